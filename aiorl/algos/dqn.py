"""Deep Q-learning (Mnih et al. 2015) with double Q-learning, dueling heads, n-step returns and a Huber loss.

Papers: double, van Hasselt et al. 2016 (arXiv 1509.06461); dueling, Wang et al. 2016 (1511.06581); priorities, Schaul et al.
2016 (1511.05952); together, Hessel et al. 2018 (1710.02298). Departures: Adam in place of RMSProp; priorities are TD errors
that are not clipped; the gradient is clipped by its norm; `update_ratio` gradient steps for each env step stored after
warm-up, exactly, done rollout by rollout; epsilon is a function of the rollout index, also during warm-up, which is no phase
of random actions: where epsilon has fallen by then, what has learned nothing acts; the gradient from the two dueling streams
into what they share is not divided by sqrt(2), which Adam would make up for. `average` is of none of them.

Which version acted does not matter to one-step targets, so any staleness is sound. n-step returns (`n_step` > 1) depend on
the actions of the version that acted, and are corrected neither for that nor for the age of what is in the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from msgspec import Meta

from aiorl.acting import MLP, NoiseTape
from aiorl.acting import make_network as make_acting_network
from aiorl.algos.base import AVERAGE, Forward, LearnerContext, StateTree, Weights, averages
from aiorl.algos.practice import (
    BatchSize,
    Capacity,
    Hidden,
    Practice,
    Rate,
    Ratio,
    ReplaySettings,
    Results,
    encode,
    standing,
    together,
)  # fmt: skip
from aiorl.buffers.replay import Batch
from aiorl.convolution import NETWORK, Network, convolutions_of
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError
from aiorl.lazy import LazyModule
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch

    from aiorl import losses, networks
else:
    torch, losses, networks = LazyModule("torch"), LazyModule("aiorl.losses"), LazyModule("aiorl.networks")

INIT = 0  # what a learner's random numbers are for


class QSettings(ReplaySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of all that learn the values of a few actions. Every `target_every` gradient steps,
    target += target_tau * (online - target)."""

    default_segment_length: ClassVar[int] = 32
    default_error_target: ClassVar[float] = 0.2  # share of greedy actions that the newest network would not take

    learning_rate: Rate = 5e-4
    batch_size: BatchSize = 64
    capacity: Capacity = 100_000
    update_ratio: Ratio = 0.25
    double: Annotated[bool, Meta(description="let the online network choose the next action")] = True
    target_every: Annotated[int, Meta(description="gradient steps between target updates", ge=1)] = 250
    target_tau: Annotated[float, Meta(description="share taken over by each target update (1: a copy)", gt=0, le=1)] = 1.0
    epsilon_start: Annotated[float, Meta(description="share of random actions at first", ge=0, le=1)] = 1.0
    epsilon_end: Annotated[float, Meta(description="and in the end", ge=0, le=1)] = 0.05
    epsilon_fraction: Annotated[
        float, Meta(description="share of the run, counted from its first step, over which it falls", ge=0, le=1)
    ] = 0.2
    average: Annotated[
        float,
        Meta(description="share that each step keeps of the mean network that is evaluated (0: the newest is)", ge=0, lt=1),
    ] = 0.0
    hidden: Hidden = (128, 128)
    network: Annotated[Network, NETWORK] = "auto"

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError unless the action space is Discrete."""
        if spaces.action.kind != "discrete":
            kind = {"box": "Box", "multi_discrete": "MultiDiscrete"}.get(spaces.action.kind, spaces.action.kind)
            needs = f"{self.name} needs a Discrete action space, this environment has {kind}"
            raise ConfigError(f"{needs}\n  use ppo: it acts in all")
        if self.epsilon_end > self.epsilon_start:
            what = f"{self.name}.epsilon_end = {self.epsilon_end:g} is above epsilon_start = {self.epsilon_start:g}"
            raise ConfigError(f"{what}: it falls over a run\n  exchange them, or make them equal")
        if spaces.features == 0:
            raise ConfigError(f"{self.name}: the observation space is empty (shape with a 0): there is nothing to learn")
        convolutions_of(spaces, self.network)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"greedy": Column((), "int64")}

    def policy(self, spaces: Spaces) -> DQNPolicy:
        return DQNPolicy(self, spaces)

    def forward(self, spaces: Spaces) -> Forward:
        plan = convolutions_of(spaces, self.network)

        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            x = networks.apply_network(weights, "torso", self.activation, x, activate_last=True, plan=plan)
            return networks.apply_mlp(weights, "advantage", self.activation, x)

        return Forward(spaces.features, spaces.action.nvec[0], apply)


class DQN(QSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of DQN."""

    name: ClassVar[str] = "dqn"

    # 0, as None could not be written to a file: what is not there has the default.
    max_grad_norm: Annotated[float, Meta(description="longest gradient (0: no limit)", ge=0)] = 10.0
    dueling: Annotated[
        bool, Meta(description="state value and advantages as two streams, each with the last hidden layer for itself")
    ] = False
    huber_delta: Annotated[
        float, Meta(description="error from which the loss grows linearly (0: squared error)", ge=0)
    ] = 1.0

    def learner(self, spaces: Spaces, context: LearnerContext) -> DQNLearner:
        return DQNLearner(self, spaces, context, Scalars(self.huber_delta or math.inf), dueling=self.dueling)


