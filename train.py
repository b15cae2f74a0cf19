"""DVPO: PPO for language models whose critic predicts the distribution of every token's return.

    python train.py                      # a tiny model, a built-in task, noisy rewards: minutes
    python train.py --model-name-or-path NAME --dataset-name FILE --reward math

The loop: each `iterate` of `train` is a `collect` and an `update`, here, step by step. What they
compute stands in dvpo.py, critic.py and risk.py; how it is sampled and scored, in rollout.py and
tasks/; what a long run needs, in harness/. A baseline is the same lines, but for its row of
ALGORITHMS (harness/flags.py) and where `args.algo` is read.
"""

import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass

if __name__ == "__main__":
    # --help and a refused flag need not wait for torch.
    from harness.flags import parse_args

    parse_args()

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

import dvpo
from harness import checkpoints, reports
from harness.flags import ALGORITHMS, parse_args
from harness.setup import autocast, build, judge, respond
from rollout import Rollout, in_micro_batches, micro_batches, response_logprobs, response_quantiles
from tasks import InputError
from tasks.prompts import batch_rows

# What is logged of a policy that rests, during the critic's warm-up.
RESTING = {"loss/policy_avg": 0.0, "policy/approxkl_avg": 0.0, "policy/clipfrac_avg": 0.0}
RESTING |= {"val/ratio": 1.0}


@dataclass
class Experience:
    """A batch of responses, and all that the losses need to know of it. No gradient in it."""

    rollout: Rollout
    # (B, T) of the sampled tokens, under the policy before the update and under the reference.
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    # (B, T) what the policy learns from; (B, T, K) what the critic learns to predict, K = M or 1.
    advantages: torch.Tensor
    targets: torch.Tensor | None
    # Both set in minibatch_backward. (B, T) what each token counts in the policy loss.
    weights: torch.Tensor | None = None
    # (B, 1, N, 1) in robust PPO, the heads that a response does not teach: they get no error.
    untaught: torch.Tensor | None = None

    def __getitem__(self, rows):
        """The given rows (indices on the CPU), cut to the longest of them."""
        rollout = self.rollout[rows]
        # An index on the CPU would wait for the GPU.
        at = rows.to(rollout.mask.device, non_blocking=True)
        length, own = rollout.mask.shape[1], vars(self).items()
        parts = {name: x if x is None else x[at, -length:] for name, x in own if name != "rollout"}
        return Experience(rollout, **parts)


def train(args):
    """The whole run: start, iterations, checkpoint, evaluation, report -> exit status."""
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    run = start(args, num_iterations)
    log = reports.open_log(run, args, num_iterations)
    with log as log, checkpoints.stopping_on_signals() as received:
        while run.iteration < num_iterations and not received:
            metrics = iterate(run, args)
            reports.log_iteration(log, run, args, metrics)
            if args.save_steps and run.iteration % args.save_steps == 0:
                checkpoints.save_checkpoint(run, args)
        folder = checkpoints.save_checkpoint(run, args)
    if run.iteration < num_iterations:
        stopped = f"stopped by {signal.Signals(received[0]).name} after iteration {run.iteration}"
        print(f"{stopped} of {num_iterations}: --resume {args.output_dir} goes on")
        return 128 + received[0]
    reports.report(run, args, folder)
    return 0


def start(args, num_iterations):
    """A new Run, evaluated, or one that --resume goes on with; its folder in order."""
    run = build(args)
    transformers.set_seed(args.seed)
    if args.resume:
        checkpoints.resume(run, args)
    else:
        checkpoints.try_saving(run, args)
        # Before an earlier run is moved aside: the reward may fail.
        run.before, run.examples = reports.evaluate(run, args)
    reports.announce(run, args, num_iterations)
    checkpoints.begin(run, args)
    return run


def iterate(run, args):
    """One iteration -> its metrics."""
    begin = time.time()
    experience, metrics = collect(run, args)
    metrics |= update(run, args, experience)
    run.iteration += 1
    metrics["tps"] = experience.rollout.mask.sum().item() / (time.time() - begin)
    return metrics


