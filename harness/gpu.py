"""What only a GPU makes worth while: attention for decoding, and --compile."""

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

# Of generate: the KV cache has a fixed size, and on a GPU transformers puts what reads it into
# CUDA graphs.
COMPILED = {"cache_implementation": "static"}


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA, but for one new token a row: query heads that share a key then read it once.

    query (B, H, T, D), key (B, G, S, D), value (B, G, S, E), attention_mask (B, 1, T, S), bool, or
    numbers to add, or None -> (B, T, H, E), None. [ours] Given a mask, transformers' own function
    first copies each key H / G times.
    """
    num_rows, num_heads, num_columns, width = query.shape
    if num_columns > 1:
        options = kwargs | {"scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query = query.reshape(num_rows, key.shape[1], num_heads // key.shape[1], width)
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    output = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return output.reshape(num_rows, 1, num_heads, value.shape[-1]), None


GROUPED = "sdpa_grouped"
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def half_copy(model):
    """A copy that decodes: it reads every weight per token, and half of them is half the time."""
    sampler = copy.deepcopy(model).requires_grad_(False)
    for parameter in sampler.parameters():
        # Not .to(): a rotary embedding's buffers stay fp32.
        parameter.data = parameter.data.bfloat16()
    if sampler.config._attn_implementation == "sdpa":
        sampler.set_attn_implementation(GROUPED)
    return sampler


def compile_layers(*models):
    """A layer at a time: they share their code, so that it is compiled once for all of them."""
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
