"""The built-in task booking: the policy asks a scripted user slot by slot, and then books."""

import json

from tasks.verifiers import text_of

SLOTS = {
    "area": "north south east west".split(),
    "food": "thai greek indian french".split(),
    "price": "cheap fair dear".split(),
    "day": "monday tuesday friday sunday".split(),
    "people": "two three four five six".split(),
}


def booking_row(num_slots, rare, rng):
    """`book area food thai` -> ask for `area`, hear `area north`, and so on; then book.

    With probability rare the user also changes an earlier slot: `area north food greek`.
    """
    values = {slot: rng.choice(SLOTS[slot]) for slot in rng.sample(list(SLOTS), num_slots)}
    given = set(rng.sample(list(values), rng.randint(1, num_slots - 1)))
    opening = " ".join(f"{slot} {values[slot]}" if slot in given else slot for slot in values)
    known = [slot for slot in values if slot in given]
    replies = {}
    completion = []
    for slot in values:
        if slot in given:
            continue
        replies[slot] = f"{slot} {values[slot]}"
        if rng.random() < rare:
            changed = rng.choice(known)
            values[changed] = another_value(changed, values[changed], rng)
            replies[slot] += f" {changed} {values[changed]}"
        known.append(slot)
        completion += turns(assistant=slot, user=replies[slot])
    booked = " ".join(f"{slot} {values[slot]}" for slot in SLOTS if slot in values)
    completion += turns(assistant=f"book {booked}")
    prompt = turns(user=f"book {opening}")
    return {"prompt": prompt, "replies": json.dumps(replies), "completion": completion}


def turns(**said):
    """Messages of what the roles say, in the order given."""
    return [{"role": role, "content": content} for role, content in said.items()]


def another_value(slot, value, rng):
    return rng.choice([other for other in SLOTS[slot] if other != value])


def scripted_user(messages, replies, **columns):
    """Answers a slot's name with its value, anything else with ok, and leaves after a booking."""
    said = messages[-1]["content"]
    if said.startswith("book"):
        return None
    return json.loads(replies).get(said.strip(), "ok")


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
        expected = "".join(f" {slot} {values[slot]}" for slot in SLOTS if slot in values)
        right = text_of(completion).split() == ["book", *expected.split()]
        scores.append(float(right and None not in values.values()))
    return scores
