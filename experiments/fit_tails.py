"""What the tail terms do to a return distribution: free quantiles fitted to sampled returns, with and without them.

    python experiments/fit_tails.py        # the ladder of ablations on three kinds of returns; a minute on one core
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from critic import head_consistency, quantile_huber_loss, quantile_levels
from risk import RiskConfig, lower_tail_mean, risk_regularizer, upper_tail_mean

RETURNS = {
    "gaussian": lambda shape, g: torch.randn(shape, generator=g),
    "heavy lower tail": lambda shape, g: torch.randn(shape, generator=g) - 6 * (torch.rand(shape, generator=g) < 0.1) * torch.rand(shape, generator=g),
    "coin": lambda shape, g: (torch.rand(shape, generator=g) < 0.5).float(),
}
OFF = {"calibration": 0.0, "shift": 0.0, "shape": 0.0, "curvature": 0.0, "consistency": 0.0}
LADDER = {"core": OFF}  # each rung adds a term at its default weight; the last is DVPO
for terms in (["consistency"], ["calibration"], ["shift"], ["shape", "curvature"]):
    LADDER["+ " + ", ".join(terms)] = {**list(LADDER.values())[-1], **{term: getattr(RiskConfig, term) for term in terms}}


def fitted_quantiles(returns, config, regularizer=risk_regularizer, heads=4, m=64, steps=700, kappa=0.01):
    """The heads' mean (M,), sorted, after Adam on 256 sampled returns a step, one atom each; config None: no terms at all."""
    generator = torch.Generator().manual_seed(0)
    head_quantiles = (0.01 * torch.randn(heads, m, generator=generator)).requires_grad_()
    optimizer, levels = torch.optim.Adam([head_quantiles], lr=0.05), quantile_levels(m)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        targets = RETURNS[returns]((256, 1), generator)
        expanded = head_quantiles.expand(256, heads, m)
        loss = quantile_huber_loss(expanded.flatten(1), targets, levels.repeat(heads), kappa).mean()
        if config is not None:
            loss = loss + regularizer(expanded.mean(1), targets, config)[0].mean() + config.consistency * head_consistency(expanded).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head_quantiles.detach().mean(0).sort().values


def tails(quantiles):
    """(mean, S_low, S_up) at alpha = beta = 0.1."""
    mean = quantiles.mean()
    return mean.item(), (mean - lower_tail_mean(quantiles, 0.1)).item(), (upper_tail_mean(quantiles, 0.1) - mean).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'returns':18}{'terms':20}{'mean':>8}{'S_low':>8}{'S_up':>8}      (M = 64, N = 4, kappa 0.01)")
    for kind in RETURNS:
        for name, weights in LADDER.items():
            print(f"{kind:18}{name:20}" + "".join(f"{value:8.3f}" for value in tails(fitted_quantiles(kind, RiskConfig(**weights)))))
