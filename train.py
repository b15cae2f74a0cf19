"""DVPO: PPO for language models whose critic predicts the distribution of the return at every token. One GPU, or a CPU.

    python train.py                                   # a tiny model on a built-in task, noisy rewards, about two minutes
    python train.py --model-name-or-path FOLDER_OR_HUB_NAME --dataset-name FILE_OR_HUB_NAME --reward math

The loop, as data flows: prompts -> sample -> score (+ noise) -> log-probs, values -> token rewards -> GAE -> losses -> step.
`--algo ppo` runs the same lines with a scalar critic and a squared error.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import dvpo
import rollout as ro
from critic import QuantileCritic
from risk import RiskConfig
from rollout import InputError

# Defaults that differ between the tiny built-in model and a pretrained one: (built-in, pretrained).
MODEL_DEFAULTS = {
    "learning_rate": (1e-4, 1e-6), "critic_learning_rate": (1e-3, 1e-5), "total_episodes": (19200, 10000), "batch_size": (128, 64),
    "micro_batch_size": (128, 8), "response_length": (16, 256), "kl_coef": (0.02, 0.05),
    "reward_noise_fp": (0.2, 0.0), "reward_noise_fn": (0.2, 0.0), "eval_samples": (512, 128),
}  # fmt: skip


# ---------------------------------------------------------------- flags


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message}\n")


def make_parser():
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    group = None

    def flag(name, default=None, help="", **kwargs):
        names = [name] + ([name.replace("-", "_").replace("__", "--", 1)] if "-" in name[2:] else [])
        key = name[2:].replace("-", "_")
        if key in MODEL_DEFAULTS:
            shown = "default %g for the built-in model, %g for a pretrained one" % MODEL_DEFAULTS[key]
            kwargs.setdefault("type", type(MODEL_DEFAULTS[key][0]))
        else:
            shown = f"default {default}"
            if default is not None and "action" not in kwargs:
                kwargs.setdefault("type", type(default))
        group.add_argument(*names, default=default, help=f"{help} ({shown})".replace("%", "%%"), **kwargs)

    group = parser.add_argument_group("model and data")
    flag("--task", "dialogue", "built-in prompts and rewards, used without --dataset-name", choices=list(ro.TASKS))
    flag("--model-name-or-path", None, "policy: a hub name or a folder; without it a tiny model is warm-started on --task")
    flag("--critic-model-name-or-path", None, "the critic's trunk; without it a copy of the policy's")
    flag("--dataset-name", None, "prompts: a hub name or a json, jsonl or parquet file with a column 'prompt'")
    flag("--dataset-split", "train", "split of --dataset-name")
    flag("--eval-dataset-name", None, "prompts for evaluation; without it some of the training rows are held out")
    flag("--eval-dataset-split", "train", "split of --eval-dataset-name")
    flag("--reward", None, "math, choice, exact, model:NAME or module:function; --task has its own")
    flag("--chat-template", "auto", "auto: string prompts become a user's message if the model has a template", choices=["auto", "never"])
    flag("--stop-token", None, "one more token that ends a response, beside the model's own")

    group = parser.add_argument_group("budget")
    flag("--total-episodes", help="responses to sample in all")
    flag("--batch-size", help="responses per iteration")
    flag("--num-mini-batches", 2, "optimiser steps per epoch over a batch")
    flag("--micro-batch-size", help="responses per forward pass; changes memory, never the gradient")
    flag("--num-ppo-epochs", 2, "passes over each batch")
    flag("--response-length", help="most tokens per response")
    flag("--critic-warmup-steps", 5, "first iterations that train the critic only")

    group = parser.add_argument_group("algorithm")
    flag("--algo", "dvpo", "the critic: distributional, or scalar with a squared error", choices=["dvpo", "ppo"])
    flag("--learning-rate", help="policy, AdamW")
    flag("--critic-learning-rate", help="critic, AdamW")
    flag("--max-grad-norm", 1.0, "gradient norm above which a step is scaled down, each model on its own")
    flag("--cliprange", 0.2, "the ratio stays within 1 +- this")
    flag("--gamma", 1.0, "discount per token")
    flag("--lam", 0.95, "GAE lambda")
    flag("--kl-coef", help="reward per nat of k1 to the starting policy; 0 skips the reference model")
    flag("--temperature", 1.0, "of sampling, and of every log-prob")
    flag("--missing-eos-penalty", 0.0, "taken from the score of a response without a stop token")
    flag("--bootstrap-truncated", False, "count on V after a truncated response instead of 0", action="store_true")
    flag("--whiten-rewards", False, "divide token rewards by their standard deviation", action="store_true")

    group = parser.add_argument_group("distributional critic (dvpo)")
    flag("--num-quantiles", 200, "M")
    flag("--num-heads", 4, "N")
    flag("--kappa", 0.01, "half-width of the Huber corner, in reward units")
    flag("--tau-grid", "midpoint", "levels (j - 1/2)/M or j/M", choices=["midpoint", "right"])
    flag("--alpha", 0.1, "share of the lower tail")
    flag("--beta", 0.1, "share of the upper tail")
    flag("--tail-ratio", RiskConfig.ratio, "lower tail at most this times the upper one")
    for term in ("calibration", "shift", "shape", "curvature", "consistency"):
        flag(f"--{term}-weight", getattr(RiskConfig, term), f"weight of the {term} term; 0 turns it off")

    group = parser.add_argument_group("reward noise (training only, never evaluation)")
    flag("--reward-noise-fp", help="probability that a wrong answer is rewarded")
    flag("--reward-noise-fn", help="probability that a right answer is not")
    flag("--reward-noise-outlier", [0.0, 0.0], "with probability P the score loses up to SCALE", nargs=2, type=float, metavar=("P", "SCALE"))
    flag("--pseudo-label-noise", 0.0, "share of prompts whose label is wrong all run long")
    flag("--reward-noise-seed", 0, "seed of all of these")

    group = parser.add_argument_group("run")
    flag("--seed", 0, "of everything else")
    flag("--output-dir", None, "default runs/TASK-ALGO-SEED")
    flag("--save-steps", 0, "iterations between checkpoints; 0: at the end only")
    flag("--eval-steps", 0, "iterations between evaluations; 0: before and after only")
    flag("--eval-samples", help="held-out prompts per evaluation")
    flag("--resume", None, "go on from a checkpoint or run folder, or without a value from --output-dir", nargs="?", const="")
    flag("--report-to", "none", "also log to", choices=["none", "tensorboard", "wandb"])
    flag("--device", "auto", "auto, cpu or cuda")
    flag("--dtype", "auto", "of matrix products: float32, bfloat16 (autocast); auto: bfloat16 on cuda", choices=["auto", "float32", "bfloat16"])
    flag("--gradient-checkpointing", False, "trade time for memory in the update", action="store_true")
    return parser


def parse_args(argv=None):
    """Flags with every default filled in and every range checked; raises InputError. A resumed run has the flags it began with."""
    parser = make_parser()
    given = parser.parse_args(argv)
    if given.resume is not None:
        folder = find_checkpoint(Path(given.resume or given.output_dir or default_output_dir(given)))
        saved = json.loads((folder.parent / "args.json").read_text())["flags"]
        explicit = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(saved))))
        changeable = ("resume", "output_dir", "total_episodes", "save_steps", "eval_steps", "report_to", "device")
        for key, value in explicit.items():
            if value is not None and key not in changeable and value != saved[key]:
                raise InputError(f"--{key.replace('_', '-')}: {value} here, {saved[key]} in the run to resume; expected the same, or none")
        kept = {key: explicit[key] for key in changeable if explicit[key] is not None}
        given = argparse.Namespace(**{**saved, **kept, "resume": str(folder), "output_dir": str(folder.parent)})
    pretrained = given.model_name_or_path is not None
    for key, defaults in MODEL_DEFAULTS.items():
        if getattr(given, key) is None:
            setattr(given, key, defaults[pretrained])
    given.output_dir = given.output_dir or default_output_dir(given)
    check_flags(given)
    return given


def default_output_dir(args):
    return f"runs/{Path(args.dataset_name).stem if args.dataset_name else args.task}-{args.algo}-seed{args.seed}"


def check_flags(args):
    """Refuses what cannot work before anything is loaded or written; raises InputError naming the flag."""
    at_least_1 = "total_episodes batch_size num_mini_batches micro_batch_size num_ppo_epochs response_length num_quantiles num_heads eval_samples"
    at_least_0 = "critic_warmup_steps missing_eos_penalty kappa kl_coef tail_ratio calibration_weight shift_weight shape_weight \
        curvature_weight consistency_weight seed reward_noise_seed save_steps eval_steps"
    above_0 = "learning_rate critic_learning_rate max_grad_norm cliprange temperature"
    unit = "gamma lam reward_noise_fp reward_noise_fn pseudo_label_noise"
    rules = [
        (at_least_1, lambda x: 1 <= x < math.inf, "at least 1"),
        (at_least_0, lambda x: 0 <= x < math.inf, "a finite number >= 0"),
        (above_0, lambda x: 0 < x < math.inf, "a finite number above 0"),
        (unit, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
        ("alpha beta", lambda x: 0 < x <= 1, "a number in (0, 1]"),
        ("reward_noise_outlier", lambda x: 0 <= x[0] <= 1 and 0 <= x[1] < math.inf, "P in [0, 1] and SCALE >= 0"),
    ]
    for keys, is_good, expected in rules:
        for key in keys.split():
            if not is_good(getattr(args, key)):
                raise InputError(f"--{key.replace('_', '-')}: expected {expected}, found {getattr(args, key)}")
    if args.batch_size % args.num_mini_batches:
        raise InputError(f"--num-mini-batches: expected a divisor of --batch-size {args.batch_size}, found {args.num_mini_batches}")
    if args.dataset_name and not args.model_name_or_path:
        raise InputError("--model-name-or-path: expected one with --dataset-name, found none (the built-in model only knows its --task)")
    if args.dataset_name and not args.reward:
        raise InputError("--reward: expected math, choice, exact, model:NAME or module:function with --dataset-name, found none")
    if args.device != "cpu" and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device: {args.device}, but torch finds no CUDA device; expected cpu or auto")


# ---------------------------------------------------------------- models


def load(auto_class, name, flag):
    """A pretrained model in fp32 with every dropout at 0 (so that two forwards agree); raises InputError in one line."""
    try:
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if ("drop" in key) and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, key, 0.0)
        return auto_class.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{flag}: cannot load {name!r}: {' '.join(str(error).split())[:160]}") from error


def load_policy(name):
    policy = load(AutoModelForCausalLM, name, "--model-name-or-path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model-name-or-path: no tokenizer in {name!r}: {' '.join(str(error).split())[:160]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return policy, tokenizer


def warm_start(args, folder):
    """Makes the built-in model: a tiny Llama, briefly taught the task by examples (few of them revised or long), saved in folder.

    A run with the same task and seed finds it there and skips the work.
    """
    settings = {"task": args.task, "seed": args.seed, "version": 1}
    if (folder / "settings.json").exists() and json.loads((folder / "settings.json").read_text()) == settings:
        return
    torch.manual_seed(args.seed)
    tokenizer = ro.task_tokenizer(args.task)
    hidden, layers, steps, batch_size = {"dialogue": (64, 3, 120, 64), "sums": (96, 3, 700, 128)}[args.task]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rows = ro.task_rows(args.task, "warm", 4096 if args.task == "dialogue" else 16384, args.seed)
    prompts = ro.encode_prompts([row["prompt"] for row in rows], tokenizer)
    answers = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    for step in tqdm(range(steps), desc="warm start", leave=False):
        batch = torch.randperm(len(rows))[:batch_size].tolist()
        width = max(len(prompts[i]) + len(answers[i]) for i in batch)
        pads = [width - len(prompts[i]) - len(answers[i]) for i in batch]
        ids = torch.tensor([prompts[i] + answers[i] + [0] * pad for i, pad in zip(batch, pads)])
        labels = torch.tensor([[-100] * len(prompts[i]) + answers[i] + [-100] * pad for i, pad in zip(batch, pads)])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "settings.json").write_text(json.dumps(settings))


# ---------------------------------------------------------------- data


def load_rows(name, split, flag):
    """A data set as {column: list}; raises InputError."""
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        if kind and not Path(name).is_file():
            raise FileNotFoundError("no such file")
        data = load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, split=split)
    except Exception as error:  # datasets raises many kinds, the cause of the last one says most
        raise InputError(f"{flag}: cannot load {name!r}: {' '.join(str(error.__cause__ or error).split())[:160]}") from error
    if "prompt" not in data.column_names:
        raise InputError(f"{flag}: {name!r}: expected a column 'prompt', found {', '.join(data.column_names) or 'none'}")
    if len(data) == 0:
        raise InputError(f"{flag}: {name!r}: expected at least one row, found none")
    return data.to_dict()


def encode(columns, tokenizer, args, context, flag):
    """{prompt, ...} -> {prompt, prompt_ids, ...}; raises InputError for a prompt that leaves no room for the response."""
    try:
        prompt_ids = ro.encode_prompts(columns["prompt"], tokenizer, args.chat_template == "auto")
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    for row, ids in enumerate(prompt_ids):
        if len(ids) + args.response_length > context:
            found = f"a prompt of {len(ids)} tokens + --response-length {args.response_length}"
            raise InputError(f"{flag}: row {row}: {found}: expected at most {context} tokens, the model's context")
    return {**columns, "prompt_ids": prompt_ids}


def take(data, rows):
    return {name: [values[row] for row in rows] for name, values in data.items()}


def load_data(args, tokenizer, context):
    """-> training data and {name: evaluation data}, each {prompt, prompt_ids, columns for the reward...}."""
    if args.dataset_name is None:

        def rows_of(split, size, exclude=()):
            rows = ro.task_rows(args.task, split, size, args.seed, exclude)
            return encode({name: [row[name] for row in rows] for name in ("prompt", "answer")}, tokenizer, args, context, "--task")

        evals = {"in domain": rows_of("test", args.eval_samples), "out of domain": rows_of("ood", args.eval_samples)}
        train = rows_of("train", 4096, {str(prompt) for prompt in evals["in domain"]["prompt"]})
    else:
        train = encode(load_rows(args.dataset_name, args.dataset_split, "--dataset-name"), tokenizer, args, context, "--dataset-name")
        order = torch.randperm(len(train["prompt"]), generator=torch.Generator().manual_seed(args.seed)).tolist()
        if args.eval_dataset_name:
            held_out = load_rows(args.eval_dataset_name, args.eval_dataset_split, "--eval-dataset-name")
            held_out = take(held_out, range(min(args.eval_samples, len(held_out["prompt"]))))
            held_out = encode(held_out, tokenizer, args, context, "--eval-dataset-name")
        else:
            num_held_out = min(args.eval_samples, len(order) // 2)
            held_out, train = take(train, order[:num_held_out]), take(train, order[num_held_out:])
        evals = {"held out": held_out} if held_out["prompt"] else {}
    if args.pseudo_label_noise:
        if "answer" not in train:
            raise InputError("--pseudo-label-noise: expected a column 'answer' in the data set, found none")
        train["label"] = ro.pseudo_labels(train["answer"], args.pseudo_label_noise, torch.Generator().manual_seed(args.reward_noise_seed))
    return train, evals


def batch_rows(num_rows, episode, batch_size, seed):
    """The rows of the batch that begins at an episode: one seeded permutation of the data after another, nothing to remember."""
    rows = []
    while len(rows) < batch_size:
        epoch, start = divmod(episode + len(rows), num_rows)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        rows += order[start : start + batch_size - len(rows)].tolist()
    return rows


# ---------------------------------------------------------------- one iteration


def reward_of(reward, batch, texts, answer="answer"):
    """Scores of a batch; answer names the column that the reward function gets as its `answer`."""
    columns = {name: values for name, values in batch.items() if name not in ("prompt", "prompt_ids", "answer", "label")}
    if answer in batch:
        columns["answer"] = batch[answer]
    return ro.score(reward, batch["prompt"], texts, columns)


def in_micro_batches(function, rollout, size):
    """function(rollout of some rows) for all rows, a few at a time by length, put together with zeros where rows are shorter."""
    lengths = rollout.attention_mask.sum(1)
    result = None
    for rows in lengths.argsort(descending=True, stable=True).split(size):
        part = function(rollout[rows])
        if result is None:  # the first rows are the longest, but their response need not be
            extra = part.shape[1] - rollout[rows].mask.shape[1]
            result = part.new_zeros(len(lengths), rollout.mask.shape[1] + extra, *part.shape[2:])
        result[rows, : part.shape[1]] = part
    return result


@torch.no_grad()
def collect(state, args):
    """Samples a batch and computes all that the update needs -> experience {name: tensor}, metrics."""
    rows = batch_rows(len(state.data["prompt"]), state.episode, args.batch_size, args.seed)
    batch = take(state.data, rows)
    with state.autocast():
        rollout = ro.sample(state.policy, batch["prompt_ids"], state.pad_id, state.stop_ids, args.response_length, args.temperature)
        logprobs = in_micro_batches(lambda part: ro.response_logprobs(state.policy, part, args.temperature), rollout, args.micro_batch_size)
        ref_logprobs = logprobs
        if state.reference is not None:
            ref_logprobs = in_micro_batches(lambda part: ro.response_logprobs(state.reference, part, args.temperature), rollout, args.micro_batch_size)
        head_quantiles = in_micro_batches(lambda part: ro.response_quantiles(state.critic, part), rollout, args.micro_batch_size)
    texts = ro.completion_texts(rollout, state.tokenizer)
    true_scores = reward_of(state.reward, batch, texts)
    labelled = reward_of(state.reward, batch, texts, "label") if "label" in batch else true_scores
    scores = ro.noisy_scores(labelled, args.reward_noise_fp, args.reward_noise_fn, args.reward_noise_outlier, state.noise)
    scores = (scores - args.missing_eos_penalty * rollout.truncated.cpu()).to(logprobs.device)

    mask = rollout.mask
    rewards = dvpo.token_rewards(scores, logprobs, ref_logprobs, mask, args.kl_coef)
    if args.whiten_rewards:
        rewards = dvpo.masked_whiten(rewards, mask, shift_mean=False)
    head_quantiles, after_last = head_quantiles[:, :-1], head_quantiles[:, -1].mean(dim=1)
    quantiles = head_quantiles.mean(dim=2)
    bootstrap = torch.where(rollout.truncated[:, None], after_last, 0) if args.bootstrap_truncated else None
    advantages, targets = dvpo.distributional_gae(rewards, quantiles, mask, args.gamma, args.lam, bootstrap)
    experience = {
        "rollout": rollout, "logprobs": logprobs, "targets": targets,
        "advantages": dvpo.masked_whiten(dvpo.scalar_advantage(advantages), mask),
    }  # fmt: skip

    returns = rewards.flip(1).cumsum(1).flip(1)
    kl = torch.where(mask, dvpo.kl_estimate(logprobs, ref_logprobs, "k1"), 0).sum(1)
    is_eos = torch.isin(rollout.response_ids, torch.tensor(state.stop_ids, device=mask.device)) & mask
    metrics = {
        "objective/kl": kl.mean(),
        "objective/scores": scores.mean(),
        "objective/true_scores": true_scores.mean(),
        "objective/entropy": -torch.where(mask, logprobs, 0).sum(1).mean(),
        "objective/rlhf_reward": scores.mean() - args.kl_coef * kl.mean(),
        "val/num_eos_tokens": is_eos.sum(),
        "val/explained_var": dvpo.explained_variance(quantiles.mean(-1), targets.mean(-1), mask),
        "completions/mean_length": mask.sum(1).float().mean(),
        "completions/clipped_ratio": rollout.truncated.float().mean(),
    }
    if args.algo == "dvpo":
        quantile = dvpo.quantile_metrics(head_quantiles, returns, mask, args.alpha, args.beta)
        metrics.update({f"quantile/{name}": value for name, value in quantile.items()})
    return experience, metrics


def update(state, args, experience):
    """Epochs of minibatch steps on one batch of experience; the policy rests during the critic's warm-up -> metrics."""
    train_policy = state.iteration >= args.critic_warmup_steps
    kappa, risk = (args.kappa, state.risk) if args.algo == "dvpo" else (None, None)
    rollout, totals, num_steps = experience["rollout"], {}, 0

    def add(prefix, values):
        for name, value in values.items():
            totals[prefix + name] = totals.get(prefix + name, 0) + value.detach()

    for _ in range(args.num_ppo_epochs):
        for minibatch in torch.randperm(args.batch_size).chunk(args.num_mini_batches):
            num_tokens = rollout.mask[minibatch].sum()
            lengths = rollout.attention_mask[minibatch].sum(1).cpu()
            for rows in minibatch[lengths.argsort(stable=True)].split(args.micro_batch_size):
                part = rollout[rows]
                old_logprobs, advantages, targets = (experience[name][rows, : part.mask.shape[1]] for name in ("logprobs", "advantages", "targets"))
                with state.autocast():
                    if train_policy:
                        logprobs = ro.response_logprobs(state.policy, part, args.temperature)
                    head_quantiles = ro.response_quantiles(state.critic, part)[:, :-1]
                if train_policy:
                    loss, metrics = dvpo.clipped_policy_loss(logprobs, old_logprobs, advantages, part.mask, args.cliprange, num_tokens)
                    loss.backward()
                    add("policy ", {"loss": loss, **metrics})
                loss, metrics = dvpo.critic_loss(head_quantiles, targets, part.mask, state.critic.levels, kappa, risk, num_tokens)
                loss.backward()
                add("critic ", {"loss": loss, **metrics})
            for model, optimizer in ((state.policy, state.optimizer), (state.critic, state.critic_optimizer)):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if not torch.isfinite(norm):
                    raise InputError(f"iteration {state.iteration}: the gradient is not finite; expected finite losses: lower --learning-rate?")
                if model is state.critic or train_policy:
                    optimizer.step()
                optimizer.zero_grad()
            num_steps += 1
    mean = {name: value / num_steps for name, value in totals.items()}
    renamed = {
        "policy/approxkl_avg": mean.get("policy approx_kl", 0.0), "policy/clipfrac_avg": mean.get("policy clipfrac", 0.0),
        "loss/policy_avg": mean.get("policy loss", 0.0), "loss/value_avg": mean["critic loss"], "val/ratio": mean.get("policy ratio", 1.0),
    }  # fmt: skip
    return renamed | {name.replace("critic ", "loss/critic_"): value for name, value in mean.items() if name.startswith("critic ") and name != "critic loss"}


