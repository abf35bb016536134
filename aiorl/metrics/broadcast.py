"""Fan-out of events: every reader has its own ring, and none can slow the run down."""

from __future__ import annotations

import asyncio
from collections import deque

from aiorl.events import AnyEvent, Finished, Lagged


class Subscription:
    """One reader's view: `async for event in subscription`, ending after `Finished`.

    At most `keep` frequent events wait for the reader; older ones are dropped and counted in a `Lagged` event. Important
    events always wait.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._events: deque[AnyEvent] = deque()
        self._frequent = 0
        self._dropped = 0
        self._over = False
        self._wakeup = asyncio.Event()

    def put(self, event: AnyEvent) -> None:
        """Add an event; never waits."""
        if not event.important:
            if self._frequent >= self._keep:
                self._drop_oldest_frequent()
            self._frequent += 1
        self._events.append(event)
        self._wakeup.set()

    def _drop_oldest_frequent(self) -> None:
        for position, event in enumerate(self._events):
            if not event.important:
                del self._events[position]
                self._frequent -= 1
                self._dropped += 1
                return

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> AnyEvent:
        while not self._events and not self._over:
            self._wakeup.clear()
            await self._wakeup.wait()
        if self._over:
            raise StopAsyncIteration
        if self._dropped:
            return self._report_dropped(self._events[0])
        event = self._events.popleft()
        if not event.important:
            self._frequent -= 1
        if isinstance(event, Finished):
            self.end()
        return event

    def _report_dropped(self, before: AnyEvent) -> Lagged:
        dropped, self._dropped = self._dropped, 0
        return Lagged(seconds=before.seconds, version=before.version, env_steps=before.env_steps, dropped=dropped)

    def end(self) -> None:
        """Nothing more will be read: iteration ends, for whoever waits now too."""
        self._over = True
        self._events.clear()
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
