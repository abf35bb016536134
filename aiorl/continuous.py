"""What learners of continuous actions share: twin critics, squashed Gaussians, the losses. Only learners import this module.

Actions are in units of their bounds, [-1, 1]. As in `networks`, gradients are written out: `trace` keeps what a forward pass
saw, and `backward` sets the parameters' gradients from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiorl import networks
from aiorl.acting import LOG_2PI, LOG_STD_MAX, LOG_STD_MIN
from aiorl.layers import draw_uniformly, fan_in_uniform_
from aiorl.losses import check_shapes

LOG_2 = math.log(2)


class Actor(nn.Module):
    """A network from observations [N, features] to what the policy acts with, [N, outputs]."""

    def __init__(self, features: int, outputs: int, hidden: Sequence[int], activation: str, rng: torch.Generator) -> None:
        super().__init__()
        self.actor = networks.MLP([features, *hidden, outputs], activation, rng, last_gain=1.0)
        draw_uniformly(self.actor, rng)  # as the authors of TD3 do


class SoftActor(Actor):
    """The same with the temperature's logarithm, `log_alpha` [1]."""

    def __init__(
        self, features: int, outputs: int, hidden: Sequence[int], activation: str, rng: torch.Generator, alpha: float
    ) -> None:
        super().__init__(features, outputs, hidden, activation, rng)
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(alpha)))


# -- action values -----------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """`count` networks with one output each, side by side, so that each layer of all is one product of matrices.

    The activation, relu or tanh, follows each layer but the last. Parameters are `weight.{i}` [count, out, in] and
    `bias.{i}` [count, out].
    """

    def __init__(self, count: int, inputs: int, hidden: Sequence[int], activation: str, rng: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for fan_in, size in pairwise([inputs, *hidden, 1]):
            self.weight.append(fan_in_uniform_(nn.Parameter(torch.empty(count, size, fan_in)), rng, fan_in))
            self.bias.append(fan_in_uniform_(nn.Parameter(torch.empty(count, size)), rng, fan_in))
        self._layers = list(zip(self.weight, self.bias, strict=True))
        self._tanh = activation == "tanh"

    def trace(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """What goes into each layer, each [count, N, in], and the values last, [count, N, 1]. Without gradients.

        Of the first `count` networks; of all by default.
        """
        layers = self._layers if count is None else [(weight[:count], bias[:count]) for weight, bias in self._layers]
        seen = [x.expand(len(layers[0][0]), *x.shape)]
        for weight, bias in layers:
            if len(seen) > 1:
                seen[-1].tanh_() if self._tanh else seen[-1].relu_()
            seen.append(torch.baddbmm(bias.unsqueeze(1), seen[-1], weight.transpose(1, 2)))
        return seen

    def backward(self, seen: Sequence[Tensor], grad: Tensor) -> None:
        """Set the parameters' gradients from the values' [count, N]."""
        grad = grad.unsqueeze(2)
        for i, (weight, bias) in reversed(list(enumerate(self._layers))):
            torch.sum(grad, 1, out=bias.grad)
            torch.bmm(grad.transpose(1, 2), seen[i], out=weight.grad)
            if i > 0:
                grad = self._through(grad, weight, seen[i])

    def input_gradient(self, seen: Sequence[Tensor], grad: Tensor, first: int) -> Tensor:
        """Gradient of the inputs from column `first` on, [N, in - first], given the values' [count, N]."""
        count, grad = len(grad), grad.unsqueeze(2)
        for (weight, _), y in zip(self._layers[:0:-1], seen[-2:0:-1], strict=True):
            grad = self._through(grad, weight[:count], y)
        return torch.bmm(grad, self._layers[0][0][:count, :, first:]).sum(0)

    def _through(self, grad: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """Back through a layer and the activation before it, whose output was `y`."""
        grad = torch.bmm(grad, weight)
        if self._tanh:
            return torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=grad)
        return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


class Goal(NamedTuple):
    """What critics are fitted to: observations [N, features], actions [N, k], targets [N] and factors on the losses [N]."""

    obs: Tensor
    action: Tensor
    targets: Tensor
    weight: Tensor | None = None


