"""A ring of the newest transitions, and how many gradient steps they call for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from aiorl.envs.spaces import Spaces
from aiorl.returns import n_step
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree


def gradient_steps_owed(env_steps: int, warmup: int, update_ratio: float) -> int:
    """Gradient steps to have done in all once `env_steps` transitions are stored: floor((env_steps - warmup) * ratio).

    `update_ratio` counts as the decimal that it is written as, so 0.29 * 100 makes 29 and nothing is lost over time.
    """
    return max(0, env_steps - warmup) * Fraction(str(update_ratio)) // 1


@dataclass(frozen=True)
class Batch:
    """n-step transitions: the target of `action` in `obs` is returns + discounts * V(next_obs)."""

    obs: dict[str, Array]
    """Observation leaves [N, …] as the environment gave them."""
    action: Array
    """[N, …]"""
    returns: Array
    """[N] float64: discounted rewards of the steps that count."""
    discounts: Array
    """[N] float64: gamma to the number of those steps, or 0 after termination."""
    next_obs: dict[str, Array]
    """[N, …] what the last of those steps led to."""


class Replay:
    """The newest rows of experience, [rows, B]; B environments side by side, time running on from rollout to rollout.

    Each row keeps the observation its step led to as well, so nothing needs to be known about its neighbours, and an
    n-step window that may not go on is cut short and bootstraps where it was cut. It may not go on past an episode's end,
    past the newest row, or into a row that does not follow: one that is not valid, or a rollout that does not begin where
    this column's last one ended. Rows that are not valid are never sampled.
    """

    def __init__(self, spaces: Spaces, envs: int, capacity: int) -> None:
        """`capacity` is in transitions, rounded down to whole rows (one at least)."""
        self.envs, self.rows = envs, max(1, capacity // envs)
        self.env_steps = 0  # valid transitions ever added
        self._size = self._head = 0  # rows in use; where the next one goes
        columns = {"action": spaces.action_column, "reward": Column((), "float64")}
        columns |= dict.fromkeys(("terminated", "cut", "valid"), Column((), "bool"))
        self._columns = {name: self._empty(column) for name, column in columns.items()}
        self._obs = {name: self._empty(column) for name, column in spaces.obs_columns.items()}
        self._next_obs = {name: self._empty(column) for name, column in spaces.obs_columns.items()}
        self._follows = np.full(envs, -1)  # which environment each column of the newest row came from
        self._sampleable = np.zeros(0, np.int64)

    def _empty(self, column: Column) -> Array:
        return np.zeros((self.rows, self.envs, *column.shape), column.dtype)

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return len(self._sampleable)

    def add(self, rollout: Rollout) -> None:
        """Store a rollout [T, B] over the oldest rows. Of one longer than the ring, the end is kept."""
        obs, next_obs = rollout.obs, rollout.next_obs()
        columns = {name: rollout.column(name) for name in ("action", "reward", "terminated", "valid")}
        columns["cut"] = columns["terminated"] | rollout.column("truncated")
        self._join(rollout, obs)
        kept = slice(max(0, rollout.steps - self.rows), rollout.steps)
        at = (self._head + np.arange(kept.stop - kept.start)) % self.rows
        for name, ring in self._columns.items():
            ring[at] = columns[name][kept]
        for name in self._obs:
            self._obs[name][at] = obs[name][:-1][kept]
            self._next_obs[name][at] = next_obs[name][kept]
        self._head = (self._head + len(at)) % self.rows
        self._size = min(self.rows, self._size + len(at))
        self._follows = np.array(rollout.envs)
        self.env_steps += rollout.env_steps
        self._index()

    def _join(self, rollout: Rollout, obs: Mapping[str, Array]) -> None:
        """Cut the newest row's windows where this rollout does not go on from it."""
        if not self._size:
            return
        newest = self._head - 1
        goes_on = (self._follows == rollout.envs) & ~rollout.aborted
        for name, leaf in obs.items():
            same = self._next_obs[name][newest] == leaf[0]
            goes_on &= same.reshape(self.envs, -1).all(1)
        self._columns["cut"][newest] |= ~goes_on

    def _index(self) -> None:
        self._sampleable = np.flatnonzero(self._columns["valid"][: self._size])

    def sample(self, rng: np.random.Generator, size: int, *, n: int = 1, gamma: float = 1.0) -> Batch:
        """`size` transitions, uniformly and with repetition, with returns over at most `n` steps."""
        return self.gather(self._sampleable[rng.integers(len(self._sampleable), size=size)], n, gamma)

    def gather(self, index: Array, n: int, gamma: float) -> Batch:
        """The n-step transitions that begin at `index` [N] (row * B + column)."""
        columns = {name: ring.reshape(-1, *ring.shape[2:]) for name, ring in self._columns.items()}
        if n == 1:  # each row knows what it led to
            end, returns = index, columns["reward"].take(index)
            discounts = gamma * ~columns["terminated"].take(index)
        else:
            end, returns, discounts = self._windows(index, n, gamma, columns)
        return Batch(
            obs={name: _rows(ring, index) for name, ring in self._obs.items()},
            action=columns["action"].take(index, 0),
            returns=returns,
            discounts=discounts,
            next_obs={name: _rows(ring, end) for name, ring in self._next_obs.items()},
        )

    def _windows(self, index: Array, n: int, gamma: float, columns: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """Where the windows of at most `n` steps that begin at `index` [N] end, their returns and discounts, [N] each."""
        row, env = np.divmod(index, self.envs)
        window = (row + np.arange(n)[:, None]) % self.rows
        at = window * self.envs + env
        last = columns["cut"].take(at) | (window == (self._head - 1) % self.rows)
        last[:-1] |= ~columns["valid"].take(at[1:])
        returns, discounts, steps = n_step(columns["reward"].take(at), columns["terminated"].take(at), last, gamma=gamma)
        return at[steps - 1, np.arange(len(index))], returns, discounts

    def state_dict(self) -> dict[str, Any]:
        """All rows in use, as copies."""
        used = slice(self._size)
        return {
            "rows": self.rows, "size": self._size, "head": self._head, "env_steps": self.env_steps,
            "follows": self._follows.copy(),
            "columns": {name: ring[used].copy() for name, ring in self._columns.items()},
            "obs": {name: ring[used].copy() for name, ring in self._obs.items()},
            "next_obs": {name: ring[used].copy() for name, ring in self._next_obs.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], path: str = "replay") -> None:
        """Raises ValueError naming the first mismatch; the ring must have as many rows as the one saved."""
        size, head = state.get("size"), state.get("head")
        if state.get("rows") != self.rows:
            raise ValueError(f"{path}.rows: this ring has {self.rows}, the one saved {state.get('rows')}")
        if not isinstance(size, int) or not isinstance(head, int) or not 0 <= head < self.rows or not 0 <= size <= self.rows:
            raise ValueError(f"{path}: size {size} and head {head} do not fit {self.rows} rows")
        groups = {"columns": self._columns, "obs": self._obs, "next_obs": self._next_obs}
        like = {"rows": 0, "size": 0, "head": 0, "env_steps": 0, "follows": self._follows}
        like |= {group: {name: ring[:size] for name, ring in rings.items()} for group, rings in groups.items()}
        check_tree(state, like, path)
        for group, rings in groups.items():
            for name, ring in rings.items():
                ring[:size] = state[group][name]
        self._size, self._head, self.env_steps = size, head, state["env_steps"]
        self._follows = np.array(state["follows"])
        self._index()


def _rows(ring: Array, at: Array) -> Array:
    """Rows [N, …] of a ring [rows, B, …], by row * B + column."""
    return ring.reshape(-1, *ring.shape[2:]).take(at, 0)
