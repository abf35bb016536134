"""Runs that go on with fewer workers, in simulation: whoever fails, and when, the laws hold and the result is the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sims import Folder

import aiorl
from aiorl.testing import FaultPlan, Pace, Sim, explore, seconds, simulate, step

WORKERS = 4
SPARE: dict[str, Any] = {"eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0}


@pytest.fixture
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    made.close()


def config(folder: Folder, degree: int) -> aiorl.Config:
    return folder.config(None, workers=WORKERS, min_workers=1, off_policy_degree=degree, total_steps=800, **SPARE)


def dying(sim: Sim, workers: list[int]) -> FaultPlan:
    """These workers fail more often than their budget allows, in ways and at moments of chance."""
    plan = FaultPlan()
    for worker in workers:
        for _ in range(6):
            at = step(int(sim.rng.integers(1, 40))) if sim.rng.random() < 0.5 else seconds(float(sim.rng.random()) * 8)
            what = ("kill", "fail", "hang", "refuse")[int(sim.rng.integers(4))]
            plan = getattr(plan, what)(worker, at)
    return plan


@pytest.mark.parametrize("degree", [0, 2])
def test_the_laws_hold_and_the_result_is_the_same(folder: Folder, degree: int) -> None:
    given_up: list[int] = []
    hashes: set[str] = set()

    def trial(sim: Sim) -> None:
        chosen = config(folder, degree)
        victims = [int(w) for w in sim.rng.permutation(WORKERS)[: int(sim.rng.integers(0, WORKERS))]]
        done = sim.run(simulate(sim, chosen, dying(sim, victims), pace=Pace.random(sim.rng)))
        done.check_laws()
        assert not sim.left, f"left behind: {sim.left}"
        result = done.run.result
        assert result.status == "completed", result.error
        given_up.append(result.workers_given_up)
        hashes.add(result.params_sha256)
        shutil.rmtree(chosen.out or "", ignore_errors=True)

    explore(trial, seeds=30)
    assert len(hashes) == 1
    assert {0, 1, 2} <= set(given_up), f"the faults were not hard enough: {given_up}"


def test_taking_over_draws_on_nobodys_budget(folder: Folder) -> None:
    plan = FaultPlan()
    for n in range(3):
        plan = plan.kill(1, step(5 + n))
    for n in range(4):
        plan = plan.kill(0, step(60 + n))
    sim = Sim(0)
    done = sim.run(simulate(sim, config(folder, 2).replace(workers=2), plan))
    done.check_laws()
    assert done.run.result.status == "completed", done.run.result.error
    assert done.run.result.workers_given_up == 1


def test_groups_that_come_while_their_heir_is_being_started_itself(folder: Folder) -> None:
    """It is not asked for what it does not know: every restart is for a kill or for them."""
    reasons: set[str] = set()

    def trial(sim: Sim) -> None:
        chosen = config(folder, 2)
        plan = FaultPlan()
        for n in range(1, 40):
            for worker in range(WORKERS - 1):
                plan = plan.kill(worker, seconds(n / 4))
        done = sim.run(simulate(sim, chosen.replace(total_steps=4000), plan, pace=Pace(start_s=0.2)))
        done.check_laws()
        assert done.run.result.workers_given_up == WORKERS - 1
        events = Path(chosen.out or "", "events.jsonl").read_text(encoding="utf-8").splitlines()
        reasons.update(e["reason"].partition(" by ")[0] for e in map(json.loads, events) if e["event"] == "worker_restarted")
        shutil.rmtree(chosen.out or "", ignore_errors=True)

    explore(trial, seeds=3)
    assert {re.sub(r"\d", "N", reason) for reason in reasons} == {"was ended", "took over the groups of worker N"}


def test_one_more_than_may_fail(folder: Folder) -> None:
    sim = Sim(3)
    plan = dying(sim, list(range(WORKERS)))
    for worker in range(WORKERS):
        for n in range(1, 6):
            plan = plan.kill(worker, step(n))
    done = sim.run(simulate(sim, config(folder, 2).replace(total_steps=20_000), plan))
    done.check_laws()
    assert isinstance(done.error, aiorl.WorkerError)
    assert "after 3 restarts" in str(done.error)
    assert done.run.result.workers_given_up == WORKERS - 1
