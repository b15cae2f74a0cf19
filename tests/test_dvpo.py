"""dvpo.py: rewards, advantages and losses by hand and against loops; what changes nothing."""

import itertools
import math
import statistics

import pytest
import torch
from common import SHAPES, hidden, padded, ragged_mask, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from critic import pairwise_quantile_huber_loss, quantile_levels
from dvpo import (
    advantage_readout,
    clipped_policy_loss,
    critic_loss,
    discounted_returns,
    distributional_gae,
    explained_variance,
    group_advantages,
    kl_estimate,
    masked_mean,
    masked_whiten,
    quantile_metrics,
    robust_gae,
    scalar_advantage,
    token_rewards,
    token_weights,
)
from risk import RiskConfig, lower_tail_mean, risk_regularizer, upper_tail_mean

NAN = float("nan")
FIVE = torch.zeros(2, 4, 5)


def scalar_gae(rewards, values, gamma, lam, last_value=0.0, successors=None):
    """The textbook recursion on plain lists, float64: the reference.

    successors: what states are worth seen from before them.
    """
    advantages, next_value, next_advantage = [0.0] * len(rewards), last_value, 0.0
    for t in reversed(range(len(rewards))):
        next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
        advantages[t], next_value = next_advantage, (successors or values)[t]
    return advantages


# ---- token rewards


def test_score_stands_on_the_last_valid_token_and_nowhere_else():
    """Ragged rows, a gap, an empty row; the slot after EOS stays 0."""
    mask = torch.tensor(
        [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool
    )
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rewards = token_rewards(scores, torch.zeros(5, 4), None, mask, 0.0)
    assert rewards.tolist() == [
        [0, 0, 1, 0],
        [2, 0, 0, 0],
        [0, 0, 3, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 5],
    ]
    rewards = token_rewards(
        scores.double().requires_grad_(), torch.zeros(5, 4, requires_grad=True), None, mask, 0.0
    )
    assert (
        rewards.dtype == torch.float32 and not rewards.requires_grad
    )  # as the log-probs, whatever the scores are


def test_kl_in_the_reward_by_hand_without_gradient_and_past_nan():
    """logp - ref = 1, -2; kl_coef 0.1: -0.1, 0.2 and the score 3 on the last."""
    logprobs = torch.tensor([[-1.0, -3.0, NAN]], requires_grad=True)
    ref_logprobs = torch.tensor([[-2.0, -1.0, 0.0]], requires_grad=True)
    rewards = token_rewards(
        torch.tensor([3.0]), logprobs, ref_logprobs, torch.tensor([[True, True, False]]), 0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 3.2, 0.0]]))
    assert not rewards.requires_grad


# ---- advantages


