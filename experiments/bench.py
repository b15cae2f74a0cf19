"""Where an iteration's time and memory go, on train.py's own code, for a random model.

    OMP_NUM_THREADS=1 python experiments/bench.py --vary algo=dvpo,ppo    # 5 M weights; or --ragged

--vary NAME=A,B,...: a row per value of one of these flags or of train.py's; what stands behind --
goes to train.py too. Every row has a process of its own, and they take turns, iteration by
iteration: a machine that slows down slows all rows. Medians.
"""

import contextlib
import copy
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

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import trange

import train
from experiments.scripts import COUNT, DEVICE, current_commit, new_parser
from harness.flags import parse_args
from harness.reports import quiet
from harness.setup import build

SIZES = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads"
SIZES = f"{SIZES} num_key_value_heads head_dim vocab_size".split()
SHAPES = {
    "tiny": ("llama", 64, 128, 3, 4, 4, 16, 64),
    "small": ("llama", 256, 1024, 4, 4, 4, 64, 2048),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936),
}
# Functions of train.py, and the phase that each is. scoring: log-probs; values: the critic's.
TIMED = {
    "respond": "rollout",
    "judge": "reward",
    "response_logprobs": "scoring",
    "response_quantiles": "values",
    "policy_backward": "policy",
    "critic_backward": "critic",
}


def config_of(args):
    """The transformers config of --shape, with room for --prompt and --response."""
    sizes = dict(zip(SIZES, SHAPES[args.shape]))
    sizes |= {"max_position_embeddings": args.prompt + args.response + 1}
    sizes |= {"tie_word_embeddings": sizes["vocab_size"] > 10000}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return transformers.AutoConfig.for_model(**sizes, **special)


def make_model(args, folder):
    """Saves a random model, a word tokenizer and prompts of --prompt words for train.py."""
    torch.manual_seed(0)
    config = config_of(args)
    with torch.device(DEVICE):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, config.vocab_size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    fast.save_pretrained(folder)
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(words[2:], k=args.prompt)) for _ in range(2 * args.batch + 2)]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))


def shape_lengths(model, prompt_length, ragged):
    """Makes a random model end its responses as asked: never, or after 8 tokens at 1/32 each."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    bias = torch.full((context,), -math.inf, device=model.device)
    if ragged:
        bias[prompt_length + 6 :] = math.log((vocabulary - 1) / 31)  # other logits are near 0

    def hook(module, inputs, kwargs, output):
        if not hasattr(output, "logits"):  # TRL's GRPO scores without
            return
        at = kwargs["position_ids"][:, -output.logits.shape[1] :]
        output.logits[..., 1] = bias[at].to(output.logits.dtype)

    model.register_forward_hook(hook, with_kwargs=True)


def lengths_reward(prompts, completions, **columns):
    return [len(completion) % 7 / 7 for completion in completions]


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, phase, seconds, running):
    """The function, but it adds its time to seconds[phase]."""

    def wrapper(*rest, **kwargs):
        if running:  # part of another phase
            return function(*rest, **kwargs)
        running.append(phase)
        start = now()
        result = function(*rest, **kwargs)
        seconds[phase] += now() - start
        running.clear()
        return result

    return wrapper


def peak_memory():
    """MiB: the most held since the last call, on the GPU or in RAM on Linux; 0 elsewhere."""
    peak, process = 0, Path("/proc/self")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    elif (process / "clear_refs").exists():
        peak = int((process / "status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
        (process / "clear_refs").write_text("5")  # the peak begins anew, at what is held now
    return peak


def train_flags(args, flags, folder):
    """train.py's flags, for the random model in a folder."""
    own = f"--model-name-or-path {folder} --dataset-name {folder}/prompts.jsonl"
    own += f" --reward experiments.bench:lengths_reward --output-dir {folder} --eval-samples 1"
    own += f" --batch-size {args.batch} --response-length {args.response}"
    return parse_args([*own.split(), *flags])


