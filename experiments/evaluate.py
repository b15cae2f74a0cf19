"""Mean reward of one or more policies on one or more data sets, greedy: for tables across domains.

    python experiments/evaluate.py MODEL runs/a runs/b --set test.jsonl math --set dialogues.jsonl model:FOLDER --rows 200

A run's folder stands for the policy of its newest checkpoint (of single turns: not one trained on conversations), and its --stop-token and
--chat-template are kept. --set FILE REWARD may be given often; rewards are train.py's. Prints a row per policy and set, with --output adds
them to a jsonl file, and at the end prints the mean and Student's 95 % interval over policies whose names differ in -seedN alone.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from experiments.seeds import interval
from train import BUILT_IN, checkpoints, context_of, load, number_in, run_script


def policy_of(name):
    """(the policy's own folder, the flags it was trained with) for a run, else (name, {}); raises InputError."""
    if not (Path(name) / "args.json").exists():
        return name, {}
    flags = json.loads((Path(name) / "args.json").read_text()).get("flags", {})
    _, user = BUILT_IN.get(flags.get("task"), (None, None))
    if flags.get("user") or (user and not flags.get("dataset_name")):
        raise rollout.InputError(f"policy: {name}: expected a policy of single turns, found one trained on conversations")
    found = [*checkpoints(Path(name)).values()]
    if not found:
        raise rollout.InputError(f"policy: {name}: expected a checkpoint in the run's folder, found none")
    return str(found[-1] / "policy"), flags


def evaluate(name, sets, rows, response_length, batch_size, prompt_column="prompt"):
    """One policy on sets [(file, split, reward's name, reward)] -> [{policy, set, reward, rows, score, words}]."""
    (folder, flags), results = policy_of(name), []
    model, tokenizer = load(AutoModelForCausalLM, folder, "policy"), load(AutoTokenizer, folder, "policy")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    stop_ids = rollout.stop_token_ids(model, tokenizer, flags.get("stop_token"))
    pad_id = rollout.pad_token_id(tokenizer, stop_ids)
    template, room = flags.get("chat_template") != "never", context_of(model) - response_length
    answered = {}  # two rewards for one file: it is read, and its responses are sampled, once
    for file, split, reward_name, reward in sets:
        if (file, split) not in answered:
            data = rollout.load_prompts("--set", file, split, tokenizer, room, template, prompt_column=prompt_column)
            data = data.select(range(min(rows, len(data))))
            order = sorted(range(len(data)), key=lambda row: len(data[row][rollout.PROMPT_IDS]))  # similar lengths together
            texts = [""] * len(data)
            for start in tqdm(range(0, len(order), batch_size), desc=f"{Path(name).name}, {Path(file).stem}", leave=False):
                part = order[start : start + batch_size]
                prompt_ids = [data[row][rollout.PROMPT_IDS] for row in part]
                sampled = rollout.sample(model, prompt_ids, pad_id, stop_ids, response_length, 0.0)
                for row, text in zip(part, rollout.completion_texts(sampled, tokenizer, stop_ids)):
                    texts[row] = text
            answered[file, split] = data, texts
        data, texts = answered[file, split]
        scores = rollout.score(reward, data.to_dict(), texts)
        words = sum(len(text.split()) for text in texts) / len(texts)
        results.append({"policy": name, "set": file, "reward": reward_name, "rows": len(texts), "score": scores.mean().item(), "words": words})
    return results


def print_means(results):
    """A row per set and reward, a column per group of policies that differ in their seed alone."""
    groups = {}
    for result in results:
        group = groups.setdefault((result["set"], result["reward"]), {}).setdefault(re.sub(r"-seed[0-9]+/?$", "", result["policy"]), [])
        group.append(result["score"])
    for (file, reward), columns in groups.items():
        spread = {name: f" ±{interval(values)[1]:.3f}" if len(values) > 1 else "" for name, values in columns.items()}
        cells = [f"{Path(name).name} {statistics.mean(values):.3f}{spread[name]}" for name, values in columns.items()]
        print(f"{Path(file).name}, {reward}: " + ", ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="folders, hub names or run folders")
    parser.add_argument("--set", nargs=2, action="append", required=True, metavar=("FILE", "REWARD"), dest="sets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt-column", default="prompt", help="the column with the prompts, in all sets")
    parser.add_argument("--rows", type=number_in("[1, inf)", int), default=200, help="the first so many of each set")
    parser.add_argument("--response-length", type=number_in("[1, inf)", int), default=64)
    parser.add_argument("--batch-size", type=number_in("[1, inf)", int), default=32)
    parser.add_argument("--output", type=Path, help="a jsonl file to add to")
    run_script(parser, compare, parser.parse_args())


def compare(args):
    device, results = "cuda" if torch.cuda.is_available() else "cpu", []
    rewards = {name: rollout.load_reward(name, device) for name in {name for _, name in args.sets}}
    sets = [(file, args.split, name, rewards[name]) for file, name in args.sets]
    for policy in args.policies:
        for result in evaluate(policy, sets, args.rows, args.response_length, args.batch_size, args.prompt_column):
            what = f"{policy:40} {Path(result['set']).name:24} {result['reward']:34}"
            print(f"{what} {result['score']:7.3f}  ({result['rows']} rows, {result['words']:.1f} words)")
            results.append(result)
            if args.output:
                with open(args.output, "a") as out:
                    out.write(json.dumps(result) + "\n")
    print_means(results)


if __name__ == "__main__":
    main()
