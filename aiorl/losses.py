"""Losses as pure functions of tensors, each with its gradient written out: (scalar to minimise, its derivative).

Every input has shape [N] unless stated, and so has the derivative, which is by the first argument. All are tensors, or
all NumPy arrays: on a few hundred numbers in main memory NumPy takes a third of the time. Of tensors, the scalar can be
differentiated by autograd as well. Nothing is detached inside, except where a docstring says so: whoever computes
targets does so without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aiorl.segments import Array

Values = Any
"""A tensor, or a NumPy array."""


def module_of(x: Values) -> Any:
    """The module whose functions take `x`: numpy or torch."""
    return np if isinstance(x, np.ndarray) else torch


def near(x: torch.Tensor) -> Values:
    """A tensor without gradient as what is quickest to compute with: the same memory as an array, or itself on a GPU."""
    return x.numpy() if x.is_cpu else x


def tensor(x: Values) -> torch.Tensor:
    """Inverse of `near`."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def array(x: Values) -> Array:
    """`x` in main memory."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def choose(x: Values, index: Values) -> Values:
    """x[i, index[i]] for each row of `x` [N, A, …]."""
    return x[_places(x), index]


def spread(values: Values, index: Values, like: Values) -> Values:
    """Zeros like [N, A, …], with values[i] at [i, index[i]]."""
    result = module_of(like).zeros_like(like)
    result[_places(like), index] = values
    return result


def _places(x: Values) -> Values:
    return np.arange(len(x)) if isinstance(x, np.ndarray) else torch.arange(len(x), device=x.device)


def mean(x: Values) -> Values:
    """Of [N]. (The quickest way in NumPy.)"""
    return x.sum() / len(x)


def joined(parts: Sequence[Values]) -> Values:
    """[n] each to one [N]."""
    return module_of(parts[0]).concatenate(parts)


def numbers(rows: Sequence[Sequence[Values]]) -> Array:
    """Rows of single values as a float64 array, fetched from a GPU at once."""
    if isinstance(rows[0][0], torch.Tensor):
        return torch.stack([torch.stack(list(row)) for row in rows]).double().cpu().numpy()
    return np.array(rows, np.float64)


def check_shapes(**values: Values | None) -> None:
    """Raise ValueError unless all values given have the same shape, before broadcasting hides the mistake."""
    first, shape = "", None
    for name, value in values.items():
        if value is None:
            continue
        if shape is None:
            first, shape = name, value.shape
        elif value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but {first} has {list(shape)}")


def standardise(x: Values, eps: float = 1e-8) -> Values:
    """Subtract the mean and divide by the (biased) standard deviation; a single value becomes 0."""
    centred = x - mean(x)
    return centred / (mean(centred * centred) ** 0.5 + eps)


def clipped_surrogate(
    log_ratio: Values, advantage: Values, clip_range: float, weight: Values | None = None
) -> tuple[Values, Values]:
    """PPO's policy loss (Schulman et al. 2017, arXiv 1707.06347), decoupled if weighted (Hilton et al. 2022, 2110.00641).

    `log_ratio` = log pi(a|x) - log pi_proximal(a|x). `weight` = pi_proximal / pi_behaviour (capped by the caller) corrects
    for actions that an older policy chose; None where both are the same.
    """
    check_shapes(log_ratio=log_ratio, advantage=advantage, weight=weight)
    module = module_of(log_ratio)
    ratio = module.exp(log_ratio)
    gain, limited = ratio * advantage, ratio.clip(1 - clip_range, 1 + clip_range) * advantage
    objective, slope = module.minimum(gain, limited), gain * (gain <= limited)
    if weight is not None:
        objective, slope = objective * weight, slope * weight
    return -mean(objective), slope * (-1 / len(slope))


def value_loss(
    value: Values, target: Values, old_value: Values | None = None, clip_range: float | None = None
) -> tuple[Values, Values]:
    """Half the mean squared error; with `clip_range`, values may only gain within that distance of `old_value`."""
    check_shapes(value=value, target=target, old_value=old_value)
    error = value - target
    if clip_range is None:
        return 0.5 * mean(error * error), error / len(error)
    if old_value is None:
        raise ValueError("clip_range needs old_value")
    module, change = module_of(error), value - old_value
    limited = old_value + change.clip(-clip_range, clip_range) - target
    slope = module.where(abs(error) >= abs(limited), error, limited * (abs(change) <= clip_range))
    return 0.5 * mean(module.maximum(error * error, limited * limited)), slope / len(error)


def clipped_share(log_ratio: Values, clip_range: float) -> Values:
    """Share of the probability ratios that differ from 1 by more than `clip_range`."""
    return mean(abs(module_of(log_ratio).expm1(log_ratio)) > clip_range)


def approximate_kl(log_ratio: Values) -> Values:
    """KL(old || new) from samples of old, low in variance and never negative: mean of ratio - 1 - log ratio (Schulman)."""
    return mean(module_of(log_ratio).expm1(log_ratio) - log_ratio)


def q_targets(
    returns: Values, discounts: Values, next_q_target: Values, next_q_online: Values | None = None
) -> Values:
    """Targets [N] for action values: returns + discounts * Q_target(x', argmax_a Q(x', a)). Without gradients.

    `next_q_target` and `next_q_online` are [N, A]. The target network chooses the action itself (Mnih et al. 2015), or the
    online one does if given (double DQN, van Hasselt et al. 2016, arXiv 1509.06461). `discounts` is 0 after termination.
    """
    check_shapes(returns=returns, discounts=discounts, next_q_target=next_q_target[:, 0])
    check_shapes(next_q_target=next_q_target, next_q_online=next_q_online)
    with torch.no_grad():
        chooser = next_q_target if next_q_online is None else next_q_online
        return returns + discounts * choose(next_q_target, chooser.argmax(1))


def td_error(q: Values, actions: Values, targets: Values) -> Values:
    """How much the values `q` [N, A] of int64 `actions` exceed their targets."""
    check_shapes(q=q[:, 0], actions=actions, targets=targets)
    return choose(q, actions) - targets


def huber(error: Values, delta: float = 1.0, weight: Values | None = None) -> tuple[Values, Values]:
    """Mean of what is quadratic up to `delta` and linear beyond: half the mean squared error if that is infinite.

    `weight` is a factor on each error's part.
    """
    check_shapes(error=error, weight=weight)
    slope = error.clip(-delta, delta)
    part = slope * (error - 0.5 * slope)
    if weight is not None:
        part, slope = part * weight, slope * weight
    return mean(part), slope / len(error)


def quantile_targets(
    returns: Values, discounts: Values, next_target: Values, next_online: Values | None = None
) -> Values:
    """Targets [N, K] for quantiles: returns + discounts * those of the next action. Without gradients.

    `next_target` and `next_online` are [N, A, K]. The action has the greatest mean by the target network (Dabney et al.
    2018, arXiv 1710.10044), or by the online one if given. `discounts` is 0 after termination.
    """
    check_shapes(returns=returns, discounts=discounts, next_target=next_target[:, 0, 0])
    check_shapes(next_target=next_target, next_online=next_online)
    with torch.no_grad():
        best = (next_target if next_online is None else next_online).mean(2).argmax(1)
        return returns[:, None] + discounts[:, None] * choose(next_target, best)


def quantile_huber(
    quantiles: Values, targets: Values, kappa: float = 1.0, weight: Values | None = None
) -> tuple[Values, Values]:
    """Quantile regression of `quantiles` [N, K] (and the derivative) to each of `targets` [N, M], with a Huber loss.

    Quantile i stands for the share (i + 1/2) / K. Summed over the quantiles, the mean over targets and N (Dabney et al.
    2018, arXiv 1710.10044, equation 10 and algorithm 1). `weight` [N] is a factor on each row's part.
    """
    check_shapes(quantiles=quantiles[:, 0], targets=targets[:, 0], weight=weight)
    n, k = quantiles.shape
    error = targets[:, None, :] - quantiles[:, :, None]
    slope = error.clip(-kappa, kappa)
    part = slope * (error - 0.5 * slope)
    # tau where a target lies above its quantile, 1 - tau below
    above = error > 0
    tau = (module_of(error).arange(k, **_like(error)) + 0.5)[:, None] / k
    share = module_of(error).where(above, tau, 1 - tau)
    part, slope = (part * share).mean(2).sum(1), (slope * share).mean(2)
    if weight is not None:
        part, slope = part * weight, slope * weight[:, None]
    return mean(part), slope / -n


def _like(x: Values) -> dict[str, Any]:
    return {"dtype": x.dtype} if isinstance(x, np.ndarray) else {"dtype": x.dtype, "device": x.device}
