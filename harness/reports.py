"""What a run says: metrics, evaluations, the log of iterations, and the table at its end."""

import contextlib
import itertools
import json
import logging
import math
import os
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
from harness.setup import respond
from rollout import completion_texts
from tasks import InputError, as_messages, users_code
from tasks.noise import assert_flippable
from tasks.rewards import score

# The bar: iteration, time left and these, within 80 columns.
BAR = "{n}/{total} |{bar}| {remaining}{postfix}"
SHOWN = {"tps": "tps", "score": "objective/scores", "true": "objective/true_scores"}
SHOWN |= {"kl": "objective/kl", "ev": "val/explained_var", "clip": "policy/clipfrac_avg"}


@torch.no_grad()
def batch_metrics(experience, scores, true_scores, kl_coef, stop_ids):
    """A batch in numbers (docs/metrics.md); true_scores (B,): before noise and penalties."""
    rollout, mask, logprobs = experience.rollout, experience.rollout.mask, experience.logprobs
    kl = scores.new_tensor(torch.nan)
    if experience.ref_logprobs is not None:
        log_ratios = kl_estimate(logprobs, experience.ref_logprobs, "k1")
        kl = torch.where(mask, log_ratios, 0).sum(dim=1).mean()
    stops = torch.tensor(stop_ids, device=mask.device)
    return {
        "objective/kl": kl,
        "objective/scores": scores.mean(),
        "objective/entropy": -torch.where(mask, logprobs, 0).sum(dim=1).mean(),
        "objective/rlhf_reward": scores.mean() - (kl_coef * kl if kl_coef else 0),
        "objective/true_scores": true_scores.mean(),
        "val/num_eos_tokens": (torch.isin(rollout.response_ids, stops) & mask).sum(),
        "completions/mean_length": mask.sum(dim=1).float().mean(),
        "completions/clipped_ratio": rollout.truncated.float().mean(),
    }


def critic_metrics(args, head_quantiles, targets, returns, mask):
    """What the critic foresees (B, T or T + 1, N, M); of a distributional one, what it believes."""
    head_quantiles = head_quantiles[:, : mask.shape[1]]
    values = head_quantiles.mean(dim=(2, 3))
    metrics = {"val/explained_var": explained_variance(values, targets.mean(dim=-1), mask)}
    kind = ALGORITHMS[args.algo].critic
    if kind != "scalar":
        found = quantile_metrics(head_quantiles, returns, mask, args.alpha, args.beta)
        names = found if kind == "quantiles" else ["head_spread"]
        metrics |= {f"quantile/{name}": found[name] for name in names}
    return metrics


@torch.no_grad()
def evaluate(run, args):
    """-> {"NAME, greedy or sampled": noise-free scores (n,)}, the first ones with their texts."""
    scores, examples, size = {}, [], args.batch_size
    modes = {"greedy": 0.0, "sampled": args.temperature}
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 1)
        for (name, data), mode in itertools.product(run.evals.items(), modes):
            rows, name, total = [], f"{name}, {mode}", math.ceil(len(data) / size)
            for batch in tqdm(data.iter(size), name, total, leave=False, disable=None):
                rollout = respond(run, args, batch, modes[mode], record_logprobs=modes[mode] > 0)
                if rollout.logprobs is not None and not rollout.logprobs.isfinite().all():
                    found = "others: is a learning rate too high?"
                    raise InputError(f"evaluation: expected finite log-probs, found {found}")
                said = rollout.messages or completion_texts(rollout, run.tokenizer, run.stop_ids)
                rows += zip(batch["prompt"], said, score(run.reward, batch, said).tolist())
            scores[name] = torch.tensor([row[-1] for row in rows])
            # Or training would refuse them, when an earlier run is moved aside.
            assert_flippable(scores[name], args.reward_noise_fp, args.reward_noise_fn)
            examples = examples or [dict(zip(("prompt", "completion", "score"), x)) for x in rows]
    return scores, json.loads(json.dumps(examples, default=str))  # plain, for torch.load


@contextlib.contextmanager
def open_log(run, args, num_iterations):
    """-> metrics.jsonl, the bar, and --report-to's own log or None; a resumed run goes on."""
    tracker, options = None, {"project": "dvpo", "config": vars(args)}
    if args.report_to == "tensorboard":
        options = {"log_dir": args.output_dir, "purge_step": 1 + run.iteration * args.batch_size}
    if args.report_to != "none":
        with users_code("--report-to"):
            tracker = tracker_of(args.report_to)(**options)
    bar = tqdm(total=num_iterations, initial=run.iteration, bar_format=BAR, disable=None)
    with open(Path(args.output_dir) / "metrics.jsonl", "a", buffering=1) as file, bar:
        yield file, bar, tracker
    if tracker is not None:
        (tracker.close if args.report_to == "tensorboard" else tracker.finish)()


