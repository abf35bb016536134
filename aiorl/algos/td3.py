"""Twin delayed deterministic policy gradients, TD3 (Fujimoto et al. 2018, arXiv 1802.09477).

Departures: layers and batches as in the authors' later code; `update_ratio` gradient steps for each env step stored after
warm-up, exactly, done rollout by rollout. The weights that make up for priorities are factors on the critics' losses alone.

Which version acted does not matter to one-step targets, so any staleness is sound; n-step returns leave it uncorrected, as
they do for everything else in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from msgspec import Meta

from aiorl.acting import MLP, NoiseTape
from aiorl.algos.base import Forward, LearnerContext, StateTree, Weights
from aiorl.algos.bounded import ActionRange, RandomStart, action_shift, check_bounded
from aiorl.algos.practice import Practice, Rate, ReplaySettings, Results, encode, standing, together
from aiorl.buffers.replay import Batch
from aiorl.envs.spaces import Spaces
from aiorl.lazy import LazyModule
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch

    from aiorl import continuous, networks
else:
    torch, continuous, networks = LazyModule("torch"), LazyModule("aiorl.continuous"), LazyModule("aiorl.networks")

INIT = 0  # what a learner's random numbers are for


class TD3(ReplaySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of TD3. Every `policy_delay` steps of the critics the actor takes one and the targets move by `tau`."""

    name: ClassVar[str] = "td3"
    default_segment_length: ClassVar[int] = 8
    default_error_target: ClassVar[float] = 0.2  # actions without noise, in units of the bounds: see `action_shift`

    learning_rate: Rate = 1e-3
    random_steps: Annotated[
        int, Meta(description="env steps with uniform random actions at first (whole rollouts)", ge=0)
    ] = 1_000
    tau: Annotated[float, Meta(description="share taken over by each target update", gt=0, le=1)] = 0.005
    policy_delay: Annotated[int, Meta(description="steps of the critics for each of the actor", ge=1)] = 2
    noise: Annotated[float, Meta(description="deviation of acting, in units of the bounds", ge=0)] = 0.1
    target_noise: Annotated[float, Meta(description="deviation of the target's action", ge=0)] = 0.2
    target_noise_clip: Annotated[float, Meta(description="and its limit", ge=0)] = 0.5

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError unless the action space is a Box with finite bounds."""
        check_bounded(self.name, spaces)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"mean": Column((spaces.action.size,), "float32")}

    def policy(self, spaces: Spaces) -> TD3Policy:
        return TD3Policy(self, spaces)

    def forward(self, spaces: Spaces) -> Forward:
        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return networks.apply_mlp(weights, "actor", self.activation, x)

        return Forward(spaces.features, spaces.action.size, apply)

    def learner(self, spaces: Spaces, context: LearnerContext) -> TD3Learner:
        return TD3Learner(self, spaces, context)


class TD3Policy:
    """The acting half: deterministic with Gaussian noise, at first uniform. Its weights are the actor's and when that ends.

    The column `mean` is the action without noise, in units of the bounds.
    """

    def __init__(self, config: TD3, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces
        self._range = ActionRange(spaces.action)
        self._noise = NoiseTape(self._draw)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._actor = MLP(weights, "actor", self._config.activation)
        self._weights = weights
        self._random = RandomStart.of_weights(weights).covers(rollout)
        self._explore = rng is not None
        self._noise.rewind(rng, steps)

    def _draw(self, rng: np.random.Generator, steps: int, n: int) -> Array:
        """Noise, or uniform actions, in units of the bounds, float32 [steps, n, k]."""
        shape = (steps, n, self._spaces.action.size)
        if self._random:
            return rng.random(shape, np.float32) * 2 - 1
        return rng.standard_normal(shape, np.float32) * np.float32(self._config.noise)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        return self.choose(self._actor(self.features(obs, first)))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        return encode(self._spaces, obs, self._weights)

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        greedy = np.tanh(outputs)
        if not self._explore:
            return self._range.stored(greedy), {}
        noise = self._noise.next(len(greedy))
        unit = noise if self._random else (greedy + noise).clip(-1, 1)
        return self._range.stored(unit), {"mean": greedy}


class TD3Learner:
    """The learning half."""

    def __init__(self, config: TD3, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        k = spaces.action.size
        rng = networks.torch_rng(context.rng(INIT))
        shape = (spaces.features, k, config.hidden, config.activation)
        self._policy, self._target = (continuous.Actor(*shape, rng) for _ in range(2))
        self._parameters = networks.FlatParameters(self._policy, context.device)
        self._target_parameters = networks.FlatParameters(self._target, context.device)
        self._target_parameters.vector.copy_(self._parameters.vector)
        self._adam = networks.Adam(self._parameters, eps=config.adam_eps)
        self._critics = continuous.TwinCritics(
            spaces.features, k, config.hidden, config.activation, rng, context.device,
            adam_eps=config.adam_eps, max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        self._range = ActionRange(spaces.action)
        self._practice = Practice(config, spaces, context)
        self._start = RandomStart.of_steps(config.random_steps, context)

    # -- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        with torch.no_grad():  # gradients are written out
            shift = 0.0 if self._start.covers(rollout.index) else action_shift(rollout, self._practice.encode, self._mean)
            metrics = self._practice.update(rollout, self._step, self._undo, self._is_finite)
            metrics |= standing(self._critics.parameters, self._critics.target_parameters)
        return metrics | {"off_policy_error": shift}

    def _undo(self) -> Callable[[], None]:
        undo_policy, undo_critics = self._adam.undo(), self._critics.undo()
        before = self._target_parameters.vector.clone()

        def take_back() -> None:
            undo_policy()
            undo_critics()
            self._target_parameters.vector.copy_(before)

        return take_back

    def _is_finite(self) -> bool:
        return self._parameters.is_finite() and self._critics.parameters.is_finite()

    def _mean(self, obs: Array) -> Array:
        """The action without noise for encoded observations, [N, k] in units of the bounds."""
        return np.tanh(self._policy.actor.trace(self._tensor(obs))[-1].cpu().numpy())

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32, copy=False)).to(self._context.device)

    def _step(self, batch: Batch, rate: float, rng: np.random.Generator) -> Results:
        """One step of the critics; of the actor and the targets, when it is their turn."""
        goals = [self._goal(part, rng) for part in self._practice.parts(batch)]
        found = together(self._critics.fit(goals, rate))
        if (self._practice.steps + 1) % self._config.policy_delay == 0:
            found |= self._improve([goal.obs for goal in goals], rate)
        return found

    def _goal(self, batch: Batch, rng: np.random.Generator) -> continuous.Goal:
        """What the critics are fitted to."""
        config = self._config
        obs, next_obs = self._practice.see(batch.obs), self._practice.see(batch.next_obs)
        noise = rng.standard_normal((len(next_obs), self._spaces.action.size), np.float32) * config.target_noise
        following = self._target.actor.trace(next_obs)[-1].tanh()
        following = continuous.smoothed(following, self._tensor(noise), config.target_noise_clip)
        value = self._critics.target_value(next_obs, following)
        targets = self._tensor(batch.returns) + self._tensor(batch.discounts) * value
        importance = self._practice.importance(batch)
        weight = None if importance is None else self._tensor(importance)
        return continuous.Goal(obs, self._tensor(self._range.unit(batch.action)), targets, weight)

    def _improve(self, parts: Sequence[torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
        """One step of the actor, uphill on the first critic, and all targets after it."""
        values = self._parameters.mean_grad(parts, self._climb)
        norm = self._parameters.clip_grad(self._config.max_grad_norm or np.inf)
        self._adam.step(rate)
        self._critics.follow(self._config.tau)
        self._target_parameters.vector.lerp_(self._parameters.vector, self._config.tau)
        return {"actor_loss": -torch.stack(values).mean(), "actor_grad_norm": norm}

    def _climb(self, obs: torch.Tensor) -> torch.Tensor:
        """Set the gradient of the actor's loss; returns the mean value of what it would do."""
        seen = self._policy.actor.trace(obs)
        action = seen[-1].tanh()
        value, d_action = self._critics.first(obs, action)
        self._policy.actor.backward(seen, d_action * (1 - action * action) / -len(obs))
        return value.mean()

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> Weights:
        return self._parameters.arrays(copy=False) | self._practice.weights() | self._start.weights()

    def _own_state(self) -> StateTree:
        return {
            "parameters": self._parameters.arrays(),
            "target": self._target_parameters.arrays(),
            "optimizer": self._adam.state_dict(),
            "critics": self._critics.state_dict(),
        }

    def state_dict(self) -> StateTree:
        return self._own_state() | {"practice": self._practice.state_dict()}

    def load_state_dict(self, state: StateTree) -> None:
        check_tree({key: value for key, value in state.items() if key != "practice"}, self._own_state())
        self._practice.load_state_dict(state.get("practice", {}))
        self._parameters.load(state["parameters"])
        self._target_parameters.load(state["target"])
        self._adam.load_state_dict(state["optimizer"])
        self._critics.load_state_dict(state["critics"])

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on."""
        self._practice.set(**changes)

    def close(self) -> None:
        self._practice.close()
