"""harness/gpu.py, as far as a CPU can tell; experiments/on_gpu.py asks a GPU."""

import copy

import pytest
import torch
from conftest import SMALL, log, refused, run_of, train_in
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train
from harness.gpu import COMPILED, GROUPED, compile_layers, grouped_attention
from rollout import response_logprobs, response_quantiles, sample
from tasks.prompts import PROMPT_IDS

MASKS = ("none", "bool", "numbers")
SHORT = "--total-episodes 128 --eval-samples 16"


@pytest.fixture
def quick_compile(monkeypatch):
    """Traces and differentiates as always, but leaves the kernels to PyTorch: seconds."""
    real = torch.nn.Module.compile
    quick = lambda module, **options: real(module, **options, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    yield
    torch.compiler.reset()


def replayed(run, prompts, **settings):
    """Sampled with a seed, log-probs recorded."""
    torch.manual_seed(0)
    ends = (run.stop_ids[0], run.stop_ids, 8)
    return sample(run.sampler, prompts, *ends, 1.0, record_logprobs=True, **settings)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_grouped_attention_is_sdpa(mask, columns, group):
    torch.manual_seed(group)
    query = torch.randn(3, 4, columns, 8)
    key, value = torch.randn(3, 4 // group, 5, 8), torch.randn(3, 4 // group, 5, 6)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = group, False
    seen = torch.rand(3, 1, columns, 5) > 0.4
    seen[..., -1] = True
    added = torch.where(seen, torch.randn(seen.shape), -torch.inf)
    given = dict(zip(MASKS, (None, seen, added)))[mask]
    for scaling in (None, 0.3):
        own, _ = grouped_attention(module, query, key, value, given, scaling=scaling)
        expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=scaling)
        assert own.shape == expected.shape == (3, columns, 4, 6)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_a_sampler_in_bf16_decodes_with_it_and_draws_the_same(warm_start, tmp_path):
    run, _ = run_of(warm_start, tmp_path, "--dtype", "bfloat16")
    assert run.sampler.config._attn_implementation == GROUPED
    assert run.policy.config._attn_implementation == "sdpa"
    prompts = run.data[:6][PROMPT_IDS]
    assert len({len(ids) for ids in prompts}) > 1  # padding
    run.sampler = copy.deepcopy(run.policy)
    usual = replayed(run, prompts)
    run.sampler.set_attn_implementation(GROUPED)
    for settings in ({}, COMPILED):
        grouped = replayed(run, prompts, **settings)
        assert torch.equal(grouped.input_ids, usual.input_ids)
        torch.testing.assert_close(grouped.logprobs, usual.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing, warm_start, tmp_path, quick_compile):
    flags = ["--gradient-checkpointing"] if checkpointing else []
    run, args = run_of(warm_start, tmp_path, *flags)
    experience, _ = train.collect(run, args)
    found = []
    for compiled in (False, True):
        if compiled:
            compile_layers(run.policy, run.critic)
        for part in (experience[torch.arange(5)], experience[torch.arange(5, 12)]):
            logprobs = response_logprobs(run.policy, part.rollout, 1.0)
            quantiles = response_quantiles(run.critic, part.rollout)
            (logprobs.sum() + quantiles.square().sum()).backward()
            models = (run.policy, run.critic)
            grads = [p.grad.clone() for m in models for p in m.parameters() if p.grad is not None]
            for model in models:
                model.zero_grad()
            found.append((logprobs, quantiles, *grads))
    assert len(found[0]) > 20
    for usual, compiled in zip(found[:2], found[2:]):
        for a, b in zip(usual, compiled):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_run_trains_saves_and_goes_on(warm_start, tmp_path, quick_compile):
    flags = f"--compile --dtype bfloat16 {SHORT} --critic-warmup-steps 0".split()
    assert train_in(tmp_path / "run", warm_start, *flags) == 0
    more = ["--resume", str(tmp_path / "run"), "--total-episodes", "192"]
    assert train.main(more) == 0 and len(log(tmp_path / "run")) == 3


def test_compile_needs_bf16(warm_start, tmp_path, capsys):
    argv = [*SMALL, "--compile", "--output-dir", str(tmp_path)]
    refused(capsys, argv, "--compile", "--dtype bfloat16", "float32")
