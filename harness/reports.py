"""What a run says: metrics, evaluations, the log of iterations, and the table at its end."""

import contextlib
import json
import logging
import math
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

from dvpo import explained_variance, kl_estimate, quantile_metrics
from harness.checkpoints import write_whole
from harness.flags import ALGORITHMS, tracker_of
from harness.setup import completions_of, respond
from tasks import users_code
from tasks.noise import assert_flippable
from tasks.rewards import score

# What the bar shows beside its own iteration and time left.
SHOWN = {
    "tok/s": "tps",
    "score": "objective/scores",
    "true": "objective/true_scores",
    "kl": "objective/kl",
    "ev": "val/explained_var",
    "clip": "policy/clipfrac_avg",
}


@torch.no_grad()
def rollout_metrics(scores, logprobs, ref_logprobs, mask, kl_coef):
    """A batch in numbers, under TRL's names: scores (B,), log-probs and mask (B, T).

    kl and entropy: mean over sequences of the sum over tokens, in nats; without a reference, NaN.
    """
    kl = scores.new_tensor(torch.nan)
    if ref_logprobs is not None:
        kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, "k1"), 0).sum(dim=1).mean()
    return {
        "objective/kl": kl,
        "objective/scores": scores.mean(),
        "objective/entropy": -torch.where(mask, logprobs, 0).sum(dim=1).mean(),
        "objective/rlhf_reward": scores.mean() - (kl_coef * kl if kl_coef else 0),
    }


def response_metrics(rollout, true_scores, stop_ids):
    """The responses of a batch in numbers; true_scores (B,): before noise and penalties."""
    mask, stops = rollout.mask, torch.tensor(stop_ids, device=rollout.mask.device)
    is_eos = torch.isin(rollout.response_ids, stops) & mask
    return {
        "objective/true_scores": true_scores.mean(),
        "val/num_eos_tokens": is_eos.sum(),
        "completions/mean_length": mask.sum(dim=1).float().mean(),
        "completions/clipped_ratio": rollout.truncated.float().mean(),
    }


def critic_metrics(args, head_quantiles, targets, returns, mask):
    """What the critic foresees (B, T or T + 1, N, M); of a distributional one, what it believes."""
    head_quantiles = head_quantiles[:, : mask.shape[1]]
    values = head_quantiles.mean(dim=(2, 3))
    metrics = {"val/explained_var": explained_variance(values, targets.mean(dim=-1), mask)}
    if ALGORITHMS[args.algo].critic == "quantiles":
        found = quantile_metrics(head_quantiles, returns, mask, args.alpha, args.beta)
        metrics |= {f"quantile/{name}": value for name, value in found.items()}
    return metrics


def plain(turns):
    """The turns of a conversation as a text; a text, or a score, as it is."""
    return " / ".join(turn["content"] for turn in turns) if isinstance(turns, list) else turns


@torch.no_grad()
def evaluate(run, args, num_examples=3):
    """-> noise-free {"NAME, greedy or sampled": mean score}, [{prompt, completion, score}]."""
    means, examples, total = {}, [], 2 * sum(map(len, run.evals.values()))
    bar = tqdm(total=total, desc="evaluating", leave=False)
    with torch.random.fork_rng(), bar:
        torch.manual_seed(args.seed + 1)
        for name, data in run.evals.items():
            for mode, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
                scores = []
                for batch in data.iter(args.batch_size):
                    completions = completions_of(run, respond(run, args, batch, temperature))
                    found = score(run.reward, batch, completions).tolist()
                    if not means:  # the first set's greedy ones
                        examples += zip(batch["prompt"], completions, found)
                    scores += found
                    bar.update(len(found))
                # Or training would refuse them, when an earlier run is moved aside.
                assert_flippable(torch.tensor(scores), args.reward_noise_fp, args.reward_noise_fn)
                means[f"{name}, {mode}"] = torch.tensor(scores).mean().item()
    keys = ("prompt", "completion", "score")
    shown = [dict(zip(keys, map(plain, row))) for row in examples[:num_examples]]
    return means, shown


