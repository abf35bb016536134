"""The asynchronous run and the plain sequential loop are the same thing, bit for bit, with the real algorithms.

Compared by SHA-256 of everything the learner holds: parameters, optimizer, target network, replay buffer, statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import plain_loop

import aiorl
from aiorl import checkpoint
from aiorl.algos.base import Learner
from aiorl.envs.spec import resolve_env
from aiorl.learning import params_sha256

SEED, STEPS, ENVS, GROUP_SIZE = 5, 32, 8, 2
ALGORITHMS: dict[str, Any] = {
    "ppo": aiorl.PPO(normalise_obs=True, normalise_rewards=True, epochs=2, minibatches=4),
    "dqn": aiorl.DQN(warmup=500, update_ratio=0.1, target_every=20, n_step=3, dueling=True),
}
CASES = [("ppo", "CartPole-v1"), ("dqn", "CartPole-v1"), ("ppo", "Pendulum-v1"), ("dqn", "Acrobot-v1")]
Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    count = iter(range(1000))

    def make(algo: str, env: str, rollouts: int = 8, **changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": env, "algo": ALGORITHMS[algo], "seed": SEED, "envs": ENVS, "group_size": GROUP_SIZE,
            "segment_length": STEPS, "workers": 2, "off_policy_degree": 0, "eval_every": 0, "eval_episodes": 1,
            "checkpoint_every": 0, "native_vector": True, "out": str(tmp_path / str(next(count))),
            "total_steps": rollouts * STEPS * ENVS - STEPS * ENVS // 2,
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


def tree_sha256(tree: Mapping[str, Any]) -> str:
    arrays, plain = checkpoint.flatten(tree)
    digest = hashlib.sha256(repr(sorted(plain.items())).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + str(arrays[name].dtype).encode() + arrays[name].tobytes())
    return digest.hexdigest()


def saved_learner_sha256(directory: str) -> str:
    newest = checkpoint.complete_checkpoints(Path(directory) / "checkpoints")[-1]
    return tree_sha256(checkpoint.load(newest, ("learner",))[1]["learner"])


def run_plain(algo: str, env: str, rollouts: int, degree: int, planned: int) -> Learner:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return plain_loop(
            ALGORITHMS[algo], resolve_env(env, in_process=True), envs=ENVS, group_size=GROUP_SIZE, steps=STEPS,
            seed=SEED, rollouts=rollouts, degree=degree, planned_rollouts=planned,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize(("algo", "env"), CASES)
async def test_a_run_equals_the_plain_loop(config: Make, algo: str, env: str, degree: int) -> None:
    result = await aiorl.train(config(algo, env, off_policy_degree=degree))
    planned = -(-config(algo, env).total_steps // (STEPS * ENVS))
    learner = run_plain(algo, env, result.updates, degree, planned)
    assert result.params_sha256 == params_sha256(learner.weights())
    assert saved_learner_sha256(result.directory) == tree_sha256(learner.state_dict())
    if algo == "dqn":
        assert result.gradient_steps == (result.env_steps - 500) // 10, "the update-to-data ratio is not exact"


@pytest.mark.long
@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize(("algo", "env"), CASES)
async def test_nothing_but_the_degree_changes_the_result(config: Make, algo: str, env: str, degree: int) -> None:
    hashes: dict[str, str] = {}
    for workers in (0, 1, 2, 4):
        for every in (0, 300):
            result = await aiorl.train(
                config(algo, env, 20, off_policy_degree=degree, workers=workers, eval_every=every, checkpoint_every=every)
            )
            hashes[f"{workers} workers, evaluation every {every}"] = saved_learner_sha256(result.directory)
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize(("algo", "env"), CASES)
async def test_stop_and_resume_equals_one_go(config: Make, algo: str, env: str, degree: int) -> None:
    whole = await aiorl.train(config(algo, env, off_policy_degree=degree))
    halves = config(algo, env, off_policy_degree=degree)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 3:
                run.stop(final_evaluation=False)
    assert 3 <= run.result.updates < whole.updates
    second = await aiorl.train(halves, resume=run.directory)
    assert second.params_sha256 == whole.params_sha256
    assert saved_learner_sha256(second.directory) == saved_learner_sha256(whole.directory)
    assert second.gradient_steps == whole.gradient_steps
