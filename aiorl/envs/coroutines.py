"""Environments written as coroutines: what they are, how they run side by side, and how functions can use them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from aiorl.envs.contract import CRASHES
from aiorl.errors import EnvError

if TYPE_CHECKING:
    import gymnasium

P = ParamSpec("P")
T = TypeVar("T")

CLOSE_GRACE_S = 5.0  # for what an environment left running on its loop


class AsyncEnv(Protocol):
    """An environment whose steps wait for something else: a simulator behind a socket, a browser, a language model.

    Like a `gymnasium.Env` (it need not be one), but `reset` and `step` are `async def`; `close`, which may be left out,
    can be either. Many share one thread and one event loop, so they must wait with `await`. It is made outside of any
    event loop when its spaces are looked at: connect in `reset`, not in `__init__`.
    """

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: (obs, info). `seed` decides all chance of the episode."""
        ...

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """(obs, reward, terminated, truncated, info)."""
        ...


def is_async(env: Any) -> bool:
    """Whether an environment is an `AsyncEnv`. Raises EnvError if it is one by half."""
    step, reset = (inspect.iscoroutinefunction(getattr(env, name, None)) for name in ("step", "reset"))
    if step != reset:
        one, other = ("step", "reset") if step else ("reset", "step")
        raise EnvError(
            f"{type(env).__name__}: {one}() is `async def`, {other}() is not\n  write both with `async def`, or neither"
        )
    return step


# -- side by side ------------------------------------------------------------------------------------------------------

ASYNC_CRASHES = (*CRASHES, asyncio.CancelledError)
"""What awaiting an environment may raise. A cancellation counts only if it is not the task's own: see `is_own_end`."""


def is_own_end(error: BaseException) -> bool:
    """Whether this is the running task being cancelled, and not something inside an environment."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at the same time; the results in their order. The first error ends the others and is raised."""
    coroutines = list(work)
    if len(coroutines) == 1:  # without a task: it costs as much as the step of a simple environment
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


# -- as functions ------------------------------------------------------------------------------------------------------


class OwnLoop:
    """An event loop on a thread of its own. Usable from any thread, also from one whose own loop is running."""

    def __init__(self) -> None:
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = runner.get_loop()
        self._thread = threading.Thread(target=_serve, args=(runner,), name="aiorl-async-envs", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine`. What it raises is raised here; being cancelled from within is a RuntimeError."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        task: list[asyncio.Task[None]] = []  # the loop itself would let go of it

        async def work() -> None:
            try:
                answer.set_result(await coroutine)
            except asyncio.CancelledError as error:
                answer.set_exception(RuntimeError("cancelled from within").with_traceback(error.__traceback__))
            except BaseException as error:  # SystemExit, too: it would end the loop, and nobody would answer
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(lambda: task.append(self._loop.create_task(work())))
        return answer.result()

    def close(self) -> None:
        """End what still runs on the loop, and the loop. May be called twice."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_GRACE_S)


def _serve(runner: asyncio.Runner) -> None:
    with runner:
        runner.get_loop().run_forever()


def run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of `coroutine`, which runs on a loop and thread of its own."""
    loop = OwnLoop()
    try:
        return loop.run(coroutine)
    finally:
        loop.close()


class AsFunctions:
    """Anything with coroutine methods, used like functions: each call runs to its end on a loop of its own.

    For looking at one environment, or for comparing; calls follow each other, so it is not a way to train.
    """

    def __init__(self, subject: Any) -> None:
        self._subject = subject
        self._loop: OwnLoop | None = None
        self.metadata: Any = getattr(subject, "metadata", {})
        self.spec: Any = getattr(subject, "spec", None)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._subject, name)
        return self._called(value) if inspect.iscoroutinefunction(value) else value

    def _called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._loop = self._loop or OwnLoop()
            return self._loop.run(function(*args, **kwargs))

        return call

    def close(self) -> None:
        """Close it and the loop. May be called twice."""
        try:
            cast("Callable[[], None]", self._called(close)(self._subject))
        finally:
            if self._loop is not None:
                self._loop.close()
                self._loop = None


# -- as coroutines -----------------------------------------------------------------------------------------------------


class AsCoroutines:
    """An environment of functions, used like an `AsyncEnv`: from its making to its end it is on a thread of its own, where
    it may block. Making it blocks the caller and raises what `make` raises."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="aiorl-env", daemon=True).start()
        try:
            self._env = self._submit(make).result()
        except BaseException:
            self._calls.put(None)
            raise

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return await asyncio.wrap_future(self._submit(self._env.reset, seed=seed, options=options))

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return await asyncio.wrap_future(self._submit(self._env.step, action))

    async def close(self) -> None:
        """Close it, and end the thread after what it is doing."""
        closed = self._submit(self._env.close)
        self._calls.put(None)
        await asyncio.wrap_future(closed)

    def _submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        self._calls.put(call)
        return answer

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call


async def close(env: Any) -> None:
    """Close an environment, if it has a `close`, and wait for it, if that is a coroutine."""
    done = env.close() if hasattr(env, "close") else None
    if inspect.isawaitable(done):
        await done
