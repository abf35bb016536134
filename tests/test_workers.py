"""The worker backends against their protocol: the same segments from processes and from this process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from toys import Toy

from aiorl import preflight
from aiorl.algos.base import LearnerContext
from aiorl.config import Config
from aiorl.errors import WorkerError
from aiorl.pacing import Grant
from aiorl.preflight import Preflight
from aiorl.segments import Segment
from aiorl.workers.launch import Launcher
from aiorl.workers.pool import InlineWorkers, ProcessWorkers, Workers, plan_stations
from aiorl.workers.program import Counter, StationSetup
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
        return ProcessWorkers(plan, Launcher(), None, 30.0, step_timeout_s) if workers else InlineWorkers(plan)

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
    assert first[0].tolist() == second[0].tolist()
    assert first[1].tolist() == [7] * 5


async def test_a_killed_worker_is_noticed_at_once_and_its_steps_are_known(build: Build, no_leaks: None) -> None:
    workers = build(2)
    assert isinstance(workers, ProcessWorkers)
    try:
        await workers.start()
        await collect(workers, 2)
        os.kill(workers.pids[1], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"worker 1 was ended by SIGKILL .*between segments"):
            async with asyncio.timeout(10):
                await workers.watch()
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
        workers.collect(Grant(0, 0, 0, 0), 0)
        with pytest.raises(WorkerError, match=r"(?s)worker 0 has not finished a step for .* step_timeout_s = 0\.3"):
            async with asyncio.timeout(10):
                await workers.watch()
    finally:
        await workers.aclose()  # a stopped process takes no SIGTERM: this shows that SIGKILL follows


async def test_the_counters_say_what_a_worker_does(build: Build) -> None:
    workers = build(1)
    assert isinstance(workers, ProcessWorkers)
    try:
        await workers.start()
        await collect(workers, 3)
        (setup,) = workers._plan.training
        counters = np.frombuffer(setup.block.buffer, np.int64, 16)
        assert counters[Counter.ORDINAL] == 2
        assert counters[Counter.STEP] == setup.segment.steps
        assert counters[Counter.BEATS] == GROUPS * 3 * setup.segment.steps
        del counters
    finally:
        await workers.aclose()
