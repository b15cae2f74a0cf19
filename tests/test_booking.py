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
        assert booking_reward([row["prompt"]], [row["completion"][-1:]]) == [
            0.0
        ]  # booked what nobody has said
    assert len({m["content"] for m in row["completion"]}) == len(row["completion"])


def test_bookings_by_hand():
    prompt = [{"role": "user", "content": "book food thai area day"}]
    say = lambda *turns: [
        {"role": role, "content": text} for role, text in zip(("assistant", "user") * 4, turns)
    ]
    talk = ("area", "area north", "day", "day friday food greek")
    for last, right in (
        ("book area north food greek day friday", 1.0),
        ("book area north food thai day friday", 0.0),  # an old value
        ("book food greek area north day friday", 0.0),
        ("area north food greek day friday", 0.0),
        ("", 0.0),
    ):
        assert booking_reward([prompt], [say(*talk, last)]) == [right]
    assert booking_reward([prompt], [say("area", "area north", "book area north food thai")]) == [
        0.0
    ]  # the day was never asked for
    assert booking_reward([prompt], [say("hello", "ok", "book area None food thai day None")]) == [
        0.0
    ]
    replies = json.dumps({"area": "area north"})
    assert [
        scripted_user(say(text), replies)
        for text in ("area", " area ", "day", "area area", "", "book", "book area")
    ] == ["area north", "area north", "ok", "ok", "ok", None, None]
