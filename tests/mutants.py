"""Mutation check: does some test fail for every small change of the code? One at a time, in a copy.

    python tests/mutants.py critic.py risk.py dvpo.py    # all; about 25 minutes on one core
    python tests/mutants.py dvpo.py:120-180              # only those in these lines

Prints the mutants that no test of the file's module kills. Each must stand in mutants.txt with the
reason why it may live, or the exit status is 1. Not changed: docstrings, messages, annotations. The
slow fits (SLOW) are left out. Runs are forks of one process with torch loaded: Linux or macOS.
"""

import argparse
import ast
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import datasets  # noqa: F401  (these are loaded here once, for the forks)
import hypothesis
import pytest
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from tqdm import tqdm

ROOT, TIMEOUT = Path(__file__).parent.parent, 120
SLOW = {"risk.py": "not tail_contracts and not off_the_targets_own"}  # pytest -k; 3 to 10 s each
PAIRS = (
    "+ -|* /|< <=|> >=|== !=|and or|is is not|min max|amin amax|minimum maximum|mean sum|any all|"
    "lower_tail_mean upper_tail_mean"
)
SWAPS = {"is": "is not", "is not": "is", "in": "not in", "&": "|", "|": "&", "//": "*", "%": "//"}
SWAPS |= {"**": "*", "<<": ">>", "ceil": "floor", "expm1": "exp", "zeros_like": "ones_like"}
SWAPS |= {"no_grad": "enable_grad"}
for one, other in (pair.split(" ", 1) for pair in PAIRS.split("|")):
    SWAPS |= {one: other, other: one}
DROPPED = {"detach", "abs", "square", "sqrt", "rsqrt", "flip", "float", "double", "clamp", "to"}
DROPPED |= {"contiguous"}
OPERATOR = re.compile(r"is not|not in|//|\*\*|<<|[<>=!]=|[-+*/%&|<>@]|and|or|is|in")


def accepted(name, source):
    """{mutated source: reason} of mutants.txt's section on a file.

    A line of it is code with the change in braces, {before => after | another after}, which must
    stand in the file just once, or is a reason with a colon at its end, for the lines below.
    """
    found, reason, file = {}, None, None
    for line in (ROOT / "tests" / "mutants.txt").read_text().splitlines():
        if not line.startswith(" "):
            file, _, reason = line.partition(": ")
        elif file == name:
            parts = re.fullmatch(r" +(.*?){(.*?) => (.*?)}(.*)", line)
            left, before, afters, right = parts.groups()
            if source.count(left + before + right) != 1:
                sys.exit(f"mutants.txt: expected once in {name}: {left + before + right}")
            for after in afters.split(" | "):
                mutant = source.replace(left + before + right, left + after + right)
                found[mutant] = f"{reason}: {line.strip()}"
    return found


def operands(node):
    match node:
        case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
            return [left, right]
        case ast.BoolOp(values=values):
            return values
        case ast.Compare(left=left, comparators=others):
            return [left, *others]
    return []


def changes_at(node, start, end, end_of):
    """The changes of one node that are not of its operators; end_of(node): the offset behind it."""
    match node:
        case ast.UnaryOp():
            yield start, start + (4 if isinstance(node.op, ast.Not) else 1), ""
        case ast.Constant(value=bool()):
            yield start, end, str(not node.value)
        case ast.Constant(value=int() | float()):
            yield start, end, repr(node.value + 1)
        case ast.Raise() | ast.Assert():  # without the word, only the expression is left
            yield start, start + len("raise " if isinstance(node, ast.Raise) else "assert "), ""
        case ast.Attribute(attr="values", value=ast.Call(func=ast.Attribute(attr="sort") as sort)):
            yield end_of(sort) - len(".sort"), end, ""
        case ast.Attribute(attr=name) | ast.Name(id=name) if name in SWAPS:
            yield end - len(name), end, SWAPS[name]
        case ast.keyword(arg="min" | "max"):  # clamp's
            yield start, start + 3, SWAPS[node.arg]
        case ast.Call(func=ast.Attribute(attr=name)) if name in DROPPED:
            yield end_of(node.func) - len(name) - 1, end, ""


