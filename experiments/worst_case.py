"""CQL's loss and RFQI's pessimistic returns, of the paper's abstract: see offline.md."""

import torch

from dvpo import masked_mean


def of_tokens(q, ids):
    """Q (B, T, V) of the tokens ids (B, T): -> (B, T)."""
    return q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def cql_loss(q, actions, targets, mask, alpha):
    """Regression on the sampled return, and a price for what the log does not hold: -> ().

    q (B, T, V), actions (B, T) ids, targets (B, T), mask (B, T). Per token, in units of the
    scores' standard deviation:  (Q(s, a) - y)^2 / 2 + alpha (log sum_b exp Q(s, b) - Q(s, a))
    """
    assert q.shape[:-1] == actions.shape == targets.shape == mask.shape, f"q {tuple(q.shape)}"
    # Whatever stands off the mask changes nothing, its gradient included.
    q, actions = q.where(mask.unsqueeze(-1), 0), actions.where(mask, 0)
    taken, targets = of_tokens(q, actions), targets.where(mask, 0)
    loss = (taken - targets).square() / 2
    if alpha:
        loss = loss + alpha * (q.logsumexp(dim=-1) - taken)
    return masked_mean(loss, mask)


def robust_value(values, worst, radius):
    """The least mean of V over all distributions of the next state within radius: -> (...).

        min {E_P V : TV(P, P_0) <= radius} = (1 - radius) V(s') + radius min(V(s'), worst)
                                 = max_eta {eta - (eta - V(s'))_+ - radius (eta - worst)_+}

    values (...): V(s') of the state that follows for sure, as tokens are appended; worst: the least
    V of the states to which P may move.
    """
    assert 0 <= radius <= 1, f"radius {radius}"
    return (1 - radius) * values + radius * torch.clamp(values, max=worst)


def robust_returns(rewards, mask, gamma, radius, worst):
    """Returns along the sampled path, each next state as bad as the ball allows: (B, T) -> (B, T).

    y_t = r_t + gamma robust_value(y_{t+1}),  y_T = r_T.  radius 0: discounted returns.
    """
    assert rewards.shape == mask.shape, f"rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)}"
    returns, after = (torch.zeros_like(own * 1.0) for own in (rewards, rewards[:, 0]))
    for t in reversed(range(mask.shape[1])):
        value = rewards[:, t] + gamma * after
        returns[:, t] = torch.where(mask[:, t], value, 0)
        after = torch.where(mask[:, t], robust_value(value, worst, radius), after)
    return returns
