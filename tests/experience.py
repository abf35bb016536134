"""Made-up experience for tests of buffers and learners."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from aiorl.algos.base import LearnerContext
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, SegmentLayout

BOX = gymnasium.spaces.Box(-10, 10, (3,), np.float32)


def spaces(action: Any = None, observation: Any = None) -> Spaces:
    """Three numbers to see and two actions, unless given."""
    return spaces_of(observation or BOX, action or gymnasium.spaces.Discrete(2))


def context(**changes: Any) -> LearnerContext:
    fields: dict[str, Any] = {"seed": 3, "envs": 4, "segment_length": 8, "rollouts": 10, "off_policy_degree": 0}
    return LearnerContext(**fields | changes)


def ends(
    rng: np.random.Generator, steps: int, envs: int, *, resets_take_a_row: bool = False, ended: Array | None = None
) -> dict[str, Array]:
    """Random ends of episodes [T, B]: terminated, truncated, valid.

    With `resets_take_a_row`, a row that is not valid follows each end, as from a NEXT_STEP vector environment; `ended`
    [B] says where the row before the first was one.
    """
    terminated = rng.random((steps, envs)) < 0.15
    truncated = rng.random((steps, envs)) < 0.15
    valid = np.ones((steps, envs), bool)
    if resets_take_a_row:
        before = np.zeros(envs, bool) if ended is None else ended
        for t in range(steps):
            valid[t] = ~before
            terminated[t] &= valid[t]
            truncated[t] &= valid[t]
            before = terminated[t] | truncated[t]
    return {"terminated": terminated, "truncated": truncated, "valid": valid}


class Stream:
    """Makes rollouts that follow each other. Every observation holds numbers that occur once: (time, env, kind).

    With `resets_take_a_row` the true next observation is always the next row, else ends have a final observation.
    `columns` are there besides the usual ones, all zeros.
    """

    def __init__(
        self, space: Spaces, envs: int, steps: int, *, resets_take_a_row: bool = False, seed: int = 0,
        columns: Mapping[str, Column] | None = None,
    ) -> None:  # fmt: skip
        self.space, self.envs, self.steps, self.takes_a_row = space, envs, steps, resets_take_a_row
        self.rng = np.random.default_rng(seed)
        self.index = 0
        every = {"action": space.action_column, "reward": Column((), "float64"), "log_prob": Column()}
        every |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]} | dict(columns or {})
        self._layout = SegmentLayout(steps, envs, space.obs_columns, every)
        self._ended = np.zeros(envs, bool)

    def next(self) -> Rollout:
        """A fresh rollout in memory of its own."""
        segment, rng, first = self._layout.allocate(), self.rng, self.index * self.steps
        (obs,) = segment.obs.values()
        obs[...] = [[(first + t, b, 0) for b in range(self.envs)] for t in range(self.steps + 1)]
        segment.columns["action"][...] = self.space.sample_actions(self.steps * self.envs, rng).reshape(
            self.steps, self.envs, *self.space.action_column.shape
        )
        segment.columns["reward"][...] = rng.normal(size=(self.steps, self.envs))
        segment.columns["log_prob"][...] = -rng.random((self.steps, self.envs))
        flags = ends(rng, self.steps, self.envs, resets_take_a_row=self.takes_a_row, ended=self._ended)
        for name, column in flags.items():
            segment.columns[name][...] = column
        ended = flags["terminated"] | flags["truncated"]
        self._ended = ended[-1]
        if not self.takes_a_row:
            for t, b in np.argwhere(ended).tolist():
                segment.add_final(t, b, {"obs": np.array([first + t + 1, b, 1])})
        rollout = Rollout(self.index, self.index, (segment,), np.arange(self.envs))
        self.index += 1
        return rollout


def digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a state tree."""
    sha = hashlib.sha256()
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            sha.update(f"{key}:{digest(value)}".encode())
        elif isinstance(value, np.ndarray):
            sha.update(f"{key}:{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            sha.update(f"{key}={value!r}".encode())
    return sha.hexdigest()
