"""Memory shared by descriptor: really shared, and nothing of it left behind."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aiorl.workers import memory
from aiorl.workers.memory import SharedBlock, available_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = mapped(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == before


def mapped() -> int:
    """How many of aiorl's blocks this process has mapped."""
    return sum("memfd:aiorl" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_zeroed_and_of_the_asked_size() -> None:
    block = SharedBlock(100_000)
    assert len(block.buffer) == block.nbytes == 100_000
    assert not np.frombuffer(block.buffer, np.uint8).any()
    block.close()
    tiny = SharedBlock(0)
    assert tiny.nbytes > 0, "no platform maps nothing"
    tiny.close()


def test_another_mapping_sees_the_same_pages() -> None:
    """As in a worker, which gets the descriptor and maps it anew."""
    block = SharedBlock(8192)
    other = SharedBlock(8192, _fd=os.dup(block.fd))
    np.frombuffer(block.buffer, np.int64)[:3] = [1, 2, 3]
    assert np.frombuffer(other.buffer, np.int64)[:3].tolist() == [1, 2, 3]
    np.frombuffer(other.buffer, np.int64)[0] = 9
    assert np.frombuffer(block.buffer, np.int64)[0] == 9
    block.close()
    assert np.frombuffer(other.buffer, np.int64)[0] == 9, "the pages live as long as one mapping"
    other.close()


def test_closing_while_arrays_live_leaves_them_valid_and_frees_with_the_last() -> None:
    before = mapped()
    block = SharedBlock(8192)
    array = np.frombuffer(block.buffer, np.int64)
    array[0] = 5
    block.close()
    block.close()  # again does no harm
    assert block.fd == -1
    assert array[0] == 5
    array[1] = 6
    del block
    gc.collect()
    assert mapped() == before + 1
    del array
    gc.collect()
    assert mapped() == before


def test_the_descriptor_is_not_inherited_by_other_programs() -> None:
    block = SharedBlock(1)
    assert not os.get_inheritable(block.fd)
    block.close()


def test_available_memory_is_less_than_all_there_is() -> None:
    available = available_bytes()
    assert available is not None
    assert 0 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limit", "used", "cached", "expected"),
    [
        ("max", 10, 0, None),
        (str(2**30), 2**29, 0, 2**29),
        (str(2**30), 2**30, 2**28, 2**28),  # a container whose limit is filled with file cache has memory to give
        (str(2**20), 2**30, 0, 0),
    ],
)
def test_limit_of_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int, cached: int, expected: int | None
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n")
    monkeypatch.setattr(memory, "CGROUP_MEMORY", str(tmp_path / "memory"))
    available = available_bytes()
    assert available is not None
    if expected is None:
        assert available > 2**20
    else:
        assert available == expected
