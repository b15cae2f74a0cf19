"""DVPO: PPO for language models whose critic predicts the distribution of every token's return.

    python train.py                      # a tiny model, a built-in task, noisy rewards: two minutes
    python train.py --model-name-or-path NAME --dataset-name FILE --reward math

The loop: `train` calls `collect` and `update` in turn, and here they are, step by step. What they
compute stands in dvpo.py, critic.py and risk.py; how it is sampled and scored, in rollout.py and
tasks/; what a long run needs, in harness/. Every baseline runs through these same lines: what
tells it apart is its row of ALGORITHMS (harness/flags.py) and its branch of `estimate`.
"""

import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

from dvpo import (
    clipped_policy_loss,
    critic_loss,
    discounted_returns,
    distributional_gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    masked_whiten,
    robust_gae,
    scalar_advantage,
    sequence_weights,
    token_rewards,
)
from harness import checkpoints, reports
from harness.flags import ALGORITHMS, parse_args
from harness.setup import autocast, build, completions_of, respond
from rollout import (
    Rollout,
    in_micro_batches,
    micro_batches,
    response_logprobs,
    response_quantiles,
)
from tasks import InputError
from tasks.noise import PSEUDO_LABEL, noisy_scores, prompt_offsets
from tasks.prompts import PROMPT_IDS
from tasks.rewards import score

# What is logged of the policy while it rests, during the critic's warm-up.
RESTING = {
    "loss/policy_avg": 0.0,
    "policy/approxkl_avg": 0.0,
    "policy/clipfrac_avg": 0.0,
    "val/ratio": 1.0,
}


@dataclass
class Experience:
    """A batch of responses, and all that the losses need to know of it. No gradient in it."""

    rollout: Rollout
    # (B, T) of the sampled tokens: under the policy that sampled them, and under the reference.
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    # (B, T) what the policy learns from, and (B, T, K) what the critic learns to predict.
    advantages: torch.Tensor
    targets: torch.Tensor | None

    def __getitem__(self, rows):
        """The given rows (indices on the CPU), cut to the longest of them."""
        rollout = self.rollout[rows]
        # An index on the CPU would wait for the GPU.
        at = rows.to(rollout.mask.device, non_blocking=True)
        parts = []
        for tensor in (self.logprobs, self.ref_logprobs, self.advantages, self.targets):
            width = rollout.mask.shape[1]
            parts.append(None if tensor is None else tensor[at, -width:])
        return Experience(rollout, *parts)


def next_batch(run, args):
    """The prompts of this iteration, each --group-size times.

    One seeded permutation of the data after another: the iteration is all there is to remember.
    """
    num_prompts = args.batch_size // args.group_size
    first, rows = run.iteration * num_prompts, []
    while len(rows) < num_prompts:
        epoch, start = divmod(first + len(rows), len(run.data))
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
        order = torch.randperm(len(run.data), generator=generator)
        rows += order[start : start + num_prompts - len(rows)].tolist()
    return run.data[[row for row in rows for _ in range(args.group_size)]]


@torch.no_grad()
def judge(run, args, batch, rollout):
    """The reward of each response as training sees it, and without its noise: (B,), (B,)."""
    completions = completions_of(run, rollout)
    true_scores = scores = score(run.reward, batch, completions)
    if PSEUDO_LABEL in batch:
        scores = score(run.reward, batch, completions, PSEUDO_LABEL)
    flips = (args.reward_noise_fp, args.reward_noise_fn)
    scores = noisy_scores(scores, *flips, args.reward_noise_outlier, run.noise)
    if args.reward_offset:
        vocab_size, seed = run.policy.config.vocab_size, args.reward_noise_seed
        scores = scores + prompt_offsets(batch[PROMPT_IDS], args.reward_offset, vocab_size, seed)
    # A response that was cut off has no end: it may cost something.
    scores = scores - args.missing_eos_penalty * rollout.truncated.cpu()
    return scores.to(rollout.mask.device), true_scores


@torch.no_grad()
def estimate(args, scores, rewards, head_quantiles, rollout):
    """Advantages (B, T), and the critic's targets (B, T, K) or None: each method its own way.

    scores (B,), rewards (B, T), head_quantiles (B, T or T + 1, N, M) or None.
    """
    mask = rollout.mask
    if args.algo in ("grpo", "dr_grpo"):
        divide_by_std = args.algo == "grpo"
        advantages = group_advantages(scores, args.group_size, divide_by_std)
        return advantages.unsqueeze(1).expand(mask.shape), None
    if args.algo == "reinforce++":
        return masked_whiten(discounted_returns(rewards, mask, args.gamma), mask), None
    after = None
    if args.bootstrap_truncated:
        # A response that was cut off goes on being worth what the critic says after its end.
        cut_off = rollout.truncated[:, None, None]
        after = torch.where(cut_off, head_quantiles[:, -1], 0)
        head_quantiles = head_quantiles[:, :-1]
    if args.algo == "robust":
        after = None if after is None else after[..., 0]
        values = head_quantiles[..., 0]
        advantages, targets = robust_gae(rewards, values, mask, args.gamma, args.lam, after)
    else:
        after = None if after is None else after.mean(dim=1)
        # The ensemble is the mean of its heads.
        quantiles = head_quantiles.mean(dim=2)
        advantages, targets = distributional_gae(
            rewards, quantiles, mask, args.gamma, args.lam, after
        )
    # What the policy sees of the distribution is its mean: by the identity, PPO's advantage.
    return masked_whiten(scalar_advantage(advantages), mask), targets


