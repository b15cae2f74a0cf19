"""Fixtures that several test modules share: tiny models with a real tokenizer on disk."""

import copy
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a defect

import numpy
import pytest
import torch
import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import train
from critic import QuantileCritic
from harness import setup
from harness.checkpoints import newest_checkpoint
from harness.flags import parse_args
from harness.setup import build
from tasks.builtin import task_rows, task_tokenizer
from tasks.warm_start import warm_start as make_warm_start

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

REPOSITORY = Path(__file__).parent.parent
FAMILIES = ("gpt2", "llama")
# A run of seconds: noise off, so that the reward's rise is not luck.
SMALL = """
    --total-episodes 1536 --batch-size 64 --micro-batch-size 48 --num-ppo-epochs 2
    --num-mini-batches 2 --critic-warmup-steps 1 --num-quantiles 16 --num-heads 2 --eval-samples 384
    --learning-rate 2e-4 --critic-learning-rate 1e-3 --reward-noise-fp 0 --reward-noise-fn 0
    --response-length 12
""".split()
# One step an iteration, for what is not about steps.
ONCE = "--num-ppo-epochs 1 --num-mini-batches 1".split()
# One iteration with a model and data of one's own.
MODEL = """
    --total-episodes 8 --batch-size 8 --micro-batch-size 3 --response-length 4
    --num-quantiles 8 --critic-warmup-steps 0 --eval-samples 2
""".split()
# Of masked tensors, for hypothesis.
SHAPES = {"batch": st.integers(1, 4), "length": st.integers(1, 7), "seed": st.integers(0, 2**31)}

# What a row of results may not hold.
DAMAGED = [
    *({when: value} for when in ("before", "after") for value in (None, 3, [1], {"a": "x"})),
    *({"after": {"in domain, greedy": value}} for value in (None, True, [0.5])),
    {"seed": "0"},
    {"seed": None},
    {"flags": 7},
    {"method": 7},
    {"noise": ["none"]},
    {"ev": ["x"]},
    {"ev": 7},
    {"ev": {}},
]


def slow(*values):
    """Values of a parametrised test that run with -m slow: another of their kind runs always."""
    return pytest.param(*values, marks=pytest.mark.slow)


def dice(prompts, **columns):
    """A reward that is all chance, from generators that are not torch's."""
    return [random.random() + numpy.random.rand() for _ in prompts]


def few_rows(task, split, num_rows, seed):
    """task_rows, for a warm start of which nobody reads what it has learned."""
    return task_rows(task, split, min(num_rows, 64), seed)


def train_and_exit(argv, out):
    """What a process of its own runs; out: the file that gets its standard output."""
    with open(out, "w") as sys.stdout:
        sys.exit(train.main(argv))


def tiny_config(family, vocab_size=40):
    if family == "gpt2":  # learned positions, and dropout on by default
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            eos_token_id=1,
            bos_token_id=2,
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.2,
    )


def bos_tokenizer(template=None):
    """A word tokenizer that puts <bos> before every text, as Llama's does."""
    words = ["<unk>", "<bos>", "hello", "there", "[user]"]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<bos>", 1)]
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def favour(model, token, bonus):
    """Makes a token likelier, through a bias on the head."""
    bias = torch.zeros(model.config.vocab_size)
    bias[token] = bonus
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output + bias)
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    """A random causal LM of either family, sharp enough that positions and masks matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(request.param))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A GPT-2-like model with the dialogue task's tokenizer, as from_pretrained reads it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = task_tokenizer("dialogue")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("gpt2", len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def made_once(tmp_path_factory, name, make):
    """A folder that make(folder) has filled, once for all of pytest-xdist's processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, is_made = root / name, root / f"{name}.made"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made.exists():
            make(folder)
            is_made.touch()
    return folder


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """The built-in model of seed 0, made once."""
    make = lambda folder: make_warm_start("dialogue", 0, folder)
    return made_once(tmp_path_factory, "warm_start", make)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, warm_start):
    """The folder of a run of 24 iterations, with checkpoints of iterations 12 and 24."""

    def make(folder):
        assert train_in(folder, warm_start, "--save-steps", "12") == 0

    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session", autouse=True)
