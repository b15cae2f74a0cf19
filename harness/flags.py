"""The flags of train.py. Without torch or transformers: --help and a refused flag are quick."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tasks import one_line


class Algorithm(NamedTuple):
    critic: str  # what predicts returns: N heads of M quantiles, a scalar, N scalars, or none
    kl: str  # where the KL to the starting policy goes: into the token rewards, or the loss
    weights: str  # each token or response counts the same; constant: tokens over the most possible


ALGORITHMS = {
    "dvpo": Algorithm(critic="quantiles", kl="reward", weights="token"),
    "ppo": Algorithm(critic="scalar", kl="reward", weights="token"),
    "robust": Algorithm(critic="scalars", kl="reward", weights="token"),
    "grpo": Algorithm(critic="none", kl="loss", weights="response"),
    "dr_grpo": Algorithm(critic="none", kl="loss", weights="constant"),
    "reinforce++": Algorithm(critic="none", kl="reward", weights="token"),
}
RISK_TERMS = ("calibration", "shift", "shape", "curvature", "consistency")

# group: (name, default, allowed, help). A default in a tuple is (built-in model, pretrained
# model). allowed: an interval, a list of choices, or None for text and switches.
FLAGS = {
    "model and data": [
        ("task", "dialogue", ["sums", "dialogue", "booking"], "built-in, without --dataset-name"),
        ("model-name-or-path", None, None, "policy: hub name or folder; else a tiny model is made"),
        ("critic-model-name-or-path", None, None, "the critic's trunk; else the policy's"),
        ("dataset-name", None, None, "prompts: a hub name, or a json, jsonl or parquet file"),
        ("dataset-config", None, None, "config of the data set, where the hub asks for one"),
        ("dataset-split", "train", None, "split of --dataset-name"),
        ("prompt-column", "prompt", None, "the column with the prompts, in both data sets"),
        ("eval-dataset-name", None, None, "held-out prompts; else training rows"),
        ("eval-dataset-split", "train", None, "split of --eval-dataset-name"),
        ("reward", None, None, "math, choice, exact, model:NAME or module:function"),
        ("user", None, None, "module:function that answers the policy, for conversations"),
        ("chat-template", "auto", ["auto", "never"], "auto: strings are user messages"),
        ("stop-token", None, None, "one more token that ends a response, beside the model's own"),
    ],
    "budget": [
        ("total-episodes", (14080, 10000), "[1, inf)", "responses to sample in all"),
        ("batch-size", (128, 64), "[1, inf)", "responses per iteration"),
        ("num-mini-batches", (8, 2), "[1, inf)", "optimiser steps per epoch over a batch"),
        ("micro-batch-size", (128, 64), "[1, inf)", "most responses per scoring or update pass"),
        ("micro-batch-tokens", 4096, "[1, inf)", "most tokens per such pass, padding too"),
        ("num-ppo-epochs", (1, 2), "[1, inf)", "passes over each batch"),
        ("response-length", (16, 256), "[1, inf)", "most tokens per response, or per turn"),
        ("max-turns", 6, "[1, inf)", "most turns of the policy in a conversation"),
        ("critic-warmup-steps", 5, "[0, inf)", "first iterations that train the critic only"),
    ],
    "algorithm": [
        ("algo", "dvpo", [*ALGORITHMS], "dvpo or a baseline; the last three have no critic"),
        ("group-size", 0, "[0, inf)", "responses per prompt; 0: 8 for grpo and dr_grpo, else 1"),
        ("learning-rate", (2e-4, 1e-06), "(0, inf)", "policy, AdamW"),
        ("critic-learning-rate", (3e-3, 1e-05), "(0, inf)", "critic, AdamW"),
        ("max-grad-norm", 1.0, "(0, inf)", "gradient norm above which a step is scaled down"),
        ("cliprange", 0.2, "(0, inf)", "no gain from a ratio beyond 1 +- this"),
        ("gamma", 1.0, "[0, 1]", "discount per token"),
        ("lam", 0.95, "[0, 1]", "GAE lambda"),
        ("kl-coef", (0.02, 0.05), "[0, inf)", "per nat to the starting policy; 0: no reference"),
        ("temperature", 1.0, "[0.01, 100]", "of sampling, and of every log-prob"),
        ("missing-eos-penalty", 0.0, "[0, inf)", "taken from the score of a truncated response"),
        ("bootstrap-truncated", False, None, "count on V after a truncated response instead of 0"),
        ("whiten-rewards", False, None, "token rewards scaled to variance 1 about their mean"),
    ],
    "distributional critic (readouts and heads: of other critics, too)": [
        ("readout", "mean", ["mean", "spread"], "the mean, or advantages in spreads, bounded"),
        ("readout-width", 1.0, "(0, inf)", "spreads at which the readout is 0.76"),
        ("num-quantiles", (50, 200), "[1, 10000]", "M"),
        ("num-heads", 4, "[1, 1000]", "N"),
        ("kappa", 0.01, "[0, inf)", "half-width of the Huber corner, in the critic's unit"),
        ("tau-grid", "midpoint", ["midpoint", "right"], "levels (j - 1/2)/M or j/M"),
        ("alpha", 0.1, "(0, 1]", "share of the lower tail"),
        ("beta", 0.1, "(0, 1]", "share of the upper tail"),
        ("tail-ratio", 0.5, "[0, inf)", "lower tail at most this times the upper one"),
        ("tail-reach", 4.0, "[0, inf)", "mean deviations beyond which shape pushes no quantile"),
        ("calibration-weight", 0.01, "[0, inf)", "tail means as in the targets; 0: off"),
        ("shift-weight", 0.1, "[0, inf)", "the mean stays while tails move; 0: off"),
        ("shape-weight", 0.1, "[0, inf)", "the --tail-ratio of tails; 0: off"),
        ("curvature-weight", 0.1, "[0, inf)", "quantiles convex at both ends; 0: off"),
        ("consistency-weight", 0.1, "[0, inf)", "heads that agree; 0: off"),
    ],
    "reward noise (training only, never evaluation)": [
        ("reward-noise-fp", (0.2, 0.0), "[0, 1]", "probability that a wrong answer is rewarded"),
        ("reward-noise-fn", (0.2, 0.0), "[0, 1]", "probability that a right answer is not"),
        ("reward-noise-outlier", [0.0, 0.0], "[0, 1000000]", "with chance P, lose up to SCALE"),
        ("reward-noise-model", 0.0, "[0, 1000000]", "noise of a reward model, uneven over domains"),
        ("reward-noise-failure", [0.0, 0.0], "[0, 1000000]", "with probability P, -SCALE or SCALE"),
        ("pseudo-label-noise", 0.0, "[0, 1]", "share of prompts whose label is wrong all run long"),
        ("reward-noise-seed", 0, "[0, 2147483647]", "seed of all of these"),
    ],
    "run": [
        ("seed", 0, "[0, 2147483647]", "of everything else"),
        ("output-dir", None, None, "default runs/TASK-ALGO-seedSEED, of spread ALGO-spread"),
        ("save-steps", (0, 50), "[0, inf)", "iterations between checkpoints; 0: at the end only"),
        ("eval-steps", 0, "[0, inf)", "iterations between evaluations; 0: before and after only"),
        ("eval-samples", (512, 128), "[1, inf)", "held-out prompts per evaluation"),
        ("resume", None, None, "go on with the run in this folder; no value: in --output-dir"),
        ("report-to", "none", ["none", "tensorboard", "wandb", "trackio"], "also log to"),
        ("device", "auto", None, "auto, cpu or cuda"),
        ("dtype", "auto", ["auto", "float32", "bfloat16"], "of products; auto: bf16 on cuda"),
        ("gradient-checkpointing", False, None, "trade time for memory in the update"),
        ("compile", False, None, "with bf16: faster on a GPU, after minutes of compiling"),
    ],
}

# What may differ in a resumed run.
CHANGEABLE = {"resume", "output_dir", "total_episodes", "save_steps", "eval_steps", "report_to"}
CHANGEABLE |= {"device", "compile"}


def number_in(interval, cast):
    """An argparse type: a number in an interval such as '(0, 1]'."""
    low, high = [float(end) for end in interval[1:-1].split(",")]
    kind, limit = ("whole number", 2**31) if cast is int else ("number", 3e38)

    def parse(text):
        try:
            value = cast(text)
        except ValueError:
            value = float("nan")  # which is in no interval
        at_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if value < limit and (low < value < high or at_end):
            return value
        size = " of 32 bits" if value >= limit else ""
        raise argparse.ArgumentTypeError(f"expected a {kind}{size} in {interval}, found {text!r}")

    return parse


def add_flag(group, name, default, allowed, text):
    """One row of FLAGS as an argparse argument."""
    first, *pretrained = default if isinstance(default, tuple) else (default,)
    if first is False:
        group.add_argument(f"--{name}", action="store_true", help=text)
        return
    options, shown = {"metavar": "NAME"}, [f"default {first}"] if first is not None else []
    shown += [f"{value} for a pretrained model" for value in pretrained]
    if isinstance(allowed, list):
        options = {"choices": allowed}
    elif allowed:
        shown.append(f"in {allowed}")
        options = {"metavar": "N", "type": number_in(allowed, int if type(first) is int else float)}
    if isinstance(first, list):
        options |= {"nargs": 2, "metavar": ("P", "SCALE")}
    if name == "resume":
        options |= {"nargs": "?", "const": ""}
    text = f"{text} ({', '.join(shown)})" if shown else text
    group.add_argument(f"--{name}", default=default, help=text, **options)


def fail(message):
    """argparse's way out, and ours: one line, without the usage."""
    print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def require(fine, args, flag, expected):
    if not fine:
        found = "none" if getattr(args, flag) in (None, "") else getattr(args, flag)
        fail(f"--{flag.replace('_', '-')}: expected {expected}, found {found}")


