"""Says when the event loop is held up and by which line, and when nothing in a run moves any more.

Looking is pure: `Stillness` and `table` know no clock and no loop. Two watchers use them. `watch` is a coroutine: it finds
a run that stands still while the loop turns. `LoopWatch` is a thread: it alone can see a loop that does not turn. Neither
takes the time during which it could not look itself (the loop was blocked, the program stopped by Ctrl-Z) for time in which
others failed to move.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import NamedTuple

from aiorl.errors import StalledError
from aiorl.loops import Parts
from aiorl.metrics.lag import INTERVAL_S, LagMeter

BLOCKED_S = 0.25
"""Longer than this is told. A loop that is to answer within 5 ms is held up by less already: see `event_loop_lag_ms`."""

TOLD_MAX = 20
"""Blockings that are told of one run; the others are only counted in its lag."""

POLL_S = 0.05
LOOKS = 20  # within the time after which a run counts as stalled


class Row(NamedTuple):
    """A line of the table: a part of the run, what it does or waits for, and a number that changes when it gets on (None:
    others tell)."""

    who: str
    does: str
    beats: int | None = None


class View(NamedTuple):
    """A run at one moment. `movement` changes with everything that gets on; `resting`: nothing is meant to."""

    movement: tuple[int, ...]
    resting: bool
    rows: list[Row]


class Stillness:
    """How long a run, and each part of it, has stood still. Look every `period_s`; a longer gap counts as twice that."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._movement: tuple[int, ...] | None = None
        self._beats: dict[str, int] = {}
        self._seen_s: float | None = None
        self.seconds = 0.0
        self.of: dict[str, float] = {}  # seconds since each part that beats has done so

    def look(self, view: View, now_s: float) -> float:
        """Seconds for which nothing has moved, by what has been seen."""
        gone_s = 0.0 if self._seen_s is None else min(now_s - self._seen_s, 2 * self._period_s)
        self._seen_s = now_s
        moved = view.movement != self._movement
        self._movement = view.movement
        for who, _, beats in view.rows:
            if beats is not None:
                self.of[who] = 0.0 if self._beats.get(who) != beats else self.of[who] + gone_s
                self._beats[who] = beats
        self.seconds = 0.0 if moved or view.resting else self.seconds + gone_s
        return self.seconds


def table(rows: list[Row], still_s: dict[str, float]) -> str:
    """Who waits for whom, a line each."""
    width = max(len(row.who) for row in rows)
    lines: list[str] = []
    for who, does, beats in rows:
        since = f"; last step {still_s[who]:.0f} s ago" if beats is not None and who in still_s else ""
        lines.append(f"  {who:<{width}}  {does}{since}")
    return "\n".join(lines)


def view_of(parts: Parts, others: list[Row], counts: tuple[int, ...]) -> View:
    """A wired run as it is now, for any thread. `others` are rows, and `counts` numbers that move, of what `parts` does not
    know."""
    pacer, rollouts, arrivals, learner = parts.pacer, parts.rollouts, parts.workers.arrivals, parts.learner_thread
    workers = parts.workers.views()
    state, done = pacer.statistics(), pacer.commits
    lacking = ", ".join(map(str, pacer.missing[:8]))
    waits = f"for rollout {done}" + (f"; segments of groups {lacking} are missing" if lacking else "")
    paused = "; paused" if pacer.paused else "; stopped" if pacer.stopped else ""
    admitted = state["rollouts_admitted"]
    rows = [
        Row("collect", f"may have rollouts up to {admitted} ({done} learned from, degree {pacer.degree}){paused}"),
        Row("drain", f"waits for a segment; {state['segments_in_flight']} are being collected"),
        Row("train", f"in update {done}{thread_place(learner.ident)}" if parts.updating else f"waits {waits}"),
        *others,
    ]
    if parts.inference is not None:
        does, thread = parts.inference.describe()
        rows.append(Row("inference", does + thread_place(thread), parts.inference.books.forwards))
    for worker, pid, doing, outstanding, beats in workers:
        process = f" (process {pid})" if pid is not None else ""
        rows.append(Row(f"{worker}{process}", f"{doing}; {outstanding} credits to answer", beats))
    rows.append(Row("queues", f"arrivals {len(arrivals)} of {arrivals.bound}, rollouts {len(rollouts)} of {rollouts.bound}"))
    resting = pacer.paused and parts.still
    moving = done, pacer.started, pacer.steps, learner.brake.asked, *counts
    return View((*moving, *(w.beats for w in workers)), resting, rows)


async def watch(look: Callable[[], View], limit_s: float, tell: Callable[[str], None]) -> None:
    """Look again and again, until cancelled. StalledError, and before that `tell` with the table, once nothing has moved for
    `limit_s`."""
    loop, still = asyncio.get_running_loop(), Stillness(limit_s / LOOKS)
    while True:
        await asyncio.sleep(limit_s / LOOKS)
        view = look()
        if still.look(view, loop.time()) >= limit_s:
            shown = table(view.rows, still.of)
            tell(shown)
            raise StalledError(f"nothing has moved for {still.seconds:.0f} s (stall_timeout_s = {limit_s:g})", detail=shown)


