"""A process started as workers are started, that tells what it finds line by line and may hang, crash or print."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

from aiorl.workers.launch import Launcher, WorkerProcess
from aiorl.workers.memory import dup_for_child
from aiorl.workers.program import prepare

END_GRACE_S = 2.0


class Child:
    """Runs `program(fd, output, *args)`, a coroutine function; leaving the block kills it if it is still there.

    It gives messages to `tell(fd, …)` and may call `redirect_stdout(output)`. Its files lie in `directory`.
    """

    def __init__(self, launcher: Launcher, program: Callable[..., Any], directory: Path, *args: Any) -> None:
        self._log, self._output = directory / f"{program.__name__}.log", directory / f"{program.__name__}.out"
        self._fd, child_fd = os.pipe()
        self._process: WorkerProcess = launcher.process(
            "aiorl-check", program, (_End(child_fd), str(self._output), *args), prepare, (str(self._log),)
        )
        try:
            self._process.start()
        except BaseException:
            os.close(self._fd)
            raise
        finally:
            os.close(child_fd)

    def messages(self, patience_s: float) -> Iterator[dict[str, Any]]:
        """What it tells, until it has ended. Raises TimeoutError when it is silent for so long."""
        rest = b""
        while True:
            if not select.select([self._fd], [], [], patience_s)[0]:
                raise TimeoutError(f"no sign of life for {patience_s:g} s")
            data = os.read(self._fd, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from (json.loads(line) for line in lines)

    def terminate(self) -> None:
        """Ask it to end, as a run that is stopping does."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just ended, and its sentinel does not say so yet
            os.kill(self._process.pid, number)

    def ends_within(self, seconds: float) -> bool:
        return bool(connection.wait([self._process.sentinel], seconds))

    def how_it_ended(self) -> str:
        self.ends_within(END_GRACE_S)
        code = self._process.exitcode
        return f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"

    def last_words(self) -> str:
        """The last line that it, or the library that ended it, wrote to stderr."""
        lines = _read(self._log).strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""

    def printed(self) -> str:
        return _read(self._output)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ends_within(0):
            self._signal(signal.SIGKILL)
            self.ends_within(END_GRACE_S)
        os.close(self._fd)
        with contextlib.suppress(ValueError):  # not even SIGKILL has ended it
            self._process.exitcode  # noqa: B018 - asking takes in that it has ended
            self._process.close()


def tell(fd: int, **message: Any) -> None:
    """In the child: one line of JSON."""
    os.write(fd, json.dumps(message).encode() + b"\n")


def redirect_stdout(path: str) -> None:
    """In the child. stderr keeps going to the log: warnings of libraries are not meant for a reader of the output."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.close(fd)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


class _End:
    """The writing end of a pipe on its way into a process, where it arrives as a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (dup_for_child(self.fd),)


def _arrive(fd: Any) -> int:
    return fd.detach()
