"""The worker backend without workers: the same stations in the training process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from aiorl.channel import Channel
from aiorl.envs.checked import at_once
from aiorl.errors import WorkerError
from aiorl.offload import OffloadThread, set_torch_threads
from aiorl.pacing import Grant
from aiorl.segments import Segment
from aiorl.workers.control import Control, Counter, Phase, where
from aiorl.workers.pool import Arrival, Compute, StationPlan, Tell, partial_steps, unheard
from aiorl.workers.questions import Question
from aiorl.workers.records import Kind, Record
from aiorl.workers.station import Played, Station, evaluation_results, mailboxes_of, segments_of
from aiorl.workers.supervision import WorkerView


class InlineWorkers:
    """The backend of `workers = 0`: the same stations in this process, one segment after the other on one thread.

    Environments that are coroutines wait on an event loop of that thread. With central inference `compute` answers there.
    `torch_threads` is for algorithms that act with torch.
    """

    def __init__(
        self,
        plan: StationPlan,
        thread: Callable[[str], OffloadThread] = OffloadThread,
        compute: Compute | None = None,
        torch_threads: int | None = None,
    ) -> None:
        self._plan, self._torch_threads = plan, torch_threads
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
        self._stopped = False
        self._failure: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self._evaluating = asyncio.Lock()
        self.on_stand: Callable[[], None] = lambda: None

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
            await self._thread.run(self._open)
        except Exception as error:
            raise _failure(self._station, error) from error

    def _open(self) -> None:
        if self._torch_threads is not None:
            set_torch_threads(self._torch_threads)
        self._station.open()

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
        elif not self._stopped and not self._failure.done():
            self._failure.set_result(_failure(self._station, error))

    def segment(self, group: int, slot: int) -> Segment:
        return self._segments[group, slot]

    def worker_of(self, group: int) -> int:
        return 0

    def unfinished_steps(self, grants: Sequence[Grant]) -> int:
        return partial_steps(self._plan.training[0], self.segment, grants)

    def hold(self, held: bool) -> None:
        """Segments are finished: an evaluation, which is not held, may be in line behind them."""

    def stands_still(self) -> bool:
        return False

    def take_in(self) -> None:
        """They arrive by themselves."""

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

    async def stop(self) -> None:
        if self._thread is not None:
            await self._stop(self._thread)

    async def _stop(self, thread: OffloadThread) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._station.control.dismiss()  # the credits that wait on the thread come to nothing
        self._eval_station.control.dismiss()
        if self._waiting is not None:  # perhaps for something that never comes
            self._waiting.get_loop().call_soon_threadsafe(self._waiting.cancel)
        with contextlib.suppress(TimeoutError, Exception):
            async with asyncio.timeout(1.5):
                await thread.run(_close_all, (self._station, self._eval_station), self._runner)

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        await self._stop(thread)
        self.arrivals.close()
        await thread.aclose(0.2)
        self._segments.clear()
        self._mailboxes.clear()
        del self._station, self._eval_station
        self._plan.close()

    def views(self) -> list[WorkerView]:
        named = (("collecting here", self._station), ("evaluating here", self._eval_station))
        return [_inline_view(name, station.control) for name, station in named]

    pids: tuple[int, ...] = ()


def _inline_view(name: str, control: Control) -> WorkerView:
    doing = where([control])
    busy = len(control.at_work()) or int(control.of(Counter.PHASE) == Phase.EVALUATING)
    return WorkerView(name, None, doing, busy, sum(control.beats))


def _close_all(stations: Iterable[Station], runner: asyncio.Runner | None) -> None:
    for station in stations:
        station.close()
    if runner is not None:
        runner.close()


def _failure(station: Station, error: BaseException) -> WorkerError:
    station.control.put_error(error)  # unless it is there already
    words = station.control.error() or {"message": str(error), "detail": ""}
    return WorkerError(f"collecting in this process failed\n  {words['message']}", detail=words["detail"])
