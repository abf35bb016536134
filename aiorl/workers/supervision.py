"""Keeping workers going: one that dies or hangs is started again, and nothing is lost but time.

Its successor brings the environments back to where they stood after the last segment that was delivered, then gets every
credit again that was not answered. A credit names weights, randomness and slot, so the same segment comes out; the weights
are still there, because the doorbell that gives them back never rang. Nobody else needs to know: a credit is answered
once, by whichever process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from aiorl.envs.cursor import GroupCursor
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread
from aiorl.segments import Segment
from aiorl.workers.launch import Launcher
from aiorl.workers.program import StationSetup, segments_of
from aiorl.workers.records import Kind, Record
from aiorl.workers.worker import Fault, Worker

RESTARTS_MAX = 3
RESTART_WINDOW_S = 60.0
BACK_OFF_S = (0.0, 0.5, 2.0)  # before each restart within the window
LOOKS = 4  # at a worker within its step_timeout_s

Where = Callable[[int, Mapping[int, Segment]], GroupCursor | None]
"""Where a group goes on after its delivered segments, given by ordinal; called on the launching thread."""


class Restart(NamedTuple):
    """A worker is back: what had ended it, how often that was so far, and how long it was away."""

    worker: str
    reason: str
    restarts: int
    seconds_down: float


class WorkerView(NamedTuple):
    """A worker at one moment. `beats` changes with every environment step, `credits` are those not answered."""

    worker: str
    pid: int | None
    doing: str
    credits: int
    beats: int


class Budget:
    """How often a worker may be started again: RESTARTS_MAX times within RESTART_WINDOW_S, after longer and longer waits."""

    def __init__(self) -> None:
        self._drawn_s: deque[float] = deque()

    def draw(self, now_s: float) -> float | None:
        """Seconds to wait before one more restart; None if there have been too many."""
        while self._drawn_s and now_s - self._drawn_s[0] >= RESTART_WINDOW_S:
            self._drawn_s.popleft()
        if len(self._drawn_s) == RESTARTS_MAX:
            return None
        self._drawn_s.append(now_s)
        return BACK_OFF_S[len(self._drawn_s) - 1]


@dataclass(frozen=True)
class Means:
    """What all keepers of a run start their workers with. `thread` is where starting blocks."""

    launcher: Launcher
    thread: OffloadThread
    where: Where
    log_dir: str | None
    start_timeout_s: float
    step_timeout_s: float


class Keeper:
    """Sees to it that one station is served by a living process. `on_record` gets its doorbells, each once.

    `segments` are the slots of its groups.
    """

    def __init__(self, setup: StationSetup, means: Means, on_record: Callable[[Record], None]) -> None:
        self.setup, self.restarts = setup, 0
        self.segments = segments_of(setup)
        self._means, self._on_record = means, on_record
        self._budget = Budget()
        self._outstanding: deque[Record] = deque()  # credits not answered, in the order in which they will be
        self._delivered: dict[tuple[int, int], int] = {}  # ordinal of the segment that lies in (group, slot)
        self._serving = False
        self._beats, self._looked_s, self._still_s = (-1, -1), _now_s(), 0.0
        self._worker = self._make(setup)
        self.name = self._worker.name

    def _make(self, setup: StationSetup) -> Worker:
        log_path = f"{self._means.log_dir}/worker-{setup.index}.log" if self._means.log_dir else None
        return Worker(setup, self._means.launcher, log_path, self._receive)

    # -- work ------------------------------------------------------------------------------------------------------

    async def launch(self) -> None:
        """Start the process."""
        await self._means.thread.run(self._worker.launch)
        self._worker.attach()

    async def enter(self) -> None:
        """Wait until the started process is ready, and give it all there is to do. WorkerError if it dies before."""
        await asyncio.shield(self._worker.ready)
        self._beats, self._looked_s, self._still_s = self._worker.beats, _now_s(), 0.0
        self._serving = True
        for credit in self._outstanding:
            self._worker.send(credit)

    @property
    def is_ready(self) -> bool:
        return self._worker.ready.done()

    def send(self, credit: Record) -> None:
        """Hand over a credit, now or when there is a process to take it; never blocks."""
        if not self._outstanding:
            self._looked_s, self._still_s = _now_s(), 0.0
        self._outstanding.append(credit)
        self._delivered.pop((credit.group, credit.slot), None)  # the slot is granted again: that segment has been used
        if self._serving:
            self._worker.send(credit)

    def _receive(self, doorbell: Record) -> None:
        self._outstanding.popleft()
        if doorbell.kind is Kind.COLLECTED:
            self._delivered[doorbell.group, doorbell.slot] = doorbell.ordinal
        self._on_record(doorbell)

    # -- supervision -----------------------------------------------------------------------------------------------

    async def keep(self, restarted: Callable[[Restart], None]) -> NoReturn:
        """Start the worker again whenever it dies or hangs. WorkerError when the budget is used up."""
        while True:
            fault = await self._trouble()
            begun_s = _now_s()
            self._serving = False
            while (another := await self._start_again(fault)) is not None:
                fault = another
            self.restarts += 1
            restarted(Restart(self.name, fault.reason, self.restarts, _now_s() - begun_s))

    async def _trouble(self) -> Fault:
        """Return when the worker has died or hangs."""
        while self._worker.fault is None:
            try:
                async with asyncio.timeout(self._means.step_timeout_s / LOOKS):
                    await self._worker.ended.wait()
            except TimeoutError:
                if (fault := self._hangs()) is not None:
                    return fault
        return self._worker.fault

    def _hangs(self) -> Fault | None:
        """A fault if the worker has something to do and has not finished an environment step for too long.

        Time in which nobody could look, for the loop was blocked or the whole program stopped, is not held against it.
        """
        self._worker.take_in()  # it may have answered while the loop was late
        now_s, beats, limit_s = _now_s(), self._worker.beats, self._means.step_timeout_s
        gone_s, self._looked_s = min(now_s - self._looked_s, 2 * limit_s / LOOKS), now_s
        self._still_s = 0.0 if beats != self._beats or not self._outstanding else self._still_s + gone_s
        self._beats = beats
        if self._still_s <= limit_s:
            return None
        reason = f"has not finished a step for {self._still_s:.1f} s {self._worker.where()}"
        advice = f"the limit is step_timeout_s = {limit_s:g}; raise it if the environment is that slow"
        return Fault(WorkerError(f"{self.name} {reason}\n  {advice}"), reason)

    async def _start_again(self, fault: Fault) -> Fault | None:
        """One more try after `fault`: what it failed of, None if the worker is ready. Raises the fault's error instead if
        it has come too often."""
        await self._worker.end()
        wait_s = self._budget.draw(_now_s())
        if wait_s is None:
            raise _after_restarts(fault.error)
        await asyncio.sleep(wait_s)
        cursors = await self._means.thread.run(self._cursors, dict(self._delivered))
        self._worker.control.reset()
        self._worker = self._make(replace(self.setup, cursors=cursors))
        try:
            await self.launch()
            async with asyncio.timeout(self._means.start_timeout_s):
                await self.enter()
        except TimeoutError:
            reason = f"was not ready after {self._means.start_timeout_s:g} s"
            return Fault(WorkerError(f"{self.name} {reason}"), reason)
        except OSError as error:
            return Fault(WorkerError(f"{self.name} could not be started: {error}"), f"could not be started: {error}")
        except WorkerError:
            return self._worker.fault
        return None

    def _cursors(self, delivered: Mapping[tuple[int, int], int]) -> dict[int, GroupCursor | None]:
        """Where each group goes on. On the launching thread: with no process alive nobody writes into the slots."""
        segments: dict[int, dict[int, Segment]] = {group: {} for group in self.setup.groups}
        for (group, slot), ordinal in delivered.items():
            segments[group][ordinal] = self.segments[group, slot]
        return {group: self._means.where(group, by_ordinal) for group, by_ordinal in segments.items()}

    def view(self) -> WorkerView:
        """What it does, for whoever wonders why nothing moves. For any thread."""
        doing = self._worker.where() if self._serving else "not serving: it is being started or has ended"
        return WorkerView(self.name, self.pid, doing, len(self._outstanding), sum(self._worker.beats))

    # -- end -------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the process, whatever it is doing. Nobody may be keeping it any more."""
        self._serving = False
        await self._worker.stop()

    def release_memory(self) -> None:
        """Let go of the shared block, so that it can be unmapped."""
        self.segments.clear()
        self._worker.release_memory()

    @property
    def pid(self) -> int | None:
        """The process's id while it lives."""
        return self._worker.pid


def _now_s() -> float:
    """The loop's clock: in a simulated run time is virtual."""
    return asyncio.get_running_loop().time()


def _after_restarts(error: WorkerError) -> WorkerError:
    """The same error with a word on what has been tried."""
    first, newline, rest = str(error).partition("\n")
    tried = f"{first}, after {RESTARTS_MAX} restarts in {RESTART_WINDOW_S:g} s"
    return WorkerError(f"{tried}{newline}{rest}", detail=error.detail)
