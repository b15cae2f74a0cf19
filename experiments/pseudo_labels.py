"""Labels by majority vote: what the paper trained math and science on, made by the model itself.

    python experiments/pseudo_labels.py MODEL problems.jsonl labels.jsonl --samples 8
    python train.py ... --dataset-name labels.jsonl --reward math --eval-dataset-name true.jsonl

The answer that most of a problem's samples end in becomes its `answer` (the true one, if there is
one, moves to `true_answer`), with its share of the votes in `agreement`. Problems with no answer in
any sample are left out. Rows are written as they are made; a second call goes on behind the last.
"""

import json
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

import rollout
from experiments.scripts import COUNT, load_policy, new_parser, run_script
from harness.setup import context_of, stop_token_ids
from tasks import InputError, naming, verifiers
from tasks.prompts import PROMPT_IDS, load_prompts


def final_answer(text, choices=(), labels=()):
    """The letter or the number that a response answers with; or None."""
    if choices:
        return verifiers.chosen_letter(text, choices, labels)
    found = verifiers.final_number(text)
    return found and str(found[1])


def labelled(problem, texts, row):
    """A problem's row with the label that its samples vote for, or None without one.

    What has no answer votes for nothing, but counts in `agreement`; the first wins a tie.
    """
    with naming(f"data: row {row}"):
        options = verifiers.options_of(problem.get("choices"))
    answers = [final_answer(text, *options) for text in texts]
    votes = [answer for answer in answers if answer is not None]
    if not votes:
        return None
    kept = {name: problem[name] for name in problem if name not in ("answer", PROMPT_IDS)}
    if "answer" in problem:
        kept["true_answer"] = problem["answer"]
    answer = statistics.mode(votes)
    return {**kept, "answer": answer, "agreement": votes.count(answer) / len(texts), "row": row}


def report(done, total):
    agreement = statistics.fmean([row["agreement"] for row in done] or [0])
    print(f"{len(done)} of {total} problems have a label; mean agreement {agreement:.3f}")
    known = [row for row in done if "true_answer" in row]
    if known:
        reward = verifiers.choice_reward if known[0].get("choices") else verifiers.math_reward
        names = ("prompt", "answer", "true_answer", "choices")
        prompts, labels, truth, choices = ([row.get(name) for row in known] for name in names)
        right = reward(prompts, labels, truth, choices=choices)
        print(f"right: {statistics.fmean(right):.3f} of the labels")


def label(args):
    model, tokenizer = load_policy(args.model, "model")
    stop_ids, room = stop_token_ids(model, tokenizer), context_of(model) - args.response_length
    known = model.config.vocab_size
    data = load_prompts("data", args.data, "train", tokenizer, room, limit=known)
    for name in {"row", "agreement", "true_answer"} & {*data.column_names}:
        raise InputError(f"data: expected no column {name!r}, which is written here, found one")
    with naming(f"output: {args.output}: expected rows of an earlier call, or no such file"):
        lines = args.output.read_text().splitlines(keepends=True) if args.output.exists() else []
        # A run that was killed may have torn its last line.
        done = [json.loads(line) for line in lines if line.endswith("\n")]
        first = max([-1, *(row["row"] for row in done)]) + 1
        same = all(row["prompt"] == data[row["row"]]["prompt"] for row in done)
        if lines and not (done and same and all("agreement" in row for row in done)):
            raise InputError(f"found others, or of another data set: {lines[0][:60]!r}")
    args.output.write_text("".join(lines[: len(done)]))
    limits = (args.response_length, 1.0)
    with open(args.output, "a", buffering=1) as out:
        for row in tqdm(range(first, len(data)), desc="problems"):
            problem = data[row]
            torch.manual_seed(row)
            prompts = [problem[PROMPT_IDS]] * args.samples
            sampled = rollout.sample(model, prompts, stop_ids[0], stop_ids, *limits)
            texts = rollout.completion_texts(sampled, tokenizer, stop_ids)
            if found := labelled(problem, texts, row):
                done.append(found)
                out.write(json.dumps(found, default=str) + "\n")
    report(done, len(data))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("model", help="the one that will be trained: a folder or a hub name")
    parser.add_argument("data", help="rows with prompt, and choices if the answer is a letter")
    parser.add_argument("output", type=Path, help="a jsonl file")
    parser.add_argument("--samples", type=COUNT, default=8, help="votes per problem")
    parser.add_argument("--response-length", type=COUNT, default=256)
    run_script(parser, label)


if __name__ == "__main__":
    main()
