"""Evaluation beside training: which snapshots are due, who waits while one is under way, what follows from a result.

`WaitingRoom` is synchronous and knows no clock; `Evaluator` empties it, one snapshot at a time and each from beginning to
end. A result is a function of (snapshot, seed) alone, so the policy of the room changes what is evaluated, never a number.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from aiorl import checkpoint
from aiorl.assembly import Assembly
from aiorl.checkpointing import Checkpointer, Snapshot
from aiorl.envs.episodes import shares
from aiorl.errors import CheckpointError, ConfigError
from aiorl.events import AnyEvent, Evaluated, EvaluationSkipped, Reevaluated, Warned
from aiorl.report import Report


class Skipped(NamedTuple):
    """A due snapshot that will not be evaluated, and why. Its buffer is still held."""

    snapshot: Snapshot
    reason: str


class WaitingRoom:
    """Due snapshots that wait for their evaluation, and the one under way. It alone decides who is left out.

    Each snapshot that is offered ends once: evaluated (`done`) or skipped (returned by `offer` or `clear`), so
    due = evaluated + skipped + waiting + under way at any time. A final one comes last and is never left out for another.
    """

    def __init__(self, busy: Literal["newest", "queue", "skip", "wait"], places: int = 1) -> None:
        self._busy, self._places = busy, places
        self._waiting: deque[Snapshot] = deque()
        self.under_way: Snapshot | None = None
        self.due = self.evaluated = self.skipped = 0

    @property
    def idle(self) -> bool:
        return self.under_way is None and not self._waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def counts(self) -> dict[str, int]:
        """What became of all due snapshots, as in summary.json."""
        return {"due": self.due, "evaluated": self.evaluated, "skipped": self.skipped}

    def offer(self, snapshot: Snapshot) -> Skipped | None:
        """A snapshot is due. Returns the one left out for it, which may be itself."""
        self.due += 1
        if self._busy == "skip" and not self.idle and not snapshot.final:
            first = self.under_way or self._waiting[0]
            return self._left_out(snapshot, f"version {first.version} was still being evaluated")
        out = None
        if self._waiting and self._waiting[-1].version == snapshot.version:
            out = self._left_out(self._waiting.pop(), "the final evaluation is of the same version")
        elif len(self._waiting) == self._places:
            full = f"{self._places} were waiting already and " if self._places > 1 else ""
            out = self._left_out(self._waiting.pop(), f"{full}a newer version was due before it could begin")
        self._waiting.append(snapshot)
        return out

    def lost(self) -> None:
        """One that was due before a resume, and cannot be offered any more, is skipped."""
        self.due += 1
        self.skipped += 1

    def take(self) -> Snapshot | None:
        """The next one to evaluate, from now on under way; None if nobody waits."""
        if self.under_way is None and self._waiting:
            self.under_way = self._waiting.popleft()
            return self.under_way
        return None

    def done(self) -> None:
        """The one under way has been evaluated."""
        self.under_way = None
        self.evaluated += 1

    def clear(self, reason: str, *, under_way: bool = False) -> list[Skipped]:
        """Give up all who wait; with `under_way` also an evaluation that was cut off."""
        left = list(self._waiting)
        self._waiting.clear()
        if under_way and self.under_way is not None:
            left.insert(0, self.under_way)
            self.under_way = None
        return [self._left_out(snapshot, reason) for snapshot in left]

    def _left_out(self, snapshot: Snapshot, reason: str) -> Skipped:
        self.skipped += 1
        return Skipped(snapshot, reason)


class _Request(NamedTuple):
    """Somebody awaits an evaluation of whatever is the newest version."""

    episodes: int
    suite: int
    answer: asyncio.Future[Evaluated]


class Evaluator:
    """All evaluation of one run. Belongs to the event loop's thread; `run` is the body of its task."""

    def __init__(
        self, made: Assembly, report: Report, checkpointer: Checkpointer, emit: Callable[[AnyEvent], None]
    ) -> None:
        self._made, self._report, self._checkpointer, self._emit = made, report, checkpointer, emit
        self._config, self._suites, self._parts = made.checked.config, made.checked.suites, made.parts
        self._room = WaitingRoom(self._config.eval_busy, self._config.eval_places)
        self._requests: deque[_Request] = deque()
        self._answering = self._closed = self._warned_of_length = False
        self._top: list[tuple[Evaluated, Snapshot]] = []  # the best so far, best first; their buffers are held
        self._reached: Snapshot | None = None

    # -- what is due -----------------------------------------------------------------------------------------------

    async def due(self, *, final: bool = False) -> None:
        """The newest version is due. With `eval_busy = "wait"` return when it has been evaluated."""
        self._offer(final)
        if self._config.eval_busy == "wait" and not final:
            await self._parts.gate.wait_for(lambda: self._room.idle)

    def take_up(self) -> None:
        """In a resumed run: what was due when its checkpoint was captured. Of an older version only the number is left."""
        before, self._report.pending = self._report.pending, []
        for version, env_steps in before:
            if version == self._parts.pacer.commits:
                self._offer(final=False)
            else:
                self._room.lost()
                self._tell_skipped(version, env_steps, "the session ended before, and its checkpoint is of a newer version")

    def _offer(self, final: bool) -> None:
        snapshot = self._newest(final)
        self._report.pending.append((snapshot.version, snapshot.env_steps))
        self._skip(self._room.offer(snapshot))
        self._parts.gate.wake()

    async def requested(self, episodes: int, suite: str | None) -> Evaluated:
        """Evaluate the newest version as soon as nothing else is under way. ConfigError for what cannot be."""
        if not isinstance(episodes, Integral) or not 1 <= episodes <= 100_000:
            raise ConfigError(f"episodes = {episodes!r}: expected a whole number, 1 to 100000")
        names = [one.name for one in self._suites]
        if suite is not None and suite not in names:
            known = ", ".join(map(repr, names)) if any(names) else "none, set eval_suites"
            raise ConfigError(f"there is no evaluation suite {suite!r}\n  this run has: {known}")
        answer: asyncio.Future[Evaluated] = asyncio.get_running_loop().create_future()
        self._requests.append(_Request(int(episodes), 0 if suite is None else names.index(suite), answer))
        self._parts.gate.wake()
        return await answer

    def skip_waiting(self, reason: str) -> None:
        """Who waits is left out; the evaluation under way goes on."""
        for skipped in self._room.clear(reason):
            self._skip(skipped)

    def close(self) -> None:
        """Nothing more will be due: `run` ends once it has done what there is."""
        self._closed = True
        self._parts.gate.wake()

    def settle(self, reason: str) -> None:
        """The run has ended: account for every due snapshot that nobody will evaluate, and for a stop that was asked for."""
        for skipped in self._room.clear(reason, under_way=True):
            self._skip(skipped)
        self._report.evaluation_points = self._room.counts
        if self._reached is not None:
            self._report.stop_overshoot = {
                "updates": self._parts.pacer.commits - self._reached.version,
                "env_steps": self._report.stored - self._reached.env_steps,
            }

    @property
    def idle(self) -> bool:
        """No evaluation is under way and none will begin by itself."""
        return self._room.idle and not self._requests and not self._answering

    def describe(self) -> str:
        """What it does now, in words."""
        room = self._room
        now = "evaluates on request" if self._answering else "waits for a due snapshot"
        if room.under_way is not None:
            now = f"evaluates version {room.under_way.version}"
        return f"{now}; {room.waiting + len(self._requests)} waiting, {room.evaluated} done"

    # -- the work --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Evaluate what is due and what is asked for, one after the other. It is never cancelled for a newer one."""
        while True:
            await self._parts.gate.wait_for(lambda: not self.idle or self._closed)
            if self.idle:
                return
            if self._requests:
                await self._answer(self._requests.popleft())
            if (snapshot := self._room.take()) is not None:
                await self._evaluate(snapshot)
                self._room.done()
                self._report.pending.remove((snapshot.version, snapshot.env_steps))
            self._parts.gate.wake()

    async def _evaluate(self, snapshot: Snapshot) -> None:
        """All suites, the primary one first."""
        first = await self._judge(snapshot, await self._play(snapshot, self._suites[0].episodes, 0))
        self._book(first)
        for index, suite in enumerate(self._suites[1:], start=1):
            self._book(await self._play(snapshot, suite.episodes, index))
        for dropped in self._keep(first, snapshot):
            self._parts.weights.release(dropped.buffer)

    def _book(self, event: Evaluated) -> None:
        self._report.evaluated(event)
        self._emit(event)

    async def _judge(self, snapshot: Snapshot, event: Evaluated) -> Evaluated:
        """See whether this was what the run was to reach, and the best so far; returns the event that says so."""
        goal, best = self._config.stop_at, self._report.best
        if goal is not None and event.mean_return >= goal and not snapshot.final:
            self._reached = self._reached or snapshot
            self._parts.stop()  # reached what was asked for: completed, not stopped
        if best is None or event.mean_return > best.mean_return:
            event = msgspec.structs.replace(event, best=True)
            await self._checkpointer.save_best(snapshot, {"evaluation": msgspec.to_builtins(event)})
        return event

    def _keep(self, event: Evaluated, snapshot: Snapshot) -> list[Snapshot]:
        """Hold on to the `eval_top` snapshots that have done best; returns those that are not among them any more."""
        if any(kept.version == snapshot.version for _, kept in self._top):
            return [snapshot]
        ranked = sorted([*self._top, (event, snapshot)], key=lambda entry: (-entry[0].mean_return, entry[0].version))
        self._top = ranked[: self._config.eval_top]
        return [dropped for _, dropped in ranked[self._config.eval_top :]]

    async def _answer(self, request: _Request) -> None:
        if request.answer.done():
            return  # whoever asked has gone away
        self._answering = True
        snapshot = self._newest(final=False)
        event = await self._play(snapshot, request.episodes, request.suite)
        self._parts.weights.release(snapshot.buffer)
        self._answering = False
        self._emit(event)
        if not request.answer.done():
            request.answer.set_result(event)

    async def _play(self, snapshot: Snapshot, episodes: int, suite: int) -> Evaluated:
        return Evaluated(
            version=snapshot.version, env_steps=snapshot.env_steps, best=False, final=snapshot.final,
            suite=self._suites[suite].name, primary=suite == 0, **await self._measure(snapshot, episodes, suite),
        )  # fmt: skip

    async def _measure(self, snapshot: Snapshot, episodes: int, suite: int, *, fresh: bool = False) -> dict[str, Any]:
        begun_s = time.perf_counter()
        long = asyncio.get_running_loop().call_later(self._config.stall_limit_s, self._warn_of_length, snapshot.version)
        try:
            played = await self._parts.workers.evaluate(snapshot.buffer, episodes, suite, fresh=fresh)
        finally:
            long.cancel()
        return {
            "seconds": self._report.seconds,
            "episodes": len(played.returns),
            "mean_return": float(np.mean(played.returns)),
            "std_return": float(np.std(played.returns)),
            "mean_length": float(np.mean(played.lengths)),
            **shares(played.outcomes),
            "eval_seconds": time.perf_counter() - begun_s,
        }

    def _warn_of_length(self, version: int) -> None:
        """Once: an episode that never ends would be waited for without a word, as its steps are no standstill."""
        if self._warned_of_length:
            return
        self._warned_of_length = True
        registered = self._made.checked.env.registration is not None
        limit = "env_kwargs max_episode_steps sets a limit" if registered else "let it truncate them after so many steps"
        message = (
            f"the evaluation of version {version} has taken {self._config.stall_limit_s:g} s and goes on: "
            f"do its episodes end? {limit}"
        )
        place = {"version": self._parts.pacer.commits, "env_steps": self._report.stored}
        self._emit(Warned(seconds=self._report.seconds, **place, message=message))

    def _newest(self, final: bool) -> Snapshot:
        """The newest version, held until its buffer is released."""
        version = self._parts.pacer.commits
        return Snapshot(version, self._report.stored, self._parts.weights.acquire(version), final)

    def _skip(self, skipped: Skipped | None) -> None:
        if skipped is not None:
            snapshot, reason = skipped
            self._parts.weights.release(snapshot.buffer)
            self._report.pending.remove((snapshot.version, snapshot.env_steps))
            self._tell_skipped(snapshot.version, snapshot.env_steps, reason)

    def _tell_skipped(self, version: int, env_steps: int, reason: str) -> None:
        seconds = self._report.seconds
        self._emit(EvaluationSkipped(seconds=seconds, version=version, env_steps=env_steps, reason=reason))

    # -- the last word ---------------------------------------------------------------------------------------------

    async def reevaluate(self) -> None:
        """Let the best play again, with fresh episodes: the best of many results is partly luck. `best/` is the winner."""
        if not self._top:
            return
        events: list[Reevaluated] = []
        candidates = [*self._top, *await self._best_of_before()]
        for _, snapshot in candidates:
            measured = await self._measure(snapshot, self._suites[0].episodes, 0, fresh=True)
            best = all(measured["mean_return"] > other.mean_return for other in events)
            events.append(Reevaluated(version=snapshot.version, env_steps=snapshot.env_steps, best=best, **measured))
            self._emit(events[-1])
        winner = max(range(len(events)), key=lambda i: events[i].mean_return)  # of equals the first
        evaluation, snapshot = candidates[winner]
        notes = msgspec.to_builtins({"evaluation": evaluation, "reevaluation": events[winner]})
        await self._checkpointer.save_best(snapshot, notes)
        self._report.reevaluated(events)

    async def _best_of_before(self) -> list[tuple[Evaluated | None, Snapshot]]:
        """In a resumed run: what `best/` holds from before, brought back to compete with the others."""
        checked = self._made.checked
        if checked.saved is None:
            return []
        try:
            path = checked.directory / "best"
            manifest, trees = await self._made.files_thread.run(checkpoint.load, path, ("policy",))
        except CheckpointError as error:
            place = {"version": self._parts.pacer.commits, "env_steps": self._report.stored}
            self._emit(Warned(seconds=self._report.seconds, **place, message=f"best/ is left out: {error}"))
            return []
        if any(manifest.version == kept.version for _, kept in self._top):
            return []
        buffer = self._parts.weights.claim()  # training is over: nobody else will want it
        await self._parts.learner_thread.run(self._parts.weights.write, buffer, trees["policy"])
        return [(None, Snapshot(manifest.version, manifest.env_steps, buffer, False))]