def test_gae_of_two_rows_by_hand():
    """gamma 1, lam 0.5, M = 2 with means V. Row 0 finished after two tokens, row 1 truncated after
    three.

    Row 0: q = (0, 1), (1, 3), rewards 0, 2:  A_1 = 2 - q = (1, -1);  A_0 = q_1 - q_0 + A_1 / 2 = (1
    + 0.5, 2 - 0.5) = (1.5, 1.5).
    Row 1: q = 0 throughout, rewards 0, 0, 1: A = 1/4, 1/2, 1; with V = 2 after the last token: 3/4,
    3/2, 3.
    """
    rewards = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    quantiles = torch.tensor([[[0.0, 1.0], [3.0, 1.0], [9.0, 9.0]], [[0.0, 0.0]] * 3])
    mask = ragged_mask([2, 3], 3)
    advantages, targets = distributional_gae(rewards, quantiles, mask, 1.0, 0.5)
    assert advantages.tolist() == [
        [[1.5, 1.5], [1.0, -1.0], [0, 0]],
        [[0.25, 0.25], [0.5, 0.5], [1, 1]],
    ]
    assert targets.tolist() == [
        [[1.5, 2.5], [2.0, 2.0], [0, 0]],
        [[0.25, 0.25], [0.5, 0.5], [1, 1]],
    ]
    bootstrap = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    advantages, _ = distributional_gae(rewards, quantiles, mask, 1.0, 0.5, bootstrap)
    assert scalar_advantage(advantages).tolist() == [[1.5, 0.0, 0.0], [0.75, 1.5, 3.0]]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    m=st.integers(1, 9),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_mean_of_distributional_gae_is_scalar_gae_of_the_mean(batch, length, m, gamma, lam, seed):
    """The identity of the README, over any mask: gaps are carried across, padding counts for
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards, quantiles = (
        torch.randn(batch, length, generator=generator).double(),
        torch.randn(batch, length, m, generator=generator).double(),
    )
    mask = random_mask(generator, batch, length)
    advantages, targets = distributional_gae(rewards, quantiles, mask, gamma, lam)
    for row in range(batch):
        kept = mask[row]
        expected = scalar_gae(
            rewards[row, kept].tolist(), quantiles[row, kept].mean(-1).tolist(), gamma, lam
        )
        torch.testing.assert_close(
            scalar_advantage(advantages)[row, kept].tolist(), expected, rtol=1e-9, atol=1e-9
        )
    assert (advantages[~mask] == 0).all() and (targets[~mask] == 0).all()
    torch.testing.assert_close(
        targets.mean(-1)[mask], (quantiles.mean(-1) + scalar_advantage(advantages))[mask]
    )


DISCOUNTS = {"gamma": st.sampled_from([0.0, 0.9, 1.0]), "lam": st.sampled_from([0.0, 0.5, 1.0])}


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 5),
    bootstrapped=st.booleans(),
    own_successors=st.booleans(),
    **SHAPES,
    **DISCOUNTS,
)
def test_distributional_gae_is_the_textbook_recursion_on_every_sorted_index(
    batch, length, seed, gamma, lam, m, bootstrapped, own_successors
):
    """Any mask with NaN off it, one token, one quantile, with and without a bootstrap and
    successors, all of them unsorted.
    """
    rng = torch.Generator().manual_seed(seed)
    rewards, mask = (
        torch.randn(batch, length, generator=rng).double(),
        random_mask(rng, batch, length),
    )
    quantiles, successors = torch.randn(2, batch, length, m, generator=rng).double()
    last = torch.randn(batch, m, generator=rng).double() if bootstrapped else torch.zeros(batch, m)
    arguments = (
        last if bootstrapped else None,
        hidden(successors, mask) if own_successors else None,
    )
    advantages, targets = distributional_gae(
        hidden(rewards, mask), hidden(quantiles, mask), mask, gamma, lam, *arguments
    )
    for row, j in itertools.product(range(batch), range(m)):
        kept = mask[row]
        values, after = (
            x[row, kept].sort(dim=-1).values[:, j].tolist()
            for x in (quantiles, successors if own_successors else quantiles)
        )
        expected = scalar_gae(
            rewards[row, kept].tolist(),
            values,
            gamma,
            lam,
            last[row].sort().values[j].item(),
            after,
        )
        assert advantages[row, kept, j].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert targets[row, kept, j].tolist() == pytest.approx(
            [v + a for v, a in zip(values, expected)], rel=1e-9, abs=1e-9
        )
    assert (advantages[~mask] == 0).all() and (targets[~mask] == 0).all()


@pytest.mark.filterwarnings("ignore:std")  # torch warns of the std of no tokens at all
def test_one_token_and_none_by_hand():
    """T = M = N = 1.

    Row 0: reward 2, value 0.5, log-ratio ln 1.5; row 1 is all masked and counts for nothing, not
    even as 0 in a mean.
    """
    mask, rewards, values = (
        torch.tensor([[True], [False]]),
        torch.tensor([[2.0], [NAN]]),
        torch.tensor([[[0.5]], [[NAN]]]),
    )
    for gae in (distributional_gae, robust_gae):
        advantages, targets = gae(rewards, values, mask, 0.5, 0.9)
        assert advantages.tolist() == [[[1.5]], [[0.0]]] and targets.tolist() == [[[2.0]], [[0.0]]]
        assert gae(rewards, values, mask, 0.5, 0.9, torch.tensor([[4.0], [4.0]]))[0].tolist() == [
            [[3.5]],
            [[0.0]],
        ]  # 2 + 0.5 * 4 - 0.5
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[2.0], [0.0]]
    loss, metrics = clipped_policy_loss(
        torch.full((2, 1), math.log(1.5)), torch.zeros(2, 1), rewards, mask, 0.2
    )
    assert (
        loss.item() == pytest.approx(-2.4)
        and metrics["clipfrac"] == 1
        and metrics["ratio"].item() == pytest.approx(1.5)
    )
    head, level = values.unsqueeze(2), torch.tensor([0.5])
    for kappa, expected in (
        (0.0, 0.75),
        (1.0, 0.5),
        (None, 1.125),
    ):  # |u| / 2, (|u| - 1/2) / 2, u^2 / 2 with u = 1.5
        assert (
            critic_loss(head, rewards.unsqueeze(2), mask, level, kappa, None)[0].item() == expected
        )
    assert explained_variance(values[..., 0], rewards, mask).isnan()


def test_undiscounted_lambda_1_makes_every_atom_the_sampled_return():
    torch.manual_seed(0)
    rewards, quantiles, mask = (
        torch.randn(4, 6).double(),
        torch.randn(4, 6, 5).double(),
        ragged_mask([6, 3, 1, 5], 6),
    )
    _, targets = distributional_gae(rewards, quantiles, mask, 1.0, 1.0)
    returns = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(targets[mask], returns[mask].unsqueeze(-1).expand(-1, 5))


def test_targets_of_crossed_quantiles_are_in_order_and_carry_no_gradient():
    torch.manual_seed(0)
    quantiles = torch.randn(3, 5, 8, requires_grad=True)
    advantages, targets = distributional_gae(
        torch.randn(3, 5), quantiles, ragged_mask([5, 2, 4], 5), 1.0, 0.9
    )
    assert (targets.diff(dim=-1) >= -1e-5).all()
    assert not targets.requires_grad and not advantages.requires_grad


def test_a_gap_is_carried_across():
    """A user's turn between two tokens of the policy: the same numbers as without it."""
    rewards, quantiles = (
        torch.tensor([[0.0, 7.0, 7.0, 1.0]]),
        torch.tensor([[[0.2], [50.0], [NAN], [0.4]]]),
    )
    mask = torch.tensor([[True, False, False, True]])
    advantages, _ = distributional_gae(rewards, quantiles, mask, 0.9, 0.5)
    short, _ = distributional_gae(
        rewards[:, [0, 3]], quantiles[:, [0, 3]], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.5
    )
    assert torch.equal(advantages[:, [0, 3]], short) and torch.equal(
        advantages[:, 1:3], torch.zeros(1, 2, 1)
    )


# ---- masked statistics


def test_masked_mean_by_hand():
    values, mask = (
        torch.tensor([[1.0, NAN], [3.0, 8.0]]),
        torch.tensor([[True, False], [True, True]]),
    )
    assert masked_mean(values, mask).item() == 4
    assert masked_mean(values, mask, num_tokens=6).item() == 2
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0


def test_whiten_gives_mean_0_and_variance_1_over_valid_tokens_whatever_the_padding():
    torch.manual_seed(0)
    values, mask = torch.randn(8, 9) * 3 + 5, ragged_mask([9, 1, 4, 4, 2, 8, 8, 3], 9)
    white = masked_whiten(values, mask)
    assert white[mask].mean().abs() < 1e-6 and white[mask].var().item() == pytest.approx(
        1, abs=1e-4
    )
    assert (
        torch.equal(masked_whiten(torch.where(mask, values, NAN), mask), white)
        and (white[~mask] == 0).all()
    )
    kept = masked_whiten(values, mask, shift_mean=False)
    assert (
        kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), rel=1e-5)
        and (kept[~mask] == 0).all()
    )


def test_whiten_of_0_1_and_2_tokens():
    """One token: variance of one element is NaN, so it is centred only.

    Two: 1 and 3 have mean 2 and std sqrt(2).
    """
    values = torch.tensor([[1.0, 3.0]])
    assert masked_whiten(values, ragged_mask([0], 2)).tolist() == [[0, 0]]
    assert masked_whiten(values, ragged_mask([1], 2)).tolist() == [[0, 0]]
    assert masked_whiten(values, ragged_mask([2], 2))[0].tolist() == pytest.approx(
        [-(0.5**0.5), 0.5**0.5]
    )
    assert masked_whiten(torch.full((2, 3), 7.0), ragged_mask([3, 2], 3)).abs().max() == 0


def test_whitening_does_not_blow_rounding_up_and_has_no_unit():
    """A part in 1e7 apart counts as a part in 1e6: about +-0.06; 1e-9 apart around 0 is news."""
    for size in (1.0, -1.0, 1e3, -1e-5):
        values = torch.tensor([[1.0, 1.0 + 2**-23, 5.0]]) * size
        white = masked_whiten(values, ragged_mask([2], 3))
        assert 0.03 < white[0, :2].abs().max() < 0.13
    for size in (1e-30, 1e-9, 1e20, 1e38):
        values = torch.tensor([[-1.0, 1.0, 5.0]]) * size
        found = masked_whiten(values, ragged_mask([2], 3))[0].tolist()
        assert found == pytest.approx([-(0.5**0.5), 0.5**0.5, 0])
    # fp32's mean of 2,048 equal numbers is not their value.
    equal, mask = torch.full((128, 16), 0.7), torch.ones(128, 16, dtype=torch.bool)
    assert masked_whiten(equal, mask).abs().max() < 1e-6


