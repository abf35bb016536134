"""Everything outside the event loop of a simulated run: threads that are tasks, and worker processes that are tasks too.

Real are: the session with all its loops, pacer, ledger, weights, evaluation, checkpoints; the pipes with their records; the
keepers that supervise the workers; the `Station` that fills the slots. Simulated are `OffloadThread` (a task that runs each
call at once, at a random moment within the time that it is said to take) and what a `Launcher` starts (a task that
serves credits from the pipe as `workers.program.main` does, and can die, hang, stop and be late like a process).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np

from aiorl.assembly import Backends
from aiorl.testing.faults import Doer, Fault, FaultPlan, InjectedFault
from aiorl.testing.sim import THREAD_PREFIX, Sim
from aiorl.testing.threads import SimThread
from aiorl.workers.control import Control, Stopped
from aiorl.workers.control import Counter as Places
from aiorl.workers.hold import Rest, Standing
from aiorl.workers.launch import Launcher, WorkerProcess
from aiorl.workers.questions import Ask, Asking
from aiorl.workers.records import READ_BYTES, RECORD_BYTES, Kind, Record, unpack
from aiorl.workers.station import Station, StationSetup
from aiorl.workers.supervision import BACK_OFF_S, RESTART_WINDOW_S, RESTARTS_MAX
from aiorl.workers.worker import PipesOnTheirWay

FIRST_PID = 1 << 30  # beyond every real process id, so that nobody is hit by mistake


@dataclass(frozen=True)
class Pace:
    """Mean virtual seconds of a segment, an update, a call to the files' thread, a start, an evaluation (exponentially
    distributed each)."""

    segment_s: float = 0.02
    update_s: float = 0.02
    file_s: float = 0.005
    start_s: float = 0.02
    evaluate_s: float = 0.05

    @classmethod
    def random(cls, rng: np.random.Generator) -> Pace:
        """Now the workers are the slow ones, now the learner, now the disk."""

        def draw() -> float:
            return float(0.002 * 30 ** rng.random())

        return cls(draw(), draw(), draw() / 2, draw(), draw() * 2)


class World(Doer):
    """What one simulated run stands on. `steps` counts rows of the groups by worker, `collected` the transitions that were
    announced to the training process, `processes` are all that were ever started."""

    def __init__(self, sim: Sim, plan: FaultPlan | None = None, pace: Pace | None = None) -> None:
        self.sim, self.pace = sim, pace or Pace()
        self.processes: list[SimProcess] = []
        self.steps: Counter[int] = Counter()
        self.collected = 0
        self._refused: Counter[int] = Counter()
        self._due = [fault for fault in (plan or FaultPlan()).faults if fault.at.unit == "step"]
        self._rng = np.random.default_rng(np.random.SeedSequence(sim.seed, spawn_key=(7,)))

    @property
    def backends(self) -> Backends:
        return Backends(thread=lambda name: SimThread(self, name), launcher=lambda *_: SimLauncher(self), watch_loop=False)

    def draw_s(self, mean_s: float) -> float:
        return float(self._rng.exponential(mean_s))

    def share(self) -> float:
        """How much of its time a piece of work takes before it is done, the rest after: all, nothing, or in between."""
        return float(np.clip(self._rng.random() * 3.0 - 1.0, 0.0, 1.0))

    def too_many_starts(self) -> list[str]:
        """Workers that were started again more often than their budget allows."""
        found: list[str] = []
        for number in {process.number for process in self.processes}:
            own = [p for p in self.processes if p.number == number]
            # A start with more stations than before is not held against it.
            again_s = [p.started_s for before, p in itertools.pairwise(own) if len(p.setups) == len(before.setups)]
            for first, last in zip(again_s, again_s[RESTARTS_MAX:], strict=False):
                if last - first < RESTART_WINDOW_S - max(BACK_OFF_S):
                    found.append(f"worker {number} was started {RESTARTS_MAX + 1} times in {last - first:.1f} s")
        return found

    async def aclose(self) -> None:
        """End whatever is still alive, and unmap the memory: once the run has ended, whichever way."""
        for process in self.processes:
            await process.discard()

    # -- faults ------------------------------------------------------------------------------------------------------

    def send(self, pid: int, number: int) -> None:
        """As `os.kill`. ProcessLookupError if there is no such process."""
        self.processes[pid - FIRST_PID].signal(number)

    def inside(self, fault: Fault) -> None:
        if fault.what == "refuse":
            self._refused[fault.worker] += 1
        else:
            self._due.append(fault._replace(at=fault.at._replace(unit="step", value=0)))

    def refuses(self, worker: int) -> bool:
        """Whether no process can be had for this worker, this time."""
        refused = self._refused[worker] > 0
        self._refused[worker] -= refused
        return refused

    def due(self, worker: int) -> Fault | None:
        """One more step of a worker: the fault that it is time for, if any."""
        self.steps[worker] += 1
        for fault in self._due:
            if fault.worker == worker and self.steps[worker] >= fault.at.value:
                self._due.remove(fault)
                return fault
        return None


class SimLauncher(Launcher):
    """Starts tasks instead of processes."""

    def __init__(self, world: World) -> None:
        self._world = world

    def process(
        self, name: str, target: Callable[..., Any], args: Sequence[Any], initializer: Any, initargs: Sequence[Any]
    ) -> WorkerProcess:
        setups, pipes = cast("tuple[Sequence[StationSetup], PipesOnTheirWay]", args)
        process = SimProcess(self._world, name, setups, pipes)
        self._world.processes.append(process)
        return cast(WorkerProcess, process)

    def warm_up(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


# -- a worker ----------------------------------------------------------------------------------------------------------


class _Cut(BaseException):
    """Out of the middle of a segment: the process goes no further."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.what)
        self.fault = fault


