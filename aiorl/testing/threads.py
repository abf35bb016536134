"""The threads of a simulated run: tasks. Each runs a call at once, at a random moment within the time it is said to take."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from aiorl.offload import Brake, OffloadThread
from aiorl.testing.sim import THREAD_PREFIX

if TYPE_CHECKING:
    from aiorl.testing.world import World

P = ParamSpec("P")
R = TypeVar("R")


class _Brake(Brake):
    """Holds a thread that is a task: before a call, for in its middle it could not wait."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__(tell)
        self._free = asyncio.Event()

    def release(self) -> None:
        super().release()
        self._free.set()

    def rest(self) -> None:
        pass

    async def let_through(self) -> None:
        while self.held:
            self._resting = True
            self._tell()
            self._free.clear()
            await self._free.wait()
        self._resting = False


class SimThread(OffloadThread):
    """A task that runs one call after the other, each at once within the virtual time that it takes."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._label = world, name
        self.on_stand: Callable[[], None] = lambda: None
        self.brake = _Brake(self._stands)
        self._queue: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._more, self._ended, self._closing = asyncio.Event(), asyncio.Event(), False
        self._task = asyncio.get_running_loop().create_task(self._work(), name=f"{THREAD_PREFIX}{name}")

    def _stands(self) -> None:
        self.on_stand()

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        if self._closing:
            raise RuntimeError(f"{self._label} is closed")
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((lambda: function(*args, **kwargs), result))
        self._more.set()
        return result

    async def aclose(self, timeout_s: float) -> bool:
        self._closing = True
        self._more.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def _work(self) -> None:
        pace = self._world.pace
        mean_s = pace.update_s if self._label == "aiorl-learner" else pace.file_s
        while self._queue or not self._closing:
            if not self._queue:
                self._more.clear()
                await self._more.wait()
                continue
            call, result = self._queue.popleft()
            takes_s, share = self._world.draw_s(mean_s), self._world.share()
            await _sleep(takes_s * share)
            await self.brake.let_through()
            try:
                value, error = call(), None
            except Exception as raised:
                value, error = None, raised
            await _sleep(takes_s * (1 - share))
            if result.done():
                continue  # nobody listens any more
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)
            del call, result, value, error
        self._ended.set()


async def _sleep(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)