# ---- KL


def test_kl_estimators_against_the_exact_kl_of_a_small_vocabulary():
    torch.manual_seed(0)
    logp, ref = torch.randn(50).double().log_softmax(-1), torch.randn(50).double().log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    for kind in ("k1", "k3"):  # expectation by enumeration: exact, not Monte Carlo
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, ref, kind)).sum(), exact)
    close = (0.9 * logp + 0.1 * ref).log_softmax(-1)  # k2 is biased, by little near the reference
    exact = (logp.exp() * (logp - close)).sum()
    assert (logp.exp() * kl_estimate(logp, close, "k2")).sum().item() == pytest.approx(
        exact.item(), rel=0.15
    )


def test_kl_signs_by_hand_and_overflow():
    """logp - ref = ln 2: k1 = ln 2, k2 = ln(2)^2 / 2, k3 = 1/2 - 1 + ln 2."""
    one, two = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}
    for kind, value in expected.items():
        assert kl_estimate(one, two, kind).item() == pytest.approx(value, rel=1e-6)
    for log_ratio, expected in (
        (-500.0, math.exp(20) - 21),
        (500.0, math.exp(-20) + 19),
    ):  # k1 = -20 and 20 in k3
        assert kl_estimate(
            torch.tensor([log_ratio]), torch.tensor([0.0]), "k3"
        ).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(one, two, "k4")


# ---- policy loss


def test_policy_loss_by_hand():
    """Ratios 1.5, 1.5, 0.5, 0.5, cliprange 0.2; A = 1, -1, 1, -1. -min(rA, clip(r)A) = -1.2, 1.5,
    -0.5, 0.8; mean 0.15.

    The clip binds on the first and the last: clipfrac 1/2, and no gradient there. approx_kl: mean
    of ln(r)^2 / 2.
    """
    logprobs = torch.tensor([[1.5, 1.5], [0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    loss, metrics = clipped_policy_loss(
        logprobs, torch.zeros(2, 2), advantages, torch.ones(2, 2, dtype=torch.bool), 0.2
    )
    assert loss.item() == pytest.approx(0.15)
    assert metrics["clipfrac"].item() == 0.5 and metrics["ratio"].item() == pytest.approx(1.0)
    assert metrics["approx_kl"].item() == pytest.approx(
        (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4, rel=1e-5
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 1.5], [-0.5, 0.0]]) / 4)


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_policy_loss_gradient_and_metrics_are_those_of_a_loop_over_tokens(batch, length, seed):
    """Any mask, NaN off it, none valid included; old log-probs that are not 0, tokens inside the
    clip range and on both sides of it.
    """
    rng = torch.Generator().manual_seed(seed)
    logprobs, old, advantages = torch.randn(3, batch, length, generator=rng).double() * 0.3 - 1
    advantages, mask = advantages + 1, random_mask(rng, batch, length)
    loss, gradient, clipped, kl, ratios, count = (
        0.0,
        torch.zeros(batch, length).double(),
        0,
        0.0,
        0.0,
        max(mask.sum().item(), 1),
    )
    for row, t in mask.nonzero().tolist():
        difference, advantage = (logprobs - old)[row, t].item(), advantages[row, t].item()
        ratio = math.exp(difference)
        surrogate, limited = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
        loss, kl, ratios, clipped = (
            loss - min(surrogate, limited),
            kl + difference**2 / 2,
            ratios + ratio,
            clipped + (limited < surrogate),
        )
        gradient[row, t] = 0 if limited < surrogate else -surrogate / count
    logprobs = hidden(logprobs, mask).requires_grad_()
    found, metrics = clipped_policy_loss(
        logprobs, hidden(old, mask), hidden(advantages, mask), mask, 0.2
    )
    assert found.item() == pytest.approx(loss / count, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, logprobs)[0], gradient)
    expected = {"clipfrac": clipped / count, "approx_kl": kl / count, "ratio": ratios / count}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        expected, rel=1e-6
    )
    assert not any(value.requires_grad for value in metrics.values())


def policy_inputs(length=7):
    torch.manual_seed(0)
    logprobs, old_logprobs = -torch.rand(6, length).double(), -torch.rand(6, length).double()
    return (
        logprobs,
        old_logprobs,
        torch.randn(6, length).double(),
        ragged_mask([7, 1, 3, 0, 6, 2], length),
    )


def test_policy_loss_ignores_padding_and_nan_in_value_gradient_and_metrics():
    logprobs, old_logprobs, advantages, mask = policy_inputs()
    logprobs.requires_grad_()
    loss, metrics = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    wide = [
        padded(torch.where(mask, x.detach(), NAN)) for x in (logprobs, old_logprobs, advantages)
    ]
    wide[0].requires_grad_()
    wide_loss, wide_metrics = clipped_policy_loss(*wide, padded(mask), 0.2)
    (wide_gradient,) = torch.autograd.grad(wide_loss, wide[0])
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient, padded(gradient, fill=0.0))
    for name in metrics:
        torch.testing.assert_close(wide_metrics[name], metrics[name])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_minibatch_loss_gradient_and_metrics(size):
    logprobs, old_logprobs, advantages, mask = policy_inputs()
    logprobs.requires_grad_()
    loss, metrics = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    parts = [
        clipped_policy_loss(
            logprobs[rows],
            old_logprobs[rows],
            advantages[rows],
            mask[rows],
            0.2,
            num_tokens=mask.sum(),
        )
        for rows in torch.arange(6).split(size)
    ]
    torch.testing.assert_close(
        torch.autograd.grad(sum(part for part, _ in parts), logprobs)[0], gradient
    )
    for name in metrics:
        torch.testing.assert_close(sum(part[name] for _, part in parts), metrics[name])


def test_policy_loss_of_an_all_masked_batch_is_0_and_of_a_huge_ratio_finite():
    logprobs = torch.full((1, 2), 300.0, requires_grad=True)
    empty, _ = clipped_policy_loss(
        logprobs, torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.2
    )
    huge, metrics = clipped_policy_loss(
        logprobs, torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.2
    )
    (empty + huge).backward()
    assert empty.item() == 0 and torch.isfinite(logprobs.grad).all()
    assert huge.item() == metrics["ratio"].item() == pytest.approx(math.exp(20), rel=1e-6)


def test_policy_loss_sends_no_gradient_to_old_logprobs_or_advantages():
    logprobs, old_logprobs, advantages, mask = (
        x.requires_grad_() if x.dtype != torch.bool else x for x in policy_inputs()
    )
    clipped_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)[0].backward()
    assert old_logprobs.grad is None and advantages.grad is None and logprobs.grad.abs().sum() > 0


