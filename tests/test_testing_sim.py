"""Virtual time, seeded scheduling and deadlocks: the simulator by itself."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from aiorl.channel import Channel, Gate
from aiorl.testing import Deadlock, SeedFailure, Sim, explore


async def workers(sim: Sim) -> tuple[tuple[int, int], ...]:
    """Four tasks that sleep the same time: who goes first is the scheduler's choice."""
    trace: list[tuple[int, int]] = []

    async def work(name: int) -> None:
        for turn in range(5):
            await asyncio.sleep(0.1)
            trace.append((name, turn))

    async with asyncio.TaskGroup() as group:
        for name in range(4):
            group.create_task(work(name))
    return tuple(trace)


def test_an_hour_passes_at_once_and_exactly() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await asyncio.sleep(3600.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await asyncio.Event().wait()
        return loop.time() - begun_s

    sim = Sim(0, limit_s=1e6)
    assert sim.run(main()) == sim.now_s == 3660.0


def test_seeds_differ_and_repeat() -> None:
    first, second = explore(workers, 100), explore(workers, 100)
    assert first == second
    assert len(set(first)) > 90


def test_without_jitter_there_is_one_order() -> None:
    assert len(set(explore(workers, 20, jitter=0.0))) == 1


def test_tasks_in_a_set_keep_their_order() -> None:
    """`asyncio.wait` and task groups keep tasks in sets, which go by hash: an address would differ from run to run."""

    async def cancelled(sim: Sim) -> list[str]:
        seen: list[str] = []

        async def wait(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(name)

        tasks = {asyncio.ensure_future(wait(str(n))) for n in range(30)}
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return seen

    keep: list[Any] = [object() for _ in range(1000)]
    first = explore(cancelled, 5)
    del keep[::2]
    assert explore(cancelled, 5) == first


def test_a_value_and_a_cancellation_reach_a_task_that_was_held_back() -> None:
    async def main(sim: Sim) -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def wait() -> int:
            return await future

        task, other = asyncio.ensure_future(wait()), asyncio.ensure_future(wait())
        await asyncio.sleep(0.1)
        future.set_result(7)
        await asyncio.sleep(0)
        other.cancel()
        done = await asyncio.gather(task, other, return_exceptions=True)
        assert done[0] == 7
        assert done[1] == 7 or isinstance(done[1], asyncio.CancelledError)

        async def fail() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await asyncio.ensure_future(fail())

    explore(main, 100, jitter=0.6)


def test_a_deadlock_names_who_waits_where() -> None:
    async def main() -> None:
        first, second = Channel[int](1), Channel[int](1)

        async def stage(source: Channel[int], target: Channel[int]) -> None:
            await target.put(await source.get())

        async with asyncio.TaskGroup() as group:
            group.create_task(stage(first, second), name="forth")
            group.create_task(stage(second, first), name="back")

    stuck = r"nothing is ready and no timer runs; at 0.000 s(.|\n)*forth .*channel.py:\d+"
    with pytest.raises(Deadlock, match=stuck) as found:
        Sim(1).run(main())
    assert "back" in str(found.value)


def test_a_lost_wake_up_beside_a_ticking_clock_is_found_at_the_limit() -> None:
    async def main(sim: Sim) -> None:
        async def tick() -> None:
            while True:
                await asyncio.sleep(1.0)

        ticking = asyncio.ensure_future(tick())
        await Gate().wait()
        ticking.cancel()

    with pytest.raises(SeedFailure, match=r"not done after 50 virtual seconds(.|\n)*waits in wait, aiorl/channel.py"):
        explore(main, 3, limit_s=50.0)


async def check_then_act(sim: Sim) -> None:
    """A race: between the look and the deed there is an await, so now and then two do it."""
    taken: list[int] = []

    async def take(name: int) -> None:
        if not taken:
            await asyncio.sleep(0)
            taken.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(take(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        group.create_task(take(2))
    assert len(taken) == 1


def test_explore_finds_a_race_and_its_seed_reproduces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    explore(check_then_act, 1, jitter=0.0)
    with pytest.raises(SeedFailure, match="AIORL_SEED=") as found:
        explore(check_then_act, 200)
    seed = found.value.seed
    assert isinstance(found.value.__cause__, AssertionError)
    with pytest.raises(SeedFailure):
        explore(check_then_act, [seed])
    tried: list[int] = []
    monkeypatch.setenv("AIORL_SEED", str(seed))
    explore(lambda sim: tried.append(sim.seed), 200)
    assert tried == [seed]


def test_what_is_left_behind_is_named() -> None:
    async def main() -> None:
        asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="forgotten")
        await asyncio.sleep(0)

    sim = Sim(0)
    sim.run(main())
    assert len(sim.left) == 1
    assert sim.left[0].startswith("forgotten")


def test_an_error_that_nobody_looks_at_is_kept() -> None:
    async def main() -> None:
        async def fail() -> None:
            raise KeyError("unseen")

        task = asyncio.ensure_future(fail())
        await asyncio.sleep(1)
        del task

    sim = Sim(0)
    sim.run(main())
    assert any("unseen" in problem for problem in sim.problems)


def test_pipes_are_read_while_time_stands_still() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        got: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(reader, lambda: got.done() or got.set_result(os.read(reader, 16)))
        loop.call_later(5.0, os.write, writer, b"bell")
        try:
            return await got
        finally:
            loop.remove_reader(reader)
            os.close(reader)
            os.close(writer)

    sim = Sim(0)
    assert sim.run(main()) == b"bell"
    assert sim.now_s == 5.0


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_jitter_is_a_probability_below_one(jitter: float) -> None:
    with pytest.raises(ValueError, match="jitter"):
        Sim(0, jitter=jitter)
