"""Deep Q-learning (Mnih et al. 2015) with double Q-learning, dueling heads, n-step returns and a Huber loss.

Papers: double, van Hasselt et al. 2016 (arXiv 1509.06461); dueling, Wang et al. 2016 (1511.06581); together, Hessel et al.
2018 (1710.02298). Departures: the gradient is clipped by its norm; `update_ratio` gradient steps for each env step stored
after warm-up, exactly, done rollout by rollout; epsilon is a function of the rollout index.

Which version acted does not matter to one-step targets, so any staleness is sound; n-step returns leave it uncorrected, as
they do for everything else in the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from aiorl.acting import MLP, NoiseTape
from aiorl.algos.base import Forward, LearnerContext, StateTree, Weights
from aiorl.buffers.replay import Batch, Replay, gradient_steps_owed
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError, NonFiniteError
from aiorl.lazy import LazyModule
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch

    from aiorl import losses, networks
else:
    torch, losses, networks = LazyModule("torch"), LazyModule("aiorl.losses"), LazyModule("aiorl.networks")

INIT, SAMPLE = 0, 1  # what a learner's random numbers are for
_PARTS = ("loss", "q_mean", "target_mean", "grad_norm")
_ADVICE = "lower dqn.learning_rate, or update the target less often (dqn.target_every)"
Positive = Annotated[float, Meta(gt=0)]


class DQN(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of DQN. Every `target_every` gradient steps, target += target_tau * (online - target)."""

    name: ClassVar[str] = "dqn"
    default_segment_length: ClassVar[int] = 32
    default_error_target: ClassVar[float] = 0.2  # share of greedy actions that the newest network would not take

    learning_rate: Annotated[float, Meta(description="Adam's step size", gt=0)] = 5e-4
    anneal: Annotated[bool, Meta(description="let the learning rate fall linearly to 0 over the run")] = False
    batch_size: Annotated[int, Meta(description="transitions per gradient step", ge=1)] = 64
    capacity: Annotated[int, Meta(description="transitions in the replay buffer", ge=1)] = 100_000
    warmup: Annotated[int, Meta(description="env steps stored before the first gradient step", ge=0)] = 1_000
    update_ratio: Annotated[float, Meta(description="gradient steps per env step after warm-up", ge=0)] = 0.25
    gamma: Annotated[float, Meta(description="discount per step", ge=0, le=1)] = 0.99
    n_step: Annotated[int, Meta(description="rewards summed before bootstrapping", ge=1)] = 1
    double: Annotated[bool, Meta(description="let the online network choose the next action")] = True
    dueling: Annotated[bool, Meta(description="state value and advantages as separate heads")] = False
    huber_delta: Annotated[
        Positive | None, Meta(description="error from which the loss grows linearly (None: squared error)")
    ] = 1.0
    target_every: Annotated[int, Meta(description="gradient steps between target updates", ge=1)] = 250
    target_tau: Annotated[float, Meta(description="share taken over by each target update (1: a copy)", gt=0, le=1)] = 1.0
    epsilon_start: Annotated[float, Meta(description="share of random actions at first", ge=0, le=1)] = 1.0
    epsilon_end: Annotated[float, Meta(description="and in the end", ge=0, le=1)] = 0.05
    epsilon_fraction: Annotated[float, Meta(description="share of the run over which it falls", ge=0, le=1)] = 0.2
    max_grad_norm: Annotated[float, Meta(description="longest gradient", gt=0)] = 10.0
    hidden: Annotated[tuple[int, ...], Meta(description="sizes of the hidden layers", min_length=1)] = (128, 128)
    activation: Annotated[Literal["tanh", "relu"], Meta(description="after each hidden layer")] = "relu"
    adam_eps: Annotated[float, Meta(description="Adam's epsilon", gt=0)] = 1e-8

    @property
    def corrects_staleness(self) -> bool:
        return True

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError unless the action space is Discrete."""
        if spaces.action.kind != "discrete":
            kind = {"box": "Box", "multi_discrete": "MultiDiscrete"}.get(spaces.action.kind, spaces.action.kind)
            raise ConfigError(f"dqn needs a Discrete action space, this environment has {kind}\n  use ppo: it acts in all")
        if spaces.features == 0:
            raise ConfigError("dqn: the observation space is empty (shape with a 0): there is nothing to learn")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"greedy": Column((), "int64")}

    def policy(self, spaces: Spaces) -> DQNPolicy:
        return DQNPolicy(self, spaces)

    def forward(self, spaces: Spaces) -> Forward:
        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            x = networks.apply_mlp(weights, "torso", self.activation, x, activate_last=True)
            return networks.apply_mlp(weights, "advantage", self.activation, x)

        return Forward(spaces.features, spaces.action.nvec[0], apply)

    def learner(self, spaces: Spaces, context: LearnerContext) -> DQNLearner:
        return DQNLearner(self, spaces, context)


def epsilon_at(rollout: int, schedule: Array) -> float:
    """Share of random actions in a rollout. `schedule` = (start, end, rollouts over which it falls linearly)."""
    start, end, over = (float(x) for x in schedule)
    done = min(1.0, rollout / over) if over > 0 else 1.0
    return start + done * (end - start)


class DQNPolicy:
    """The acting half: epsilon-greedy. Its weights are the network's and `epsilon`, the schedule."""

    def __init__(self, config: DQN, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces
        self._noise = NoiseTape(self._draw)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._torso = MLP(weights, "torso", self._config.activation, activate_last=True)
        self._head = MLP(weights, "advantage", self._config.activation)  # the state's value does not change the order
        self._epsilon = epsilon_at(rollout, weights["epsilon"])
        self._explore = rng is not None
        self._noise.rewind(rng, steps)

    def _draw(self, rng: np.random.Generator, steps: int, n: int) -> Array:
        """Random actions [steps, n] where one is to be taken, else -1."""
        explore = rng.random((steps, n)) < self._epsilon
        return np.where(explore, rng.integers(self._spaces.action.nvec[0], size=(steps, n)), -1)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        return self.choose(self._head(self._torso(self.features(obs, first))))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        return self._spaces.encode(obs)

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        greedy = outputs.argmax(1)
        if not self._explore:
            return greedy, {}
        random = self._noise.next(len(greedy))
        return np.where(random < 0, greedy, random), {"greedy": greedy}


class DQNLearner:
    """The learning half."""

    def __init__(self, config: DQN, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        rng = networks.torch_rng(context.rng(INIT))
        shape = (spaces.features, spaces.action.nvec[0], config.hidden, config.activation)
        self._online = networks.QNetwork(*shape, rng, dueling=config.dueling)
        self._target = networks.QNetwork(*shape, rng, dueling=config.dueling)
        self._parameters = networks.FlatParameters(self._online, context.device)
        self._target_parameters = networks.FlatParameters(self._target, context.device)
        self._target_parameters.vector.copy_(self._parameters.vector)
        self._adam = networks.Adam(self._parameters, eps=config.adam_eps)
        self._replay = Replay(spaces, context.envs, config.capacity)
        self._skipped_steps = 0  # gradient steps that were owed and given up
        self._warmup = config.warmup if context.warmup is None else context.warmup
        self._settings = {"learning_rate": config.learning_rate}

    # -- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        disagreement = self._disagreement(rollout)
        self._replay.add(rollout)
        done = self._adam.steps + self._skipped_steps
        owed = gradient_steps_owed(self._replay.env_steps, self._warmup, self._config.update_ratio) - done
        rate = self._settings["learning_rate"]
        if self._config.anneal:
            rate *= max(0.0, 1.0 - rollout.index / self._context.rollouts)
        rng = self._context.rng(SAMPLE, rollout.index)
        means = self._learn(owed, rate, rng) if owed else []
        metrics: dict[str, float] = {
            "gradient_steps": float(owed),
            "learning_rate": rate,
            "epsilon": epsilon_at(rollout.index, self._schedule()),
            "replay_size": float(len(self._replay)),
            "action_disagreement": disagreement,
            "off_policy_error": disagreement,
        }
        return metrics | dict(zip(_PARTS, means, strict=False))

    def _learn(self, owed: int, rate: float, rng: np.random.Generator) -> list[float]:
        """All gradient steps that are owed: the means of `_PARTS`. If one fails, none was done, and they are not owed any
        more."""
        undo, target = self._adam.undo(), self._target_parameters.vector.clone()
        try:
            # Gradients are written out, and what is not finite is found by looking at the results.
            with torch.no_grad(), np.errstate(all="ignore"):
                rows = losses.numbers([self._step(self._sample(rng), rate) for _ in range(owed)])
            self._check_finite(rows)
        except BaseException:
            undo()
            self._target_parameters.vector.copy_(target)
            self._skipped_steps += owed
            raise
        return rows.mean(0).tolist()

    def _check_finite(self, rows: Array) -> None:
        """Raise NonFiniteError for the first gradient step whose `_PARTS` [gradient steps, 4] are not finite."""
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            first = int(finite.argmin())
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(_PARTS, rows[first], strict=True))
            step = self._adam.steps - len(rows) + first
            raise NonFiniteError(f"dqn: the loss is not finite at gradient step {step}: {parts}\n  {_ADVICE}")
        if not self._parameters.is_finite():  # the last step shows in no loss
            raise NonFiniteError(f"dqn: not finite after an update: the parameters\n  {_ADVICE}")

    def _disagreement(self, rollout: Rollout) -> float:
        """Share of the rollout's greedy actions that the network as it is now would not take: 0 if it is what acted."""
        valid = rollout.column("valid")
        if rollout.behaviour_version == rollout.index or not valid.any():
            return 0.0
        obs = self._spaces.encode({name: leaf[:-1][valid] for name, leaf in rollout.obs.items()})
        with torch.no_grad():
            now = self._online.trace(self._tensor(obs))[-1].argmax(1).cpu().numpy()
        return float(np.mean(now != rollout.column("greedy")[valid]))

    def _sample(self, rng: np.random.Generator) -> Batch:
        return self._replay.sample(rng, self._config.batch_size, n=self._config.n_step, gamma=self._config.gamma)

    def _tensor(self, array: Array, dtype: type[np.generic] | None = None) -> torch.Tensor:
        return torch.from_numpy(array if dtype is None else array.astype(dtype)).to(self._context.device)

    def _near(self, array: Array, dtype: type[np.generic] | None = None) -> losses.Values:
        return losses.near(self._tensor(array, dtype))

    def _step(self, batch: Batch, rate: float) -> list[losses.Values]:
        """One gradient step, and the target update that may be due after it: what `_PARTS` names."""
        config = self._config
        obs, next_obs = (self._tensor(self._spaces.encode(leaves)) for leaves in (batch.obs, batch.next_obs))
        returns, discounts = (self._near(array, np.float32) for array in (batch.returns, batch.discounts))
        next_target = losses.near(self._target.trace(next_obs)[-1])
        # One pass of the online network over both is quicker than two.
        seen = self._online.trace(torch.cat([obs, next_obs]) if config.double else obs)
        next_online = losses.near(seen[-1][len(obs) :]) if config.double else None
        seen = [x[: len(obs)] for x in seen]
        q = losses.near(seen[-1])
        targets = losses.q_targets(returns, discounts, next_target, next_online)
        loss, d_q = losses.q_loss(q, self._near(batch.action), targets, config.huber_delta)
        self._online.backward(seen, losses.tensor(d_q))
        norm = self._parameters.clip_grad(config.max_grad_norm)
        self._adam.step(rate)
        if self._adam.steps % config.target_every == 0:
            self._target_parameters.vector.lerp_(self._parameters.vector, config.target_tau)
        return [loss, q.mean(), targets.mean(), losses.near(norm)]

    # -- state -----------------------------------------------------------------------------------------------------

    def _schedule(self) -> Array:
        config = self._config
        over = config.epsilon_fraction * self._context.rollouts
        return np.array([config.epsilon_start, config.epsilon_end, over], np.float32)

    def weights(self) -> Weights:
        return self._parameters.arrays(copy=False) | {"epsilon": self._schedule()}

    def state_dict(self) -> StateTree:
        return self._small_state() | {"replay": self._replay.state_dict()}

    def _small_state(self) -> StateTree:
        return {
            "parameters": self._parameters.arrays(),
            "target": self._target_parameters.arrays(),
            "optimizer": self._adam.state_dict(),
            "settings": dict(self._settings),
            "skipped_steps": self._skipped_steps,
        }

    def load_state_dict(self, state: StateTree) -> None:
        rest = {key: value for key, value in state.items() if key != "replay"}
        check_tree(rest, self._small_state())
        self._replay.load_state_dict(state.get("replay", {}))
        self._parameters.load(state["parameters"])
        self._target_parameters.load(state["target"])
        self._adam.load_state_dict(state["optimizer"])
        self._settings, self._skipped_steps = dict(state["settings"]), state["skipped_steps"]

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on."""
        for name, value in changes.items():
            if name not in self._settings:
                raise ValueError(f"dqn cannot change {name!r} during training; it can change {', '.join(self._settings)}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: expected a positive number")
        self._settings |= {name: float(value) for name, value in changes.items()}
