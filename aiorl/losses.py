"""Losses as pure functions of tensors, each with its gradient written out: (scalar to minimise, its derivative).

Every input has shape [N] unless stated, and so has the derivative, which is by the first argument. The scalar can be
differentiated by autograd as well. Nothing is detached inside, except where a docstring says so: whoever computes
targets does so without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors given have the same shape, before broadcasting hides the mistake."""
    given = {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}
    first, shape = next(iter(given.items()))
    for name, other in given.items():
        if other != shape:
            raise ValueError(f"{name} has shape {list(other)}, but {first} has {list(shape)}")


def standardise(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Subtract the mean and divide by the (biased) standard deviation; a single value becomes 0."""
    centred = x - x.mean()
    return centred / (centred.square().mean().sqrt() + eps)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_range: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's policy loss (Schulman et al. 2017, arXiv 1707.06347), decoupled if weighted (Hilton et al. 2022, 2110.00641).

    `log_ratio` = log pi(a|x) - log pi_proximal(a|x). `weight` = pi_proximal / pi_behaviour (capped by the caller) corrects
    for actions that an older policy chose; None where both are the same.
    """
    check_shapes(log_ratio=log_ratio, advantage=advantage, weight=weight)
    ratio = log_ratio.exp()
    gain, limited = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    objective, slope = torch.minimum(gain, limited), gain * (gain <= limited)
    if weight is not None:
        objective, slope = objective * weight, slope * weight
    return -objective.mean(), slope * (-1 / len(slope))


def value_loss(
    value: Tensor, target: Tensor, old_value: Tensor | None = None, clip_range: float | None = None
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error; with `clip_range`, values may only gain within that distance of `old_value`."""
    check_shapes(value=value, target=target, old_value=old_value)
    error = value - target
    if clip_range is None:
        return 0.5 * error.square().mean(), error / len(error)
    if old_value is None:
        raise ValueError("clip_range needs old_value")
    change = value - old_value
    limited = old_value + change.clamp(-clip_range, clip_range) - target
    slope = torch.where(error.abs() >= limited.abs(), error, limited * (change.abs() <= clip_range))
    return 0.5 * torch.maximum(error.square(), limited.square()).mean(), slope / len(error)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from samples of old, low in variance and never negative: mean of ratio - 1 - log ratio (Schulman)."""
    return (log_ratio.expm1() - log_ratio).mean()


def q_targets(
    returns: Tensor, discounts: Tensor, next_q_target: Tensor, next_q_online: Tensor | None = None
) -> Tensor:
    """Targets [N] for action values: returns + discounts * Q_target(x', argmax_a Q(x', a)). Without gradients.

    `next_q_target` and `next_q_online` are [N, A]. The target network chooses the action itself (Mnih et al. 2015), or the
    online one does if given (double DQN, van Hasselt et al. 2016, arXiv 1509.06461). `discounts` is 0 after termination.
    """
    check_shapes(returns=returns, discounts=discounts, next_q_target=next_q_target[:, 0])
    check_shapes(next_q_target=next_q_target, next_q_online=next_q_online)
    with torch.no_grad():
        chooser = next_q_target if next_q_online is None else next_q_online
        values = next_q_target.gather(1, chooser.argmax(1, keepdim=True)).squeeze(1)
        return returns + discounts * values


def q_loss(
    q: Tensor, actions: Tensor, targets: Tensor, huber_delta: float | None = 1.0
) -> tuple[Tensor, Tensor]:
    """Error of the chosen actions' values: `q` [N, A] (and its derivative), int64 `actions`, `targets`.

    Huber (quadratic up to `huber_delta`, linear beyond), or half the mean squared error if that is None.
    """
    check_shapes(q=q[:, 0], actions=actions, targets=targets)
    index = actions.unsqueeze(1)
    error = q.gather(1, index).squeeze(1) - targets
    if huber_delta is None:
        loss, slope = 0.5 * error.square().mean(), error
    else:
        slope = error.clamp(-huber_delta, huber_delta)
        loss = (slope * (error - 0.5 * slope)).mean()
    return loss, torch.zeros_like(q).scatter_(1, index, (slope / len(error)).unsqueeze(1))
