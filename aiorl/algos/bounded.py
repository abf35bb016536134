"""Acting in a Box with finite bounds: units, a start with random actions, and how far a policy has moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from aiorl.algos.base import LearnerContext, Weights
from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import ConfigError
from aiorl.segments import Array, Rollout


def check_bounded(algorithm: str, spaces: Spaces) -> None:
    """Raise ConfigError unless the action space is a Box with finite bounds and there is something to see."""
    leaf = spaces.action
    if leaf.kind != "box":
        kind = {"discrete": "Discrete", "multi_discrete": "MultiDiscrete"}.get(leaf.kind, leaf.kind)
        raise ConfigError(f"{algorithm} needs a Box action space, this environment has {kind}\n  use ppo: it acts in all")
    for what, size in (("observation", spaces.features), ("action", leaf.size)):
        if size == 0:
            raise ConfigError(f"{algorithm}: the {what} space is empty (shape with a 0): there is nothing to learn")
    with np.errstate(over="ignore"):  # networks compute in float32: what is too large for that is infinite
        low, high = (bound.reshape(-1).astype(np.float32) for bound in leaf.bounds)
    if len(unbounded := np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))):
        i = int(unbounded[0])
        raise ConfigError(
            f"{algorithm} needs finite bounds for its actions, number {i} has [{low[i]:g}, {high[i]:g}]\n"
            "  use ppo, or wrap the environment in gymnasium.wrappers.RescaleAction or one that has bounds"
        )


class ActionRange:
    """Between stored actions, float32 [N, k], and the same in units of their bounds, [-1, 1]."""

    def __init__(self, leaf: Leaf) -> None:
        low, high = (bound.reshape(-1).astype(np.float64) for bound in leaf.bounds)
        half = high / 2 - low / 2
        self._centre, self._half = (low + half).astype(np.float32), half.astype(np.float32)
        self._per_half = np.divide(1, half, out=np.zeros_like(half), where=half > 0).astype(np.float32)

    def stored(self, unit: Array) -> Array:
        return self._centre + self._half * unit

    def unit(self, stored: Array) -> Array:
        """0 where the bounds leave nothing to choose."""
        return (stored - self._centre) * self._per_half


@dataclass(frozen=True)
class RandomStart:
    """The first `rollouts` rollouts are collected with uniform random actions. Workers are told with the weights."""

    rollouts: int

    @classmethod
    def of_steps(cls, env_steps: int, context: LearnerContext) -> Self:
        return cls(math.ceil(env_steps / context.env_steps_per_rollout))

    @classmethod
    def of_weights(cls, weights: Weights) -> Self:
        return cls(int(weights["random_rollouts"][0]))

    def weights(self) -> dict[str, Array]:
        return {"random_rollouts": np.array([self.rollouts])}

    def covers(self, rollout: int) -> bool:
        return rollout < self.rollouts


def action_shift(
    rollout: Rollout, encode: Callable[[Mapping[str, Array]], Array], mean: Callable[[Array], Array]
) -> float:
    """Root mean square difference of the deterministic action then (the column `mean`) and now, in units of the bounds.

    `encode` maps observation leaves [N, …] to what the network sees, and `mean` that, [N, features], to actions [N, k] of
    the policy as it is. 0 for the newest version.
    """
    valid = rollout.column("valid")
    if rollout.behaviour_version == rollout.index or not valid.any():
        return 0.0
    obs = encode({name: leaf[:-1][valid] for name, leaf in rollout.obs.items()})
    return math.sqrt(float(np.square(mean(obs) - rollout.column("mean")[valid]).mean()))
