"""Async environments that tests, and the workers they start, can import by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from run_envs import Counting

from tests.envs_for_tests import Broken, Unseeded, Walk


class Async:
    """Any gymnasium environment as a plain object with coroutines, which give way now and then, each in its own rhythm."""

    made = 0

    def __init__(self, env: Any) -> None:
        self.env, self.closed, self.calls = env, 0, 0
        self.observation_space, self.action_space = env.observation_space, env.action_space
        Async.made += 1
        self._rhythm = 2 + Async.made % 3

    async def _give_way(self) -> None:
        self.calls += 1
        for _ in range(self.calls % self._rhythm):
            await asyncio.sleep(0)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        await self._give_way()
        return self.env.reset(seed=seed, options=options)

    async def step(self, action: Any) -> Any:
        await self._give_way()
        return self.env.step(action)

    async def close(self) -> None:
        await self._give_way()
        self.closed += 1


def walk(**kwargs: Any) -> Async:
    return Async(Walk(**kwargs))


def broken(**kwargs: Any) -> Async:
    return Async(Broken(**kwargs))


def unseeded() -> Async:
    return Async(Unseeded())


def cartpole() -> Async:
    return Async(gymnasium.make("CartPole-v1"))


def counting() -> Async:
    return Async(Counting())


class Plain:
    """Spaces, and reset and step that do nothing but return."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(2, np.float32), {}

    async def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, False, False, {}


class Hangs(Plain):
    """Waits for ever in its step number `at`, but for the process that looked at its spaces and, later on, for all."""

    def __init__(self, marks: str, at: int = 40) -> None:
        self._mark, self._at, self._steps = Path(marks) / "hung", at, 0

    async def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == self._at:
            with contextlib.suppress(FileExistsError):
                with self._mark.open("x") as mark:  # by one alone: two workers come here at once
                    mark.write(str(os.getpid()))
                await asyncio.Event().wait()
        return np.zeros(2, np.float32), 1.0, self._steps % 10 == 0, False, {}
