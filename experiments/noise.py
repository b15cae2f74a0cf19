"""The noise laboratory: does the distribution pay, and when? Algorithms x kinds of reward noise x seeds, on the built-in task.

    python experiments/noise.py --jobs 2                  # the main grid; 15 to 60 seconds a run, --jobs runs at a time
    python experiments/noise.py --noises outliers --methods "dvpo, critic floor" --seeds 3    # a part of it, PPO always beside
    python experiments/noise.py --grid tuning --jobs 2    # the learning rates that the main grid uses, on seeds of their own
    python experiments/noise.py --grid ladder --jobs 2    # also: quantiles, risk, lam, floor, rates, setups, flags
    python experiments/noise.py --quick                   # a few short runs, to see that it works; numbers mean nothing
    python experiments/noise.py --table                   # only print and plot what experiments/results/ holds

One thread a run. Finished runs stand in experiments/results/noise-*.jsonl and are skipped, so a grid may be stopped and gone on
with, and grids share what they have in common. Per seed all methods get the same warm start, the same number of sampled completions,
and prompts and noise in the same order (GRPO and Dr. GRPO: an eighth of the prompts, 8 completions each).
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.seeds import ROOT, current_commit, interval

RESULTS = ROOT / "experiments" / "results"
# 60 iterations of 128 completions, 4 optimiser steps of 32 each; in the first 10 only the critics learn. The critics' learning rate is
# the same for all that have one, chosen beforehand: at 1e-3 they had learned nothing of a learnable offset in 20 iterations.
BUDGET = "--total-episodes 7680 --num-ppo-epochs 1 --num-mini-batches 4 --critic-learning-rate 3e-3 --critic-warmup-steps 10 --eval-samples 256"
CLEAN = "--reward-noise-fp 0 --reward-noise-fn 0"
QUICK = "--total-episodes 320 --batch-size 64 --critic-warmup-steps 1 --eval-samples 32"
NOISES = {
    "none": CLEAN,
    "flips 0.3": "--reward-noise-fp 0.3 --reward-noise-fn 0.3",
    "false negatives 0.4": "--reward-noise-fp 0 --reward-noise-fn 0.4",
    "outliers": CLEAN + " --reward-noise-outlier 0.3 3",
    "pseudo-labels 0.3": CLEAN + " --pseudo-label-noise 0.3",
    "offset": CLEAN + " --reward-offset 3",
    "offset, outliers": CLEAN + " --reward-offset 3 --reward-noise-outlier 0.3 3",
}
MAIN = tuple(NOISES)
NOISES |= {f"outliers {p}": f"{CLEAN} --reward-noise-outlier {p} 3" for p in (0.1, 0.5)}
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")  # what --grid tuning tries for each method, under flips 0.3 and outliers
METHODS = ("ppo", "dvpo", "robust", "grpo", "dr_grpo", "reinforce++")
FLOORS = {
    "ppo, batch floor": ("ppo", "--score-floor batch"),
    "ppo, residual floor": ("ppo", "--score-floor residual"),
    "dvpo, critic floor": ("dvpo", "--score-floor critic"),
}
# The best of LEARNING_RATES by mean in-domain accuracy, greedy and sampled, in --grid tuning; a floor keeps its method's.
TUNED = {"ppo": "2e-4", "dvpo": "2e-4", "robust": "1e-4", "grpo": "2e-4", "dr_grpo": "1e-4", "reinforce++": "2e-4"}
LADDER = ("consistency", "calibration", "shift", "shape", "curvature")


def tuned(name, *more):
    return " ".join((f"--algo {name} --learning-rate {TUNED[name]}", *filter(None, more)))


def weights(value, terms=LADDER):
    return " ".join(f"--{term}-weight {value}" for term in terms)


def unless(usual, value, flag):
    """The flag, or nothing where it would only say the default, so that such runs are the main grid's."""
    return "" if value == usual else f"{flag} {value}"


