"""tasks/builtin.py: rows that are right, seeded and distinct, and a tokenizer that takes them."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.builtin import task_rows, task_tokenizer
from tasks.prompts import encode_prompts
from tasks.verifiers import exact_reward, math_reward, text_of


@pytest.mark.parametrize("task", ["sums", "dialogue"])
@pytest.mark.parametrize("split", ["warm", "train", "test", "ood"])
def test_task_rows_are_right_and_their_answers_earn_the_reward(task, split):
    for row in task_rows(task, split, 50, seed=3):
        reward = {"sums": math_reward, "dialogue": exact_reward}[task]
        assert reward([row["prompt"]], [row["completion"]], [row["answer"]]) == [1.0]
        assert reward([row["prompt"]], [row["completion"] + "1"], [row["answer"]]) == [0.0]
        if task == "sums":
            assert eval(row["prompt"][:-1]) == int(row["answer"])  # our own text, not a model's
        else:
            said = [m["content"] for m in row["prompt"] if m["role"] == "user"]
            assert said[-1] == "book"
            words = row["answer"].split()
            assert dict(zip(words[::2], words[1::2])) == dict(map(str.split, said[:-1]))


@pytest.mark.parametrize("task", ["sums", "dialogue", "booking"])
def test_tasks_are_seeded_and_prompts_distinct(task):
    test = task_rows(task, "test", 40, seed=0)
    assert test == task_rows(task, "test", 40, seed=0) != task_rows(task, "test", 40, seed=1)
    assert len({str(row["prompt"]) for row in test}) == 40


def test_out_of_domain_is_longer():
    for task, length in (("dialogue", len), ("sums", lambda prompt: prompt.count("+"))):
        near, far = (
            [length(row["prompt"]) for row in task_rows(task, split, 200, seed=0)]
            for split in ("train", "ood")
        )
        assert min(far) > max(near)


@pytest.mark.parametrize("task", ["sums", "dialogue", "booking"])
def test_task_tokenizer_round_trips_through_a_folder(task, tmp_path):
    tokenizer = task_tokenizer(task)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    (row,) = task_rows(task, "ood", 1, seed=0)
    said = text_of(row["completion"])
    ids = loaded(said)["input_ids"]
    assert ids == tokenizer(said)["input_ids"] and loaded.pad_token_id not in ids
    assert loaded.decode(ids) == said
    assert encode_prompts([row["prompt"]], loaded) == encode_prompts([row["prompt"]], tokenizer)


def test_tasks_need_no_json_tricks():
    """Rows survive json, as a data file of one's own would hold them."""
    (row,) = task_rows("dialogue", "train", 1, seed=0)
    assert json.loads(json.dumps(row)) == row
