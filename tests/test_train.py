"""train.py: the run from end to end, equal seeds, collect, estimate and update, the baselines."""

import argparse
import collections
import copy
import io
import itertools
import json
import math
import shutil
import sys
import traceback
import types
from pathlib import Path

import pytest
import torch
from common import (
    MODEL,
    ONCE,
    SMALL,
    log,
    own,
    refused,
    rows_of,
    run_of,
    slow,
    some_of,
    tiny_config,
    train_in,
    weights,
    write_rows,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import dvpo
import train
from harness import reports, setup
from harness.checkpoints import newest_checkpoint
from harness.flags import ALGORITHMS, parse_args
from harness.setup import build
from risk import RiskConfig
from rollout import Rollout
from tasks import InputError
from tasks.builtin import task_tokenizer
from tasks.noise import PSEUDO_LABEL, noisy_scores


def test_end_to_end_the_reward_rises_and_what_is_left_behind_loads(finished):
    rows = log(finished)
    assert [row["iteration"] for row in rows] == list(range(1, 25)) and rows[-1]["episode"] == 1536
    names = ("loss/policy_avg", "loss/value_avg", "objective/kl")
    assert all(math.isfinite(row[name]) for row in rows for name in names)
    scores = [row["objective/true_scores"] for row in rows]
    assert sum(scores[-6:]) / 6 > sum(scores[:6]) / 6 + 0.02
    results = json.loads((finished / "results.json").read_text())
    before, after = results["before"], results["after"]
    modes, domains = ("greedy", "sampled"), ("in domain", "out of domain")
    for mode in modes:
        assert after[f"in domain, {mode}"] > before[f"in domain, {mode}"] + 0.03
    assert before.keys() == {f"{domain}, {mode}" for domain in domains for mode in modes}
    folder = finished / "checkpoint-000024"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompt = [{"role": "user", "content": "area north"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    AutoModel.from_pretrained(folder / "critic")
    flags = json.loads((finished / "args.json").read_text())["flags"]
    assert flags["num_quantiles"] == 16 and flags["batch_size"] == 64
    assert not list(finished.glob("*.tmp"))


def test_same_seed_same_run_bit_for_bit_and_another_seed_another(
    finished, warm_start, tmp_path, monkeypatch
):
    """Evaluation draws from generators of its own: without it, too, the run is the same."""
    monkeypatch.setattr(reports, "evaluate", lambda run, args: ({}, []))
    train_in(tmp_path / "again", warm_start, "--total-episodes", "768")
    assert log(tmp_path / "again") == log(finished)[:12]
    assert torch.equal(weights(tmp_path / "again"), weights(finished / "checkpoint-000012"))
    # From the same weights, not from a warm start of its own seed.
    other = f"--seed 1 --total-episodes 64 --model-name-or-path {warm_start}".split()
    train_in(tmp_path / "other", warm_start, *other)
    assert log(tmp_path / "other")[0] != log(finished)[0]


def test_ppo_shares_every_line_but_the_critics_loss(warm_start, tmp_path):
    flags = "--algo ppo --total-episodes 128 --eval-samples 8 --num-ppo-epochs 1"
    assert train_in(tmp_path, warm_start, *flags.split()) == 0
    row = log(tmp_path)[-1]
    assert not any(name.startswith("quantile/") for name in row)
    assert row["val/ratio"] == pytest.approx(1, abs=0.1)
    assert weights(tmp_path).isfinite().all()


@pytest.mark.parametrize("algo", ["robust", "grpo", *map(slow, ("dr_grpo", "reinforce++"))])
def test_baselines_run_save_and_resume_with_no_more_parts_than_they_need(
    algo, warm_start, tmp_path
):
    first, again = tmp_path / "a", tmp_path / "b"
    few = "--total-episodes 192 --save-steps 2 --eval-samples 8 --num-ppo-epochs 1".split()
    assert train_in(first, warm_start, "--algo", algo, *few) == 0
    rows = log(first)
    has_critic = algo == "robust"
    assert ("val/explained_var" in rows[0]) == has_critic == ("loss/value_avg" in rows[0])
    # Of a quantile critic's numbers robust PPO has one: how far its heads are from their mean.
    named = [name for name in rows[0] if "quantile/" in name]
    assert named == ["quantile/head_spread"] * has_critic
    for name in ("loss/policy_avg", "objective/kl", "policy/approxkl_avg", "val/ratio"):
        assert all(math.isfinite(row[name]) for row in rows)
    # No critic, no warm-up.
    assert rows[0]["val/ratio"] == 1 if has_critic else rows[0]["policy/approxkl_avg"] > 0
    assert (newest_checkpoint(first) / "critic").exists() == has_critic
    again.mkdir()
    some_of(first, again, "checkpoint-000002", "args.json", "metrics.jsonl", "warm_start")
    assert train.main(["--resume", "--output-dir", str(again)]) == 0
    assert log(again) == rows
    folders = [newest_checkpoint(folder) / "policy" for folder in (first, again)]
    policies = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert all(torch.equal(a, b) for a, b in zip(*(policy.parameters() for policy in policies)))


def test_grpo_samples_groups_and_keeps_the_kl_in_its_loss(warm_start, tmp_path, monkeypatch):
    once = "--num-mini-batches 1 --num-ppo-epochs 1 --kl-coef 2 --group-size 4".split()
    run, args = run_of(warm_start, tmp_path, "--algo", "grpo", *once)
    head, rng = run.policy.lm_head.weight, torch.Generator().manual_seed(0)
    with torch.no_grad():
        head += 0.05 * torch.randn(head.shape, generator=rng)
    experience, _ = train.collect(run, args)
    rollout, mask = experience.rollout, experience.rollout.mask
    prompts = []
    for ids, (length, response) in zip(rollout.input_ids.tolist(), rollout.lengths.tolist()):
        prompts.append(tuple(ids[-length:-response]))
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 64, 4))
    assert len(set(prompts)) == 16
    advantages = experience.advantages[:, 0].view(16, 4)
    assert advantages.sum(1).abs().max() < 1e-4 and advantages.abs().max() > 0.1
    assert experience.targets is None
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    losses = []
    for args.kl_coef in (0.0, 2.0):
        losses.append(train.update(run, args, experience)["loss/policy_avg"])
    k3 = dvpo.kl_estimate(experience.logprobs, experience.ref_logprobs, "k3")
    expected = 2 * dvpo.masked_mean(dvpo.token_weights("response", mask, 12) * k3, mask).item()
    assert (losses[1] - losses[0]).item() == pytest.approx(expected, rel=1e-3)


def test_dr_grpos_gradient_of_a_token_does_not_depend_on_lengths(warm_start, tmp_path, monkeypatch):
    """With others of the minibatch cut short, a response's share of the loss stays as it is.

    It is score / (rows * response_length).
    """
    once = "--num-mini-batches 1 --num-ppo-epochs 1 --kl-coef 0 --algo dr_grpo".split()
    run, args = run_of(warm_start, tmp_path, *once)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    experience, _ = train.collect(run, args)
    experience.advantages = torch.zeros(64, experience.logprobs.shape[1])
    experience.advantages[7] = 1.0  # the others do not pull
    rollout = experience.rollout
    expected = -rollout.mask[7].sum().item() / (64 * args.response_length)
    losses = [train.update(run, args, experience)["loss/policy_avg"].item()]
    rollout.mask[:7, :-1] = False
    experience.rollout = Rollout(
        rollout.input_ids, rollout.attention_mask, rollout.mask, rollout.truncated
    )
    losses.append(train.update(run, args, experience)["loss/policy_avg"].item())
    assert losses == pytest.approx([expected, expected], rel=1e-4)


def test_warm_up_trains_the_critic_only_and_says_so(warm_start, tmp_path, capsys):
    flags = "--critic-warmup-steps 2 --total-episodes 128 --eval-samples 8"
    train_in(tmp_path, warm_start, *flags.split(), *ONCE)
    assert "--critic-warmup-steps 2 covers all 2 iterations" in capsys.readouterr().out
    policy = AutoModelForCausalLM.from_pretrained(newest_checkpoint(tmp_path) / "policy")
    start = AutoModelForCausalLM.from_pretrained(warm_start)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters()))
    row = log(tmp_path)[-1]
    assert row["objective/kl"] == pytest.approx(0, abs=1e-6) and row["val/ratio"] == 1