def epsilon_at(rollout: int, schedule: Array) -> float:
    """Share of random actions in a rollout. `schedule` = (start, end, rollouts over which it falls linearly)."""
    start, end, over = (float(x) for x in schedule)
    done = min(1.0, rollout / over) if over > 0 else 1.0
    return start + done * (end - start)


class DQNPolicy:
    """The acting half: epsilon-greedy. Its weights are the network's and `epsilon`, the schedule; with `average` also those
    of the mean network, which acts where nothing is explored."""

    def __init__(self, config: QSettings, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces
        self._plan = convolutions_of(spaces, config.network)
        self._noise = NoiseTape(self._draw)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        activation = self._config.activation
        if rng is None:
            weights = {**weights, **averages(weights)}
        self._torso = make_acting_network(weights, "torso", activation, activate_last=True, plan=self._plan)
        self._head = MLP(weights, "advantage", activation)  # the state's value would not change the order
        self._weights = weights
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
        return encode(self._spaces, obs, self._weights)

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        greedy = outputs.argmax(1)
        if not self._explore:
            return greedy, {}
        random = self._noise.next(len(greedy))
        return np.where(random < 0, greedy, random), {"greedy": greedy}


# -- what outputs mean -------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What the outputs of a network are to become for a batch: see `Head.fit`."""

    action: losses.Values
    """[N] int64"""
    returns: losses.Values
    discounts: losses.Values
    """[N] float32 both"""
    next_target: losses.Values
    """[N, outputs] of the target network"""
    next_online: losses.Values | None
    """[N, outputs] of the network itself, if it chooses the next action"""
    weight: losses.Values | None
    """[N] float32 factors on the losses"""


class Fit(NamedTuple):
    """A loss, its derivative by the outputs, each action's value less its target [N], and the mean of these targets."""

    loss: losses.Values
    slope: losses.Values
    error: losses.Values
    target_mean: losses.Values


class Head(Protocol):
    """What the outputs of a network say about the actions."""

    @property
    def width(self) -> int:
        """Outputs for each action."""
        ...

    def values(self, outputs: losses.Values) -> losses.Values:
        """Action values [N, A] of outputs [N, A * width]."""
        ...

    def fit(self, outputs: losses.Values, goal: Goal) -> Fit: ...

    def acting(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Weights of a network whose outputs are action values, from the parameters by name."""
        ...


@dataclass(frozen=True)
class Scalars:
    """Each output is the value of an action."""

    huber_delta: float
    width: int = 1

    def values(self, outputs: losses.Values) -> losses.Values:
        return outputs

    def fit(self, outputs: losses.Values, goal: Goal) -> Fit:
        targets = losses.q_targets(goal.returns, goal.discounts, goal.next_target, goal.next_online)
        error = losses.td_error(outputs, goal.action, targets)
        loss, slope = losses.huber(error, self.huber_delta, goal.weight)
        return Fit(loss, losses.spread(slope, goal.action, outputs), error, targets.mean())

    def acting(self, arrays: dict[str, Array]) -> dict[str, Array]:
        return arrays


# -- learning ----------------------------------------------------------------------------------------------------------


def make_network(config: QSettings, spaces: Spaces, width: int, dueling: bool, rng: torch.Generator) -> networks.QNetwork:
    """`width` outputs for each action."""
    outputs = spaces.action.nvec[0] * width
    plan = convolutions_of(spaces, config.network)
    return networks.QNetwork(spaces.features, outputs, config.hidden, config.activation, rng, dueling=dueling, plan=plan)


class DQNLearner:
    """The learning half."""

    def __init__(
        self, config: QSettings, spaces: Spaces, context: LearnerContext, head: Head, *, dueling: bool = False
    ) -> None:
        self._config, self._spaces, self._context, self._head = config, spaces, context, head
        rng = networks.torch_rng(context.rng(INIT))
        self._online, self._target = (make_network(config, spaces, head.width, dueling, rng) for _ in range(2))
        self._parameters = networks.FlatParameters(self._online, context.device)
        self._target_parameters = networks.FlatParameters(self._target, context.device)
        self._target_parameters.vector.copy_(self._parameters.vector)
        self._average = self._parameters.vector.clone() if config.average else None
        self._adam = networks.Adam(self._parameters, eps=config.adam_eps)
        self._practice = Practice(config, spaces, context)

    # -- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        with torch.no_grad():  # gradients are written out
            disagreement = self._disagreement(rollout)
            metrics = self._practice.update(rollout, self._step, self._undo, self._parameters.is_finite)
            metrics |= standing(self._parameters, self._target_parameters)
        return metrics | {
            "epsilon": epsilon_at(rollout.index, self._schedule()),
            "action_disagreement": disagreement,
            "off_policy_error": disagreement,
        }

    def _undo(self) -> Callable[[], None]:
        others = [vector for vector in (self._target_parameters.vector, self._average) if vector is not None]
        undo, before = self._adam.undo(), [vector.clone() for vector in others]

        def take_back() -> None:
            undo()
            for vector, old in zip(others, before, strict=True):
                vector.copy_(old)

        return take_back

    def _disagreement(self, rollout: Rollout) -> float:
        """Share of the rollout's greedy actions that the network as it is now would not take: 0 if it is what acted."""
        valid = rollout.column("valid")
        if rollout.behaviour_version == rollout.index or not valid.any():
            return 0.0
        obs = self._look({name: leaf[:-1][valid] for name, leaf in rollout.obs.items()})
        now = self._head.values(self._online.trace(obs)[-1]).argmax(1).cpu().numpy()
        return float(np.mean(now != rollout.column("greedy")[valid]))

    def _tensor(self, array: Array, dtype: type[np.generic] | None = None) -> torch.Tensor:
        return torch.from_numpy(array if dtype is None else array.astype(dtype)).to(self._context.device)

    def _near(self, array: Array, dtype: type[np.generic] | None = None) -> losses.Values:
        return losses.near(self._tensor(array, dtype))

    def _look(self, leaves: Mapping[str, Array]) -> torch.Tensor:
        """What the network sees of observation leaves [N, …]."""
        return self._practice.see(leaves)

    def _step(self, batch: Batch, rate: float, rng: np.random.Generator) -> Results:
        """One gradient step, and the target update that may be due after it."""
        config = self._config
        found = together(self._parameters.mean_grad(self._practice.parts(batch), self._fit))
        found["grad_norm"] = losses.near(self._parameters.clip_grad(config.max_grad_norm or math.inf))
        self._adam.step(rate)
        if self._adam.steps % config.target_every == 0:
            self._target_parameters.vector.lerp_(self._parameters.vector, config.target_tau)
        if self._average is not None:
            steps = self._adam.steps  # at first it spans few, or it would long be mostly what was there at the start
            self._average.lerp_(self._parameters.vector, 1 - min(config.average, steps / (steps + 9)))
        return found

    def _fit(self, batch: Batch) -> dict[str, Any]:
        """Set the gradient of a batch's loss."""
        obs, next_obs = self._look(batch.obs), self._look(batch.next_obs)
        returns, discounts = (self._near(array, np.float32) for array in (batch.returns, batch.discounts))
        importance = self._practice.importance(batch)
        next_target = losses.near(self._target.trace(next_obs)[-1])
        # One pass of the online network over both is quicker than two.
        seen = self._online.trace(torch.cat([obs, next_obs]) if self._config.double else obs)
        next_online = losses.near(seen[-1][len(obs) :]) if self._config.double else None
        seen = [x[: len(obs)] for x in seen]
        outputs = losses.near(seen[-1])
        weight = None if importance is None else self._near(importance, np.float32)
        goal = Goal(self._near(batch.action), returns, discounts, next_target, next_online, weight)
        fit = self._head.fit(outputs, goal)
        self._online.backward(seen, losses.tensor(fit.slope))
        q = self._head.values(outputs)
        return {"loss": fit.loss, "target_mean": fit.target_mean, "q": q, "td_error": fit.error}

    # -- state -----------------------------------------------------------------------------------------------------

    def _schedule(self) -> Array:
        config = self._config
        over = config.epsilon_fraction * self._context.rollouts
        return np.array([config.epsilon_start, config.epsilon_end, over], np.float32)

    def _acting(self, vector: torch.Tensor) -> dict[str, Array]:
        arrays = self._parameters.arrays(vector, copy=False)
        return self._head.acting({k: array for k, array in arrays.items() if not k.startswith("state_value.")})

    def weights(self) -> Weights:
        acting = self._acting(self._parameters.vector)
        if self._average is not None:
            acting |= {AVERAGE + name: array for name, array in self._acting(self._average).items()}
        return acting | self._practice.weights() | {"epsilon": self._schedule()}

    def state_dict(self) -> StateTree:
        return self._own_state() | {"practice": self._practice.state_dict()}

    def _own_state(self) -> StateTree:
        return {
            "parameters": self._parameters.arrays(),
            "target": self._target_parameters.arrays(),
            "optimizer": self._adam.state_dict(),
        } | ({} if self._average is None else {"average": self._parameters.arrays(self._average)})

    def load_state_dict(self, state: StateTree) -> None:
        check_tree({key: value for key, value in state.items() if key != "practice"}, self._own_state())
        self._practice.load_state_dict(state.get("practice", {}))
        self._parameters.load(state["parameters"])
        self._target_parameters.load(state["target"])
        if self._average is not None:
            self._parameters.load(state["average"], "average", into=self._average)
        self._adam.load_state_dict(state["optimizer"])

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on."""
        self._practice.set(**changes)

    def close(self) -> None:
        self._practice.close()
