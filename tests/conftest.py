"""What all tests share. Sizes and threads are set before anything imports NumPy or torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# One compute thread: quicker for small networks, and tests do not take the cores from the worker processes.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail if the test leaves a thread, a child process, a file descriptor on a socket or pipe, or a shared block."""
    before = _belongings()
    yield
    left = {kind: sorted(now - before[kind]) for kind, now in _belongings().items() if now - before[kind]}
    assert not left, f"left behind after the test: {left}"


def _belongings() -> dict[str, set[str]]:
    return {
        "threads": {f"{t.name} ({t.ident})" for t in threading.enumerate()},
        "processes": _children(),
        "shared blocks": {p.name for p in Path("/dev/shm").glob("*")} if Path("/dev/shm").is_dir() else set(),
    }


def _children() -> set[str]:
    """Command lines of living child processes, where /proc tells; the standard library's resource tracker may stay."""
    found: set[str] = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            pids = listing.read_text().split()
        except OSError:
            continue  # the thread ended between the two looks
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended between the two reads
            if "resource_tracker" not in command:
                found.add(f"{pid}: {command.strip()}")
    return found