def resumed(argv, parser, args):
    """The flags of the run to resume, and of the new ones those that may change."""
    folder, path, words = Path(args.resume), Path(args.resume, "args.json"), []
    is_same = Path(args.output_dir or folder).resolve() == folder.resolve()
    require(is_same, args, "output_dir", f"{folder}, the run to resume, or none")
    try:
        saved = json.loads(path.read_text())["flags"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--resume: expected a run's flags in {path}, found none: {one_line(error)}")
    # Flags that are newer than the run have their defaults, those that are gone are forgotten.
    for key, value in saved:
        if hasattr(args, key) and value is not None and value is not False:
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, list):
                words += [flag, *map(str, value)]
            else:  # a text may begin with a dash
                words.append(flag if value is True else f"{flag}={value}")
    parser.error = lambda message: fail(f"--resume: {path}: {message}")
    saved, args = parser.parse_args(words), parser.parse_args([*words, *argv])
    for key in vars(args).keys() - CHANGEABLE:
        own = getattr(saved, key)
        require(getattr(args, key) == own, args, key, f"{own}, as in the run to resume, or none")
    args.resume = args.output_dir = str(folder)
    return args


def tracker_of(name):
    """What starts a log of --report-to; a folder that has the package's name does not."""
    try:
        if name == "tensorboard":
            return importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return importlib.import_module(name).init
    except Exception as error:
        fail(f"--report-to: expected {name} to be installed, found: {one_line(error)}")


