"""Runs train.py's built-in task for several seeds and algorithms: what came out, with spread.

    python experiments/seeds.py --seeds 5 --algos dvpo ppo     # 2 minutes a run on one core
    python experiments/seeds.py --name sums -- --task sums     # behind --: flags of train.py

One thread a run; finished runs are kept. Raw numbers: experiments/results/NAME.jsonl.
"""

import itertools
import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

from experiments import scripts
from experiments.tables import RESULTS, by_seed, compared, is_text, read_results
from harness.flags import ALGORITHMS, number_in, parse_args
from tasks import InputError


def assert_same(where, own, asked):
    """Raises InputError where a run's own flags are not those asked for, of what both know."""
    known = own.keys() & asked.keys() - {"output_dir"}
    if other := sorted(key for key in known if own[key] != asked[key]):
        raise InputError(f"{where}: expected flags as now or a new --name, found other {other[0]}")


def run(algo, seed, words, asked):
    """A finished run as a row: flags, versions, evaluation before and after."""
    folder = Path(asked["output_dir"])
    if not (folder / "results.json").exists():
        scripts.train_quietly(f"{algo}, seed {seed}", words)
    found, _ = scripts.read_run(folder)
    assert_same(folder, found["flags"], asked)
    return {"algo": algo, "seed": seed, **found}


def print_table(runs, algos):
    """Scores before and after, and the first algorithm minus the last, paired by seed."""
    found = by_seed(runs, lambda run: run["algo"])
    names, first, last = runs[0]["before"], found[algos[0]], found[algos[-1]]
    _, before = compared(algos[0], first, first, names, "before")
    after = [compared(algo, own, last, names)[1] for algo, own in found.items()]
    heads = ["before", *algos, f"{algos[0]} - {algos[-1]}"]
    print(f"{'mean score, 95 % interval':26}" + "".join(f"{head:>17}" for head in heads))
    for name in names:
        pairs = [own[name][:2] for own in (before, *after)] + [after[0][name][2:]]
        print(f"{name:26}" + "".join("{:11.3f} ±{:.3f}".format(*pair) for pair in pairs))


def run_and_print(args):
    if args.flags and args.name == "default":
        raise InputError("--name: expected one for a run with further flags, found 'default'")
    if not re.fullmatch(r"(?!noise-|setting-)\w[\w.-]*", args.name):
        raise InputError(f"--name: no path, noise-* or setting-* expected, found {args.name!r}")
    scripts.refuse(args.flags, "algo|seed|reward-noise-seed|output-dir|resume")
    torch.set_num_threads(1)
    about, algos, todo = scripts.machine(), [*dict.fromkeys(args.algos)], {}
    for seed, algo in itertools.product(range(args.seeds), algos):
        folder = scripts.ROOT / "runs" / f"{args.name}-{algo}-seed{seed}"
        words = scripts.seeded(["--algo", algo, "--eval-steps", "15", *args.flags], seed, folder)
        # It ends here what cannot work, before the first run.
        todo[algo, seed] = words, vars(parse_args(words))
    target = RESULTS / f"{args.name}.jsonl"
    held = {"algo": is_text, "flags": lambda flags: isinstance(flags, dict)}
    for row in read_results(target, "seed", *held, **held):
        key = row["algo"], row["seed"]
        if key not in todo:
            raise InputError(f"--name: expected a new one, found other runs in {target}")
        assert_same(target, row["flags"], todo[key][1])
    runs = []
    for key, own in tqdm(todo.items(), desc="runs"):
        runs.append(run(*key, *own))
    print_table(runs, algos)
    target.write_text("".join(json.dumps(about | run) + "\n" for run in runs))
    print(f"written: {target.relative_to(scripts.ROOT)}")


def main():
    parser = scripts.new_parser(__doc__)
    many = number_in("[2, inf)", int)
    parser.add_argument("--seeds", type=many, default=5, help="how many, from 0 on")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["dvpo", "ppo"])
    parser.add_argument("--name", default="default", help="of the results and the runs' folders")
    parser.add_argument("flags", nargs="*", help="further flags of train.py, behind --")
    scripts.run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
