"""An algorithm for central inference that notices every wrong answer: another version's, another group's, a stale one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from aiorl.algos.base import Forward, LearnerContext, Weights
from aiorl.envs.spaces import Spaces
from aiorl.lazy import LazyModule
from aiorl.segments import Array
from aiorl.testing import Mark
from aiorl.testing.ledger_env import MarkLearner

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # workers need none


class Stamped(Mark, frozen=True):
    """Its network answers with the weights' stamp and the features themselves; which action follows depends on both."""

    name: ClassVar[str] = "stamped"

    def policy(self, spaces: Spaces) -> StampedPolicy:
        return StampedPolicy(spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> StampedLearner:
        return StampedLearner(context.seed)

    def forward(self, spaces: Spaces) -> Forward:
        return Forward(spaces.features, spaces.features + 1, _apply)


def _apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([weights["stamp"].expand(len(x), 1), x], 1)


class StampedPolicy:
    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces
        self._rng: np.random.Generator | None = None
        self._stamp = np.zeros(1, np.float32)
        self._seen = np.zeros((0, 0), np.float32)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._stamp, self._rng = weights["stamp"], rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        seen = self.features(obs, first)
        return self.choose(np.concatenate([np.broadcast_to(self._stamp, (len(seen), 1)), seen], 1))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        self._seen = self._spaces.encode(obs).copy()
        return self._seen

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        if not (outputs[:, 0] == self._stamp).all():
            raise RuntimeError(f"asked for stamp {self._stamp}, got {outputs[:, 0]}")
        if outputs[:, 1:].tobytes() != self._seen.tobytes():
            raise RuntimeError(f"asked about {self._seen}, got {outputs[:, 1:]}")
        actions = int(self._spaces.action.nvec[0])
        chance = 0 if self._rng is None else self._rng.integers(0, actions, len(outputs))
        return (chance + outputs.astype(np.int64).sum(1)) % actions, {}


class StampedLearner(MarkLearner):
    def weights(self) -> Weights:
        return {**super().weights(), "stamp": (self._mark[:1] % 2**20).astype(np.float32)}


class Broken(Stamped, frozen=True):
    """Its network does as `how` says: raises, or answers in another shape."""

    name: ClassVar[str] = "broken"
    how: str = "raise"

    def forward(self, spaces: Spaces) -> Forward:
        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            if self.how == "raise":
                raise ZeroDivisionError("the matrix broke")
            return _apply(weights, x)[:, :-1]

        return super().forward(spaces)._replace(apply=apply)


class Stuck(Stamped, frozen=True):
    """Its network answers when the test lets it."""

    name: ClassVar[str] = "stuck"
    begun: ClassVar[threading.Event]
    go_on: ClassVar[threading.Event]

    def forward(self, spaces: Spaces) -> Forward:
        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            Stuck.begun.set()
            Stuck.go_on.wait(60)
            return _apply(weights, x)

        return super().forward(spaces)._replace(apply=apply)