@torch.no_grad()
def evaluate(state, args):
    """Mean noise-free score of greedy and of sampled responses on each evaluation set -> {"name, greedy": score, ...}."""
    results = {}
    with torch.random.fork_rng(), tqdm(total=2 * sum(len(data["prompt"]) for data in state.evals.values()), desc="evaluating", leave=False) as bar:
        torch.manual_seed(args.seed + 1)
        for name, data in state.evals.items():
            for mode, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
                scores = []
                for start in range(0, len(data["prompt"]), args.batch_size):
                    batch = take(data, range(start, min(start + args.batch_size, len(data["prompt"]))))
                    with state.autocast():
                        rollout = ro.sample(state.policy, batch["prompt_ids"], state.pad_id, state.stop_ids, args.response_length, temperature)
                    scores.append(reward_of(state.reward, batch, ro.completion_texts(rollout, state.tokenizer)))
                    bar.update(len(batch["prompt"]))
                results[f"{name}, {mode}"] = torch.cat(scores).mean().item()
    return results


# ---------------------------------------------------------------- state on disk


def save_checkpoint(state, args):
    """Writes output_dir/checkpoint-ITERATION: policy/ and tokenizer, critic/, and state.pt to go on from; complete or not at all."""
    folder = Path(args.output_dir) / f"checkpoint-{state.iteration:06d}"
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    state.policy.save_pretrained(aside / "policy")
    state.tokenizer.save_pretrained(aside / "policy")
    state.critic.save_pretrained(aside / "critic")
    resume = {
        "iteration": state.iteration, "episode": state.episode, "before": state.before, "seconds": time.time() - state.start,
        "optimizer": state.optimizer.state_dict(), "critic_optimizer": state.critic_optimizer.state_dict(),
        "rng": torch.get_rng_state(), "noise": state.noise.get_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip
    torch.save(resume, aside / "state.pt")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def find_checkpoint(folder):
    """The folder itself if it is a checkpoint, else the newest one in it; raises InputError."""
    if (folder / "state.pt").exists():
        return folder
    found = sorted(path.parent for path in folder.glob("checkpoint-*/state.pt") if path.parent.suffix != ".tmp")
    if not found:
        raise InputError(f"--resume: expected a checkpoint in {str(folder)!r}, found {'none' if folder.is_dir() else 'no such folder'}")
    return found[-1]


def restore(state, args, folder):
    """Puts back what save_checkpoint wrote beside the weights, and drops the metrics of later iterations."""
    saved = torch.load(folder / "state.pt", weights_only=True)
    state.iteration, state.episode, state.before = saved["iteration"], saved["episode"], saved["before"]
    state.start = time.time() - saved["seconds"]
    state.optimizer.load_state_dict(saved["optimizer"])
    state.critic_optimizer.load_state_dict(saved["critic_optimizer"])
    torch.set_rng_state(saved["rng"])
    state.noise.set_state(saved["noise"])
    if saved["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    log = Path(args.output_dir) / "metrics.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["iteration"] <= state.iteration]
    log.write_text("".join(line + "\n" for line in kept))


def set_aside(output_dir):
    """Moves an earlier run's files to output_dir/earlier-K, so that nothing is overwritten; the warm start stays for reuse."""
    found = [path for path in output_dir.glob("*") if path.name in ("args.json", "metrics.jsonl", "results.json") or path.name.startswith("checkpoint-")]
    if found:
        number = 1
        while (output_dir / f"earlier-{number}").exists():
            number += 1
        (output_dir / f"earlier-{number}").mkdir()
        for path in found:
            path.rename(output_dir / f"earlier-{number}" / path.name)
        print(f"{output_dir} holds an earlier run: moved to {output_dir / f'earlier-{number}'}")


def make_logger(args):
    """A function (metrics, episode) for --report-to, its package imported only here."""
    try:
        if args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(args.output_dir)
            return lambda metrics, episode: [writer.add_scalar(name, value, episode) for name, value in metrics.items() if value is not None]
        if args.report_to == "wandb":
            import wandb

            wandb.init(project="dvpo", config=vars(args), dir=args.output_dir)
            return lambda metrics, episode: wandb.log(metrics, step=episode)
    except ImportError as error:
        raise InputError(f"--report-to: {args.report_to} needs a package that is not installed: {error}") from error
    return lambda metrics, episode: None


# ---------------------------------------------------------------- the run


def build(args):
    """Everything a run needs, as one namespace: models, optimisers, data, reward, noise. State lives here and nowhere else."""
    state = argparse.Namespace(iteration=0, episode=0, before=None, start=time.time())
    state.reward = ro.load_reward(args.reward or {"sums": "math", "dialogue": "exact"}[args.task])
    output_dir = Path(args.output_dir)
    name = args.model_name_or_path
    if name is None:
        warm_start(args, output_dir / "warm_start")
        name = str(output_dir / "warm_start")
    state.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    state.policy, state.tokenizer = load_policy(name)
    context = getattr(state.policy.config, "max_position_embeddings", None) or math.inf
    state.data, state.evals = load_data(args, state.tokenizer, context)
    state.stop_ids = ro.stop_token_ids(state.policy, state.tokenizer, args.stop_token)
    state.pad_id = state.tokenizer.pad_token_id if state.tokenizer.pad_token_id is not None else state.stop_ids[0]
    state.reference = copy.deepcopy(state.policy).requires_grad_(False).to(state.device) if args.kl_coef > 0 else None
    if args.critic_model_name_or_path:
        trunk = load(AutoModel, args.critic_model_name_or_path, "--critic-model-name-or-path")
    else:
        trunk = copy.deepcopy(state.policy.base_model)
    size = (args.num_heads, args.num_quantiles) if args.algo == "dvpo" else (1, 1)
    state.critic = QuantileCritic(trunk, *size, args.tau_grid, seed=args.seed)
    if args.resume:
        state.policy = load(AutoModelForCausalLM, Path(args.resume) / "policy", "--resume")
        state.critic = QuantileCritic.from_pretrained(Path(args.resume) / "critic")
    for model in (state.policy, state.critic):
        model.to(state.device).train()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), "bf16 weights lose small Adam steps"
    if args.gradient_checkpointing:
        state.policy.gradient_checkpointing_enable()
        state.critic.trunk.gradient_checkpointing_enable()
    state.optimizer = torch.optim.AdamW(state.policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    state.critic_optimizer = torch.optim.AdamW(state.critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, fused=True)
    state.noise = torch.Generator().manual_seed(args.reward_noise_seed)
    weights = {term: getattr(args, f"{term}_weight") for term in ("calibration", "shift", "shape", "curvature", "consistency")}
    state.risk = RiskConfig(alpha=args.alpha, beta=args.beta, ratio=args.tail_ratio, **weights)
    kind = state.device.split(":")[0]
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and kind == "cuda")
    state.autocast = lambda: torch.autocast(kind, torch.bfloat16) if half else contextlib.nullcontext()
    return state


