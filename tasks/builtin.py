"""The built-in tasks: seeded examples of any number, a small tokenizer, a reward."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.booking import SLOTS, another_value, booking_reward, booking_row, scripted_user, turns
from tasks.verifiers import exact_reward, math_reward

# Per split: the least and the largest number of terms, user turns or slots, and the share of long
# sums or of turns that revise an earlier one.
TASKS = {
    "sums": dict(warm=(2, 3, 0.1), train=(2, 4, 0.0), test=(2, 4, 0.0), ood=(5, 6, 0.0)),
    "dialogue": dict(warm=(2, 5, 0.03), train=(2, 5, 0.5), test=(2, 5, 0.5), ood=(6, 8, 0.5)),
    "booking": dict(warm=(3, 4, 0.03), train=(3, 4, 0.5), test=(3, 4, 0.5), ood=(5, 5, 0.5)),
}

# The reward, and the user between the policy's turns if there are several.
BUILT_IN = {
    "sums": (math_reward, None),
    "dialogue": (exact_reward, None),
    "booking": (booking_reward, scripted_user),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} <eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sums_row(length, rare, rng):
    """`12+7+40=` -> `19,59#59`: running totals and then the answer."""
    if rng.random() < rare:
        length = rng.randint(4, 6)
    terms = [rng.randint(1, 20) for _ in range(length)]
    totals = [str(sum(terms[: i + 1])) for i in range(1, length)]
    prompt = "+".join(map(str, terms)) + "="
    completion = ",".join(totals) + "#" + totals[-1]
    return {"prompt": prompt, "answer": totals[-1], "completion": completion}


def dialogue_row(length, rare, rng):
    """A user fills slots in `length` turns, sometimes one again, and asks for what stands then."""
    values = {}
    messages = []
    for _ in range(length):
        unset = [slot for slot in SLOTS if slot not in values]
        revise = values and (not unset or rng.random() < rare)
        slot = rng.choice(list(values) if revise else unset)
        values[slot] = another_value(slot, values.get(slot), rng)
        messages += turns(user=f"{slot} {values[slot]}", assistant="ok")
    messages += turns(user="book")
    answer = " ".join(f"{slot} {values[slot]}" for slot in SLOTS if slot in values)
    return {"prompt": messages, "answer": answer, "completion": answer}


def task_row(task, split, rng):
    """One example, {prompt, answer or replies, completion}; rng: a random.Random. [ours]"""
    low, high, rare = TASKS[task][split]
    row = {"sums": sums_row, "dialogue": dialogue_row, "booking": booking_row}[task]
    return row(rng.randint(low, high), rare, rng)


def task_rows(task, split, num_rows, seed):
    """num_rows examples with distinct prompts, the same for the same seed."""
    rng = random.Random(f"{task}/{split}/{seed}")
    rows = {}
    while len(rows) < num_rows:
        row = task_row(task, split, rng)
        rows[str(row["prompt"])] = row
    return list(rows.values())


def task_tokenizer(task):
    """A small real tokenizer: characters for sums, words and a chat template for the others."""
    words = list("0123456789+=,#")
    if task != "sums":
        words = [*SLOTS, *(value for values in SLOTS.values() for value in values), "ok", "book"]
    special = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    if task == "sums":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", extra_special_tokens=special[3:], **names
    )
    if task != "sums":
        fast.chat_template = CHAT_TEMPLATE
    return fast
