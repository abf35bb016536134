"""Simulated runs for tests: small configurations of every kind, and hosts that meddle with a run at random moments."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

import aiorl
from aiorl.algos.base import LearnerContext
from aiorl.envs.spaces import Spaces
from aiorl.errors import NonFiniteError
from aiorl.segments import Rollout
from aiorl.testing import LEDGER_ENV, FaultPlan, InjectedFault, Mark, Pace, Recording, Sim, Simulated, simulate
from aiorl.testing.ledger_env import MarkLearner
from aiorl.testing.simulation import Host

STEPS = 400

SHAPES: list[dict[str, Any]] = [
    {"off_policy_degree": 0, "workers": 1},
    {"off_policy_degree": 0, "workers": 2, "eval_busy": "wait"},
    {"off_policy_degree": 1, "workers": 2},
    {"off_policy_degree": 2, "workers": 4, "eval_top": 2},
    {"off_policy_degree": 3, "workers": 2, "group_size": 4, "eval_busy": "queue", "debug": True},
    {"off_policy_degree": 1, "workers": 3, "schedule": "eager"},
    {"off_policy_degree": 2, "workers": 4, "schedule": "eager", "eval_busy": "skip"},
    {"off_policy_degree": 0, "workers": 2, "schedule": "eager", "eval_suites": {"a": {}, "b": {"episodes": 1}}},
    {"off_policy_degree": -1, "degree_max": 3, "workers": 2},
    {"off_policy_degree": 1, "degree_max": 4, "workers": 3},
]
"""What a run can be like; beside it all are the same."""


class Still(Mark, frozen=True):
    """Its updates change nothing from number `after` on, as with a learning rate that was annealed to 0; those in
    `not_finite` come to NaN."""

    name: ClassVar[str] = "still"
    after: int = 0
    not_finite: tuple[int, ...] = ()

    def learner(self, spaces: Spaces, context: LearnerContext) -> StillLearner:
        return StillLearner(self, context.seed)


class StillLearner(MarkLearner):
    def __init__(self, config: Still, seed: int) -> None:
        super().__init__(seed)
        self._config = config

    def update(self, rollout: Rollout) -> dict[str, float]:
        if rollout.index in self._config.not_finite:
            raise NonFiniteError("planned")
        return super().update(rollout) if rollout.index < self._config.after else {"gradient_steps": 1.0}


class Folder:
    """Run directories that last as long as a test; in memory where there is such a place, for the sake of fsync."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="aiorl-test-", dir=memory if memory.is_dir() else None))
        self._count = 0

    def config(self, shape: dict[str, Any] | None = None, **changes: Any) -> aiorl.Config:
        self._count += 1
        fields: dict[str, Any] = {
            "env": LEDGER_ENV, "algo": Recording.of(Mark()), "total_steps": STEPS, "envs": 8, "group_size": 2, "workers": 2,
            "segment_length": 5, "off_policy_degree": 1, "eval_every": 120, "eval_episodes": 2, "checkpoint_every": 150,
            "step_timeout_s": 1.0, "start_timeout_s": 5.0, "out": str(self.path / str(self._count)),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **(shape or {}), **changes})

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Meddler:
    """A host that pauses, saves, evaluates, turns the degree, stops or leaves at random moments. `did` says what it did."""

    def __init__(self, rng: np.random.Generator, *, ends: bool) -> None:
        self.did: list[str] = []
        self._rng = rng
        self._ends = ends

    async def __call__(self, run: aiorl.Run) -> None:
        rng = self._rng
        actions = [self._pause, self._save, self._evaluate, self._turn] + [self._stop] * self._ends
        for _ in range(int(rng.integers(0, 4))):
            await asyncio.sleep(float(rng.exponential(0.1)))
            action = actions[int(rng.integers(len(actions)))]
            self.did.append(action.__name__)
            try:
                await action(run)
            except (RuntimeError, aiorl.AiorlError, InjectedFault) as error:  # it has ended meanwhile, or cannot do that
                self.did.append(f"{error}")
                return

    async def _pause(self, run: aiorl.Run) -> None:
        await run.pause()
        before = run.status()
        await asyncio.sleep(float(self._rng.exponential(0.2)))
        now = run.status()
        assert (before.env_steps, before.version) == (now.env_steps, now.version), "something moves in a paused run"
        assert now.ledger["produced"] == before.ledger["produced"], "a worker collects in a paused run"
        run.resume()

    async def _save(self, run: aiorl.Run) -> None:
        await run.checkpoint()

    async def _evaluate(self, run: aiorl.Run) -> None:
        await run.evaluate(episodes=2)

    async def _turn(self, run: aiorl.Run) -> None:
        await run.set(off_policy_degree=int(self._rng.integers(-1, run.config.degree_limit + 1)))

    async def _stop(self, run: aiorl.Run) -> None:
        run.stop(final_evaluation=bool(self._rng.integers(2)))


class Trial(NamedTuple):
    """What came of one seed."""

    status: str
    error: str
    restarts: int
    virtual_s: float
    params_sha256: str
    did: tuple[str, ...]


def trial(sim: Sim, folder: Folder, *, shape: int | None = None, meddle: bool = True, **changes: Any) -> Trial:
    """One simulated run with random pace, faults and host; every law is checked and nothing may be left."""
    number = sim.seed % len(SHAPES) if shape is None else shape
    config = folder.config(SHAPES[number], **changes)
    host = Meddler(sim.rng, ends=True) if meddle else None
    plan = FaultPlan.random(sim.rng, int(config.workers), steps=STEPS)
    done = sim.run(simulate(sim, config, plan, pace=Pace.random(sim.rng), host=host))
    done.check_laws()
    assert not sim.left, f"left behind: {sim.left}"
    shutil.rmtree(config.out or "", ignore_errors=True)
    return summary(done, host)


def summary(done: Simulated, host: Host | None = None) -> Trial:
    result = done.run.result
    did = tuple(host.did) if isinstance(host, Meddler) else ()
    error = str(done.error) if done.error else ""
    return Trial(result.status, error, result.restarts, done.world.sim.now_s, result.params_sha256, did)
