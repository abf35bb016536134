"""Fan-out of events: every reader has its own ring, and none can slow the run down."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count

from aiorl.events import AnyEvent, Finished, Lagged


class Subscription:
    """One reader's view: `async for event in subscription`, ending after `Finished`.

    At most `keep` frequent events wait for the reader; older ones are dropped and counted in a `Lagged` event. Important
    events always wait.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        # Each with its number in the order of all: what is dropped is then at the end of its own queue.
        self._important: deque[tuple[int, AnyEvent]] = deque()
        self._frequent: deque[tuple[int, AnyEvent]] = deque()
        self._numbers = count()
        self._dropped = 0
        self._over = False
        self._wakeup = asyncio.Event()

    def put(self, event: AnyEvent) -> None:
        """Add an event; never waits."""
        if not event.important and len(self._frequent) >= self._keep:
            self._frequent.popleft()
            self._dropped += 1
        (self._important if event.important else self._frequent).append((next(self._numbers), event))
        self._wakeup.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> AnyEvent:
        while not self._important and not self._frequent and not self._over:
            self._wakeup.clear()
            await self._wakeup.wait()
        if self._over:
            raise StopAsyncIteration
        waiting = [events for events in (self._important, self._frequent) if events]
        first = min(waiting, key=lambda events: events[0][0])
        if self._dropped:
            return self._report_dropped(first[0][1])
        _, event = first.popleft()
        if isinstance(event, Finished):
            self.end()
        return event

    def _report_dropped(self, before: AnyEvent) -> Lagged:
        dropped, self._dropped = self._dropped, 0
        return Lagged(seconds=before.seconds, version=before.version, env_steps=before.env_steps, dropped=dropped)

    def end(self) -> None:
        """Nothing more will be read: iteration ends, for whoever waits now too."""
        self._over = True
        self._important.clear()
        self._frequent.clear()
        self._wakeup.set()


class Broadcast:
    """Sends each event to all subscriptions. Who subscribes late gets the important events so far first."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._important: list[AnyEvent] = []

    def subscribe(self, keep: int = 256) -> Subscription:
        subscription = Subscription(max(1, keep))
        for event in self._important:
            subscription.put(event)
        self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send no more events to this subscription, and end it."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        subscription.end()

    def emit(self, event: AnyEvent) -> None:
        if event.important:
            self._important.append(event)
        for subscription in self._subscriptions:
            subscription.put(event)
