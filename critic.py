"""The critic: a distribution of the return at every token, as N sets (heads) of M quantiles.

Reading order: levels -> the loss as defined -> the network -> the same loss, fast -> consistency.
Layout: heads on dim -2, quantiles on dim -1. From the heads on nothing is half precision.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel


def quantile_levels(num_quantiles, grid="midpoint", device=None):
    """The probability levels tau_j that the M quantiles stand for: -> (M,) fp32 in (0, 1].

    Raises ValueError for M < 1 or an unknown grid.
    midpoint [ours]: tau_j = (j - 1/2) / M, the minimiser of the 1-Wasserstein distance (QR-DQN,
    Lemma 2). right [paper]: tau_j = j / M; the mean of the fitted quantiles is then biased
    upward, and the top one can never come down.
    """
    if num_quantiles < 1:
        raise ValueError(f"num_quantiles: expected at least 1, found {num_quantiles}")
    if grid not in ("midpoint", "right"):
        raise ValueError(f"grid: expected 'midpoint' or 'right', found {grid!r}")
    offset = 0.5 if grid == "midpoint" else 0.0
    j = torch.arange(1, num_quantiles + 1, dtype=torch.float64, device=device)
    return ((j - offset) / num_quantiles).float()


def pairwise_quantile_huber_loss(quantiles, targets, levels, kappa):
    """The quantile Huber loss as it is defined, every quantile against every target: -> (...).

        u_ij = y_j - q_i,  loss = mean_ij |tau_i - 1{u_ij < 0}| H_kappa(u_ij) / kappa

    H_kappa(u) is u^2 / 2 within kappa, and further out the straight line that goes on from it.
    Builds M x K numbers per token: training uses quantile_huber_loss.
    """
    assert levels.shape == quantiles.shape[-1:] and quantiles.shape[:-1] == targets.shape[:-1]
    u = targets.detach().unsqueeze(-2) - quantiles.unsqueeze(-1)
    distance = u.abs()
    if kappa > 0:
        # H_kappa(u) / kappa
        distance = torch.where(distance <= kappa, u.square() / (2 * kappa), distance - kappa / 2)
    return ((levels.unsqueeze(-1) - (u < 0).to(u.dtype)).abs() * distance).mean(dim=(-2, -1))


class QuantileCritic(nn.Module):
    """A transformer trunk and N independent linear heads of M quantiles each.

    trunk: what AutoModel gives (or a causal LM's `.base_model`). [paper] shared trunk, N light
    heads, ensemble = mean over heads. [ours] The heads count in units of `scale`, 1 until start_at
    sets it, and start at `bias` within 1e-3: zero weights but for a tiny spread drawn from `seed`.
    """

    def __init__(self, trunk, num_heads=4, num_quantiles=200, grid="midpoint", bias=0.0, seed=0):
        super().__init__()
        self.trunk = trunk
        self.settings = {"num_heads": num_heads, "num_quantiles": num_quantiles, "grid": grid}
        self.register_buffer("levels", quantile_levels(num_quantiles, grid), persistent=False)
        self.register_buffer("scale", torch.ones(()))
        hidden_size = trunk(torch.tensor([[0]], device=trunk.device)).last_hidden_state.shape[-1]
        self.heads = nn.Linear(hidden_size, num_heads * num_quantiles)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            spread = torch.randn(self.heads.weight.shape, generator=generator)
            self.heads.weight.copy_(spread * 2e-5 / hidden_size**0.5)
            self.heads.bias.fill_(bias)

    @torch.no_grad()
    def start_at(self, returns):
        """Moves a fresh critic's heads to the quantiles of returns (R,); to their mean if M = 1.

        [ours] From 0, the heads' first steps would go into the spread of all returns, and not
        into telling states apart. scale: the returns' standard deviation; 1 if they do not vary.
        """
        assert returns.dim() == 1 and len(returns), f"returns {tuple(returns.shape)}"
        # torch.quantile takes 2^24 numbers at most.
        returns = returns.float()[:: len(returns) // 2**24 + 1]
        start = returns.mean(0, keepdim=True)
        if len(self.levels) > 1:
            start = returns.quantile(self.levels)
        # What rounding leaves of equal returns is no spread.
        std, least = returns.double().std(correction=0), 1e-6 * returns.abs().max()
        self.scale.copy_(torch.where(std > least, std, 1))
        self.heads.bias.copy_((start / self.scale).repeat(self.settings["num_heads"]))

    def forward(self, input_ids, attention_mask, position_ids, last=None):
        """The quantiles of the return from every position on: (B, L) each -> (B, L, N, M) fp32.

        last: only at the last so many positions (the response's), and so (B, last, N, M).
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.trunk(input_ids, **inputs, use_cache=False).last_hidden_state
        if last is not None:
            hidden = hidden[:, -last:]
        with torch.autocast(hidden.device.type, enabled=False):
            quantiles = self.heads(hidden.float())
        return self.scale * quantiles.unflatten(-1, (self.settings["num_heads"], len(self.levels)))

    def save_pretrained(self, folder):
        """Writes the trunk as transformers does, and beside it the heads and their settings."""
        self.trunk.save_pretrained(folder)
        heads = {name: value.contiguous() for name, value in self.heads.state_dict().items()}
        save_file(heads | {"scale": self.scale}, Path(folder) / "critic_heads.safetensors")
        (Path(folder) / "critic_config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder, trunk_class=AutoModel):
        """Reads what save_pretrained wrote; fp32."""
        # safetensors only: nothing is unpickled. And transformers makes up what is missing.
        options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        trunk, found = trunk_class.from_pretrained(folder, **options)
        assert not found["missing_keys"], f"expected all weights, found no {found['missing_keys']}"
        critic = cls(trunk, **json.loads((Path(folder) / "critic_config.json").read_text()))
        heads = load_file(Path(folder) / "critic_heads.safetensors")
        critic.scale.copy_(heads.pop("scale", torch.ones(())))
        critic.heads.load_state_dict(heads)
        return critic


# The loss at the top again, in O((M + K) log K) a token. As a function of q_i it is a polynomial
# between the points y_j and y_j +- kappa. So: sort the targets once, keep prefix sums of y and
# y^2, and look up three edges per quantile.

# Numbers per block of rows: on a CPU they should stay in its cache.
CHUNK_SIZE = {"cpu": 2**16, "gpu": 2**23}


def count_below(targets, edges):
    """How many of each row's sorted targets lie below each edge: (R, K), (R, E) -> (R, E) int64.

    [ours] searchsorted, as a binary search of all edges in step: a third of its time on a CPU.
    """
    step = 1 << (targets.shape[-1].bit_length() - 1)
    room = 2 * step - 1 - targets.shape[-1]
    padded = nn.functional.pad(targets, (0, room), value=torch.inf)
    count = torch.zeros_like(edges, dtype=torch.long)
    while step:
        count.add_(padded[:, step - 1 :].gather(-1, count) < edges, alpha=step)
        step //= 2
    return count


def near_sums(q, sum_y, sum_yy, start, end, kappa):
    """Over the targets of ranks start to end (R, M): the sums of (q - y) / kappa and of
    (q - y)^2 / (2 kappa), from prefix sums (R, K + 1) of y and y^2. kappa (R, 1); 0: none is near.
    """
    corner = torch.where(kappa > 0, 1 / kappa, 0)
    count = end - start
    total = sum_y.gather(-1, end) - sum_y.gather(-1, start)
    squares = sum_yy.gather(-1, end) - sum_yy.gather(-1, start)
    slope = (count * q - total) * corner
    return slope, (squares - 2 * q * total + count * q.square()) * (corner / 2)


def loss_and_slope(quantiles, targets, levels, kappa):
    """Rows of quantiles (R, M), targets (R, K) -> losses (R,) and their slopes (R, M), in fp64."""
    y = targets.double().sort(dim=-1).values
    # Centred: differences of large sums lose digits.
    centre = y.mean(dim=-1, keepdim=True)
    y, q, levels = y - centre, quantiles.double() - centre, levels.double()
    # [i]: the sum over the i smallest targets
    sum_y = nn.functional.pad(y.cumsum(dim=-1), (1, 0))
    sum_yy = nn.functional.pad(y.square().cumsum(dim=-1), (1, 0))
    # A corner (R, 1) not far above what the sums round off is none; 1 / 1e-300 is finite.
    least = 1e-10 * sum_yy[:, -1:].sqrt() + 1e-300
    kappa = kappa * (kappa > least).double()
    # Targets before `low` lie more than kappa below q, those from `high` on more than that above.
    low = count_below(y, q - kappa)
    mid = count_below(y, q)
    far_above = count_below(-y.flip(-1), -q - kappa)
    high = y.shape[-1] - far_above
    slope_below, below = near_sums(q, sum_y, sum_yy, low, mid, kappa)
    slope_above, above = near_sums(q, sum_y, sum_yy, mid, high, kappa)
    below += low * (q - kappa / 2) - sum_y.gather(-1, low)
    above += sum_y[..., -1:] - sum_y.gather(-1, high) - far_above * (q + kappa / 2)
    loss = levels * above + (1 - levels) * below
    slope = (1 - levels) * (low + slope_below) - levels * (far_above - slope_above)
    num_pairs = y.shape[-1] * q.shape[-1]
    return loss.sum(dim=-1) / num_pairs, slope / num_pairs


def quantile_huber_loss(quantiles, targets, levels, kappa):
    """Quantile regression with a Huber corner of half-width kappa: O(M + K) memory per token.

    quantiles (..., M), targets (..., K), levels (M,) -> (...), their unit; targets get no gradient.
    Raises AssertionError for other shapes, ValueError unless 0 <= kappa < inf. Equation:
    pairwise_quantile_huber_loss. [reported] quantile regression; [ours] mean over M and K, so that
    no weight depends on M; kappa = 0 is the plain quantile (pinball) loss.
    """
    shapes = f"quantiles {tuple(quantiles.shape)}, targets {tuple(targets.shape)}"
    assert levels.shape == quantiles.shape[-1:], f"levels {tuple(levels.shape)}, {shapes}"
    assert quantiles.shape[:-1] == targets.shape[:-1], shapes
    if not 0 <= kappa < torch.inf:
        raise ValueError(f"kappa: expected a finite number >= 0, found {kappa}")
    q = quantiles.detach().reshape(-1, quantiles.shape[-1])
    y = targets.detach().reshape(-1, targets.shape[-1])
    chunk_size = CHUNK_SIZE["cpu" if quantiles.device.type == "cpu" else "gpu"]
    num_rows = max(1, chunk_size // (q.shape[-1] + y.shape[-1]))
    parts = zip(q.split(num_rows), y.split(num_rows))
    losses, slopes = zip(*(loss_and_slope(*part, levels, kappa) for part in parts))
    dtype = torch.result_type(quantiles, 1.0)
    loss = torch.cat(losses).to(dtype).view(quantiles.shape[:-1])
    slope = torch.cat(slopes).to(dtype).view(quantiles.shape)
    # The value is `loss`, the gradient exactly `slope`, and autograd keeps one tensor only.
    tangent = (slope * quantiles).sum(dim=-1)
    return loss + (tangent - tangent.detach())


def head_consistency(head_quantiles):
    """How far the heads are apart: mean over N and M of (q_nm - mean_n q_nm)^2.

    head_quantiles (..., N, M) -> (...), their unit squared; 0 for N = 1.
    [reported] as "multi-distribution consistency"; [ours] in form.
    """
    centred = head_quantiles - head_quantiles.mean(dim=-2, keepdim=True)
    return centred.square().mean(dim=(-2, -1))
