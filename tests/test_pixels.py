"""Runs on images, from the environment to the loaded policy: exact like all others, in each way of acting."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import plain_loop

import aiorl
from aiorl import checkpoint
from aiorl.algos.base import Learner
from aiorl.envs.make import make_env
from aiorl.envs.spec import resolve_env
from aiorl.learning import params_sha256
from tests.test_exactness import killed, saved_learner_sha256, tree_sha256

REPLAY: dict[str, Any] = {
    "hidden": (16,), "warmup": 60, "update_ratio": 0.1, "batch_size": 16, "target_every": 5, "capacity": 300,
}  # fmt: skip
ALGORITHMS: dict[str, Any] = {
    "dqn": aiorl.DQN(**REPLAY, n_step=2, dueling=True),
    "qrdqn": aiorl.QRDQN(**REPLAY, quantiles=5, priority_exponent=0.5, average=0.9),
    "ppo": aiorl.PPO(hidden=(16,), epochs=2, minibatches=2),
}
FIXED: dict[str, Any] = {
    "env": "tests.image_envs:Falling", "frame_stack": 3, "envs": 4, "group_size": 2, "segment_length": 10, "seed": 3,
    "total_steps": 380, "off_policy_degree": 0, "eval_every": 0, "eval_episodes": 2, "checkpoint_every": 0,
}  # fmt: skip


def config(algo: str, out: Path, **changes: Any) -> aiorl.Config:
    return aiorl.Config(**{**FIXED, "algo": ALGORITHMS[algo], "out": str(out), **changes})


def plain(made: aiorl.Config) -> Learner:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return plain_loop(
            made.algorithm,
            resolve_env(made.env, made.env_kwargs, in_process=True, frame_stack=made.frame_stack),
            envs=made.envs, group_size=2, steps=made.steps_per_segment, seed=made.seed, rollouts=10, planned_rollouts=10,
            degree=0,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algo", ALGORITHMS)
async def test_a_run_on_images_equals_the_plain_loop(tmp_path: Path, algo: str) -> None:
    made = config(algo, tmp_path / "run", workers=2)
    result = await aiorl.train(made)
    learner = plain(made)
    assert result.params_sha256 == params_sha256(learner.weights())
    assert saved_learner_sha256(result.directory) == tree_sha256(learner.state_dict())
    assert any(".conv." in name for name in learner.weights())


async def test_a_killed_worker_and_a_resume_change_nothing(tmp_path: Path) -> None:
    """Open episodes come back with their stacks, and the buffer with its frames."""
    learner = plain(config("dqn", tmp_path / "none"))
    expected = params_sha256(learner.weights()), tree_sha256(learner.state_dict())
    result = await killed(config("dqn", tmp_path / "killed", workers=2), random.Random(4))
    assert (result.params_sha256, saved_learner_sha256(result.directory)) == expected
    halves = config("dqn", tmp_path / "halves", workers=2)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 4:
                run.stop(final_evaluation=False)
    assert run.result.updates < result.updates
    resumed = await aiorl.train(halves, resume=run.directory)
    assert (resumed.params_sha256, saved_learner_sha256(resumed.directory)) == expected


@pytest.mark.parametrize("inference", ["worker", "central"])
async def test_the_number_of_workers_changes_nothing(tmp_path: Path, inference: str) -> None:
    hashes = {
        workers: (await aiorl.train(config(
            "dqn", tmp_path / str(workers), workers=workers, inference=inference, off_policy_degree=1, envs=8,
        ))).params_sha256
        for workers in (0, 1, 2, 4)
    }  # fmt: skip
    assert len(set(hashes.values())) == 1, hashes


async def test_large_images(tmp_path: Path) -> None:
    changes = {"env_kwargs": {"size": 40}, "frame_stack": 4, "total_steps": 80}
    result, alone = [await aiorl.train(config("dqn", tmp_path / f"{n}", workers=n, **changes)) for n in (2, 0)]
    assert result.gradient_steps == 2
    assert result.params_sha256 == alone.params_sha256
    policy = aiorl.load(result.directory)
    assert policy.weights["torso.conv.0.weight"].shape == (32, 8, 8, 4)
    assert policy.spaces.stack == 4


async def test_each_frame_is_stored_once(tmp_path: Path) -> None:
    result = await aiorl.train(config("dqn", tmp_path / "run", workers=0))
    newest = checkpoint.complete_checkpoints(Path(result.directory) / "checkpoints")[-1]
    arrays, _ = checkpoint.flatten(checkpoint.load(newest, ("learner",))[1]["learner"])
    frames = sum(array.nbytes for array in arrays.values() if array.shape[-2:] == (8, 8)) / 64
    ends = 400 / 7 + 4  # what episodes ended with, and what the newest row led to
    assert 300 <= frames <= 300 + ends + 16


def test_the_policy_acts_without_torch(tmp_path: Path) -> None:
    result = asyncio.run(aiorl.train(config("dqn", tmp_path / "run", workers=0)))
    program = (
        "import sys, numpy as np, aiorl\n"
        f"policy = aiorl.load({result.directory!r})\n"
        "print(policy(np.full((3, 8, 8), 200, np.uint8)))\n"
        "assert 'torch' not in sys.modules, 'imported'\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) in (0, 1, 2)


def test_a_policy_stacks_what_is_not_stacked(tmp_path: Path) -> None:
    result = asyncio.run(aiorl.train(config("dqn", tmp_path / "run", workers=0)))
    plain, stacked = (make_env(resolve_env(FIXED["env"], in_process=True, frame_stack=k)) for k in (1, 3))
    single, whole = (aiorl.load(result.directory) for _ in range(2))
    for seed in range(6):
        (one, _), (three, _), over = plain.reset(seed=seed), stacked.reset(seed=seed), False
        single.reset()
        whole.reset()
        while not over:
            action = single(one)
            assert action == whole(three)
            one, _, over, _, _ = plain.step(action)
            three, *_ = stacked.step(action)
    with pytest.raises(ValueError, match="expected"):
        single(one[0])


@pytest.mark.long
async def test_a_falling_dot_is_caught(tmp_path: Path) -> None:
    """By chance three games of eight are won."""
    algo = aiorl.DQN(hidden=(32,), warmup=300, update_ratio=0.25, learning_rate=2e-3, target_every=50, gamma=0.95)
    made = config("dqn", tmp_path / "run", workers=1, total_steps=15_000, eval_episodes=100, env_kwargs={"kind": "bool"})
    result = await aiorl.train(made.replace(algo=algo))
    assert result.final_evaluation is not None
    assert result.final_evaluation.mean_return > 0.9
