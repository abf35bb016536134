"""`crash_points` kills for good at every file operation, and finds every way of saving that is not safe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiorl.testing import Crash, CrashTestError, crash_points

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

OLD, NEW = b"old " * 1000, b"new!" * 1000


def in_place(path: Path) -> None:
    path.write_bytes(NEW)


def renamed(path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(NEW)
    os.replace(temporary, path)


def synced(path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(NEW)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_first(path: Path) -> None:
    path.unlink()
    synced(path)


def safely(path: Path) -> None:
    synced(path)
    fd = os.open(path.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


Way = Callable[[Path], Any]


def outcomes(tmp_path: Path, way: Way, **given: Any) -> tuple[set[bytes | None], list[Crash]]:
    """What can be found at the end, None for nothing, and every crash."""
    directory = tmp_path / "disk"
    path = directory / "file"

    def prepare() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        path.write_bytes(OLD)

    found: set[bytes | None] = set()
    crashes: list[Crash] = []
    for crash in crash_points(lambda: way(path), directory, prepare=prepare, **given):
        crashes.append(crash)
        found.add(path.read_bytes() if path.exists() else None)
        assert not crash.completed or given or path.read_bytes() == NEW
    return found, crashes


def test_every_operation_is_a_point(tmp_path: Path) -> None:
    found, crashes = outcomes(tmp_path, safely)
    assert [crash.operation for crash in crashes] == [
        "open", "write", "second half of a write", "fsync", "replace", "fsync", ""
    ]  # fmt: skip
    assert [crash.number for crash in crashes] == list(range(1, 8))
    assert [Path(crash.path).name for crash in crashes] == ["file.tmp"] * 5 + ["disk", ""]
    assert [crash.completed for crash in crashes] == [False] * 6 + [True]
    assert found == {OLD, NEW}
    assert list(tmp_path.iterdir()) == [tmp_path / "disk"], "something was left behind"


@pytest.mark.parametrize(
    ("way", "at_kill", "at_cut"),
    [
        (in_place, False, False),  # half written
        (remove_first, False, False),  # there is a moment without either
        (renamed, True, False),  # the name reached the disk before the contents
        (synced, True, True),
        (safely, True, True),
    ],
)
def test_it_tells_the_safe_ways_from_the_others(tmp_path: Path, way: Way, at_kill: bool, at_cut: bool) -> None:
    assert (outcomes(tmp_path, way)[0] <= {OLD, NEW}) == at_kill
    torn, _ = outcomes(tmp_path, way, power_cut="torn")
    lost, _ = outcomes(tmp_path, way, power_cut="lost")
    assert (torn | lost <= {OLD, NEW}) == at_cut


@pytest.mark.parametrize(("way", "expected"), [(synced, OLD), (safely, NEW)])
def test_what_was_not_synced_is_not_there(tmp_path: Path, way: Way, expected: bytes) -> None:
    """Without the directory's fsync the new name may be forgotten though the program has gone on."""
    directory = tmp_path / "disk"
    directory.mkdir()
    (directory / "file").write_bytes(OLD)
    last = list(crash_points(lambda: way(directory / "file"), directory, power_cut="lost"))[-1]
    assert last.completed
    assert (directory / "file").read_bytes() == expected


def test_a_directory_that_was_removed_comes_back(tmp_path: Path) -> None:
    directory = tmp_path / "disk"

    def prepare() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "a" / "b").mkdir(parents=True)
        (directory / "a" / "b" / "file").write_bytes(OLD)

    crashes = 0
    for crash in crash_points(lambda: shutil.rmtree(directory / "a"), directory, prepare=prepare, power_cut="lost"):
        crashes += 1
        assert (directory / "a" / "b" / "file").read_bytes() == OLD, crash
    assert crashes == 4


def test_a_function_that_fails_by_itself(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("by itself")

    with pytest.raises(CrashTestError, match="by itself"):
        list(crash_points(fail, tmp_path / "disk"))
    assert len(list(crash_points(fail, tmp_path / "disk", expect=(ValueError,)))) == 1


def test_other_files_do_not_count(tmp_path: Path) -> None:
    def elsewhere() -> None:
        (tmp_path / "elsewhere").write_bytes(b"")
        (tmp_path / "disk" / "file").write_bytes(b"12")

    operations = [crash.operation for crash in crash_points(elsewhere, tmp_path / "disk")]
    assert operations == ["open", "write", "second half of a write", ""]
