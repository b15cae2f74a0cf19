"""The built-in tasks: seeded examples of any number, a small tokenizer, a reward."""

import json
import random
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks import as_messages
from tasks.verifiers import exact_reward, math_reward, text_of

# Per split: least and most terms, user turns or slots, and the share of long sums or of turns that
# revise an earlier one. The warm start knows both, a little: something is left for RL to learn.
TASKS = {
    "sums": dict(warm=(2, 3, 0.1), train=(2, 4, 0.0), test=(2, 4, 0.0), ood=(5, 6, 0.0)),
    "dialogue": dict(warm=(2, 5, 0.03), train=(2, 5, 0.5), test=(2, 5, 0.5), ood=(6, 8, 0.5)),
    "booking": dict(warm=(3, 4, 0.03), train=(3, 4, 0.5), test=(3, 4, 0.5), ood=(5, 5, 0.5)),
}
SLOTS = {
    "area": "north south east west".split(),
    "food": "thai greek indian french".split(),
    "price": "cheap fair dear".split(),
    "day": "monday tuesday friday sunday".split(),
    "people": "two three four five six".split(),
}
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
CHAT_TEMPLATE += "{% if message['role'] == 'assistant' %} <eos>{% endif %} {% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def sums_row(length, odd, rng):
    """`12+7+40=` -> `19,59#59`: running totals and then the answer."""
    if rng.random() < odd:
        length = rng.randint(4, 6)
    terms = [rng.randint(1, 20) for _ in range(length)]
    totals = [str(sum(terms[: i + 1])) for i in range(1, length)]
    prompt, completion = "+".join(map(str, terms)) + "=", ",".join(totals) + "#" + totals[-1]
    return {"prompt": prompt, "answer": totals[-1], "completion": completion}


def in_order(values):
    return " ".join(f"{slot} {values[slot]}" for slot in SLOTS if slot in values)


def dialogue_row(length, odd, rng):
    """A user fills slots in `length` turns, sometimes one again, and asks for what stands then."""
    values, messages = {}, []
    for _ in range(length):
        unset = [slot for slot in SLOTS if slot not in values]
        revise = values and (not unset or rng.random() < odd)
        slot = rng.choice(list(values) if revise else unset)
        values[slot] = rng.choice([value for value in SLOTS[slot] if value != values.get(slot)])
        messages += as_messages(f"{slot} {values[slot]}") + as_messages("ok", "assistant")
    messages += as_messages("book")
    return {"prompt": messages, "answer": in_order(values), "completion": in_order(values)}


def booking_row(num_slots, odd, rng):
    """`book area food thai`: ask `area`, hear `area north`, perhaps also `food greek`, and book."""
    values = {slot: rng.choice(SLOTS[slot]) for slot in rng.sample(list(SLOTS), num_slots)}
    known = sorted(rng.sample([*values], rng.randint(1, num_slots - 1)), key=[*values].index)
    opening = " ".join(f"{slot} {values[slot]}" if slot in known else slot for slot in values)
    replies, completion = {}, []
    for slot in [slot for slot in values if slot not in known]:
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
        words = " ".join(heard).split()
        # None: the user has named the slot, and not said which.
        values = dict.fromkeys(word for word in words if word in SLOTS)
        values |= {slot: word for slot, word in pairwise(words) if word in SLOTS.get(slot, ())}
        right = text_of(completion).split() == ["book", *in_order(values).split()]
        scores.append(float(right and None not in values.values()))
    return scores


BUILT_IN = {  # a row, its reward, and the user between the policy's turns if there are several
    "sums": (sums_row, math_reward, None),
    "dialogue": (dialogue_row, exact_reward, None),
    "booking": (booking_row, booking_reward, scripted_user),
}


def task_rows(task, split, num_rows, seed):
    """Seeded {prompt, answer or replies, completion} with num_rows distinct prompts. [ours]"""
    rng = random.Random(f"{task}/{split}/{seed}")
    make_row, (low, high, odd) = BUILT_IN[task][0], TASKS[task][split]
    rows = {}
    while len(rows) < num_rows:
        row = make_row(rng.randint(low, high), odd, rng)
        rows[str(row["prompt"])] = row
    return list(rows.values())


def task_tokenizer(task):
    """A small real tokenizer: characters for sums, words and a chat template for the others."""
    words = "0123456789+=,#" if task == "sums" else [*sum(SLOTS.values(), [*SLOTS]), "ok", "book"]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    roles = ["<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*names.values(), *roles, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if task == "sums":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
    options = {"unk_token": "<pad>", "padding_side": "left", "extra_special_tokens": roles, **names}
    options["chat_template"] = None if task == "sums" else CHAT_TEMPLATE
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
