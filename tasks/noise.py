"""Noise in rewards and labels, all of it seeded: what only training sees."""

from string import ascii_uppercase

import torch

from tasks import InputError
from tasks.verifiers import choice_reward, meaning, options_of

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

    At 1.05 right ranks above wrong in 77 of 100 pairs of a domain, 67 of two; the paper's: 72.
    """
    seeds = [1_000_003 * seed + domain for domain in domains]
    drawn = [torch.randn(3, generator=torch.Generator().manual_seed(own)) for own in seeds]
    level, slope, noise = torch.stack(drawn).unbind(dim=1)
    error = scale * (0.8 * noise).exp() * torch.randn(len(scores), generator=generator)
    return level + (0.5 * slope).exp() * scores + error


def pseudo_labels(columns, reward, share, generator):
    """Labels as a majority vote would leave them: a fixed share means something else. [ours]

    Wrong is, for the reward choice, a letter of the row's own options, else another row's answer.
    """
    answers, chooses = columns.get("answer", []), reward is choice_reward
    choices = columns.get("choices") or [None] * len(answers)
    meant = [meaning(reward, *pair) for pair in zip(answers, choices)]
    options = [ascii_uppercase[: len(options_of(own)[0])] if chooses else "" for own in choices]
    labels, distinct = list(meant if chooses else answers), {*meant}
    if share and min((len(own or distinct) for own in options), default=0) < 2:
        raise InputError("expected two different values of 'answer' or options, found fewer")
    order, everywhere = torch.randperm(len(labels), generator=generator), [*zip(labels, meant)]
    for row in order[: round(share * len(labels))].tolist():
        others, means = [*zip(options[row], options[row])] or everywhere, meant[row]
        while means == meant[row]:
            labels[row], means = others[int(torch.randint(len(others), (1,), generator=generator))]
    return labels


def assert_flippable(scores, fp, fn):
    """Raises InputError where scores (B,) are to be flipped and one of them is not 0 or 1."""
    odd = scores[(scores != 0) & (scores != 1)]
    if (fp or fn) and len(odd):
        raise InputError(f"--reward-noise-fp or -fn: expected 0/1 scores, found {odd[0]:g}")