def check(args):
    """Ends the program where flags cannot work together."""
    algorithm, has_data = ALGORITHMS[args.algo], args.dataset_name is not None
    for flag in ("num_mini_batches", "group_size"):
        divides = args.batch_size % getattr(args, flag) == 0
        require(divides, args, flag, f"a divisor of --batch-size {args.batch_size}")
    compared = algorithm.kl == "reward" or args.group_size > 1  # with others to its prompt
    require(compared, args, "group_size", f"at least 2 for {args.algo}")
    for flag in ("model_name_or_path", "reward"):
        require(getattr(args, flag) or not has_data, args, flag, "one with --dataset-name")
    require(has_data or args.resume or args.eval_samples <= 512, args, "eval_samples", "up to 512")
    usual = {"dataset_config": None, "dataset_split": "train", "prompt_column": "prompt"}
    for flag, value in {**usual, "eval_dataset_name": None, "eval_dataset_split": "train"}.items():
        needed = "eval_dataset_name" if flag == "eval_dataset_split" else "dataset_name"
        fits = getattr(args, needed) or getattr(args, flag) == value
        require(fits, args, needed, f"one with --{flag.replace('_', '-')}")
    for flag in ("reward_noise_outlier", "reward_noise_failure"):
        require(getattr(args, flag)[0] <= 1, args, flag, "P in [0, 1]")
    is_model = str(args.reward).startswith("model:") or args.reward_noise_model
    for flag in ("reward_noise_fp", "reward_noise_fn"):
        flips = is_model and getattr(args, flag)
        require(not flips, args, flag, "0, as the other one, with a reward model or its noise")
    for flag, value in {"bootstrap_truncated": False, "readout": "mean"}.items():
        has_critic = algorithm.critic != "none" or getattr(args, flag) == value
        require(has_critic, args, flag, f"an --algo with a critic, not {args.algo}")
    can_chat = not args.user or args.model_name_or_path or args.task != "sums"
    require(can_chat, args, "user", "none with --task sums, whose model has no chat template")
    written = args.chat_template == "auto" or not args.user
    require(written, args, "chat_template", "auto with --user, whose turns it writes")
    if args.report_to != "none":
        tracker_of(args.report_to)
    known = re.fullmatch("auto|cpu|cuda(:[0-9]+)?", args.device)
    require(known, args, "device", "auto, cpu, cuda or cuda:N")
    own = str(Path(args.output_dir).resolve() / "checkpoint-")
    is_own = str(Path(args.model_name_or_path or "").resolve()).startswith(own)
    require(not is_own, args, "model_name_or_path", f"none of --output-dir's own, {own}*")


def parse_args(argv=None):
    """Flags with every default filled in; ends the program where they cannot work."""
    parser = argparse.ArgumentParser("train.py", "python train.py [flags]", allow_abbrev=False)
    parser.description = "DVPO and its baselines: see README.md and docs/flags.md."
    parser.error = fail
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            add_flag(group, *flag)
    # --learning_rate=1e-4 is --learning-rate=1e-4.
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    args = parser.parse_args(argv)
    algo = args.algo if args.readout == "mean" else f"{args.algo}-{args.readout}"
    data = re.sub("[.](jsonl?|parquet)$", "", Path(args.dataset_name or args.task).name)
    default_dir = f"runs/{data}-{algo}-seed{args.seed}"
    if args.resume is not None:
        args.resume = args.resume or args.output_dir or default_dir
        args = resumed(argv, parser, args)
    args.output_dir = default_dir if args.output_dir is None else args.output_dir
    for key, value in vars(args).items():
        require(value != "", args, key, "a value")
        if isinstance(value, tuple):
            setattr(args, key, value[args.model_name_or_path is not None])
    # These compare responses to the same prompt.
    args.group_size = args.group_size or (8 if ALGORITHMS[args.algo].kl == "loss" else 1)
    check(args)
    return args
