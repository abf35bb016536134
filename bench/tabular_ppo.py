"""PPO with a softmax policy and values in tables, on many `Garnets` at once, learning from rollouts D versions old.

The learner is `aiorl.algos.ppo` with a table for a network: the same order of work, the same meaning of `correction`, the
library's own returns and losses (each process is a batch of its own under `torch.vmap`), Adam, annealing and limit on the
gradient. Rollout k is acted by version max(0, k - D), as in the `ordered` schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aiorl.losses import clipped_surrogate, standardise, value_loss
from aiorl.returns import gae, vtrace
from aiorl.segments import Array
from bench.garnet import Garnets, start_states

Correction = Literal["decoupled", "vtrace", "none"]

# One process after the other along the first axis, as if each were a call of its own.
_standardise = torch.vmap(standardise)
_clipped_surrogate = torch.vmap(clipped_surrogate, in_dims=(0, 0, None, 0))
_value_loss = torch.vmap(value_loss)


@dataclass(frozen=True)
class Settings:
    """As in `aiorl.PPO`; a rollout is `steps` of `envs` chains of each process."""

    learning_rate: float = 0.05
    updates: int = 120
    steps: int = 16
    envs: int = 8
    epochs: int = 4
    minibatches: int = 4
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ratio_cap: float = 2.0
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    adam_eps: float = 1e-5


class Learning(NamedTuple):
    """What came of it: exact returns [updates + 1, M] of every version, and by update what `Updated` events carry."""

    returns: Array
    log_ratio_m2: Array
    clip_fraction: Array


class _Rollout(NamedTuple):
    """[steps, M, B] each; `after` is the state that the step led to, also where the episode then ended."""

    states: Array
    actions: Array
    log_prob: Array
    rewards: Array
    after: Array
    ended: Array


def learn(garnets: Garnets, correction: Correction, degree: int, settings: Settings, seed: int) -> Learning:
    """Learn in every process. The random numbers are the same for every correction and degree: differences are paired."""
    m, s, a = garnets.shape
    tables = torch.zeros(m, s, a, dtype=torch.float64), torch.zeros(m, s, dtype=torch.float64)
    adam = torch.optim.Adam(tables, lr=settings.learning_rate, eps=settings.adam_eps)
    transitions = garnets.transitions()
    policies = [_policy(tables[0])]
    states = start_states(np.random.default_rng((seed, 1)).random((m, settings.envs)), s)
    measured: list[tuple[float, float]] = []
    for k in range(settings.updates):
        adam.param_groups[0]["lr"] = settings.learning_rate * (1 - k / settings.updates)
        rng = np.random.default_rng((seed, 2, k))
        rollout, states = _collect(garnets, policies[max(0, k - degree)], states, rng, settings)
        measured.append(_update(tables, adam, rollout, correction, garnets.gamma, rng, settings))
        policies.append(_policy(tables[0]))
    returns = [garnets.returns(policy, transitions) for policy in policies]
    m2, clipped = np.array(measured).T
    return Learning(np.array(returns), m2, clipped)


def normalised_area(garnets: Garnets, returns: Array) -> Array:
    """Mean height [M] of the curves [updates + 1, M]: 0 is the uniform policy, with which learning begins, 1 the best."""
    best = garnets.returns(garnets.optimal())
    return ((returns - returns[0]) / (best - returns[0])).mean(0)


def _policy(logits: Tensor) -> Array:
    return logits.softmax(-1).numpy().copy()


def _collect(
    garnets: Garnets, policy: Array, states: Array, rng: np.random.Generator, settings: Settings
) -> tuple[_Rollout, Array]:
    """One rollout, and the states to go on from."""
    chance = rng.random((settings.steps, 4, *states.shape))
    bounds = policy.cumsum(-1)[..., :-1]
    process = np.arange(len(policy))[:, None]
    rows: list[tuple[Array, ...]] = []
    for t in range(settings.steps):
        actions = (chance[t, 0][..., None] >= bounds[process, states]).sum(-1)
        log_prob = np.log(policy[process, states, actions])
        rewards, after, ended, following = garnets.step(states, actions, chance[t, 1:])
        rows.append((states, actions, log_prob, rewards, after, ended))
        states = following
    return _Rollout(*(np.stack(column) for column in zip(*rows, strict=True))), states


def _update(
    tables: tuple[Tensor, Tensor],
    adam: torch.optim.Adam,
    rollout: _Rollout,
    correction: Correction,
    gamma: float,
    rng: np.random.Generator,
    settings: Settings,
) -> tuple[float, float]:
    """All epochs over one rollout, as `PPOLearner` does them. Returns the second moment of the log-ratio, clip fraction."""
    logits, values = tables
    process = np.arange(len(values))[None, :, None]
    proximal = logits.log_softmax(-1).numpy()[process, rollout.states, rollout.actions]
    log_ratio = proximal - rollout.log_prob
    now, following = values.numpy()[process, rollout.states], values.numpy()[process, rollout.after]
    advantages, targets = _advantages(rollout, now, following, log_ratio, correction, gamma, settings.gae_lambda)
    weight, old = np.exp(np.minimum(log_ratio, math.log(settings.ratio_cap))), proximal
    if correction == "none":
        weight, old = np.ones_like(weight), rollout.log_prob
    columns = [_by_process(x) for x in (rollout.states, rollout.actions, old, weight, advantages, targets)]
    clipped: list[float] = []
    for _ in range(settings.epochs):
        order = torch.from_numpy(rng.permutation(columns[0].shape[1]))
        for rows in order.chunk(settings.minibatches):
            ratio = _step(tables, adam, [column[:, rows] for column in columns], settings)
            clipped.append(float((ratio.expm1().abs() > settings.clip_range).double().mean()))
    return float(np.square(log_ratio).mean()), float(np.mean(clipped))


def _advantages(
    rollout: _Rollout, now: Array, following: Array, log_ratio: Array, correction: Correction, gamma: float, decay: float
) -> tuple[Array, Array]:
    """(advantages, value targets), [steps, M, B] each."""
    shape = now.shape
    flat = [x.reshape(len(x), -1) for x in (rollout.rewards, now, following, log_ratio, rollout.ended)]
    rewards, values, next_values, log_ratios, terminated = flat
    ended = terminated, np.zeros_like(terminated)
    if correction == "vtrace":
        targets, advantages = vtrace(
            rewards, values, next_values, log_ratios, *ended, gamma=gamma, gae_lambda=decay
        )
    else:
        advantages = gae(rewards, values, next_values, *ended, gamma=gamma, gae_lambda=decay)
        targets = advantages + values
    return advantages.reshape(shape), targets.reshape(shape)


def _by_process(x: Array) -> Tensor:
    """[steps, M, B] as [M, steps * B]."""
    return torch.from_numpy(x.swapaxes(0, 1).reshape(x.shape[1], -1))


def _step(tables: tuple[Tensor, Tensor], adam: torch.optim.Adam, batch: list[Tensor], settings: Settings) -> Tensor:
    """One gradient step on a minibatch of every process; returns the log-ratios [M, N]."""
    logits, values = tables
    states, actions, old, weight, advantages, targets = batch
    process = torch.arange(len(values)).unsqueeze(1)
    log_pi = logits[process, states].log_softmax(-1)
    log_ratio = log_pi.gather(2, actions.unsqueeze(2)).squeeze(2) - old
    _, d_log_prob = _clipped_surrogate(log_ratio, _standardise(advantages), settings.clip_range, weight)
    _, d_value = _value_loss(values[process, states], targets)
    # d log pi(a) / d logits = onehot(a) - pi, added up where a state occurs more than once
    d_logits = -d_log_prob.unsqueeze(2) * log_pi.exp()
    d_logits.scatter_add_(2, actions.unsqueeze(2), d_log_prob.unsqueeze(2))
    logits.grad = torch.zeros_like(logits).index_put_((process, states), d_logits, accumulate=True)
    values.grad = torch.zeros_like(values).index_put_((process, states), settings.value_coef * d_value, accumulate=True)
    norm = (logits.grad.square().sum((1, 2)) + values.grad.square().sum(1)).sqrt()
    scale = (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    logits.grad *= scale[:, None, None]
    values.grad *= scale[:, None]
    adam.step()
    return log_ratio
