"""Rows of experiments/results/*.jsonl, and what tables say of them."""

import contextlib
import itertools
import json
import statistics
from pathlib import Path

from tasks import InputError

RESULTS = Path(__file__).parent / "results"
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # t at 97.5 % of 2, 3, ... values
is_number = lambda value: type(value) in (int, float) and abs(value) < 1e300  # no NaN, either
is_text = lambda value: isinstance(value, str)
# What rows of results hold, if anything: {key: whether a value will do}.
HELD = dict.fromkeys(("method", "noise", "flags", "advantage"), is_text)
HELD |= dict.fromkeys(("temperature", "alpha", "radius"), is_number)
HELD |= {"seed": lambda seed: type(seed) is int and seed >= 0}
ABOUT = tuple(HELD)  # which run it is
HELD |= dict.fromkeys(("before", "after"), lambda scores: all(map(is_number, scores.values())))
HELD |= {"ev": lambda ev: all(value is None or is_number(value) for value in [] + ev)}


def read_rows(path, *keys):
    """The objects of a jsonl file, a line each, with keys; raises InputError naming the line."""
    rows = []
    # Only what JSON writes as the end of a line is one.
    for number, line in enumerate(Path(path).read_text("utf-8-sig", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = {**json.loads(line)}
            if not row.keys() >= {*keys}:
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, RecursionError) as error:
            expected = f"a JSON object with {', '.join(keys)}" if keys else "a JSON object"
            found = f"expected {expected}, found {line[:60]!r}"
            raise InputError(f"{path}, line {number}: {found}") from error
    return rows


def read_results(path, *keys, **own):
    """Rows of runs, with "all four" accuracies' mean, each once and as HELD and own have it."""
    rows, seen = read_rows(path, *keys), {}
    for (key, fits), (number, row) in itertools.product((HELD | own).items(), enumerate(rows, 1)):
        with contextlib.suppress(TypeError, AttributeError):
            if key not in row or fits(row[key]):
                continue
        found = f"expected another {key}, found {repr(row[key])[:200]}"
        raise InputError(f"{path}, row {number}: {found}")
    for number, row in enumerate(rows, 1):
        first = seen.setdefault(str([row.get(key) for key in ABOUT]), number)
        if first != number:
            raise InputError(f"{path}, row {number}: expected another run, found row {first} again")
        if len(four := [x for key, x in row.get("after", {}).items() if "domain" in key]) == 4:
            row["after"]["all four"] = statistics.fmean(four)
    return rows


def add_row(path, row):
    """Adds a row to a jsonl file, on a line of its own: an edited file may lack its last end."""
    text = path.read_text(errors="replace") if path.exists() else ""
    with open(path, "a") as file:
        file.write("\n" * (text[-1:] not in ("", "\n")) + json.dumps(row) + "\n")


def interval(values):
    """Mean and half-width of Student's 95 % interval."""
    half = STUDENT[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def compared(what, own, base, names):
    """Scores {seed: {name: score}}, paired -> seeds, {name: (mean, half, difference, half)}."""
    seeds, columns = sorted(own.keys() & base.keys()), {}
    for name in names if len(seeds) > 1 else ():
        if lacks := [seed for seed in seeds if not (name in own[seed] and name in base[seed])]:
            raise InputError(f"results: {what}, seed {lacks[0]}: expected {name!r}, found none")
        pairs = [own[seed][name] - base[seed][name] for seed in seeds]
        columns[name] = *interval([own[seed][name] for seed in seeds]), *interval(pairs)
    return seeds, columns
