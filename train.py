"""DVPO: PPO for language models whose critic predicts the distribution of the return at every token. One GPU, or a CPU.

    python train.py                                   # a tiny model on a built-in task, noisy rewards, about two minutes
    python train.py --model-name-or-path FOLDER_OR_HUB_NAME --dataset-name FILE_OR_HUB_NAME --reward math

The loop, as data flows: prompts -> sample -> log-probs -> score (+ noise) -> token rewards -> values -> GAE -> losses -> step.
`--algo ppo` runs the same lines with a scalar critic and a squared error; robust, grpo, dr_grpo and reinforce++ are the other
baselines, each with its own advantage (dvpo.py) and otherwise the same loop.
"""

import argparse
import collections
import contextlib
import copy
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy  # comes with transformers; a user's reward may draw from it
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import dvpo
import rollout as ro
from critic import QuantileCritic
from risk import RiskConfig
from rollout import InputError

RISK_TERMS = ("calibration", "shift", "shape", "curvature", "consistency")
POLICY_METRICS = {"approx_kl": "policy/approxkl_avg", "clipfrac": "policy/clipfrac_avg", "ratio": "val/ratio"}
CRITICS = ("dvpo", "ppo", "robust")
BUILT_IN = {"sums": (ro.math_reward, None), "dialogue": (ro.exact_reward, None), "booking": (ro.booking_reward, ro.scripted_user)}  # reward, user
GROUPED = ("grpo", "dr_grpo")  # several responses per prompt, no critic, the KL in the loss
RESTING = {"loss/policy_avg": 0.0, "policy/approxkl_avg": 0.0, "policy/clipfrac_avg": 0.0, "val/ratio": 1.0}  # during the critic's warm-up
SHOWN = {"tok/s": "tps", "score": "objective/scores", "true": "objective/true_scores", "kl": "objective/kl", "ev": "val/explained_var",
         "clip": "policy/clipfrac_avg"}  # beside the bar's own iteration and time left
CHANGEABLE = ("resume", "output_dir", "total_episodes", "save_steps", "eval_steps", "report_to", "device")  # in a resumed run
FLAGS = {  # group: (name, default, allowed: an interval, a list of choices, None for text and switches; help)
    # A default in a tuple is (built-in model, pretrained model).
    "model and data": [
        ("task", "dialogue", list(ro.TASKS), "built-in prompts and rewards, used without --dataset-name"),
        ("model-name-or-path", None, None, "policy: a hub name or a folder; without it a tiny model is warm-started on --task"),
        ("critic-model-name-or-path", None, None, "the critic's trunk; without it a copy of the policy's"),
        ("dataset-name", None, None, "prompts: a hub name or a json, jsonl or parquet file"),
        ("dataset-config", None, None, "config of --dataset-name, where the hub asks for one"),
        ("dataset-split", "train", None, "split of --dataset-name"),
        ("prompt-column", "prompt", None, "the column with the prompts, in both data sets"),
        ("eval-dataset-name", None, None, "prompts for evaluation; without it some of the training rows are held out"),
        ("eval-dataset-split", "train", None, "split of --eval-dataset-name"),
        ("reward", None, None, "math, choice, exact, model:NAME or module:function; --task has its own"),
        ("user", None, None, "module:function that answers the policy's turns: a whole conversation is one response; --task booking has its own"),
        ("chat-template", "auto", ["auto", "never"], "auto: string prompts become a user's message if the model has a template"),
        ("stop-token", None, None, "one more token that ends a response, beside the model's own"),
    ],
    "budget": [
        ("total-episodes", (19200, 10000), "[1, inf)", "responses to sample in all"),
        ("batch-size", (128, 64), "[1, inf)", "responses per iteration"),
        ("num-mini-batches", 2, "[1, inf)", "optimiser steps per epoch over a batch"),
        ("micro-batch-size", (128, 64), "[1, inf)", "most responses per forward pass; changes memory and time, never the gradient"),
        ("micro-batch-tokens", 4096, "[1, inf)", "most tokens per forward pass, prompts and padding counted (a longer response goes alone)"),
        ("num-ppo-epochs", 2, "[1, inf)", "passes over each batch"),
        ("response-length", (16, 256), "[1, inf)", "most tokens per response, in a conversation per turn"),
        ("max-turns", 6, "[1, inf)", "most turns of the policy in a conversation"),
        ("critic-warmup-steps", 5, "[0, inf)", "first iterations that train the critic only"),
    ],
    "algorithm": [
        ("algo", "dvpo", ["dvpo", "ppo", "robust", "grpo", "dr_grpo", "reinforce++"], "dvpo or a baseline; the last three have no critic"),
        ("group-size", 0, "[0, inf)", "responses per prompt in a batch; 0: 8 for grpo and dr_grpo, else 1"),
        ("learning-rate", (1e-4, 1e-06), "(0, inf)", "policy, AdamW"),
        ("critic-learning-rate", (1e-3, 1e-05), "(0, inf)", "critic, AdamW"),
        ("max-grad-norm", 1.0, "(0, inf)", "gradient norm above which a step is scaled down, each model on its own"),
        ("cliprange", 0.2, "(0, inf)", "the ratio stays within 1 +- this"),
        ("gamma", 1.0, "[0, 1]", "discount per token"),
        ("lam", 0.95, "[0, 1]", "GAE lambda"),
        ("kl-coef", (0.02, 0.05), "[0, inf)", "reward per nat of k1 to the starting policy; 0 skips the reference model"),
        ("temperature", 1.0, "[0.01, 100]", "of sampling, and of every log-prob"),
        ("missing-eos-penalty", 0.0, "[0, inf)", "taken from the score of a response without a stop token, or of a conversation without room for more"),
        ("bootstrap-truncated", False, None, "count on V after a truncated response instead of 0"),
        ("whiten-rewards", False, None, "divide token rewards by their standard deviation"),
    ],
    "distributional critic (dvpo)": [
        ("num-quantiles", 200, "[1, inf)", "M"),
        ("num-heads", 4, "[1, inf)", "N"),
        ("kappa", 0.01, "[0, inf)", "half-width of the Huber corner, in reward units"),
        ("tau-grid", "midpoint", ["midpoint", "right"], "levels (j - 1/2)/M or j/M"),
        ("alpha", RiskConfig.alpha, "(0, 1]", "share of the lower tail"),
        ("beta", RiskConfig.beta, "(0, 1]", "share of the upper tail"),
        ("tail-ratio", RiskConfig.ratio, "[0, inf)", "lower tail at most this times the upper one"),
        *((f"{term}-weight", getattr(RiskConfig, term), "[0, inf)", f"weight of the {term} term; 0 turns it off") for term in RISK_TERMS),
    ],
    "reward noise (training only, never evaluation)": [
        ("reward-noise-fp", (0.2, 0.0), "[0, 1]", "probability that a wrong answer is rewarded"),
        ("reward-noise-fn", (0.2, 0.0), "[0, 1]", "probability that a right answer is not"),
        ("reward-noise-outlier", [0.0, 0.0], "[0, 1000000]", "with probability P, at most 1, the score loses up to SCALE"),
        ("reward-offset", 0.0, "[0, 1000000]", "the score gains up to this, by the prompt: a level that a critic can learn"),
        ("pseudo-label-noise", 0.0, "[0, 1]", "share of prompts whose label is wrong all run long"),
        ("reward-noise-seed", 0, "[0, 2147483647]", "seed of all of these"),
    ],
    "run": [
        ("seed", 0, "[0, 2147483647]", "of everything else"),
        ("output-dir", None, None, "default runs/TASK-ALGO-seedSEED"),
        ("save-steps", (0, 50), "[0, inf)", "iterations between checkpoints; 0: at the end, or at Ctrl-C, only"),
        ("eval-steps", 0, "[0, inf)", "iterations between evaluations; 0: before and after only"),
        ("eval-samples", (512, 128), "[1, inf)", "held-out prompts per evaluation"),
        ("resume", None, None, "go on from a run's folder, or without a value from --output-dir"),
        ("report-to", "none", ["none", "tensorboard", "wandb", "trackio"], "also log to"),
        ("device", "auto", None, "auto, cpu or cuda"),
        ("dtype", "auto", ["auto", "float32", "bfloat16"], "of matrix products; auto: bfloat16 (autocast) on cuda, else float32"),
        ("gradient-checkpointing", False, None, "trade time for memory in the update"),
    ],
}