def test_ratio_is_1_in_the_first_minibatch_and_old_values_stay_as_rolled_out(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path, *"--num-mini-batches 1 --num-ppo-epochs 1".split())
    experience, _ = train.collect(run, args)
    targets = experience.targets.clone()
    run.iteration = 5
    metrics = train.update(run, args, experience)
    assert metrics["val/ratio"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approxkl_avg"] < 1e-10
    assert torch.equal(experience.targets, targets) and not targets.requires_grad


def numbers_of(*models):
    return torch.cat([p.detach().flatten().clone() for model in models for p in model.parameters()])


@pytest.mark.parametrize("algo", ["dvpo", "robust"])
def test_micro_batch_size_changes_no_gradient_and_no_metric(algo, warm_start, tmp_path):
    """One step of SGD with micro-batches of 64 rows, of 7, of 100 tokens: equal up to rounding.

    So the logged losses are not the last micro-batch's, and explained variance is the batch's and
    not a mean of parts.
    """
    moved, logged = [], []
    for size in ("--micro-batch-size 64", "--micro-batch-size 7", "--micro-batch-tokens 100"):
        once = "--num-mini-batches 1 --num-ppo-epochs 1 --critic-warmup-steps 0".split()
        run, args = run_of(warm_start, tmp_path, *size.split(), *once, "--algo", algo)
        torch.manual_seed(0)
        run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=1.0)
        run.critic_optimizer = torch.optim.SGD(run.critic.parameters(), lr=1.0)
        # Values that differ between states.
        rng = torch.Generator().manual_seed(0)
        run.critic.heads.weight.data.normal_(0, 0.1, generator=rng)
        before = numbers_of(run.policy, run.critic)
        experience, metrics = train.collect(run, args)
        metrics |= train.update(run, args, experience)
        moved.append(numbers_of(run.policy, run.critic) - before)
        logged.append({name: float(value) for name, value in metrics.items()})
    assert moved[0].abs().max() > 1e-3
    for other in (1, 2):
        torch.testing.assert_close(moved[0], moved[other], rtol=1e-3, atol=1e-5)
        assert logged[0] == pytest.approx(logged[other], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "flags,at_start,expected",
    [
        ([], {"policy": 24}, {"reference": 64}),
        (["--kl-coef", "0"], {"policy": 24}, {}),
        (["--dtype", "bfloat16"], {"policy": 24}, {"policy": 64, "reference": 64}),
    ],
)
def test_no_pass_is_spent_on_numbers_that_are_there(
    flags, at_start, expected, warm_start, tmp_path, monkeypatch
):
    """Eight rows are asked about at the start, thrice; then in fp32 the policy is not scored again.

    Without a KL there is no reference; in bf16 both are scored.
    """
    calls, response_logprobs = [], train.response_logprobs

    def noting(model, part, temperature):
        calls.append((model, len(part.mask)))
        return response_logprobs(model, part, temperature)

    for module in (train, setup):
        monkeypatch.setattr(module, "response_logprobs", noting)
    run, args = run_of(warm_start, tmp_path, *flags, build=build)
    for rows in (at_start, expected, expected):
        scored = collections.Counter()
        for model, number in calls:
            scored["policy" if model is run.policy else "reference"] += number
        assert scored == rows
        calls.clear()
        train.collect(run, args)


