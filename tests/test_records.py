"""The fixed records on the pipes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl.config import GROUPS_MAX
from aiorl.workers.records import READ_BYTES, RECORD_BYTES, Kind, Record, unpack

SHORT, LONG = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
RECORDS = st.builds(Record, st.sampled_from(Kind), SHORT, SHORT, SHORT, LONG, LONG)


@given(records=st.lists(RECORDS, max_size=5))
def test_what_is_packed_is_unpacked(records: list[Record]) -> None:
    data = b"".join(record.pack() for record in records)
    assert len(data) == RECORD_BYTES * len(records)
    seen = unpack(data)
    assert seen == records
    assert all(isinstance(record.kind, Kind) for record in seen)


def test_sizes_keep_records_whole() -> None:
    assert RECORD_BYTES == 16
    assert READ_BYTES % RECORD_BYTES == 0
    assert READ_BYTES <= 4096, "a read of more than a pipe's page gains nothing"


def test_a_torn_or_foreign_record_is_an_error() -> None:
    with pytest.raises(struct.error):
        unpack(Record(Kind.READY).pack()[:-1])
    with pytest.raises(ValueError, match="99"):
        unpack(bytes([99]) + bytes(15))


def test_numbers_that_do_not_fit_are_an_error_not_another_number() -> None:
    assert unpack(Record(Kind.COLLECT, group=GROUPS_MAX - 1).pack())[0].group == GROUPS_MAX - 1
    for wrong in ({"group": 2**16}, {"slot": -1}, {"buffer": 2**16}, {"ordinal": 2**32}, {"value": 2**32}):
        with pytest.raises(struct.error):
            Record(Kind.COLLECT, **wrong).pack()
