"""harness/gpu.py, as far as a CPU can tell; experiments/on_gpu.py asks a GPU."""

import pytest
import torch
from common import SMALL, log, refused, run_of, train_in
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train
from harness.gpu import COMPILED, compile_layers, grouped_attention
from rollout import response_logprobs, response_quantiles, sample

MASKS = ("none", "bool", "numbers")
SHORT = "--total-episodes 128 --eval-samples 16"


@pytest.fixture
def quick_compile(monkeypatch):
    """Traces and differentiates as always, but leaves the kernels to PyTorch: seconds."""
    real, compiled = torch.nn.Module.compile, []

    def quick(module, **options):
        compiled.append(type(module).__name__)
        real(module, **options, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    # Else what is too much for the limit is run as it is, with a warning.
    limits = {"recompile_limit": 3, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        yield compiled
    torch.compiler.reset()


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
        # By keyword, as some models pass it.
        options = {"attention_mask": given, "scaling": scaling}
        own, _ = grouped_attention(module, query, key, value, **options)
        expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=scaling)
        assert own.shape == expected.shape == (3, columns, 4, 6)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_attention_is_never_cudnn():
    """Whose gradients can be NaN on an H100 where a pass has 64, 192, ... tokens a row."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("length", [63, 64, 128, 192])
def test_gradients_of_attention_under_a_mask_are_finite(length):
    """On an H200 cuDNN's are NaN at 64 and 192 (pytorch/pytorch issue 196678), if it is on."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    torch.manual_seed(0)
    shape = (3, 16, 9, length, 64)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) * 8).unbind()
    inputs = [part.requires_grad_() for part in (query, key, value)]
    at = torch.arange(length, device=device)
    starts = torch.randint(0, length // 2, (16, 1, 1), device=device)
    seen = (at >= starts) & (at <= at[:, None])
    mask = torch.zeros(seen.shape, device=device, dtype=dtype)
    mask = mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
    torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask).sum().backward()
    assert all(part.grad.isfinite().all() for part in inputs)


def test_scores_stay_fp32_in_half_precision():
    """Rounded to bf16 before the softmax, scores of this size would be off three times as far."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(8, heads, n, 64) for heads, n in ((4, 1), (2, 99), (2, 99)))
    exact, _ = grouped_attention(None, 3 * query, key, value, None)
    half = [tensor.bfloat16() for tensor in (3 * query, key, value)]
    own, _ = grouped_attention(None, *half, None)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, False
    usual, _ = sdpa_attention_forward(module, *half, None)
    off = [(found.float() - exact).abs().mean() for found in (own, usual)]
    assert 0 < off[0] < 1.2 * off[1]


def test_decoding_with_it_draws_the_same():
    """Prompts of unequal length, two query heads a key, a cache that grows or does not."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, **heads, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config)
    prompts, found = [[3, 4, 5, 6], [7, 8], [9, 10, 11]], []
    ways = [(sdpa_attention_forward, {}), (grouped_attention, {}), (grouped_attention, COMPILED)]
    for attention, settings in ways:
        AttentionInterface.register("sdpa", attention)
        torch.manual_seed(1)
        found.append(sample(model, prompts, 0, [1], 8, 1.0, record_logprobs=True, **settings))
    assert len(set(found[0].input_ids[:, -1].tolist())) > 1
    for other in found[1:]:
        assert torch.equal(other.input_ids, found[0].input_ids)
        torch.testing.assert_close(other.logprobs, found[0].logprobs, rtol=1e-4, atol=1e-5)
    layer = model.model.layers[0].self_attn
    assert grouped_attention is AttentionInterface()[layer.config._attn_implementation]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing, warm_start, tmp_path, quick_compile):
    flags = ["--gradient-checkpointing"] if checkpointing else []
    run, args = run_of(warm_start, tmp_path, *flags)
    experience, _ = train.collect(run, args)
    models, found = (run.policy, run.critic, run.reference), []
    # Rows of one length have no padding: another graph.
    lengths = experience.rollout.lengths[:, 0]
    alike = (lengths == lengths[0]).nonzero().flatten()[:5]
    for compiled in (False, True):
        if compiled:
            compile_layers(*models)
            assert quick_compile == ["LlamaDecoderLayer"] * 9
        for part in (
            experience[torch.arange(5)],
            experience[torch.arange(5, 12)],
            experience[alike],
        ):
            with torch.no_grad():
                before = [response_logprobs(model, part.rollout, 1.0) for model in models[::2]]
            logprobs = response_logprobs(run.policy, part.rollout, 1.0)
            quantiles = response_quantiles(run.critic, part.rollout)
            (logprobs.sum() + quantiles.square().sum()).backward()
            grads = [p.grad.clone() for m in models for p in m.parameters() if p.grad is not None]
            for model in models:
                model.zero_grad()
            found.append((*before, logprobs, quantiles, *grads))
    assert len(found[0]) > 20
    for usual, compiled in zip(found[:3], found[3:]):
        for a, b in zip(usual, compiled):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_run_trains_saves_and_goes_on(warm_start, tmp_path, quick_compile):
    flags = f"--compile --dtype bfloat16 {SHORT} --critic-warmup-steps 0".split()
    assert train_in(tmp_path / "run", warm_start, *flags) == 0 and quick_compile
    more = ["--resume", str(tmp_path / "run"), "--total-episodes", "192"]
    assert train.main(more) == 0 and len(log(tmp_path / "run")) == 3


def test_compile_needs_bf16(warm_start, tmp_path, capsys):
    argv = [*SMALL, "--compile", "--output-dir", str(tmp_path)]
    refused(capsys, argv, "--compile", "--dtype bfloat16", "float32")
