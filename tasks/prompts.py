"""Prompts: from a file, a hub name or a built-in task to token ids."""

import tempfile
from glob import escape, has_magic
from math import inf
from pathlib import Path

import pyarrow
import torch
from datasets import ClassLabel, Dataset, load_dataset

from tasks import InputError, as_messages, naming
from tasks.builtin import task_rows
from tasks.noise import PSEUDO_LABEL
from tasks.verifiers import assert_readable

PROMPT_IDS = "_prompt_ids"  # a column of ours beside the user's


def load_data(name, split, config=None, prompt_column="prompt"):
    """Rows with a column prompt: of a file, the hub, or a task (split: its name, rows, seed)."""
    path = Path(name)
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    if isinstance(split, tuple):
        data = Dataset.from_list(task_rows(name, *split)).remove_columns("completion")
    elif kind is None and (path.is_file() or path.is_dir() and has_magic(str(path.resolve()))):
        raise InputError("expected a json, jsonl or parquet file, or a folder without *, ? or [")
    elif kind is None:
        # A folder not by the usual cache, which knows it by its name and README alone.
        with tempfile.TemporaryDirectory() as fresh:
            own = {"cache_dir": fresh, "keep_in_memory": True} if path.is_dir() else {}
            data = load_dataset(name, config, split=split, **own)
    elif config:
        raise InputError(f"a file has no config, found {config!r}")
    elif path.stat().st_size == 0:
        raise InputError("expected rows, found an empty file")
    else:
        # datasets takes a path for a pattern.
        data = load_dataset(kind, data_files=escape(str(path.resolve())), split=split)
    found = f"found {len(data)} rows of {', '.join(data.column_names) or 'nothing'}"
    if prompt_column not in data.column_names or len(data) == 0:
        raise InputError(f"expected a column {prompt_column!r} (--prompt-column), {found}")
    if {PROMPT_IDS, PSEUDO_LABEL} & {*data.column_names}:
        raise InputError(f"expected other columns than {PROMPT_IDS} and {PSEUDO_LABEL}, {found}")
    if isinstance(label := data.features.get("answer"), ClassLabel):  # names, not their numbers
        names = [None if own in (None, -1) else label.int2str(own) for own in data["answer"][:]]
        data = data.remove_columns("answer").add_column("answer", names)
    if prompt_column != "prompt":
        others = [column for column in data.column_names if column != "prompt"]
        data = data.select_columns(others).rename_column(prompt_column, "prompt")
    return data


def load_prompts(
    flag, name, split, tokenizer, max_tokens, template=True, limit=inf, rewards=(), **source
):
    """load_data with the prompts' ids; longer ones are left out, and counted; raises InputError."""
    with naming(f"{flag}: cannot load {name!r}"):
        data = load_data(name, split, **source)
        # All columns: bytes that are no text would end a run when it comes to their row.
        columns = data.to_dict()
        for reward in rewards:
            assert_readable(columns, reward)
        prompt_ids = encode_prompts(data["prompt"][:], tokenizer, template, limit)
    # As an arrow array: datasets hashes a list number by number.
    data = data.add_column(PROMPT_IDS, pyarrow.array(prompt_ids))
    fitting = [row for row, ids in enumerate(prompt_ids) if len(ids) <= max_tokens]
    expected = f"expected at most {max(0, max_tokens)} tokens, the context less --response-length"
    if not fitting:
        raise InputError(f"{flag}: row 0: {len(prompt_ids[0])} tokens, and no row fits: {expected}")
    if len(fitting) < len(data):
        print(f"{flag}: {len(data) - len(fitting)} of {len(data)} prompts left out, {expected}")
    return data.select(fitting)


def encode_prompts(prompts, tokenizer, use_chat_template=True, limit=inf):
    """Token ids of prompts, by the chat template if there is one; raises InputError."""
    templated, encoded = tokenizer.chat_template and use_chat_template, []
    for row, prompt in enumerate(prompts):
        is_plain = isinstance(prompt, str) and prompt != "" and not templated
        text = prompt if is_plain else render_chat(prompt, tokenizer, row)
        # A template writes its own special tokens: no second BOS.
        found = tokenizer(text, add_special_tokens=is_plain, return_special_tokens_mask=True)
        ids, special = found["input_ids"], found["special_tokens_mask"]
        # Some tokenizers append an end, behind which nothing is left to say.
        while is_plain and ids and special[len(ids) - 1]:
            ids.pop()
        if not ids or max(ids) >= limit:
            expected = f"expected token ids below {limit} (--model-name-or-path), found"
            most = max(ids, default="none")
            raise InputError(f"row {row}: {expected} {most} in {prompt!r:.60}")
        encoded.append(ids)
    return encoded


def render_chat(prompt, tokenizer, row=0):
    """The text of a prompt by the chat template, without keys of None, as parquet has them."""
    where, messages, keys = f"row {row}: prompt", as_messages(prompt), ("role", "content")
    is_list = prompt and isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not (is_list and all(isinstance(m.get(key), str) for m in messages for key in keys)):
        raise InputError(f"{where}: expected a text or [{{role, content}}], found {prompt!r:.60}")
    messages = [{key: m[key] for key in m if m[key] is not None} for m in messages]
    with naming(f"{where}: the tokenizer cannot write it as a chat"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def batch_rows(num_rows, first, count, seed):
    """The rows of a batch: one seeded permutation of the data after another, from `first` on."""
    rows = []
    while len(rows) < count:
        epoch, start = divmod(first + len(rows), num_rows)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(num_rows, generator=generator)
        rows += order[start : start + count - len(rows)].tolist()
    return rows
