"""All the workers of a run behind one narrow interface, `Workers`, and the backend that runs them as processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from aiorl.channel import Channel
from aiorl.envs.cursor import GroupCursor
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread
from aiorl.pacing import Grant
from aiorl.seals import lay_guards
from aiorl.segments import Array, Segment
from aiorl.workers.control import Control
from aiorl.workers.hold import Hold
from aiorl.workers.launch import Launcher
from aiorl.workers.memory import SharedBlock
from aiorl.workers.questions import Question, Questions
from aiorl.workers.records import Kind, Record
from aiorl.workers.station import Played, StationSetup, evaluation_results, mailboxes_of, segments_of
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
    on_stand: Callable[[], None]
    """Called when a group that is held has come to a stand, and its worker perhaps with it."""

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
        """Transitions in the slots of grants that have not arrived (after `stop`, to account for them)."""
        ...

    async def evaluate(self, buffer: int, episodes: int, suite: int = 0, *, fresh: bool = False) -> Played:
        """Run episodes of a suite with the weights in `buffer`."""
        ...

    def hold(self, held: bool) -> None:
        """Let all groups wait before their next environment step, or go on. Evaluation is not held."""
        ...

    def stands_still(self) -> bool:
        """No environment of a group steps, and none will while they are held. For any thread."""
        ...

    def take_in(self) -> None:
        """Let everything arrive that has been finished by now."""
        ...

    async def watch(self, tell: Tell = unheard) -> None:
        """Mend what can be mended, and `tell` of it; raise the first failure that cannot. Await it in one task."""
        ...

    def views(self) -> list[WorkerView]:
        """What each worker does now, for any thread."""
        ...

    async def stop(self) -> None:
        """End all work: after it nothing steps any more, and what was finished has arrived."""
        ...

    async def aclose(self) -> None:
        """End everything and give its memory back; safe to call twice."""
        ...


class StationPlan(NamedTuple):
    """Who does what: one set-up per worker, the evaluating one last."""

    training: list[StationSetup]
    evaluation: StationSetup

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        for setup in (*self.training, self.evaluation):
            setup.block.close()


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
    with contextlib.ExitStack() as undo:  # where there is memory for some of them only

        def with_memory(setup: StationSetup) -> StationSetup:
            block = SharedBlock(setup.block_bytes)
            undo.callback(block.close)
            return replace(setup, block=block)

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
            training.append(with_memory(setup))
            for segment in segments_of(training[-1]).values():
                lay_guards(segment)
        evaluation = replace(common, index=count, groups={}, cursors={}, eval_width=max(1, common.eval_width))
        plan = StationPlan(training, with_memory(evaluation))
        undo.pop_all()
    return plan


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
        self._stopped = False
        self._hold = Hold()
        self.on_stand: Callable[[], None] = lambda: None
        means = Means(launcher, self._thread, where, log_dir, start_timeout_s, step_timeout_s, self._hold)
        self._keepers = [Keeper(setup, means, self._on_record) for setup in (*plan.training, plan.evaluation)]
        self._by_group = {group: keeper for keeper in self._keepers for group in keeper.groups}
        self._watching: list[asyncio.Task[None]] = []
        self.questions = Questions()
        self._mailboxes = {g: mailbox for setup in plan.training for g, mailbox in mailboxes_of(setup).items()}

    async def start(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                for keeper in self._keepers:
                    await _launch(keeper)
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
        return sum(partial_steps(setup, self.segment, grants) for setup in self._plan.training)

    def hold(self, held: bool) -> None:
        if held:  # first the pipe: whoever finds itself held waits for it
            self._hold.turn(True)
        for keeper in self._keepers:
            keeper.hold(held)
        if not held:
            self._hold.turn(False)

    def stands_still(self) -> bool:
        return all(keeper.stands_still() for keeper in self._keepers) and not len(self.arrivals)

    def take_in(self) -> None:
        for keeper in self._keepers:
            keeper.take_in()

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
        elif record.kind is Kind.STANDS:
            self.on_stand()
        elif record.kind is Kind.COLLECTED:
            self.questions.filled(record.group)
            self.arrivals.put_nowait(Arrival(record.group, record.slot, record.buffer, record.value))
        elif not (done := self._evaluated.popleft()).done():  # else its caller has given up
            done.set_result(None)

    async def stop(self) -> None:
        if self._thread is not None:
            await self._stop(self._thread)

    async def _stop(self, thread: OffloadThread) -> None:
        if self._stopped:
            return
        self._stopped = True
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._stop_all)
            for task in self._watching:
                task.cancel()
            await asyncio.gather(*self._watching, return_exceptions=True)
            self._launcher.give_up()
            await thread.run(_nothing)  # behind a launch that is under way
            self._hold.turn(False)  # each finds out that it is dismissed

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        async with contextlib.AsyncExitStack() as stack:  # from the last to the first, whatever one of them raises
            stack.callback(self._release_memory)
            stack.push_async_callback(thread.aclose, 1.0)
            stack.push_async_callback(thread.run, self._launcher.close)
            stack.callback(self._hold.close)
            stack.callback(self.arrivals.close)
            await self._stop(thread)

    async def _stop_all(self) -> None:
        """End all processes, then raise the first failure to."""
        for failure in await asyncio.gather(*(keeper.stop() for keeper in self._keepers), return_exceptions=True):
            if failure is not None:
                raise failure

    def _release_memory(self) -> None:
        for keeper in self._keepers:
            keeper.release_memory()
        self._mailboxes.clear()
        self._plan.close()

    def views(self) -> list[WorkerView]:
        return [keeper.view() for keeper in self._keepers if keeper.setups]

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that live, the evaluating one last."""
        return [keeper.pid for keeper in self._keepers if keeper.pid is not None]


async def _launch(keeper: Keeper) -> None:
    try:
        await keeper.launch()
    except OSError as error:
        raise WorkerError(
            f"{keeper.name} could not be started: {error}\n"
            "  is a limit reached? look at `ulimit -u` (processes), `ulimit -n` (files) and a container's pids and memory\n"
            "  or use fewer workers"
        ) from error


def _nothing() -> None:
    pass


def partial_steps(setup: StationSetup, segment: Callable[[int, int], Segment], grants: Sequence[Grant]) -> int:
    """Valid transitions in the slots that a station was filling, of grants that have not arrived."""
    control, found = Control(setup.block, setup.groups), 0
    for grant in grants:
        if grant.group in setup.groups and (steps := control.steps_into(grant.group, grant.ordinal)):
            found += int(np.count_nonzero(segment(grant.group, grant.slot).columns["valid"][:steps]))
    return found
