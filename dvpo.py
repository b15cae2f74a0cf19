"""The objective, as the numbers flow: token rewards, advantages and targets, the two losses.

All functions are pure; shapes that do not fit raise AssertionError. Response tensors are (B, T);
`mask` (B, T) bool is True on the policy's tokens, and what stands elsewhere (NaN, too) changes
nothing. Losses are sums over tokens / `num_tokens`: micro-batches add up to a minibatch's.
"""

import torch

from critic import head_consistency, quantile_huber_loss
from risk import lower_tail_mean, risk_regularizer, tail_size, upper_tail_mean

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far outside any trust region, far inside fp32


def masked_mean(values, mask, num_tokens=None):
    """Mean of values (B, T) over mask, 0 if it is empty, or their sum / num_tokens: a scalar."""
    assert values.shape == mask.shape, f"values {tuple(values.shape)}, mask {tuple(mask.shape)}"
    count = mask.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=values.device)
    # where, not *: 0 * NaN is NaN
    return torch.where(mask, values, 0).sum() / count.clamp(min=1)


def masked_whiten(values, mask, shift_mean=True):
    """values (B, T) with mean 0 and (unbiased) variance 1 over the True slots, 0 in the others.

    A lone token becomes 0. shift_mean=False then adds the mean, as TRL does to rewards. [ours]:
    std is at least 1e-6 of the largest |value|: relative, so that rewards have no unit.
    """
    assert values.shape == mask.shape, f"values {tuple(values.shape)}, mask {tuple(mask.shape)}"
    valid = torch.where(mask, values, 0).double()
    largest = valid.abs().amax()
    valid = valid / torch.where(largest > 0, largest, 1)
    mean = masked_mean(valid, mask)
    centred = torch.where(mask, valid - mean, 0)
    std = (centred.square().sum() / (mask.sum() - 1).clamp(min=1)).sqrt()
    scaled = (centred / std.clamp(min=1e-6)).to(torch.result_type(values, 1.0))
    return scaled if shift_mean else torch.where(mask, scaled + mean * largest, 0)