# What is broken behind the rollout, so that only the update can see it.
NOT_FINITE = {
    "policy": lambda run: run.policy.lm_head.weight,
    "critic": lambda run: run.critic.heads.weight,
}


@pytest.mark.parametrize("broken", NOT_FINITE)
def test_losses_and_gradients_that_are_not_finite_stop_the_run_before_a_step(
    broken, warm_start, tmp_path
):
    run, args = run_of(warm_start, tmp_path, "--critic-warmup-steps", "0")
    experience, _ = train.collect(run, args)
    with torch.no_grad():
        NOT_FINITE[broken](run)[3, 0] = math.nan
    before = numbers_of(run.policy, run.critic)
    where = "iteration 1, minibatch 1 of 4: expected finite losses and gradients, found others in "
    critics = "loss/value_avg, .*the gradient of QuantileCritic"
    policys = "loss/policy_avg, the gradient of LlamaForCausalLM"
    named = critics if broken == "critic" else policys
    with pytest.raises(InputError, match=f"^{where}{named}$"):
        train.update(run, args, experience)
    assert torch.equal(before.nan_to_num(9.0), numbers_of(run.policy, run.critic).nan_to_num(9.0))
    assert not run.optimizer.state and not run.critic_optimizer.state  # Adam has seen nothing