@contextlib.contextmanager
def open_log(run, args, num_iterations):
    """-> metrics.jsonl, the bar, and --report-to's own log or None; a resumed run goes on."""
    tracker, options = None, {"project": "dvpo", "config": vars(args)}
    if args.report_to == "tensorboard":
        options = {"log_dir": args.output_dir, "purge_step": 1 + run.iteration * args.batch_size}
    if args.report_to != "none":
        with users_code("--report-to"):
            tracker = tracker_of(args.report_to)(**options)
    bar = tqdm(total=num_iterations, initial=run.iteration, desc=args.algo)
    with open(Path(args.output_dir) / "metrics.jsonl", "a") as file, bar:
        yield file, bar, tracker
    if tracker is not None:
        (tracker.close if args.report_to == "tensorboard" else tracker.finish)()


def log_iteration(log, run, args, metrics):
    """One line of metrics.jsonl, with an evaluation if one is due; the same wherever else."""
    (file, bar, tracker), episode = log, run.iteration * args.batch_size
    speed = {"episode": episode, "eps": episode / (time.time() - run.start)}
    metrics = metrics | {"lr": args.learning_rate, **speed}
    if args.eval_steps and run.iteration % args.eval_steps == 0:
        for name, value in evaluate(run, args)[0].items():
            metrics[f"eval/{name.replace(', ', '/').replace(' ', '_')}"] = value
    known = {"iteration": run.iteration} | {name: float(v) for name, v in metrics.items()}
    known = {name: value for name, value in known.items() if math.isfinite(value)}
    # JSON has no NaN.
    numbers = dict.fromkeys(["iteration", *metrics]) | known
    file.write(json.dumps(numbers) + "\n")
    file.flush()
    if args.report_to == "tensorboard":
        for name, value in known.items():
            tracker.add_scalar(name, value, episode)
    elif tracker is not None:
        tracker.log(numbers, step=episode)
    shown = {name: f"{known[key]:.2f}" if key in known else "-" for name, key in SHOWN.items()}
    bar.set_postfix(shown)
    bar.update()


def announce(run, args, num_iterations):
    """What is about to happen, in a line or two."""
    sizes = ", ".join(f"{len(data)} {name}" for name, data in run.evals.items()) or "none"
    print(f"{len(run.data)} prompts to train on; held out: {sizes}")
    if run.critic is not None and args.critic_warmup_steps >= num_iterations:
        what = f"--critic-warmup-steps {args.critic_warmup_steps} covers all {num_iterations}"
        print(f"note: {what} iterations: the policy will not change")
    if run.iteration:
        print(f"{run.iteration} of {num_iterations} iterations are done")


def shortened(text, width=90):
    """One line of at most so many characters: the end of a prompt, where the question stands."""
    text = " ".join(text.split())
    return text if len(text) <= width else "..." + text[3 - width :]


def report(run, args, folder):
    """The last evaluation, as results.json and as a table of what changed, and where all is."""
    output_dir, pairs = Path(args.output_dir), []
    after, examples = evaluate(run, args)
    for old, new in zip(run.examples, examples):
        pair = {"prompt": old["prompt"], "before": old["completion"], "after": new["completion"]}
        pairs.append(pair | {"scores": [old["score"], new["score"]]})
    seconds = round(time.time() - run.start, 1)
    results = {"before": run.before, "after": after, "seconds": seconds}
    text = json.dumps(results | {"examples": pairs}, indent=2) + "\n"
    write_whole(output_dir / "results.json", text)
    print(f"\n{'mean score':24} before    after   change")
    for name, value in run.before.items():
        print(f"{name:24} {value:6.3f}   {after[name]:6.3f}   {after[name] - value:+6.3f}")
    for pair in pairs:
        print(f"\nprompt  {shortened(pair['prompt'])}")
        for when, value in zip(("before", "after"), pair["scores"]):
            print(f"{when:7} {shortened(pair[when])}  ({value:g})")
    print(f"\npolicy and tokenizer: {folder / 'policy'}")
    if run.critic is not None:
        print(f"critic: {folder / 'critic'}")
    names = sorted(path.name for path in output_dir.iterdir() if path != folder)
    print(f"also in {output_dir}: {', '.join(names)}\n{seconds:.0f} s in all")


def quiet():
    """The libraries' own messages and bars off; what a terminal cannot show is replaced."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # It logs what it then raises.
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
