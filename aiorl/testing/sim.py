"""Asynchronous code in virtual time, under seeded scheduling: an hour passes in a moment, and a race that was seen once is
seen again.

`Sim(seed).run(main())` runs a coroutine on an event loop whose clock jumps to the next timer instead of waiting for it.
After every wake-up the seed decides whether a task goes on at once or first lets others go ahead, which asyncio never
promises not to do: so different seeds see different interleavings, and one seed always sees the same. What waits for
nothing that could ever come is a `Deadlock`, reported with every task and where it waits. `explore` tries many seeds.

The code under test must take its time from the loop, its chance from seeds, and may not use threads. This is what
FoundationDB calls deterministic simulation (Zhou et al., "FoundationDB: A Distributed Unbundled Transactional Key Value
Store", SIGMOD 2021).
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

SEED_VARIABLE = "AIORL_SEED"
THREAD_PREFIX = "thread "
"""Names of tasks that stand for a thread: like one, they may go on for a moment after their program has ended."""


class Deadlock(AssertionError):
    """Nothing can go on any more, or nothing has come to an end within the limit. The message names every waiting task."""


class SeedFailure(AssertionError):
    """A seed for which the code under test failed; the failure is its `__cause__`."""

    def __init__(self, seed: int, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}\n  {SEED_VARIABLE}={seed} reproduces it")
        self.seed = seed


class Sim:
    """One simulated world: an event loop in virtual time, and the sources of chance of one seed.

    `jitter` is how likely a task lets others go ahead when it is woken. `limit_s` is how long, in virtual seconds, `run`
    may take: with tasks that tick for ever a lost wake-up shows only in that nothing else happens. `rng` is for the test
    itself. `left` are the tasks that were not done when the main one was, `problems` what the loop complained about.
    """

    def __init__(self, seed: int, *, jitter: float = 0.25, limit_s: float = 600.0) -> None:
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"jitter = {jitter}: expected 0 to less than 1")
        self.seed = seed
        streams = np.random.SeedSequence(seed).spawn(2)
        self.rng = np.random.default_rng(streams[0])
        self.left: list[str] = []
        self.problems: list[str] = []
        self._clock = _Clock(limit_s)
        self._delays = _delays(np.random.default_rng(streams[1]), jitter)
        self._serial = 0

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self._clock.now_s

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end in virtual time and return what it returns. Deadlock if it never ends.

        Call it once. Tasks that `main` leaves behind are cancelled and named in `left`.
        """
        loop = _SimLoop(self._clock)
        loop.set_task_factory(self._make_task)  # pyright: ignore[reportArgumentType]
        loop.set_exception_handler(lambda _, context: self.problems.append(_complaint(context)))
        try:
            task = loop.create_task(main, name="main")
            try:
                result = loop.run_until_complete(task)
            except Stuck as stuck:
                raise Deadlock(_report(stuck, loop, self.now_s)) from None
            self.left = [_describe(t) for t in _pending(loop) if not t.get_name().startswith(THREAD_PREFIX)]
            return result
        finally:
            self._clear_up(loop)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        self._serial += 1
        task = _SimTask(_Jittered(coro, self._delays), loop=loop, **options)
        task.serial = self._serial
        return task

    def _clear_up(self, loop: asyncio.AbstractEventLoop) -> None:
        self._clock.limit_s = float("inf")
        try:
            for _ in range(3):  # who refuses to be cancelled three times is left to the garbage collector, which complains
                pending = _pending(loop)
                for task in pending:
                    task.cancel()
                if pending:
                    loop.run_until_complete(asyncio.wait(pending, timeout=3600.0))
            loop.run_until_complete(loop.shutdown_asyncgens())
        except Stuck:
            pass
        finally:
            loop.close()


def explore(fn: Callable[[Sim], Any], seeds: int | Iterable[int] = 200, **options: Any) -> list[Any]:
    """Call `fn(Sim(seed, **options))` for many seeds; a coroutine that it returns is run in that simulation.

    Returns what each seed returned. Raises SeedFailure for the first that raises, which names the seed; with that in the
    environment variable AIORL_SEED only this one is run.
    """
    only = os.environ.get(SEED_VARIABLE)
    chosen: Iterable[int] = range(seeds) if isinstance(seeds, int) else seeds
    results: list[Any] = []
    for seed in [int(only)] if only else chosen:
        sim = Sim(seed, **options)
        try:
            result = fn(sim)
            results.append(sim.run(result) if asyncio.iscoroutine(result) else result)
        except Exception as error:
            raise SeedFailure(seed, error) from error
    return results


