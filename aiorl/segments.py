"""How collected experience lies in memory: columns, segments and rollouts.

A *segment* is what one group of `n` environments collected in `T` steps, written in place into one slot of shared
memory. Its columns, each a NumPy view:

    obs, obs.NAME…   [T + 1, n, …]  observation leaves (see `envs.spaces`); row T is where the next segment goes on
    action           [T, n, …]      what the policy chose (before clipping into the environment's bounds)
    reward           [T, n]         float64, as returned by `env.step`
    terminated       [T, n]         bool
    truncated        [T, n]         bool
    valid            [T, n]         bool; False where the row is no transition: a NEXT_STEP vector environment spent it
                                    on its reset, or what the step returned was not finite
    …                [T, n, …]      the policy's own columns, e.g. `log_prob`

    policy_state     [n, …]         what a recurrent policy remembers after row T - 1, by name

Where an environment resets within the step that ended its episode, `obs[t + 1]` already belongs to the next episode.
The true last observation is then kept aside in `final_obs`, and `final_at` says which rows have one. So for every valid
row the next observation is `final_obs` where there is one and `obs[t + 1]` otherwise: `Rollout.next_obs` does just that.

Where an environment could not be brought back to where it was (after a worker's death, or at a resume), its open episode
is *aborted*: the segment begins with a fresh episode although the row before did not end one, and `aborted` [n] says so.
Nothing may flow from such a segment into the rows before it. An episode can also be aborted within a segment (see
`aiorl.envs.aborts`): by a row that is not valid and yet `truncated`. The row after it begins another episode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
ALIGN = 64
GUARD_BYTES = 64  # before and behind a guarded slot
SEAL_PLACE = 3  # numbers at the head of a seal: station, group, ordinal; then a checksum for each block

CORE_COLUMNS = ("action", "reward", "terminated", "truncated", "valid")


@dataclass(frozen=True, slots=True)
class Column:
    """Shape and dtype of one value per environment and step."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)  # exact, however large


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Names of the numbers at the head of a slot (float64 each)."""

    FINALS = 0  # how many rows of final_obs are in use
    STARTED_S = 1  # monotonic clock when the segment was begun
    ENDED_S = 2  # and when it was full
    STATE_BYTES = 3  # length of the environment state at the end of the slot
    COUNT = 8


class Segment:
    """Views on one slot. `obs` and `final_obs` map leaf names to arrays; `columns` holds everything else by name.

    `guards` and `seal` are empty unless the layout is guarded (see `aiorl.seals`).
    """

    __slots__ = (
        "aborted", "columns", "envs", "final_at", "final_obs", "guards", "header", "obs", "policy_state", "seal", "state",
        "steps",
    )  # fmt: skip

    def __init__(
        self,
        steps: int,
        envs: int,
        header: Array,
        obs: dict[str, Array],
        columns: dict[str, Array],
        final_at: Array,
        final_obs: dict[str, Array],
        state: Array,
        aborted: Array,
        seal: Array,
        guards: dict[str, Array],
        policy_state: dict[str, Array],
    ) -> None:
        self.steps, self.envs = steps, envs
        self.header, self.obs, self.columns = header, obs, columns
        self.final_at, self.final_obs, self.state, self.aborted = final_at, final_obs, state, aborted
        self.seal, self.guards, self.policy_state = seal, guards, policy_state

    @property
    def finals(self) -> int:
        """How many rows have a `final_obs`."""
        return int(self.header[SegmentHeader.FINALS])

    def clear(self) -> None:
        """Make ready for writing; columns are overwritten row by row, so only the counts matter."""
        self.header[:] = 0
        self.aborted[:] = False

    def add_final(self, t: int, env: int, obs: Mapping[str, Any]) -> None:
        """Keep the last observation of the episode that environment `env` ended at row `t`."""
        row = self.finals
        for name, value in obs.items():
            self.final_obs[name][row] = value
        self.final_at[row] = t * self.envs + env
        self.header[SegmentHeader.FINALS] = row + 1

    def finals_of(self, t: int) -> list[tuple[int, int]]:
        """The finals of row `t`: (place in `final_obs`, environment) each."""
        at = self.final_at[: self.finals]
        return [(row, int(at[row]) % self.envs) for row in np.flatnonzero(at // self.envs == t).tolist()]

    @property
    def env_steps(self) -> int:
        return int(np.count_nonzero(self.columns["valid"]))

    @property
    def env_state(self) -> bytes:
        """State of a native vector environment after the last row (empty for single environments)."""
        return self.state[: int(self.header[SegmentHeader.STATE_BYTES])].tobytes()

    def put_env_state(self, data: bytes) -> None:
        self.state[: len(data)] = np.frombuffer(data, np.uint8)
        self.header[SegmentHeader.STATE_BYTES] = len(data)


@dataclass(frozen=True)
class SegmentLayout:
    """Where each column of a segment lies in its slot. Pure arithmetic: the same on both sides of the process boundary.

    A `guarded` one has room for checksums, and for marks before and behind everything else.
    """

    steps: int
    envs: int
    obs: Mapping[str, Column]
    columns: Mapping[str, Column]
    state_bytes: int = 0
    guarded: bool = False
    policy_state: Mapping[str, Column] = field(default_factory=dict[str, Column])

    def _blocks(self) -> list[tuple[str, str, tuple[int, ...], str]]:
        rows = self.steps * self.envs
        blocks = [("header", "", (SegmentHeader.COUNT,), "float64")]
        blocks += [("obs", k, (self.steps + 1, self.envs, *c.shape), c.dtype) for k, c in self.obs.items()]
        blocks += [("columns", k, (self.steps, self.envs, *c.shape), c.dtype) for k, c in self.columns.items()]
        blocks += [("final_at", "", (rows,), "int32")]
        # Room for the worst case, one final observation a row: pages never written cost no memory.
        blocks += [("final_obs", k, (rows, *c.shape), c.dtype) for k, c in self.obs.items()]
        blocks += [("state", "", (self.state_bytes,), "uint8"), ("aborted", "", (self.envs,), "bool")]
        blocks += [("policy_state", k, (self.envs, *c.shape), c.dtype) for k, c in self.policy_state.items()]
        if not self.guarded:
            return [*blocks, ("seal", "", (0,), "int64")]
        blocks += [("seal", "", (SEAL_PLACE + len(blocks),), "int64")]
        before, behind = (("guards", side, (GUARD_BYTES,), "uint8") for side in ("before", "behind"))
        return [before, *blocks, behind]

    @property
    def nbytes(self) -> int:
        return sum(_padded(shape, dtype) for _, _, shape, dtype in self._blocks())

    @property
    def touched_nbytes(self) -> int:
        """Bytes that are sure to be written, for the memory estimate (`nbytes` counts address space)."""
        return sum(_padded(s, d) for kind, _, s, d in self._blocks() if kind != "final_obs")

    def view(self, buffer: memoryview, offset: int = 0) -> Segment:
        """The segment that lies at `offset` of `buffer`."""
        plain: dict[str, Array] = {}
        kinds = ("obs", "columns", "final_obs", "guards", "policy_state")
        named: dict[str, dict[str, Array]] = {kind: {} for kind in kinds}
        for kind, name, shape, dtype in self._blocks():
            array = np.frombuffer(buffer, dtype, math.prod(shape), offset).reshape(shape)
            if kind in named:
                named[kind][name] = array
            else:
                plain[kind] = array
            offset += _padded(shape, dtype)
        return Segment(
            self.steps, self.envs, plain["header"], named["obs"], named["columns"],
            plain["final_at"], named["final_obs"], plain["state"], plain["aborted"],
            plain["seal"], named["guards"], named["policy_state"],
        )  # fmt: skip

    def allocate(self) -> Segment:
        """A segment in private memory, for tests and plain loops."""
        return self.view(memoryview(bytearray(self.nbytes)))


def _padded(shape: tuple[int, ...], dtype: str) -> int:
    return -(-Column(shape, dtype).nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class Rollout:
    """The k-th unit of experience: segments side by side, `B` = total environments, in the order of `envs`.

    `index` is k, `behaviour_version` is b_k (the oldest version that acted), `envs` [B] names each column's environment.
    The arrays are views on slots that are given back after the update: copy what must outlive it.
    """

    index: int
    behaviour_version: int
    segments: tuple[Segment, ...]
    envs: Array

    @property
    def steps(self) -> int:
        return self.segments[0].steps

    @property
    def env_steps(self) -> int:
        """Valid transitions in the rollout."""
        return sum(s.env_steps for s in self.segments)

    def column(self, name: str) -> Array:
        """Column `name` of all segments, [T, B, …] (a copy when there are several segments)."""
        parts = [s.columns[name] for s in self.segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    @property
    def aborted(self) -> Array:
        """[B] bool: the environment's open episode was given up before row 0, which begins another one."""
        return np.concatenate([s.aborted for s in self.segments])

    def turns(self) -> list[Array]:
        """The columns, in parts that hold an environment once each. One that is there twice (eager schedule) was in the
        columns of an earlier part before it was in those of a later one."""
        seen: dict[int, int] = {}
        turn = np.empty(len(self.envs), int)
        for column, env in enumerate(self.envs.tolist()):
            turn[column] = seen.get(env, 0)
            seen[env] = seen.get(env, 0) + 1
        return [np.flatnonzero(turn == k) for k in range(max(seen.values()))]

    @property
    def obs(self) -> dict[str, Array]:
        """Observation leaves, [T + 1, B, …]."""
        return _join([s.obs for s in self.segments])

    def finals(self) -> tuple[Array, Array, dict[str, Array]]:
        """(t [F], b [F], leaves [F, …]): the rows whose next observation is not `obs[t + 1]`, and that observation."""
        times: list[Array] = []
        columns: list[Array] = []
        for segment, first in zip(self.segments, self._first_columns(), strict=True):
            at = segment.final_at[: segment.finals]
            times.append(at // segment.envs)
            columns.append(at % segment.envs + first)
        leaves = {
            name: np.concatenate([s.final_obs[name][: s.finals] for s in self.segments])
            for name in self.segments[0].final_obs
        }
        return np.concatenate(times), np.concatenate(columns), leaves

    def next_obs(self) -> dict[str, Array]:
        """The observation each step led to, [T, B, …], true at episode ends too (a copy)."""
        t, b, final = self.finals()
        result = {name: leaf[1:].copy() for name, leaf in self.obs.items()}
        for name, leaf in result.items():
            leaf[t, b] = final[name]
        return result

    def _first_columns(self) -> list[int]:
        return list(np.cumsum([0, *(s.envs for s in self.segments[:-1])]))


def _join(parts: list[dict[str, Array]]) -> dict[str, Array]:
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([p[name] for p in parts], axis=1) for name in parts[0]}
