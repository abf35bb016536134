"""Presets are valid configurations, and (long) reach what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plain_loop import plain_loop

from aiorl.algos.base import Learner
from aiorl.config import Config
from aiorl.envs.episodes import run_episodes
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.presets import PRESETS, preset

REACHED = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "MountainCar-v0": -130.0,
    "Pendulum-v1": -300.0,
    "LunarLander-v3": 200.0,
}


@pytest.mark.parametrize(("algo", "env"), PRESETS)
def test_presets_are_valid(algo: str, env: str):
    config = Config.preset(env, algo)
    assert config.algorithm.name == algo
    assert config.total_steps <= 1_000_000
    assert env in REACHED


def test_there_is_none_for_the_unknown_and_a_copy_for_the_known():
    assert preset("ppo", "Nowhere-v0") == {}
    preset("ppo", "CartPole-v1")["ppo"]["gamma"] = 0
    assert preset("ppo", "CartPole-v1")["ppo"]["gamma"] > 0


def final_return(algo: str, env: str, seed: int, degree: int) -> float:
    """Mean return of 20 greedy episodes after the preset's training."""
    config = Config.preset(env, algo).resolve()
    spec = resolve_env(env, in_process=True)
    size: Any = config.group_size
    learner: Learner = plain_loop(
        config.algo, spec, envs=config.envs, group_size=size, steps=config.steps_per_segment, seed=seed,
        rollouts=-(-config.total_steps // config.steps_per_rollout), degree=degree, warmup=config.warmup,
    )  # fmt: skip
    found = probe(spec, size)
    policy = config.algo.policy(found.spaces)
    policy.begin({name: np.array(array) for name, array in learner.weights().items()}, 0, None, 0)
    returns, _ = run_episodes(found.spec, found.spaces, policy, 20, seed, 10)
    return float(returns.mean())


@pytest.mark.long
@pytest.mark.parametrize(("algo", "env"), PRESETS)
def test_presets_reach_what_they_are_for(algo: str, env: str):
    pytest.importorskip("Box2D") if "Lander" in env else None
    assert final_return(algo, env, seed=0, degree=1) >= REACHED[env]
