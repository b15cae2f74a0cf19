"""What a run holds, how it is built, and what training and evaluation both do with it."""

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
from tasks.noise import PSEUDO_LABEL, model_scores, noisy_scores, pseudo_labels
from tasks.prompts import PROMPT_IDS, assert_known_ids, load_prompts
from tasks.rewards import load_function, load_reward, score
from tasks.warm_start import warm_start


@dataclass
class Run:
    """All that a run holds. What changes from iteration to iteration stands last."""

    policy: Any  # what is trained, in fp32
    sampler: Any  # what decodes: the policy, or its bf16 copy
    reference: Any  # the policy as it was at first; None with --kl-coef 0
    critic: Any  # None where the algorithm has none
    optimizer: Any
    critic_optimizer: Any
    tokenizer: Any
    stop_ids: list
    context: float  # most tokens that the policy takes
    data: Any  # prompts to train on
    evals: dict  # {name: prompts to evaluate on}
    reward: Any  # f(prompts, completions, **columns) -> scores
    user: Any  # f(messages, **columns) -> reply, or None
    risk: RiskConfig
    half: bool  # whether matrix products are in bf16
    noise: torch.Generator  # of the rewards' noise alone
    domain_at: int  # the first token in which prompts differ says what a prompt is about
    start: float
    trust_recorded: bool = False  # whether sampling's log-probs are those of scoring
    iteration: int = 0
    before: dict | None = None  # the evaluation before training
    examples: list | None = None  # responses of it


def autocast(run):
    return torch.autocast(run.policy.device.type, torch.bfloat16, enabled=run.half)


def load(auto_class, name, flag):
    """A model in fp32 without dropout (two forwards agree), or a tokenizer; raises InputError."""
    # A path is not a hub name: there is nothing to ask the network for.
    is_path = os.path.isabs(name) or str(name).count("/") > 1 or str(name).startswith(".")
    # No code of the model's runs, nobody is asked whether it may, and nothing is unpickled.
    safe = {"trust_remote_code": False}
    options = {"dtype": torch.float32, "use_safetensors": True, **safe}
    try:
        if is_path and not Path(name).is_dir():
            raise FileNotFoundError("no such folder")
        if auto_class is AutoTokenizer:
            return auto_class.from_pretrained(name, **safe)
        config = AutoConfig.from_pretrained(name, **safe)
        for key, value in config.to_dict().items():
            if "drop" in key and type(value) in (int, float):
                setattr(config, key, 0.0)
        return auto_class.from_pretrained(name, config=config, **options)
    except Exception as error:
        raise InputError(f"{flag}: cannot load {str(name)!r}: {one_line(error)}") from error


def context_of(model):
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def stop_token_ids(model, tokenizer, stop_token=None):
    """Every id that ends a response: the tokenizer's EOS, all of the model's, and --stop-token."""
    listed = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])}
    if stop_token is not None:
        stop_id = tokenizer.convert_tokens_to_ids(stop_token)
        if stop_id == tokenizer.unk_token_id and stop_token != tokenizer.unk_token:
            raise InputError(f"--stop-token: {stop_token!r} is not one token of the vocabulary")
        ids.add(stop_id)
    if ids == {None}:
        raise InputError("--stop-token: expected one, as the model names no end-of-sequence token")
    return sorted(ids - {None})


def load_splits(args, tokenizer, context, reward=None):
    """-> prompts to train on, {name: prompts to evaluate on}; none stands in both."""
    load = functools.partial(
        load_prompts,
        tokenizer=tokenizer,
        max_tokens=context - args.response_length,
        use_chat_template=args.chat_template == "auto",
        reward=reward,
        prompt_column=args.prompt_column,
    )
    evals = {}
    if args.dataset_name is None:
        train = load("--task", args.task, ("train", 4096, args.seed))
        for name, split in {"in domain": "test", "out of domain": "ood"}.items():
            evals[name] = load("--task", args.task, (split, args.eval_samples, args.seed))
    else:
        where = ("--dataset-name", args.dataset_name, args.dataset_split)
        train = load(*where, config=args.dataset_config)
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
        raise InputError("--dataset-name: expected prompts beside the held-out ones, found none")
    if args.pseudo_label_noise:
        if "answer" not in train.column_names:
            raise InputError("--pseudo-label-noise: expected a column 'answer', found none")
        generator = torch.Generator().manual_seed(args.reward_noise_seed)
        labels = pseudo_labels(train["answer"], args.pseudo_label_noise, generator)
        train = train.add_column(PSEUDO_LABEL, labels)
    return train, evals


def build_critic(args, policy, context):
    """The critic that --algo asks for, on its own trunk or on a copy of the policy's; or None."""
    kind, flag = ALGORITHMS[args.algo].critic, "--critic-model-name-or-path"
    if kind == "none":
        return None
    trunk = copy.deepcopy(policy.base_model)
    if args.critic_model_name_or_path:
        trunk = load(AutoModel, args.critic_model_name_or_path, flag)
    if trunk.config.vocab_size < policy.config.vocab_size or context_of(trunk) < context:
        raise InputError(
            f"{flag}: expected the policy's vocabulary and context, found smaller ones"
        )
    num_heads = 1 if kind == "scalar" else args.num_heads
    num_quantiles = args.num_quantiles if kind == "quantiles" else 1
    return QuantileCritic(trunk, num_heads, num_quantiles, args.tau_grid, seed=args.seed)