def random_run(args, flags, folder):
    """A random model of --shape, made if the folder has none: its Run, and train.py's flags."""
    if not (Path(folder) / "config.json").exists():
        make_model(args, Path(folder))
    train_args = train_flags(args, flags, folder)
    run = build(train_args)
    for model in {run.policy, run.sampler, run.reference or run.policy}:
        shape_lengths(model, args.prompt, args.ragged)
    run.iteration = train_args.critic_warmup_steps
    return run, train_args


def worker(connection, held, args, flags):
    """A run as train.py builds it; for each message an iteration -> seconds, MiB beyond held."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        run, train_args = random_run(args, flags, folder)
    seconds, running = {}, []
    for name, phase in TIMED.items():
        setattr(train, name, timed(vars(train)[name], phase, seconds, running))
    while True:
        connection.recv()
        seconds.update(dict.fromkeys(TIMED.values(), 0.0))
        peak_memory()
        start = now()
        experience, _ = train.collect(run, train_args)
        train.update(run, train_args, experience)
        total, memory = now() - start, peak_memory() - held
        rest, tokens = total - sum(seconds.values()), int(experience.rollout.mask.sum())
        found = {"rest": rest, "total": total, "tokens/s": tokens / total, "peak MiB": memory}
        connection.send({**seconds, **found})


def until_closed(worker, connection, args, flags):
    """One row's process, which ends with the other end of its connection."""
    peak_memory()
    held = peak_memory()  # imports are not an iteration's
    with contextlib.suppress(EOFError):
        worker(connection, held, args, flags)


def start(worker, args, flags):
    """A worker's process -> the connection over which it takes a message for each iteration."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=until_closed, args=(worker, there, args, flags)).start()
    there.close()
    return here


def measure(rows, iterations):
    """{name: connection to its worker} -> {name: {column: median}}; two turns do not count."""
    found = {name: [] for name in rows}
    for _ in trange(iterations + 2, desc="turns", leave=False):
        for name, connection in rows.items():
            try:
                connection.send(None)
                found[name].append(connection.recv())
            except (EOFError, OSError):
                sys.exit(f"bench: {name} failed, see above")
    for name, results in found.items():
        rows[name].close()
        found[name] = {c: statistics.median(row[c] for row in results[2:]) for c in results[0]}
    return found


def print_table(table):
    first = next(iter(table.values()))
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    print(f"{device}, {versions}, commit {current_commit()}; seconds per iteration, medians\n")
    heads = "".join(f"{name:>10}" for name in first)
    print(f"{'':24}{heads}{'time':>8}{'memory':>8}")
    for name, row in table.items():
        cells = [f"{value:10.{0 if value >= 100 else 3}f}" for value in row.values()]
        cells += [f"{row[column] / first[column]:7.3f}x" for column in ("total", "peak MiB")]
        print(f"{name:24}" + "".join(cells))


def make_parser():
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompt", type=COUNT, default=64, help="tokens; 16 if --ragged")
    parser.add_argument("--response", type=COUNT, default=64, help="most tokens; 112 if --ragged")
    parser.add_argument("--batch", type=COUNT, default=32)
    parser.add_argument("--ragged", action="store_true", help="responses end at random, from 8 on")
    parser.add_argument("--iterations", type=COUNT, default=5)
    parser.add_argument("--vary", default="algo=dvpo", help="NAME=VALUE,VALUE,...")
    parser.add_argument("flags", nargs="*", help="flags of train.py, behind --")
    if "--ragged" in sys.argv:
        parser.set_defaults(prompt=16, response=112)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    rows, (name, _, values) = {}, args.vary.partition("=")
    for value in values.split(","):
        own, words = copy.copy(args), [f"--{name}", value]
        if name in vars(args):
            parser.parse_args(words, own)
        flags = args.flags if name in vars(args) else [*args.flags, *words]
        rows[f"{name} {value}"] = start(worker, own, flags)
    print_table(measure(rows, args.iterations))


if __name__ == "__main__":
    main()
