"""Whole runs with real worker processes and a tiny NumPy algorithm: exactness, accounting, failure, and the end."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from kills import kill, until
from torch_threads import threads_of_a_new_thread
from toys import Toy, ToyLearner

import aiorl
from aiorl import assembly
from aiorl.algos.base import LearnerContext
from aiorl.cli import main
from aiorl.envs.episodes import run_episodes
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import resolve_env
from aiorl.events import Paused, Resumed
from aiorl.filelock import state_of
from aiorl.learning import params_sha256
from aiorl.metrics.directory import LOCK
from aiorl.record import Record, RecordLine
from aiorl.session import Session
from aiorl.testing import errors
from aiorl.testing.examine_run import check_run
from aiorl.workers.inline import InlineWorkers
from aiorl.workers.memory import SharedBlock
from aiorl.workers.station import Station

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., aiorl.Config]:
    """A small run; each call has a directory of its own."""
    count = iter(range(1000))

    def make(**changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": "run_envs:Counting",
            "algo": Toy(),
            "total_steps": 2000,
            "envs": 8,
            "group_size": 2,
            "workers": 2,
            "off_policy_degree": 0,
            "eval_every": 0,
            "eval_episodes": 4,
            "checkpoint_every": 0,
            "out": str(tmp_path / str(next(count))),
        }
        return aiorl.Config(**{**fields, **changes})

    return make


Make = Callable[..., aiorl.Config]


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 3])
async def test_workers_delays_and_evaluation_do_not_change_the_result(config: Make, degree: int) -> None:
    hashes: dict[str, str] = {}
    for label, changes in {
        "inline": {"workers": 0},
        "one worker": {"workers": 1},
        "two workers": {"workers": 2},
        "four workers, uneven": {"workers": 4, "env": "run_envs:Jittery"},
        "evaluated": {"workers": 2, "eval_every": 200, "checkpoint_every": 300},
    }.items():
        result = await aiorl.train(config(off_policy_degree=degree, total_steps=1200, **changes))
        assert result.status == "completed"
        assert result.staleness["max"] == degree
        assert result.ledger == {"produced": 1216, "stored": 1216, "dropped": 0, "in_flight": 0}
        hashes[label] = result.params_sha256
    assert len(set(hashes.values())) == 1, hashes


async def test_degrees_differ(config: Make) -> None:
    """The hash is seen to be able to differ, else the equalities above prove nothing."""
    results = [await aiorl.train(config(off_policy_degree=d, workers=0)) for d in (0, 1)]
    assert results[0].params_sha256 != results[1].params_sha256


async def test_eager_keeps_its_bound_and_its_books(config: Make) -> None:
    result = await aiorl.train(config(schedule="eager", off_policy_degree=2, env="run_envs:Jittery", workers=4))
    assert result.staleness["max"] <= 2
    assert result.ledger["produced"] == result.ledger["stored"] == result.env_steps
    assert result.dropped == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"off_policy_degree": 2},
        {"env": "CartPole-v1"},
        {"env": "CartPole-v1", "native_vector": False, "off_policy_degree": 1},
        {"workers": 0},
    ],
    ids=["degree 0", "degree 2", "native vector", "single environments", "inline"],
)
async def test_stop_and_resume_equals_one_go(config: Make, changes: dict[str, Any]) -> None:
    whole = await aiorl.train(config(**changes))
    halves = config(**changes)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 10:
                run.stop(final_evaluation=False)
    assert run.result.status == "stopped"
    assert 10 <= run.result.updates < whole.updates
    second = await aiorl.train(halves, resume=run.directory)
    assert second.updates == whole.updates
    assert second.params_sha256 == whole.params_sha256
    assert (second.env_steps, second.episodes) == (whole.env_steps, whole.episodes)
    assert second.gradient_steps == whole.gradient_steps
    lines = [json.loads(line) for line in (run.directory / "schedule.jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == list(range(whole.updates)), "the record of a resumed run has a gap"


@pytest.mark.parametrize("by", ["library", "command line"])
def test_a_run_that_somebody_else_went_on_with_meanwhile_is_not_resumed(
    config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    """Another process takes, resumes and leaves the run between our reading of its checkpoint and our taking it."""
    settings = config(total_steps=640, workers=0)
    directory = Path(asyncio.run(aiorl.train(settings)).directory)
    words, hold = ["resume", str(directory), "--progress", "none", "--steps"], assembly.hold

    def hold_later(path: Path) -> Any:
        environ = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        subprocess.run([sys.executable, "-m", "aiorl", *words, "1280"], check=True, env=environ, capture_output=True)
        return hold(path)

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "hold", hold_later)
        if by == "library":
            with pytest.raises(aiorl.CheckpointError, match="has gone on from 00000010 to 00000020") as caught:
                asyncio.run(aiorl.train(settings.replace(total_steps=1280), resume=directory))
            text = str(caught.value)
        else:
            assert main([*words, "1920"]) == 2
            text = capsys.readouterr().err
    assert "has gone on from 00000010 to 00000020" in text
    assert "run it again" in text
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["00000010", "00000020"]
    assert state_of(directory / LOCK) == "free"
    assert main([*words, "1920"]) == 0


async def test_a_resumed_run_that_goes_on_is_not_judged_by_the_summary_of_the_session_before(config: Make) -> None:
    settings = config(total_steps=640, workers=0)
    summary = Path((await aiorl.train(settings)).directory) / "summary.json"
    async with aiorl.Run(settings.replace(total_steps=2000), resume=summary.parent) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated):
                break
        await run.checkpoint()  # its events are on disk by then
        assert errors(check_run(summary.parent)) == []
        assert not summary.exists()
        await run.wait()
    assert json.loads(summary.read_text())["env_steps"] == 2048


# -- what a run tells --------------------------------------------------------------------------------------------------


async def test_events_status_and_files(config: Make) -> None:
    async with aiorl.Run(config(eval_every=500, checkpoint_every=700, off_policy_degree=1)) as run:
        events = [event async for event in run]
        status = run.status()
    names = [type(event).__name__ for event in events]
    assert names[0] == "Started"
    assert names[-1] == "Finished"
    assert names.count("Updated") + sum(e.dropped for e in events if isinstance(e, aiorl.Lagged)) >= run.result.updates
    result = run.result
    assert (status.state, status.version, status.env_steps) == ("completed", result.updates, result.env_steps)
    assert result.final_evaluation is not None
    assert result.final_evaluation.version == result.updates
    assert result.best is not None
    assert {"config.toml", "events.jsonl", "metrics.csv", "schedule.jsonl", "summary.json", "curve.svg"} <= {
        path.name for path in run.directory.iterdir()
    }
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary == result.to_dict()
    assert aiorl.Config.from_toml(run.directory / "config.toml").to_dict() == run.config.replace(
        out=str(run.directory)
    ).to_dict()
    stored = [json.loads(line)["event"] for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert stored.count("updated") == result.updates
    assert stored[-1] == "finished"


async def test_best_is_the_snapshot_that_was_evaluated(config: Make) -> None:
    async with aiorl.Run(config(env="CartPole-v1", eval_every=300, off_policy_degree=2)) as run:
        await run.wait()
    best = aiorl.load(run.directory, which="best", algo=Toy)
    record = run.result.best
    assert record is not None
    assert best.version == record.version
    spec = resolve_env("CartPole-v1", in_process=True)
    policy = Toy().policy(best.spaces)
    policy.begin(best.weights, 0, None, 0)
    returns, _ = run_episodes(spec, best.spaces, policy, record.episodes, run.config.seed, record.episodes)
    assert (returns.mean(), returns.std()) == (record.mean_return, record.std_return), "best/ holds other weights"
    final = aiorl.load(run.directory, which="final", algo=Toy)
    assert final.version == run.result.updates
    assert params_sha256(final.weights) == run.result.params_sha256
    assert final([0.0, 0.0, 0.0, 0.0]) in (0, 1)


async def test_evaluation_is_the_same_inline_in_the_background_and_on_demand(config: Make) -> None:
    results = [
        await aiorl.train(config(env="CartPole-v1", workers=workers, eval_every=every, eval_episodes=6))
        for workers, every in ((0, 0), (2, 0), (2, 64))
    ]
    finals = [result.final_evaluation for result in results]
    assert len({(f.version, f.mean_return, f.std_return) for f in finals if f}) == 1
    assert len({result.params_sha256 for result in results}) == 1


async def test_stop_at_completes_the_run(config: Make) -> None:
    result = await aiorl.train(config(eval_every=64, stop_at=-1.0, total_steps=100_000))
    assert result.status == "completed"
    assert result.env_steps < 100_000
    assert result.first_evaluation_at_stop_return is not None


@pytest.mark.parametrize("moment", ["before", "while its environment is tried", "while workers start"])
async def test_a_stop_before_training_begins(
    config: Make, no_leaks: None, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = aiorl.Run(config(total_steps=10**7, env="CartPole-v1"))
    assemble = assembly.assemble

    async def assembled(*args: Any) -> assembly.Assembly:
        if moment == "while its environment is tried":
            run.stop()
        made = await assemble(*args)
        if moment == "while workers start":
            asyncio.get_running_loop().call_soon(run.stop)
        return made

    monkeypatch.setattr("aiorl.session.assemble", assembled)
    if moment == "before":
        run.stop()
    async with asyncio.timeout(30), run:
        result = await run.wait()
    assert (result.status, result.env_steps) == ("stopped", 0)


async def test_what_a_run_that_is_starting_cannot_do_yet(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    start = InlineWorkers.start

    async def started(workers: InlineWorkers) -> None:
        for call in (run.checkpoint, run.evaluate, run.pause, functools.partial(run.set, learning_rate=0.1)):
            with pytest.raises(RuntimeError, match="is not going on") as error:
                await call()
            refused.append(str(error.value))
        await start(workers)

    monkeypatch.setattr(InlineWorkers, "start", started)
    run = aiorl.Run(config(env="CartPole-v1", workers=0))
    async with run:
        await run.wait()
    assert len(refused) == 4


async def test_pause_returns_when_nothing_moves(config: Make) -> None:
    async with aiorl.Run(config(total_steps=10**7, off_policy_degree=2, env="CartPole-v1")) as run:
        watcher = run.events()
        for _ in range(3):
            await run.pause()
            before = run.status()
            assert before.state == "paused"
            await asyncio.sleep(0.05)  # time in which anything still moving would show
            assert run.status().ledger == before.ledger
            assert run.status().version == before.version
            run.resume()
            async for event in watcher:
                if isinstance(event, aiorl.Updated) and event.version > before.version:
                    break
        run.stop(final_evaluation=False)
        events = [event async for event in run]
    assert sum(isinstance(e, Paused) for e in events) == sum(isinstance(e, Resumed) for e in events) == 3


async def test_set_checkpoint_evaluate_and_policy_while_running(config: Make) -> None:
    async with aiorl.Run(config(total_steps=10**7, env="CartPole-v1", off_policy_degree=1)) as run:
        await run.set(learning_rate=0.5)
        with pytest.raises(aiorl.ConfigError, match="momentum"):
            await run.set(momentum=0.5)
        with pytest.raises(aiorl.ConfigError, match="nothing to change"):
            await run.set()
        for number in (np.float64(0.25), np.float32(0.5), np.array(0.5), Fraction(1, 4), Decimal("0.5"), np.int64(1)):
            await run.set(learning_rate=number)
        for name, what in itertools.product(("learning_rate", "off_policy_degree"), ("0.1", None, [0.1])):
            with pytest.raises(aiorl.ConfigError, match=rf"cannot set {name} = .*: expected a number"):
                await run.set(**{name: what})
        for degree in (0.5, math.nan):
            with pytest.raises(aiorl.ConfigError, match="expected a whole number"):
                await run.set(off_policy_degree=degree)
        with pytest.raises(aiorl.ConfigError, match=r"off_policy_degree = -5: this run can change it to 0 to 1, or to -1"):
            await run.set(off_policy_degree=-5, learning_rate=0.125)
        with pytest.raises(aiorl.ConfigError, match="momentum"):
            await run.set(off_policy_degree=0, momentum=0.5)
        assert run.status().off_policy_degree == 1, "all of it comes into force, or nothing"
        for episodes in (0, 2.5, 20.0, np.float32(3), "3"):
            with pytest.raises(aiorl.ConfigError, match="expected a whole number, 1 to 100000"):
                await run.evaluate(episodes=episodes)  # pyright: ignore[reportArgumentType]
        assert (await run.evaluate(episodes=np.int64(2))).episodes == 2  # pyright: ignore[reportArgumentType]
        path = await run.checkpoint()
        evaluated = await run.evaluate(episodes=3)
        policy = run.policy()
    assert evaluated.episodes == 3
    assert policy([0.0, 0.0, 0.0, 0.0]) in (0, 1)
    loaded = aiorl.load(path, algo=Toy)
    assert loaded.version <= run.result.updates
    assert run.result.status == "stopped"


async def test_two_runs_side_by_side_do_not_touch_each_other(config: Make) -> None:
    alone = await aiorl.train(config())
    together = await asyncio.gather(*(aiorl.train(config(seed=seed)) for seed in (0, 1)))
    assert together[0].params_sha256 == alone.params_sha256
    assert together[1].params_sha256 != alone.params_sha256


# -- failure -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "ZeroDivisionError: the physics broke"),
        ("unpicklable", "local trouble 1 2"),
        ("exit", "exited with code 3"),
        ("kill", "SIGKILL"),
    ],
)
async def test_a_broken_worker_ends_the_run_with_one_clear_error(
    config: Make, no_leaks: None, fault: str, message: str
) -> None:
    async with aiorl.Run(config(env="run_envs:Faulty", env_kwargs={"fault": fault}, off_policy_degree=1)) as run:
        with pytest.raises(aiorl.WorkerError, match=message) as caught:
            async with asyncio.timeout(20):
                await run.wait()
    assert "worker" in str(caught.value)
    assert "after 3 restarts in 60 s" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    if fault == "raise":
        assert "in _go_wrong" in caught.value.detail, "the worker's traceback was lost"
    result = run.result
    assert result.status == "failed"
    assert 3 <= result.restarts <= 6, "of each of two workers up to three"
    assert result.ledger["produced"] == result.ledger["stored"] + result.ledger["dropped"]
    assert result.ledger["in_flight"] == 0
    assert message in (run.directory / "summary.json").read_text()


@pytest.mark.usefixtures("short_waits")
async def test_a_hung_worker_is_noticed_at_its_deadline(config: Make, no_leaks: None) -> None:
    changed = config(env="run_envs:Faulty", env_kwargs={"fault": "hang"}, step_timeout_s=0.4, eval_every=0)
    async with aiorl.Run(changed) as run:
        pattern = r"(?s)has not finished a step for .* in rollout.*after 3 restarts.* step_timeout_s = 0\.4"
        with pytest.raises(aiorl.WorkerError, match=pattern):
            async with asyncio.timeout(20):
                await run.wait()


@pytest.mark.parametrize(
    ("env", "timeout_s", "message"),
    [("BadStart", 15.0, "no licence file"), ("DelayedStart", 1.0, "not ready after 1 s: worker 0, worker 1")],
)
async def test_a_worker_that_never_becomes_ready(
    config: Make, no_leaks: None, env: str, timeout_s: float, message: str
) -> None:
    changed = config(env=f"run_envs:{env}", env_kwargs={"pid": os.getpid()}, start_timeout_s=timeout_s)
    with pytest.raises(aiorl.WorkerError, match=message):
        async with asyncio.timeout(20), aiorl.Run(changed):
            pytest.fail("the run should not have started")


async def test_a_failing_learner_ends_the_run(config: Make, no_leaks: None) -> None:
    async with aiorl.Run(config(algo=Toy(fail_at=5), off_policy_degree=1)) as run:
        events = [event async for event in run]
    assert isinstance(events[-1], aiorl.Finished)
    assert (events[-1].status, events[-1].error) == ("failed", "RuntimeError: planned failure")
    with pytest.raises(aiorl.TrainingError, match="planned failure"):
        await run.wait()
    assert run.result.updates == 5
    assert "planned failure" in (run.directory / "error.txt").read_text()


@pytest.mark.parametrize("call", ["pause", "evaluate", "checkpoint"])
async def test_a_call_that_waits_ends_with_the_run(config: Make, no_leaks: None, call: str) -> None:
    """The worker hangs, so that the call must wait, and is killed until the run gives it up."""
    changes = {"env": "run_envs:Faulty", "env_kwargs": {"fault": "hang", "at": 30}, "workers": 1, "eval_every": 0}
    async with aiorl.Run(config(**changes)) as run:
        await first_update(run)
        workers = run._session.parts.workers  # type: ignore[union-attr]
        # A pause waits for an evaluation; a worker that is started again meanwhile stands at once.
        others = [asyncio.ensure_future(run.evaluate(2000))] if call == "pause" else []
        task = asyncio.ensure_future(getattr(run, call)(*([2000] if call == "evaluate" else [])))
        if call == "checkpoint":
            await task  # needs no worker
        else:
            async with asyncio.timeout(30):
                async for event in run.events():
                    if isinstance(event, aiorl.Started | aiorl.WorkerRestarted):
                        for pid in workers.pids:  # type: ignore[attr-defined]
                            kill(pid)
                for waiting in (task, *others):
                    with pytest.raises(aiorl.WorkerError, match="SIGKILL"):
                        await waiting


async def test_calls_after_the_end_say_so(config: Make) -> None:
    async with aiorl.Run(config()) as run:
        await run.wait()
    for call in (run.pause, run.checkpoint, run.evaluate):
        with pytest.raises(RuntimeError, match="not going on"):
            await call()
    run.stop()
    assert run.policy()([0.0, 0.0]) in (0, 1)
    assert run.status().state == "completed"


# -- the end -----------------------------------------------------------------------------------------------------------


async def first_update(run: aiorl.Run) -> None:
    async for event in run:
        if isinstance(event, aiorl.Updated):
            return


@pytest.mark.parametrize("way", ["leave", "raise", "cancel", "stop"])
@pytest.mark.parametrize("workers", [0, 2])
async def test_every_way_out_ends_everything(config: Make, no_leaks: None, way: str, workers: int) -> None:
    loop = asyncio.get_running_loop()
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    async def host() -> None:
        async with aiorl.Run(config(total_steps=10**7, workers=workers, off_policy_degree=1)) as run:
            await first_update(run)
            nonlocal begun
            begun = loop.time()
            if way == "raise":
                raise KeyError("the host's own trouble")
            if way == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.Event().wait()
            if way == "stop":
                run.stop()
                await run.wait()

    begun = 0.0
    task = asyncio.ensure_future(host())
    await asyncio.wait([task])
    took_s = loop.time() - begun
    assert took_s < 2.0 * 3, "leaving took far longer than the two seconds promised"  # 3: room for a busy machine
    assert task.cancelled() == (way == "cancel")
    if not task.cancelled():
        assert isinstance(task.exception(), KeyError) == (way == "raise")
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del task
    gc.collect()
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1, "a descriptor was left open"  # + resource tracker


async def test_a_cancel_while_everything_is_being_cut_off_is_not_lost(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[aiorl.Run.__module__], "LEAVE_GRACE_S", 0.0)
    closing, go_on, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    close = Session._close

    async def slow_close(self: Session, status: str) -> None:
        closing.set()
        await go_on.wait()
        await close(self, status)

    monkeypatch.setattr(Session, "_close", slow_close)
    run = aiorl.Run(config(total_steps=10**7, workers=0))

    async def host() -> None:
        async with run:
            await first_update(run)
        left.set()

    task = asyncio.create_task(host())
    await closing.wait()
    task.cancel()
    await asyncio.sleep(0)  # it arrives while the run is ending
    go_on.set()
    await asyncio.wait([task])
    assert (task.cancelled(), left.is_set()) == (True, False)
    assert run.result.status == "stopped", "and everything is ended by then"


async def test_a_start_that_was_cancelled_has_no_result(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def assembling(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(sys.modules[Session.__module__], "assemble", assembling)
    run = aiorl.Run(config())
    entering = asyncio.create_task(run.__aenter__())
    await begun.wait()
    entering.cancel()
    await asyncio.wait([entering])
    assert entering.cancelled()
    with pytest.raises(RuntimeError, match="cancelled before it began"):
        await run.wait()


@pytest.mark.parametrize("end", ["fail", "leave"])
@pytest.mark.parametrize("workers", [0, 2])
async def test_every_step_that_was_made_is_counted(config: Make, tmp_path: Path, workers: int, end: str) -> None:
    """Also those of segments that are being collected at the end, or that were finished just then."""
    for tries in range(3):
        path = tmp_path / f"steps-{tries}"
        changes: dict[str, Any] = {"total_steps": 10**7, "group_size": 1, "off_policy_degree": 4, "env": "run_envs:Noted"}
        noted = config(**changes, env_kwargs={"path": str(path)}, workers=workers, algo=Toy(fail_at=20 + tries))
        async with aiorl.Run(noted) as run:
            if end == "leave":
                await first_update(run)
            else:
                with pytest.raises(aiorl.TrainingError):
                    await run.wait()
        assert run.result.ledger["produced"] == path.stat().st_size
        assert run.result.ledger["in_flight"] == 0


async def test_a_stuck_disk_does_not_hold_the_host(config: Make) -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    async with aiorl.Run(config(total_steps=10**7)) as run:
        await first_update(run)
        made = run._session.made
        assert made is not None
        stuck = asyncio.ensure_future(made.files_thread.run(release.wait))  # every later write waits behind this one
        await asyncio.sleep(0)
        begun = loop.time()
    took_s = loop.time() - begun
    release.set()
    await stuck
    assert took_s < 10, "leaving waited for the disk"
    assert run.result.status == "stopped"


PARENT = """
import asyncio, os, sys
sys.path[:0] = sys.argv[3:]
import aiorl
from toys import Toy
async def main():
    config = aiorl.Config(env=sys.argv[2], algo=Toy(), total_steps=10**8, envs=8, group_size=2, workers=2,
                          eval_every=0, out=sys.argv[1])
    async with aiorl.Run(config) as run:
        print("PIDS", *run._session.parts.workers.pids, flush=True)
        await run.wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("env", ["run_envs:Counting", "run_envs:WithHelper"])
