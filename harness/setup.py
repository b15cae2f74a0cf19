"""What a run holds, and how it is built: models, optimisers, data, reward, noise."""

import copy
import functools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from critic import QuantileCritic
from harness.flags import ALGORITHMS, RISK_TERMS
from risk import RiskConfig
from rollout import completion_texts, response_logprobs, sample
from tasks import InputError, one_line
from tasks.builtin import BUILT_IN
from tasks.conversations import converse, turns_between
from tasks.noise import PSEUDO_LABEL, pseudo_labels
from tasks.prompts import PROMPT_IDS, assert_known_ids, load_prompts
from tasks.rewards import load_function, load_reward
from tasks.warm_start import warm_start


@dataclass
class Run:
    """All that a run holds. What changes from iteration to iteration stands last."""

    # The model that is trained, in fp32, and what decodes: itself, or its bf16 copy.
    policy: Any
    sampler: Any
    tokenizer: Any
    # The frozen policy as it was at first, for the KL; None with --kl-coef 0.
    reference: Any
    # None where the algorithm has none.
    critic: Any
    optimizer: Any
    critic_optimizer: Any
    # Prompts to train on, and {name: prompts to evaluate on}.
    data: Any
    evals: dict
    # f(prompts, completions, **columns) -> scores, and f(messages, **columns) -> reply, or None.
    reward: Any
    user: Any
    stop_ids: list
    pad_id: int
    # Most tokens that the policy takes.
    context: float
    risk: RiskConfig
    # Whether matrix products are in bf16.
    half: bool
    # Of the reward noise, and of nothing else.
    noise: torch.Generator
    # Whether sampling's log-probs are those of scoring, so that they need no pass of their own.
    trust_recorded: bool = False
    iteration: int = 0
    # The evaluation and the examples before training.
    before: dict | None = None
    examples: list | None = None
    start: float = 0.0


def autocast(run):
    """bf16 matrix products, where the run has them."""
    return torch.autocast(run.policy.device.type, torch.bfloat16, enabled=run.half)


def from_pretrained(auto_class, name):
    """A model in fp32 with every dropout at 0, so that two forwards agree; or a tokenizer."""
    if auto_class is AutoTokenizer:
        return auto_class.from_pretrained(name)
    config = AutoConfig.from_pretrained(name)
    for key, value in config.to_dict().items():
        if "drop" in key and type(value) in (int, float):
            setattr(config, key, 0.0)
    # safetensors only: nothing is unpickled.
    options = {"dtype": torch.float32, "use_safetensors": True}
    return auto_class.from_pretrained(name, config=config, **options)


def load(auto_class, name, flag):
    """from_pretrained, with one line about whatever fails: raises InputError naming the flag."""
    try:
        # A path is not a hub name either: there is nothing to ask the network for.
        is_path = os.path.isabs(name) or str(name).count("/") > 1 or str(name).startswith(".")
        if is_path and not Path(name).is_dir():
            raise FileNotFoundError("no such folder")
        return from_pretrained(auto_class, name)
    except Exception as error:
        # A broken file or a missing one, each library in its own words.
        raise InputError(f"{flag}: cannot load {str(name)!r}: {one_line(error)}") from error


def context_of(model):
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def pad_token_id(tokenizer, stop_ids):
    """The tokenizer's pad token, or a stop token where it has none: masks never look at it."""
    return stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_token_ids(model, tokenizer, stop_token=None):
    """Every id that ends a response: the tokenizer's EOS, all of the model's, and --stop-token."""
    listed = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])}
    ids -= {None}
    if stop_token is not None:
        stop_id = tokenizer.convert_tokens_to_ids(stop_token)
        is_unknown = stop_id == tokenizer.unk_token_id and stop_token != tokenizer.unk_token
        if stop_id is None or is_unknown:
            raise InputError(f"--stop-token: {stop_token!r} is not one token of the vocabulary")
        ids.add(stop_id)
    if not ids:
        raise InputError("--stop-token: expected one, as the model names no end-of-sequence token")
    return sorted(ids)