TRIAL_SEEDS = 100  # seeds from here on are for choosing, the others for reporting
SOME = ("flips 0.3", "offset, outliers")  # a critic explains nothing of the one, and 0.4 of the other
OUTLYING = ("none", "outliers", "offset, outliers")
TRIED = {f"{name}, lr {lr}": f"--algo {name} --learning-rate {lr}" for name in METHODS for lr in LEARNING_RATES}
PAIR = {"ppo": ("ppo",), "dvpo, critic floor": FLOORS["dvpo, critic floor"]}
SETUPS = {"": (), ", lam 1": ("--lam 1",), ", warm-up 3": ("--critic-warmup-steps 3",)}
ONE_FLAG = {  # beside BUDGET's value or train.py's: a quarter and four times of it, where that makes sense; the critics' warm-up is about the same share
    "learning-rate": ("5e-5", "8e-4"),
    "critic-learning-rate": ("7.5e-4", "1.2e-2"),
    "batch-size": ("32 --critic-warmup-steps 40", "512 --critic-warmup-steps 2"),
    "num-ppo-epochs": ("2", "4"),
    "num-mini-batches": ("1", "16"),
    "critic-warmup-steps": ("0", "30"),
    "kl-coef": ("0", "0.08"),
    "cliprange": ("0.05", "0.8"),
    "lam": ("0.8", "1.0"),
    "gamma": ("0.9", "0.98"),
    "temperature": ("0.7", "1.3"),
}
RUNGS = {"core": 0, "+ consistency": 1, "+ calibration": 2, "+ shift": 3, "+ shape, curvature": 5}
GRIDS = {  # name: (methods: flags, noises, seeds); differences are to the first method
    "main": ({name: tuned(name) for name in METHODS} | {name: tuned(*flags) for name, flags in FLOORS.items()}, MAIN, range(10)),
    "tuning": (TRIED, ("flips 0.3", "outliers"), range(TRIAL_SEEDS, TRIAL_SEEDS + 2)),
    "ladder": ({name: tuned("dvpo", weights(0, LADDER[steps:])) for name, steps in RUNGS.items()}, SOME, range(3)),
    "quantiles": ({f"M = {m}": tuned("dvpo", unless(200, m, "--num-quantiles")) for m in (1, 8, 50, 200, 500)}, SOME, range(3)),
    "risk": ({f"weight {w}": tuned("dvpo", weights(w)) for w in (0, 0.01, 0.1, 1)}, SOME, range(3)),
    "lam": ({f"{name}, lam {lam}": tuned(name, unless(0.95, lam, "--lam")) for name in ("ppo", "dvpo") for lam in (0.9, 0.95, 1)}, SOME, range(3)),
    "quick": ({name: tuned(*FLOORS.get(name, (name,))) for name in ("ppo", "dvpo, critic floor", "grpo")}, ("none", "offset, outliers"), range(2)),
    "floor": ({f"level {a}": tuned(*FLOORS["dvpo, critic floor"], unless(0.3, a, "--score-floor-level")) for a in (0.1, 0.3, 0.5)}, OUTLYING, range(5)),
    # The default spelled out, and 1.0 for 1: or those runs would be other grids', from another machine.
    "flags": ({"defaults": tuned("dvpo", "--cliprange 0.2")}
              | {f"{flag} {value.split()[0]}": tuned("dvpo", f"--{flag} {value}") for flag, values in ONE_FLAG.items() for value in values}, SOME, range(3)),
    "rates": ({name: tuned(*flags) for name, flags in PAIR.items()}, ("outliers 0.1", "outliers 0.5"), range(3)),
    "setups": ({name + setup: tuned(*flags, *more) for setup, more in SETUPS.items() for name, flags in PAIR.items()}, ("outliers",), range(3)),
}
SPLITS = ("in domain, greedy", "out of domain, greedy")
CURVES = {"true": "objective/true_scores", "ev": "val/explained_var", "kl": "objective/kl", "coverage": "quantile/coverage"}
WINDOW = 5  # a curve is a mean over as many iterations


def flags_of(grid, method, noise):
    return f"{QUICK if grid == 'quick' else BUDGET} {GRIDS[grid][0][method]} {NOISES[noise]}"


def windows(values):
    """Means over every WINDOW values, None left out."""
    parts = [[value for value in values[i : i + WINDOW] if value is not None] for i in range(0, len(values) - WINDOW + 1, WINDOW)]
    return [round(statistics.fmean(part), 4) if part else None for part in parts]


def warm(seed, scratch):
    from experiments.warm_start import warm_start

    with contextlib.redirect_stderr(io.StringIO()):
        warm_start("dialogue", seed, Path(scratch) / f"warm-{seed}")


