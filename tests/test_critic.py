"""critic.py: hand-derived losses, a float64 reference, mutants that must fail, and the network's
promises.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

import critic
from critic import (
    QuantileCritic,
    count_below,
    head_consistency,
    pairwise_quantile_huber_loss,
    quantile_huber_loss,
    quantile_levels,
)

# Two predictions, three targets. u = y - q, with the weights |tau - 1{u < 0}|:
#   q_1 = 0, tau_1 = 0.25:  u = -1,  0.5, 3,  weights 0.75, 0.25, 0.25
#   q_2 = 1, tau_2 = 0.75:  u = -2, -0.5, 2,  weights 0.25, 0.25, 0.75
# kappa 0, |u|:  0.75 * 1   + 0.25 * 0.5    + 0.25 * 3   = 1.625
#                0.25 * 2   + 0.25 * 0.5    + 0.75 * 2   = 2.125
# kappa 1, H:    0.75 * 0.5 + 0.25 * 0.125  + 0.25 * 2.5 = 1.03125
#                0.25 * 1.5 + 0.25 * 0.125  + 0.75 * 1.5 = 1.53125
# kappa 2, H/2:  0.75 * 1/4 + 0.25 * 0.0625 + 0.25 * 2   = 0.703125
#                0.25 * 1   + 0.25 * 0.0625 + 0.75 * 1   = 1.015625
QUANTILES, LEVELS = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75])
TARGETS = torch.tensor([-1.0, 0.5, 3.0])
BY_HAND = {0.0: 3.75 / 6, 1.0: 2.5625 / 6, 2.0: 1.71875 / 6}
LOSSES = [quantile_huber_loss, pairwise_quantile_huber_loss]


def fit(loss, targets, levels, steps=400):
    """Quantiles that minimise a loss on fixed targets (K,), by Adam with a falling step."""
    quantiles = torch.zeros(len(levels), requires_grad=True)
    optimizer = torch.optim.Adam([quantiles], lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        loss(quantiles, targets, levels, 0.01).backward()
        optimizer.step()
    return quantiles.detach()


def normal_atoms(count):
    return torch.special.ndtri(quantile_levels(count).double()).float()


# ---- levels


def test_levels_by_hand():
    assert quantile_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quantile_levels(4, "right").tolist() == [0.25, 0.5, 0.75, 1.0]
    assert quantile_levels(1).tolist() == [0.5]
    levels = quantile_levels(800)
    assert levels.dtype == torch.float32 and len(levels.unique()) == 800


@pytest.mark.parametrize("arguments", [(0,), (4, "left")])
def test_levels_refuse(arguments):
    with pytest.raises(ValueError, match="expected"):
        quantile_levels(*arguments)


def test_mean_of_fitted_midpoint_quantiles_is_the_sample_mean():
    """With j/M it is biased upward by 0.23 on a normal at M = 16 (the top quantile runs to the
    largest atom and stays).
    """
    atoms = normal_atoms(1000)
    assert abs(fit(quantile_huber_loss, atoms, quantile_levels(16)).mean() - atoms.mean()) < 0.02
    assert fit(quantile_huber_loss, atoms, quantile_levels(16, "right")).mean() > 0.15


def test_top_quantile_above_all_targets_comes_down_only_on_midpoints():
    for grid, moves in (("midpoint", True), ("right", False)):
        quantiles = torch.full((8,), 5.0, requires_grad=True)
        quantile_huber_loss(quantiles, torch.zeros(3), quantile_levels(8, grid), 0.01).backward()
        assert (quantiles.grad[-1] > 0) == moves


# ---- the loss


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kappa", BY_HAND)
def test_two_predictions_three_targets_by_hand(loss, kappa):
    assert loss(QUANTILES, TARGETS, LEVELS, kappa).item() == pytest.approx(BY_HAND[kappa], rel=1e-6)


def value_and_gradient(loss, quantiles, targets, levels, kappa):
    quantiles = quantiles.detach().requires_grad_()
    value = loss(quantiles, targets, levels, kappa)
    return value.detach(), torch.autograd.grad(value.sum(), quantiles)[0]


def by_loops(quantiles, targets, levels, kappa):
    """The definition on lists of floats."""
    huber = lambda u: (
        abs(u) - kappa / 2 if abs(u) > kappa else u * u / (2 * kappa) if kappa else 0.0
    )
    return sum(
        abs(tau - (y < q)) * huber(y - q) for q, tau in zip(quantiles, levels) for y in targets
    ) / (len(quantiles) * len(targets))


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 9),
    k=st.integers(1, 9),
    kappa=st.sampled_from([0.0, 0.01, 1.0]),
    offset=st.sampled_from([0.0, 100.0, -1e4]),
    grid=st.sampled_from(["midpoint", "right"]),
    seed=st.integers(0, 2**31),
)
def test_fast_form_is_the_pairwise_definition_in_float64(shape, m, k, kappa, offset, grid, seed):
    """Values and gradients of the two forms, and the values of loops over lists."""
    generator = torch.Generator().manual_seed(seed)
    targets = (
        torch.randn(*shape, k, generator=generator, dtype=torch.float64) * 4
    ).round() / 4 + offset  # a grid: ties abound
    quantiles = (
        torch.randn(*shape, m, generator=generator, dtype=torch.float64) * 4
    ).round() / 4 + offset
    levels = quantile_levels(m, grid).double()
    value, gradient = value_and_gradient(quantile_huber_loss, quantiles, targets, levels, kappa)
    expected, expected_gradient = value_and_gradient(
        pairwise_quantile_huber_loss, quantiles, targets, levels, kappa
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    loops = [
        by_loops(q, y, levels.tolist(), kappa)
        for q, y in zip(quantiles.view(-1, m).tolist(), targets.view(-1, k).tolist())
    ]
    assert value.flatten().tolist() == pytest.approx(loops, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("m,k", [(1, 1), (1, 3), (5, 1), (5, 3)])
@pytest.mark.parametrize("kappa", [0.0, 0.01])
def test_quantiles_that_equal_all_targets_cost_nothing_and_stay(m, k, kappa):
    value, gradient = value_and_gradient(
        quantile_huber_loss,
        torch.full((2, m), 0.7),
        torch.full((2, k), 0.7),
        quantile_levels(m),
        kappa,
    )
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    "offset,scale,outlier", [(0, 1, 0), (1e3, 1, 0), (-1e5, 1, 0), (0, 1, 1e6), (0, 1e4, 0)]
)
@pytest.mark.parametrize("kappa", [0.0, 0.01, 1.0])
def test_fp32_stays_exact_far_from_zero_and_beside_outliers(offset, scale, outlier, kappa):
    torch.manual_seed(0)
    quantiles, targets = torch.randn(16, 50) * scale + offset, torch.randn(16, 60) * scale + offset
    targets[:, 0] += outlier
    levels = quantile_levels(50)
    value, gradient = value_and_gradient(quantile_huber_loss, quantiles, targets, levels, kappa)
    expected, expected_gradient = value_and_gradient(
        pairwise_quantile_huber_loss, quantiles.double(), targets.double(), levels.double(), kappa
    )
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient,
        rtol=0,
        atol=3e-7 * expected_gradient.abs().max().item(),
    )


def test_gradient_against_finite_differences():
    torch.manual_seed(0)
    quantiles = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets, levels = torch.randn(3, 7, dtype=torch.float64), quantile_levels(5).double()
    assert torch.autograd.gradcheck(
        lambda q: quantile_huber_loss(q, targets, levels, 0.5), quantiles
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_get_no_gradient_and_inputs_stay(loss):
    quantiles, targets = QUANTILES.clone().requires_grad_(), TARGETS.clone().requires_grad_()
    loss(quantiles, targets, LEVELS, 0.01).backward()
    assert targets.grad is None and quantiles.grad is not None
    assert torch.equal(quantiles.detach(), QUANTILES) and torch.equal(targets.detach(), TARGETS)


def test_one_quantile_and_large_kappa_is_the_squared_error_over_four_kappa():
    """M = 1, tau = 1/2: |tau - 1{u < 0}| u^2 / (2 kappa) = u^2 / (4 kappa)."""
    torch.manual_seed(0)
    quantiles, targets = (
        torch.randn(10, 1, dtype=torch.float64),
        torch.randn(10, 1, dtype=torch.float64),
    )
    value = quantile_huber_loss(quantiles, targets, quantile_levels(1).double(), 1000.0)
    torch.testing.assert_close(value * 4 * 1000, (quantiles - targets).square().squeeze(-1))


def test_pinball_is_the_limit_of_small_kappa():
    torch.testing.assert_close(
        quantile_huber_loss(QUANTILES, TARGETS, LEVELS, 1e-7),
        quantile_huber_loss(QUANTILES, TARGETS, LEVELS, 0.0),
    )


def test_kappa_is_in_reward_units():
    """Scaling rewards and kappa together scales the loss; kappa 1 on 0/1 rewards is expectile
    regression, std 0.29 and not 0.5.
    """
    scaled = quantile_huber_loss(10 * QUANTILES, 10 * TARGETS, LEVELS, 0.1)
    torch.testing.assert_close(scaled, 10 * quantile_huber_loss(QUANTILES, TARGETS, LEVELS, 0.01))
    coin, levels = torch.tensor([0.0, 1.0]), quantile_levels(32)

    def fitted_std(kappa):
        return (
            fit(lambda q, y, tau, _: quantile_huber_loss(q, y, tau, kappa), coin, levels)
            .std(unbiased=False)
            .item()
        )

    assert fitted_std(0.01) == pytest.approx(0.5, abs=0.02) and fitted_std(1.0) == pytest.approx(
        0.288, abs=0.02
    )


def test_loss_scale_does_not_depend_on_the_number_of_quantiles():
    losses = [
        quantile_huber_loss(normal_atoms(m), normal_atoms(300), quantile_levels(m), 0.01).item()
        for m in (25, 100, 400)
    ]
    assert max(losses) / min(losses) < 1.05


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 9, 200, 255, 256])
def test_count_below_is_searchsorted(k):
    """Ties between targets and with edges, edges below and above all targets, infinite ones."""
    rng = torch.Generator().manual_seed(k)
    targets = torch.randint(0, 10, (5, k), generator=rng).double().sort(dim=-1).values
    edges = torch.cat(
        [
            torch.arange(-1, 11.5, 0.5).double().expand(5, -1),
            torch.tensor([[-torch.inf, torch.inf]] * 5, dtype=torch.double),
        ],
        dim=-1,
    )
    assert torch.equal(count_below(targets, edges), torch.searchsorted(targets, edges.contiguous()))


def test_loss_is_the_same_in_chunks_of_rows(monkeypatch):
    """Chunks of one row, of two, and all at once; any number of leading dimensions, also none."""
    quantiles, targets, levels = (
        torch.randn(3, 5, 7, 40).double(),
        torch.randn(3, 5, 7, 30).double(),
        quantile_levels(40).double(),
    )
    expected = pairwise_quantile_huber_loss(quantiles, targets, levels, 0.1)
    rows, of_rows = [], critic.loss_and_slope
    monkeypatch.setattr(
        critic, "loss_and_slope", lambda q, *rest: rows.append(len(q)) or of_rows(q, *rest)
    )
    for size, num_rows in ((1, 1), (150, 2), (2**16, 105)):
        monkeypatch.setitem(critic.CHUNK_SIZE, "cpu", size)
        found = quantile_huber_loss(quantiles, targets, levels, 0.1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert max(rows) == rows[0] == num_rows
        rows.clear()
    assert quantile_huber_loss(quantiles[:0], targets[:0], levels, 0.1).shape == (0, 5, 7)
    assert quantile_huber_loss(quantiles[0, 0, 0], targets[0, 0, 0], levels, 0.1).shape == ()


@pytest.mark.parametrize("kappa", [1e-15, 1e-9, 1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_loss_and_gradient_in_fp32_for_kappas_of_any_size(kappa, scale):
    """fp32 tensors and levels, as training has them, M = 200 and 0/1 returns or large ones:
    against the fp64 definition.
    """
    rng = torch.Generator().manual_seed(0)
    quantiles = scale * (0.5 + 0.1 * torch.rand(4, 200, generator=rng))
    targets = scale * (torch.rand(4, 200, generator=rng) < 0.5).float()
    results = []
    for loss, dtype in (
        (quantile_huber_loss, torch.float32),
        (pairwise_quantile_huber_loss, torch.float64),
    ):
        q = quantiles.to(dtype).requires_grad_()
        value = loss(q, targets.to(dtype), quantile_levels(200).to(dtype), kappa)
        results.append((value.detach().double(), torch.autograd.grad(value.sum(), q)[0].double()))
    for found, expected in zip(*results):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
        )


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation's result held."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_tensor_of_m_times_k_is_built():
    quantiles, targets = torch.randn(4, 200, requires_grad=True), torch.randn(4, 200)
    with LargestTensor() as largest:
        quantile_huber_loss(quantiles, targets, quantile_levels(200), 0.01).sum().backward()
    assert largest.numel <= 4 * 4 * 200  # O(M + K)
    with LargestTensor() as largest:
        pairwise_quantile_huber_loss(quantiles, targets, quantile_levels(200), 0.01)
    assert largest.numel == 4 * 200 * 200  # the measuring mode does see it


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "shapes", [((3, 5), (3, 7), 4), ((3, 5), (3, 7), 1), ((3, 5), (7,), 5), ((3, 5), (1, 7), 5)]
)
def test_shapes_are_asserted(loss, shapes):
    quantiles, targets, levels = shapes
    with pytest.raises(AssertionError):
        loss(torch.zeros(quantiles), torch.zeros(targets), quantile_levels(levels), 0.01)


@pytest.mark.parametrize("kappa", [-0.1, math.inf, math.nan])
def test_other_kappas_are_refused(kappa):
    with pytest.raises(ValueError, match="kappa: expected a finite number >= 0"):
        quantile_huber_loss(QUANTILES, TARGETS, LEVELS, kappa)


@pytest.mark.parametrize("loss", LOSSES)
def test_whole_numbers_are_read_as_floats(loss):
    """The first distance is 1 or 3, at the levels 1/4 and 3/4: not whole."""
    quantiles, targets = torch.tensor([[0, 1]]), torch.tensor([[-1, 3, 3]])
    expected = loss(quantiles.float(), targets.float(), LEVELS, 0.5)
    for y in (targets, targets.float()):
        assert torch.equal(loss(quantiles, y, LEVELS, 0.5), expected)
    assert torch.equal(loss(quantiles.float(), targets, LEVELS, 0.5), expected)
    assert expected.dtype == torch.float32 and expected.item() % 1


@pytest.mark.parametrize("kappa", [5e-324, 1e-300, 1e-100, 1e-30, 1e-15, 1e-12, 1e-9])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_kappa_below_rounding_is_none(kappa, scale):
    """Half of the targets are quantiles: at a tie, sums of large numbers leave no digit of it."""
    rng = torch.Generator().manual_seed(0)
    quantiles = scale * torch.randn(16, 9, generator=rng, dtype=torch.float64)
    targets = scale * torch.randn(16, 12, generator=rng, dtype=torch.float64)
    targets[:, :6] = quantiles[:, :6]
    arguments = (quantiles, targets, quantile_levels(9).double())
    loss, slope = value_and_gradient(quantile_huber_loss, *arguments, scale * kappa)
    expected = value_and_gradient(pairwise_quantile_huber_loss, *arguments, 0.0)
    torch.testing.assert_close(loss, expected[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(slope, expected[1], rtol=0, atol=1e-8)
    # A target alone is centred to 0: there is nothing to round.
    one = torch.zeros(1, dtype=torch.float64)
    assert quantile_huber_loss(one, one, one + 0.5, kappa) == 0
    near = value_and_gradient(quantile_huber_loss, one + kappa / 2, one, one + 0.5, kappa)[1]
    assert kappa <= 1e-300 or near.item() == pytest.approx(0.25)


# ---- mutants: wrong losses seen in the wild. Each must fail the check named beside it; the real
# ones must pass all.


def mutant(tau="prediction", flipped=False, pairs=True, reduce=torch.mean):
    def loss(quantiles, targets, levels, kappa):
        if pairs:
            u = targets.unsqueeze(-2) - quantiles.unsqueeze(-1)
            levels = levels.unsqueeze(-1) if tau == "prediction" else levels.unsqueeze(-2)
        else:
            u = targets - quantiles
        distance = u.abs()
        huber = (
            torch.where(distance <= kappa, u.square() / (2 * kappa), distance - kappa / 2)
            if kappa
            else distance
        )
        indicator = (u > 0 if flipped else u < 0).float()
        weighted = (levels - indicator).abs() * huber
        return reduce(weighted.flatten(-2) if pairs else weighted, -1)

    return loss


def check_hand_numbers(loss, levels_of):
    return all(
        abs(loss(QUANTILES, TARGETS, LEVELS, kappa).item() - value) < 1e-6
        for kappa, value in BY_HAND.items()
    )


def check_spread_and_order(loss, levels_of):
    quantiles = fit(loss, normal_atoms(16), levels_of(16))
    return (
        abs(quantiles.std(unbiased=False) - normal_atoms(16).std(unbiased=False)) < 0.1
        and quantiles[-1] > quantiles[0]
    )


def check_mixture(loss, levels_of):
    """Two returns of 16 atoms each, 4 apart, take turns: the fit is the mixture's quantiles, not
    the mean of the two sets.
    """
    mixed = lambda q, y, tau, kappa: (
        (loss(q, normal_atoms(16), tau, kappa) + loss(q, normal_atoms(16) + 4, tau, kappa)) / 2
    )
    expected = torch.cat([normal_atoms(16), normal_atoms(16) + 4]).sort().values.view(16, 2).mean(1)
    return (fit(mixed, None, levels_of(16)) - expected).abs().max() < 0.35


def check_mean(loss, levels_of):
    return abs(fit(loss, normal_atoms(1000), levels_of(16)).mean()) < 0.05


MUTANTS = {
    "tau on the target axis": (mutant(tau="target"), quantile_levels, check_spread_and_order),
    "flipped indicator": (mutant(flipped=True), quantile_levels, check_hand_numbers),
    "flipped indicator, order": (mutant(flipped=True), quantile_levels, check_spread_and_order),
    "element-wise pairing": (mutant(pairs=False), quantile_levels, check_mixture),
    "j/M mean": (quantile_huber_loss, lambda m: quantile_levels(m, "right"), check_mean),
    "sum instead of mean": (mutant(reduce=torch.sum), quantile_levels, check_hand_numbers),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name):
    loss, levels_of, check = MUTANTS[name]
    assert not check(loss, levels_of)


@pytest.mark.parametrize(
    "check", [check_hand_numbers, check_spread_and_order, check_mixture, check_mean]
)
@pytest.mark.parametrize("loss", [*LOSSES, mutant()])
def test_right_losses_pass_what_mutants_fail(loss, check):
    assert check(loss, quantile_levels)


# ---- heads


def test_head_consistency_by_hand():
    """Heads (0, 3) and (2, 3): mean (1, 3), squared distances 1, 0, 1, 0 -> mean 0.5.

    With the axes swapped: 1.25.
    """
    heads = torch.tensor([[0.0, 3.0], [2.0, 3.0]])
    assert head_consistency(heads).item() == 0.5
    assert head_consistency(heads.T).item() == 1.25
    assert head_consistency(torch.randn(3, 4, 1, 8)).equal(torch.zeros(3, 4))


def make_critic(model, **kwargs):
    return QuantileCritic(model.base_model, **{"num_heads": 3, "num_quantiles": 8, **kwargs})


def inputs(length=6):
    ids = torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids), torch.arange(length).expand(2, -1)


def test_critic_starts_at_its_bias_with_heads_apart(model):
    quantiles = make_critic(model, bias=0.5)(*inputs())
    assert quantiles.shape == (2, 6, 3, 8) and quantiles.dtype == torch.float32
    assert (quantiles - 0.5).abs().max() < 1e-3
    assert head_consistency(quantiles).min() > 0
    assert torch.equal(quantiles, make_critic(model, bias=0.5)(*inputs()))  # seeded
    assert not torch.equal(quantiles, make_critic(model, bias=0.5, seed=1)(*inputs()))
    fresh = QuantileCritic(model.base_model)
    assert fresh(*inputs()).shape == (2, 6, 4, 200)  # README: N and M
    assert fresh.heads.weight.std().item() == pytest.approx(
        2e-5 / 32**0.5, rel=0.02
    )  # whatever the width, hidden states of size 1 give 2e-5


def test_critic_starts_at_the_quantiles_of_returns_or_at_their_mean(model):
    """Levels 1/4 and 3/4 of 0, 1, 2, 3, 4 are 1 and 3; the mean of 0, 0, 3 is 1, their median
    would be 0.
    """
    critic = make_critic(model, num_quantiles=2)
    critic.start_at(torch.tensor([4.0, 0.0, 2.0, 1.0, 3.0]))
    assert (critic(*inputs()) - torch.tensor([1.0, 3.0])).abs().max() < 1e-3
    critic = make_critic(model, num_quantiles=1)
    critic.start_at(torch.tensor([0.0, 3.0, 0.0]))
    assert (critic(*inputs()) - 1).abs().max() < 1e-3
    for returns in (torch.zeros(2, 3), torch.zeros(0)):
        with pytest.raises(AssertionError):
            critic.start_at(returns)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_critic_starts_at_returns_of_any_precision_and_number(model):
    """torch.quantile wants one dtype, float or double, and at most 2^24 numbers."""
    critic = make_critic(model, num_quantiles=2)
    for returns in (torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).bfloat16(), torch.arange(5).double()):
        critic.start_at(returns)
        # The standard deviation of 0, 1, 2, 3, 4.
        assert critic.scale.item() == pytest.approx(2**0.5)
        found = critic.scale * critic.heads.bias
        torch.testing.assert_close(found, torch.tensor([1.0, 3.0] * 3))
    critic.start_at(torch.tensor([2.0]).expand(2**24 + 1))
    assert critic.heads.bias.tolist() == [2.0] * 6 and critic.scale == 1


def test_equal_returns_and_what_rounding_leaves_of_them_are_no_unit(model):
    critic = make_critic(model, num_quantiles=2)
    for returns, scale in (
        (torch.full((7,), 0.1), 1.0),
        (torch.tensor([1.0, 1.0 + 2**-23]), 1.0),
        (torch.tensor([-3e-9, 3e-9]), 3e-9),
    ):
        critic.start_at(returns)
        assert critic.scale.item() == pytest.approx(scale)


def test_critic_output_is_fp32_under_autocast_or_on_a_bf16_trunk_and_last_is_a_slice(model):
    critic = make_critic(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(*inputs()).dtype == torch.float32
    every = critic(*inputs())
    for last in (1, 2, 6):
        torch.testing.assert_close(critic(*inputs(), last=last), every[:, -last:])
    critic.trunk.bfloat16()
    assert critic(*inputs()).dtype == torch.float32


def test_critic_learns_and_every_head_is_calibrated(model):
    """A fixed batch whose return is N(0, 1): gradients reach trunk and heads, and each head finds
    the quantiles.

    The loss starts at E|Y| / 2 = 0.399 (all quantiles at 0) and can fall to E|Y - Y'| / 4 = 0.282
    (exact quantiles, M large).
    """
    critic = make_critic(model, num_quantiles=5)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    targets = normal_atoms(200).expand(2, 6, 1, 200).expand(2, 6, 3, 200)
    losses = []
    for _ in range(200):
        loss = quantile_huber_loss(critic(*inputs()), targets, critic.levels, 0.01).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.394, abs=0.01) and losses[-1] < 0.295
    assert all(p.grad.norm() > 0 for p in critic.heads.parameters())
    assert sum(p.grad.norm() for p in critic.trunk.parameters() if p.grad is not None) > 0
    expected = normal_atoms(5)
    assert (critic(*inputs()) - expected).abs().max() < 0.3


def test_save_and_load_round_trip(model, tmp_path):
    critic = make_critic(model, bias=0.3, grid="right")
    critic.scale.fill_(3.0)
    critic.save_pretrained(tmp_path)
    loaded = QuantileCritic.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(*inputs()), critic.eval()(*inputs()))
    assert (
        torch.equal(loaded.levels, quantile_levels(8, "right"))
        and "levels" not in loaded.state_dict()
    )  # they follow from the settings
    assert type(AutoModel.from_pretrained(tmp_path)) is type(
        model.base_model
    )  # the trunk alone, in plain transformers


def test_levels_stay_apart_in_fp32_and_are_not_cast():
    assert math.isclose(quantile_levels(500).diff().min().item(), 1 / 500, rel_tol=1e-3)