@torch.no_grad()
def collect(run, args):
    """One batch of responses and what they teach: -> Experience, metrics."""
    num_prompts = args.batch_size // args.group_size
    rows = batch_rows(len(run.data), run.iteration * num_prompts, num_prompts, args.seed)
    batch = run.data[[row for row in rows for _ in range(args.group_size)]]
    limits = (args.micro_batch_size, args.micro_batch_tokens)

    # 1. Sample a response to every prompt, or a conversation with the user, and 2. score it.
    rollout, scores, true_scores = sample_and_score(run, args, batch)
    mask = rollout.mask

    # 3. How probable was each token, for the policy (unless recorded) and for its starting point?
    logprobs, ref_logprobs = rollout.logprobs, None
    inputs = (rollout, *limits, args.temperature)
    with autocast(run):
        if logprobs is None:
            logprobs = in_micro_batches(response_logprobs, run.policy, *inputs)
        if run.reference is not None:
            ref_logprobs = in_micro_batches(response_logprobs, run.reference, *inputs)

    # 4. The score is the last token's reward; every token pays for its KL, unless the loss does.
    # Not in iteration 0: were all scores equal, the KL's rounding would set the critic's unit.
    kl_coef = args.kl_coef if ALGORITHMS[args.algo].kl == "reward" and run.iteration else 0
    rewards = dvpo.token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    if args.whiten_rewards:
        rewards = dvpo.masked_whiten(rewards, mask, shift_mean=False)
    returns = dvpo.discounted_returns(rewards, mask, args.gamma)

    # 5. What did the critic expect, before each token was chosen?
    head_quantiles = None
    if run.critic is not None:
        if run.iteration == 0:
            run.critic.start_at(returns[mask])
        critic_inputs = (run.critic, rollout, *limits, args.bootstrap_truncated)
        with autocast(run):
            head_quantiles = in_micro_batches(response_quantiles, *critic_inputs)

    # 6. Who gets the credit?
    advantages, targets = estimate(args, scores, rewards, head_quantiles, rollout)
    experience = Experience(rollout, logprobs, ref_logprobs, advantages, targets)
    assert_finite(run.iteration + 1, scores=scores, quantiles=head_quantiles, **vars(experience))
    metrics = reports.batch_metrics(experience, scores, true_scores, args.kl_coef, run.stop_ids)
    if head_quantiles is not None:
        metrics |= reports.critic_metrics(args, head_quantiles, targets, returns, mask)
    return experience, metrics


def sample_and_score(run, args, batch):
    """Steps 1 and 2 -> Rollout, scores (B,), and those without the noise that training sees."""
    rollout = respond(run, args, batch, args.temperature, record_logprobs=run.trust_recorded)
    return rollout, *judge(run, args, batch, rollout)


