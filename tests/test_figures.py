"""experiments/figures.py: pictures drawn again from stored data, and data computed in small."""

import json
import shutil
import sys

import pytest

import train
from experiments import figures, noise
from harness.flags import RISK_TERMS
from tasks import InputError
from tasks.builtin import SLOTS


def data_of(figure):
    return json.loads((figures.RESULTS / f"figure-{figure}.json").read_text())


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_redrawn_from_its_data_alone(name, tmp_path, monkeypatch, capsys):
    shutil.copy(figures.RESULTS / f"figure-{name}.json", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setitem(figures.FIGURES, name, (None, *figures.FIGURES[name][1:]))
    monkeypatch.setattr("sys.argv", ["figures.py", name, "--redraw"])
    figures.main()
    (target,) = tmp_path.glob("*.png")
    assert 30_000 < target.stat().st_size < 250_000 and target.name in capsys.readouterr().out


def test_the_figure_of_terms_says_what_its_data_say():
    for fits in data_of("terms")["fits"].values():
        core, full = fits["core"], fits["all"]
        assert full["mean"] - full["worst"] < core["mean"] - core["worst"]
        assert full["best"] - full["mean"] > core["best"] - core["mean"]
        moved = [abs(fit["mean"] - core["mean"]) for fit in (full, fits["+ shape"])]
        assert moved[0] < 0.02 < moved[1]
        assert fits.keys() == {"core", *(f"+ {term}" for term in RISK_TERMS), "all"}


def test_the_figures_data_are_computed(monkeypatch):
    """The curves as stored; the fits in small; of the domains the calmest and the wildest."""
    found = figures.terms_data(steps=2, m=3)["fits"]
    assert {len(fit["quantiles"]) for fits in found.values() for fit in fits.values()} == {3}
    domains = {name: {"std": std} for name, std in {"a": 2.0, "b": 1.0, "c": 3.0}.items()}
    monkeypatch.setattr(figures, "beliefs", lambda *rest: domains)
    found = json.loads(json.dumps(figures.first_data()))
    stored = data_of("first")
    assert found["bands"] == stored["bands"] and found["seeds"] == stored["seeds"] == 10
    assert [*found["fits"]] == ["b", "c"]


def test_a_run_that_fails_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", lambda words: 2)
    with pytest.raises(InputError, match="expected a finished run, found status 2"):
        figures.beliefs("dvpo, spread, lr 2e-4", 0, tmp_path)


@pytest.mark.slow
def test_what_a_critic_believes_is_read_of_a_run_that_has_ended(tmp_path, warm_start, monkeypatch):
    small = "--total-episodes 32 --batch-size 16 --eval-samples 8"
    monkeypatch.setattr(noise, "BUDGET", small)
    monkeypatch.setitem(noise.GRIDS, "long", noise.GRIDS["main"])  # which is short
    monkeypatch.setattr(figures, "NUM_BELIEFS", 64)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    found = figures.beliefs("dvpo, spread", 0, tmp_path)
    assert found.keys() == SLOTS.keys()
    for fit in found.values():
        assert len(fit["scores"]) == len(fit["believed"]) == 200 and fit["std"] > 0
        assert fit["scores"] == sorted(fit["scores"])
        assert fit["believed"] == sorted(fit["believed"])


def test_the_results_of_figures_whose_code_is_gone_say_what_they_did():
    """Their pages quote them; each names its commit."""
    kappa, levels = data_of("kappa"), data_of("levels")["fits"]
    stds = dict(zip(kappa["kappas"], kappa["stds"]))
    assert stds[1.0] == pytest.approx(0.288, abs=0.002)
    assert stds[0.01] == pytest.approx(0.5, abs=0.01)
    assert levels["right"]["mean"] == pytest.approx(0.23, abs=0.005)
    assert levels["midpoint"]["mean"] == pytest.approx(0, abs=0.001)
    data = data_of("calibration")
    excess = {}
    for domain in ("in domain", "out of domain"):
        means = [mean[domain] for mean in data["mean"].values()]
        excess[domain] = [predicted - sampled for sampled, predicted in means]
    assert max(map(abs, excess["in domain"])) < 0.05 < 0.08 < min(excess["out of domain"])
    assert all(data_of(name)["commit"] for name in ("kappa", "levels", "calibration"))


def test_an_unknown_figure_and_missing_data_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    bad = (["tails"], "invalid choice: 'tails'"), (["terms", "--redraw"], "figure-terms.json")
    for words, found in bad:
        monkeypatch.setattr("sys.argv", ["figures.py", *words])
        with pytest.raises(SystemExit) as stopped:
            figures.main()
        assert stopped.value.code == 2 and found in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        figures.main()
    said = "figures.py: error: it needs matplotlib: see requirements-dev.txt\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name,text,found",
    [
        ("terms", "[", "Expecting value"),
        ("terms", "[]", "list indices must be"),
        ("terms", '{"fits": {"coin": {"core": {}}}}', "'+ shape'"),
        ("first", '{"seeds": 10}', "'bands'"),
    ],
)
def test_a_figures_damaged_data_are_one_line(name, text, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    stored = tmp_path / f"figure-{name}.json"
    stored.write_text(text)
    monkeypatch.setattr("sys.argv", ["figures.py", name, "--redraw"])
    with pytest.raises(SystemExit) as stopped:
        figures.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and [*tmp_path.iterdir()] == [stored]
    assert said.startswith(f"figures.py: error: {stored}: expected the data of a figure: {found}")


def test_runs_without_a_curve_are_one_line(monkeypatch):
    before = dict.fromkeys(noise.SPLITS, 0.5)
    runs = {
        ("reward model", method): {0: {"before": before}, 1: {}} for method, *_ in figures.CURVES
    }
    monkeypatch.setattr(noise, "current", lambda name: runs)
    with pytest.raises(InputError, match="results: dvpo, spread, lr 2e-4: 'before'"):
        figures.first_data()
    runs["reward model", "dvpo, spread, lr 2e-4"][1] = {"before": before}
    with pytest.raises(InputError, match="results: dvpo, spread, lr 2e-4: 'curve'"):
        figures.first_data()
