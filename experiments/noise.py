"""The noise laboratory: does the distribution pay, and when? Algorithms x kinds of reward noise x seeds, on the built-in task.

    python experiments/noise.py --jobs 2                  # the main grid; some 25 seconds a run, --jobs runs at a time
    python experiments/noise.py --noises outliers --methods ppo "dvpo, critic floor" --seeds 3    # a part of it
    python experiments/noise.py --grid tuning --jobs 2    # the learning rates that the main grid uses, on seeds of their own
    python experiments/noise.py --grid ladder --jobs 2    # also: quantiles, risk, lam, floor
    python experiments/noise.py --quick                   # a few short runs, to see that it works; numbers mean nothing
    python experiments/noise.py --table                   # only print and plot what experiments/results/ holds

One thread a run. Finished runs stand in experiments/results/noise-*.jsonl and are skipped, so a grid may be stopped and gone on
with, and grids share what they have in common. All methods get the same number of sampled completions, the same prompts, noise and
warm start per seed.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))

# 60 iterations of 128 completions, each used for 4 optimiser steps; the critic's learning rate is the same for all that have one.
BUDGET = "--total-episodes 7680 --num-ppo-epochs 1 --num-mini-batches 4 --critic-learning-rate 3e-3 --critic-warmup-steps 10 --eval-samples 256"
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
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")  # what --grid tuning tries for each method, under flips 0.3 and outliers
METHODS = {
    "ppo": "--algo ppo",
    "dvpo": "--algo dvpo",
    "robust": "--algo robust",
    "grpo": "--algo grpo",
    "dr_grpo": "--algo dr_grpo",
    "reinforce++": "--algo reinforce++",
}
FLOORS = {"ppo, batch floor": ("ppo", "--score-floor batch"), "dvpo, critic floor": ("dvpo", "--score-floor critic")}
TUNED = dict.fromkeys(METHODS, "2e-4")
LADDER = ("consistency", "calibration", "shift", "shape", "curvature")


def tuned(name, *more):
    return " ".join((METHODS[name], f"--learning-rate {TUNED[name]}", *filter(None, more)))


def weights(value, terms=LADDER):
    return " ".join(f"--{term}-weight {value}" for term in terms)


def unless(usual, value, flag):
    """The flag, or nothing where it would only say the default, so that such runs are the main grid's."""
    return "" if value == usual else f"{flag} {value}"


SOME, OUTLYING = ("none", "flips 0.3", "outliers"), ("none", "outliers", "offset, outliers")
TRIED = {f"{name}, lr {lr}": f"{METHODS[name]} --learning-rate {lr}" for name in METHODS for lr in LEARNING_RATES}
RUNGS = {"core": 0, "+ consistency": 1, "+ calibration": 2, "+ shift": 3, "+ shape, curvature": 5}
FLOOR = "--score-floor critic"
READOUTS = {
    "ppo": tuned("ppo"),
    "dvpo": tuned("dvpo"),
    "ppo, batch floor": tuned("ppo", "--score-floor batch"),
    "ppo, batch floor, capped": tuned("ppo", "--score-floor batch --floor-kind capped"),
    "critic floor": tuned("dvpo", FLOOR),
    "critic floor, capped": tuned("dvpo", FLOOR, "--floor-kind capped"),
    "critic floor, tail mean": tuned("dvpo", FLOOR, "--floor-kind tail"),
    "critic floor, capped, values": tuned("dvpo", FLOOR, "--floor-kind capped --floor-values"),
    "bootstrapped, mean, 0.5": tuned("dvpo", "--score-bootstrap 0.5"),
    "bootstrapped, median, 0.5": tuned("dvpo", "--score-bootstrap 0.5 --score-readout median"),
    "bootstrapped, median, 1": tuned("dvpo", "--score-bootstrap 1 --score-readout median"),
    "bootstrapped, trimmed, 0.5": tuned("dvpo", "--score-bootstrap 0.5 --score-readout trimmed"),
    "mixture target, critic floor": tuned("dvpo", FLOOR, "--target mixture"),
    "scaled by spread": tuned("dvpo", "--advantage-scale spread"),
    "lam 0.9, warm-up 20": tuned("dvpo", "--lam 0.9", "--critic-warmup-steps 20"),
    "ppo, lam 0.9, warm-up 20": tuned("ppo", "--lam 0.9", "--critic-warmup-steps 20"),
}
GRIDS = {  # name: (methods: flags, noises, seeds); differences are to the first method
    "main": ({name: tuned(name) for name in METHODS} | {name: tuned(*flags) for name, flags in FLOORS.items()}, tuple(NOISES), range(10)),
    "tuning": (TRIED, ("flips 0.3", "outliers"), range(100, 102)),
    "readouts": (READOUTS, ("outliers", "offset, outliers", "none", "flips 0.3"), range(100, 103)),
    "long": ({name: f"{flags} --total-episodes 19200" for name, flags in READOUTS.items() if name in ("dvpo", "ppo, batch floor", "critic floor", "critic floor, capped")},
             ("none", "outliers"), range(100, 102)),
    "ladder": ({name: tuned("dvpo", weights(0, LADDER[steps:])) for name, steps in RUNGS.items()}, SOME, range(5)),
    "quantiles": ({f"M = {m}": tuned("dvpo", unless(200, m, "--num-quantiles")) for m in (1, 8, 50, 200, 500)}, SOME, range(5)),
    "risk": ({f"weight {w}": tuned("dvpo", weights(w)) for w in (0, 0.01, 0.1, 1)}, SOME, range(5)),
    "lam": ({f"{name}, lam {lam}": tuned(name, unless(0.95, lam, "--lam")) for name in ("ppo", "dvpo") for lam in (0.9, 0.95, 1)}, SOME, range(5)),
    "floor": ({f"level {a}": tuned(*FLOORS["dvpo, critic floor"], unless(0.3, a, "--score-floor-level")) for a in (0.1, 0.3, 0.5)}, OUTLYING, range(5)),
}
SPLITS = ("in domain, greedy", "out of domain, greedy")
CURVES = {"true": "objective/true_scores", "ev": "val/explained_var", "kl": "objective/kl", "coverage": "quantile/coverage"}
WINDOW = 5  # a curve is a mean over as many iterations