# -- time --------------------------------------------------------------------------------------------------------------


class Stuck(Exception):
    """Raised out of the loop when there is nothing left to wait for. `why` says which of the two ways it was."""


class _Clock:
    def __init__(self, limit_s: float) -> None:
        self.now_s, self.limit_s = 0.0, limit_s


class _SimLoop(asyncio.SelectorEventLoop):
    """A selector loop whose time is a `_Clock`."""

    def __init__(self, clock: _Clock) -> None:
        self._sim_clock = clock
        super().__init__(_Selector(clock))

    def time(self) -> float:
        return self._sim_clock.now_s


class _Selector(selectors.BaseSelector):
    """Looks at descriptors without waiting; instead of waiting for time it moves the clock on."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._real = clock, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = self._real.select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            raise Stuck("nothing is ready and no timer runs")
        if self._clock.now_s + timeout > self._clock.limit_s:
            raise Stuck(f"not done after {self._clock.limit_s:g} virtual seconds")
        self._clock.now_s += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


# -- scheduling --------------------------------------------------------------------------------------------------------


def _delays(rng: np.random.Generator, jitter: float) -> Iterator[int]:
    """How many turns a task lets pass, at each wake-up: mostly none."""
    while True:
        draws, lengths = rng.random(1024).tolist(), rng.integers(1, 4, 1024).tolist()
        for draw, length in zip(draws, lengths, strict=True):
            yield length if draw < jitter else 0


class _SimTask(asyncio.Task[Any]):
    """A task that hashes by its number, so that sets of tasks are gone through in the same order in every repetition."""

    serial = 0

    def __hash__(self) -> int:
        return self.serial

    def __eq__(self, other: object) -> bool:
        return self is other


class _Jittered(Coroutine[Any, Any, Any]):
    """A coroutine that now and then lets others go ahead before it takes up what it was woken with."""

    def __init__(self, inner: Any, delays: Iterator[int]) -> None:
        self._inner, self._delays = inner, delays
        self._turns = -1  # to let pass; -1: the next wake-up has not been looked at yet
        self._thrown: BaseException | None = None

    def send(self, value: Any) -> Any:
        if self._hold_back():
            return None  # as `asyncio.sleep(0)`: again in the next turn
        thrown, self._thrown = self._thrown, None
        return self._inner.send(value) if thrown is None else self._inner.throw(thrown)

    def throw(self, error: Any, *rest: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._thrown = error
        return self.send(None)

    def _hold_back(self) -> bool:
        if self._turns < 0:
            self._turns = next(self._delays)
        self._turns -= 1
        return self._turns >= 0

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:  # cr_frame, cr_await, …: what asyncio and debuggers look at
        return getattr(self._inner, name)


# -- reports -----------------------------------------------------------------------------------------------------------


def _pending(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    return sorted((t for t in asyncio.all_tasks(loop)), key=lambda t: getattr(t, "serial", 0))


def _report(stuck: Stuck, loop: asyncio.AbstractEventLoop, now_s: float) -> str:
    lines = [f"{stuck}; at {now_s:.3f} s these tasks wait:"]
    return "\n".join(lines + [f"  {_describe(task)}" for task in _pending(loop)])


def _describe(task: asyncio.Task[Any]) -> str:
    """Name of a task, what it runs, and the innermost place outside asyncio where it waits."""
    frames = _frames(task.get_coro())
    own = [f for f in frames if not f[0].startswith(_ASYNCIO)] or frames
    body = getattr(task.get_coro(), "__qualname__", "?")
    if not own:
        return f"{task.get_name()} ({body})"
    path, line, function = own[-1]
    how = "sleeps" if frames[-1][2] == "sleep" else "waits"
    return f"{task.get_name()} ({body}) {how} in {function}, {'/'.join(Path(path).parts[-2:])}:{line}"


_ASYNCIO = str(Path(asyncio.__file__).parent)


def _frames(coro: Any) -> list[tuple[str, int, str]]:
    """(file, line, function) of a suspended coroutine, outermost first."""
    found: list[tuple[str, int, str]] = []
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)
        if frame is None:
            break
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None)
    return found


def _complaint(context: Mapping[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')}" + (f": {type(error).__name__}: {error}" if error is not None else "")


