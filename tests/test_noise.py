"""tasks/noise.py: rates, seeds, and independence of the scores."""

import pytest
import torch

from tasks import InputError
from tasks.builtin import task_rows, task_tokenizer
from tasks.noise import noisy_scores, prompt_offsets, pseudo_labels
from tasks.prompts import encode_prompts

NO_OUTLIER = (0.0, 0.0)


def test_flips_have_their_own_rates_and_noise_is_seeded():
    scores = torch.cat([torch.zeros(20_000), torch.ones(20_000)])
    noisy, again, other = (
        noisy_scores(scores, 0.1, 0.3, NO_OUTLIER, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert noisy[:20_000].mean().item() == pytest.approx(0.1, abs=0.01)
    assert noisy[20_000:].mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)
    assert torch.equal(scores, noisy_scores(scores, 0.0, 0.0, NO_OUTLIER, torch.Generator()))
    assert torch.equal(1 - scores, noisy_scores(scores, 1.0, 1.0, NO_OUTLIER, torch.Generator()))


def test_outliers_are_a_negative_tail():
    generator = torch.Generator().manual_seed(0)
    noisy = noisy_scores(torch.zeros(40_000), 0.0, 0.0, (0.3, 2.0), generator)
    assert (noisy < 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert noisy.min() >= -2 and noisy.max() == 0
    assert noisy.mean().item() == pytest.approx(-0.3, abs=0.01)


def test_noise_does_not_depend_on_the_scores_and_flips_need_0_or_1():
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noisy_scores(torch.zeros(9), 0.2, 0.2, (0.1, 1.0), a)
    noisy_scores(torch.ones(9), 0.0, 0.0, NO_OUTLIER, b)
    assert torch.equal(a.get_state(), b.get_state())
    with pytest.raises(InputError, match="--reward-noise-fp.*found 0.5"):
        noisy_scores(torch.tensor([1.0, 0.5]), 0.1, 0.0, NO_OUTLIER, torch.Generator())


def test_offsets_depend_on_the_prompt_alone_and_span_the_scale():
    rows = task_rows("dialogue", "train", 500, 0)
    tokenizer = task_tokenizer("dialogue")
    ids = encode_prompts([row["prompt"] for row in rows], tokenizer)
    offsets = prompt_offsets(ids, 3.0, len(tokenizer), 0)
    assert 0 <= offsets.min() and offsets.max() <= 3 and offsets.std() > 0.7
    assert torch.equal(prompt_offsets(ids[5:9], 3.0, len(tokenizer), 0), offsets[5:9])
    assert prompt_offsets([ids[0]] * 2, 1.0, 40, 1).diff() == 0
    assert not torch.equal(prompt_offsets(ids, 3.0, len(tokenizer), 1), offsets)
    words = torch.zeros(500, len(tokenizer))
    for row, prompt in enumerate(ids):
        words[row, prompt] = 1.0
    # Pairs of words predict most of it, on prompts not seen too.
    pairs = (words[:, :, None] * words[:, None, :]).flatten(1)
    seen = pairs[:400]
    ridge = seen.T @ seen + torch.eye(pairs.shape[1])
    weights = torch.linalg.solve(ridge, seen.T @ offsets[:400, None])
    assert (pairs[400:] @ weights - offsets[400:, None]).var() < 0.5 * offsets[400:].var()


def test_pseudo_labels_are_wrong_for_a_fixed_share():
    answers = [str(i % 7) for i in range(1000)]
    labels = pseudo_labels(answers, 0.3, torch.Generator().manual_seed(0))
    assert sum(a != b for a, b in zip(answers, labels)) == 300
    assert labels == pseudo_labels(answers, 0.3, torch.Generator().manual_seed(0)) and set(
        labels
    ) <= set(answers)
    assert pseudo_labels(answers, 0.0, torch.Generator()) == answers
    with pytest.raises(InputError, match="--pseudo-label-noise"):
        pseudo_labels(["same"] * 3, 0.5, torch.Generator())
