"""Runs train.py's built-in task for several seeds and algorithms: what came out, with spread.

    python experiments/seeds.py --seeds 5 --algos dvpo ppo     # 2 minutes a run on one core
    python experiments/seeds.py --name sums -- --task sums     # behind --: flags of train.py

One thread a run; finished runs are kept. Raw numbers: experiments/results/NAME.jsonl.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from experiments.tables import RESULTS, interval, is_text, read_results, read_rows
from harness.checkpoints import newest_checkpoint, restore
from harness.flags import ALGORITHMS, number_in, parse_args
from harness.reports import quiet
from harness.setup import build, load
from tasks import InputError, naming

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = number_in("[1, inf)", int)
KEPT = ("iteration", "objective/", "val/explained_var", "quantile/", "eval/")  # of metrics.jsonl


def new_parser(doc):
    """A parser of flags whose --help begins with a script's first line."""
    return argparse.ArgumentParser(description=doc.split("\n")[0])


def run_script(parser, function):
    """function(flags); what cannot work ends the program with one line and status 2."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:end])  # flags may stand between the others
    # argparse would take a -- for its own where nothing stands before it.
    if hasattr(args, "flags"):
        args.flags += words[end + 1 :]
    elif words[end + 1 :]:
        parser.error(f"expected nothing behind --, found {words[end + 1]}")
    quiet()
    try:
        function(args)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")


def load_policy(name, flag):
    """A causal language model, on the GPU if there is one, and its tokenizer."""
    model = load(AutoModelForCausalLM, name, flag).to(DEVICE)
    return model, load(AutoTokenizer, name, flag)


def load_run(folder):
    """A finished run's Run and flags, as its newest checkpoint has it; its data are not checked."""
    args = parse_args([f"--resume={folder}"])
    run = build(args)
    restore(run, newest_checkpoint(Path(folder)))
    return run, args


def current_commit():
    """The short hash of what is checked out, with -dirty if the code is not just that."""
    # Not experiments/results: results may change while runs go on.
    pathspec = ["--", ".", ":!experiments/results"]
    git = {"cwd": ROOT, "capture_output": True, "text": True}
    if shutil.which("git") is None:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "-uno", *pathspec], **git).stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    return commit + "-dirty" * bool(changed)


def machine():
    """What ran, and on what: rounding differs between kinds of CPU, and so do runs."""
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    about = {"commit": current_commit(), "python": platform.python_version()}
    return about | {"cores": os.cpu_count(), "cpu": cpu[1] if cpu else platform.machine()}


def refuse(flags, own):
    """Raises InputError where flags behind -- are among a script's own: a pattern of names."""
    for word in flags:
        if re.fullmatch(f"--({own})", word.split("=")[0].replace("_", "-")):
            raise InputError(f"{word}: expected another flag behind --, found one that is set here")


def train_quietly(flags):
    """train.main(flags), unheard; raises RuntimeError with the last line of a run that failed."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = train.main(flags)
        except SystemExit as error:  # argparse's
            status = error.code
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError((said.getvalue().strip() or "stopped").splitlines()[-1])


def assert_same(where, own, asked):
    """Raises InputError where a run's own flags are not those asked for, of what both know."""
    known = own.keys() & asked.keys() - {"output_dir"}
    if other := sorted(key for key in known if own[key] != asked[key]):
        raise InputError(f"{where}: expected flags as now or a new --name, found other {other[0]}")


def run(algo, seed, flags, asked):
    """One finished run as a dict: flags, versions, evaluation before and after, its curves."""
    folder = Path(asked["output_dir"])
    if not (folder / "results.json").exists():
        with naming(f"{algo}, seed {seed}"):
            train_quietly(flags)
    with naming(str(folder)):
        files = [json.loads((folder / name).read_text()) for name in ("args.json", "results.json")]
        assert_same("args.json", files[0]["flags"], asked)
    rows = read_rows(folder / "metrics.jsonl")
    curve = [{name: row[name] for name in row if name.startswith(KEPT)} for row in rows]
    return {"algo": algo, "seed": seed, **files[0], **files[1], "curve": curve}


def print_table(runs, algos):
    """Scores before and after, and the first algorithm minus the last, paired by seed."""
    heads = ["before", *algos, f"{algos[0]} - {algos[-1]}"]
    print(f"{'mean score, 95 % interval':26}" + "".join(f"{head:>17}" for head in heads))
    for name in runs[0]["before"]:
        columns = [[run["before"][name] for run in runs if run["algo"] == algos[0]]]
        columns += [[run["after"][name] for run in runs if run["algo"] == algo] for algo in algos]
        columns.append([a - b for a, b in zip(columns[1], columns[-1])])
        cells = ["{:11.3f} ±{:.3f}".format(*interval(values)) for values in columns]
        print(f"{name:26}" + "".join(cells))


def run_and_print(args):
    if args.seeds < 2 or (args.flags and args.name == "default"):
        raise InputError("expected at least 2 --seeds, and a --name for a run with further flags")
    if not re.fullmatch(r"(?!noise-|setting-)\w[\w.-]*", args.name):
        raise InputError(f"--name: no path, noise-* or setting-* expected, found {args.name!r}")
    refuse(args.flags, "algo|seed|reward-noise-seed|output-dir|resume")
    torch.set_num_threads(1)
    about, algos, todo, runs = machine(), [*dict.fromkeys(args.algos)], {}, []
    for seed, algo in itertools.product(range(args.seeds), algos):
        # The noise has the run's seed: or all runs would meet the same, and the interval miss it.
        flags = f"--algo {algo} --seed {seed} --reward-noise-seed {seed} --eval-steps 15".split()
        flags += [*args.flags, "--output-dir", f"{ROOT}/runs/{args.name}-{algo}-seed{seed}"]
        asked = vars(parse_args(flags))  # it ends here what cannot work, before the first run
        todo[algo, seed] = flags, asked
    target = RESULTS / f"{args.name}.jsonl"
    held = {"algo": is_text, "flags": lambda flags: isinstance(flags, dict)}
    for row in read_results(target, "seed", *held, **held) if target.exists() else []:
        key = row["algo"], row["seed"]
        if key not in todo:
            raise InputError(f"--name: expected a new one, found other runs in {target}")
        assert_same(target, row["flags"], todo[key][1])
    for key, own in tqdm(todo.items(), desc="runs"):
        runs.append(run(*key, *own))
    target.write_text("".join(json.dumps({**about, **run}) + "\n" for run in runs))
    print_table(runs, algos)
    print(f"written: {target.relative_to(ROOT)}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=COUNT, default=5, help="how many, from 0 on; at least 2")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["dvpo", "ppo"])
    parser.add_argument("--name", default="default", help="of the results and the runs' folders")
    parser.add_argument("flags", nargs="*", help="further flags of train.py, behind --")
    run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