def number_in(interval, cast):
    """An argparse type: a number in an interval such as '(0, 1]'."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        with contextlib.suppress(ValueError):
            value = cast(text)
            if low <= value <= high and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]"):
                return value
        raise argparse.ArgumentTypeError(f"expected a {'whole ' if cast is int else ''}number in {interval}, found {text!r}")

    return parse


def make_parser():
    parser = argparse.ArgumentParser(usage="python train.py [flags]", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")  # one line, without the usage
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, default, allowed, text in flags:
            usual = default if isinstance(default, tuple) else (default,)
            shown = f"default {usual[0]}" + (f", {usual[1]} for a pretrained model" if len(usual) == 2 else "")
            options = {"nargs": 2, "metavar": ("P", "SCALE")} if "outlier" in name else {"nargs": "?", "const": ""} if name == "resume" else {}
            if isinstance(allowed, str):
                options["type"], shown = number_in(allowed, int if type(usual[0]) is int else float), f"{shown}; in {allowed}"
            elif default is False:
                options["action"] = "store_true"
            else:
                options["choices"] = allowed
            if "action" not in options and not isinstance(allowed, list):
                options.setdefault("metavar", "N" if isinstance(allowed, str) else "NAME")
            group.add_argument(f"--{name}", default=default, help=text if default is None or default is False else f"{text} ({shown})", **options)
    return parser


def parse_args(argv=None):
    """Flags with every default filled in; raises InputError for combinations that cannot work. A resumed run keeps its flags."""
    argv = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = make_parser()
    args = parser.parse_args(argv)
    default_dir = f"runs/{Path(args.dataset_name or args.task).stem}-{args.algo}-seed{args.seed}"
    if args.resume is not None:
        folder = find_checkpoint(Path(args.resume or args.output_dir or default_dir))
        try:
            saved = json.loads((folder.parent / "args.json").read_text())["flags"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--resume: expected the run's flags in {folder.parent / 'args.json'}, found none: {ro.one_line(error)}") from error
        if args.output_dir and Path(args.output_dir).resolve() != folder.parent.resolve():
            raise InputError(f"--output-dir: expected {folder.parent}, the folder of the run to resume, or none; found {args.output_dir}")
        saved = {**vars(parser.parse_args([])), **saved, "output_dir": str(folder.parent)}  # flags newer than the run: their defaults
        given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(saved))))  # None where a flag was not given
        given = {key: value for key, value in given.items() if value is not None}
        for key in given.keys() - CHANGEABLE:
            if given[key] != saved[key]:
                raise InputError(f"--{key.replace('_', '-')}: {given[key]} here, {saved[key]} in the run to resume; expected the same, or none")
        args = argparse.Namespace(**{**saved, **given, "resume": str(folder)})
    args.output_dir = args.output_dir or default_dir
    for key, value in vars(args).items():
        if isinstance(value, tuple):
            setattr(args, key, value[args.model_name_or_path is not None])
    args.group_size = args.group_size or (8 if args.algo in GROUPED else 1)
    devices = "auto|cpu|cuda|cuda:[0-9]" if torch.cuda.is_available() else "auto|cpu"
    missing = args.report_to != "none" and not importlib.util.find_spec(args.report_to)
    for wrong, message in (
        (args.batch_size % args.num_mini_batches, f"--num-mini-batches: expected a divisor of --batch-size {args.batch_size}, found {args.num_mini_batches}"),
        (args.batch_size % args.group_size, f"--group-size: expected a divisor of --batch-size {args.batch_size}, found {args.group_size}"),
        (args.algo in GROUPED and args.group_size == 1, f"--group-size: expected at least 2 for {args.algo}, found 1: alone, a response has no advantage"),
        (args.dataset_name and not args.model_name_or_path, "--model-name-or-path: expected one with --dataset-name, found none"),
        (args.dataset_name and not args.reward, "--reward: expected one with --dataset-name, found none"),
        (args.reward_noise_outlier[0] > 1, f"--reward-noise-outlier: expected P in [0, 1], found {args.reward_noise_outlier[0]}"),
        ((args.dataset_config or args.prompt_column != "prompt") and not args.dataset_name,
         "--dataset-name: expected one with --dataset-config or --prompt-column, found none"),
        (args.eval_dataset_name and not args.dataset_name, "--dataset-name: expected one with --eval-dataset-name, found none"),
        (args.bootstrap_truncated and args.algo not in CRITICS, f"--bootstrap-truncated: expected a method with a critic, found --algo {args.algo}"),
        ((args.reward_noise_fp or args.reward_noise_fn) and str(args.reward).startswith("model:"),
         "--reward-noise-fp, --reward-noise-fn: expected both at 0 with --reward model:NAME, whose scores are not 0 or 1"),
        (args.user and args.chat_template == "never", "--chat-template: expected auto with --user, whose turns the template writes; found never"),
        (missing, f"--report-to: expected {args.report_to} to be installed, found no such package"),
        (not re.fullmatch(devices, args.device), f"--device: expected {devices.replace('|', ', ')}, found {args.device}"),
        (Path(args.output_dir).is_file(), f"--output-dir: expected a folder, found the file {args.output_dir}"),
    ):
        if wrong:
            raise InputError(message)
    return args


def load(auto_class, name, flag, trunk_class=AutoModel):
    """A pretrained model in fp32 with every dropout at 0 (so that two forwards agree), a tokenizer or a critic; raises InputError."""
    try:
        if (os.path.isabs(name) or str(name).count("/") > 1 or str(name).startswith(".")) and not Path(name).is_dir():
            raise FileNotFoundError("no such folder")  # not a hub name either: nothing to ask the network for
        if auto_class is QuantileCritic:
            return auto_class.from_pretrained(name, trunk_class)
        if auto_class is AutoTokenizer:
            return auto_class.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if "drop" in key and type(value) in (int, float):
                setattr(config, key, 0.0)
        return auto_class.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)  # nothing is unpickled
    except Exception as error:  # a broken file or a missing one, each library in its own words
        raise InputError(f"{flag}: cannot load {str(name)!r}: {ro.one_line(error)}") from error


def context_of(model):
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def load_data(args, tokenizer, context):
    """-> training data, {name: evaluation data}; held-out prompts do not stand in the training data."""

    def prompts(flag, name, split, config=None, column="prompt"):
        return ro.load_prompts(flag, name, split, tokenizer, context - args.response_length, args.chat_template == "auto", config, column)

    if args.dataset_name is None:
        splits = {"in domain": "test", "out of domain": "ood"}
        evals = {name: prompts("--task", args.task, (split, args.eval_samples, args.seed)) for name, split in splits.items()}
        train = prompts("--task", args.task, ("train", 4096, args.seed))
    else:
        train, evals = prompts("--dataset-name", args.dataset_name, args.dataset_split, args.dataset_config, args.prompt_column), {}
        if args.eval_dataset_name:
            where = args.eval_dataset_name, args.eval_dataset_split, None, args.prompt_column
            held_out = prompts("--eval-dataset-name", *where)
            evals = {"held out": held_out.select(range(min(args.eval_samples, len(held_out))))}
        elif len(train) > 1:
            halves = train.train_test_split(min(args.eval_samples, len(train) // 2), seed=args.seed)
            train, evals = halves["train"], {"held out": halves["test"]}
    held_out = {str(prompt) for data in evals.values() for prompt in data["prompt"]}
    train = train.filter(lambda prompt: str(prompt) not in held_out, input_columns="prompt")
    if len(train) == 0:
        raise InputError("--dataset-name: expected prompts beside the held-out ones, found none: give --eval-dataset-name or fewer --eval-samples")
    if args.pseudo_label_noise:
        if "answer" not in train.column_names:
            raise InputError("--pseudo-label-noise: expected a column 'answer' in the data set, found none")
        labels = ro.pseudo_labels(train["answer"], args.pseudo_label_noise, torch.Generator().manual_seed(args.reward_noise_seed))
        train = train.add_column(ro.PSEUDO_LABEL, labels)
    return train, evals


def batch_rows(num_rows, episode, batch_size, seed):
    """The rows of the batch that begins at an episode: one seeded permutation of the data after another, nothing to remember."""
    rows = []
    while len(rows) < batch_size:
        epoch, start = divmod(episode + len(rows), num_rows)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        rows += order[start : start + batch_size - len(rows)].tolist()
    return rows


def sample_batch(state, args, batch, temperature, record_logprobs=False):
    """Responses from the policy, or in half precision from its bf16 copy, brought up to date: decoding reads every weight per token."""
    if state.sampler is not state.policy:
        torch._foreach_copy_([*state.sampler.parameters()], [*state.policy.parameters()])
    pad_id, stop_ids = state.pad_id, state.stop_ids
    take_turn = lambda prompt_ids: ro.sample(state.sampler, prompt_ids, pad_id, stop_ids, args.response_length, temperature, record_logprobs)
    if state.user is None:
        return take_turn(batch[ro.PROMPT_IDS])
    max_tokens = context_of(state.policy) - args.response_length
    return ro.converse(take_turn, batch, state.user, state.tokenizer, pad_id, stop_ids, args.max_turns, max_tokens)


def recorded_as_scored(state, args, rollout):
    """Whether sampling drew from the numbers that training computes, so that its log-probs need no scoring pass: asked once a run.

    A few architectures decode otherwise than they read; where sampling is bf16 nobody asks.
    """
    rows = torch.arange(min(8, args.batch_size))
    part = rollout[rows]
    difference = ro.response_logprobs(state.policy, part, args.temperature) - rollout.logprobs[rows, -part.mask.shape[1] :]
    return bool(difference.abs().max() < 1e-3)


def completions_of(state, rollout):
    """What the reward reads of each response: its text, or a whole conversation's messages."""
    return rollout.messages or ro.completion_texts(rollout, state.tokenizer, state.stop_ids)


