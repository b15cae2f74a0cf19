"""What a run holds, how it is built, and what training and evaluation both do with it."""

import copy
import functools
import os
import re
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from critic import QuantileCritic
from harness.flags import ALGORITHMS, RISK_TERMS
from harness.gpu import COMPILED, compile_layers, half_copy
from risk import RiskConfig
from rollout import Rollout, completion_texts, response_logprobs, response_quantiles, sample
from tasks import SAFE, WEIGHTS, InputError, naming
from tasks.builtin import BUILT_IN
from tasks.conversations import continuation, converse
from tasks.noise import PSEUDO_LABEL, model_scores, noisy_scores, pseudo_labels
from tasks.prompts import PROMPT_IDS, load_prompts
from tasks.rewards import load_function, load_reward, score
from tasks.warm_start import warm_start


@dataclass
class Run:
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
    checksum: int  # of both: another version of the data has another
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


def turn_off(config):
    """Ends what a model does by chance in train mode, or unasked, in a config and those in it."""
    names = "drop|jitter|output_(attentions|hidden_states|router_logits)"
    for key, value in [*vars(config).items()]:
        if hasattr(value, "get_text_config"):
            turn_off(value)
        elif re.search(names, key) and type(value) in (bool, int, float):
            setattr(config, key, type(value)(0))


def load(auto_class, name, flag):
    """A model in fp32 that leaves nothing to chance, or a tokenizer; raises InputError."""
    with naming(f"{flag}: cannot load {str(name)!r}"):
        # A path is not a hub name: there is nothing to ask the network for.
        if re.match("[./]|.*/.*/", str(name)) and not Path(name).is_dir():
            raise FileNotFoundError("no such folder")
        if auto_class is AutoTokenizer:
            return auto_class.from_pretrained(name, **SAFE)
        config = AutoConfig.from_pretrained(name, return_dict=True, **SAFE)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("expected a decoder alone, found an encoder too")
        turn_off(config)
        model, found = auto_class.from_pretrained(name, config=config, **WEIGHTS)
        if found["missing_keys"]:  # transformers makes them up
            raise ValueError(f"expected all weights, found no {min(found['missing_keys'])}")
        # What the model can read, whatever its config says.
        model.config.vocab_size = model.get_input_embeddings().weight.shape[0]
    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:  # Llama 2's could not be saved; only their ids are used here
        ids = {key: value for key, value in vars(settings).items() if "_token_id" in key}
        model.generation_config = type(settings)(**ids)
    return model


def context_of(model):
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or float("inf")


def stop_token_ids(model, tokenizer, stop_token=None):
    """Every id that ends a response: the tokenizer's EOS, all of the model's, and --stop-token."""
    vocabulary, known = tokenizer.get_vocab(), range(model.config.vocab_size)
    if stop_token is not None and stop_token not in vocabulary:
        raise InputError(f"--stop-token: {stop_token!r} is not one token of the vocabulary")
    listed = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, vocabulary.get(stop_token)]
    ids += listed if isinstance(listed, (list, tuple)) else [listed]
    ids = [stop_id for stop_id in ids if stop_id is not None]
    if not ids or any(stop_id not in known for stop_id in ids):
        expected = f"expected one, or the model's end of sequence, with ids below {len(known)}"
        raise InputError(f"--stop-token: {expected}, found {ids or 'none'}")
    return sorted(set(ids))


