"""Where an iteration's time and memory go, on train.py's own code, for a model of a given shape with random weights.

    OMP_NUM_THREADS=1 python experiments/bench.py --vary algo=dvpo,ppo                    # 5 M weights, prompt 64, response 64
    OMP_NUM_THREADS=1 python experiments/bench.py --vary algo=dvpo,ppo --ragged           # prompt 16, responses of 8 to 112
    OMP_NUM_THREADS=1 python experiments/bench.py --vary algo=dvpo,ppo --shape tiny --prompt 32 --response 16 --batch 128
    OMP_NUM_THREADS=1 python experiments/bench.py --vary num-quantiles=8,50,200,800
    OMP_NUM_THREADS=1 python experiments/bench.py --vary response=64,256,1024,4096 --batch 2
    python experiments/bench.py --shape qwen3-1.7b --prompt 512 --response 2048 --batch 64 -- --kv-cache static     # a GPU's

update %: matrix products of the update (padding and recomputation not counted) over its time, of the rate of one large product.
decode %: bytes that decoding must read (weights and cache, each step) over the rollout's time, of the rate of one large copy.
--vary NAME=A,B,...: a row per value of one of these flags or of train.py's; what stands behind -- goes to train.py too. Every row
has a process of its own, and they take turns, iteration by iteration: a machine that slows down slows all rows. Medians.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.seeds import current_commit

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 3, 4, 4, 64),
    "small": (256, 1024, 4, 4, 4, 2048),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936),
}
PHASES = ("rollout", "reward", "scoring", "values", "policy", "critic", "rest")  # scoring: log-probs; values: the critic's, before the update


def make_model(args, folder):
    """Saves a random model, a word tokenizer and prompts of --prompt words, as train.py reads them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left").save_pretrained(folder)
    torch.manual_seed(0)
    config = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": args.prompt + args.response + 1,
              "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": vocabulary > 10000}  # fmt: skip
    config = Qwen3Config(head_dim=128, **config) if args.shape.startswith("qwen3") else LlamaConfig(**config)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rng = random.Random(0)
    rows = [{"prompt": " ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(args.prompt))} for _ in range(2 * args.batch + 2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shape_lengths(model, prompt_length, ragged):
    """Makes a random model end its responses as asked: never, or after 8 tokens with probability 1/32 at each."""
    import torch

    vocabulary = model.config.vocab_size
    bias = torch.full((model.config.max_position_embeddings,), -math.inf, device=model.device)
    if ragged:
        bias[prompt_length + 6 :] = math.log((vocabulary - 1) / 31)  # the other logits are near 0

    def hook(module, inputs, kwargs, output):
        output.logits[..., 1] = bias[kwargs["position_ids"][:, -output.logits.shape[1] :]].to(output.logits.dtype)

    model.register_forward_hook(hook, with_kwargs=True)


def lengths_reward(prompts, completions, **columns):
    return [len(completion) % 7 / 7 for completion in completions]


def time_phases(train):
    """Wraps the functions of train.py that make up an iteration -> a dict that collects the seconds spent in each phase."""
    import torch

    seconds, running = dict.fromkeys(PHASES, 0.0), []

    def timed(module, name, phase):
        function = getattr(module, name)

        def wrapper(*rest, **kwargs):
            if running:  # part of another phase
                return function(*rest, **kwargs)
            running.append(name)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                return function(*rest, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[phase] += time.perf_counter() - start
                running.clear()

        setattr(module, name, wrapper)

    for module, name, phase in (
        (train.ro, "sample", "rollout"), (train.ro, "score", "reward"), (train.ro, "response_logprobs", "scoring"),
        (train.ro, "response_quantiles", "values"), (train, "policy_backward", "policy"), (train, "critic_backward", "critic"),
    ):  # fmt: skip
        timed(module, name, phase)
    return seconds


def rates(device, dtype):
    """What the machine can do at best: (FLOP/s of a large matrix product, bytes/s moved by a large copy, read and written)."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    other = torch.empty_like(big)

    def seconds(function):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * size**3 / seconds(lambda: torch.matmul(a, b)), 2 * 4 * big.numel() / seconds(lambda: other.copy_(big))


def work_done(state, args, rollout):
    """(FLOP of the update's matrix products, without recomputation; bytes that decoding must read), by the usual counts."""
    config, tokens, responses = state.policy.config, rollout.lengths.sum(1).double(), rollout.lengths[:, 1].double()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    trunk = sum(p.numel() for p in state.policy.base_model.parameters()) - config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * tokens.square().sum()  # q k and its use, causal half
    heads = config.vocab_size * config.hidden_size + (state.critic.heads.weight.numel() if state.critic is not None else 0)
    models = 1 if state.critic is None else 2
    flop = 3 * args.num_ppo_epochs * (models * (2 * trunk * tokens.sum() + attention) + 2 * heads * responses.sum())
    size = next(state.sampler.parameters()).element_size()
    steps = rollout.mask.shape[1]
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * len(tokens) * (steps * rollout.lengths[:, 0].max() + steps**2 / 2)
    return float(flop), float(size * (steps * (trunk + config.vocab_size * config.hidden_size) + cache))


def peak_memory():
    """Bytes: the most that this process held on the GPU, or in RAM on Linux, since the last call; 0 elsewhere."""
    import torch

    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    if not Path("/proc/self/clear_refs").exists():
        return 0
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is held now
    return peak


def held_memory():
    peak_memory()
    return peak_memory()


def told_to_go_on(connection):
    with contextlib.suppress(EOFError):  # the parent has ended
        return connection.recv()
    return False


def worker(connection, args, flags):
    """One row's process: builds a run as train.py does, then one iteration for each message -> {phase: seconds, ...}."""
    import torch
    import transformers

    import train

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train.datasets.disable_progress_bars()
    held = held_memory()  # imports are not an iteration's
    with tempfile.TemporaryDirectory() as folder:
        make_model(args, Path(folder))
        train_args = train.parse_args([
            "--model-name-or-path", folder, "--dataset-name", f"{folder}/prompts.jsonl", "--reward", "experiments.bench:lengths_reward",
            "--batch-size", str(args.batch), "--response-length", str(args.response), "--eval-samples", "1", "--output-dir", folder, *flags,
        ])  # fmt: skip
        state = train.build(train_args)
    for model in {state.policy, state.sampler, state.reference or state.policy}:
        shape_lengths(model, args.prompt, args.ragged)
    machine, seconds = None, time_phases(train)
    state.iteration = train_args.critic_warmup_steps
    while told_to_go_on(connection):
        seconds.update(dict.fromkeys(PHASES, 0.0))
        machine = machine or rates(state.policy.device, torch.bfloat16 if state.half else torch.float32)  # the other rows rest now
        peak_memory()
        start = time.perf_counter()
        experience, _ = train.collect(state, train_args)
        train.update(state, train_args, experience)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        total = time.perf_counter() - start
        seconds["rest"] = total - sum(seconds.values())
        tokens = int(experience["rollout"].mask.sum())
        flop, read = work_done(state, train_args, experience["rollout"])
        update = seconds["policy"] + seconds["critic"]
        efficiency = {"update %": 100 * flop / update / machine[0], "decode %": 100 * read / seconds["rollout"] / machine[1]}
        connection.send({**seconds, "total": total, "tokens/s": tokens / total, "peak MiB": (peak_memory() - held) / 2**20, **efficiency})


def start(target, args, flags):
    """A worker in a process of its own -> the connection over which it takes True for one more iteration, False for the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=target, args=(there, args, flags)).start()
    there.close()
    return here


def measure(rows, iterations):
    """{name: connection to its worker} -> {name: {column: median}}; the rows take turns, the first two turns do not count."""
    from tqdm import tqdm

    found = {name: [] for name in rows}
    for turn in tqdm(range(iterations + 2), desc="turns", leave=False):
        for name, connection in rows.items():
            try:
                connection.send(True)
                result = connection.recv()
            except (EOFError, OSError):
                sys.exit(f"bench: {name} failed, see above")
            if turn > 1:
                found[name].append(result)
    for connection in rows.values():
        connection.send(False)
    return {name: {column: statistics.median(row[column] for row in results) for column in results[0]} for name, results in found.items()}


def print_table(title, table):
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{title}\n{device}, torch {torch.__version__}, transformers {transformers.__version__}, commit {current_commit()}; seconds per iteration, medians\n")
    columns, first = list(next(iter(table.values()))), next(iter(table.values()))
    print(f"{'':24}" + "".join(f"{name:>10}" for name in columns) + f"{'time':>8}{'memory':>8}")
    for name, row in table.items():
        cells = "".join(f"{row[column]:10.0f}" if row[column] >= 100 else f"{row[column]:10.3f}" for column in columns)
        print(f"{name:24}{cells}" + "".join(f"{row[column] / first[column]:7.3f}x" for column in ("total", "peak MiB")))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="\n".join(__doc__.split("\n")[1:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompt", type=int, help="tokens; default 64, or 16 if --ragged")
    parser.add_argument("--response", type=int, help="most tokens; default 64, or 112 if --ragged")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ragged", action="store_true", help="responses end after 8 tokens or more, with probability 1/32 at each")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--vary", default="algo=dvpo", help="NAME=VALUE,VALUE,...")
    parser.add_argument("flags", nargs="*", help="flags of train.py, behind --")
    return parser


def with_lengths(args):
    for name, equal, ragged in (("prompt", 64, 16), ("response", 64, 112)):
        if getattr(args, name) is None:
            setattr(args, name, ragged if args.ragged else equal)
    return args


def main():
    args = make_parser().parse_args()
    rows, (name, _, values) = {}, args.vary.partition("=")
    for value in values.split(","):
        own, flags = argparse.Namespace(**vars(args)), list(args.flags)
        if name in ("shape", "prompt", "response", "batch"):
            own = make_parser().parse_args([f"--{name}", value], own)
        else:
            flags += [f"--{name}", value]
        rows[f"{name} {value}"] = start(worker, with_lengths(own), flags)
    table = measure(rows, args.iterations)
    print_table(" ".join(["bench.py", *sys.argv[1:]]), table)


if __name__ == "__main__":
    main()
