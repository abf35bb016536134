"""A tiny algorithm in NumPy alone: every rollout changes its weights, so any difference in data shows in the hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np

from aiorl.algos.base import LearnerContext, StateTree, Weights
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout


class Toy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Linear scores for discrete actions, pushed by rewards."""

    name: ClassVar[str] = "toy"
    default_segment_length: ClassVar[int] = 8

    learning_rate: float = 0.1
    fail_at: int = -1
    """Update that raises, for tests of failure."""

    @property
    def corrects_staleness(self) -> bool:
        return True

    def check(self, spaces: Spaces) -> None:
        assert spaces.action.kind == "discrete"

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"score": Column((), "float32")}

    def policy(self, spaces: Spaces) -> ToyPolicy:
        return ToyPolicy(spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> ToyLearner:
        return ToyLearner(self, spaces, context)


class ToyPolicy:
    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._w, self._rng = weights["w"], rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        scores = self._spaces.encode(obs) @ self._w
        if self._rng is not None:
            scores = scores + self._rng.gumbel(size=scores.shape)
        action = scores.argmax(-1)
        return action, {"score": np.take_along_axis(scores, action[:, None], 1)[:, 0].astype(np.float32)}


class ToyLearner:
    def __init__(self, config: Toy, spaces: Spaces, context: LearnerContext) -> None:
        self._spaces, self._config = spaces, config
        self._rate = config.learning_rate
        self._w = context.rng(0).normal(size=(spaces.features, spaces.action.nvec[0])).astype(np.float32) * 0.1
        self.updates = 0

    def update(self, rollout: Rollout) -> dict[str, float]:
        if self.updates == self._config.fail_at:
            raise RuntimeError("planned failure")
        features = self._spaces.encode({k: v[:-1] for k, v in rollout.obs.items()})
        valid, reward, action = rollout.column("valid"), rollout.column("reward"), rollout.column("action")
        for a in range(self._w.shape[1]):
            mask = ((action == a) & valid)[..., None]
            self._w[:, a] += self._rate * (features * mask * reward[..., None]).mean((0, 1)).astype(np.float32)
        self._w *= 0.99
        self.updates += 1
        return {"gradient_steps": 1.0, "norm": float(np.linalg.norm(self._w))}

    def weights(self) -> Weights:
        return {"w": self._w}

    def state_dict(self) -> StateTree:
        return {"w": self._w.copy(), "updates": self.updates, "rate": self._rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["w"].shape != self._w.shape:
            raise ValueError(f"w: expected {self._w.shape}, got {state['w'].shape}")
        self._w[...], self.updates, self._rate = state["w"], int(state["updates"]), float(state["rate"])

    def set(self, **changes: float) -> None:
        for name, value in changes.items():
            if name != "learning_rate":
                raise ValueError(f"unknown setting {name!r}")
            self._rate = value