# ---- critic loss


def critic_inputs(heads=3, m=8, k=5):
    torch.manual_seed(0)
    return (
        torch.randn(4, 6, heads, m).double(),
        torch.randn(4, 6, k).double(),
        ragged_mask([6, 1, 0, 4], 6),
        quantile_levels(m).double(),
    )


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    m=st.integers(1, 6),
    k=st.integers(1, 5),
    kappa=st.sampled_from([0.0, 0.1, 1.0]),
    consistency=st.sampled_from([0.0, 0.7, 1.0]),
    **SHAPES,
)
def test_critic_loss_is_every_heads_loss_plus_weighted_terms(
    batch, length, seed, heads, m, k, kappa, consistency
):
    """Against a loop over tokens and heads with the pairwise definition: any mask, NaN off it, N =
    1, M = 1.
    """
    rng = torch.Generator().manual_seed(seed)
    head_quantiles, targets = (
        torch.randn(batch, length, heads, m, generator=rng).double(),
        torch.randn(batch, length, k, generator=rng).double(),
    )
    mask, levels = random_mask(rng, batch, length), quantile_levels(m).double()
    risk = RiskConfig(calibration=0.3, shift=0.4, shape=0.5, curvature=0.6, consistency=consistency)
    quantile, tails, apart = (torch.zeros(1).double() for _ in range(3))
    for values, atoms in zip(head_quantiles[mask], targets[mask]):
        quantile += (
            sum(pairwise_quantile_huber_loss(head, atoms, levels, kappa) for head in values) / heads
        )
        tails += risk_regularizer(values.mean(0), atoms, risk)[0]
        apart += ((values - values.mean(0)) ** 2).mean()
    loss, metrics = critic_loss(
        hidden(head_quantiles, mask).requires_grad_(),
        hidden(targets, mask),
        mask,
        levels,
        kappa,
        risk,
    )
    expected = torch.cat([quantile + tails + consistency * apart, quantile, apart]) / max(
        mask.sum().item(), 1
    )
    torch.testing.assert_close(
        torch.stack([loss.detach(), metrics["quantile"], metrics["consistency"]]), expected
    )
    assert metrics.keys() == {
        "quantile",
        "calibration",
        "shift",
        "shape",
        "curvature",
        "consistency",
    }
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_consistency_of_weight_0_is_off_exactly():
    """Heads 2e30 apart: their squared distance overflows in fp32, and 0 times infinity would be
    NaN.
    """
    heads, off = (
        torch.tensor([-1e30, 1e30]).view(1, 1, 2, 1),
        RiskConfig(calibration=0, shift=0, shape=0, curvature=0, consistency=0),
    )
    loss, _ = critic_loss(
        heads,
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        torch.tensor([0.5]),
        0.0,
        off,
    )
    assert loss.item() == pytest.approx(5e29)  # |u| / 2


def test_scalar_critics_loss_by_hand_for_several_heads_and_atoms():
    """Heads (0, 0, 3) and (1, 2, 6), means 1 and 3; targets 0 and 4, mean 2: half of the mean of 1
    and 1. And 5: half of 16 and 4.
    """
    heads = torch.tensor([[0.0, 0.0, 3.0], [1.0, 2.0, 6.0]]).expand(1, 2, 2, 3)
    targets, mask = torch.tensor([[[0.0, 4.0], [5.0, 5.0]]]), torch.tensor([[True, True]])
    assert (
        critic_loss(heads, targets, mask, quantile_levels(3), None, None)[0].item() == (0.5 + 5) / 2
    )
    assert (
        critic_loss(heads, targets, ragged_mask([1], 2), quantile_levels(3), None, None)[0].item()
        == 0.5
    )


def test_every_head_gets_a_gradient_of_its_own():
    """A loss on the heads' mean alone would pull heads 0 and 10 equally; each must be drawn
    towards the target 5.
    """
    head_quantiles = torch.tensor([0.0, 10.0]).view(1, 1, 2, 1).requires_grad_()
    critic_loss(
        head_quantiles,
        torch.full((1, 1, 1), 5.0),
        torch.ones(1, 1, dtype=torch.bool),
        torch.tensor([0.5]),
        0.01,
        None,
    )[0].backward()
    assert head_quantiles.grad.flatten().sign().tolist() == [-1, 1]


@pytest.mark.parametrize(
    "kappa,risk", [(None, None), (0.01, None), (0.0, RiskConfig()), (0.01, RiskConfig())]
)
def test_critic_loss_ignores_padding_and_nan_and_micro_batches(kappa, risk):
    head_quantiles, targets, mask, levels = critic_inputs(heads=1 if kappa is None else 3)
    head_quantiles.requires_grad_()
    loss, metrics = critic_loss(head_quantiles, targets, mask, levels, kappa, risk)
    (gradient,) = torch.autograd.grad(loss, head_quantiles)
    wide = padded(torch.where(mask[..., None, None], head_quantiles.detach(), NAN)).requires_grad_()
    wide_loss, wide_metrics = critic_loss(
        wide, padded(torch.where(mask[..., None], targets, NAN)), padded(mask), levels, kappa, risk
    )
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(torch.autograd.grad(wide_loss, wide)[0], padded(gradient, fill=0.0))
    parts = [
        critic_loss(
            head_quantiles[[row]], targets[[row]], mask[[row]], levels, kappa, risk, mask.sum()
        )
        for row in range(4)
    ]
    torch.testing.assert_close(
        torch.autograd.grad(sum(part for part, _ in parts), head_quantiles)[0], gradient
    )
    for name in metrics:
        torch.testing.assert_close(wide_metrics[name], metrics[name])
        torch.testing.assert_close(sum(part[name] for _, part in parts), metrics[name])


def test_scalar_critic_is_half_the_squared_error_and_dvpo_with_equal_quantiles_is_ppo():
    """M = N = 1, tau = 1/2, kappa beyond all errors: gradients are those of the squared error
    times 1 / (2 kappa).
    """
    values, targets = (
        torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 3, 1, dtype=torch.float64),
    )
    mask = ragged_mask([3, 2], 3)
    scalar, _ = critic_loss(values, targets, mask, torch.tensor([0.5]), None, None)
    torch.testing.assert_close(scalar, (values[..., 0] - targets)[mask].square().mean() / 2)
    quantile, _ = critic_loss(values, targets, mask, torch.tensor([0.5]).double(), 100.0, None)
    torch.testing.assert_close(quantile * 2 * 100, scalar)
    rewards = torch.randn(2, 3, dtype=torch.float64)
    equal = distributional_gae(rewards, values[:, :, 0].expand(2, 3, 7), mask, 0.99, 0.9)[0]
    torch.testing.assert_close(
        scalar_advantage(equal),
        distributional_gae(rewards, values[:, :, 0], mask, 0.99, 0.9)[0][..., 0],
    )


