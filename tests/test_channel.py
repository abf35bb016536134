"""The channel between coroutines: order, bound, closing, and nothing lost however tasks are interleaved and cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.channel import Channel, Closed, Gate


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# -- channel -----------------------------------------------------------------------------------------------------------


async def test_first_in_first_out_and_the_high_water_mark() -> None:
    channel = Channel[int](3)
    for item in (1, 2):
        await channel.put(item)
    assert (len(channel), channel.high_water) == (2, 2)
    assert [await channel.get(), await channel.get()] == [1, 2]
    assert (len(channel), channel.high_water) == (0, 2)


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_below_one_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=f"bound = {bound}"):
        Channel[int](bound)


async def test_put_waits_for_room_and_put_nowait_does_not() -> None:
    channel = Channel[int](1)
    channel.put_nowait(1)
    with pytest.raises(OverflowError, match="1 items"):
        channel.put_nowait(2)
    putting = asyncio.create_task(channel.put(2))
    await ticks()
    assert not putting.done()
    assert await channel.get() == 1
    await putting
    assert channel.drain() == [2]


async def test_close_wakes_every_putter_and_every_getter() -> None:
    full, empty = Channel[int](1), Channel[int](1)
    full.put_nowait(0)
    waiting = [asyncio.create_task(full.put(n)) for n in range(3)] + [asyncio.create_task(empty.get()) for _ in range(3)]
    await ticks()
    full.close()
    empty.close()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, Closed) for outcome in outcomes)
    assert full.drain() == [0]
    for channel in (full, empty):
        with pytest.raises(Closed):
            channel.put_nowait(1)
        with pytest.raises(Closed):
            await channel.put(1)
        with pytest.raises(Closed):
            await channel.get()


async def test_what_is_left_after_closing_is_still_received_and_iteration_ends() -> None:
    channel = Channel[int](5)
    for item in range(3):
        channel.put_nowait(item)
    channel.close()
    channel.close()  # again does no harm
    assert [item async for item in channel] == [0, 1, 2]
    assert [item async for item in channel] == []


async def test_drain_takes_all_and_lets_putters_in() -> None:
    channel = Channel[int](2)
    channel.put_nowait(0)
    channel.put_nowait(1)
    putting = [asyncio.create_task(channel.put(n)) for n in (2, 3, 4)]
    await ticks()
    assert channel.drain() == [0, 1]
    await ticks()
    assert channel.drain() == [2, 3]
    await ticks()
    assert channel.drain() == [4]
    await asyncio.gather(*putting)


async def test_a_getter_cancelled_in_the_tick_it_is_woken_passes_the_item_on() -> None:
    channel = Channel[int](4)
    first, second = (asyncio.create_task(channel.get()) for _ in range(2))
    await ticks()
    channel.put_nowait(7)  # wakes the first …
    first.cancel()  # … which will never look
    async with asyncio.timeout(5):
        assert await second == 7
    assert first.cancelled()


async def test_a_putter_cancelled_in_the_tick_it_is_woken_passes_the_room_on() -> None:
    channel = Channel[int](1)
    channel.put_nowait(0)
    first, second = (asyncio.create_task(channel.put(n)) for n in (1, 2))
    await ticks()
    assert await channel.get() == 0
    first.cancel()
    async with asyncio.timeout(5):
        await second
    assert first.cancelled()
    assert channel.drain() == [2]


STEPS = st.lists(
    st.one_of(
        st.sampled_from(["put", "get", "tick", "drain"]),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(bound=st.integers(1, 3), steps=STEPS)
def test_nothing_is_lost_doubled_overtaken_or_stuck(bound: int, steps: list[Any]) -> None:
    asyncio.run(_play(bound, steps))


async def _play(bound: int, steps: list[Any]) -> None:
    channel = Channel[int](bound)
    accepted: list[int] = []  # in the order in which puts returned
    received: list[int] = []
    putters: list[asyncio.Task[None]] = []
    getters: list[asyncio.Task[None]] = []

    async def put(item: int) -> None:
        await channel.put(item)
        accepted.append(item)

    async def get() -> None:
        received.append(await channel.get())

    for step in steps:
        if step == "put":
            putters.append(asyncio.create_task(put(len(putters))))
        elif step == "get":
            getters.append(asyncio.create_task(get()))
        elif step == "tick":
            await asyncio.sleep(0)
        elif step == "drain":
            received += channel.drain()
        else:
            tasks = putters + getters
            if tasks:
                tasks[step[1] % len(tasks)].cancel()
        assert len(channel) <= bound
    await ticks(2 * len(steps) + 10)
    assert not (any(not task.done() for task in getters) and len(channel)), "a getter sleeps beside an item"
    assert not (any(not task.done() for task in putters) and len(channel) < bound), "a putter sleeps beside room"
    channel.close()
    await ticks()
    assert all(task.done() for task in putters + getters)
    for task in putters + getters:
        assert task.cancelled() or task.exception() is None or isinstance(task.exception(), Closed)
    assert received + channel.drain() == accepted


# -- gate --------------------------------------------------------------------------------------------------------------


async def test_gate_wakes_everybody_who_waits_and_nobody_who_comes_later() -> None:
    gate = Gate()
    gate.wake()  # nobody waits: it is not remembered
    waiting = [asyncio.create_task(gate.wait()) for _ in range(3)]
    await ticks()
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    gate.wake()
    late = asyncio.create_task(gate.wait())
    await ticks()
    assert [task.done() for task in waiting] == [True] * 3
    assert waiting[0].cancelled()
    assert not late.done()
    late.cancel()


async def test_wait_for_returns_with_the_predicate_true_and_no_step_in_between() -> None:
    gate, value, seen = Gate(), 0, list[int]()

    async def waiter() -> None:
        await gate.wait_for(lambda: value >= 2)
        seen.append(value)

    task = asyncio.create_task(waiter())
    for value in (1, 2):
        gate.wake()
        await ticks()
        assert task.done() == (value == 2)
    assert seen == [2]
    await gate.wait_for(lambda: True)  # true already: no wake-up is needed
