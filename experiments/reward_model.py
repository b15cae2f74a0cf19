"""Trains a reward model for --reward model:FOLDER; says how often it is right on unseen dialogues.

    python experiments/reward_model.py ENCODER judged.jsonl FOLDER      # prompt, completion, reward
    python experiments/reward_model.py ENCODER dialogues.jsonl FOLDER   # prompt, reference

ENCODER: what AutoModelForSequenceClassification reads (a sentence encoder will do). Rows without a
reward (0 or 1) make two each: the reference is good, one of another dialogue is not. Rows are held
out by `dialogue_id`. The reward is the probability of "good".
"""

import json
import random
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments.scripts import COUNT, DEVICE, new_parser, run_script
from experiments.tables import read_rows
from harness.flags import number_in
from harness.setup import context_of, load
from tasks import WEIGHTS, InputError, as_messages, naming
from tasks.rewards import judged_text, load_reward
from tasks.warm_start import fine_tune


def read(name, tokenizer):
    """A jsonl file's rows with a judgement each: [(prompt, completion, 0 or 1, dialogue)]."""
    rows, judged, rng = read_rows(name), [], random.Random(0)
    for number, row in enumerate(rows, 1):
        is_judged = row.keys() >= {"prompt", "completion", "reward"} and row["reward"] in (0, 1)
        if not is_judged and ("reward" in row or not row.keys() >= {"prompt", "reference"}):
            expected = "expected prompt, completion and a reward of 0 or 1, or prompt and reference"
            raise InputError(f"data: {name}, row {number}: {expected}")
        with naming(f"data: {name}, row {number}: expected texts or [{{role, content}}]"):
            for key in row.keys() & {"completion", "reference"}:
                messages = as_messages(row["prompt"]) + as_messages(row[key])
                "".join(turn["role"] + turn["content"] for turn in messages)
                judged_text(row["prompt"], row[key], tokenizer)  # a template may refuse it
        row["dialogue_id"] = str(row.get("dialogue_id", number))
    for row in rows:
        prompt, dialogue = row["prompt"], row["dialogue_id"]
        if "reward" in row:
            judged.append((prompt, row["completion"], int(row["reward"]), dialogue))
            continue
        others = [other for other in rng.choices(rows, k=100) if other["dialogue_id"] != dialogue]
        said = [other.get("reference", row["reference"]) for other in others]
        foreign = [text for text in said if text != row["reference"]]
        if not foreign:
            raise InputError(f"data: {name}: expected references that differ, found hardly any")
        judged += [(prompt, row["reference"], 1, dialogue), (prompt, foreign[0], 0, dialogue)]
    return judged


def split(judged, share):
    """Whole dialogues held out: about `share` of them."""
    names = sorted({row[3] for row in judged})
    out = random.Random(0).sample(names, min(len(names), max(1, round(share * len(names)))))
    return [row for row in judged if row[3] not in out], [row for row in judged if row[3] in out]


def auc(scores, labels):
    """How often the good response of a random pair scores higher, ties half; None without pairs."""
    good, bad = ([s for s, own in zip(scores, labels) if own == label] for label in (1, 0))
    wins = [(a > b) + (a == b) / 2 for a in good for b in bad]
    return statistics.fmean(wins) if wins else None


def logits_of(model, tokenizer, rows):
    texts = [judged_text(*row[:2], tokenizer) for row in rows]
    options = {"truncation": True, "padding": True, "return_tensors": "pt"}
    inputs = tokenizer(texts, add_special_tokens=not tokenizer.chat_template, **options)
    return model(**inputs.to(model.device)).logits.float()


def load_both(name, max_length):
    """A classifier whose head is new, and its tokenizer, which keeps the last tokens of a text."""
    tokenizer = load(AutoTokenizer, name, "encoder")
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError("encoder: expected a tokenizer with a padding or an end token, found none")
    options = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}, **WEIGHTS}
    with naming(f"encoder: cannot load {name!r}"):
        model, _ = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length, context_of(model))
    return model.to(DEVICE).train(), tokenizer


def train_judge(args):
    torch.manual_seed(0)
    model, tokenizer = load_both(args.encoder, args.max_length)
    train, held_out = split(read(args.data, tokenizer), 0.1)
    if not train:
        raise InputError("data: expected rows of at least two dialogues, found fewer")
    orders = [torch.randperm(len(train)) for _ in range(args.epochs)]
    batches = [rows.tolist() for order in orders for rows in order.split(16)]

    def loss(model, rows):
        labels = torch.tensor([row[2] for row in rows], device=model.device)
        return torch.nn.functional.cross_entropy(logits_of(model, tokenizer, rows), labels)

    args.output.mkdir(parents=True, exist_ok=True)  # or nothing could be saved
    fine_tune(model, train, loss, batches, len(batches), args.learning_rate)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    prompts, completions, truth, _ = zip(*held_out)
    scores = load_reward(f"model:{args.output}", DEVICE)(prompts, completions)  # as train.py does
    right = statistics.fmean((score > 0.5) == label for score, label in zip(scores, truth))
    area, good = auc(scores, truth), statistics.fmean(truth)
    report = {"data": [Path(args.data).name], "steps": len(batches)}
    report |= {"train_rows": len(train), "held_out_rows": len(held_out), "accuracy": right}
    report |= {"majority": max(good, 1 - good), "auc": area}
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shown = "none" if area is None else f"{area:.3f}"
    print(f"right on {right:.3f} of {len(held_out)} held-out rows; AUC {shown}")
    print(f"always saying the commoner would be right on {report['majority']:.3f}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("encoder")
    parser.add_argument("data", help="a jsonl file")
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=COUNT, default=2)
    parser.add_argument("--learning-rate", type=number_in("(0, 1)", float), default=5e-5)
    parser.add_argument("--max-length", type=COUNT, default=192, help="tokens; the last are kept")
    run_script(parser, train_judge)


if __name__ == "__main__":
    main()
