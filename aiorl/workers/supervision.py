"""Keeping workers going: one that dies or hangs is started again, and nothing is lost but time.

Its successor brings the environments back to where they stood after the last segment that was delivered, then gets every
credit again that was not answered. A credit names weights, randomness and slot, so the same segment comes out; the weights
are still there, because the doorbell that gives them back never rang. Nobody else needs to know: a credit is answered
once, by whichever process.

A worker that fails too often is given up, if the run may go on with fewer: then its stations, their memory and all their
open credits go to another worker, which is started again with them, in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aiorl.envs.cursor import GroupCursor
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread
from aiorl.segments import Segment
from aiorl.workers.control import Control
from aiorl.workers.hold import Hold
from aiorl.workers.launch import Launcher
from aiorl.workers.records import Kind, Record
from aiorl.workers.station import StationSetup, segments_of
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


class GivenUp(NamedTuple):
    """A worker is not started again: `reason` is what ended it last. `heir` has taken over its groups, and `workers` are
    left."""

    worker: str
    reason: str
    heir: str
    workers: int


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
    hold: Hold
    lives: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # a number for each process


class Patience:
    """How long a worker, and each of its groups, has stood still while it had something to do.

    Time in which nobody could look, for the loop was blocked or the whole program stopped, is not held against it.
    """

    def __init__(self) -> None:
        self._beats: list[int] = []
        self.begin(0.0)

    def begin(self, now_s: float, beats: list[int] | None = None) -> None:
        """Whatever was before does not count. `beats` are those of another process."""
        self._beats = self._beats if beats is None else beats
        self._looked_s, self._all_s = now_s, 0.0
        self._still_s: dict[int, float] = {}

    def look(
        self, now_s: float, most_s: float, beats: list[int], stepping: Mapping[int, int], owing: bool
    ) -> tuple[float, int | None]:
        """Seconds for which a group (or None: the whole worker) has stood still, the longest that there is.

        `beats` change with every step, `stepping` are the groups that should make one (place in `beats` -> group), `owing`
        says whether there is anything to do. A gap of more than `most_s` since the last look counts as that.
        """
        gone_s, self._looked_s = min(now_s - self._looked_s, most_s), now_s
        before, self._beats = self._beats, beats
        self._all_s = self._all_s + gone_s if owing and before == beats else 0.0
        self._still_s = {
            place: self._still_s.get(place, 0.0) + gone_s if before[place] == beats[place] else 0.0 for place in stepping
        }
        longest = max(self._still_s, key=self._still_s.__getitem__, default=None)
        if longest is not None and self._still_s[longest] >= self._all_s:
            return self._still_s[longest], stepping[longest]
        return self._all_s, None


class Keeper:
    """Sees to it that its stations are served by a living process. `on_record` gets their doorbells, each once.

    It begins with one station, `setups[0]`; `segments` are the slots of all its groups.
    """

    def __init__(self, setup: StationSetup, means: Means, on_record: Callable[[Record], None]) -> None:
        self.setups, self.restarts = [setup], 0
        self.segments = segments_of(setup)
        self._means, self._on_record = means, on_record
        self._budget, self._patience = Budget(), Patience()
        self._outstanding: dict[tuple[int, ...], list[Record]] = {}  # credits not answered, oldest first
        self._delivered: dict[tuple[int, int], int] = {}  # ordinal of the segment that lies in (group, slot)
        self._asking: set[tuple[int, int]] = set()  # (group, process) that are owed an answer: they do not hang
        self._serving = False
        self._looking: asyncio.Timeout | None = None
        self._heritage: list[str] = []  # whose groups it has taken over
        self._worker = self._make([setup])
        self.index, self.name = setup.index, self._worker.name

    def _make(self, setups: list[StationSetup]) -> Worker:
        """A worker for these stations, to be launched."""
        log_path = f"{self._means.log_dir}/worker-{setups[0].index}.log" if self._means.log_dir else None
        means, life = self._means, next(self._means.lives)
        return Worker([replace(s, life=life) for s in setups], means.launcher, log_path, self._receive, means.hold)

    @property
    def groups(self) -> list[int]:
        """Those that it sees to; none once it has been given up."""
        return [group for setup in self.setups for group in setup.groups]

    # -- work ------------------------------------------------------------------------------------------------------

    async def launch(self) -> None:
        """Start the process."""
        await self._means.thread.run(self._worker.launch)
        self._worker.attach()

    async def enter(self) -> None:
        """Wait until the started process is ready, and give it all there is to do. WorkerError if it dies before."""
        await asyncio.shield(self._worker.ready)
        self._patience.begin(_now_s(), self._worker.beats)
        if self._lacks_stations:  # they came while it was being started
            return
        self._serving = True
        for credits in self._outstanding.values():
            for credit in credits:
                self._worker.send(credit)

    @property
    def is_ready(self) -> bool:
        return self._worker.ready.done()

    @property
    def _lacks_stations(self) -> bool:
        """The process does not know all the stations that it is to serve."""
        return len(self._worker.setups) < len(self.setups)

    def send(self, credit: Record) -> None:
        """Hand over a credit, now or when there is a process to take it; never blocks."""
        if not self._outstanding:
            self._patience.begin(_now_s())
        self._outstanding.setdefault(_key(credit), []).append(credit)
        self._delivered.pop((credit.group, credit.slot), None)  # the slot is granted again: that segment has been used
        if self._serving:
            self._worker.send(credit)

    def answer(self, record: Record) -> None:
        """Answer a question, if the process that asked is still there."""
        self._asking.discard((record.group, record.slot))
        if self._serving:
            self._worker.send(record)

    def _receive(self, doorbell: Record) -> None:
        if doorbell.kind in (Kind.ASK, Kind.STANDS):
            if doorbell.kind is Kind.ASK:
                self._asking.add((doorbell.group, doorbell.slot))
            self._on_record(doorbell)
            return
        key = _key(doorbell)
        credits = self._outstanding[key]
        del credits[0]
        if not credits:
            del self._outstanding[key]
        if doorbell.kind is Kind.COLLECTED:
            self._delivered[doorbell.group, doorbell.slot] = doorbell.ordinal
        self._on_record(doorbell)

    def adopt(self, other: Keeper) -> None:
        """Take over all stations of another keeper, whose worker has been given up, in the middle of whatever they do.

        The process is started again for it. Until then credits wait.
        """
        self._serving = False
        self._heritage.append(other.name)
        self.setups += other.setups
        self.segments |= other.segments
        self._outstanding |= other._outstanding
        self._delivered |= other._delivered
        other.setups, other.segments, other._outstanding, other._delivered = [], {}, {}, {}
        if self._looking is not None:
            with contextlib.suppress(RuntimeError):  # it is about to look anyway
                self._looking.reschedule(_now_s())

    def hold(self, held: bool) -> None:
        """Let its groups wait before their next step, or go on."""
        for setup in self.setups:
            if setup.groups:
                Control(setup.block, setup.groups).hold(held)

    def stands_still(self) -> bool:
        """No environment of its groups steps, and none will while they are held. For any thread."""
        return not self.groups or not self._outstanding or (self._serving and self._waits())

    def take_in(self) -> None:
        """Hear every doorbell that has rung, also before the loop gets round to it."""
        self._worker.take_in()

    def _waits(self) -> bool:
        """Held, it goes on with nothing: one group that stands holds up those whose turn comes after it."""
        standing, owing = self._worker.standing, {group for group, *_ in list(self._outstanding)}
        return owing <= standing if self.setups[0].has_lanes else bool(standing)

    # -- supervision -----------------------------------------------------------------------------------------------

    async def keep(self, restarted: Callable[[Restart], None]) -> Fault:
        """Start the worker again whenever it dies or hangs, or has got more stations; return what ended it once the budget
        is used up."""
        while True:
            fault = await self._trouble()
            begun_s = _now_s()
            self._serving = False
            while True:
                await self._worker.end()
                self._asking.clear()
                wait_s = 0.0 if self._lacks_stations else self._budget.draw(_now_s())
                if wait_s is None:
                    return fault
                await asyncio.sleep(wait_s)
                another = await self._start_again()
                if another is None:
                    break
                fault = another
            self.restarts += 1
            restarted(Restart(self.name, fault.reason, self.restarts, _now_s() - begun_s))

    async def _trouble(self) -> Fault:
        """Return when the worker has died or hangs, or has to be started again for more stations."""
        while self._worker.fault is None:
            if self._lacks_stations:
                reason = f"took over the groups of {self._heritage[-1]}"
                return Fault(WorkerError(f"{self.name} {reason}"), reason)
            try:
                async with asyncio.timeout(self._means.step_timeout_s / LOOKS) as self._looking:
                    await self._worker.ended.wait()
            except TimeoutError:
                if (fault := self._hangs()) is not None:
                    return fault
            finally:
                self._looking = None
        return self._worker.fault

    def _hangs(self) -> Fault | None:
        """A fault if the worker has something to do and it, or one of its groups, has not finished an environment step for
        too long."""
        worker, limit_s = self._worker, self._means.step_timeout_s
        worker.take_in()  # it may have answered while the loop was late
        asking = {group for group, _ in self._asking}
        stepping = {place: group for place, group in worker.stepping.items() if group not in asking}
        owing = bool(self._outstanding) and not asking and not self._waits()
        still_s, group = self._patience.look(_now_s(), 2 * limit_s / LOOKS, worker.beats, stepping, owing)
        if still_s <= limit_s:
            return None
        reason = f"has not finished a step for {still_s:.1f} s {worker.where(group)}"
        advice = f"the limit is step_timeout_s = {limit_s:g}; raise it if the environment is that slow"
        return Fault(WorkerError(f"{self.name} {reason}\n  {advice}"), reason)

    async def _start_again(self) -> Fault | None:
        """One more try: what it failed of, None if the worker is ready."""
        setups = list(self.setups)  # more may come at any time
        setups = await self._means.thread.run(self._moved_on, setups, dict(self._delivered))
        self._worker = self._make(setups)
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

    def _moved_on(
        self, setups: list[StationSetup], delivered: Mapping[tuple[int, int], int]
    ) -> list[StationSetup]:
        """With where each group goes on. On the launching thread: with no process alive nobody writes into the slots."""
        segments: dict[int, dict[int, Segment]] = {group: {} for setup in setups for group in setup.groups}
        for (group, slot), ordinal in delivered.items():
            segments[group][ordinal] = self.segments[group, slot]
        cursors = {group: self._means.where(group, by_ordinal) for group, by_ordinal in segments.items()}
        return [replace(setup, cursors={group: cursors[group] for group in setup.groups}) for setup in setups]

    def view(self) -> WorkerView:
        """What it does, for whoever wonders why nothing moves. For any thread."""
        doing = self._worker.where() if self._serving else "not serving: it is being started or has ended"
        return WorkerView(self.name, self.pid, doing, sum(map(len, self._outstanding.values())), sum(self._worker.beats))

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


def _key(record: Record) -> tuple[int, ...]:
    """The same for a credit and the doorbell that answers it. Two evaluations that nobody waits for may be alike."""
    return record.group, record.slot, record.buffer, record.ordinal


def after_restarts(error: WorkerError) -> WorkerError:
    """The same error with a word on what has been tried."""
    first, newline, rest = str(error).partition("\n")
    tried = f"{first}, after {RESTARTS_MAX} restarts in {RESTART_WINDOW_S:g} s"
    return WorkerError(f"{tried}{newline}{rest}", detail=error.detail)
