"""Asymmetric tail regularisation: contract the lower tail, expand the upper one, keep the mean.

The tail functions take the ensemble-mean quantiles and sort them: a tail of unsorted quantiles is
not a tail. Tail means are exact integrals, so any M and alpha in (0, 1] will do. Shapes that do not
fit raise AssertionError.
"""

import math
from dataclasses import dataclass

import torch


def tail_size(length, share):
    """How many of `length` sorted quantiles a tail of `share` touches, the boundary one too."""
    # 0.07 * 100 is a little above 7 in floating point.
    return max(1, math.ceil(share * length - 1e-6))


def first_share(values, share):
    """Mean over the first `share` of the last dim, with a fraction of the entry at the boundary."""
    if not 0 < share <= 1:
        raise ValueError(f"alpha, beta: expected a number in (0, 1], found {share}")
    length = values.shape[-1]
    index = torch.arange(length, dtype=torch.float64, device=values.device)
    weights = (share * length - index).clamp(0, 1) / (share * length)
    values = values.to(torch.result_type(values, 1.0))
    return values @ weights.to(values.dtype)


def lower_tail_mean(quantiles, alpha):
    """CVaR_alpha = 1 / alpha * integral of Q(t) over t in [0, alpha]: the mean of the worst alpha.

    quantiles (..., M) -> (...), their unit; Q is the step function through the sorted quantiles.
    Raises ValueError for alpha outside (0, 1]. [reported]
    """
    return first_share(quantiles.sort(dim=-1).values, alpha)


def upper_tail_mean(quantiles, beta):
    """gain_beta = 1 / beta * integral of Q(t) over [1 - beta, 1], as lower_tail_mean. [reported]"""
    return first_share(quantiles.sort(dim=-1, descending=True).values, beta)


def tail_calibration_loss(quantiles, targets, alpha, beta):
    """Pulls both tail means towards those of what the targets are drawn from.

    quantiles (..., M), targets (..., K) -> (...), their unit squared. Raises as the tail means.
    [reported] "tail calibration"; [ours] in form (Rockafellar-Uryasev), since one state's targets
    (at the last token a single number) are not the distribution of its returns:

        (CVaR_alpha(q) - t_low)^2 + (gain_beta(q) - t_up)^2
        t_low = v - mean_j (v - y_j)_+ / alpha,  v = stop_grad Q(alpha)
        t_up  = w + mean_j (y_j - w)_+ / beta,   w = stop_grad Q(1 - beta)
    """
    assert quantiles.shape[:-1] == targets.shape[:-1], f"{quantiles.shape}, {targets.shape}"
    q, targets = quantiles.sort(dim=-1).values, targets.detach()
    low, high = first_share(q, alpha), first_share(q.flip(-1), beta)
    # The boundary quantile of each tail.
    v = q[..., tail_size(q.shape[-1], alpha) - 1].detach()
    w = q[..., -tail_size(q.shape[-1], beta)].detach()
    t_low = v - (v.unsqueeze(-1) - targets).clamp(min=0).mean(dim=-1) / alpha
    t_up = w + (targets - w.unsqueeze(-1)).clamp(min=0).mean(dim=-1) / beta
    return (low - t_low).square() + (high - t_up).square()


def mean_shift_loss(quantiles, targets):
    """Holds the mean while the tails move: (mean_i q_i - mean_j y_j)^2.

    quantiles (..., M), targets (..., K) -> (...), their unit squared. [reported]; [ours] in form.
    """
    assert quantiles.shape[:-1] == targets.shape[:-1], f"{quantiles.shape}, {targets.shape}"
    return (quantiles.mean(dim=-1) - targets.detach().mean(dim=-1)).square()


def tail_shape_loss(quantiles, alpha, beta, ratio, reach=math.inf):
    """Asks for a lower tail at most `ratio` times as long as the upper: (S_low - ratio * S_up)_+.

    quantiles (..., M) -> (...), their unit. Raises as the tail means. [reported]; [ours] in form.
    reach [ours]: what is more than reach * mean_i |q_i - mean q| above the mean is not pushed up.
    Else the topmost few, hardly held by data, go to 18 where returns end at 2.
    """
    q = quantiles.sort(dim=-1).values
    mean = q.mean(dim=-1)
    above = (q - mean.unsqueeze(-1)).detach()
    upper = torch.where(above > reach * above.abs().mean(dim=-1, keepdim=True), q.detach(), q)
    s_low, s_up = mean - first_share(q, alpha), first_share(upper.flip(-1), beta) - mean
    return (s_low - ratio * s_up).clamp(min=0)


def tail_curvature_loss(quantiles, alpha, beta):
    """Asks for a quantile function convex at both ends: a short lower tail, a long upper one.

    quantiles (..., M) -> (...), their unit; 0 for M < 3. Raises as the tail means. [reported]
    "curvature"; [ours] in form, D2_j = q_{j+1} - 2 q_j + q_{j-1} on the sorted quantiles:

        (-mean of the first alpha of the D2_j)_+ + (-mean of the last beta of the D2_j)_+
    """
    q = quantiles.sort(dim=-1).values
    if q.shape[-1] < 3:
        return q.sum(dim=-1) * 0
    bend = q.diff(n=2, dim=-1)
    first, last = first_share(bend, alpha), first_share(bend.flip(-1), beta)
    return (-first).clamp(min=0) + (-last).clamp(min=0)


@dataclass(frozen=True)
class RiskConfig:
    """Tail shares, ratio and reach of tail_shape_loss, a weight per term: 0 turns it off exactly.

    alpha, beta in (0, 1], others finite and >= 0, else ValueError; consistency, of the heads, is
    added in critic_loss. [ours]: the smallest round weights that move the tails, not the mean.
    """

    alpha: float = 0.1
    beta: float = 0.1
    ratio: float = 0.5
    calibration: float = 0.01
    shift: float = 0.1
    shape: float = 0.1
    curvature: float = 0.1
    consistency: float = 0.1
    reach: float = 4.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("alpha", "beta"):
                if not 0 < value <= 1:
                    raise ValueError(f"{name}: expected a number in (0, 1], found {value}")
            elif not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, found {value}")


def risk_regularizer(quantiles, targets, config):
    """The weighted sum of the four tail terms, and each of them unweighted for the log.

    quantiles (..., M), targets (..., K) -> (loss (...), {name: (...)}), the values detached.
    AssertionError for other shapes. [reported]; [ours] in form.
    """
    q, alpha, beta = quantiles.sort(dim=-1).values, config.alpha, config.beta
    terms = {
        "calibration": tail_calibration_loss(q, targets, alpha, beta),
        "shift": mean_shift_loss(q, targets),
        "shape": tail_shape_loss(q, alpha, beta, config.ratio, config.reach),
        "curvature": tail_curvature_loss(q, alpha, beta),
    }
    # Not 0 * term: a term that overflows must not leak in.
    parts = [getattr(config, name) * term for name, term in terms.items() if getattr(config, name)]
    loss = sum(parts, torch.zeros_like(terms["shift"]))
    return loss, {name: term.detach() for name, term in terms.items()}
