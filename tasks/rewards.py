"""Reward functions: where they come from, and a call of one whose result is checked."""

import contextlib
import functools
import importlib
import inspect
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, pipeline

from tasks import SAFE, WEIGHTS, InputError, as_messages, naming, one_line, users_code
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS
from tasks.verifiers import VERIFIERS

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = {"critic", "risk", "dvpo", "rollout", "train", "tasks", "harness", "experiments"}


def take_out(names):
    return {key: sys.modules.pop(key) for key in [*sys.modules] if key.partition(".")[0] in names}


def import_theirs(name):
    """A user's module, from the working folder first; what it imports may have names of ours."""
    names = OURS if (here := Path.cwd()) != REPOSITORY else ()
    shared = {n for n in names if (here / f"{n}.py").exists() or any((here / n).glob("**/*.py"))}
    ours, before = take_out(shared), [*sys.path]
    # A package of ours would win over a folder of theirs without an __init__.py.
    sys.path[:] = [str(here)] + [p for p in before if Path(p).resolve() != REPOSITORY]
    try:
        return importlib.import_module(name)
    finally:
        # Theirs is the last from now on: it may import more when it is called.
        sys.path[:] = before + [place for place in sys.path if place not in before]
        take_out(shared)
        sys.modules.update(ours)


def load_function(flag, spec, expected="module:function"):
    """module:function, the module found from the working folder on; raises InputError."""
    module, _, name = spec.partition(":")
    if not (module and name):
        raise InputError(f"{flag}: expected {expected}, found {spec!r}")
    with users_code(f"{flag}: cannot load {spec!r}"):
        function = getattr(import_theirs(module), name)
        inspect.signature(function)  # is it one?
    return function


def load_reward(spec, device="cpu"):
    """The reward of math, choice, exact, model:NAME or module:function; raises InputError."""
    if spec in VERIFIERS:
        return VERIFIERS[spec]
    if not spec.startswith("model:"):
        return load_function("--reward", spec, "math, choice, exact, model:NAME or module:function")
    with naming(f"--reward: cannot load {spec!r}"):
        return model_reward(spec.removeprefix("model:"), device)


def judged_text(prompt, completion, tokenizer):
    """A prompt and a response as a reward model reads them, by its chat template if it has one."""
    messages = as_messages(prompt) + as_messages(completion, "assistant")
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def model_reward(name, device="cpu"):
    """A reward that scores with a sequence classifier; raises ValueError for another model."""
    model, loaded = AutoModelForSequenceClassification.from_pretrained(name, **WEIGHTS)
    classify = pipeline("text-classification", model, tokenizer=name, device=device, **SAFE)
    tokenizer, config = classify.tokenizer, model.config
    if loaded["missing_keys"]:  # transformers makes them up
        found = f"{config.architectures} without {min(loaded['missing_keys'])}"
        raise ValueError(f"expected a sequence classifier, found {found}")
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"  # the judged turn is the last one
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id  # a decoder finds its last real token by it
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
    # RoBERTa's positions begin behind the id of its padding.
    tables = [part for part in model.modules() if getattr(part, "num_embeddings", 0) == context]
    starts = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    tokenizer.model_max_length = min(tokenizer.model_max_length, context - max(starts, default=0))
    return functools.partial(classifier_scores, classify)


def classifier_scores(classify, prompts, completions, **columns):
    """A classifier's one logit, or the probability of its last label, for each completion."""
    tokenizer, labels = classify.tokenizer, classify.model.config.id2label
    texts = [judged_text(*pair, tokenizer) for pair in zip(prompts, completions)]
    options = {"function_to_apply": "none" if len(labels) == 1 else "softmax", "top_k": None}
    options |= {"add_special_tokens": not tokenizer.chat_template, "truncation": True}
    last, found = labels[len(labels) - 1], classify(texts, batch_size=16, **options)
    return [one["score"] for row in found for one in row if one["label"] == last]


def score(reward, batch, completions, answer="answer"):
    """The scores of completions: (B,) fp32; answer: the column that the reward sees as `answer`."""
    ours = ("prompt", "prompts", "completions", "answer", PROMPT_IDS, PSEUDO_LABEL)
    columns = {name: list(batch[name]) for name in batch if name not in ours}
    if answer in batch:
        columns["answer"] = list(batch[answer])
    prompts, shaped = list(batch["prompt"]), []
    for prompt, said in zip(prompts, completions):
        shaped.append(said if isinstance(prompt, str) else as_messages(said, "assistant"))
    with users_code("--reward"):
        scores = reward(prompts=prompts, completions=shaped, **columns)
        return torch.tensor(numbers_in(scores, batch["prompt"]))


def numbers_in(scores, prompts):
    """A reward's scores as floats that fp32 holds; raises InputError for the first that is none."""
    is_list = isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) == 1
    if not is_list or len(scores) != len(prompts):
        found = f"{len(scores)} values" if is_list else type(scores).__name__
        raise InputError(f"--reward: expected a list of {len(prompts)} numbers, found {found}")
    numbers = [math.nan] * len(scores)
    for row, value in enumerate(scores):
        # float() reads texts, and drops what is imaginary.
        is_other = isinstance(value, (str, bytes)) or "complex" in str(getattr(value, "dtype", ""))
        with contextlib.suppress(Exception):  # as many kinds as there are libraries
            numbers[row] = math.nan if is_other else float(value)
        if not abs(numbers[row]) < 3e38:  # NaN is not less
            prompt = one_line(as_messages(prompts[row])[-1]["content"])[:60]
            found = f"expected a finite number, found {str(value)[:80]!r}"
            raise InputError(f"--reward: row {row} of the batch, {prompt!r}: {found}")
    return numbers
