"""Trains a reward model for dialogue, for train.py --reward model:FOLDER, and says how often it is right on dialogues it has not seen.

    python experiments/reward_model.py ENCODER judged.jsonl FOLDER                    # rows with prompt, completion, reward (0 or 1)
    python experiments/reward_model.py ENCODER dialogues.jsonl FOLDER                 # rows with prompt, reference: true reply or another's?
    python experiments/reward_model.py ENCODER dialogues.jsonl FOLDER --stop-at 0.72  # a careless judge, right 72 % of the time

ENCODER: a hub name or folder that AutoModelForSequenceClassification reads (a sentence encoder will do; its new head is random). Rows
are held out by `dialogue_id`. Rows without a judgement make two each: the reference is good, a reference of another dialogue is not.
Several files may be given, with commas between. The reward is the probability of "good".
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from train import load, run_script


def read(name):
    """Rows of a jsonl file with a judgement each: [(prompt, completion, 0 or 1, dialogue)]; raises InputError naming file and line."""
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise rollout.InputError(f"data: cannot read {name}: {rollout.one_line(error)}") from error
    rows, judged = [], []
    for line, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            kinds = [{"prompt", *columns} <= row.keys() for columns in (("completion", "reward"), ("reference",))]
        except (ValueError, AttributeError) as error:
            raise rollout.InputError(f"data: {name}, line {line}: expected a JSON object, found {text[:60]!r}") from error
        if not any(kinds) or (kinds[0] and row["reward"] not in (0, 1)):
            raise rollout.InputError(f"data: {name}, line {line}: expected prompt, completion and a reward of 0 or 1, or prompt and reference")
        rows.append({**row, "dialogue_id": f"{name} {row.get('dialogue_id', line)}"})
    rng = random.Random(0)
    for row in rows:
        if "reward" in row:
            judged.append((row["prompt"], row["completion"], int(row["reward"]), row["dialogue_id"]))
            continue
        foreign = lambda other: other["dialogue_id"] != row["dialogue_id"] and other.get("reference", row["reference"]) != row["reference"]  # noqa: B023
        other = next(filter(foreign, rng.choices(rows, k=100)), None)
        if other is None:
            raise rollout.InputError(f"data: {name}: expected different references in different dialogues, found hardly any")
        judged += [(row["prompt"], row["reference"], 1, row["dialogue_id"]), (row["prompt"], other["reference"], 0, row["dialogue_id"])]
    return judged


def split(judged, share, seed):
    """Whole dialogues held out: about `share` of them."""
    dialogues = sorted({row[3] for row in judged})
    held_out = set(random.Random(seed).sample(dialogues, max(1, round(share * len(dialogues)))))
    return [row for row in judged if row[3] not in held_out], [row for row in judged if row[3] in held_out]


def auc(scores, labels):
    """How often a good response has the higher score of a random pair, ties half: the area under the ROC curve; None without both kinds."""
    ranked = torch.tensor(scores).double()
    good, bad = ranked[torch.tensor(labels) == 1], ranked[torch.tensor(labels) == 0]
    if not len(good) or not len(bad):
        return None
    difference = good.unsqueeze(1) - bad
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def accuracy(scores, labels):
    """The share of rows where the score is above one half exactly if the label is 1."""
    return statistics.fmean((score > 0.5) == label for score, label in zip(scores, labels))


def encode(rows, tokenizer, max_length):
    texts = [rollout.judged_text(prompt, completion, tokenizer) for prompt, completion, *_ in rows]
    return tokenizer(texts, truncation=True, max_length=max_length, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def batch_of(ids, tokenizer, device):
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)


@torch.no_grad()
def judge(model, tokenizer, encoded, device, batch_size=32):
    """The probability of "good" for each row."""
    model.eval()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # similar lengths together
    scores = [0.0] * len(encoded)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        probabilities = model(**batch_of([encoded[i] for i in rows], tokenizer, device)).logits.softmax(-1)[:, 1].tolist()
        for row, probability in zip(rows, probabilities):
            scores[row] = probability
    model.train()
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("encoder")
    parser.add_argument("data", help="jsonl files, commas between")
    parser.add_argument("output", type=Path, help="folder of the finished model and tokenizer")
    parser.add_argument("--stop-at", type=float, default=1.1, metavar="ACCURACY", help="stop at this held-out accuracy, between 0.5 and 1")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=192, help="tokens; of a longer dialogue the end is read")
    parser.add_argument("--eval-steps", type=int, default=25)
    parser.add_argument("--eval-rows", type=int, default=400, help="held-out rows for --stop-at; the last report uses all")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16 while training; the weights stay fp32")
    parser.add_argument("--seed", type=int, default=0)
    run_script(parser, fit, parser.parse_args())


def fit(args):
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load(AutoTokenizer, args.encoder, "encoder")
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    try:
        model = AutoModelForSequenceClassification.from_pretrained(args.encoder, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    except Exception as error:  # each library in its own words
        raise rollout.InputError(f"encoder: cannot load {args.encoder!r}: {rollout.one_line(error)}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(device).train()
    train, held_out = split([row for name in args.data.split(",") for row in read(name)], 0.1, args.seed)
    if not train:
        raise rollout.InputError("data: expected rows of at least two dialogues, found one")
    encoded, held_out_ids = encode(train, tokenizer, args.max_length), encode(held_out, tokenizer, args.max_length)
    labels, truth = torch.tensor([row[2] for row in train], device=device), [row[2] for row in held_out]
    probe = random.Random(args.seed).sample(range(len(held_out)), min(args.eval_rows, len(held_out)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = [rows for _ in range(args.epochs) for rows in torch.randperm(len(train)).split(args.batch_size)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - (step + 1) / (len(steps) + 1)))
    curve = []
    with tqdm(steps, desc="reward model") as bar:
        for step, rows in enumerate(bar, 1):
            with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                logits = model(**batch_of([encoded[row] for row in rows], tokenizer, device)).logits.float()
            loss = torch.nn.functional.cross_entropy(logits, labels[rows.to(device)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % args.eval_steps == 0:
                scores = judge(model, tokenizer, [held_out_ids[row] for row in probe], device)
                curve.append({"step": step, "accuracy": accuracy(scores, [truth[row] for row in probe])})
                bar.set_postfix(accuracy=f"{curve[-1]['accuracy']:.3f}")
                if curve[-1]["accuracy"] >= args.stop_at:
                    break
    scores = judge(model, tokenizer, held_out_ids, device)
    right, common = accuracy(scores, truth), max(statistics.fmean(truth), 1 - statistics.fmean(truth))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {"data": [Path(name).name for name in args.data.split(",")], "steps": step, "train_rows": len(train), "held_out_rows": len(held_out),
              "accuracy": right, "majority": common, "auc": auc(scores, truth), "curve": curve}  # fmt: skip
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"after {step} steps: right on {right:.3f} of {len(held_out)} held-out rows (always saying the commoner: {common:.3f}); AUC {report['auc'] or 0:.3f}")
    for name in args.data.split(","):
        rows = [row for row, judged in enumerate(held_out) if judged[3].startswith(f"{name} ")]
        own = [scores[row] for row in rows], [truth[row] for row in rows]
        if (area := auc(*own)) is not None:
            print(f"  {Path(name).name}: {accuracy(*own):.3f} of {len(rows)}, AUC {area:.3f}")
    print(f"python train.py ... --reward model:{args.output}")


if __name__ == "__main__":
    main()
