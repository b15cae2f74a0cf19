"""A setting of the paper with a real model: methods x kinds of noise x seeds.

    python experiments/settings.py DATA --model FOLDER --jobs 2 -- FLAGS     # train.py's
    python experiments/settings.py DATA --table

DATA is a folder: train.jsonl and held.jsonl, other.jsonl for out of domain, for the noise `votes`
votes.jsonl, train.jsonl as pseudo_labels.py labels it, and for `judge` the folder judge, a reward
model that pays in place of --reward. Runs in experiments/results/setting-DATA.jsonl are skipped.
"""

import gc
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

from experiments import evaluate, scripts
from experiments.noise import CURVES, NOISES
from experiments.tables import RESULTS, add_row, by_seed, compared, is_text, read_results
from harness.flags import number_in, parse_args
from tasks import InputError
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
KINDS = {"none": "", "verifier": NOISES["verifier"], "votes": "", "judge": ""}
USUAL = ("none", "verifier")
# As evaluate.py has them, in fp32; train.py evaluates in the precision that it trains in.
TRUE = {"held": "held out, greedy, fp32", "other": "out of domain, greedy"}
# Behind --, these would make a run another than its row says, or than the start's scores.
OURS = "algo|readout|model-name-or-path|dataset-name|eval-dataset-name|seed|output-dir|resume|user"
OURS += "|chat-template|stop-token|pseudo-label-noise|reward-noise-.*"


def flags_of(args, method, kind):
    labels = "votes" if kind == "votes" else "train"
    own = ["--model-name-or-path", args.model, *METHODS[method].split(), *KINDS[kind].split()]
    own += ["--dataset-name", str(args.data / f"{labels}.jsonl")]
    judge = ["--reward", f"model:{args.data / 'judge'}"] if kind == "judge" else []
    return [*own, "--eval-dataset-name", str(args.data / "held.jsonl"), *args.flags, *judge]


def check(args):
    """Ends the program where a run could not begin, or would not be what the table says."""
    if not (args.model and args.flags):
        raise InputError("expected --model and train.py's flags behind --, or --table")
    scripts.refuse(args.flags, OURS)
    for kind, method in itertools.product(["none", *(args.kinds or USUAL)], METHODS):
        flags = parse_args(flags_of(args, method, kind))
        files = [flags.dataset_name, flags.eval_dataset_name, args.data / "other.jsonl"]
        files += [args.data / "judge" / "config.json"] if kind == "judge" else []
        for file in files:
            if not Path(file).is_file():
                raise InputError(f"DATA: expected a file {file} for --kinds {kind}, found none")


def true_scores(name, args, parts):
    """Greedy mean --reward of a model, or of a run's policy, on files of DATA."""
    flags = parse_args(flags_of(args, "ppo", "none"))
    flags.rows = args.rows or flags.eval_samples
    flags.set = [(str(args.data / f"{part}.jsonl"), flags.reward) for part in parts]
    rewards = {flags.reward: load_reward(flags.reward, scripts.DEVICE)}
    scores = [row["score"] for row in evaluate.evaluate(name, rewards, flags)]
    return dict(zip([TRUE[part] for part in parts], scores))


def run(args, method, kind, seed):
    """One run of train.py, evaluated -> its row: results, and what it was made with."""
    flags = flags_of(args, method, kind)
    with tempfile.TemporaryDirectory() as folder:
        words = scripts.seeded(flags, seed, folder)
        scripts.train_quietly(f"{method}, {kind}, seed {seed}", words)
        found, rows = scripts.read_run(folder)
        gc.collect()  # or what was trained would stay while another model is loaded
        scores = true_scores(folder, args, TRUE if kind == "judge" or args.rows else ["other"])
    if kind == "judge":
        for when in ("before", "after"):
            found[when] = {f"judge, {name}": score for name, score in found[when].items()}
    if scripts.DEVICE == "cuda":
        torch.cuda.empty_cache()
        found["device"] = torch.cuda.get_device_name()
    found |= {"method": method, "noise": kind, "seed": seed, "rows": args.rows, "flags": flags}
    found |= {name: [row.get(key) for row in rows] for name, key in CURVES.items()}
    return [found | {"after": found["after"] | scores}]


