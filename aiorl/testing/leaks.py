"""What a process has that a test could leave behind. Needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SHARED = Path("/dev/shm")
COUNTED = ("anon_inode:", "/memfd:", "pipe:", "socket:")
"""Descriptors that count: of pipes, sockets, event loops, shared memory. Files and the terminal may come and go."""


def belongings() -> dict[str, set[str]]:
    """Tasks, threads, child processes, descriptors and named shared blocks that there are now."""
    return {
        "tasks": _tasks(),
        "threads": {f"{thread.name} ({thread.ident})" for thread in threading.enumerate()},
        "processes": children(),
        "descriptors": _descriptors(),
        "shared blocks": {path.name for path in SHARED.glob("*") if path.is_file()},
    }


def left_behind(before: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """What there is now and was not there `before`, by kind; empty if nothing. Uncollected garbage does not count, nor do
    shared blocks that a process outside of this family uses, e.g. one of tests that run beside these."""
    for collect in (False, True):
        if collect:  # e.g. arrays on shared memory in the traceback of an error that the test expected
            gc.collect()
        now = belongings()
        new = {kind: now[kind] - before[kind] for kind in now}
        if new["shared blocks"]:
            new["shared blocks"] -= _used_elsewhere(new["shared blocks"])
        left = {kind: sorted(found) for kind, found in new.items() if found}
        if not left:
            break
    return left


def children() -> set[str]:
    """Living child processes of this one as `pid command`, where /proc tells; the resource tracker of the standard
    library may stay."""
    found: set[str] = set()
    for pid in _children_of(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended between the two reads
        if "resource_tracker" not in command:
            found.add(f"{pid} {command.strip()}")
    return found


def _children_of(pid: int) -> Iterator[int]:
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended between the two looks
            yield from map(int, listing.read_text().split())


def _family(pid: int) -> Iterator[int]:
    """A process and all that it and its children have started."""
    yield pid
    for child in _children_of(pid):
        yield from _family(child)


def _used_elsewhere(names: set[str]) -> set[str]:
    """Which shared blocks are open or mapped in processes that this one has not started, as far as it may look."""
    mine, found = set(_family(os.getpid())), set[str]()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) in mine or found == names:
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            used = {line.split()[-1] for line in (entry / "maps").read_text().splitlines() if str(SHARED) in line}
            used |= {os.readlink(fd) for fd in (entry / "fd").glob("*")}
            found |= {name for name in names if str(SHARED / name) in used}
    return found


def end(processes: Iterable[str]) -> None:
    """Kill processes as `children` names them."""
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended by itself
            os.kill(int(process.split()[0]), signal.SIGKILL)


def _tasks() -> set[str]:
    """Unfinished asyncio tasks of any event loop, also of a closed one."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return set()
    # By type(): asking some objects for their class runs their code.
    found = [o for o in gc.get_objects() if issubclass(type(o), asyncio.Task) and not o.done()]
    return {f"{task.get_name()} {getattr(task.get_coro(), '__qualname__', '')} ({id(task):#x})" for task in found}


def _descriptors() -> set[str]:
    """Open pipes and the like, but for the one to the standard library's resource tracker."""
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    found: set[str] = set()
    for link in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue  # the one that the listing itself was read with
        if target.startswith(COUNTED) and link.name != str(getattr(tracker, "_fd", None)):
            found.add(f"{link.name} -> {target}")
    return found
