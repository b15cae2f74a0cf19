"""Prompts: from a file, a hub name or a built-in task to token ids."""

import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset

from tasks import InputError, one_line
from tasks.builtin import task_rows

PROMPT_IDS = "_prompt_ids"  # a column of ours beside the user's


def load_data(flag, name, split, config=None, prompt_column="prompt"):
    """A data set whose prompts stand in the column prompt; raises InputError naming the flag.

    name: a hub name, perhaps with a config; a json, jsonl or parquet file; or a built-in task with
    split (split, number of rows, seed). prompt_column: the one that is renamed to prompt.
    """
    try:
        data = read_rows(name, split, config)
    except Exception as error:  # datasets raises many kinds; the cause of the last one says most
        text = one_line(error.__cause__ or error)
        raise InputError(f"{flag}: cannot load {name!r}: {text}") from error
    if prompt_column not in data.column_names or len(data) == 0:
        expected = f"{name!r}: expected a column {prompt_column!r} (--prompt-column) and a row"
        found = f"found {len(data)} rows of {', '.join(data.column_names) or 'nothing'}"
        raise InputError(f"{flag}: {expected}, {found}")
    if prompt_column == "prompt":
        return data
    others = [column for column in data.column_names if column != "prompt"]
    return data.select_columns(others).rename_column(prompt_column, "prompt")


def read_rows(name, split, config):
    """The data set behind a name; raises whatever is wrong with it."""
    if isinstance(split, tuple):
        return Dataset.from_list(task_rows(name, *split)).remove_columns("completion")
    path = Path(name)
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None and path.is_file():
        raise ValueError("expected a json, jsonl or parquet file")
    if kind is None:
        return load_dataset(name, config, split=split)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if config:
        raise ValueError(f"a file has no config, found {config!r}")
    if kind == "json" and broken_line(path):
        raise ValueError(broken_line(path))
    return load_dataset(kind, data_files=name, split=split)


def broken_line(path):
    """Which line of a json file is not UTF-8, or of a jsonl file no object, as text; or None."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                found = json.loads(text) if path.suffix == ".jsonl" and text.strip() else {}
            except ValueError as error:  # of UTF-8, or of JSON
                return f"line {number}: {one_line(error)}"
            if not isinstance(found, dict):
                return f"line {number}: expected an object, found {one_line(found)[:40]!r}"
    return None


def load_prompts(flag, name, split, tokenizer, max_tokens, use_chat_template=True, **source):
    """load_data with the prompts' ids in a column; longer ones than max_tokens are left out.

    Their number is printed. source: config, prompt_column. Raises InputError.
    """
    data = load_data(flag, name, split, **source)
    try:
        prompt_ids = encode_prompts(data["prompt"], tokenizer, use_chat_template)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    data = data.add_column(PROMPT_IDS, prompt_ids)
    fitting = [row for row, ids in enumerate(prompt_ids) if len(ids) <= max_tokens]
    if len(fitting) == len(data):
        return data
    expected = f"expected at most {max_tokens} tokens, the context less --response-length"
    if not fitting:
        found = f"all prompts are too long, the first of {len(prompt_ids[0])} tokens"
        raise InputError(f"{flag}: row 0: {found}; {expected}")
    print(f"{flag}: {len(data) - len(fitting)} of {len(data)} prompts left out, {expected}")
    return data.select(fitting)


def encode_prompts(prompts, tokenizer, use_chat_template=True):
    """Token ids of prompts, str or lists of {role, content}; raises InputError naming the row.

    Messages go through the chat template, and so does a text if the model has one.
    """
    templated = tokenizer.chat_template and use_chat_template
    encoded = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str) and prompt and not templated:
            ids = tokenizer(prompt)["input_ids"]
        else:  # the template writes its own special tokens: no second BOS
            text = render_chat(prompt, tokenizer, row)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"row {row}: the prompt has no tokens: {prompt!r}")
        encoded.append(ids)
    return encoded


def as_messages(prompt):
    """A prompt's messages: a text is one user's message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt


def is_message(found):
    keys = ("role", "content")
    return isinstance(found, dict) and all(isinstance(found.get(key), str) for key in keys)


def render_chat(prompt, tokenizer, row=0):
    """The text of a prompt after the tokenizer's chat template; raises InputError."""
    messages = as_messages(prompt)
    if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
        found = f"expected a text or a list of {{role, content}}, found {str(prompt)[:80]!r}"
        raise InputError(f"row {row}: prompt: {found}")
    if not tokenizer.chat_template:
        raise InputError(f"row {row}: prompt: messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author
        found = f"the chat template refuses it: {one_line(error)}"
        raise InputError(f"row {row}: prompt: {found}") from error


def batch_rows(num_rows, first, count, seed):
    """The rows of a batch: one seeded permutation of the data after another, from `first` on.

    So there is nothing to remember but how many were drawn.
    """
    rows = []
    while len(rows) < count:
        epoch, start = divmod(first + len(rows), num_rows)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(num_rows, generator=generator)
        rows += order[start : start + count - len(rows)].tolist()
    return rows


def assert_known_ids(data, vocab_size):
    """Raises InputError where a prompt holds a token that the model has no embedding for."""
    for row, ids in enumerate(data[PROMPT_IDS]):
        if max(ids) >= vocab_size:
            expected = f"expected token ids below {vocab_size}, the model's vocabulary"
            found = f"found {max(ids)} in the prompt {data['prompt'][row]!r}"
            raise InputError(f"--model-name-or-path: {expected}, {found[:120]}")
