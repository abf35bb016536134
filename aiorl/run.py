"""A run: its parts wired together in one task, and the interface to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from aiorl import loops
from aiorl.assembly import Assembly, assemble
from aiorl.checkpointing import Checkpointer
from aiorl.config import Config
from aiorl.errors import AiorlError, ConfigError, TrainingError
from aiorl.events import (
    AnyEvent,
    Evaluated,
    EvaluationSkipped,
    Finished,
    Paused,
    Progress,
    Resumed,
    SettingsChanged,
    Started,
    Status,
    Updated,
    Warned,
)
from aiorl.learning import Outcome, params_sha256
from aiorl.metrics.broadcast import Broadcast, Subscription
from aiorl.metrics.lag import LagMeter
from aiorl.pacing import RolloutPlan
from aiorl.policy import LoadedPolicy
from aiorl.report import Report, Result, library_versions
from aiorl.segments import Array

PROGRESS_INTERVAL_S = 0.25
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
    """

    def __init__(self, config: Config, *, resume: str | Path | None = None) -> None:
        self._config, self._resume_from = config, resume
        self._broadcast = Broadcast()
        self._report = Report(config.stop_at)
        self._lag = LagMeter()
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._parts: loops.Parts | None = None
        self._made: Assembly | None = None
        self._checkpointer: Checkpointer | None = None
        self._own_events: Subscription | None = None
        self._state = "starting"
        self._final_evaluation = True
        self._stop_requested = False
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._snapshot: tuple[int, dict[str, Array]] | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Run:
        if self._task is not None:
            raise RuntimeError("a Run can be entered once; make a new one")
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._own_events = self._broadcast.subscribe()
        # A task of our own: a TaskGroup entered here would cancel the host's task when one of ours fails.
        self._task = loop.create_task(self._main(), name="aiorl-run")
        try:
            await asyncio.shield(self._ready)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait([self._task])
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
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise

    async def _main(self) -> None:
        assert self._ready is not None
        status = "failed"
        try:
            self._made = await assemble(self._config, self._resume_from, self._report)
            self._parts = self._made.parts
            await self._made.parts.workers.start()
            self._begin(self._made)
            self._ready.set_result(None)
            async with asyncio.TaskGroup() as group:
                await self._work(group, self._parts, self._made)
            status = "stopped" if self._stop_requested else "completed"
        except asyncio.CancelledError:
            status = "stopped"
            raise
        except BaseException as error:
            self._error = _one_cause(error)
            if not self._ready.done():
                self._ready.set_exception(self._error)
        finally:
            await _uninterrupted(self._close(status))

    def _begin(self, made: Assembly) -> None:
        self._report.ready()
        config, saved = made.checked.config, made.checked.saved
        self._checkpointer = Checkpointer(made, self._report, self._emit)
        self._state = "training"
        self._emit(
            Started(
                **self._now(),
                env=made.env_name,
                algo=made.checked.algorithm.name,
                seed=config.seed,
                envs=config.envs,
                groups=config.groups,
                workers=int(config.workers),
                off_policy_degree=config.off_policy_degree,
                schedule=config.schedule,
                total_steps=config.total_steps,
                out=str(made.checked.directory),
                start_seconds=self._report.seconds,
                resumed_from=saved.manifest.version if saved else None,
            )
        )

    async def _work(self, group: asyncio.TaskGroup, parts: loops.Parts, made: Assembly) -> None:
        episodes = made.checked.config.eval_episodes
        background: list[Coroutine[Any, Any, None]] = [
            parts.workers.watch(),
            loops.collect(parts),
            loops.drain(parts),
            self._tick(made),
            self._lag.measure(),
        ]
        tasks = [group.create_task(coroutine) for coroutine in background]
        evaluation = group.create_task(loops.evaluate(parts, episodes, self._evaluated))
        await group.create_task(loops.train(parts, self._booked))
        self._report.trained_s = time.perf_counter()
        parts.pacer.stopped = True
        await self._finish(parts, evaluation)
        for task in tasks:
            task.cancel()

    async def _finish(self, parts: loops.Parts, evaluation: asyncio.Task[None]) -> None:
        """After the last update: evaluate the final version, save everything."""
        assert self._checkpointer is not None
        self._state = "evaluating" if self._final_evaluation else "stopping"
        last = self._report.evaluations[-1].version if self._report.evaluations else -1
        if self._final_evaluation and (last != parts.pacer.commits or parts.evaluating):
            self._offer_snapshot(final=True)
        elif self._final_evaluation and self._report.evaluations:
            self._report.final_evaluation = self._report.evaluations[-1]
        elif not self._final_evaluation:
            self._skip(parts.due.clear(), "the run was stopped")
        parts.due.close()
        await self._checkpointer.save_final()
        await evaluation

    async def _close(self, status: str) -> None:
        """End everything, whatever state the run is in, and write the summary."""
        self._state = status
        made, parts = self._made, self._parts
        if made is not None and parts is not None:
            self._count_unused(parts)
            self._result = self._make_result(status, made, parts)
            await made.aclose()
        error = str(self._error) if self._error is not None else None
        self._emit(Finished(**self._now(), status=status, error=error))
        if made is not None:
            await made.write_files(self._result, self._error)
        if self._ready is not None and not self._ready.done():
            self._ready.cancel()

    # -- what the loops report -------------------------------------------------------------------------------------

    async def _booked(self, plan: RolloutPlan, outcome: Outcome, waited_s: float) -> None:
        """After an update: report it, and see what is due."""
        made, parts, report = self._made, self._parts, self._report
        assert made is not None and parts is not None and self._checkpointer is not None
        before = report.stored
        report.updated(plan, outcome, parts.trainer.ledger.return_mean_100)
        totals = [e.total for e in outcome.episodes]
        self._emit(
            Updated(
                **self._now(),
                rollout=plan.index,
                behaviour_version=plan.behaviour_version,
                staleness=plan.staleness,
                gradient_steps=outcome.gradient_steps,
                collect_seconds=outcome.collect_seconds,
                update_seconds=outcome.update_seconds,
                waited_seconds=waited_s,
                episodes=len(totals),
                return_mean=float(np.mean(totals)) if totals else None,
                length_mean=float(np.mean([e.length for e in outcome.episodes])) if totals else None,
                train_return_mean_100=report.return_mean_100,
                metrics=outcome.metrics,
            )
        )
        made.files.rollout(_schedule_line(plan))
        config = made.checked.config
        if _is_due(config.eval_every, before, report.stored) and not parts.pacer.finished:
            self._offer_snapshot(final=False)
        if _is_due(config.checkpoint_every, before, report.stored) and not parts.pacer.finished:
            await self._checkpointer.save_periodic()

    def _offer_snapshot(self, *, final: bool) -> None:
        assert self._parts is not None
        parts = self._parts
        version = parts.pacer.commits
        snapshot = loops.Snapshot(version, self._report.stored, parts.weights.acquire(version), final)
        self._skip(parts.due.offer(snapshot), "a newer version was due before it could begin")

    def _skip(self, snapshot: loops.Snapshot | None, reason: str) -> None:
        if snapshot is not None:
            assert self._parts is not None
            self._parts.weights.release(snapshot.buffer)
            place = {**self._now(), "version": snapshot.version, "env_steps": snapshot.env_steps}
            self._emit(EvaluationSkipped(**place, reason=reason))

    async def _evaluated(self, snapshot: loops.Snapshot, returns: Array, lengths: Array, took_s: float) -> None:
        assert self._parts is not None and self._checkpointer is not None
        best = self._report.best
        event = self._evaluation_event(snapshot, returns, lengths, took_s)
        event = msgspec.structs.replace(event, best=best is None or event.mean_return > best.mean_return)
        self._report.evaluated(event)
        if event.best:
            await self._checkpointer.save_best(snapshot, event)
        self._emit(event)
        stop_at = self._config.stop_at
        if stop_at is not None and event.mean_return >= stop_at and not snapshot.final:
            self._finish_early()

    def _finish_early(self) -> None:
        """The stop return was reached: that is a completed run, not a stopped one."""
        if self._parts is not None:
            self._parts.pacer.stopped = True
            self._parts.gate.wake()

    def _evaluation_event(self, snapshot: loops.Snapshot, returns: Array, lengths: Array, took_s: float) -> Evaluated:
        return Evaluated(
            seconds=self._report.seconds,
            version=snapshot.version,
            env_steps=snapshot.env_steps,
            episodes=len(returns),
            mean_return=float(np.mean(returns)),
            std_return=float(np.std(returns)),
            mean_length=float(np.mean(lengths)),
            best=False,
            final=snapshot.final,
            eval_seconds=took_s,
        )

    async def _tick(self, made: Assembly) -> None:
        """Progress for displays and files, until cancelled."""
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            self._emit(Progress(**self._now(), status=self.status()))
            problem = await made.flush_files()
            if problem is not None:
                self._emit(Warned(**self._now(), message=f"the run directory cannot be written: {problem}"))

    def _emit(self, event: AnyEvent) -> None:
        self._broadcast.emit(event)
        if self._made is not None:
            self._made.files.event(event)

    def _now(self) -> dict[str, Any]:
        version = self._parts.pacer.commits if self._parts else 0
        return {"seconds": self._report.seconds, "version": version, "env_steps": self._report.stored}

    # -- what the user asks ----------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        assert self._own_events is not None, "enter the run first: async with Run(config) as run"
        return self._own_events

    def events(self, keep: int = 256) -> Subscription:
        """An own stream of events for one more reader, beginning with the important ones so far."""
        return self._broadcast.subscribe(keep)

    def unsubscribe(self, subscription: Subscription) -> None:
        """A reader made by `events` has gone away."""
        self._broadcast.unsubscribe(subscription)

    @property
    def directory(self) -> Path:
        """Where the run writes (known once it is entered)."""
        if self._made is None:
            raise RuntimeError("the run has not been entered")
        return self._made.checked.directory

    @property
    def config(self) -> Config:
        """The configuration; resolved, without "auto", once the run is entered."""
        return self._made.checked.config if self._made else self._config

    @property
    def result(self) -> Result:
        """How the run ended, also if it failed. Raises RuntimeError while it is going on."""
        if self._result is None:
            if self._error is not None:
                raise self._error
            raise RuntimeError("the run has not ended: await run.wait() first")
        return self._result

    def policy(self) -> LoadedPolicy:
        """The newest snapshot as a policy by itself."""
        made, parts = self._made, self._parts
        if made is None or parts is None:
            raise RuntimeError("the run has not been entered")
        if self._snapshot is not None:
            version, weights = self._snapshot
        else:
            version = parts.pacer.commits
            buffer = parts.weights.acquire(version)
            weights = {name: array.copy() for name, array in parts.weights.arrays(buffer).items()}
            parts.weights.release(buffer)
        return LoadedPolicy(
            made.checked.algorithm, made.checked.spaces, weights, version, made.checked.config.to_dict()
        )

    def status(self) -> Status:
        """The state of the run now; never waits."""
        parts, made = self._parts, self._made
        config = self.config
        workers = max(1, int(config.workers)) if made else 1
        return self._report.status(
            state=self._describe_state(),
            version=parts.pacer.commits if parts else 0,
            total_steps=config.total_steps,
            off_policy_degree=config.off_policy_degree,
            queue=len(parts.rollouts) if parts else 0,
            queue_bound=parts.rollouts.bound if parts else 0,
            busy=self._report.busy(workers),
            event_loop_lag_ms=self._lag.percentiles(),
            ledger=self._report.ledger(self._in_flight()),
        )

    def _describe_state(self) -> str:
        parts = self._parts
        if self._state != "training" or parts is None:
            return self._state
        if parts.pacer.paused:
            return "paused" if self._is_quiet() else "pausing"
        if self._stop_requested:
            return "stopping"
        if not parts.updating:
            return "waiting for data"
        return "training" if self._report.gradient_steps else "warm-up"

    def _in_flight(self) -> int:
        """Transitions that have arrived but no update has used yet."""
        return self._parts.pacer.steps - self._report.stored if self._parts and self._result is None else 0

    def stop(self, *, final_evaluation: bool = True) -> None:
        """Finish the running update, save, evaluate the final version (unless told not to) and end. Returns at once."""
        self._stop_requested = True
        self._final_evaluation = self._final_evaluation and final_evaluation
        if self._parts is not None:
            self._parts.pacer.stopped = True
            self._parts.gate.wake()

    async def pause(self) -> None:
        """Return when nothing moves: no environment steps, no update runs, no evaluation."""
        parts = self._going()
        parts.pacer.paused = True
        await parts.gate.wait_for(lambda: self._is_quiet() or parts.pacer.stopped)
        self._emit(Paused(**self._now()))

    def resume(self) -> None:
        """Go on after `pause`."""
        parts = self._going()
        if parts.pacer.paused:
            parts.pacer.paused = False
            parts.gate.wake()
            self._emit(Resumed(**self._now()))

    def _is_quiet(self) -> bool:
        parts = self._parts
        return parts is None or not (
            parts.pacer.in_flight or parts.updating or parts.evaluating or not parts.due.empty
        )

    async def checkpoint(self) -> Path:
        """Save now (between two updates) and return the checkpoint's directory. Raises OSError if it cannot be written."""
        self._going()
        assert self._checkpointer is not None
        return await self._checkpointer.save_requested()

    async def evaluate(self, episodes: int = 20) -> Evaluated:
        """Evaluate the newest version now, beside training, and return the result (also emitted as an event)."""
        parts = self._going()
        if episodes < 1:
            raise ConfigError(f"episodes = {episodes}: expected at least 1")
        version = parts.pacer.commits
        snapshot = loops.Snapshot(version, self._report.stored, parts.weights.acquire(version), False)
        try:
            begun = time.perf_counter()
            returns, lengths = await parts.workers.evaluate(snapshot.buffer, episodes)
        finally:
            parts.weights.release(snapshot.buffer)
        event = self._evaluation_event(snapshot, returns, lengths, time.perf_counter() - begun)
        self._emit(event)
        return event

    async def set(self, **changes: float) -> None:
        """Change settings of the learner such as `learning_rate` between two updates. ConfigError for unknown ones."""
        parts = self._going()
        try:
            await parts.learner_thread.run(parts.trainer.learner.set, **changes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot set {', '.join(changes)}: {error}") from error
        self._emit(SettingsChanged(**self._now(), changes=changes))

    async def wait(self) -> Result:
        """Wait for the end. Re-raises the error of a failed run."""
        if self._task is None:
            raise RuntimeError("enter the run first: async with Run(config) as run")
        await asyncio.wait([self._task])
        if self._error is not None:
            raise self._error
        return self.result

    def _going(self) -> loops.Parts:
        if self._parts is None or self._task is None or self._task.done():
            raise RuntimeError("the run is not going on")
        return self._parts

    # -- the end ---------------------------------------------------------------------------------------------------

    def _count_unused(self, parts: loops.Parts) -> None:
        """Transitions that were collected and will not be learned from are dropped, with the reason."""
        reason = "failed" if self._error else "stopped"
        flying, arrived = parts.pacer.unused()
        self._report.drop(reason, sum(parts.workers.segment(g.group, g.slot).env_steps for g in arrived))
        self._report.drop(reason, parts.workers.unfinished_steps(flying))
        if not parts.weights.versions:
            return
        newest = parts.weights.versions[-1]
        buffer = parts.weights.acquire(newest)
        self._snapshot = newest, {name: a.copy() for name, a in parts.weights.arrays(buffer).items()}
        parts.weights.release(buffer)

    def _make_result(self, status: str, made: Assembly, parts: loops.Parts) -> Result:
        report, config = self._report, made.checked.config
        per_second, gradients_per_second = report.rates()
        wall_s = time.perf_counter() - report.begun_s
        return Result(
            status=status,
            error=str(self._error) if self._error else None,
            env=made.env_name,
            algo=made.checked.algorithm.name,
            seed=config.seed,
            versions=library_versions(),
            env_steps=report.stored,
            episodes=report.episodes,
            updates=parts.pacer.commits,
            gradient_steps=report.gradient_steps,
            wall_seconds=wall_s,
            start_seconds=(report.ready_s or time.perf_counter()) - report.begun_s,
            train_seconds=report.train_seconds(),
            env_steps_per_second=per_second,
            gradient_steps_per_second=gradients_per_second,
            train_return_mean_100=report.return_mean_100,
            evaluations=report.evaluations,
            stop_return=report.stop_return,
            first_evaluation_at_stop_return=report.first_at_stop_return(),
            best=report.best,
            final_evaluation=report.final_evaluation,
            off_policy_degree=config.off_policy_degree,
            staleness=report.staleness_summary(),
            dropped=report.dropped,
            restarts=0,
            ledger=report.ledger(0),
            busy=report.busy(max(1, int(config.workers))),
            waiting={name: round(s, 4) for name, s in parts.waiting_s.items()},
            event_loop_lag_ms=self._lag.percentiles(),
            queue={"high_water": parts.rollouts.high_water, "bound": parts.rollouts.bound},
            params_sha256=params_sha256(self._snapshot[1]) if self._snapshot else "",
            directory=str(made.checked.directory),
        )


async def train(config: Config, *, resume: str | Path | None = None) -> Result:
    """Run to the end and return the result. Raises what made it fail; cancelling it stops the run."""
    async with Run(config, resume=resume) as run:
        return await run.wait()


async def _uninterrupted(closing: Coroutine[Any, Any, None]) -> None:
    """Await to the end even if cancelled meanwhile: what is being ended here must not be left half ended."""
    task = asyncio.ensure_future(closing)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _is_due(every: int | None, before: int, now: int) -> bool:
    return bool(every) and now // every > before // every  # type: ignore[operator]


def _schedule_line(plan: RolloutPlan) -> dict[str, Any]:
    line: dict[str, Any] = {
        "k": plan.index,
        "b_k": plan.behaviour_version,
        "order": [part.group for part in plan.parts],
    }
    versions = [part.version for part in plan.parts]
    if len(set(versions)) > 1:
        line["versions"] = versions
    return line


def _one_cause(error: BaseException) -> BaseException:
    """The error that the others followed from: of a group, ours before foreign ones."""
    while isinstance(error, BaseExceptionGroup):
        inner = error.exceptions
        error = next((e for e in inner if isinstance(e, AiorlError)), inner[0])
    if isinstance(error, AiorlError) or not isinstance(error, Exception):
        return error
    wrapped = TrainingError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


__all__ = ["Result", "Run", "train"]
