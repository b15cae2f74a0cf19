"""risk.py: exact tail means, each term by hand, and the property that the terms exist for."""

import dataclasses
import functools

import pytest
import torch
from common import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from critic import quantile_levels
from experiments.fit_tails import LADDER, OFF, RETURNS, fitted_quantiles, tails
from risk import (
    RiskConfig,
    lower_tail_mean,
    mean_shift_loss,
    risk_regularizer,
    tail_calibration_loss,
    tail_curvature_loss,
    tail_shape_loss,
    tail_size,
    upper_tail_mean,
)

# ---- tail means


def test_tail_means_by_hand():
    """q = 1, 2, 4, 8, given unsorted. alpha 0.3 covers 1.2 quantiles: (1 + 0.2 * 2) / 1.2; beta
    0.3: (8 + 0.2 * 4) / 1.2.
    """
    q = torch.tensor([8.0, 1.0, 4.0, 2.0])
    assert lower_tail_mean(q, 0.25).item() == 1 and upper_tail_mean(q, 0.25).item() == 8
    assert lower_tail_mean(q, 0.5).item() == 1.5 and upper_tail_mean(q, 0.5).item() == 6
    assert lower_tail_mean(q, 0.3).item() == pytest.approx(1.4 / 1.2) and upper_tail_mean(
        q, 0.3
    ).item() == pytest.approx(8.8 / 1.2)
    assert lower_tail_mean(q, 1.0).item() == upper_tail_mean(q, 1.0).item() == 3.75
    assert lower_tail_mean(q, 0.01).item() == 1  # int(alpha * M) would be 0