def test_critic_loss_of_an_all_masked_batch_is_0():
    head_quantiles, targets, mask, levels = critic_inputs()
    loss, metrics = critic_loss(
        head_quantiles.requires_grad_(), targets, torch.zeros_like(mask), levels, 0.01, RiskConfig()
    )
    loss.backward()
    assert (
        loss.item() == 0
        and (head_quantiles.grad == 0).all()
        and all(value == 0 for value in metrics.values())
    )


@pytest.mark.parametrize("kappa,risk", [(None, None), (0.01, RiskConfig())])
def test_targets_get_no_gradient(kappa, risk):
    head_quantiles, targets, mask, levels = critic_inputs()
    targets.requires_grad_()
    critic_loss(head_quantiles.requires_grad_(), targets, mask, levels, kappa, risk)[0].backward()
    assert targets.grad is None and head_quantiles.grad.abs().sum() > 0


# ---- the baselines' advantages


def test_group_advantages_by_hand():
    """Two groups of 2: scores 1, 0 (mean 0.5, unbiased std 0.7071) and 2, 6 (mean 4, std 2.83)."""
    scores = torch.tensor([1.0, 0.0, 2.0, 6.0])
    assert group_advantages(scores, 2, False).tolist() == [0.5, -0.5, -2.0, 2.0]
    assert group_advantages(scores, 2, True).tolist() == pytest.approx(
        [0.70701, -0.70701, -0.70708, 0.70708], abs=1e-5
    )
    assert group_advantages(scores, 4, False).tolist() == [-1.25, -2.25, -0.25, 3.75]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_group_of_equal_scores_has_no_advantage_and_a_group_of_one_is_refused(divide_by_std):
    """fp32's mean of three 0.9 is not 0.9, nor that of seven 0.1."""
    for score, size in itertools.product((0.1, 0.3, 0.9, 1.0, -1e6 / 7), (3, 7)):
        assert (group_advantages(torch.full((2 * size,), score), size, divide_by_std) == 0).all()
    for size in (1, 0, 3, 16):
        with pytest.raises(ValueError, match="group_size: expected at least 2"):
            group_advantages(torch.ones(8), size, divide_by_std)


def test_grpo_weighs_responses_alike_and_dr_grpo_tokens():
    """Lengths 4 and 1: GRPO's token weights 2.5 / 4 and 2.5, mean 1 over the five tokens, so that
    each response's sum is the same.
    """
    mask = ragged_mask([4, 1], 4)
    weights = token_weights("response", mask, 4)
    assert weights.tolist() == [[0.625] * 4, [2.5, 0, 0, 0]] and weights[mask].mean() == 1
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, NAN, NAN, NAN]])
    assert masked_mean(weights * losses, mask).item() == pytest.approx(
        (2.5 + 10) / 2
    )  # the mean of the two means
    assert token_weights("response", ragged_mask([0, 3], 3), 4).tolist() == [
        [0.0] * 3,
        [1.0] * 3,
    ]  # an empty response counts for nothing


def test_dr_grpos_weight_of_a_token_does_not_depend_on_lengths():
    """Of 2 rows of at most 8 tokens: a loss over 5 tokens, times 5 / 16, is a sixteenth a token."""
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, NAN, NAN, NAN]])
    mask = ragged_mask([4, 1], 4)
    weights = token_weights("constant", mask, 8)
    assert masked_mean(weights * losses, mask).item() == pytest.approx(20 / 16)
    assert (token_weights("constant", ragged_mask([4, 4], 4), 4) == 1).all()
    assert (token_weights("token", mask, 8) == 1).all()
    with pytest.raises(ValueError, match="found 'tokens'"):
        token_weights("tokens", mask, 8)


def test_a_weight_on_the_advantage_is_a_weight_on_the_clipped_loss():
    """The surrogate is homogeneous in A: what GRPO's weights rely on, with tokens inside the clip
    range and on both sides of it.
    """
    torch.manual_seed(0)
    logprobs, old, advantages, weights = (
        torch.randn(4, 9),
        torch.randn(4, 9),
        torch.randn(4, 9),
        torch.rand(4, 9),
    )
    mask = torch.ones(4, 9, dtype=torch.bool)
    each = torch.stack(
        [
            clipped_policy_loss(
                logprobs[:, [t]], old[:, [t]], advantages[:, [t]], mask[:, [t]], 0.2, 1
            )[0]
            for t in range(9)
        ]
    )
    single = [
        [
            clipped_policy_loss(
                *(x[b : b + 1, t : t + 1] for x in (logprobs, old, advantages, mask)), 0.2
            )[0]
            for t in range(9)
        ]
        for b in range(4)
    ]
    expected = (torch.tensor(single) * weights).sum() / 36
    assert clipped_policy_loss(logprobs, old, weights * advantages, mask, 0.2)[
        0
    ].item() == pytest.approx(expected.item(), rel=1e-5)
    assert each.sum().item() == pytest.approx(torch.tensor(single).sum().item(), rel=1e-5)


def test_discounted_returns_by_hand_and_across_a_gap():
    """Rewards 1, 2, 3 with gamma 0.5: 1 + 1 + 0.75, 2 + 1.5, 3; the gap's NaN is no reward and no
    step.
    """
    mask = torch.tensor([[True, False, True, True]])
    returns = discounted_returns(torch.tensor([[1.0, NAN, 2.0, 3.0]]), mask, 0.5)
    assert returns.tolist() == [[2.75, 0.0, 3.5, 3.0]]


@settings(max_examples=60, deadline=None)
@given(gamma=st.floats(0, 1), **SHAPES)
def test_discounted_returns_are_discounted_sums(batch, length, seed, gamma):
    rng = torch.Generator().manual_seed(seed)
    rewards, mask = (
        torch.randn(batch, length, generator=rng).double(),
        random_mask(rng, batch, length),
    )
    returns = discounted_returns(hidden(rewards, mask), mask, gamma)
    for row, kept in enumerate(mask):
        left = rewards[row, kept].tolist()
        expected = [
            sum(gamma**k * reward for k, reward in enumerate(left[t:])) for t in range(len(left))
        ]
        assert returns[row, kept].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (returns[~mask] == 0).all()


