"""A replay learner of your own in one file: double DQN (van Hasselt et al. 2016) with one hidden layer, in plain NumPy.

python -m aiorl train CartPole-v1 --algo examples.custom_replay:TinyDQN --steps 60k
python -m aiorl doctor CartPole-v1 --algo examples.custom_replay:TinyDQN
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import msgspec
import numpy as np

from aiorl import ConfigError, LearnerContext, TrainingError
from aiorl.buffers.replay import Replay, gradient_steps_owed
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout

Parameters = dict[str, Array]
INIT, SAMPLE = 0, 1  # what random numbers are for


class TinyDQN(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration. What has a name that `aiorl doctor` knows (`target_every`, `n_step`, ...) is checked by it."""

    name: ClassVar[str] = "tiny_dqn"
    default_segment_length: ClassVar[int] = 8  # a burst of gradient steps for every envs x 8 env steps

    learning_rate: float = 1e-3
    hidden: int = 64
    batch_size: int = 64
    capacity: int = 50_000
    warmup: int = 1_000
    update_ratio: float = 0.25
    gamma: float = 0.99
    n_step: int = 1
    target_every: int = 250  # gradient steps
    epsilon: float = 0.1

    @property
    def corrects_staleness(self) -> bool:
        return True  # one-step targets hold whoever acted

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError(f"tiny_dqn needs a Discrete action space, not {spaces.action.kind}")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {}  # nothing has to be remembered with an action

    def policy(self, spaces: Spaces) -> EpsilonGreedy:
        return EpsilonGreedy(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> TinyDQNLearner:
        return TinyDQNLearner(self, spaces, context)


def values(parameters: Mapping[str, Array], x: Array) -> tuple[Array, Array]:
    """Features [N, F] to the hidden layer [N, H] and action values [N, A]: one function for acting and learning."""
    hidden = np.maximum(x @ parameters["w1"] + parameters["b1"], 0)
    return hidden, hidden @ parameters["w2"] + parameters["b2"]


class EpsilonGreedy:
    """The acting half: runs in the workers."""

    def __init__(self, config: TinyDQN, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces

    def begin(self, weights: Mapping[str, Array], rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._weights, self._rng = weights, rng

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        _, q = values(self._weights, self._spaces.encode(obs))
        action = q.argmax(axis=-1)
        if self._rng is not None:
            explores = self._rng.random(len(q)) < self._config.epsilon
            action = np.where(explores, self._rng.integers(q.shape[1], size=len(q)), action)
        return action, {}


class TinyDQNLearner:
    """The learning half: runs on the learner thread."""

    def __init__(self, config: TinyDQN, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        self._warmup = config.warmup if context.warmup is None else context.warmup  # `--warmup` goes before
        self._learning_rate = config.learning_rate
        self._replay = Replay(spaces, context.envs, config.capacity)
        self._steps = 0  # gradient steps done
        rng, sizes = context.rng(INIT), (spaces.features, config.hidden, spaces.action.features)
        self._parameters: Parameters = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            bound = fan_in**-0.5
            self._parameters[f"w{i}"] = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
            self._parameters[f"b{i}"] = rng.uniform(-bound, bound, fan_out).astype(np.float32)
        self._target = copy(self._parameters)
        self._first, self._second = ({k: np.zeros_like(p) for k, p in self._parameters.items()} for _ in range(2))

    def update(self, rollout: Rollout) -> dict[str, float]:
        config = self._config
        self._replay.add(rollout)
        owed = gradient_steps_owed(self._replay.env_steps, self._warmup, config.update_ratio) - self._steps
        told: dict[str, float] = {"gradient_steps": float(owed), "learning_rate": self._learning_rate}
        rng = self._context.rng(SAMPLE, rollout.index)  # so that a resumed run draws what one without a stop draws
        for _ in range(owed):
            self._context.go_on()  # a pause or an end of the run need not wait for all of them
            told |= self._gradient_step(rng)
            self._steps += 1
            if self._steps % config.target_every == 0:
                self._target = copy(self._parameters)
        return told

    def _gradient_step(self, rng: np.random.Generator) -> dict[str, float]:
        config, n = self._config, np.arange(self._config.batch_size)
        batch = self._replay.sample(rng, config.batch_size, n=config.n_step, gamma=config.gamma)
        x, following = self._spaces.encode(batch.obs), self._spaces.encode(batch.next_obs)
        best = values(self._parameters, following)[1].argmax(axis=-1)
        after = values(self._target, following)[1][n, best]
        # `discounts` is gamma to the number of steps that a window has: 0 where it terminated, not where it was truncated.
        target = (batch.returns + batch.discounts * after).astype(np.float32)
        hidden, q = values(self._parameters, x)
        error = q[n, batch.action] - target
        d_q = np.zeros_like(q)
        d_q[n, batch.action] = np.clip(error, -1, 1) / len(n)  # of the Huber loss
        d_hidden = d_q @ self._parameters["w2"].T * (hidden > 0)
        gradient = {"w2": hidden.T @ d_q, "b2": d_q.sum(0), "w1": x.T @ d_hidden, "b1": d_hidden.sum(0)}
        norm = float(np.sqrt(sum(np.square(g).sum() for g in gradient.values())))
        if not np.isfinite(norm):
            raise TrainingError(f"gradient step {self._steps} is not finite\n  lower tiny_dqn.learning_rate")
        self._adam(gradient)
        return {"grad_norm": norm, "td_error": float(np.abs(error).mean()), "q_mean": float(q.mean())}

    def _adam(self, gradient: Parameters) -> None:
        step = self._steps + 1
        for name, g in gradient.items():
            self._first[name] = 0.9 * self._first[name] + 0.1 * g
            self._second[name] = 0.999 * self._second[name] + 0.001 * g * g
            scale = np.sqrt(self._second[name] / (1 - 0.999**step)) + 1e-8
            self._parameters[name] -= self._learning_rate * self._first[name] / (1 - 0.9**step) / scale

    def weights(self) -> Parameters:
        return self._parameters

    def state_dict(self) -> dict[str, Any]:
        return {**{name: copy(tree) for name, tree in self._trees().items()}, "replay": self._replay.state_dict(),
                "steps": self._steps, "learning_rate": self._learning_rate}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tree in self._trees().items():
            for key, array in tree.items():
                if state[name][key].shape != array.shape:
                    raise ValueError(f"{name}.{key}: shape {state[name][key].shape}, expected {array.shape}")
            tree |= copy(state[name])
        self._replay.load_state_dict(state["replay"])
        self._steps, self._learning_rate = state["steps"], state["learning_rate"]

    def _trees(self) -> dict[str, Parameters]:
        return {"parameters": self._parameters, "target": self._target, "first": self._first, "second": self._second}

    def set(self, **changes: float) -> None:
        if set(changes) != {"learning_rate"}:
            raise ValueError(f"cannot change {', '.join(changes)}; tiny_dqn has: learning_rate")
        self._learning_rate = changes["learning_rate"]


def copy(tree: Parameters) -> Parameters:
    return {name: array.copy() for name, array in tree.items()}
