"""Mean reward of policies on data sets, greedy: a row per policy and --set FILE REWARD.

    python experiments/evaluate.py MODEL runs/a runs/b --set a.jsonl math --set b.jsonl model:FOLDER

A run's folder stands for the policy of its newest checkpoint (of single turns), with its stop token
and --chat-template.
"""

import json
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from tqdm import trange

import rollout
from experiments.scripts import COUNT, DEVICE, load_policy, new_parser, run_script
from harness.checkpoints import newest_checkpoint
from harness.setup import context_of, stop_token_ids
from tasks import InputError, naming
from tasks.prompts import PROMPT_IDS, load_prompts
from tasks.rewards import load_reward, score


def policy_of(name):
    """(the policy's folder, the flags it was trained with) of a run, else (name, {})."""
    file = Path(name) / "args.json"
    if not file.exists():
        return name, {}
    with naming(f"policy: {file}: expected a run's flags"):
        flags = {**json.loads(file.read_text())["flags"]}
    if flags.get("user") or (flags.get("task") == "booking" and not flags.get("dataset_name")):
        expected = "expected a policy of single turns, found one of conversations"
        raise InputError(f"policy: {name}: {expected}")
    return str(newest_checkpoint(Path(name), "policy") / "policy"), flags


def respond(model, tokenizer, stop_ids, prompt_ids, response_length):
    """Greedy responses as texts; prompts of similar lengths go together."""
    order, texts = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row])), {}
    for start in trange(0, len(order), 32, leave=False):
        rows = order[start : start + 32]
        ids = [prompt_ids[row] for row in rows]
        sampled = rollout.sample(model, ids, stop_ids[0], stop_ids, response_length, 0.0)
        texts |= zip(rows, rollout.completion_texts(sampled, tokenizer, stop_ids))
    return [texts[row] for row in range(len(prompt_ids))]


def evaluate(name, rewards, args):
    """One policy on all of args.set -> [{set, reward, rows, score, words}]."""
    folder, flags = policy_of(name)
    model, tokenizer = load_policy(folder, "policy")
    stop = flags.get("stop_token")
    stop_ids = stop_token_ids(model, tokenizer, stop and str(stop))
    template, room = flags.get("chat_template") != "never", context_of(model) - args.response_length
    results, answered = [], {}  # two rewards for one file: its responses are sampled once
    for file, reward in args.set:
        if file not in answered:
            own = {"rewards": [rewards[other] for name, other in args.set if name == file]}
            own |= {"limit": model.config.vocab_size}
            data = load_prompts("--set", file, "train", tokenizer, room, template, **own)
            data, length = data.take(args.rows), args.response_length
            texts = respond(model, tokenizer, stop_ids, data[PROMPT_IDS], length)
            answered[file] = data.to_dict(), texts
        batch, texts = answered[file]
        mean = score(rewards[reward], batch, texts).mean().item()
        found = {"set": file, "reward": reward, "rows": len(texts), "score": mean}
        results.append(found | {"words": statistics.fmean(len(text.split()) for text in texts)})
    return results


def compare(args):
    rewards = {name: load_reward(name, DEVICE) for _, name in args.set}
    for policy in args.policies:
        for result in evaluate(policy, rewards, args):
            what = f"{policy:40} {Path(result['set']).name:24} {result['reward']:34}"
            size = f"({result['rows']} rows, {result['words']:.1f} words)"
            print(f"{what} {result['score']:7.3f}  {size}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("policies", nargs="+", help="folders, hub names or run folders")
    sets = {"nargs": 2, "action": "append", "required": True, "metavar": ("FILE", "REWARD")}
    parser.add_argument("--set", **sets)
    parser.add_argument("--rows", type=COUNT, default=200, help="the first so many of each set")
    parser.add_argument("--response-length", type=COUNT, default=64)
    run_script(parser, compare)


if __name__ == "__main__":
    main()