def scores_of(state, args, batch, completions, answer="answer"):
    """The reward of completions by the column `answer`, before noise -> (B,)."""
    return ro.score(state.reward, batch, completions, answer)


@torch.no_grad()
def judge(state, args, batch, rollout):
    """The reward of each response, and without the noise and the penalty that training adds -> scores, true_scores (B,)."""
    completions = completions_of(state, rollout)
    true_scores = scores_of(state, args, batch, completions)
    labelled = scores_of(state, args, batch, completions, ro.PSEUDO_LABEL) if ro.PSEUDO_LABEL in batch else true_scores
    scores = ro.noisy_scores(labelled, args.reward_noise_fp, args.reward_noise_fn, args.reward_noise_outlier, state.noise)
    if args.reward_offset:
        scores = scores + ro.prompt_offsets(batch[ro.PROMPT_IDS], args.reward_offset, state.policy.config.vocab_size, args.reward_noise_seed)
    return (scores - args.missing_eos_penalty * rollout.truncated.cpu()).to(rollout.mask.device), true_scores


def rewards_of(args, scores, logprobs, ref_logprobs, mask):
    """Token rewards (B, T): the scores (B,), and the KL unless the method has it in the loss; with --whiten-rewards, over their std."""
    rewards = dvpo.token_rewards(scores, logprobs, ref_logprobs, mask, 0 if args.algo in GROUPED else args.kl_coef)
    return dvpo.masked_whiten(rewards, mask, shift_mean=False) if args.whiten_rewards else rewards


