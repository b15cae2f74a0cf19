"""The noise laboratory: does the distribution pay, and when? Methods x kinds of noise x seeds.

    python experiments/noise.py --jobs 2                   # the main grid; 70 CPU seconds a run
    python experiments/noise.py --grid tuning --jobs 2     # or choice, ladder, long, rates, quick
    python experiments/noise.py --table                    # print what results/ holds

Finished runs stand in experiments/results/noise-*.jsonl (quick: runs/noise-quick/) and are skipped:
a grid may be stopped and gone on with, and grids share what they have in common. Per seed all
methods get the same warm start, number of completions, and order of prompts and noise.
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

from experiments import fit_tails
from experiments.seeds import COUNT, current_commit, load_run, new_parser, run_script, train_quietly
from experiments.strata import evaluated
from experiments.tables import RESULTS, add_row, compared, read_results, read_rows
from tasks import InputError

# 60 iterations of 128 completions, 4 steps of 32 each; in the first 10 only the critics learn.
BUDGET = "--total-episodes 7680 --num-ppo-epochs 1 --num-mini-batches 4 "
BUDGET += "--critic-learning-rate 3e-3 --critic-warmup-steps 10 --eval-samples 256"
QUICK = "--total-episodes 320 --batch-size 64 --critic-warmup-steps 1 --eval-samples 32"
CLEAN = "--reward-noise-fp 0 --reward-noise-fn 0"
NOISES = {
    "none": CLEAN,
    "flips 0.3": "--reward-noise-fp 0.3 --reward-noise-fn 0.3",
    "verifier": "--reward-noise-fp 0.01 --reward-noise-fn 0.22",
    "wrong labels 0.2": CLEAN + " --pseudo-label-noise 0.2",
    # The README's figure shows training under it.
    "reward model": CLEAN + " --reward-noise-model 1.05 --eval-steps 15",
    "judge failures": CLEAN + " --reward-noise-failure 0.03 3",
    "outliers": CLEAN + " --reward-noise-outlier 0.3 3",
}
METHODS = ("ppo", "dvpo", "robust", "grpo", "dr_grpo", "reinforce++")
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
# The best for each method by in-domain accuracy, greedy and sampled, in --grid tuning.
TUNED = dict(zip(METHODS, ("2e-4", "2e-4", "4e-4", "2e-4", "1e-4", "2e-4")))
TRIAL_SEEDS = 100  # seeds from here on are for choosing, the others for reporting
SPLITS = ("in domain, greedy", "out of domain, greedy")
COLUMNS = (*SPLITS, "all four")  # their mean, the sampled ones included
CURVES = {"true": "objective/true_scores", "ev": "val/explained_var", "kl": "objective/kl"}
CURVES |= {"heads": "quantile/head_spread", "length": "completions/mean_length"}
WINDOW = 5  # a curve is a mean over as many iterations


def tuned(name, flags="", rate=None):
    return f"--algo {name} --learning-rate {rate or TUNED[name]} {flags}".strip()


ALL = {name: tuned(name) for name in METHODS}
# The control has the bound, and no distribution.
BOUND = "--readout spread"
ALL |= {"dvpo, spread": tuned("dvpo", BOUND), "control": tuned("ppo", BOUND, "4e-4")}
# Term by term; all of them, without a flag, are the main grid's runs.
LADDER = {}
for name, weights in fit_tails.LADDER.items():
    off = (f"--{term}-weight 0" for term in " ".join(fit_tails.RUNGS).split() if not weights[term])
    LADDER[name] = tuned("dvpo", " ".join([BOUND, *off]))
CHOICE = {name: ALL[name] for name in ("ppo", "dvpo, spread", "reinforce++")}
for steps, name in itertools.product((0, 3), ("ppo", "dvpo, spread")):
    CHOICE[f"{name}, {steps} first"] = f"{ALL[name]} --critic-warmup-steps {steps}"
for width in (0.5, 2):
    CHOICE[f"dvpo, spread, width {width}"] = f"{ALL['dvpo, spread']} --readout-width {width}"
TRIED = {}
for rate in LEARNING_RATES:
    TRIED |= {f"{name}, lr {rate}": tuned(name, rate=rate) for name in METHODS}
    TRIED |= {f"dvpo, spread, lr {rate}": tuned("dvpo", BOUND, rate)}
    TRIED |= {f"control, lr {rate}": tuned("ppo", BOUND, rate)}
NAMES = ("ppo", "dvpo, spread", "control", "robust")  # is a lead the rate's, or the bound's?
RATES = [f"{name}, lr {rate}" for rate in ("2e-4", "1e-4", "4e-4") for name in NAMES]
LONG = [name for name in RATES if "4e-4" not in name and name != "robust, lr 1e-4"]
LONG += [f"{name}, lr {rate}" for name in ("grpo", "reinforce++") for rate in ("2e-4", "1e-4")]
LONGER = {name: f"{TRIED[name]} --total-episodes 19200" for name in LONG}  # 150 iterations
GRIDS = {  # name: (methods, noises, seeds); differences are to the first method
    "main": (ALL, tuple(NOISES), range(20, 30)),
    "tuning": (TRIED, ("flips 0.3", "outliers"), range(TRIAL_SEEDS, TRIAL_SEEDS + 2)),
    "rates": ({name: TRIED[name] for name in RATES}, tuple(NOISES), range(20, 30)),
    "quick": ({name: ALL[name] for name in ("ppo", "dvpo")}, ("none",), range(2)),
    "ladder": (LADDER, ("flips 0.3", "reward model"), range(20, 25)),
    "choice": (CHOICE, ("none", "flips 0.3", "reward model", "outliers"), range(100, 104)),
    "long": (LONGER, ("flips 0.3", "reward model", "outliers", "judge failures"), range(20, 30)),
}


def flags_of(grid, method, noise):
    return f"{QUICK if grid == 'quick' else BUDGET} {GRIDS[grid][0][method]} {NOISES[noise]}"


def seeded(flags, seed, folder):
    """All flags of a run, in a list; its critic has as many quantiles as a pretrained model's."""
    own = f"{flags} --num-quantiles 200 --seed {seed} --reward-noise-seed {seed}"
    return [*own.split(), "--output-dir", str(folder)]


