"""Does what is on the disk survive a kill at any moment? Tried at every file operation, as SQLite tests itself.

    for crash in crash_points(lambda: save(path), path.parent, prepare=lambda: start_afresh(path)):
        assert load(path) in (OLD, NEW)

Every turn a child process runs the function and is killed (SIGKILL) before its first, second, … operation on files
below the directory, until there is none left. A write counts as two operations, so that it is also cut in half. With
`power_cut` the machine goes down with it: what was not fsynced is not there. Then contents that were written after a
file's last fsync are gone. Names that were made, moved or removed after the last fsync of the directory that they stand
in are as they were before ("lost"), some are and some are not ("partly"), or all have reached the disk before the
contents ("torn": the file is there, cut short or full of zeros).

The child is forked, so the function may be any callable. Fork where no other thread holds a lock that the function needs.
Linux only: it looks into /proc.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import select
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

PowerCut = Literal["lost", "partly", "torn"]

POINTS_MAX = 100_000
CHILD_TIMEOUT_S = 120.0
_PATCHED = (
    "open", "write", "fsync", "fdatasync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate",
    "ftruncate", "link", "symlink",
)  # fmt: skip


class Crash(NamedTuple):
    """The child was killed before its `number`-th operation, `operation` on `path`; at the end `completed` is true."""

    number: int
    operation: str
    path: str
    completed: bool


class CrashTestError(AssertionError):
    """The function failed by itself, or did not come to an end."""


def crash_points(
    function: Callable[[], Any],
    directory: Path,
    *,
    prepare: Callable[[], Any] | None = None,
    power_cut: PowerCut | None = None,
    expect: tuple[type[BaseException], ...] = (),
    points: Iterable[int] | None = None,
) -> Iterator[Crash]:
    """Yield after each crash, and once after the function has come through unharmed (with `power_cut` the machine goes
    down just then).

    `prepare` is called before each turn, in this process, and lays out what `function` finds. `expect` are errors that
    the function may end with. `points` are the operations to be killed at, if not all of them. Raises CrashTestError for any
    other error, and for a child that hangs.
    """
    for number in range(1, POINTS_MAX) if points is None else points:
        if prepare is not None:
            prepare()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".crash-", dir=directory.parent) as scratch:
            disk = _Disk(directory, Path(scratch)) if power_cut else None
            crash = _one(function, directory, number, expect, disk)
            if disk is not None:
                disk.cut(cast(PowerCut, power_cut))
        yield crash
        if crash.completed:
            return
    if points is None:
        raise CrashTestError(f"no end after {POINTS_MAX} operations")


def _one(
    function: Callable[[], Any], directory: Path, number: int, expect: tuple[type[BaseException], ...], disk: _Disk | None
) -> Crash:
    """One child. What it does comes through a pipe, line by line: it is told before it is done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(function, _Shim(directory.resolve(), number, writer, disk), expect)
    os.close(writer)
    try:
        lines = _read_to_end(reader, pid)
    finally:
        os.close(reader)
    _, status = os.waitpid(pid, 0)
    told = [json.loads(line) for line in lines]
    if disk is not None:
        disk.told = told
    if told and told[-1][0] in ("failed", "completed"):
        if told[-1][0] == "failed":
            raise CrashTestError(f"the function failed by itself, not killed: {told[-1][1]}")
        return Crash(number, "", "", True)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise CrashTestError(f"the child ended with status {status} instead of being killed at operation {number}")
    operation, path, _ = [line for line in told if line[0] != "safe"][-1]
    return Crash(number, operation, path, False)


def _read_to_end(fd: int, pid: int) -> list[bytes]:
    data = bytearray()
    while True:
        ready, _, _ = select.select([fd], [], [], CHILD_TIMEOUT_S)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise CrashTestError(f"the child did nothing for {CHILD_TIMEOUT_S:g} s")
        if not (piece := os.read(fd, 65536)):
            return bytes(data).splitlines()
        data += piece


def _child(function: Callable[[], Any], shim: _Shim, expect: tuple[type[BaseException], ...]) -> NoReturn:
    shim.install()
    try:
        with contextlib.suppress(*expect):
            function()
        shim.tell("completed", "")
    except BaseException as error:
        shim.tell("failed", repr(error))
    os._exit(0)


# -- in the child ------------------------------------------------------------------------------------------------------


