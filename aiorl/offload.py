"""Blocking work on one thread of its own, awaited from the event loop.

Not the loop's default executor: its threads are joined at exit, so a stuck call would take three Ctrl-Cs, and other
users of it could starve the learner.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

BACKGROUND_NICENESS = 10
"""Of these threads and of workers: with every core busy the loop's thread would else wait its turn behind them."""


class Brake:
    """Lets a thread stand still for a while, at places of its own choosing. `rest` is for that thread, all else for others.

    `rested_s` is for how long it has stood, `asked` how often it has got to such a place. `tell` is called, on the thread,
    when it comes to a stand.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        self.held = False
        self._tell = tell
        self.rested_s = 0.0
        self.asked = 0
        self._resting = False
        self._changed = threading.Condition()

    @property
    def stands(self) -> bool:
        """It is held and has come to a stand: nothing goes on before `release`."""
        return self.held and self._resting

    def hold(self) -> None:
        """From its next `rest` on the thread waits."""
        with self._changed:  # not while a thread that was let go is about to leave
            self.held = True

    def release(self) -> None:
        with self._changed:
            self.held = False
            self._changed.notify_all()

    def rest(self) -> None:
        """Wait for as long as the thread is held."""
        self.asked += 1
        if not self.held:
            return
        begun_s = time.perf_counter()
        with self._changed:
            self._resting = True
            self._tell()
            self._changed.wait_for(lambda: not self.held)
            self._resting = False
        self.rested_s += time.perf_counter() - begun_s


_torch_default = threading.Lock()


def set_torch_threads(threads: int) -> int:
    """Let torch use so many threads for the calling one; returns how many it used before.

    torch takes the number for all threads that have not used it yet, too. Those are the host's and other runs', so one of
    them puts it back at once: at the end of a run it would be too late, for runs may overlap.
    """
    import torch

    before = torch.get_num_threads()
    with _torch_default:
        (default,) = _in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
        _in_a_new_thread(torch.set_num_threads, default)
    return before


def _in_a_new_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> list[R]:
    found: list[R] = []
    thread = threading.Thread(target=lambda: found.append(function(*args, **kwargs)), daemon=True)
    thread.start()
    thread.join()
    return found


class OffloadThread:
    """A daemon thread that runs one call after the other. Make and use it in one event loop.

    A call that asks `brake` can be held in its middle; `on_stand` is called, on the loop, when it has come to a stand.
    """

    ident: int | None = None
    """The thread's number, to find out where it is."""

    def __init__(self, name: str) -> None:
        self.on_stand: Callable[[], None] = lambda: None
        self.brake = Brake(lambda: self._post(self.on_stand))
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = asyncio.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        self.ident = self._thread.ident

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` on the thread. If the caller is cancelled the call still ends by itself, unheard.

        What it raises is raised here. `SystemExit` and the like, which would end the host, come as RuntimeError.
        """
        return await self.submit(function, *args, **kwargs)

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """As `run`; the call is in line behind the earlier ones when this returns, not when a task gets its turn."""
        if self._closing:
            raise RuntimeError(f"{self._thread.name} is closed")
        result: asyncio.Future[R] = self._loop.create_future()

        def call() -> None:
            try:
                value = function(*args, **kwargs)
            except BaseException as error:
                self._post(_set_exception, result, _as_ordinary(error))
            else:
                self._post(_set_result, result, value)

        self._calls.put(call)
        return result

    async def aclose(self, timeout_s: float) -> bool:
        """Let the thread end after the calls it has got; False if it is still busy after `timeout_s`."""
        if not self._closing:
            self._closing = True
            self._calls.put(None)
        try:
            async with asyncio.timeout(timeout_s):
                await self._done.wait()
        except TimeoutError:
            return False
        self._thread.join(0.1)
        return True

    def _serve(self) -> None:
        if sys.platform == "linux":  # where niceness is a thread's own
            me = threading.get_native_id()
            niceness = max(BACKGROUND_NICENESS, os.getpriority(os.PRIO_PROCESS, me))  # less than it has is not allowed
            os.setpriority(os.PRIO_PROCESS, me, niceness)
        while (call := self._calls.get()) is not None:
            call()
            del call  # else the last call's arguments live until the next one
        self._post(self._done.set)

    def _post(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the host closed its loop while the call was running: nobody is left to hear


def _as_ordinary(error: BaseException) -> Exception:
    """An error that a future can carry: asyncio takes SystemExit, CancelledError and StopIteration as meant for itself."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    ordinary = RuntimeError(f"{type(error).__name__}: {error}")
    ordinary.__cause__ = error
    return ordinary


def _set_result(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