def test_robust_gae_by_hand():
    """Heads (1, 3), (2, 6), no reward but 1 at the end, gamma = lam = 1: delta_1 = min(2, 6) -
    mean(1, 3) = 0; delta_2 = 1 - 4 = -3.
    """
    values, mask = torch.tensor([[[1.0, 3.0], [2.0, 6.0]]]), torch.ones(1, 2, dtype=torch.bool)
    advantages, targets = robust_gae(torch.tensor([[0.0, 1.0]]), values, mask, 1.0, 1.0)
    assert advantages.flatten().tolist() == [-3.0, -3.0] and targets.flatten().tolist() == [
        -1.0,
        1.0,
    ]
    after = torch.tensor(
        [[5.0, 9.0]]
    )  # a truncated row, bootstrapped from the worst head: delta_2 = 1 + 5 - 4
    assert robust_gae(torch.tensor([[0.0, 1.0]]), values, mask, 1.0, 1.0, after)[
        0
    ].flatten().tolist() == [2.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(num_heads=st.integers(1, 4), bootstrapped=st.booleans(), **SHAPES, **DISCOUNTS)
def test_robust_gae_is_the_textbook_recursion_with_the_worst_head_as_successor(
    batch, length, seed, gamma, lam, num_heads, bootstrapped
):
    rng = torch.Generator().manual_seed(seed)
    rewards, mask = (
        torch.randn(batch, length, generator=rng).double(),
        random_mask(rng, batch, length),
    )
    heads, last = (
        torch.randn(batch, length, num_heads, generator=rng).double(),
        torch.randn(batch, num_heads, generator=rng).double(),
    )
    advantages, targets = robust_gae(
        hidden(rewards, mask), hidden(heads, mask), mask, gamma, lam, last if bootstrapped else None
    )
    assert (
        advantages.shape == targets.shape == (batch, length, 1)
        and (advantages[~mask] == 0).all()
        and (targets[~mask] == 0).all()
    )
    for row, kept in enumerate(mask):
        values, worst, end = (
            heads[row, kept].mean(-1).tolist(),
            heads[row, kept].amin(-1).tolist(),
            last[row].min().item() if bootstrapped else 0.0,
        )
        expected = scalar_gae(rewards[row, kept].tolist(), values, gamma, lam, end, worst)
        assert advantages[row, kept, 0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert targets[row, kept, 0].tolist() == pytest.approx(
            [v + a for v, a in zip(values, expected)], rel=1e-9, abs=1e-9
        )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_heads=st.integers(1, 5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_robust_gae_is_at_most_gae_on_the_mean_and_equal_for_one_head(seed, num_heads, gamma, lam):
    rng = torch.Generator().manual_seed(seed)
    rewards, values, mask = (
        torch.randn(3, 6, generator=rng),
        torch.randn(3, 6, num_heads, generator=rng),
        random_mask(rng, 3, 6),
    )
    worst, _ = robust_gae(rewards, values, mask, gamma, lam)
    mean, _ = distributional_gae(rewards, values.mean(dim=-1, keepdim=True), mask, gamma, lam)
    assert (worst <= mean + 1e-5).all()
    if num_heads == 1:
        torch.testing.assert_close(worst, mean)


# ---- metrics


def test_explained_variance_by_hand():
    """targets 0, 2, 4: variance 8/3. Errors 0, 1, -1: variance 2/3. 1 - 1/4.

    A constant offset costs nothing.
    """
    targets, mask = torch.tensor([[0.0, 2.0, 4.0, NAN]]), ragged_mask([3], 4)
    assert explained_variance(
        torch.tensor([[0.0, 1.0, 5.0, 7.0]]), targets, mask
    ).item() == pytest.approx(0.75)
    assert explained_variance(
        torch.tensor([[0.0, 0.25, 1.25, 7.0]]), targets / 4, mask
    ).item() == pytest.approx(0.75)
    assert explained_variance(targets + 9, targets, mask).item() == 1
    assert explained_variance(torch.zeros(1, 4), targets, mask).item() == 0
    for values in (torch.zeros(1, 4), targets):
        assert explained_variance(values, torch.ones(1, 4), mask).isnan()


def test_what_rounding_leaves_of_equal_targets_is_not_explained():
    """The mean of fifty 0.1 is not 0.1; q + (0.1 - q) is not always 0.1."""
    mask, values = torch.ones(1, 50, dtype=torch.bool), torch.linspace(-7, 0, 50)[None]
    for equal in (0.1, 0.3, -1e6 / 7):
        targets = torch.full((1, 50), equal).double()
        assert explained_variance(values.double(), targets, mask).isnan()
    targets = values + (10.1 - values)
    assert targets.std() > 0 and explained_variance(values, targets, mask).isnan()
    # Where all are below 0, what stands off the mask is not the largest of them.
    targets = torch.tensor([[-1e6, -1e6 + 0.0625, 0.0]])
    assert explained_variance(torch.ones(1, 3), targets, ragged_mask([2], 3)).isnan()
    # Small targets are no rounding, whatever stands there.
    targets = torch.tensor([[0.0, 2e-9, 4e-9, 1.0]])
    values, mask = torch.tensor([[0.0, 1e-9, 5e-9, 1.0]]), ragged_mask([3], 4)
    assert explained_variance(values, targets, mask).item() == pytest.approx(0.75)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_fp32(half):
    """In bf16, 300 tokens of a reward of 1 add up to 256."""
    ones, mask = torch.ones(1, 300).to(half), torch.ones(1, 300, dtype=torch.bool)
    assert discounted_returns(ones, mask, 1.0)[0, 0] == 300
    advantages, targets = distributional_gae(ones, ones.unsqueeze(-1), mask, 1.0, 1.0)
    assert targets[0, 0, 0] == 300 and advantages.dtype == torch.float32
    assert robust_gae(ones, ones.unsqueeze(-1), mask, 1.0, 1.0)[1][0, 0] == 300


def normal_quantiles(count, heads):
    levels = quantile_levels(count).double()
    return torch.special.ndtri(levels).float().expand(1, 20_000, heads, count)


def test_quantile_metrics_of_a_calibrated_critic():
    torch.manual_seed(0)
    returns, mask = torch.randn(1, 20_000), torch.ones(1, 20_000, dtype=torch.bool)
    metrics = quantile_metrics(normal_quantiles(200, 2), returns, mask, 0.1, 0.1)
    expected = {"crossing_frac": 0.0, "std": 1.0, "lower_tail": 1.755, "upper_tail": 1.755}
    expected |= {"coverage": 0.8, "head_spread": 0.0}
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=0.02), name
    # q_1 to q_10: levels 0.05 to 0.95.
    small = quantile_metrics(normal_quantiles(10, 1), returns, mask, 0.1, 0.1)
    assert small["coverage"].item() == pytest.approx(0.9, abs=0.02)


def test_quantile_metrics_see_crossing_spread_and_ignore_padding():
    """Heads (3, 1, 2, 0) and the same + 2: mean (4, 2, 3, 1).

    Two of three neighbours are out of order, and the head distance is 1.
    """
    heads = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 3.0, 4.0, 2.0]]).view(1, 1, 2, 4)
    returns, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    metrics = quantile_metrics(padded(heads), padded(returns), padded(mask), 0.25, 0.25)
    assert metrics["crossing_frac"].item() == pytest.approx(2 / 3)
    assert metrics["head_spread"].item() == 1
    assert metrics["coverage"].item() == 0 and metrics["lower_tail"].item() == 1.5
    one = quantile_metrics(heads[..., :1], returns, mask, 1.0, 1.0)
    assert one["crossing_frac"].item() == 0


