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
        "ppo": {"learning_rate": 1e-3, "gamma": 0.99, "gae_lambda": 0.95, "epochs": 4, "minibatches": 8},
    },
}


def preset(algo: str, env: str) -> dict[str, Any]:
    """The settings for an algorithm and an environment, as a copy; empty if there are none."""
    return copy.deepcopy(PRESETS.get((algo, env), {}))
