"""Presets are valid configurations, and (long) reach what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from plain_loop import plain_loop

import aiorl
from aiorl.algos.base import Learner
from aiorl.cli.parse import read_train
from aiorl.config import Config
from aiorl.envs.episodes import run_episodes
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.presets import PRESETS, preset
from bench.results import CASES

REACHED = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "MountainCar-v0": -130.0,
    "Pendulum-v1": -300.0,
    "LunarLander-v3": 200.0,
    "MiniGrid-Empty-8x8-v0": 0.9,
    "MiniGrid-DoorKey-5x5-v0": 0.9,
    "aiorl/Hockey-v0": 0.6,  # games won less games lost, against the weak player
}
# These take hours; docs/results.md says what they reach.
SLOW = {
    "ALE/Pong-v5", "BipedalWalker-v3", "HalfCheetah-v5", "Hopper-v5", "LunarLanderContinuous-v3", "MinAtar/Asterix-v1",
    "MinAtar/Breakout-v1",
}  # fmt: skip
NEEDS = {"BipedalWalker-v3": "Box2D", "LunarLanderContinuous-v3": "Box2D", "HalfCheetah-v5": "mujoco", "Hopper-v5": "mujoco"}
BETTER = {("sac", "Pendulum-v1"): -200.0, ("td3", "Pendulum-v1"): -200.0}  # than others, in far fewer env steps
SLOWER = {("td3", "aiorl/Hockey-v0"): 0.3, ("selfplay", "aiorl/Hockey-v0"): 0.3}


@pytest.mark.parametrize(("algo", "env"), PRESETS)
def test_presets_are_valid(algo: str, env: str):
    config = Config.preset(env, algo)
    assert config.algorithm.name == algo
    assert config.total_steps <= 1_000_000
    assert (env in REACHED) != (env in SLOW)


def test_there_is_none_for_the_unknown_and_a_copy_for_the_known():
    assert preset("ppo", "Nowhere-v0") == {}
    assert preset("sac", "hockey") == preset("sac", "aiorl/Hockey-v0") != {}
    preset("ppo", "CartPole-v1")["ppo"]["gamma"] = 0
    assert preset("ppo", "CartPole-v1")["ppo"]["gamma"] > 0


def test_atari_games_without_settings_of_their_own_share_some():
    for algo in ("dqn", "qrdqn"):
        found = preset(algo, "ALE/Breakout-v5")
        assert (found["frame_stack"], found[algo]["reward_clip"]) == (4, 1.0)
        assert Config.preset("ALE/Breakout-v5", algo).algorithm.name == algo
    assert preset("dqn", "ALE/Pong-v5")["total_steps"] < preset("qrdqn", "ALE/Pong-v5")["total_steps"]
    assert preset("ppo", "ALE/Breakout-v5") == preset("dqn", "ALE/Breakout-ram-v5") == {}


def test_changes_reach_as_deep_as_those_in_a_file(tmp_path: Path):
    changed = Config.preset("hockey", "sac", eval_suites={"weak": {"episodes": 5}}, sac={"gamma": 0.9})
    file = tmp_path / "changes.toml"
    file.write_text('env = "hockey"\nalgo = "sac"\n[sac]\ngamma = 0.9\n[eval_suites.weak]\nepisodes = 5\n')
    request = read_train(["--config", str(file)])
    assert not isinstance(request, str)
    assert changed == request.config
    assert changed.eval_suites["weak"].env_kwargs["opponent"] == "weak"
    assert list(changed.eval_suites) == ["weak", "strong", "shooting"]


@pytest.mark.parametrize("env", NEEDS)
async def test_slow_presets_run(env: str, tmp_path: Path):
    """As they are but for sizes: the environment, its actions, and a gradient step as often as the preset says."""
    pytest.importorskip(NEEDS[env])
    config = Config.preset(env, "sac", total_steps=128, eval_every=0, eval_episodes=1, workers=0, out=str(tmp_path / "run"))
    small = {"warmup": 64, "random_steps": 64, "capacity": 128, "batch_size": 8, "hidden": (16,)}
    result = await aiorl.train(msgspec.structs.replace(config, algo=msgspec.structs.replace(config.algo, **small)))
    ratio: float = preset("sac", env)["sac"].get("update_ratio", 1.0)
    assert (result.env_steps, result.gradient_steps) == (128, 64 * ratio)
    assert result.final_evaluation is not None


def test_results_are_made_with_presets():
    assert {(case.algo, case.env) for case in CASES} <= set(PRESETS)
    assert {env for env in NEEDS} <= {case.env for case in CASES}


def final_return(algo: str, env: str, seed: int, degree: int) -> float:
    """Mean return of 20 greedy episodes after the preset's training."""
    config = Config.preset(env, algo).resolve()
    suites = [suite.environment(config.env, config.env_kwargs) for suite in config.eval_suites.values()]
    spec = resolve_env(config.env, config.env_kwargs, in_process=True)
    size: Any = config.group_size
    learner: Learner = plain_loop(
        config.algo, spec, envs=config.envs, group_size=size, steps=config.steps_per_segment, seed=seed,
        rollouts=-(-config.total_steps // config.steps_per_rollout), degree=degree, warmup=config.warmup,
    )  # fmt: skip
    found = probe(resolve_env(*suites[0], in_process=True) if suites else spec, size)
    policy = config.algo.policy(found.spaces)
    policy.begin({name: np.array(array) for name, array in learner.weights().items()}, 0, None, 0)
    returns, _ = run_episodes(found.spec, found.spaces, policy, 200 if suites else 20, seed, 10)
    return float(returns.mean())


@pytest.mark.long
@pytest.mark.parametrize(("algo", "env"), [key for key in PRESETS if key[1] not in SLOW])
def test_presets_reach_what_they_are_for(algo: str, env: str):
    for package, envs in {"Box2D": ("Lander", "Hockey"), "minigrid": ("MiniGrid",)}.items():
        pytest.importorskip(package) if any(name in env for name in envs) else None
    assert final_return(algo, env, seed=0, degree=1) >= (BETTER | SLOWER).get((algo, env), REACHED[env])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algo", ["sac", "td3"])
async def test_pendulum_is_learned_within_20_000_env_steps(tmp_path: Path, algo: str, seed: int):
    out = str(tmp_path / "run")
    config = Config.preset("Pendulum-v1", algo, seed=seed, stop_at=-180.0, eval_every=1_000, eval_episodes=20, out=out)
    result = await aiorl.train(config)
    assert result.env_steps <= 20_000
    assert result.final_evaluation is not None
    assert result.final_evaluation.mean_return >= -200
