"""Trains a reward model for --reward model:FOLDER; says how often it is right on unseen dialogues.

    python experiments/reward_model.py ENCODER judged.jsonl FOLDER      # prompt, completion, reward
    python experiments/reward_model.py ENCODER dialogues.jsonl FOLDER   # prompt, reference
    python experiments/reward_model.py ENCODER a.jsonl,b.jsonl FOLDER --stop-at 0.72   # careless

ENCODER: what AutoModelForSequenceClassification reads (a sentence encoder will do). Rows without a
reward (0 or 1) make two each: the reference is good, one of another dialogue is not. Rows are held
out by `dialogue_id`. The reward is the probability of "good".
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.reports import run_script
from harness.setup import load
from tasks import InputError, one_line
from tasks.rewards import judged_text


def row_of(line, name, number):
    """A line of a jsonl file as a row; raises InputError naming file and line."""
    try:
        row = json.loads(line)
        kinds = [{"prompt", "reference"} <= row.keys()]
        kinds.append({"prompt", "completion", "reward"} <= row.keys() and row["reward"] in (0, 1))
    except (ValueError, AttributeError) as error:
        found = f"expected a JSON object, found {line[:60]!r}"
        raise InputError(f"data: {name}, line {number}: {found}") from error
    if not any(kinds):
        expected = "expected prompt, completion and a reward of 0 or 1, or prompt and reference"
        raise InputError(f"data: {name}, line {number}: {expected}")
    return {**row, "dialogue_id": f"{name} {row.get('dialogue_id', number)}"}


def read(name):
    """A jsonl file's rows with a judgement each: [(prompt, completion, 0 or 1, dialogue)]."""
    lines = Path(name).read_text().splitlines()
    rows = [row_of(line, name, number) for number, line in enumerate(lines, 1)]
    judged, rng = [], random.Random(0)
    for row in rows:
        prompt, dialogue = row["prompt"], row["dialogue_id"]
        if "reward" in row:
            judged.append((prompt, row["completion"], int(row["reward"]), dialogue))
            continue
        others = [other for other in rng.choices(rows, k=100) if other["dialogue_id"] != dialogue]
        said = [other.get("reference", row["reference"]) for other in others]
        foreign = [text for text in said if text != row["reference"]]
        if not foreign:
            expected = "expected different references in different dialogues, found hardly any"
            raise InputError(f"data: {name}: {expected}")
        judged += [(prompt, row["reference"], 1, dialogue), (prompt, foreign[0], 0, dialogue)]
    return judged


def split(judged, share, seed):
    """Whole dialogues held out: about `share` of them."""
    names = sorted({row[3] for row in judged})
    out = random.Random(seed).sample(names, max(1, round(share * len(names))))
    return [row for row in judged if row[3] not in out], [row for row in judged if row[3] in out]


def auc(scores, labels):
    """How often the good response of a random pair scores higher, ties half; None without pairs."""
    ranked = torch.tensor(scores).double()
    good, bad = ranked[torch.tensor(labels) == 1], ranked[torch.tensor(labels) == 0]
    if not len(good) or not len(bad):
        return None
    return ((good.unsqueeze(1) - bad).sign().mean() / 2 + 0.5).item()


def accuracy(scores, rows):
    """The share of rows where the score is above one half exactly if they are good."""
    return statistics.fmean((score > 0.5) == row[2] for score, row in zip(scores, rows))


def logits_of(model, tokenizer, rows, max_length):
    texts = [judged_text(prompt, completion, tokenizer) for prompt, completion, *_ in rows]
    options = {"truncation": True, "max_length": max_length, "padding": True}
    options |= {"add_special_tokens": not tokenizer.chat_template, "return_tensors": "pt"}
    return model(**tokenizer(texts, **options).to(model.device)).logits.float()


@torch.no_grad()
def judge(model, tokenizer, rows, max_length):
    """The probability of "good" for each row."""
    model.eval()
    parts = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    logits = [logits_of(model, tokenizer, part, max_length) for part in parts]
    model.train()
    return torch.cat(logits).softmax(-1)[:, 1].tolist()


def load_both(name):
    tokenizer = load(AutoTokenizer, name, "encoder")
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    except Exception as error:  # each library in its own words
        raise InputError(f"encoder: cannot load {name!r}: {one_line(error)}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train(), tokenizer


def fit(model, tokenizer, train, held_out, args):
    """AdamW until --epochs are over or --stop-at is reached -> [{step, accuracy}] on a sample."""
    probe = random.Random(args.seed).sample(held_out, min(400, len(held_out)))
    steps = [rows for _ in range(args.epochs) for rows in torch.randperm(len(train)).split(16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    curve = []
    for step, rows in enumerate(tqdm(steps, desc="reward model"), 1):
        rate = min(1, step / 50) * (1 - step / (len(steps) + 1))  # warm-up, then linear decay
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        batch = [train[row] for row in rows.tolist()]
        labels = torch.tensor([row[2] for row in batch], device=model.device)
        logits = logits_of(model, tokenizer, batch, args.max_length)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.eval_steps == 0 or step == len(steps):
            right = accuracy(judge(model, tokenizer, probe, args.max_length), probe)
            curve.append({"step": step, "accuracy": right})
            if right >= args.stop_at:
                break
    return curve


def train_judge(args):
    torch.manual_seed(args.seed)
    model, tokenizer = load_both(args.encoder)
    names = args.data.split(",")
    train, held_out = split([row for name in names for row in read(name)], 0.1, args.seed)
    if not train:
        raise InputError("data: expected rows of at least two dialogues, found one")
    curve = fit(model, tokenizer, train, held_out, args)
    scores = judge(model, tokenizer, held_out, args.max_length)
    truth = [row[2] for row in held_out]
    good, area = statistics.fmean(truth), auc(scores, truth)
    common = max(good, 1 - good)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {"data": [Path(name).name for name in names], "steps": curve[-1]["step"]}
    report |= {"train_rows": len(train), "held_out_rows": len(held_out), "majority": common}
    report |= {"accuracy": accuracy(scores, held_out), "auc": area, "curve": curve}
    (Path(args.output) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    right = f"right on {report['accuracy']:.3f} of {len(held_out)} held-out rows"
    print(f"{right} (always saying the commoner: {common:.3f}); AUC {area or 0:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("encoder", "data", "output"):
        parser.add_argument(name)
    parser.add_argument("--stop-at", type=float, default=1.1, help="a held-out accuracy")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=192, help="tokens; the last are kept")
    parser.add_argument("--eval-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    run_script(parser, train_judge, parser.parse_args())


if __name__ == "__main__":
    main()