def finished_rows(target):
    known = {"method": lambda name: name == "start" or name in METHODS}
    known |= {"noise": lambda name: name in KINDS, "flags": lambda words: all(map(is_text, words))}
    return read_results(target, "method", "noise", "seed", "flags", "after", **known)


def run_grid(args, target):
    """Runs what the results lack, seed by seed, and adds it line by line -> number of failures."""
    finished = set()
    for row in finished_rows(target):
        method, kind, seed = key = (row["method"], row["noise"], row["seed"])
        own, rows = flags_of(args, "ppo" if method == "start" else method, kind), row.get("rows")
        if row["flags"] != own or rows != args.rows:
            expected = f"expected flags as now, found --rows {rows}, {' '.join(row['flags'])}"
            raise InputError(f"{target}: {method}, {kind}, seed {seed}: {expected}")
        finished.add(key)
    if ("start", "none", 0) not in finished:
        row = {"method": "start", "noise": "none", "seed": 0, "rows": args.rows}
        row |= {"flags": flags_of(args, "ppo", "none"), **scripts.machine()}
        add_row(target, row | {"after": true_scores(args.model, args, TRUE)})
    asked = sorted(args.seeds or range(5)), args.kinds or USUAL, args.methods
    todo = []
    for seed, kind, method in itertools.product(*map(dict.fromkeys, asked)):
        if (method, kind, seed) not in finished and (kind != "none" or method == "ppo"):
            todo.append((args, method, kind, seed))
    # A fork could not use the GPU, which its parent has looked at.
    return scripts.add_runs(run, todo, args.jobs, target, "spawn")


def print_table(rows, kinds=KINDS, methods=METHODS):
    """A row per noise and method: seeds, each score, and how far it is from PPO's, paired."""
    found = by_seed(rows, lambda row: (row["noise"], row["method"]))
    before = [row["before"] for row in rows if "before" in row]
    names = dict.fromkeys(name for scores in before for name in scores)
    starts = {name: statistics.fmean(x[name] for x in before if name in x) for name in names}
    if not starts or ("none", "start") not in found:
        raise InputError("expected a start and finished runs, found others")
    starts |= [*found["none", "start"].values()][0]["after"]
    print(f"{'noise':10}{'method':14}{'seeds':6}" + "".join(f"{name:34}" for name in starts))
    print(f"{'':10}{'start':20}" + "".join(f"{value:<34.3f}" for value in starts.values()))
    for kind, method in itertools.product(kinds, methods):
        own, base = found.get((kind, method), {}), found.get((kind, "ppo"), {})
        # A judge's scores are its own kind's.
        names = [name for name in starts if any(name in run["after"] for run in own.values())]
        seeds, columns = compared(f"{kind}, {method}", own, base, names)
        texts = {k: "{:.3f} ±{:.3f}  {:+.3f} ±{:.3f}".format(*v) for k, v in columns.items()}
        texts = {k: text.replace("±nan", " " * 6) for k, text in texts.items()}  # of one seed
        cells = "".join(f"{texts.get(name, ''):34}" for name in starts)
        if columns:
            print(f"{kind:10}{method:14}{len(seeds):<6}{cells}")


def run_and_print(args):
    target, failed = RESULTS / f"setting-{args.data.resolve().name}.jsonl", 0
    if not args.table:
        check(args)
        failed = run_grid(args, target)
    rows = finished_rows(target)
    if not rows:
        raise InputError(f"DATA: expected finished runs in {target}, found none")
    if args.seeds:
        rows = [row for row in rows if row["method"] == "start" or row["seed"] in args.seeds]
    print_table(rows, args.kinds or KINDS, args.methods)
    return failed


def main():
    parser = scripts.new_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="to run: else none, verifier")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--rows", type=scripts.COUNT, help="at the end; else --eval-samples")
    parser.add_argument("--seeds", nargs="+", type=number_in("[0, 2e9]", int), help="else 0 to 4")
    scripts.add_grid_flags(parser)
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    scripts.run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
