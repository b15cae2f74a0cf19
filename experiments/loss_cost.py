"""Times the quantile loss, forward and backward, in its two forms, side by side in one process on one thread.

    python experiments/loss_cost.py
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from critic import pairwise_quantile_huber_loss, quantile_huber_loss, quantile_levels


def seconds(loss, quantiles, targets, levels):
    start = time.perf_counter()
    loss(quantiles, targets, levels, 0.01).sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread, 512 tokens, median of 5\n{'M = K':>8}{'pairwise':>12}{'sorted':>12}{'ratio':>8}")
    for m in (8, 50, 200, 400):
        quantiles, targets, levels = torch.randn(512, m, requires_grad=True), torch.randn(512, m), quantile_levels(m)
        both = (pairwise_quantile_huber_loss, quantile_huber_loss)
        times = [[seconds(loss, quantiles, targets, levels) for loss in both] for _ in range(6)]
        slow, fast = (sorted(column)[2] for column in zip(*times[1:]))
        print(f"{m:8}{slow:10.4f} s{fast:10.4f} s{slow / fast:8.1f}")
