"""train.py: the run from end to end, equal seeds, resuming, and bad input in one line."""

import argparse
import collections
import contextlib
import importlib.machinery
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path

import numpy
import pytest
import torch
from conftest import tiny_config, train_and_exit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import rollout as ro
import train
from critic import QuantileCritic
from experiments.warm_start import warm_start as make_warm_start

# A run of seconds: noise off, so that the reward's rise is not luck.
SMALL = """--total-episodes 1536 --batch-size 64 --micro-batch-size 48 --num-ppo-epochs 2 --critic-warmup-steps 1 --num-quantiles 16
    --num-heads 2 --eval-samples 384 --learning-rate 2e-4 --reward-noise-fp 0 --reward-noise-fn 0 --response-length 12""".split()
MODEL = ["--total-episodes", "8", "--batch-size", "8", "--micro-batch-size", "3", "--response-length", "4", "--num-quantiles", "8",
         "--critic-warmup-steps", "0", "--eval-samples", "2"]  # fmt: skip


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """The built-in model of seed 0, made once."""
    folder = tmp_path_factory.mktemp("warm") / "warm_start"
    make_warm_start("dialogue", 0, folder)
    return folder


def run(folder, warm_start, *flags):
    """train.main in process; the exit status."""
    if not (folder / "warm_start").exists():
        shutil.copytree(warm_start, folder / "warm_start")
    return train.main([*SMALL, "--output-dir", str(folder), *flags])


def some_of(source, target, *names):
    for name in names:
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, target / name)


def log(folder):
    """The metrics without those that are clocks."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("eps", "tps")} for row in rows]


def weights(folder):
    """Every number of the newest checkpoint's policy and critic."""
    folder = train.find_checkpoint(folder)
    policy, critic = AutoModelForCausalLM.from_pretrained(folder / "policy"), QuantileCritic.from_pretrained(folder / "critic")
    return torch.cat([p.flatten() for model in (policy, critic) for p in model.parameters()])


@pytest.fixture(scope="session")
def finished(tmp_path_factory, warm_start):
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, warm_start, "--save-steps", "12") == 0
    return folder


# ---- the run


def test_end_to_end_the_reward_rises_and_what_is_left_behind_loads(finished, capsys):
    rows = log(finished)
    assert [row["iteration"] for row in rows] == list(range(1, 25)) and rows[-1]["episode"] == 1536
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss/policy_avg", "loss/value_avg", "objective/kl"))
    first, last = (sum(row["objective/true_scores"] for row in part) / 6 for part in (rows[:6], rows[-6:]))
    assert last > first + 0.02
    results = json.loads((finished / "results.json").read_text())
    assert all(results["after"][f"in domain, {mode}"] > results["before"][f"in domain, {mode}"] + 0.03 for mode in ("greedy", "sampled"))
    assert results["before"].keys() == {f"{domain}, {mode}" for domain in ("in domain", "out of domain") for mode in ("greedy", "sampled")}
    folder = finished / "checkpoint-000024"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "policy"), AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": "area north"}], tokenize=False, add_generation_prompt=True), return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    AutoModel.from_pretrained(folder / "critic")
    flags = json.loads((finished / "args.json").read_text())["flags"]
    assert flags["num_quantiles"] == 16 and flags["batch_size"] == 64
    assert not list(finished.glob("*.tmp"))


def test_metrics_have_trls_names_and_the_quantile_ones(finished):
    names = """objective/kl objective/scores objective/entropy objective/rlhf_reward policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg
        val/ratio val/num_eos_tokens lr episode val/explained_var completions/mean_length completions/clipped_ratio objective/true_scores
        quantile/crossing_frac quantile/std quantile/lower_tail quantile/upper_tail quantile/coverage quantile/head_spread""".split()
    assert set(names) <= log(finished)[0].keys() and "eps" in (finished / "metrics.jsonl").read_text()


