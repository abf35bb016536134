"""The worker backends against their protocol: the same segments from processes and from this process."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from toys import Toy

from aiorl import preflight
from aiorl.algos.base import LearnerContext
from aiorl.config import Config
from aiorl.envs.cursor import GroupCursor, advance
from aiorl.errors import WorkerError
from aiorl.pacing import Grant
from aiorl.preflight import Preflight
from aiorl.segments import Segment
from aiorl.workers.control import Control, Counter
from aiorl.workers.inline import InlineWorkers
from aiorl.workers.launch import Launcher
from aiorl.workers.pool import ProcessWorkers, Workers, plan_stations
from aiorl.workers.station import StationSetup
from aiorl.workers.supervision import GivenUp, Restart
from aiorl.workers.weights import WeightLayout, WeightStore

GROUPS, GROUP_SIZE, SLOTS = 4, 2, 2


@pytest.fixture
def checked() -> Preflight:
    config = Config(env="run_envs:Counting", algo=Toy(), envs=GROUPS * GROUP_SIZE, group_size=GROUP_SIZE, workers=0)
    return preflight.check(config, write=False)


@pytest.fixture
def weights(checked: Preflight) -> Iterator[WeightStore]:
    learner = Toy().learner(checked.spaces, LearnerContext(0, 8, 8, 10, 0))
    store = WeightStore(WeightLayout.of(learner.weights()), 3)
    buffer = store.claim()
    store.write(buffer, learner.weights())
    store.publish(buffer, 0)
    yield store
    store.close()


Build = Callable[[int], Workers]


@pytest.fixture
def build(checked: Preflight, weights: WeightStore) -> Build:
    """Make a backend with that many processes (0: inline)."""

    def make(workers: int, step_timeout_s: float = 30.0, **changes: object) -> Workers:
        common = StationSetup(
            index=0, env=checked.env, spaces=checked.spaces, algorithm=checked.algorithm, seed=3, groups={}, slots=SLOTS,
            segment=checked.segment, weights=weights.layout, weight_block=weights.block, block=weights.block, eval_width=2,
        )  # fmt: skip
        plan = plan_stations(replace(common, **changes), GROUPS, GROUP_SIZE, workers, {})
        if not workers:
            return InlineWorkers(plan)
        return ProcessWorkers(plan, Launcher(), None, 30.0, step_timeout_s, from_the_start)

    def from_the_start(group: int, delivered: Mapping[int, Segment]) -> GroupCursor | None:
        cursor = None
        for ordinal in range(len(delivered)):
            cursor = advance(cursor, delivered[ordinal])
        return cursor

    return make


async def collect(workers: Workers, ordinals: int) -> dict[tuple[int, int], dict[str, bytes]]:
    """Collect `ordinals` segments from every group; their contents by (group, ordinal)."""
    found: dict[tuple[int, int], dict[str, bytes]] = {}
    for ordinal in range(ordinals):
        for group in range(GROUPS):
            workers.collect(Grant(group, ordinal, ordinal % SLOTS, 0), 0)
        for _ in range(GROUPS):
            arrival = await workers.arrivals.get()
            segment = workers.segment(arrival.group, arrival.slot)
            assert arrival.env_steps == segment.env_steps == segment.steps * GROUP_SIZE
            found[arrival.group, ordinal] = contents(segment)
    return found


def contents(segment: Segment) -> dict[str, bytes]:
    arrays = {**segment.obs, **segment.columns, "final_at": segment.final_at[: segment.finals]}
    return {name: np.ascontiguousarray(a).tobytes() for name, a in arrays.items()}


async def test_every_backend_collects_the_same(build: Build) -> None:
    seen = []
    for processes in (0, 1, 3, 4):
        workers = build(processes)
        try:
            await workers.start()
            seen.append(await collect(workers, 5))
        finally:
            await workers.aclose()
    assert all(other == seen[0] for other in seen[1:])
    assert len({segment["obs"] for segment in seen[0].values()}) == GROUPS * 5, "groups or segments repeat each other"


@pytest.mark.parametrize("processes", [0, 2])
async def test_evaluation_is_a_function_of_weights_and_seed(build: Build, processes: int) -> None:
    workers = build(processes)
    try:
        await workers.start()
        first = await workers.evaluate(0, 5)
        await collect(workers, 1)
        second = await workers.evaluate(0, 5)
    finally:
        await workers.aclose()
    assert first.returns.tolist() == second.returns.tolist()
    assert first.lengths.tolist() == [7] * 5


@pytest.mark.usefixtures("short_waits")
async def test_a_killed_worker_is_noticed_at_once_and_its_steps_are_known(build: Build, no_leaks: None) -> None:
    workers = build(2)
    assert isinstance(workers, ProcessWorkers)

    def kill(_: Restart | GivenUp | None = None) -> None:
        os.kill(workers.pids[1], signal.SIGKILL)

    try:
        await workers.start()
        await collect(workers, 2)
        kill()
        with pytest.raises(WorkerError, match=r"worker 1 was ended by SIGKILL .*between segments, after 3 restarts in 60 s"):
            async with asyncio.timeout(20):
                await workers.watch(kill)
        workers.collect(Grant(3, 2, 0, 0), 0)  # to the dead worker: must neither raise nor block
        assert workers.unfinished_steps([Grant(3, 2, 0, 0)]) == 0
    finally:
        await workers.aclose()
    await workers.aclose()


async def test_a_stopped_worker_counts_as_hung_only_while_it_has_work(build: Build, no_leaks: None) -> None:
    workers = build(2, step_timeout_s=0.3)
    assert isinstance(workers, ProcessWorkers)
    try:
        await workers.start()
        os.kill(workers.pids[0], signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await workers.watch()
        restarts: list[Restart | GivenUp] = []
        watching = asyncio.ensure_future(workers.watch(restarts.append))
        workers.collect(Grant(0, 0, 0, 0), 0)
        async with asyncio.timeout(20):
            arrival = await workers.arrivals.get()  # a stopped process takes no SIGTERM: this shows that SIGKILL follows
        assert arrival.env_steps == workers.segment(0, 0).env_steps > 0
        assert [r.worker for r in restarts] == ["worker 0"]
        assert re.match(r"has not finished a step for \d+\.\d s", restarts[0].reason)
        os.kill(workers.pids[0], signal.SIGSTOP)
    finally:
        await workers.aclose()
    await watching


async def test_what_was_delivered_before_the_death_is_not_collected_again(build: Build, no_leaks: None) -> None:
    """The worker dies with its doorbell in the pipe: the loop learns of both at once."""
    twin, workers = build(0), build(1)
    assert isinstance(workers, ProcessWorkers)
    (setup,) = workers._plan.training
    control = Control(setup.block, setup.groups)
    restarts: list[Restart | GivenUp] = []
    try:
        await twin.start()
        expected = await collect(twin, 2)
        await workers.start()
        watching = asyncio.ensure_future(workers.watch(restarts.append))
        await asyncio.sleep(0)
        workers.collect(Grant(2, 0, 0, 0), 0)
        worker = workers._keepers[0]._worker
        assert worker._process is not None
        assert select.select([worker._doorbell_fd], [], [], 20)[0]
        os.kill(workers.pids[0], signal.SIGKILL)
        assert select.select([worker._process.sentinel], [], [], 20)[0]
        async with asyncio.timeout(20):
            assert (await workers.arrivals.get()).group == 2
            workers.collect(Grant(2, 1, 1, 0), 0)
            assert (await workers.arrivals.get()).slot == 1
        assert len(restarts) == 1
        beats = control.table[:, Counter.BEATS].sum()
        assert beats == workers.segment(2, 1).steps, "more than the second segment was collected"
        assert [contents(workers.segment(2, slot)) for slot in (0, 1)] == [expected[2, 0], expected[2, 1]]
    finally:
        del control
        await workers.aclose()
        await twin.aclose()
    await watching


async def test_what_cannot_be_closed_holds_up_nothing_else(
    build: Build, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = build(2)
    assert isinstance(workers, ProcessWorkers)
    await workers.start()
    close, stop = Launcher.close, workers._keepers[0].stop

    def close_and_fail(launcher: Launcher) -> None:
        close(launcher)
        raise ChildProcessError("no such process")

    async def stop_and_fail() -> None:
        await stop()
        raise OSError("no such process")

    monkeypatch.setattr(Launcher, "close", close_and_fail)
    monkeypatch.setattr(workers._keepers[0], "stop", stop_and_fail)
    with pytest.raises(ChildProcessError):
        await workers.aclose()
    assert workers.pids == []


async def test_the_counters_say_what_a_worker_does(build: Build) -> None:
    workers = build(1)
    assert isinstance(workers, ProcessWorkers)
    try:
        await workers.start()
        await collect(workers, 3)
        (setup,) = workers._plan.training
        control = Control(setup.block, setup.groups)
        for group in setup.groups:
            assert control.of(Counter.ORDINAL, group) == 2
            assert control.of(Counter.STEP, group) == setup.segment.steps
            assert control.of(Counter.BEATS, group) == 3 * setup.segment.steps
        del control
    finally:
        await workers.aclose()