def load_splits(args, tokenizer, context):
    """-> prompts to train on, {name: prompts to evaluate on}; none stands in both."""
    load = functools.partial(
        load_prompts,
        tokenizer=tokenizer,
        max_tokens=context - args.response_length,
        use_chat_template=args.chat_template == "auto",
        prompt_column=args.prompt_column,
    )
    evals = {}
    if args.dataset_name is None:
        train = load("--task", args.task, ("train", 4096, args.seed))
        for name, split in (("in domain", "test"), ("out of domain", "ood")):
            evals[name] = load("--task", args.task, (split, args.eval_samples, args.seed))
    else:
        train = load(
            "--dataset-name", args.dataset_name, args.dataset_split, config=args.dataset_config
        )
        if args.eval_dataset_name:
            held_out = load("--eval-dataset-name", args.eval_dataset_name, args.eval_dataset_split)
            evals["held out"] = held_out.select(range(min(args.eval_samples, len(held_out))))
        elif len(train) > 1:
            size = min(args.eval_samples, len(train) // 2)
            parts = train.train_test_split(size, seed=args.seed)
            train, evals["held out"] = parts["train"], parts["test"]
    held_out = {str(prompt) for data in evals.values() for prompt in data["prompt"]}
    train = train.filter(lambda prompt: str(prompt) not in held_out, input_columns="prompt")
    if len(train) == 0:
        expected = "prompts beside the held-out ones (--eval-dataset-name, --eval-samples)"
        raise InputError(f"--dataset-name: expected {expected}, found none")
    return train, evals


def with_pseudo_labels(data, share, seed):
    """data with a column of labels beside the answers, a share of them wrong all run long."""
    if "answer" not in data.column_names:
        raise InputError("--pseudo-label-noise: expected a column 'answer' in the data, found none")
    labels = pseudo_labels(data["answer"], share, torch.Generator().manual_seed(seed))
    return data.add_column(PSEUDO_LABEL, labels)


def build_critic(args, policy, context):
    """The critic that --algo asks for, on its own trunk or on a copy of the policy's; or None."""
    kind = ALGORITHMS[args.algo].critic
    if kind == "none":
        return None
    trunk = copy.deepcopy(policy.base_model)
    if args.critic_model_name_or_path:
        trunk = load(AutoModel, args.critic_model_name_or_path, "--critic-model-name-or-path")
    if trunk.config.vocab_size < policy.config.vocab_size or context_of(trunk) < context:
        expected = "the policy's vocabulary and context"
        raise InputError(f"--critic-model-name-or-path: expected {expected}, found a smaller one")
    num_heads = 1 if kind == "scalar" else args.num_heads
    num_quantiles = args.num_quantiles if kind == "quantiles" else 1
    return QuantileCritic(trunk, num_heads, num_quantiles, args.tau_grid, seed=args.seed)


def half_copy(policy):
    """A frozen copy of the policy with bf16 weights: decoding reads every weight per token."""
    sampler = copy.deepcopy(policy).requires_grad_(False)
    for parameter in sampler.parameters():
        # Not .to(): a rotary embedding's buffers stay fp32.
        parameter.data = parameter.data.bfloat16()
    return sampler


def adam(model, learning_rate):
    options = {"lr": learning_rate, "weight_decay": 0.0, "fused": True}
    return None if model is None else torch.optim.AdamW(model.parameters(), **options)


def load_policy(args):
    """The policy to start from and its tokenizer; the built-in one is made first."""
    name = args.model_name_or_path
    if name is None:
        name = Path(args.output_dir) / "warm_start"
        warm_start(args.task, args.seed, name)
    policy = load(AutoModelForCausalLM, name, "--model-name-or-path")
    tokenizer = load(AutoTokenizer, name, "--model-name-or-path")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return policy, tokenizer


def load_functions(args, device, tokenizer):
    """-> reward, user or None: the user's, else those of the built-in task."""
    reward, user = BUILT_IN[args.task] if args.dataset_name is None else (None, None)
    if args.reward:
        reward = load_reward(args.reward, device)
    if args.user:
        user = load_function("--user", args.user)
    if user is not None:
        try:
            turns_between("hello", tokenizer)
        except InputError as error:
            raise InputError(f"--user: it needs a chat template for all turns: {error}") from error
    return reward, user


def device_of(args):
    """--device as torch names it; raises InputError for a GPU that is not there."""
    is_there = torch.cuda.is_available()
    if args.device == "auto":
        return "cuda" if is_there else "cpu"
    if args.device.startswith("cuda") and not is_there:
        raise InputError(f"--device: expected auto or cpu, as there is no GPU; found {args.device}")
    return args.device


def build(args):
    """A Run before its first iteration; raises InputError for whatever cannot work."""
    start, device = time.time(), device_of(args)
    policy, tokenizer = load_policy(args)
    reward, user = load_functions(args, device, tokenizer)
    stop_ids, context = stop_token_ids(policy, tokenizer, args.stop_token), context_of(policy)
    if args.response_length >= context:
        expected = f"expected less than the model's context of {context} tokens"
        raise InputError(f"--response-length: {expected}, found {args.response_length}")
    data, evals = load_splits(args, tokenizer, context)
    for flag, prompts in [
        ("--dataset-name", data),
        *(("--eval-dataset-name", e) for e in evals.values()),
    ]:
        assert_known_ids(flag, prompts, policy.config.vocab_size)
    if args.pseudo_label_noise:
        data = with_pseudo_labels(data, args.pseudo_label_noise, args.reward_noise_seed)
    reference = None
    if args.kl_coef > 0:
        reference = copy.deepcopy(policy).requires_grad_(False).to(device)
    critic = build_critic(args, policy, context)
    for model in filter(None, (policy, critic)):
        model.to(device).train()
        is_fp32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert is_fp32, "bf16 weights lose small Adam steps"
        if args.gradient_checkpointing:
            getattr(model, "trunk", model).gradient_checkpointing_enable()
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))
    weights = {term: getattr(args, f"{term}_weight") for term in RISK_TERMS}
    run = Run(
        policy=policy,
        sampler=half_copy(policy) if half else policy,
        tokenizer=tokenizer,
        reference=reference,
        critic=critic,
        optimizer=adam(policy, args.learning_rate),
        critic_optimizer=adam(critic, args.critic_learning_rate),
        data=data,
        evals=evals,
        reward=reward,
        user=user,
        stop_ids=stop_ids,
        pad_id=pad_token_id(tokenizer, stop_ids),
        context=context,
        risk=RiskConfig(args.alpha, args.beta, args.tail_ratio, **weights),
        half=half,
        noise=torch.Generator().manual_seed(args.reward_noise_seed),
        start=start,
    )
    # In bf16 they never are: nobody asks.
    run.trust_recorded = not half and sampling_is_scoring(run, args)
    return run


