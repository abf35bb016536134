"""An algorithm of your own in one file: REINFORCE (Williams 1992) with linear policy and baseline, in plain NumPy.

python -m aiorl train CartPole-v1 --algo examples.custom_algorithm:Reinforce --off-policy-degree 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np

from aiorl import ConfigError, LearnerContext
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout


class Reinforce(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration: its fields become flags (`--reinforce.gamma`) and keys of `[reinforce]` in a TOML file."""

    name: ClassVar[str] = "reinforce"
    default_segment_length: ClassVar[int] = 128

    learning_rate: float = 5.0  # advantages are normalised and features small, so steps may be large
    gamma: float = 0.99

    @property
    def corrects_staleness(self) -> bool:
        return False  # plain policy gradients hold only for the policy that acted

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError(f"reinforce needs a Discrete action space, not {spaces.action.kind}")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {}  # nothing has to be remembered with an action

    def policy(self, spaces: Spaces) -> SoftmaxPolicy:
        return SoftmaxPolicy(spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> ReinforceLearner:
        return ReinforceLearner(self, spaces)


def features(spaces: Spaces, obs: Mapping[str, Array]) -> Array:
    """Observation leaves […, *shape] to [..., features + 1], the last one constant."""
    x = spaces.encode(obs).astype(np.float64)
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)


class SoftmaxPolicy:
    """The acting half: runs in the workers."""

    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces

    def begin(self, weights: Mapping[str, Array], rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._theta, self._rng = weights["theta"], rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        logits = features(self._spaces, obs) @ self._theta  # [N, actions]
        if self._rng is not None:  # adding Gumbel noise and taking the largest is a draw from the softmax
            logits = logits + self._rng.gumbel(size=logits.shape)
        return logits.argmax(axis=-1), {}


class ReinforceLearner:
    """The learning half: runs on the learner thread."""

    def __init__(self, config: Reinforce, spaces: Spaces) -> None:
        self._spaces, self._gamma, self._learning_rate = spaces, config.gamma, config.learning_rate
        self._theta = np.zeros((spaces.features + 1, spaces.action.features))
        self._baseline = np.zeros(spaces.features + 1)

    def update(self, rollout: Rollout) -> dict[str, float]:
        x = features(self._spaces, {name: leaf[:-1] for name, leaf in rollout.obs.items()})  # [T, B, features + 1]
        returns = self._returns(rollout)  # [T, B]
        valid = rollout.column("valid")
        x, g, action = x[valid], returns[valid], rollout.column("action")[valid]
        advantage = g - x @ self._baseline
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        chosen = np.eye(self._theta.shape[1])[action]
        gradient = x.T @ (advantage[:, None] * (chosen - softmax(x @ self._theta))) / len(x)
        self._theta += self._learning_rate * gradient
        self._baseline = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ g)  # least squares, for the next rollout
        return {"gradient_steps": 1.0, "gradient_norm": float(np.linalg.norm(gradient))}

    def _returns(self, rollout: Rollout) -> Array:
        """Discounted return of each row; the baseline says what follows a cut: by truncation, by the segment's end, or by a
        row that is no transition."""
        after = features(self._spaces, rollout.next_obs()) @ self._baseline
        terminated, truncated = rollout.column("terminated"), rollout.column("truncated").copy()
        truncated[:-1] |= ~rollout.column("valid")[1:]
        returns, following = rollout.column("reward").copy(), after[-1]
        for t in reversed(range(rollout.steps)):
            following = np.where(terminated[t], 0.0, np.where(truncated[t], after[t], following))
            following = returns[t] = returns[t] + self._gamma * following
        return returns

    def weights(self) -> dict[str, Array]:
        return {"theta": self._theta}

    def state_dict(self) -> dict[str, Any]:
        return {"theta": self._theta.copy(), "baseline": self._baseline.copy(), "learning_rate": self._learning_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["theta"].shape != self._theta.shape:
            raise ValueError(f"theta: shape {state['theta'].shape}, expected {self._theta.shape}")
        self._theta, self._baseline = state["theta"].copy(), state["baseline"].copy()
        self._learning_rate = state["learning_rate"]

    def set(self, **changes: float) -> None:
        if set(changes) != {"learning_rate"}:
            raise ValueError(f"cannot change {', '.join(changes)}; reinforce has: learning_rate")
        self._learning_rate = changes["learning_rate"]


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