def after_truncated(values, rollout):
    """What values (B, T + 1, ...) hold after the last token of rows that were cut off, 0 for the others: -> (B, ...)."""
    after = values[:, -1]
    return torch.where(rollout.truncated.view(-1, *[1] * (after.dim() - 1)), after, 0)


@torch.no_grad()
def estimate(args, scores, rewards, head_quantiles, rollout):
    """Advantages (B, T) and the critic's targets (B, T, K) or None, each method its own way."""
    mask = rollout.mask
    if head_quantiles is not None:
        after = after_truncated(head_quantiles, rollout) if args.bootstrap_truncated else None
        head_quantiles = head_quantiles[:, : mask.shape[1]]
        quantiles = head_quantiles.mean(dim=2)
    if args.algo in GROUPED:
        return dvpo.group_advantages(scores, args.group_size, args.algo == "grpo").unsqueeze(1).expand(mask.shape), None
    if args.algo == "reinforce++":
        return dvpo.masked_whiten(dvpo.discounted_returns(rewards, mask, args.gamma), mask), None

    if args.algo == "robust":
        after = None if after is None else after[..., 0]
        advantages, targets = dvpo.robust_gae(rewards, head_quantiles[..., 0], mask, args.gamma, args.lam, after)
    else:
        after = None if after is None else after.mean(dim=1)
        advantages, targets = dvpo.distributional_gae(rewards, quantiles, mask, args.gamma, args.lam, after)
    return dvpo.masked_whiten(dvpo.scalar_advantage(advantages), mask), targets