def kl_estimate(logprobs, ref_logprobs, kind):
    """Estimates of KL(policy || ref) from tokens that the policy sampled: as the inputs, in nats.

    k1 = logp - ref (unbiased, may be negative);  k2 = k1^2 / 2;
    k3 = exp(-k1) - 1 + k1 (unbiased, never negative), k1 clamped to +-20 in it.
    Raises ValueError for another kind. (Schulman, "Approximating KL divergence".)
    """
    assert logprobs.shape == ref_logprobs.shape, f"ref_logprobs {tuple(ref_logprobs.shape)}"
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        k1 = k1.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.expm1(-k1) + k1
    raise ValueError(f"kind: expected 'k1', 'k2' or 'k3', found {kind!r}")


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The reward of every token: -kl_coef * k1 on each, plus the row's score on its last True slot.

    scores (B,), the rest (B, T) -> (B, T), reward units, without gradient. ref_logprobs may be
    None if kl_coef is 0. An empty row gets no reward. [ours]: KL in it, as InstructGPT and TRL.
    """
    assert scores.shape == mask.shape[:1], f"scores {tuple(scores.shape)}"
    assert logprobs.shape == mask.shape, f"logprobs {tuple(logprobs.shape)}"
    kl = torch.zeros_like(logprobs)
    if kl_coef != 0:
        kl = kl_estimate(logprobs.detach(), ref_logprobs.detach(), "k1")
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards + torch.where(is_last, scores.detach().to(rewards.dtype).unsqueeze(1), 0)


@torch.no_grad()
def distributional_gae(rewards, quantiles, mask, gamma, lam, bootstrap=None, successors=None):
    """Generalised advantage estimation by index of the sorted quantiles, over the policy's tokens.

    rewards, mask (B, T), quantiles (B, T, M) -> advantages, targets (B, T, M), 0 off the mask.
    bootstrap (B, M) or None: the quantiles after the last token; None = 0, also for cut-off rows.
    successors (B, T, M) or None: the values that count as the next state's; None = quantiles.
    [ours], after the [paper]'s token-level value distributions; index j is paired with index j
    over time, as if returns rose and fell together:

        delta_j = r_t + gamma q_j(s_{t+1}) - q_j(s_t)
        A_j = delta_j + gamma lam A_j(next),  y_j = q_j + A_j

    t + 1 means the policy's next token: a gap in the mask (a user's or a tool's turn) is carried
    across, undiscounted. The mean over j is scalar GAE on the mean value, exactly.
    """
    shapes = f"rewards {tuple(rewards.shape)}, quantiles {tuple(quantiles.shape)}"
    assert rewards.shape == mask.shape == quantiles.shape[:-1], shapes
    # In fp32 at least: a sum over many tokens is rounded at each of them.
    quantiles = quantiles.to(torch.promote_types(quantiles.dtype, torch.float32))
    quantiles = torch.where(mask.unsqueeze(-1), quantiles, 0).sort(dim=-1).values
    successors = quantiles if successors is None else successors.to(quantiles).sort(dim=-1).values
    assert successors.shape == quantiles.shape, f"successors {tuple(successors.shape)}, {shapes}"
    rewards = torch.where(mask, rewards, 0).unsqueeze(-1)
    advantages = torch.zeros_like(quantiles)
    next_advantage = torch.zeros_like(quantiles[:, 0])
    next_quantiles = next_advantage
    if bootstrap is not None:
        next_quantiles = bootstrap.to(quantiles).sort(dim=-1).values
    assert next_quantiles.shape == next_advantage.shape, f"bootstrap {tuple(bootstrap.shape)}"
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t, None]
        delta = rewards[:, t] + gamma * next_quantiles - quantiles[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_quantiles = torch.where(valid, successors[:, t], next_quantiles)
    return advantages, quantiles + advantages


def scalar_advantage(advantages):
    """The mean of a distributional advantage, scalar GAE's: (B, T, M) -> (B, T)."""
    return advantages.mean(dim=-1)


@torch.no_grad()
def advantage_readout(quantiles, targets, mask, readout, width=1.0):
    """What the policy sees of the distribution: one advantage for every token.

    quantiles (B, T, M), targets (B, T, K), mask (B, T) -> (B, T), 0 where mask is False. Raises
    ValueError for another readout. With the surprise x = mean_j y_j - mean_i q_i:

        mean:    x, reward units: what scalar_advantage makes of GAE's, and so PPO's
        spread:  tanh(x / (width * s)): within 1, before it is whitened [ours]
    s: q's standard deviation, at least a tenth of that of the batch's mean targets, as a nearly
    certain state would blow a small error up. For M = 1: the batch's median |x|.
    """
    assert quantiles.shape[:-1] == targets.shape[:-1] == mask.shape, f"mask {tuple(mask.shape)}"
    if readout not in ("mean", "spread"):
        raise ValueError(f"readout: expected 'mean' or 'spread', found {readout!r}")
    quantiles, targets = quantiles.double(), targets.double()
    x = torch.where(mask, targets.mean(dim=-1) - quantiles.mean(dim=-1), 0)
    if readout == "mean":
        return x.float()
    if quantiles.shape[-1] == 1:
        spread = torch.where(mask, x.abs(), torch.nan).nanmedian()
    else:
        least = 0.1 * masked_variance(targets.mean(dim=-1), mask).sqrt()
        spread = torch.maximum(quantiles.std(dim=-1, correction=0), least)
    return torch.where(mask, x / (width * spread).clamp(min=1e-300), 0).tanh().float()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange, num_tokens=None):
    """PPO's clipped surrogate over tokens: mean of -min(ratio A, clip(ratio, 1 +- cliprange) A).

    All tensors (B, T); gradient reaches logprobs only -> loss, {clipfrac, approx_kl, ratio},
    scalars that add up like the loss. ratio = exp(logp - old), log-ratio clamped to +-20.
    clipfrac: share of tokens where the clip binds. approx_kl: mean k2 (as TRL).
    """
    shapes = f"logprobs {tuple(logprobs.shape)}, mask {tuple(mask.shape)}"
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape, shapes
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0)
    advantages = torch.where(mask, advantages.detach(), 0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask, num_tokens)
    binds = (clipped > unclipped).float()
    per_token = {"clipfrac": binds, "approx_kl": log_ratio.square() / 2, "ratio": ratio}
    return loss, {k: masked_mean(v.detach(), mask, num_tokens) for k, v in per_token.items()}


