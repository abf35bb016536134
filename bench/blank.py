"""An environment and algorithms that do nothing, so that only the machinery between them is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import msgspec
import numpy as np

from aiorl.algos.base import Forward, LearnerContext
from aiorl.algos.ppo import PPO, PPOPolicy
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout

STEPS, ENVS, WIDTH = 256, 8, 64  # one segment: 256 steps x 8 environments x 64 float32 = 0.5 MB of observations


class Blank(gymnasium.Env[Array, np.int64]):
    """An environment that costs next to nothing and never ends."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (WIDTH,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self._obs = np.zeros(WIDTH, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs, {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        return self._obs, 0.0, False, False, {}


class Idle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An algorithm that does nothing: what is left is the machinery."""

    name: ClassVar[str] = "idle"
    corrects_staleness: ClassVar[bool] = True
    default_segment_length: ClassVar[int] = STEPS

    def check(self, spaces: Spaces) -> None:
        pass

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {}

    def policy(self, spaces: Spaces) -> Idler:
        return Idler()

    def learner(self, spaces: Spaces, context: LearnerContext) -> Idler:
        return Idler()


class Idler:
    """Both halves of `Idle`."""

    def begin(self, weights: Mapping[str, Array], rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        pass

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        return np.zeros(len(first), np.int64), {}

    def update(self, rollout: Rollout) -> dict[str, float]:
        return {"gradient_steps": 0.0}

    def weights(self) -> dict[str, Array]:
        return {"w": np.zeros(1, np.float32)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def set(self, **changes: float) -> None:
        pass


class Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PPO that acts and does not learn."""

    name: ClassVar[str] = "frozen"
    corrects_staleness: ClassVar[bool] = True
    default_segment_length: ClassVar[int] = 64

    hidden: tuple[int, ...] = (64, 64)

    @property
    def ppo(self) -> PPO:
        return PPO(hidden=self.hidden)

    def check(self, spaces: Spaces) -> None:
        self.ppo.check(spaces)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return self.ppo.columns(spaces)

    def policy(self, spaces: Spaces) -> PPOPolicy:
        return self.ppo.policy(spaces)

    def forward(self, spaces: Spaces) -> Forward:
        return self.ppo.forward(spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> FrozenLearner:
        return FrozenLearner(self.ppo.learner(spaces, context).weights())


class FrozenLearner(Idler):
    """Keeps the weights that it begins with."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = {name: np.array(array) for name, array in weights.items()}

    def weights(self) -> dict[str, Array]:
        return self._weights