def test_a_term_of_weight_0_that_overflows_does_not_stop_the_run(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path, "--critic-warmup-steps", "0")
    experience, _ = train.collect(run, args)
    run.risk = RiskConfig(calibration=0, shift=0, shape=0, curvature=0, consistency=0)
    run.critic.heads.bias.data.fill_(3e25)  # squared, it is beyond fp32
    metrics = train.update(run, args, experience)
    assert metrics["loss/critic_shift"].isinf() and metrics["loss/value_avg"].isfinite()


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    """As PYTHONIOENCODING=ascii has it: the table at the end, after hours of training."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        train.main(["--alpha", "0"])
    print("caf\u00e9")
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


def test_a_log_that_does_not_start_is_one_line(warm_start, tmp_path, monkeypatch, capsys):
    def init(project, config):
        raise PermissionError("no API key\nlog in")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    shutil.copytree(warm_start, tmp_path / "warm_start")
    argv = [*SMALL, *f"--eval-samples 4 --report-to wandb --output-dir {tmp_path}".split()]
    refused(capsys, argv, "--report-to: it raised PermissionError", "(test_train.py, line ")


@pytest.mark.parametrize("term", ["scores", "logprobs", "quantiles"])
def test_a_rollout_that_is_not_finite_stops_the_run_and_names_its_row(
    term, warm_start, tmp_path, monkeypatch
):
    where = (setup, "noisy_scores") if term == "scores" else (train, "in_micro_batches")
    function = getattr(*where)

    def broken(*rest):
        value = function(*rest)
        value[7] = math.nan
        return value

    monkeypatch.setattr(*where, broken)
    algo = "reinforce++" if term == "logprobs" else "dvpo"
    flags = ["--algo", algo, *"--critic-warmup-steps 0 --kl-coef 0".split()]
    run, args = run_of(warm_start, tmp_path, *flags)
    run.trust_recorded = term != "logprobs"
    found = f"iteration 1: expected finite {term}, found others in rows? 7 of the batch"
    with pytest.raises(InputError, match=found):
        train.collect(run, args)


def test_a_model_whose_logits_are_not_finite_stops_the_run_in_its_first_iteration(
    warm_start, tmp_path
):
    """Sampling draws on, as on a GPU drawing from NaN would end the process."""
    run, args = run_of(warm_start, tmp_path)
    run.policy.lm_head.weight.data[3] = math.nan
    with pytest.raises(InputError, match="iteration 1: expected finite (quantiles|logprobs)"):
        train.collect(run, args)


SMALLEST = [
    "--num-quantiles 1",
    "--num-heads 1",
    "--response-length 1",
    "--response-length 2 --missing-eos-penalty 1 --whiten-rewards",
]
# Every set of flags with DVPO and every algorithm with the shortest response; robust's heads.
FIRST = {("dvpo", flags) for flags in SMALLEST} | {(algo, SMALLEST[2]) for algo in ALGORITHMS}
FIRST |= {("robust", "--num-heads 1"), ("grpo", SMALLEST[3])}


@pytest.mark.parametrize(
    "algo,flags",
    [pair if pair in FIRST else slow(*pair) for pair in itertools.product(ALGORITHMS, SMALLEST)],
)
def test_the_smallest_of_everything(algo, flags, model_folder, tmp_path, monkeypatch):
    """M = 1, N = 1, T = 1, all rows truncated, all rewards equal: finite weights, for each."""
    monkeypatch.chdir(tmp_path)
    Path("same.py").write_text("def one(prompts, **columns): return [1.0] * len(prompts)\n")
    write_rows(tmp_path / "data.jsonl", rows_of())
    own = f"--model-name-or-path {model_folder} --dataset-name data.jsonl --reward same:one"
    argv = [*MODEL, *own.split(), "--output-dir", "run", "--algo", algo]
    assert train.main([*argv, *flags.split()]) == 0
    (row,) = log(tmp_path / "run")
    assert all(value is None or math.isfinite(value) for value in row.values())
    assert row["objective/true_scores"] == 1
    unknown = [name for name, value in row.items() if value is None]
    assert [name for name in unknown if not name.startswith("val/explained")] == []
    policy = AutoModelForCausalLM.from_pretrained(newest_checkpoint(tmp_path / "run") / "policy")
    assert all(p.isfinite().all() for p in policy.parameters())


def test_half_precision_samples_from_a_bf16_copy_that_follows_the_policy_and_scores_its_tokens_anew(
    warm_start, tmp_path
):
    flags = "--dtype bfloat16 --batch-size 16 --critic-warmup-steps 0 --learning-rate 0.01"
    run, args = run_of(warm_start, tmp_path, *ONCE, *flags.split())
    assert {p.dtype for p in run.sampler.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.policy.parameters()} == {torch.float32}
    assert {b.dtype for b in run.sampler.buffers()} == {torch.float32}  # rotary frequencies
    old = run.sampler.lm_head.weight.clone()
    for _ in range(2):
        experience, _ = train.collect(run, args)
        pairs = zip(run.sampler.parameters(), run.policy.parameters())
        assert all(torch.equal(a, b.bfloat16()) for a, b in pairs)
        metrics = train.update(run, args, experience)
        assert metrics["val/ratio"].item() == pytest.approx(1, abs=1e-5)
        assert experience.rollout.logprobs is None
    assert not torch.equal(old, run.sampler.lm_head.weight)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Notes every operation for which a program would wait for a GPU, transformers' own aside."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name in WAITING or (name in ("index", "index_put_") and self.is_by_mask(args[1])):
            stack = [f for f in traceback.extract_stack() if "importlib" not in f.filename]
            frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in stack]
            if not any("transformers" in frame.filename for frame in stack):
                self.found.append(f"{function} {frames[-6:]}")
        return function(*args, **(kwargs or {}))

    @staticmethod
    def is_by_mask(indices):
        return any(getattr(index, "dtype", None) == torch.bool for index in indices)


@pytest.mark.parametrize("algo", ["dvpo", "ppo", "grpo", slow("dr_grpo")])
def test_the_update_waits_for_the_gpu_once_a_minibatch_and_for_the_critics_valid_tokens(
    algo, warm_start, tmp_path, monkeypatch
):
    flags = f"--critic-warmup-steps 0 --algo {algo} --micro-batch-size 8"
    run, args = run_of(warm_start, tmp_path, *flags.split())
    experience, _ = train.collect(run, args)
    fetched = lambda *rest: pytest.fail("a tensor is fetched from the GPU")
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, fetched)
    with Waits() as waits:
        train.update(run, args, experience)
    monkeypatch.undo()
    by_mask = [found for found in waits.found if "dvpo.py" in found]
    others = len(waits.found) - len(by_mask)
    assert others <= args.num_ppo_epochs * args.num_mini_batches, waits.found
    assert bool(by_mask) == (run.critic is not None)
    with Waits() as waits:
        torch.randn(4)[torch.ones(4) > 0].sum().item()
    assert len(waits.found) == 2  # the measuring mode does see them


def test_updates_train_on_the_sampled_ids(warm_start, tmp_path, monkeypatch):
    """Never decoded and encoded again: a row that an update scores is a sampled one, with mask."""
    flags = "--critic-warmup-steps 0 --num-ppo-epochs 1"
    run, args = run_of(warm_start, tmp_path, *flags.split())
    experience, _ = train.collect(run, args)
    seen, response_logprobs = [], train.response_logprobs

    def noting(model, part, temperature):
        seen.append(part)
        return response_logprobs(model, part, temperature)

    monkeypatch.setattr(train, "response_logprobs", noting)
    train.update(run, args, experience)
    trained, sampled = [], []
    for rows, parts in ((trained, seen), (sampled, [experience.rollout])):
        for part in parts:
            pairs = zip(part.response_ids, part.mask)
            rows += [tuple(ids[kept].tolist()) for ids, kept in pairs]
    assert len(trained) == 64 and sorted(trained) == sorted(sampled)


def at_first(tensor, rollout):
    """What tensor (B, T, ...) holds at the first token of each response."""
    return tensor[torch.arange(len(tensor)), tensor.shape[1] - rollout.lengths[:, 1]]


def test_noise_penalty_kl_and_whitening_reach_the_experience(warm_start, tmp_path):
    """With gamma = lam = 1 a first target is the noisy score less kl_coef times the row's KL.

    And advantages have mean 0 and variance 1.
    """
    flags = "--lam 1 --kl-coef 0.5 --reward-noise-outlier 1 2 --missing-eos-penalty 3"
    run, args = run_of(warm_start, tmp_path, *flags.split())
    run.iteration = 1  # in the first there is no KL
    run.reward = lambda prompts, completions, **columns: [1.0] * len(prompts)
    for parameter in run.policy.parameters():  # away from the reference
        rng = torch.Generator().manual_seed(0)
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=rng)
    noise = torch.Generator().manual_seed(args.reward_noise_seed)
    experience, _ = train.collect(run, args)
    rollout, mask = experience.rollout, experience.rollout.mask
    with torch.no_grad():
        log_ratio = experience.logprobs - train.response_logprobs(run.reference, rollout, 1.0)
    kl = torch.where(mask, log_ratio, 0).sum(1)
    scores = noisy_scores(torch.ones(64), 0.0, 0.0, (1.0, 2.0), noise)
    expected = scores - 3 * rollout.truncated - 0.5 * kl
    assert kl.abs().max() > 0.01 and expected.std() > 0.3
    found = at_first(experience.targets, rollout).mean(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    advantages = experience.advantages[mask]
    assert abs(advantages.mean()) < 1e-5 and advantages.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("num_heads,taught", [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_each_response_teaches_half_of_robust_ppos_heads(num_heads, taught, warm_start, tmp_path):
    """So each head's bias moves by the errors of its own responses alone; one head learns all."""
    once = "--num-mini-batches 1 --num-ppo-epochs 1".split()
    flags = ("--algo", "robust", "--num-heads", str(num_heads), *once)
    run, args = run_of(warm_start, tmp_path, *flags)
    experience, _ = train.collect(run, args)
    minibatch, again = experience[torch.arange(64)], experience[torch.arange(64)]
    torch.manual_seed(0)
    sums = train.minibatch_backward(run, args, minibatch, False)
    learns, scale = ~minibatch.untaught[:, 0, :, 0], run.critic.scale
    assert (learns.sum(1) == taught).all()
    assert num_heads == 1 or all(10 < count < 54 for count in learns.sum(0).tolist())
    with torch.no_grad():
        values = train.response_quantiles(run.critic, minibatch.rollout)[..., 0]
    error = ((values - minibatch.targets) / scale).where(minibatch.rollout.mask[..., None], 0)
    of_heads = torch.stack([error[learns[:, head], :, head].sum() for head in range(num_heads)])
    count = num_heads * minibatch.rollout.mask.sum()
    torch.testing.assert_close(run.critic.heads.bias.grad, of_heads / count, rtol=1e-4, atol=1e-6)
    taught_error = torch.where(learns.unsqueeze(1), error, 0)
    torch.testing.assert_close(sums["loss/value_avg"], taught_error.square().sum() / 2 / count)
    train.minibatch_backward(run, args, again, False)
    # In the next step, another half.
    assert num_heads == 1 or not torch.equal(again.untaught, minibatch.untaught)


