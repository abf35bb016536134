"""What a policy needs to act, in NumPy alone: networks, and choosing actions from their outputs.

Weights are used in place, float32 throughout; only biases are copied, once for each size of a batch. Random numbers for a
whole segment are drawn at once, so a step costs a few array operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from aiorl.convolution import Convolutions
from aiorl.envs.spaces import Leaf
from aiorl.segments import Array

LOG_2PI = math.log(2 * math.pi)
TINY = np.float32(1e-30)  # so that no noise lifts a logit over one that is larger by more than exp can hold
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # of squashed Gaussians
LEAST_REACH, MOST_REACH = 0.1, 10.0  # from the middle of a box to its bounds, in deviations


def relu(x: Array, out: Array) -> Array:
    return np.maximum(x, 0, out=out)


ACTIVATIONS: dict[str, Callable[..., Array]] = {"tanh": np.tanh, "relu": relu}


class MLP:
    """Forward pass of `networks.MLP` with the arrays `{name}.{i}.weight` [out, in] and `{name}.{i}.bias` [out].

    The activation follows each layer but the last, or each one if `activate_last`: then all are hidden layers, and there may
    be none. Raises KeyError if the last layer of another network is not there.
    """

    def __init__(self, weights: Mapping[str, Array], name: str, activation: str, *, activate_last: bool = False) -> None:
        self._layers: list[tuple[Array, Array]] = []
        while (weight := weights.get(f"{name}.{len(self._layers)}.weight")) is not None:
            self._layers.append((weight.T, weights[f"{name}.{len(self._layers)}.bias"]))
        self._activate: list[Callable[..., Array] | None] = [ACTIVATIONS[activation]] * len(self._layers)
        if not activate_last:
            if not self._layers:
                raise KeyError(f"{name}.0.weight")
            self._activate[-1] = None
        self._fitted = 0, self._fit(0)

    def _fit(self, n: int) -> list[tuple[Array, Array, Callable[..., Array] | None]]:
        """The layers for batches of `n`, biases in full: so they are added in half the time."""
        parts = zip(self._layers, self._activate, strict=True)
        return [(weight, np.repeat(bias[None], n, axis=0), activate) for (weight, bias), activate in parts]

    def __call__(self, x: Array) -> Array:
        """[N, in] to [N, out], float32; a new array if there are layers. Threads may call at the same time."""
        n, layers = self._fitted
        if len(x) != n:
            layers = self._fit(len(x))
            self._fitted = len(x), layers
        for weight, bias, activate in layers:
            x = np.dot(x, weight)  # sooner begun than `@`
            np.add(x, bias, x)
            if activate is not None:
                activate(x, x)
        return x


class ConvNet:
    """Forward pass of `networks.ConvNet`: each convolution is one matrix product over the patches that it looks at.

    On one core that is as quick as torch for grids of 10 x 10, and takes half as long again for images of 84 x 84.
    """

    def __init__(
        self, weights: Mapping[str, Array], name: str, activation: str, plan: Convolutions, *, activate_last: bool = False
    ) -> None:
        parts = [(weights[f"{name}.conv.{i}.weight"], weights[f"{name}.conv.{i}.bias"]) for i in range(len(plan.layers))]
        self._filters = [(weight.reshape(len(weight), -1).T, bias) for weight, bias in parts]
        self._plan, self._dense = plan, MLP(weights, f"{name}.dense", activation, activate_last=activate_last)

    def __call__(self, x: Array) -> Array:
        """[N, features] to [N, out], float32; a new array. Threads may call at the same time."""
        image, n = np.ascontiguousarray(self._plan.images(x)), len(x)
        for (weight, bias), (filters, kernel, stride) in zip(self._filters, self._plan.layers, strict=True):
            patches = _patches(image, kernel, stride)
            height, width = patches.shape[1:3]
            y = np.dot(patches.reshape(n * height * width, -1), weight)
            np.add(y, bias, y)
            image = relu(y, y).reshape(n, height, width, filters)
        flat, rest = image.reshape(n, -1), self._plan.rest(x)
        return self._dense(np.concatenate([flat, *rest], axis=1) if rest else flat)


def _patches(image: Array, kernel: int, stride: int) -> Array:
    """What a convolution looks at: [N, H, W, C] to a view [N, h, w, kernel, kernel, C]."""
    n, height, width, channels = image.shape
    across = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    per_image, per_row, per_pixel, per_channel = image.strides
    steps = per_image, per_row * stride, per_pixel * stride, per_row, per_pixel, per_channel
    return as_strided(image, (n, *across, kernel, kernel, channels), steps, writeable=False)


def make_network(
    weights: Mapping[str, Array], name: str, activation: str, *, activate_last: bool = False,
    plan: Convolutions | None = None,
) -> MLP | ConvNet:  # fmt: skip
    """The acting half of `networks.make_network`."""
    if plan is None:
        return MLP(weights, name, activation, activate_last=activate_last)
    return ConvNet(weights, name, activation, plan, activate_last=activate_last)


class Categorical:
    """One choice for each entry of `nvec` (Discrete, MultiDiscrete), sampled with Gumbel noise.

    `outputs` [N, sum(nvec)] are logits, one block for each choice. Actions are int64 [N] for a Discrete space, else [N, k].
    """

    def __init__(self, leaf: Leaf) -> None:
        self.size = sum(leaf.nvec)
        self._flat = leaf.kind == "discrete"
        ends = np.cumsum(leaf.nvec)
        self._blocks = [slice(int(end) - n, int(end)) for end, n in zip(ends, leaf.nvec, strict=True)]
        self._rows = np.arange(0)

    def noise(self, rng: np.random.Generator, steps: int, n: int) -> Array:
        """Standard Gumbel noise, float32 [steps, n, sum(nvec)]."""
        noise = rng.standard_exponential((steps, n, self.size), np.float32)
        np.maximum(noise, TINY, out=noise)
        np.log(noise, out=noise)
        return np.negative(noise, out=noise)

    def mode(self, outputs: Array) -> Array:
        """The most likely actions."""
        if self._flat:
            return outputs.argmax(1)
        return np.stack([outputs[:, block].argmax(1) for block in self._blocks], axis=1)

    def sample(self, outputs: Array, noise: Array) -> tuple[Array, Array]:
        """Actions for one step's noise [N, sum(nvec)], and their log-probabilities, float32 [N]."""
        noisy = outputs + noise
        rows = self._rows
        if len(rows) != len(outputs):
            rows = self._rows = np.arange(len(outputs))
        if self._flat:
            return _choose(outputs, noisy, rows)
        chosen = [_choose(outputs[:, block], noisy[:, block], rows) for block in self._blocks]
        return np.stack([action for action, _ in chosen], axis=1), sum(log_prob for _, log_prob in chosen)  # type: ignore[return-value]