def assert_finite(iteration, **tensors):
    """Raises InputError naming the first tensor (B, ...) with a number that is not finite."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            rows = (~tensor.isfinite()).nonzero()[:, 0].unique().tolist()[:8]
            found = f"others in rows {', '.join(map(str, rows))} of the batch"
            raise InputError(f"iteration {iteration}: expected finite {name}, found {found}")


def estimate(args, scores, rewards, head_quantiles, rollout):
    """Advantages (B, T), and the critic's targets (B, T, K) or None: each method its own way.

    scores (B,), rewards (B, T), head_quantiles (B, T or T + 1, N, M) or None.
    """
    mask = rollout.mask
    if args.algo in ("grpo", "dr_grpo"):
        advantages = dvpo.group_advantages(scores, args.group_size, args.algo == "grpo")
        return advantages.unsqueeze(1).expand(mask.shape), None
    if args.algo == "reinforce++":
        return dvpo.masked_whiten(dvpo.discounted_returns(rewards, mask, args.gamma), mask), None
    # The ensemble is the mean of its heads; robust PPO's Bellman step looks at each.
    quantiles = values = head_quantiles.mean(dim=2)
    gae = dvpo.distributional_gae
    if args.algo == "robust":
        gae, values = dvpo.robust_gae, head_quantiles[..., 0]
    bootstrap = None
    if args.bootstrap_truncated:
        # A response that was cut off goes on being worth what the critic says after its end.
        bootstrap = torch.where(rollout.truncated[:, None], values[:, -1], 0)
        quantiles, values = quantiles[:, :-1], values[:, :-1]
    _, targets = gae(rewards, values, mask, args.gamma, args.lam, bootstrap)  # y = q + A
    readout = dvpo.advantage_readout(quantiles, targets, mask, args.readout, args.readout_width)
    return dvpo.masked_whiten(readout, mask), targets


def update(run, args, experience):
    """Epochs of minibatch steps on one batch -> metrics, means over the steps.

    Raises InputError before a step with numbers that are not finite: Adam never forgets them.
    """
    train_policy = run.critic is None or run.iteration >= args.critic_warmup_steps
    models = [] if run.critic is None else [(run.critic, run.critic_optimizer)]
    models += [(run.policy, run.optimizer)] if train_policy else []
    minibatches, totals = [], Counter()
    for _ in range(args.num_ppo_epochs):
        minibatches += torch.randperm(args.batch_size).chunk(args.num_mini_batches)
    for number, rows in enumerate(minibatches, 1):
        sums = minibatch_backward(run, args, experience[rows], train_policy)
        watched = {k: v for k, v in sums.items() if k in ("loss/policy_avg", "loss/value_avg")}
        for model, _ in models:
            name = f"the gradient of {type(model).__name__}"
            watched[name] = clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not torch.stack([*watched.values()]).isfinite().all():
            where = f"iteration {run.iteration + 1}, minibatch {number} of {len(minibatches)}"
            found = f"others in {', '.join(n for n, v in watched.items() if not v.isfinite())}"
            raise InputError(f"{where}: expected finite losses and gradients, found {found}")
        for _, optimizer in models:
            optimizer.step()
            optimizer.zero_grad()
        totals.update(sums)
    return RESTING | {name: value / len(minibatches) for name, value in totals.items()}


def minibatch_backward(run, args, minibatch, train_policy):
    """Adds the gradients of a minibatch's losses, a micro-batch at a time -> metrics."""
    sums, rollout = Counter(), minibatch.rollout
    num_tokens = rollout.mask.sum()
    most_tokens = args.response_length * (args.max_turns if run.user else 1)
    minibatch.weights = dvpo.token_weights(ALGORITHMS[args.algo].weights, rollout.mask, most_tokens)
    limits = (args.micro_batch_size, args.micro_batch_tokens)
    if args.algo == "robust":
        # Heads that learn the same stay one: in each step a response teaches a random half of them.
        draws = torch.rand(len(rollout.mask), 1, args.num_heads, 1).to(rollout.mask.device)
        minibatch.untaught = draws > draws.median(dim=2, keepdim=True).values
    for rows in micro_batches(rollout, torch.arange(len(rollout.mask)), *limits):
        part = minibatch[rows]
        if train_policy:
            sums.update(policy_backward(run, args, part, num_tokens))
        if run.critic is not None:
            sums.update(critic_backward(run, args, part, num_tokens))
    return sums


def policy_backward(run, args, part, num_tokens):
    """7. Adds the policy loss's gradient of a micro-batch (an Experience) -> metrics."""
    mask, weights = part.rollout.mask, part.weights
    with autocast(run):
        logprobs = response_logprobs(run.policy, part.rollout, args.temperature)
    # Scaling A by w >= 0 scales the clipped loss by w.
    tensors = (logprobs, part.logprobs, weights * part.advantages, mask)
    loss, metrics = dvpo.clipped_policy_loss(*tensors, args.cliprange, num_tokens)
    if ALGORITHMS[args.algo].kl == "loss" and part.ref_logprobs is not None:
        kl = dvpo.kl_estimate(logprobs, part.ref_logprobs, "k3")
        loss = loss + args.kl_coef * dvpo.masked_mean(weights * kl, mask, num_tokens)
    loss.backward()
    return {
        "loss/policy_avg": loss.detach(),
        "policy/approxkl_avg": metrics["approx_kl"],
        "policy/clipfrac_avg": metrics["clipfrac"],
        "val/ratio": metrics["ratio"],
    }


def critic_backward(run, args, part, num_tokens):
    """8. Adds the critic loss's gradient of a micro-batch (an Experience) -> metrics."""
    with autocast(run):
        head_quantiles = response_quantiles(run.critic, part.rollout)
    if part.untaught is not None:
        head_quantiles = torch.where(part.untaught, part.targets.unsqueeze(-1), head_quantiles)
    # In the critic's own units, whatever the reward is counted in.
    q, y = head_quantiles / run.critic.scale, part.targets / run.critic.scale
    # kappa and risk. No kappa: the squared error of PPO's one head, or of robust PPO's N.
    pair = (args.kappa, run.risk) if ALGORITHMS[args.algo].critic == "quantiles" else (None, None)
    loss, terms = dvpo.critic_loss(q, y, part.rollout.mask, run.critic.levels, *pair, num_tokens)
    loss.backward()
    return {"loss/value_avg": loss.detach()} | {f"loss/critic_{k}": v for k, v in terms.items()}


def main(argv=None):
    reports.quiet()
    try:
        args = parse_args(argv)
        with checkpoints.alone_in(args.output_dir):
            return train(args)
    except (InputError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from a checkpoint, if any", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