def remembered_prompts():
    """A built-in task's prompts with their ids, which nobody changes, are made once a process."""
    known, load_prompts = {}, setup.load_prompts

    def remembered(flag, *where, tokenizer, **options):
        if flag != "--task":
            return load_prompts(flag, *where, tokenizer=tokenizer, **options)
        words = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
        key = (*where, *words, *sorted(options.items()))
        if key not in known:
            known[key] = load_prompts(flag, *where, tokenizer=tokenizer, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_prompts", remembered)
        yield


# ---- runs


def train_in(folder, warm_start, *flags):
    """train.main in process; the exit status."""
    if not (folder / "warm_start").exists():
        shutil.copytree(warm_start, folder / "warm_start")
    return train.main([*SMALL, "--output-dir", str(folder), *flags])


def own(model_folder, data, reward):
    """The flags of a run of seconds with a model, data and a reward of one's own."""
    flags = f"--model-name-or-path {model_folder} --dataset-name {data} --reward {reward}"
    return [*MODEL, *flags.split()]


class Noting:
    """Flags of which is noted what is read."""

    def __init__(self, args):
        self.args, self.read = args, {}

    def __getattr__(self, name):
        self.read[name] = getattr(self.args, name)
        return self.read[name]


BUILT = []


def built(args):
    """build(args) on the warm start of its seed, as a copy where all flags that it reads are equal.

    For what does not change what build does: it takes a second, and a copy nearly nothing.
    """
    for read, run in BUILT:
        if all(vars(args)[name] == value for name, value in read.items()):
            return copy.deepcopy(run)
    noting = Noting(args)
    run = build(noting)
    # There is the same warm start.
    assert noting.read.pop("output_dir")
    BUILT.append((noting.read, run))
    return copy.deepcopy(run)


def run_of(warm_start, folder, *flags, build=built):
    """A Run before its first iteration, and its flags."""
    if not (folder / "warm_start").exists():
        shutil.copytree(warm_start, folder / "warm_start")
    args = parse_args([*SMALL, "--output-dir", str(folder), *flags])
    return build(args), args


def refused(capsys, argv, *words):
    """train.main exits with 2 after one line on stderr that holds the words."""
    try:
        status = train.main(argv)
    except SystemExit as error:
        status = error.code
    lines = re.split("[\r\n]", capsys.readouterr().err)  # \r: progress bars
    lines = [line for line in lines if line.startswith("train.py: error: ")]
    assert status == 2 and len(lines) == 1, (status, lines)
    assert all(word in lines[0] for word in words), lines


def script(*words):
    """A process of its own: python with these words, in the repository."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def refused_by(script, capsys, monkeypatch, *words):
    """The one line with which a script of experiments/ ends, status 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1, said
    return said[0]


def some_of(source, target, *names):
    """Copies files and folders of these names from one folder to another."""
    for name in names:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, target / name)


def log(folder):
    """The metrics without those that are clocks."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["eps"], row["tps"]
    return rows


def weights(folder):
    """Every number of the policy and the critic of a checkpoint, or of a run's newest one."""
    folder = folder if (folder / "policy").exists() else newest_checkpoint(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    critic = QuantileCritic.from_pretrained(folder / "critic")
    return torch.cat([p.flatten() for model in (policy, critic) for p in model.parameters()])


def write_rows(path, rows):
    """A jsonl file -> its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count=12, **extra):
    return [{**row, **extra} for row in task_rows("dialogue", "train", count, 0)]


# ---- masked tensors


def ragged_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def random_mask(generator, batch, length):
    """Any mask: gaps, empty rows, full rows."""
    return torch.rand(batch, length, generator=generator) < 0.7


def hidden(tensor, mask):
    """The tensor with NaN wherever mask (B, T) is False."""
    return torch.where(mask.view(*mask.shape, *[1] * (tensor.dim() - 2)), tensor, float("nan"))


def padded(tensor, columns=50, fill=float("nan")):
    """The tensor with garbage in further columns (dim 1)."""
    fill = 0 if tensor.dtype == torch.bool else fill
    extra = torch.full((tensor.shape[0], columns, *tensor.shape[2:]), fill).to(tensor.dtype)
    return torch.cat([tensor, extra], dim=1)
