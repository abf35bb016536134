"""Pausing in the middle of segments and updates: nothing moves, nothing is lost, and the result is that of one go."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from kills import kill, until, workers_of
from toys import Toy, ToyLearner

import aiorl
from aiorl.algos.base import LearnerContext
from aiorl.envs.spaces import Spaces
from aiorl.offload import Brake
from aiorl.segments import Rollout
from aiorl.testing import FaultPlan, Pace, Sim, simulate
from aiorl.workers.control import Counter
from aiorl.workers.hold import Hold, Rest
from aiorl.workers.records import Kind, Record
from tests.sims import Folder

Make = Callable[..., aiorl.Config]
BUSY = aiorl.PPO(epochs=2, minibatches=4, normalise_obs=True, hidden=(16, 16))


@pytest.fixture
def config(tmp_path: Path) -> Make:
    count = iter(range(1000))

    def make(**changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": "CartPole-v1", "algo": BUSY, "seed": 3, "envs": 8, "group_size": 2, "workers": 2, "segment_length": 64,
            "total_steps": 6 * 8 * 64, "off_policy_degree": 1, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0,
            "native_vector": False, "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


# -- a learner that can be held in the middle of an update -------------------------------------------------------------


class Gradual(Toy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes the update of `Toy` in four gradient steps. In update `at` all but the first wait until they are let go."""

    name: ClassVar[str] = "gradual"
    in_step: ClassVar[threading.Event]
    let_go: ClassVar[threading.Event]
    at: int = 2

    def learner(self, spaces: Spaces, context: LearnerContext) -> ToyLearner:
        return GradualLearner(self, spaces, context)


class GradualLearner(ToyLearner):
    def __init__(self, config: Gradual, spaces: Spaces, context: LearnerContext) -> None:
        super().__init__(config, spaces, context)
        self._at, self._context = config.at, context

    def update(self, rollout: Rollout) -> dict[str, float]:
        for step in range(4):
            self._context.go_on()
            if rollout.index == self._at and step > 0:
                Gradual.in_step.set()
                assert Gradual.let_go.wait(60)
            metrics = super().update(rollout)
        return metrics


@pytest.fixture
def gradual(config: Make) -> Make:
    Gradual.in_step, Gradual.let_go = threading.Event(), threading.Event()
    fields: dict[str, Any] = {"algo": Gradual(), "env": "run_envs:Counting", "segment_length": 8, "total_steps": 6 * 64}
    return lambda **changes: config(**{**fields, **changes})


async def uninterrupted(config: aiorl.Config) -> aiorl.Result:
    Gradual.let_go.set()
    result = await aiorl.train(config)
    Gradual.in_step.clear()
    Gradual.let_go.clear()
    return result


async def pause_in_update(run: aiorl.Run) -> tuple[np.ndarray[Any, Any], int]:
    """Pause between the second and the third gradient step of the update; the parameters and how many steps made them."""
    await until(Gradual.in_step.is_set)
    pause = asyncio.ensure_future(run.pause())
    await until(lambda: parts_of(run).learner_thread.brake.held)
    assert not pause.done(), "a gradient step goes on"
    Gradual.let_go.set()
    await pause
    learner = parts_of(run).trainer.learner
    assert isinstance(learner, GradualLearner)
    return learner._w.copy(), learner.updates


def parts_of(run: aiorl.Run) -> Any:
    assert run._session.parts is not None
    return run._session.parts


async def test_an_update_stands_between_two_gradient_steps(gradual: Make, no_leaks: None) -> None:
    whole = await uninterrupted(gradual(workers=0))
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        weights, steps = await pause_in_update(run)
        assert steps == 2 * 4 + 2
        before = run.status()
        assert (before.state, before.version) == ("paused", 2)
        policy = run.policy()
        evaluated = await run.evaluate(1)
        learner = parts_of(run).trainer.learner
        assert learner.updates == steps
        assert learner._w.tobytes() == weights.tobytes(), "the learner moves in a paused run"
        assert run.status().ledger == before.ledger
        assert (evaluated.version, policy.version) == (2, 2)
        run.resume()
        result = await run.wait()
    assert result.params_sha256 == whole.params_sha256
    assert (result.updates, result.dropped, result.ledger) == (6, {}, whole.ledger)


async def test_a_checkpoint_is_of_the_finished_update(gradual: Make, no_leaks: None) -> None:
    whole = await uninterrupted(gradual(workers=0))
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        await pause_in_update(run)
        path = await run.checkpoint()
        at_rest = run.status()
        assert (at_rest.state, at_rest.version, path.name) == ("paused", 3, "00000003")
        assert await run.checkpoint() == path
        run.resume()
        result = await run.wait()
    assert result.params_sha256 == whole.params_sha256
    resumed = await aiorl.train(gradual(out=run.config.out, workers=0), resume=path)
    assert resumed.params_sha256 == whole.params_sha256