def assert_finite(iteration, **tensors):
    """Raises InputError naming the first tensor (B, ...) with a number that is not finite."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.isfinite().all():
            continue
        is_bad = ~tensor.isfinite().view(len(tensor), -1).all(dim=1)
        rows = is_bad.nonzero().flatten().tolist()
        found = f"others in rows {', '.join(map(str, rows[:8]))} of the batch"
        raise InputError(f"iteration {iteration}: expected finite {name}, found {found}")


@torch.no_grad()
def collect(run, args):
    """One batch of responses and what they teach: -> Experience, metrics."""
    algorithm, batch = ALGORITHMS[args.algo], next_batch(run, args)
    limits = (args.micro_batch_size, args.micro_batch_tokens)

    # 1. Sample a response to every prompt; where a user answers, a whole conversation.
    rollout = respond(run, args, batch, args.temperature, record_logprobs=run.trust_recorded)
    mask = rollout.mask

    # 2. Score it. The noise is what only training sees.
    scores, true_scores = judge(run, args, batch, rollout)

    # 3. How probable was each token, for the policy and for the model that it started as?
    logprobs, ref_logprobs = rollout.logprobs, None
    with autocast(run):
        if logprobs is None:
            of_policy = (response_logprobs, run.policy, rollout, *limits, args.temperature)
            logprobs = in_micro_batches(*of_policy)
        if run.reference is not None:
            of_reference = (response_logprobs, run.reference, rollout, *limits, args.temperature)
            ref_logprobs = in_micro_batches(*of_reference)

    # 4. The score is the last token's reward; every token pays for its KL, unless the loss does.
    kl_coef = args.kl_coef if algorithm.kl == "reward" else 0
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    returns = discounted_returns(rewards, mask, args.gamma)

    # 5. What did the critic expect, before each token was chosen?
    head_quantiles = None
    if run.critic is not None:
        if run.iteration == 0:
            run.critic.start_at(returns[mask])
        of_critic = (response_quantiles, run.critic, rollout, *limits, args.bootstrap_truncated)
        with autocast(run):
            head_quantiles = in_micro_batches(*of_critic)

    # 6. Who gets the credit?
    advantages, targets = estimate(args, scores, rewards, head_quantiles, rollout)
    experience = Experience(rollout, logprobs, ref_logprobs, advantages, targets)
    found = {"scores": scores, "quantiles": head_quantiles, **vars(experience)}
    found.pop("rollout")
    assert_finite(run.iteration + 1, **found)
    metrics = reports.rollout_metrics(scores, logprobs, ref_logprobs, mask, args.kl_coef)
    metrics |= reports.response_metrics(rollout, true_scores, run.stop_ids)
    if head_quantiles is not None:
        metrics |= reports.critic_metrics(args, head_quantiles, targets, returns, mask)
    return experience, metrics


def policy_backward(run, args, part, weights, num_tokens):
    """7. Adds the policy loss's gradient of a micro-batch (an Experience) -> metrics.

    weights (B, T): what each token counts. num_tokens: of the whole minibatch.
    """
    mask = part.rollout.mask
    with autocast(run):
        logprobs = response_logprobs(run.policy, part.rollout, args.temperature)
    # A positive weight on a token's advantage is one on its loss.
    weighted = weights * part.advantages
    loss, metrics = clipped_policy_loss(
        logprobs, part.logprobs, weighted, mask, args.cliprange, num_tokens
    )
    if ALGORITHMS[args.algo].kl == "loss" and part.ref_logprobs is not None:
        kl = kl_estimate(logprobs, part.ref_logprobs, "k3")
        loss = loss + args.kl_coef * masked_mean(weights * kl, mask, num_tokens)
    loss.backward()
    return {
        "loss/policy_avg": loss.detach(),
        "policy/approxkl_avg": metrics["approx_kl"],
        "policy/clipfrac_avg": metrics["clipfrac"],
        "val/ratio": metrics["ratio"],
    }


def critic_backward(run, args, part, num_tokens):
    """8. Adds the critic loss's gradient of a micro-batch (an Experience) -> metrics."""
    is_distributional = ALGORITHMS[args.algo].critic == "quantiles"
    # All that tells dvpo from ppo: without them critic_loss is the squared error of a value.
    kappa, risk = (args.kappa, run.risk) if is_distributional else (None, None)
    with autocast(run):
        head_quantiles = response_quantiles(run.critic, part.rollout)
    levels, mask = run.critic.levels, part.rollout.mask
    loss, terms = critic_loss(head_quantiles, part.targets, mask, levels, kappa, risk, num_tokens)
    loss.backward()
    metrics = {f"loss/critic_{name}": value for name, value in terms.items()}
    return {"loss/value_avg": loss.detach(), **metrics}


