"""tasks/booking.py: examples that the scripted user would answer so, and bookings by hand."""

import json

import pytest

from tasks.booking import booking_reward, scripted_user
from tasks.builtin import task_rows


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
