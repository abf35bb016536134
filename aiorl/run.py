"""The interface to a run: start it, watch it, steer it, end it, from any asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from aiorl import loops
from aiorl.assembly import REAL, Backends
from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.events import AnyEvent, Evaluated, Paused, Resumed, Status
from aiorl.metrics.broadcast import Subscription
from aiorl.policy import LoadedPolicy
from aiorl.record import Record
from aiorl.report import Result
from aiorl.session import Session

__all__ = ["Result", "Run", "train"]

T = TypeVar("T")

LEAVE_GRACE_S = 1.0  # for a final checkpoint when `async with` is left early; then everything is cut


class Run:
    """One training run inside the caller's event loop.

        async with aiorl.Run(config) as run:      # returns when every worker is ready
            async for event in run:
                ...
        run.result

    Entering raises ConfigError for anything that cannot work, before a process is started, and WorkerError if a worker does
    not become ready. After that a failure is held: events end with `Finished(status="failed")`, `wait()` raises it, the
    host's task is never cancelled. Leaving the block stops the run and ends every task, thread, process and shared block.
    `resume` is a run directory or a checkpoint to go on from; `record` makes the run repeat what another one did.
    `backends` is for tests (`aiorl.testing`).
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: str | Path | None = None,
        record: Record | None = None,
        backends: Backends = REAL,
    ) -> None:
        self._session = Session(config, resume, record, backends)
        self._task: asyncio.Task[None] | None = None
        self._own_events: Subscription | None = None

    async def __aenter__(self) -> Run:
        if self._task is not None:
            raise RuntimeError("a Run can be entered once; make a new one")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._own_events = self._session.tell.broadcast.subscribe()
        # A task of our own: a TaskGroup entered here would cancel the host's task when one of ours fails.
        self._task = loop.create_task(self._session.main(ready), name="aiorl-run")
        try:
            await asyncio.shield(ready)
        except asyncio.CancelledError:
            await _cut_off(self._task)
            raise
        except Exception:
            await asyncio.wait([self._task])  # it is clearing up
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = self._task
        assert task is not None
        if task.done():
            return
        self.stop(final_evaluation=False)
        try:
            async with asyncio.timeout(LEAVE_GRACE_S):
                await asyncio.shield(task)
        except TimeoutError:
            await _cut_off(task)
        except asyncio.CancelledError:
            await _cut_off(task)
            raise

    # -- watching --------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        if self._own_events is None:
            raise RuntimeError("enter the run first: async with Run(config) as run")
        return self._own_events

    def events(self, keep: int = 256) -> Subscription:
        """An own stream of events for one more reader, beginning with the important ones so far.

        At most `keep` frequent events wait for a slow reader; of older ones it only learns the number (`Lagged`).
        """
        return self._session.tell.broadcast.subscribe(keep)

    def unsubscribe(self, subscription: Subscription) -> None:
        """A reader made by `events` has gone away."""
        self._session.tell.broadcast.unsubscribe(subscription)

    def status(self) -> Status:
        """The state of the run now; never waits."""
        return self._session.status()

    @property
    def config(self) -> Config:
        """The configuration; without "auto" once the run is entered."""
        return self._session.config

    @property
    def directory(self) -> Path:
        """Where the run writes (known once it is entered)."""
        if self._session.made is None:
            raise RuntimeError("the run has not been entered")
        return self._session.made.checked.directory

    async def wait(self) -> Result:
        """Wait for the end. Re-raises the error of a failed run."""
        if self._task is None:
            raise RuntimeError("enter the run first: async with Run(config) as run")
        await asyncio.wait([self._task])
        if self._session.error is not None:
            raise self._session.error
        return self.result

    @property
    def result(self) -> Result:
        """How the run ended, also if it failed. Raises RuntimeError while it is going on."""
        if self._session.result is not None:
            return self._session.result
        if self._session.error is not None:
            raise self._session.error
        if self._task is not None and self._task.done():
            raise RuntimeError("the run was cancelled before it began: there is no result")
        raise RuntimeError("the run has not ended: await run.wait() first")

    def policy(self) -> LoadedPolicy:
        """The newest version as a policy by itself."""
        session = self._session
        if session.made is None or session.parts is None:
            raise RuntimeError("the run has not been entered")
        if session.snapshot is not None:
            version, weights = session.snapshot
        else:
            store = session.parts.weights
            version = store.versions[-1]
            buffer = store.acquire(version)
            weights = {name: array.copy() for name, array in store.arrays(buffer).items()}
            store.release(buffer)
        checked = session.made.checked
        return LoadedPolicy(checked.algorithm, checked.spaces, weights, version, session.config.to_dict())

    def when_stuck(self, action: Callable[[], object]) -> None:
        """What to do, on a thread of its own, once the event loop has been blocked for `stall_timeout_s`: the program itself
        can do nothing any more. By then stderr and the run's stall.txt say by which line. The library ends no process; the
        command line does.
        """
        self._session.when_stuck = action

    # -- steering --------------------------------------------------------------------------------------------------

    def stop(self, *, final_evaluation: bool = True) -> None:
        """Finish the running update, save, evaluate the final version (unless told not to) and end. Returns at once."""
        self._session.final_evaluation = self._session.final_evaluation and final_evaluation
        self._session.stop()

    async def pause(self) -> None:
        """Return when nothing moves: no environment steps, no update goes on, no evaluation.

        Workers stop between two environment steps and the learner between two gradient steps; with `workers = 0` segments
        are finished first, and so are evaluations. Raises the run's error if it fails meanwhile, RuntimeError if it ends or
        is about to. Whoever gives up waiting leaves the run held.
        """
        parts = self._going()
        if not parts.pacer.stopped:
            self._forget_time()
            parts.hold(True)
            await self._while_going(self._rest(parts))
        if parts.pacer.stopped:
            raise RuntimeError("the run is ending, it cannot be paused any more")
        if parts.pacer.paused:  # else somebody has let it go on
            self._session.tell.emit(Paused(**self._session.tell.now()))

    def resume(self) -> None:
        """Go on after `pause`."""
        parts = self._going()
        if parts.pacer.paused:
            self._forget_time()
            parts.hold(False)
            self._session.tell.emit(Resumed(**self._session.tell.now()))

    def _forget_time(self) -> None:
        """Updates that are interrupted, or finished in a pause, do not say how long updates take."""
        assert self._session.made is not None
        if self._session.made.dial is not None:
            self._session.made.dial.forget_time()

    async def checkpoint(self) -> Path:
        """Save now (between two updates) and return the checkpoint's directory. Raises OSError if it cannot be written.

        It counts among the `keep` newest, so later ones take its place: copy what is to stay.
        An update in whose middle the run was paused is finished first; then nothing moves again.
        """
        parts = self._going()
        assert self._session.checkpointer is not None
        path = await self._while_going(self._session.checkpointer.save_requested())
        if parts.pacer.paused:
            await self._while_going(self._rest(parts))
        return path

    async def evaluate(self, episodes: int = 20, suite: str | None = None) -> Evaluated:
        """Evaluate the newest version beside training and return the result (also emitted as an event).

        It begins when the evaluation under way has ended. `suite` is a name in `eval_suites` (by default the first one).
        """
        self._going()
        assert self._session.evaluator is not None
        return await self._while_going(self._session.evaluator.requested(episodes, suite))

    async def set(self, **changes: float) -> None:
        """Change settings of the learner such as `learning_rate` between two updates. ConfigError for unknown ones.

        An update in whose middle the run was paused is finished first, as it began. What has come into force is recorded,
        also if nobody waits for it any more. All changes come into force, or none.

        `off_policy_degree` can be set too: 0 to the configured `degree_max`, or -1 to let it tune itself from here on.
        """
        parts = self._going()
        if not changes:
            raise ConfigError("set() was given nothing to change\n  name a setting, such as set(learning_rate=1e-4)")
        changes = {name: _number(name, value) for name, value in changes.items()}
        degree = changes.pop("off_policy_degree", None)
        if degree is not None:
            self._session.check_degree(degree)
        if not changes:
            self._session.turn_degree(int(cast(float, degree)))
            return

        def record(done: asyncio.Future[int]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            self._session.tell.settings_changed(changes, done.result())
            if degree is not None:  # only now: all of it comes into force, or nothing
                self._session.turn_degree(int(degree))

        async def change() -> None:
            async with parts.between_updates():
                done = parts.learner_thread.submit(parts.trainer.set, changes)
                done.add_done_callback(record)
                await asyncio.shield(done)

        try:
            await self._while_going(change())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot set {', '.join(changes)}: {error}") from error
        if parts.pacer.paused:
            await self._while_going(self._rest(parts))

    async def _rest(self, parts: loops.Parts) -> None:
        """Wait until nothing moves in a run that is held, or until it is not any more, or about to end."""
        is_quiet = self._session.is_quiet
        while parts.pacer.paused and not parts.pacer.stopped:
            if is_quiet():
                parts.workers.take_in()  # what they had finished before they came to a stand
                if is_quiet():
                    return
            await parts.gate.wait()

    async def _while_going(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something that only happens while the run goes on; if the run ends first, raise its error."""
        assert self._task is not None
        waiting = asyncio.ensure_future(work)
        try:
            await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise self._session.error or RuntimeError("the run ended before this could be done")
            return waiting.result()
        finally:
            waiting.cancel()

    def _going(self) -> loops.Parts:
        session = self._session
        if session.parts is None or session.evaluator is None or self._task is None or session.result is not None:
            raise RuntimeError("the run is not going on")
        return session.parts


async def _cut_off(task: asyncio.Task[None]) -> None:
    """Cancel it and wait until everything is ended; a cancel of whoever waits takes effect after that."""
    task.cancel()
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _number(name: str, value: Any) -> float:
    """A number of any make, such as NumPy's, as Python's own: it goes into files. Raises ConfigError for what is none."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return int(value) if isinstance(value, Integral) else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"cannot set {name} = {value!r}: expected a number") from None


async def train(config: Config, *, resume: str | Path | None = None) -> Result:
    """Run to the end and return the result. Raises what made it fail; cancelling it stops the run."""
    async with Run(config, resume=resume) as run:
        return await run.wait()
