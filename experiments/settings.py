"""A setting of the paper with a real model: methods x kinds of noise x seeds.

    python experiments/settings.py DATA --model FOLDER --jobs 2 -- FLAGS    # of train.py, all runs'
    python experiments/settings.py DATA --table

DATA is a folder: train.jsonl and held.jsonl, other.jsonl for out of domain, and for the noise
`votes` votes.jsonl, train.jsonl as pseudo_labels.py labels it. Finished runs stand in
experiments/results/setting-NAME.jsonl, NAME the folder's, and are skipped.
"""

import argparse
import concurrent.futures
import contextlib
import gc
import io
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

import train
from experiments import evaluate
from experiments.noise import NOISES
from experiments.seeds import COUNT, DEVICE, RESULTS, current_commit, interval, read_rows
from experiments.seeds import run_script
from harness.flags import parse_args
from tasks.rewards import load_reward

METHODS = {
    "ppo": "--algo ppo",
    "dvpo, spread": "--algo dvpo --readout spread",
    "grpo": "--algo grpo",
    "robust": "--algo robust",
    "control": "--algo ppo --readout spread",
    "dvpo": "--algo dvpo",
}
# The first is for the rule of admission: does plain PPO learn here?
KINDS = {"none": "", "verifier": NOISES["verifier"], "votes": ""}
OTHER = "out of domain, greedy"


def flags_of(args, method, kind):
    labels = "votes" if kind == "votes" else "train"
    data = f"--dataset-name {args.data / labels}.jsonl --eval-dataset-name {args.data}/held.jsonl"
    return f"--model-name-or-path {args.model} {data} {METHODS[method]} {KINDS[kind]}".split()


def out_of_domain(name, args):
    """Greedy mean score on other.jsonl of a model, or of a run's policy."""
    flags = parse_args([*flags_of(args, "ppo", "none"), *args.flags])
    file = str(args.data / "other.jsonl")
    own = argparse.Namespace(set=[(file, flags.reward)], rows=flags.eval_samples)
    own.response_length = flags.response_length
    rewards = {flags.reward: load_reward(flags.reward, DEVICE)}
    return evaluate.evaluate(name, rewards, own)[0]["score"]


def run(args, method, kind, seed):
    """One run of train.py, evaluated -> its results, and what it was made with."""
    torch.set_num_threads(1)
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags_of(args, method, kind), *args.flags]
        own = ["--seed", str(seed), "--reward-noise-seed", str(seed), "--output-dir", folder]
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()) as said:
            if train.main([*flags, *own]):
                raise RuntimeError(said.getvalue().strip().splitlines()[-1])
            found = json.loads((Path(folder) / "results.json").read_text())
            gc.collect()
            found["after"][OTHER] = out_of_domain(folder, args)
        rows = read_rows(Path(folder) / "metrics.jsonl")
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        found["device"] = torch.cuda.get_device_name()
    curve = [round(row["objective/true_scores"], 4) for row in rows]
    return {**found, "flags": flags, "true": curve, "all seconds": round(time.time() - begin, 1)}


def run_grid(args, target):
    """Runs what the results lack, seed by seed, and adds it line by line -> number of failures."""
    rows = read_rows(target) if target.exists() else []
    finished, failed = {(row["method"], row["noise"], row["seed"]) for row in rows}, 0
    about = {"commit": current_commit(), "torch": torch.__version__}
    if ("start", "none", 0) not in finished:
        row = {"method": "start", "noise": "none", "seed": 0, **about}
        row["after"] = {OTHER: out_of_domain(args.model, args)}
        target.open("a").write(json.dumps(row) + "\n")
    keys = [
        (method, kind, seed) for seed in args.seeds for kind in args.kinds for method in METHODS
    ]
    # Fresh processes: a fork cannot use a GPU that its parent has looked at.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        futures = {}
        for method, kind, seed in keys:
            if (method, kind, seed) not in finished and (kind != "none" or method == "ppo"):
                key = {"method": method, "noise": kind, "seed": seed, **about}
                futures[pool.submit(run, args, method, kind, seed)] = key
        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(futures), desc=f"{args.jobs} at a time"):
                if future.exception():
                    tqdm.write(f"settings.py: {futures[future]}: {future.exception()}", sys.stderr)
                    failed += 1
                    continue
                with target.open("a") as out:
                    out.write(json.dumps(futures[future] | future.result()) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C
    return failed


def print_table(rows):
    """Scores by noise and method: before, after, and minus PPO's, paired by seed."""
    found = {}
    for row in rows:
        found.setdefault((row["noise"], row["method"]), {})[row["seed"]] = row["after"]
    before = [row["before"] for row in rows if "before" in row]
    for name in before[0] if before else ():
        print(f"start, {name}: {sum(scores[name] for scores in before) / len(before):.3f}")
    for (kind, method), own in found.items():
        base = found.get((kind, "ppo"), {})
        cells = []
        for name in next(iter(own.values())):
            values = [own[seed][name] for seed in sorted(own)]
            pairs = [
                own[seed][name] - base[seed][name] for seed in sorted(own.keys() & base.keys())
            ]
            for column in (values, pairs):
                text = "{:.3f} ±{:.3f}".format(*interval(column)) if len(column) > 1 else column
                cells.append(f"{text!s:17}")
        print(f"{kind:10}{method:14}{len(own):3}  {'  '.join(cells)}")


def run_and_print(args):
    target = RESULTS / f"setting-{args.data.resolve().name}.jsonl"
    failed = 0 if args.table else run_grid(args, target)
    print_table(read_rows(target))
    if failed:
        sys.exit(f"settings.py: {failed} runs failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["none", "verifier"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(5)])
    parser.add_argument("--jobs", type=COUNT, default=1, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