def load_functions(args, device, tokenizer):
    """-> reward, user or None: what the flags name, else the built-in task's."""
    reward, user = (None, None) if args.dataset_name else BUILT_IN[args.task]
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
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device: expected auto or cpu, as there is no GPU; found {args.device}")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return best if args.device == "auto" else args.device


def to_train(model, device, args, learning_rate):
    """A model on its device in train mode, and its optimiser -> optimiser; or None for None."""
    if model is None:
        return None
    model.to(device).train()
    is_fp32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert is_fp32, "bf16 weights lose small Adam steps"
    if args.gradient_checkpointing:
        getattr(model, "trunk", model).gradient_checkpointing_enable()
    options = {"lr": learning_rate, "weight_decay": 0.0, "fused": True}
    return torch.optim.AdamW(model.parameters(), **options)


def build(args):
    """A Run before its first iteration; raises InputError for whatever cannot work."""
    start, device, name = time.time(), device_of(args), args.model_name_or_path
    if name is None:
        name = Path(args.output_dir) / "warm_start"
        warm_start(args.task, args.seed, name)
    policy = load(AutoModelForCausalLM, name, "--model-name-or-path")
    tokenizer = load(AutoTokenizer, name, "--model-name-or-path")
    stop_ids, context = stop_token_ids(policy, tokenizer, args.stop_token), context_of(policy)
    if args.response_length >= context:
        expected = f"expected less than the model's context of {context} tokens"
        raise InputError(f"--response-length: {expected}, found {args.response_length}")
    reward, user = load_functions(args, device, tokenizer)
    data, evals = load_splits(args, tokenizer, context, reward)
    for prompts in (data, *evals.values()):
        assert_known_ids(prompts, policy.config.vocab_size)
    critic = build_critic(args, policy, context)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))
    # Decoding reads every weight per token: half of them are half the time.
    sampler = copy.deepcopy(policy).requires_grad_(False).to(device) if half else policy
    for parameter in sampler.parameters() if half else ():
        # Not .to(): a rotary embedding's buffers stay fp32.
        parameter.data = parameter.data.bfloat16()
    weights = {term: getattr(args, f"{term}_weight") for term in RISK_TERMS}
    reference = copy.deepcopy(policy).requires_grad_(False).to(device) if args.kl_coef else None
    run = Run(
        policy=policy,
        sampler=sampler,
        reference=reference,
        critic=critic,
        optimizer=to_train(policy, device, args, args.learning_rate),
        critic_optimizer=to_train(critic, device, args, args.critic_learning_rate),
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        context=context,
        data=data,
        evals=evals,
        reward=reward,
        user=user,
        risk=RiskConfig(args.alpha, args.beta, args.tail_ratio, **weights),
        half=half,
        noise=torch.Generator().manual_seed(args.reward_noise_seed),
        domain_at=len(os.path.commonprefix(list(data[PROMPT_IDS]))),
        start=start,
    )
    # In bf16 they never are: nobody asks.
    run.trust_recorded = not half and sampling_is_scoring(run, args)
    return run


def respond(run, args, batch, temperature, record_logprobs=False):
    """A response to each prompt of a batch, or with a user a whole conversation -> Rollout."""
    if run.sampler is not run.policy:
        torch._foreach_copy_([*run.sampler.parameters()], [*run.policy.parameters()])
    pad_id, stop_ids = run.stop_ids[0], run.stop_ids
    limits = {"response_length": args.response_length, "temperature": temperature}
    limits |= {"pad_id": pad_id, "stop_ids": stop_ids, "record_logprobs": record_logprobs}
    take_turn = functools.partial(sample, run.sampler, **limits)
    with autocast(run):
        if run.user is None:
            return take_turn(batch[PROMPT_IDS])
        ends = (pad_id, stop_ids, args.max_turns, run.context - args.response_length)
        return converse(take_turn, batch, run.user, run.tokenizer, *ends)


def completions_of(run, rollout):
    """What the reward reads of each response: its text, or a conversation's messages."""
    return rollout.messages or completion_texts(rollout, run.tokenizer, run.stop_ids)


@torch.no_grad()
def judge(run, args, batch, rollout):
    """Scores as training sees them, and without noise, offset and penalty: (B,), (B,)."""
    completions = completions_of(run, rollout)
    true_scores = scores = score(run.reward, batch, completions)
    if PSEUDO_LABEL in batch:
        scores = score(run.reward, batch, completions, PSEUDO_LABEL)
    if args.reward_noise_model:
        domains = [ids[min(run.domain_at, len(ids) - 1)] for ids in batch[PROMPT_IDS]]
        uneven = (args.reward_noise_model, args.reward_noise_seed, run.noise)
        scores = model_scores(scores, domains, *uneven)
    flips = (args.reward_noise_fp, args.reward_noise_fn)
    outlier, failure = args.reward_noise_outlier, args.reward_noise_failure
    scores = noisy_scores(scores, *flips, outlier, run.noise, failure)
    # A response that was cut off has no end: that may cost something.
    scores = scores - args.missing_eos_penalty * rollout.truncated.cpu()
    return scores.to(rollout.mask.device), true_scores


@torch.no_grad()
def sampling_is_scoring(run, args, count=8):
    """Whether the policy decodes as it reads, asked on a few prompts: not all architectures do."""
    turn = (run.data[:count][PROMPT_IDS], run.stop_ids[0], run.stop_ids, args.response_length)
    with torch.random.fork_rng():
        rollout = sample(run.policy, *turn, args.temperature, record_logprobs=True)
    logprobs = response_logprobs(run.policy, rollout, args.temperature)
    return bool((logprobs - rollout.logprobs).abs().max() < 1e-3)
