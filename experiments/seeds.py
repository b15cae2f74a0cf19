"""Runs train.py's built-in task for several seeds and algorithms, and says what came out, with spread.

    python experiments/seeds.py --seeds 5 --algos dvpo ppo                 # about 2 minutes a run on one core
    python experiments/seeds.py --seeds 5 --algos dvpo ppo --name sums -- --task sums  # what stands behind -- goes to train.py

One thread per run, finished runs are kept (the folder of a run is its name). Raw numbers: experiments/results/NAME.jsonl.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent


def run(algo, seed, extra, folder):
    """One finished run as a dict: flags, versions, evaluation before and after, the curve of evaluations."""
    if not (ROOT / folder / "results.json").exists():
        seeds = ["--seed", str(seed), "--reward-noise-seed", str(seed)]  # or all runs would meet the same noise, and the interval leave it out
        command = [sys.executable, "train.py", "--algo", algo, *seeds, "--eval-steps", "15", "--output-dir", str(folder), *extra]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    folder = ROOT / folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keep = ("objective/scores", "objective/true_scores", "objective/kl", "val/explained_var", "quantile/lower_tail", "quantile/upper_tail", "quantile/coverage")
    curve = [{name: row[name] for name in ("iteration", *keep) if name in row} | {k: v for k, v in row.items() if k.startswith("eval/")} for row in rows]
    return {"algo": algo, "seed": seed, **json.loads((folder / "args.json").read_text()), **json.loads((folder / "results.json").read_text()), "curve": curve}


def interval(values):
    """Mean and half-width of Student's 95 % interval."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[min(len(values), 10)]
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def current_commit():
    """The short hash of what is checked out, as results name it, with -dirty if the code is not just that."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results")  # results may change while runs go on
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; at least 2")
    parser.add_argument("--algos", nargs="+", default=["dvpo", "ppo"])
    parser.add_argument("--name", default="default", help="of the results file and of the folder under runs/")
    parser.add_argument("extra", nargs="*", help="further flags of train.py, behind --")
    args = parser.parse_args()
    if args.seeds < 2 or (args.extra and args.name == "default"):
        parser.error("expected at least 2 --seeds, and a --name of its own for a run with further flags")
    cpuinfo = Path("/proc/cpuinfo")  # rounding differs between kinds of CPU, and so do runs
    cpu = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), "") if cpuinfo.exists() else ""
    machine = {"commit": current_commit(), "python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine(), "cpu": cpu}
    runs = []
    for algo, seed in tqdm([(algo, seed) for seed in range(args.seeds) for algo in args.algos], desc="runs"):
        runs.append(run(algo, seed, args.extra, Path("runs") / f"{args.name}-{algo}-seed{seed}"))
    target = ROOT / "experiments" / "results" / f"{args.name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(json.dumps({**machine, **entry}) + "\n" for entry in runs))
    print(f"{'mean score, 95 % interval':26}{'before':>16}" + "".join(f"{algo:>16}" for algo in args.algos) + f"{args.algos[0] + ' - ' + args.algos[-1]:>18}")
    for name in runs[0]["before"]:
        columns = [[entry["before"][name] for entry in runs if entry["algo"] == args.algos[0]]]
        columns += [[entry["after"][name] for entry in runs if entry["algo"] == algo] for algo in args.algos]
        columns.append([a - b for a, b in zip(columns[1], columns[-1])])  # paired: same seed, same warm start, same noise
        print(f"{name:26}" + "".join("{:10.3f} ±{:.3f}".format(*interval(values)) for values in columns))
    print(f"written: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