def plain(value):
    """A metric as JSON has it: numbers, and null for NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


def table(before, after):
    """The evaluation before and after, one line each."""
    width = max(map(len, before), default=0)
    lines = [f"{'mean score':{width}}   before    after   change"]
    return "\n".join(lines + [f"{name:{width}}   {before[name]:6.3f}   {after[name]:6.3f}   {after[name] - before[name]:+6.3f}" for name in before])


def train(args):
    """The whole run -> {before, after}, the evaluation scores."""
    output_dir = Path(args.output_dir)
    state = build(args)
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    torch.manual_seed(args.seed)
    if args.resume:
        restore(state, args, Path(args.resume))
    else:
        set_aside(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
        (output_dir / "args.json").write_text(json.dumps({"flags": {**vars(args), "resume": None}, "versions": versions}, indent=2) + "\n")
        state.before = evaluate(state, args)
    log_elsewhere = make_logger(args)
    with open(output_dir / "metrics.jsonl", "a") as log, tqdm(total=num_iterations, initial=state.iteration, desc=args.algo) as bar:
        while state.iteration < num_iterations:
            experience, metrics = collect(state, args)
            metrics.update(update(state, args, experience))
            state.iteration += 1
            state.episode += args.batch_size
            metrics.update({"lr": args.learning_rate, "episode": state.episode, "eps": state.episode / (time.time() - state.start)})
            if args.eval_steps and state.iteration % args.eval_steps == 0:
                metrics.update({f"eval/{name.replace(', ', '/').replace(' ', '_')}": value for name, value in evaluate(state, args).items()})
            metrics = {"iteration": state.iteration, **{name: plain(value) for name, value in metrics.items()}}
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            log_elsewhere(metrics, state.episode)
            shown = {"score": "objective/scores", "true": "objective/true_scores", "kl": "objective/kl", "ev": "val/explained_var", "clip": "policy/clipfrac_avg"}
            bar.set_postfix({name: "-" if metrics[key] is None else f"{metrics[key]:.2f}" for name, key in shown.items()})
            bar.update()
            if args.save_steps and state.iteration % args.save_steps == 0 and state.iteration < num_iterations:
                save_checkpoint(state, args)
    folder = save_checkpoint(state, args)
    after = evaluate(state, args)
    results = {"before": state.before, "after": after, "seconds": round(time.time() - state.start, 1)}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(state.before, after)}\n")
    print(f"policy and tokenizer: {folder / 'policy'}\ncritic: {folder / 'critic'}\nmetrics: {output_dir / 'metrics.jsonl'}")
    print(f"flags: {output_dir / 'args.json'}\nresults: {output_dir / 'results.json'}\n{results['seconds']:.0f} s in all")
    return results


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        train(parse_args(argv))
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