def rows_text(rows):
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:8]))}" + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def assert_finite(iteration, tensors):
    """Raises InputError naming the first of {name: (B, ...) or None} that holds a number that is not finite, and its rows."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            rows = (~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
            raise InputError(f"iteration {iteration}: expected finite {name}, found others in {rows_text(rows)} of the batch")


@torch.no_grad()
def collect(state, args):
    """Samples a batch and computes all that the update needs -> experience {name: tensor}, metrics."""
    num_prompts = args.batch_size // args.group_size
    rows = batch_rows(len(state.data), state.iteration * num_prompts, num_prompts, args.seed)
    batch = state.data[[row for row in rows for _ in range(args.group_size)]]
    with state.autocast():
        rollout = sample_batch(state, args, batch, args.temperature, record_logprobs=state.trust_recorded is not False)
        forward = lambda function: ro.in_micro_batches(function, rollout, args.micro_batch_size, args.micro_batch_tokens)
        logprobs_of = lambda model: forward(lambda part: ro.response_logprobs(model, part, args.temperature))
        if state.trust_recorded is None:
            state.trust_recorded = recorded_as_scored(state, args, rollout)
        logprobs, head_quantiles = rollout.logprobs if state.trust_recorded else logprobs_of(state.policy), None
        with torch.inference_mode():
            ref_logprobs = logprobs_of(state.reference) if state.reference is not None else None
    scores, true_scores = judge(state, args, batch, rollout)
    rewards = rewards_of(args, scores, logprobs, ref_logprobs, rollout.mask)
    if state.critic is not None:
        if state.iteration == 0 and rollout.mask.any():
            state.critic.start_at(dvpo.discounted_returns(rewards, rollout.mask, args.gamma)[rollout.mask])
        with state.autocast():
            head_quantiles = forward(lambda part: ro.response_quantiles(state.critic, part, after_last=args.bootstrap_truncated))
    mask = rollout.mask
    advantages, targets = estimate(args, scores, rewards, head_quantiles, rollout)
    found = {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "quantiles": head_quantiles, "targets": targets, "advantages": advantages}
    assert_finite(state.iteration + 1, found)

    metrics = dvpo.rollout_metrics(scores, logprobs, ref_logprobs, mask, args.kl_coef)
    is_eos = torch.isin(rollout.response_ids, torch.tensor(state.stop_ids, device=mask.device)) & mask
    metrics |= {
        "objective/true_scores": true_scores.mean(), "val/num_eos_tokens": is_eos.sum(),
        "completions/mean_length": mask.sum(1).float().mean(), "completions/clipped_ratio": rollout.truncated.float().mean(),
    }  # fmt: skip
    if state.critic is not None:
        head_quantiles = head_quantiles[:, : mask.shape[1]]
        metrics["val/explained_var"] = dvpo.explained_variance(head_quantiles.mean(dim=(2, 3)), targets.mean(dim=-1), mask)
    if args.algo == "dvpo":
        returns = dvpo.discounted_returns(rewards, mask, args.gamma)
        metrics |= {f"quantile/{name}": value for name, value in dvpo.quantile_metrics(head_quantiles, returns, mask, args.alpha, args.beta).items()}
    experience = {"rollout": rollout, "logprobs": logprobs, "advantages": advantages, "targets": targets, "ref_logprobs": ref_logprobs}
    return experience, metrics


def policy_backward(state, args, part, old_logprobs, ref_logprobs, advantages, weights, num_tokens):
    """Adds the policy loss's gradient of a micro-batch -> metrics. A positive weight on a token's advantage is one on its loss."""
    with state.autocast():
        logprobs = ro.response_logprobs(state.policy, part, args.temperature)
    loss, metrics = dvpo.clipped_policy_loss(logprobs, old_logprobs, weights * advantages, part.mask, args.cliprange, num_tokens)
    if args.algo in GROUPED and ref_logprobs is not None:
        loss = loss + args.kl_coef * dvpo.masked_mean(weights * dvpo.kl_estimate(logprobs, ref_logprobs, "k3"), part.mask, num_tokens)
    loss.backward()
    return {"loss/policy_avg": loss.detach(), **{POLICY_METRICS[name]: value for name, value in metrics.items()}}


def critic_backward(state, args, part, targets, num_tokens):
    """Adds the critic loss's gradient of a micro-batch -> metrics."""
    kappa, risk = (args.kappa, state.risk) if args.algo == "dvpo" else (None, None)  # all that tells dvpo from ppo
    with state.autocast():
        head_quantiles = ro.response_quantiles(state.critic, part)
    loss, metrics = dvpo.critic_loss(head_quantiles, targets, part.mask, state.critic.levels, kappa, risk, num_tokens)
    loss.backward()
    return {"loss/value_avg": loss.detach(), **{f"loss/critic_{name}": value for name, value in metrics.items()}}


def update(state, args, experience):
    """Epochs of minibatch steps on one batch of experience; the policy rests during the critic's warm-up -> metrics.

    Nothing in the loop waits for a GPU but the question, once a minibatch, whether its losses and gradients are finite: Adam never
    forgets a NaN. If not, raises InputError naming the minibatch.
    """
    train_policy = state.critic is None or state.iteration >= args.critic_warmup_steps
    totals, num_steps = collections.Counter(), args.num_ppo_epochs * args.num_mini_batches
    models = [(state.critic, state.critic_optimizer)] * (state.critic is not None) + [(state.policy, state.optimizer)] * train_policy
    minibatches = [rows for _ in range(args.num_ppo_epochs) for rows in torch.randperm(args.batch_size).chunk(args.num_mini_batches)]
    for step, minibatch in enumerate(minibatches):
        sums = minibatch_backward(state, args, experience, minibatch, train_policy)
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm) for model, _ in models]
        finite = torch.stack([*norms, *(value for name, value in sums.items() if name.startswith("loss/"))]).isfinite().all().item()
        if not finite:
            where = f"iteration {state.iteration + 1}, minibatch {step + 1} of {num_steps}"
            raise InputError(f"{where}: expected finite losses and gradients, found others: is a learning rate too high?")
        for _, optimizer in models:
            optimizer.step()
            optimizer.zero_grad()
        totals.update(sums)
    return ({} if train_policy else RESTING) | {name: value / num_steps for name, value in totals.items()}


def minibatch_backward(state, args, experience, minibatch, train_policy):
    """Adds the gradients of a minibatch's losses, a micro-batch at a time -> metrics."""
    rollout, sums = experience["rollout"], collections.Counter()
    mask, token_weights = rollout[minibatch].mask, torch.ones_like(experience["logprobs"])
    num_tokens = mask.sum()
    if args.algo == "grpo":  # every response counts the same, and so its tokens the less the more they are
        token_weights[minibatch.to(mask.device), -mask.shape[1] :] = dvpo.sequence_weights(mask)
    elif args.algo == "dr_grpo":  # every token counts the same, whatever the lengths in the minibatch
        token_weights *= num_tokens / (len(minibatch) * args.response_length * (args.max_turns if state.user else 1))
    for rows in ro.micro_batches(rollout, minibatch, args.micro_batch_size, args.micro_batch_tokens):
        part, at = rollout[rows], rows.to(rollout.mask.device, non_blocking=True)  # an index on the CPU would wait for the GPU
        now = {name: value[at, -part.mask.shape[1] :] for name, value in experience.items() if isinstance(value, torch.Tensor)}
        if train_policy:
            weights = token_weights[at, -part.mask.shape[1] :]
            sums.update(policy_backward(state, args, part, now["logprobs"], now.get("ref_logprobs"), now["advantages"], weights, num_tokens))
        if state.critic is not None:
            sums.update(critic_backward(state, args, part, now["targets"], num_tokens))
    return sums


