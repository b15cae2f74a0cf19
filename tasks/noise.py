"""Noise in rewards and labels, all of it seeded: what only training sees."""

import torch

from tasks import InputError

PSEUDO_LABEL = "_pseudo_label"  # a column of ours beside the user's


def noisy_scores(scores, fp, fn, outlier, generator):
    """Scores (B,) as a careless judge gives them: with fp a 0 is 1, with fn a 1 is 0. [ours]

    outlier (p, scale): with probability p a score loses scale * U(0, 1), a heavy negative tail.
    """
    # The same numbers are drawn whatever the scores are: two algorithms meet the same noise.
    flip, hit, size = torch.rand(3, len(scores), generator=generator)
    assert_flippable(scores, fp, fn)
    scores = torch.where(flip < torch.where(scores == 1, fn, fp), 1 - scores, scores)
    return scores - (hit < outlier[0]).float() * outlier[1] * size


def prompt_offsets(prompt_ids, scale, vocab_size, seed):
    """What the prompt alone adds to a score: (B,). A critic can learn it, no batch's mean. [ours]

    z: the sum of a seeded N(0, 1) weight of each distinct token, over the root of their number.
    """
    weights = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    z = torch.stack([weights[list(ids)].sum() / len(ids) ** 0.5 for ids in map(set, prompt_ids)])
    # A sine: the words that all prompts share shift it and cannot saturate it.
    return scale * (1 + (2 * z).sin()) / 2


def pseudo_labels(answers, share, generator):
    """Labels as a majority vote would leave them: a fixed share replaced by others. [ours]"""
    if share and len(set(map(str, answers))) < 2:
        raise InputError("--pseudo-label-noise: expected different values in 'answer', found one")
    labels = list(answers)
    order = torch.randperm(len(answers), generator=generator)
    for row in order[: round(share * len(answers))].tolist():
        while str(labels[row]) == str(answers[row]):
            labels[row] = answers[int(torch.randint(len(answers), (1,), generator=generator))]
    return labels


def assert_flippable(scores, fp, fn):
    """Raises InputError where scores (B,) are to be flipped and one of them is not 0 or 1."""
    odd = scores[(scores != 0) & (scores != 1)]
    if (fp or fn) and len(odd):
        raise InputError(f"--reward-noise-fp or -fn: expected 0/1 scores, found {odd[0]:g}")
