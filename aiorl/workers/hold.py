"""Holding all workers between two environment steps, and letting them go on as if nothing had been.

A word in each station's control block says that it is held; it is looked at after every step. Who is held waits for a pipe
to become readable, so that nobody polls: one byte in it lets every group of every worker go on, and its end does too.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Coroutine
from typing import Any

from aiorl.workers.records import Kind, Record


class Hold:
    """The training process's side: a pipe whose reading end, `fd`, every worker gets."""

    def __init__(self) -> None:
        self.fd, self._free_fd = os.pipe()
        self.held = True
        self.turn(False)

    def turn(self, held: bool) -> None:
        """Whoever looks at `fd` waits from now on, or goes on."""
        if held == self.held or self.fd < 0:
            return
        self.held = held
        if held:
            os.read(self.fd, 1)
        else:
            os.write(self._free_fd, b".")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self._free_fd)
            os.close(self.fd)
            self.fd = -1


class Rest:
    """A worker's side. `blocks`: whoever waits has a thread to itself; else they are tasks of one event loop.

    `ring` is called as each begins to wait.
    """

    def __init__(self, fd: int, ring: Callable[[Record], None], *, blocks: bool) -> None:
        self._fd, self._ring, self._blocks = fd, ring, blocks
        self._waiting: list[asyncio.Future[None]] = []

    async def wait(self, held: Callable[[], bool]) -> None:
        """Return once `held` is false."""
        self._ring(Record(Kind.STANDS))
        while held():
            await (self._block() if self._blocks else self._wait())

    async def _block(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        free: asyncio.Future[None] = loop.create_future()
        self._waiting.append(free)
        loop.add_reader(self._fd, self._wake)
        await free

    def _wake(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        waiting, self._waiting = self._waiting, []
        for free in waiting:
            if not free.done():
                free.set_result(None)


Standing = Callable[[Callable[[], bool]], Coroutine[Any, Any, None]]
"""Returns when what it is given is false; see `Rest.wait`."""


async def unheld(held: Callable[[], bool]) -> None:
    """For a station that is never held."""