class _Shim:
    """Stands between the child and its files: counts, tells, and kills when it is time."""

    def __init__(self, directory: Path, number: int, pipe: int, disk: _Disk | None) -> None:
        self._directory, self._number, self._pipe, self._disk = f"{directory}/", number, pipe, disk
        self._real = {name: getattr(os, name) for name in _PATCHED}
        self._count, self._lock = 0, threading.Lock()

    def install(self) -> None:
        for name in _PATCHED:
            setattr(os, name, self._patched(name))
        builtins.open = io.open = cast(Any, self._open_file)

    def tell(self, what: str, path: str, **more: Any) -> None:
        self._real["write"](self._pipe, json.dumps([what, path, more]).encode() + b"\n")

    def step(self, operation: str, path: str | None) -> None:
        """One operation is about to be carried out."""
        if path is None:
            return
        with self._lock:
            self._count += 1
            self.tell(operation, path)
            if self._count == self._number:
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()

    def safe(self, path: str, size: int | None = None) -> None:
        """So much of a file (by default all of it), or the names in a directory, would be there after a power cut."""
        found = os.stat(path)
        names = {e.name: e.inode() for e in os.scandir(path)} if stat.S_ISDIR(found.st_mode) else None
        self.tell("safe", path, inode=found.st_ino, size=found.st_size if size is None else size, names=names)

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The full path (or that of an open descriptor) if it is below the directory, else None."""
        try:
            if isinstance(path, int):
                full = os.readlink(f"/proc/self/fd/{path}")
            else:
                base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
                parent, name = os.path.split(os.path.join(base, os.fsdecode(path)))
                full = os.path.join(os.path.realpath(parent), name)
        except (OSError, TypeError):
            return None
        return full if f"{full}/".startswith(self._directory) else None

    def _patched(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return real(*args, **kwargs)
            path = self.inside(args[0], kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            if name == "write" and path is not None:
                return self.write(args[0], args[1], path)
            if path is not None and self._disk is not None and name in ("replace", "rename", "unlink", "remove"):
                for going in (path, self.inside(args[1]) if name in ("replace", "rename") else None):
                    self._disk.keep(self._real["link"], going)
            self.step(name, path)
            result = real(*args, **kwargs)
            if path is not None and name in ("fsync", "fdatasync"):
                self.safe(path)
            elif path is not None and name == "open" and args[1] & os.O_TRUNC:
                self.safe(path, 0)
            return result

        return call

    def write(self, fd: int, data: Any, path: str) -> int:
        view, real = memoryview(data).cast("B"), self._real["write"]
        self.step("write", path)
        if len(view) < 2:
            return real(fd, view)
        half = real(fd, view[: len(view) // 2])
        self.step("second half of a write", path)
        return half + real(fd, view[half:])

    def _open_file(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """As `open`, but what is written goes through `os.write`, piece by piece."""
        writes = set(mode) & set("wxa+")
        path = self.inside(file) if writes else None
        if path is None:
            return _REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = mode.replace("b", "").replace("t", "")
        if not isinstance(file, int):
            self.step("open", path)
        raw = _CountedFile(self, path, file, raw_mode, closefd, opener)
        if "w" in mode:
            self.safe(path, 0)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


_REAL_OPEN = builtins.open


class _CountedFile(io.FileIO):
    def __init__(self, shim: _Shim, path: str, *args: Any) -> None:
        super().__init__(*args)
        self._shim, self._path = shim, path

    def write(self, data: Any) -> int:
        return self._shim.write(self.fileno(), data, self._path)


# -- the disk after a power cut ----------------------------------------------------------------------------------------


class _Disk:
    """What is known to be on the disk: as it was found, and as each fsync left it.

    The child puts a second name for every file that it is about to remove into `scratch`, so that it can come back.
    """

    def __init__(self, directory: Path, scratch: Path) -> None:
        self._directory, self._scratch = directory, scratch
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self._sizes: dict[int, int] = {}  # bytes that are safe, by inode
        self._names: dict[str, dict[str, int]] = {}  # entries that are safe, by directory
        for path in (directory, *directory.rglob("*")):
            self._note(path)

    def _note(self, path: Path) -> None:
        found = path.lstat()
        self._sizes[found.st_ino] = found.st_size
        if stat.S_ISDIR(found.st_mode):
            self._names[str(path.resolve())] = {entry.name: entry.inode() for entry in os.scandir(path)}
        elif stat.S_ISREG(found.st_mode):
            self.keep(os.link, str(path))

    def keep(self, link: Callable[[str, Path], Any], path: str | None) -> None:
        """Hold on to a file whose name may go away."""
        with contextlib.suppress(OSError):
            if path is not None and stat.S_ISREG(os.lstat(path).st_mode):
                link(path, self._scratch / str(os.lstat(path).st_ino))

    def cut(self, how: PowerCut) -> None:
        """Make the directory what a machine would find that went down now."""
        self._replay()
        kept = {int(p.name): p for p in self._scratch.iterdir()}
        if how != "torn":
            self._forget_names(self._directory.resolve(), kept, lambda inode: how == "lost" or inode % 3 != 0)
        for path in self._directory.rglob("*"):
            found = path.lstat()
            safe = self._sizes.get(found.st_ino, 0)
            if stat.S_ISREG(found.st_mode) and found.st_size > safe:
                os.truncate(path, safe)
                if how == "torn" and found.st_ino % 2:  # now short, now as long as it was, but empty
                    os.truncate(path, found.st_size)

    def _replay(self) -> None:
        """Follow what the child told: which files and directories were safe when it died."""
        for what, path, more in self.told:
            if what == "safe":
                self._sizes[more["inode"]] = more["size"]
                if more["names"] is not None:
                    self._names[path] = more["names"]

    def _forget_names(self, directory: Path, kept: dict[int, Path], forgotten: Callable[[int], bool]) -> None:
        """Take back what became of names. A rename is one thing: it is `forgotten` at both of its ends, or at neither."""
        safe = self._names.get(str(directory), {})
        restored = set[str]()
        for entry in list(os.scandir(directory)):
            if safe.get(entry.name) != entry.inode() and forgotten(entry.inode()):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
                restored.add(entry.name)  # what it had replaced is there again
        for name, inode in safe.items():
            path = directory / name
            if path.exists() or not (name in restored or forgotten(inode)):
                continue
            if str(path) in self._names:
                path.mkdir()  # it was removed with all that was in it, which comes back with it
            elif inode in kept:
                os.link(kept[inode], path)
        for entry in list(os.scandir(directory)):
            if entry.is_dir(follow_symlinks=False):
                self._forget_names(Path(entry.path), kept, forgotten)