def token_weights(run, args, mask):
    """What each token of a minibatch counts in the policy loss: mask (B, T) -> (B, T)."""
    kind, ones = ALGORITHMS[args.algo].weights, torch.ones(mask.shape, device=mask.device)
    if kind == "response":
        return sequence_weights(mask)
    if kind == "constant":
        # Every token counts the same, whatever the lengths in the minibatch.
        most_tokens = args.response_length * (args.max_turns if run.user else 1)
        return ones * (mask.sum() / (len(mask) * most_tokens))
    return ones


def minibatch_backward(run, args, minibatch, train_policy):
    """Adds the gradients of a minibatch's losses, a micro-batch at a time -> metrics."""
    sums, rollout = Counter(), minibatch.rollout
    num_tokens, weights = rollout.mask.sum(), token_weights(run, args, rollout.mask)
    limits = (args.micro_batch_size, args.micro_batch_tokens)
    for rows in micro_batches(rollout, torch.arange(len(rollout.mask)), *limits):
        part = minibatch[rows]
        if train_policy:
            at = rows.to(weights.device, non_blocking=True)
            own = weights[at, -part.rollout.mask.shape[1] :]
            sums.update(policy_backward(run, args, part, own, num_tokens))
        if run.critic is not None:
            sums.update(critic_backward(run, args, part, num_tokens))
    return sums


def update(run, args, experience):
    """Epochs of minibatch steps on one batch -> metrics, means over the steps.

    The policy rests during the critic's warm-up. Raises InputError before a step with numbers that
    are not finite, as Adam never forgets them. Nothing else in the loop waits for a GPU.
    """
    train_policy = run.critic is None or run.iteration >= args.critic_warmup_steps
    models = []
    if run.critic is not None:
        models.append((run.critic, run.critic_optimizer))
    if train_policy:
        models.append((run.policy, run.optimizer))
    minibatches, totals = [], Counter()
    for _ in range(args.num_ppo_epochs):
        minibatches += torch.randperm(args.batch_size).chunk(args.num_mini_batches)
    for number, rows in enumerate(minibatches, 1):
        sums = minibatch_backward(run, args, experience[rows], train_policy)
        watched = [value for name, value in sums.items() if name.startswith("loss/")]
        for model, _ in models:
            watched.append(clip_grad_norm_(model.parameters(), args.max_grad_norm))
        if not torch.stack(watched).isfinite().all():
            where = f"iteration {run.iteration + 1}, minibatch {number} of {len(minibatches)}"
            found = "others: is a learning rate too high?"
            raise InputError(f"{where}: expected finite losses and gradients, found {found}")
        for _, optimizer in models:
            optimizer.step()
            optimizer.zero_grad()
        totals.update(sums)
    metrics = {name: value / len(minibatches) for name, value in totals.items()}
    return metrics if train_policy else RESTING | metrics


def train(args):
    """The whole run: evaluation, iterations, checkpoint, evaluation, report -> exit status."""
    run, output_dir = build(args), Path(args.output_dir)
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    # Of python, numpy and torch: a user's reward may draw from any.
    transformers.set_seed(args.seed)
    if args.resume:
        checkpoints.resume(run, args)
    if run.before is None:
        # Before an earlier run is moved aside: the reward may fail.
        run.before, run.examples = reports.evaluate(run, args), reports.examples(run, args)
    if not args.resume:
        checkpoints.set_aside(output_dir)
    reports.announce(run, args, num_iterations)
    checkpoints.write_flags(args)
    log = reports.open_log(run, args, num_iterations)
    with log as log, checkpoints.stopping_on_signals() as received:
        while run.iteration < num_iterations and not received:
            begin = time.time()
            experience, metrics = collect(run, args)
            metrics |= update(run, args, experience)
            run.iteration += 1
            num_tokens = experience.rollout.mask.sum().item()
            metrics["tps"] = num_tokens / (time.time() - begin)
            if args.eval_steps and run.iteration % args.eval_steps == 0:
                metrics |= reports.evaluation_metrics(run, args)
            reports.log_iteration(log, run, args, metrics)
            is_due = args.save_steps and run.iteration % args.save_steps == 0
            if is_due and run.iteration < num_iterations:
                checkpoints.save_checkpoint(run, args)
        folder = checkpoints.save_checkpoint(run, args)
    if run.iteration < num_iterations:
        stopped = f"stopped by {signal.Signals(received[0]).name} after iteration {run.iteration}"
        print(f"{stopped} of {num_iterations}: --resume {output_dir} goes on")
        return 128 + received[0]
    reports.report(run, args, folder)
    return 0


def main(argv=None):
    reports.quiet()
    try:
        return train(parse_args(argv))
    except (InputError, OSError) as error:
        # OSError: the output folder cannot be written.
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from the newest checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