@torch.no_grad()
def examples(state, args, count=3):
    """Greedy responses to the first held-out prompts -> [{prompt, completion, score}], all as text but the score."""
    if not state.evals:
        return []
    data = next(iter(state.evals.values()))
    batch = data[: min(count, len(data))]
    with torch.random.fork_rng(), state.autocast():
        completions = completions_of(state, sample_batch(state, args, batch, 0.0))
    scores = scores_of(state, args, batch, completions).tolist()
    text = lambda turns: turns if isinstance(turns, str) else " / ".join(turn["content"] for turn in turns)
    return [{"prompt": text(p), "completion": text(c), "score": score} for p, c, score in zip(batch["prompt"], completions, scores)]


def shortened(text, width=100):
    """One line of at most so many characters: the end of a prompt, where the question stands."""
    text = " ".join(text.split())
    return text if len(text) <= width else "..." + text[3 - width :]


@torch.no_grad()
def evaluate(state, args):
    """Mean noise-free score of greedy and of sampled responses on each evaluation set -> {"name, greedy": score, ...}."""
    results = {}
    with torch.random.fork_rng(), tqdm(total=2 * sum(map(len, state.evals.values())), desc="evaluating", leave=False) as bar:
        torch.manual_seed(args.seed + 1)
        for name, mode in ((name, mode) for name in state.evals for mode in ("greedy", "sampled")):
            scores = []
            for batch in state.evals[name].iter(args.batch_size):
                with state.autocast():
                    rollout = sample_batch(state, args, batch, args.temperature if mode == "sampled" else 0.0)
                scores.append(scores_of(state, args, batch, completions_of(state, rollout)))
                bar.update(len(batch["prompt"]))
            results[f"{name}, {mode}"] = torch.cat(scores).mean().item()
    return results


def flushed(path):
    """A file or folder, on the disk and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_whole(path, text):
    """Text in a file: all of it, or what stood there before."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    flushed(aside)
    os.replace(aside, path)


def checkpoints(output_dir):
    """{iteration: folder} of all checkpoints in a run's folder, whole or not, oldest first."""
    found = {int(path.name[11:]): path for path in output_dir.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)}
    return dict(sorted(found.items()))


def random_states():
    """Every generator that is not the run's own, in types that torch.load(weights_only=True) reads."""
    name, keys, *rest = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}


def save_checkpoint(state, args):
    """Writes output_dir/checkpoint-ITERATION: policy/ and tokenizer, critic/, and state.pt to go on from; complete or not at all.

    The position in the data and in metrics.jsonl is the iteration. All but the newest two are deleted. Raises InputError.
    """
    output_dir = Path(args.output_dir)
    folder = output_dir / f"checkpoint-{state.iteration:06d}"
    aside = folder.with_suffix(".tmp")
    for left in [*output_dir.glob("checkpoint-[0-9]*.tmp"), *output_dir.glob("checkpoint-[0-9]*.old")]:  # by a run that was killed
        shutil.rmtree(left)
    if folder.exists():  # the run ended here before
        return folder
    try:
        state.policy.save_pretrained(aside / "policy")
        state.tokenizer.save_pretrained(aside / "policy")
        if state.critic is not None:
            state.critic.save_pretrained(aside / "critic")
        torch.save({
            "iteration": state.iteration, "before": state.before, "examples": state.examples, "seconds": time.time() - state.start,
            "optimizer": state.optimizer.state_dict(), "critic_optimizer": state.critic_optimizer.state_dict() if state.critic is not None else None,
            "random": random_states(), "noise": state.noise.get_state(),
        }, aside / "state.pt")  # fmt: skip
        for path in [*aside.rglob("*"), aside, output_dir / "metrics.jsonl"]:
            flushed(path)
    except Exception as error:  # a full disk, in each library's own words
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"--output-dir: cannot write {folder.name}, earlier ones are kept; found: {ro.one_line(error)}") from error
    os.replace(aside, folder)
    flushed(output_dir)
    for path in [*checkpoints(output_dir).values()][:-2]:
        shutil.rmtree(path.rename(path.with_suffix(".old")))
    return folder


def find_checkpoint(folder):
    """The newest checkpoint in a run's folder; raises InputError."""
    if found := checkpoints(folder):
        return [*found.values()][-1]
    found = "none" if folder.is_dir() else "no such folder"
    raise InputError(f"--resume: expected a checkpoint in {str(folder)!r}, found {found}; without --resume the run begins anew")