def test_the_readme_explains_every_metric(finished):
    text = (Path(train.__file__).parent / "README.md").read_text().split("\n## Metrics")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/.*]+)`", "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))))
    prefixes = tuple(name.rstrip("*.") for name in named if name.endswith(("*", "...")))
    logged = {name for row in (finished / "metrics.jsonl").read_text().splitlines() for name in json.loads(row)} - {"iteration"}
    assert len(logged) > 20 and not {name for name in logged - named if not name.startswith(prefixes)}


def test_same_seed_same_run_bit_for_bit_and_another_seed_another(finished, warm_start, tmp_path):
    run(tmp_path / "again", warm_start, "--total-episodes", "768")
    assert log(tmp_path / "again") == log(finished)[:12]
    assert torch.equal(weights(tmp_path / "again"), weights(finished / "checkpoint-000012"))
    run(tmp_path / "other", warm_start, "--seed", "1", "--total-episodes", "64")
    assert log(tmp_path / "other")[0] != log(finished)[0]


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, capsys):
    """As after a crash in iteration 13 or later: the checkpoint of iteration 12, and a log that had gone on."""
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    with open(tmp_path / "metrics.jsonl", "a") as log_file:
        log_file.write('{"iteration": 25, "objec')  # torn by the crash
    assert train.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    assert f"going on from {tmp_path / 'checkpoint-000012'}: 12 of 24 iterations are done" in capsys.readouterr().out
    assert log(tmp_path) == log(finished) and torch.equal(weights(tmp_path), weights(finished))
    assert json.loads((tmp_path / "results.json").read_text())["after"] == json.loads((finished / "results.json").read_text())["after"]


def test_ppo_shares_every_line_but_the_critics_loss(warm_start, tmp_path):
    assert run(tmp_path, warm_start, "--algo", "ppo", "--total-episodes", "128") == 0
    row = log(tmp_path)[-1]
    assert not any(name.startswith("quantile/") for name in row) and row["val/ratio"] == pytest.approx(1, abs=0.1)
    assert weights(tmp_path).isfinite().all()


@pytest.mark.parametrize("algo", ["robust", "grpo", "dr_grpo", "reinforce++"])
def test_baselines_run_save_and_resume_with_no_more_parts_than_they_need(algo, warm_start, tmp_path):
    assert run(tmp_path / "a", warm_start, "--algo", algo, "--total-episodes", "256", "--save-steps", "2", "--eval-samples", "8") == 0
    rows = log(tmp_path / "a")
    has_critic = algo == "robust"
    assert ("val/explained_var" in rows[0]) == has_critic == ("loss/value_avg" in rows[0]) and not any("quantile/" in name for name in rows[0])
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss/policy_avg", "objective/kl", "policy/approxkl_avg", "val/ratio"))
    assert rows[0]["val/ratio"] == 1 if has_critic else rows[0]["policy/approxkl_avg"] > 0  # no critic, no warm-up
    final = train.find_checkpoint(tmp_path / "a")
    assert (final / "critic").exists() == has_critic
    (tmp_path / "b").mkdir()
    some_of(tmp_path / "a", tmp_path / "b", "checkpoint-000002", "args.json", "metrics.jsonl", "warm_start")
    assert train.main(["--resume", "--output-dir", str(tmp_path / "b")]) == 0
    assert log(tmp_path / "b") == rows
    policies = [AutoModelForCausalLM.from_pretrained(train.find_checkpoint(tmp_path / name) / "policy") for name in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*(policy.parameters() for policy in policies)))


def test_grpo_samples_groups_and_keeps_the_kl_in_its_loss(warm_start, tmp_path, monkeypatch):
    once = ["--num-mini-batches", "1", "--num-ppo-epochs", "1", "--kl-coef", "2", "--group-size", "4"]
    state, args = state_of(warm_start, tmp_path, "--algo", "grpo", *once)
    with torch.no_grad():
        state.policy.lm_head.weight += 0.05 * torch.randn(state.policy.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    experience, _ = train.collect(state, args)
    prompts = [tuple(row) for row in experience["rollout"].input_ids[:, : -args.response_length].tolist()]
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 64, 4)) and len(set(prompts)) == 16
    advantages = experience["advantages"][:, 0].view(16, 4)
    assert advantages.sum(1).abs().max() < 1e-4 and experience["targets"] is None and advantages.abs().max() > 0.1
    losses = []
    for kl_coef in (0.0, 2.0):
        args.kl_coef = kl_coef
        monkeypatch.setattr(state.optimizer, "step", lambda: None)
        losses.append(train.update(state, args, experience)["loss/policy_avg"])
    mask, weights = experience["rollout"].mask, train.dvpo.sequence_weights(experience["rollout"].mask)
    k3 = train.dvpo.kl_estimate(experience["logprobs"], experience["ref_logprobs"], "k3")
    assert (losses[1] - losses[0]).item() == pytest.approx(2 * train.dvpo.masked_mean(weights * k3, mask).item(), rel=1e-3)


def test_dr_grpos_gradient_of_a_token_does_not_depend_on_lengths(warm_start, tmp_path, monkeypatch):
    """Cutting other responses of the minibatch short leaves a response's share of the loss as it is, score / (rows * response_length)."""
    once = ["--num-mini-batches", "1", "--num-ppo-epochs", "1", "--kl-coef", "0", "--algo", "dr_grpo"]
    state, args = state_of(warm_start, tmp_path, *once)
    monkeypatch.setattr(state.optimizer, "step", lambda: None)
    experience, _ = train.collect(state, args)
    experience["advantages"] = torch.zeros(64, experience["logprobs"].shape[1])
    experience["advantages"][7] = 1.0  # the others do not pull
    length = experience["rollout"].mask[7].sum().item()
    for keep in (None, 1):
        if keep:
            rollout = experience["rollout"]
            rollout.mask[:7, keep:] = False
            rollout.attention_mask[:7, -rollout.mask.shape[1] + keep :] = 0
            experience["rollout"] = ro.Rollout(rollout.input_ids, rollout.attention_mask, rollout.position_ids, rollout.mask, rollout.truncated)
        assert train.update(state, args, experience)["loss/policy_avg"].item() == pytest.approx(-length / (64 * args.response_length), rel=1e-4)


def test_a_second_run_moves_the_first_aside_and_reuses_the_warm_start(warm_start, tmp_path, capsys):
    run(tmp_path, warm_start, "--total-episodes", "64")
    first = log(tmp_path)
    made = (tmp_path / "warm_start" / "model.safetensors").stat().st_mtime_ns
    run(tmp_path, warm_start, "--total-episodes", "64", "--algo", "ppo")
    assert log(tmp_path / "earlier-1") == first != log(tmp_path)
    assert (tmp_path / "warm_start" / "model.safetensors").stat().st_mtime_ns == made
    assert "earlier-1" in capsys.readouterr().out


def test_a_runs_own_event_file_stays_and_earlier_folders_never_collide(warm_start, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def logger(args, episode):
        (tmp_path / "events.out.new").touch()
        yield lambda metrics, episode: None

    monkeypatch.setattr(train, "logger", logger)
    (tmp_path / "earlier-2").mkdir()  # the user threw earlier-1 away
    (tmp_path / "events.out.old").touch()
    run(tmp_path, warm_start, "--total-episodes", "64", "--eval-samples", "8")
    assert (tmp_path / "events.out.new").exists() and (tmp_path / "earlier-1" / "events.out.old").exists()
    train.set_aside(tmp_path)
    assert (tmp_path / "earlier-3" / "args.json").exists() and not list((tmp_path / "earlier-2").iterdir())


def test_tensorboard_events_read_back_and_a_resumed_run_leaves_no_event_twice(warm_start, tmp_path):
    """Killed after three of four iterations with a checkpoint at two: what is read is one value per iteration, those of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--total-episodes", "256", "--save-steps", "2", "--eval-samples", "4", "--report-to", "tensorboard"]
    assert run(tmp_path, warm_start, *flags) == 0
    shutil.rmtree(tmp_path / "checkpoint-000004")
    assert train.main(["--resume", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    rows = log(tmp_path)
    assert len(rows) == 4 and set(events.Tags()["scalars"]) == rows[0].keys() | {"eps", "tps"}
    for name in ("objective/scores", "loss/value_avg", "quantile/std"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(row["episode"], pytest.approx(row[name])) for row in rows]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_other_loggers_get_the_metrics_under_their_names_and_are_closed(package, warm_start, tmp_path, monkeypatch):
    seen = []
    own = argparse.Namespace(log=lambda metrics, step: seen.append((step, metrics)), finish=lambda: seen.append("finished"))
    module = types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    module.init = lambda project, config: seen.append((project, config["num_quantiles"])) or own
    monkeypatch.setitem(sys.modules, package, module)
    assert run(tmp_path, warm_start, "--total-episodes", "128", "--eval-samples", "4", "--report-to", package) == 0
    first, *steps, last = seen
    assert first == ("dvpo", 16) and last == "finished" and [step for step, _ in steps] == [64, 128]
    assert steps[1][1] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])


def test_the_end_shows_scores_sample_completions_and_paths(finished, warm_start, tmp_path, capsys):
    run(tmp_path, warm_start, "--total-episodes", "128")
    out = capsys.readouterr()
    examples = json.loads((tmp_path / "results.json").read_text())["examples"]
    assert len(examples) == 3 and out.out.count("prompt  ") == 3
    for pair in examples:
        assert f"before  {pair['before']}  ({pair['scores'][0]:g})" in out.out and f"after   {pair['after']}  ({pair['scores'][1]:g})" in out.out
        assert train.shortened(pair["prompt"]) in out.out and set(pair["scores"]) <= {0.0, 1.0}
    for path in ("checkpoint-000002/policy", "checkpoint-000002/critic"):
        assert str(tmp_path / path) in out.out
    (also,) = (line.split(": ")[1] for line in out.out.splitlines() if line.startswith(f"also in {tmp_path}: "))
    assert set(also.split(", ")) == {path.name for path in tmp_path.iterdir()} - {"checkpoint-000002"} and "metrics.jsonl" in also
    assert all(f"{name}=" in out.err for name in train.SHOWN) and "2/2" in out.err
    assert train.shortened("a" * 200 + " b\nc", 10) == "...aaa b c" and train.shortened("a\nb") == "a b"


def test_warm_up_trains_the_critic_only_and_says_so(warm_start, tmp_path, capsys):
    run(tmp_path, warm_start, "--critic-warmup-steps", "2", "--total-episodes", "128")
    assert "--critic-warmup-steps 2 covers all 2 iterations" in capsys.readouterr().out
    policy = AutoModelForCausalLM.from_pretrained(train.find_checkpoint(tmp_path) / "policy")
    start = AutoModelForCausalLM.from_pretrained(warm_start)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters()))
    assert log(tmp_path)[-1]["objective/kl"] == pytest.approx(0, abs=1e-6) and log(tmp_path)[-1]["val/ratio"] == 1


def state_of(warm_start, tmp_path, *flags):
    if not (tmp_path / "warm_start").exists():
        shutil.copytree(warm_start, tmp_path / "warm_start")
    args = train.parse_args([*SMALL, "--output-dir", str(tmp_path), *flags])
    return train.build(args), args


def test_ratio_is_1_in_the_first_minibatch_and_old_values_stay_as_rolled_out(warm_start, tmp_path):
    state, args = state_of(warm_start, tmp_path, "--num-mini-batches", "1", "--num-ppo-epochs", "1")
    experience, _ = train.collect(state, args)
    targets = experience["targets"].clone()
    state.iteration = 5
    metrics = train.update(state, args, experience)
    assert metrics["val/ratio"].item() == pytest.approx(1, abs=1e-5) and metrics["policy/approxkl_avg"] < 1e-10
    assert torch.equal(experience["targets"], targets) and not targets.requires_grad


def test_micro_batch_size_changes_no_gradient_and_no_metric(warm_start, tmp_path):
    """One optimiser step of SGD with micro-batches of 64 rows, of 7, of 100 tokens: the same weights and numbers to rounding.

    So the logged losses are not the last micro-batch's, and explained variance is the batch's and not a mean of parts.
    """
    moved, logged = [], []
    for size in (["--micro-batch-size", "64"], ["--micro-batch-size", "7"], ["--micro-batch-tokens", "100"]):
        once = ["--num-mini-batches", "1", "--num-ppo-epochs", "1", "--critic-warmup-steps", "0"]
        state, args = state_of(warm_start, tmp_path, *size, *once)
        torch.manual_seed(0)
        state.optimizer, state.critic_optimizer = (torch.optim.SGD(model.parameters(), lr=1.0) for model in (state.policy, state.critic))
        state.critic.heads.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # values that differ between states
        before = torch.cat([p.detach().flatten() for model in (state.policy, state.critic) for p in model.parameters()])
        experience, metrics = train.collect(state, args)
        metrics |= train.update(state, args, experience)
        moved.append(torch.cat([p.detach().flatten() for model in (state.policy, state.critic) for p in model.parameters()]) - before)
        logged.append({name: float(value) for name, value in metrics.items()})
    assert moved[0].abs().max() > 1e-3
    for other in (1, 2):
        torch.testing.assert_close(moved[0], moved[other], rtol=1e-3, atol=1e-5)
        assert logged[0] == pytest.approx(logged[other], rel=1e-3, abs=1e-5)


def test_no_pass_is_spent_on_numbers_that_are_there(warm_start, tmp_path, monkeypatch):
    """After a first check of eight rows, in fp32 the policy is not scored again; without a KL there is no reference; in bf16 both are scored."""
    calls, response_logprobs = [], ro.response_logprobs
    note = lambda model, part, temperature: calls.append((model, len(part.mask))) or response_logprobs(model, part, temperature)
    monkeypatch.setattr(ro, "response_logprobs", note)
    for flags, expected in (([], {"reference": 64}), (["--kl-coef", "0"], {}), (["--dtype", "bfloat16"], {"policy": 64, "reference": 64})):
        state, args = state_of(warm_start, tmp_path, *flags)
        calls.clear()
        train.collect(state, args)
        first = {"policy": 8} if state.trust_recorded else {}
        for rows in (collections.Counter(expected) + collections.Counter(first), expected):
            scored = collections.Counter()
            for model, number in calls:
                scored["policy" if model is state.policy else "reference"] += number
            assert scored == rows
            calls.clear()
            train.collect(state, args)


def test_recorded_logprobs_that_differ_from_scored_ones_are_not_trusted(warm_start, tmp_path, monkeypatch):
    """An architecture that decodes otherwise than it reads: its tokens are scored, and the first ratio is 1 all the same."""
    sample = ro.sample

    def shifted(*args):
        found = sample(*args)
        found.logprobs = found.logprobs - 0.01 * found.mask
        return found

    monkeypatch.setattr(ro, "sample", shifted)
    state, args = state_of(warm_start, tmp_path, "--num-mini-batches", "1", "--num-ppo-epochs", "1", "--critic-warmup-steps", "0")
    experience, _ = train.collect(state, args)
    assert state.trust_recorded is False
    assert train.update(state, args, experience)["val/ratio"].item() == pytest.approx(1, abs=1e-5)


NOT_FINITE = {  # what is broken behind the rollout, so that only the update can see it: (the parameter, what the line names)
    "policy": (lambda state: state.policy.lm_head.weight, "log-probs"),
    "critic": (lambda state: state.critic.heads.weight, "quantiles"),
}


@pytest.mark.parametrize("broken", NOT_FINITE)
def test_losses_and_gradients_that_are_not_finite_stop_the_run_before_a_step(broken, warm_start, tmp_path):
    state, args = state_of(warm_start, tmp_path, "--critic-warmup-steps", "0")
    experience, _ = train.collect(state, args)
    parameter, term = NOT_FINITE[broken]
    with torch.no_grad():
        parameter(state)[3, 0] = math.nan
    before = [p.clone() for model in (state.policy, state.critic) for p in model.parameters()]
    with pytest.raises(ro.InputError, match=f"iteration 1, minibatch 1 of 4: expected finite losses and gradients, found {term} that are not, in rows [0-9]"):
        train.update(state, args, experience)
    assert all(torch.equal(a, b) for a, b in zip(before, [p for m in (state.policy, state.critic) for p in m.parameters()]) if a.isfinite().all())
    assert not state.optimizer.state and not state.critic_optimizer.state  # Adam has seen nothing


@pytest.mark.parametrize("term", ["scores", "log-probs", "quantiles"])
def test_a_rollout_that_is_not_finite_stops_the_run_and_names_its_row(term, warm_start, tmp_path, monkeypatch):
    def broken(function):
        def wrapped(*rest, **named):
            value = function(*rest, **named)
            value[7] = math.nan
            return value

        return wrapped

    name = {"scores": (ro, "noisy_scores"), "log-probs": (ro, "in_micro_batches"), "quantiles": (ro, "in_micro_batches")}[term]
    flags = ["--algo", "reinforce++" if term == "log-probs" else "dvpo", "--critic-warmup-steps", "0", "--kl-coef", "0"]
    state, args = state_of(warm_start, tmp_path, *flags)
    state.trust_recorded = term != "log-probs"
    monkeypatch.setattr(*name, broken(getattr(*name)))
    with pytest.raises(ro.InputError, match=f"iteration 1: expected finite {term}, found others in row 7 of the batch"):
        train.collect(state, args)


def test_a_checkpoint_from_another_device_or_precision_asks_anew_whether_to_trust_sampling(finished, tmp_path):
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    for flags, trusted in (([], True), (["--dtype", "bfloat16"], False)):
        args = train.parse_args(["--resume", str(tmp_path)])
        args.dtype = flags[1] if flags else args.dtype
        state = train.build(args)
        train.restore(state, args)
        assert state.trust_recorded is trusted


@pytest.mark.parametrize("algo", train.FLAGS["algorithm"][0][2])
@pytest.mark.parametrize("flags", ["--num-quantiles 1", "--num-heads 1", "--response-length 1", "--response-length 2 --missing-eos-penalty 1 --whiten-rewards"])
def test_the_smallest_of_everything(flags, algo, model_folder, tmp_path, monkeypatch):
    """M = 1, N = 1, T = 1, all rows truncated, all rewards equal: finite numbers in, finite weights out, whatever the method."""
    monkeypatch.chdir(tmp_path)
    Path("same.py").write_text("def one(prompts, **columns): return [1.0] * len(prompts)\n")
    write_rows(tmp_path / "data.jsonl", rows_of())
    argv = [*MODEL, "--model-name-or-path", model_folder, "--dataset-name", "data.jsonl", "--reward", "same:one", "--output-dir", "run", "--algo", algo]
    assert train.main([*argv, *flags.split()]) == 0
    (row,) = log(tmp_path / "run")
    assert all(value is None or math.isfinite(value) for value in row.values()) and row["objective/true_scores"] == 1
    assert [name for name, value in row.items() if value is None and not name.startswith("val/explained")] == []
    policy = AutoModelForCausalLM.from_pretrained(train.find_checkpoint(tmp_path / "run") / "policy")
    assert all(p.isfinite().all() for p in policy.parameters())


def test_half_precision_samples_from_a_bf16_copy_that_follows_the_policy_and_scores_its_tokens_anew(warm_start, tmp_path):
    once = ["--num-mini-batches", "1", "--num-ppo-epochs", "1", "--critic-warmup-steps", "0", "--learning-rate", "0.01"]
    state, args = state_of(warm_start, tmp_path, "--dtype", "bfloat16", *once)
    assert {p.dtype for p in state.sampler.parameters()} == {torch.bfloat16} and {p.dtype for p in state.policy.parameters()} == {torch.float32}
    assert {b.dtype for b in state.sampler.buffers()} == {torch.float32}  # rotary frequencies
    old = state.sampler.lm_head.weight.clone()
    for _ in range(2):
        experience, _ = train.collect(state, args)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(state.sampler.parameters(), state.policy.parameters()))
        metrics = train.update(state, args, experience)
        assert metrics["val/ratio"].item() == pytest.approx(1, abs=1e-5) and experience["rollout"].logprobs is None
    assert not torch.equal(old, state.sampler.lm_head.weight)


class Waits(TorchDispatchMode):
    """Notes every operation for which a program would wait for a GPU, transformers' own aside."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        by_mask = name in ("index", "index_put_") and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack() if "importlib" not in frame.filename]
            if not any("transformers" in frame.filename for frame in traceback.extract_stack()):
                self.found.append(f"{function} {frames[-6:]}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("algo", ["dvpo", "ppo"])
def test_the_update_waits_for_the_gpu_once_a_minibatch(algo, warm_start, tmp_path, monkeypatch):
    state, args = state_of(warm_start, tmp_path, "--critic-warmup-steps", "0", "--algo", algo, "--micro-batch-size", "8")
    experience, _ = train.collect(state, args)
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *rest: pytest.fail("a tensor is fetched from the GPU"))
    with Waits() as waits:
        train.update(state, args, experience)
    monkeypatch.undo()
    assert len(waits.found) <= args.num_ppo_epochs * args.num_mini_batches, waits.found
    with Waits() as waits:
        torch.randn(4)[torch.ones(4) > 0].sum().item()
    assert len(waits.found) == 2  # the measuring mode does see them


def test_updates_train_on_the_sampled_ids(warm_start, tmp_path, monkeypatch):
    """Never decoded and encoded again: every row that an update scores is a sampled row, ids and mask."""
    state, args = state_of(warm_start, tmp_path, "--critic-warmup-steps", "0", "--num-ppo-epochs", "1")
    experience, _ = train.collect(state, args)
    sampled = {tuple(row[kept].tolist()) for row, kept in zip(experience["rollout"].response_ids, experience["rollout"].mask)}
    seen, response_logprobs = [], ro.response_logprobs
    monkeypatch.setattr(ro, "response_logprobs", lambda model, part, temperature: seen.append(part) or response_logprobs(model, part, temperature))
    train.update(state, args, experience)
    trained = [tuple(row[kept].tolist()) for part in seen for row, kept in zip(part.response_ids, part.mask)]
    assert len(trained) == 64 and set(trained) == sampled


def test_noise_penalty_kl_and_whitening_reach_the_experience(warm_start, tmp_path):
    """With gamma = lam = 1 a row's first target is its noisy score less kl_coef times its KL; advantages have mean 0, variance 1."""
    state, args = state_of(warm_start, tmp_path, "--lam", "1", "--kl-coef", "0.5", "--reward-noise-outlier", "1", "2", "--missing-eos-penalty", "3")
    state.reward = lambda prompts, completions, **columns: [1.0] * len(prompts)
    for parameter in state.policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))  # away from the reference
    noise = torch.Generator().manual_seed(args.reward_noise_seed)
    experience, metrics = train.collect(state, args)
    rollout, mask = experience["rollout"], experience["rollout"].mask
    with torch.no_grad():
        log_ratio = experience["logprobs"] - ro.response_logprobs(state.reference, rollout, 1.0)
    kl = torch.where(mask, log_ratio, 0).sum(1)
    expected = ro.noisy_scores(torch.ones(64), 0.0, 0.0, (1.0, 2.0), noise) - 3 * rollout.truncated - 0.5 * kl
    assert kl.abs().max() > 0.01 and expected.std() > 0.3
    torch.testing.assert_close(experience["targets"][:, 0].mean(-1), expected, rtol=1e-3, atol=1e-3)
    advantages = experience["advantages"][mask]
    assert abs(advantages.mean()) < 1e-5 and advantages.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("algo", ["dvpo", "ppo", "robust"])
def test_the_critic_starts_at_the_first_batchs_returns_and_only_there(warm_start, tmp_path, algo):
    """Without KL and discount a token's return is its row's score, here the row's number; long rows count more."""
    state, args = state_of(warm_start, tmp_path, "--kl-coef", "0", "--algo", algo)
    state.reward = lambda prompts, completions, **columns: [float(row) for row in range(len(prompts))]
    experience, _ = train.collect(state, args)
    returns = torch.arange(64.0).repeat_interleave(experience["rollout"].mask.sum(1))
    expected = returns.quantile(state.critic.levels) if algo == "dvpo" else returns.mean().view(1)
    heads = state.critic.heads.bias.view(-1, len(expected))
    torch.testing.assert_close(heads, expected.expand_as(heads))
    assert experience["targets"][0, 0].mean() > 1  # row 0 has the score 0: the values were read after the move
    state.iteration = 1
    state.reward = lambda prompts, completions, **columns: [-1.0] * len(prompts)
    train.collect(state, args)
    torch.testing.assert_close(heads, expected.expand_as(heads))


def test_risk_weights_reach_the_critic_and_each_model_has_its_own_learning_rate(warm_start, tmp_path):
    heads = {}
    for weight in ("0", "0.1"):
        state, args = state_of(warm_start, tmp_path, "--shape-weight", weight, "--learning-rate", "1e-4", "--critic-learning-rate", "3e-3")
        torch.manual_seed(0)
        experience, _ = train.collect(state, args)
        state.critic.heads.bias.data[::16] = -5.0  # one far quantile a head: a long lower tail
        train.update(state, args, experience)
        heads[weight] = state.critic.heads.bias.detach().clone()
        assert state.optimizer.param_groups[0]["lr"] == 1e-4 and state.critic_optimizer.param_groups[0]["lr"] == 3e-3
    assert not torch.equal(heads["0"], heads["0.1"])


def test_a_users_own_label_column_is_just_a_column(model_folder, tmp_path):
    seen = []
    args = train.parse_args([*MODEL, "--model-name-or-path", model_folder, "--dataset-name", write_rows(tmp_path / "d.jsonl", rows_of(label="mine")),
                             "--reward", "exact", "--output-dir", str(tmp_path / "run"), "--pseudo-label-noise", "0.5"])  # fmt: skip
    state = train.build(args)
    state.reward = lambda prompts, completions, answer, label, **columns: seen.append((answer, label)) or [0.0] * len(prompts)
    train.collect(state, args)
    true, noisy = seen
    assert true[1] == noisy[1] == ["mine"] * 8 and true[0] != noisy[0]


def test_evaluation_sees_no_noise_and_does_not_disturb_training(warm_start, tmp_path):
    state, args = state_of(warm_start, tmp_path, "--reward-noise-fp", "1", "--reward-noise-fn", "1", "--reward-noise-outlier", "1", "5")
    rng, noise = torch.get_rng_state(), state.noise.get_state()
    results = train.evaluate(state, args)
    assert all(0 <= value <= 1 for value in results.values()) and results["in domain, greedy"] > 0.3
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(state.noise.get_state(), noise)
    _, metrics = train.collect(state, args)
    assert metrics["objective/scores"] < 0 < metrics["objective/true_scores"]


def test_pseudo_labels_reach_training_but_not_true_scores_or_evaluation(warm_start, tmp_path):
    state, args = state_of(warm_start, tmp_path, "--pseudo-label-noise", "1")
    assert all(label != answer for label, answer in zip(state.data[ro.PSEUDO_LABEL], state.data["answer"]))
    assert all(ro.PSEUDO_LABEL not in data.column_names for data in state.evals.values())
    _, metrics = train.collect(state, args)
    assert metrics["objective/scores"] < 0.05 < metrics["objective/true_scores"]


def test_truncation_penalty_and_bootstrap(warm_start, tmp_path):
    """Two tokens are too few for nearly every booking: each such row loses 3."""
    state, args = state_of(warm_start, tmp_path, "--response-length", "2", "--missing-eos-penalty", "3")
    _, metrics = train.collect(state, args)
    clipped = metrics["completions/clipped_ratio"].item()
    assert clipped > 0.9 and metrics["objective/scores"].item() == pytest.approx(metrics["objective/true_scores"].item() - 3 * clipped)
    state.reward = lambda prompts, completions, **columns: [0.0] * len(prompts)
    state.iteration = 1  # the critic starts at the first batch's returns only in the first
    state.critic.heads.bias.data.fill_(2.0)  # V = 2 everywhere: without a reward, targets are 2 if truncation counts on it, else fall to 0
    for flag, last_target in (((), 0.0), (("--bootstrap-truncated",), 2.0)):
        args = train.parse_args([*SMALL, "--output-dir", str(tmp_path), "--response-length", "2", "--kl-coef", "0", *flag])
        experience, _ = train.collect(state, args)
        targets = experience["targets"][experience["rollout"].truncated, -1]
        assert targets.mean().item() == pytest.approx(last_target, abs=0.01)
    by_position = lambda ids, attention, positions, columns: positions.gather(1, columns)[..., None, None].float()  # V = the position it is read at
    state.critic = by_position
    experience, _ = train.collect(state, args)
    rollout = experience["rollout"]
    last = rollout.position_ids[rollout.truncated, -1]  # the last token's own position: where the state after it is seen
    assert torch.equal(experience["targets"][rollout.truncated, -1, 0], last.float())


def test_held_out_prompts_stay_out_of_training(warm_start, tmp_path):
    state, _ = state_of(warm_start, tmp_path)
    held_out = set(map(str, state.evals["in domain"]["prompt"]))
    assert len(held_out) == 384 and not held_out & set(map(str, state.data["prompt"])) and len(state.data) > 3500


def test_batches_are_seeded_permutations_of_the_data():
    first = train.batch_rows(10, 0, 10, seed=0)
    assert sorted(first) == list(range(10)) and first != list(range(10))
    assert train.batch_rows(10, 5, 10, seed=0)[:5] == first[5:] and train.batch_rows(10, 0, 25, 0)[:10] == first
    assert train.batch_rows(10, 0, 10, seed=1) != first != train.batch_rows(10, 10, 10, 0)


# ---- a model and data of one's own


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count=12, **extra):
    return [{**row, **extra} for row in ro.task_rows("dialogue", "train", count, 0)]


def test_a_folder_a_file_and_a_python_reward(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_reward.py").write_text("def f(prompts, completions, level, **columns):\n    return [level[0] + len(c[-1]['content']) for c in completions]\n")
    data = write_rows(tmp_path / "data.jsonl", rows_of(level=3))
    flags = ["--model-name-or-path", model_folder, "--dataset-name", data, "--reward", "own_reward:f", "--gradient-checkpointing", "--eval-steps", "1"]
    assert train.main([*MODEL, *flags, "--output-dir", "run"]) == 0
    row = log(tmp_path / "run")[0]
    assert row["objective/scores"] >= 3 and "eval/held_out/greedy" in row


def test_a_whole_conversation_is_one_response(tmp_path):
    """The built-in booking task: ratio 1 at first, the user's tokens neither scored nor trained on, and the reward rises."""
    make_warm_start("booking", 0, tmp_path / "warm_start")
    flags = [*SMALL, "--task", "booking", "--output-dir", str(tmp_path), "--learning-rate", "3e-4"]
    args = train.parse_args(flags)
    state = train.build(args)
    experience, metrics = train.collect(state, args)
    rollout = experience["rollout"]
    gaps = ~rollout.mask & rollout.attention_mask[:, -rollout.mask.shape[1] :].bool()
    assert gaps.any() and (experience["advantages"][gaps] == 0).all()
    heard = {word for row in state.tokenizer.batch_decode([ids[gap].tolist() for ids, gap in zip(rollout.response_ids, gaps)]) for word in row.split()}
    assert heard >= {"<user>", "<assistant>", "ok"} and not heard & {"book", "<pad>"}
    last = torch.stack([torch.as_tensor(row.nonzero().max()) for row in rollout.mask])
    ends = [row[-1]["role"] for row in rollout.messages]
    assert set(ends) == {"assistant"} and rollout.lengths[:, 1].equal(last + 1)  # the score stands on the last token of all
    experience["targets"] = torch.where(gaps.unsqueeze(-1), torch.nan, experience["targets"])  # nobody reads them
    policy_before = torch.cat([p.flatten() for p in state.policy.parameters()]).clone()
    state.iteration = args.critic_warmup_steps
    updated = train.update(state, argparse.Namespace(**{**vars(args), "num_ppo_epochs": 1, "num_mini_batches": 1}), experience)
    assert updated["val/ratio"] == pytest.approx(1, abs=1e-5) and updated["loss/value_avg"].isfinite()
    assert not torch.cat([p.flatten() for p in state.policy.parameters()]).equal(policy_before)
    assert train.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["in domain, sampled"] > results["before"]["in domain, sampled"] + 0.05
    assert "replies" in state.data.column_names and "completion" not in state.data.column_names


def test_a_short_truncated_conversation_counts_on_its_own_last_state_whatever_the_micro_batch(tmp_path):
    """The first row is cut in its first turn, and so shorter than the longest of the batch."""
    args = train.parse_args(["--model-name-or-path", "x", "--bootstrap-truncated", "--gamma", "1", "--lam", "1", "--algo", "ppo"])
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    lengths = torch.tensor([[1, 2], [1, 4]])
    found = ro.Rollout(torch.zeros(2, 5).long(), torch.ones(2, 5).long(), torch.zeros(2, 5).long(), mask, torch.tensor([True, True]), lengths)
    values = torch.tensor([[1.0, 2.0, 30.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 50.0]])[:, :, None, None]  # the zeros: another micro-batch's width
    zeros = torch.zeros(2, 4)
    _, targets = train.estimate(args, torch.zeros(2), zeros, zeros, zeros, values, found)
    assert targets[..., 0][mask].tolist() == [30.0, 30.0, 50.0, 50.0, 50.0]


def test_a_users_own_user_and_reward_for_conversations(model_folder, tmp_path, monkeypatch):
    module = tmp_path / "talk.py"
    module.write_text("def user(messages, name):\n    return name if len(messages) < 4 else None\n"
                      "def reward(prompts, completions, name):\n    return [float(len(c)) for c in completions]\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "data.jsonl", [{"prompt": f"book {slot}", "name": f"{slot} two"} for slot in ro.SLOTS])
    flags = ["--model-name-or-path", model_folder, "--dataset-name", str(rows), "--reward", "talk:reward", "--user", "talk:user"]
    assert train.main([*MODEL, *flags, "--output-dir", "run", "--missing-eos-penalty", "1"]) == 0
    assert all(1 <= row["objective/true_scores"] <= 5 for row in log(tmp_path / "run"))


def test_parquet_and_an_evaluation_set(model_folder, tmp_path):
    from datasets import Dataset

    Dataset.from_list(rows_of()).to_parquet(tmp_path / "data.parquet")
    evaluation = write_rows(tmp_path / "eval.json", rows_of(3))
    flags = ["--model-name-or-path", model_folder, "--dataset-name", str(tmp_path / "data.parquet"), "--eval-dataset-name", evaluation]
    assert train.main([*MODEL, *flags, "--reward", "exact", "--critic-model-name-or-path", model_folder, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["before"].keys() == {"held out, greedy", "held out, sampled"}


def test_a_data_set_as_the_hub_has_them_with_a_config_and_a_column_of_another_name(model_folder, tmp_path, capsys):
    hub = tmp_path / "gsm"
    for config in ("main", "socratic"):
        (hub / config).mkdir(parents=True)
        for split, first in (("train", 0), ("test", 8)):
            rows = [{"question": f"area {' '.join(['north'] * i)} {config}", "answer": f"so\n#### {i}", "prompt": 7} for i in range(first, first + 4)]
            write_rows(hub / config / f"{split}.jsonl", rows)
    files = lambda config: [{"split": split, "path": f"{config}/{split}.jsonl"} for split in ("train", "test")]
    configs = [{"config_name": config, "data_files": files(config)} for config in ("main", "socratic")]
    (hub / "README.md").write_text("---\nconfigs: " + json.dumps(configs) + "\n---\n")
    flags = [*MODEL, "--model-name-or-path", model_folder, "--dataset-name", str(hub), "--reward", "math", "--output-dir", str(tmp_path / "run")]
    own = ["--dataset-config", "main", "--prompt-column", "question", "--eval-dataset-name", str(hub)]
    args = train.parse_args([*flags, *own, "--eval-dataset-split", "test"])
    data, evals = train.load_data(args, AutoTokenizer.from_pretrained(model_folder), 64)
    assert sorted(data["prompt"]) == sorted(f"area {' '.join(['north'] * i)} main" for i in range(4)) and len(evals["held out"]) == 2
    assert train.main([*flags, *own]) == 0
    refused(capsys, [*flags, "--prompt-column", "question"], "--dataset-name", "main")
    refused(capsys, [*flags, "--dataset-config", "main", "--prompt-column", "query"], "--dataset-name", "'query'", "--prompt-column")


def test_dropout_is_off_even_in_train_mode_and_weights_are_fp32(model_folder, tmp_path):
    """The folder's GPT-2 has dropout 0.1 in its config; a bf16 copy of it is trained in fp32 all the same."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.config.resid_pdrop == 0.1
    model.bfloat16().save_pretrained(tmp_path)
    policy = train.load(AutoModelForCausalLM, str(tmp_path), "--model-name-or-path").train()
    ids = torch.arange(6)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_weights_that_are_not_fp32_are_refused(warm_start, tmp_path, monkeypatch):
    """Adam steps of 1e-6 vanish in bf16 weights."""
    load = train.load
    monkeypatch.setattr(train, "load", lambda kind, *rest: load(kind, *rest).bfloat16() if kind is AutoModelForCausalLM else load(kind, *rest))
    with pytest.raises(AssertionError, match="bf16"):
        state_of(warm_start, tmp_path)


def test_a_missing_logging_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    refused(capsys, ["--report-to", "tensorboard", "--output-dir", str(tmp_path / "run")], "--report-to", "tensorboard", "no such package")
    assert not (tmp_path / "run").exists()


# ---- bad input: exit status 2, one line that names the culprit, nothing written

BAD_FLAGS = [
    ("--alpha 0", "--alpha"), ("--alpha 1.5", "--alpha"), ("--beta -1", "--beta"), ("--alpha nan", "--alpha"), ("--num-mini-batches 3", "--num-mini-batches"),
    ("--num-mini-batches 0", "--num-mini-batches"), ("--batch-size 0", "--batch-size"), ("--batch-size x", "--batch-size"), ("--kappa -1", "--kappa"),
    ("--learning-rate 0", "--learning-rate"), ("--learning-rate inf", "--learning-rate"), ("--lam 1.1", "--lam"), ("--gamma -0.1", "--gamma"),
    ("--temperature 0", "--temperature"), ("--reward-noise-fp 2", "--reward-noise-fp"), ("--reward-noise-outlier 0.5", "--reward-noise-outlier"),
    ("--reward-noise-outlier 2 1", "--reward-noise-outlier"), ("--algo sac", "--algo"), ("--no-such-flag", "--no-such-flag"), ("--seed -1", "--seed"),
    ("--dataset-name data.jsonl", "--model-name-or-path"), ("--model-name-or-path x --dataset-name data.jsonl", "--reward"),
    ("--resume", "--resume"), ("--resume nowhere", "--resume"), ("--model-name-or-path ./no/such/folder", "--model-name-or-path"),
    ("--reward nonsense", "--reward"), ("--shape-weight -1", "--shape-weight"), ("--num-quantiles 0", "--num-quantiles"), ("--task chess", "--task"),
    ("--cliprange 0", "--cliprange"), ("--device cuda:0", "--device"), ("--eval-samples 0", "--eval-samples"),
    ("--critic-model-name-or-path ./nowhere", "--critic"), ("--device gpu", "--device"), ("--device meta", "--device"), ("--seed 40000000000000", "--seed"),
    ("--temperature 1e-42", "--temperature"), ("--response-length 300", "--response-length"), ("--reward-noise-outlier 1 1e30", "--reward-noise-outlier"),
    ("--group-size 5", "--group-size"), ("--group-size -1", "--group-size"), ("--algo grpo --group-size 1", "--group-size"),
    ("--algo dr_grpo --group-size 200", "--group-size"),
    ("--max-turns 0", "--max-turns"), ("--user nonsense", "--user"), ("--user json:nosuch", "--user"), ("--user os:sep", "--user"),
    ("--dataset-config main", "--dataset-name"), ("--prompt-column question", "--dataset-name"),
    ("--user json:dumps --chat-template never", "--chat-template"), ("--task sums --user json:dumps", "--user"),
    ("--micro-batch-tokens 0", "--micro-batch-tokens"), ("--reward-offset -1", "--reward-offset"),
    ("--learning-rte 1", "--learning-rte"), ("--lr 1e-4", "--lr"), ("--kl 0", "--kl"),
    ("--zzzz", "unrecognized arguments: --zzzz"), ("stray", "stray"), ("--learning-rate", "--learning-rate: expected one argument"),
    ("--bootstrap-truncated --algo grpo", "--bootstrap-truncated"), ("--eval-dataset-name data.jsonl", "--dataset-name"),
    ("--reward model:x --reward-noise-fp 0.1", "--reward-noise-fp"),
    ("--report-to mlflow", "--report-to"), ("--dtype float16", "--dtype"), ("--tau-grid left", "--tau-grid"),
    ("--stop-token nosuchword", "--stop-token"), ("--algo grpo --batch-size 12", "--group-size"), ("--reward-noise-outlier x 1", "--reward-noise-outlier"),
    ("--reward math:", "--reward"), ("--reward os:sep", "--reward"), ("--user :f", "--user"), ("--model-name-or-path a/b/c", "no such folder"),
    ("--critic-model-name-or-path a/b/c", "--critic-model-name-or-path"), ("--model-name-or-path nosuchmodel", "--model-name-or-path"),
]  # fmt: skip


def beyond(name, interval):
    """Values of a numeric flag that it must refuse: on either side of its interval, no number, and for whole numbers a fraction."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    yield from ("x", "nan", "", f"{low - 1:g}")
    if interval[0] == "(":
        yield f"{low:g}"
    yield "inf" if math.isinf(high) else f"{high:g}" if interval[-1] == ")" else f"{high * 2 + 1:g}"


NUMERIC = {name: (default[0] if isinstance(default, tuple) else default, allowed) for flags in train.FLAGS.values() for name, default, allowed, _ in flags
           if isinstance(allowed, str) and not isinstance(default, list)}  # fmt: skip


@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_outside_their_range(name, capsys):
    default, interval = NUMERIC[name]
    assert isinstance(default, (int, float)) and default not in beyond(name, interval)
    values = [*beyond(name, interval)] + ["1.5"] * (type(default) is int)
    for value in values:
        refused(capsys, [f"--{name}={value}"], f"--{name}", f"in {interval}", repr(value))
    assert len(values) >= 5


def refused(capsys, argv, *words):
    """train.main exits with 2 after one line on stderr that holds the words."""
    try:
        status = train.main(argv)
    except SystemExit as error:
        status = error.code
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("train.py: error: ")]  # \r: progress bars
    assert status == 2 and len(lines) == 1, (status, lines)
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize("flags,culprit", BAD_FLAGS)
def test_bad_flags(flags, culprit, tmp_path, capsys, warm_start, monkeypatch):
    if culprit == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(warm_start, tmp_path / "run" / "warm_start")
    refused(capsys, [*flags.split(), "--output-dir", "run"], culprit)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["warm_start"]


LONG = [{"role": "user", "content": "area north " * 40}]  # 80 words and two of the template
ONE = [{"prompt": "area", "answer": "x"}]
BAD_DATA = [
    ([], "", ["--dataset-name"]),
    ([{"question": "x"}], "", ["--dataset-name", "'prompt'", "question"]),
    ([{"prompt": LONG, "answer": "x"}], "", ["--dataset-name", "82 tokens", "at most 60"]),
    ([{"prompt": "", "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": None, "answer": "x"}], "", ["row 0", "prompt", "None"]),
    (ONE + [{"prompt": None, "answer": "x"}], "", ["row 1", "prompt", "None"]),
    ([{"prompt": 3, "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [3], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": ["area"], "answer": "x"}], "", ["row 0", "prompt", "{role, content}"]),
    ([{"prompt": {"role": "user"}, "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [{"role": "user"}], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [{"role": "user", "content": 3}], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": "area", "text": "x"}], "", ["--reward", "'answer'", "text"]),
    ("{broken", "", ["--dataset-name", "line 1"]),
    ('{"prompt": "area"}\n\n{"prompt": "area",}\n', "", ["--dataset-name", "line 3"]),
    ('{"prompt": "area"}\n[1, 2]\n', "", ["--dataset-name", "line 2", "object"]),
    ('{"prompt": "area"}\n{"prompt": 3}\n', "", ["--dataset-name"]),
    (b'{"prompt": "area"}\n{"prompt": "\xff\xfe"}\n', "", ["--dataset-name", "line 2", "utf-8"]),
    (b"\x00\x01\x02", "", ["--dataset-name", "line 1"]),
    (b"", "", ["--dataset-name"]),
    (None, "", ["--dataset-name", "no such file"]),
    (ONE, "--dataset-name data.csv", ["--dataset-name", "json, jsonl or parquet", "data.csv"]),
    (ONE, "--dataset-name broken.parquet", ["--dataset-name", "broken.parquet"]),
    (ONE, "--dataset-name no/such/set", ["--dataset-name", "no/such/set"]),
    (ONE, "--dataset-name nosuchset", ["--dataset-name", "nosuchset"]),
    (ONE, "--eval-dataset-name nosuch.jsonl", ["--eval-dataset-name", "no such file"]),
    (ONE, "--prompt-column question", ["--dataset-name", "'question'", "--prompt-column"]),
    (ONE, "--eval-dataset-name data.csv", ["--eval-dataset-name", "json, jsonl or parquet"]),
    ([{"prompt": "area"}], "--pseudo-label-noise 0.1", ["--pseudo-label-noise", "'answer'"]),
    (ONE * 3, "--pseudo-label-noise 0.1 --eval-dataset-name other.jsonl", ["--pseudo-label-noise", "different"]),
    (ONE, "--dataset-split nosuch", ["--dataset-name", "nosuch"]),
    (ONE, "--dataset-config nosuch", ["--dataset-name", "a file has no config", "nosuch"]),
    (ONE * 4, "", ["--dataset-name", "held-out"]),
    (ONE, "--reward bad:raises", ["--reward", "KeyError", "bad.py, line 3"]),
    (ONE, "--reward bad:short", ["--reward", "8 numbers", "1 values"]),
    (ONE, "--reward bad:nan", ["--reward", "row 7", "nan"]),
    (ONE, "--reward bad:text", ["--reward", "row 0", "'1'"]),
    (ONE, "--reward bad:none", ["--reward", "row 0", "None"]),
    (ONE, "--reward bad:nothing", ["--reward", "8 numbers", "NoneType"]),
    (ONE, "--reward bad:nested", ["--reward", "row 0", "[1, 2]"]),
    (ONE, "--reward bad:huge", ["--reward", "row 0", "1e+39"]),
    (ONE, "--reward bad:leaves", ["--reward", "SystemExit"]),
    (ONE, "--reward bad:late", ["--reward", "TimeoutError", "the service is slow"]),
    (ONE, "--user bad:leaves", ["--user", "SystemExit"]),
    (ONE, "--reward bad:nosuch", ["--reward", "nosuch"]),
    (ONE, "--user bad:nosuch", ["--user", "nosuch"]),
    (ONE, "--eval-dataset-name other.jsonl --eval-dataset-split nosuch", ["--eval-dataset-name", "nosuch"]),
    ("[1, 2]\n", "", ["--dataset-name", "line 1", "object"]),
    (ONE, "--reward bad:needs", ["--reward", "'level'", "answer"]),
    (ONE, "--reward bad:half --reward-noise-fp 0.1", ["--reward-noise-fp", "0.5"]),
    (ONE, "--user bad:raises", ["--user", "KeyError"]),
    (ONE, "--user bad:three", ["--user", "expected a str", "3"]),
    (ONE, "--reward nosuchmodule:f", ["--reward", "nosuchmodule"]),
    (ONE, "--reward broken:f", ["--reward", "broken"]),
    (ONE, "--reward model:nosuchmodel", ["--reward", "nosuchmodel"]),
]
BAD_CODE = """
def short(prompts, **columns): return [0.0]
def raises(*prompts, **columns): return {}['x']
def half(prompts, **columns): return [0.5] * len(prompts)
def nan(prompts, **columns): return [0.0] * 7 + [float('nan')]
def text(prompts, **columns): return ['1'] * len(prompts)
def none(prompts, **columns): return [None] * len(prompts)
def nothing(prompts, **columns): pass
def nested(prompts, **columns): return [[1, 2]] * len(prompts)
def huge(prompts, **columns): return [1e39] * len(prompts)
def leaves(prompts, **columns): raise SystemExit(0)
def late(prompts, **columns): raise TimeoutError("the service is slow")
def needs(prompts, completions, level): return [level] * len(prompts)
def three(messages, **columns): return 3
"""


@pytest.mark.parametrize("rows,flags,words", BAD_DATA)
def test_bad_data_and_rewards(rows, flags, words, model_folder, tmp_path, capsys, monkeypatch):
    """And what stood in the output folder before is still there, moved or not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    (tmp_path / "bad.py").write_text(BAD_CODE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    for name in ("data.csv", "broken.parquet"):
        (tmp_path / name).write_text("prompt,answer\narea,x\n")
    write_rows(tmp_path / "other.jsonl", [{"prompt": "food", "answer": "x"}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
    if isinstance(rows, (str, bytes)):
        (tmp_path / "data.jsonl").write_bytes(rows.encode() if isinstance(rows, str) else rows)
    elif rows is not None:
        write_rows(tmp_path / "data.jsonl", rows)
    argv = [*MODEL, "--model-name-or-path", model_folder, "--dataset-name", "data.jsonl", "--output-dir", "run", "--reward", "exact", *flags.split()]
    refused(capsys, argv, *words)
    kept = [path.read_text() for path in (tmp_path / "run").rglob("metrics.jsonl")]
    assert "precious\n" in kept


def test_the_table_of_bad_inputs_is_long_enough():
    numbers = sum(len([*beyond(name, interval)]) for name, (_, interval) in NUMERIC.items())
    assert len(BAD_FLAGS) + len(BAD_DATA) >= 130 and numbers >= 150


def test_overlong_prompts_are_left_out_with_a_count(model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [*rows_of(4), {"prompt": LONG, "answer": "x"}, *rows_of(6)[4:]])
    argv = ["--model-name-or-path", model_folder, "--dataset-name", data, "--reward", "exact", "--output-dir", str(tmp_path)]
    assert train.main([*MODEL, *argv]) == 0
    assert re.search("--dataset-name: 1 of 7 prompts .* 60", capsys.readouterr().out)


def test_equal_rows_ids_and_unknown_words_are_just_data(model_folder, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"id": 7, **row} for row in rows_of(6) * 2] + [{"id": 7, "prompt": "what is this", "answer": "x"}])
    argv = ["--model-name-or-path", model_folder, "--dataset-name", data, "--reward", "exact", "--output-dir", str(tmp_path)]
    assert train.main([*MODEL, *argv]) == 0


def saved_model(folder, **changes):
    """A tiny model and tokenizer in a folder, with the tokenizer's attributes changed."""
    tokenizer = ro.task_tokenizer("dialogue")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).save_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizers_without_pad_or_template_and_with_added_tokens(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"area {area}", "answer": "x"} for area in ro.SLOTS["area"]])
    bare = saved_model(tmp_path / "bare", pad_token=None, chat_template=None)
    argv = [*MODEL, "--dataset-name", data, "--reward", "exact", "--output-dir", str(tmp_path / "run")]
    assert train.main([*argv, "--model-name-or-path", str(bare)]) == 0
    chat = write_rows(tmp_path / "chat.jsonl", rows_of())
    refused(capsys, [*argv, "--model-name-or-path", str(bare), "--dataset-name", chat], "row 0", "no chat template")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.add_tokens(["sushi"])
    tokenizer.save_pretrained(bare)
    assert train.main([*argv, "--model-name-or-path", str(bare)]) == 0  # as long as nobody says it
    write_rows(tmp_path / "data.jsonl", [{"prompt": f"area {area} food sushi", "answer": "x"} for area in ro.SLOTS["area"]])
    refused(capsys, [*argv, "--model-name-or-path", str(bare)], "--dataset-name: row", "token ids below 32", "found 32")


def test_code_of_a_model_and_pickles_never_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = saved_model(tmp_path / "own")
    (folder / "own.py").write_text(f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(tmp_path / "ran")!r}).touch()
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
""")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    argv = [*MODEL, "--model-name-or-path", str(folder), "--dataset-name", write_rows(tmp_path / "data.jsonl", rows_of()), "--reward", "exact"]
    refused(capsys, [*argv, "--output-dir", str(tmp_path / "run")], "--model-name-or-path", "code")
    assert not (tmp_path / "ran").exists()
    pickled = saved_model(tmp_path / "pickled")
    torch.save(AutoModelForCausalLM.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(capsys, [*argv, "--model-name-or-path", str(pickled)], "--model-name-or-path", "model.safetensors")


def test_a_reward_that_fails_leaves_the_earlier_run_where_it_is(model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{**row, "answer": None} for row in rows_of()])
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    argv = [*MODEL, "--model-name-or-path", model_folder, "--dataset-name", data, "--output-dir", str(tmp_path)]
    refused(capsys, [*argv, "--reward", "model:" + model_folder], "--reward", "sequence classifier")
    refused(capsys, [*argv, "--reward", "no_such_module:f"], "--reward", "no_such_module")
    write_rows(tmp_path / "data.jsonl", [{"prompt": row["prompt"], "text": "x"} for row in rows_of()])
    refused(capsys, [*argv, "--reward", "exact"], "--reward", "'answer'")
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n" and not (tmp_path / "earlier-1").exists()


def test_an_output_folder_that_cannot_be_made_is_one_line(warm_start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "set_aside", lambda folder: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(folder))))
    shutil.copytree(warm_start, tmp_path / "warm_start")
    refused(capsys, [*SMALL, "--eval-samples", "4", "--output-dir", str(tmp_path)], "Permission denied", str(tmp_path))


def test_resume_refuses_changed_flags_and_takes_more_episodes(finished, warm_start, tmp_path, capsys):
    refused(capsys, ["--resume", str(finished), "--seed", "5"], "--seed", "5 here", "0 in the run")
    refused(capsys, ["--resume", str(finished), "--output-dir", str(tmp_path)], "--output-dir", str(finished))
    refused(capsys, ["--resume", str(tmp_path)], "expected a whole checkpoint", "found none; without --resume the run begins anew")
    assert train.parse_args(["--resume", "--output-dir", f"{finished}/"]).resume.endswith("checkpoint-000024")
    args = train.parse_args(["--resume", str(finished), "--total-episodes", "1600"])
    assert args.total_episodes == 1600 and args.num_quantiles == 16 and args.resume.endswith("checkpoint-000024")
    some_of(finished, tmp_path, "checkpoint-000012", "args.json")  # a run of a version that did not know a flag yet
    known = json.loads((tmp_path / "args.json").read_text())
    del known["flags"]["micro_batch_tokens"]
    (tmp_path / "args.json").write_text(json.dumps(known))
    args = train.parse_args(["--resume", str(tmp_path)])
    assert args.micro_batch_tokens == 4096 and args.num_quantiles == 16


@pytest.mark.parametrize("torn", ["state.pt", "critic/critic_config.json", "policy/model.safetensors"])
def test_a_torn_checkpoint_is_left_aside_with_a_line_and_the_older_one_used(torn, finished, tmp_path, capsys):
    some_of(finished, tmp_path, "checkpoint-000012", "checkpoint-000024", "args.json", "metrics.jsonl")
    (tmp_path / "checkpoint-000024" / "policy" / ".cache").touch()  # of someone else
    assert train.find_checkpoint(tmp_path).name == "checkpoint-000024"
    path = tmp_path / "checkpoint-000024" / torn
    path.write_bytes(path.read_bytes()[:-20])
    assert train.find_checkpoint(tmp_path).name == "checkpoint-000012"
    assert "checkpoint-000024" in capsys.readouterr().err


def test_resume_from_torn_flags_or_short_metrics_is_one_line(finished, tmp_path, capsys):
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    log_file = tmp_path / "metrics.jsonl"
    log_file.write_text("".join(log_file.read_text().splitlines(keepends=True)[:9]))
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "expected 12 lines", "found 9")
    (tmp_path / "args.json").write_text("{")
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "args.json")


def test_resuming_a_finished_run_moves_nothing(finished, tmp_path):
    some_of(finished, tmp_path, "checkpoint-000024", "args.json", "metrics.jsonl", "results.json", "warm_start")
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert not (tmp_path / "earlier-1").exists() and log(tmp_path) == log(finished)


def loads(folder):
    """Whether every part of a checkpoint is there and can be read."""
    QuantileCritic.from_pretrained(folder / "critic"), AutoModelForCausalLM.from_pretrained(folder / "policy"), AutoTokenizer.from_pretrained(folder / "policy")
    return torch.load(folder / "state.pt", weights_only=True).keys() >= {"iteration", "optimizer", "random"}


def lines_until(limit, function):
    """Calls function in a process of its own, which dies before the limit-th line of train.py -> whether it got to the end."""
    process = os.fork()
    if process == 0:
        left = [limit]

        def trace(frame, event, value):
            if frame.f_code.co_filename != train.__file__:
                return None
            left[0] -= event == "line"
            if left[0] <= 0:
                os._exit(9)
            return trace

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.settrace(trace)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_kill_at_any_line_of_a_save_loses_no_checkpoint(warm_start, tmp_path):
    """A third checkpoint where two may be kept: wherever it dies, one or both of the newest are there and whole, and the next save clears up."""
    state, args = state_of(warm_start, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    for state.iteration in (1, 2):
        train.save_checkpoint(state, args)
    shutil.copytree(tmp_path, tmp_path.with_name("kept"))
    state.iteration, limit, done, seen = 3, 1, False, set()
    while not done:
        for path in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(path)
        for path in tmp_path.with_name("kept").glob("checkpoint-*"):
            shutil.copytree(path, tmp_path / path.name)
        done = lines_until(limit, lambda: train.save_checkpoint(state, args))
        found = train.checkpoints(tmp_path)
        seen.add((*found, bool([*tmp_path.glob("*.tmp")]), bool([*tmp_path.glob("*.old")])))
        assert all(loads(path) for path in found.values()) and {2} <= found.keys(), found
        limit += 1
    assert {(1, 2, False, False), (1, 2, True, False), (1, 2, 3, False, False), (2, 3, False, False)} <= seen, seen


def test_only_checkpoints_of_ours_count(tmp_path):
    for name in ("checkpoint-000002", "checkpoint-1000000", "checkpoint-999999", "checkpoint-best2", "checkpoint-000003-copy1", "checkpoint-7.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in train.checkpoints(tmp_path).values()] == ["checkpoint-000002", "checkpoint-999999", "checkpoint-1000000"]


def test_the_newest_checkpoints_are_kept_and_leftovers_cleared(warm_start, tmp_path):
    for left in ("checkpoint-000002.tmp", "checkpoint-000001.old"):
        (tmp_path / left).mkdir()
    assert run(tmp_path, warm_start, "--total-episodes", "320", "--save-steps", "1", "--eval-samples", "4") == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000004", "checkpoint-000005"]


def test_a_full_disk_loses_no_earlier_checkpoint(warm_start, tmp_path, capsys):
    """No file may grow beyond 30 kB from the second save on: the run ends with a line, the first checkpoint stands and is whole."""
    save, limits = train.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(state, args):
        if state.iteration > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        return save(state, args)

    train.save_checkpoint = save_on_a_full_disk
    shutil.copytree(warm_start, tmp_path / "warm_start")
    try:
        refused(capsys, [*SMALL, "--output-dir", str(tmp_path), "--save-steps", "1", "--eval-samples", "4"], "--output-dir", "checkpoint-000002", "arge")
    finally:
        train.save_checkpoint = save
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"] and loads(tmp_path / "checkpoint-000001")


def test_random_states_come_back(tmp_path):
    """Python's, numpy's and torch's generators, through a file that unpickles nothing."""
    torch.save(train.random_states(), path := tmp_path / "states.pt")
    draw = lambda: (random.random(), numpy.random.rand(), torch.rand(1).item())
    first, saved = draw(), torch.load(path, weights_only=True)
    random.setstate(saved["python"]), numpy.random.set_state(saved["numpy"]), torch.set_rng_state(saved["torch"])
    assert draw() == first


# ---- killed runs

FORK = multiprocessing.get_context("forkserver")  # a clean process with train imported, from which others start at once
FORK.set_forkserver_preload(["train", "conftest"])
KILLED = ["--total-episodes", "800", "--save-steps", "1", "--response-length", "6"]


def started(argv, out=os.devnull):
    process = FORK.Process(target=train_and_exit, args=(argv, str(out)))
    process.start()
    return process


@pytest.fixture(scope="module")
def to_kill(model_folder, tmp_path_factory):
    """(flags, finished folder): a run whose reward draws from python's and numpy's generators."""
    folder = tmp_path_factory.mktemp("kill")
    write_rows(folder / "data.jsonl", rows_of())
    argv = [*MODEL, *KILLED, "--model-name-or-path", model_folder, "--dataset-name", str(folder / "data.jsonl"), "--reward", "conftest:dice"]
    process = started([*argv, "--output-dir", str(folder / "whole")])
    process.join()
    assert process.exitcode == 0
    return argv, folder / "whole"


def same_run(a, b):
    assert log(a) == log(b) and torch.equal(weights(a), weights(b))
    assert json.loads((a / "results.json").read_text())["after"] == json.loads((b / "results.json").read_text())["after"]


def test_twenty_kills_change_nothing(to_kill, tmp_path):
    """SIGKILL while it starts, inside a save, and an iteration or three later, in turn: the finished run is the uninterrupted one, bit for bit."""
    argv, whole = to_kill
    rng, saves, folder = random.Random(0), 0, tmp_path / "run"

    def num_lines():
        return len((folder / "metrics.jsonl").read_bytes().splitlines()) if (folder / "metrics.jsonl").exists() else 0

    def asides():
        return {path.stat().st_ino for path in folder.glob("checkpoint-*.tmp")}

    for number in range(21):
        found, before = train.checkpoints(folder), asides()
        process = started([*argv, *(["--resume"] if found else []), "--output-dir", str(folder)])
        kind, start, lines = number % 3, time.time() + rng.uniform(0, 0.6), max(found, default=0) + rng.randint(0, 2)
        while number < 20 and not (kind == 0 and asides() - before or kind == 1 and time.time() > start or kind == 2 and num_lines() > lines):
            assert process.is_alive(), number
            time.sleep(0.0005)
        if number < 20:
            time.sleep(rng.uniform(0, 0.005))
            process.kill()
        process.join()
        saves += bool(asides() - before)
        assert process.exitcode == (0 if number == 20 else -signal.SIGKILL), number
    assert saves >= 4, saves
    same_run(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, to_kill, tmp_path):
    argv, whole = to_kill
    folder = tmp_path / "run"
    process = started([*argv, "--save-steps", "0", "--output-dir", str(folder)], tmp_path / "out")
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text()):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number and len(list(folder.glob("checkpoint-*"))) == 1
    out = (tmp_path / "out").read_text()
    assert re.search(rf"stopped by {signal.Signals(number).name} after iteration \d+ of 100: --resume {folder} goes on", out), out
    assert train.main(["--resume", str(folder)]) == 0
    same_run(folder, whole)


def test_a_second_signal_ends_at_once_and_other_code_gets_its_handlers_back():
    state, before = argparse.Namespace(stop=None), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.stopping_on_signals(state):
        os.kill(os.getpid(), signal.SIGINT)
        assert state.stop == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.soak
def test_half_an_hour_leaks_nothing(warm_start, tmp_path):
    """python -m pytest -m soak: memory within 2 % and open files the same, from the fifth minute to the thirtieth."""
    minutes, seen = float(os.environ.get("SOAK_MINUTES", 30)), []
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGINT))

    def look():
        while timer.is_alive():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages, len(os.listdir("/proc/self/fd"))))
            time.sleep(minutes)

    timer.start()
    threading.Thread(target=look, daemon=True).start()
    assert run(tmp_path, warm_start, "--total-episodes", "10000000", "--save-steps", "50", "--eval-steps", "50") == 128 + signal.SIGINT
    memory, files = zip(*seen[len(seen) // 6 : -1])
    early, late = (sum(part) / len(part) for part in (memory[: len(memory) // 4], memory[-len(memory) // 4 :]))
    print(f"{early:.0f} -> {late:.0f} pages, {min(files)} to {max(files)} open files, {len(log(tmp_path))} iterations")
    assert abs(late / early - 1) < 0.02 and files[-1] <= files[0] + 2


def test_help_names_every_flag_and_both_spellings_work(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0 and "--reward-noise-fp" in text and "default 0.95" in text
    assert "--save-steps" in text and "default 0; in [0, inf)" in " ".join(text.split())
    assert train.parse_args(["--batch_size", "64"]).batch_size == 64
