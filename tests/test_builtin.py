"""tasks/builtin.py: rows that are right, seeded and distinct, a tokenizer, bookings by hand."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.builtin import booking_reward, scripted_user, task_rows, task_tokenizer
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


@pytest.mark.parametrize("split", ["warm", "train", "test", "ood"])
def test_booking_examples_are_what_the_scripted_user_answers_and_earn_the_reward(split):
    for row in task_rows("booking", split, 50, seed=3):
        messages = list(row["prompt"])
        for policy, user in zip(row["completion"][::2], [*row["completion"][1::2], None]):
            messages.append(policy)
            assert scripted_user(messages, replies=row["replies"]) == (user and user["content"])
            messages += [user] if user else []
        assert booking_reward([row["prompt"]], [row["completion"]]) == [1.0]
        assert booking_reward([row["prompt"]], [row["completion"][:-1]]) == [0.0]  # nothing booked
        # Booked what nobody has said.
        assert booking_reward([row["prompt"]], [row["completion"][-1:]]) == [0.0]
    assert len({m["content"] for m in row["completion"]}) == len(row["completion"])


def said(*turns):
    """Messages of the policy and the user in turn."""
    roles = ("assistant", "user") * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


TALK = ("area", "area north", "day", "day friday food greek")
BOOKED = [
    ((*TALK, "book area north food greek day friday"), 1.0),
    ((*TALK, "book area north food thai day friday"), 0.0),  # an old value
    ((*TALK, "book food greek area north day friday"), 0.0),
    ((*TALK, "area north food greek day friday"), 0.0),
    ((*TALK, ""), 0.0),
    (("area", "area north", "book area north food thai"), 0.0),  # the day was never asked for
    (("hello", "ok", "book area None food thai day None"), 0.0),
]


@pytest.mark.parametrize("turns,right", BOOKED)
def test_bookings_by_hand(turns, right):
    prompt = [{"role": "user", "content": "book food thai area day"}]
    assert booking_reward([prompt], [said(*turns)]) == [right]


HEARD = {
    "area": "area north",
    " area ": "area north",
    "day": "ok",
    "area area": "ok",
    "": "ok",
    "book": None,
    "book area": None,
}


@pytest.mark.parametrize("text", HEARD)
def test_the_scripted_user_by_hand(text):
    replies = json.dumps({"area": "area north"})
    assert scripted_user(said(text), replies) == HEARD[text]
