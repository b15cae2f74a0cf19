"""The noise laboratory: does the distribution pay, and when? Algorithms x kinds of reward noise x seeds, on the built-in task.

    python experiments/noise.py --jobs 2                  # the main grid; one to two minutes a run, --jobs runs at a time
    python experiments/noise.py --noises outliers --methods ppo "dvpo, critic floor" --seeds 3    # a part of it
    python experiments/noise.py --grid tuning --jobs 2    # the learning rates that the main grid uses, on seeds of their own
    python experiments/noise.py --grid ladder --jobs 2    # also: quantiles, risk, lam, floor
    python experiments/noise.py --quick                   # a few short runs, to see that it works; numbers mean nothing
    python experiments/noise.py --table                   # only print and plot what experiments/results/ holds

One thread a run. Finished runs stand in experiments/results/noise-GRID.jsonl and are skipped, so a grid may be stopped and gone on
with. All methods get the same number of sampled completions, the same prompts, noise and warm start per seed.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))

BUDGET = "--total-episodes 12800 --eval-steps 20 --eval-samples 512"  # 100 iterations of 128 completions
CLEAN = "--reward-noise-fp 0 --reward-noise-fn 0"
NOISES = {
    "none": CLEAN,
    "flips 0.3": "--reward-noise-fp 0.3 --reward-noise-fn 0.3",
    "false negatives 0.4": "--reward-noise-fp 0 --reward-noise-fn 0.4",
    "outliers": CLEAN + " --reward-noise-outlier 0.3 3",
    "pseudo-labels 0.3": CLEAN + " --pseudo-label-noise 0.3",
    "offset": CLEAN + " --reward-offset 3",
    "offset, outliers": CLEAN + " --reward-offset 3 --reward-noise-outlier 0.3 3",
}
LEARNING_RATES = ("5e-5", "1e-4", "2e-4")  # what --grid tuning tries for each method, under flips 0.3 and outliers
METHODS = {
    "ppo": "--algo ppo",
    "dvpo": "--algo dvpo",
    "robust": "--algo robust",
    "grpo": "--algo grpo",
    "dr_grpo": "--algo dr_grpo",
    "reinforce++": "--algo reinforce++",
    "ppo, batch floor": "--algo ppo --score-floor batch",
    "dvpo, critic floor": "--algo dvpo --score-floor critic",
}
TUNED = dict.fromkeys(METHODS, "1e-4")
LADDER = ("consistency", "calibration", "shift", "shape", "curvature")


def ladder(steps):
    """Flags that leave the first `steps` of the risk terms on."""
    return tuned("dvpo") + " " + " ".join(f"--{term}-weight 0" for term in LADDER[steps:])


def tuned(name):
    return f"{METHODS[name]} --learning-rate {TUNED[name]}"


SOME, OUTLYING = ("none", "flips 0.3", "outliers"), ("none", "outliers", "offset, outliers")
TRIED = {f"{name}, lr {rate}": f"{METHODS[name]} --learning-rate {rate}" for name in METHODS for rate in LEARNING_RATES}
WEIGHTS = {f"weight {w}": tuned("dvpo") + "".join(f" --{term}-weight {w}" for term in LADDER) for w in (0, 0.01, 0.1, 1)}
RUNGS = {"core": 0, "+ consistency": 1, "+ calibration": 2, "+ shift": 3, "+ shape, curvature": 5}
GRIDS = {  # name: (methods: flags, noises, seeds)
    "main": ({name: tuned(name) for name in METHODS}, tuple(NOISES), range(10)),
    "tuning": (TRIED, ("flips 0.3", "outliers"), range(100, 102)),
    "ladder": ({name: ladder(steps) for name, steps in RUNGS.items()}, SOME, range(5)),
    "quantiles": ({f"M = {m}": f"{tuned('dvpo')} --num-quantiles {m}" for m in (1, 8, 50, 200, 500)}, SOME, range(5)),
    "risk": (WEIGHTS, SOME, range(5)),
    "lam": ({f"{name}, lam {lam}": f"{tuned(name)} --lam {lam}" for name in ("ppo", "dvpo") for lam in (0.9, 0.95, 1)}, SOME, range(5)),
    "floor": ({f"level {a}": f"{tuned('dvpo, critic floor')} --score-floor-level {a}" for a in (0.1, 0.3, 0.5)}, OUTLYING, range(5)),
}
KEEP = ("iteration", "objective/scores", "objective/true_scores", "objective/kl", "val/explained_var", "quantile/coverage")


def train(folder, flags, seed):
    """One run of train.py in one thread -> its results; a warm start is made once per seed."""
    warm = folder.parent / f"warm-{seed}"
    if not (folder / "warm_start").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(warm, folder / "warm_start")
    command = [sys.executable, "train.py", *flags.split(), "--seed", str(seed), "--reward-noise-seed", str(seed), "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [{name: value for name, value in row.items() if name in KEEP or name.startswith("eval/")} for row in rows if row["iteration"] % 5 == 0]
    results = {**json.loads((folder / "results.json").read_text()), "curve": curve}
    shutil.rmtree(folder)  # weights are large and results small
    return results


def run_grid(name, jobs, budget, methods, noises, seeds):
    """Runs what experiments/results/noise-NAME.jsonl does not hold yet, and adds it there line by line."""
    import torch
    import transformers

    from experiments.warm_start import warm_start

    file = RESULTS / f"noise-{name}.jsonl"
    finished = {(row["method"], row["noise"], row["seed"], row["flags"]) for row in read(file)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    todo = [(method, noise, seed, f"{budget} {GRIDS[name][0][method]} {NOISES[noise]}") for seed in seeds for noise in noises for method in methods]
    todo = [key for key in todo if key not in finished]
    folder, lock = ROOT / "runs" / "noise", threading.Lock()
    for seed in {seed for _, _, seed, _ in todo}:
        warm_start("dialogue", seed, folder / f"warm-{seed}")

    def one(number, key):
        method, noise, seed, flags = key
        results = train(folder / f"{name}-{os.getpid()}-{number}", flags, seed)
        with lock, open(file, "a") as out:
            out.write(json.dumps({"method": method, "noise": noise, "seed": seed, "flags": flags, **about, **results}) + "\n")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, number, key) for number, key in enumerate(todo)]
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc=f"{name}, {jobs} at a time"):
            future.result()


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def current(name):
    """The finished runs whose flags are those that the grid has now: never two budgets or learning rates in one row."""
    rows, methods = read(RESULTS / f"noise-{name}.jsonl"), GRIDS[name][0]
    return [row for row in rows if row["method"] in methods and row["flags"].endswith(f" {methods[row['method']]} {NOISES[row['noise']]}")]


def bootstrap(values, resamples=4000):
    """Mean and 95 % bootstrap interval (percentiles)."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.fmean(values), means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def steps_to(rows, target):
    """The first evaluated iteration at or above target on average over rows; None if there is none."""
    curves = [{point["iteration"]: point["eval/in_domain/greedy"] for point in row["curve"] if "eval/in_domain/greedy" in point} for row in rows]
    for iteration in sorted(curves[0]):
        if statistics.fmean(curve[iteration] for curve in curves) >= target:
            return iteration
    return None


