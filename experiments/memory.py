"""How much GPU memory a run needs, by a formula: before one waits for a model to load and fail.

    python experiments/memory.py Qwen/Qwen3-1.7B --prompt 256                             # what stands behind -- are train.py's flags
    python experiments/memory.py Qwen/Qwen3-1.7B --prompt 256 -- --kl-coef 0 --gradient-checkpointing --critic-model-name-or-path Qwen/Qwen3-0.6B

Reads the models' config only (a hub name, or a folder with config.json). Bytes, P a model's parameters:

    held        policy 16 P and critic 16 P (fp32 weight, gradient, Adam's two moments), reference 4 P, bf16 sampler 2 P; a critic's P
                are its trunk's and hidden * N * M for its heads
    update      bf16 casts of the weights in use 2 P; per token of a micro-batch and layer 16 hidden + 2 (3 q + 4 kv + 4 mlp), with
                --gradient-checkpointing 4 hidden and once a whole layer; per response token 4 vocabulary (bf16 logits and their gradient)
    rollout     KV cache: per token of the batch and layer 4 kv (bf16 keys and values)

q and kv are the widths of all query heads and of all key heads together. The peak is held + the larger of update and rollout; allow
some 10 % more for what CUDA and its allocator take. With --dtype float32 there are no casts and no sampler, and the other 2s and 4s of update
and rollout double, but for hidden. A conversation counts as --max-turns responses; a user's turns do not count.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
import train


def count_parameters(config, auto_class=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto_class.from_config(config).num_parameters()


def widths(config):
    """(hidden, all query heads, all key heads, MLP) of a config, in numbers per token."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    return hidden, heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head, getattr(config, "intermediate_size", None) or 4 * hidden


def needs(policy, critic, args, prompt):
    """{part: bytes} of a run with these configs and train.py's flags, and "peak"."""
    half, num_policy, num_critic = args.dtype != "float32", count_parameters(policy), 0
    if args.algo in train.CRITICS:
        num_critic = count_parameters(critic, AutoModel) + math.prod(train.critic_size(args)) * (critic.hidden_size + 1)
    few, response = 2 if half else 4, args.response_length * (args.max_turns if args.user else 1)
    length, per_token, once = prompt + response, 0, 0
    rows = max(1, min(args.micro_batch_size, args.micro_batch_tokens // length, args.batch_size // args.num_mini_batches))
    for config in (policy, critic)[: 1 + (num_critic > 0)]:
        hidden, q, kv, mlp = widths(config)
        layer = 16 * hidden + few * (3 * q + 4 * kv + 4 * mlp)
        kept = config.num_hidden_layers * (4 * hidden if args.gradient_checkpointing else layer)
        if kept > per_token:  # policy and critic take turns
            per_token, once = kept, layer if args.gradient_checkpointing else 0
    parts = {
        "policy": 16 * num_policy,
        "critic": 16 * num_critic,
        "reference": 4 * num_policy if args.kl_coef > 0 else 0,
        "sampler": 2 * num_policy if half else 0,
        "casts": 2 * max(num_policy, num_critic) if half else 0,
        "activations": rows * length * (per_token + once),
        "logits": rows * response * 2 * few * policy.vocab_size,
        "KV cache": args.batch_size * length * policy.num_hidden_layers * 2 * few * widths(policy)[2],
    }
    held = sum(parts[name] for name in ("policy", "critic", "reference", "sampler"))
    return {**parts, "peak": held + max(parts["KV cache"], parts["casts"] + parts["activations"] + parts["logits"])}


def read_config(name):
    try:
        config = AutoConfig.from_pretrained(name)
        widths(config)
        return config
    except Exception as error:  # each library in its own words, and some models have no such widths
        raise rollout.InputError(f"model: cannot read the config of {name!r}: {rollout.one_line(error)}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="train.py's flags stand behind --")
    parser.add_argument("model")
    parser.add_argument("--prompt", type=train.number_in("[1, inf)", int), default=256, help="tokens of a prompt")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    own = parser.parse_args(words[:at])
    own.flags = words[at + 1 :]
    train.run_script(parser, show, own)


def show(own):
    args = train.parse_args(["--model-name-or-path", own.model, *own.flags])
    policy = read_config(own.model)
    critic = read_config(args.critic_model_name_or_path) if args.critic_model_name_or_path else policy
    try:
        found = needs(policy, critic, args, own.prompt)
    except ValueError as error:  # not a causal language model
        raise rollout.InputError(f"model: {rollout.one_line(error)}") from error
    for name, size in found.items():
        print(f"{name:12} {size / 2**30:9.2f} GiB")
    print(f"prompts of {own.prompt} tokens; peak: policy, critic, reference and sampler, and the larger of KV cache and casts + activations + logits")


if __name__ == "__main__":
    main()
