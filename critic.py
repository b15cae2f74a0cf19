"""The critic: a distribution of the return at every token, as N independent sets of M quantiles.

Reading order: levels -> the loss, twice (its definition, then the fast form that training uses) -> consistency -> the network.
Layout everywhere: heads on dim -2, quantiles on dim -1. Everything after the network's head is fp32.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

CHUNK_SIZE = {"cpu": 2**16, "gpu": 2**23}  # numbers per row block of quantile_huber_loss


def quantile_levels(num_quantiles, grid="midpoint", device=None):
    """The probability levels tau_j that the M quantiles stand for.

    Returns (M,) fp32 in (0, 1]. Raises ValueError for M < 1 or an unknown grid.
    midpoint [ours]: tau_j = (j - 1/2) / M, the minimiser of the 1-Wasserstein distance (QR-DQN, Lemma 2).
    right [paper]:   tau_j = j / M; the mean of the fitted quantiles is then biased upward, and the top one can never come down.
    """
    if num_quantiles < 1:
        raise ValueError(f"num_quantiles: expected at least 1, found {num_quantiles}")
    if grid not in ("midpoint", "right"):
        raise ValueError(f"grid: expected 'midpoint' or 'right', found {grid!r}")
    offset = 0.5 if grid == "midpoint" else 0.0
    j = torch.arange(1, num_quantiles + 1, dtype=torch.float64, device=device)
    return ((j - offset) / num_quantiles).float()


def pairwise_quantile_huber_loss(quantiles, targets, levels, kappa):
    """The quantile Huber loss as it is defined: every quantile against every target. Builds M x K numbers per token: for tests.

    Shapes, units and equation: see quantile_huber_loss, which returns the same numbers.
    """
    u = targets.detach().unsqueeze(-2) - quantiles.unsqueeze(-1)  # (..., M, K): u_ij = y_j - q_i
    distance = u.abs()
    if kappa > 0:
        distance = torch.where(distance <= kappa, u.square() / (2 * kappa), distance - kappa / 2)  # H_kappa(u) / kappa
    return ((levels.unsqueeze(-1) - (u < 0).to(u.dtype)).abs() * distance).mean(dim=(-2, -1))


def count_below(targets, edges):
    """How many of each row's sorted targets lie below each edge: (rows, K), (rows, E) -> (rows, E) int64, as searchsorted.

    [ours] A binary search all edges take in step, without branches: a third of searchsorted's time on a CPU at K = 200.
    """
    step = 1 << (targets.shape[-1].bit_length() - 1)
    padded = nn.functional.pad(targets, (0, 2 * step - 1 - targets.shape[-1]), value=torch.inf)
    count = torch.zeros_like(edges, dtype=torch.long)
    while step:
        count.add_(padded[:, step - 1 :].gather(-1, count) < edges, alpha=step)
        step //= 2
    return count


def _loss_and_slope(quantiles, targets, levels, kappa):
    """The quantile Huber loss of each row and its derivative by each quantile, in fp64: (rows, M), (rows, K) -> (rows,), (rows, M)."""
    y = targets.double().sort(dim=-1).values
    centre = y.mean(dim=-1, keepdim=True)  # centred: differences of large sums lose digits
    y, q, levels = y - centre, quantiles.double() - centre, levels.double()
    sum_y, sum_yy = (nn.functional.pad(x.cumsum(dim=-1), (1, 0)) for x in (y, y.square()))  # [i]: over the i smallest targets
    low, mid = count_below(y, q - kappa), count_below(y, q)  # targets before `low` lie more than kappa below q
    far_above = count_below(-y.flip(-1), -q - kappa)
    high = y.shape[-1] - far_above  # targets from `high` on lie more than kappa above q
    corner = 1 / kappa if kappa > 0 else 0.0

    def near(start, end):  # the targets within kappa of q on one side: sums of (q - y) / kappa and (q - y)^2 / (2 kappa)
        count = end - start
        total, squares = (sums.gather(-1, end) - sums.gather(-1, start) for sums in (sum_y, sum_yy))
        return (count * q - total) * corner, (squares - 2 * q * total + count * q.square()) * (corner / 2)

    (slope_below, below), (slope_above, above) = near(low, mid), near(mid, high)
    below += low * (q - kappa / 2) - sum_y.gather(-1, low)
    above += sum_y[..., -1:] - sum_y.gather(-1, high) - far_above * (q + kappa / 2)
    loss = levels * above + (1 - levels) * below
    slope = (1 - levels) * (low + slope_below) - levels * (far_above - slope_above)
    scale = y.shape[-1] * q.shape[-1]
    return loss.sum(dim=-1) / scale, slope / scale


def quantile_huber_loss(quantiles, targets, levels, kappa):
    """Quantile regression with a Huber corner of half-width kappa, in O((M + K) log K) time and O(M + K) memory per token.

    quantiles (..., M), targets (..., K), levels (M,) -> (...), all in reward units; no gradient reaches the targets.
    Raises AssertionError for shapes that do not fit, ValueError for kappa < 0.
    [reported] quantile regression; [ours] mean over both M and K, so that no weight depends on M, and kappa in reward units:

        u_ij = y_j - q_i,  loss = mean_ij |tau_i - 1{u_ij < 0}| H_kappa(u_ij) / kappa,  kappa = 0: the pinball loss

    For a fixed q_i the loss is a polynomial in q_i between the points y_j and y_j +- kappa. So: sort the targets once, keep prefix
    sums of y and y^2 in fp64, look up three edges per quantile; a few rows at a time, so that they stay in a CPU's cache.
    """
    assert levels.shape == quantiles.shape[-1:], f"levels {tuple(levels.shape)} for quantiles {tuple(quantiles.shape)}"
    assert quantiles.shape[:-1] == targets.shape[:-1], f"quantiles {tuple(quantiles.shape)}, targets {tuple(targets.shape)}"
    if kappa < 0:
        raise ValueError(f"kappa: expected >= 0 (reward units), found {kappa}")
    with torch.no_grad():
        flat_quantiles, flat_targets = quantiles.reshape(-1, quantiles.shape[-1]), targets.reshape(-1, targets.shape[-1])
        num_rows = max(1, CHUNK_SIZE["cpu" if quantiles.device.type == "cpu" else "gpu"] // (quantiles.shape[-1] + targets.shape[-1]))
        chunks = [_loss_and_slope(q, y, levels, kappa) for q, y in zip(flat_quantiles.split(num_rows), flat_targets.split(num_rows))]
        loss, slope = (torch.cat(parts).to(quantiles.dtype) for parts in zip(*chunks))
        loss, slope = loss.view(quantiles.shape[:-1]), slope.view(quantiles.shape)
    tangent = (slope * quantiles).sum(dim=-1)
    return loss + (tangent - tangent.detach())  # the value is `loss`, the gradient exactly `slope`, and autograd keeps one tensor only


def head_consistency(head_quantiles):
    """How far the heads are apart: mean over N and M of (q_nm - mean_n q_nm)^2.

    head_quantiles (..., N, M) in reward units -> (...) in squared reward units; 0 for N = 1.
    [reported] as "multi-distribution consistency"; [ours] in form.
    """
    return (head_quantiles - head_quantiles.mean(dim=-2, keepdim=True)).square().mean(dim=(-2, -1))


class QuantileCritic(nn.Module):
    """A transformer trunk and N independent linear heads of M quantiles each.

    trunk: what AutoModel gives (or a causal LM's `.base_model`). [paper] shared trunk, N light heads, ensemble = mean over heads.
    [ours] The heads start at `bias` (reward units) within 1e-3: zero weights but for a tiny spread drawn from `seed`.
    """

    def __init__(self, trunk, num_heads=4, num_quantiles=200, grid="midpoint", bias=0.0, seed=0):
        super().__init__()
        self.trunk = trunk
        self.settings = {"num_heads": num_heads, "num_quantiles": num_quantiles, "grid": grid}
        self.register_buffer("levels", quantile_levels(num_quantiles, grid), persistent=False)
        hidden_size = trunk.config.hidden_size
        self.heads = nn.Linear(hidden_size, num_heads * num_quantiles)
        with torch.no_grad():
            spread = torch.randn(self.heads.weight.shape, generator=torch.Generator().manual_seed(seed))
            self.heads.weight.copy_(spread * 2e-5 / hidden_size**0.5)
            self.heads.bias.fill_(bias)

    @torch.no_grad()
    def start_at(self, returns):
        """Moves a fresh critic's heads to the quantiles of returns (R,), reward units; to their mean if M = 1. [ours]

        From 0, the heads' first steps would go into the spread of all returns, and not into telling states apart.
        """
        assert returns.dim() == 1 and len(returns), f"returns {tuple(returns.shape)}"
        returns = returns.float()[:: len(returns) // 2**24 + 1]  # torch.quantile takes 2^24 numbers at most
        start = returns.mean(0, keepdim=True) if len(self.levels) == 1 else returns.quantile(self.levels)
        self.heads.bias.copy_(start.repeat(self.settings["num_heads"]))

    def forward(self, input_ids, attention_mask, position_ids, last=None):
        """The quantiles of the return from every position on: ids, mask, positions (B, L) -> (B, L, N, M) fp32.

        last: only at the last so many positions (the response's), and so (B, last, N, M).
        """
        output = self.trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state
        if last is not None:
            hidden = hidden[:, -last:]
        with torch.autocast(hidden.device.type, enabled=False):
            quantiles = self.heads(hidden.float())
        return quantiles.unflatten(-1, (self.settings["num_heads"], self.settings["num_quantiles"]))

    def save_pretrained(self, folder):
        """Writes the trunk as transformers does, the heads beside it (critic_heads.safetensors, critic_config.json)."""
        self.trunk.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.heads.state_dict().items()}, Path(folder) / "critic_heads.safetensors")
        (Path(folder) / "critic_config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder, trunk_class=AutoModel):
        """Reads what save_pretrained wrote; fp32."""
        settings = json.loads((Path(folder) / "critic_config.json").read_text())
        critic = cls(trunk_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True), **settings)
        critic.heads.load_state_dict(load_file(Path(folder) / "critic_heads.safetensors"))
        return critic