def load_splits(args, tokenizer, context, limit=float("inf"), reward=None):
    """-> prompts to train on, {name: prompts to evaluate on}; none stands in both."""
    options = dict(tokenizer=tokenizer, max_tokens=context - args.response_length, limit=limit)
    options |= dict(prompt_column=args.prompt_column, template=args.chat_template == "auto")
    load = functools.partial(load_prompts, rewards=(reward,), **options)
    evals = {}
    if args.dataset_name is None:
        train = load("--task", args.task, ("train", 4096, args.seed))
        for name, split in {"in domain": "test", "out of domain": "ood"}.items():
            evals[name] = load("--task", args.task, (split, args.eval_samples, args.seed))
    else:
        where = ("--dataset-name", args.dataset_name, args.dataset_split)
        train = load(*where, config=args.dataset_config)
        if args.eval_dataset_name:
            where = ("--eval-dataset-name", args.eval_dataset_name, args.eval_dataset_split)
            config = args.dataset_config if args.eval_dataset_name == args.dataset_name else None
            evals["held out"] = load(*where, config=config).take(args.eval_samples)
        elif len(train) > 1:
            size = min(args.eval_samples, len(train) // 2)
            train, evals["held out"] = train.train_test_split(size, seed=args.seed).values()
    held_out = {tuple(ids) for data in evals.values() for ids in data[PROMPT_IDS]}
    count = len(train)
    train = train.filter(lambda ids: tuple(ids) not in held_out, input_columns=PROMPT_IDS)
    if args.dataset_name and len(train) < count:
        print(f"--dataset-name: {count - len(train)} of {count} rows left out, as held out too")
    if len(train) == 0:
        raise InputError("--dataset-name: expected prompts beside the held-out ones, found none")
    if args.pseudo_label_noise:
        generator = torch.Generator().manual_seed(args.reward_noise_seed)
        with naming("--pseudo-label-noise"):
            labels = pseudo_labels(train.to_dict(), reward, args.pseudo_label_noise, generator)
        train = train.add_column(PSEUDO_LABEL, labels)
    return train, evals


def build_critic(args, policy, context):
    """The critic that --algo asks for, on its own trunk or on a copy of the policy's; or None."""
    kind, flag = ALGORITHMS[args.algo].critic, "--critic-model-name-or-path"
    if kind == "none":
        return None
    name = args.critic_model_name_or_path
    trunk = load(AutoModel, name, flag) if name else copy.deepcopy(policy.base_model)
    num_heads = 1 if kind == "scalar" else args.num_heads
    num_quantiles = args.num_quantiles if kind == "quantiles" else 1
    # Also what is no language model.
    with naming(flag):
        if trunk.config.vocab_size < policy.config.vocab_size or context_of(trunk) < context:
            raise InputError("expected the policy's vocabulary and context, found smaller ones")
        return QuantileCritic(trunk, num_heads, num_quantiles, args.tau_grid, seed=args.seed)


def to_train(model, device, args, learning_rate):
    """A model on its device in train mode, and its optimiser -> optimiser."""
    model.to(device).train()
    assert all(p.dtype == torch.float32 for p in model.parameters()), "bf16 loses small Adam steps"
    if args.gradient_checkpointing:
        getattr(model, "trunk", model).gradient_checkpointing_enable()
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)


def build(args):
    """A Run before its first iteration; raises InputError for whatever cannot work."""
    start, has_gpu, name = time.time(), torch.cuda.is_available(), args.model_name_or_path
    device = args.device if args.device != "auto" else "cuda" if has_gpu else "cpu"
    if device.startswith("cuda") and not has_gpu:
        raise InputError(f"--device: expected auto or cpu, as there is no GPU; found {device}")
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))
    if args.compile and not half:
        raise InputError("--compile: expected --dtype bfloat16 with it, found float32")
    reward, user = (None, None) if args.dataset_name else BUILT_IN[args.task][1:]
    reward = load_reward(args.reward, device) if args.reward else reward
    user = load_function("--user", args.user) if args.user else user
    if name is None:
        name = Path(args.output_dir) / "warm_start"
        warm_start(args.task, args.seed, name)
    policy = load(AutoModelForCausalLM, name, "--model-name-or-path")
    tokenizer = load(AutoTokenizer, name, "--model-name-or-path")
    stop_ids, context = stop_token_ids(policy, tokenizer, args.stop_token), context_of(policy)
    if user is not None:
        continuation(None, "hello", tokenizer)  # it needs a chat template
    data, evals = load_splits(args, tokenizer, context, policy.config.vocab_size, reward)
    critic = build_critic(args, policy, context)
    risk = {term: getattr(args, f"{term}_weight") for term in RISK_TERMS}
    risk |= dict(alpha=args.alpha, beta=args.beta, ratio=args.tail_ratio, reach=args.tail_reach)
    parts = dict(policy=policy, critic=critic, tokenizer=tokenizer, data=data, evals=evals)
    parts |= dict(stop_ids=stop_ids, context=context, reward=reward, user=user, half=half)
    run = Run(
        **parts,
        sampler=half_copy(policy).to(device) if half else policy,
        reference=copy.deepcopy(policy).requires_grad_(False).to(device) if args.kl_coef else None,
        optimizer=to_train(policy, device, args, args.learning_rate),
        critic_optimizer=critic and to_train(critic, device, args, args.critic_learning_rate),
        checksum=zlib.crc32(repr([rows.to_dict() for rows in (data, *evals.values())]).encode()),
        risk=RiskConfig(**risk),
        noise=torch.Generator().manual_seed(args.reward_noise_seed),
        domain_at=len(os.path.commonprefix(list(data[PROMPT_IDS]))),
        start=start,
    )
    # In bf16, sampling's log-probs never are those of scoring.
    run.trust_recorded = sampling_is_scoring(run, args) and not half
    if args.compile:
        compile_layers(policy, critic, run.reference)
    return run


