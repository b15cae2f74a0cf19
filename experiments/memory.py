"""How much GPU memory a run needs, by a formula: before one waits for a model to load and fail.

    python experiments/memory.py Qwen/Qwen3-1.7B --prompt 256 -- --kl-coef 0    # train.py's flags

Reads the models' config only (a hub name or folder). Bytes, P a model's parameters:

    held     policy 16 P and critic 16 P (fp32 weight, gradient, Adam's two moments), reference 4 P,
             bf16 sampler 2 P; a critic's P are its trunk's and hidden * N * M for its heads
    update   bf16 casts of the weights in use 2 P; per token of a micro-batch and layer 16 hidden +
             2 (3 q + 4 kv + 4 mlp), with --gradient-checkpointing 4 hidden and once a whole layer;
             per response token 4 vocabulary (bf16 logits and their gradient)
    rollout  KV cache: per token of the batch and layer 4 kv (bf16 keys and values)

q and kv: the widths of all query heads and of all key heads. The peak is held + the larger of
update and rollout; allow 10 % more for CUDA. With --dtype float32 there are no casts and no
sampler, and the other 2s and 4s of update and rollout double, but for hidden. A conversation
counts as --max-turns responses without its user's turns.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from experiments.scripts import COUNT, new_parser, refuse, run_script
from harness.flags import ALGORITHMS, parse_args
from tasks import SAFE, naming


def count_parameters(config, auto_class=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto_class.from_config(config).num_parameters()


def widths(config):
    """(hidden, all query heads, all key heads, MLP) of a config, in numbers per token."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    return hidden, heads * head, key_heads * head, mlp


def kept_for_backward(config, few, checkpointing):
    """Bytes per token of what a model keeps, and of one layer while it is computed again."""
    hidden, q, kv, mlp = widths(config)
    layer = 16 * hidden + few * (3 * q + 4 * kv + 4 * mlp)
    kept = 4 * hidden if checkpointing else layer
    return config.num_hidden_layers * kept, layer * checkpointing


def needs(policy, critic, args, prompt):
    """{part: bytes} of a run with these configs and train.py's flags, and "peak"."""
    half, kind = args.dtype != "float32", ALGORITHMS[args.algo].critic
    few, num_policy, num_critic, configs = 2 if half else 4, count_parameters(policy), 0, [policy]
    if kind != "none":
        heads = 1 if kind == "scalar" else args.num_heads
        outputs = heads * (args.num_quantiles if kind == "quantiles" else 1)
        num_critic = count_parameters(critic, AutoModel) + outputs * (critic.hidden_size + 1)
        configs.append(critic)
    response = args.response_length * (args.max_turns if args.user else 1)
    length, minibatch = prompt + response, args.batch_size // args.num_mini_batches
    rows = max(1, min(args.micro_batch_size, args.micro_batch_tokens // length, minibatch))
    # Policy and critic take turns.
    kept = max(kept_for_backward(each, few, args.gradient_checkpointing) for each in configs)
    held = {"policy": 16 * num_policy, "critic": 16 * num_critic}
    held["reference"] = 4 * num_policy if args.kl_coef > 0 else 0
    held["sampler"] = 2 * num_policy if half else 0
    update = {
        "casts": 2 * max(num_policy, num_critic) if half else 0,
        "activations": rows * length * sum(kept),
        "logits": rows * response * 2 * few * policy.vocab_size,
    }
    cache = policy.num_hidden_layers * args.batch_size * length * 2 * few * widths(policy)[2]
    peak = sum(held.values()) + max(cache, sum(update.values()))
    return {**held, **update, "KV cache": cache, "peak": peak}


def read_config(name):
    with naming(f"model: cannot read the config of {name!r}"):
        config = AutoConfig.from_pretrained(name, **SAFE)
        widths(config), count_parameters(config)  # not every model has such widths
    return config


def show(own):
    refuse(own.flags, "resume|output-dir|model-name-or-path")
    # By default a run might go where the model is, and be refused.
    args = parse_args(["--output-dir=-", "--model-name-or-path", own.model, *own.flags])
    names = (own.model, args.critic_model_name_or_path or own.model)
    for name, size in needs(*map(read_config, names), args, own.prompt).items():
        print(f"{name:12} {size / 2**30:9.2f} GiB")
    print("peak: the first four, and the larger of KV cache and casts + activations + logits")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=COUNT, default=256, help="tokens")
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    run_script(parser, show)


if __name__ == "__main__":
    main()