def respond(run, args, batch, temperature, record_logprobs=False):
    """A response to each prompt of a batch, or with a user a whole conversation -> Rollout."""
    if run.sampler is not run.policy:
        torch._foreach_copy_([*run.sampler.parameters()], [*run.policy.parameters()])
    take_turn = functools.partial(
        sample,
        run.sampler,
        pad_id=run.pad_id,
        stop_ids=run.stop_ids,
        response_length=args.response_length,
        temperature=temperature,
        record_logprobs=record_logprobs,
    )
    with autocast(run):
        if run.user is None:
            return take_turn(batch[PROMPT_IDS])
        room = run.context - args.response_length
        ids = (run.tokenizer, run.pad_id, run.stop_ids)
        return converse(take_turn, batch, run.user, *ids, args.max_turns, room)


def completions_of(run, rollout):
    """What the reward reads of each response: its text, or a whole conversation's messages."""
    return rollout.messages or completion_texts(rollout, run.tokenizer, run.stop_ids)


@torch.no_grad()
def sampling_is_scoring(run, args, count=8):
    """Whether sampling draws from the numbers that training computes, asked on a few prompts.

    A few architectures decode otherwise than they read.
    """
    prompt_ids = run.data[:count][PROMPT_IDS]
    options = {"response_length": args.response_length, "temperature": args.temperature}
    with torch.random.fork_rng():
        rollout = sample(
            run.policy, prompt_ids, run.pad_id, run.stop_ids, record_logprobs=True, **options
        )
    difference = response_logprobs(run.policy, rollout, args.temperature) - rollout.logprobs
    return bool(difference.abs().max() < 1e-3)