def respond(run, args, batch, temperature, record_logprobs=False):
    """A response to each prompt of a batch, or with a user a whole conversation -> Rollout."""
    if run.sampler is not run.policy:
        torch._foreach_copy_([*run.sampler.parameters()], [*run.policy.parameters()])
    limits = {"response_length": args.response_length, "temperature": temperature}
    limits |= {"record_logprobs": record_logprobs, **(COMPILED if args.compile else {})}
    stops = {"pad_id": run.stop_ids[0], "stop_ids": run.stop_ids}
    take_turn = functools.partial(sample, run.sampler, **stops, **limits)
    with autocast(run):
        if run.user is None:
            return take_turn(batch[PROMPT_IDS])
        sizes = (args.max_turns, run.context - args.response_length, run.policy.config.vocab_size)
        return converse(take_turn, batch, run.user, run.tokenizer, *stops.values(), *sizes)


@torch.no_grad()
def judge(run, args, batch, rollout):
    """Scores as training sees them, and without noise and penalty: (B,), (B,)."""
    completions = rollout.messages or completion_texts(rollout, run.tokenizer, run.stop_ids)
    true_scores = scores = score(run.reward, batch, completions)
    if PSEUDO_LABEL in batch:
        scores = score(run.reward, batch, completions, PSEUDO_LABEL)
    if args.reward_noise_model:
        domains = [ids[min(run.domain_at, len(ids) - 1)] for ids in batch[PROMPT_IDS]]
        scale, seed = args.reward_noise_model, args.reward_noise_seed
        scores = model_scores(scores, domains, scale, seed, run.noise)
    noise = (args.reward_noise_fp, args.reward_noise_fn, args.reward_noise_outlier)
    scores = noisy_scores(scores, *noise, run.noise, args.reward_noise_failure)
    # A response that was cut off has no end: that may cost something.
    scores = scores - args.missing_eos_penalty * rollout.truncated.cpu()
    return scores.to(rollout.mask.device), true_scores


@torch.no_grad()
def sampling_is_scoring(run, args, count=8):
    """Whether the policy decodes as it reads, asked on a few prompts: not all architectures do.

    Raises InputError where the policy, or a critic's own trunk, reads a row differently the second
    time, or without padding and a token behind it. In fp32, rounding is far below 1e-3 of the most.
    """
    room, data = run.context - args.response_length, run.data[:count][PROMPT_IDS]
    prompts = [(ids * 8)[: min(4 + row, room)] for row, ids in enumerate(data)]
    turn = (prompts, run.stop_ids[0], run.stop_ids, min(args.response_length, 16))
    own = run.critic is not None and args.critic_model_name_or_path
    readers = {"--critic-model-name-or-path": (response_quantiles, run.critic)} if own else {}
    readers["--model-name-or-path"] = (response_logprobs, run.policy, args.temperature)
    with torch.random.fork_rng():
        rollout = sample(run.policy, *turn, args.temperature, record_logprobs=True)
        parts = (rollout.input_ids, rollout.attention_mask, rollout.mask)
        longer = Rollout(*(torch.cat([part, part[:, -1:]], 1) for part in parts), rollout.truncated)
        rows = [rollout[row : row + 1] for row in range(len(rollout.mask))]
        for flag, (read, model, *rest) in readers.items():
            first, again = (read(model, longer, *rest)[:, :-1][rollout.mask] for _ in range(2))
            alone = torch.cat([read(model, row, *rest)[row.mask] for row in rows])
            for name, other in (("chance in training", again), ("padding or later tokens", alone)):
                # The median: between two equally good experts, rounding chooses.
                if (first - other).abs().median() > 1e-3 * first.abs().max():
                    raise InputError(f"{flag}: expected {name} to change nothing, found it does")
    return bool((first - rollout.logprobs[rollout.mask]).abs().max() < 1e-3)
