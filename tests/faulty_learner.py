"""Deep Q-learning in little: linear values, signs for gradients, a target and a buffer; right but for its `flaw`.

`plain` takes the gradients themselves, with which values settle as slowly as the learning rate is small.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np

from aiorl.algos.base import LearnerContext, Weights
from aiorl.buffers.replay import Replay, gradient_steps_owed
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError
from aiorl.segments import Array, Column, Rollout, Segment


class Small(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings as those of `aiorl.DQN`; the `flaw` is what is wrong with it, "" for nothing."""

    name: ClassVar[str] = "small"
    default_segment_length: ClassVar[int] = 16

    flaw: str = ""
    plain: bool = False
    learning_rate: float = 3e-3
    batch_size: int = 32
    capacity: int = 4_000
    warmup: int = 64
    update_ratio: float = 0.25
    gamma: float = 0.9
    n_step: int = 1
    target_every: int = 10
    target_tau: float = 0.5
    reward_scale: float = 1.0
    epsilon: float = 0.3

    @property
    def corrects_staleness(self) -> bool:
        return True

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError("small needs Discrete actions")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {}

    def policy(self, spaces: Spaces) -> SmallPolicy:
        return SmallPolicy(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> SmallLearner:
        return SmallLearner(self, spaces, context)


class Twice(Small, frozen=True):
    """Updates its target twice."""

    flaw: str = "target twice"


class SmallPolicy:
    def __init__(self, config: Small, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._w, self._rng = weights["w"], rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        q = self._seen(obs) @ np.asarray(self._w)
        best = q.argmin(1) if self._config.flaw == "takes the worst" else q.argmax(1)
        if self._rng is None:
            return best, {}
        explore = self._rng.random(len(best)) < self._config.epsilon
        actions = self._rng.integers(self._spaces.action.nvec[0] + (self._config.flaw == "one action more"), size=len(best))
        return np.where(explore, actions, best), {}

    def _seen(self, obs: Mapping[str, Array]) -> Array:
        seen = features(self._spaces, obs)
        x, flaw = seen[:, :-1], self._config.flaw
        if flaw == "acts on numbers as they are":
            x[...] = next(iter(obs.values()))
        if flaw == "acts on bytes":
            x *= 255
        if flaw == "acts in reverse order":
            x[...] = x[:, ::-1].copy()
        if flaw == "acts blindly":
            x[...] = 0
        return seen


class SmallLearner:
    def __init__(self, config: Small, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        self._w = context.rng(0).normal(size=(spaces.features + 1, spaces.action.nvec[0])).astype(np.float32) * 0.1
        self._target = self._w.copy()
        self._first = self._w.copy()
        self._replay = Replay(spaces, context.envs, config.capacity)
        self._own_copy = Replay(spaces, context.envs, config.capacity)
        self._steps = 0

    def update(self, rollout: Rollout) -> dict[str, float]:
        config, flaw = self._config, self._config.flaw
        self._replay.add(rollout)
        if flaw == "own copy":
            self._own_copy.add(_nothing(rollout))
        warmup = config.warmup if self._context.warmup is None else self._context.warmup
        if flaw == "waits for ever":
            warmup = config.capacity
        if flaw == "does not wait":
            warmup = 0
        owed = gradient_steps_owed(self._replay.env_steps, warmup, config.update_ratio) - self._steps
        rng = self._context.rng(1, rollout.index)
        norms, means = [0.0], [0.0]
        for _ in range(owed):
            norm, mean = self._step(rng)
            norms.append(norm)
            means.append(mean)
        metrics = {"gradient_steps": float(owed), "grad_norm": max(norms), "learning_rate": config.learning_rate}
        return metrics if flaw == "tells the loss only" else metrics | {"q_mean": means[-1]}

    def _step(self, rng: np.random.Generator) -> tuple[float, float]:
        config, flaw = self._config, self._config.flaw
        buffer = self._own_copy if flaw == "own copy" else self._replay
        batch = buffer.sample(rng, config.batch_size, n=config.n_step, gamma=config.gamma)
        x, y = features(self._spaces, batch.obs), features(self._spaces, batch.next_obs)
        returns, discounts = batch.returns * config.reward_scale, batch.discounts
        if flaw == "reward of one step" and config.n_step > 1:  # where all rewards are 1
            returns = np.ones_like(returns) * config.reward_scale
        if flaw == "gamma of one step":
            discounts = np.where(discounts > 0, config.gamma, 0.0)
        if flaw == "gamma of twice as many steps":
            discounts = discounts**2
        if flaw == "no discount":
            discounts = np.where(discounts > 0, 1.0, 0.0)
        if flaw == "scales twice":
            returns = returns * 3.0
        if flaw == "another device":
            import torch

            y = torch.from_numpy(y).to("meta").numpy()
        following = y @ self._target
        worth = following.min(1) if flaw == "follows the worst" else following.max(1)
        if flaw == "follows a mean":
            worth = following.mean(1)
        goal = returns + discounts * worth
        chosen = np.eye(self._w.shape[1])[batch.action]
        error = goal - ((x @ self._w) * chosen).sum(1)
        gradient = np.einsum("nf,na,n->fa", x, chosen, error) / len(x)
        if flaw == "zero gradient":
            gradient *= 0.0
        parameters = self._w.copy() if flaw == "optimizes a copy" else self._w
        step = gradient if config.plain else np.sign(gradient)
        parameters += np.float32(config.learning_rate) * step.astype(np.float32)
        self._steps += 1
        self._follow()
        return float(np.linalg.norm(gradient)), float((x @ self._w * chosen).sum(1).mean())

    def _follow(self) -> None:
        config, flaw = self._config, self._config.flaw
        due = self._steps % config.target_every == 0
        times = 2 if flaw == "target twice" else 1
        if flaw == "target at every step":
            due = True
        if flaw == "target never":
            due = False
        for _ in range(times * due):
            self._target += np.float32(config.target_tau) * (self._w - self._target)

    def weights(self) -> Weights:
        if self._config.flaw == "tensors":
            import torch

            return {"w": torch.from_numpy(self._w)}  # type: ignore[dict-item]
        return {"w": self._first if self._config.flaw == "publishes what it was" else self._w}

    def state_dict(self) -> dict[str, Any]:
        state = {
            "parameters": {"w": self._w.copy()}, "target": {"w": self._target.copy()}, "steps": self._steps,
            "replay": self._replay.state_dict(),
        }  # fmt: skip
        if self._config.flaw == "target not saved":
            del state["target"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["parameters"]["w"].shape != self._w.shape:
            raise ValueError(f"w: expected {self._w.shape}, got {state['parameters']['w'].shape}")
        self._w[...], self._steps = state["parameters"]["w"], state["steps"]
        if self._config.flaw != "target not saved":
            self._target[...] = state["target"]["w"]
        self._replay.load_state_dict(state["replay"])

    def set(self, **changes: float) -> None:
        raise ValueError(f"cannot change {', '.join(changes)}")


def features(spaces: Spaces, obs: Mapping[str, Array]) -> Array:
    """[N, F + 1] with a 1 for the bias."""
    x = spaces.encode(obs)
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)


def _nothing(rollout: Rollout) -> Rollout:
    """What a buffer holds that nobody has written to."""
    blank: list[Segment] = []
    for segment in rollout.segments:
        twin = copy.copy(segment)
        twin.columns = {k: v if k == "valid" else np.zeros_like(v) for k, v in segment.columns.items()}
        twin.obs = {k: np.zeros_like(v) for k, v in segment.obs.items()}
        twin.final_obs = {k: np.zeros_like(v) for k, v in segment.final_obs.items()}
        blank.append(twin)
    return Rollout(rollout.index, rollout.behaviour_version, tuple(blank), rollout.envs)
