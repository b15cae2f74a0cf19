"""What the tail terms do to a return distribution: free quantiles fitted with and without them.

python experiments/fit_tails.py    # a ladder of terms on three kinds of returns; a minute on a core
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

from critic import head_consistency, quantile_huber_loss, quantile_levels
from harness.flags import RISK_TERMS
from risk import RiskConfig, lower_tail_mean, risk_regularizer, upper_tail_mean

RETURNS = ("gaussian", "heavy lower tail", "coin")
RUNGS = ("consistency", "calibration", "shift", "shape curvature")
OFF = dict.fromkeys(RISK_TERMS, 0.0)
LADDER = {"core": OFF}  # each rung adds terms at their default weights; the last is DVPO
for terms in map(str.split, RUNGS):
    below = list(LADDER.values())[-1]
    LADDER["+ " + ", ".join(terms)] = below | {term: getattr(RiskConfig, term) for term in terms}


def sampled(returns, count, generator):
    """Returns of one kind: (count, 1)."""
    if returns == "coin":
        return (torch.rand(count, 1, generator=generator) < 0.5).float()
    normal = torch.randn(count, 1, generator=generator)
    if returns == "gaussian":
        return normal
    hit, size = (torch.rand(count, 1, generator=generator) for _ in range(2))
    return normal - 6 * (hit < 0.1) * size


def fitted_quantiles(returns, config, regularizer=risk_regularizer, m=64, steps=700):
    """The 4 heads' mean (M,), sorted, after Adam on 256 returns a step; config None: no terms."""
    generator = torch.Generator().manual_seed(0)
    head_quantiles = (0.01 * torch.randn(4, m, generator=generator)).requires_grad_()
    optimizer, levels = torch.optim.Adam([head_quantiles], lr=0.05), quantile_levels(m)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        targets = sampled(returns, 256, generator)
        expanded = head_quantiles.expand(256, 4, m)
        loss = quantile_huber_loss(expanded.flatten(1), targets, levels.repeat(4), 0.01).mean()
        if config is not None:
            loss = loss + regularizer(expanded.mean(1), targets, config)[0].mean()
            loss = loss + config.consistency * head_consistency(expanded).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head_quantiles.detach().mean(0).sort().values


def tails(quantiles):
    """(mean, S_low, S_up) at alpha = beta = 0.1."""
    low, up = lower_tail_mean(quantiles, 0.1), upper_tail_mean(quantiles, 0.1)
    mean = quantiles.mean()
    return mean.item(), (mean - low).item(), (up - mean).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'returns':18}{'terms':20}    mean   S_low    S_up      (M = 64, N = 4, kappa 0.01)")
    for kind in RETURNS:
        for name, weights in LADDER.items():
            found = tails(fitted_quantiles(kind, RiskConfig(**weights)))
            print(f"{kind:18}{name:20}" + "".join(f"{value:8.3f}" for value in found))
