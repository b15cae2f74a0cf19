"""The noise laboratory: does the distribution pay, and when? Methods x kinds of noise x seeds.

    python experiments/noise.py --jobs 2                   # the main grid; 70 CPU seconds a run
    python experiments/noise.py --grid tuning --jobs 2     # or choice, ladder, long, rates, quick
    python experiments/noise.py --table                    # print what results/ holds

Finished runs stand in experiments/results/noise-*.jsonl and are skipped: a grid may be stopped and
gone on with, and grids share what they have in common. Per seed all methods get the same warm
start, number of completions, and order of prompts and noise.
"""

import contextlib
import fcntl
import itertools
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

from experiments import fit_tails, scripts
from experiments.tables import RESULTS, by_seed, compared, read_results
from harness.reports import evaluate
from tasks import InputError
from tasks.warm_start import warm_start

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
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
# The best for each method by in-domain accuracy, greedy and sampled, in --grid tuning.
TUNED = {"ppo": "2e-4", "dvpo": "2e-4", "robust": "4e-4", "grpo": "2e-4", "dr_grpo": "1e-4"}
TUNED |= {"reinforce++": "2e-4", "dvpo, spread": "2e-4", "control": "4e-4"}
FORMS = {name: f"--algo {name} --learning-rate {{}}" for name in TUNED}
# The control has the bound, and no distribution.
FORMS["dvpo, spread"] = "--algo dvpo --learning-rate {} --readout spread"
FORMS["control"] = "--algo ppo --learning-rate {} --readout spread"
TRIAL_SEEDS = 100  # seeds from here on are for choosing, the others for reporting
SPLITS = ("in domain, greedy", "out of domain, greedy")
COLUMNS = (*SPLITS, "all four")  # their mean, the sampled ones included
CURVES = {"true": "objective/true_scores", "ev": "val/explained_var", "kl": "objective/kl"}
CURVES |= {"heads": "quantile/head_spread", "length": "completions/mean_length"}
WINDOW = 5  # a curve is a mean over as many iterations

ALL = {name: FORMS[name].format(rate) for name, rate in TUNED.items()}
# Term by term; all of them, without a flag, are the main grid's runs.
LADDER = {}
for name, weights in fit_tails.LADDER.items():
    off = (f"--{term}-weight 0" for term in " ".join(fit_tails.RUNGS).split() if not weights[term])
    LADDER[name] = " ".join([ALL["dvpo, spread"], *off])
CHOICE = {name: ALL[name] for name in ("ppo", "dvpo, spread", "reinforce++")}
for steps, name in itertools.product((0, 3), ("ppo", "dvpo, spread")):
    CHOICE[f"{name}, {steps} first"] = f"{ALL[name]} --critic-warmup-steps {steps}"
for width in (0.5, 2):
    CHOICE[f"dvpo, spread, width {width}"] = f"{ALL['dvpo, spread']} --readout-width {width}"
TRIED = {}
for rate in LEARNING_RATES:
    TRIED |= {f"{name}, lr {rate}": form.format(rate) for name, form in FORMS.items()}
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
    return scripts.seeded([*flags.split(), "--num-quantiles", "200"], seed, folder)


def windows(values):
    """Means over every WINDOW values, None left out."""
    parts = [values[end - WINDOW : end] for end in range(WINDOW, len(values) + 1, WINDOW)]
    known = [[value for value in part if value is not None] for part in parts]
    return [round(statistics.fmean(part), 4) if part else None for part in known]


@contextlib.contextmanager
def run_folder(seed):
    """A folder for a run, with the seed's warm start, which is made once and kept."""
    kept = Path("runs") / f"warm-dialogue-seed{seed}"
    kept.parent.mkdir(exist_ok=True)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes it, the others wait
        warm_start("dialogue", seed, kept)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(kept, Path(folder) / "warm_start")
        yield Path(folder)


def by_stratum(prompts, scores):
    """Dialogues' {"3 turns", "1 changes" (of mind): [right, prompts]}; `book` is no turn."""
    found = {}
    for prompt, score in zip(prompts, scores.tolist()):
        slots = [turn["content"].split()[0] for turn in prompt[:-1] if turn["role"] == "user"]
        for key in (f"{len(slots)} turns", f"{len(slots) - len(set(slots))} changes"):
            right, count = found.get(key, (0, 0))
            found[key] = [right + score, count + 1]
    return found


