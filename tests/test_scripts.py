"""experiments/scripts.py: flags, and the line with which a script ends."""

import sys

import pytest

from experiments import evaluate


def test_nothing_stands_behind_two_dashes_where_no_flags_are_passed_on(monkeypatch, capsys):
    words = ["evaluate.py", "x", "--set", "y", "math", "--", "--lam", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert "expected nothing behind --, found --lam" in capsys.readouterr().err.splitlines()[-1]
