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


def quantile_huber_loss(quantiles, targets, levels, kappa):
    """Quantile regression with a Huber corner of half-width kappa, in O((M + K) log K) time and O(M + K) memory per token.

    quantiles (..., M), targets (..., K), levels (M,) -> (...), all in reward units; no gradient reaches the targets.
    Raises AssertionError for shapes that do not fit, ValueError for kappa < 0.
    [reported] quantile regression; [ours] mean over both M and K, so that no weight depends on M, and kappa in reward units:

        u_ij = y_j - q_i,  loss = mean_ij |tau_i - 1{u_ij < 0}| H_kappa(u_ij) / kappa,  kappa = 0: the pinball loss

    For a fixed q_i the loss is a polynomial in q_i between the points y_j and y_j +- kappa. So: sort the targets once, keep
    prefix sums of y and y^2 (in fp64 and centred: differences of large sums lose digits), look up three edges per quantile.
    """
    assert levels.shape == quantiles.shape[-1:], f"levels {tuple(levels.shape)} for quantiles {tuple(quantiles.shape)}"
    assert quantiles.shape[:-1] == targets.shape[:-1], f"quantiles {tuple(quantiles.shape)}, targets {tuple(targets.shape)}"
    if kappa < 0:
        raise ValueError(f"kappa: expected >= 0 (reward units), found {kappa}")
    with torch.no_grad():
        y = targets.double().sort(dim=-1).values
        centre = y.mean(dim=-1, keepdim=True)
        y, q = y - centre, (quantiles.double() - centre).contiguous()
        zero = torch.zeros_like(centre)
        sum_y = torch.cat([zero, y.cumsum(dim=-1)], dim=-1)  # sum_y[i] = sum of the i smallest targets
        sum_yy = torch.cat([zero, y.square().cumsum(dim=-1)], dim=-1)
        low = torch.searchsorted(y, q - kappa)  # targets before `low` lie more than kappa below q
        mid = torch.searchsorted(y, q, right=True)  # targets from `mid` on lie above q
        high = torch.searchsorted(y, q + kappa, right=True)  # targets from `high` on lie more than kappa above q
        y_low, y_mid, y_high = (sum_y.gather(-1, edge) for edge in (low, mid, high))
        yy_low, yy_mid, yy_high = (sum_yy.gather(-1, edge) for edge in (low, mid, high))
        corner = 1 / kappa if kappa > 0 else 0.0

        # Sums over the targets above q of H(u)/kappa and of its slope: a near, quadratic part and a far, linear one.
        far, near, near_y = y.shape[-1] - high, high - mid, y_high - y_mid
        slope_above = far + (near_y - near * q) * corner
        above = (sum_y[..., -1:] - y_high) - far * (q + kappa / 2)
        above += (yy_high - yy_mid - 2 * q * near_y + near * q.square()) * (corner / 2)
        # And over those below q.
        far, near, near_y = low, mid - low, y_mid - y_low
        slope_below = far + (near * q - near_y) * corner
        below = far * (q - kappa / 2) - y_low
        below += (yy_mid - yy_low - 2 * q * near_y + near * q.square()) * (corner / 2)

        loss = (levels * above + (1 - levels) * below).mean(dim=-1) / y.shape[-1]
        slope = ((1 - levels) * slope_below - levels * slope_above) / (q.shape[-1] * y.shape[-1])
        loss, slope = loss.to(quantiles.dtype), slope.to(quantiles.dtype)
    # The value is in `loss`; adding slope * (q - q) = 0 gives it the exact gradient, and autograd keeps one tensor only.
    return loss + (slope * (quantiles - quantiles.detach())).sum(dim=-1)


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

    def forward(self, input_ids, attention_mask, position_ids, num_last=0):
        """The quantiles of the return from every position on: ids, mask, positions (B, L) -> (B, L, N, M) fp32.

        num_last > 0 keeps the last positions only (the response), as transformers' logits_to_keep does for logits.
        """
        output = self.trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state[:, -num_last:]
        with torch.autocast(hidden.device.type, enabled=False):
            quantiles = self.heads(hidden.float())
        return quantiles.unflatten(-1, (self.settings["num_heads"], self.settings["num_quantiles"]))

    def save_pretrained(self, folder):
        """Writes the trunk as transformers does, the heads beside it (critic_heads.safetensors, critic_config.json)."""
        self.trunk.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.heads.state_dict().items()}, Path(folder) / "critic_heads.safetensors")
        (Path(folder) / "critic_config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder):
        """Reads what save_pretrained wrote; fp32."""
        settings = json.loads((Path(folder) / "critic_config.json").read_text())
        critic = cls(AutoModel.from_pretrained(folder, dtype=torch.float32), **settings)
        critic.heads.load_state_dict(load_file(Path(folder) / "critic_heads.safetensors"))
        return critic
