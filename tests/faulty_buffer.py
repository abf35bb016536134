"""A replay buffer that is right but for its flaw: a ring of rows with n-step windows, written for being read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aiorl.buffers.replay import Batch
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Rollout
from aiorl.testing.buffer_checks import STEPS

COLUMNS = ("action", "reward", "terminated", "truncated", "obs", "next_obs")


class RingBuffer:
    """`flaw` is what is wrong with it; "" for nothing."""

    def __init__(self, spaces: Spaces, envs: int, capacity: int, flaw: str = "") -> None:
        self.envs, self.rows, self.flaw = envs, capacity // envs, flaw
        self.features, self.written = spaces.features, 0  # rows ever written
        self.ring: dict[str, Array] = {}
        self.generation = np.zeros(self.rows, np.int64)

    def __len__(self) -> int:
        size = min(self.written, self.rows) * self.envs
        return {"own copy": 0, "counts too much": self.written * self.envs}.get(self.flaw, size)

    def add(self, rollout: Rollout) -> None:
        obs, after = (next(iter(leaves.values())) for leaves in (rollout.obs, rollout.next_obs()))
        given = {name: rollout.column(name) for name in COLUMNS[:4]} | {"obs": obs[:-1], "next_obs": after}
        for t in range(rollout.steps):
            for name, column in given.items():
                value = column[t]
                if self.flaw == "(1, F)" and name in ("obs", "next_obs"):
                    value = value[:, None]
                if self.flaw == "clears history" and name == "next_obs" and t == rollout.steps - 1:
                    value = np.zeros_like(value)
                ring = self.ring.setdefault(name, np.zeros((self.rows, *value.shape), column.dtype))
                if not (self.flaw == "torn" and name == "action" and self.written % 4 == 3):  # what was there before stays
                    ring[self.written % self.rows] = value
            self.generation[self.written % self.rows] += 1
            self.written += 1

    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float) -> Batch:
        held = min(self.written, self.rows)
        if self.flaw == "unlocked size":
            held = min(held + 1, self.rows)  # the row that is being written
        low = held // 4 if self.flaw == "forgets some" else 0
        row, env = rng.integers(low, held, size), rng.integers(self.envs, size=size)
        if self.flaw == "biased":
            row = np.where(row == held // 2, rng.integers(low, held, size), row)
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
            discounts=discounts, next_obs={"obs": self.ring["next_obs"][last, env]}, **self._where(row, env),
        )  # fmt: skip

    def _steps(self, window: Array, env: Array, n: int) -> Array:
        """How many steps each window [n, N] has: up to an end of an episode, or the newest row."""
        stop = self.ring["terminated"][window, env] | self.ring["truncated"][window, env]
        if self.flaw == "crosses episodes":
            stop[...] = False
        if self.flaw != "crosses the head":
            stop |= window == (self.written - 1) % self.rows
        return np.where(stop.any(0), stop.argmax(0) + 1, n)

    def _where(self, row: Array, env: Array) -> dict[str, Array]:
        """Fields of a Batch that say where it comes from, if it has any."""
        known = {"index": row * self.envs + env, "generation": self.generation[row], "weights": np.ones(len(row))}
        return {name: value for name, value in known.items() if name in Batch.__dataclass_fields__}


class Prioritised(RingBuffer):
    """Takes priorities; a sound one leaves those of rows that were overwritten as they are."""

    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float) -> Batch:
        self.sampled = self.generation.copy()
        return super().sample(rng, size, n=n, gamma=gamma)

    def reprioritise(self, batch: Batch, errors: Array) -> int:
        stale = self.sampled != self.generation
        return 0 if self.flaw == "stale priorities" else int(len(errors) * stale.all())


class Stacks(RingBuffer):
    """Keeps single frames and makes stacks of them when it is asked; finds its frames by time, which they hold."""

    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float) -> Batch:
        batch = super().sample(rng, size, n=n, gamma=gamma)
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
                held = times - back >= max(0, self.written - self.rows)
                stacks[held, k - 1 - back] = self.ring["obs"][(times[held] - back) % self.rows, env[held], -1]
        if self.flaw == "newest first":
            stacks[:, :-1] = stacks[:, -2::-1]
        if self.flaw == "stacks fewer":
            stacks = stacks[:, 1:]
        return stacks
