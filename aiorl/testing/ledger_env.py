"""An environment whose every row proves itself, and a small algorithm to play it with.

An observation of `LedgerEnv` is an entry of a ledger, four float64: the seed its episode was reset with, the step t, the
action that led here (-1 at a reset) and the CRC-32 of these three. Reward, length and the way an episode ends are functions
of the entry. As aiorl seeds episode e of environment i with `episode_seed(root, i, e)`, whoever knows the root knows every
row that may ever be stored, up to the actions: a row that is torn, doubled, left out, or filed under another environment
cannot be explained, and `check_laws` says so. An environment that was brought back after a worker's death shows the same
entries to the last byte, so there is no count of restarts in them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import msgspec
import numpy as np

from aiorl.algos.base import LearnerContext, StateTree, Weights
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError
from aiorl.segments import Array, Column, Rollout

ACTIONS = 4
LONGEST = 24  # steps of an episode
ENTRY = 4  # float64 of an observation: seed, t, action, CRC-32


def entry(seed: int, t: int, action: int) -> Array:
    """The observation after `t` steps of the episode with this seed, the last of them `action` (-1: none yet)."""
    row = np.array([seed, t, action, 0], np.float64)
    row[3] = zlib.crc32(row[:3].tobytes())
    return row


def is_true(rows: Array) -> Array:
    """[N] bool: which of the observations [N, 4] carry the checksum of what they say."""
    data, width = np.ascontiguousarray(rows).tobytes(), ENTRY * 8
    sums = [zlib.crc32(data[at : at + 24]) for at in range(0, len(data), width)]
    return rows[:, 3] == np.array(sums, np.float64)


def rewards(seed: Array, t: Array, action: Array) -> Array:
    """What step number `t` (from 1 on) pays, [N] float64: a multiple of 1/8 from 0 to 15/8, so that sums are exact."""
    return (seed * 7 + t * 5 + action * 3) % 16 / 8.0


def length_of(seed: Array) -> Array:
    """Steps of the episode with this seed: 1 to LONGEST."""
    return 1 + seed % LONGEST


def is_cut(seed: Array) -> Array:
    """Whether it ends by truncation instead of termination."""
    return seed // LONGEST % 2 == 1


class LedgerEnv(gymnasium.Env[Array, Any]):
    """See the module. Episodes take 1 to LONGEST steps; half of them end by termination, half by truncation."""

    observation_space = gymnasium.spaces.Box(-1.0, 2.0**53, (ENTRY,), np.float64)
    action_space = gymnasium.spaces.Discrete(ACTIONS)

    def __init__(self) -> None:
        self._seed = self._t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        """Begin the episode that `seed` stands for (the next one if it is None)."""
        super().reset(seed=seed)
        self._seed, self._t = self._seed + 1 if seed is None else seed, 0
        return entry(self._seed, 0, -1), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Enter one more step."""
        self._t += 1
        chosen, seed = int(action), self._seed
        ended = self._t >= 1 + seed % LONGEST
        cut = ended and seed // LONGEST % 2 == 1
        reward = (seed * 7 + self._t * 5 + chosen * 3) % 16 / 8.0
        return entry(seed, self._t, chosen), reward, ended and not cut, cut, {}


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An algorithm in NumPy alone that learns nothing but remembers everything: its weights are a hash of all it was given.

    So each version has weights of its own, and two runs that differ in one row differ in every version after it.
    """

    name: ClassVar[str] = "mark"
    default_segment_length: ClassVar[int] = 8

    @property
    def corrects_staleness(self) -> bool:
        return True

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError(f"mark needs discrete actions, the environment has {spaces.action.kind}")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {}

    def policy(self, spaces: Spaces) -> MarkPolicy:
        return MarkPolicy(int(spaces.action.nvec[0]))

    def learner(self, spaces: Spaces, context: LearnerContext) -> MarkLearner:
        return MarkLearner(context.seed)


class MarkPolicy:
    """Acts by chance, and by its weights where there is none."""

    def __init__(self, actions: int) -> None:
        self._actions = actions
        self._rng: np.random.Generator | None = None
        self._weights: Array = np.zeros(1, np.uint32)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._weights, self._rng = weights["mark"], rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        shift = int(self._weights[0]) % self._actions
        if self._rng is None:
            return np.full(len(first), shift), {}
        return (self._rng.integers(0, self._actions, len(first)) + shift) % self._actions, {}


class MarkLearner:
    """Chains the CRC-32 of each rollout to that of all before it."""

    def __init__(self, seed: int) -> None:
        self._mark = np.full(64, seed % 2**32, np.uint32)

    def update(self, rollout: Rollout) -> dict[str, float]:
        crc = int(self._mark[0])
        for segment in rollout.segments:
            for array in (*segment.obs.values(), *(segment.columns[n] for n in ("action", "reward", "valid"))):
                crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        self._mark[:] = crc + np.arange(len(self._mark), dtype=np.uint32) * np.uint32(rollout.index + 1)
        return {"gradient_steps": 1.0}

    def weights(self) -> Weights:
        return {"mark": self._mark}

    def state_dict(self) -> StateTree:
        return {"mark": self._mark.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["mark"].shape != self._mark.shape:
            raise ValueError(f"mark: expected shape {self._mark.shape}, got {state['mark'].shape}")
        self._mark[...] = state["mark"]

    def set(self, **changes: float) -> None:
        if changes:
            raise ValueError(f"unknown setting {next(iter(changes))!r}")