# -- the loop itself ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A line that a thread is at, and the function that it is in."""

    code: CodeType
    line: int

    def __str__(self) -> str:
        return f"{_short(self.code.co_filename)}:{self.line} ({self.code.co_name})"


class Seen:
    """Where the loop has been seen while it did not turn: who held it up is seen more often than what came after."""

    def __init__(self) -> None:
        self._times: Counter[CodeType] = Counter()
        self._lines: dict[CodeType, int] = {}

    def add(self, place: Place | None) -> None:
        if place is not None:
            self._times[place.code] += 1
            self._lines[place.code] = place.line

    def most(self) -> Place | None:
        """The function that was seen most often, the first of those as often, with its last line."""
        for code, _ in self._times.most_common(1):
            return Place(code, self._lines[code])
        return None


class LoopWatch:
    """A thread beside the event loop of the thread that makes it. `blocked` is called on the loop, with words, when it turns
    again; `stuck` on the watching thread, once, with the table and the loop's stack, when it has not turned for `limit_s`.
    """

    def __init__(
        self,
        lag: LagMeter,
        look: Callable[[], View],
        limit_s: float,
        blocked: Callable[[str], None],
        stuck: Callable[[str], None],
    ) -> None:
        self._lag, self._look, self._limit_s, self._blocked, self._stuck = lag, look, limit_s, blocked, stuck
        self._loop_thread = threading.get_ident()
        self._below = set(map(id, _runner_frames()))
        self._seen = Seen()
        self._told = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="aiorl-watchdog", daemon=True)
        self._thread.start()

    def turned(self, late_s: float) -> None:
        """The loop turns: it was late by so much."""
        seen, self._seen = self._seen, Seen()
        place = seen.most()
        if late_s >= BLOCKED_S and place is not None and self._told < TOLD_MAX:
            self._told += 1
            last = "; no more of these will be told" if self._told == TOLD_MAX else ""
            self._blocked(f"the event loop was blocked for {late_s:.2f} s in {place}: nothing else could run{last}")

    def close(self) -> None:
        self._over.set()
        self._thread.join(1.0)

    def _watch(self) -> None:
        held_s, before_s = 0.0, time.perf_counter()
        told = False
        while not self._over.wait(POLL_S):
            now_s = time.perf_counter()
            late_s = now_s - self._lag.woke_s - INTERVAL_S
            held_s = held_s + min(now_s - before_s, 2 * POLL_S) if late_s > 2 * POLL_S else 0.0
            before_s = now_s
            if late_s > POLL_S:  # soon, for on a busy machine this thread may not get many looks
                self._seen.add(self._where())
            if held_s > self._limit_s and not told:
                told = True
                self._tell_stuck(held_s)

    def _where(self) -> Place | None:
        """The line that the loop's thread is at; None if the loop itself is waiting, for work or for the machine."""
        frame = sys._current_frames().get(self._loop_thread)
        busy = [f.f_code for f in itertools.takewhile(lambda f: id(f) not in self._below, _outwards(frame))]
        named = next((code for code in busy if not _is_plumbing(code)), None)
        if named is None or frame is None:
            return None
        line = next(f.f_lineno for f in _outwards(frame) if f.f_code is named)
        return Place(named, line)

    def _tell_stuck(self, held_s: float) -> None:
        view = self._look()
        if view.resting:
            return
        frame = sys._current_frames().get(self._loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        head = f"the event loop has been blocked for {held_s:.0f} s (stall_timeout_s = {self._limit_s:g})"
        at = f", in {place}" if (place := self._where()) else ""
        self._stuck(f"{head}{at}\n{table(view.rows, {})}\n{stack}")


def thread_place(ident: int | None) -> str:
    """` at FILE:LINE (FUNCTION)` for a thread, as far as that can be told."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    return f" at {_short(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else ""


def cry(text: str) -> None:
    """Write to stderr, but not through its buffer, whose lock a stuck thread may hold, and for 1 s at most."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(1.0)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _runner_frames() -> list[FrameType]:
    """The frames that stay while the loop runs: those outside the running task's coroutines, and of them not the ones that
    asyncio makes for each turn."""
    frames = list(_outwards(sys._getframe()))
    coroutines = [i for i, frame in enumerate(frames) if frame.f_code.co_flags & inspect.CO_COROUTINE]
    outside = frames[coroutines[-1] + 1 :] if coroutines else frames
    return [frame for frame in outside if frame.f_code.co_name not in ("_run", "_run_once")]


_STDLIB = sysconfig.get_path("stdlib")
_PLUMBING = tuple(os.path.join(_STDLIB, name) for name in ("asyncio", "selectors.py", "contextvars.py"))


def _is_plumbing(code: CodeType) -> bool:
    return code.co_filename.startswith(_PLUMBING) or code.co_filename.startswith("<frozen")


def _short(path: str) -> str:
    """From the working directory if it lies there."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
