"""Debug mode (`Config.debug`): has a slot been written to by anybody but the segment that belongs there?

Shared memory has no owner: native code of an environment that writes beyond its arrays may hit the slot of another group,
or one that is full and waits to be learned from. In debug mode the learner finds out. Around each slot lie marks that nobody
may touch, and a station that has filled a slot seals it: which segment this is, and a CRC-32 of each of its columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from aiorl.errors import InvariantError
from aiorl.segments import GUARD_BYTES, SEAL_PLACE, Array, Segment

MARK = np.frombuffer((b"aiorl: nobody writes here. " * 3)[:GUARD_BYTES], np.uint8)


def lay_guards(segment: Segment) -> None:
    """Put the marks around a slot, once, before anybody uses it."""
    for guard in segment.guards.values():
        guard[...] = MARK


def seal(segment: Segment, station: int, group: int, ordinal: int) -> None:
    """The segment is complete. Does nothing if it is not guarded."""
    if segment.guards:
        segment.seal[:SEAL_PLACE] = station, group, ordinal
        segment.seal[SEAL_PLACE:] = 0
        for n, (_, block) in enumerate(_blocks(segment), start=SEAL_PLACE):
            segment.seal[n] = _crc(block)


def check_seal(segment: Segment, group: int, ordinal: int) -> None:
    """Raise InvariantError, naming worker, group, segment and column, unless all is as `seal` left it."""
    if not segment.guards:
        return
    station, *found = segment.seal[:SEAL_PLACE].tolist()
    where = f"worker-{station}, group {group}, segment {ordinal}"
    for side, guard in segment.guards.items():
        if not np.array_equal(guard, MARK):
            raise _damaged(f"{where}: the {GUARD_BYTES} bytes {side} its slot were written over")
    if found != [group, ordinal]:
        raise _damaged(f"{where}: its slot holds segment {found[1]} of group {found[0]}")
    for n, (name, block) in enumerate(_blocks(segment), start=SEAL_PLACE):
        if _crc(block) != segment.seal[n]:
            raise _damaged(f"{where}: column {name} was changed after it was complete (CRC-32)")


def _blocks(segment: Segment) -> Iterator[tuple[str, Array]]:
    """Everything that is in use. The header comes first: it says how much of the others that is."""
    yield "header", segment.header
    yield from segment.obs.items()
    yield from segment.columns.items()
    yield "aborted", segment.aborted
    finals = segment.finals
    yield "final_at", segment.final_at[:finals]
    for name, leaf in segment.final_obs.items():
        yield f"final_{name}", leaf[:finals]
    yield "state", np.frombuffer(segment.env_state, np.uint8)
    for name, leaf in segment.policy_state.items():
        yield f"policy_state.{name}", leaf


def _crc(block: Array) -> int:
    return zlib.crc32(block.reshape(-1).view(np.uint8).data)


def _damaged(what: str) -> InvariantError:
    return InvariantError(
        f"{what}\n  native code of an environment that writes beyond its own arrays does this, and so would a bug in aiorl"
    )
