"""Observations of a ring of rows, each stored once.

What a step led to is what the next row begins with, and a stack of frames is mostly what the rows before hold. So a row
keeps its newest frame alone, and says where the observation after it and the frame before it lie. Only what no row of the
ring shows is kept aside: the last observations of episodes and of the newest row, and the older frames of a stack that
does not follow from the row before (unless it repeats its newest frame, as at the begin of an episode).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aiorl.buffers.device import DeviceRows
from aiorl.buffers.storage import Rows
from aiorl.errors import ConfigError, EnvError
from aiorl.frames import stack_places
from aiorl.segments import Array, Column
from aiorl.trees import check_tree

Leaves = Mapping[str, Array]
Make = Callable[[int, Column], Rows | DeviceRows]


class Observations:
    """Observation leaves of `rows` x `envs` places; place p is of row p // envs, and lies behind place p - envs in time.

    Places from rows * envs on are those kept aside: as many as there have ever been at once. With `stack` > 1 each leaf
    has so many frames on its first axis, the oldest first.
    """

    def __init__(self, columns: Mapping[str, Column], rows: int, envs: int, stack: int, make: Make) -> None:
        self._stack, self._envs, self._places = stack, envs, rows * envs
        self._slots = slots_at_first(rows, envs)  # places aside
        frames = {name: frame_of(name, column, stack) for name, column in columns.items()}
        self._frames = {name: make(self._places + self._slots, frame) for name, frame in frames.items()}
        self._free = list(range(self._slots))  # those that are not in use, counted from the first one aside
        self._next = self._in_ring(np.arange(self._places) + envs)  # where the observation lies that a step led to
        # Where the frame before lies, or the same place if there is none.
        self._before = np.arange(self._places + self._slots if stack > 1 else 0)

    @staticmethod
    def nbytes_for(columns: Mapping[str, Column], rows: int, envs: int, stack: int) -> tuple[int, int]:
        """Bytes of the frames, and of what says how they belong together, at first: more may have to be kept aside."""
        frames = sum(frame_of(name, column, stack).nbytes for name, column in columns.items())
        places = rows * envs + slots_at_first(rows, envs)
        return places * frames, rows * envs * 8 + (places * 8 if stack > 1 else 0)

    @property
    def nbytes(self) -> int:
        return sum(rows.array.nbytes for rows in self._frames.values()) + self._next.nbytes + self._before.nbytes

    def close(self) -> None:
        """Let go of memory and files."""
        for rows in self._frames.values():
            rows.close()

    @property
    def kept_aside(self) -> int:
        """How many places are in use besides the ring."""
        return self._slots - len(self._free)

    def _in_ring(self, places: Array) -> Array:
        return places % self._places

    # -- reading -----------------------------------------------------------------------------------------------------

    def take(self, places: Array) -> dict[str, Any]:
        """Observations [N, …] of the rows at `places` [N], as the storage has them: arrays, or tensors on a device."""
        return self._take(places if self._stack == 1 else stack_places(self._before, places, self._stack))

    def take_next(self, places: Array) -> dict[str, Any]:
        """What the steps at `places` [N] led to, [N, …]."""
        after = self._next.take(places, mode="clip")
        if self._stack == 1:
            return self._take(after)
        # The frame after a step follows the step's own, whatever lies before it in the ring.
        older = stack_places(self._before, places, self._stack - 1)
        return self._take(np.column_stack([older, after]))

    def _take(self, places: Array) -> dict[str, Any]:
        return {name: rows.take(places) for name, rows in self._frames.items()}

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, places: Array, leaves: Leaves, follows: Array, valid: Array) -> None:
        """Store observations [T, B, …] at `places` [T, B], which follow each other.

        `follows` [T, B] says which belong to the episode of the row before, `valid` [T, B] which are steps at all.
        """
        self._release(places.reshape(-1))
        for name, leaf in leaves.items():
            self._frames[name].put(places, self._newest(name, leaf))
        self._next[places] = self._in_ring(places + self._envs)
        if self._stack > 1:
            self._before[places] = np.where(follows, self._in_ring(places - self._envs), places)
            t, b = np.nonzero(~follows & valid)
            self._keep_older(places[t, b], {name: leaf[t, b] for name, leaf in leaves.items()})

    def keep_next(self, places: Array, leaves: Leaves) -> None:
        """The steps at `places` [N] led to the observations [N, …], which no row shows."""
        self._put_next(places, {name: self._newest(name, leaf) for name, leaf in leaves.items()})

    def _put_next(self, places: Array, frames: Leaves) -> None:
        aside = self._reserve(len(places))
        for name, frame in frames.items():
            self._frames[name].put(aside, frame)
        self._next[places] = aside

    def join(self, places: Array) -> None:
        """What was kept aside as what the steps at `places` [N] led to is what the row behind them shows from now on."""
        self._give_back(self._next[places])
        self._next[places] = self._in_ring(places + self._envs)

    def compare(self, given: Leaves, read: Mapping[str, Any]) -> None:
        """Raise EnvError if stacks [N, k, …] as acting saw them are not those that are read."""
        read = on_host(read)
        for name, leaf in given.items():
            found = read[name]
            wrong = (leaf != found) & ~((leaf != leaf) & (found != found))  # NaN is like NaN here
            if wrong.any():
                frame = int(np.argwhere(wrong)[0, 1])
                raise EnvError(
                    f"stack mismatch: acting saw {name} whose frame {frame} of {self._stack} is not the one that was the "
                    f"newest {self._stack - 1 - frame} steps before\n  a stack holds the newest frames of one episode, the "
                    "oldest first: make it with aiorl.frames.Stack, and `begin` it at each reset"
                )

    def _newest(self, name: str, leaf: Array) -> Array:
        """The newest frames of observations with any axes in front."""
        if self._stack == 1:
            return leaf
        return leaf[(*[slice(None)] * (leaf.ndim - 1 - len(self._frames[name].row.shape)), -1)]

    def _keep_older(self, places: Array, stacks: Leaves) -> None:
        """Keep the older frames of stacks [N, k, …] that do not just repeat the newest."""
        repeats = np.ones(len(places), bool)
        for stack in stacks.values():
            repeats &= alike(stack[:, :-1], stack[:, -1:])
        self._put_older(places[~repeats], {name: stack[~repeats, :-1] for name, stack in stacks.items()})

    def _put_older(self, places: Array, older: Leaves) -> None:
        """Frames [N, k - 1, …] come before those at `places` [N]."""
        count = self._stack - 1
        aside = self._reserve(len(places) * count).reshape(len(places), count)
        for name, frames in older.items():
            self._frames[name].put(aside, frames)
        self._before[aside[:, :1]] = aside[:, :1]
        self._before[aside[:, 1:]] = aside[:, :-1]
        self._before[places] = aside[:, -1]

    # -- places aside ------------------------------------------------------------------------------------------------

    def _reserve(self, count: int) -> Array:
        """Places aside that are free, [count] int64."""
        if len(self._free) < count:
            more = max(count, self._slots // 2)
            self._free += range(self._slots, self._slots + more)
            self._slots += more
            for rows in self._frames.values():
                rows.grow(self._places + self._slots)
            if self._stack > 1:
                self._before = np.concatenate([self._before, np.zeros(more, np.int64)])
        left = len(self._free) - count
        slots = np.array(self._free[left:], np.int64)
        del self._free[left:]
        return slots + self._places

    def _give_back(self, places: Array) -> None:
        self._free += (places - self._places).tolist()

    def _release(self, places: Array) -> None:
        """The rows at `places` [N] are no more: nor is what was kept aside for them."""
        after = self._next[places]
        self._give_back(after[after >= self._places])
        if self._stack > 1:
            older = self._before[places]
            self._give_back(stack_places(self._before, older[older >= self._places], self._stack - 1).reshape(-1))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self, used: int) -> dict[str, Any]:
        """What the first `used` rows hold, as copies, frames where these are. It does not depend on where things are kept
        aside. Raises OSError if there is no room for the copies."""
        after, older = self._next[: used * self._envs], self._before[: used * self._envs]
        ends, begins = np.flatnonzero(after >= self._places), np.flatnonzero(older >= self._places)
        chains = stack_places(self._before, older[begins], max(1, self._stack - 1))
        return {
            "frames": {name: self._copy(rows, used) for name, rows in self._frames.items()},
            "after": {"at": ends} | on_host(self._take(after[ends])),
            "older": {"at": begins} | on_host(self._take(chains)),
        }

    def _copy(self, frames: Rows | DeviceRows, used: int) -> Array:
        copied = frames.copy(used * self._envs)
        return copied.reshape(used, self._envs, *copied.shape[1:])

    def load_state_dict(self, state: Mapping[str, Any], used: int, follows: Array, path: str) -> None:
        """`follows` [used * envs] bool as given to `put`. Raises ValueError naming the first mismatch."""
        places = used * self._envs
        self._check_state(state, used, path)
        self._release(np.arange(self._places))
        for name, rows in self._frames.items():
            rows.put(np.arange(places).reshape(used, self._envs), state["frames"][name])
        everywhere = np.arange(self._places)
        self._next = self._in_ring(everywhere + self._envs)
        if self._stack > 1:
            self._before[: self._places] = everywhere
            self._before[:places][follows] = self._in_ring(everywhere[:places][follows] - self._envs)
            self._put_older(state["older"]["at"], {name: state["older"][name] for name in self._frames})
        self._put_next(state["after"]["at"], {name: state["after"][name] for name in self._frames})

    def _check_state(self, state: Mapping[str, Any], used: int, path: str) -> None:
        like: dict[str, Any] = {"frames": {n: _like(rows.row, used, self._envs) for n, rows in self._frames.items()}}
        for part, lead in (("after", ()), ("older", (max(1, self._stack - 1),))):
            count = _length(state, part)
            if count and part == "older" and self._stack == 1:
                raise ValueError(f"{path}.older: there are no stacks here")
            like[part] = {"at": np.zeros(count, np.int64)}
            for name, rows in self._frames.items():
                like[part][name] = _like(rows.row, count, *lead)
        check_tree(state, like, path)
        for part in ("after", "older"):
            at, places = state[part]["at"], used * self._envs
            if len(at) and not (at[0] >= 0 and at[-1] < places and (np.diff(at) > 0).all()):
                raise ValueError(f"{path}.{part}.at: expected places in order, below {places}")


def slots_at_first(rows: int, envs: int) -> int:
    """Places aside that need not be made later: what the newest row leads to, and ends of episodes of 64 steps."""
    return envs + rows * envs // 64


def on_host(leaves: Mapping[str, Any]) -> dict[str, Array]:
    """Observations as arrays, wherever they were taken from."""
    return {name: leaf if isinstance(leaf, np.ndarray) else leaf.cpu().numpy() for name, leaf in leaves.items()}


def alike(a: Array, b: Array) -> Array:
    """[N] bool: whether the values [N, …] are equal."""
    return (a == b).all(axis=tuple(range(1, a.ndim)))


def frame_of(name: str, column: Column, stack: int) -> Column:
    """What one place holds of an observation leaf. Raises ConfigError if the leaf is no stack of so many."""
    if stack == 1:
        return column
    if column.shape[:1] != (stack,):
        raise ConfigError(
            f"replay: {name} has the shape {list(column.shape)}, which does not begin with the stack of {stack} frames\n"
            "  put the frames on the first axis of every leaf, or set stack = 1"
        )
    return Column(column.shape[1:], column.dtype)


def _like(row: Column, *lead: int) -> Array:
    """Something of the shape and dtype of so many rows, without their memory."""
    return np.broadcast_to(np.zeros((), row.dtype), (*lead, *row.shape))


def _length(state: Mapping[str, Any], part: str) -> int:
    """How many places a part of a state has, if it has any."""
    at = state[part].get("at") if isinstance(state.get(part), Mapping) else None
    return len(at) if isinstance(at, np.ndarray) and at.ndim else 0
