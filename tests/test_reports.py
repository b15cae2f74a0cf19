"""harness/reports.py: metrics against a loop, logs that read back, and the table at the end."""

import importlib.machinery
import json
import math
import shutil
import sys
import types

import pytest
import torch
from conftest import (
    log,
    ragged_mask,
    run_of,
    train_in,
)

import train
from harness import reports
from harness.reports import rollout_metrics
from tasks import InputError


def test_metrics_have_trls_names_and_the_quantile_ones(finished):
    names = """
        objective/kl objective/scores objective/entropy objective/rlhf_reward objective/true_scores
        policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio
        val/num_eos_tokens val/explained_var lr episode
        completions/mean_length completions/clipped_ratio
        quantile/crossing_frac quantile/std quantile/lower_tail quantile/upper_tail
        quantile/coverage quantile/head_spread
    """
    assert set(names.split()) <= log(finished)[0].keys()
    assert "eps" in (finished / "metrics.jsonl").read_text()


def test_tensorboard_events_read_back_and_a_resumed_run_leaves_no_event_twice(warm_start, tmp_path):
    """Killed after three of four iterations with a checkpoint at two.

    What is read is one value per iteration, those of metrics.jsonl.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--total-episodes 256 --save-steps 2 --eval-samples 4 --report-to tensorboard".split()
    assert train_in(tmp_path, warm_start, *flags) == 0
    shutil.rmtree(tmp_path / "checkpoint-000004")
    assert train.main(["--resume", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    rows = log(tmp_path)
    assert len(rows) == 4 and set(events.Tags()["scalars"]) == rows[0].keys() | {"eps", "tps"}
    for name in ("objective/scores", "loss/value_avg", "quantile/std"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["episode"], pytest.approx(row[name])) for row in rows]


def test_a_run_that_stops_on_an_error_leaves_its_events(warm_start, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    update = train.update

    def failing(run, args, experience):
        if run.iteration == 1:
            raise InputError("iteration 2: expected finite losses")
        return update(run, args, experience)

    monkeypatch.setattr(train, "update", failing)
    flags = "--total-episodes 256 --eval-samples 4 --report-to tensorboard".split()
    assert train_in(tmp_path, warm_start, *flags) == 2
    (event,) = EventAccumulator(str(tmp_path)).Reload().Scalars("objective/scores")
    assert event.value == pytest.approx(log(tmp_path)[0]["objective/scores"])


class Tracker:
    """wandb and trackio in their image: notes what it is given."""

    def __init__(self):
        self.seen = []

    def init(self, project, config):
        self.seen.append((project, config["num_quantiles"]))
        return self

    def log(self, metrics, step):
        self.seen.append((step, metrics))

    def finish(self):
        self.seen.append("finished")


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_other_loggers_get_the_metrics_under_their_names_and_are_closed(
    package, warm_start, tmp_path, monkeypatch
):
    tracker, module = Tracker(), types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    module.init = tracker.init
    monkeypatch.setitem(sys.modules, package, module)
    flags = f"--total-episodes 128 --eval-samples 4 --report-to {package}"
    assert train_in(tmp_path, warm_start, *flags.split()) == 0
    first, *steps, last = tracker.seen
    assert first == ("dvpo", 16) and last == "finished" and [step for step, _ in steps] == [64, 128]
    assert steps[1][1] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])


def test_the_end_shows_scores_sample_completions_and_paths(warm_start, tmp_path, capsys):
    train_in(tmp_path, warm_start, *"--total-episodes 128 --eval-samples 8".split())
    out, err = capsys.readouterr()
    examples = json.loads((tmp_path / "results.json").read_text())["examples"]
    assert len(examples) == 3 and out.count("prompt  ") == 3
    for pair in examples:
        assert f"before  {pair['before']}  ({pair['scores'][0]:g})" in out
        assert f"after   {pair['after']}  ({pair['scores'][1]:g})" in out
        assert reports.shortened(pair["prompt"]) in out and set(pair["scores"]) <= {0.0, 1.0}
    for path in ("checkpoint-000002/policy", "checkpoint-000002/critic"):
        assert str(tmp_path / path) in out
    (also,) = (line for line in out.splitlines() if line.startswith(f"also in {tmp_path}: "))
    names = set(also.split(": ")[1].split(", "))
    assert names == {path.name for path in tmp_path.iterdir()} - {"checkpoint-000002"}
    assert "metrics.jsonl" in names
    assert all(f"{name}=" in err for name in reports.SHOWN) and "2/2" in err


def test_long_texts_are_shortened_from_the_left():
    assert reports.shortened("a" * 200 + " b\nc", 10) == "...aaa b c"
    assert reports.shortened("a\nb") == "a b"


def test_evaluation_sees_no_noise_and_does_not_disturb_training(warm_start, tmp_path):
    noise = "--reward-noise-fp 1 --reward-noise-fn 1 --reward-noise-outlier 1 5"
    run, args = run_of(warm_start, tmp_path, *noise.split())
    before, noise = torch.get_rng_state(), run.noise.get_state()
    results, examples = reports.evaluate(run, args)
    assert len(examples) == 3
    assert all(0 <= value <= 1 for value in results.values()) and results["in domain, greedy"] > 0.3
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(run.noise.get_state(), noise)
    _, metrics = train.collect(run, args)
    assert metrics["objective/scores"] < 0 < metrics["objective/true_scores"]


def test_rollout_metrics_by_hand():
    """Two rows of two and one token, kl_coef 2.

    k1 sums to 0.3 and -0.1, -logp to 1.5 and 0.5; the scores are 1 and 0.
    """
    mask, scores = ragged_mask([2, 1], 2), torch.tensor([1.0, 0.0])
    logprobs = torch.tensor([[-1.0, -0.5], [-0.5, math.nan]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.1, -0.7], [-0.4, 0.0]])
    metrics = rollout_metrics(scores, logprobs, ref_logprobs, mask, 2.0)
    assert not any(value.requires_grad for value in metrics.values())
    expected = {"kl": 0.1, "scores": 0.5, "entropy": 1.0, "rlhf_reward": 0.3}
    expected = {f"objective/{name}": value for name, value in expected.items()}
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected, abs=1e-6)
    without = rollout_metrics(scores, logprobs, None, mask, 0.0)
    assert without["objective/kl"].isnan() and without["objective/rlhf_reward"] == 0.5