class _Station(Station):
    """A station that notices at every step what is to go wrong."""

    def __init__(self, setup: StationSetup, world: World, worker: int, ask: Ask, standing: Standing) -> None:
        super().__init__(setup, ask=ask, standing=standing)
        self._world, self._worker, self.late_s = world, worker, 0.0

    def _beat(self, row: memoryview, step: int) -> None:
        super()._beat(row, step)
        fault = self._world.due(self._worker)
        if fault is None:
            return
        if fault.what == "slow":
            self.late_s += fault.for_s or 0.0
        elif fault.what == "fail":
            raise InjectedFault("planned in a step")
        else:
            raise _Cut(fault)


class SimProcess:
    """A worker as a task. It has what `Worker` needs of a process: start, exitcode, sentinel, terminate, kill, close.

    `number` is that of the worker; -1 is the evaluating one. Its groups take turns.
    """

    def __init__(self, world: World, name: str, setups: Sequence[StationSetup], pipes: PipesOnTheirWay) -> None:
        self.name, self.exitcode = name, cast("int | None", None)
        self.pid = FIRST_PID + len(world.processes)
        self.sentinel = -1
        self.setups, self.started_s = setups, world.sim.now_s
        self.number = setups[0].index if setups[0].groups else -1
        self._world, self._pipes = world, pipes
        self._fds: list[int] = []
        self._asking = Asking(self._ring, threads=False)
        self._running = asyncio.Event()
        self._running.set()

    def start(self) -> None:
        """OSError if there can be no process now."""
        if self._world.refuses(self.number):
            raise OSError(errno.EAGAIN, "planned: no more processes")
        self._credits_fd, self._doorbell_fd, self._hold_fd = self._fds = [os.dup(fd) for fd in self._pipes.fds]
        self.sentinel, alive_fd = os.pipe()
        self._fds.append(alive_fd)
        self._task = asyncio.get_running_loop().create_task(self._live(), name=f"{THREAD_PREFIX}{self.name}")

    # -- what is done to it -------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """ProcessLookupError if it has ended."""
        if self.exitcode is not None:
            raise ProcessLookupError(self.pid)
        if number == signal.SIGSTOP:
            self._running.clear()
        elif number == signal.SIGCONT:
            self._running.set()
        elif number == signal.SIGKILL or self._running.is_set():
            self._end(-number)
            self._task.cancel()

    def close(self) -> None:
        """Let go of the sentinel. ValueError while it runs."""
        if self.exitcode is None:
            raise ValueError("still running")
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1

    async def discard(self) -> None:
        """After the run: whoever still lives goes, unseen, and nobody looks at the shared memory any more."""
        if not self._fds:
            return
        self._end(-signal.SIGKILL)
        self._task.cancel()
        await asyncio.wait([self._task])
        for setup in self.setups:
            setup.block.close()
            setup.weight_block.close()

    def _end(self, exitcode: int) -> None:
        if self.exitcode is not None:
            return
        self.exitcode = exitcode
        for fd in (self._credits_fd, self._hold_fd):
            asyncio.get_running_loop().remove_reader(fd)
        for fd in self._fds:
            os.close(fd)

    # -- what it does -------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        control = Control(self.setups[0].block, self.setups[0].groups)
        try:
            await self._serve(control)
            self._end(0)
        except BrokenPipeError:
            self._end(0)  # the training process has gone on without this worker
        except asyncio.CancelledError:
            self._end(-signal.SIGKILL)
        except Exception as error:
            control.put_error(error)
            with contextlib.suppress(BrokenPipeError):
                os.write(self._doorbell_fd, Record(Kind.FAILED).pack())
            self._end(1)

    async def _serve(self, control: Control) -> None:
        world, pace = self._world, self._world.pace
        inbox: asyncio.Queue[Record | None] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(self._credits_fd, self._receive, inbox)
        await self._take(world.draw_s(pace.start_s), control)
        rest = Rest(self._hold_fd, self._ring, blocks=False)
        stations = [_Station(setup, world, self.number, self._ask, rest.wait) for setup in self.setups]
        of = {group: station for station in stations for group in station.groups}
        for station in stations:
            station.open()
        self._ring(Record(Kind.READY, value=self.pid % 2**31))
        while (credit := await inbox.get()) is not None and credit.kind is not Kind.STOP:
            mean_s = pace.evaluate_s if credit.kind is Kind.EVALUATE else pace.segment_s
            takes_s, share = world.draw_s(mean_s), world.share()
            station = of.get(credit.group, stations[0])
            await self._take(takes_s * share, control)
            try:
                doorbell = await station.answer(credit)
            except _Cut as cut:
                await self._suffer(cut.fault)
            except Stopped:
                break
            late_s, station.late_s = station.late_s, 0.0
            await self._take(takes_s * (1 - share) + late_s, control)
            self._ring(doorbell)
            if doorbell.kind is Kind.COLLECTED:
                world.collected += doorbell.value
        for station in stations:
            station.close()

    def _receive(self, inbox: asyncio.Queue[Record | None]) -> None:
        data = os.read(self._credits_fd, READ_BYTES)
        for record in unpack(data):
            if record.kind is Kind.ANSWER:
                self._asking.answered(record)
            else:
                inbox.put_nowait(record)
        if len(data) < RECORD_BYTES:
            asyncio.get_running_loop().remove_reader(self._credits_fd)
            inbox.put_nowait(None)

    async def _ask(self, question: Record) -> None:
        await self._asking.ask(question)
        await self._running.wait()

    def _ring(self, record: Record) -> None:
        os.write(self._doorbell_fd, record.pack())

    async def _take(self, seconds: float, control: Control) -> None:
        """Work for so long, with a sign of life now and then; not while stopped."""
        while seconds > 0:
            part_s = min(seconds, 0.1)
            await asyncio.sleep(part_s)
            await self._running.wait()
            control.table[0, Places.BEATS] += 1
            seconds -= part_s

    async def _suffer(self, fault: Fault) -> NoReturn:
        """In the middle of a segment; what remains in the block is just what was written so far."""
        if fault.what == "kill":
            self._end(-signal.SIGKILL)
            raise asyncio.CancelledError
        if fault.what == "stop":
            self._running.clear()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")