class TwinCritics:
    """Two action values, their targets and the way to fit them (clipped double Q-learning, Fujimoto et al. 2018)."""

    def __init__(
        self, features: int, actions: int, hidden: Sequence[int], activation: str, rng: torch.Generator,
        device: str, *, adam_eps: float, max_grad_norm: float | None,
    ) -> None:  # fmt: skip
        self._features, self._max_norm = features, max_grad_norm or math.inf
        self.online, self.target = (Ensemble(2, features + actions, hidden, activation, rng) for _ in range(2))
        self.parameters = networks.FlatParameters(self.online, device)
        self.target_parameters = networks.FlatParameters(self.target, device)
        self.target_parameters.vector.copy_(self.parameters.vector)
        self.adam = networks.Adam(self.parameters, eps=adam_eps)

    def target_value(self, obs: Tensor, action: Tensor) -> Tensor:
        """The smaller of the targets' values [N]."""
        return self.target.trace(torch.cat([obs, action], 1))[-1].squeeze(2).amin(0)

    def fit(self, parts: Sequence[Goal], rate: float) -> list[dict[str, Tensor]]:
        """One gradient step of the mean loss; returns what each part says of itself, with the norm of the gradient."""
        found = self.parameters.mean_grad(parts, self._fit)
        norm = self.parameters.clip_grad(self._max_norm)
        self.adam.step(rate)
        return [part | {"grad_norm": norm} for part in found]

    def _fit(self, goal: Goal) -> dict[str, Tensor]:
        """Set the gradient of a batch's loss."""
        seen = self.online.trace(torch.cat([goal.obs, goal.action], 1))
        values = seen[-1].squeeze(2)
        loss, error = twin_loss(values, goal.targets, goal.weight)
        slope = error if goal.weight is None else error * goal.weight
        self.online.backward(seen, slope / len(goal.targets))
        return {"critic_loss": loss, "q": values, "td_error": error}

    def smaller(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The smaller of the two values [N], and its gradient by the action [N, k]."""
        seen = self.online.trace(torch.cat([obs, action], 1))
        value, which = seen[-1].squeeze(2).min(0)
        chosen = torch.zeros_like(seen[-1].squeeze(2)).scatter_(0, which.unsqueeze(0), 1.0)
        return value, self.online.input_gradient(seen, chosen, self._features)

    def first(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the two values [N], and its gradient by the action [N, k]."""
        seen = self.online.trace(torch.cat([obs, action], 1), count=1)
        value = seen[-1].squeeze(2)
        return value[0], self.online.input_gradient(seen, torch.ones_like(value), self._features)

    def follow(self, tau: float) -> None:
        """Move the targets by a share `tau` of the way."""
        self.target_parameters.vector.lerp_(self.parameters.vector, tau)

    def undo(self) -> Callable[[], None]:
        """What takes everything back to where it is now."""
        undo, before = self.adam.undo(), self.target_parameters.vector.clone()

        def take_back() -> None:
            undo()
            self.target_parameters.vector.copy_(before)

        return take_back

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters.arrays(),
            "target": self.target_parameters.arrays(),
            "optimizer": self.adam.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], path: str = "critics") -> None:
        """Raises ValueError naming the first mismatch."""
        self.parameters.load(state["parameters"], f"{path}.parameters")
        self.target_parameters.load(state["target"], f"{path}.target")
        self.adam.load_state_dict(state["optimizer"], f"{path}.optimizer")


def twin_loss(values: Tensor, targets: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Half the mean squared error of each critic, added up, and all errors: `values` [2, N], `targets` [N].

    `weight` [N] is a factor on each transition's part.
    """
    check_shapes(targets=targets, values=values[0], weight=weight)
    error = values - targets
    square = error.square() if weight is None else error.square() * weight
    return 0.5 * square.mean(1).sum(), error


# -- policies ----------------------------------------------------------------------------------------------------------


class SquashedGaussian:
    """tanh of independent normal variables, drawn as mean + std * noise.

    `outputs` [N, 2 k] are means, then log standard deviations (limited); `noise` [N, k] is standard normal. `action`
    [N, k] lies in [-1, 1]; `log_prob` [N] is its log-density there (Haarnoja et al. 2018, arXiv 1812.05905, appendix C).
    """

    def __init__(self, outputs: Tensor, noise: Tensor) -> None:
        mean, free = outputs.chunk(2, 1)
        log_std = free.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self._unlimited = free == log_std
        self._spread = log_std.exp() * noise
        u = mean + self._spread
        self.action = u.tanh()
        # log(1 - tanh(u)^2), in a form that does not lose its digits where tanh is near 1
        squash = 2 * (LOG_2 - u - F.softplus(-2 * u))
        self.log_prob = (-0.5 * (noise * noise + LOG_2PI) - log_std - squash).sum(1)

    def backward(self, d_action: Tensor, d_log_prob: Tensor) -> Tensor:
        """Gradient of the outputs, given those of the actions [N, k] and of each log-density (the same for all)."""
        d_u = d_action * (1 - self.action * self.action) + 2 * d_log_prob * self.action
        return torch.cat([d_u, (d_u * self._spread - d_log_prob) * self._unlimited], 1)


def smoothed(action: Tensor, noise: Tensor, clip: float) -> Tensor:
    """Target policy smoothing: actions with noise limited to `clip`, within [-1, 1] (Fujimoto et al. 2018, 1802.09477)."""
    check_shapes(action=action, noise=noise)
    return (action + noise.clamp(-clip, clip)).clamp(-1, 1)
