"""A worker that is killed or hangs changes nothing but time: real processes, real signals, whole runs."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import kill, kill_fork_server_in_a_launch, mortal_runs, until, workers_of
from toys import Toy

import aiorl
from aiorl.workers.launch import Launcher
from aiorl.workers.supervision import BACK_OFF_S, RESTART_WINDOW_S, RESTARTS_MAX, Budget

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")

STEPS = 8  # of a segment of Toy
Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """A small run; with `deaths` its environments go wrong as `run_envs.Mortal` says."""
    return mortal_runs(
        tmp_path,
        env="run_envs:Counting", env_kwargs={"length": 20}, algo=Toy(), total_steps=1200, envs=8,
        group_size=2, workers=2, off_policy_degree=2, eval_every=0, eval_episodes=4,
        checkpoint_every=0,
    )  # fmt: skip


async def watched(config: aiorl.Config) -> tuple[aiorl.Result, list[aiorl.WorkerRestarted]]:
    """The result of a run, and its restarts."""
    async with asyncio.timeout(60), aiorl.Run(config) as run:
        events = [event async for event in run.events()]
        return await run.wait(), [e for e in events if isinstance(e, aiorl.WorkerRestarted)]


def assert_nothing_but_time(result: aiorl.Result, whole: aiorl.Result) -> None:
    """All that does not depend on time is as in a run without trouble."""
    assert result.status == "completed"
    assert result.params_sha256 == whole.params_sha256
    assert result.ledger == whole.ledger
    assert result.dropped == {}
    for name in ("env_steps", "episodes", "updates", "gradient_steps", "train_return_mean_100"):
        assert getattr(result, name) == getattr(whole, name), name
    assert result.staleness["histogram"] == whole.staleness["histogram"]


# -- at every moment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deaths", "restarts", "reason"),
    [
        ([("kill", 1)], 1, "SIGKILL .*in rollout 0, step 0 of the segment"),
        ([("kill", 12)], 1, "SIGKILL .*in rollout 1, step 3 of the segment, environments 0-1"),
        ([("kill", 2 * STEPS)], 1, "SIGKILL .*in rollout 1, step 7 of the segment"),
        ([("kill", 12), ("kill", 12)], 2, "SIGKILL .*in rollout 1"),
        ([("kill", 12), ("kill", 4)], 1, "SIGKILL .*while starting"),
        ([("kill", 12), ("kill", 0)], 1, "SIGKILL .*while starting"),
        ([("exit", 30)], 1, "exited with code 3"),
        ([("raise", 30)], 1, r"failed in rollout .*: .*the physics broke"),
        ([("hang", 30)], 1, r"has not finished a step for .* in rollout 3"),
    ],
    ids=["first step", "middle", "last step", "twice in a row", "replaying", "starting", "exit", "raise", "hang"],
)
@pytest.mark.parametrize("degree", [pytest.param(0, marks=pytest.mark.long), 2])
async def test_a_worker_that_goes_wrong(
    config: Make, no_leaks: None, degree: int, deaths: list[tuple[str, int]], restarts: int, reason: str
) -> None:
    whole = await aiorl.train(config(off_policy_degree=degree, workers=0))
    result, events = await watched(config(deaths, off_policy_degree=degree, workers=1, step_timeout_s=0.5))
    assert_nothing_but_time(result, whole)
    assert result.restarts == len(events) == restarts
    assert [event.restarts for event in events] == list(range(1, restarts + 1))
    assert all(event.worker == "worker 0" and event.seconds_down > 0 for event in events)
    assert events[-1].important
    assert re.search(reason, events[-1].reason)
    assert "\n" not in events[-1].reason


async def test_all_workers_at_once_again_and_again(config: Make, no_leaks: None) -> None:
    whole = await aiorl.train(config(total_steps=2000, workers=0))
    changes = {"env": "run_envs:Jittery", "total_steps": 2000, "eval_every": 200}
    async with asyncio.timeout(60), aiorl.Run(config(**changes, workers=4)) as run:
        due = [3, 9, 15]
        async for event in run:
            if isinstance(event, aiorl.Updated) and due and event.version >= due[0]:
                del due[0]
                for pid in workers_of(run).pids:
                    kill(pid)
    assert_nothing_but_time(run.result, whole)
    assert 4 <= run.result.restarts <= 15
    assert run.result.final_evaluation is not None
    assert whole.final_evaluation is not None
    assert run.result.final_evaluation.mean_return == whole.final_evaluation.mean_return


async def test_between_segments_and_in_a_pause(config: Make, no_leaks: None) -> None:
    whole = await aiorl.train(config(total_steps=3000, workers=0))
    async with asyncio.timeout(60), aiorl.Run(config(total_steps=3000)) as run:
        events = run.events()
        await anext(e async for e in events if isinstance(e, aiorl.Updated))
        pause = asyncio.ensure_future(run.pause())
        for pid in workers_of(run).pids:
            kill(pid)  # while it comes to rest
        await pause
        back = [e async for e in _first(events, 3, aiorl.WorkerRestarted)]
        at_rest = run.status()
        for pid in workers_of(run).pids:
            kill(pid)  # while it rests
        back += [e async for e in _first(events, 3, aiorl.WorkerRestarted)]
        assert run.status().ledger == at_rest.ledger, "something moved"
        assert sorted(e.worker for e in back) == sorted(["worker 0", "worker 1", "evaluation worker"] * 2)
        assert all("between segments" in e.reason for e in back if e.restarts == 2)
        assert run.status().restarts == 6
        run.resume()
        await run.wait()
    assert_nothing_but_time(run.result, whole)


async def _first(events: Any, count: int, kind: type[Any]) -> Any:
    async for event in events:
        if isinstance(event, kind):
            yield event
            count -= 1
            if not count:
                return


async def test_the_evaluation_worker_in_an_evaluation(config: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(config(total_steps=10**7)) as run:
        await anext(e async for e in run.events() if isinstance(e, aiorl.Updated))
        await run.pause()
        undisturbed = await run.evaluate(episodes=400)
        evaluator = workers_of(run)._keepers[-1]
        begun = evaluator._worker.beats
        evaluation = asyncio.ensure_future(run.evaluate(episodes=400))
        await until(lambda: evaluator._worker.beats != begun)
        assert evaluator.pid is not None
        kill(evaluator.pid)
        disturbed = await evaluation
    assert (disturbed.mean_return, disturbed.std_return) == (undisturbed.mean_return, undisturbed.std_return)
    assert disturbed.version == undisturbed.version
    assert run.result.restarts == 1


async def test_the_fork_server(config: Make, no_leaks: None) -> None:
    """Its workers only seem to die with it. They must be gone before others write into their slots."""
    whole = await aiorl.train(config(total_steps=2000, workers=0))
    async with asyncio.timeout(60), aiorl.Run(config(env="run_envs:Jittery", total_steps=2000)) as run:
        await anext(e async for e in run.events() if isinstance(e, aiorl.Updated))
        kill(workers_of(run)._launcher._server._forkserver_pid)  # type: ignore[attr-defined]
        await run.wait()
    assert_nothing_but_time(run.result, whole)
    assert run.result.restarts == 3


# -- the end of patience -----------------------------------------------------------------------------------------------


def test_the_budget() -> None:
    budget = Budget()
    assert [budget.draw(t) for t in (0.0, 1.0, 2.0, 3.0, 59.9)] == [*BACK_OFF_S, None, None]
    assert budget.draw(RESTART_WINDOW_S) == BACK_OFF_S[-1], "the first restart is no longer in the window"
    assert budget.draw(RESTART_WINDOW_S) is None
    assert [budget.draw(1000.0 * t) for t in range(1, 10)] == [BACK_OFF_S[0]] * 9
    assert len(BACK_OFF_S) == RESTARTS_MAX


@pytest.mark.usefixtures("short_waits")
async def test_after_the_last_restart_the_run_fails_with_the_last_error(config: Make, no_leaks: None) -> None:
    deaths = [("kill", 12), ("exit", 12), ("kill", 0), ("raise", 12)]
    async with asyncio.timeout(60), aiorl.Run(config(deaths, workers=1)) as run:
        message = r"worker 0 failed .*, after 3 restarts in 60 s\n .*physics broke"
        with pytest.raises(aiorl.WorkerError, match=message) as caught:
            await run.wait()
    assert "in _go_wrong" in caught.value.detail
    result = run.result
    assert (result.status, result.error) == ("failed", str(caught.value))
    assert result.restarts == 2, "one of the three died before it was ready"
    assert result.ledger["produced"] == result.ledger["stored"] + result.ledger["dropped"]


async def test_a_restart_that_takes_too_long_counts_as_one(config: Make, no_leaks: None) -> None:
    deaths = [("kill", 12), ("hang", 4)]
    result, events = await watched(config(deaths, workers=1, start_timeout_s=1.5))
    assert result.status == "completed"
    assert [event.reason for event in events] == ["was not ready after 1.5 s"]


async def test_a_process_that_cannot_be_made_counts_too(
    config: Make, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await aiorl.train(config(total_steps=3000, workers=0))
    make, tries = Launcher.process, []

    def refuse_once(*args: Any) -> Any:
        tries.append(args)
        if len(tries) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        return make(*args)

    async with asyncio.timeout(60), aiorl.Run(config(total_steps=3000)) as run:
        events = run.events()
        monkeypatch.setattr(Launcher, "process", refuse_once)
        kill(workers_of(run).pids[0])
        result = await run.wait()
        (back,) = [e async for e in events if isinstance(e, aiorl.WorkerRestarted)]
    assert_nothing_but_time(result, whole)
    assert back.reason == "could not be started: [Errno 11] Resource temporarily unavailable"
    assert len(tries) == 2


async def test_a_fork_server_that_dies_in_a_launch_counts_too(
    config: Make, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await aiorl.train(config(total_steps=3000, workers=0))
    async with asyncio.timeout(60), aiorl.Run(config(env="run_envs:Jittery", total_steps=3000)) as run:
        events = run.events(10**6)
        kill_fork_server_in_a_launch(monkeypatch)
        kill(workers_of(run).pids[0])
        result = await run.wait()
        reasons = [e.reason async for e in events if isinstance(e, aiorl.WorkerRestarted)]
    assert_nothing_but_time(result, whole)
    assert "could not be started: the fork server died when it was to make a process" in reasons


async def test_a_fork_server_that_dies_during_the_start(
    config: Make, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_fork_server_in_a_launch(monkeypatch)
    message = r"^worker 0 could not be started: the fork server died .*\n.*ulimit -u.* pids .*"
    with pytest.raises(aiorl.WorkerError, match=message):
        await aiorl.train(config())


async def test_a_kill_during_the_start_fails_at_once(config: Make, no_leaks: None) -> None:
    changes = {"env": "run_envs:DelayedStart", "env_kwargs": {"pid": os.getpid()}}
    run = aiorl.Run(config(**changes))
    entering = asyncio.ensure_future(run.__aenter__())
    await until(lambda: run._session.parts is not None and workers_of(run).pids)
    kill(workers_of(run).pids[0])
    with pytest.raises(aiorl.WorkerError, match=r"worker 0 was ended by SIGKILL .*while starting$|while starting\n"):
        async with asyncio.timeout(20):
            await entering


# -- leaving in the middle of a restart --------------------------------------------------------------------------------

MOMENTS: dict[str, list[tuple[str, int]]] = {
    "making": [("kill", 12), ("hang", 0)],
    "replaying": [("kill", 12), ("hang", 4)],
    "back-off": [("kill", 12), ("kill", 12), ("kill", 12)],
    "hung": [("hang", 12)],
}


@pytest.mark.parametrize("way", ["leave", "cancel", "stop"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_leaving_in_the_middle_of_a_restart(config: Make, no_leaks: None, moment: str, way: str) -> None:
    loop, deaths = asyncio.get_running_loop(), MOMENTS[moment]
    setting = config(deaths, total_steps=10**6, workers=1, step_timeout_s=0.4 if moment == "hung" else 30.0)
    marks = Path(setting.env_kwargs["marks"])
    begun_s = 0.0

    async def host() -> None:
        nonlocal begun_s
        async with aiorl.Run(setting) as run:
            await until(lambda: len(list(marks.iterdir())) == len(deaths))
            if moment in ("back-off", "hung"):
                times = run.status().restarts  # the worker may be back before anybody has looked
                await until(lambda: len(workers_of(run).pids) < 2 or run.status().restarts > times)
            begun_s = loop.time()
            if way == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            elif way == "stop":
                run.stop(final_evaluation=False)
            await asyncio.sleep(0)

    descriptors = _descriptors()
    task = asyncio.ensure_future(host())
    async with asyncio.timeout(60):
        await asyncio.wait([task])
    assert loop.time() - begun_s < 6.0, "leaving took far longer than the two seconds promised"  # room for a busy machine
    assert task.cancelled() == (way == "cancel")
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del task
    gc.collect()
    assert _descriptors() <= descriptors + 1, "a descriptor was left open"  # + resource tracker


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


# -- fewer workers -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("stepping", ["serial", "threads"])
async def test_a_worker_that_keeps_dying_is_given_up(config: Make, no_leaks: None, degree: int, stepping: str) -> None:
    """Its groups go on in another worker, where they were: all that changes is time."""
    changes: dict[str, Any] = {"env": "run_envs:Jittery", "total_steps": 3000, "off_policy_degree": degree}
    whole = await aiorl.train(config(**changes, workers=0))
    chosen = config(**changes, workers=3, min_workers=1, stepping=stepping)
    async with asyncio.timeout(60), aiorl.Run(chosen) as run:
        seen = run.events(10**6)
        victim = workers_of(run)._keepers[1]
        killing = asyncio.ensure_future(_kill_again_and_again(victim))
        result = await run.wait()
        killing.cancel()
        events = [event async for event in seen]
    assert_nothing_but_time(result, whole)
    (given_up,) = [e for e in events if isinstance(e, aiorl.WorkerGivenUp)]
    assert given_up.important
    assert (given_up.worker, given_up.workers) == ("worker 1", 2)
    assert re.search("SIGKILL", given_up.reason)
    assert given_up.heir == "worker 2", "worker 0 has two groups already"
    backs = [e for e in events if isinstance(e, aiorl.WorkerRestarted)]
    (taken_over,) = [e for e in backs if e.worker == given_up.heir]
    assert taken_over.reason == "took over the groups of worker 1"
    assert result.workers_given_up == 1
    assert result.restarts == len(backs)


async def _kill_again_and_again(keeper: Any) -> None:
    """Until it is given up."""
    while keeper.groups:
        if keeper.pid is not None and keeper.is_ready:
            kill(keeper.pid)
        await asyncio.sleep(0.01)


@pytest.mark.usefixtures("short_waits")
async def test_an_heir_may_be_given_up_too(config: Make, no_leaks: None) -> None:
    """All it had, also what it had taken over, goes to the next one; one more is too many."""
    changes: dict[str, Any] = {"env": "run_envs:Jittery", "total_steps": 10**7}
    async with asyncio.timeout(60), aiorl.Run(config(**changes, workers=3, min_workers=1)) as run:
        events = run.events(10**6)
        keepers = workers_of(run)._keepers
        for victim in keepers[:2]:
            await _kill_again_and_again(victim)
        assert sorted(keepers[2].groups) == [0, 1, 2, 3]
        stored = run.status().env_steps
        await until(lambda: run.status().env_steps > stored + 500)
        killing = asyncio.ensure_future(_kill_again_and_again(keepers[2]))
        with pytest.raises(aiorl.WorkerError, match=r"worker 2 was ended by SIGKILL .*after 3 restarts in 60 s"):
            await run.wait()
        killing.cancel()
    assert [e.heir async for e in events if isinstance(e, aiorl.WorkerGivenUp)] == ["worker 1", "worker 2"]
    result = run.result
    assert result.status == "failed"
    assert result.workers_given_up == 2
    assert result.ledger["produced"] == result.ledger["stored"] + result.ledger["dropped"]


@pytest.mark.usefixtures("short_waits")
async def test_the_evaluation_worker_is_never_given_up(config: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(config(total_steps=10**7, min_workers=1)) as run:
        killing = asyncio.ensure_future(until(lambda: _kill_if_there(workers_of(run)._keepers[-1])))
        with pytest.raises(aiorl.WorkerError, match=r"evaluation worker was ended .*after 3 restarts in 60 s"):
            await run.wait()
        killing.cancel()
    assert run.result.workers_given_up == 0


def _kill_if_there(keeper: Any) -> None:
    if keeper.pid is not None and keeper.is_ready:
        kill(keeper.pid)
