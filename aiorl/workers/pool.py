"""All the workers of a run behind one narrow interface, `Workers`; with processes, or inline for `workers = 0`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from aiorl.channel import Channel
from aiorl.envs.checked import at_once
from aiorl.envs.cursor import GroupCursor
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread
from aiorl.pacing import Grant
from aiorl.seals import lay_guards
from aiorl.segments import Array, Segment
from aiorl.workers.control import Control, Counter, Phase, where
from aiorl.workers.launch import Launcher
from aiorl.workers.memory import SharedBlock
from aiorl.workers.questions import Question, Questions
from aiorl.workers.records import Kind, Record
from aiorl.workers.station import Played, Station, StationSetup, evaluation_results, mailboxes_of, segments_of
from aiorl.workers.supervision import GivenUp, Keeper, Means, Restart, Where, WorkerView, after_restarts


class Arrival(NamedTuple):
    """A slot has been filled; `buffer` is the weight buffer it no longer needs."""

    group: int
    slot: int
    buffer: int
    env_steps: int


Tell = Callable[[Restart | GivenUp], None]


def unheard(_: Restart | GivenUp) -> None:
    """For a caller of `watch` who does not mind."""


Compute = Callable[[Sequence[Question]], Sequence[Array]]
"""The outputs [N, K] of each question's network. Called on one thread."""


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

    def worker_of(self, group: int) -> int:
        """The number of the worker that a group belongs to now."""
        ...

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        """Transitions in the slots of grants that have not arrived (after the end, to account for them)."""
        ...

    async def evaluate(self, buffer: int, episodes: int, suite: int = 0, *, fresh: bool = False) -> Played:
        """Run episodes of a suite with the weights in `buffer`."""
        ...

    async def watch(self, tell: Tell = unheard) -> None:
        """Mend what can be mended, and `tell` of it; raise the first failure that cannot. Await it in one task."""
        ...

    def views(self) -> list[WorkerView]:
        """What each worker does now, for any thread."""
        ...

    async def aclose(self) -> None:
        """End everything; safe to call twice."""
        ...


class StationPlan(NamedTuple):
    """Who does what: one set-up per worker, the evaluating one last."""

    training: list[StationSetup]
    evaluation: StationSetup


def worker_of(group: int, groups: int, workers: int) -> int:
    """The worker that a group belongs to: neighbours are together."""
    return group * workers // groups


def plan_stations(
    common: StationSetup, groups: int, group_size: int, workers: int, cursors: Mapping[int, GroupCursor | None]
) -> StationPlan:
    """Share the groups out over `workers` stations (at least one), neighbours together, with memory for each.

    `common` gives everything that is the same for all; its block and groups are ignored.
    """
    count = max(1, workers)
    training: list[StationSetup] = []
    for index in range(count):
        mine = [g for g in range(groups) if worker_of(g, groups, count) == index]
        setup = replace(
            common,
            index=index,
            groups={g: range(g * group_size, (g + 1) * group_size) for g in mine},
            cursors={g: cursors.get(g) for g in mine},
            eval_width=0,
        )
        training.append(replace(setup, block=SharedBlock(setup.block_bytes)))
        for segment in segments_of(training[-1]).values():
            lay_guards(segment)
    evaluation = replace(common, index=count, groups={}, cursors={}, eval_width=max(1, common.eval_width))
    return StationPlan(training, replace(evaluation, block=SharedBlock(evaluation.block_bytes)))


