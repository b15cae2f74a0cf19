"""Asymmetric tail regularisation: contract the lower tail of the return distribution, expand the upper one, keep the mean.

Every function takes the ensemble-mean quantiles and sorts them itself: a tail of unsorted quantiles is not a tail.
Tail means integrate the step quantile function exactly, so any M and any alpha in (0, 1] will do.
"""

import math
from dataclasses import dataclass

import torch


def _sorted(quantiles):
    return quantiles.sort(dim=-1).values


def _lowest(values, share):
    """Mean over the first `share` of the last dim: whole entries, and a fraction of the one at the boundary. Needs no order."""
    if not 0 < share <= 1:
        raise ValueError(f"a tail's share (alpha, beta): expected a number in (0, 1], found {share}")
    length = values.shape[-1]
    index = torch.arange(length, dtype=torch.float64, device=values.device)
    weights = (share * length - index).clamp(0, 1) / (share * length)
    return values @ weights.to(values.dtype)


def _highest(values, share):
    return _lowest(values.flip(-1), share)


def tail_size(length, share):
    """How many of `length` sorted quantiles a tail of `share` touches, the boundary one included: 1 or more."""
    return max(1, math.ceil(share * length - 1e-6))  # 0.07 * 100 is a little above 7 in floating point


def lower_tail_mean(quantiles, alpha):
    """CVaR_alpha, the mean of the worst alpha of the distribution: quantiles (..., M) -> (...), reward units.

    CVaR_alpha = (1 / alpha) * integral of Q(t) over t in [0, alpha]; Q is the step function through the sorted quantiles.
    Raises ValueError for alpha outside (0, 1]. [reported] as tail calibration's CVaR.
    """
    return _lowest(_sorted(quantiles), alpha)


def upper_tail_mean(quantiles, beta):
    """gain_beta, the mean of the best beta of the distribution: quantiles (..., M) -> (...), reward units.

    gain_beta = (1 / beta) * integral of Q(t) over t in [1 - beta, 1]. Raises ValueError for beta outside (0, 1]. [reported]
    """
    return _highest(_sorted(quantiles), beta)


def tail_calibration_loss(quantiles, targets, alpha, beta):
    """Pulls both tail means towards the true tail means of the sampled returns.

    quantiles (..., M), targets (..., K) -> (...), squared reward units. Raises ValueError for alpha, beta outside (0, 1].
    [reported] "tail calibration"; [ours] in form (Rockafellar-Uryasev), since a sampled return has no tails of its own:

        (CVaR_alpha(q) - t_low)^2 + (gain_beta(q) - t_up)^2
        t_low = v - mean_j (v - y_j)_+ / alpha,  v = stop_grad Q(alpha);  t_up = w + mean_j (y_j - w)_+ / beta,  w = stop_grad Q(1 - beta)
    """
    return _tail_calibration(_sorted(quantiles), targets, alpha, beta)


def _tail_calibration(q, targets, alpha, beta):
    length, targets = q.shape[-1], targets.detach()
    low, high = _lowest(q, alpha), _highest(q, beta)
    v = q[..., tail_size(length, alpha) - 1, None].detach()  # the boundary quantile of each tail
    w = q[..., length - tail_size(length, beta), None].detach()
    t_low = v[..., 0] - (v - targets).clamp(min=0).mean(dim=-1) / alpha
    t_up = w[..., 0] + (targets - w).clamp(min=0).mean(dim=-1) / beta
    return (low - t_low).square() + (high - t_up).square()


def mean_shift_loss(quantiles, targets):
    """Holds the mean while the tails move, because the mean is all that the policy reads: (mean_i q_i - mean_j y_j)^2.

    quantiles (..., M), targets (..., K) -> (...), squared reward units. [reported] "mean-shift penalisation"; [ours] in form.
    """
    return (quantiles.mean(dim=-1) - targets.detach().mean(dim=-1)).square()


def tail_shape_loss(quantiles, alpha, beta, ratio):
    """Asks for a lower tail at most `ratio` times as long as the upper one: (S_low - ratio * S_up)_+.

    quantiles (..., M) -> (...), reward units; S_low = mean(q) - CVaR_alpha(q), S_up = gain_beta(q) - mean(q).
    Raises ValueError for alpha, beta outside (0, 1]. [reported] "tail shape"; [ours] in form.
    """
    return _tail_shape(_sorted(quantiles), alpha, beta, ratio)


def _tail_shape(q, alpha, beta, ratio):
    mean = q.mean(dim=-1)
    return ((mean - _lowest(q, alpha)) - ratio * (_highest(q, beta) - mean)).clamp(min=0)


def tail_curvature_loss(quantiles, alpha, beta):
    """Asks for a quantile function that is convex at both ends: a short lower tail, a long upper one.

    quantiles (..., M) -> (...), reward units; 0 for M < 3. Raises ValueError for alpha, beta outside (0, 1].
    [reported] "curvature"; [ours] in form, D2_j = q_{j+1} - 2 q_j + q_{j-1} on the sorted quantiles:

        (-mean of the lowest alpha of the D2_j)_+ + (-mean of the highest beta of the D2_j)_+       (lowest, highest: in j)
    """
    return _tail_curvature(_sorted(quantiles), alpha, beta)


def _tail_curvature(q, alpha, beta):
    if q.shape[-1] < 3:
        return q.sum(dim=-1) * 0
    bend = q.diff(n=2, dim=-1)
    return (-_lowest(bend, alpha)).clamp(min=0) + (-_highest(bend, beta)).clamp(min=0)


@dataclass(frozen=True)
class RiskConfig:
    """Tail shares, the aimed-at ratio of tail lengths, and one weight per term; weight 0 turns a term off exactly.

    alpha, beta in (0, 1]; ratio and the weights >= 0; ValueError otherwise. `consistency` weighs critic.head_consistency.
    The weights are [ours]: the smallest round numbers at which the tails move and the mean stays (tests/test_risk.py).
    """

    alpha: float = 0.1
    beta: float = 0.1
    ratio: float = 0.5
    calibration: float = 0.01
    shift: float = 0.1
    shape: float = 0.1
    curvature: float = 0.1
    consistency: float = 0.1

    def __post_init__(self):
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], found {getattr(self, name)}")
        for name in ("ratio", "calibration", "shift", "shape", "curvature", "consistency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, found {getattr(self, name)}")


def risk_regularizer(quantiles, targets, config):
    """The weighted sum of the four tail terms, and each of them unweighted for the log.

    quantiles (..., M), targets (..., K) -> (loss (...), {calibration, shift, shape, curvature: (...)}), the values detached.
    Raises AssertionError for leading shapes that differ. [reported] the components; [ours] forms and weights.
    """
    assert quantiles.shape[:-1] == targets.shape[:-1], f"quantiles {tuple(quantiles.shape)}, targets {tuple(targets.shape)}"
    q = _sorted(quantiles)  # once for all terms
    terms = {
        "calibration": _tail_calibration(q, targets, config.alpha, config.beta),
        "shift": mean_shift_loss(q, targets),
        "shape": _tail_shape(q, config.alpha, config.beta, config.ratio),
        "curvature": _tail_curvature(q, config.alpha, config.beta),
    }
    loss = torch.zeros_like(terms["shift"])
    for name, term in terms.items():
        if getattr(config, name) != 0:  # not 0 * term: a term that overflows must not leak in
            loss = loss + getattr(config, name) * term
    return loss, {name: term.detach() for name, term in terms.items()}
