"""experiments/scripts.py: flags, and the line with which a script ends."""

import importlib
import sys

import pytest
from common import REPOSITORY, refused_by

from experiments import evaluate

FILES = sorted((REPOSITORY / "experiments").glob("*.py"))
# many_gpus.py has train.py's flags, bench_trl.py needs TRL.
NAMES = [file.stem for file in FILES if "new_parser(__doc__)" in file.read_text()]


def test_nothing_stands_behind_two_dashes_where_no_flags_are_passed_on(monkeypatch, capsys):
    words = ["evaluate.py", "x", "--set", "y", "math", "--", "--lam", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert "expected nothing behind --, found --lam" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_bad_flags_of_every_script_are_one_line(name, monkeypatch, capsys):
    """Without argparse's usage, as train.py's."""
    module = importlib.import_module(f"experiments.{name}")
    said = refused_by(module, capsys, monkeypatch, "--no-such-flag")
    assert said.startswith(f"{name}.py: error: ")
