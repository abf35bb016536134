"""A bounded, closable queue between two coroutines (asyncio.Queue can be shut down only from Python 3.13 on)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel is closed (and, when receiving, empty)."""


class Channel(Generic[T]):
    """First in, first out, at most `bound` items. `async for item in channel` ends when it is closed and empty.

    After `close`, senders get `Closed` and receivers first get what is left. Items are never lost: `drain` returns
    what nobody received.
    """

    def __init__(self, bound: int) -> None:
        if bound < 1:
            raise ValueError(f"bound = {bound}: expected at least 1")
        self.bound = bound
        self.high_water = 0
        self.closed = False
        self._items: deque[T] = deque()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def put_nowait(self, item: T) -> None:
        """Append an item; `Closed` if closed, OverflowError if full."""
        if self.closed:
            raise Closed
        if len(self._items) >= self.bound:
            raise OverflowError(f"channel is full ({self.bound} items)")
        self._items.append(item)
        self.high_water = max(self.high_water, len(self._items))
        _wake_one(self._getters)

    async def put(self, item: T) -> None:
        """Append an item, waiting for room."""
        while len(self._items) >= self.bound and not self.closed:
            await self._wait(self._putters)
        self.put_nowait(item)

    async def get(self) -> T:
        """Take the oldest item, waiting for one; `Closed` when closed and empty."""
        while not self._items:
            if self.closed:
                raise Closed
            await self._wait(self._getters)
        item = self._items.popleft()
        _wake_one(self._putters)
        return item

    def close(self) -> None:
        """Let nothing more in and wake everybody."""
        self.closed = True
        for waiters in (self._getters, self._putters):
            while waiters:
                _wake_one(waiters)

    def drain(self) -> list[T]:
        """Take everything that is left without waiting."""
        items = list(self._items)
        self._items.clear()
        while self._putters:
            _wake_one(self._putters)
        return items

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.get()
        except Closed:
            raise StopAsyncIteration from None

    async def _wait(self, waiters: deque[asyncio.Future[None]]) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                _wake_one(waiters)  # the wake-up was meant for somebody: pass it on
            elif waiter in waiters:
                waiters.remove(waiter)
            raise


def _wake_one(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return


class Gate:
    """Wakes everybody who waits for "something may have changed". Check and wait without an await in between."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Return as soon as the predicate holds (it is looked at now and at every wake-up)."""
        while not predicate():
            await self.wait()
