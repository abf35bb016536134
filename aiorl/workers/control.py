"""What a station tells of itself in shared memory: a row of counters for itself and for each of its groups, and last words.

Written by the station, read by the training process at any moment, also after the station's death. Two numbers go the
other way: which process may fill the slots, and whether it is held. One that has been given up finds another number there,
or none, and stops before its next environment step; one that is held waits there.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence

import numpy as np

from aiorl.errors import AiorlError
from aiorl.workers.memory import SharedBlock

WORDS = 8  # int64 of a row
ERROR_BYTES = 32 * 1024
DISMISSED = -1


class Counter:
    """Places in a row. ERROR_LENGTH and LIFE are used in the station's own row alone, which comes first. HELD says in that
    one that the station is held, in a group's that it stands."""

    PHASE, ORDINAL, STEP, BEATS, STEPPING, ERROR_LENGTH, LIFE, HELD = range(8)


class Phase:
    STARTING, IDLE, COLLECTING, EVALUATING, FAILED = range(5)


def control_bytes(groups: int) -> int:
    return (1 + groups) * WORDS * 8 + ERROR_BYTES


class Stopped(Exception):
    """The station may not fill slots any more; raised between two environment steps."""


class Control:
    """The control block of a station with `groups` (index -> its global env indices). `table` [1 + groups, WORDS] int64 has
    the rows, the station's own first."""

    def __init__(self, block: SharedBlock, groups: Mapping[int, range]) -> None:
        self.groups = groups
        self.table = np.frombuffer(block.buffer, np.int64, (1 + len(groups)) * WORDS).reshape(-1, WORDS)
        self._error = np.frombuffer(block.buffer, np.uint8, ERROR_BYTES, self.table.nbytes)
        self._places = {group: place for place, group in enumerate(groups, start=1)}
        self._block = block

    def row(self, group: int | None = None) -> memoryview:
        """The counters of a group, or the station's own, for one who writes them often: faster than an array."""
        start = self._place(group) * WORDS * 8
        return self._block.buffer[start : start + WORDS * 8].cast("q")

    def of(self, counter: int, group: int | None = None) -> int:
        return int(self.table[self._place(group), counter])

    def _place(self, group: int | None) -> int:
        return 0 if group is None else self._places[group]

    # -- who may fill the slots --------------------------------------------------------------------------------------

    def admit(self, life: int) -> None:
        """All is as before a station began, and the process with this number may. A station that is held stays so."""
        self.table[0, : Counter.HELD] = 0
        self.table[1:] = 0
        self.table[0, Counter.LIFE] = life

    def dismiss(self) -> None:
        """Nobody may any more."""
        self.table[0, Counter.LIFE] = DISMISSED

    def hold(self, held: bool) -> None:
        """Before its next environment step each group waits, or goes on."""
        self.table[0, Counter.HELD] = held

    def stands(self, group: int) -> bool:
        """It is held and has come to a stand."""
        return bool(self.table[0, Counter.HELD] and self.of(Counter.HELD, group))

    # -- what a station does -----------------------------------------------------------------------------------------

    @property
    def beats(self) -> list[int]:
        """One number for each row: it changes when a segment is begun and with every environment step."""
        return (self.table[:, Counter.BEATS] + self.table[:, Counter.ORDINAL]).tolist()

    def at_work(self) -> list[int]:
        """The groups that are in the middle of a segment."""
        return [group for group in self.groups if self.of(Counter.PHASE, group) in (Phase.COLLECTING, Phase.FAILED)]

    def steps_into(self, group: int, ordinal: int) -> int:
        """How many rows of that segment are there; 0 if the group is not at work on it."""
        row = self.table[self._place(group)]
        begun = row[Counter.PHASE] in (Phase.COLLECTING, Phase.FAILED) and row[Counter.ORDINAL] == ordinal
        return int(row[Counter.STEP]) if begun else 0

    def describe(self, group: int) -> str:
        envs = self.groups[group]
        return (
            f"in rollout {self.of(Counter.ORDINAL, group)}, step {self.of(Counter.STEP, group)} of the segment, "
            f"environments {envs.start}-{envs.stop - 1}"
        )

    # -- last words --------------------------------------------------------------------------------------------------

    def put_error(self, error: BaseException, group: int | None = None) -> None:
        """Keep type, message and traceback as text, for exceptions may be impossible to pickle. The first error stays."""
        if self.error() is not None:
            return
        message = str(error) or type(error).__name__
        if not isinstance(error, AiorlError):
            message = f"{type(error).__name__}: {message}"
        detail = getattr(error, "detail", "") or "".join(traceback.format_exception(error))
        text = {"type": type(error).__name__, "message": message[:4000], "detail": detail[-16_000:]}
        data = json.dumps(text).encode()
        if len(data) > ERROR_BYTES:
            data = json.dumps({**text, "detail": detail[-2000:]}).encode()[:ERROR_BYTES]
        self._error[: len(data)] = np.frombuffer(data, np.uint8)
        self.table[0, Counter.ERROR_LENGTH] = len(data)
        if group is not None:
            self.table[self._place(group), Counter.PHASE] = Phase.FAILED

    def error(self) -> dict[str, str] | None:
        """What `put_error` kept, or None."""
        length = self.of(Counter.ERROR_LENGTH)
        if not 0 < length <= ERROR_BYTES:
            return None
        try:
            text = json.loads(self._error[:length].tobytes())
        except ValueError:
            return None
        return {key: str(text.get(key, "")) for key in ("type", "message", "detail")}


def where(controls: Sequence[Control], group: int | None = None) -> str:
    """What a worker with these stations does or did, or one group of it. Unless one is asked for it is told of the group
    that failed, or else of the one that is the furthest behind."""
    if group is not None:
        return next(c for c in controls if group in c.groups).describe(group)
    phases = {control.of(Counter.PHASE) for control in controls}
    if Phase.STARTING in phases:
        return "while starting"
    if Phase.EVALUATING in phases:
        return "in an evaluation"
    busy = [(control, index) for control in controls for index in control.at_work()]
    failed = [(control, index) for control, index in busy if control.of(Counter.PHASE, index) == Phase.FAILED]
    if not busy:
        return "between segments"
    control, index = min(failed or busy, key=lambda at: (at[0].of(Counter.ORDINAL, at[1]), at[0].of(Counter.STEP, at[1])))
    others = "" if failed or len(busy) == 1 else f", and {len(busy) - 1} more groups"
    return control.describe(index) + others
