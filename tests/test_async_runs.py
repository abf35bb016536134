"""Whole runs on async environments: what they learn is what they would learn from the same environments as functions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import kill, workers_of

import aiorl
from aiorl.preflight import check
from aiorl.testing import check_env

Make = Callable[..., aiorl.Config]

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    count = iter(range(1000))

    def make(env: str, **changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": env, "algo": aiorl.PPO(epochs=2, minibatches=4, normalise_obs=True), "seed": 3, "envs": 8,
            "group_size": 1, "segment_length": 32, "total_steps": 6 * 32 * 8, "workers": 2, "off_policy_degree": 0,
            "eval_every": 600, "eval_episodes": 3, "eval_busy": "wait", "native_vector": False,
            "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


def learned(result: aiorl.Result) -> tuple[str, list[float]]:
    assert result.dropped == {}
    return result.params_sha256, [evaluation.mean_return for evaluation in result.evaluations]


@pytest.mark.parametrize("degree", [0, 1])
async def test_what_is_learned_is_that_of_functions(config: Make, degree: int):
    expected = learned(await aiorl.train(config("CartPole-v1", off_policy_degree=degree, workers=0)))
    for workers in (0, 2):
        result = await aiorl.train(config("async_envs:cartpole", off_policy_degree=degree, workers=workers))
        assert learned(result) == expected, f"{workers} workers"


async def test_larger_groups_too(config: Make):
    expected = learned(await aiorl.train(config("CartPole-v1", group_size=4)))
    assert learned(await aiorl.train(config("async_envs:cartpole", group_size=4))) == expected


async def test_a_killed_worker_changes_nothing(config: Make):
    fields: dict[str, Any] = {"off_policy_degree": 1, "total_steps": 12 * 32 * 8}
    whole = await aiorl.train(config("async_envs:cartpole", **fields))
    async with asyncio.timeout(120), aiorl.Run(config("async_envs:cartpole", **fields)) as run:
        async for event in run:
            if event.version >= 3:
                kill(workers_of(run).pids[0])
                break
        result = await run.wait()
    assert result.restarts == 1
    assert learned(result)[0] == learned(whole)[0]


async def test_stop_and_resume_equals_one_go(config: Make):
    whole = await aiorl.train(config("async_envs:cartpole"))
    halves = config("async_envs:cartpole")
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 3:
                run.stop(final_evaluation=False)
    second = await aiorl.train(halves, resume=run.directory)
    assert second.params_sha256 == whole.params_sha256


async def test_a_step_that_never_returns_is_found(config: Make, tmp_path: Path):
    """The worker is ended at its deadline, and what comes after goes on."""
    marks = tmp_path / "marks"
    marks.mkdir()
    one = config("async_envs:Hangs", env_kwargs={"marks": str(marks)}, step_timeout_s=1.0, eval_every=0, eval_episodes=1)
    async with asyncio.timeout(60):
        result = await aiorl.train(one)
    assert (result.status, result.restarts, result.dropped) == ("completed", 1, {})
    assert int((marks / "hung").read_text()) != os.getpid()


# -- before a run ------------------------------------------------------------------------------------------------------


def test_a_group_is_one_environment_unless_said_otherwise(config: Make):
    """Whoever has its answer acts: none waits for the others."""
    one = check(config("async_envs:cartpole", group_size="auto", workers=4), write=False)
    assert (one.config.group_size, one.config.workers, one.config.groups, one.segment.envs) == (1, 4, 8, 1)
    assert check(config("async_envs:cartpole", group_size=4), write=False).config.group_size == 4
    assert check(config("run_envs:Counting", group_size="auto"), write=False).config.group_size == 4


async def test_the_group_size_is_recorded(config: Make):
    result = await aiorl.train(config("async_envs:counting", group_size="auto", total_steps=300))
    recorded = aiorl.Config.from_toml(Path(result.directory) / "config.toml")
    assert (recorded.group_size, recorded.env) == (1, "async_envs:counting")


def test_the_doctor_looks_at_it_like_at_any_other():
    found = {f.code: f.severity for f in check_env("async_envs:cartpole")}
    expected = {f.code: f.severity for f in check_env("CartPole-v1")}
    assert "error" not in found.values()
    assert "warning" not in found.values()
    assert found.keys() <= expected.keys() | {"no-time-limit", "endless"}
    assert [f.code for f in check_env("async_envs:unseeded") if f.severity == "error"] == ["unseeded"]