def critic_loss(head_quantiles, targets, mask, levels, kappa, risk, num_tokens=None):
    """Every head regressed on the targets, plus consistency and the tail terms of the heads' mean.

    head_quantiles (B, T, N, M), targets (B, T, K), mask (B, T), levels (M,), kappa >= 0 in their
    unit, risk a RiskConfig or None -> loss, {quantile, calibration, shift, shape, curvature,
    consistency}, scalars that add up like the loss. kappa=None is the scalar critic of PPO and
    robust PPO (M = K = 1): half the heads' mean squared error, no terms, no value clipping.
    """
    shapes = f"head_quantiles {tuple(head_quantiles.shape)}, mask {tuple(mask.shape)}"
    assert head_quantiles.shape[:-2] == targets.shape[:-1] == mask.shape, shapes
    # (tokens, N, M), (tokens, K): no work on padding, and no NaN of it in the gradient.
    q, y = head_quantiles[mask.bool()], targets.detach()[mask.bool()]
    count = torch.as_tensor(len(y) if num_tokens is None else num_tokens).clamp(min=1)
    if kappa is None:
        error = q.mean(dim=-1) - y.mean(dim=-1, keepdim=True)
        return (error.square().mean(dim=-1) / 2).sum() / count, {}
    # As one row of N * M quantiles, all heads share one sort of the targets, and one mean.
    token_loss = quantile_huber_loss(q.flatten(1), y, levels.repeat(q.shape[1]), kappa)
    terms = {"quantile": token_loss}
    if risk is not None:
        tail_loss, tail_terms = risk_regularizer(q.mean(dim=1), y, risk)
        terms |= tail_terms | {"consistency": head_consistency(q)}
        token_loss = token_loss + tail_loss
        if risk.consistency != 0:
            token_loss = token_loss + risk.consistency * terms["consistency"]
    metrics = {name: term.detach().sum() / count for name, term in terms.items()}
    return token_loss.sum() / count, metrics


