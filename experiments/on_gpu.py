"""What a GPU has to say of this code, in eight minutes and without a download.

    python experiments/on_gpu.py
    python experiments/on_gpu.py --model FOLDER -- --dataset-name FILE --reward math
    python experiments/on_gpu.py --small --output runs/small.jsonl    # tiny: does the script work?

Random models of three sizes, the built-in task, with --model a real one, trained with train.py's
flags. Each part adds a line to --output; one that lacks memory or time is skipped, and says so.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

import train
from experiments import bench, memory
from experiments.scripts import DEVICE, current_commit, new_parser, run_script
from experiments.tables import RESULTS, add_row
from harness.gpu import COMPILED
from harness.setup import autocast, respond
from rollout import Rollout, generate
from tasks import InputError, one_line
from tasks.prompts import PROMPT_IDS

AIMS = {"difference": "< 1e-4", "decoding, compiled": ">= 0.5"}
AIMS |= {"update, compiled, 16384": ">= 0.45", "time, DVPO / PPO": "<= 1.05"}
AIMS |= {"memory, DVPO / PPO": "<= 1.10"}
DECODINGS = {"eager": {}, "compiled": COMPILED}  # settings of generate
MICRO_BATCHES = (4096, 16384)  # tokens; the first is train.py's default
MINUTES = 8


def sizes(args, shape):
    """bench.py's flags for a random model: 64 prompts and responses of 512 tokens, if not tiny."""
    batch, length = (4, 8) if args.small else (16, 64) if shape == "tiny" else (64, 512)
    lengths = {"prompt": length, "response": length, "ragged": False}
    return argparse.Namespace(shape=shape, batch=batch, **lengths)


def random_run(args, shape, flags):
    with tempfile.TemporaryDirectory() as folder:
        return bench.random_run(sizes(args, shape), flags.split(), folder)


def seconds_of(function, *rest, times=1):
    """The median time of a call, and what it gave."""
    found = []
    for _ in range(times):
        start = bench.now()
        result = function(*rest)
        found.append(bench.now() - start)
    return statistics.median(found), result


def collect(run, own, rollouts):
    """train.collect, but of the responses in rollouts; if there are none, it samples and adds."""
    source = respond
    if rollouts:
        first = rollouts[0]
        tensors = (first.input_ids, first.attention_mask, first.mask, first.truncated)
        source = [Rollout(*(tensor.to(run.policy.device) for tensor in tensors))]
    with patch.object(train, "respond", side_effect=source):
        experience, metrics = train.collect(run, own)
    rollouts[:] = [experience.rollout]
    return experience, metrics


def agreement(args, found):
    """An iteration on the CPU, and on the GPU from what the CPU sampled, in fp32."""
    both, rollouts = [], []
    for device in ("cpu", DEVICE):
        run, own = random_run(args, "tiny", f"--dtype float32 --device {device}")
        run.trust_recorded = False  # both score
        experience, metrics = collect(run, own, rollouts)
        torch.manual_seed(0)  # the same minibatches
        metrics |= train.update(run, own, experience)
        both.append({key: float(value) for key, value in metrics.items()})
    off = {key: abs(both[1][key] - x) / (1 + abs(x)) for key, x in both[0].items() if x == x}
    worst = max(off, key=off.get)
    found |= {"difference": off[worst], "most off": worst}


