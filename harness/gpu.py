"""What only a GPU makes worth while: attention for decoding, and --compile."""

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

    query (B, H, T, D), key and value (B, G, S, D), attention_mask (B, 1, T, S) bool or None ->
    (B, T, H, D), None. [ours] Given a mask, transformers' own first copies each key H / G times.
    """
    num_rows, num_heads, num_columns, width = query.shape
    if num_columns > 1:
        options = kwargs | {"scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query = query.reshape(num_rows, key.shape[1], num_heads // key.shape[1], width)
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    output = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return output.view(num_rows, 1, num_heads, width), None


GROUPED = "sdpa_grouped"
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def compile_layers(model):
    """A layer at a time: they share their code, so that it is compiled once for all of them."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