async def test_settings_change_after_the_update(gradual: Make, no_leaks: None) -> None:
    async def change(held: bool) -> aiorl.Result:
        Gradual.in_step.clear()
        Gradual.let_go.clear()
        async with asyncio.timeout(60), aiorl.Run(gradual(off_policy_degree=0, workers=1)) as run:
            if held:
                await pause_in_update(run)
            else:
                await until(Gradual.in_step.is_set)
                changing = asyncio.ensure_future(run.set(learning_rate=0.7))
                await asyncio.sleep(0)
                Gradual.let_go.set()
                await changing
            if held:
                await run.set(learning_rate=0.7)
                run.resume()
            return await run.wait()

    assert (await change(True)).params_sha256 == (await change(False)).params_sha256


async def test_stopping_a_held_update_finishes_it(gradual: Make, no_leaks: None) -> None:
    whole = await uninterrupted(gradual(workers=0))
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        await pause_in_update(run)
        run.stop()
        result = await run.wait()
    assert (result.status, result.updates) == ("stopped", 3)
    assert result.ledger["produced"] == result.ledger["stored"] + result.ledger["dropped"]
    assert set(result.dropped) <= {"stopped"}
    resumed = await aiorl.train(gradual(out=run.config.out, workers=0), resume=result.directory)
    assert resumed.params_sha256 == whole.params_sha256