def run(flags, seed, scratch):
    """One run of train.py in a worker process -> its results; raises RuntimeError with one line."""
    import train

    folder, said = Path(scratch) / f"run-{os.getpid()}", io.StringIO()
    shutil.rmtree(folder, ignore_errors=True)  # what a failed run left
    shutil.copytree(Path(scratch) / f"warm-{seed}", folder / "warm_start")
    argv = [*flags.split(), "--seed", str(seed), "--reward-noise-seed", str(seed), "--output-dir", str(folder)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            failed = train.main(argv)
        except SystemExit:
            failed = True
    if failed:
        raise RuntimeError(f"train.py {' '.join(argv)}: {said.getvalue().strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {name: windows([row[key] for row in rows]) for name, key in CURVES.items() if key in rows[0]}
    return {**json.loads((folder / "results.json").read_text()), **curves}


def run_grid(name, jobs, methods, noises, seeds):
    """Runs what experiments/results/ does not hold yet, and adds it to noise-NAME.jsonl there line by line -> number of failed runs."""
    import torch
    import transformers

    about = {"commit": current_commit(), "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    todo = [(method, noise, seed, flags_of(name, method, noise)) for seed in seeds for noise in noises for method in methods]
    finished = {(row["flags"], row["seed"]) for row in finished_runs()}
    todo, failed = [key for key in todo if (key[3], key[2]) not in finished], 0
    processes = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with tempfile.TemporaryDirectory() as scratch, processes as pool:
        try:
            warm_seeds = sorted({seed for _, _, seed, _ in todo})
            list(tqdm(pool.map(warm, warm_seeds, itertools.repeat(scratch)), total=len(warm_seeds), desc="warm starts"))
            keys = {pool.submit(run, flags, seed, scratch): (method, noise, seed, flags) for method, noise, seed, flags in todo}
            for future in tqdm(concurrent.futures.as_completed(keys), total=len(keys), desc=f"{name}, {jobs} at a time"):
                if future.exception():
                    tqdm.write(f"noise.py: {future.exception()}", file=sys.stderr)
                    failed += 1
                    continue
                row = dict(zip(("method", "noise", "seed", "flags"), keys[future])) | about | future.result()
                with open(RESULTS / f"noise-{name}.jsonl", "a") as out:
                    out.write(json.dumps(row) + "\n")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def finished_runs():
    """All of them, whichever grid made them; a line that is not JSON (torn when a machine stopped) ends the program with its place."""
    runs = []
    for file in sorted(RESULTS.glob("noise-*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                runs.append(json.loads(line))
            except ValueError:
                sys.exit(f"noise.py: {file}, line {number}: expected a run as JSON, found {line[:40]!r}: delete the line")
    return runs


def current(name):
    """{(noise, method): {seed: finished run}} of exactly the flags that the grid has now: never two budgets or learning rates in one row."""
    runs = {(row["flags"], row["seed"]): row for row in finished_runs()}
    methods, noises, own = GRIDS[name]
    seeds = own if own[0] >= TRIAL_SEEDS else sorted({seed for _, seed in runs if seed < TRIAL_SEEDS})
    keys = {(noise, method): flags_of(name, method, noise) for noise in noises for method in methods}
    return {key: {seed: runs[flags, seed] for seed in seeds if (flags, seed) in runs} for key, flags in keys.items()}


def mean_and_interval(values):
    """(mean, low, high): Student's 95 % interval of the mean. A percentile bootstrap of ten values would cover 90 %, of five 84 %."""
    mean, half = interval(values)
    return mean, mean - half, mean + half


def steps_to(rows, target):
    """The iteration at the end of the first window whose mean over rows is at or above target; None if there is none."""
    for number, values in enumerate(zip(*(row["true"] for row in rows)), 1):
        if statistics.fmean(values) >= target:
            return WINDOW * number
    return None


def summarise(found, reference):
    """Rows of (noise, method, seeds, {column: (mean, low, high)}, explained variance, steps); differences are paired by seed."""
    table = []
    for (noise, method), own in found.items():
        base, clean = found[noise, reference], found.get(("none", reference), {})
        shared = sorted(own.keys() & base.keys())
        if len(shared) < 2:
            continue
        same = all(own[seed]["before"][split] == base[seed]["before"][split] for seed in shared for split in SPLITS)  # sampled: by --batch-size, too
        assert same, f"{noise}, {method}: another warm start than {reference}"
        columns = {}
        for split in SPLITS:
            columns[split] = mean_and_interval([own[seed]["after"][split] for seed in shared])
            columns[f"{split}, difference"] = mean_and_interval([own[seed]["after"][split] - base[seed]["after"][split] for seed in shared])
        explained = statistics.fmean(own[seed]["ev"][-1] for seed in shared) if "ev" in own[shared[0]] else None
        steps = ""
        if clean.keys() >= set(shared):
            goal = 0.9 * statistics.fmean(clean[seed]["true"][-1] for seed in shared)
            steps = steps_to([own[seed] for seed in shared], goal) or "never"
        table.append((noise, method, shared, columns, explained, steps))
    return table


def print_table(table, reference):
    cell, width = lambda value: "{:6.3f} [{:.3f}, {:.3f}]".format(*value), max([24, *(len(row[1]) + 1 for row in table)])
    minus = f"{'minus ' + reference:25}"
    print(f"\n{'noise':20}{'method':{width}}{'seeds':>6}  " + "".join(f"{split:25}{minus}" for split in SPLITS) + f"{'ev':>6}{'steps':>7}")
    for noise, method, seeds, columns, explained, steps in table:
        cells = [cell(columns[f"{split}{kind}"]) for split in SPLITS for kind in ("", ", difference")]
        explained = "" if explained is None else f"{explained:.2f}"
        print(f"{noise:20}{method:{width}}{len(seeds):6}  " + "".join(f"{text:25}" for text in cells) + f"{explained:>6}{steps:>7}")
    print("mean [Student's 95 % interval over seeds]; differences paired by seed. ev: the critic's explained variance at the end. steps: iterations until\n"
          f"accuracy while training (sampled, noise-free) is 90 % of what {reference} ends with when there is no noise.")  # fmt: skip


def plot(name, table, found):
    """Two figures: accuracy over iterations with bands, and final accuracy with intervals, a panel per noise."""
    try:
        import matplotlib
    except ImportError:
        return print("no figures: they need matplotlib, which is in requirements-dev.txt")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    noises, methods = (list(dict.fromkeys(entry[i] for entry in table)) for i in (0, 1))
    colours = dict(zip(methods, [*pyplot.cm.tab10.colors, *pyplot.cm.Dark2.colors, *pyplot.cm.Set1.colors]))
    curves, curve_axes = pyplot.subplots(1, len(noises), figsize=(1 + 2.6 * len(noises), 3.4), sharey=True, squeeze=False)
    dots, dot_axes = pyplot.subplots(1, len(noises), figsize=(1 + 2.6 * len(noises), 0.8 + 0.3 * len(methods)), sharey=True, squeeze=False)
    for noise, method, seeds, columns, *_ in table:
        colour, axis, other = colours[method], curve_axes[0][noises.index(noise)], dot_axes[0][noises.index(noise)]
        bands = [mean_and_interval(values) for values in zip(*(found[noise, method][seed]["true"] for seed in seeds))]
        steps = [WINDOW * (i + 1) for i in range(len(bands))]
        axis.plot(steps, [band[0] for band in bands], color=colour, label=method)
        axis.fill_between(steps, [band[1] for band in bands], [band[2] for band in bands], color=colour, alpha=0.1, linewidth=0)
        axis.set(title=noise, xlabel="iteration")
        mean, low, high = columns["in domain, greedy"]
        other.plot([low, high], [-methods.index(method)] * 2, color=colour)
        other.plot(mean, -methods.index(method), "o", color=colour)
        other.set(title=noise, yticks=[-i for i in range(len(methods))], yticklabels=methods)
        other.grid(axis="x", alpha=0.3)
    curve_axes[0][0].set_ylabel("accuracy while training, sampled, noise-free")
    curve_axes[0][0].legend(fontsize=7, frameon=False)
    dots.supxlabel("held-out accuracy, greedy, after training", fontsize=9)
    for kind, figure in (("curves", curves), ("dots", dots)):
        figure.tight_layout()
        figure.savefig(RESULTS / f"noise-{name}-{kind}.png", dpi=110)
    print(f"written: noise-{name}-curves.png, noise-{name}-dots.png in {RESULTS.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", choices=[name for name in GRIDS if name != "quick"], default="main")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, help="how many; default what the grid names")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these of the grid's, and its first, to which differences are taken")
    parser.add_argument("--noises", nargs="+", metavar="NAME", help="only these of the grid's")
    parser.add_argument("--quick", action="store_true", help="three methods, two noises, two seeds, five iterations; into runs/noise-quick/")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    grid = args.grid
    if args.quick:
        global RESULTS
        RESULTS, grid = ROOT / "runs" / "noise-quick", "quick"
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods, noises, seeds = GRIDS[grid]
    for flag, given, known in (("methods", args.methods, methods), ("noises", args.noises, noises)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"--{flag}: expected some of {', '.join(known)}; found {', '.join(unknown)}")
    for flag, given in (("jobs", args.jobs), ("seeds", args.seeds)):
        if given is not None and given < 1:
            parser.error(f"--{flag}: expected at least 1, found {given}")
    reference, failed = next(iter(methods)), 0
    chosen = [method for method in methods if args.methods is None or method in (reference, *args.methods)]
    if not args.table:
        try:
            failed = run_grid(grid, args.jobs, chosen, args.noises or noises, range(seeds[0], seeds[0] + (args.seeds or len(seeds))))
        except KeyboardInterrupt:
            sys.exit("noise.py: stopped; finished runs are kept, and the same command goes on")
    found = {key: runs for key, runs in current(grid).items() if key[0] in (args.noises or noises)}
    table = summarise(found, reference)
    print_table(table, reference)
    if table:
        plot(grid, table, found)
    if failed:
        sys.exit(f"noise.py: {failed} runs failed")


if __name__ == "__main__":
    main()
