"""A lock that a kill cannot leave held."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aiorl.filelock import FileLock, Held, state_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
ROOT = Path(__file__).parent.parent


def test_held_and_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert state_of(path) == "free"
    lock = FileLock(path)
    assert (lock.was_left, state_of(path)) == (False, "held")
    with pytest.raises(Held):
        FileLock(path)  # also within one process
    lock.release()
    lock.release()
    assert state_of(path) == "free"
    assert not path.exists()
    FileLock(path).release()


def test_a_kill_lets_go_of_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = f"from pathlib import Path\nfrom aiorl.filelock import FileLock\nlock = FileLock(Path({str(path)!r}))\n"
    program += "print('READY', flush=True)\nimport time\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        assert state_of(path) == "held"
        with pytest.raises(Held) as caught:
            FileLock(path)
        assert caught.value.pid == process.pid
        process.kill()
    assert state_of(path) == "left"
    lock = FileLock(path)
    assert lock.was_left
    lock.release()


@pytest.mark.parametrize("before", ["free", "left"])
def test_who_cannot_write_into_it_does_not_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    path = tmp_path / "lock"
    if before == "left":
        path.write_text("1\n")

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            FileLock(path)
    assert state_of(path) == before
    FileLock(path).release()


def test_asking_does_not_keep_anybody_out(tmp_path: Path) -> None:
    """And at any time at most one holds it."""
    path, over, holders, most = tmp_path / "lock", threading.Event(), [0], [0]

    def ask() -> None:
        while not over.is_set():
            state_of(path)

    def hold() -> None:
        for _ in range(50):
            try:
                lock = FileLock(path)
            except Held:
                continue
            holders[0] += 1
            most[0] = max(most[0], holders[0])
            time.sleep(0)
            holders[0] -= 1
            taken.append(1)
            lock.release()

    taken: list[int] = []
    asking = threading.Thread(target=ask)
    holding = [threading.Thread(target=hold) for _ in range(3)]
    for thread in (asking, *holding):
        thread.start()
    for thread in holding:
        thread.join()
    over.set()
    asking.join()
    assert most == [1]
    assert len(taken) >= 50
