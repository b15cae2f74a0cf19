"""tasks/rewards.py: what a reward gets and may give, where it is found, and whose modules it sees."""

import math
from fractions import Fraction

import numpy
import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForSequenceClassification, LlamaConfig

from tasks import InputError
from tasks.builtin import task_tokenizer
from tasks.rewards import load_function, load_reward, needed_parameters, score
from tasks.verifiers import exact_reward, math_reward


def test_whole_conversations_reach_the_reward_as_they_are():
    said = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    seen = []
    reward = lambda prompts, completions: seen.extend(completions) or [1.0] * len(completions)
    score(reward, {"prompt": [[{"role": "user", "content": "x"}]] * 2}, [said, "c"])
    assert seen == [said, said[-1:]]
    assert exact_reward(["x"], [said], ["c"]) == [1.0]  # the last turn is the answer


def test_columns_reach_the_reward_and_conversations_stay_conversations():
    seen = {}

    def reward(prompts, completions, level, **columns):
        seen.update(prompts=prompts, completions=completions, level=level, others=columns)
        return [True, 0]

    prompts = ["text", [{"role": "user", "content": "hi"}]]
    assert score(
        reward, {"prompt": prompts, "level": [1, 2], "more": ["x", "y"]}, ["a", "b"]
    ).tolist() == [1.0, 0.0]
    assert (
        seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]
        and seen["level"] == [1, 2]
        and seen["others"] == {"more": ["x", "y"]}
    )


@pytest.mark.parametrize(
    "returned,found",
    [
        ([1.0], "1 values"),
        (1.0, "float"),
        (None, "NoneType"),
        ([1.0, float("nan")], "row 1.*nan"),
        ([float("inf"), 0], "row 0.*inf"),
        ([0, "1.0"], "row 1.*'1.0'"),
        ([0, None], "row 1.*None"),
        ([0, [1]], r"row 1.*\[1\]"),
        ([1e39, 0], "row 0.*1e.39"),
        ([0, 10**400], "row 1"),
        (torch.tensor(1.0), "Tensor"),
        ("ab", "str"),
    ],
)
def test_bad_reward_values_are_one_line_with_the_row(returned, found):
    with pytest.raises(InputError, match=f"--reward: .*{found}"):
        score(lambda prompts, completions, **columns: returned, {"prompt": ["p", "q"]}, ["a", "b"])


def test_rewards_may_be_tensors_and_a_missing_column_is_named():
    assert score(
        lambda prompts, completions, **columns: torch.tensor([0.5, 2.0]),
        {"prompt": ["p", "q"]},
        ["a", "b"],
    ).tolist() == [0.5, 2.0]
    with pytest.raises(InputError, match="--reward: it raised ZeroDivisionError"):
        score(lambda prompts, completions, **columns: [1 / 0], {"prompt": ["p"]}, ["a"])
    assert score(
        lambda prompts, completions, **columns: [len(columns)],
        {"prompt": ["p"], "completions": [1], "prompts": [2]},
        ["a"],
    ).tolist() == [0.0]
    with pytest.raises(InputError, match="needs the column 'answer'; the data set has level"):
        score(math_reward, {"prompt": ["p"], "level": [1]}, ["a"])


def test_plain_numbers_of_any_kind_are_scores():
    values = [
        True,
        1,
        0.5,
        numpy.float32(0.25),
        numpy.int64(2),
        numpy.bool_(False),
        torch.tensor(3.0),
        torch.tensor([4]),
        numpy.array(5.0),
        Fraction(1, 2),
    ]
    expected = [1, 1, 0.5, 0.25, 2, 0, 3, 4, 5, 0.5]
    batch, texts = {"prompt": ["p"] * len(values)}, ["a"] * len(values)
    for returned in (values, tuple(values)):
        assert score(lambda prompts, **columns: returned, batch, texts).tolist() == expected  # noqa: B023
    for returned in (
        numpy.array(expected),
        numpy.array(expected, dtype=object),
        torch.tensor(expected, dtype=torch.float64),
    ):
        assert score(lambda prompts, **columns: returned, batch, texts).tolist() == expected  # noqa: B023


@pytest.mark.parametrize("prompt", ["how many", [{"role": "user", "content": "how \n many"}]])
def test_a_score_that_is_no_number_is_named_with_its_prompt(prompt):
    with pytest.raises(
        InputError,
        match="--reward: row 1 of the batch, 'how many': expected a finite number, found 'nan'",
    ):
        score(lambda prompts, **columns: [1, math.nan], {"prompt": ["p", prompt]}, ["a", "b"])


def test_what_a_reward_raises_is_named_with_its_file_and_line():
    def reward(prompts, level, **columns):
        return [1 / value for value in level]

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(
        InputError,
        match=rf"--reward: it raised ZeroDivisionError: .* \(test_rewards.py, line {line}[,)]",
    ):
        score(reward, {"prompt": ["p", "q", "r", "s"], "level": [1, 2, 0, 0]}, ["a"] * 4)


def test_load_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    assert load_reward("my_reward:short")(["p"], ["abc"]) == [-3]
    assert load_reward("math") is math_reward
    (tmp_path / "broken.py").write_text("def f(:\n")
    for wrong in (
        "maths",
        "my_reward:long",
        "broken:f",
        "my_reward:__name__",
        "no_such_module:f",
        ":f",
        "model:",
        "model:/no/such/folder",
    ):
        with pytest.raises(InputError, match="--reward"):
            load_reward(wrong)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_model_reward_reads_the_last_real_token_whatever_the_batch(tmp_path, num_labels):
    torch.manual_seed(0)
    tokenizer = task_tokenizer("dialogue")
    tokenizer.chat_template = None
    config = LlamaConfig(
        **{
            **tiny_config("llama", len(tokenizer)).to_dict(),
            "num_labels": num_labels,
            "pad_token_id": 0,
        }
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"model:{tmp_path}")
    prompts, completions = (
        ["area north", [{"role": "user", "content": "food thai food greek"}]],
        ["ok", [{"role": "assistant", "content": "book book book"}]],
    )
    together = score(reward, {"prompt": prompts}, ["ok", "book book book"])
    alone = [reward([prompt], [completion])[0] for prompt, completion in zip(prompts, completions)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert num_labels == 1 or all(0 < value < 1 for value in alone)
    assert (
        len(reward(["area north"], ["food " * 200])) == 1
    )  # longer than the model's context: its start is cut


def test_a_causal_lm_is_no_reward_model(model_folder):
    with pytest.raises(
        InputError, match="--reward: .*expected a sequence classifier, found GPT2LMHeadModel"
    ):
        load_reward(f"model:{model_folder}")
