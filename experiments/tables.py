"""Rows of experiments/results/*.jsonl, and what tables say of them."""

import contextlib
import json
import math
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


def check(where, row, **own):
    """Raises InputError where a row holds what is not as HELD and own have it."""
    for key, fits in (HELD | own).items():
        with contextlib.suppress(TypeError, AttributeError):
            if key not in row or fits(row[key]):
                continue
        raise InputError(f"{where}: expected another {key}, found {repr(row[key])[:200]}")


def read_results(path, *keys, **own):
    """Rows of runs, checked, each once, with "all four" accuracies' mean; none of no file."""
    rows, seen = read_rows(path, *keys) if path.exists() else [], {}
    for number, row in enumerate(rows, 1):
        check(f"{path}, row {number}", row, **own)
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


def by_seed(rows, key):
    """{key(row): {seed: row}}."""
    found = {}
    for row in rows:
        found.setdefault(key(row), {})[row["seed"]] = row
    return found


def interval(values):
    """Mean and half-width of Student's 95 % interval, NaN of a single value."""
    if len(values) == 1:
        return values[0], math.nan
    half = STUDENT[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def compared(what, own, base, names, when="after"):
    """Runs {seed: row}, paired -> seeds, {score: (mean, half-width, difference, half-width)}."""
    seeds, columns = sorted(own.keys() & base.keys()), {}
    for name in names if seeds else ():
        for seed in seeds:
            if not (name in own[seed][when] and name in base[seed][when]):
                raise InputError(f"results: {what}, seed {seed}: expected {name!r}, found none")
        scores, others = ([runs[seed][when][name] for seed in seeds] for runs in (own, base))
        differences = [score - other for score, other in zip(scores, others)]
        columns[name] = *interval(scores), *interval(differences)
    return seeds, columns
