"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), also for rollouts of an older policy.

Departures from the paper: advantages are standardised in each minibatch; separate networks for policy and value, with
orthogonal weights; Adam's learning rate falls linearly to 0 (`anneal`).

One update sees three policies: the *behaviour* policy that acted (log_prob travels with the rollout), the *proximal*
policy (parameters as the update begins) and the one being optimised. In a sequential loop the first two are the same.
Otherwise `correction` says what happens, on one code path, so that at staleness 0 all of these are plain PPO:

    decoupled   ratio and clip against the proximal policy, samples weighted by min(proximal / behaviour, `ratio_cap`)
                (Hilton et al. 2022, arXiv 2110.00641; the cap as in AReaL)
    vtrace      the same, and advantages and value targets by V-trace (Espeholt et al. 2018, arXiv 1802.01561)
    none        ratio and clip against the behaviour policy: the clip also holds back what is already learned
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from aiorl.acting import Gaussian, NoiseTape, beyond_reach, distribution, make_network
from aiorl.algos.base import Forward, LearnerContext, StateTree, Weights
from aiorl.convolution import NETWORK, Network, convolutions_of
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError, NonFiniteError
from aiorl.lazy import LazyModule
from aiorl.normalise import RunningMoments, normalise
from aiorl.returns import gae, running_returns, vtrace
from aiorl.segments import Array, Column, Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch

    from aiorl import losses, networks
else:
    torch, losses, networks = LazyModule("torch"), LazyModule("aiorl.losses"), LazyModule("aiorl.networks")

INIT, PERMUTE = 0, 1  # what a learner's random numbers are for
REWARD_CLIP = 10.0
_PARTS = ("policy_loss", "value_loss", "entropy", "grad_norm")
_ADVICE = "lower ppo.learning_rate, or normalise observations and rewards (ppo.normalise_obs, ppo.normalise_rewards)"
Positive = Annotated[float, Meta(gt=0)]