@pytest.mark.parametrize("m", [1, 8, 200])
@pytest.mark.parametrize("share", [0.001, 0.07, 0.1, 0.29, 1.0])
def test_tail_means_at_awkward_counts(m, share):
    """int(0.29 * 100) is 28 and ceil(0.07 * 100) is 8; the integral does not care.

    A constant has constant tails.
    """
    assert lower_tail_mean(torch.full((3, m), 2.5), share).tolist() == pytest.approx([2.5] * 3)
    assert upper_tail_mean(torch.full((3, m), 2.5), share).tolist() == pytest.approx([2.5] * 3)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 40),
    share=st.floats(1e-3, 1.0),
    seed=st.integers(0, 2**31),
)
def test_tail_means_integrate_the_step_function(shape, m, share, seed):
    q = torch.randn(*shape, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, low in zip(
        q.view(-1, m).tolist(), lower_tail_mean(q, share).flatten().tolist(), strict=True
    ):
        area = sum(
            value * max(0.0, min((j + 1) / m, share) - j / m) for j, value in enumerate(sorted(row))
        )
        assert low == pytest.approx(area / share, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(upper_tail_mean(q, share), -lower_tail_mean(-q, share))


def test_tail_size_counts_the_boundary_quantile():
    sizes = {
        (8, 0.1): 1,
        (100, 0.07): 7,
        (100, 0.29): 29,
        (4, 0.3): 2,
        (200, 0.1): 20,
        (5, 1.0): 5,
        (4, 1e-9): 1,
    }
    assert {key: tail_size(*key) for key in sizes} == sizes


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("function", [lower_tail_mean, upper_tail_mean])
def test_tail_means_refuse_shares_outside_0_1(function, share):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        function(torch.zeros(4), share)


# ---- terms


def test_calibration_by_hand():
    """q = 0, 1, 2, 3, alpha = beta = 0.5: CVaR 0.5, gain 2.5, v = Q(1/2) = 1, w = the first of the
    upper tail = 2.

    y = -1, 0, 4, 5: t_low = 1 - (2 + 1) / 4 / 0.5 = -0.5, the mean of -1 and 0; t_up = 2 + (2 + 3)
    / 4 / 0.5 = 4.5, that of 4 and 5.
    (0.5 + 0.5)^2 + (2.5 - 4.5)^2 = 5.
    """
    q, y = torch.tensor([2.0, 0.0, 3.0, 1.0]), torch.tensor([4.0, -1.0, 5.0, 0.0])
    assert tail_calibration_loss(q, y, 0.5, 0.5).item() == pytest.approx(5.0)


@pytest.mark.parametrize("share", [1e-9, 0.26, 1.0])
def test_calibration_reads_its_boundary_from_the_right_end_for_any_share(share):
    """Every quantile and target at 3: nothing to calibrate, whatever the share; q = 0..3 with
    target 0: the lower tail is right.
    """
    assert tail_calibration_loss(
        torch.full((4,), 3.0), torch.full((2,), 3.0), share, share
    ).item() == pytest.approx(0, abs=1e-9)
    if share < 0.25:
        loss = tail_calibration_loss(torch.arange(4.0), torch.tensor([1.0]), share, 1.0)
        assert loss.item() == pytest.approx(
            (1.5 - 1.0) ** 2
        )  # low = v = 0, no target below it; the whole mean against the target


def test_calibration_target_is_the_true_tail_mean_where_the_quantiles_are_right():
    torch.manual_seed(0)
    y = torch.randn(200_000, dtype=torch.float64)
    q = torch.special.ndtri(quantile_levels(400).double())
    single = torch.stack(
        [tail_calibration_loss(q + shift, y, 0.1, 0.1) for shift in (-0.1, 0.0, 0.1)]
    )
    assert single.argmin() == 1 and single[1] < 1e-3


def test_calibration_of_a_single_atom_is_finite_and_targets_get_no_gradient():
    q, y = torch.tensor([0.5], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    tail_calibration_loss(q, y, 0.1, 0.1).backward()
    assert torch.isfinite(q.grad).all() and y.grad is None


def test_calibrations_gradient_by_hand():
    """q = 0, 1, 2, 3 and one target -1 below them all, shares 1/2: t_low = 1 - 2 / 0.5 = -3, t_up =
    2, both without gradient.

    So 2 (0.5 + 3) / 2 on each of the lower two and 2 (2.5 - 2) / 2 on the upper two; through v,
    t_low would move by 1 - 1 / 0.5.
    """
    q = torch.arange(4.0, requires_grad=True)
    tail_calibration_loss(q, torch.tensor([-1.0]), 0.5, 0.5).backward()
    assert q.grad.tolist() == [3.5, 3.5, 0.5, 0.5]
    q = torch.arange(4.0, requires_grad=True)  # mirrored: -q, -y
    tail_calibration_loss(-q, torch.tensor([1.0]), 0.5, 0.5).backward()
    assert q.grad.tolist() == [3.5, 3.5, 0.5, 0.5]


def test_shift_by_hand_without_gradient_to_the_targets():
    """Means 2 and 4 against 3 and 2."""
    q, y = (
        torch.tensor([[[0.0, 4.0], [1.0, 7.0]]], requires_grad=True),
        torch.tensor([[[1.0, 2.0, 6.0], [0.0, 0.0, 6.0]]], requires_grad=True),
    )
    loss = mean_shift_loss(q, y)
    assert loss.tolist() == [[1.0, 4.0]]
    loss.sum().backward()
    assert y.grad is None and q.grad.tolist() == [[[-1.0, -1.0], [2.0, 2.0]]]


def test_shape_by_hand():
    """q = 1, 5, 6, 8: mean 5, S_low = 5 - 1, S_up = 8 - 5 at share 1/4: 4 - 0.5 * 3 = 2.5; at
    ratio 2 the hinge is shut.
    """
    q = torch.tensor([6.0, 8.0, 1.0, 5.0])
    assert tail_shape_loss(q, 0.25, 0.25, 0.5).item() == 2.5
    assert tail_shape_loss(q, 0.25, 0.25, 2.0).item() == 0.0


def test_shape_pushes_nothing_beyond_its_reach():
    """q = 0, 1, 2, 13: mean 4, |q - 4| = 4, 3, 2, 9, on average 4.5. S_low = 4, S_up of the better
    half 3.5. The value is the same at any reach; 13 is 9 above the mean, two times 4.5.
    """
    values = torch.tensor([13.0, 0.0, 2.0, 1.0])
    # Of (q_low - mean): -1 for the least and 1/4 each; of -(S_up / 2): -1/4 each of the better
    # half, and 1/8 each by the mean.
    whole = [0.125, -0.625, 0.125, 0.375]
    for reach, expected in ((1.99, [0.375, -0.625, 0.125, 0.375]), (2.0, whole), (1e9, whole)):
        q = values.clone().requires_grad_()
        loss = tail_shape_loss(q, 0.25, 0.5, 0.5, reach)
        loss.backward()
        assert loss.item() == 2.25 and q.grad.tolist() == expected, reach
    for unit in (2.0**-30, 2.0**30):
        q = (unit * values).requires_grad_()
        loss = tail_shape_loss(q, 0.25, 0.5, 0.5, 1.99)
        loss.backward()
        assert loss.item() == 2.25 * unit and q.grad.tolist() == [0.375, -0.625, 0.125, 0.375]
    q = torch.zeros(4, requires_grad=True)
    tail_shape_loss(q, 0.25, 0.5, 0.5).backward()  # inf * 0
    assert torch.isfinite(q.grad).all()


def test_curvature_by_hand():
    """q = 0, 4, 6, 7, 7: D2 = -2, -1, -1. Lowest third of them: -2; highest third: -1.

    Penalty 2 + 1. A convex end costs nothing.
    """
    q = torch.tensor([7.0, 0.0, 6.0, 4.0, 7.0])
    assert tail_curvature_loss(q, 1 / 3, 1 / 3).item() == pytest.approx(3.0)
    assert tail_curvature_loss(torch.tensor([0.0, 1.0, 3.0, 6.0]), 0.5, 0.5).item() == 0.0
    assert (
        tail_curvature_loss(torch.tensor([2.0, 3.0, 0.0]), 0.1, 1.0).item() == 2.0
    )  # M = 3: one D2, -1, at both ends
    assert tail_curvature_loss(torch.tensor([1.0, 2.0]), 0.1, 0.1).item() == 0.0


@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_terms_are_finite_for_any_number_of_quantiles(m):
    q = torch.randn(5, m, requires_grad=True)
    loss, parts = risk_regularizer(q, torch.randn(5, 1), RiskConfig())
    loss.sum().backward()
    assert loss.shape == (5,) and torch.isfinite(loss).all() and torch.isfinite(q.grad).all()
    assert all(value.shape == (5,) and not value.requires_grad for value in parts.values())
    assert (
        risk_regularizer(torch.full((5, m), 2.5), torch.full((5, 1), 2.5), RiskConfig())[0]
        .abs()
        .max()
        < 1e-6
    )  # all equal: nothing to do


def test_every_term_sorts_its_input():
    torch.manual_seed(0)
    q, y = torch.randn(4, 30), torch.randn(4, 20)
    shuffled = q[:, torch.randperm(30)]
    for function in (
        lambda q: lower_tail_mean(q, 0.2),
        lambda q: upper_tail_mean(q, 0.2),
        lambda q: tail_calibration_loss(q, y, 0.1, 0.2),
        lambda q: tail_shape_loss(q, 0.1, 0.2, 0.5),
        lambda q: tail_curvature_loss(q, 0.1, 0.2),
        lambda q: risk_regularizer(q, y, RiskConfig())[0],
    ):
        torch.testing.assert_close(function(q), function(shuffled))


def test_regularizer_is_the_weighted_sum_of_its_terms():
    torch.manual_seed(0)
    q, y = torch.randn(3, 16), torch.randn(3, 4)
    config = RiskConfig(
        alpha=0.2,
        beta=0.3,
        ratio=0.7,
        calibration=0.5,
        shift=2.0,
        shape=3.0,
        curvature=5.0,
        reach=1,
    )
    loss, parts = risk_regularizer(q, y, config)
    expected = {
        "calibration": tail_calibration_loss(q, y, 0.2, 0.3),
        "shift": mean_shift_loss(q, y),
        "shape": tail_shape_loss(q, 0.2, 0.3, 0.7),
        "curvature": tail_curvature_loss(q, 0.2, 0.3),
    }
    assert parts.keys() == expected.keys()
    for name in parts:
        torch.testing.assert_close(parts[name], expected[name])
    torch.testing.assert_close(
        loss, sum(getattr(config, name) * value for name, value in expected.items())
    )
    grads = []
    for alone in (
        lambda q: risk_regularizer(q, y, RiskConfig(**{**OFF, "shape": 1.0, "reach": 1.0}))[0],
        lambda q: tail_shape_loss(q, 0.1, 0.1, 0.5, 1.0),
        lambda q: tail_shape_loss(q, 0.1, 0.1, 0.5),
    ):
        leaf = q.clone().requires_grad_()
        alone(leaf).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


def test_weight_0_turns_a_term_off_exactly():
    q, y = (
        torch.randn(3, 16, requires_grad=True),
        torch.full((3, 4), 1e30),
    )  # (1e30)^2 overflows in fp32
    loss, _ = risk_regularizer(q, y, RiskConfig(**{**OFF, "shape": 0.1}))
    torch.testing.assert_close(loss, 0.1 * tail_shape_loss(q, 0.1, 0.1, 0.5))
    loss, _ = risk_regularizer(q, y, RiskConfig(**OFF))
    assert torch.equal(loss, torch.zeros(3)) and not loss.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0},
        {"beta": 1.5},
        {"ratio": -1},
        {"shift": float("nan")},
        {"curvature": float("inf")},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RiskConfig(**wrong)


def test_config_takes_its_limits_stays_as_made_and_starts_at_the_documented_weights():
    config = RiskConfig(
        alpha=1.0, beta=1, ratio=0, calibration=0, shift=0, shape=0, curvature=0, consistency=0
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.shift = -1.0
    assert dataclasses.astuple(RiskConfig()) == (
        0.1,
        0.1,
        0.5,
        0.01,
        0.1,
        0.1,
        0.1,
        0.1,
        4.0,
    )  # README, "weights" and "shape, curvature"


@pytest.mark.parametrize(
    "quantiles,targets", [((3, 8), (8,)), ((3, 3, 8), (3, 8)), ((3, 8), (3, 3, 8))]
)
def test_regularizer_asserts_shapes(quantiles, targets):
    q, y = torch.zeros(quantiles), torch.zeros(targets)
    for call in (
        lambda: risk_regularizer(q, y, RiskConfig()),
        lambda: tail_calibration_loss(q, y, 0.1, 0.1),
        lambda: mean_shift_loss(q, y),
    ):
        with pytest.raises(AssertionError):
            call()


def test_tails_of_whole_numbers_are_not_rounded():
    """A tail of 3/8 of four: 0 and half of 1, over one and a half."""
    whole = torch.tensor([3, 0, 1, 7])
    assert lower_tail_mean(whole, 0.375).item() == pytest.approx(1 / 3)
    assert upper_tail_mean(whole, 0.375).item() == pytest.approx(8.5 / 1.5)
    calibration = lambda q: tail_calibration_loss(q, whole.float(), 0.375, 0.375)
    assert calibration(whole) == calibration(whole.float())
    assert tail_curvature_loss(whole, 0.8, 0.8) == tail_curvature_loss(whole.float(), 0.8, 0.8)


# ---- the property: against plain quantile regression the lower tail contracts, the upper one
# expands, the mean stays


def target_quantile_form(q, targets, config):
    """The mutant: the tails of q drawn to the tails of the target's own atoms, which for a sampled
    return are one number.
    """
    tail = (lower_tail_mean(q, 0.1) - lower_tail_mean(targets, 0.1)).square() + (
        upper_tail_mean(q, 0.1) - upper_tail_mean(targets, 0.1)
    ).square()
    return 0.1 * tail, {}


# A fit takes seconds: those that several tests look at are made once.
fit = functools.cache(fitted_quantiles)


FITS = [("gaussian", 64, 350), ("coin", 64, 350), slow("gaussian", 200, 350)]
FITS += [slow(name, 64, 700) for name in RETURNS]


@pytest.mark.parametrize("returns,m,steps", FITS)
def test_lower_tail_contracts_upper_tail_expands_mean_stays(returns, m, steps):
    mean, low, up = tails(fit(returns, None, m=m, steps=steps))
    risk_mean, risk_low, risk_up = tails(fit(returns, RiskConfig(), m=m, steps=steps))
    assert abs(risk_mean - mean) < 0.05
    if returns == "coin":  # already as short as it can be: it must not grow
        assert risk_low < low + 0.01
    else:
        assert risk_low < 0.8 * low
        assert risk_up > 1.15 * up


def test_mutant_that_reads_tails_off_the_targets_own_quantiles_fails():
    _, _, up = tails(fit("gaussian", None, m=64, steps=350))
    off = RiskConfig(**OFF)
    _, _, mutant_up = tails(fitted_quantiles("gaussian", off, target_quantile_form, steps=350))
    assert mutant_up < 0.5 * up  # its "gain" pulls the upper tail down


def test_ladder_of_ablations_is_made_of_weights_alone():
    """All weights 0 is plain quantile regression, to the last bit."""
    assert torch.equal(
        fitted_quantiles("coin", RiskConfig(**LADDER["core"]), steps=20),
        fitted_quantiles("coin", None, steps=20),
    )
    assert RiskConfig(**LADDER["+ shape, curvature"]) == RiskConfig()