@pytest.mark.filterwarnings("ignore:std")  # torch warns of the std of no tokens at all
def test_quantile_metrics_of_one_token_and_of_none_by_hand():
    head, reward, mask = torch.full((1, 1, 1, 1), 0.5), torch.tensor([[2.0]]), torch.ones(1, 1)
    for kept in (mask.bool(), mask.bool() & False):
        metrics = quantile_metrics(head, reward, kept, 0.1, 0.1)
        assert set(map(float, metrics.values())) == {0.0}


NAMES = ("crossing_frac", "std", "lower_tail", "upper_tail", "coverage", "head_spread")


def metrics_of_a_token(heads, sampled, alpha, beta):
    """heads (N, M), a float -> the quantile metrics of one token, in NAMES' order."""
    m, unsorted = heads.shape[1], heads.mean(0)
    q, mean = sorted(unsorted.tolist()), unsorted.mean().item()
    crossings = sum(after < before for before, after in itertools.pairwise(unsorted.tolist()))
    return (
        crossings / max(m - 1, 1),
        statistics.pstdev(q),
        mean - lower_tail_mean(unsorted, alpha).item(),
        upper_tail_mean(unsorted, beta).item() - mean,
        q[math.ceil(alpha * m) - 1] <= sampled <= q[m - math.ceil(beta * m)],
        math.sqrt(((heads - unsorted) ** 2).mean().item()),
    )


@pytest.mark.filterwarnings("ignore:std")
@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    m=st.integers(1, 6),
    alpha=st.sampled_from([0.1, 0.25, 0.5]),
    beta=st.sampled_from([0.1, 0.25, 1.0]),
    **SHAPES,
)
def test_quantile_metrics_are_those_of_a_loop_over_tokens(
    batch, length, seed, heads, m, alpha, beta
):
    """Any mask, NaN off it.

    Quantiles and returns on a grid: neighbours tie, and returns fall on the interval's ends.
    """
    rng = torch.Generator().manual_seed(seed)
    quantiles = torch.randint(0, 4, (batch, length, heads, m), generator=rng).double()
    returns = torch.randint(0, 4, (batch, length), generator=rng).double()
    mask = random_mask(rng, batch, length)
    tokens = []
    for values, sampled in zip(quantiles[mask], returns[mask].tolist()):
        tokens.append(metrics_of_a_token(values, sampled, alpha, beta))
    sums = [sum(each) for each in zip(*tokens)] or [0.0] * len(NAMES)
    expected = {name: value / max(len(tokens), 1) for name, value in zip(NAMES, sums)}
    quantiles = hidden(quantiles, mask).requires_grad_()
    metrics = quantile_metrics(quantiles, hidden(returns, mask), mask, alpha, beta)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_rewards(
            torch.zeros(3), torch.zeros(2, 4), None, torch.ones(2, 4, dtype=torch.bool), 0.0
        ),
        lambda: distributional_gae(
            torch.zeros(2, 4), torch.zeros(2, 3, 5), torch.ones(2, 4, dtype=torch.bool), 1, 1
        ),
        lambda: clipped_policy_loss(
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            torch.zeros(2),
            torch.ones(2, 4, dtype=torch.bool),
            0.2,
        ),
        lambda: critic_loss(
            torch.zeros(2, 4, 1, 5),
            torch.zeros(2, 3, 5),
            torch.ones(2, 4, dtype=torch.bool),
            quantile_levels(5),
            0,
            None,
        ),
        lambda: masked_mean(torch.zeros(2, 4), torch.ones(2, 1, dtype=torch.bool)),
        lambda: robust_gae(
            torch.zeros(2, 4), torch.zeros(2, 3, 5), torch.ones(2, 4, dtype=torch.bool), 1, 1
        ),
        lambda: group_advantages(torch.zeros(4, 2), 2, False),
        lambda: advantage_readout(
            torch.zeros(2, 1, 5), torch.zeros(2, 4, 5), torch.ones(2, 4, dtype=torch.bool), "mean"
        ),
    ],
)
def test_shapes_are_asserted(call):
    with pytest.raises(AssertionError):
        call()


@pytest.mark.parametrize(
    "function,shapes",
    [
        (
            lambda b, mask: distributional_gae(mask * 1.0, FIVE, mask, 1, 1, b),
            [(2, 1), (1, 5), (5,)],
        ),
        (
            lambda s, mask: distributional_gae(mask * 1.0, FIVE, mask, 1, 1, None, s),
            [(2, 4, 1), (2, 5, 5), (4, 5)],
        ),
        (lambda q, mask: distributional_gae(mask * 1.0, q, mask, 1, 1), [(2, 4), (2, 4, 3, 5)]),
        (lambda b, mask: robust_gae(mask * 1.0, FIVE, mask, 1, 1, b), [(2, 1), (1, 5), (2,)]),
        (masked_whiten, [(2, 1), (1, 4), (4,)]),
        (lambda ref, mask: kl_estimate(mask * 1.0, ref, "k1"), [(2, 1), (4,), ()]),
        (lambda v, mask: explained_variance(v, mask * 1.0, mask), [(2, 1), (1, 4), (4,)]),
        (
            lambda q, mask: quantile_metrics(q, mask * 1.0, mask, 0.1, 0.1),
            [(2, 4, 5), (2, 3, 1, 5)],
        ),
        (
            lambda r, mask: quantile_metrics(FIVE.unsqueeze(2), r, mask, 0.1, 0.1),
            [(2, 4, 1), (2, 1)],
        ),
        (
            lambda q, mask: critic_loss(q, FIVE, mask, quantile_levels(5), None, None),
            [(2, 4, 5), (2, 4, 1, 1, 5)],
        ),
        (lambda y, mask: critic_loss(FIVE.unsqueeze(2), y, mask, None, None, None), [(2, 4)]),
        (lambda q, mask: advantage_readout(q, FIVE, mask, "mean"), [(2, 4), (2, 4, 1, 5)]),
        (lambda x, mask: token_rewards(torch.zeros(2), x, None, mask, 0), [(2, 1), (1, 4), (4,)]),
    ],
)
def test_shapes_that_broadcast_are_asserted(function, shapes):
    """FIVE: as many quantiles for each of the mask's slots."""
    mask = torch.ones(2, 4, dtype=torch.bool)
    for shape in shapes:
        with pytest.raises(AssertionError):
            function(torch.zeros(shape), mask)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: distributional_gae(x, x.unsqueeze(-1), mask, 0.9, 0.9)[0],
        lambda x, mask: discounted_returns(x, mask, 0.9),
        masked_whiten,
        lambda x, mask: masked_whiten(x, mask, shift_mean=False),
        lambda x, mask: token_rewards(torch.tensor([0.5, 0.7]), x, None, mask, 0),
    ],
)
def test_whole_numbers_are_read_as_floats(function):
    x, mask = torch.tensor([[3, 0, 7], [1, 2, 2]]), ragged_mask([3, 2], 3)
    found = function(x, mask)
    assert found.dtype == torch.float32 and torch.equal(found, function(x.float(), mask))
    assert not torch.equal(found, found.round())


