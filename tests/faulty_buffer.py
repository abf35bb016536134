"""A replay buffer that is right but for its flaw: a ring of rows with n-step windows, written for being read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from aiorl.buffers.batch import Batch, Sequences
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Rollout
from aiorl.testing.transition_checks import STEPS

COLUMNS = ("action", "reward", "terminated", "truncated", "valid", "obs", "next_obs")


class RingBuffer:
    """Each environment has a ring of its own. `flaw` is what is wrong with it; "" for nothing."""

    def __init__(self, spaces: Spaces, envs: int, capacity: int, flaw: str = "") -> None:
        self.envs, self.rows, self.flaw = envs, capacity // envs, flaw
        self.written = np.zeros(envs, np.int64)  # rows ever written
        self.ring: dict[str, Array] = {"given_up": np.zeros((self.rows, envs), bool)}

    def __len__(self) -> int:
        held = int(self._held().sum())
        return {"own copy": 0, "counts too much": int(self.written.sum())}.get(self.flaw, held)

    def add(self, rollout: Rollout) -> None:
        obs, after = (next(iter(leaves.values())) for leaves in (rollout.obs, rollout.next_obs()))
        given = {name: rollout.column(name) for name in COLUMNS[:5]} | {"obs": obs[:-1], "next_obs": after}
        for column, env in enumerate(rollout.envs.tolist()):
            env = column if self.flaw == "goes by columns" else env
            if rollout.aborted[column] and self.flaw != "does not see what was given up":
                self.ring["given_up"][(self.written[env] - 1) % self.rows, env] = True
            for t in range(rollout.steps):
                self._put(env, {name: values[t, column] for name, values in given.items()}, t == rollout.steps - 1)

    def _put(self, env: int, row: dict[str, Any], last: bool) -> None:
        at = self.written[env] % self.rows
        for name, value in (row | {"given_up": np.zeros((), bool)}).items():
            if self.flaw == "(1, F)" and name in ("obs", "next_obs"):
                value = value[None]
            if self.flaw == "clears history" and name == "next_obs" and last:
                value = np.zeros_like(value)
            ring = self.ring.setdefault(name, np.zeros((self.rows, self.envs, *value.shape), value.dtype))
            if not (self.flaw == "torn" and name == "action" and self.written[env] % 4 == 3):  # what was there before stays
                ring[at, env] = value
        self.written[env] += 1

    def _held(self) -> Array:
        """[rows, envs] bool"""
        if "valid" not in self.ring:
            return np.zeros((self.rows, self.envs), bool)
        row = np.arange(self.rows)[:, None]
        valid = self.ring["valid"] | (self.flaw == "samples what is no step")
        if self.flaw == "unlocked size":
            valid = valid | (row == self.written)  # the row that is being written
        if self.flaw == "forgets some":
            valid = valid & (row >= np.minimum(self.written, self.rows) // 4)
        return valid & (row < self.written + (self.flaw == "unlocked size"))

    def _draw(self, rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        places = np.argwhere(self._held())
        row, env = places[rng.integers(len(places), size=size)].T
        if self.flaw == "biased":
            again = places[rng.integers(len(places), size=size)].T
            row, env = np.where(row == self.rows // 2, again, (row, env))
        return row, env

    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float, beta: float = 1.0) -> Batch:
        row, env = self._draw(rng, size)
        window = (row + np.arange(n)[:, None]) % self.rows
        steps = self._steps(window, env, n)
        last = window[steps - 1, np.arange(size)]
        reward, within = self.ring["reward"][window, env], np.arange(n)[:, None] < steps
        returns = (reward * within * gamma ** np.arange(n)[:, None]).sum(0)
        discounts = gamma**steps * ~self.ring["terminated"][last, env]
        if self.flaw == "reward of one step":
            returns = reward[0]
        if self.flaw == "gamma of one step":
            discounts = np.where(discounts > 0, gamma, 0.0)
        if self.flaw == "truncation is the end":
            discounts = discounts * ~self.ring["truncated"][last, env]
        if self.flaw == "termination goes on":
            discounts = gamma**steps
        return Batch(
            obs={"obs": self.ring["obs"][row, env]}, action=self.ring["action"][row, env], returns=returns,
            discounts=discounts, next_obs={"obs": self.ring["next_obs"][last, env]}, index=row * self.envs + env,
            generation=(self.written[env] - 1 - row) // self.rows, weights=self._weights(row, env, beta),
        )  # fmt: skip

    def _weights(self, row: Array, env: Array, beta: float) -> Array:
        return np.ones(len(row))

    def _steps(self, window: Array, env: Array, n: int) -> Array:
        """How many steps each window [n, N] has: up to an end of an episode, a row that is none, or the newest row."""
        stops = [self.ring[name][window, env] for name in ("terminated", "truncated", "given_up")]
        stop = np.logical_or.reduce(stops)
        if self.flaw == "crosses episodes":
            stop[...] = False
        if self.flaw != "goes on into what is no step":
            stop[:-1] |= ~self.ring["valid"][window, env][1:]
        if self.flaw != "crosses the head":
            stop |= window == (self.written[env] - 1) % self.rows
        return np.where(stop.any(0), stop.argmax(0) + 1, n)

    def state_dict(self) -> dict[str, Any]:
        used = int(min(self.rows, self.written.max()))
        return {"ring": {name: column[:used].copy() for name, column in self.ring.items()}, "written": self.written.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.written = np.maximum(self.written, state["written"]) if self.flaw == "keeps its size" else state["written"]
        for name, column in state["ring"].items():
            ring = self.ring.setdefault(name, np.zeros((self.rows, *column.shape[1:]), column.dtype))
            if not (self.flaw == "loads no ends" and name == "terminated"):
                ring[: len(column)] = column


class Prioritised(RingBuffer):
    """Draws in proportion to errors, to the power of 0.5; leaves those of rows that were overwritten as they are."""

    def __init__(self, spaces: Spaces, envs: int, capacity: int, flaw: str = "") -> None:
        super().__init__(spaces, envs, capacity, flaw)
        self.weight = np.zeros((self.rows, envs))

    def _put(self, env: int, row: dict[str, Any], last: bool) -> None:
        self.weight[self.written[env] % self.rows, env] = 1.0
        super()._put(env, row, last)

    def _draw(self, rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        chances = self._chances()
        if self.flaw == "draws uniformly":
            chances = np.where(chances > 0, 1.0, 0.0) / np.count_nonzero(chances)
        row, env = np.divmod(rng.choice(chances.size, size, p=chances.reshape(-1)), self.envs)
        return row, env

    def _chances(self) -> Array:
        chances = self.weight * self._held()
        return chances / chances.sum()

    def _weights(self, row: Array, env: Array, beta: float) -> Array:
        weights = (len(self) * self._chances()[row, env]) ** -beta
        if self.flaw == "weights of all rows":
            return weights
        return np.ones(len(row)) if self.flaw == "has no weights" else weights / weights.max()

    def reprioritise(self, batch: Batch, errors: Array) -> int:
        row, env = np.divmod(batch.index, self.envs)
        known = batch.generation == (self.written[env] - 1 - row) // self.rows
        if self.flaw == "stale priorities":
            known[:] = True
        if self.flaw == "takes none":
            known[:] = False
        self.weight[row[known], env[known]] = np.abs(errors[known]) ** 0.5
        return int(np.count_nonzero(~known))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"weight": self.weight.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.weight = state["weight"].copy()


class Chains(RingBuffer):
    """Has sequences, too."""

    def _put(self, env: int, row: dict[str, Any], last: bool) -> None:
        before, begins = (self.written[env] - 1) % self.rows, self.written[env] == 0
        if not begins:
            begins = any(self.ring[name][before, env] for name in ("terminated", "truncated", "given_up"))
        super()._put(env, row | {"begins": np.array(begins)}, last)

    def sequences(self, rng: np.random.Generator, size: int, length: int) -> Sequences:
        row, env = self._draw(rng, size)
        at = (row + np.arange(length)[:, None]) % self.rows
        rows = {name: column[at, env] for name, column in self.ring.items()}
        if self.flaw == "goes on elsewhere":
            half = length // 2
            for name, column in self.ring.items():
                rows[name][half:] = column[at, (env + 1) % self.envs][half:]
        goes_on = np.ones((length - 1, size), bool)
        if self.flaw != "sequences cross the head":
            goes_on &= at[:-1] != (self.written[env] - 1) % self.rows
        if self.flaw != "sequences hold what is no step":
            goes_on &= rows["valid"][1:]
        if self.flaw == "sequences are short":
            goes_on &= ~rows["begins"][1:]
        mask = np.ones((length, size), bool)
        mask[1:] = goes_on if self.flaw == "has holes" else np.logical_and.accumulate(goes_on)
        first = mask & rows["begins"]
        if self.flaw == "ends untold":
            first[1:] = False
        if self.flaw == "cuts are begins":
            first[0] = True
        if self.flaw == "rewards of the step before":
            rows["reward"] = self.ring["reward"][at - 1, env]
        return Sequences(
            obs={"obs": rows["obs"]}, action=rows["action"], reward=rows["reward"], terminated=rows["terminated"],
            truncated=rows["truncated"], next_obs={"obs": rows["next_obs"]}, first=first, mask=mask,
            index=row * self.envs, generation=row, weights=np.ones(size),
        )  # fmt: skip


class Stacks(RingBuffer):
    """Keeps single frames and makes stacks of them when it is asked; finds its frames by time, which they hold."""

    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float, beta: float = 1.0) -> Batch:
        batch = super().sample(rng, size, n=n, gamma=gamma, beta=beta)
        return replace(batch, obs={"obs": self._spoilt(batch.obs["obs"])})

    def _spoilt(self, stacks: Array) -> Array:
        stacks, k = stacks.copy(), stacks.shape[1]
        times, env = stacks[:, -1, 0].astype(int) - 1, stacks[:, -1, 1].astype(int) - 1
        if self.flaw == "clears its history":  # with each rollout
            for back in range(1, k):
                late = times % STEPS < back
                stacks[late, k - 1 - back] = stacks[late, k - back]
        if self.flaw == "stacks across ends":
            for back in range(1, k):
                held = times - back >= np.maximum(0, self.written[env] - self.rows)
                stacks[held, k - 1 - back] = self.ring["obs"][(times[held] - back) % self.rows, env[held], -1]
        if self.flaw == "newest first":
            stacks[:, :-1] = stacks[:, -2::-1]
        if self.flaw == "stacks fewer":
            stacks = stacks[:, 1:]
        return stacks