def summarise(name):
    """Rows of (noise, method, number of seeds, {column: (mean, low, high)}, steps); differences are paired by seed with the first method."""
    rows, (methods, noises, _) = current(name), GRIDS[name]
    reference = next(iter(methods))
    clean = [row["after"]["in domain, greedy"] for row in rows if row["method"] == reference and row["noise"] == "none"]
    table = []
    for noise in noises:
        base = {row["seed"]: row for row in rows if (row["noise"], row["method"]) == (noise, reference)}
        for method in methods:
            own = {row["seed"]: row for row in rows if (row["noise"], row["method"]) == (noise, method)}
            shared = sorted(own.keys() & base.keys())
            if len(shared) < 2:
                continue
            columns = {}
            for split in ("in domain, greedy", "in domain, sampled", "out of domain, greedy"):
                columns[split] = bootstrap([own[seed]["after"][split] for seed in shared])
                columns[f"{split}, difference"] = bootstrap([own[seed]["after"][split] - base[seed]["after"][split] for seed in shared])
            steps = steps_to([own[seed] for seed in shared], 0.9 * statistics.fmean(clean)) if clean else None
            table.append((noise, method, len(shared), columns, steps))
    return table, reference


def print_table(name):
    table, reference = summarise(name)
    cell = lambda value: "{:6.3f} [{:.3f}, {:.3f}]".format(*value)
    minus = f"{'minus ' + reference:25}"
    print(f"\n{'noise':22}{'method':20}{'seeds':>6}  {'in domain, greedy':25}{minus}{'out of domain, greedy':25}{minus}{'steps':>6}")
    for noise, method, seeds, columns, steps in table:
        cells = [cell(columns[f"{split}{kind}"]) for split in ("in domain, greedy", "out of domain, greedy") for kind in ("", ", difference")]
        print(f"{noise:22}{method:20}{seeds:6}  " + "".join(f"{text:25}" for text in cells) + f"{steps or '-':>6}")
    print("mean [95 % bootstrap interval over seeds]; differences paired by seed; steps: iterations to 90 % of the first method's noise-free final accuracy")


