"""experiments/worst_case.py: the loss by hand, the operator by brute force and by its dual."""

import itertools

import pytest
import torch
from common import random_mask

from dvpo import discounted_returns
from experiments.worst_case import cql_loss, robust_returns, robust_value

ONE = torch.ones(1, 1, dtype=torch.bool)


def test_cql_loss_by_hand():
    """Q = (ln 1, ln 3), action 1, y = 0: (ln 3)^2 / 2 + alpha (ln 4 - ln 3)."""
    q, actions = torch.tensor([[[1.0, 3.0]]]).log(), torch.tensor([[1]])
    square = torch.tensor(3.0).log().square() / 2
    for alpha in (0.0, 0.5, 2.0):
        expected = square + alpha * torch.tensor(4 / 3).log()
        torch.testing.assert_close(cql_loss(q, actions, torch.zeros(1, 1), ONE, alpha), expected)


def test_the_price_pushes_down_what_the_log_does_not_hold():
    torch.manual_seed(0)
    q = torch.randn(3, 4, 5, requires_grad=True)
    actions, mask = torch.randint(5, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    mask[0, :2] = False
    taken = q.detach().gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    cql_loss(q, actions, taken, mask, 1.0).backward()
    is_taken = torch.nn.functional.one_hot(actions, 5).bool()
    assert (q.grad[mask][is_taken[mask]] < 0).all() and (q.grad[mask][~is_taken[mask]] > 0).all()
    assert not q.grad[~mask].any()
    whole = q.grad.clone()
    q.grad = None
    spoiled = torch.where(mask.unsqueeze(-1), q, torch.nan)
    tensors = actions.where(mask, -1), taken.where(mask, torch.nan), mask
    cql_loss(spoiled, *tensors, 1.0).backward()
    assert torch.equal(q.grad, whole)
    # The price alone moves no mean over the vocabulary.
    torch.testing.assert_close(q.grad.sum(dim=-1), torch.zeros(3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5, 1.0])
def test_robust_value_is_the_least_mean_in_the_ball_and_its_dual(radius):
    """States V; P_0 is sure of one of them. Extreme points of the ball move the mass to one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, generator=generator, dtype=torch.float64)
    for at, value in enumerate(values):
        own = robust_value(value, values.min(), radius)
        sure = torch.nn.functional.one_hot(torch.tensor(at), 6).double()
        others = torch.eye(6, dtype=torch.float64)
        corners = (1 - radius) * sure + radius * others
        torch.testing.assert_close(own, (corners @ values).min())
        # No mixture of corners, which is all of the ball, is lower.
        mixed = torch.rand(500, 6, generator=generator, dtype=torch.float64)
        mixed = mixed / mixed.sum(dim=1, keepdim=True)
        assert (mixed @ corners @ values >= own - 1e-12).all()
        eta = torch.linspace(-4, 4, 80001, dtype=torch.float64)
        dual = eta - (eta - value).clamp(min=0) - radius * (eta - values.min()).clamp(min=0)
        torch.testing.assert_close(dual.max(), own, atol=2e-4, rtol=0)


def test_robust_returns_on_a_path_by_brute_force():
    """An adversary who, at each of two steps, may move the mass radius to any of three states."""
    rewards = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    mask, gamma, radius = torch.ones(1, 3, dtype=torch.bool), 0.9, 0.2
    states = torch.tensor([-0.7, 0.4, 1.0], dtype=torch.float64)
    own = robust_returns(rewards, mask, gamma, radius, states.min())[0]
    found = []
    for first, second in itertools.product([None, *states.tolist()], repeat=2):
        y = 2.0
        for reward, state in ((-1.0, second), (0.5, first)):
            following = y if state is None else (1 - radius) * y + radius * state
            y = reward + gamma * following
        found.append(y)
    assert own[0].item() == pytest.approx(min(found)) and own[2] == 2.0


def test_robust_returns_of_whole_numbers_are_floats_and_other_shapes_are_refused():
    rewards, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    found = robust_returns(rewards, mask, 0.9, 0.0, torch.tensor(0.0))
    torch.testing.assert_close(found, torch.tensor([[2.71, 1.9, 1.0]]))
    for other in (mask[:, :2], mask.expand(2, 3)):
        with pytest.raises(AssertionError, match="mask"):
            robust_returns(rewards, other, 0.9, 0.0, torch.tensor(0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_ball_of_radius_0_leaves_the_discounted_return(gamma):
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(generator, 5, 7)
    rewards = torch.where(mask, torch.randn(5, 7, generator=generator), 0)
    own = robust_returns(rewards, mask, gamma, 0.0, torch.tensor(-3.0))
    assert torch.equal(own, torch.where(mask, discounted_returns(rewards, mask, gamma), 0))
    lower = robust_returns(rewards, mask, gamma, 0.3, torch.tensor(-3.0))
    assert (lower <= own + 1e-6).all() and (lower < own).any()
