"""Tests for an environment, an algorithm and a program of your own, as they could stand in your project.

pytest examples/testing_your_own.py
pytest examples/testing_your_own.py --aiorl-seed 3
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aiorl
from aiorl.testing import LEDGER_ENV, FaultPlan, Mark, Recording, Sim, check_algorithm, check_env, errors, simulate
from examples.custom_algorithm import Reinforce

pytestmark = pytest.mark.usefixtures("aiorl_no_leaks")


def test_the_environment() -> None:
    """In worker processes: the contract, seeds, the way back to an open episode, what is left behind, and more."""
    assert not errors(check_env("examples.custom_env:GoToGoal", size=6))


def test_the_algorithm() -> None:
    """Exactness, state, chance, dtypes; truncation bootstraps and termination does not."""
    assert not errors(check_algorithm(Reinforce))


@pytest.mark.aiorl_chaos(seeds=10)
async def test_a_program_around_a_run(aiorl_sim: Sim, tmp_path: Path) -> None:
    """Your coroutine beside a real run, with workers that die and hang, in virtual time: each seed is another course."""

    async def program(run: aiorl.Run) -> None:
        await run.pause()
        version = run.status().version
        run.resume()
        async for event in run.events():
            if event.version >= version + 8:
                return run.stop()

    settings: dict[str, Any] = {"envs": 4, "group_size": 2, "segment_length": 8, "workers": 2, "total_steps": 2_000}
    config = aiorl.Config(env=LEDGER_ENV, algo=Recording.of(Mark()), out=str(tmp_path / str(aiorl_sim.seed)), **settings)
    faults = FaultPlan.random(aiorl_sim.rng, workers=2, steps=200)
    simulated = await simulate(aiorl_sim, config, faults, host=program)
    simulated.check_laws()
    assert simulated.run.result.status == ("failed" if simulated.error else "stopped")
