"""One worker process seen from the event loop: pipes, readiness, death, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from aiorl.errors import WorkerError
from aiorl.workers.launch import Launcher, WorkerProcess
from aiorl.workers.memory import dup_for_child
from aiorl.workers.program import Control, Counter, Phase, Pipes, StationSetup, main, prepare
from aiorl.workers.records import READ_BYTES, Kind, Record, unpack

STOP_GRACE_S = 0.6  # to end by itself after STOP; then SIGTERM
TERM_GRACE_S = 0.4  # after SIGTERM; then SIGKILL


class Worker:
    """A process that serves credits. `on_record` gets its doorbells, `on_death` the one error that ended it."""

    def __init__(
        self,
        setup: StationSetup,
        launcher: Launcher,
        log_path: str | None,
        on_record: Callable[[Record], None],
        on_death: Callable[[WorkerError], None],
    ) -> None:
        self.setup = setup
        self.name = f"worker {setup.index}" if setup.groups else "evaluation worker"
        self.log_path = log_path
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.outstanding = 0  # credits not answered
        self._control = Control(setup.block)
        self._launcher, self._on_record, self._on_death = launcher, on_record, on_death
        self._process: WorkerProcess | None = None
        self._credits_fd = self._doorbell_fd = -1
        self._stopping = False
        self._last_beat = (-1, time.monotonic())

    # -- start -----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the process (blocks for milliseconds: call it off the loop, then `attach` on it)."""
        child_credits, self._credits_fd = os.pipe()
        self._doorbell_fd, child_doorbell = os.pipe()
        try:
            process = self._launcher.process(
                f"aiorl-{self.name.replace(' ', '-')}",
                main,
                (self.setup, _PipesOnTheirWay(child_credits, child_doorbell)),
                prepare,
                (self.log_path,),
            )
            process.start()
            self._process = process
        finally:
            os.close(child_credits)
            os.close(child_doorbell)

    def attach(self) -> None:
        """Watch the started process from the event loop."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        os.set_blocking(self._doorbell_fd, False)
        loop.add_reader(self._doorbell_fd, self._receive)
        loop.add_reader(self._process.sentinel, self._died)

    # -- work ------------------------------------------------------------------------------------------------------

    def send(self, credit: Record) -> None:
        """Hand over a credit; never blocks (the pipe holds 4096 of them, far more than are ever outstanding)."""
        if self.ended.is_set():
            return  # its death has been reported
        if self.outstanding == 0:
            self._last_beat = (self._last_beat[0], time.monotonic())
        self.outstanding += 1
        with contextlib.suppress(BrokenPipeError):  # just died: the sentinel tells
            os.write(self._credits_fd, credit.pack())

    def _receive(self) -> None:
        try:
            data = os.read(self._doorbell_fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._doorbell_fd)
        for record in unpack(data):
            if record.kind is Kind.READY:
                if not self.ready.done():
                    self.ready.set_result(None)
            elif record.kind is not Kind.FAILED:  # its last words are read when it has ended
                self.outstanding -= 1
                self._on_record(record)

    def hung_for_s(self) -> float:
        """Seconds since the worker last finished an environment step while it had something to do (0 if idle)."""
        beats = int(self._control.counters[Counter.BEATS]) + int(self._control.counters[Counter.ORDINAL]) * 2**32
        now = time.monotonic()
        if beats != self._last_beat[0] or self.outstanding == 0:
            self._last_beat = (beats, now)
        return now - self._last_beat[1]

    def where(self) -> str:
        """What the worker is or was doing, for messages."""
        counters = self._control.counters
        phase = int(counters[Counter.PHASE])
        if phase == Phase.COLLECTING:
            group = int(counters[Counter.GROUP])
            envs = self.setup.groups[group]
            return (
                f"in rollout {int(counters[Counter.ORDINAL])}, step {int(counters[Counter.STEP])} of the segment, "
                f"environments {envs.start}-{envs.stop - 1}"
            )
        return {Phase.STARTING: "while starting", Phase.EVALUATING: "in an evaluation"}.get(phase, "between segments")

    # -- end -------------------------------------------------------------------------------------------------------

    def _died(self) -> None:
        assert self._process is not None
        loop = asyncio.get_running_loop()
        exitcode = self._process.exitcode
        if exitcode is None:  # the sentinel may fire before the exit code is there
            loop.call_later(0.002, self._died)
            loop.remove_reader(self._process.sentinel)
            return
        loop.remove_reader(self._process.sentinel)
        self._receive()  # doorbells rung before it died still count
        loop.remove_reader(self._doorbell_fd)
        self.ended.set()
        if self._stopping:
            return
        error = self._last_words(exitcode)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # looked at here, so that asyncio never calls it "never retrieved"
        self._on_death(error)

    def _last_words(self, exitcode: int) -> WorkerError:
        words = self._control.error()
        if words is not None:
            log = f"\n  worker log: {self.log_path}" if self.log_path else ""
            return WorkerError(f"{self.name} failed {self.where()}\n  {words['message']}{log}", detail=words["detail"])
        how = f"exited with code {exitcode}"
        if exitcode < 0:
            how = f"was ended by {_signal_name(-exitcode)}"
            if exitcode == -signal.SIGKILL:
                how += " (possibly out of memory)"
        log = f"\n  its last output is in {self.log_path}" if self.log_path else ""
        return WorkerError(f"{self.name} {how} {self.where()}{log}")

    async def stop(self) -> None:
        """End the process: by itself if it can, by SIGTERM, by SIGKILL. Returns when it is gone."""
        self._stopping = True
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._credits_fd, Record(Kind.STOP).pack())
        for grace_s, end in ((STOP_GRACE_S, self._process.terminate), (TERM_GRACE_S, self._process.kill), (5.0, None)):
            try:
                async with asyncio.timeout(grace_s):
                    await self.ended.wait()
                    break
            except TimeoutError:
                if end is not None:
                    with contextlib.suppress(ProcessLookupError):
                        end()
        for fd in (self._credits_fd, self._doorbell_fd):
            os.close(fd)
        with contextlib.suppress(ValueError):
            self._process.close()

    def release_memory(self) -> None:
        """Let go of the shared block, so that it can be unmapped."""
        del self._control

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None


class _PipesOnTheirWay:
    """Pickles into a worker as its `Pipes`."""

    def __init__(self, credits_fd: int, doorbell_fd: int) -> None:
        self._fds = credits_fd, doorbell_fd

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipes, tuple(dup_for_child(fd) for fd in self._fds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
