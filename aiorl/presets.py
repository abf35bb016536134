"""Settings that are known to solve an environment, by algorithm and environment. Plain data: keys of `Config`, and a table
under the algorithm's name for its own fields. `docs/results.md` says what they reach."""

from __future__ import annotations

import copy
from typing import Any

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "total_steps": 200_000,
        "envs": 16,
        "segment_length": 128,
        "ppo": {"learning_rate": 2e-3, "gamma": 0.98, "gae_lambda": 0.8},
    },
    ("ppo", "Acrobot-v1"): {
        "total_steps": 500_000,
        "envs": 16,
        "segment_length": 256,
        "ppo": {
            "learning_rate": 1e-3,
            "gae_lambda": 0.94,
            "minibatches": 16,
            "entropy_coef": 0.01,
            "normalise_obs": True,
            "normalise_rewards": True,
        },
    },
    ("ppo", "Pendulum-v1"): {
        "total_steps": 300_000,
        "envs": 16,
        "segment_length": 128,
        "ppo": {"learning_rate": 1e-3, "gamma": 0.9, "epochs": 10},
    },
    ("ppo", "MountainCar-v0"): {
        "total_steps": 1_000_000,
        "envs": 16,
        "segment_length": 16,
        "ppo": {
            "learning_rate": 5e-4,
            "gae_lambda": 0.98,
            "minibatches": 4,
            "normalise_obs": True,
            "normalise_rewards": True,
        },
    },
    ("ppo", "LunarLander-v3"): {
        "total_steps": 990_000,  # 121 whole rollouts: the last one ends before a million
        "envs": 16,
        "segment_length": 512,
        "ppo": {
            "learning_rate": 5e-4,
            "gamma": 0.999,
            "gae_lambda": 0.98,
            "minibatches": 32,
            "entropy_coef": 0.01,
            "normalise_rewards": True,
        },
    },
    ("dqn", "CartPole-v1"): {
        "total_steps": 300_000,
        "envs": 8,
        "segment_length": 32,
        "dqn": {
            "learning_rate": 1e-3,
            "anneal": True,
            "gamma": 0.98,
            "n_step": 3,
            "batch_size": 128,
            "capacity": 20_000,
            "update_ratio": 0.1,
            "target_every": 100,
        },
    },
    ("dqn", "Acrobot-v1"): {
        "total_steps": 100_000,
        "envs": 8,
        "segment_length": 32,
        "dqn": {
            "learning_rate": 7e-4,
            "anneal": True,
            "n_step": 3,
            "batch_size": 128,
            "capacity": 50_000,
            "update_ratio": 0.25,
            "target_every": 250,
        },
    },
    ("sac", "Pendulum-v1"): {
        "total_steps": 20_000,
        "envs": 4,
        "segment_length": 4,
        "sac": {"learning_rate": 1e-3, "capacity": 20_000},
    },
    ("td3", "Pendulum-v1"): {
        "total_steps": 20_000,
        "envs": 4,
        "segment_length": 4,
        "td3": {"gamma": 0.98, "capacity": 20_000},
    },
}


def preset(algo: str, env: str) -> dict[str, Any]:
    """The settings for an algorithm and an environment, as a copy; empty if there are none."""
    return copy.deepcopy(PRESETS.get((algo, env), {}))
