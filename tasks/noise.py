"""Noise in rewards and labels, all of it seeded: what only training sees."""

import torch

from tasks import InputError

PSEUDO_LABEL = "_pseudo_label"  # a column of ours beside the user's


def noisy_scores(scores, fp, fn, outlier, generator):
    """Scores as a careless judge would give them: (B,) -> (B,). [ours]

    fp, fn: the probability that a 0 becomes 1, and a 1 becomes 0; InputError for other scores.
    outlier (p, scale): with probability p a score loses scale * U(0, 1), a heavy negative tail.
    """
    # The same numbers are drawn whatever the scores are: two algorithms meet the same noise.
    flip, hit, size = torch.rand(3, len(scores), generator=generator)
    if fp or fn:
        odd = ((scores != 0) & (scores != 1)).nonzero().flatten().tolist()
        if odd:
            flags = "--reward-noise-fp, --reward-noise-fn: they flip 0/1 scores"
            found = f"found {scores[odd[0]]:g} in row {odd[0]} of the batch"
            raise InputError(f"{flags}, {found}; expected both at 0 for such a reward")
        scores = torch.where(flip < torch.where(scores == 1, fn, fp), 1 - scores, scores)
    return scores - (hit < outlier[0]).float() * outlier[1] * size


def prompt_offsets(prompt_ids, scale, vocab_size, seed):
    """A level of the scores that depends on the prompt alone, as a reward model's does. [ours]

    prompt_ids: B lists of int -> (B,): scale * (1 + sin 2z) / 2, z the sum of a seeded N(0, 1)
    weight of each distinct token, over the root of their number. A critic that reads the prompt can
    learn it, a batch's statistics cannot.
    """
    weights = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    distinct = [list(set(ids)) for ids in prompt_ids]
    z = torch.stack([weights[ids].sum() / len(ids) ** 0.5 for ids in distinct])
    # A sine: the words that all prompts share shift it and cannot saturate it.
    return scale * (1 + (2 * z).sin()) / 2


def pseudo_labels(answers, share, generator):
    """A list of labels as a majority vote would leave it: a fixed share replaced by others. [ours]

    Raises InputError if all are the same.
    """
    if share and len(set(map(str, answers))) < 2:
        expected = "expected at least two different values in the column 'answer', found one"
        raise InputError(f"--pseudo-label-noise: {expected}")
    labels = list(answers)
    order = torch.randperm(len(answers), generator=generator)
    for row in order[: round(share * len(answers))].tolist():
        while str(labels[row]) == str(answers[row]):
            labels[row] = answers[int(torch.randint(len(answers), (1,), generator=generator))]
    return labels