# ---- the readout


def test_readout_by_hand():
    """q = (0, 2): mean 1, standard deviation 1. Targets 3: a surprise of 2, two spreads.

    The second token's q = (1, 1) has no spread: a tenth of the batch's, of targets 3 and 1, is 0.1.
    """
    quantiles = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    targets, mask = torch.tensor([[[2.0, 4.0], [0.0, 2.0]]]), torch.ones(1, 2, dtype=torch.bool)
    assert advantage_readout(quantiles, targets, mask, "mean").tolist() == [[2, 0]]
    assert not advantage_readout(quantiles.requires_grad_(), targets, mask, "mean").requires_grad
    found = advantage_readout(quantiles, targets, mask, "spread")
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([math.tanh(2), 0])
    found = advantage_readout(quantiles, targets + 0.05, mask, "spread", width=0.5)
    assert found[0].tolist() == pytest.approx([math.tanh(2.05 / 0.5), math.tanh(0.05 / 0.05)])
    with pytest.raises(ValueError, match="found 'median'"):
        advantage_readout(quantiles, targets, mask, "median")


def test_readout_of_one_number_counts_in_the_batchs_median_surprise():
    """Surprises 1, -2 and 6: the median size is 2. Off the mask stands NaN."""
    values, mask = torch.zeros(2, 2, 1), ragged_mask([2, 1], 2)
    targets = hidden(torch.tensor([[[1.0], [-2.0]], [[6.0], [9.0]]]), mask)
    found = advantage_readout(values, targets, mask, "spread")
    assert found.flatten().tolist() == pytest.approx(
        [math.tanh(0.5), math.tanh(-1), math.tanh(3), 0]
    )


@given(**SHAPES, m=st.integers(2, 5))
def test_readout_is_bounded_has_the_means_sign_and_is_odd_under_reflection(batch, length, seed, m):
    generator = torch.Generator().manual_seed(seed)
    quantiles = torch.randn(batch, length, m, generator=generator)
    targets = quantiles + 3 * torch.randn(batch, length, 1, generator=generator)
    mask = random_mask(generator, batch, length)
    mean = advantage_readout(quantiles, targets, mask, "mean")
    spread = advantage_readout(quantiles, targets, mask, "spread")
    assert spread.abs().max() <= 1 and torch.equal(spread.sign(), mean.sign())
    # The mean is the identity's: what scalar GAE on the mean value gives.
    expected = torch.where(mask, scalar_advantage(targets - quantiles), 0)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    reflected = advantage_readout(-quantiles, -targets, mask, "spread")
    torch.testing.assert_close(reflected, -spread, rtol=1e-4, atol=1e-6)
    nan = advantage_readout(hidden(quantiles, mask), hidden(targets, mask), mask, "spread")
    assert torch.equal(nan, spread)


@given(seed=st.integers(0, 2**31))
def test_a_level_and_a_scale_of_the_prompts_own_drop_out_of_the_spread_readout(seed):
    """As long as no state is nearly certain; the mean readout takes them for news."""
    generator = torch.Generator().manual_seed(seed)
    quantiles = torch.rand(4, 3, 1, generator=generator) + torch.tensor([-1.0, 0.0, 1.0])
    targets = quantiles + torch.randn(4, 3, 1, generator=generator)
    mask = torch.ones(4, 3, dtype=torch.bool)
    level = torch.randn(4, 1, 1, generator=generator)
    scale = torch.rand(4, 1, 1, generator=generator) + 0.5
    found = [
        advantage_readout(*pair, mask, readout)
        for readout in ("spread", "mean")
        for pair in ((quantiles, targets), (level + scale * quantiles, level + scale * targets))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[2], found[3], rtol=1e-3, atol=1e-4)


def test_readout_where_nothing_varies_or_no_token_is_valid_is_0():
    for m in (1, 3):
        values = torch.full((2, 2, m), 7.0)
        for mask in (torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)):
            assert advantage_readout(values, values, mask, "spread").tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e37])
def test_readout_of_tiny_and_huge_rewards_is_that_of_others(size):
    torch.manual_seed(0)
    quantiles, mask = torch.randn(3, 4, 5), ragged_mask([4, 2, 1], 4)
    targets = quantiles + torch.randn(3, 4, 1)
    for m in (1, 5):
        pair = (quantiles[..., :m], targets[..., :m])
        found = advantage_readout(*(size * value for value in pair), mask, "spread")
        expected = advantage_readout(*pair, mask, "spread")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [0.3, 0.1, -0.05, 1e-30, 1e30])
def test_targets_that_do_not_vary_explain_nothing(constant):
    mask = torch.ones(32, 16, dtype=torch.bool)
    values, targets = torch.rand(32, 16), torch.full((32, 16), constant)
    assert explained_variance(values, targets, mask).isnan()
    assert explained_variance(targets, targets, mask).isnan()
    varied = values * constant
    assert explained_variance(varied, varied, mask) == 1


def test_a_mask_of_whole_numbers_as_hubs_have_it_is_a_mask():
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(generator, 4, 5)
    heads, returns = torch.randn(4, 5, 2, 3, generator=generator), torch.randn(4, 5)
    targets, levels = torch.randn(4, 5, 3, generator=generator), quantile_levels(3)
    for kappa, risk in ((0.01, RiskConfig()), (None, None)):
        losses = [critic_loss(heads, targets, m, levels, kappa, risk) for m in (mask, mask.long())]
        assert torch.equal(losses[0][0], losses[1][0])
    found = [quantile_metrics(heads, returns, m, 0.1, 0.1) for m in (mask, mask.long())]
    assert found[0] == found[1]
