"""Fan-out of events: slow readers lose frequent events only, and are told how many."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from aiorl.events import AnyEvent, Evaluated, Event, Finished, Lagged, Updated, Warned
from aiorl.metrics.broadcast import Broadcast, Subscription


def important(n: int) -> Warned:
    return Warned(seconds=float(n), version=n, env_steps=n, message=str(n))


def frequent(n: int) -> Updated:
    return Updated(
        seconds=float(n), version=n, env_steps=n, rollout=n, behaviour_version=n, staleness=0,
        staleness_in_queue=0, off_policy_degree=1, gradient_steps=1,
        collect_seconds=0, update_seconds=0, waited_seconds=0, episodes=0, return_mean=None, length_mean=None,
        train_return_mean_100=None, metrics={},
    )  # fmt: skip


def finished(n: int = 99) -> Finished:
    return Finished(seconds=float(n), version=n, env_steps=n, status="completed", error=None)


def sent(broadcast: Broadcast, events: Iterable[Event]) -> None:
    for event in events:
        broadcast.emit(event)  # type: ignore[arg-type]


async def read_all(subscription: Subscription) -> list[AnyEvent]:
    async with asyncio.timeout(5):
        return [event async for event in subscription]


def test_the_two_kinds() -> None:
    assert Evaluated.important
    assert not Updated.important


async def test_every_reader_gets_everything_in_order_and_ends_after_finished() -> None:
    broadcast = Broadcast()
    readers = [broadcast.subscribe(), broadcast.subscribe(5)]
    events = [important(1), frequent(2), important(3), frequent(4), finished()]
    sent(broadcast, events)
    for reader in readers:
        assert await read_all(reader) == events
        assert await read_all(reader) == [], "reading on after the end ends at once"


async def test_a_reader_that_waits_gets_each_event_as_it_comes() -> None:
    broadcast, got = Broadcast(), asyncio.Queue[AnyEvent]()
    reader = broadcast.subscribe(1)

    async def read() -> None:
        async for event in reader:
            got.put_nowait(event)

    task = asyncio.create_task(read())
    for n in range(10):
        broadcast.emit(frequent(n))
        assert await got.get() == frequent(n), "nothing is dropped for a reader that keeps up"
    broadcast.emit(finished())
    await task


async def test_a_slow_reader_is_told_how_many_it_missed_before_the_next_event() -> None:
    broadcast = Broadcast()
    slow = broadcast.subscribe(2)
    sent(broadcast, [*(frequent(n) for n in range(5)), important(5), finished()])
    first, *rest = await read_all(slow)
    assert first == Lagged(seconds=3.0, version=3, env_steps=3, dropped=3)
    assert rest == [frequent(3), frequent(4), important(5), finished()]


class Asked(Updated, frozen=True):
    """Counts how often anybody asks what kind of event it is."""

    count: ClassVar[int] = 0

    @property
    def important(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        Asked.count += 1
        return self.version % 2 == 1


def test_what_nobody_reads_costs_the_next_event_nothing() -> None:
    """Each event is looked at a few times when it comes, however many wait."""
    broadcast = Broadcast()
    broadcast.subscribe(2)
    events = [Asked(**{**structs.asdict(frequent(n)), "version": n}) for n in range(1000)]
    Asked.count = 0
    sent(broadcast, events)
    assert Asked.count < 10 * len(events)


async def test_a_reader_that_catches_up_misses_nothing_more() -> None:
    broadcast = Broadcast()
    reader = broadcast.subscribe(2)
    sent(broadcast, (frequent(n) for n in range(9)))
    assert [await anext(reader) for _ in range(3)][1:] == [frequent(7), frequent(8)]
    for n in range(10, 20, 2):
        sent(broadcast, [frequent(n), frequent(n + 1)])
        assert [await anext(reader) for _ in range(2)] == [frequent(n), frequent(n + 1)]


async def test_one_slow_reader_costs_the_others_nothing() -> None:
    broadcast = Broadcast()
    slow, quick = broadcast.subscribe(1), broadcast.subscribe(100)
    events = [*(frequent(n) for n in range(50)), finished()]
    sent(broadcast, events)
    assert await read_all(quick) == events
    assert len(await read_all(slow)) == 3


async def test_who_comes_late_gets_the_important_events_first() -> None:
    broadcast = Broadcast()
    sent(broadcast, [important(1), frequent(2), important(3)])
    late = broadcast.subscribe()
    sent(broadcast, [frequent(4), finished()])
    assert await read_all(late) == [important(1), important(3), frequent(4), finished()]
    assert await read_all(broadcast.subscribe()) == [important(1), important(3), finished()], "also after the end"


async def test_a_reader_who_has_left_gets_nothing_more_and_does_not_wait() -> None:
    broadcast = Broadcast()
    reader, other = broadcast.subscribe(), broadcast.subscribe()
    waiting = asyncio.create_task(read_all(reader))
    await asyncio.sleep(0)
    broadcast.unsubscribe(reader)
    broadcast.unsubscribe(reader)  # again does no harm
    sent(broadcast, [important(1), finished()])
    assert await waiting == []
    assert await read_all(other) == [important(1), finished()]


async def test_two_tasks_may_share_a_subscription() -> None:
    broadcast = Broadcast()
    shared = broadcast.subscribe()
    tasks = [asyncio.create_task(read_all(shared)) for _ in range(2)]
    await asyncio.sleep(0)
    sent(broadcast, [important(1), important(2), finished()])
    results = await asyncio.gather(*tasks)
    assert sorted((e for r in results for e in r), key=lambda e: e.version) == [important(1), important(2), finished()]


@pytest.mark.parametrize("keep", [0, -3])
async def test_at_least_one_frequent_event_is_kept(keep: int) -> None:
    broadcast = Broadcast()
    reader = broadcast.subscribe(keep)
    sent(broadcast, [frequent(1), frequent(2), finished()])
    assert (await read_all(reader))[1:] == [frequent(2), finished()]


@settings(deadline=None, max_examples=200)
@given(keep=st.integers(1, 3), steps=st.lists(st.sampled_from("ifr"), max_size=40))
def test_accounts_agree(keep: int, steps: list[str]) -> None:
    """Whatever the order of sending and reading: important events all arrive in order, frequent ones or their number."""
    asyncio.run(_check_accounts(keep, steps))


async def _check_accounts(keep: int, steps: list[str]) -> None:
    broadcast = Broadcast()
    reader = broadcast.subscribe(keep)
    emitted: list[AnyEvent] = []
    got: list[AnyEvent] = []
    waiting = 0  # events that are sure to be there to be read
    for n, step in enumerate([*steps, "end"]):
        if step == "r":
            if waiting:
                got.append(await anext(reader))
                waiting -= not isinstance(got[-1], Lagged)
                waiting = max(waiting, 0)
            continue
        event = {"i": important, "f": frequent, "end": finished}[step](n)
        emitted.append(event)
        broadcast.emit(event)
        waiting += step != "f"
    got += await read_all(reader)
    assert [e for e in got if e.important and not isinstance(e, Lagged)] == [e for e in emitted if e.important]
    dropped = sum(e.dropped for e in got if isinstance(e, Lagged))
    arrived = [e for e in got if not e.important]
    assert arrived == [e for e in emitted if e in arrived], "out of order or doubled"
    assert dropped + len(arrived) == sum(not e.important for e in emitted)
