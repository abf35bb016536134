"""Where the rows of each environment lie in a ring, whichever columns of rollouts they come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from aiorl.segments import Array, Rollout, Segment


class Lanes:
    """A ring [rows, envs] in which each environment has a lane, a column of its own, so that the row of a lane that was
    written before another is what happened before it. Lanes are written unevenly: a group of environments may be in a
    rollout twice, or not at all. Place p of the ring is row p // envs of lane p % envs."""

    def __init__(self, rows: int, envs: int) -> None:
        self.rows, self.envs = rows, envs
        self._every = np.arange(envs)
        self._owner = np.full(envs, -1)  # [envs] the environment whose rows are the newest of each lane
        self._written = np.zeros(envs, np.int64)  # [envs] rows ever written
        self._even = True  # whether all lanes have as many
        self.used = 0  # rows of the ring below which all that are in use lie

    def of(self, envs: Array) -> tuple[Array, Array]:
        """(lanes, whether the newest row there is the environment's own), [N] both, of different environments. One without
        a lane takes that of another one, with the fewest rows. Raises ValueError for more than there are lanes."""
        if len(envs) == self.envs and (known := envs == self._owner).all():
            return self._every, known
        if len(envs) > self.envs:
            raise ValueError(
                f"replay: a rollout of {len(envs)} environments, expected {self.envs} at most\n"
                f"  make it with room for them, envs = {len(envs)}"
            )
        lane_of = {env: lane for lane, env in enumerate(self._owner.tolist())}
        wanted = envs.tolist()
        free = sorted(set(range(self.envs)) - {lane_of.get(env) for env in wanted}, key=lambda i: (self._written[i], i))
        lanes = np.array([lane_of[env] if env in lane_of else free.pop(0) for env in wanted])
        known = self._owner[lanes] == envs
        self._owner[lanes] = envs
        return lanes, known

    def newest(self, lanes: Array) -> Array:
        """The places [N] of the newest rows; of a lane that is empty, of one that was never written."""
        return (self._written[lanes] - 1) % self.rows * self.envs + lanes

    def empty(self, lanes: Array) -> Array:
        """[N] bool: which were never written."""
        return self._written[lanes] == 0

    def oldest(self, lanes: Array, count: int) -> tuple[Array, Array]:
        """(lanes [F], places [count, F] of their oldest rows) of those lanes that are full."""
        full = lanes[self._written[lanes] >= self.rows]
        return full, self._next(full, count)

    def extend(self, lanes: Array, count: int) -> Array:
        """The places [count, N] of as many new rows, which are the newest from now on."""
        places = self._next(lanes, count)
        self._written[lanes] += count
        self._even &= len(lanes) == self.envs
        self.used = used_rows(self._written, self.rows)
        return places

    def _next(self, lanes: Array, count: int) -> Array:
        return (self._written[lanes] + np.arange(count)[:, None]) % self.rows * self.envs + lanes

    def generation(self, places: Array) -> Array:
        """How often the rows at `places` [N] have been overwritten."""
        rounds, head = divmod(self._written[0 if self._even else places % self.envs], self.rows)
        return rounds - (places >= head * self.envs)

    def state_dict(self) -> dict[str, Any]:
        return {"owner": self._owner.copy(), "written": self._written.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a state that has been checked in form."""
        self._owner, self._written = state["owner"].copy(), state["written"].copy()
        self._even = bool((self._written == self._written[0]).all())
        self.used = used_rows(self._written, self.rows)


def used_rows(written: Array, rows: int) -> int:
    return min(rows, int(written.max()))


def in_turn(rollout: Rollout) -> list[Rollout]:
    """A rollout as parts, the earlier before the later, in each of which an environment is once. Columns of one environment
    are in the order of time."""
    if len(rollout.segments) == 1 or len(set(rollout.envs.tolist())) == len(rollout.envs):
        return [rollout]
    parts: list[list[tuple[Segment, Array]]] = []
    seen = Counter[int]()  # how often each environment was there so far
    columns = np.split(rollout.envs, np.cumsum([segment.envs for segment in rollout.segments])[:-1])
    for segment, envs in zip(rollout.segments, columns, strict=True):
        turn = max(seen[env] for env in envs.tolist())
        seen.update(dict.fromkeys(envs.tolist(), 1))
        if turn == len(parts):
            parts.append([])
        parts[turn].append((segment, envs))
    return [
        Rollout(rollout.index, rollout.behaviour_version, tuple(s for s, _ in part), np.concatenate([e for _, e in part]))
        for part in parts
    ]
