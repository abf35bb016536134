"""What a policy does when it is handled as a worker handles it: one check for each clause of its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from aiorl.algos.base import Algorithm, LearnerContext, Policy, Recurrent, RecurrentPolicy, Weights
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Rollout
from aiorl.testing.bench import ENVS, HALF, SEED, STEPS, Bench, copied, difference, layout_of, same
from aiorl.testing.chance import watched
from aiorl.testing.findings import Finding, error, warning

TRIES = 16
CUT = 13  # a prime, so that hardly any rhythm happens to begin anew there


def actions(algorithm: Algorithm, spaces: Spaces, given: LearnerContext) -> Iterator[Finding]:
    """Discrete actions are those of the space, before anything learns from others (a box is clipped to its bounds)."""
    if not spaces.action.nvec:
        return
    acting, nvec = algorithm.policy(spaces), np.array(spaces.action.nvec)
    acting.begin(copied(algorithm.learner(spaces, given).weights()), 0, np.random.default_rng(SEED), STEPS)
    obs = {name: np.zeros((ENVS, *column.shape), column.dtype) for name, column in spaces.obs_columns.items()}
    for _ in range(STEPS):
        chosen = np.asarray(acting.act(obs, np.zeros(ENVS, bool))[0]).reshape(ENVS, -1)
        wrong = (chosen < 0) | (chosen >= nvec)
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            yield error(
                "action-space",
                f"the policy chooses {chosen[row, place]}, the space has 0 to {nvec[place] - 1}",
                "stored actions count from 0, whatever the space's first value is",
            )
            return


def policy(bench: Bench) -> Iterator[Finding]:
    """Its weights lie in memory that others read, its observations in a segment; its chance is its generator's."""
    recorded = bench.tape[-1].rollout()
    obs = {name: leaf[0].copy() for name, leaf in recorded.obs.items()}
    fixed = copied(bench.trained(HALF).weights())
    for array in fixed.values():
        array.flags.writeable = False
    used: set[str] = set()
    shown = {name: leaf.copy() for name, leaf in obs.items()}
    try:
        with watched(used):
            greedy, _ = _act(bench, fixed, shown, None)
            drawn, extras = _act(bench, fixed, shown, SEED)
    except ValueError as failure:
        if "read-only" not in str(failure):
            raise
        yield error(
            "writes-weights", "the policy writes into its weights, which other workers act with", "work on a copy"
        )
        return
    if used:
        yield error(
            "global-chance",
            f"the policy uses the global generator of {', '.join(sorted(used))}",
            "draw from begin's rng only",
        )
    if not same(obs, shown):
        yield error(
            "writes-obs", "the policy writes into its observations, which are stored as they are", "work on a copy"
        )
    again, more = _act(bench, fixed, obs, SEED)
    if not (same({"a": drawn, **extras}, {"a": again, **more})):
        yield error("not-repeatable", "with the same weights, observations and generator the policy acts differently")
    # More than once: few actions to choose from are soon the same by chance.
    if not all(same({"a": greedy}, {"a": _act(bench, fixed, obs, None)[0]}) for _ in range(TRIES)):
        yield error(
            "not-deterministic",
            "with rng = None the policy acts differently at the second time",
            "take the most likely action",
        )
    yield from _dtypes(bench, drawn, extras)
    yield from _memory(bench, fixed)


def _memory(bench: Bench, weights: Weights) -> Iterator[Finding]:
    """A worker that is replaced, and a run that is resumed, have a new policy for the next segment."""
    algorithm, cut = bench.algorithm, CUT
    old, new = (algorithm.policy(bench.spaces) for _ in range(2))
    _play(old, weights, bench.tape[0].rollout(), range(cut))
    if isinstance(algorithm, Recurrent):
        state = copied(cast(RecurrentPolicy, old).state())
        like = {k: np.empty((ENVS, *c.shape), c.dtype) for k, c in algorithm.policy_state(bench.spaces).items()}
        declared = layout_of(like)
        if (found := layout_of(state)) != declared:
            other = difference(found, declared)
            yield error("policy-state", f"state() and policy_state() differ: {other} is in one of them only")
            return
        cast(RecurrentPolicy, new).restore(state)
    if same(*(_play(policy, weights, bench.tape[0].rollout(), range(cut, STEPS)) for policy in (old, new))):
        return
    if isinstance(algorithm, Recurrent):
        yield error(
            "policy-state",
            "a policy that was restored acts differently from the one whose state it got",
            "let state() return all that it remembers, and restore() take it over",
        )
    else:
        yield error(
            "forgets",
            "the policy remembers something beyond begin(): after a restart of its worker, or a resume, it acts differently",
            "declare it by policy_state(), with state() and restore() of the policy, or forget it in begin()",
        )


def _play(policy: Policy, weights: Weights, rollout: Rollout, rows: range) -> dict[str, Array]:
    """What it does and returns at some recorded observations, as a segment of its own, taken for one long episode."""
    policy.begin(weights, rollout.index, np.random.default_rng(SEED + rows.start), len(rows))
    found: dict[str, list[Array]] = {}
    for t in rows:
        obs = {name: leaf[t].copy() for name, leaf in rollout.obs.items()}
        actions, extras = policy.act(obs, np.full(ENVS, t == 0))
        for name, value in {"action": actions, **extras}.items():
            found.setdefault(name, []).append(np.array(value))
    return {name: np.stack(values) for name, values in found.items()}


def _act(
    bench: Bench, weights: Weights, obs: Mapping[str, Array], seed: int | None
) -> tuple[Array, Mapping[str, Array]]:
    acting: Policy = bench.algorithm.policy(bench.spaces)
    acting.begin(weights, 0, None if seed is None else np.random.default_rng(seed), STEPS)
    actions, extras = acting.act(obs, np.ones(ENVS, bool))
    return np.array(actions), {name: np.array(value) for name, value in extras.items()}


def _dtypes(bench: Bench, actions: Array, extras: Mapping[str, Array]) -> Iterator[Finding]:
    """Values are cast into their columns: what would be lost on the way is a mistake."""
    columns = {"action": bench.spaces.action_column, **bench.algorithm.columns(bench.spaces)}
    given = {"action": actions, **extras}
    for name, column in columns.items():
        if name not in given:
            yield error("columns", f"act() returns no {name!r}, which columns() declares")
            continue
        value, declared = given[name], np.dtype(column.dtype)
        if value.shape != (ENVS, *column.shape):
            yield error("columns", f"act() returns {name!r} of shape {value.shape}, expected {(ENVS, *column.shape)}")
        elif not np.can_cast(value.dtype, declared, "same_kind"):
            yield error(
                "dtype",
                f"act() returns {name!r} as {value.dtype}, which cannot be stored as {declared} without loss",
            )
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            yield error("dtype", f"act() returns {name!r} that is not finite")
        elif not np.can_cast(value.dtype, declared, "safe"):
            yield warning(
                "dtype",
                f"act() returns {name!r} as {value.dtype}; stored, it is rounded to {declared}: declare or return the other",
            )