def masked_variance(values, mask):
    """The (biased) variance of values (B, T) over the True slots of mask, as a scalar."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def explained_variance(values, targets, mask):
    """1 - Var(targets - values) / Var(targets) over the True slots of (B, T) tensors, as a scalar.

    1 perfect, 0 no better than a constant; NaN where rounding alone (1e-6) varies targets. In fp64.
    """
    assert values.shape == targets.shape, f"{tuple(values.shape)}, {tuple(targets.shape)}"
    targets = targets.double()
    spread, left = (masked_variance(x, mask) for x in (targets, targets - values))
    rounding = 1e-6 * torch.where(mask, targets, 0).abs().amax()
    return torch.where(spread > rounding.square(), 1 - left / spread, torch.nan)


@torch.no_grad()
def quantile_metrics(head_quantiles, returns, mask, alpha, beta):
    """What the critic believes, and whether it is right, as scalars over the True slots of mask.

    head_quantiles (B, T, N, M), returns (B, T) the sampled (lam = 1) returns, reward units ->
    crossing_frac: share of neighbouring quantiles out of order; std; lower_tail, upper_tail: S_low,
    S_up; coverage: share of returns within [Q(alpha), Q(1 - beta)], ties inside; head_spread: root
    mean square distance of a head from the heads' mean.
    """
    assert head_quantiles.shape[:-2] == returns.shape == mask.shape, f"mask {tuple(mask.shape)}"
    head_quantiles, returns = head_quantiles[mask.bool()], returns[mask.bool()]
    unsorted = head_quantiles.mean(dim=1)
    q = unsorted.sort(dim=-1).values
    mean, num_quantiles = q.mean(dim=-1), q.shape[-1]
    low, high = q[..., tail_size(num_quantiles, alpha) - 1], q[..., -tail_size(num_quantiles, beta)]
    per_token = {
        "crossing_frac": (unsorted.diff(dim=-1) < 0).sum(dim=-1) / max(num_quantiles - 1, 1),
        "std": q.std(dim=-1, unbiased=False),
        "lower_tail": mean - lower_tail_mean(q, alpha),
        "upper_tail": upper_tail_mean(q, beta) - mean,
        "coverage": ((returns >= low) & (returns <= high)).float(),
        "head_spread": head_consistency(head_quantiles).sqrt(),
    }
    return {name: value.sum() / max(len(returns), 1) for name, value in per_token.items()}


# ---- The baselines' advantages, and weights. What a method adds to PPO is here; train.py chooses.


def robust_gae(rewards, head_values, mask, gamma, lam, bootstrap=None):
    """Robust-Bellman PPO: a successor is worth what the most pessimistic of N scalar heads says.

    rewards, mask (B, T), head_values (B, T, N), bootstrap (B, N) or None -> advantages, targets
    (B, T, 1), as distributional_gae. [ours in form]; PPO's, where the heads agree.

        delta = r_t + gamma min_n V_n(s_{t+1}) - mean_n V_n(s_t)
    """
    head_values = head_values.to(torch.promote_types(head_values.dtype, torch.float32))
    mean, worst = head_values.mean(dim=-1, keepdim=True), head_values.amin(dim=-1, keepdim=True)
    if bootstrap is not None:
        assert bootstrap.shape == head_values[:, 0].shape, f"bootstrap {tuple(bootstrap.shape)}"
        bootstrap = bootstrap.amin(dim=-1, keepdim=True)
    return distributional_gae(rewards, mean, mask, gamma, lam, bootstrap, worst)


def discounted_returns(rewards, mask, gamma):
    """The sampled returns, Reinforce++'s advantage: sum_k gamma^k r_{t+k}, (B, T) -> (B, T)."""
    no_values = torch.zeros_like(rewards).unsqueeze(-1)
    return distributional_gae(rewards, no_values, mask, gamma, 1.0)[0].squeeze(-1)


def group_advantages(scores, group_size, divide_by_std):
    """GRPO's: how much better a response scored than the others to its prompt, (B,) -> (B,).

    scores: groups stand together. (r - mean) / std over each group (unbiased std, + 1e-4), 0 where
    all are equal; divide_by_std=False is Dr. GRPO's. Raises ValueError for a group of 1, or a
    size that does not divide B. (Shao et al. 2024; Liu et al. 2025.)
    """
    assert scores.dim() == 1, f"scores {tuple(scores.shape)}"
    if group_size < 2 or len(scores) % group_size:
        expected = f"expected at least 2 and a divisor of {len(scores)} scores"
        raise ValueError(f"group_size: {expected}, found {group_size}")
    groups = scores.view(-1, group_size)
    # Equal scores are then exactly 0, whatever rounding a mean has.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    return centred.flatten()


def token_weights(kind, mask, most_tokens):
    """What each token of a minibatch counts in the policy loss: mask (B, T) -> (B, T).

    kind token: 1. response: mean_length / length (GRPO), so that the loss is the mean over
    responses of their means. constant: a sum over B * most_tokens (Dr. GRPO). Else ValueError.
    """
    if kind not in ("token", "response", "constant"):
        raise ValueError(f"kind: expected 'token', 'response' or 'constant', found {kind!r}")
    weights = torch.ones(mask.shape, device=mask.device)
    if kind == "response":
        lengths = mask.sum(dim=1, keepdim=True)
        mean_length = mask.sum() / (lengths > 0).sum().clamp(min=1)
        weights = torch.where(mask, mean_length / lengths.clamp(min=1), 0)
    if kind == "constant":
        weights *= mask.sum() / (len(mask) * most_tokens)
    return weights