class PPO(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of PPO. The minibatches of an epoch are equal parts of the rollout."""

    name: ClassVar[str] = "ppo"
    default_segment_length: ClassVar[int] = 128
    default_error_target: ClassVar[float] = 0.3  # root mean square of log(proximal / behaviour)

    learning_rate: Annotated[float, Meta(description="Adam's step size at the start", gt=0)] = 3e-4
    anneal: Annotated[bool, Meta(description="let the learning rate fall linearly to 0 over the run")] = True
    epochs: Annotated[int, Meta(description="passes over each rollout", ge=1)] = 4
    minibatches: Annotated[int, Meta(description="gradient steps per pass", ge=1)] = 8
    gamma: Annotated[float, Meta(description="discount per step", ge=0, le=1)] = 0.99
    gae_lambda: Annotated[float, Meta(description="trace decay of the advantages", ge=0, le=1)] = 0.95
    clip_range: Annotated[float, Meta(description="how far the probability ratio may gain", gt=0)] = 0.2
    value_clip: Annotated[Positive | None, Meta(description="how far a value may gain (default: no limit)")] = None
    entropy_coef: Annotated[float, Meta(description="weight of the entropy bonus", ge=0)] = 0.0
    value_coef: Annotated[float, Meta(description="weight of the value loss", ge=0)] = 0.5
    max_grad_norm: Annotated[float, Meta(description="longest gradient", gt=0)] = 0.5
    normalise_advantages: Annotated[bool, Meta(description="standardise advantages in each minibatch")] = True
    target_kl: Annotated[
        Positive | None, Meta(description="end the update after an epoch with a larger KL divergence (default: never)")
    ] = None
    hidden: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...], Meta(description="sizes of the hidden layers", min_length=1)
    ] = (64, 64)
    network: Annotated[Network, NETWORK] = "auto"
    activation: Annotated[Literal["tanh", "relu"], Meta(description="after each hidden layer")] = "tanh"
    log_std: Annotated[float, Meta(description="initial log standard deviation of Box actions", ge=-10, le=3)] = 0.0
    normalise_obs: Annotated[bool, Meta(description="standardise observations by running statistics")] = False
    normalise_rewards: Annotated[bool, Meta(description="divide rewards by the running deviation of returns")] = False
    correction: Annotated[
        Literal["decoupled", "vtrace", "none"], Meta(description="what is done about data of an older version")
    ] = "decoupled"
    ratio_cap: Annotated[float, Meta(description="largest weight proximal / behaviour", gt=0)] = 2.0
    adam_eps: Annotated[float, Meta(description="Adam's epsilon", gt=0)] = 1e-5

    @property
    def corrects_staleness(self) -> bool:
        return self.correction != "none"

    def check(self, spaces: Spaces) -> None:
        """PPO acts in all supported spaces. Raises ConfigError if there is nothing to choose or to see."""
        for what, size in (("observation", spaces.features), ("action", spaces.action.features)):
            if size == 0:
                raise ConfigError(f"ppo: the {what} space is empty (shape with a 0): there is nothing to learn")
        convolutions_of(spaces, self.network)

    def doubts(self, spaces: Spaces) -> Sequence[str]:
        return beyond_reach(spaces.action, math.exp(self.log_std))

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"log_prob": Column((), "float32")}

    def policy(self, spaces: Spaces) -> PPOPolicy:
        return PPOPolicy(self, spaces)

    def forward(self, spaces: Spaces) -> Forward:
        plan = convolutions_of(spaces, self.network)

        def apply(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return networks.apply_network(weights, "actor", self.activation, x, plan=plan)

        return Forward(spaces.features, distribution(spaces.action).size, apply)

    def learner(self, spaces: Spaces, context: LearnerContext) -> PPOLearner:
        return PPOLearner(self, spaces, context)


class PPOPolicy:
    """The acting half. Its weights are the actor's, `log_std` for Box actions, `obs_mean` and `obs_scale` if normalising."""

    def __init__(self, config: PPO, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces
        self._plan = convolutions_of(spaces, config.network)
        self._distribution = distribution(spaces.action)
        self._noise = NoiseTape(self._distribution.noise)

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._actor = make_network(weights, "actor", self._config.activation, plan=self._plan)
        self._weights = weights
        if isinstance(self._distribution, Gaussian):
            self._distribution.load(weights["log_std"])
        self._explore = rng is not None
        self._noise.rewind(rng, steps)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        return self.choose(self._actor(self.features(obs, first)))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        x = self._spaces.encode(obs)
        return normalise(x, self._weights["obs_mean"], self._weights["obs_scale"]) if self._config.normalise_obs else x

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        if not self._explore:
            return self._distribution.mode(outputs), {}
        actions, log_prob = self._distribution.sample(outputs, self._noise.next(len(outputs)))
        return actions, {"log_prob": log_prob}


@dataclass
class _Experience:
    """A rollout's valid transitions, [N, …] each: what the epochs go over. All but `obs` are arrays, or tensors on a GPU."""

    obs: torch.Tensor
    actions: losses.Values
    old_log_prob: losses.Values
    """Of the policy that ratio and clip are taken against."""
    weight: losses.Values
    advantages: losses.Values
    targets: losses.Values
    old_values: losses.Values

    def select(self, rows: Array) -> _Experience:
        obs, *rest = vars(self).values()
        at = torch.from_numpy(rows).to(obs.device)
        return _Experience(obs.index_select(0, at), *(column[rows if obs.is_cpu else at] for column in rest))

    def split(self, sizes: list[int]) -> Iterator[_Experience]:
        begin = 0
        for size in sizes:
            yield _Experience(*(column[begin : begin + size] for column in vars(self).values()))
            begin += size


class PPOLearner:
    """The learning half."""

    def __init__(self, config: PPO, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        rng = networks.torch_rng(context.rng(INIT))
        self._net = networks.ActorCritic(
            spaces.features, spaces.action, config.hidden, config.activation, rng, config.log_std,
            convolutions_of(spaces, config.network),
        )  # fmt: skip
        self._parameters = networks.FlatParameters(self._net, context.device)
        self._adam = networks.Adam(self._parameters, eps=config.adam_eps)
        self._obs_moments = RunningMoments((spaces.features,))
        self._reward_moments = RunningMoments()
        self._running_return = np.zeros(context.envs)
        self._settings = {name: float(getattr(config, name)) for name in ("learning_rate", "entropy_coef", "clip_range")}

    # -- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        if not rollout.env_steps:
            return {"gradient_steps": 0.0}
        take_back = self._undo()
        try:
            # Gradients are written out, and what is not finite is found by looking at the results.
            with torch.no_grad(), np.errstate(all="ignore"):
                return self._update(rollout)
        except BaseException:
            take_back()  # an update is done as a whole or not at all
            raise

    def _undo(self) -> Callable[[], None]:
        """What takes everything back to where it is now."""
        undo_parameters = self._adam.undo()
        moments, running_return = (copy(self._obs_moments), copy(self._reward_moments)), self._running_return.copy()

        def take_back() -> None:
            undo_parameters()
            (self._obs_moments, self._reward_moments), self._running_return = moments, running_return

        return take_back

    def _update(self, rollout: Rollout) -> dict[str, float]:
        obs, next_at = self._observations(rollout)
        experience, metrics = self._evaluate(rollout, obs, next_at)
        rate = self._settings["learning_rate"]
        if self._config.anneal:
            rate *= self._context.annealed(rollout.index)
        metrics |= self._fit(experience, rollout.index, rate)
        if self._config.normalise_obs:
            # Only now: acting and learning of one version see the same statistics.
            valid = rollout.column("valid").reshape(-1)
            self._obs_moments.update(obs[: len(valid)][valid])
        self._check_finite()
        return metrics | {"learning_rate": rate}

    def _check_finite(self) -> None:
        """What the last gradient step made of the parameters shows in no loss, and statistics may overflow unseen."""
        moments = {"observations": self._obs_moments, "returns": self._reward_moments}
        wrong = [f"the statistics of {name}" for name, moment in moments.items() if not moment.is_finite]
        if wrong := wrong + ["the parameters"] * (not self._parameters.is_finite()):
            raise NonFiniteError(f"ppo: not finite after an update: {', '.join(wrong)}\n  {_ADVICE}")

    def _observations(self, rollout: Rollout) -> tuple[Array, Array]:
        """Encoded observations [(T + 1) * B + F, features], the final ones last, and where each row's next one is [T, B]."""
        steps, envs = rollout.column("reward").shape
        time, column, final = rollout.finals()
        parts = [self._spaces.encode(leaves).reshape(-1, self._spaces.features) for leaves in (rollout.obs, final)]
        next_at = np.arange(envs, (steps + 1) * envs).reshape(steps, envs)
        next_at[time, column] = (steps + 1) * envs + np.arange(len(time))
        return np.concatenate(parts), next_at

    def _evaluate(self, rollout: Rollout, obs: Array, next_at: Array) -> tuple[_Experience, dict[str, float]]:
        """Values and log-probabilities by the parameters as they are now, and what follows from them."""
        rows, shape = next_at.size, next_at.shape
        valid = rollout.column("valid")
        x = torch.from_numpy(self._normalise(obs)).to(self._context.device)
        actions = self._near(np.array(rollout.column("action")).reshape(rows, -1))
        values = self._net.critic.trace(x)[-1].squeeze(1).cpu().numpy()
        outputs = losses.near(self._net.actor.trace(x[:rows])[-1])
        log_prob = self._net.distribution(outputs, actions).log_prob
        behaviour = rollout.column("log_prob")
        log_ratio = np.where(valid, losses.tensor(log_prob).cpu().numpy().reshape(shape) - behaviour, 0)
        now = values[:rows].reshape(shape)
        advantages, targets = self._advantages(rollout, now, values[next_at], log_ratio)
        weight = np.exp(np.minimum(log_ratio, math.log(self._config.ratio_cap)))
        if self._config.correction == "none":
            weight, log_prob = np.ones_like(weight), self._near(np.array(behaviour).reshape(-1))
        rest = [self._near(a.astype(np.float32).reshape(-1)) for a in (weight, advantages, targets, now)]
        experience = _Experience(x[:rows], actions, log_prob, *rest)
        if not valid.all():
            experience = experience.select(np.flatnonzero(valid))
        return experience, _staleness_metrics(log_ratio[valid]) | _value_metrics(now[valid], targets[valid])

    def _near(self, array: Array) -> losses.Values:
        return losses.near(torch.from_numpy(array).to(self._context.device))

    def _normalise(self, obs: Array) -> Array:
        return normalise(obs, *self._statistics().values()) if self._config.normalise_obs else obs

    def _statistics(self) -> dict[str, Array]:
        moments = self._obs_moments
        return {"obs_mean": moments.mean.astype(np.float32), "obs_scale": moments.scale.astype(np.float32)}

    def _advantages(
        self, rollout: Rollout, values: Array, next_values: Array, log_ratio: Array
    ) -> tuple[Array, Array]:
        """(advantages, value targets), [T, B] each."""
        ended = rollout.column("terminated"), rollout.column("truncated")
        config, valid = self._config, rollout.column("valid")
        rewards = self._rewards(rollout, *ended, valid)
        decay = {"gamma": config.gamma, "gae_lambda": config.gae_lambda, "valid": valid}
        if config.correction == "vtrace":
            targets, advantages = vtrace(rewards, values, next_values, log_ratio, *ended, **decay)
            return advantages, targets
        advantages = gae(rewards, values, next_values, *ended, **decay)
        return advantages, advantages + values

    def _rewards(self, rollout: Rollout, terminated: Array, truncated: Array, valid: Array) -> Array:
        """Rewards, scaled if asked for. Acting does not need the scale, so this rollout's rewards count already."""
        rewards = rollout.column("reward")
        if not self._config.normalise_rewards:
            return rewards
        returns = np.empty_like(rewards)
        for columns in rollout.turns():
            envs, flags = rollout.envs[columns], (terminated[:, columns], truncated[:, columns])
            start = np.where(rollout.aborted[columns], 0.0, self._running_return[envs])
            returns[:, columns], self._running_return[envs] = running_returns(
                rewards[:, columns], *flags, start, gamma=self._config.gamma, valid=valid[:, columns]
            )
        self._reward_moments.update(returns[valid])
        return np.clip(rewards * self._reward_moments.scale, -REWARD_CLIP, REWARD_CLIP)

    def _fit(self, experience: _Experience, rollout: int, rate: float) -> dict[str, float]:
        """The epochs over one rollout."""
        config, count = self._config, len(experience.obs)
        parts = min(config.minibatches, count)
        sizes = [len(part) for part in np.array_split(np.empty(count), parts)]
        seen: list[list[losses.Values]] = []
        log_ratios: list[losses.Values] = []
        for epoch in range(config.epochs):
            order = self._context.rng(PERMUTE, rollout, epoch).permutation(count)
            for minibatch in experience.select(order).split(sizes):
                self._context.go_on()
                row, log_ratio = self._step(minibatch, rate)
                seen.append(row)
                log_ratios.append(log_ratio)
            epoch_kl = 0.0 if config.target_kl is None else losses.approximate_kl(losses.joined(log_ratios[-parts:]))
            if epoch_kl > (config.target_kl or math.inf):
                break
        rows = losses.numbers(seen)
        self._check_losses(rows)
        metrics: dict[str, float] = dict(zip(_PARTS, rows.mean(0).tolist(), strict=True))
        log_ratio = losses.joined(log_ratios)
        metrics["approx_kl"] = float(losses.approximate_kl(log_ratio))
        metrics["clip_fraction"] = float(losses.clipped_share(log_ratio, self._settings["clip_range"]))
        return metrics | {"gradient_steps": float(len(rows))}

    def _check_losses(self, rows: Array) -> None:
        """Raise NonFiniteError for the first gradient step whose `_PARTS` are not finite: rows [gradient steps, 4]."""
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            first = int(finite.argmin())
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(_PARTS, rows[first], strict=True))
            step = self._adam.steps - len(rows) + first
            raise NonFiniteError(f"ppo: a loss is not finite at gradient step {step}: {parts}\n  {_ADVICE}")

    def _step(self, batch: _Experience, rate: float) -> tuple[list[losses.Values], losses.Values]:
        """One gradient step: (what `_PARTS` names, log ratios [N])."""
        config, settings = self._config, self._settings
        found = self._net.evaluate(batch.obs, batch.actions)
        log_ratio = found.distribution.log_prob - batch.old_log_prob
        advantages = losses.standardise(batch.advantages) if config.normalise_advantages else batch.advantages
        policy_loss, d_log_prob = losses.clipped_surrogate(log_ratio, advantages, settings["clip_range"], batch.weight)
        value_loss, d_value = losses.value_loss(found.value, batch.targets, batch.old_values, config.value_clip)
        found.backward(d_log_prob, -settings["entropy_coef"] / len(log_ratio), config.value_coef * d_value)
        norm = self._parameters.clip_grad(config.max_grad_norm)
        self._adam.step(rate)
        return [policy_loss, value_loss, losses.mean(found.distribution.entropy), losses.near(norm)], log_ratio

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> Weights:
        arrays = self._parameters.arrays(copy=False)
        acting = {name: array for name, array in arrays.items() if not name.startswith("critic.")}
        return acting | self._statistics() if self._config.normalise_obs else acting

    def state_dict(self) -> StateTree:
        return {
            "parameters": self._parameters.arrays(),
            "optimizer": self._adam.state_dict(),
            "obs_moments": self._obs_moments.state_dict(),
            "reward_moments": self._reward_moments.state_dict(),
            "running_return": self._running_return.copy(),
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: StateTree) -> None:
        check_tree(state, self.state_dict())
        self._parameters.load(state["parameters"])
        self._adam.load_state_dict(state["optimizer"])
        self._obs_moments.load_state_dict(state["obs_moments"])
        self._reward_moments.load_state_dict(state["reward_moments"])
        self._running_return = np.array(state["running_return"])
        self._settings = dict(state["settings"])

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing), entropy_coef or clip_range from the next update on."""
        for name, value in changes.items():
            if name not in self._settings:
                raise ValueError(f"ppo cannot change {name!r} during training; it can change {', '.join(self._settings)}")
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name == "entropy_coef"))):
                raise ValueError(f"{name} = {value}: expected a positive number")
        self._settings |= {name: float(value) for name, value in changes.items()}


def _staleness_metrics(log_ratio: Array) -> dict[str, float]:
    """Of the weights proximal / behaviour [N]: effective sample size as a share, second moment of their logarithm, and its
    root, which grows in proportion to the lag."""
    ratio = np.exp(np.clip(log_ratio, -50, 50))
    ess = float(ratio.sum() ** 2 / (len(ratio) * np.square(ratio).sum()))
    m2 = float(np.square(log_ratio).mean())
    return {"ess": ess, "log_ratio_m2": m2, "off_policy_error": math.sqrt(m2)}


def _value_metrics(values: Array, targets: Array) -> dict[str, float]:
    """Share of the targets' variance that the values explain; 0 when there is none to explain."""
    variance = float(targets.var())
    return {"explained_variance": 1.0 - float((targets - values).var()) / variance if variance > 0 else 0.0}
