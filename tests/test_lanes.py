"""The groups of one worker side by side, in threads and as coroutines: nothing but the speed is another. Real processes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import kill, mortal_runs, until, workers_of
from toys import Toy

import aiorl
from aiorl.offload import OffloadThread
from aiorl.testing import LEDGER_ENV, Mark, Recording, check_laws
from aiorl.workers import worker as worker_module
from aiorl.workers.supervision import Patience

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")

GROUPS = 6
Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """A small run whose groups are single environments; with `deaths` they go wrong as `run_envs.Mortal` says."""
    return mortal_runs(
        tmp_path,
        env="run_envs:Counting", env_kwargs={"length": 20}, algo=Toy(), total_steps=600, envs=GROUPS,
        group_size=1, workers=1, off_policy_degree=1, eval_every=0, eval_episodes=2,
        checkpoint_every=0, stepping="threads",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    return made


async def watched(config: aiorl.Config) -> tuple[aiorl.Result, list[aiorl.WorkerRestarted]]:
    async with asyncio.timeout(60), aiorl.Run(config) as run:
        events = [event async for event in run.events()]
        return await run.wait(), [e for e in events if isinstance(e, aiorl.WorkerRestarted)]


def same(result: aiorl.Result, other: aiorl.Result) -> bool:
    return all(getattr(result, n) == getattr(other, n) for n in ("params_sha256", "ledger", "env_steps", "updates"))


# -- the same results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1])
async def test_how_groups_step_does_not_show(config: Make, no_leaks: None, degree: int) -> None:
    ways = [
        {"workers": 0}, {"stepping": "serial"}, {}, {"workers": 2}, {"steps_at_once": 2},
        {"env": "lane_envs:AsyncCounting", "stepping": "auto"},
        {"env": "lane_envs:AsyncCounting", "stepping": "auto", "workers": 2, "steps_at_once": 2},
        {"env": "lane_envs:AsyncCounting", "stepping": "serial"},
        {"env": "lane_envs:AsyncCounting", "stepping": "auto", "workers": 0},
    ]  # fmt: skip
    results = [await aiorl.train(config(off_policy_degree=degree, **way)) for way in ways]
    assert all(same(result, results[0]) for result in results)
    assert results[0].dropped == {}


def test_threads_make_groups_of_one(config: Make) -> None:
    assert config(group_size="auto").resolve().group_size == 1
    assert config(group_size="auto", stepping="serial").resolve().group_size != 1
    assert config(group_size=3).resolve().group_size == 3


# -- side by side ------------------------------------------------------------------------------------------------------


async def test_threads_wait_side_by_side_each_group_on_its_own(config: Make, no_leaks: None) -> None:
    """The first steps can only be done together; an environment that is called on another thread raises."""
    result, events = await watched(config(env="lane_envs:Meeting", env_kwargs={"together": GROUPS}, eval_episodes=1,
                                          eval_suites={"plain": {"env": "run_envs:Counting"}}))  # fmt: skip
    assert (result.status, events) == ("completed", [])


async def test_no_more_steps_at_once_than_allowed(config: Make, no_leaks: None, folder: Path) -> None:
    """The first steps can only be done two by two."""
    changes: dict[str, Any] = {"env": "lane_envs:Crowded", "env_kwargs": {"folder": str(folder), "together": 2}}
    suites = {"plain": {"env": "run_envs:Counting"}}
    result, events = await watched(config(**changes, steps_at_once=2, eval_suites=suites))
    assert (result.status, events) == ("completed", [])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("workers", [0, 1])
async def test_an_evaluation_keeps_to_what_is_allowed(config: Make, no_leaks: None, folder: Path, workers: int) -> None:
    """It has as many environments as episodes: four."""
    suites = {"crowded": {"env": "lane_envs:AsyncCrowded", "env_kwargs": {"folder": str(folder)}}}
    changes: dict[str, Any] = {"env": "lane_envs:AsyncCounting", "env_kwargs": {}, "stepping": "auto", "eval_episodes": 4}
    free = await aiorl.train(config(**changes, workers=workers))
    result, events = await watched(config(**changes, workers=workers, steps_at_once=2, eval_suites=suites))
    assert (result.status, events) == ("completed", [])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert result.final_evaluation is not None
    assert free.final_evaluation is not None
    assert result.final_evaluation.mean_return == free.final_evaluation.mean_return


async def test_coroutines_wait_side_by_side(config: Make, no_leaks: None) -> None:
    suites = {"plain": {"env": "run_envs:Counting"}}
    changes = {"env": "lane_envs:AsyncCounting", "env_kwargs": {"together": GROUPS}, "stepping": "auto"}
    result, events = await watched(config(**changes, eval_suites=suites))
    assert (result.status, events) == ("completed", [])


async def test_threads_are_not_for_coroutines(config: Make) -> None:
    with pytest.raises(aiorl.ConfigError, match=r'stepping = "threads".*`async def`'):
        await aiorl.train(config(env="lane_envs:AsyncCounting"))


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deaths", "reason"),
    [
        ([("kill", 12)], r"SIGKILL .*in rollout \d, step \d of the segment, environments \d-\d"),
        ([("exit", 30)], "exited with code 3"),
        ([("raise", 30)], r"failed in rollout 3, step 5 of the segment, environments (\d)-\1: environment \1, .* broke"),
        ([("hang", 30)], r"has not finished a step for .* in rollout 3, step 5 of the segment, environments (\d)-\1$"),
    ],
    ids=["kill", "exit", "raise", "hang"],
)
async def test_a_group_that_goes_wrong(
    config: Make, no_leaks: None, deaths: list[tuple[str, int]], reason: str
) -> None:
    whole = await aiorl.train(config(workers=0))
    result, events = await watched(config(deaths, step_timeout_s=0.5))
    assert same(result, whole)
    assert result.dropped == {}
    (back,) = events
    assert re.search(reason, back.reason), back.reason


async def test_a_coroutine_that_never_goes_on(config: Make, no_leaks: None, folder: Path) -> None:
    whole = await aiorl.train(config(workers=0, env="lane_envs:AsyncCounting", env_kwargs={}, stepping="auto"))
    kwargs = {"folder": str(folder), "pid": os.getpid(), "at": 30}
    result, events = await watched(
        config(env="lane_envs:AsyncForever", env_kwargs=kwargs, stepping="auto", step_timeout_s=0.5)
    )
    assert same(result, whole)
    (back,) = events
    assert re.search(r"has not finished a step for .* in rollout 3, step 5 of the segment", back.reason), back.reason


@pytest.mark.parametrize("seed", range(2))
async def test_sigkill_again_and_again(config: Make, no_leaks: None, seed: int) -> None:
    """What every group was in the middle of is collected again, to the last byte."""
    chance = random.Random(seed)
    changes: dict[str, Any] = {
        "env": LEDGER_ENV, "env_kwargs": {}, "algo": Recording.of(Mark()), "total_steps": 6000, "segment_length": 16,
        "off_policy_degree": 2, "workers": 2,
    }  # fmt: skip
    whole = await aiorl.train(config(**changes, stepping="serial"))
    async with asyncio.timeout(60), aiorl.Run(config(**changes)) as run:
        due = sorted(chance.sample(range(2, 50), 3))  # as many as one worker may bear
        async for event in run:
            if isinstance(event, aiorl.Updated) and due and event.version >= due[0]:
                del due[0]
                kill(chance.choice(workers_of(run).pids[:-1]))
    check_laws(run)
    assert run.result.restarts >= 2
    assert same(run.result, whole)


def test_a_group_that_hangs_is_noticed_although_its_neighbours_go_on() -> None:
    patience = Patience()
    patience.begin(0.0, [0, 5, 5, 5])
    seen = [
        patience.look(0.25 * n, 0.5, [0, 5 + n, 5, 5], {1: 10, 2: 11}, True)  # the third group waits for its turn
        for n in range(1, 6)
    ]
    assert seen == [(0.25 * n, 11) for n in range(1, 6)]
    assert patience.look(1.5, 0.5, [0, 11, 6, 5], {1: 10, 2: 11, 3: 12}, True) == (0.25, 12)
    assert patience.look(9.0, 0.5, [0, 11, 6, 5], {}, True) == (0.5, None), "nobody has taken up the credits"
    assert patience.look(9.5, 0.5, [0, 11, 6, 5], {}, False) == (0.0, None)


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepping", ["serial", "threads"])
async def test_stop_wins_over_waiting_credits(
    config: Make, no_leaks: None, folder: Path, monkeypatch: pytest.MonkeyPatch, stepping: str
) -> None:
    """A worker in the middle of a step makes no other one."""
    monkeypatch.setattr(worker_module, "STOP_GRACE_S", 20.0)
    changes: dict[str, Any] = {"env": "lane_envs:Gated", "env_kwargs": {"folder": str(folder), "pid": os.getpid()}}
    async with asyncio.timeout(60), aiorl.Run(config(**changes, stepping=stepping, off_policy_degree=3)) as run:
        keeper = workers_of(run)._keepers[0]
        worker = keeper._worker
        await until((folder / "in").exists)
        workers_of(run)._watching[0].cancel()
        stopping = asyncio.ensure_future(keeper.stop())
        await asyncio.sleep(0)
        if stepping == "serial":  # in threads nothing need end but the process
            (folder / "out").touch()
        await stopping
        assert worker.fault is not None
        assert worker.fault.reason.startswith("exited with code 0")
        assert sum(worker.beats) <= GROUPS
        run.stop(final_evaluation=False)


async def test_leaving_does_not_wait_for_a_thread_that_is_stuck(config: Make, no_leaks: None) -> None:
    loop = asyncio.get_running_loop()
    setting = config([("hang", 12)], total_steps=10**6)
    async with asyncio.timeout(60), aiorl.Run(setting) as run:
        await until(lambda: list(Path(setting.env_kwargs["marks"]).iterdir()))
        worker = workers_of(run)._keepers[0]._worker
        begun_s = loop.time()
    assert loop.time() - begun_s < 6.0, "leaving took far longer than the two seconds promised"  # room for a busy machine
    assert worker.fault is not None


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread")
def test_a_thread_of_a_nice_process_stays_as_nice_as_that() -> None:
    """Going back needs rights that hardly anybody has."""
    seen: list[int] = []

    async def look() -> None:
        thread = OffloadThread("looks")
        seen.append(await thread.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        await thread.aclose(5.0)

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        asyncio.run(look())

    host = threading.Thread(target=run)
    host.start()
    host.join()
    assert seen == [15]
