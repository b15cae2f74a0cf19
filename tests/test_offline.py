"""experiments/offline.py: advantages, resume, and three methods that are one without pessimism."""

import argparse
import itertools
import shutil
import sys

import pytest
import torch
from common import random_mask, write_rows

from dvpo import discounted_returns
from experiments import noise, offline
from experiments.offline import cql_loss, robust_returns, robust_value
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


# ---- the losses: by hand, the operator by brute force and by its dual

ONE = torch.ones(1, 1, dtype=torch.bool)


def test_cql_loss_by_hand():
    """Q = (ln 1, ln 3), action 1, y = 0: (ln 3)^2 / 2 + alpha (ln 4 - ln 3)."""
    q, actions = torch.tensor([[[1.0, 3.0]]]).log(), torch.tensor([[1]])
    square = torch.tensor(3.0).log().square() / 2
    for alpha in (0.0, 0.5, 2.0):
        expected = square + alpha * torch.tensor(4 / 3).log()
        torch.testing.assert_close(cql_loss(q, actions, torch.zeros(1, 1), ONE, alpha), expected)


def test_the_price_pushes_down_what_the_log_does_not_hold():
    torch.manual_seed(0)
    q = torch.randn(3, 4, 5, requires_grad=True)
    actions, mask = torch.randint(5, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    mask[0, :2] = False
    taken = q.detach().gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    cql_loss(q, actions, taken, mask, 1.0).backward()
    is_taken = torch.nn.functional.one_hot(actions, 5).bool()
    assert (q.grad[mask][is_taken[mask]] < 0).all() and (q.grad[mask][~is_taken[mask]] > 0).all()
    assert not q.grad[~mask].any()
    whole = q.grad.clone()
    q.grad = None
    spoiled = torch.where(mask.unsqueeze(-1), q, torch.nan)
    tensors = actions.where(mask, -1), taken.where(mask, torch.nan), mask
    cql_loss(spoiled, *tensors, 1.0).backward()
    assert torch.equal(q.grad, whole)
    # The price alone moves no mean over the vocabulary.
    torch.testing.assert_close(q.grad.sum(dim=-1), torch.zeros(3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5, 1.0])
def test_robust_value_is_the_least_mean_in_the_ball_and_its_dual(radius):
    """States V; P_0 is sure of one of them. Extreme points of the ball move the mass to one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, generator=generator, dtype=torch.float64)
    for at, value in enumerate(values):
        own = robust_value(value, values.min(), radius)
        sure = torch.nn.functional.one_hot(torch.tensor(at), 6).double()
        others = torch.eye(6, dtype=torch.float64)
        corners = (1 - radius) * sure + radius * others
        torch.testing.assert_close(own, (corners @ values).min())
        # No mixture of corners, which is all of the ball, is lower.
        mixed = torch.rand(500, 6, generator=generator, dtype=torch.float64)
        mixed = mixed / mixed.sum(dim=1, keepdim=True)
        assert (mixed @ corners @ values >= own - 1e-12).all()
        eta = torch.linspace(-4, 4, 80001, dtype=torch.float64)
        dual = eta - (eta - value).clamp(min=0) - radius * (eta - values.min()).clamp(min=0)
        torch.testing.assert_close(dual.max(), own, atol=2e-4, rtol=0)


def test_robust_returns_on_a_path_by_brute_force():
    """An adversary who, at each of two steps, may move the mass radius to any of three states."""
    rewards = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    mask, gamma, radius = torch.ones(1, 3, dtype=torch.bool), 0.9, 0.2
    states = torch.tensor([-0.7, 0.4, 1.0], dtype=torch.float64)
    own = robust_returns(rewards, mask, gamma, radius, states.min())[0]
    found = []
    for first, second in itertools.product([None, *states.tolist()], repeat=2):
        y = 2.0
        for reward, state in ((-1.0, second), (0.5, first)):
            following = y if state is None else (1 - radius) * y + radius * state
            y = reward + gamma * following
        found.append(y)
    assert own[0].item() == pytest.approx(min(found)) and own[2] == 2.0


def test_robust_returns_of_whole_numbers_are_floats_and_other_shapes_are_refused():
    rewards, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    found = robust_returns(rewards, mask, 0.9, 0.0, torch.tensor(0.0))
    torch.testing.assert_close(found, torch.tensor([[2.71, 1.9, 1.0]]))
    for other in (mask[:, :2], mask.expand(2, 3)):
        with pytest.raises(AssertionError, match="mask"):
            robust_returns(rewards, other, 0.9, 0.0, torch.tensor(0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_ball_of_radius_0_leaves_the_discounted_return(gamma):
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(generator, 5, 7)
    rewards = torch.where(mask, torch.randn(5, 7, generator=generator), 0)
    own = robust_returns(rewards, mask, gamma, 0.0, torch.tensor(-3.0))
    assert torch.equal(own, torch.where(mask, discounted_returns(rewards, mask, gamma), 0))
    lower = robust_returns(rewards, mask, gamma, 0.3, torch.tensor(-3.0))
    assert (lower <= own + 1e-6).all() and (lower < own).any()
