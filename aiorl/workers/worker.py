"""One worker process seen from the event loop: pipes, readiness, death, and its end. `supervision` starts the next one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiorl.errors import WorkerError
from aiorl.workers.control import Control, Counter, Phase, where
from aiorl.workers.hold import Hold
from aiorl.workers.launch import Launcher, WorkerProcess
from aiorl.workers.memory import dup_for_child
from aiorl.workers.program import Pipes, main, prepare
from aiorl.workers.records import READ_BYTES, Kind, Record, unpack
from aiorl.workers.station import StationSetup

STOP_GRACE_S = 0.6  # to end by itself after STOP; then SIGTERM
TERM_GRACE_S = 0.4  # after SIGTERM; then SIGKILL
HUNG_GRACE_S = 1.0  # the same for one that hangs
KILL_GRACE_S = 5.0  # after SIGKILL, on a machine with much to do
ORPHAN_GRACE_S = 0.4  # for a process to notice that nobody waits for it any more


class Fault(NamedTuple):
    """What ended a worker or makes it useless: the error, and its cause in one line."""

    error: WorkerError
    reason: str


class Worker:
    """A process that serves the credits of some stations. `on_record` gets its doorbells; once it has `ended` there is a
    `fault`."""

    def __init__(
        self,
        setups: Sequence[StationSetup],
        launcher: Launcher,
        log_path: str | None,
        on_record: Callable[[Record], None],
        hold: Hold,
    ) -> None:
        self.setups, self._hold = setups, hold
        self.name = f"worker {setups[0].index}" if setups[0].groups else "evaluation worker"
        self.log_path = log_path
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.fault: Fault | None = None
        self._silent = asyncio.Event()  # nobody can ring the doorbell any more
        self._controls = [Control(setup.block, setup.groups) for setup in setups]
        self._launcher, self._on_record = launcher, on_record
        self._process: WorkerProcess | None = None
        self._attached = False
        self._credits_fd = self._doorbell_fd = -1

    # -- start -----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the process (blocks for milliseconds: call it off the loop, then `attach` on it). May raise OSError."""
        for setup, control in zip(self.setups, self._controls, strict=True):
            control.admit(setup.life)
        child_credits, self._credits_fd = os.pipe()
        self._doorbell_fd, child_doorbell = os.pipe()
        try:
            process = self._launcher.process(
                f"aiorl-{self.name.replace(' ', '-')}",
                main,
                (self.setups, PipesOnTheirWay(child_credits, child_doorbell, self._hold.fd)),
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
        self._attached = True
        loop = asyncio.get_running_loop()
        os.set_blocking(self._doorbell_fd, False)
        loop.add_reader(self._doorbell_fd, self._receive)
        loop.add_reader(self._process.sentinel, self._died)

    # -- work ------------------------------------------------------------------------------------------------------

    def send(self, credit: Record) -> None:
        """Hand over a credit; never blocks (the pipe holds 4096 of them, far more than are ever outstanding)."""
        if self._credits_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # just died: the sentinel tells
                os.write(self._credits_fd, credit.pack())

    def _receive(self) -> bool:
        """Take in the doorbells that have rung; False if there were none."""
        if self._doorbell_fd < 0:
            return False
        try:
            data = os.read(self._doorbell_fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._doorbell_fd)
            self._silent.set()
        for record in unpack(data):
            if record.kind is Kind.READY:
                if not self.ready.done():
                    self.ready.set_result(None)
            elif record.kind is not Kind.FAILED:  # its last words are read when it has ended
                self._on_record(record)
        return bool(data)

    def take_in(self) -> None:
        """Hear every doorbell that has rung, also before the loop gets round to it."""
        while self._receive():
            pass

    @property
    def beats(self) -> list[int]:
        """A number for each station and each of its groups: it changes with every environment step that is finished."""
        return [number for control in self._controls for number in control.beats]

    @property
    def stepping(self) -> dict[int, int]:
        """The groups that are at work, and can be waiting neither for their turn nor for the end of a pause: place in
        `beats` -> group."""
        found: dict[int, int] = {}
        begin = 0
        for setup, control in zip(self.setups, self._controls, strict=True):
            for place, group in enumerate(setup.groups, start=begin + 1):
                waits = setup.steps_at_once is not None and not control.of(Counter.STEPPING, group)
                waits = waits or control.stands(group)
                if control.of(Counter.PHASE, group) == Phase.COLLECTING and not waits and not setup.takes_turns:
                    found[place] = group
            begin += 1 + len(setup.groups)
        return found

    @property
    def standing(self) -> set[int]:
        """The groups that are held and have come to a stand."""
        return {group for control in self._controls for group in control.groups if control.stands(group)}

    def where(self, group: int | None = None) -> str:
        """What the worker, or one group of it, is or was doing, for messages."""
        return where(self._controls, group)

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
        self.take_in()  # doorbells rung before it died still count
        self.fault = self._last_words(exitcode)
        if not self.ready.done():
            self.ready.set_exception(self.fault.error)
            self.ready.exception()  # looked at here, so that asyncio never calls it "never retrieved"
        self.ended.set()

    def _last_words(self, exitcode: int) -> Fault:
        words = next((words for control in self._controls if (words := control.error()) is not None), None)
        if words is not None:
            log = f"\n  worker log: {self.log_path}" if self.log_path else ""
            how, message = f"failed {self.where()}", words["message"]
            error = WorkerError(f"{self.name} {how}\n  {message}{log}", detail=words["detail"])
            return Fault(error, f"{how}: {message.partition(chr(10))[0]}")
        how = f"exited with code {exitcode}"
        if exitcode < 0:
            how = f"was ended by {_signal_name(-exitcode)}"
            if exitcode == -signal.SIGKILL:
                how += " (possibly out of memory)"
        log = f"\n  its last output is in {self.log_path}" if self.log_path else ""
        return Fault(WorkerError(f"{self.name} {how} {self.where()}{log}"), f"{how} {self.where()}")

    async def stop(self) -> None:
        """End the process: by itself if it can, by SIGTERM, by SIGKILL. Returns when it is gone."""
        self._dismiss()  # it wins over the credits that wait in the pipe before STOP
        self.send(Record(Kind.STOP))
        await self._see_it_end(STOP_GRACE_S, TERM_GRACE_S)
        self._close_credits()
        self._close_doorbell()

    async def end(self) -> None:
        """Make sure that the process, which has died or hangs, touches nothing any more. WorkerError if it will not end."""
        self._dismiss()
        await self._see_it_end(0.0, HUNG_GRACE_S)
        if self._process is not None and not self.ended.is_set():
            raise WorkerError(f"{self.name} hangs and could not be ended by SIGKILL")
        self._close_credits()
        # When the fork server dies its workers only seem to. They notice that they have been given up, and go.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ORPHAN_GRACE_S if self._attached else 0.0):
                await self._silent.wait()
        self._close_doorbell()

    def _dismiss(self) -> None:
        for control in self._controls:
            control.dismiss()

    async def _see_it_end(self, term_after_s: float, kill_after_s: float) -> None:
        if self._process is None:
            return
        if not self._attached:  # nobody waited for the launch
            self.attach()
        steps = ((term_after_s, self._process.terminate), (kill_after_s, self._process.kill), (KILL_GRACE_S, None))
        for grace_s, signal_it in steps:
            try:
                async with asyncio.timeout(grace_s):
                    await self.ended.wait()
                    return
            except TimeoutError:
                if signal_it is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal_it()

    def _close_credits(self) -> None:
        if self._credits_fd >= 0:
            os.close(self._credits_fd)
            self._credits_fd = -1
        if self._process is not None:
            with contextlib.suppress(ValueError):
                self._process.close()

    def _close_doorbell(self) -> None:
        if self._doorbell_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._doorbell_fd)
            os.close(self._doorbell_fd)
            self._doorbell_fd = -1

    def release_memory(self) -> None:
        """Let go of the shared blocks, so that they can be unmapped."""
        self._controls.clear()

    @property
    def pid(self) -> int | None:
        """Its process id while it lives."""
        return self._process.pid if self._process is not None and not self.ended.is_set() else None


class PipesOnTheirWay:
    """Pickles into a worker as its `Pipes`."""

    def __init__(self, credits_fd: int, doorbell_fd: int, hold_fd: int) -> None:
        self.fds = credits_fd, doorbell_fd, hold_fd

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipes, tuple(dup_for_child(fd) for fd in self.fds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