def restore(state, args):
    """Puts back what save_checkpoint wrote beside the weights."""
    saved = torch.load(Path(args.resume) / "state.pt", weights_only=True, map_location="cpu")
    state.iteration, state.before, state.examples, state.start = saved["iteration"], saved["before"], saved["examples"], time.time() - saved["seconds"]
    state.optimizer.load_state_dict(saved["optimizer"])
    if state.critic is not None:
        state.critic_optimizer.load_state_dict(saved["critic_optimizer"])
    state.noise.set_state(saved["noise"])
    torch.set_rng_state(saved["random"]["torch"])
    random.setstate(saved["random"]["python"])
    numpy.random.set_state(saved["random"]["numpy"])
    if torch.cuda.is_available() and len(saved["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])


def go_on_from(args, iteration, ended):
    """Moves what a run wrote after an iteration out of the way, with a copy of the metrics, and then cuts metrics.jsonl behind its line.

    ended: whether that iteration is the last one. In this order a kill in between leaves a folder that can be resumed.
    """
    output_dir = Path(args.output_dir)
    log = output_dir / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    if len(lines) < iteration:
        raise InputError(f"--resume: expected {iteration} lines in {log}, one for each iteration of {Path(args.resume).name}, found {len(lines)}")
    later = [path for number, path in checkpoints(output_dir).items() if number > iteration]
    later += [] if ended else output_dir.glob("results.json")
    set_aside(output_dir, later, "was resumed before its end", [log] if later else [])
    os.truncate(log, sum(map(len, lines[:iteration])))


def set_aside(output_dir, found=None, why="holds an earlier run", copied=()):
    """Moves an earlier run's files to output_dir/earlier-K, so that nothing is overwritten; the warm start stays for reuse."""
    if found is None:
        found = [path for name in ("args.json", "metrics.jsonl", "results.json", "checkpoint-*", "events.out.*") for path in output_dir.glob(name)]
    if found:
        earlier = next(path for k in itertools.count(1) if not (path := output_dir / f"earlier-{k}").exists())
        earlier.mkdir()
        for path in copied:
            shutil.copy(path, earlier)
        for path in found:
            path.rename(earlier / path.name)
        print(f"{output_dir} {why}: {len(found)} files and folders moved to {earlier}")


@contextlib.contextmanager
def stopping_on_signals(state):
    """While it lasts, Ctrl-C and SIGTERM set state.stop for the loop to see; a second one ends the program at once."""

    def handler(number, frame):
        if state.stop:
            raise KeyboardInterrupt
        state.stop = number
        os.write(2, b"\nstopping after this iteration, with a checkpoint; once more: at once, without one\n")

    known = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in known}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def logger(args, episode):
    """A function (metrics, episode) for --report-to, its package imported only here; a resumed run goes on behind its episode."""
    if args.report_to == "tensorboard":
        with importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.output_dir, purge_step=episode + 1) as writer:
            yield lambda metrics, episode: [writer.add_scalar(name, value, episode) for name, value in metrics.items() if value is not None]
    elif args.report_to != "none":  # wandb, and trackio in its image
        tracked = importlib.import_module(args.report_to).init(project="dvpo", config=vars(args))
        yield lambda metrics, episode: tracked.log(metrics, step=episode)
        tracked.finish()
    else:
        yield lambda metrics, episode: None


def critic_size(args):
    """(N heads, M quantiles) of the critic that --algo asks for."""
    return 1 if args.algo == "ppo" else args.num_heads, args.num_quantiles if args.algo == "dvpo" else 1


def build_critic(args, policy, context):
    """The critic that --algo asks for, from the checkpoint to resume, --critic-model-name-or-path or a copy of the policy; or None."""
    if args.algo not in CRITICS:
        return None
    own_trunk = args.critic_model_name_or_path
    trunk = load(AutoModel, own_trunk, "--critic-model-name-or-path") if own_trunk else policy.base_model
    if args.resume:  # the trunk's own class: not every model with code of its own has an AutoModel
        return load(QuantileCritic, Path(args.resume) / "critic", "--resume", trunk_class=type(trunk))
    if trunk.config.vocab_size < policy.config.vocab_size or context_of(trunk) < context:
        raise InputError("--critic-model-name-or-path: expected the policy's vocabulary and context, found a smaller one")
    return QuantileCritic(trunk if own_trunk else copy.deepcopy(trunk), *critic_size(args), args.tau_grid, seed=args.seed)


def build(args):
    """Everything a run needs, as one namespace: models, optimisers, data, reward, noise. State lives here and nowhere else."""
    state = argparse.Namespace(iteration=0, before=None, examples=None, start=time.time(), stop=None)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    reward, user = BUILT_IN[args.task] if args.dataset_name is None else (None, None)
    state.reward = ro.load_reward(args.reward, device) if args.reward else reward
    state.user = ro.load_function("--user", args.user) if args.user else user
    name = args.model_name_or_path or Path(args.output_dir) / "warm_start"
    if args.model_name_or_path is None:
        importlib.import_module("experiments.warm_start").warm_start(args.task, args.seed, name)
    state.policy = load(AutoModelForCausalLM, name, "--model-name-or-path")
    state.tokenizer = load(AutoTokenizer, name, "--model-name-or-path")
    state.tokenizer.pad_token = state.tokenizer.pad_token or state.tokenizer.eos_token
    state.stop_ids = ro.stop_token_ids(state.policy, state.tokenizer, args.stop_token)
    state.pad_id = ro.pad_token_id(state.tokenizer, state.stop_ids)
    if state.user:
        try:
            ro.turns_between("hello", state.tokenizer)
        except InputError as error:
            raise InputError(f"--user: it needs a chat template for all turns: {error}") from error
    context = context_of(state.policy)
    if args.response_length >= context:
        raise InputError(f"--response-length: expected less than the model's context of {context} tokens, found {args.response_length}")
    state.data, state.evals = load_data(args, state.tokenizer, context)
    for flag, data in (("--dataset-name", state.data), *(("--eval-dataset-name", data) for data in state.evals.values())):
        ro.assert_known_ids(flag, data, state.policy.config.vocab_size)
    state.reference = copy.deepcopy(state.policy).requires_grad_(False).to(device) if args.kl_coef > 0 else None
    state.critic = build_critic(args, state.policy, context)
    if args.resume:
        state.policy = load(AutoModelForCausalLM, Path(args.resume) / "policy", "--resume")
    for model in filter(None, (state.policy, state.critic)):
        model.to(device).train()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), "bf16 weights lose small Adam steps"
        if args.gradient_checkpointing:
            getattr(model, "trunk", model).gradient_checkpointing_enable()
    adam = lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    state.optimizer = adam(state.policy, args.learning_rate)
    state.critic_optimizer = adam(state.critic, args.critic_learning_rate) if state.critic is not None else None
    state.noise = torch.Generator().manual_seed(args.reward_noise_seed)
    weights = {term: getattr(args, f"{term}_weight") for term in RISK_TERMS}
    state.risk = RiskConfig(alpha=args.alpha, beta=args.beta, ratio=args.tail_ratio, **weights)
    state.half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.startswith("cuda"))
    state.trust_recorded = False if state.half else None  # None: to be found out
    state.autocast = lambda: torch.autocast(device.split(":")[0], torch.bfloat16, enabled=state.half)
    state.sampler = copy.deepcopy(state.policy).requires_grad_(False) if state.half else state.policy
    for parameter in state.sampler.parameters() if state.half else ():  # not .to(): a rotary embedding's buffers stay fp32
        parameter.data = parameter.data.bfloat16()
    return state


