"""Memory shared by file descriptor: no name in any file system, so nothing can be left behind by a kill."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

from aiorl.errors import ConfigError

CGROUP_MEMORY = "/sys/fs/cgroup/memory"


class SharedBlock:
    """`nbytes` of zeroed memory. Pickled into a worker that is being started, it arrives as a mapping of the same pages."""

    def __init__(self, nbytes: int, *, _fd: int | None = None) -> None:
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        self.fd = _create(self.nbytes) if _fd is None else _fd
        self._map = mmap.mmap(self.fd, self.nbytes)
        self.buffer = memoryview(self._map)

    def close(self) -> None:
        """Give the descriptor back; the pages live until the last array on them is gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):  # arrays still look at it: unmapped with the last of them
            self.buffer.release()
            self._map.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (dup_for_child(self.fd), self.nbytes)


def dup_for_child(fd: int) -> Any:
    """A descriptor that can be pickled into a worker that is being started."""
    from multiprocessing import reduction

    return reduction.DupFd(fd)  # type: ignore[attr-defined, no-any-return]


def _attach(fd: Any, nbytes: int) -> SharedBlock:
    return SharedBlock(nbytes, _fd=fd.detach())


def _create(nbytes: int) -> int:
    fd = -1
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("aiorl", os.MFD_CLOEXEC)
        else:  # macOS: an unlinked temporary file does the same
            fd, path = tempfile.mkstemp(prefix="aiorl-")
            os.unlink(path)
        os.ftruncate(fd, nbytes)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        available = available_bytes()
        there = "" if available is None else f"; {available / 2**20:.0f} MiB of memory are available"
        raise ConfigError(f"{nbytes / 2**20:.1f} MiB of shared memory cannot be had: {error.strerror}{there}") from error
    return fd


def available_bytes() -> int | None:
    """Memory that could be used now, or None where the platform does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = _cgroup_limit()
    return available if limit is None else min(available, limit)


def _cgroup_limit() -> int | None:
    """What the control group leaves. Its cache of files counts as free: it gives way when memory is needed."""
    try:
        texts = {name: Path(f"{CGROUP_MEMORY}.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")}
        limit, used = int(texts["max"]), int(texts["current"])
        stat = dict(line.split() for line in texts["stat"].splitlines())
        return max(0, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, KeyError, ValueError):  # no control group, or its limit is "max"
        return None