def test_workers_end_with_a_killed_parent_and_an_unguarded_program_works(tmp_path: Path, env: str) -> None:
    """The program above has no `if __name__` guard: workers must not import it."""
    program = tmp_path / "program.py"
    program.write_text(PARENT)
    command = [sys.executable, str(program), str(tmp_path / "run"), env, str(HERE), str(HERE.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        assert words[:1] == ["PIDS"], f"the program did not start: {words}"
        pids = [int(word) for word in words[1:]]
        assert len(pids) == 3
        parent.send_signal(signal.SIGKILL)
    for pid in pids:
        _wait_until_gone(pid)


def _wait_until_gone(pid: int) -> None:
    """Wait on the kernel's own word; a process that stays fails the test by its limit."""
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return
    try:
        import select

        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, f"worker {pid} outlived its parent"
    finally:
        os.close(fd)


class Clinging(Toy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its learner cannot be closed."""

    name: ClassVar[str] = "clinging"

    def learner(self, spaces: Spaces, context: LearnerContext) -> ToyLearner:
        return ClingingLearner(self, spaces, context)


class ClingingLearner(ToyLearner):
    def close(self) -> None:
        raise OSError("it is in use")


async def test_a_learner_that_cannot_be_closed_takes_nothing_with_it(config: Make, no_leaks: None) -> None:
    told: list[aiorl.Event] = []
    async with asyncio.timeout(60), aiorl.Run(config(algo=Clinging(), workers=1)) as run:
        async for event in run:
            told.append(event)
        result = await run.wait()
    warned = [event.message for event in told if isinstance(event, aiorl.Warned)]
    assert any("could not be closed: OSError('it is in use')" in message for message in warned)
    assert isinstance(told[-1], aiorl.Finished)
    assert (result.status, told[-1].status) == ("completed", "completed")
    assert (run.directory / "summary.json").exists()


async def test_a_start_that_fails_late_leaves_nothing(
    config: Make, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """When all is wired and only the directory cannot be written."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(assembly, "_begin_directory", full)
    for changes in ({}, {"workers": 0}, {"algo": aiorl.PPO(hidden=(8,)), "inference": "central"}):
        with pytest.raises(aiorl.TrainingError, match="no space left"):
            await aiorl.train(config(**changes))


@pytest.mark.parametrize("why", ["its checkpoint lacks weights", "its record does not fit", "there is no memory"])
async def test_a_start_that_is_refused_leaves_nothing(
    config: Make, monkeypatch: pytest.MonkeyPatch, no_leaks: None, why: str
) -> None:
    if why == "its checkpoint lacks weights":
        first = config(workers=0, total_steps=400, checkpoint_every=100)
        await aiorl.train(first)
        with pytest.raises(aiorl.CheckpointError, match="lacks the weights of versions"):
            await aiorl.train(first.replace(off_policy_degree=2, total_steps=800), resume=first.out)
    elif why == "its record does not fit":
        record = Record((RecordLine(k=0, b_k=0, order=(0,)),))
        with pytest.raises(aiorl.AiorlError, match="record"):
            async with aiorl.Run(config(), record=record):
                pass
    else:
        blocks = itertools.count()

        def scarce(nbytes: int) -> SharedBlock:
            if next(blocks) == 2:
                raise aiorl.ConfigError("no memory")
            return SharedBlock(nbytes)

        monkeypatch.setattr("aiorl.workers.pool.SharedBlock", scarce)
        with pytest.raises(aiorl.ConfigError, match="no memory"):
            await aiorl.train(config())


class Counted(Toy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Writes a line into a file for each learner that is closed."""

    name: ClassVar[str] = "counted"
    file: str = ""

    def learner(self, spaces: Spaces, context: LearnerContext) -> ToyLearner:
        return CountedLearner(self, spaces, context)


class CountedLearner(ToyLearner):
    def close(self) -> None:
        with open(self._config.file, "a") as file:  # type: ignore[attr-defined]
            file.write("closed\n")


@pytest.mark.parametrize(
    "making",
    ["aiorl.preflight.check", "aiorl.assembly.hold", "aiorl.assembly.Trainer", "aiorl.assembly.WeightStore"],
)
async def test_a_start_that_is_cancelled_leaves_nothing(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_leaks: None, making: str
) -> None:
    """Cancelled while a thread makes something that nobody will take over."""
    monkeypatch.chdir(tmp_path)
    module, _, name = making.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(making, slow)
    closed = tmp_path / "closed"
    training = asyncio.ensure_future(aiorl.train(config(out=None, algo=Counted(file=str(closed)), workers=0)))
    await begun.wait()
    training.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait([training])
    assert training.cancelled()
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("aiorl")])
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {"closed"} == {"runs"}
    made_learner = making in ("aiorl.assembly.Trainer", "aiorl.assembly.WeightStore")
    assert closed.exists() == made_learner


class Unmade(Toy, frozen=True):
    """Its learner cannot be made, and may have written something by then."""

    writes: str = ""

    def learner(self, spaces: Spaces, context: LearnerContext) -> ToyLearner:
        if self.writes:
            assert context.directory is not None
            (context.directory / self.writes).write_text("something")
        raise aiorl.ConfigError("no room")


@pytest.mark.parametrize(
    ("out", "writes", "left"),
    [
        (None, "", set[str]()),
        (None, "rows", {"runs/run_envs.Counting-toy-0", "runs/run_envs.Counting-toy-0/rows"}),
        ("given", "", set[str]()),
    ],
)
async def test_a_start_that_fails_leaves_no_directory_that_it_chose(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str | None, writes: str, left: set[str]
) -> None:
    """Unless there is something in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    with pytest.raises(aiorl.ConfigError, match="no room"):
        await aiorl.train(config(out=out, algo=Unmade(writes=writes), workers=0))
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert there - {"runs"} == left | {"given"}


async def test_the_host_is_left_as_it_was(config: Make) -> None:
    import random

    import numpy as np
    import torch

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    await aiorl.train(config())
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert dict(os.environ) == environment
    assert torch.get_num_threads() == threads
    assert states == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())


async def test_runs_that_overlap_have_torch_threads_of_their_own(
    config: Make, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """The host's stay as they are, in whichever order the runs end. What acts with torch here acts as the run is set."""
    import torch

    opened: list[int] = []
    real = Station.open

    def opening(station: Station) -> None:
        opened.append(torch.get_num_threads())
        real(station)

    monkeypatch.setattr(Station, "open", opening)
    host = torch.get_num_threads(), threads_of_a_new_thread()
    runs = [aiorl.Run(config(workers=0, total_steps=10**7, torch_threads=host[1] + more)) for more in (1, 2)]
    for run in runs:
        await run.__aenter__()
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == host
    for run in runs:
        await run.__aexit__(None, None, None)
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == host
    assert opened == [host[1] + 1, host[1] + 2]


ENDLESS_UPDATES = {
    "ppo": aiorl.PPO(hidden=(8,), epochs=10**9),
    "dqn": aiorl.DQN(hidden=(8,), batch_size=4, warmup=8, update_ratio=1e9),
}


@pytest.mark.parametrize("algo", ENDLESS_UPDATES)
@pytest.mark.parametrize("workers", [0, 1])
async def test_leaving_in_the_middle_of_an_update_that_takes_for_ever(
    tmp_path: Path, no_leaks: None, algo: str, workers: int
) -> None:
    """The learner gives it up: its thread ends, so that nothing computes while the process goes down."""
    config = aiorl.Config(
        env="CartPole-v1", algo=ENDLESS_UPDATES[algo], total_steps=10**6, envs=2, segment_length=8, workers=workers,
        eval_every=0, out=str(tmp_path),
    )  # fmt: skip

    async def host() -> None:
        async with aiorl.Run(config) as run:
            parts = run._session.parts
            assert parts is not None
            async for _ in run.events():
                if parts.updating:
                    raise KeyError("the host's own trouble")

    async with asyncio.timeout(60):
        with pytest.raises(KeyError):
            await host()
