"""Fault plans on real processes, the environment that goes wrong, the one that proves itself, and fault points."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sims import STEPS, Folder

import aiorl
from aiorl import faultpoints
from aiorl.faultpoints import POINTS
from aiorl.testing import (
    LEDGER_ENV,
    FaultEnv,
    FaultPlan,
    FaultPoints,
    InjectedFault,
    LawsBroken,
    LedgerEnv,
    Recording,
    Sim,
    armed,
    check_laws,
    drive,
    fault_point,
    seconds,
    simulate,
    step,
    stored,
    tape_of,
)
from aiorl.testing.ledger_env import entry, is_true
from aiorl.workers.supervision import Budget

PACKAGE = Path(aiorl.__file__).parent


@pytest.fixture
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    made.close()


PATIENT: dict[str, float] = {"step_timeout_s": 30.0, "start_timeout_s": 30.0}  # where cores are busy real steps take long


async def trained(config: aiorl.Config, plan: FaultPlan | None = None) -> aiorl.Run:
    """A run with real processes, driven by a plan, whose laws have been checked."""
    async with asyncio.timeout(60), aiorl.Run(config) as run:
        driving = asyncio.ensure_future(drive(run, plan or FaultPlan()))
        await run.wait()
        await driving
    check_laws(run)
    return run


# -- plans -------------------------------------------------------------------------------------------------------------


async def test_one_plan_for_processes_and_for_simulation(folder: Folder, no_leaks: None) -> None:
    """What is killed and stopped comes back, every row is stored once, and the weights are those of an undisturbed run."""
    plan = FaultPlan().kill(0, at=stored(100)).kill(1, at=stored(200)).stop(0, at=stored(300), for_s=0.2)
    changes = {"total_steps": 2 * STEPS, "checkpoint_every": 0, "eval_every": 0, **PATIENT}
    whole = await trained(folder.config(**changes))
    hit = await trained(folder.config(**changes), plan)

    def simulated() -> aiorl.Result:
        sim = Sim(1)
        done = sim.run(simulate(sim, folder.config(**changes), plan))
        done.check_laws()
        assert len(done.struck) == 3
        return done.run.result

    # In a thread: this test runs in an event loop already.
    result = await asyncio.get_running_loop().run_in_executor(None, simulated)
    assert hit.result.restarts == result.restarts == 2
    assert hit.result.params_sha256 == result.params_sha256 == whole.result.params_sha256


async def test_a_plan_on_processes_refuses_what_only_happens_inside(folder: Folder, no_leaks: None) -> None:
    async with aiorl.Run(folder.config()) as run:
        for plan in (FaultPlan().hang(0, at=seconds(0.1)), FaultPlan().kill(0, at=step(3))):
            with pytest.raises(aiorl.ConfigError, match="use FaultEnv"):
                await drive(run, plan)
        with pytest.raises(aiorl.ConfigError, match="no worker process 7"):
            await drive(run, FaultPlan().kill(7, at=stored(0)))


def test_every_kind_of_fault_in_simulation(folder: Folder) -> None:
    plan = (
        FaultPlan()
        .kill(0, at=step(7)).hang(1, at=step(12)).fail(0, at=step(30)).slow(1, at=step(3), for_s=0.4)
        .stop(1, at=stored(200)).kill(-1, at=step(5)).kill(0, at=seconds(0.0)).refuse(1, at=seconds(0.0))
    )  # fmt: skip
    sim = Sim(3)
    done = sim.run(simulate(sim, folder.config(eval_every=50), plan))
    done.check_laws()
    assert done.run.result.status == "completed"
    assert done.run.result.restarts >= 5


def test_too_many_faults_end_the_run_and_break_no_law(folder: Folder) -> None:
    plan = FaultPlan()
    for number in range(5):
        plan = plan.kill(1, at=step(2 + number))
    sim = Sim(0)
    done = sim.run(simulate(sim, folder.config(total_steps=20 * STEPS), plan))
    done.check_laws()
    assert isinstance(done.error, aiorl.WorkerError)
    assert re.search("worker 1 .*SIGKILL.* after 3 restarts in 60 s", str(done.error))
    assert done.run.result.status == "failed"
    assert len(done.world.processes) == 2 + 1 + 3


def test_more_restarts_than_the_budget_are_found(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "draw", lambda self, now_s: 0.0)
    plan = FaultPlan()
    for number in range(5):
        plan = plan.kill(1, at=step(2 + number))
    sim = Sim(0)
    done = sim.run(simulate(sim, folder.config(), plan))
    with pytest.raises(LawsBroken, match=r"processes: worker 1 was started 4 times in \d"):
        done.check_laws()


def test_random_plans_differ_and_repeat() -> None:
    def plans() -> list[FaultPlan]:
        return [FaultPlan.random(np.random.default_rng(seed), 4, steps=1000) for seed in range(50)]

    assert plans() == plans()
    faults = [fault for plan in plans() for fault in plan.faults]
    assert {fault.what for fault in faults} == {"kill", "stop", "hang", "fail", "slow"}
    assert {fault.at.unit for fault in faults} == {"stored", "step", "seconds"}


# -- environments ------------------------------------------------------------------------------------------------------


async def test_fault_env_goes_wrong_once_for_each_fault(folder: Folder, tmp_path: Path, no_leaks: None) -> None:
    faults = [["kill", 11], ["fail", 17], ["slow", 5, 0.01], ["exit", 23]]
    kwargs = {"wraps": LEDGER_ENV, "faults": faults, "marks": str(tmp_path)}
    config = folder.config(env="aiorl.testing.faults:FaultEnv", env_kwargs=kwargs, eval_every=0, total_steps=600, **PATIENT)
    run = await trained(config)
    assert run.result.status == "completed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    assert 1 <= run.result.restarts <= 3


def test_fault_env_does_not_end_the_process_that_trains(tmp_path: Path) -> None:
    env = FaultEnv(LEDGER_ENV, [["kill", 2], ["nan", 1]], str(tmp_path))
    env.reset(seed=5)
    assert np.isnan(env.step(0)[1])
    with pytest.raises(InjectedFault, match="would end the training process"):
        env.step(0)
    env.step(0)  # each happens once
    cart = FaultEnv("CartPole-v1", [], str(tmp_path))
    cart.reset(seed=1)
    cart.step(0)


def test_ledger_env_is_a_gymnasium_environment_whose_rows_prove_themselves() -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(LedgerEnv(), skip_render_check=True)
    env = LedgerEnv()
    rows = [env.reset(seed=46)[0]]
    terminated = truncated = False
    while not (terminated or truncated):
        obs, _, terminated, truncated, _ = env.step(3)
        rows.append(obs)
    assert is_true(np.stack(rows)).all()
    assert rows[1].tolist() == entry(46, 1, 3).tolist()
    for place in range(4):
        torn = np.stack(rows)
        torn[1, place] = torn[0, place] + 0.5
        assert is_true(torn).tolist() == [True, False] + [True] * (len(rows) - 2)


async def test_a_real_algorithm_can_be_recorded(folder: Folder, no_leaks: None) -> None:
    algo = Recording.of(aiorl.PPO(epochs=1, minibatches=1, anneal=False))  # every version has weights of its own
    # Long enough that the kill, which comes from beside the run, does not come after its end.
    config = folder.config(env="CartPole-v1", algo=algo, total_steps=20_000, eval_every=0, segment_length=16, **PATIENT)
    run = await trained(config, FaultPlan().kill(1, at=stored(128)))
    assert run.result.restarts == 1
    assert tape_of(run).gradient_steps == run.result.gradient_steps == run.result.updates
    assert aiorl.Config.from_toml(run.directory / "config.toml").algo == algo


# -- fault points ------------------------------------------------------------------------------------------------------


def test_every_point_is_somewhere_and_every_place_is_listed() -> None:
    used = [
        name
        for path in PACKAGE.rglob("*.py")
        if path.name != "faultpoints.py" and "testing" not in path.parts
        for name in re.findall(r"fault_point\(\"([^\"]+)\"\)", path.read_text(encoding="utf-8"))
    ]
    assert sorted(used) == sorted(POINTS)


def test_a_point_does_nothing_until_it_is_armed() -> None:
    fault_point("arrival")
    points = FaultPoints({"arrival": 2})
    with armed(points):
        fault_point("arrival")
        with pytest.raises(InjectedFault, match="arrival, passing 2"):
            fault_point("arrival")
        fault_point("arrival")
        with pytest.raises(RuntimeError, match="armed already"), armed(points):
            pass
        with pytest.raises(aiorl.ConfigError, match="list it"):
            fault_point("nowhere")
    fault_point("arrival")
    assert points.passed["arrival"] == 3
    assert points.never == [name for name in POINTS if name != "arrival"]
    assert re.search(r"never +publish.before: .+\n", points.report())
    assert faultpoints._passing is None


def test_a_point_that_does_not_exist_cannot_be_planned() -> None:
    with pytest.raises(aiorl.ConfigError, match="there is no fault point publish"):
        FaultPoints({"publish": 1})