def half_precision(args, found):
    """The first minibatch's ratio under bf16, and how far sampling's log-probs are from scoring."""
    run, own = random_run(args, "small", "--dtype bfloat16")
    run.trust_recorded = True  # the log-probs of sampling come with the responses
    sampled, _ = train.collect(run, own)
    run.trust_recorded = False
    scored, _ = collect(run, own, [sampled.rollout])
    off = (sampled.logprobs - scored.logprobs)[scored.rollout.mask].abs()
    first = scored[torch.arange(own.batch_size // own.num_mini_batches)]
    ratio = train.minibatch_backward(run, own, first, True)["val/ratio"]
    found |= {"|ratio - 1|": abs(ratio.item() - 1)}
    found |= {"sampling off by, mean": off.mean().item(), "sampling off by, most": off.max().item()}


def rates(args):
    """What the card does: FLOP/s of a large bf16 product, bytes/s of a large copy."""
    n, numbers = (256, 2**16) if args.small else (8192, 2**29)
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    source = torch.rand(numbers, device=DEVICE)
    target = torch.empty_like(source)
    seconds_of(torch.mm, a, a, times=3)
    matrix = 2 * n**3 / seconds_of(torch.mm, a, a, times=9)[0]
    return matrix, 8 * numbers / seconds_of(target.copy_, source, times=9)[0]


def decode_shares(run, own, bandwidth, found):
    """Adds {way of decoding: its bytes (weights, keys, values) as a share of the copy bandwidth}.

    A quarter of the steps of a response, about its middle. Every other prompt is padded.
    """
    prompts = torch.tensor(run.data[: own.batch_size][PROMPT_IDS], device=DEVICE)
    steps = own.response_length // 4
    prompts = torch.cat([prompts, prompts[:, : own.response_length // 2 - steps // 2]], dim=1)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1::2, 0] = 0
    config, size = run.policy.config, 2 if run.half else 4
    cached = config.num_hidden_layers * len(prompts) * (prompts.shape[1] + steps / 2)
    bytes_a_step = size * (run.policy.num_parameters() + 2 * cached * memory.widths(config)[2])
    limits = {"max_new_tokens": steps, "eos_token_id": 1, "pad_token_id": 0}
    for name, settings in DECODINGS.items():
        times = []
        clock = lambda ids, logits, times=times: times.append(bench.now()) or logits
        try:
            with torch.no_grad(), autocast(run):
                inputs = (run.sampler, prompts, attention_mask, 1.0, clock)
                generate(*inputs, **limits, **settings)
            step = statistics.median(b - a for a, b in itertools.pairwise(times))
            found |= {f"decoding, {name}": bytes_a_step / step / bandwidth}
            found |= {f"decoding, {name}, ms": 1000 * step}
        except Exception as error:  # a compiler that is not there, each in its own words
            found |= {f"decoding, {name}": f"failed: {one_line(error)[:60]}"}


def update_share(run, own, seconds, matrix):
    """The update's FLOPs as a share of the matrix rate: 6 a weight and token, attention left out.

    The policy's output layer sees responses only; what checkpointing computes again is not counted.
    """
    table = run.policy.get_input_embeddings().weight.numel()
    responses = own.batch_size * own.response_length
    tokens = responses + own.batch_size * len(run.data[0][PROMPT_IDS])
    body = sum(parameter.numel() for parameter in run.policy.parameters())
    body -= table * (1 if run.policy.config.tie_word_embeddings else 2)
    num_critic = body + sum(parameter.numel() for parameter in run.critic.heads.parameters())
    flops = 6 * own.num_ppo_epochs * (tokens * (body + num_critic) + responses * table)
    return flops / seconds / matrix


def one_size(args, found, shape):
    """An update of DVPO beside PPO's on the same responses, without a reference; DVPO's shares."""
    sized, measured, rollouts = sizes(args, shape), [], []
    flags = "--num-ppo-epochs 1 --critic-warmup-steps 0 --kl-coef 0 --dtype bfloat16"
    # On a CPU, compiling takes minutes.
    flags += "" if args.small else " --compile"
    config = bench.config_of(sized)
    formula = lambda own: memory.needs(config, config, own, sized.prompt)["peak"]
    needed = formula(bench.train_flags(sized, flags.split(), "x"))
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else math.inf
    if needed > free:
        found |= {"skipped": f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free"}
        return
    flags += " --gradient-checkpointing" if 1.2 * needed > free else ""
    found |= {"flags": flags}
    with tempfile.TemporaryDirectory() as folder:
        for algo in ("dvpo", "ppo"):
            run, own = bench.random_run(sized, ["--algo", algo, *flags.split()], folder)
            expected = formula(own) / 2**20
            measured.append(one_algorithm(args, found, run, own, rollouts))
            found |= {f"{algo}: peak / formula": measured[-1][1] / expected}
            del run
            gc.collect()
            torch.cuda.empty_cache()
    of_time, of_memory = (a / b if b else None for a, b in zip(*measured))
    found |= {"time, DVPO / PPO": of_time, "memory, DVPO / PPO": of_memory}


def one_algorithm(args, found, run, own, rollouts):
    """Adds what a run's parts take, and DVPO's shares -> the seconds and MiB of its update."""
    is_first = not rollouts
    if is_first:
        found |= {"first collect, s": seconds_of(train.collect, run, own)[0]}  # much compiles
    of_collect, (experience, _) = seconds_of(collect, run, own, rollouts)
    # Of the update alone: the second run samples nothing.
    bench.peak_memory()
    train.update(run, own, experience)
    of_update, _ = seconds_of(train.update, run, own, experience, times=3)
    peak = bench.peak_memory()
    found |= {f"{own.algo}: update, s": of_update}
    if is_first:
        found |= {"collect, s": of_collect}
        shares(args, found, run, own, experience, of_update)
    return of_update, peak


def shares(args, found, run, own, experience, of_update):
    """Adds what the card does, and which share of it updates and decoding reach."""
    matrix, bandwidth = rates(args)
    usual, own.micro_batch_tokens = MICRO_BATCHES
    found |= {"TFLOP/s": matrix / 1e12, "GB/s": bandwidth / 1e9}
    found |= {f"update, compiled, {usual}": update_share(run, own, of_update, matrix)}
    try:
        of_update, _ = seconds_of(train.update, run, own, experience, times=3)
        share = update_share(run, own, of_update, matrix)
    except torch.OutOfMemoryError:
        share = "out of memory"
    found |= {f"update, compiled, {own.micro_batch_tokens}": share}
    decode_shares(run, own, bandwidth, found)


def trained(args, found, name, flags):
    """A run of train.py: adds scores before and after, seconds."""
    folder = args.output.with_suffix(".runs") / name
    if status := train.main([*flags, "--output-dir", str(folder)]):
        raise RuntimeError(f"train.py ended with status {status}")
    results = json.loads((folder / "results.json").read_text())
    for key, before in results["before"].items():
        found[key] = f"{before:.3f} -> {results['after'][key]:.3f}"
    found["seconds"] = results["seconds"]


def parts_of(args):
    """{name: (least seconds that it takes, function of the flags and of what is found)}."""
    parts = {"CPU and GPU": (20, agreement), "bf16": (20, half_precision)}
    shapes = {"tiny": 30} if args.small else {"small": 30, "qwen3-0.6b": 90, "qwen3-1.7b": 150}
    parts |= {name: (s, functools.partial(one_size, shape=name)) for name, s in shapes.items()}
    small = "--total-episodes 16 --batch-size 8 --eval-samples 8"
    task = (small if args.small else "--total-episodes 6400").split()
    parts["built-in task"] = (60, functools.partial(trained, name="task", flags=task))
    if args.model:
        own = ["--model-name-or-path", args.model, *args.flags]
        parts["real model"] = (120, functools.partial(trained, name="model", flags=own))
    return parts


def run_parts(args):
    if DEVICE != "cuda" and not args.small:
        sys.exit("on_gpu.py: expected a GPU, found none; --small tries the script on a CPU")
    if args.flags and not args.model:
        raise InputError("--model: expected one for the flags behind --, found none")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    about = {"device": device, "torch": torch.__version__, "commit": current_commit()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start, table, failed = time.time(), [], False
    for name, (least, part) in parts_of(args).items():
        begin, found = time.time(), {}
        left = 60 * MINUTES - (begin - start)
        try:
            if left < least:
                found |= {"skipped": f"{least} s wanted, {left:.0f} s left"}
            else:
                part(args, found)
        except Exception as error:  # the other parts have answers, too
            failed = True
            found |= {"failed": one_line(error)}
        finally:  # Ctrl-C
            row = {"part": name, **found, "seconds in all": round(time.time() - begin, 1)}
            add_row(args.output, row | about)
        for key, value in found.items():
            value = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.append(f"{name:16}{key:28}{value:20}{AIMS.get(key, '')}")
            print(table[-1], flush=True)
    print(f"\n{device}, commit {about['commit']}, {time.time() - start:.0f} s", *table, sep="\n")
    sys.exit(int(failed))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--output", type=Path, default=RESULTS / "on-gpu.jsonl")
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("flags", nargs="*", help="of train.py for --model, behind --")
    run_script(parser, run_parts)


if __name__ == "__main__":
    main()