async def asked(run: aiorl.Run, what: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that waits for the end of the update."""
    task = asyncio.create_task(what)
    await until(lambda: parts_of(run).waiting_for_gap > 0)
    return task


@pytest.mark.parametrize("held", [False, True])
async def test_a_pause_does_not_keep_a_checkpoint_waiting(gradual: Make, no_leaks: None, held: bool) -> None:
    """Neither one that was asked for before it, nor one in a pause, when somebody pauses again."""
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        if held:
            await pause_in_update(run)
            Gradual.let_go.clear()
        else:
            await until(Gradual.in_step.is_set)
        saving = await asked(run, run.checkpoint())
        pausing = asyncio.create_task(run.pause())
        await asyncio.sleep(0)
        Gradual.let_go.set()
        assert (await saving).name == "00000003"
        await pausing
        assert (run.status().state, run.status().version) == ("paused", 3)


async def test_a_run_that_is_ending_is_not_paused(gradual: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        await until(Gradual.in_step.is_set)
        run.stop()
        with pytest.raises(RuntimeError, match="is ending"):
            await run.pause()
        Gradual.let_go.set()
        result = await run.wait()
    assert (result.status, result.updates) == ("stopped", 3)


async def test_a_pause_that_a_stop_overtakes(gradual: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        await until(Gradual.in_step.is_set)
        pausing = asyncio.create_task(run.pause())
        await until(lambda: parts_of(run).pacer.paused)
        run.stop()
        with pytest.raises(RuntimeError, match="is ending"):
            await pausing
        Gradual.let_go.set()
        assert (await run.wait()).updates == 3


async def test_who_gives_up_a_checkpoint_leaves_the_run_held(gradual: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        await pause_in_update(run)
        Gradual.let_go.clear()
        saving = await asked(run, run.checkpoint())
        assert not parts_of(run).learner_thread.brake.held
        saving.cancel()
        await asyncio.wait([saving])
        assert parts_of(run).learner_thread.brake.held
        Gradual.let_go.set()


async def test_an_update_finished_in_a_pause_is_not_measured(gradual: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(60), aiorl.Run(gradual(off_policy_degree=-1, degree_max=1)) as run:
        assert run._session.made is not None
        measured: list[Any] = []
        monkeypatch.setattr(run._session.made.dial._tuner, "observe", measured.append)
        await pause_in_update(run)
        before = len(measured)
        await run.checkpoint()
        assert (run.status().version, len(measured)) == (3, before)
        run.resume()
        await until(lambda: len(measured) > before)


async def test_a_pause_that_is_taken_back_is_not_told(gradual: Make, no_leaks: None) -> None:
    told: list[str] = []
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        listening = asyncio.create_task(_names(run, told))
        await until(Gradual.in_step.is_set)
        pausing = asyncio.create_task(run.pause())
        await until(lambda: parts_of(run).pacer.paused)
        run.resume()
        Gradual.let_go.set()
        await pausing
        await run.wait()
        await listening
    assert "Resumed" in told
    assert "Paused" not in told


async def test_a_setting_in_force_is_recorded_though_nobody_waits(
    gradual: Make, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    told: list[str] = []
    Gradual.let_go.set()
    async with asyncio.timeout(60), aiorl.Run(gradual()) as run:
        listening = asyncio.create_task(_names(run, told))
        await run.pause()
        monkeypatch.setattr(run, "_rest", lambda _: asyncio.Event().wait())  # an evaluation takes long, say
        changing = asyncio.create_task(run.set(learning_rate=0.7))
        learner: Any = parts_of(run).trainer.learner
        await until(lambda: learner._rate == 0.7)
        changing.cancel()
        await asyncio.wait([changing])
        run.resume()
        await run.wait()
        await listening
    assert told.count("SettingsChanged") == 1


async def _names(run: aiorl.Run, told: list[str]) -> None:
    async for event in run.events():
        told.append(type(event).__name__)


ENDLESS_UPDATES = {
    "ppo": aiorl.PPO(hidden=(8,), epochs=10**9),
    "dqn": aiorl.DQN(hidden=(8,), batch_size=4, warmup=8, update_ratio=1e9),
}


@pytest.mark.parametrize("algo", ENDLESS_UPDATES)
@pytest.mark.parametrize("workers", [0, 1])
async def test_leaving_while_an_endless_update_is_held(config: Make, no_leaks: None, algo: str, workers: int) -> None:
    fields: dict[str, Any] = {"algo": ENDLESS_UPDATES[algo], "envs": 2, "group_size": 1, "segment_length": 8}
    async with asyncio.timeout(60):
        async with aiorl.Run(config(**fields, workers=workers)) as run:
            await until(lambda: parts_of(run).updating and len(parts_of(run).rollouts) > 0)
            await run.pause()
            assert run.status().state == "paused"
            assert parts_of(run).updating
            first = parts_of(run).learner_thread.brake.rested_s
    assert parts_of(run).learner_thread.brake.rested_s > first, "it was not held"
    assert run.result.status == "stopped"
    assert run.result.ledger["produced"] == run.result.ledger["stored"] + run.result.ledger["dropped"]


# -- workers -----------------------------------------------------------------------------------------------------------


def rows(run: aiorl.Run) -> dict[int, int]:
    """How far each group that is in the middle of a segment is into it."""
    controls = [control for keeper in workers_of(run)._keepers[:-1] for control in keeper._worker._controls]
    return {group: control.of(Counter.STEP, group) for control in controls for group in control.at_work()}


LONG: dict[str, Any] = {"segment_length": 20_000, "total_steps": 10**7, "off_policy_degree": 0}
KINDS: dict[str, dict[str, Any]] = {
    "in turn": {},
    "threads": {"stepping": "threads"},
    "coroutines": {"env": "async_envs:cartpole"},
    "native": {"native_vector": True},
    "central": {"inference": "central"},
    "central threads": {"inference": "central", "stepping": "threads"},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_workers_stand_between_two_steps(config: Make, no_leaks: None, kind: str) -> None:
    async with asyncio.timeout(60), aiorl.Run(config(**LONG, **KINDS[kind])) as run:
        parts = parts_of(run)
        for _ in range(2):
            moved = rows(run)
            await until(lambda: any(step > moved.get(group, 0) for group, step in rows(run).items()))  # noqa: B023
            await run.pause()
            assert parts.pacer.in_flight == 4, "this proves nothing"
            at_rest, beats = rows(run), [view.beats for view in parts.workers.views()]
            assert 0 < max(at_rest.values()) < LONG["segment_length"]
            assert run.status().state == "paused"
            await run.evaluate(2)  # time in which anything still moving would show
            assert rows(run) == at_rest
            assert [view.beats for view in parts.workers.views()][:-1] == beats[:-1]
            run.resume()
        await until(lambda: sum(rows(run).values()) > sum(at_rest.values()))
    left = run.result.ledger
    assert left["produced"] == left["dropped"] >= sum(at_rest.values())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in ("native", "central threads"))) for kind in KINDS]
)
async def test_pauses_at_any_moment_do_not_change_the_result(config: Make, kind: str) -> None:
    # When all segments have landed there is an update to come, longer than the waits between two pauses.
    learner = aiorl.PPO(epochs=12, minibatches=8, normalise_obs=True, hidden=(64, 64))
    changes = {**KINDS[kind], "algo": learner, "segment_length": 200, "total_steps": 4 * 8 * 200}
    whole = await aiorl.train(config(**changes))
    pauses = in_segment = 0
    async with asyncio.timeout(120), aiorl.Run(config(**changes)) as run:
        with contextlib.suppress(RuntimeError):  # until it has ended
            while True:
                await run.pause()
                pauses += 1
                in_segment += parts_of(run).pacer.in_flight > 0
                run.resume()
                await asyncio.sleep(0.001 * (pauses % 7))
    assert (run.result.params_sha256, run.result.ledger) == (whole.params_sha256, whole.ledger)
    assert run.result.dropped == {}
    assert run.result.restarts == 0
    assert pauses > in_segment > 0, "no pause in the middle of a segment, or none after all of them: this proves nothing"


async def test_a_worker_killed_while_it_stands(config: Make, no_leaks: None) -> None:
    changes = {"segment_length": 2_000, "total_steps": 8 * 2_000, "algo": aiorl.PPO(epochs=1, hidden=(8,))}
    whole = await aiorl.train(config(**changes))
    async with asyncio.timeout(60), aiorl.Run(config(**changes)) as run:
        await until(lambda: 0 in rows(run))
        await run.pause()
        before = run.status().ledger
        workers = workers_of(run)
        kill(workers.pids[0])
        back = await anext(event async for event in run.events() if isinstance(event, aiorl.WorkerRestarted))
        assert "in rollout 0, step " in back.reason
        await run.pause()
        assert run.status().ledger == before
        run.resume()
        result = await run.wait()
    assert (result.params_sha256, result.dropped, result.restarts) == (whole.params_sha256, {}, 1)


def test_standing_for_long_is_not_hanging() -> None:
    """In virtual time: neither a worker's deadline nor the watch over the run mistakes it for trouble."""

    async def host(run: aiorl.Run) -> None:
        await until(lambda: run.status().version >= 2)
        await run.pause()
        rests.append((parts_of(run).updating, parts_of(run).pacer.in_flight))
        await asyncio.sleep(15)
        run.resume()

    rests: list[tuple[bool, int]] = []
    folder = Folder()
    try:
        hashes: set[str] = set()
        for seed in range(8):
            sim = Sim(seed)
            config = folder.config({"off_policy_degree": 2, "stall_timeout_s": 6.0}, seed=3)
            done = sim.run(simulate(sim, config, FaultPlan(), host=host))
            done.check_laws()
            assert (done.run.result.status, done.run.result.restarts) == ("completed", 0)
            hashes.add(done.run.result.params_sha256)
    finally:
        folder.close()
    assert len(hashes) == 1
    assert {updating for updating, _ in rests} == {False, True}, "this proves nothing"
    assert max(flying for _, flying in rests) > 0


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_a_brake_holds_its_thread_and_tells() -> None:
    told: list[bool] = []
    passed = threading.Semaphore(0)
    brake = Brake(lambda: told.append(brake.stands))
    brake.rest()
    assert brake.rested_s == 0

    def work() -> None:
        for _ in range(3):
            brake.rest()
            passed.release()

    brake.hold()
    assert not brake.stands
    thread = threading.Thread(target=work)
    thread.start()
    while not brake.stands:
        thread.join(0.001)
    assert not passed.acquire(blocking=False)
    brake.release()
    assert not brake.stands
    thread.join(60)
    assert all(passed.acquire(blocking=False) for _ in range(3))
    assert brake.rested_s > 0
    assert told == [True]


@pytest.mark.parametrize("blocks", [False, True])
async def test_whoever_is_held_waits_for_the_pipe(blocks: bool) -> None:
    hold = Hold()
    rung: list[Record] = []
    rest, held = Rest(hold.fd, rung.append, blocks=blocks), True

    def begin() -> asyncio.Future[None]:
        wait = rest.wait(lambda: held)
        return asyncio.ensure_future(asyncio.to_thread(asyncio.run, wait) if blocks else wait)

    try:
        hold.turn(True)
        waiting = [begin(), begin()]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in waiting)
        held = False
        hold.turn(False)
        await asyncio.gather(*waiting)
        assert rung == [Record(Kind.STANDS)] * 2
        await rest.wait(lambda: False)
    finally:
        hold.close()
        hold.close()


def test_a_checkpoint_does_not_wait_for_a_learner_that_always_has_work() -> None:
    """Segments come much faster than they are learned from, so that the next update could always begin at once."""

    async def host(run: aiorl.Run) -> None:
        await until(lambda: run.status().version >= 1)
        asked = run.status().version
        saved.append(int((await run.checkpoint()).name) - asked)

    saved: list[int] = []
    folder = Folder()
    try:
        for seed in range(8):
            sim = Sim(seed)
            pace = Pace(segment_s=0.0001, update_s=1.0)
            done = sim.run(simulate(sim, folder.config({"off_policy_degree": 2}), FaultPlan(), pace=pace, host=host))
            done.check_laws()
    finally:
        folder.close()
    assert len(saved) == 8
    assert max(saved) <= 1, "more than the running update was waited for"
