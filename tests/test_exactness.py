"""The asynchronous run and the plain sequential loop are the same thing, bit for bit, with the real algorithms.

Compared by SHA-256 of everything the learner holds: parameters, optimizer, target network, replay buffer, statistics.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import kill, workers_of
from plain_loop import plain_loop

import aiorl
from aiorl import checkpoint
from aiorl.algos.base import Learner
from aiorl.envs.spec import resolve_env
from aiorl.learning import params_sha256
from aiorl.pacing import Ordered

SEED, STEPS, ENVS, GROUP_SIZE = 5, 32, 8, 2
ALGORITHMS: dict[str, Any] = {
    "ppo": aiorl.PPO(normalise_obs=True, normalise_rewards=True, epochs=2, minibatches=4),
    "dqn": aiorl.DQN(warmup=500, update_ratio=0.1, target_every=20, n_step=3, dueling=True, average=0.9),
    "qrdqn": aiorl.QRDQN(
        warmup=500, update_ratio=0.1, target_every=20, hidden=(32, 32), quantiles=8, priority_exponent=0.6, accumulate=2,
        normalise_obs=True, reward_clip=0.5,
    ),
    "sac": aiorl.SAC(warmup=500, random_steps=300, update_ratio=0.1, hidden=(16, 16), batch_size=32, n_step=3),
    "td3": aiorl.TD3(
        warmup=500, random_steps=300, update_ratio=0.1, hidden=(16, 16), batch_size=32, priority_exponent=0.6,
        normalise_obs=True,
    ),
}
DISCRETE = ("ppo", "dqn")  # those that act in `run_envs`
CASES = [
    ("ppo", "CartPole-v1"), ("dqn", "CartPole-v1"), ("ppo", "Pendulum-v1"), ("dqn", "Acrobot-v1"),
    ("sac", "Pendulum-v1"), ("qrdqn", "CartPole-v1"), pytest.param("td3", "Pendulum-v1", marks=pytest.mark.long),
]  # fmt: skip
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


def run_plain(algo: str, env: str, rollouts: int, degree: int, planned: int, native: bool = True) -> Learner:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return plain_loop(
            ALGORITHMS[algo], resolve_env(env, in_process=True, native=native), envs=ENVS, group_size=GROUP_SIZE,
            steps=STEPS, seed=SEED, rollouts=rollouts, degree=degree, planned_rollouts=planned,
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
    if algo != "ppo":
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


# -- with workers killed -----------------------------------------------------------------------------------------------


async def killed(config: aiorl.Config, chance: random.Random) -> aiorl.Result:
    """The result of a run of which one worker is killed at some moment of its first half."""
    rollouts = -(-config.total_steps // config.steps_per_rollout)
    version = chance.randrange(1, rollouts // 2)
    async with asyncio.timeout(120), aiorl.Run(config) as run:
        async for event in run:
            if event.version >= version:
                kill(chance.choice(workers_of(run).pids[:-1]))
                break
        result = await run.wait()
    assert result.restarts == 1
    assert result.dropped == {}
    assert result.ledger["produced"] == result.ledger["stored"] == result.env_steps
    return result


@pytest.mark.parametrize(("algo", "env", "native"), [("ppo", "CartPole-v1", False), ("dqn", "CartPole-v1", True)])
async def test_a_killed_worker_does_not_change_the_result(config: Make, algo: str, env: str, native: bool) -> None:
    one = config(algo, env, off_policy_degree=1, native_vector=native)
    result = await killed(one, random.Random(env + algo))
    learner = run_plain(algo, env, result.updates, 1, -(-one.total_steps // (STEPS * ENVS)), native)
    assert result.params_sha256 == params_sha256(learner.weights())
    assert saved_learner_sha256(result.directory) == tree_sha256(learner.state_dict())


JITTERY, STEADY = "run_envs:Jittery", "run_envs:Counting"


@pytest.mark.long
@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("algo", DISCRETE)
async def test_one_result_for_each_degree(config: Make, algo: str, degree: int) -> None:
    """Whatever the workers, the delays, the evaluations, and a worker killed or not."""
    seed = int.from_bytes(os.urandom(4), "little")
    chance, hashes = random.Random(seed), set[tuple[str, str]]()
    result = None
    for workers, env, every, dies in itertools.product((1, 2, 4), (STEADY, JITTERY), (0, 300), (False, True)):
        one = config(algo, env, off_policy_degree=degree, workers=workers, eval_every=every)
        result = await (killed(one, chance) if dies else aiorl.train(one))
        hashes.add((result.params_sha256, saved_learner_sha256(result.directory)))
        assert len(hashes) == 1, f"{workers} workers, {env}, evaluation every {every}, killed: {dies} by seed {seed}"
    assert result is not None
    learner = run_plain(algo, STEADY, result.updates, degree, result.updates)
    assert hashes == {(params_sha256(learner.weights()), tree_sha256(learner.state_dict()))}


@pytest.mark.parametrize("violation", ["by arrival", "two groups swapped"])
@pytest.mark.parametrize("algo", DISCRETE)
async def test_another_order_is_another_result(
    config: Make, monkeypatch: pytest.MonkeyPatch, algo: str, violation: str
) -> None:
    """What the tests above compare can differ. Only the order of columns within a rollout is nothing to a replay buffer."""
    ordered = await aiorl.train(config(algo, JITTERY, off_policy_degree=3))
    if violation == "two groups swapped":
        parts = Ordered.parts
        monkeypatch.setattr(Ordered, "parts", lambda self, rollout: parts(self, rollout)[::1 if rollout != 2 else -1])
    schedule = "eager" if violation == "by arrival" else "ordered"
    other = await aiorl.train(config(algo, JITTERY, off_policy_degree=3, schedule=schedule))
    assert (other.updates, other.env_steps) == (ordered.updates, ordered.env_steps)
    # A replay buffer has a lane for each environment, whichever column of a rollout it comes in.
    same = algo == "dqn" and violation == "two groups swapped"
    assert (saved_learner_sha256(other.directory) == saved_learner_sha256(ordered.directory)) is same
    assert (other.params_sha256 == ordered.params_sha256) is same


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
