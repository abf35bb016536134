"""Environments that show their newest `k` observations, the newest last, on a new first axis of each leaf.

How a stack is filled when an episode begins is for `aiorl.frames` to say, here and in replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

from aiorl.envs.contract import ObsReader
from aiorl.envs.coroutines import is_async
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.frames import Stack, stack_places
from aiorl.segments import Array

if TYPE_CHECKING:
    from aiorl.envs.coroutines import AsyncEnv


def stacked(env: Any, k: int) -> Any:
    """A single environment, also an async one, with its observations stacked. Raises ConfigError where they cannot be."""
    return AsyncStacked(env, k) if is_async(env) else Stacked(env, k)


def stack_space(space: Any, k: int) -> Any:
    """Of `k` observations. gymnasium's own would make a Box of a MultiDiscrete: plain numbers, no choices any more."""
    match space:
        case gymnasium.spaces.MultiDiscrete():
            nvec, start = (np.stack([x] * k) for x in (space.nvec, space.start))
            return gymnasium.spaces.MultiDiscrete(nvec, space.dtype, start=start)
        case gymnasium.spaces.Dict():
            return gymnasium.spaces.Dict({key: stack_space(part, k) for key, part in space.items()})
        case gymnasium.spaces.Tuple():
            return gymnasium.spaces.Tuple([stack_space(part, k) for part in space])
        case _:
            return batch_space(space, k)


class _Stacks:
    """The stacks of one environment's observations, nested as these are."""

    def __init__(self, observation_space: Any, action_space: Any, k: int) -> None:
        self._spaces = spaces_of(observation_space, action_space)
        self._read = ObsReader(self._spaces.observation).read
        self._leaves = [Stack(k, leaf.shape, leaf.dtype) for leaf in self._spaces.observation]

    def begin(self, obs: Any) -> Any:
        leaves = zip(self._leaves, self._read(obs), strict=True)
        return nested(self._spaces, [stack.begin(leaf) for stack, leaf in leaves])

    def push(self, obs: Any) -> Any:
        leaves = zip(self._leaves, self._read(obs), strict=True)
        return nested(self._spaces, [stack.push(leaf) for stack, leaf in leaves])


class Stacked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises BrokenContract if an observation is not of its space."""

    def __init__(self, env: gymnasium.Env[Any, Any], k: int) -> None:
        super().__init__(env)
        self._stacks = _Stacks(env.observation_space, env.action_space, k)
        self.observation_space = stack_space(env.observation_space, k)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._stacks.begin(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._stacks.push(obs), reward, terminated, truncated, info


class AsyncStacked:
    """The same for an `AsyncEnv`."""

    def __init__(self, env: AsyncEnv, k: int) -> None:
        self.env, self.action_space = env, env.action_space
        self._stacks = _Stacks(env.observation_space, env.action_space, k)
        self.observation_space = stack_space(env.observation_space, k)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = await self.env.reset(seed=seed, options=options)
        return self._stacks.begin(obs), info

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = await self.env.step(action)
        return self._stacks.push(obs), reward, terminated, truncated, info

    def __getattr__(self, name: str) -> Any:
        """All else, `close` for one, is the environment's."""
        return getattr(self.env, name)


class VectorStacked(gymnasium.vector.VectorWrapper[Any, Any, Any]):
    """The same for a vector environment, in each autoreset mode.

    What it remembers are plain arrays, so that its state can be captured: the frames in a ring of `k` rows, [k * n, …].
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Any, Any, Any], k: int, mode: str) -> None:
        super().__init__(env)
        n, spaces = env.num_envs, spaces_of(env.single_observation_space, env.single_action_space)
        self._read = ObsReader(spaces.observation, (n,)).read
        self._read_one = ObsReader(spaces.observation).read
        self._nest = lambda values: nested(spaces, values)
        self.single_observation_space = stack_space(env.single_observation_space, k)
        self.observation_space = batch_space(self.single_observation_space, n)
        self._k, self._mode = k, mode
        self._frames = [np.zeros((k * n, *leaf.shape), leaf.dtype) for leaf in spaces.observation]
        self._before = np.arange(k * n)
        self._newest = np.arange(n)
        self._ended = np.zeros(n, bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask")  # which the environment may take away
        obs, info = self.env.reset(seed=seed, options=options)
        self._begin(np.ones(self.num_envs, bool) if mask is None else np.asarray(mask), self._read(obs))
        self._ended[:] = False
        return self._nest(self._stacks()), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        leaves, ended = self._read(obs), np.logical_or(terminated, truncated)
        if self._mode == "NEXT_STEP":
            self._push(leaves)
            self._begin(self._ended, leaves)
            self._ended = ended
        elif self._mode == "SAME_STEP" and ended.any():
            info = {**info, "final_obs": self._finals(leaves, ended, info.get("final_obs"))}
            self._begin(ended, leaves)
        else:
            self._push(leaves)
        return self._nest(self._stacks()), reward, terminated, truncated, info

    def _finals(self, leaves: list[Array], ended: Array, finals: Any) -> Any:
        """Push, and return the stacks that episodes `ended` with: one object for each environment, None where it goes on."""
        last = [leaf.copy() for leaf in leaves]
        for i in np.flatnonzero(ended) if finals is not None else ():
            final = self._final(finals, i)
            for leaf, value in zip(last, final, strict=True):
                leaf[i] = value
        self._push(last)
        if finals is None:
            return None  # the caller says what is missing
        stacks, found = self._stacks(), np.full(self.num_envs, None, object)
        for i in np.flatnonzero(ended):
            found[i] = self._nest([stack[i] for stack in stacks])
        return found

    def _final(self, finals: Any, i: Any) -> list[Array]:
        if isinstance(finals, np.ndarray) and finals.dtype == object:
            return self._read_one(finals[i])
        return [leaf[i] for leaf in self._read(finals)]

    def _push(self, leaves: list[Array]) -> None:
        """The newest frames of all."""
        place = (self._newest + self.num_envs) % len(self._before)
        self._before[place], self._newest = self._newest, place
        for frames, leaf in zip(self._frames, leaves, strict=True):
            frames[place] = leaf

    def _begin(self, mask: Array, leaves: list[Array]) -> None:
        """Where `mask` [n], the newest frame is the first of an episode."""
        at = self._newest[mask]
        self._before[at] = at
        for frames, leaf in zip(self._frames, leaves, strict=True):
            frames[at] = leaf[mask]

    def _stacks(self) -> list[Array]:
        """[n, k, …] for each leaf."""
        places = stack_places(self._before, self._newest, self._k)
        return [frames.take(places, 0) for frames in self._frames]


def nested(spaces: Spaces, values: list[Array]) -> Any:
    """An observation as the environment nests it, of one value for each leaf."""
    if not spaces.observation[0].path:
        return values[0]
    tree: dict[Any, Any] = {}
    for leaf, value in zip(spaces.observation, values, strict=True):
        at = tree
        for key in leaf.path[:-1]:
            at = at.setdefault(key, {})
        at[leaf.path[-1]] = value
    return _tuples(tree)


def _tuples(tree: Any) -> Any:
    """Branches whose keys are places become tuples."""
    if not isinstance(tree, dict):
        return tree
    branches = {key: _tuples(value) for key, value in cast("Mapping[Any, Any]", tree).items()}
    return tuple(branches.values()) if isinstance(next(iter(branches)), int) else branches
