"""Single environments whose every answer is checked, and batches of them: stepped one by one, or side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol, TypeVar, cast

from aiorl.envs.contract import (
    CRASHES,
    BrokenContract,
    ObsReader,
    crashed,
    flag,
    real,
    reset_obs,
    step_parts,
)
from aiorl.envs.coroutines import ASYNC_CRASHES, close, is_own_end, together
from aiorl.envs.spaces import Spaces
from aiorl.errors import EnvError
from aiorl.segments import Array

T = TypeVar("T")

Outcome = tuple[float, bool, bool]
"""(reward, terminated, truncated)."""

Limit = AbstractContextManager[Any]
"""Held while a step or reset runs: a semaphore, so that not more of them run at once than it allows."""

AsyncLimit = AbstractAsyncContextManager[Any]


class Checked:
    """One environment, where it is, and the checks on what it returns. `outcome` is that of the episode that ended last.

    Observations are written to place `i` of `rows`, one array [n, …] for each leaf, so it does not matter whether the
    environment uses its buffers again.
    """

    def __init__(self, env: Any, spaces: Spaces, index: int) -> None:
        self.env, self.index = env, index
        self.episode, self.steps = -1, 0
        self.outcome = math.nan
        self._write = ObsReader(spaces.observation).write

    @property
    def where(self) -> str:
        return f"environment {self.index}, step {self.steps} of episode {self.episode}"

    def _begun(self, result: Any, rows: Sequence[Array], i: int) -> None:
        """Take what `reset` returned. Raises EnvError."""
        try:
            self._write(reset_obs(result), rows, i)
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None

    def _stepped(self, result: Any, rows: Sequence[Array], i: int) -> Outcome:
        """Take what `step` returned. Raises EnvError."""
        try:
            if type(result) is not tuple or len(result) != 5:
                result = step_parts(result)
            obs, reward, terminated, truncated, info = result
            if type(reward) is not float:
                reward = real(reward)
            if terminated is not False:
                terminated = flag(terminated, "terminated")
            if truncated is not False:
                truncated = flag(truncated, "truncated")
            self._write(obs, rows, i)
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None
        if terminated or truncated:
            self.outcome = outcome_of(info)
        return reward, terminated, truncated


def outcome_of(info: Any) -> float:
    """How an episode ended, from the `info` of its last step: more than 0 is won, less is lost, NaN if that is not told.

    It is told by a number or truth value under `outcome`, or under `is_success` as some environments have it.
    """
    told = cast("Mapping[Any, Any]", info) if isinstance(info, Mapping) else {}
    value = told.get("outcome", told.get("is_success"))
    try:
        return float(value) if not isinstance(value, str) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


class CheckedEnv(Checked):
    """A gymnasium environment."""

    def __init__(self, env: Any, spaces: Spaces, index: int, limit: Limit | None = None) -> None:
        super().__init__(env, spaces, index)
        self._step, self._reset = within(limit, env.step), within(limit, env.reset)

    def reset(self, seed: int, episode: int, rows: Sequence[Array], i: int) -> None:
        """Begin an episode and write its first observation. Raises EnvError."""
        self.episode, self.steps = episode, 0
        try:
            result = self._reset(seed=seed)
        except CRASHES as error:
            raise crashed(self.where, f"reset(seed={seed})", error) from error
        self._begun(result, rows, i)

    def step(self, action: Any, rows: Sequence[Array], i: int) -> Outcome:
        """Step, write the observation, and return (reward, terminated, truncated). Raises EnvError."""
        self.steps += 1
        try:
            result = self._step(action)
        except CRASHES as error:
            raise crashed(self.where, f"step({action!r})", error) from error
        return self._stepped(result, rows, i)

    def close(self) -> None:
        # Nothing can be lost any more, and the other environments must be closed too.
        with contextlib.suppress(Exception):
            self.env.close()


class CheckedAsyncEnv(Checked):
    """An `AsyncEnv`; its methods are coroutines, otherwise as in `CheckedEnv`."""

    def __init__(self, env: Any, spaces: Spaces, index: int, limit: AsyncLimit | None = None) -> None:
        super().__init__(env, spaces, index)
        self._step, self._reset = _within_async(limit, env.step), _within_async(limit, env.reset)

    async def reset(self, seed: int, episode: int, rows: Sequence[Array], i: int) -> None:
        self.episode, self.steps = episode, 0
        try:
            result = await self._reset(seed=seed)
        except ASYNC_CRASHES as error:
            if is_own_end(error):
                raise
            raise crashed(self.where, f"reset(seed={seed})", error) from error
        self._begun(result, rows, i)

    async def step(self, action: Any, rows: Sequence[Array], i: int) -> Outcome:
        self.steps += 1
        try:
            result = await self._step(action)
        except ASYNC_CRASHES as error:
            if is_own_end(error):
                raise
            raise crashed(self.where, f"step({action!r})", error) from error
        return self._stepped(result, rows, i)

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await close(self.env)


def within(limit: Limit | None, call: Callable[..., T]) -> Callable[..., T]:
    """`call`, made while `limit` is held."""
    if limit is None:
        return call

    def limited(*args: Any, **kwargs: Any) -> T:
        with limit:
            return call(*args, **kwargs)

    return limited


def _within_async(
    limit: AsyncLimit | None, call: Callable[..., Coroutine[Any, Any, T]]
) -> Callable[..., Coroutine[Any, Any, T]]:
    if limit is None:
        return call

    async def limited(*args: Any, **kwargs: Any) -> T:
        async with limit:
            return await call(*args, **kwargs)

    return limited


# -- batches -----------------------------------------------------------------------------------------------------------

Ends = list[tuple[int, bool, bool]]
"""Places whose episode ended with the step, in order: (place, terminated, truncated)."""

Start = tuple[int, int, int]
"""(place, seed, episode) to begin."""


class Batch(Protocol):
    """Environments that are stepped at once; places count from 0. Everything that may have to wait is a coroutine."""

    @property
    def envs(self) -> Sequence[Checked]: ...

    def add(self, env: Any, index: int) -> None:
        """Put a new environment of the global `index` at the next place."""
        ...

    async def step_all(self, places: Sequence[int], actions: Any, rows: Sequence[Array], rewards: Array) -> Ends:
        """Step `places`, each with its own of `actions`, and write `rows` and `rewards`. Raises EnvError."""
        ...

    async def step(self, i: int, action: Any, rows: Sequence[Array]) -> Outcome: ...

    async def reset_all(self, starts: Sequence[Start], rows: Sequence[Array]) -> None:
        """Begin episodes and write their first observations to `rows`. Raises EnvError."""
        ...

    async def all(self, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Do work on several places; the results in order."""
        ...

    async def close(self) -> None: ...


