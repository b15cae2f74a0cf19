"""experiments/scripts.py: flags, and the line with which a script ends."""

import fcntl
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import REPOSITORY, refused_by

from experiments import evaluate, scripts, tables
from tasks import InputError

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


def test_two_programs_do_not_add_to_one_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    with open(rows, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="rows.jsonl: expected one program at a time"):
            scripts.add_runs(list, [()], 1, rows)
    assert scripts.add_runs(list, [()], 1, rows) == 0 and scripts.add_runs(list, [], 1, rows) == 0


GRID = """
import os, pathlib, sys, time
from experiments import scripts

def run(name):
    pathlib.Path(name).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    scripts.add_runs(run, [("a",), ("b",), ("c",), ("d",)], 2, "rows.jsonl", sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_grid_that_is_told_to_end_leaves_no_run_behind(method, tmp_path):
    """By SIGTERM, too, which only the first process gets; one that waits may have begun."""
    (tmp_path / "grid.py").write_text(GRID)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    grid = subprocess.Popen([sys.executable, "grid.py", method], cwd=tmp_path, env=environment)
    files = [tmp_path / "a", tmp_path / "b"]
    while not all(file.exists() and file.read_text() for file in files):
        assert grid.poll() is None
        time.sleep(0.1)
    grid.terminate()
    assert grid.wait(60) != 0 and not (tmp_path / "d").exists()
    for file in tmp_path.glob("?"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("words", [["--output", "no/rows.jsonl"], ["no/rows.jsonl"]])
def test_a_file_that_cannot_be_written_is_named_with_its_flag(words, tmp_path, monkeypatch, capsys):
    flag = words[0] if len(words) == 2 else "output"
    parser = scripts.new_parser("A script.")
    parser.add_argument(flag, type=Path)
    parser.add_argument("--other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    with pytest.raises(SystemExit) as ended:
        scripts.run_script(parser, lambda args: tables.add_row(args.output, {}))
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said.endswith(f"error: {flag}: [Errno 2] No such file or directory: 'no/rows.jsonl'")
