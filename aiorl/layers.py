"""The layers that networks are made of: an MLP, and convolutions with one behind them. Only the learner imports this module.

Parameter names are those that `acting` looks up: `{name}.{i}.weight` [out, in], `{name}.{i}.bias` [out], and for images
those of `convolution`.

The modules work with autograd as usual. The learners go another way: `trace` keeps what a forward pass saw, and `backward`
sets the gradients from it (sets, not adds). For networks this small the graph costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiorl.convolution import Convolutions


class MLP(nn.ModuleList):
    """Linear layers of the given sizes; the activation follows each but the last (or each one, if `activate_last`).

    A single size makes no layers: what goes in comes out. Weights are orthogonal with gain sqrt(2), the last layer's
    with `last_gain`; biases are 0. `rng` is the only source of randomness.
    """

    def __init__(
        self, sizes: Sequence[int], activation: str, rng: torch.Generator, *, last_gain: float, activate_last: bool = False
    ) -> None:
        super().__init__()
        self._layers: list[tuple[nn.Parameter, nn.Parameter]] = []  # reading a module's attribute takes a microsecond
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layer: Any = nn.utils.skip_init(nn.Linear, inputs, outputs)
            gain = last_gain if i == len(sizes) - 2 else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain, generator=rng)
            nn.init.zeros_(layer.bias)
            self._layers.append((layer.weight, layer.bias))
            self.append(layer)
        self._activation = activation
        self._activated = len(self) - (0 if activate_last else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        activate = torch.tanh if self._activation == "tanh" else torch.relu
        for i, (weight, bias) in enumerate(self._layers):
            x = F.linear(x, weight, bias)
            if i < self._activated:
                x = activate(x)
        return x

    def trace(self, x: Tensor) -> list[Tensor]:
        """What goes into each layer, and the output last. To be called without gradients."""
        seen = [x]
        for i, (weight, bias) in enumerate(self._layers):
            x = F.linear(x, weight, bias)
            if i < self._activated:
                _activate_(x, self._activation)
            seen.append(x)
        return seen

    def backward(self, seen: Sequence[Tensor], grad: Tensor, *, to_input: bool = False) -> Tensor | None:
        """Set the parameters' gradients from the output's [N, out]; returns the input's [N, in] if asked for."""
        for i in reversed(range(len(self._layers))):
            (weight, bias), x = self._layers[i], seen[i]
            if i < self._activated:
                grad = _activation_backward(grad, seen[i + 1], self._activation)
            torch.sum(grad, 0, out=bias.grad)
            # The narrow matrix goes first, which MKL multiplies up to four times as fast.
            if grad.shape[1] <= x.shape[1]:
                torch.mm(grad.t(), x, out=weight.grad)
            else:
                grad_of(weight).copy_((x.t() @ grad).t())
            if i > 0 or to_input:
                grad = grad @ weight
        return grad if to_input else None


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "the module's parameters belong to no FlatParameters"
    return parameter.grad


def _activate_(x: Tensor, activation: str) -> None:
    """In place. NumPy's float32 tanh is several times as fast as torch's, and the same that acting uses."""
    if activation == "relu":
        x.relu_()
    elif x.is_cuda:
        x.tanh_()
    else:
        array = x.numpy()
        np.tanh(array, out=array)


def _activation_backward(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, y)
    return torch.ops.aten.threshold_backward(grad, y, 0)