class OneByOne:
    """A batch of gymnasium environments, stepped one after the other: its coroutines never wait."""

    def __init__(self, spaces: Spaces, limit: Limit | None = None) -> None:
        self.envs: list[CheckedEnv] = []
        self._spaces, self._limit = spaces, limit

    def add(self, env: Any, index: int) -> None:
        self.envs.append(CheckedEnv(env, self._spaces, index, self._limit))

    async def step_all(self, places: Sequence[int], actions: Any, rows: Sequence[Array], rewards: Array) -> Ends:
        ends: Ends = []
        envs = self.envs
        for i in places:
            rewards[i], terminated, truncated = envs[i].step(actions[i], rows, i)
            if terminated or truncated:
                ends.append((i, terminated, truncated))
        return ends

    async def step(self, i: int, action: Any, rows: Sequence[Array]) -> Outcome:
        return self.envs[i].step(action, rows, i)

    async def reset_all(self, starts: Sequence[Start], rows: Sequence[Array]) -> None:
        for i, seed, episode in starts:
            self.envs[i].reset(seed, episode, rows, i)

    async def all(self, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        return [await one for one in work]

    async def close(self) -> None:
        while self.envs:
            self.envs.pop().close()


class SideBySide:
    """A batch of async environments, which all step at the same time."""

    def __init__(self, spaces: Spaces, limit: AsyncLimit | None = None) -> None:
        self.envs: list[CheckedAsyncEnv] = []
        self._spaces, self._limit = spaces, limit

    def add(self, env: Any, index: int) -> None:
        self.envs.append(CheckedAsyncEnv(env, self._spaces, index, self._limit))

    async def step_all(self, places: Sequence[int], actions: Any, rows: Sequence[Array], rewards: Array) -> Ends:
        outcomes = await together([self.envs[i].step(actions[i], rows, i) for i in places])
        ends: Ends = []
        for i, (reward, terminated, truncated) in zip(places, outcomes, strict=True):
            rewards[i] = reward
            if terminated or truncated:
                ends.append((i, terminated, truncated))
        return ends

    async def step(self, i: int, action: Any, rows: Sequence[Array]) -> Outcome:
        return await self.envs[i].step(action, rows, i)

    async def reset_all(self, starts: Sequence[Start], rows: Sequence[Array]) -> None:
        await together([self.envs[i].reset(seed, episode, rows, i) for i, seed, episode in starts])

    async def all(self, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        return await together(work)

    async def close(self) -> None:
        envs, self.envs = self.envs, []
        await together([env.close() for env in envs])


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    work.close()
    raise RuntimeError(f"{work.__qualname__} was to wait for nothing")
