"""Losses against closed-form values and gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import tensor

from aiorl import losses


def q_loss(q: Any, actions: Any, targets: Any, huber_delta: float = 1.0, weight: Any = None) -> tuple[Any, Any]:
    """As a learner puts it together."""
    loss, slope = losses.huber(losses.td_error(q, actions, targets), huber_delta, weight)
    return loss, losses.spread(slope, actions, q)


def test_surrogate_of_the_same_policy_is_minus_the_mean_advantage_and_its_gradient_the_policy_gradient():
    log_ratio = torch.zeros(3, requires_grad=True)
    advantage = tensor([1.0, -2.0, 4.0])
    loss, slope = losses.clipped_surrogate(log_ratio, advantage, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.0)
    assert slope.tolist() == pytest.approx([-1 / 3, 2 / 3, -4 / 3])
    assert torch.equal(log_ratio.grad, slope)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.1, 2.0, 2.2, 2.2),  # inside the range: ratio * advantage; its derivative by log ratio is the same
        (1.5, 2.0, 2.4, 0.0),  # gains no more beyond 1.2
        (0.5, -2.0, -1.6, 0.0),  # nor below 0.8 for a bad action
        (1.5, -2.0, -3.0, -3.0),  # but what got worse is pulled back from everywhere
        (0.5, 2.0, 1.0, 1.0),
    ],
)
def test_surrogate_clips_gains_only(ratio: float, advantage: float, objective: float, slope: float):
    log_ratio = tensor([math.log(ratio)], requires_grad=True)
    loss, found = losses.clipped_surrogate(log_ratio, tensor([advantage]), 0.2)
    assert loss.item() == pytest.approx(-objective)
    assert found.item() == pytest.approx(-slope)


def test_surrogate_weights_samples():
    loss, _ = losses.clipped_surrogate(torch.zeros(2), tensor([1.0, 3.0]), 0.2, weight=tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx(-(0.5 * 1 + 2 * 3) / 2)


def test_value_loss():
    value, target = tensor([1.0, 2.0]), tensor([3.0, 2.0])
    assert losses.value_loss(value, target)[0].item() == pytest.approx(0.5 * (4 + 0) / 2)
    clipped, _ = losses.value_loss(value, target, old_value=tensor([0.0, 2.0]), clip_range=0.5)
    assert clipped.item() == pytest.approx(0.5 * 2.5**2 / 2)  # the value may only rise from 0 to 0.5
    with pytest.raises(ValueError, match="old_value"):
        losses.value_loss(value, target, clip_range=0.5)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda x, a, b: losses.clipped_surrogate(x, a, 0.2), (50,)),
        (lambda x, a, b: losses.clipped_surrogate(x, a, 0.2, b.exp()), (50,)),
        (lambda x, a, b: losses.value_loss(x, a), (50,)),
        (lambda x, a, b: losses.value_loss(x, a, b, 0.5), (50,)),
        (lambda x, a, b: q_loss(x, (b > 0).long(), a), (50, 3)),
        (lambda x, a, b: q_loss(x, (b > 0).long(), a, math.inf), (50, 3)),
        (lambda x, a, b: q_loss(x, (b > 0).long(), a, 0.5, abs(b)), (50, 3)),
        (lambda x, a, b: losses.quantile_huber(x, torch.stack([a, b], 1)), (50, 3)),
        (lambda x, a, b: losses.quantile_huber(x, torch.stack([a, b, a + b], 1), 0.3, abs(b)), (50, 7)),
    ],
)
def test_derivatives_are_those_of_autograd(loss: Any, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    a, b = torch.randn(2, 50, generator=generator)
    scalar, derivative = loss(x, a, b)
    torch.testing.assert_close(derivative, torch.autograd.grad(scalar, x)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, q, i: losses.clipped_surrogate(a, b, 0.2),
        lambda a, b, c, q, i: losses.clipped_surrogate(a, b, 0.2, abs(c)),
        lambda a, b, c, q, i: losses.value_loss(a, b),
        lambda a, b, c, q, i: losses.value_loss(a, b, c, 0.5),
        lambda a, b, c, q, i: q_loss(q, i, a),
        lambda a, b, c, q, i: q_loss(q, i, a, math.inf),
        lambda a, b, c, q, i: q_loss(q, i, a, 0.5, abs(c)),
        lambda a, b, c, q, i: losses.quantile_huber(q, q[:, :2] + a[:, None], 0.5, abs(c)),
        lambda a, b, c, q, i: [losses.quantile_targets(a, b, q[:, :, None] * a[0], x) for x in (None, -q[:, :, None])],
        lambda a, b, c, q, i: [losses.q_targets(a, b, q), losses.q_targets(a, b, q, -q)],
        lambda a, b, c, q, i: [losses.standardise(a), losses.approximate_kl(a), losses.clipped_share(a, 0.2)],
        lambda a, b, c, q, i: [losses.joined([a, b]), losses.choose(q, i), losses.spread(a, i, q)],
    ],
)
def test_arrays_give_what_tensors_give(function: Any):
    draw = np.random.default_rng(0)
    arrays: list[Any] = [draw.normal(size=50).astype(np.float32) for _ in range(3)]
    arrays += [draw.normal(size=(50, 3)).astype(np.float32), draw.integers(3, size=50)]
    found, expected = function(*arrays), function(*(torch.from_numpy(x) for x in arrays))
    for x, like in zip(found, expected, strict=True):
        assert not isinstance(x, torch.Tensor)
        assert np.ndim(x) == 0 or x.dtype == np.float32
        np.testing.assert_allclose(x, like.numpy(), atol=1e-6, rtol=1e-5)


def test_single_values_are_fetched_together():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    assert losses.numbers([[np.float32(x) for x in row] for row in rows]).tolist() == rows
    assert losses.numbers([[torch.tensor(x) for x in row] for row in rows]).tolist() == rows


def test_approximate_kl_is_zero_for_the_same_policy_and_never_negative():
    assert losses.approximate_kl(torch.zeros(5)).item() == 0
    assert losses.approximate_kl(tensor([-0.3])).item() > 0
    assert losses.approximate_kl(tensor([math.log(2)])).item() == pytest.approx(2 - 1 - math.log(2))


def test_standardise():
    x = losses.standardise(tensor([1.0, 2.0, 3.0]))
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.square().mean().item() == pytest.approx(1, abs=1e-6)
    assert losses.standardise(tensor([7.0])).item() == 0


def test_q_targets_choose_with_the_online_network_and_evaluate_with_the_target():
    target, online = tensor([[1.0, 5.0], [2.0, 0.0]]), tensor([[9.0, 0.0], [0.0, 1.0]])
    returns, discounts = tensor([1.0, 1.0]), tensor([0.9, 0.0])
    assert losses.q_targets(returns, discounts, target).tolist() == pytest.approx([1 + 0.9 * 5, 1.0])
    assert losses.q_targets(returns, discounts, target, online).tolist() == pytest.approx([1 + 0.9 * 1, 1.0])
    assert not losses.q_targets(returns, discounts, target.requires_grad_()).requires_grad


def test_q_loss():
    q = tensor([[1.0, 9.0], [9.0, 2.0]])
    actions, targets = tensor([0, 1]), tensor([1.5, 5.0])
    assert q_loss(q, actions, targets, huber_delta=1.0)[0].item() == pytest.approx((0.5 * 0.25 + 2.5) / 2)
    assert q_loss(q, actions, targets, huber_delta=math.inf)[0].item() == pytest.approx((0.5 * 0.25 + 4.5) / 2)


def test_weights_are_factors_on_each_transition():
    q, actions, targets = torch.zeros(2, 2), tensor([0, 1]), tensor([0.5, 3.0])
    weighted, slope = q_loss(q, actions, targets, weight=tensor([2.0, 0.5]))
    assert weighted.item() == pytest.approx((2 * 0.125 + 0.5 * 2.5) / 2)
    assert slope.tolist() == [[-0.5, 0.0], [0.0, -0.25]]


@pytest.mark.parametrize("kappa", [0.2, 1.0, 3.0])
def test_quantile_huber_is_the_papers_double_sum(kappa: float):
    """Equation 10 and algorithm 1 of Dabney et al. 2018, pair by pair."""
    draw = np.random.default_rng(1)
    quantiles, targets, weight = draw.normal(size=(6, 5)) * 2, draw.normal(size=(6, 4)) * 2, draw.random(6)
    total = 0.0
    for n in range(6):
        for i in range(5):
            tau = (2 * i + 1) / 10
            for j in range(4):
                u = targets[n, j] - quantiles[n, i]
                huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
                total += weight[n] * abs(tau - (u < 0)) * huber / 4 / 6
    loss, slope = losses.quantile_huber(quantiles, targets, kappa, weight)
    assert float(loss) == pytest.approx(total)
    step = 1e-6
    for n, i in np.ndindex(6, 5):
        moved = quantiles.copy()
        moved[n, i] += step
        rise = (losses.quantile_huber(moved, targets, kappa, weight)[0] - loss) / step
        assert slope[n, i] == pytest.approx(rise, abs=1e-5)


def test_quantile_regression_finds_the_quantiles():
    """Of the numbers 0 to 99, all at once, with a loss that is linear almost everywhere."""
    quantiles, targets = np.full((1, 4), 50.0), np.arange(100.0)[None]
    for step in range(4000):
        quantiles -= 200 / (1 + step / 100) * losses.quantile_huber(quantiles, targets, 0.1)[1]
    np.testing.assert_allclose(quantiles[0], [12, 37, 62, 87], atol=1.5)


def test_quantile_targets_are_those_of_the_action_with_the_greatest_mean():
    returns, discounts = tensor([1.0, 1.0]), tensor([0.9, 0.0])
    target = tensor([[[0.0, 9.0], [4.0, 4.0]], [[1.0, 1.0], [2.0, 0.0]]])  # means 4.5 and 4; 1 and 1
    online = -target
    assert losses.quantile_targets(returns, discounts, target).tolist() == [pytest.approx([1, 9.1]), [1, 1]]
    double = losses.quantile_targets(returns, discounts, target, online)
    assert double.tolist() == [pytest.approx([4.6, 4.6]), [1, 1]]
    assert not losses.quantile_targets(returns, discounts, target.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.huber(torch.zeros(4), weight=torch.zeros(4, 1)),
        lambda: losses.quantile_huber(torch.zeros(4, 3), torch.zeros(1, 3)),
        lambda: losses.quantile_huber(torch.zeros(4, 3), torch.zeros(4, 3), 1.0, torch.zeros(4, 1)),
        lambda: losses.quantile_targets(torch.zeros(4), torch.zeros(4), torch.zeros(4, 2, 3), torch.zeros(4, 2, 1)),
        lambda: losses.clipped_surrogate(torch.zeros(4), torch.zeros(4, 1), 0.2),
        lambda: losses.clipped_surrogate(torch.zeros(4), torch.zeros(4), 0.2, torch.zeros(1)),
        lambda: losses.value_loss(torch.zeros(4, 1), torch.zeros(4)),
        lambda: losses.q_targets(torch.zeros(4), torch.zeros(1), torch.zeros(4, 2)),
        lambda: losses.q_targets(torch.zeros(4), torch.zeros(4), torch.zeros(4, 2), torch.zeros(1, 2)),
        lambda: q_loss(torch.zeros(4, 2), torch.zeros(4).long(), torch.zeros(4, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(ValueError, match="has shape"):
        call()
