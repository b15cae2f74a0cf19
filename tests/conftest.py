"""Fixtures that several test modules share: tiny models with a real tokenizer on disk."""

import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a defect

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import train
from tasks.builtin import task_tokenizer
from tasks.warm_start import warm_start as make_warm_start

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

FAMILIES = ("gpt2", "llama")


def dice(prompts, **columns):
    """A reward that is all chance, from generators that are not torch's."""
    return [random.random() + numpy.random.rand() for _ in prompts]


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


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """The built-in model of seed 0, made once."""
    folder = tmp_path_factory.mktemp("warm") / "warm_start"
    make_warm_start("dialogue", 0, folder)
    return folder
