"""The noise laboratory: does the distribution pay, and when? Methods x kinds of noise x seeds.

    python experiments/noise.py --jobs 2                   # the main grid; 15 to 60 seconds a run
    python experiments/noise.py --grid tuning --jobs 2     # or ladder, quantiles, risk, lam, flags
    python experiments/noise.py --quick                    # short runs; their numbers mean nothing
    python experiments/noise.py --table                    # print what results/ holds

Finished runs stand in experiments/results/noise-*.jsonl and are skipped: a grid may be stopped and
gone on with, and grids share what they have in common. Per seed all methods get the same warm
start, number of completions, and order of prompts and noise.
"""

import argparse
import concurrent.futures
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from experiments.seeds import RESULTS, ROOT, current_commit, interval, json_lines, train
from harness.flags import number_in

# 60 iterations of 128 completions, 4 steps of 32 each; in the first 10 only the critics learn. At
# a critic's learning rate of 1e-3 they had learned no offset in 20 iterations.
BUDGET = (
    "--total-episodes 7680 --num-ppo-epochs 1 --num-mini-batches 4 "
    "--critic-learning-rate 3e-3 --critic-warmup-steps 10 --eval-samples 256"
)
QUICK = "--total-episodes 320 --batch-size 64 --critic-warmup-steps 1 --eval-samples 32"
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
SOME = ("flips 0.3", "offset, outliers")  # a critic explains nothing of the one, 0.4 of the other
METHODS = ("ppo", "dvpo", "robust", "grpo", "dr_grpo", "reinforce++")
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
# The best for each method by in-domain accuracy, greedy and sampled, in --grid tuning.
TUNED = dict(zip(METHODS, ("2e-4", "2e-4", "1e-4", "2e-4", "1e-4", "2e-4")))
TRIAL_SEEDS = 100  # seeds from here on are for choosing, the others for reporting
RUNGS = {"core": 0, "+ consistency": 1, "+ calibration": 2, "+ shift": 3, "+ shape, curvature": 5}
TERMS = ("consistency", "calibration", "shift", "shape", "curvature")
# A quarter and four times, where that makes sense; warm-ups are about the same share.
ONE_FLAG = """
    learning-rate 5e-5, learning-rate 8e-4, critic-learning-rate 7.5e-4,
    critic-learning-rate 1.2e-2, batch-size 32 --critic-warmup-steps 40,
    batch-size 512 --critic-warmup-steps 2, num-ppo-epochs 2, num-ppo-epochs 4,
    num-mini-batches 1, num-mini-batches 16, critic-warmup-steps 0, critic-warmup-steps 30,
    kl-coef 0, kl-coef 0.08, cliprange 0.05, cliprange 0.8, lam 0.8, lam 1.0, gamma 0.9,
    gamma 0.98, temperature 0.7, temperature 1.3"""
ONE_FLAG = [flag.strip() for flag in ONE_FLAG.split(",")]
SPLITS = ("in domain, greedy", "out of domain, greedy")
CURVES = {"true": "objective/true_scores", "ev": "val/explained_var", "kl": "objective/kl"}
FILES = ("args", "results")
WINDOW = 5  # a curve is a mean over as many iterations


def tuned(name, flags=""):
    return f"--algo {name} --learning-rate {TUNED[name]} {flags}".strip()


def weights(value, terms=TERMS):
    return tuned("dvpo", " ".join(f"--{term}-weight {value}" for term in terms))


SWEEPS = {  # grid: {method: flags}; without its flag, a default's runs are the main grid's
    "ladder": {name: weights(0, TERMS[count:]) for name, count in RUNGS.items()},
    "quantiles": {
        f"M = {m}": tuned("dvpo", f"--num-quantiles {m}" * (m != 200)) for m in (1, 8, 50, 200, 500)
    },
    "risk": {f"weight {value}": weights(value) for value in (0, 0.01, 0.1, 1)},
    "lam": {
        f"{name}, lam {lam}": tuned(name, f"--lam {lam}" * (lam != 0.95))
        for name, lam in itertools.product(("ppo", "dvpo"), (0.9, 0.95, 1))
    },
    # The default spelled out: or those runs would be another grid's, from another machine.
    "flags": {"defaults": tuned("dvpo", "--cliprange 0.2")}
    | {" ".join(flag.split()[:2]): tuned("dvpo", f"--{flag}") for flag in ONE_FLAG},
}
TRIED = {
    f"{name}, lr {lr}": f"--algo {name} --learning-rate {lr}"
    for name, lr in itertools.product(METHODS, LEARNING_RATES)
}
ALL = {name: tuned(name) for name in METHODS}
FEW = {name: ALL[name] for name in ("ppo", "dvpo")}
GRIDS = {  # name: (methods, noises, seeds); differences are to the first method
    "main": (ALL, tuple(NOISES), range(10)),
    "tuning": (TRIED, ("flips 0.3", "outliers"), range(TRIAL_SEEDS, TRIAL_SEEDS + 2)),
    "quick": (FEW, ("none", "offset, outliers"), range(2)),
    **{name: (methods, SOME, range(3)) for name, methods in SWEEPS.items()},
}


def flags_of(grid, method, noise):
    return f"{QUICK if grid == 'quick' else BUDGET} {GRIDS[grid][0][method]} {NOISES[noise]}"


def windows(values):
    """Means over every WINDOW values, None left out."""
    found = []
    for i in range(0, len(values) - WINDOW + 1, WINDOW):
        known = [value for value in values[i : i + WINDOW] if value is not None]
        found.append(round(statistics.fmean(known), 4) if known else None)
    return found


