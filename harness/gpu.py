"""What only a GPU makes worth while: attention for decoding, and --compile."""

import copy

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

# Of generate: a KV cache of fixed size, which transformers reads in CUDA graphs on a GPU.
COMPILED = {"cache_implementation": "static"}


def grouped_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA, but for one new token a row: query heads that share a key then read it once.

    query (B, H, T, D), key (B, G, S, D), value (B, G, S, E), attention_mask (B, 1, T, S) or None,
    scaling a keyword -> (B, T, H, E), None. [ours] transformers first copies each key H / G times.
    """
    (num_rows, num_heads, num_columns, width), groups = query.shape, key.shape[1]
    if num_columns > 1 or groups == num_heads or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query = query.reshape(num_rows, groups, num_heads // groups, width)
    output = sdpa(query, key, value, attention_mask, scale=kwargs.get("scaling"))
    return output.reshape(num_rows, 1, num_heads, value.shape[-1]), None


# Under its own name, which some models ask for: and so what decodes is what a run checks at first.
AttentionInterface.register("sdpa", grouped_attention)
# cuDNN's, which PyTorch takes on an H100, can have NaN gradients: pytorch/pytorch issue 196678.
torch.backends.cuda.enable_cudnn_sdp(False)


def half_copy(model):
    """A copy that decodes: it reads every weight per token, and half of them is half the time."""
    sampler = copy.deepcopy(model).requires_grad_(False)
    for parameter in sampler.parameters():
        # Not .to(): a rotary embedding's buffers stay fp32.
        parameter.data = parameter.data.bfloat16()
    return sampler


def compile_layers(*models):
    """A layer at a time: they share their code, and it is compiled once for all. None: left out."""
    # With and without padding, with gradients and without, of all models; the usual limit is 8.
    torch._dynamo.config.recompile_limit = 64
    for module in (module for model in filter(None, models) for module in model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
