"""Noise in rewards and labels, all of it seeded: what only training sees."""

import torch

from tasks import InputError
from tasks.verifiers import meaning

PSEUDO_LABEL = "_pseudo_label"  # a column of ours beside the user's


def noisy_scores(scores, fp, fn, outlier, generator, failure=(0.0, 0.0)):
    """Scores (B,) as a careless judge gives them: with fp a 0 is 1, with fn a 1 is 0. [ours]

    outlier (p, scale): with probability p a score loses scale * U(0, 1), to one side.
    failure (p, scale): with probability p the judge fails, and its score is -scale or scale.
    """
    # The same numbers are drawn whatever the scores are: two algorithms meet the same noise.
    flip, hit, size = torch.rand(3, *scores.shape, generator=generator)
    assert_flippable(scores, fp, fn)
    scores = torch.where(flip < torch.where(scores == 1, fn, fp), 1 - scores, scores)
    scores = scores - (hit < outlier[0]).float() * outlier[1] * size
    fails, end = torch.rand(2, *scores.shape, generator=generator)
    return torch.where(fails < failure[0], failure[1] * (2 * end.round() - 1), scores)


def model_scores(scores, domains, scale, seed, generator):
    """Scores (B,) as an uneven reward model gives them; domains: a number for each prompt.

        a_d + b_d score + s_d N(0, 1),  a ~ N(0, 1), b ~ exp(0.5 N), s ~ scale exp(0.8 N)  [ours]

    At scale 1.05 it ranks right above wrong in 77 of 100 pairs of one domain and in 67 of two; the
    paper's reward model in 72 [reported]. A critic can learn a_d and how noisy a domain is.
    """
    seeds = [1_000_003 * seed + domain for domain in domains]
    drawn = [torch.randn(3, generator=torch.Generator().manual_seed(own)) for own in seeds]
    level, slope, noise = torch.stack(drawn).unbind(dim=1)
    error = scale * (0.8 * noise).exp() * torch.randn(len(scores), generator=generator)
    return level + (0.5 * slope).exp() * scores + error


def pseudo_labels(columns, reward, share, generator):
    """Labels as a majority vote would leave them: for a fixed share another row's answer. [ours]"""
    if "answer" not in columns:
        raise InputError(f"expected a column 'answer', found {', '.join(columns)}")
    answers, choices = columns["answer"], columns.get("choices")
    labels, order = list(answers), torch.randperm(len(answers), generator=generator)
    for row in order[: round(share * len(answers))].tolist():
        options = choices and choices[row]
        right = meaning(reward, answers[row], options)
        for _ in range(10_000):
            labels[row] = answers[int(torch.randint(len(answers), (1,), generator=generator))]
            if meaning(reward, labels[row], options) not in (None, right):
                break
        else:
            raise InputError(f"row {row}: expected wrong answers in other rows, found none")
    return labels


def assert_flippable(scores, fp, fn):
    """Raises InputError where scores (B,) are to be flipped and one of them is not 0 or 1."""
    odd = scores[(scores != 0) & (scores != 1)]
    if (fp or fn) and len(odd):
        raise InputError(f"--reward-noise-fp or -fn: expected 0/1 scores, found {odd[0]:g}")
