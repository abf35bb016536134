"""Environments whose steps take time without computing, as a simulator elsewhere does: blocking, and as coroutines."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import gymnasium
import numpy as np

from aiorl.segments import Array

WIDTH, ACTIONS = 8, 4


class Slow(gymnasium.Env[Array, np.int64]):
    """A random walk whose step first sleeps a lognormal time of `mean_s` seconds; episodes are `episode` steps long.

    How long a step sleeps is drawn from the seed, so a run's work is the same whatever collects it.
    """

    def __init__(self, mean_s: float = 0.010, sigma: float = 1.0, episode: int = 38) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (WIDTH,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self._mu, self._sigma, self._episode = math.log(mean_s) - sigma**2 / 2, sigma, episode
        self._obs, self._steps = np.zeros(WIDTH, np.float32), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._obs, self._steps = np.zeros(WIDTH, np.float32), 0
        return self._obs, {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        time.sleep(self._draw_s())
        return self._move(action)

    def _draw_s(self) -> float:
        return float(self.np_random.lognormal(self._mu, self._sigma))

    def _move(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self._obs = self._obs.copy()
        self._obs[action] += 1.0
        self._steps += 1
        return self._obs, float(action == 0), False, self._steps == self._episode, {}


class AsyncSlow(Slow):
    """The same as coroutines: thousands of them sleep side by side in one process."""

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # pyright: ignore
        return super().reset(seed=seed)

    async def step(self, action: np.int64) -> Any:  # pyright: ignore
        await asyncio.sleep(self._draw_s())
        return self._move(action)