def log_iteration(log, run, args, metrics):
    """One line of metrics.jsonl, with an evaluation if one is due; the same wherever else."""
    (file, bar, tracker), episode = log, run.iteration * args.batch_size
    speed = {"episode": episode, "eps": episode / (time.time() - run.start)}
    metrics = metrics | {"lr": args.learning_rate, **speed}
    if args.eval_steps and run.iteration % args.eval_steps == 0:
        for name, scores in evaluate(run, args)[0].items():
            metrics[f"eval/{name.replace(', ', '/').replace(' ', '_')}"] = scores.mean()
    metrics = {"iteration": run.iteration} | {name: float(v) for name, v in metrics.items()}
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    numbers = dict.fromkeys(metrics) | known  # JSON has no NaN
    file.write(json.dumps(numbers) + "\n")
    with users_code("--report-to"):
        for name, value in known.items() if args.report_to == "tensorboard" else ():
            tracker.add_scalar(name, value, episode)
        if args.report_to not in ("none", "tensorboard"):
            tracker.log(numbers, step=episode)
    # + 0: never -0.00.
    values = {name: round(known[key], 2) + 0 for name, key in SHOWN.items() if key in known}
    shown = [f"{name}={v:.{0 if abs(v) >= 10 else 2}f}" for name, v in values.items()]
    bar.set_postfix_str(" ".join(shown), refresh=False)
    bar.update()
    if 10 * run.iteration % bar.total < 10:  # every tenth of the run, a line that stays
        with bar.external_write_mode():
            try:
                print(f"iteration {run.iteration} of {bar.total}:", *shown[1:], flush=True)
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")  # nobody reads on, as behind `| head`


def announce(run, args, num_iterations):
    """What is about to happen, in a line or two."""
    sizes = ", ".join(f"{len(data)} {name}" for name, data in run.evals.items()) or "none"
    print(f"{len(run.data)} prompts to train on; evaluated on {sizes}")
    if run.critic is not None and args.critic_warmup_steps >= num_iterations:
        what = f"--critic-warmup-steps {args.critic_warmup_steps} covers all {num_iterations}"
        print(f"note: {what} iterations: the policy will not change")
    is_first = run.before and not run.iteration
    if is_first and (scores := torch.cat([*run.before.values()])).min() == scores.max():
        print(f"note: at first all {len(scores)} scores are {scores[0]:g}: nothing to learn from?")


def shortened(said, width=72):
    """A text, or turns, in one line of at most so many characters: the end of a long one."""
    text = " / ".join(" ".join(turn["content"].split()) or "(empty)" for turn in as_messages(said))
    return text if len(text) <= width else "..." + text[3 - width :]


def interval(scores):
    """-> mean over prompts, half the width of its 95 % interval (NaN for a single score)."""
    error = scores.std().item() / scores.numel() ** 0.5 if scores.numel() > 1 else math.nan
    return scores.mean().item(), 1.96 * error


def report(run, args, folder):
    """The last evaluation: results.json, a table, three examples (changed ones first), paths."""
    (after, examples), output_dir, pairs = evaluate(run, args), Path(args.output_dir), []
    results = dict(before={}, after={}, interval={}, seconds=round(time.time() - run.start, 1))
    table = [f"\n{'mean score, 95 % interval':27}before          after           change"]
    for name, new in after.items():
        old = run.before[name]
        (a, of_a), (b, of_b), (c, of_c) = map(interval, (old, new, new - old))  # paired by prompt
        row = f"{name:24}{a:9.3f} ±{of_a:.3f}{b:9.3f} ±{of_b:.3f}{c:+9.3f} ±{of_c:.3f}"
        table.append(row.replace("±nan", " " * 6).rstrip())
        results["before"][name], results["after"][name] = a, b
        results["interval"][name] = [None if math.isnan(x) else x for x in (of_a, of_b, of_c)]
    if not after:
        table = ["\nno prompts are held out, and so there are no scores: --eval-dataset-name"]
    for old, new in zip(run.examples, examples):
        pair = {"prompt": old["prompt"], "before": old["completion"], "after": new["completion"]}
        pairs.append(pair | {"scores": [old["score"], new["score"]]})
    results["examples"] = sorted(pairs, key=lambda pair: pair["before"] == pair["after"])[:3]
    write_whole(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    print("\n".join(table))
    for pair in results["examples"]:
        print(f"\nprompt  {shortened(pair['prompt'])}")
        for when, value in zip(("before", "after"), pair["scores"]):
            print(f"{when:7} {shortened(pair[when])}  ({value:g})")
    print()
    for place in (folder, output_dir):
        print(f"in {place}:", *sorted(path.name for path in place.iterdir()))
    print(f"{results['seconds']:.0f} s in all, without loading the libraries")


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
