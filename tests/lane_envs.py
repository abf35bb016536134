"""Environments that tell whether a worker's groups step side by side; workers import them by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
from run_envs import Counting

PATIENCE_S = 30.0  # for others that ought to come


class Process:
    """What the environments of one process share."""

    lock = threading.Lock()
    inside = 0
    most = 0
    meeting: threading.Barrier | None = None
    async_meeting: asyncio.Barrier | None = None


class Meeting(Counting):
    """The first step of each environment in a process waits for that of `together` environments.

    It also keeps to its thread: to be made, reset, stepped and closed on different ones is an error.
    """

    def __init__(self, together: int, length: int = 7) -> None:
        super().__init__(length)
        self._together, self._met, self._thread = together, False, threading.get_ident()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._check()
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._check()
        if not self._met:
            with Process.lock:
                Process.meeting = Process.meeting or threading.Barrier(self._together)
            Process.meeting.wait(PATIENCE_S)
            self._met = True
        return super().step(action)

    def close(self) -> None:
        self._check()

    def _check(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError("called on another thread than the one that made it")


class Crowded(Meeting):
    """Leaves in `folder` files named after how many steps ran at the same time."""

    def __init__(self, folder: str, together: int) -> None:
        super().__init__(together)
        self._folder = Path(folder)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        with Process.lock:
            Process.inside += 1
            (self._folder / str(Process.inside)).touch()
        try:
            return super().step(action)
        finally:
            with Process.lock:
                Process.inside -= 1


class AsyncCounting:
    """As `Counting`, but its steps give way; the first step in each environment waits for those of `together` others."""

    observation_space = Counting.observation_space
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, together: int = 0, length: int = 7) -> None:
        self._env, self._together, self._met = Counting(length), together, together < 2

    async def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        await asyncio.sleep(0)  # others run
        return self._env.reset(seed=seed)

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._met:
            Process.async_meeting = Process.async_meeting or asyncio.Barrier(self._together)
            async with asyncio.timeout(PATIENCE_S):
                await Process.async_meeting.wait()
            self._met = True
        await asyncio.sleep(0)  # others run
        return self._env.step(action)

    async def close(self) -> None:
        pass


class AsyncCrowded(AsyncCounting):
    """Leaves in `folder` files named after how many steps and resets ran at the same time."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)

    async def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        with self._inside():
            return await super().reset(seed=seed)

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        with self._inside():
            return await super().step(action)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        Process.inside += 1
        (self._folder / str(Process.inside)).touch()
        yield
        Process.inside -= 1


class Gated(Counting):
    """Its first step in a worker leaves the file `in` in `folder` and waits until there is a file `out`."""

    def __init__(self, folder: str, pid: int) -> None:
        super().__init__()
        self._folder, self._pid = Path(folder), pid

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if os.getpid() != self._pid and not (self._folder / "out").exists():
            (self._folder / "in").touch()
            while not (self._folder / "out").exists():
                time.sleep(0.001)  # the fault itself: a step that blocks
        return super().step(action)


class AsyncForever(AsyncCounting):
    """One step never ends, in the `at`-th step of the first environment to get there in a worker."""

    def __init__(self, folder: str, pid: int, at: int) -> None:
        super().__init__()
        self._folder, self._pid, self._at, self._steps = Path(folder), pid, at, 0

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._steps == self._at and os.getpid() != self._pid:
            try:
                (self._folder / "hung").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                await asyncio.Event().wait()
        return await super().step(action)