def windows(values):
    """Means over every WINDOW values, None left out."""
    parts = [[value for value in values[i : i + WINDOW] if value is not None] for i in range(0, len(values), WINDOW)]
    return [round(statistics.fmean(part), 4) if part else None for part in parts]


def run(task):
    """One run of train.py in one thread of a worker process -> (task, results); a warm start is made once per seed."""
    import torch

    import train
    from experiments.warm_start import warm_start

    torch.set_num_threads(1)
    (method, noise, seed, flags), scratch = task
    warm, folder, said = Path(scratch) / f"warm-{seed}", Path(scratch) / f"run-{os.getpid()}", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if noise is None:
            return task, warm_start("dialogue", seed, warm)
        shutil.copytree(warm, folder / "warm_start")
        argv = [*flags.split(), "--seed", str(seed), "--reward-noise-seed", str(seed), "--output-dir", str(folder)]
        if train.main(argv):
            raise RuntimeError(f"train.py {' '.join(argv)}: {said.getvalue().strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {name: windows([row[key] for row in rows]) for name, key in CURVES.items() if key in rows[0]}
    results = json.loads((folder / "results.json").read_text())
    shutil.rmtree(folder)  # weights are large and results small
    return task, {**results, **curves}


def run_grid(name, jobs, budget, methods, noises, seeds):
    """Runs what experiments/results/ does not hold yet, and adds it to noise-NAME.jsonl there line by line."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    finished = {(row["flags"], row["seed"]) for row in finished_runs()}
    todo = [(method, noise, seed, f"{budget} {GRIDS[name][0][method]} {NOISES[noise]}") for seed in seeds for noise in noises for method in methods]
    todo = [key for key in todo if (key[3], key[2]) not in finished]
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for number, stage in enumerate(([(None, None, seed, None) for seed in sorted({key[2] for key in todo})], todo)):
            done = pool.imap_unordered(run, [(key, scratch) for key in stage])
            for ((method, noise, seed, flags), _), results in tqdm(done, total=len(stage), desc=(f"{name}, {jobs} at a time", "warm starts")[not number]):
                if number:
                    with open(RESULTS / f"noise-{name}.jsonl", "a") as out:
                        out.write(json.dumps({"method": method, "noise": noise, "seed": seed, "flags": flags, **about, **results}) + "\n")
        pool.close()
        pool.join()


def finished_runs():
    return [json.loads(line) for file in sorted(RESULTS.glob("noise-*.jsonl")) for line in file.read_text().splitlines()]


def current(name, budget):
    """{(noise, method): {seed: finished run}} of exactly the flags that the grid has now: never two budgets or learning rates in one row."""
    runs = {(row["flags"], row["seed"]): row for row in finished_runs()}
    methods, noises, seeds = GRIDS[name]
    keys = [(noise, method, seed, (f"{budget} {methods[method]} {NOISES[noise]}", seed)) for noise in noises for method in methods for seed in seeds]
    found = {(noise, method): {} for noise, method, *_ in keys}
    for noise, method, seed, key in keys:
        if key in runs:
            found[noise, method][seed] = runs[key]
    return found


def bootstrap(values, resamples=4000):
    """Mean and 95 % bootstrap interval (percentiles)."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.fmean(values), means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def steps_to(rows, target):
    """The iteration at the end of the first window whose mean over rows is at or above target; None if there is none."""
    for number, values in enumerate(zip(*(row["true"] for row in rows)), 1):
        if statistics.fmean(values) >= target:
            return WINDOW * number
    return None


def summarise(found, reference):
    """Rows of (noise, method, number of seeds, {column: (mean, low, high)}, steps); differences are paired by seed with the reference."""
    clean = [row["true"][-1] for row in found.get(("none", reference), {}).values()]
    table = []
    for (noise, method), own in found.items():
        base = found[noise, reference]
        shared = sorted(own.keys() & base.keys())
        if len(shared) < 2:
            continue
        columns = {}
        for split in SPLITS:
            columns[split] = bootstrap([own[seed]["after"][split] for seed in shared])
            columns[f"{split}, difference"] = bootstrap([own[seed]["after"][split] - base[seed]["after"][split] for seed in shared])
        steps = steps_to([own[seed] for seed in shared], 0.9 * statistics.fmean(clean)) if clean else None
        table.append((noise, method, len(shared), columns, steps))
    return table


def print_table(found, reference):
    cell = lambda value: "{:6.3f} [{:.3f}, {:.3f}]".format(*value)
    minus = f"{'minus ' + reference:25}"
    print(f"\n{'noise':22}{'method':24}{'seeds':>6}  " + "".join(f"{split:25}{minus}" for split in SPLITS) + f"{'steps':>6}")
    for noise, method, seeds, columns, steps in summarise(found, reference):
        cells = [cell(columns[f"{split}{kind}"]) for split in SPLITS for kind in ("", ", difference")]
        print(f"{noise:22}{method:24}{seeds:6}  " + "".join(f"{text:25}" for text in cells) + f"{steps or '-':>6}")
    print("mean [95 % bootstrap interval over seeds]; differences paired by seed; steps: iterations until sampled accuracy while training, noise-free,\n"
          f"is 90 % of what {reference} ends with when there is no noise")  # fmt: skip


def plot(name, found, reference):
    """Two figures: accuracy over iterations with bands, and final accuracy with intervals, a panel per noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = summarise(found, reference)
    noises, methods = (list(dict.fromkeys(entry[i] for entry in table)) for i in (0, 1))
    if not table:
        return print("no figures: fewer than two seeds")
    colours = dict(zip(methods, [*pyplot.cm.tab10.colors, *pyplot.cm.Dark2.colors, *pyplot.cm.Set1.colors]))
    figure, axes = pyplot.subplots(1, len(noises), figsize=(1 + 2.6 * len(noises), 3.4), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], noises):
        for method in [entry[1] for entry in table if entry[0] == noise]:
            bands = [bootstrap(values, 500) for values in zip(*(row["true"] for row in found[noise, method].values()))]
            steps = [WINDOW * (i + 1) for i in range(len(bands))]
            axis.plot(steps, [band[0] for band in bands], color=colours[method], label=method)
            axis.fill_between(steps, [band[1] for band in bands], [band[2] for band in bands], color=colours[method], alpha=0.12, linewidth=0)
        axis.set(title=noise, xlabel="iteration")
    axes[0][0].set_ylabel("accuracy while training, sampled, noise-free")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"noise-{name}-curves.png", dpi=110)
    figure, axes = pyplot.subplots(1, len(noises), figsize=(1 + 2.6 * len(noises), 0.8 + 0.3 * len(methods)), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], noises):
        for _, method, _, columns, _ in [entry for entry in table if entry[0] == noise]:
            mean, low, high = columns["in domain, greedy"]
            height = -methods.index(method)
            axis.plot([low, high], [height, height], color=colours[method])
            axis.plot(mean, height, "o", color=colours[method])
        axis.set(title=noise, yticks=[-i for i in range(len(methods))], yticklabels=methods)
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
        RESULTS, grid, budget = ROOT / "runs", "quick", "--total-episodes 256 --batch-size 64 --critic-warmup-steps 1 --eval-samples 32"
        GRIDS["quick"] = ({name: GRIDS["main"][0][name] for name in ("ppo", "dvpo, critic floor", "grpo")}, ("none", "offset, outliers"), range(2))
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods, noises, seeds = GRIDS[grid]
    for flag, given, known in (("methods", args.methods, methods), ("noises", args.noises, noises)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"--{flag}: expected some of {', '.join(known)}; found {', '.join(unknown)}")
    if not args.table:
        run_grid(grid, args.jobs, budget, args.methods or methods, args.noises or noises, seeds[: args.seeds])
    found = current(grid, budget)
    reference = next(iter(methods))
    print_table(found, reference)
    plot(grid, found, reference)


if __name__ == "__main__":
    main()
