"""The 16-byte records that cross the pipes between a worker and the training process.

A write of 16 bytes is atomic, so a reader that asks for multiples of 16 never sees half a record, also when the pipe is
non-blocking (which uvloop makes it) and when the writer is killed.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

_FORMAT = struct.Struct("<BBHHHII")
RECORD_BYTES = _FORMAT.size
READ_BYTES = RECORD_BYTES * 256


class Kind(IntEnum):
    """What a record asks for (credits) or reports (doorbells)."""

    COLLECT = 1
    EVALUATE = 2
    STOP = 3
    ANSWER = 4
    READY = 11
    COLLECTED = 12
    EVALUATED = 13
    FAILED = 14
    ASK = 15
    STANDS = 16


class Record(NamedTuple):
    """A credit or a doorbell.

    `group` and `slot` say where in memory, `buffer` which weights, `ordinal` is the group's segment number, `value` the
    weights' version in a credit and the valid transitions in a doorbell. Of an evaluation `group` is the number of the
    suite, `value` that of the episodes, and `ordinal` is 1 if they have fresh seeds.
    ASK and ANSWER: see `workers.questions`. STANDS: some group is held and has come to a stand.
    """

    kind: Kind
    group: int = 0
    slot: int = 0
    buffer: int = 0
    ordinal: int = 0
    value: int = 0

    def pack(self) -> bytes:
        return _FORMAT.pack(self.kind, 0, self.group, self.slot, self.buffer, self.ordinal, self.value)


def unpack(data: bytes) -> list[Record]:
    """All records in `data`, whose length is a multiple of RECORD_BYTES."""
    return [
        Record(Kind(kind), group, slot, buffer, ordinal, value)
        for kind, _, group, slot, buffer, ordinal, value in _FORMAT.iter_unpack(data)
    ]