def train(args):
    """The whole run: evaluation, iterations, checkpoint, evaluation, and a table of what changed -> exit status."""
    output_dir, state = Path(args.output_dir), build(args)
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    transformers.set_seed(args.seed)  # of python, numpy and torch: a user's reward may draw from any
    if args.resume:
        try:
            restore(state, args)
        except Exception as error:  # a torn file can fail in any way
            raise InputError(f"--resume: expected a whole checkpoint in {args.resume}, found: {ro.one_line(error)}") from error
    if state.before is None:  # before an earlier run is moved: the reward may fail
        state.before, state.examples = evaluate(state, args), examples(state, args)
    print(f"{len(state.data)} prompts to train on; held out: {', '.join(f'{len(data)} {name}' for name, data in state.evals.items()) or 'none'}")
    if state.critic is not None and args.critic_warmup_steps >= num_iterations:
        print(f"note: --critic-warmup-steps {args.critic_warmup_steps} covers all {num_iterations} iterations: the policy will not change")
    if args.resume:
        print(f"going on from {args.resume}: {state.iteration} of {num_iterations} iterations are done")
        go_on_from(args, state.iteration, state.iteration >= num_iterations)
    else:
        set_aside(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    write_whole(output_dir / "args.json", json.dumps({"flags": {**vars(args), "resume": None}, "versions": versions}, indent=2) + "\n")
    bar, log = tqdm(total=num_iterations, initial=state.iteration, desc=args.algo), open(output_dir / "metrics.jsonl", "a")
    with bar, log, logger(args, state.iteration * args.batch_size) as log_elsewhere, stopping_on_signals(state):
        while state.iteration < num_iterations and not state.stop:
            begin = time.time()
            experience, metrics = collect(state, args)
            metrics |= update(state, args, experience)
            state.iteration += 1
            episode = state.iteration * args.batch_size
            num_tokens = experience["rollout"].mask.sum().item()
            metrics |= {"lr": args.learning_rate, "episode": episode, "eps": episode / (time.time() - state.start), "tps": num_tokens / (time.time() - begin)}
            if args.eval_steps and state.iteration % args.eval_steps == 0:
                metrics |= {f"eval/{name.replace(', ', '/').replace(' ', '_')}": value for name, value in evaluate(state, args).items()}
            numbers = for_json({"iteration": state.iteration, **{name: float(value) for name, value in metrics.items()}})
            log.write(json.dumps(numbers) + "\n")
            log.flush()
            log_elsewhere(numbers, episode)
            bar.set_postfix({name: "-" if numbers.get(key) is None else f"{numbers[key]:.2f}" for name, key in SHOWN.items()})
            bar.update()
            if args.save_steps and state.iteration % args.save_steps == 0 and state.iteration < num_iterations:
                save_checkpoint(state, args)
        folder = save_checkpoint(state, args)
    if state.iteration < num_iterations:
        print(f"stopped by {signal.Signals(state.stop).name} after iteration {state.iteration} of {num_iterations}: --resume {output_dir} goes on")
        return 128 + state.stop
    report(state, args, folder)
    return 0


def for_json(numbers):
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN


def report(state, args, folder):
    """The last evaluation, in results.json and as a table: scores and sample completions before and after, and where everything is."""
    output_dir, after, later = Path(args.output_dir), evaluate(state, args), examples(state, args)
    seconds = round(time.time() - state.start, 1)
    pairs = [{"prompt": old["prompt"], "before": old["completion"], "after": new["completion"], "scores": [old["score"], new["score"]]}
             for old, new in zip(state.examples, later)]  # fmt: skip
    results = {"before": for_json(state.before), "after": for_json(after), "seconds": seconds, "examples": pairs}
    write_whole(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"\n{'mean score':24} before    after   change")
    for name, value in state.before.items():
        print(f"{name:24} {value:6.3f}   {after[name]:6.3f}   {after[name] - value:+6.3f}")
    for pair in pairs:
        print(f"\nprompt  {shortened(pair['prompt'])}")
        for when, score in zip(("before", "after"), pair["scores"]):
            print(f"{when:7} {shortened(pair[when])}  ({score:g})")
    print(f"\npolicy and tokenizer: {folder / 'policy'}" + (f"\ncritic: {folder / 'critic'}" if state.critic is not None else ""))
    print(f"also in {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir() if path != folder))}\n{seconds:.0f} s in all")


def quiet():
    """The libraries' own messages and bars off."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def run_script(parser, function, args):
    """function(args), for the scripts in experiments/; what cannot work ends the program with one line and status 2."""
    quiet()
    try:
        function(args)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def main(argv=None):
    quiet()
    try:
        return train(parse_args(argv))
    except (InputError, OSError) as error:  # OSError: the output folder cannot be written
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from the newest checkpoint, where there is one", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
