"""Returns, advantages and targets over segments, in NumPy. Pure functions of arrays [T, B]: time first, then environment.

Throughout, `next_values[t, b]` is the value of the observation that step t led to: V(obs[t + 1]) within an episode and
V(final observation) at its end. A terminated step bootstraps with nothing, a truncated one with `next_values`; neither
lets anything from the next episode flow back. Rows with `valid` False are no transitions: whatever they hold, nothing
flows through them, and what is returned for them means nothing. The last row of a segment bootstraps like a truncated
one.
"""

from __future__ import annotations

import numpy as np

from aiorl.segments import Array


def check_shapes(**arrays: Array | None) -> None:
    """Raise ValueError unless all arrays given have the same shape, before broadcasting hides the mistake."""
    given = {name: array.shape for name, array in arrays.items() if array is not None}
    first, shape = next(iter(given.items()))
    for name, other in given.items():
        if other != shape:
            raise ValueError(f"{name} has shape {list(other)}, but {first} has {list(shape)}")


def gae(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: float,
    gae_lambda: float,
    valid: Array | None = None,
) -> Array:
    """Generalised advantage estimates [T, B] (Schulman et al. 2016, arXiv 1506.02438).

    All arrays [T, B]. The targets for the value function ("lambda returns") are the result plus `values`.
    """
    check_shapes(
        rewards=rewards, values=values, next_values=next_values, terminated=terminated, truncated=truncated, valid=valid
    )
    delta = _td_errors(rewards, values, next_values, terminated, gamma, valid)
    return _reverse_scan(delta, gamma * gae_lambda * _goes_on(terminated, truncated, valid))


def vtrace(
    rewards: Array,
    values: Array,
    next_values: Array,
    log_ratios: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: float,
    gae_lambda: float = 1.0,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    valid: Array | None = None,
) -> tuple[Array, Array]:
    """V-trace (targets, advantages), each [T, B] (Espeholt et al. 2018, arXiv 1802.01561).

    All arrays [T, B]; `log_ratios` = log pi(a|x) - log mu(a|x), mu being the policy that acted. With rho = min(rho_max,
    ratio) and c = gae_lambda * min(c_max, ratio), targets are

        v_t = V_t + rho_t * delta_t + gamma * c_t * (v_{t+1} - V_{t+1})

    and the advantages r_t + gamma * (V_{t+1} + gae_lambda * (v_{t+1} - V_{t+1})) - V_t, to be weighted by rho_t in the
    policy gradient. For gae_lambda = 1 these are the paper's; for ratios of 1 they are GAE's, at every gae_lambda.
    """
    check_shapes(
        rewards=rewards, values=values, next_values=next_values, log_ratios=log_ratios, terminated=terminated,
        truncated=truncated, valid=valid,
    )  # fmt: skip
    ratios = np.exp(np.minimum(log_ratios if valid is None else np.where(valid, log_ratios, 0), 50.0))
    delta = _td_errors(rewards, values, next_values, terminated, gamma, valid)
    decay = gamma * gae_lambda * _goes_on(terminated, truncated, valid)
    errors = _reverse_scan(np.minimum(ratios, rho_max) * delta, np.minimum(ratios, c_max) * decay)
    later = np.concatenate([errors[1:], np.zeros_like(errors[:1])])
    return values + errors, delta + decay * later


def discounted_returns(
    rewards: Array, terminated: Array, truncated: Array, *, gamma: float, valid: Array | None = None
) -> Array:
    """Sum of discounted rewards from each row to the end of its episode or of the segment, [T, B], without bootstrap."""
    check_shapes(rewards=rewards, terminated=terminated, truncated=truncated, valid=valid)
    rewards = rewards if valid is None else np.where(valid, rewards, 0)
    return _reverse_scan(rewards, gamma * _goes_on(terminated, truncated, valid))


def running_returns(
    rewards: Array, terminated: Array, truncated: Array, start: Array, *, gamma: float, valid: Array | None = None
) -> tuple[Array, Array]:
    """Discounted sum of the rewards so far, forwards in time: R_t = gamma * R_{t-1} + r_t, from 0 in each episode.

    `start` [B] is R before the first row. Returns (R [T, B], R to start the next segment with [B]). Its standard deviation
    is what rewards are divided by to normalise them. Rows that are not valid repeat the sum before them.
    """
    check_shapes(rewards=rewards, terminated=terminated, truncated=truncated, valid=valid)
    check_shapes(row_of_rewards=rewards[0], start=start)
    result = np.empty_like(rewards)
    total = start
    for t, reward in enumerate(rewards):
        ahead = gamma * total + reward
        total = ahead if valid is None else np.where(valid[t], ahead, total)
        result[t] = total
        total = np.where(terminated[t] | truncated[t], 0.0, total)
    return result, total


def n_step(rewards: Array, terminated: Array, last: Array, *, gamma: float) -> tuple[Array, Array, Array]:
    """n-step returns of windows of n successive rows, [n, N] each: (returns [N], discounts [N], steps [N]).

    A window ends early after a row marked `last` (an episode's end, the newest row stored, a cut). `steps` m is how many
    rows count, `returns` their discounted rewards, and `discounts` = gamma^m, or 0 if row m - 1 terminated: the target is
    returns + discounts * V(the observation that row m - 1 led to). (Sutton 1988; Mnih et al. 2016, arXiv 1602.01783.)
    """
    check_shapes(rewards=rewards, terminated=terminated, last=last)
    counts = np.empty(rewards.shape, bool)
    counts[0] = True
    np.logical_and.accumulate(~last[:-1], axis=0, out=counts[1:])
    powers = gamma ** np.arange(len(rewards) + 1)
    returns = (np.where(counts, rewards, 0) * powers[:-1, None]).sum(0)
    steps = counts.sum(0)
    ended = terminated[steps - 1, np.arange(rewards.shape[1])]
    return returns, powers[steps] * ~ended, steps


def _td_errors(
    rewards: Array, values: Array, next_values: Array, terminated: Array, gamma: float, valid: Array | None
) -> Array:
    errors = rewards + gamma * np.where(terminated, 0, next_values) - values
    return errors if valid is None else np.where(valid, errors, 0)


def _goes_on(terminated: Array, truncated: Array, valid: Array | None) -> Array:
    """1 where the next row belongs to the same episode, else 0, as floats."""
    goes_on = ~(terminated | truncated)
    return (goes_on if valid is None else goes_on & valid).astype(np.float64)


def _reverse_scan(first: Array, decay: Array) -> Array:
    """x[t] = first[t] + decay[t] * x[t + 1], with x[T] = 0."""
    result = np.array(first, np.result_type(first, decay))
    for row, factor, later in zip(result[-2::-1], decay[-2::-1], result[:0:-1], strict=True):
        row += factor * later
    return result