def unevenness(strata, name):
    """The standard deviation of accuracy over the strata of that name, weighted by prompts."""
    right, count = torch.tensor([own for key, own in strata.items() if key.endswith(name)]).T
    error = right / count - right.sum() / count.sum()
    return (error.square() @ count / count.sum()).sqrt().item()


def evaluated(run, args, when):
    """Mean scores without noise; greedy ones of both domains by stratum, and how uneven."""
    scores, _ = evaluate(run, args)
    prompts = [prompt for data in run.evals.values() for prompt in data["prompt"]]
    strata = by_stratum(prompts, torch.cat([scores[f"{name}, greedy"] for name in run.evals]))
    means = {name: own.mean().item() for name, own in scores.items()}
    means |= {f"uneven {name}": unevenness(strata, name) for name in ("turns", "changes")}
    return {when: means, f"strata {when}": strata}


def run(method, noise, seed, flags):
    """One run of train.py -> its row: results, and what it was made with."""
    with run_folder(seed) as folder:
        scripts.train_quietly(f"{method}, {noise}, seed {seed}", seeded(flags, seed, folder))
        found, rows = scripts.read_run(folder)
        found |= evaluated(*scripts.load_run(folder), "after")
    found |= {"method": method, "noise": noise, "seed": seed, "flags": flags}
    curves = {name: key for name, key in CURVES.items() if key in rows[0]}
    found |= {name: windows([row[key] for row in rows]) for name, key in curves.items()}
    curve = [{k: v for k, v in row.items() if k[:4] in ("iter", "eval")} for row in rows]
    return [found | {"curve": [row for row in curve if len(row) > 1]}]


def run_grid(name, jobs, seeds):
    """Runs what results/ lacks, and adds it to noise-NAME.jsonl -> number of failures."""
    methods, noises, _ = GRIDS[name]
    finished, todo = {(row["flags"], row["seed"]) for row in finished_runs()}, []
    for seed, noise, method in itertools.product(seeds, noises, methods):
        flags = flags_of(name, method, noise)
        if (flags, seed) not in finished:
            todo.append((method, noise, seed, flags))
    return scripts.add_runs(run, todo, jobs, RESULTS / f"noise-{name}.jsonl")


def finished_runs():
    """All of them, whichever grid made them."""
    files = sorted(RESULTS.glob("noise-*.jsonl"))
    return [row for file in files for row in read_results(file, "flags", "seed", "before", "after")]


def current(name, seeds=None):
    """{(noise, method): {seed: run}} of just the grid's flags now: never two budgets in one row."""
    methods, noises, own = GRIDS[name]
    seeds = seeds or (own if own[0] >= TRIAL_SEEDS else range(TRIAL_SEEDS))
    rows = [row for row in finished_runs() if row["seed"] in seeds]
    runs, keys = by_seed(rows, lambda row: row["flags"]), itertools.product(noises, methods)
    return {(noise, method): runs.get(flags_of(name, method, noise), {}) for noise, method in keys}


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
        for seed, split in itertools.product(runs.keys() & base.keys(), splits):
            # Sampled scores before training depend on --batch-size, too.
            if runs[seed]["before"].get(split) != base[seed]["before"].get(split):
                expected = f"expected the warm start of {reference}, found another"
                raise InputError(f"results: {what}: {expected}")
        seeds, columns = compared(what, runs, base, splits)
        ends = [end for seed in seeds for end in runs[seed].get("ev", [])[-1:] if end is not None]
        explained = round(statistics.fmean(ends), 2) + 0 if ends else ""
        table += [(noise, method, seeds, columns, explained)] if len(seeds) > 1 else []
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
    return failed


def main():
    parser = scripts.new_parser(__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="main")
    parser.add_argument("--seeds", type=scripts.COUNT, help="only so many of the grid's")
    parser.add_argument("--reference", help="the method that differences are to: else the first")
    scripts.add_grid_flags(parser)
    scripts.run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