def _choose(logits: Array, noisy: Array, rows: Array) -> tuple[Array, Array]:
    actions = noisy.argmax(1)
    odds = logits - logits[rows, actions][:, None]  # of each action against the chosen one, as logarithms
    total = np.add.reduce(np.exp(odds, odds), 1)
    return actions, np.negative(np.log(total, total), total)


class Gaussian:
    """Independent normal distributions with a standard deviation that does not depend on the state (Box).

    `outputs` [N, k] are means, `log_std` [k]. Actions are float32 [N, k], not clipped into the space's bounds.
    """

    def __init__(self, leaf: Leaf) -> None:
        self.size = leaf.size
        self.load(np.zeros(leaf.size, np.float32))

    def load(self, log_std: Array) -> None:
        self._std = np.exp(log_std)
        self._constant = np.float32(np.sum(log_std) + 0.5 * LOG_2PI * self.size)

    def noise(self, rng: np.random.Generator, steps: int, n: int) -> Array:
        """Standard normal noise, float32 [steps, n, k]."""
        return rng.standard_normal((steps, n, self.size), np.float32)

    def mode(self, outputs: Array) -> Array:
        return outputs

    def sample(self, outputs: Array, noise: Array) -> tuple[Array, Array]:
        """Actions for one step's noise [N, k], and their log-densities, float32 [N]."""
        actions = outputs + self._std * noise
        z = (actions - outputs) / self._std  # not `noise`: the density of the action as rounded
        return actions, np.float32(-0.5) * (z * z).sum(1) - self._constant


def beyond_reach(leaf: Leaf, std: float) -> list[str]:
    """Why a `Gaussian` that begins around 0 with this deviation hardly explores an action space, in a line; or nothing."""
    if leaf.kind != "box":
        return []
    low, high = (bound.reshape(-1).astype(np.float64) for bound in leaf.bounds)
    reach = (high - low) / 2 / std  # infinite where a bound is
    wrong = np.isfinite(reach) & (reach > 0) & ((low > 0) | (high < 0) | (reach < LEAST_REACH) | (reach > MOST_REACH))
    return [
        f"actions are drawn around 0 with a deviation of {std:g} at first, and dimension {i} of the actions is "
        f"[{low[i]:g}, {high[i]:g}]: wrap it in gymnasium.wrappers.RescaleAction(env, -1, 1)"
        for i in np.flatnonzero(wrong)[:1]
    ]


def distribution(leaf: Leaf) -> Categorical | Gaussian:
    """The distribution of actions for an action space."""
    return Gaussian(leaf) if leaf.kind == "box" else Categorical(leaf)


class NoiseTape:
    """One step's noise after the other, drawn for whole segments."""

    def __init__(self, draw: Callable[[np.random.Generator, int, int], Any]) -> None:
        self._draw = draw
        self.rewind(None, 0)

    def rewind(self, rng: np.random.Generator | None, steps: int) -> None:
        self._rng, self._steps = rng, max(1, steps)
        self._at = self._steps
        self._tape: Any = None

    def next(self, n: int) -> Any:
        """Noise [n, …] for the next step. More steps than announced get a further segment's worth."""
        assert self._rng is not None
        if self._at == self._steps:
            self._tape, self._at = self._draw(self._rng, self._steps, n), 0
        self._at += 1
        return self._tape[self._at - 1]
