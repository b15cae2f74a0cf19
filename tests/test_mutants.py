"""tests/mutants.py: what it changes, and that what it accepts still is a mutant."""

import argparse
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parent.parent


def test_mutants_are_single_changes_of_code_alone():
    """Nothing in the docstring or the message changes."""
    code = ('    assert x < 3, f"{x + 1}"', "    return -x.detach() if not x else max(0, True)")
    source = "\n".join(["def f(x):", '    """1 + 1"""', *code, ""])
    found = []
    for start, end, new in mutants.changes(source):
        lines = (source[:start] + new + source[end:]).splitlines()
        found += [a.strip() for a, b in zip(lines, source.splitlines()) if a != b]
    assert found == [
        'x < 3, f"{x + 1}"',
        'assert x <= 3, f"{x + 1}"',
        'assert x < 4, f"{x + 1}"',
        "return x.detach() if not x else max(0, True)",
        "return -x if not x else max(0, True)",
        "return -x.detach() if x else max(0, True)",
        "return -x.detach() if not x else min(0, True)",
        "return -x.detach() if not x else max(1, True)",
        "return -x.detach() if not x else max(0, False)",
    ]


@pytest.mark.parametrize("name", ["critic.py", "risk.py", "dvpo.py"])
def test_what_mutants_txt_accepts_is_a_mutant_of_the_file_as_it_is(name):
    source = (ROOT / name).read_text()
    possible = {source[:start] + new + source[end:] for start, end, new in mutants.changes(source)}
    found = mutants.accepted(name, source)
    assert found and not [reason for mutant, reason in found.items() if mutant not in possible]


@pytest.mark.slow
def test_a_mutant_is_killed_by_a_test_or_accepted_for_a_reason():
    """Zero times a sum: times one, over zero and two wrong dims are killed; a mean lives."""
    lines = (ROOT / "risk.py").read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith("q.sum(dim=-1) * 0")]
    done = subprocess.run(
        [sys.executable, "tests/mutants.py", f"risk.py:{number}-{number}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = "risk.py: 5 mutants, 4 killed, 1 survivors accepted, 0 not"
    assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]
    assert mutants.part("risk.py:7-9") == ("risk.py", 7, 9)
    assert mutants.part("risk.py") == ("risk.py",)
    for wrong in ("risk.py:7", "README.md", "setup.py"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a file with a test module"):
            mutants.part(wrong)
