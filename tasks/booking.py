"""The built-in task booking: the policy asks a scripted user slot by slot, and then books."""

import json

from tasks import as_messages
from tasks.verifiers import text_of

SLOTS = {
    "area": "north south east west".split(),
    "food": "thai greek indian french".split(),
    "price": "cheap fair dear".split(),
    "day": "monday tuesday friday sunday".split(),
    "people": "two three four five six".split(),
}


def in_order(values):
    return " ".join(f"{slot} {values[slot]}" for slot in SLOTS if slot in values)


def booking_row(num_slots, odd, rng):
    """`book area food thai`: ask `area`, hear `area north`, perhaps also `food greek`, and book."""
    values = {slot: rng.choice(SLOTS[slot]) for slot in rng.sample(list(SLOTS), num_slots)}
    given = set(rng.sample(list(values), rng.randint(1, num_slots - 1)))
    opening = " ".join(f"{slot} {values[slot]}" if slot in given else slot for slot in values)
    known = [slot for slot in values if slot in given]
    replies, completion = {}, []
    for slot in [slot for slot in values if slot not in given]:
        replies[slot] = f"{slot} {values[slot]}"
        if rng.random() < odd:
            changed = rng.choice(known)
            values[changed] = rng.choice([v for v in SLOTS[changed] if v != values[changed]])
            replies[slot] += f" {changed} {values[changed]}"
        known.append(slot)
        completion += as_messages(slot, "assistant") + as_messages(replies[slot])
    completion += as_messages(f"book {in_order(values)}", "assistant")
    prompt = as_messages(f"book {opening}")
    return {"prompt": prompt, "replies": json.dumps(replies), "completion": completion}


def scripted_user(messages, replies, **columns):
    """Answers a slot's name with its value, anything else with ok, and leaves after a booking."""
    said = messages[-1]["content"]
    return None if said.startswith("book") else json.loads(replies).get(said.strip(), "ok")


def booking_reward(prompts, completions, **columns):
    """1.0 where the last turn books every slot the user named, as the user said last, else 0.0."""
    scores = []
    for prompt, completion in zip(prompts, completions):
        heard = [turn["content"] for turn in [*prompt, *completion] if turn["role"] == "user"]
        values = {}  # of the slots that were named; None: the user has not said which
        for word in " ".join(heard).split():
            if word in SLOTS:
                slot = word
                values.setdefault(slot)
            elif word not in ("book", "ok"):
                values[slot] = word
        right = text_of(completion).split() == ["book", *in_order(values).split()]
        scores.append(float(right and None not in values.values()))
    return scores
