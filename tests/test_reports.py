"""harness/reports.py: metrics against a loop, logs that read back, and the table at the end."""

import fcntl
import importlib.machinery
import json
import math
import os
import pty
import re
import shutil
import struct
import sys
import termios
import types
from pathlib import Path

import pytest
import torch
from common import (
    ONCE,
    log,
    ragged_mask,
    run_of,
    train_in,
)

import train
from harness import reports
from harness.reports import batch_metrics
from rollout import Rollout
from tasks import InputError

README = Path(__file__).parent.parent / "README.md"
STRICT = "def none(completions, **columns):\n    return [0.0] * len(completions)\n"


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
    assert train_in(tmp_path, warm_start, *flags, *ONCE) == 0
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
    assert train_in(tmp_path, warm_start, *flags, *ONCE) == 2
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
    assert train_in(tmp_path, warm_start, *flags.split(), *ONCE) == 0
    first, *steps, last = tracker.seen
    assert first == ("dvpo", 16) and last == "finished" and [step for step, _ in steps] == [64, 128]
    assert steps[1][1] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])


def test_the_end_shows_scores_sample_completions_and_paths(warm_start, tmp_path, capsys):
    train_in(tmp_path, warm_start, *"--total-episodes 128 --eval-samples 8".split(), *ONCE)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["examples"]) == 3 and out.count("prompt  ") == 3
    for pair in results["examples"]:
        for when, value in zip(("before", "after"), pair["scores"]):
            assert f"{when:7} {reports.shortened(pair[when])}  ({value:g})" in out
        assert reports.shortened(pair["prompt"]) in out and set(pair["scores"]) <= {0.0, 1.0}
    for name, halves in results["interval"].items():
        (row,) = (line for line in out.splitlines() if line.startswith(name))
        before, after = results["before"][name], results["after"][name]
        means = [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        found = row.removeprefix(name).split()
        assert found[::2] == means and found[1::2] == [f"±{half:.3f}" for half in halves]
    for folder in (tmp_path, tmp_path / "checkpoint-000002"):
        assert f"in {folder}: {' '.join(sorted(path.name for path in folder.iterdir()))}\n" in out
    assert "8 in domain, 8 out of domain\n" in out and "without loading the libraries" in out
    (header,) = re.findall("^ +(mean score.*)$", README.read_text(), re.M)
    assert f"\n{header}\n" in out


def evaluation_of(rows):
    """What `evaluate` gives for one set of (prompt, completion, score)."""
    keys = ("prompt", "completion", "score")
    scores = {"held out, greedy": torch.tensor([row[-1] for row in rows])}
    return scores, [dict(zip(keys, row)) for row in rows]


def results_of(folder, before, after, monkeypatch):
    """results.json of a report on two evaluations; before: as a checkpoint holds it."""
    run = types.SimpleNamespace(before=before[0], examples=before[1], start=0.0)
    monkeypatch.setattr(reports, "evaluate", lambda run, args: after)
    reports.report(run, types.SimpleNamespace(output_dir=folder), folder)
    return json.loads((folder / "results.json").read_text())


def test_intervals_by_hand_the_change_is_paired_by_prompt(tmp_path, monkeypatch):
    """Four prompts: 0 0 1 1 become 0 1 1 1, a change of 0 1 0 0.

    Variances (n - 1): 1/3, 1/4, 1/4. Were it not paired, the change's would be their sum.
    """
    before = evaluation_of([("p", "said", score) for score in (0.0, 0.0, 1.0, 1.0)])
    after = evaluation_of([("p", "said", score) for score in (0.0, 1.0, 1.0, 1.0)])
    results = results_of(tmp_path, before, after, monkeypatch)
    assert results["before"] == {"held out, greedy": 0.5}
    assert results["after"] == {"held out, greedy": 0.75}
    expected = [1.96 * math.sqrt(variance / 4) for variance in (1 / 3, 1 / 4, 1 / 4)]
    assert results["interval"]["held out, greedy"] == pytest.approx(expected)


def test_a_single_score_has_no_interval(tmp_path, monkeypatch, capsys):
    one = [("p", "said", 1.0)]
    results = results_of(tmp_path, evaluation_of(one), evaluation_of(one), monkeypatch)
    assert results["interval"] == {"held out, greedy": [None] * 3}
    assert results["after"] == {"held out, greedy": 1.0}
    (row,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("held out")]
    assert row.split() == ["held", "out,", "greedy", "1.000", "1.000", "+0.000"]


def test_without_held_out_prompts_the_end_says_so(tmp_path, monkeypatch, capsys):
    results = results_of(tmp_path, ({}, []), ({}, []), monkeypatch)
    out = capsys.readouterr().out
    assert results["after"] == {} and "no prompts are held out" in out and "before" not in out


def test_responses_that_changed_are_shown_first_and_empty_ones_too(tmp_path, monkeypatch, capsys):
    def shown(before, after):
        pair = evaluation_of(before), evaluation_of(after)
        return [row["prompt"] for row in results_of(tmp_path, *pair, monkeypatch)["examples"]]

    before = [(f"prompt {number}", "same", 0.0) for number in range(6)]
    after = [*before[:3], ("prompt 3", "", 0.0), ("prompt 4", "other", 0.0)]
    after.append(("prompt 5", " \n", 1.0))
    assert shown(before, after) == ["prompt 3", "prompt 4", "prompt 5"]
    out = capsys.readouterr().out
    assert "before  same  (0)\nafter   (empty)  (0)" in out and "after   (empty)  (1)" in out
    assert shown(before, before) == ["prompt 0", "prompt 1", "prompt 2"]


def test_the_interval_of_a_run_is_that_of_its_prompts(finished):
    """384 prompts, scores of 0 and 1. That a resumed run has the same: test_checkpoints.py."""
    results = json.loads((finished / "results.json").read_text())
    name = "in domain, greedy"
    mean, (half, *_) = results["before"][name], results["interval"][name]
    assert half == pytest.approx(1.96 * math.sqrt(mean * (1 - mean) / 383), rel=1e-4)


class Screen:
    """A terminal of 80 columns in sys.stderr's place; `lines` is what was drawn on it."""

    def __init__(self, monkeypatch):
        self.reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        monkeypatch.setattr(sys, "stderr", open(writer, "w", encoding="utf-8"))

    def lines(self):
        print("\nend", file=sys.stderr, flush=True)
        drawn = b""
        while not drawn.endswith(b"end\r\n"):  # one read may get a part
            drawn += os.read(self.reader, 65536)
        return re.split("[\r\n]+", drawn.decode().replace("\x1b[A", ""))[:-2]


def log_of(folder, num_iterations, metrics):
    """Logs a run whose every iteration has the same metrics."""
    args = types.SimpleNamespace(output_dir=folder, batch_size=128, report_to="none", eval_steps=0)
    args.learning_rate = 1e-4
    run = types.SimpleNamespace(iteration=0, start=0.0)
    with reports.open_log(run, args, num_iterations) as entries:
        while run.iteration < num_iterations:
            run.iteration += 1
            reports.log_iteration(entries, run, args, metrics)


TYPICAL = {
    "tps": 3456.7,
    "objective/scores": 0.614,
    "objective/true_scores": 0.655,
    "objective/kl": -0.0012,
    "val/explained_var": -0.13,
    "policy/clipfrac_avg": 0.1,
}


@pytest.mark.parametrize("scale, width", [(1, 5), (-1000, 1)])
def test_the_bar_fits_80_columns_with_all_six_values(scale, width, tmp_path, monkeypatch, capsys):
    """Also with scores of hundreds below 0, and 1,500 iterations to come."""
    screen = Screen(monkeypatch)
    scores = {name: scale * TYPICAL[name] for name in TYPICAL if name.endswith("scores")}
    log_of(tmp_path, 1500 if scale < 0 else 150, TYPICAL | scores)
    lines = [line for line in screen.lines() if "clip" in line]
    assert lines and all(len(line.rstrip()) <= 80 for line in lines)
    shown = "tps=3457 score=-614 true=-655" if scale < 0 else "tps=3457 score=0.61 true=0.66"
    assert all(f"{shown} kl=0.00 ev=-0.13 clip=0.10" in line for line in lines)
    assert all(len(line.split("|")[1]) >= width for line in lines)
    assert "it/s" not in "".join(lines) and "-0.00" not in "".join(lines)


@pytest.mark.parametrize("num_iterations, expected", [(150, range(15, 151, 15)), (4, range(1, 5))])
def test_every_tenth_of_a_run_leaves_a_line_and_a_file_gets_no_bar(
    num_iterations, expected, tmp_path, capsys
):
    log_of(tmp_path, num_iterations, TYPICAL)
    out, err = capsys.readouterr()
    values = "score=0.61 true=0.66 kl=0.00 ev=-0.13 clip=0.10"
    assert out.splitlines() == [f"iteration {n} of {num_iterations}: {values}" for n in expected]
    assert err == ""
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == num_iterations


def test_what_was_not_measured_is_not_shown(tmp_path, capsys):
    log_of(tmp_path, 1, TYPICAL | {"objective/kl": math.nan})
    assert capsys.readouterr().out == "iteration 1 of 1: score=0.61 true=0.66 ev=-0.13 clip=0.10\n"


@pytest.mark.parametrize("spoiled", [True, False])
def test_a_reward_that_gives_all_the_same_is_noted(
    spoiled, warm_start, tmp_path, capsys, monkeypatch
):
    (tmp_path / "strict_reward.py").write_text(STRICT)
    monkeypatch.chdir(tmp_path)
    flags = f"--reward {'strict_reward:none' if spoiled else 'exact'} --eval-samples 8".split()
    run, args = run_of(warm_start, tmp_path, *flags)
    run.before, _ = reports.evaluate(run, args)
    capsys.readouterr()
    reports.announce(run, args, 24)
    first, *notes = capsys.readouterr().out.splitlines()
    assert first.endswith(" prompts to train on; evaluated on 8 in domain, 8 out of domain")
    expected = ["note: at first all 32 scores are 0: nothing to learn from?"]
    assert notes == (expected if spoiled else [])


def test_long_texts_are_shortened_from_the_left():
    assert reports.shortened("a" * 200 + " b\nc", 10) == "...aaa b c"
    assert reports.shortened("a\nb") == "a b"
    turns = [{"role": "user", "content": content} for content in ("a\nb", "", "c")]
    assert reports.shortened(turns) == "a b / (empty) / c"


def test_evaluation_sees_no_noise_and_does_not_disturb_training(warm_start, tmp_path):
    noise = "--reward-noise-fp 1 --reward-noise-fn 1 --reward-noise-outlier 1 5"
    run, args = run_of(warm_start, tmp_path, *noise.split(), "--eval-samples", "96")
    before, noise = torch.get_rng_state(), run.noise.get_state()
    results, examples = reports.evaluate(run, args)
    assert all(0 <= scores.min() and scores.max() <= 1 for scores in results.values())
    scores = results["in domain, greedy"]
    assert len(scores) == args.eval_samples and scores.mean() > 0.3
    assert [row["score"] for row in examples] == scores.tolist()
    assert [row["prompt"] for row in examples] == list(run.evals["in domain"]["prompt"])
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(run.noise.get_state(), noise)
    _, metrics = train.collect(run, args)
    assert metrics["objective/scores"] < 0 < metrics["objective/true_scores"]


def test_evaluation_of_a_policy_whose_logits_are_not_finite_says_so(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path, "--eval-samples", "4")
    run.policy.lm_head.weight.data[3] = math.nan
    with pytest.raises(InputError, match="evaluation: expected finite log-probs"):
        reports.evaluate(run, args)


def test_batch_metrics_by_hand():
    """Two rows of two and one token, the second cut off, kl_coef 2.

    k1 sums to 0.3 and -0.1, -logp to 1.5 and 0.5; the scores are 1 and 0, without noise 1 and 1.
    """
    mask, scores = ragged_mask([2, 1], 2), torch.tensor([1.0, 0.0])
    ids = torch.tensor([[5, 9, 1], [5, 9, 1]])  # the last 1 is off the mask
    rollout = Rollout(ids, torch.ones(2, 3).long(), mask, torch.tensor([False, True]))
    logprobs = torch.tensor([[-1.0, -0.5], [-0.5, math.nan]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.1, -0.7], [-0.4, 0.0]])
    experience = types.SimpleNamespace(rollout=rollout, logprobs=logprobs)
    experience.ref_logprobs = ref_logprobs
    metrics = batch_metrics(experience, scores, torch.ones(2), 2.0, [1])
    assert not any(value.requires_grad for value in metrics.values())
    expected = {"kl": 0.1, "scores": 0.5, "entropy": 1.0, "rlhf_reward": 0.3, "true_scores": 1.0}
    expected = {f"objective/{name}": value for name, value in expected.items()}
    expected |= {"completions/mean_length": 1.5, "completions/clipped_ratio": 0.5}
    expected["val/num_eos_tokens"] = 1
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected, abs=1e-6)
    experience.ref_logprobs = None
    without = batch_metrics(experience, scores, torch.ones(2), 0.0, [1])
    assert without["objective/kl"].isnan() and without["objective/rlhf_reward"] == 0.5
