"""Settings for an environment, by algorithm and environment. Plain data: keys of `Config`, and a table under the algorithm's
name for its own fields. An `env` among them is the form of the environment that the algorithm needs. `docs/results.md` says
what they reach; those that have no row there are other people's settings, and have not been shown to reach anything here."""

from __future__ import annotations

import copy
from typing import Any

from aiorl.algos import algorithm_class
from aiorl.envs.spec import full_id
from aiorl.structs import fields_of

# Hockey: trained on mixtures, with repeated actions and a reward by potential; evaluated in the game as it is, by wins.
_HOCKEY: dict[str, Any] = {
    "total_steps": 1_000_000,
    "envs": 16,
    "segment_length": 16,
    "env_kwargs": {
        "mode": ["NORMAL", "TRAIN_SHOOTING", "TRAIN_SHOOTING", "TRAIN_DEFENSE"],
        "opponent": ["weak", "strong"],
        "frame_skip": 2,
        "shaping": 2.0,
        "shaping_gamma": 0.98,
    },
    "eval_every": 100_000,
    "eval_episodes": 100,
    "eval_top": 3,
    "eval_suites": {
        name: {
            "env_kwargs": {"mode": mode, "opponent": opponent, "frame_skip": 1, "shaping": 0.0, "reward": "outcome"},
        }
        for name, mode, opponent in (
            ("weak", "NORMAL", "weak"), ("strong", "NORMAL", "strong"), ("shooting", "TRAIN_SHOOTING", "still"),
        )
    },
}  # fmt: skip
_HOCKEY_LEARNER: dict[str, Any] = {
    "learning_rate": 5e-4,
    "gamma": 0.98,
    "n_step": 3,
    "update_ratio": 0.06,
    "normalise_obs": True,
    "warmup": 10_000,
    "random_steps": 10_000,
}

# Half of the games against its past, whoever is hard to beat first; whoever joins has held its own against those before.
_HOCKEY_SELFPLAY: dict[str, Any] = {
    **_HOCKEY,
    "env": "aiorl.envs.hockey.selfplay:hockey",
    "env_kwargs": {name: value for name, value in _HOCKEY["env_kwargs"].items() if name != "opponent"},
    "eval_suites": {  # who shoots is the first player
        name: {"env_kwargs": suite["env_kwargs"] | {"swap_seats": name != "shooting"}}
        for name, suite in _HOCKEY["eval_suites"].items()
    },
    "selfplay": {
        "algo": "sac",
        "inner": {**_HOCKEY_LEARNER, "alpha": 0.2},
        "bots": {"weak": 0.2, "strong": 0.2},
        "self_share": 0.1,
        "pool": 8,
        "matchmaking": "hard",
        "admit_every": 100,
        "admit_win_rate": 0.5,
        "admit_games": 30,
    },
}

# Young and Tian 2019 (arXiv 1903.03176) for DQN: a batch of 32 after each frame from 5,000 on, 100,000 frames kept, the
# target copied every 1,000 updates, epsilon to 0.1 over 100,000 frames. Other than there: Adam, and gradients are clipped.
_MINATAR: dict[str, Any] = {"total_steps": 1_000_000, "envs": 8, "segment_length": 4, "eval_episodes": 100}
_MINATAR_LEARNER: dict[str, Any] = {
    "learning_rate": 2.5e-4,
    "batch_size": 32,
    "capacity": 100_000,
    "warmup": 5_000,
    "update_ratio": 1.0,
    "double": False,
    "target_every": 1_000,
    "epsilon_end": 0.1,
    "epsilon_fraction": 0.1,
    "hidden": [128],
    "network": "small",
}

# Mnih et al. 2015, for one game in a million steps of 4 frames: a batch of 32 every 4 steps, rewards clipped, 4 frames seen
# at once. Sizes and rates are those that Stable-Baselines3's zoo has for Atari; the warm-up is shorter.
_ATARI: dict[str, Any] = {"total_steps": 1_000_000, "envs": 8, "segment_length": 16, "frame_stack": 4, "eval_episodes": 10}
_ATARI_LEARNER: dict[str, Any] = {
    "learning_rate": 1e-4,
    "batch_size": 32,
    "capacity": 100_000,
    "warmup": 10_000,
    "update_ratio": 0.25,
    "double": False,
    "reward_clip": 1.0,
    "target_every": 250,
    "epsilon_end": 0.01,
    "epsilon_fraction": 0.1,
    "hidden": [512],
    "network": "nature",
}

# What one core learns in less than two hours: two convolutions, more gradient steps on fewer frames, and of Hessel et al.
# 2018 (arXiv 1710.02298) dueling heads, three-step returns and priorities. Double Q-learning is left out, which looks at
# each batch once more.
_PONG: dict[str, Any] = {**_ATARI, "total_steps": 450_000, "segment_length": 8, "eval_every": 25_000, "eval_episodes": 5}
_PONG_LEARNER: dict[str, Any] = {
    **_ATARI_LEARNER,
    "learning_rate": 2e-4,
    "adam_eps": 1e-5,
    "capacity": 200_000,
    "update_ratio": 0.5,
    "n_step": 3,
    "priority_exponent": 0.5,
    "target_every": 500,
    "epsilon_fraction": 0.12,
    "hidden": [128],
    "network": "light",
    "dueling": True,
}