def apply_mlp(
    weights: Mapping[str, Tensor], name: str, activation: str, x: Tensor, *, activate_last: bool = False
) -> Tensor:
    """As an `MLP` of that name whose parameters are in `weights`. To be called without gradients."""
    depth = sum(key.startswith(f"{name}.") for key in weights) // 2
    for i in range(depth):
        x = F.linear(x, weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"])
        if i < depth - (not activate_last):
            _activate_(x, activation)
    return x


# -- other initial weights ---------------------------------------------------------------------------------------------


def fan_in_uniform_(parameter: nn.Parameter, rng: torch.Generator, fan_in: int) -> nn.Parameter:
    """Draw from [-1, 1] / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound, generator=rng)
    return parameter


def draw_uniformly(module: nn.Module, rng: torch.Generator) -> None:
    """Draw all weights [out, …] and biases [out] of a module again, from [-1, 1] / sqrt(inputs of each output)."""
    for name, parameter in module.named_parameters():
        fan_in_uniform_(parameter, rng, module.get_parameter(name.replace("bias", "weight"))[0].numel())


# -- images ------------------------------------------------------------------------------------------------------------


class Filters(nn.Module):
    """The parameters of one convolution: orthogonal `weight` [filters, kernel, kernel, channels], `bias` 0 [filters]."""

    def __init__(self, filters: int, kernel: int, channels: int, rng: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(filters, kernel, kernel, channels))
        self.bias = nn.Parameter(torch.zeros(filters))
        nn.init.orthogonal_(self.weight, math.sqrt(2), generator=rng)


class ConvNet(nn.Module):
    """Convolutions, each with a ReLU, and an `MLP` over what they give and the rest of the observation.

    `sizes` are those of the MLP without its inputs. Torch sees the channels second in memory that has them last: for that
    its kernels are quickest on a CPU.
    """

    def __init__(
        self, plan: Convolutions, sizes: Sequence[int], activation: str, rng: torch.Generator, *, last_gain: float,
        activate_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        layers = zip(plan.layers, plan.channels, strict=True)
        filters = [Filters(layer.filters, layer.kernel, channels, rng) for layer, channels in layers]
        self.conv = nn.ModuleList(filters)
        self.dense = MLP([plan.dense_features, *sizes], activation, rng, last_gain=last_gain, activate_last=activate_last)
        self._plan = plan
        self._layers = [(f.weight, f.bias, layer.stride) for f, layer in zip(filters, plan.layers, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """[N, features] to [N, out]."""
        image = self._plan.images(x)
        for weight, bias, stride in self._layers:
            image = _convolve(image, weight, bias, stride).relu()
        return self.dense(torch.cat([image.reshape(len(x), -1), *self._plan.rest(x)], 1))

    def trace(self, x: Tensor) -> list[Tensor]:
        """What goes into each convolution and comes out of the last, [N, h, w, C], then the trace of the MLP."""
        seen = [self._plan.images(x).contiguous()]
        for weight, bias, stride in self._layers:
            seen.append(_convolve(seen[-1], weight, bias, stride).relu_())
        flat, rest = seen[-1].reshape(len(x), -1), self._plan.rest(x)
        return [*seen, *self.dense.trace(torch.cat([flat, *rest], 1) if rest else flat)]

    def backward(self, seen: Sequence[Tensor], grad: Tensor, *, to_input: bool = False) -> None:
        """Set the parameters' gradients from the output's [N, out]."""
        assert not to_input, "nothing is before a ConvNet"
        first_dense = len(self._layers) + 1
        d_flat = self.dense.backward(seen[first_dense:], grad, to_input=True)
        last = seen[first_dense - 1]
        assert d_flat is not None
        d_image = d_flat[:, : self._plan.flat].reshape(last.shape)
        for i in reversed(range(len(self._layers))):
            weight, bias, stride = self._layers[i]
            d_image = torch.ops.aten.threshold_backward(d_image, seen[i + 1], 0)
            d_image, d_weight, d_bias = torch.ops.aten.convolution_backward(
                d_image.permute(0, 3, 1, 2), seen[i].permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), [len(bias)],
                [stride, stride], [0, 0], [1, 1], False, [0, 0], 1, [i > 0, True, True],
            )  # fmt: skip
            grad_of(weight).copy_(d_weight.permute(0, 2, 3, 1))
            grad_of(bias).copy_(d_bias)
            if i > 0:
                d_image = d_image.permute(0, 2, 3, 1)


def _convolve(image: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """[N, H, W, C] to [N, h, w, filters]."""
    return F.conv2d(image.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, stride).permute(0, 2, 3, 1)


Net = MLP | ConvNet


def make_network(
    features: int, sizes: Sequence[int], activation: str, rng: torch.Generator, *, last_gain: float,
    activate_last: bool = False, plan: Convolutions | None = None,
) -> Net:  # fmt: skip
    """An `MLP` of these sizes behind `features` inputs, with the convolutions of `plan` in front if there are any."""
    if plan is None:
        return MLP([features, *sizes], activation, rng, last_gain=last_gain, activate_last=activate_last)
    return ConvNet(plan, sizes, activation, rng, last_gain=last_gain, activate_last=activate_last)


def apply_network(
    weights: Mapping[str, Tensor], name: str, activation: str, x: Tensor, *, activate_last: bool = False,
    plan: Convolutions | None = None,
) -> Tensor:  # fmt: skip
    """As a network of that name whose parameters are in `weights`. To be called without gradients."""
    if plan is None:
        return apply_mlp(weights, name, activation, x, activate_last=activate_last)
    image = plan.images(x)
    for i, layer in enumerate(plan.layers):
        weight, bias = weights[f"{name}.conv.{i}.weight"], weights[f"{name}.conv.{i}.bias"]
        image = _convolve(image, weight, bias, layer.stride).relu_()
    flat = torch.cat([image.reshape(len(x), -1), *plan.rest(x)], 1)
    return apply_mlp(weights, f"{name}.dense", activation, flat, activate_last=activate_last)
