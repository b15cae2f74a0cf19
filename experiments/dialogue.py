"""What the dialogue experiment needs beside train.py: data in three parts that share no dialogue, and a rule for success.

    python experiments/dialogue.py MODEL sgd_train.jsonl FOLDER --max-tokens 128     # FOLDER/policy.jsonl, judge.jsonl, strict.jsonl

Rows are turns of Schema-Guided Dialogue: prompt (the messages so far), reference (what the system said), acts, values (what the
reference conveys), dialogue_id. The parts: for the policy, for the reward model that trains it, and for the stricter one that evaluates it.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from train import load, run_script

PARTS = ("policy", "judge", "strict")
ASKING = {"REQUEST", "CONFIRM", "OFFER_INTENT", "REQ_MORE"}  # acts that wait for an answer


def success(prompts, completions, reference, acts, values, **columns):
    """How far a reply does what the reference did, by rule: the mean of two shares, or the second alone where the first is undefined.

    1. Of the values that the reference conveys and the dialogue has named, the share that the reply conveys. (Values that only a data
    base knows cannot be guessed.)  2. Whether it asks something exactly if the reference's acts do. -> list of float in [0, 1].
    """
    scores = []
    for prompt, completion, said, own_acts, own_values in zip(prompts, completions, reference, acts, values):
        text, said = rollout.text_of(completion).lower(), said.lower()
        heard = " ".join(message["content"] for message in rollout.as_messages(prompt)).lower()
        names = lambda value, text: re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None
        due = [value for value in map(str.lower, own_values) if names(value, said) and names(value, heard)]
        asks = float(("?" in text) == bool(ASKING & set(own_acts))) if text.strip() else 0.0
        scores.append((sum(names(value, text) for value in due) / len(due) + asks) / 2 if due else asks)
    return scores


def part_of(dialogue_id):
    return PARTS[int(hashlib.sha256(str(dialogue_id).encode()).hexdigest(), 16) % len(PARTS)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="whose tokens are counted: a folder or a hub name")
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-tokens", type=int, default=128, help="longest prompt in the policy's part")
    run_script(parser, write_parts, parser.parse_args())


def write_parts(args):
    data = rollout.load_prompts("data", args.data, "train", load(AutoTokenizer, args.model, "model"), float("inf"))
    if missing := {"reference", "acts", "values", "dialogue_id"} - set(data.column_names):
        raise rollout.InputError(f"data: {args.data}: expected the columns reference, acts, values, dialogue_id, found no {', '.join(sorted(missing))}")
    args.output.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        rows = [row for row in data if part_of(row["dialogue_id"]) == part and (part != "policy" or len(row[rollout.PROMPT_IDS]) <= args.max_tokens)]
        kept = [{name: value for name, value in row.items() if name != rollout.PROMPT_IDS} for row in rows]
        (args.output / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        print(f"{args.output / part}.jsonl: {len(kept)} rows of {len({row['dialogue_id'] for row in kept})} dialogues")


if __name__ == "__main__":
    main()
