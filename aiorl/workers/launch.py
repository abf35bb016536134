"""Starting a worker process: `aiomultiprocess.Process` on a fork server of our own.

Why not `aiomultiprocess.Process` as it is: its constructor starts a Manager (a pickle server, 200 ms on the loop), and if
that dies no process can be started any more. So the unit of work is built here, without a namespace.

Why a fork server, and why our own: one that has NumPy and gymnasium loaded starts a worker in milliseconds instead of half a
second, and its memory is shared. Python's global one belongs to the host, which may have set it up otherwise; ours ends with
the run.

This module leans on five things that Python and aiomultiprocess do not document; tests/test_launch.py holds them.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import context as mp_context  # pyright: ignore[reportAttributeAccessIssue]
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing import process as mp_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiomultiprocess
from aiomultiprocess.types import Unit

from aiorl.errors import ConfigError
from aiorl.filelock import FileLock, Held, state_of

MARK = "aiorl-{}.lock"
"""In the folder with the fork server's socket: held while a launcher lives, so that a folder left by a kill can be told."""

SHORT_DIR = "/tmp"
SOCKET_FOLDER_BYTES = 84  # 104 is the least that a system allows for the path, with "/listener-12345678" and a zero

_numbers = itertools.count()


class Launcher:
    """Starts processes; owns the fork server they come from. Its methods block: call them off the event loop."""

    def __init__(
        self, *, import_main: bool = False, method: str = "forkserver", modules: Sequence[str] = ()
    ) -> None:
        """`import_main`: workers import the host's `__main__` (needed only for environments defined there). `modules` are
        imported by the fork server, so that workers have them at once and share their memory; none may start a thread."""
        self._server = forkserver.ForkServer()
        # Elsewhere a system's own libraries may not live through a fork: macOS ends such a process.
        shared = modules if sys.platform == "linux" else ()
        self._server.set_forkserver_preload(["aiorl.workers.preload", *shared])
        self._import_main = import_main
        self._method = method
        self._mark: FileLock | None = None
        self._serves = False  # it has made a process

    def process(
        self,
        name: str,
        target: Callable[..., Any],
        args: Sequence[Any],
        initializer: Callable[..., Any],
        initargs: Sequence[Any],
    ) -> WorkerProcess:
        return WorkerProcess(self, name, target, args, initializer, initargs)

    def launch(self, process: BaseProcess) -> Any:
        """The multiprocessing side of a started process."""
        popen = _SpawnPopen if self._method == "spawn" else _ForkServerPopen
        with _deaf_to_ctrl_c():
            made = popen(process, self._server, self._import_main)
        self._serves = True
        return made

    def warm_up(self) -> None:
        """Start the fork server, so that it loads its modules while other things are being prepared."""
        if self._method == "forkserver":
            remove_leftovers()
            _see_to_short_paths()
            with _deaf_to_ctrl_c():
                self._server.ensure_running()
            with contextlib.suppress(OSError, Held):
                self._mark = FileLock(Path(util.get_temp_dir()) / MARK.format(f"{os.getpid()}-{next(_numbers)}"))

    def give_up(self) -> None:
        """End a fork server that still loads its modules, and with it a `launch` that waits for that. For any thread."""
        if not self._serves:
            self._kill_server()

    def _kill_server(self) -> None:
        """It alone: where it has died and the host has it reaped, its number may be somebody else's by now."""
        pid: int | None = self._server._forkserver_pid  # type: ignore[attr-defined]
        if pid is not None:
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    os.kill(pid, signal.SIGKILL)

    def _reap_server(self) -> None:
        server: Any = self._server
        with contextlib.suppress(ChildProcessError):  # the host ignores SIGCHLD, or reaps whatever has ended
            server._stop()
        if server._forkserver_pid is not None:
            server._forkserver_pid = None
            Path(server._forkserver_address).unlink(missing_ok=True)

    def close(self) -> None:
        """End the fork server. Call it when all its processes have ended: of one that lives nobody would learn the end.

        Not by asking: it would wait for whatever an environment has started, which holds the pipe that would tell it."""
        with contextlib.ExitStack() as stack:
            if self._mark is not None:
                stack.callback(self._mark.release)
            self._kill_server()
            self._reap_server()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started in here does not hear the terminal's Ctrl-C, from its first moment until `program.prepare`: else it
    would print a traceback. The mask is that of this thread alone."""
    resource_tracker.ensure_running()  # it unblocks the signal for its own start, so let that be over
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _see_to_short_paths() -> None:
    """The fork server's socket lies in multiprocessing's temporary folder, and a socket's path must be short. Where TMPDIR
    is long that folder is made in SHORT_DIR, as Python does from 3.14 on. Raises ConfigError if it was made before."""
    config = mp_process.current_process()._config  # type: ignore[attr-defined]
    folder = config.get("tempdir")
    if len(os.fsencode(folder or f"{tempfile.gettempdir()}/pymp-12345678")) <= SOCKET_FOLDER_BYTES:
        return
    if folder is not None or not os.access(SHORT_DIR, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the temporary folder {folder or tempfile.gettempdir()} has too long a path for the socket of the workers\n"
            "  set TMPDIR to a folder with a path of at most 70 characters"
        )
    config["tempdir"] = folder = tempfile.mkdtemp(prefix="pymp-", dir=SHORT_DIR)
    # As multiprocessing does with its own: after everything else at exit.
    util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)


def remove_leftovers() -> None:
    """Delete the folders of sockets that runs left behind whose process was killed before it could."""
    folders = {Path(tempfile.gettempdir()), Path(SHORT_DIR)}
    for mark in itertools.chain(*(folder.glob("pymp-*/" + MARK.format("*")) for folder in folders)):
        others = {path.name.partition("-")[0] for path in _listing(mark.parent) if path != mark}
        if others <= {"listener", "aiorl"} and all(map(_is_left, mark.parent.glob(MARK.format("*")))):
            shutil.rmtree(mark.parent, ignore_errors=True)


def _is_left(mark: Path) -> bool:
    """Its process is gone. The lock alone does not tell: a living process makes the file a moment before it locks it."""
    pid = mark.name.split("-")[1]
    return state_of(mark) == "left" and pid.isdigit() and not _lives(int(pid))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of somebody else
    return True


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class WorkerProcess(aiomultiprocess.Process):
    """An aiomultiprocess process made without a Manager."""

    def __init__(
        self,
        launcher: Launcher,
        name: str,
        target: Callable[..., Any],
        args: Sequence[Any],
        initializer: Callable[..., Any],
        initargs: Sequence[Any],
    ) -> None:
        self.unit = Unit(
            target=target, args=args, kwargs={}, namespace=None, initializer=initializer, initargs=initargs
        )  # fmt: skip
        self.aio_process: Any = _Process(launcher, name, self.unit)

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        return self.aio_process.sentinel


class _Process(BaseProcess):
    """A multiprocessing process whose start is the launcher's business."""

    _start_method = None  # the child keeps Python's own default for processes that an environment may start

    def __init__(self, launcher: Launcher, name: str, unit: Unit) -> None:
        super().__init__(target=aiomultiprocess.Process.run_async, args=(unit,), name=name, daemon=True)
        self._launcher: Launcher | None = launcher

    def run(self) -> None:
        """In the child. The host does not wait for it at its exit, for it is a daemon; but it may have children."""
        self._config = {**self._config, "daemon": False}  # type: ignore[attr-defined]
        super().run()

    def _Popen(self, process_obj: BaseProcess) -> Any:  # type: ignore[override]
        launcher, self._launcher = self._launcher, None  # the child must not get it
        assert launcher is not None
        return launcher.launch(process_obj)


