"""A ring of the newest transitions, and how many gradient steps they call for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.buffers.batch import Batch, Sequences
from aiorl.buffers.device import DeviceRows
from aiorl.buffers.lanes import Lanes, in_turn, used_rows
from aiorl.buffers.marks import Marks
from aiorl.buffers.observations import Observations, alike, on_host
from aiorl.buffers.priorities import Priorities, SumTree
from aiorl.buffers.storage import Rows, Storage
from aiorl.buffers.turn import Turn
from aiorl.envs.spaces import Spaces
from aiorl.returns import n_step
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree

# What is known of a row, as bits of one byte.
VALID = np.uint8(1)  # it is a transition
TERMINATED, TRUNCATED = np.uint8(2), np.uint8(4)
SEAM = np.uint8(8)  # what lies behind it did not happen after it
FOLLOWS = np.uint8(16)  # its observation is the one after the step of the row before
BEGINS = np.uint8(32)  # an episode begins with it or, if it is no transition, with the next row that is one
STOPS = TERMINATED | TRUNCATED | SEAM
GOES_ON = 1.0 - (np.arange(256) & TERMINATED != 0)  # by a row's byte: whether anything comes after it


def gradient_steps_owed(env_steps: int, warmup: int, update_ratio: float) -> int:
    """Gradient steps to have done in all once `env_steps` transitions are stored: floor((env_steps - warmup) * ratio).

    `update_ratio` counts as the decimal that it is written as, so 0.29 * 100 makes 29 and nothing is lost over time.
    """
    return max(0, env_steps - warmup) * Fraction(str(update_ratio)) // 1


class Replay:
    """The newest rows of experience of each of B environments, [rows, B], time running on from rollout to rollout.

    An n-step window follows its environment, whichever columns of rollouts that comes in. One that may not go on is cut
    short and bootstraps where it was cut. It may not go on past an episode's end, past the newest row, or into a row that
    does not follow: one that is not valid, or that does not begin where this environment's last segment ended. Rows that
    are not valid are never sampled, nor are those whose stack of frames is not held any more: at most stack - 1 of the
    oldest rows, for which the ring is that much longer.

    One thread at a time: rows are added and sampled by the learner alone, within its update, so no batch ever sees half of
    a rollout. That it is so is checked (InvariantError).
    """

    def __init__(
        self, spaces: Spaces, envs: int, capacity: int, *, stack: int | None = None, priority_exponent: float = 0.0,
        storage: Storage = "memory", directory: str | Path | None = None, device: str = "cpu",
        learned: Callable[[Array], Array] | None = None, columns: Mapping[str, Column] | None = None,
    ) -> None:  # fmt: skip
        """`capacity` is in transitions, rounded down to whole rows (one at least). Observations of a `stack` of frames
        (None: as `spaces` says) have them on the first axis of each leaf; every frame is stored once.

        With a `priority_exponent` rows are sampled by their priorities raised to it, else uniformly. With storage "disk"
        the observations lie in `directory`, in files without a name which vanish with `close` or the process; with "device"
        on `device`, and what is sampled of them are tensors there. Raises ConfigError if there is no room for them, or a
        leaf is no such stack. `learned` makes of rewards as they were what is sampled, each for itself. `columns` are
        those of the policy (`Algorithm.columns`) that are kept, in memory, and sampled with the rest.
        """
        _at_least_1("envs", envs)
        self.stack = spaces.stack if stack is None else stack
        self.envs, self.rows = envs, _rows(envs, capacity, self.stack)
        self.env_steps = 0  # valid transitions ever added
        self._lanes = Lanes(self.rows, envs)
        self._learned = learned
        places = self.rows * envs
        if storage == "device":
            make = partial(DeviceRows, device=device)
        else:
            make = partial(Rows, storage=storage, directory=directory)
        self._obs = Observations(spaces.obs_columns, self.rows, envs, self.stack, make)
        action = spaces.action_column
        self._action = np.zeros((places, *action.shape), action.dtype)
        self._reward, self._flags = np.zeros(places), np.zeros(places, np.uint8)
        self._own = {name: np.zeros((places, *c.shape), c.dtype) for name, c in (columns or {}).items()}
        self._marks = Marks(places)  # what can be sampled
        self._priorities = Priorities(places, priority_exponent) if priority_exponent else None
        self._turn, self._closed = Turn("replay"), False

    @staticmethod
    def nbytes_for(
        spaces: Spaces, envs: int, capacity: int, *, stack: int | None = None, priority_exponent: float = 0.0,
        storage: Storage = "memory", columns: Mapping[str, Column] | None = None,
    ) -> int:  # fmt: skip
        """Bytes of memory that a buffer takes once it is full, but for the last observations of episodes, and for those that
        lie elsewhere."""
        stack = spaces.stack if stack is None else stack
        rows = _rows(envs, capacity, stack)
        frames, links = Observations.nbytes_for(spaces.obs_columns, rows, envs, stack)
        places = rows * envs
        tree = SumTree.nbytes_for(places) if priority_exponent else 0
        own = sum(column.nbytes for column in (columns or {}).values())
        numbers = places * (spaces.action_column.nbytes + own + 8 + 1)
        return (frames if storage == "memory" else 0) + links + numbers + Marks.nbytes_for(places) + tree

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return len(self._marks)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, those on disk included."""
        arrays = self._obs.nbytes + sum(column.nbytes for column in self._columns().values()) + self._marks.nbytes
        return arrays + (self._priorities.nbytes if self._priorities else 0)

    def close(self) -> None:
        """Give memory and disk back now; of no use afterwards."""
        with self._turn.of("close"):
            self._obs.close()
            self._lanes, self._marks = Lanes(self.rows, self.envs), Marks(1)
            self._closed = True

    # -- adding ------------------------------------------------------------------------------------------------------

    def add(self, rollout: Rollout) -> None:
        """Store a rollout [T, B] over the oldest rows. Of one longer than the ring, the end is kept. Raises EnvError if
        observations are no stacks of the frames before them (a few are looked at), ValueError after `close` or if it is of
        more environments than the buffer."""
        with self._turn.of("add"):
            if self._closed:
                raise ValueError("replay: nothing can be added: it is closed")
            self._add(rollout)

    def _add(self, rollout: Rollout) -> None:
        for part in in_turn(rollout):
            self._add_part(part)
        self.env_steps += rollout.env_steps

    def _add_part(self, rollout: Rollout) -> None:
        """Add one in which no environment is twice."""
        obs, valid, steps = rollout.obs, rollout.column("valid"), rollout.steps
        t, b, final = rollout.finals()
        own = {name: rollout.column(name) for name in self._own}
        lanes, known = self._lanes.of(rollout.envs)
        begins = self._begins(rollout, lanes, known)
        follows = np.empty(valid.shape, bool)
        follows[0] = self._join(self._lanes.newest(lanes), known & ~rollout.aborted, obs)
        follows[1:] = valid[:-1]
        inner = t < steps - 1
        follows[t[inner] + 1, b[inner]] = False
        kept = slice(max(0, steps - self.rows), steps)
        if steps >= self.rows:
            follows[kept.start] = False  # the row before is overwritten
        flags = valid * VALID | rollout.column("terminated") * TERMINATED | rollout.column("truncated") * TRUNCATED
        flags |= follows * FOLLOWS | begins * BEGINS
        flags[-1] |= SEAM  # until it is known what lies behind it

        places = self._lanes.extend(lanes, steps - kept.start)
        self._obs.put(places, {name: leaf[kept] for name, leaf in obs.items()}, follows[kept], valid[kept])
        self._action[places] = rollout.column("action")[kept]
        self._reward[places] = rollout.column("reward")[kept]
        self._flags[places] = flags[kept]
        for name, column in own.items():
            self._own[name][places] = column[kept]
        self._renew(places.reshape(-1), valid[kept].reshape(-1))
        self._withdraw(lanes)
        # What the newest row led to is kept aside like the last observation of an episode, until a row shows it.
        shown_last = valid[-1].copy()
        shown_last[b[~inner]] = False
        ends = t >= kept.start
        self._keep_next(places[t[ends] - kept.start, b[ends]], {name: leaf[ends] for name, leaf in final.items()})
        self._keep_next(places[-1][shown_last], {name: leaf[-1][shown_last] for name, leaf in obs.items()})
        if self.stack > 1:  # one row is looked at as well, another one each time
            row = rollout.index % len(places)
            whole = self._marks.has(places[row])
            seen = {name: leaf[kept][row][whole] for name, leaf in obs.items()}
            self._obs.compare(seen, self._obs.take(places[row][whole]))

    def _begins(self, rollout: Rollout, lanes: Array, known: Array) -> Array:
        """[T, B] bool: see `BEGINS`. With the first row ever of a lane, too."""
        valid, before = rollout.column("valid"), self._flags[self._lanes.newest(lanes)]
        begins = np.empty(valid.shape, bool)
        due = (before & (TERMINATED | TRUNCATED) != 0) | (before & (BEGINS | VALID) == BEGINS)
        begins[0] = rollout.aborted | known & due | self._lanes.empty(lanes)
        begins[1:] = (rollout.column("terminated") | rollout.column("truncated"))[:-1]
        for t in np.flatnonzero(~valid[:-1].all(1)):
            begins[t + 1] |= begins[t] & ~valid[t]
        return begins

    def _keep_next(self, places: Array, leaves: Mapping[str, Array]) -> None:
        if not len(places):
            return
        self._obs.keep_next(places, leaves)
        if self.stack > 1:
            whole = self._marks.has(places)
            seen = {name: leaf[whole] for name, leaf in leaves.items()}
            self._obs.compare(seen, self._obs.take_next(places[whole]))

    def _join(self, newest: Array, may: Array, obs: Mapping[str, Array]) -> Array:
        """[B] bool: which observations [T + 1, B, …] go on from what the rows at `newest` [B] led to, of those that `may`.
        Windows pass from no other row into them, but sequences do from one that ended an episode."""
        flags = self._flags[newest]
        goes_on = may & (flags & VALID != 0)
        for name, leaf in on_host(self._obs.take_next(newest)).items():
            goes_on &= alike(leaf, obs[name][0])
        ended = flags & (TERMINATED | TRUNCATED) != 0
        self._flags[newest] &= ~((goes_on | may & ended) * SEAM)
        self._obs.join(newest[goes_on])
        return goes_on

    def _renew(self, places: Array, valid: Array) -> None:
        """New rows lie at `places` [N]; those that are `valid` can be sampled."""
        self._marks.put(places, valid)
        if self._priorities is not None:
            self._priorities.renew(places, valid)

    def _withdraw(self, lanes: Array) -> None:
        """Of the oldest rows those cannot be sampled whose stack goes back to rows that have been overwritten."""
        if self.stack == 1:
            return
        full, oldest = self._lanes.oldest(lanes, min(self.stack - 1, self.rows))
        whole = np.zeros(len(full), bool)
        for places in oldest:
            flags = self._flags[places]
            whole |= flags & FOLLOWS == 0
            can_be = whole & (flags & VALID != 0)
            self._marks.put(places, can_be)
            if self._priorities is not None:
                self._priorities.withdraw(places[~can_be])

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator, size: int, *, n: int = 1, gamma: float = 1.0, beta: float = 1.0) -> Batch:
        """`size` transitions, with repetition, with returns over at most `n` steps: uniformly, or by priority and with
        importance weights to the power `beta` (1: sampling by priority makes no difference to the expected gradient)."""
        with self._turn.of("sample"):
            index, weights = self._draw(rng, size, beta)
            return self._gather(index, n, gamma, weights)

    def _draw(self, rng: np.random.Generator, size: int, beta: float) -> tuple[Array, Array]:
        """Places of transitions, with repetition, and their importance weights, [size] both."""
        if not (held := len(self._marks)):
            raise ValueError("replay: nothing to sample from: it is empty, or closed")
        if self._priorities is None:
            return self._marks.draw(rng, size, self._lanes.used * self.envs), np.ones(size)
        index = self._priorities.sample(rng, size)
        return index, self._priorities.weights(index, held, beta)

    def gather(self, index: Array, n: int, gamma: float) -> Batch:
        """The n-step transitions that begin at `index` [N] (row * B + column)."""
        if len(index) and not 0 <= index.min() <= index.max() < self.rows * self.envs:
            raise IndexError(f"replay: an index of {index.min()} to {index.max()}, there are {self.rows * self.envs} places")
        with self._turn.of("gather"):
            return self._gather(index, n, gamma, np.ones(len(index)))

    def _gather(self, index: Array, n: int, gamma: float, weights: Array) -> Batch:
        _at_least_1("n", n)
        if n == 1:
            end, returns = index, self._rewards(index)
            discounts = gamma * GOES_ON.take(self._flags.take(index, mode="clip"))
        else:
            end, returns, discounts = self._windows(index, n, gamma)
        return Batch(
            obs=self._obs.take(index),
            action=self._action.take(index, 0, mode="clip"),
            returns=returns,
            discounts=discounts,
            next_obs=self._obs.take_next(end),
            index=index,
            generation=self._lanes.generation(index),
            weights=weights,
            columns={name: column.take(index, 0, mode="clip") for name, column in self._own.items()},
        )

    def _rewards(self, index: Array) -> Array:
        rewards = self._reward.take(index, mode="clip")
        return rewards if self._learned is None else self._learned(rewards)

    def _rows_from(self, index: Array, count: int) -> Array:
        """The places [count, N] of the rows from `index` [N] on."""
        return (index + np.arange(count)[:, None] * self.envs) % (self.rows * self.envs)

    def _windows(self, index: Array, n: int, gamma: float) -> tuple[Array, Array, Array]:
        """Where the windows of at most `n` steps that begin at `index` [N] end, their returns and discounts, [N] each."""
        at = self._rows_from(index, n)
        flags = self._flags.take(at)
        last = flags & STOPS != 0
        last[:-1] |= flags[1:] & VALID == 0
        returns, discounts, steps = n_step(self._rewards(at), flags & TERMINATED != 0, last, gamma=gamma)
        return at[steps - 1, np.arange(len(index))], returns, discounts

    def sequences(self, rng: np.random.Generator, size: int, length: int, *, beta: float = 1.0) -> Sequences:
        """`size` sequences of at most `length` rows. Where each begins is drawn as `sample` draws, with the same weights. It
        goes on over ends of episodes, but not past the newest row, nor into a row that is not valid or did not happen after
        the one before."""
        _at_least_1("length", length)
        with self._turn.of("sequences"):
            index, weights = self._draw(rng, size, beta)
            at = self._rows_from(index, length)
            flags = self._flags.take(at)
            mask = np.ones(at.shape, bool)
            goes_on = (flags[:-1] & SEAM == 0) & (flags[1:] & VALID != 0)
            np.logical_and.accumulate(goes_on, axis=0, out=mask[1:])
            held = np.minimum(np.arange(length)[:, None], mask.sum(0) - 1)
            at, flags = (np.take_along_axis(x, held, 0) for x in (at, flags))
            obs, next_obs = (
                {name: leaf.reshape(*at.shape, *leaf.shape[1:]) for name, leaf in leaves.items()}
                for leaves in (self._obs.take(at.reshape(-1)), self._obs.take_next(at.reshape(-1)))
            )
            return Sequences(
                obs=obs,
                action=self._action.take(at, 0),
                reward=self._rewards(at),
                terminated=flags & TERMINATED != 0,
                truncated=flags & TRUNCATED != 0,
                next_obs=next_obs,
                first=mask & (flags & BEGINS != 0),
                mask=mask,
                index=index,
                generation=self._lanes.generation(index),
                weights=weights,
                columns={name: column.take(at, 0) for name, column in self._own.items()},
            )

    # -- priorities --------------------------------------------------------------------------------------------------

    def reprioritise(self, batch: Batch | Sequences, td_errors: Array) -> int:
        """Transitions, or the sequences that begin with them, turned out to have these errors [N]. How many were ignored,
        because the row was overwritten since, or can be sampled no more. Raises NonFiniteError."""
        with self._turn.of("reprioritise"):
            known = (batch.generation == self._lanes.generation(batch.index)) & self._marks.has(batch.index)
            if self._priorities is not None:
                self._priorities.update(batch.index[known], td_errors[known])
            return int(np.count_nonzero(~known))

    def undone_by_failure(self) -> AbstractContextManager[None]:
        """If what is done within raises, `reprioritise` there counts no more. Nothing may be added within."""
        return nullcontext() if self._priorities is None else self._priorities.undone_by_failure()

    def chances(self, batch: Batch | Sequences) -> Array:
        """How likely each transition of a batch is to be drawn now, [N] float64."""
        if self._priorities is None:
            return np.full(len(batch.index), 1 / max(1, len(self)))
        return self._priorities.chances(batch.index)

    def priority_entropy(self) -> float:
        """Of the chances of all rows to be sampled, in nats: log(len(self)) where all have the same."""
        if self._priorities is None:
            return float(np.log(max(1, len(self))))
        return self._priorities.entropy(self._lanes.used * self.envs)

    # -- state -------------------------------------------------------------------------------------------------------

    def _columns(self) -> dict[str, Array]:
        """What is kept of each row besides observations, [rows, B, …] views."""
        flat = {"action": self._action, "reward": self._reward, "flags": self._flags}
        flat |= {f"own.{name}": column for name, column in self._own.items()}
        return {name: column.reshape(self.rows, self.envs, *column.shape[1:]) for name, column in flat.items()}

    def state_dict(self) -> dict[str, Any]:
        """All rows in use, as copies: on disk what is there, too. Raises OSError if it is full."""
        used = self._lanes.used
        with self._turn.of("state_dict"):
            return {
                "rows": self.rows, "stack": self.stack, "env_steps": self.env_steps, "lanes": self._lanes.state_dict(),
                "columns": {name: column[:used].copy() for name, column in self._columns().items()},
                "obs": self._obs.state_dict(used),
                "priorities": {} if self._priorities is None else self._priorities.state_dict(used * self.envs),
            }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], path: str = "replay") -> None:
        """Raises ValueError naming the first mismatch; the ring must have as many rows as the one saved."""
        with self._turn.of("load_state_dict"):
            self._load(state, path)

    def _load(self, state: Mapping[str, Any], path: str) -> None:
        for name, mine in (("rows", self.rows), ("stack", self.stack)):
            if state.get(name) != mine:
                raise ValueError(f"{path}.{name}: this ring has {mine}, the one saved {state.get(name)}")
        check_tree(state.get("lanes", {}), self._lanes.state_dict(), f"{path}.lanes")
        written = state["lanes"]["written"]
        if (written < 0).any():
            raise ValueError(f"{path}.lanes.written: {written.min()} rows, expected none below 0")
        used = used_rows(written, self.rows)
        like = {"rows": 0, "stack": 0, "env_steps": 0, "lanes": self._lanes.state_dict()}
        like["columns"] = {name: column[:used] for name, column in self._columns().items()}
        like["priorities"] = {} if self._priorities is None else self._priorities.state_dict(used * self.envs)
        check_tree({key: value for key, value in state.items() if key != "obs"}, like, path)
        flags = state["columns"]["flags"].reshape(-1)
        self._obs.load_state_dict(state.get("obs", {}), used, flags & FOLLOWS != 0, f"{path}.obs")
        self._flags[:] = 0
        for name, column in self._columns().items():
            column[:used] = state["columns"][name]
        self.env_steps = state["env_steps"]
        self._lanes.load_state_dict(state["lanes"])
        self._marks = Marks(self.rows * self.envs)
        self._marks.put(np.arange(len(flags)), flags & VALID != 0)
        if self._priorities is not None:
            self._priorities.load_state_dict(state["priorities"])
        self._withdraw(np.arange(self.envs))


def _at_least_1(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"replay: {name} = {count}, expected 1 or more")


def _rows(envs: int, capacity: int, stack: int) -> int:
    return max(1, capacity // envs) + stack - 1