def changes(source):
    """Every single change of a module, in order: (start, end, new text), offsets in source."""
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]

    def start_of(node):
        return starts[node.lineno - 1] + node.col_offset

    def end_of(node):
        return starts[node.end_lineno - 1] + node.end_col_offset

    todo, found = [ast.parse(source)], []
    while todo:
        node = todo.pop()
        todo += [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.JoinedStr)]
        if hasattr(node, "lineno"):
            found += changes_at(node, start_of(node), end_of(node), end_of)
        for left, right in itertools.pairwise(operands(node)):
            token = OPERATOR.search(source, end_of(left), start_of(right))
            found += [(*token.span(), SWAPS[token[0]])] if token[0] in SWAPS else []
    return sorted(found)


def run_pytest(folder, name):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.dont_write_bytecode = True  # two mutants of one second and one size would share a .pyc
    quick = {"phases": [hypothesis.Phase.explicit, hypothesis.Phase.generate]}
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, **quick)
    hypothesis.settings.load_profile("mutants")
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-k", SLOW.get(name, "")]
    os._exit(pytest.main([*flags, f"tests/test_{name}"]))


def survives(folder, name):
    run = multiprocessing.get_context("fork").Process(target=run_pytest, args=(folder, name))
    run.start()
    run.join(TIMEOUT)
    run.kill()
    run.join()
    return run.exitcode == 0


def check(folder, name, first=1, last=10**9):
    """Tries the mutants of one file; returns how many survive without being accepted."""
    source = (ROOT / name).read_text()
    reasons, survivors = accepted(name, source), []
    if not survives(folder, name):
        sys.exit(f"mutants.py: tests/test_{name} fails without any mutant")
    all_changes = [(source.count("\n", 0, change[0]) + 1, *change) for change in changes(source)]
    mutants = [change for change in all_changes if first <= change[0] <= last]
    for number, start, end, new in tqdm(mutants, name):
        mutant = source[:start] + new + source[end:]
        (folder / name).write_text(mutant)
        if survives(folder, name):
            survivors.append(mutant)
            before, after = (text.splitlines()[number - 1].strip() for text in (source, mutant))
            reason = reasons.get(mutant, "NOT ACCEPTED")
            tqdm.write(f"{name}:{number}: {reason}\n  - {before}\n  + {after}")
    (folder / name).write_text(source)
    wrong = sum(mutant not in reasons for mutant in survivors)
    counts = f"{len(mutants) - len(survivors)} killed, {len(survivors) - wrong} survivors accepted"
    print(f"{name}: {len(mutants)} mutants, {counts}, {wrong} not")
    if len(mutants) == len(all_changes):
        for mutant in reasons.keys() - set(survivors):
            print(f"  in mutants.txt, but no survivor: {reasons[mutant]}")
    return wrong


def part(text):
    found = re.fullmatch(r"(\w+\.py)(?::(\d+)-(\d+))?", text)
    if not found or not all((ROOT / f"{path}{found[1]}").exists() for path in ("", "tests/test_")):
        expected = "expected a file with a test module, dvpo.py or dvpo.py:120-180"
        raise argparse.ArgumentTypeError(f"{expected}, found {text!r}")
    return found[1], *map(int, filter(None, found.groups()[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", type=part, metavar="FILE[:FIRST-LAST]")
    parts = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "pyproject.toml", folder)
        folders = ("", "tasks/", "harness/", "experiments/", "tests/")
        for path in itertools.chain(*(ROOT.glob(f"{name}*.py") for name in folders)):
            copy = Path(folder) / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
        sys.exit(sum(check(Path(folder), *each) for each in parts) > 0)


if __name__ == "__main__":
    main()
