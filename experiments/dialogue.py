"""What the dialogue experiment needs beside train.py: data in three parts, and a rule for success.

    python experiments/dialogue.py MODEL sgd_train.jsonl FOLDER --max-tokens 128

Rows are turns of Schema-Guided Dialogue: prompt (the messages so far), reference (what the system
said), acts, values (what the reference conveys), dialogue_id. FOLDER/policy.jsonl, judge.jsonl (for
the reward model that trains the policy) and strict.jsonl (to teach the policy) share no dialogue.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from transformers import AutoTokenizer

from experiments.scripts import COUNT, new_parser, run_script
from harness.setup import load
from tasks import InputError
from tasks.prompts import PROMPT_IDS, as_messages, load_prompts
from tasks.verifiers import text_of

PARTS = ("policy", "judge", "strict")
ASKING = {"REQUEST", "CONFIRM", "OFFER_INTENT", "REQ_MORE"}  # acts that wait for an answer


def names(value, text):
    """Whether a text says a value, as a word of its own."""
    return bool(re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", text.lower()))


def success(prompts, completions, reference, acts, values, **columns):
    """How far a reply does what the reference did, by rule -> list of float in [0, 1].

    The mean of two shares, or the second alone where the first is undefined. 1. Of the values that
    the reference conveys and the dialogue has named, the share that the reply conveys: what only a
    data base knows cannot be guessed. 2. Whether it asks something exactly if the acts do.
    """
    scores = []
    rows = zip(prompts, completions, reference, acts, values)
    for prompt, completion, said, own_acts, own_values in rows:
        text = text_of(completion).lower()
        heard = " ".join(message["content"] for message in as_messages(prompt))
        due = [value for value in own_values if names(value, said) and names(value, heard)]
        asks = float(("?" in text) == bool(ASKING & set(own_acts)) and bool(text.strip()))
        conveyed = sum(names(value, text) for value in due)
        scores.append((conveyed / len(due) + asks) / 2 if due else asks)
    return scores


def write_parts(args):
    tokenizer = load(AutoTokenizer, args.model, "model")
    data = load_prompts("data", args.data, "train", tokenizer, float("inf"))
    if missing := {"reference", "acts", "values", "dialogue_id"} - set(data.column_names):
        expected = "expected the columns reference, acts, values, dialogue_id, found no"
        raise InputError(f"data: {args.data}: {expected} {', '.join(sorted(missing))}")
    parts = {part: [] for part in PARTS}
    if Path(args.data).resolve() in [(args.output / f"{part}.jsonl").resolve() for part in PARTS]:
        raise InputError(f"output: expected a folder without the data's file, found {args.output}")
    for row in data:
        digest = hashlib.sha256(str(row["dialogue_id"]).encode()).hexdigest()
        part, ids = PARTS[int(digest, 16) % len(PARTS)], row.pop(PROMPT_IDS)
        if part != "policy" or len(ids) <= args.max_tokens:
            parts[part].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        file = args.output / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
        print(f"{file}: {len(rows)} rows of {len({row['dialogue_id'] for row in rows})} dialogues")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("model", help="whose tokens are counted: a folder or a hub name")
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-tokens", type=COUNT, default=128, help="of the policy's prompts")
    run_script(parser, write_parts)


if __name__ == "__main__":
    main()