def test_robust_ppos_heads_come_apart_and_those_of_the_others_do_not(warm_start, tmp_path):
    """In units of the returns, after three batches: else the least of them is their mean."""
    apart = {}
    for algo in ("robust", "dvpo"):
        run, args = run_of(warm_start, tmp_path, "--algo", algo)
        torch.manual_seed(0)
        for run.iteration in range(4):
            experience, metrics = train.collect(run, args)
            train.update(run, args, experience)
        apart[algo] = metrics["quantile/head_spread"] / run.critic.scale
    assert apart["dvpo"] < 0.005 < 0.02 < apart["robust"]


def test_robust_ppo_counts_on_the_worst_head_and_improves_on_their_mean():
    """Heads (1, 3), (2, 6), and (5, 9) after the cut; rewards 2 and 0.

    delta = 2 + min(2, 6) - mean(1, 3) = 2, and 0 + 5 - 4 = 1; so A = 3, 1 and y = V + A = 5, 5.
    """
    flags = "--model-name-or-path x --bootstrap-truncated --gamma 1 --lam 1 --algo robust"
    args = parse_args(flags.split())
    ids, mask = torch.zeros(1, 3).long(), torch.ones(1, 2, dtype=torch.bool)
    rollout = Rollout(ids, torch.ones(1, 3).long(), mask, torch.tensor([True]))
    heads = torch.tensor([[[1.0, 3.0], [2.0, 6.0], [5.0, 9.0]]]).unsqueeze(-1)
    rewards = torch.tensor([[2.0, 0.0]])
    advantages, targets = train.estimate(args, torch.zeros(1), rewards, heads, rollout)
    # Whitened.
    assert targets.flatten().tolist() == [5.0, 5.0]
    torch.testing.assert_close(advantages, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


@pytest.mark.parametrize("algo", ["dvpo", "ppo", "robust"])
def test_the_critic_starts_at_the_first_batchs_returns_and_only_there(warm_start, tmp_path, algo):
    """Without KL and discount a token's return is its row's score, here the row's number.

    Long rows count more.
    """
    run, args = run_of(warm_start, tmp_path, "--kl-coef", "0", "--algo", algo)
    run.reward = lambda prompts, completions, **columns: [float(row) for row in range(len(prompts))]
    experience, _ = train.collect(run, args)
    returns = torch.arange(64.0).repeat_interleave(experience.rollout.mask.sum(1))
    expected = returns.quantile(run.critic.levels) if algo == "dvpo" else returns.mean().view(1)
    assert run.critic.scale.item() == pytest.approx(returns.std(correction=0).item())
    heads = run.critic.scale * run.critic.heads.bias.view(-1, len(expected))
    torch.testing.assert_close(heads, expected.expand_as(heads))
    # Row 0 has the score 0: the values were read after the move.
    assert at_first(experience.targets, experience.rollout)[0].mean() > 1
    run.iteration = 1
    run.reward = lambda prompts, completions, **columns: [-1.0] * len(prompts)
    train.collect(run, args)
    again = run.critic.scale * run.critic.heads.bias.view(-1, len(expected))
    torch.testing.assert_close(again, heads)


def test_risk_weights_reach_the_critic_and_each_model_has_its_own_learning_rate(
    warm_start, tmp_path
):
    heads = {}
    for weight in ("0", "0.1"):
        flags = f"--shape-weight {weight} --learning-rate 1e-4 --critic-learning-rate 3e-3"
        run, args = run_of(warm_start, tmp_path, *flags.split())
        torch.manual_seed(0)
        experience, _ = train.collect(run, args)
        run.critic.heads.bias.data[::16] = -5.0  # one far quantile a head: a long lower tail
        train.update(run, args, experience)
        heads[weight] = run.critic.heads.bias.detach().clone()
        assert run.optimizer.param_groups[0]["lr"] == 1e-4
        assert run.critic_optimizer.param_groups[0]["lr"] == 3e-3
    assert not torch.equal(heads["0"], heads["0.1"])


def test_pseudo_labels_reach_training_but_not_true_scores_or_evaluation(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path, "--pseudo-label-noise", "1")
    assert all(label != answer for label, answer in zip(run.data[PSEUDO_LABEL], run.data["answer"]))
    assert all(PSEUDO_LABEL not in data.column_names for data in run.evals.values())
    _, metrics = train.collect(run, args)
    assert metrics["objective/scores"] < 0.05 < metrics["objective/true_scores"]


def position_critic(input_ids, attention_mask, position_ids, last):
    """V = the position it is read at."""
    return position_ids[:, -last:, None, None].float()


def test_truncation_penalty_and_bootstrap(warm_start, tmp_path):
    """Two tokens are too few for nearly every booking: each such row loses 3."""
    two = "--response-length 2 --missing-eos-penalty 3".split()
    run, args = run_of(warm_start, tmp_path, *two)
    _, metrics = train.collect(run, args)
    clipped, true_scores = metrics["completions/clipped_ratio"], metrics["objective/true_scores"]
    assert clipped > 0.9
    assert metrics["objective/scores"].item() == pytest.approx((true_scores - 3 * clipped).item())
    run.reward = lambda prompts, completions, **columns: [0.0] * len(prompts)
    run.iteration = 1  # the critic starts at the first batch's returns only in the first
    # V = 2 everywhere: without a reward, targets are 2 if truncation counts on it, else fall to 0.
    run.critic.heads.bias.data.fill_(2.0 / run.critic.scale.item())
    for flag, last_target in (((), 0.0), (("--bootstrap-truncated",), 2.0)):
        two = "--response-length 2 --kl-coef 0".split()
        args = parse_args([*SMALL, "--output-dir", str(tmp_path), *two, *flag])
        experience, _ = train.collect(run, args)
        targets = experience.targets[experience.rollout.truncated, -1]
        assert targets.mean().item() == pytest.approx(last_target, abs=0.01)
    run.critic = position_critic
    experience, _ = train.collect(run, args)
    rollout = experience.rollout
    # The last token's own position: where the state after it is seen.
    last = rollout.position_ids[rollout.truncated, -1]
    assert torch.equal(experience.targets[rollout.truncated, -1, 0], last.float())


@pytest.mark.slow
def test_the_reward_of_conversations_rises(tmp_path):
    flags = f"--task booking --output-dir {tmp_path} --learning-rate 3e-4"
    assert train.main([*SMALL, *flags.split()]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["in domain, sampled"] > results["before"]["in domain, sampled"] + 0.05


def test_a_whole_conversation_is_one_response(tmp_path):
    """The built-in booking task, with a policy that knows nothing: ratio 1 at first.

    The user's tokens are neither scored nor trained on.
    """
    tokenizer = task_tokenizer("booking")
    config = tiny_config("llama", len(tokenizer))
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    flags = f"--task booking --model-name-or-path {tmp_path / 'model'} --output-dir {tmp_path}"
    args = parse_args([*SMALL, *flags.split()])
    run = build(args)
    experience, _ = train.collect(run, args)
    rollout, mask = experience.rollout, experience.rollout.mask
    gaps = ~mask & (mask.cumsum(dim=1) > 0)
    assert gaps.any() and (experience.advantages[gaps] == 0).all()
    said = [ids[gap].tolist() for ids, gap in zip(rollout.response_ids, gaps)]
    heard = {word for row in run.tokenizer.batch_decode(said) for word in row.split()}
    assert heard >= {"<user>", "<assistant>", "ok"} and not heard & {"book", "<pad>"}
    # The score stands on the last token of all.
    assert {row[-1]["role"] for row in rollout.messages} == {"assistant"} and mask[:, -1].all()
    assert rollout.lengths[:, 1].equal(mask.shape[1] - mask.long().argmax(dim=1))
    # Nobody reads them.
    experience.targets = torch.where(gaps.unsqueeze(-1), torch.nan, experience.targets)
    before = numbers_of(run.policy)
    run.iteration = args.critic_warmup_steps
    once = argparse.Namespace(**{**vars(args), "num_ppo_epochs": 1, "num_mini_batches": 1})
    updated = train.update(run, once, experience)
    assert updated["val/ratio"].item() == pytest.approx(1, abs=1e-5)
    assert updated["loss/value_avg"].isfinite() and not numbers_of(run.policy).equal(before)
    assert "replies" in run.data.column_names and "completion" not in run.data.column_names


def test_a_truncated_conversation_counts_on_the_state_after_its_last_token():
    """The first row is cut in its first turn, and so shorter than the longest of the batch."""
    flags = "--model-name-or-path x --bootstrap-truncated --gamma 1 --lam 1 --algo ppo"
    args = parse_args(flags.split())
    mask = torch.tensor([[False, False, True, True], [True, False, True, True]])
    ids, truncated = torch.zeros(2, 5).long(), torch.tensor([True, True])
    rollout = Rollout(ids, torch.ones(2, 5).long(), mask, truncated)
    values = torch.tensor([[0.0, 0.0, 1.0, 2.0, 30.0], [1.0, 2.0, 3.0, 4.0, 50.0]])
    quantiles = values[:, :, None, None]
    _, targets = train.estimate(args, torch.zeros(2), torch.zeros(2, 4), quantiles, rollout)
    assert targets[..., 0][mask].tolist() == [30.0, 30.0, 50.0, 50.0, 50.0]


# ---- no absolute units


def learned(start, args, factor, offset):
    """The policy's numbers after three iterations with rewards times factor, plus offset."""
    run = copy.deepcopy(start)
    run.reward = lambda prompts, completions, **columns: [
        (len(str(completion)) % 7 - 3.0) * factor + offset for completion in completions
    ]
    torch.manual_seed(0)
    for run.iteration in range(3):
        train.update(run, args, train.collect(run, args)[0])
    return torch.cat([parameter.detach().flatten() for parameter in run.policy.parameters()])


UNITLESS = "--kl-coef 0 --learning-rate 1e-3 --critic-learning-rate 3e-3".split()
# Not --whiten-rewards, which adds the rewards' mean to numbers without a unit.
CRITICS = ("--readout spread", "--algo ppo", "--algo robust")
CRITICS += (slow("--readout mean"), slow("--algo ppo --readout spread"))


@pytest.mark.parametrize("flags", CRITICS)
def test_rewards_have_no_unit(flags, model_folder, tmp_path):
    """Times a power of two the same policy bit for bit; times any number, plus any, to rounding."""
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    args = parse_args([*own(model_folder, data, "exact"), *flags.split(), *UNITLESS])
    start = build(args)
    base = learned(start, args, 1.0, 0.0)
    for power in (-20, 3, 66):
        assert torch.equal(learned(start, args, 2.0**power, 0.0), base)
    moved = (base - learned(start, args, 0.0, 0.0)).abs().mean()
    assert moved > 1e-4
    for factor, offset in ((1e-6, 0.0), (1e6, 0.0), (1e-3, 2.0), (1.0, 2e3)):
        other = learned(start, args, factor, offset)
        assert (other - base).abs().mean() < 0.02 * moved, (factor, offset)


@pytest.mark.parametrize("algo", ["dvpo", "ppo", "reinforce++"])
def test_equal_scores_in_the_first_batch_teach_nothing_and_leave_the_unit_at_1(
    algo, warm_start, tmp_path
):
    """Its KL is rounding alone: no unit for the critic, and nothing for whitening to blow up."""
    run, args = run_of(warm_start, tmp_path, "--algo", algo, "--kl-coef", "0.05")
    run.reward = lambda prompts, completions, **columns: [0.0] * len(prompts)
    experience, _ = train.collect(run, args)
    if run.critic is None:
        assert (experience.advantages == 0).all()
    else:
        assert run.critic.scale == 1
