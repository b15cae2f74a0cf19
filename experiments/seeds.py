"""Runs train.py's built-in task for several seeds and algorithms: what came out, with spread.

    python experiments/seeds.py --seeds 5 --algos dvpo ppo     # 2 minutes a run on one core
    python experiments/seeds.py --name sums -- --task sums     # behind --: flags of train.py

One thread a run. Finished runs stand in experiments/results/NAME.jsonl, and are not run again.
"""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

from experiments import scripts
from experiments.tables import RESULTS, add_row, by_seed, compared, read_results
from harness.flags import ALGORITHMS, number_in, parse_args
from tasks import InputError

KEPT = ("iteration", "objective/", "val/explained_var", "quantile/", "eval/")  # of metrics.jsonl


def assert_same(where, own, asked):
    """Raises InputError where a run's own flags are not those asked for, of what both know."""
    known = own.keys() & asked.keys() - {"output_dir"}
    if other := sorted(key for key in known if own[key] != asked[key]):
        raise InputError(f"{where}: expected flags as now or a new --name, found other {other[0]}")


def run(algo, seed, words, asked):
    """A finished run as a row: flags, versions, evaluation before and after, its curves."""
    folder = Path(asked["output_dir"])
    if not (folder / "results.json").exists():
        scripts.train_quietly(f"{algo}, seed {seed}", words)
    found, rows = scripts.read_run(folder)
    assert_same(folder, found["flags"], asked)
    del found["flags"]["output_dir"]
    curve = [{name: row[name] for name in row if name.startswith(KEPT)} for row in rows]
    return {"algo": algo, "seed": seed, **found, "curve": curve}


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


def words_of(args, algo, seed):
    """All flags of a run, in a list; train.py refuses those that cannot work."""
    folder = scripts.ROOT / "runs" / f"{args.name}-{algo}-seed{seed}"
    words = scripts.seeded(["--algo", algo, "--eval-steps", "15", *args.flags], seed, folder)
    return words, vars(parse_args(words))


def run_and_print(args):
    if args.flags and args.name == "default":
        raise InputError("--name: expected one for a run with further flags, found 'default'")
    if not re.fullmatch(r"(?!noise-|setting-)\w[\w.-]*", args.name):
        raise InputError(f"--name: no path, noise-* or setting-* expected, found {args.name!r}")
    scripts.refuse(args.flags, "algo|seed|reward-noise-seed|output-dir|resume")
    torch.set_num_threads(1)
    algos, target = [*dict.fromkeys(args.algos)], RESULTS / f"{args.name}.jsonl"
    # What cannot work ends it here, before the first run.
    keys = [(algo, seed) for seed in range(args.seeds) for algo in algos]
    todo = {key: words_of(args, *key) for key in keys}
    held = {"algo": lambda algo: algo in ALGORITHMS, "flags": lambda flags: isinstance(flags, dict)}
    finished = {}
    for row in read_results(target, "seed", "before", "after", *held, **held):
        key = row["algo"], row["seed"]
        assert_same(target, row["flags"], words_of(args, *key)[1])
        finished[key] = row
    for key in tqdm([key for key in keys if key not in finished], desc="runs"):
        finished[key] = scripts.machine() | run(*key, *todo[key])
        add_row(target, finished[key])
    print_table([finished[key] for key in keys], algos)
    print(f"in {target.relative_to(scripts.ROOT)}")


def main():
    parser = scripts.new_parser(__doc__)
    parser.add_argument("--seeds", type=number_in("[2, inf)", int), default=5, help="how many")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["dvpo", "ppo"])
    parser.add_argument("--name", default="default", help="of the results and the runs' folders")
    parser.add_argument("flags", nargs="*", help="further flags of train.py, behind --")
    scripts.run_script(parser, run_and_print)


if __name__ == "__main__":
    main()
