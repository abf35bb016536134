"""All the workers of a run behind one narrow interface, `Workers`; with processes, or inline for `workers = 0`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from aiorl.channel import Channel
from aiorl.envs.cursor import GroupCursor
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread
from aiorl.pacing import Grant
from aiorl.segments import Array, Segment
from aiorl.workers.launch import Launcher
from aiorl.workers.memory import SharedBlock
from aiorl.workers.program import (
    Control,
    Counter,
    Phase,
    Station,
    StationSetup,
    evaluation_results,
    segments_of,
)
from aiorl.workers.records import Kind, Record
from aiorl.workers.worker import Worker


class Arrival(NamedTuple):
    """A slot has been filled; `buffer` is the weight buffer it no longer needs."""

    group: int
    slot: int
    buffer: int
    env_steps: int


class Workers(Protocol):
    """A worker backend: takes grants, delivers arrivals, evaluates, reports the first failure, ends everything."""

    arrivals: Channel[Arrival]
    """One place per slot, so that putting never fails: the grants are the backpressure."""

    async def start(self) -> None:
        """Return when all are ready; WorkerError if one is not in time or fails."""
        ...

    def collect(self, grant: Grant, buffer: int) -> None:
        """Ask for a segment; returns at once."""
        ...

    def segment(self, group: int, slot: int) -> Segment:
        """The memory of a slot."""
        ...

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        """Transitions in the slots of grants that have not arrived (after the end, to account for them)."""
        ...

    async def evaluate(self, buffer: int, episodes: int) -> tuple[Array, Array]:
        """Run episodes with the weights in `buffer`: (returns float64, lengths int64), each [episodes]."""
        ...

    async def watch(self) -> None:
        """Wait for the first failure and raise it."""
        ...

    async def aclose(self) -> None:
        """End everything; safe to call twice."""
        ...


class StationPlan(NamedTuple):
    """Who does what: one set-up per worker, the evaluating one last."""

    training: list[StationSetup]
    evaluation: StationSetup


def plan_stations(
    common: StationSetup, groups: int, group_size: int, workers: int, cursors: Mapping[int, GroupCursor | None]
) -> StationPlan:
    """Share the groups out over `workers` stations (at least one), neighbours together, with memory for each.

    `common` gives everything that is the same for all; its block and groups are ignored.
    """
    count = max(1, workers)
    training: list[StationSetup] = []
    for index in range(count):
        mine = [g for g in range(groups) if g * count // groups == index]
        block = SharedBlock(StationSetup.block_bytes(len(mine), common.slots, common.segment, 0))
        training.append(
            replace(
                common,
                index=index,
                block=block,
                groups={g: range(g * group_size, (g + 1) * group_size) for g in mine},
                cursors={g: cursors.get(g) for g in mine},
                eval_width=0,
            )
        )
    width = max(1, common.eval_width)
    block = SharedBlock(StationSetup.block_bytes(0, common.slots, common.segment, width))
    evaluation = replace(common, index=count, block=block, groups={}, cursors={}, eval_width=width)
    return StationPlan(training, evaluation)


class ProcessWorkers:
    """The backend that runs each station in a process of its own."""

    def __init__(
        self, plan: StationPlan, launcher: Launcher, log_dir: str | None, start_timeout_s: float, step_timeout_s: float
    ) -> None:
        slots = sum(len(s.groups) * s.slots for s in plan.training)
        self.arrivals: Channel[Arrival] = Channel(slots)
        self._plan, self._launcher = plan, launcher
        self._start_timeout_s, self._step_timeout_s = start_timeout_s, step_timeout_s
        self._failure: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self._evaluated: asyncio.Future[None] | None = None
        self._evaluating = asyncio.Lock()
        self._thread: OffloadThread | None = OffloadThread("aiorl-launch")
        self._segments: dict[tuple[int, int], Segment] = {}
        self._workers: list[Worker] = []
        self._by_group: dict[int, Worker] = {}
        for setup in (*plan.training, plan.evaluation):
            log_path = f"{log_dir}/worker-{setup.index}.log" if log_dir else None
            worker = Worker(setup, launcher, log_path, self._on_record, self._on_death)
            self._workers.append(worker)
            self._segments.update(segments_of(setup))
            self._by_group.update(dict.fromkeys(setup.groups, worker))

    async def start(self) -> None:
        assert self._thread is not None
        try:
            async with asyncio.timeout(self._start_timeout_s):
                for worker in self._workers:
                    await self._thread.run(worker.launch)
                    worker.attach()
                for worker in self._workers:
                    await worker.ready
        except TimeoutError:
            late = [w.name for w in self._workers if not w.ready.done()]
            raise WorkerError(
                f"not ready after {self._start_timeout_s:g} s: {', '.join(late)}\n"
                "  does the environment take that long to start? set a longer start_timeout_s"
            ) from None

    def collect(self, grant: Grant, buffer: int) -> None:
        credit = Record(Kind.COLLECT, grant.group, grant.slot, buffer, grant.ordinal, grant.version)
        self._by_group[grant.group].send(credit)

    def segment(self, group: int, slot: int) -> Segment:
        return self._segments[group, slot]

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        return sum(_partial(w.setup, self._segments, grants) for w in self._workers)

    async def evaluate(self, buffer: int, episodes: int) -> tuple[Array, Array]:
        async with self._evaluating:
            self._evaluated = asyncio.get_running_loop().create_future()
            self._workers[-1].send(Record(Kind.EVALUATE, buffer=buffer, value=episodes))
            await self._evaluated
            return _copy_results(self._plan.evaluation, episodes)

    async def watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._step_timeout_s / 4):
                    raise await asyncio.shield(self._failure)
            except TimeoutError:
                self._check_progress()

    def _check_progress(self) -> None:
        for worker in self._workers:
            hung_s = worker.hung_for_s()
            if hung_s > self._step_timeout_s:
                raise WorkerError(
                    f"{worker.name} has not finished a step for {hung_s:.1f} s {worker.where()}\n"
                    f"  the limit is step_timeout_s = {self._step_timeout_s:g}; raise it if the environment is that slow"
                )

    def _on_record(self, record: Record) -> None:
        if record.kind is Kind.COLLECTED:
            self.arrivals.put_nowait(Arrival(record.group, record.slot, record.buffer, record.value))
        elif self._evaluated is not None and not self._evaluated.done():
            self._evaluated.set_result(None)

    def _on_death(self, error: WorkerError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        self.arrivals.close()
        await thread.run(self._launcher.close)
        await thread.aclose(1.0)
        self._segments.clear()
        for worker in self._workers:
            worker.release_memory()
        for setup in (*self._plan.training, self._plan.evaluation):
            setup.block.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, the evaluating one last."""
        return [w.pid for w in self._workers if w.pid is not None]