# SAC's own defaults after 10,000 random env steps, as Stable-Baselines3's zoo has it for MuJoCo.
_MUJOCO: dict[str, Any] = {
    "total_steps": 300_000,
    "envs": 2,
    "segment_length": 4,
    "eval_episodes": 10,
    "sac": {"capacity": 300_000, "warmup": 10_000, "random_steps": 10_000},
}

# Rates and discounts are those of Stable-Baselines3's zoo, without its state-dependent exploration, and with more
# environments. Its gradient step for each env step takes long, so BipedalWalker has half as many. LunarLander needs them:
# with a quarter it learns to hover until its time is up, and stays there.
_BOX2D: dict[str, Any] = {"total_steps": 500_000, "envs": 8, "segment_length": 4}
_BOX2D_LEARNER: dict[str, Any] = {
    "learning_rate": 7.3e-4,
    "warmup": 10_000,
    "random_steps": 10_000,
    "hidden": [400, 300],
}

# Objects, colours and states are small integers: normalised, a plain network learns from them.
_MINIGRID: dict[str, Any] = {
    "envs": 16,
    "segment_length": 128,
    "ppo": {"learning_rate": 1e-3, "minibatches": 8, "entropy_coef": 0.01, "normalise_obs": True},
}

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
        "total_steps": 990_000,  # 242 whole rollouts: the last one ends before a million
        "envs": 16,
        "segment_length": 256,
        "ppo": {
            "learning_rate": 5e-4,
            "gamma": 0.999,
            "gae_lambda": 0.98,
            "minibatches": 16,
            "entropy_coef": 0.01,
            "normalise_rewards": True,
        },
    },
    ("ppo", "MiniGrid-Empty-8x8-v0"): {"total_steps": 100_000, **_MINIGRID},
    ("ppo", "MiniGrid-DoorKey-5x5-v0"): {"total_steps": 200_000, **_MINIGRID},
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
            "capacity": 100_000,
            "update_ratio": 0.1,
            "target_every": 100,
        },
    },
    ("qrdqn", "CartPole-v1"): {
        "total_steps": 300_000,
        "envs": 8,
        "segment_length": 32,
        "qrdqn": {
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
            "capacity": 100_000,
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
    ("sac", "HalfCheetah-v5"): _MUJOCO,
    ("sac", "Hopper-v5"): _MUJOCO,
    ("sac", "LunarLanderContinuous-v3"): {
        **_BOX2D,
        "total_steps": 150_000,
        "sac": {**_BOX2D_LEARNER, "hidden": [256, 256], "anneal": True, "tau": 0.01, "capacity": 150_000},
    },
    ("sac", "BipedalWalker-v3"): {
        **_BOX2D,
        "sac": {**_BOX2D_LEARNER, "gamma": 0.98, "tau": 0.02, "capacity": 300_000, "update_ratio": 0.5},
    },
    **{
        (algo, f"MinAtar/{game}-v1"): {**_MINATAR, algo: _MINATAR_LEARNER}
        for algo in ("dqn", "qrdqn") for game in ("Breakout", "Asterix")
    },
    ("dqn", "ALE/Pong-v5"): {**_PONG, "dqn": _PONG_LEARNER},
    ("sac", "aiorl/Hockey-v0"): {**_HOCKEY, "sac": {**_HOCKEY_LEARNER, "alpha": 0.2}},
    ("td3", "aiorl/Hockey-v0"): {**_HOCKEY, "td3": {**_HOCKEY_LEARNER, "noise": 0.2}},
    ("selfplay", "aiorl/Hockey-v0"): _HOCKEY_SELFPLAY,
}


def preset(algo: str, env: str) -> dict[str, Any]:
    """The settings for an algorithm and an environment, as a copy; empty if there are none.

    Atari games without settings of their own share those of Mnih et al. 2015.
    """
    name = full_id(env)
    shared = algo in ("dqn", "qrdqn") and name.startswith("ALE/") and "-ram" not in name
    return copy.deepcopy(PRESETS.get((algo, name), {**_ATARI, algo: _ATARI_LEARNER} if shared else {}))


def suited(settings: dict[str, Any], algo: str, inner: Any) -> dict[str, Any]:
    """A preset of `algo` for another algorithm within, if `inner` names one: what that has no setting for is left out."""
    own: dict[str, Any] = settings.get(algo, {})
    if not isinstance(inner, str) or inner == own.get("algo", inner):
        return settings
    known = {field.name for field in fields_of(algorithm_class(inner))}
    kept = {name: value for name, value in own["inner"].items() if name in known}
    return {**settings, algo: {**own, "algo": inner, "inner": kept}}
