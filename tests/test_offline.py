"""experiments/offline.py: advantages, resume, and three methods that are one without pessimism."""

import argparse
import shutil
import sys

import pytest
import torch
from common import write_rows

from experiments import noise, offline
from experiments.tables import read_rows
from harness.setup import build


@pytest.mark.slow
def test_the_advantages_are_the_return_and_q_minus_the_start_s_value(small):
    """Both are minus V(s), which drops out of their difference; y is the score, as gamma is 1."""
    before, log, probs = offline.log_of(0)
    run, args = offline.start(noise.flags_of("main", "ppo", "none"), 0)
    scores = torch.arange(len(log.mask)).remainder(2).float()
    with torch.no_grad():
        critic, found = offline.fitted(run, args, log, scores, probs, 0.0, 0.0)
        q = offline.response_q(critic, log)
    taken = offline.of_tokens(q, log.response_ids)
    own = found["return"] - found["q"] + taken - scores[:, None]
    torch.testing.assert_close(own[log.mask], torch.zeros(log.mask.sum()), atol=1e-5, rtol=0)
    values = (probs * q).sum(dim=-1)
    torch.testing.assert_close(found["q"][log.mask], (taken - values)[log.mask])


def test_what_is_asked_for_twice_runs_once():
    asked = {"method": ["awr", "cql", "awr"], "temperature": [1.0, 0.3, 1.0]}
    asked |= {"alpha": [0.1, 0.1], "radius": [0.03], "advantage": ["return"]}
    found = offline.settings_of(argparse.Namespace(**asked))
    awr, cql = ("awr", 0.0), ("cql", 0.1)
    assert found == [(m, "return", t, a, 0.0) for m, a in (awr, cql) for t in (1.0, 0.3)]


def build_with_grad(args):
    assert torch.is_grad_enabled()  # or a seed's warm start could not be made
    return build(args)


@pytest.fixture
def small(monkeypatch, tmp_path, warm_start):
    """A short budget, a warm start at hand, and rows of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(warm_start, tmp_path / "runs" / "warm-dialogue-seed0")
    monkeypatch.setattr(noise, "BUDGET", noise.QUICK)
    monkeypatch.setattr(offline, "build", build_with_grad)
    monkeypatch.setattr(offline, "FOUND", tmp_path / "offline.jsonl")
    return tmp_path / "offline.jsonl"


def run_offline(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["offline.py", *flags])
    offline.main()


GRID = ("--seeds", "0", "--noise", "reward model", "--alpha", "1", "0", "--radius", "0.3", "0")


@pytest.mark.slow
def test_without_a_price_or_a_ball_all_three_are_one(monkeypatch, small):
    run_offline(monkeypatch, *GRID, "--temperature", "0.5", "1")
    rows = read_rows(small)
    assert len(rows) == 10 and len({str(row["before"]) for row in rows}) == 1
    for temperature in (0.5, 1):
        own = [row for row in rows if row["temperature"] == temperature]
        found = {(row["method"], row["alpha"] + row["radius"]): row["after"] for row in own}
        assert found["awr", 0] == found["cql", 0] == found["rfqi", 0]
        others = [found["awr", 0], found["cql", 1], found["rfqi", 0.3]]
        assert len({after["foreseen"] for after in others}) == 3
    assert rows[0]["after"] != rows[1]["after"]


@pytest.mark.slow
def test_a_grid_goes_on_where_it_stopped_and_one_method_alone_is_the_same(
    monkeypatch, small, capsys
):
    run_offline(monkeypatch, *GRID[:4], "--method", "cql")
    run_offline(monkeypatch, *GRID[:4], "--method", "awr", "cql")
    rows = read_rows(small)
    assert [row["method"] for row in rows] == ["cql", "awr"]
    assert rows[0]["before"] == rows[1]["before"]
    for row in rows:
        assert sum(n for key, (_, n) in row["strata after"].items() if "turns" in key) == 64
    small.write_text("")
    run_offline(monkeypatch, *GRID[:4], "--method", "awr", "cql")
    again = {row["method"]: row["after"] for row in read_rows(small)}
    assert again == {row["method"]: row["after"] for row in rows}
    monkeypatch.setattr(offline, "build", None)
    rest = [*GRID[:4], "--method", "awr", "cql"]
    run_offline(monkeypatch, *rest)
    run_offline(monkeypatch, *rest, "--table", "--seeds", "0", "1")
    for none in (["--seeds", "7"], ["--advantage", "q"], ["--temperature", "9"]):
        with pytest.raises(SystemExit) as ended:
            run_offline(monkeypatch, *rest, "--table", *none)
        assert ended.value.code == 2 and "found none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run_offline(monkeypatch, *GRID[:4], "--method", "rfqi")
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "offline.py: 1 failed"
    assert len(read_rows(small)) == 2


ROW = {"method": "awr", "advantage": "return", "temperature": 0.3, "alpha": 0.0, "radius": 0.0}
ROW |= {"flags": noise.flags_of("main", "ppo", "none"), "noise": "none", "before": {}}


def offline_rows():
    names = [name for columns in offline.COLUMNS for name in columns]
    return [{**ROW, "seed": seed, "after": dict.fromkeys(names, 0.5)} for seed in (20, 21)]


DAMAGED = [{"after": None}, {"after": {"a": "x"}}, {"noise": []}, {"alpha": [0]}, {"seed": {}}]
DAMAGED += [{"noise": "rain"}, {"method": "bcq"}]


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_damaged_row_is_one_line(monkeypatch, capsys, tmp_path, damage):
    monkeypatch.setattr(offline, "FOUND", tmp_path / "offline.jsonl")
    first, second = offline_rows()
    write_rows(offline.FOUND, [first, second | damage])
    with pytest.raises(SystemExit) as ended:
        run_offline(monkeypatch, "--table")
    said = capsys.readouterr().err.splitlines()[-1]
    expected = f"offline.py: error: {offline.FOUND}, row 2: expected another {[*damage][0]}, found"
    assert ended.value.code == 2 and said.startswith(expected)


def test_a_row_that_lacks_a_score_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(offline, "FOUND", tmp_path / "offline.jsonl")
    first, second = offline_rows()
    del second["after"]["foreseen"]
    write_rows(offline.FOUND, [first, second])
    with pytest.raises(SystemExit) as ended:
        run_offline(monkeypatch, "--table")
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "seed 21: expected 'foreseen', found none" in said


@pytest.mark.parametrize("flags", [("--radius", "1.5"), ("--alpha", "-1"), ("--method", "bcq")])
def test_bad_flags_are_one_line(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        run_offline(monkeypatch, *flags)
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and flags[0] in said and flags[1] in said
