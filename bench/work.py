"""An environment whose step computes for a set while: real work, where a sleep would leave the core to the learner."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from aiorl.segments import Array

WIDTH, ACTIONS, EPISODE = 8, 4, 32


class Work(gymnasium.Env[Array, np.int64]):
    """Each step carries out `iterations` rounds of arithmetic; what comes out is part of the observation.

    The amount of work is fixed: the step reads no clock, so what slows the core slows the step.
    """

    def __init__(self, iterations: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (WIDTH,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self._iterations = iterations
        self._x, self._steps = 0.5, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._x, self._steps = float(self.np_random.uniform(0.1, 0.9)), 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        x = self._x
        for _ in range(self._iterations):
            x = 3.9 * x * (1.0 - x)  # stays within (0, 1) and never settles
        self._x, self._steps = x, self._steps + 1
        return self._observe(), float(int(x * ACTIONS) == action), False, self._steps == EPISODE, {}

    def _observe(self) -> Array:
        return np.cos(np.arange(1, WIDTH + 1) * np.pi * self._x).astype(np.float32)