def run(flags, seed):
    """One run of train.py -> its results, and what it was made with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train([*flags.split(), *f"--seed {seed} --reward-noise-seed {seed}".split()], folder)
        rows = json_lines(folder / "metrics.jsonl")
        named = {name: key for name, key in CURVES.items() if key in rows[0]}
        curves = {name: windows([row[key] for row in rows]) for name, key in named.items()}
        about, results = (json.loads((folder / f"{file}.json").read_text()) for file in FILES)
    return {**about["versions"], **results, **curves}


def run_grid(name, jobs, methods, noises, seeds):
    """Runs what results/ lacks, adds it to noise-NAME.jsonl line by line -> number of failures."""
    commit, finished = current_commit(), {(row["flags"], row["seed"]) for row in finished_runs()}
    todo, failed = [], 0
    for seed, noise, method in itertools.product(seeds, noises, methods):
        flags = flags_of(name, method, noise)
        if (flags, seed) not in finished:
            key = {"method": method, "noise": noise, "seed": seed, "flags": flags}
            todo.append({**key, "commit": commit})
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, key["flags"], key["seed"]): key for key in todo}
        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(todo), desc=f"{name}, {jobs} at a time"):
                if future.exception():
                    tqdm.write(f"noise.py: {future.exception()}", file=sys.stderr)
                    failed += 1
                    continue
                with open(RESULTS / f"noise-{name}.jsonl", "a") as out:
                    out.write(json.dumps(futures[future] | future.result()) + "\n")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def finished_runs():
    """All of them, whichever grid made them; a torn line ends the program with its place."""
    runs = []
    for file in sorted(RESULTS.glob("noise-*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                runs.append(json.loads(line))
            except ValueError:
                found = f"expected a run as JSON, found {line[:40]!r}: delete the line"
                sys.exit(f"noise.py: {file}, line {number}: {found}")
    return runs


def current(name):
    """{(noise, method): {seed: run}} of just the grid's flags now: never two budgets in one row."""
    methods, noises, own = GRIDS[name]
    runs, keys = {}, itertools.product(noises, methods)
    for row in finished_runs():
        if row["seed"] in own or max(own[0], row["seed"]) < TRIAL_SEEDS:
            runs.setdefault(row["flags"], {})[row["seed"]] = row
    return {key: runs.get(flags_of(name, key[1], key[0]), {}) for key in keys}


def steps_to(rows, target):
    """The last iteration of the first window whose mean over rows reaches target, or "never"."""
    for number, values in enumerate(zip(*(row["true"] for row in rows)), 1):
        if statistics.fmean(values) >= target:
            return WINDOW * number
    return "never"


def summarise(found, reference):
    """Rows (noise, method, seeds, {column: (mean, half-width)}, explained variance, steps)."""
    table = []
    for (noise, method), own in found.items():
        base, clean = found[noise, reference], found.get(("none", reference), {})
        seeds = sorted(own.keys() & base.keys())
        if len(seeds) < 2:
            continue
        columns = {}
        for split in SPLITS:
            # Sampled scores before training depend on --batch-size, too.
            same = all(own[seed]["before"][split] == base[seed]["before"][split] for seed in seeds)
            assert same, f"{noise}, {method}: another warm start than {reference}"
            after, other = ([runs[seed]["after"][split] for seed in seeds] for runs in (own, base))
            columns[split] = interval(after)
            # Paired by seed.
            columns[f"{split}, difference"] = interval([a - b for a, b in zip(after, other)])
        runs, explained, steps = [own[seed] for seed in seeds], "", ""
        if "ev" in runs[0]:
            explained = round(statistics.fmean(run["ev"][-1] for run in runs), 2)
        if clean.keys() >= set(seeds):
            goal = 0.9 * statistics.fmean(clean[seed]["true"][-1] for seed in seeds)
            steps = steps_to(runs, goal)
        table.append((noise, method, seeds, columns, explained, steps))
    return table


def print_table(table, reference):
    heads = "".join(f"{split:23}{'minus ' + reference:23}" for split in SPLITS)
    print(f"\n{'noise':20}{'method':28}{'seeds':>6}  {heads}{'ev':>6}{'steps':>7}")
    for noise, method, seeds, columns, explained, steps in table:
        cells = "".join("{:6.3f} ±{:<15.3f}".format(*column) for column in columns.values())
        print(f"{noise:20}{method:28}{len(seeds):6}  {cells}{explained:>6}{steps:>7}")
    print("mean ± half of Student's 95 % interval over seeds; differences paired by seed. ev: the")
    print("critic's explained variance at the end. steps: iterations until accuracy while training")
    print(f"(sampled, noise-free) is 90 % of what {reference} ends with when there is no noise.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", choices=GRIDS, default="main")
    count = number_in("[1, inf)", int)
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=count, help="only so many of the grid's")
    parser.add_argument("--noises", nargs="+", help="only these of the grid's")
    parser.add_argument("--quick", action="store_true", help="--grid quick, into runs/noise-quick/")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    grid = args.grid
    if args.quick:
        global RESULTS
        RESULTS, grid = ROOT / "runs" / "noise-quick", "quick"
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods, noises, seeds = GRIDS[grid]
    kinds, seeds = args.noises or noises, seeds[: args.seeds]
    if unknown := set(kinds) - set(noises):
        found = f"found {', '.join(unknown)}"
        parser.error(f"--noises: expected some of {', '.join(noises)}; {found}")
    reference, failed = next(iter(methods)), 0
    if not args.table:
        try:
            failed = run_grid(grid, args.jobs, methods, kinds, seeds)
        except KeyboardInterrupt:
            sys.exit("noise.py: stopped; finished runs are kept, and the same command goes on")
    found = {key: runs for key, runs in current(grid).items() if key[0] in kinds}
    table = summarise(found, reference)
    print_table(table, reference)
    if failed:
        sys.exit(f"noise.py: {failed} runs failed")


if __name__ == "__main__":
    main()