def windows(values):
    """Means over every WINDOW values, None left out."""
    found = []
    for i in range(0, len(values) - WINDOW + 1, WINDOW):
        known = [value for value in values[i : i + WINDOW] if value is not None]
        found.append(round(statistics.fmean(known), 4) if known else None)
    return found


@contextlib.contextmanager
def run_folder(seed):
    """A folder for a run, with the seed's warm start if there is one; a new one is kept."""
    warm = Path("runs") / f"warm-dialogue-seed{seed}"
    with tempfile.TemporaryDirectory() as folder:
        if warm.exists():
            shutil.copytree(warm, Path(folder) / "warm_start")
        yield Path(folder)
        if not warm.exists():
            # There in one step, as other processes may look, and the first of them wins.
            own = warm.with_name(f"{warm.name}-{os.getpid()}")
            shutil.copytree(Path(folder) / "warm_start", own, dirs_exist_ok=True)
            with contextlib.suppress(OSError):
                own.rename(warm)
            shutil.rmtree(own, ignore_errors=True)


def run(flags, seed):
    """One run of train.py -> its results, and what it was made with."""
    torch.set_num_threads(1)
    with run_folder(seed) as folder:
        train_quietly(seeded(flags, seed, folder))
        rows = read_rows(folder / "metrics.jsonl")
        curve = [{k: v for k, v in row.items() if k[:4] in ("iter", "eval")} for row in rows]
        versions = json.loads((folder / "args.json").read_text())["versions"]
        results = json.loads((folder / "results.json").read_text())
        with contextlib.redirect_stderr(io.StringIO()):
            found = evaluated(*load_run(folder), "after")
    named = {name: key for name, key in CURVES.items() if key in rows[0]}
    curves = {name: windows([row[key] for row in rows]) for name, key in named.items()}
    curves["curve"] = [row for row in curve if len(row) > 1]
    results["after"] = found.pop("after") | results["after"]
    return {"flags": flags, **versions, **results, **found, **curves}


def pooled(function, todo, jobs, method="fork"):
    """function(*arguments) for {key: arguments}: yields (key, result) of each that did not fail.

    Forks share what is imported; a GPU takes the method spawn. A process has one call at a time.
    """
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(function, *arguments): key for key, arguments in todo.items()}
        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(futures), desc=f"{jobs} at a time"):
                if future.exception():
                    tqdm.write(f"{Path(sys.argv[0]).name}: {future.exception()}", file=sys.stderr)
                else:
                    yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C


def add_all(run, todo, jobs, target, about, method="fork"):
    """run(*arguments) for {(method, noise, seed): arguments}, a row of target each -> failures."""
    for key, found in pooled(run, todo, jobs, method):
        todo.pop(key)
        add_row(target, dict(zip(("method", "noise", "seed"), key)) | about | found)
    return len(todo)


