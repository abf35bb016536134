"""Soft actor-critic with automatic temperature (Haarnoja et al. 2018, arXiv 1812.05905).

Departures: the temperature's step follows the gradient by its logarithm without the factor alpha, as in the authors' later
code; `update_ratio` gradient steps for each env step stored after warm-up, exactly, done rollout by rollout; uniform random
actions at first; n-step returns leave out the entropy of the steps between; the weights that make up for priorities are
factors on the critics' losses alone; the logarithm of the standard deviation is kept within [-20, 2], as in the authors'
code. Nothing else differs with the default settings.

Which version acted does not matter to one-step targets, so any staleness is sound; n-step returns leave it uncorrected, as
they do for everything else in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np
from msgspec import Meta

from aiorl.acting import LOG_STD_MAX, LOG_STD_MIN, MLP, NoiseTape
from aiorl.algos.base import Forward, LearnerContext, StateTree, Weights
from aiorl.algos.bounded import ActionRange, RandomStart, action_shift, check_bounded
from aiorl.algos.practice import Practice, ReplaySettings, Results, encode, standing, together
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


class SAC(ReplaySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of SAC. After every gradient step, target += tau * (online - target)."""

    name: ClassVar[str] = "sac"
    default_segment_length: ClassVar[int] = 8
    default_error_target: ClassVar[float] = 0.2  # mean actions, in units of the bounds: see `action_shift`

    random_steps: Annotated[
        int, Meta(description="env steps with uniform random actions at first (whole rollouts)", ge=0)
    ] = 1_000
    tau: Annotated[float, Meta(description="share taken over by each target update", gt=0, le=1)] = 0.005
    alpha: Annotated[float, Meta(description="temperature: weight of the entropy (at first, if tuned)", gt=0)] = 1.0
    tune_alpha: Annotated[bool, Meta(description="adjust the temperature to the target entropy")] = True
    target_entropy: Annotated[
        float | None, Meta(description="entropy of the actions, in units of their bounds (default: minus their number)")
    ] = None

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError unless the action space is a Box with finite bounds."""
        check_bounded(self.name, spaces)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"mean": Column((spaces.action.size,), "float32")}

    def policy(self, spaces: Spaces) -> SACPolicy:
        return SACPolicy(self, spaces)

    def forward(self, spaces: Spaces) -> Forward:
        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return networks.apply_mlp(weights, "actor", self.activation, x)

        return Forward(spaces.features, 2 * spaces.action.size, apply)

    def learner(self, spaces: Spaces, context: LearnerContext) -> SACLearner:
        return SACLearner(self, spaces, context)


class SACPolicy:
    """The acting half: tanh of a Gaussian, at first uniform. Its weights are the actor's and when the random start ends.

    The column `mean` is the deterministic action, in units of the bounds.
    """

    def __init__(self, config: SAC, spaces: Spaces) -> None:
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
        """Standard normal noise, or uniform actions in units of the bounds, float32 [steps, n, k]."""
        shape = (steps, n, self._spaces.action.size)
        return rng.random(shape, np.float32) * 2 - 1 if self._random else rng.standard_normal(shape, np.float32)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        return self.choose(self._actor(self.features(obs, first)))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        return encode(self._spaces, obs, self._weights)

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        k = self._spaces.action.size
        mean, log_std = outputs[:, :k], outputs[:, k:]
        greedy = np.tanh(mean)
        if not self._explore:
            return self._range.stored(greedy), {}
        noise = self._noise.next(len(mean))
        unit = noise if self._random else np.tanh(mean + np.exp(log_std.clip(LOG_STD_MIN, LOG_STD_MAX)) * noise)
        return self._range.stored(unit), {"mean": greedy}


class View(NamedTuple):
    """A batch as critics and actor see it: what the critics are fitted to, what the actor saw and what it would do."""

    goal: continuous.Goal
    seen: list[torch.Tensor]
    chosen: continuous.SquashedGaussian


class SACLearner:
    """The learning half."""

    def __init__(self, config: SAC, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        k = spaces.action.size
        self._target_entropy = float(-k) if config.target_entropy is None else config.target_entropy
        rng = networks.torch_rng(context.rng(INIT))
        self._policy = continuous.SoftActor(spaces.features, 2 * k, config.hidden, config.activation, rng, config.alpha)
        self._parameters = networks.FlatParameters(self._policy, context.device)
        self._log_alpha_grad = self._parameters.split(self._parameters.grad)["log_alpha"]
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

        def take_back() -> None:
            undo_policy()
            undo_critics()

        return take_back

    def _is_finite(self) -> bool:
        return self._parameters.is_finite() and self._critics.parameters.is_finite()

    def _mean(self, obs: Array) -> Array:
        """The deterministic action for encoded observations, [N, k] in units of the bounds."""
        outputs = self._policy.actor.trace(self._tensor(obs))[-1].cpu().numpy()
        return np.tanh(outputs[:, : self._spaces.action.size])

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32, copy=False)).to(self._context.device)

    def _step(self, batch: Batch, rate: float, rng: np.random.Generator) -> Results:
        """One step of the critics, the actor, the temperature and the targets, in this order."""
        alpha = self._policy.log_alpha.exp()
        views = [self._view(part, alpha, rng) for part in self._practice.parts(batch)]
        found = together(self._critics.fit([view.goal for view in views], rate))
        improved = self._parameters.mean_grad(views, lambda view: self._improve(view, alpha))
        entropy, value = (torch.stack(column).mean() for column in zip(*improved, strict=True))
        self._log_alpha_grad.zero_()  # it has no part in the norm
        found["actor_grad_norm"] = self._parameters.clip_grad(self._config.max_grad_norm or np.inf)
        if self._config.tune_alpha:
            self._log_alpha_grad.copy_(entropy - self._target_entropy)
        self._adam.step(rate)
        self._critics.follow(self._config.tau)
        actor_loss = -(alpha * entropy + value)
        bonus = (alpha * entropy).abs().squeeze(0)  # comes to each reward, so values may be as much larger
        return found | {
            "actor_loss": actor_loss.squeeze(0), "entropy": entropy, "alpha": alpha.squeeze(0), "bonus": bonus
        }  # fmt: skip

    def _view(self, batch: Batch, alpha: torch.Tensor, rng: np.random.Generator) -> View:
        n = len(batch.returns)
        both = self._practice.see(batch.obs, batch.next_obs)  # one pass for both, as the actor changes after the critics
        obs, next_obs = both.split(n)
        seen = self._policy.actor.trace(both)
        noise = self._tensor(rng.standard_normal((2 * n, self._spaces.action.size), np.float32))
        chosen = continuous.SquashedGaussian(seen[-1][:n], noise[:n])
        following = continuous.SquashedGaussian(seen[-1][n:], noise[n:])
        soft_value = self._critics.target_value(next_obs, following.action) - alpha * following.log_prob
        targets = self._tensor(batch.returns) + self._tensor(batch.discounts) * soft_value
        importance = self._practice.importance(batch)
        weight = None if importance is None else self._tensor(importance)
        goal = continuous.Goal(obs, self._tensor(self._range.unit(batch.action)), targets, weight)
        return View(goal, [x[:n] for x in seen], chosen)

    def _improve(self, view: View, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the gradient of the actor's loss; returns the mean entropy and value."""
        n, chosen = len(view.goal.targets), view.chosen
        value, d_action = self._critics.smaller(view.goal.obs, chosen.action)
        self._policy.actor.backward(view.seen, chosen.backward(d_action / -n, alpha / n))
        return -chosen.log_prob.mean(), value.mean()

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> Weights:
        arrays = self._parameters.arrays(copy=False)
        acting = {name: array for name, array in arrays.items() if name != "log_alpha"}
        return acting | self._practice.weights() | self._start.weights()

    def _own_state(self) -> StateTree:
        return {
            "parameters": self._parameters.arrays(),
            "optimizer": self._adam.state_dict(),
            "critics": self._critics.state_dict(),
        }

    def state_dict(self) -> StateTree:
        return self._own_state() | {"practice": self._practice.state_dict()}

    def load_state_dict(self, state: StateTree) -> None:
        check_tree({key: value for key, value in state.items() if key != "practice"}, self._own_state())
        self._practice.load_state_dict(state.get("practice", {}))
        self._parameters.load(state["parameters"])
        self._adam.load_state_dict(state["optimizer"])
        self._critics.load_state_dict(state["critics"])

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on."""
        self._practice.set(**changes)

    def close(self) -> None:
        self._practice.close()
