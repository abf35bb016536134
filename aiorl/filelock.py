"""A file that says "in use" for as long as a process lives: the kernel lets go of the lock at its death, however it dies."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Literal

TRIES, PAUSE_S = 5, 0.02  # somebody who only asks for the state holds the lock for a moment

State = Literal["free", "held", "left"]


class Held(Exception):
    """Somebody else holds the lock; `pid` is whose it is, 0 if that is not known."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"held by process {pid}")
        self.pid = pid


class FileLock:
    """Holds `path`, which is made for it and removed by `release`. `was_left`: it lay there, left by a killed process.

    Raises Held, or OSError where the file cannot be made. Where the file system knows no locks the file alone is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            self.was_left = path.exists()
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if _lock(self._fd) and _is_same(self._fd, path):
                break
            os.close(self._fd)
        else:
            raise Held(_pid_in(path))
        try:
            os.truncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        except OSError:  # a full disk: nobody holds it then, and what a killed process left still says so
            if self.was_left:
                os.close(self._fd)
            else:
                self.release()
            raise

    def release(self) -> None:
        """Remove the file and let go. May be called twice."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def state_of(path: Path) -> State:
    """free: there is no such file; held: its owner lives; left: its owner was killed."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return "free"
    try:
        return "left" if _lock(fd) else "held"
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Whether the lock was to be had. True where there are none."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _is_same(fd: int, path: Path) -> bool:
    """Not a file that its last owner has removed in the meantime."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _pid_in(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return 0
