"""A run while it goes on: the one task that owns the loops, what they report to, and the orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

from aiorl import loops
from aiorl.assembly import REAL, Assembly, Backends, assemble
from aiorl.checkpointing import Checkpointer
from aiorl.config import Config
from aiorl.errors import AiorlError, ConfigError, TrainingError
from aiorl.evaluation import Evaluator
from aiorl.events import DegreeChanged, Finished, Progress
from aiorl.faultpoints import fault_point
from aiorl.inference import Inference
from aiorl.learning import Outcome, params_sha256
from aiorl.metrics.directory import write_atomically
from aiorl.metrics.lag import LagMeter
from aiorl.pacing import RolloutPlan
from aiorl.record import Record, record_line
from aiorl.report import Report, Result
from aiorl.segments import Array
from aiorl.telling import Teller
from aiorl.watchdog import LoopWatch, Row, View, cry, view_of, watch

PROGRESS_INTERVAL_S = 0.25


class Session:
    """State and conduct of one run. `main` is the body of its task; everything belongs to the event loop's thread.

    `made` and `parts` are there once everything has been checked and wired, `result` once it has ended, `error` if it
    failed. `snapshot` is the newest version and its weights, kept when the shared memory is given back.
    """

    def __init__(
        self, config: Config, resume: str | Path | None, record: Record | None = None, backends: Backends = REAL
    ) -> None:
        self.config = config
        self.report = Report(config.stop_at, config.primary_suite)
        self.tell = Teller(self.report)
        self.lag = LagMeter()
        self.made: Assembly | None = None
        self.parts: loops.Parts | None = None
        self.checkpointer: Checkpointer | None = None
        self.evaluator: Evaluator | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.snapshot: tuple[int, dict[str, Array]] | None = None
        self.stop_requested = False
        self.final_evaluation = True
        self.state = "starting"
        self.when_stuck: Callable[[], object] | None = None
        self._resume_from, self._record, self._backends = resume, record, backends

    # -- life ------------------------------------------------------------------------------------------------------

    async def main(self, ready: asyncio.Future[None]) -> None:
        """Check, build, start, run, end. Sets `ready` when the workers are, or to the error that kept them from it."""
        status = "failed"
        try:
            self.made = made = await assemble(
                self.config, self.report, self._resume_from, self._record, self._backends
            )
            self.parts = made.parts
            if self.stop_requested:  # before there was anything to stop
                self.parts.stop()
            self.tell.about(made)
            self.config = made.checked.config
            await made.parts.workers.start()
            self._begin(made)
            ready.set_result(None)
            async with asyncio.TaskGroup() as group:
                await self._work(group, made)
            status = "stopped" if self.stop_requested else "completed"
        except asyncio.CancelledError:
            status = "stopped"
            raise
        except BaseException as error:
            self.error = _one_cause(error)
            if not ready.done():
                ready.set_exception(self.error)
        finally:
            await _uninterrupted(self._close(status))
            ready.cancel()

    def _begin(self, made: Assembly) -> None:
        self.report.ready()
        self.checkpointer = Checkpointer(made, self.report, self.tell.emit, self._flush)
        self.evaluator = Evaluator(made, self.report, self.checkpointer, self.tell.emit)
        self.state = "training"
        self.tell.started()
        if made.parts.trainer.set_now:
            self.tell.settings_changed(dict(made.parts.trainer.set_now))
        for message in (*made.checked.warnings, *_of_a_killed_session(made)):
            self.tell.warned(message)
        self.evaluator.take_up()

    async def _work(self, group: asyncio.TaskGroup, made: Assembly) -> None:
        parts, evaluator = made.parts, self.evaluator
        assert evaluator is not None
        background: list[Coroutine[Any, Any, None]] = [
            parts.workers.watch(self.tell.mended),
            loops.collect(parts),
            loops.drain(parts),
            self._tick(),
            watch(self.view, self.config.stall_limit_s, self.tell.stalled),
        ]
        if parts.inference is not None:
            background.append(parts.inference.run())
        with self._watching_loop() as turned:
            tasks = [group.create_task(coroutine) for coroutine in (*background, self.lag.measure(turned))]
            evaluation = group.create_task(evaluator.run())
            await group.create_task(loops.train(parts, self._booked))
            self.report.trained_s = time.perf_counter()
            parts.stop()
            await self._finish(evaluator, evaluation)
            for task in tasks:
                task.cancel()

    @contextlib.contextmanager
    def _watching_loop(self) -> Iterator[Callable[[float], None] | None]:
        """A thread sees to it that a blocked loop is told of; yields what to tell it each time the loop turns."""
        if not self._backends.watch_loop:
            yield None
            return
        watching = LoopWatch(self.lag, self.view, self.config.stall_limit_s, self.tell.warned, self._loop_stuck)
        try:
            yield watching.turned
        finally:
            watching.close()

    async def _finish(self, evaluator: Evaluator, evaluation: asyncio.Task[None]) -> None:
        """After the last update: save everything, let evaluation come to its end with the final version."""
        assert self.checkpointer is not None
        assert self.parts is not None
        weights = self.parts.weights
        newest = weights.acquire(weights.versions[-1])
        self.tell.standings(weights.arrays(newest))
        weights.release(newest)
        if self.final_evaluation:
            self.state = "evaluating"
            await evaluator.due(final=True)
        else:
            self.state = "stopping"
            evaluator.skip_waiting("the run was stopped")
        evaluator.close()
        await self.checkpointer.save_final()
        await evaluation
        if self.final_evaluation:
            await evaluator.reevaluate()

    async def _close(self, status: str) -> None:
        """End everything, whatever state the run is in, and write the summary."""
        self.state = status
        made, parts = self.made, self.parts
        if self.checkpointer is not None:
            self.checkpointer.close()
        if made is not None and parts is not None:
            await self._halt(parts)
            self._count_unused(parts)
            if self.evaluator is not None:
                self.evaluator.settle("the run failed" if self.error else "the run was ended at once")
            self.result = self._make_result(status, made, parts)
            try:
                await made.aclose()
            except Exception as failure:  # a learner's own close, perhaps: what was reached is no less for it
                self._not_closed(failure)
        error = str(self.error) if self.error is not None else None
        self.tell.emit(Finished(**self.tell.now(), status=status, error=error))
        if made is not None:
            await made.write_files(self.result, self.error)

    async def _halt(self, parts: loops.Parts) -> None:
        """No environment steps any more, so that what they did can be counted."""
        parts.trainer.abandon()
        try:
            await parts.workers.stop()
        except Exception as failure:
            self._not_closed(failure)

    def _not_closed(self, failure: Exception) -> None:
        self.tell.warned(f"at the end of the run something could not be closed: {failure!r}")

    # -- what the loops report -------------------------------------------------------------------------------------

    async def _booked(self, plan: RolloutPlan, outcome: Outcome, waited_s: float) -> None:
        """After an update: report it, and see what is due."""
        assert self.made is not None
        assert self.parts is not None
        assert self.checkpointer is not None
        assert self.evaluator is not None
        fault_point("booking")
        report, config = self.report, self.config
        before = report.stored
        report.updated(plan, outcome, self.parts.trainer.ledger.return_mean_100)
        self.tell.updated(plan, outcome, waited_s)
        decision = self.made.dial.updated(plan, outcome, waited_s) if self.made.dial is not None else None
        if decision is not None:
            self.tell.emit(DegreeChanged(**self.tell.now(), **decision._asdict()))
        self.made.files.rollout(record_line(plan, outcome.fingerprint))
        if self.parts.pacer.finished:
            return  # the final evaluation and checkpoint follow
        if _is_due(config.eval_every, before, report.stored):
            await self.evaluator.due()
        await self.checkpointer.look()
        if _is_due(config.checkpoint_every, before, report.stored):
            await self.checkpointer.save_periodic()

    def _loop_stuck(self, text: str) -> None:
        """On the watchdog's thread, for the loop cannot: leave word, then do what whoever owns the process wants."""
        assert self.made is not None
        with contextlib.suppress(OSError):
            write_atomically(self.made.checked.directory / "stall.txt", text.encode())
        cry(text)
        if self.when_stuck is not None:
            self.when_stuck()

    async def _tick(self) -> None:
        """Progress for displays and files, until cancelled."""
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            self.tell.emit(Progress(**self.tell.now(), status=self.status()))
            await self._flush()

    async def _flush(self) -> None:
        assert self.made is not None
        problem = await self.made.flush_files()
        if problem is not None:
            self.tell.warned(f"the run directory cannot be written: {problem}")

    # -- state -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let the trainer end after the running update, which may go on if it was held."""
        self.stop_requested = True
        if self.parts is not None:
            self.parts.stop()

    def check_degree(self, degree: float) -> None:
        """Raise ConfigError unless `turn_degree` takes it."""
        assert self.made is not None
        assert self.parts is not None
        if self.made.dial is None:
            raise ConfigError("a repeated run keeps to its record: its off_policy_degree cannot be set")
        most = self.parts.pacer.degree_max
        if not float(degree).is_integer():
            raise ConfigError(f"off_policy_degree = {degree}: expected a whole number")
        if not -1 <= degree <= most:
            raise ConfigError(f"off_policy_degree = {degree}: this run can change it to 0 to {most}, or to -1: by itself")

    def turn_degree(self, degree: int) -> None:
        """Set `off_policy_degree` from the next rollout on; -1 lets it tune itself."""
        assert self.made is not None
        assert self.made.dial is not None
        assert self.parts is not None
        before = self.parts.pacer.degree
        self.made.dial.turn(degree)
        now = self.parts.pacer.degree
        detail = "tunes itself from here on" if degree < 0 else f"set to {now}"
        self.tell.emit(DegreeChanged(**self.tell.now(), degree=now, before=before, reason="asked", detail=detail))
        self.parts.gate.wake()

    def is_quiet(self) -> bool:
        """Nothing moves: no environment steps, no update runs, no evaluation."""
        parts, evaluator = self.parts, self.evaluator
        if parts is None or evaluator is None:
            return True
        return evaluator.idle and parts.still

    def view(self) -> View:
        """Who does what and waits for whom; for any thread."""
        assert self.parts is not None
        assert self.evaluator is not None
        assert self.checkpointer is not None
        report, saves = self.report, "writes a checkpoint" if self.checkpointer.writing else "nothing to write"
        others = [Row("evaluate", self.evaluator.describe()), Row("save", saves)]
        return view_of(self.parts, others, (len(report.evaluations), report.restarts, self.checkpointer.written))

    def status(self) -> Any:
        """See `Status`."""
        parts, config = self.parts, self.config
        in_flight = parts.pacer.steps - self.report.stored if parts is not None and self.result is None else 0
        return self.report.status(
            state=self._describe_state(),
            version=parts.pacer.commits if parts else 0,
            total_steps=config.total_steps,
            off_policy_degree=parts.pacer.degree if parts else config.off_policy_degree,
            self_tuned=self.made is not None and self.made.dial is not None and self.made.dial.tunes_itself,
            queue=len(parts.rollouts) if parts else 0,
            queue_bound=parts.rollouts.bound if parts else 0,
            busy=self.report.busy(self.made.checked.lanes if self.made is not None else 1),
            event_loop_lag_ms=self.lag.percentiles(),
            ledger=self.report.ledger(in_flight),
        )

    def _describe_state(self) -> str:
        parts = self.parts
        if self.state != "training" or parts is None:
            return self.state
        if parts.pacer.paused:
            return "paused" if self.is_quiet() else "pausing"
        if self.stop_requested:
            return "stopping"
        if not parts.updating:
            return "waiting for data"
        return "training" if self.report.gradient_steps else "warm-up"

    # -- the end ---------------------------------------------------------------------------------------------------

    def _count_unused(self, parts: loops.Parts) -> None:
        """Transitions that were collected and will not be learned from are dropped, with the reason."""
        reason = "failed" if self.error else "stopped"
        flying, _ = parts.pacer.unused()
        rung = sum(arrival.env_steps for arrival in parts.workers.arrivals.drain())
        # Arrived and not booked: waiting, or given to an update that failed or was cut off.
        self.report.drop(reason, parts.pacer.steps - self.report.stored + rung)
        self.report.drop(reason, parts.workers.unfinished_steps(flying))
        newest = parts.weights.versions[-1]
        buffer = parts.weights.acquire(newest)
        self.snapshot = newest, {name: a.copy() for name, a in parts.weights.arrays(buffer).items()}
        parts.weights.release(buffer)

    def _make_result(self, status: str, made: Assembly, parts: loops.Parts) -> Result:
        return self.report.result(
            status=status,
            error=str(self.error) if self.error else None,
            env=made.env_name,
            algo=made.checked.algorithm.name,
            seed=self.config.seed,
            updates=parts.pacer.commits,
            off_policy_degree=parts.pacer.degree,
            ledger=self.report.ledger(0),
            busy=self.report.busy(made.checked.lanes),
            waiting={name: round(s, 4) for name, s in parts.waiting_s.items()} | _idle(parts.inference),
            inference=parts.inference.books.summary() if parts.inference is not None else {},
            event_loop_lag_ms=self.lag.percentiles(),
            queue={"high_water": parts.rollouts.high_water, "bound": parts.rollouts.bound},
            params_sha256=params_sha256(self.snapshot[1]) if self.snapshot else "",
            directory=str(made.checked.directory),
        )


def _idle(inference: Inference | None) -> dict[str, float]:
    return {} if inference is None else {"inference": round(inference.books.idle_s, 4)}


def _of_a_killed_session(made: Assembly) -> list[str]:
    """What to say where the run directory was left by a process that did not end in good order."""
    saved = made.checked.saved
    if not made.lock.was_left or saved is None:
        return []
    return [
        f"the last session was killed: going on from its checkpoint at {saved.manifest.env_steps} env steps, "
        "what it had learned since is lost"
    ]


async def _uninterrupted(closing: Coroutine[Any, Any, None]) -> None:
    """Await to the end even if cancelled meanwhile: what is being ended here must not be left half ended."""
    task = asyncio.ensure_future(closing)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _is_due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` env steps was passed."""
    return every is not None and every > 0 and now // every > before // every


def _one_cause(error: BaseException) -> BaseException:
    """The error that the others followed from: of a group, ours before foreign ones."""
    while isinstance(error, BaseExceptionGroup):
        inner = cast("tuple[BaseException, ...]", error.exceptions)
        error = next((e for e in inner if isinstance(e, AiorlError)), inner[0])
    if isinstance(error, AiorlError) or not isinstance(error, Exception):
        return error
    wrapped = TrainingError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