class _ForkServerPopen(popen_forkserver.Popen):
    """As the standard one, but from the given fork server and importing `__main__` only where that is needed."""

    def __init__(self, process_obj: BaseProcess, server: Any, import_main: bool) -> None:
        self._server, self._import_main = server, import_main
        super().__init__(process_obj)

    def _launch(self, process_obj: BaseProcess) -> None:
        data = spawn.get_preparation_data(process_obj.name)
        if not self._import_main:
            data = {k: v for k, v in data.items() if not k.startswith("init_main")}
        buffer = io.BytesIO()
        mp_context.set_spawning_popen(self)
        try:
            reduction.dump(data, buffer)
            reduction.dump(process_obj, buffer)
        finally:
            mp_context.set_spawning_popen(None)
        self.sentinel, write_fd = self._server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # A second write end, held by this process only: it closes when we die, which is how a worker notices.
        parent_fd = os.dup(write_fd)
        self.finalizer = util.Finalize(self, _close_fds, (parent_fd, self.sentinel))
        try:
            with open(write_fd, "wb") as file:
                file.write(buffer.getbuffer())
            self.pid = forkserver.read_signed(self.sentinel)  # type: ignore[attr-defined]
        except (EOFError, BrokenPipeError) as error:
            self.finalizer()
            raise ConnectionResetError("the fork server died when it was to make a process") from error


def _close_fds(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _spawn_popen() -> Any:
    from multiprocessing import popen_spawn_posix

    class SpawnPopen(popen_spawn_posix.Popen):
        def __init__(self, process_obj: BaseProcess, server: Any, import_main: bool) -> None:
            super().__init__(process_obj)

    return SpawnPopen


_SpawnPopen: Any = _spawn_popen() if sys.platform != "win32" else None
