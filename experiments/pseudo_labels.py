"""Labels by majority vote: what the paper trained math and science on, made by the initial model itself.

    python experiments/pseudo_labels.py FOLDER_OR_HUB_NAME problems.jsonl labels.jsonl --samples 8 --response-length 256
    python train.py --model-name-or-path ... --dataset-name labels.jsonl --reward math --eval-dataset-name true.jsonl

Every problem is sampled --samples times; the answer that most samples end in becomes the column `answer` (the true one, if there is
one, moves to `true_answer`), with its share of the votes in `agreement`. Problems with no answer in any sample are left out. Rows are
written as they are made, in order; a second call goes on behind the last one.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from train import context_of, load, run_script


def final_answer(text, choices=()):
    """The answer that a response ends in, as a label: a letter where there are choices, else a number or what stands in \\boxed{}; or None."""
    if choices:
        return rollout.chosen_letter(text, choices)
    given = rollout.boxed(text)
    number = rollout.last_number(text) if given is None else rollout.one_number(given)
    return str(number) if number is not None else given and rollout.plain_answer(given)


def majority(answers):
    """(The most frequent of the answers, its share of all); None votes for nothing; a tie goes to the one that came first."""
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return (None, 0.0) if not votes else (votes.most_common(1)[0][0], votes.most_common(1)[0][1] / len(answers))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="the model that will be trained: a folder or a hub name")
    parser.add_argument("data", help="rows with a column prompt, and choices if the answer is a letter: a hub name, a json, jsonl or parquet file")
    parser.add_argument("output", type=Path, help="a jsonl file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--samples", type=int, default=8, help="votes per problem")
    parser.add_argument("--rows", type=int, help="only the first so many problems")
    parser.add_argument("--response-length", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=64, help="responses sampled at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for flag in ("samples", "response_length", "batch_size"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: expected at least 1, found {getattr(args, flag)}")
    run_script(parser, label, args)


def label(args):
    model, tokenizer = load(AutoModelForCausalLM, args.model, "model"), load(AutoTokenizer, args.model, "model")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    stop_ids = rollout.stop_token_ids(model, tokenizer)
    pad_id = rollout.pad_token_id(tokenizer, stop_ids)
    data = rollout.load_prompts("data", args.data, args.split, tokenizer, context_of(model) - args.response_length)
    data = data.select(range(min(args.rows or len(data), len(data))))
    lines = args.output.read_text().splitlines(keepends=True) if args.output.exists() else []
    done = [json.loads(line) for line in lines if line.endswith("\n")]  # a run that was killed may have torn its last line
    args.output.write_text("".join(lines[: len(done)]))
    first = done[-1]["row"] + 1 if done else 0
    num_problems = max(1, args.batch_size // args.samples)
    with open(args.output, "a") as out, tqdm(total=len(data), initial=first, desc="problems") as bar:
        for start in range(first, len(data), num_problems):
            problems = [data[row] for row in range(start, min(start + num_problems, len(data)))]
            torch.manual_seed(args.seed * 1_000_003 + start)
            texts = []
            prompt_ids = [problem[rollout.PROMPT_IDS] for problem in problems for _ in range(args.samples)]
            for i in range(0, len(prompt_ids), args.batch_size):
                sampled = rollout.sample(model, prompt_ids[i : i + args.batch_size], pad_id, stop_ids, args.response_length, args.temperature)
                texts += rollout.completion_texts(sampled, tokenizer, stop_ids)
            for number, problem in enumerate(problems):
                choices = rollout.option_texts(problem.get("choices"))
                votes = [final_answer(text, choices) for text in texts[number * args.samples : (number + 1) * args.samples]]
                answer, agreement = majority(votes)
                if answer is not None:
                    kept = {name: value for name, value in problem.items() if name not in ("answer", rollout.PROMPT_IDS)}
                    true = {"true_answer": problem["answer"]} if "answer" in problem else {}
                    done.append({**kept, "answer": answer, **true, "agreement": agreement, "row": start + number})
                    out.write(json.dumps(done[-1]) + "\n")
                    out.flush()
            bar.update(len(problems))
    print(f"{len(done)} of {len(data)} problems have a label; mean agreement {sum(row['agreement'] for row in done) / max(1, len(done)):.3f}")
    known = [row for row in done if "true_answer" in row]
    if known:
        reward = rollout.choice_reward if known[0].get("choices") else rollout.math_reward
        columns = {"answer": [str(row["true_answer"]) for row in known], "choices": [row.get("choices") for row in known]}
        right = reward([row["prompt"] for row in known], [row["answer"] for row in known], **columns)
        print(f"right: {sum(right) / len(right):.3f} of the labels")


if __name__ == "__main__":
    main()
