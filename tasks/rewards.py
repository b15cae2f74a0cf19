"""Reward functions: where they come from, and a call of one whose result is checked."""

import contextlib
import functools
import importlib.machinery
import inspect
import os
import sys
from pathlib import Path

import torch
from transformers import pipeline

from tasks import InputError, one_line, raised
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS, as_messages
from tasks.verifiers import choice_reward, exact_reward, math_reward

VERIFIERS = {"math": math_reward, "choice": choice_reward, "exact": exact_reward}
REPOSITORY = Path(__file__).resolve().parent.parent
OURS = ("critic", "risk", "dvpo", "rollout", "train", "tasks", "harness", "experiments")
THEIRS = {}  # {working folder: its modules with a name of ours}, while ours are in place


def take_out(names):
    """Takes modules of these names, and those inside them, from sys.modules -> {name: module}."""
    inside = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in inside}


@contextlib.contextmanager
def imports_from(folder):
    """Imports inside look in folder first, also for modules with names of ours."""
    names = [] if Path(folder).resolve() == REPOSITORY else OURS
    names = [name for name in names if importlib.machinery.PathFinder.find_spec(name, [folder])]
    ours = take_out(names)
    sys.modules.update(THEIRS.get(folder, {}))
    before = [*sys.path]
    sys.path.insert(0, folder)
    if names:  # a package of ours would win over a folder of theirs without an __init__.py
        sys.path[:] = [place for place in sys.path if Path(place).resolve() != REPOSITORY]
    try:
        yield
    finally:
        sys.path[:] = before + [place for place in sys.path if place not in (folder, *before)]
        THEIRS[folder] = take_out(names)
        sys.modules.update(ours)


def load_function(flag, spec):
    """module:function, the module found from the working folder on; raises InputError."""
    module, _, name = spec.partition(":")
    if not (module and name):
        raise InputError(f"{flag}: expected module:function, found {spec!r}")
    folder = os.getcwd()
    try:
        with imports_from(folder):
            function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        raise InputError(f"{flag}: cannot load {spec!r}: {one_line(error)}") from error
    if not callable(function):
        raise InputError(f"{flag}: {spec!r}: expected a function, found {function!r:.80}")
    return imports_from(folder)(function)  # it may import when it is called


def load_reward(spec, device="cpu"):
    """The reward of math, choice, exact, model:NAME or module:function; raises InputError."""
    if spec in VERIFIERS:
        return VERIFIERS[spec]
    module, _, name = spec.partition(":")
    if not (module and name):
        expected = f"expected {', '.join(VERIFIERS)}, model:NAME or module:function"
        raise InputError(f"--reward: {expected}, found {spec!r}")
    if module != "model":
        return load_function("--reward", spec)
    try:
        return model_reward(name, device)
    except Exception as error:  # a broken folder or a missing one, each library in its own words
        raise InputError(f"--reward: cannot load {spec!r}: {one_line(error)}") from error


def judged_text(prompt, completion, tokenizer):
    """A prompt and a response as a reward model reads them, by its chat template if it has one."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = [*as_messages(prompt), *completion]
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def model_reward(name, device="cpu"):
    """A reward that scores with a sequence classifier; raises ValueError for another model."""
    safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    classify = pipeline("text-classification", name, device=device, dtype=torch.float32, **safe)
    tokenizer = classify.tokenizer
    config = classify.model.config
    found = config.architectures or ["no architecture"]
    if not any(kind.endswith("ForSequenceClassification") for kind in found):
        raise ValueError(f"expected a sequence classifier, found {', '.join(found)}")
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"  # the judged turn is the last one
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id  # a decoder finds its last real token by it
    context = getattr(config, "max_position_embeddings", None) or 512
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return functools.partial(classifier_scores, classify)


def classifier_scores(classify, prompts, completions, **columns):
    """A classifier's one logit, or the probability of its last label, for each completion."""
    tokenizer = classify.tokenizer
    labels = classify.model.config.id2label
    last = labels[len(labels) - 1]
    options = {"batch_size": 16, "top_k": None, "truncation": True}
    options["function_to_apply"] = "none" if len(labels) == 1 else "softmax"
    options["add_special_tokens"] = not tokenizer.chat_template
    texts = [judged_text(*pair, tokenizer) for pair in zip(prompts, completions)]
    found = classify(texts, **options)
    return [one["score"] for row in found for one in row if one["label"] == last]


def needed_parameters(function, positional=0):
    """What a user's function must be given by name, behind `positional` others -> list of str."""
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named if p.default is p.empty]


def score(reward, batch, completions, answer="answer"):
    """The scores of completions, checked: (B,) fp32. Raises InputError.

    batch: {prompt, other columns: lists}; answer: the one that the function sees as `answer`.
    Conversational prompts get conversational completions, as in TRL.
    """
    ours = ("prompt", "prompts", "completions", "answer", PROMPT_IDS, PSEUDO_LABEL)
    columns = {name: list(batch[name]) for name in batch if name not in ours}
    if answer in batch:
        columns["answer"] = list(batch[answer])
    for name in needed_parameters(reward):
        if name not in {"prompts", "completions", *columns}:
            found = f"the data set has {', '.join(sorted(columns)) or 'none'} beside 'prompt'"
            raise InputError(f"--reward: it needs the column {name!r}; {found}")
    shaped = list(completions)
    for row, prompt in enumerate(batch["prompt"]):
        if isinstance(shaped[row], str) and not isinstance(prompt, str):
            shaped[row] = [{"role": "assistant", "content": shaped[row]}]
    try:
        scores = reward(prompts=list(batch["prompt"]), completions=shaped, **columns)
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        raise InputError(f"--reward: {raised(error)}") from error
    found = type(scores).__name__
    if isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) == 1:
        found = f"{len(scores)} values"
    if found != f"{len(completions)} values":
        raise InputError(f"--reward: expected a list of {len(completions)} numbers, found {found}")
    rows = range(len(completions))
    return torch.tensor([number_of(scores[row], row, batch["prompt"]) for row in rows])


def number_of(value, row, prompts):
    """A score, a number or an array of one, as a float; raises InputError for anything else."""
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None or not abs(number) < 3e38:  # what fp32 holds, and NaN is not less
        expected = f"expected a finite number, found {str(value)[:80]!r}"
        raise InputError(f"--reward: {row_text(row, prompts)}: {expected}")
    return number


def row_text(row, prompts):
    """A row of a batch for a message: by the beginning of its prompt, or of its last message."""
    prompt = prompts[row] if isinstance(prompts[row], str) else prompts[row][-1]["content"]
    return f"row {row} of the batch, {' '.join(prompt.split())[:60]!r}"