class ProcessWorkers:
    """The backend that runs each station in a process of its own.

    With central inference `questions` gets what they ask; `answer` it.
    """

    def __init__(
        self,
        plan: StationPlan,
        launcher: Launcher,
        log_dir: str | None,
        start_timeout_s: float,
        step_timeout_s: float,
        where: Where,
        thread: Callable[[str], OffloadThread] = OffloadThread,
        min_workers: int | None = None,
    ) -> None:
        """`min_workers`: with so many training workers left the run goes on; None needs all."""
        slots = sum(len(s.groups) * s.slots for s in plan.training)
        self.arrivals: Channel[Arrival] = Channel(slots)
        self._plan, self._launcher, self._start_timeout_s = plan, launcher, start_timeout_s
        self._min_workers = len(plan.training) if min_workers is None else min_workers
        self._evaluated: deque[asyncio.Future[None]] = deque()  # for each evaluation that has been asked for
        self._evaluating = asyncio.Lock()
        self._thread: OffloadThread | None = thread("aiorl-launch")
        means = Means(launcher, self._thread, where, log_dir, start_timeout_s, step_timeout_s)
        self._keepers = [Keeper(setup, means, self._on_record) for setup in (*plan.training, plan.evaluation)]
        self._by_group = {group: keeper for keeper in self._keepers for group in keeper.groups}
        self._watching: list[asyncio.Task[None]] = []
        self.questions = Questions()
        self._mailboxes = {g: mailbox for setup in plan.training for g, mailbox in mailboxes_of(setup).items()}

    async def start(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                for keeper in self._keepers:
                    await keeper.launch()
                for keeper in self._keepers:
                    await keeper.enter()
        except TimeoutError:
            late = [keeper.name for keeper in self._keepers if not keeper.is_ready]
            raise WorkerError(
                f"not ready after {self._start_timeout_s:g} s: {', '.join(late)}\n"
                "  does the environment take that long to start? set a longer start_timeout_s"
            ) from None

    def collect(self, grant: Grant, buffer: int) -> None:
        credit = Record(Kind.COLLECT, grant.group, grant.slot, buffer, grant.ordinal, grant.version)
        self.questions.granted(grant.group)
        self._by_group[grant.group].send(credit)

    def answer(self, question: Question, outputs: Array) -> None:
        """Tell a group its network's outputs [N, K]."""
        record = question.record
        self._mailboxes[record.group].outputs[...] = outputs
        self._by_group[record.group].answer(record._replace(kind=Kind.ANSWER))

    def segment(self, group: int, slot: int) -> Segment:
        return self._by_group[group].segments[group, slot]

    def worker_of(self, group: int) -> int:
        return self._by_group[group].index

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        return sum(_partial(setup, self.segment, grants) for setup in self._plan.training)

    async def evaluate(self, buffer: int, episodes: int, suite: int = 0, *, fresh: bool = False) -> Played:
        credit = Record(Kind.EVALUATE, suite, 0, buffer, int(fresh), episodes)
        async with self._evaluating:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._evaluated.append(done)
            self._keepers[-1].send(credit)
            await done
            return evaluation_results(self._plan.evaluation).first(episodes)

    async def watch(self, tell: Tell = unheard) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._watching = [group.create_task(self._keep(keeper, tell)) for keeper in self._keepers]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _keep(self, keeper: Keeper, tell: Tell) -> None:
        """Keep a worker as long as that goes, then go on without it or raise what it failed of."""
        fault = await keeper.keep(tell)
        left = [other for other in self._keepers if other.groups and other is not keeper]
        if not keeper.groups or len(left) < self._min_workers:
            raise after_restarts(fault.error)
        heir = min(left, key=lambda other: len(other.groups))
        self._by_group |= dict.fromkeys(keeper.groups, heir)
        heir.adopt(keeper)
        tell(GivenUp(keeper.name, fault.reason, heir.name, len(left)))

    def _on_record(self, record: Record) -> None:
        if record.kind is Kind.ASK:
            self.questions.put(record, self._mailboxes[record.group].features)
        elif record.kind is Kind.COLLECTED:
            self.questions.filled(record.group)
            self.arrivals.put_nowait(Arrival(record.group, record.slot, record.buffer, record.value))
        elif not (done := self._evaluated.popleft()).done():  # else its caller has given up
            done.set_result(None)

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await thread.run(_nothing)  # behind a launch that is under way
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers))
        self.arrivals.close()
        await thread.run(self._launcher.close)
        await thread.aclose(1.0)
        for keeper in self._keepers:
            keeper.release_memory()
        self._mailboxes.clear()
        for setup in (*self._plan.training, self._plan.evaluation):
            setup.block.close()

    def views(self) -> list[WorkerView]:
        return [keeper.view() for keeper in self._keepers if keeper.setups]

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that live, the evaluating one last."""
        return [keeper.pid for keeper in self._keepers if keeper.pid is not None]


class InlineWorkers:
    """The backend of `workers = 0`: the same stations in this process, one segment after the other on one thread.

    Environments that are coroutines wait on an event loop of that thread. With central inference `compute` answers there.
    """

    def __init__(
        self, plan: StationPlan, thread: Callable[[str], OffloadThread] = OffloadThread, compute: Compute | None = None
    ) -> None:
        self._plan = plan
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop) if plan.training[0].env.coroutines else None
        self._waiting: asyncio.Task[Any] | None = None
        self._mailboxes, self._compute = mailboxes_of(plan.training[0]), compute
        ask = self._ask if compute is not None else None
        self._station = Station(plan.training[0], drive=at_once if self._runner is None else self._wait, ask=ask)
        self._eval_station = Station(plan.evaluation)
        slots = len(plan.training[0].groups) * plan.training[0].slots
        self.arrivals: Channel[Arrival] = Channel(slots)
        self._segments = segments_of(plan.training[0])
        self._thread: OffloadThread | None = thread("aiorl-collect")
        self._failure: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self._evaluating = asyncio.Lock()

    async def _ask(self, record: Record) -> None:
        """On the thread: answer a question at once."""
        assert self._compute is not None
        mailbox = self._mailboxes[record.group]
        (mailbox.outputs[...],) = self._compute([Question(record, mailbox.features, 0.0)])

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """On the thread: the result of a coroutine that may have to wait."""

        async def cancellable() -> Any:
            self._waiting = asyncio.current_task()
            return await work

        assert self._runner is not None
        return self._runner.run(cancellable())

    async def start(self) -> None:
        assert self._thread is not None
        try:
            await self._thread.run(self._station.open)
        except Exception as error:
            raise _failure(self._station, error) from error

    def collect(self, grant: Grant, buffer: int) -> None:
        credit = Record(Kind.COLLECT, grant.group, grant.slot, buffer, grant.ordinal, grant.version)
        assert self._thread is not None
        self._thread.submit(self._station.serve, credit).add_done_callback(self._collected)

    def _collected(self, answer: asyncio.Future[Record]) -> None:
        if answer.cancelled():
            return
        error = answer.exception()  # looked at even if it is too late: asyncio reports errors that nobody has seen
        if self.arrivals.closed:
            return
        if error is None:
            done = answer.result()
            self.arrivals.put_nowait(Arrival(done.group, done.slot, done.buffer, done.value))
        elif not self._failure.done():
            self._failure.set_result(_failure(self._station, error))

    def segment(self, group: int, slot: int) -> Segment:
        return self._segments[group, slot]

    def worker_of(self, group: int) -> int:
        return 0

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        return _partial(self._plan.training[0], self.segment, grants)

    async def evaluate(self, buffer: int, episodes: int, suite: int = 0, *, fresh: bool = False) -> Played:
        credit = Record(Kind.EVALUATE, suite, 0, buffer, int(fresh), episodes)
        async with self._evaluating:
            assert self._thread is not None
            try:
                await self._thread.run(self._eval_station.serve, credit)
            except Exception as error:
                raise _failure(self._eval_station, error) from error
            return evaluation_results(self._plan.evaluation).first(episodes)

    async def watch(self, tell: Tell = unheard) -> None:
        raise await asyncio.shield(self._failure)  # there is nothing to kill, and nothing is started again

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self.arrivals.close()
        self._station.control.dismiss()  # the credits that wait on the thread come to nothing
        self._eval_station.control.dismiss()
        if self._waiting is not None:  # perhaps for something that never comes
            self._waiting.get_loop().call_soon_threadsafe(self._waiting.cancel)
        with contextlib.suppress(TimeoutError, Exception):
            async with asyncio.timeout(1.5):
                await thread.run(_close_all, (self._station, self._eval_station), self._runner)
        await thread.aclose(0.2)
        self._segments.clear()
        self._mailboxes.clear()
        del self._station, self._eval_station
        for setup in (*self._plan.training, self._plan.evaluation):
            setup.block.close()

    def views(self) -> list[WorkerView]:
        named = (("collecting here", self._station), ("evaluating here", self._eval_station))
        return [_inline_view(name, station.control) for name, station in named]

    pids: tuple[int, ...] = ()


def _inline_view(name: str, control: Control) -> WorkerView:
    doing = where([control])
    busy = len(control.at_work()) or int(control.of(Counter.PHASE) == Phase.EVALUATING)
    return WorkerView(name, None, doing, busy, sum(control.beats))


def _nothing() -> None:
    pass


def _close_all(stations: Iterable[Station], runner: asyncio.Runner | None) -> None:
    for station in stations:
        station.close()
    if runner is not None:
        runner.close()


def _failure(station: Station, error: BaseException) -> WorkerError:
    station.control.put_error(error)  # unless it is there already
    words = station.control.error() or {"message": str(error), "detail": ""}
    return WorkerError(f"collecting in this process failed\n  {words['message']}", detail=words["detail"])


def _partial(setup: StationSetup, segment: Callable[[int, int], Segment], grants: Sequence[Grant]) -> int:
    """Valid transitions in the slots that a station was filling, of grants that have not arrived."""
    control, found = Control(setup.block, setup.groups), 0
    for grant in grants:
        if grant.group in setup.groups and (steps := control.steps_into(grant.group, grant.ordinal)):
            found += int(np.count_nonzero(segment(grant.group, grant.slot).columns["valid"][:steps]))
    return found