def plot(name):
    """Two figures: accuracy over iterations with bands, and final accuracy with intervals, a panel per noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, (table, _), (methods, noises, _) = current(name), summarise(name), GRIDS[name]
    noises = [noise for noise in noises if any(entry[0] == noise for entry in table)]
    colours = dict(zip(methods, [*pyplot.cm.tab10.colors, *pyplot.cm.Dark2.colors, *pyplot.cm.Set1.colors]))
    figure, axes = pyplot.subplots(1, len(noises), figsize=(3.2 * len(noises), 3.4), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], noises):
        for method in methods:
            own = [row["curve"] for row in rows if (row["noise"], row["method"]) == (noise, method)]
            curves = [[point for point in curve if "eval/in_domain/greedy" in point] for curve in own]
            if len(curves) < 2:
                continue
            bands = [bootstrap([point["eval/in_domain/greedy"] for point in points], 500) for points in zip(*curves)]
            steps = [point["iteration"] for point in curves[0]]
            axis.plot(steps, [band[0] for band in bands], color=colours[method], label=method)
            axis.fill_between(steps, [band[1] for band in bands], [band[2] for band in bands], color=colours[method], alpha=0.12, linewidth=0)
        axis.set(title=noise, xlabel="iteration")
    axes[0][0].set_ylabel("held-out accuracy, greedy")
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"noise-{name}-curves.png", dpi=110)
    figure, axes = pyplot.subplots(1, len(noises), figsize=(3.2 * len(noises), 0.6 + 0.32 * len(methods)), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], noises):
        for _, method, _, columns, _ in [entry for entry in table if entry[0] == noise]:
            mean, low, high = columns["in domain, greedy"]
            height = -list(methods).index(method)
            axis.plot([low, high], [height, height], color=colours[method])
            axis.plot(mean, height, "o", color=colours[method])
        axis.set(title=noise, yticks=[-i for i in range(len(methods))], yticklabels=list(methods))
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("held-out accuracy, greedy, after training", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / f"noise-{name}-dots.png", dpi=110)
    print(f"written: noise-{name}-curves.png, noise-{name}-dots.png in {RESULTS.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", choices=GRIDS, default="main")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, help="how many; default what the grid names")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these of the grid's")
    parser.add_argument("--noises", nargs="+", metavar="NAME", help="only these of the grid's")
    parser.add_argument("--quick", action="store_true", help="two methods, two noises, two seeds, four iterations; into noise-quick.jsonl under runs/")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    budget, grid = BUDGET, args.grid
    if args.quick:
        global RESULTS
        RESULTS, grid, budget = ROOT / "runs", "quick", "--total-episodes 256 --batch-size 64 --critic-warmup-steps 1 --eval-steps 2 --eval-samples 32"
        GRIDS["quick"] = ({name: METHODS[name] for name in ("ppo", "dvpo, critic floor", "grpo")}, ("none", "offset, outliers"), range(2))
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods, noises, seeds = GRIDS[grid]
    for flag, given, known in (("methods", args.methods, methods), ("noises", args.noises, noises)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"--{flag}: expected some of {', '.join(known)}; found {', '.join(unknown)}")
    if not args.table:
        run_grid(grid, args.jobs, budget, args.methods or methods, args.noises or noises, seeds[: args.seeds])
    print_table(grid)
    plot(grid)


if __name__ == "__main__":
    main()