class InlineWorkers:
    """The backend of `workers = 0`: the same stations in this process, one segment after the other on one thread."""

    def __init__(self, plan: StationPlan) -> None:
        self._plan = plan
        self._station, self._eval_station = Station(plan.training[0]), Station(plan.evaluation)
        slots = len(plan.training[0].groups) * plan.training[0].slots
        self.arrivals: Channel[Arrival] = Channel(slots)
        self._segments = segments_of(plan.training[0])
        self._thread: OffloadThread | None = OffloadThread("aiorl-collect")
        self._failure: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self._evaluating = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        assert self._thread is not None
        try:
            await self._thread.run(self._station.open)
        except Exception as error:
            raise _failure(self._station, error) from error

    def collect(self, grant: Grant, buffer: int) -> None:
        credit = Record(Kind.COLLECT, grant.group, grant.slot, buffer, grant.ordinal, grant.version)
        task = asyncio.get_running_loop().create_task(self._collect(credit))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _collect(self, credit: Record) -> None:
        assert self._thread is not None
        try:
            done = await self._thread.run(self._station.serve, credit)
        except Exception as error:
            if not self._failure.done():
                self._failure.set_result(_failure(self._station, error))
        else:
            self.arrivals.put_nowait(Arrival(done.group, done.slot, done.buffer, done.value))

    def segment(self, group: int, slot: int) -> Segment:
        return self._segments[group, slot]

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        return _partial(self._plan.training[0], self._segments, grants)

    async def evaluate(self, buffer: int, episodes: int) -> tuple[Array, Array]:
        async with self._evaluating:
            assert self._thread is not None
            try:
                await self._thread.run(self._eval_station.serve, Record(Kind.EVALUATE, buffer=buffer, value=episodes))
            except Exception as error:
                raise _failure(self._eval_station, error) from error
            return _copy_results(self._plan.evaluation, episodes)

    async def watch(self) -> None:
        raise await asyncio.shield(self._failure)

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.arrivals.close()
        with contextlib.suppress(TimeoutError, Exception):
            async with asyncio.timeout(1.5):
                await thread.run(_close_all, (self._station, self._eval_station))
        await thread.aclose(0.2)
        self._segments.clear()
        del self._station, self._eval_station
        for setup in (*self._plan.training, self._plan.evaluation):
            setup.block.close()

    pids: tuple[int, ...] = ()


def _close_all(stations: Iterable[Station]) -> None:
    for station in stations:
        station.close()


def _failure(station: Station, error: Exception) -> WorkerError:
    words = station.control.error()
    if words is None:
        station.control.put_error(error)
        words = station.control.error() or {"message": str(error), "detail": ""}
    return WorkerError(f"collecting in this process failed\n  {words['message']}", detail=words["detail"])


def _partial(setup: StationSetup, segments: Mapping[tuple[int, int], Segment], grants: Sequence[Grant]) -> int:
    """Valid transitions in the one slot that a station was filling, if its grant is among the unfinished ones."""
    counters = Control(setup.block).counters
    group, ordinal = int(counters[Counter.GROUP]), int(counters[Counter.ORDINAL])
    if int(counters[Counter.PHASE]) != Phase.COLLECTING:
        return 0
    for grant in grants:
        if (grant.group, grant.ordinal) == (group, ordinal):
            rows = segments[group, grant.slot].columns["valid"][: int(counters[Counter.STEP])]
            return int(np.count_nonzero(rows))
    return 0


def _copy_results(setup: StationSetup, episodes: int) -> tuple[Array, Array]:
    returns, lengths = evaluation_results(setup)
    return np.array(returns[:episodes]), np.array(lengths[:episodes])
