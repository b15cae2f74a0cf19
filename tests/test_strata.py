"""Accuracy by stratum, by hand, and in a row of the laboratory."""

import pytest
import torch

from experiments.strata import by_stratum, unevenness
from tasks import as_messages


def test_strata_by_hand():
    prompts = []
    for said in ("food thai", "day monday day sunday", "food thai day friday"):
        words = said.split()
        messages = [turn for at in range(0, len(words), 2) for turn in turns_of(words[at : at + 2])]
        prompts.append(messages + as_messages("book"))
    strata = by_stratum(prompts, torch.tensor([1.0, 0.0, 1.0]))
    turns, changes = {"1 turns": [1, 1], "2 turns": [1, 2]}, {"0 changes": [2, 2]}
    assert strata == turns | changes | {"1 changes": [0, 1]}
    # 2/3 in all; 1 of one and 1/2 of two: (1/9 + 2/36) / 3 = 1/18.
    assert unevenness(strata, "turns") == pytest.approx(18**-0.5)
    assert unevenness(strata, "changes") == pytest.approx((2 / 9) ** 0.5)


def turns_of(words):
    return as_messages(" ".join(words)) + as_messages("ok", "assistant")