def run_grid(name, jobs, seeds):
    """Runs what results/ lacks, adds it to noise-NAME.jsonl line by line -> number of failures."""
    (methods, noises, _), todo = GRIDS[name], {}
    finished = {(row["flags"], row["seed"]) for row in finished_runs()}
    for seed, noise, method in itertools.product(seeds, noises, methods):
        flags = flags_of(name, method, noise)
        if (flags, seed) not in finished:
            todo[method, noise, seed] = flags, seed
    return add_all(run, todo, jobs, RESULTS / f"noise-{name}.jsonl", {"commit": current_commit()})


def finished_runs():
    """All of them, whichever grid made them."""
    files = sorted(RESULTS.glob("noise-*.jsonl"))
    return [row for file in files for row in read_results(file, "flags", "seed", "before", "after")]


def current(name, seeds=None):
    """{(noise, method): {seed: run}} of just the grid's flags now: never two budgets in one row."""
    methods, noises, own = GRIDS[name]
    seeds = seeds or (own if own[0] >= TRIAL_SEEDS else range(TRIAL_SEEDS))
    runs, keys = {}, itertools.product(noises, methods)
    for row in finished_runs():
        if row["seed"] in seeds:
            runs.setdefault(row["flags"], {})[row["seed"]] = row
    return {key: runs.get(flags_of(name, key[1], key[0]), {}) for key in keys}


def averaged(found):
    """{(noise, method): {seed: run}} -> the same of one noise, the mean of all: shared seeds."""
    means = {}
    for method in dict.fromkeys(method for _, method in found):
        noises = [own for (_, name), own in found.items() if name == method]
        own = means["averaged", method] = {seed: {} for seed in set.intersection(*map(set, noises))}
        for seed, run in own.items():
            for when in ("before", "after"):
                rows = [noise[seed][when] for noise in noises]
                keys = set.intersection(*map(set, rows))
                run[when] = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    return means


def summarise(found, reference, splits=COLUMNS):
    """Rows (noise, method, seeds, {split: as compared has it}, explained variance at the end)."""
    table = []
    for (noise, method), runs in found.items():
        base, what = found[noise, reference], f"{noise}, {method}"
        for seed in runs.keys() & base.keys():
            # Sampled scores before training depend on --batch-size, too.
            one, two = runs[seed]["before"], base[seed]["before"]
            if any(one.get(split) != two.get(split) for split in splits):
                expected = f"expected the warm start of {reference}, found another"
                raise InputError(f"results: {what}: {expected}")
        own, other = ({seed: run["after"] for seed, run in part.items()} for part in (runs, base))
        seeds, columns = compared(what, own, other, splits)
        ends = [end for seed in seeds for end in runs[seed].get("ev", [])[-1:] if end is not None]
        explained = round(statistics.fmean(ends), 2) + 0 if ends else ""
        table += [(noise, method, seeds, columns, explained)] if columns else []
    return table


def print_table(table, reference, splits=COLUMNS):
    width = max(23, len(f"minus {reference} "))
    heads = "".join(f"{split:{width}}{'minus ' + reference:{width}}" for split in splits)
    print(f"\n{'noise':20}{'method':28}{'seeds':>6}  {heads}{'ev':>6}")
    cell = 2 * "{:6.3f} ±{:<{rest}.3f}"
    for noise, method, seeds, columns, explained in table:
        cells = "".join(cell.format(*column, rest=width - 8) for column in columns.values())
        print(f"{noise:20}{method:28}{len(seeds):6}  {cells}{explained:>6}")
    print("mean ± half of Student's 95 % interval, paired by seed; ev: explained variance at last")


def run_and_print(args):
    if args.grid == "quick":
        global RESULTS
        RESULTS = Path("runs/noise-quick")
        RESULTS.mkdir(parents=True, exist_ok=True)
    methods, _, seeds = GRIDS[args.grid]
    reference = args.reference or next(iter(methods))
    if reference not in methods:
        expected = f"expected one of {', '.join(map(repr, methods))}"
        raise InputError(f"--reference: {expected}, found {reference!r}")
    failed = 0 if args.table else run_grid(args.grid, args.jobs, seeds[: args.seeds])
    found = current(args.grid, args.seeds and seeds[: args.seeds])
    table = summarise(found | averaged(found), reference)
    if args.table and not table:
        expected = f"expected runs of two seeds and {reference} in {RESULTS / 'noise-*.jsonl'}"
        raise InputError(f"--grid {args.grid}: {expected}, found fewer")
    print_table(table, reference)
    if failed:
        sys.exit(f"noise.py: {failed} runs failed")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="main")
    parser.add_argument("--jobs", type=COUNT, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=COUNT, help="only so many of the grid's")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--reference", help="the method that differences are to: else the first")
    run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
