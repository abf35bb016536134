"""Returns against closed forms and against the definitions written out as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from experience import ends
from hypothesis import given
from hypothesis import strategies as st

from aiorl.returns import discounted_returns, gae, n_step, running_returns, vtrace
from aiorl.segments import Array

GAMMA = 0.9
V_NEXT = 5.0


def made_up(seed: int, steps: int, envs: int, takes_a_row: bool) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shape = (steps, envs)
    flags = ends(rng, steps, envs, resets_take_a_row=takes_a_row, ended=rng.random(envs) < 0.3)
    return {name: rng.normal(size=shape) for name in ("rewards", "values", "next_values")} | flags


cases = st.builds(made_up, st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4), st.booleans())
decays = st.floats(0, 1)


def row(x: float) -> Array:
    return np.array([[x]])


# -- one step, in closed form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize(("terminated", "target"), [(True, 1.0), (False, 1.0 + GAMMA * V_NEXT)])
def test_truncation_bootstraps_and_termination_does_not(terminated: bool, target: float, gae_lambda: float):
    flags = {"terminated": np.array([[terminated]]), "truncated": np.array([[not terminated]])}
    value = 2.0
    advantage = gae(row(1.0), row(value), row(V_NEXT), **flags, gamma=GAMMA, gae_lambda=gae_lambda)
    assert advantage[0, 0] + value == pytest.approx(target, abs=1e-6)
    targets, _ = vtrace(row(1.0), row(value), row(V_NEXT), row(0.0), **flags, gamma=GAMMA, gae_lambda=gae_lambda)
    assert targets[0, 0] == pytest.approx(target, abs=1e-6)
    returns, discounts, steps = n_step(row(1.0), flags["terminated"], np.array([[True]]), gamma=GAMMA)
    assert returns[0] + discounts[0] * V_NEXT == pytest.approx(target, abs=1e-6)
    assert steps[0] == 1


def test_constant_reward_over_a_whole_episode():
    """Four steps of reward 1 that end in a truncation: values 0, so the advantage with lambda 1 is the discounted return."""
    steps, zeros = 4, np.zeros((4, 1))
    truncated = np.array([[False], [False], [False], [True]])
    next_values = np.array([[0.0], [0.0], [0.0], [V_NEXT]])
    found = gae(np.ones((4, 1)), zeros, next_values, zeros > 0, truncated, gamma=GAMMA, gae_lambda=1.0)
    expected = [sum(GAMMA**i for i in range(steps - t)) + GAMMA ** (steps - t) * V_NEXT for t in range(steps)]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)


def test_the_next_episode_does_not_flow_back():
    rewards = np.array([[1.0], [1000.0]])
    truncated = np.array([[True], [False]])
    flags = {"terminated": truncated & False, "truncated": truncated}
    found = gae(rewards, np.zeros((2, 1)), np.full((2, 1), V_NEXT), **flags, gamma=GAMMA, gae_lambda=1.0)
    assert found[0, 0] == pytest.approx(1 + GAMMA * V_NEXT)


# -- against the definitions -------------------------------------------------------------------------------------------


@given(cases, decays, decays)
def test_gae_is_the_sum_of_discounted_errors(case: dict[str, Array], gamma: float, gae_lambda: float):
    found = gae(**case, gamma=gamma, gae_lambda=gae_lambda)
    steps, envs = found.shape
    for b in range(envs):
        for t in range(steps):
            total, factor = 0.0, 1.0
            for i in range(t, steps):
                if not case["valid"][i, b]:
                    break
                bootstrap = 0.0 if case["terminated"][i, b] else case["next_values"][i, b]
                total += factor * (case["rewards"][i, b] + gamma * bootstrap - case["values"][i, b])
                factor *= gamma * gae_lambda
                if case["terminated"][i, b] or case["truncated"][i, b]:
                    break
            assert found[t, b] == pytest.approx(total, abs=1e-9)


@given(cases, decays, decays, st.floats(0.1, 3), st.floats(0.1, 3), st.integers(0, 1000))
def test_vtrace_is_the_papers_sum(
    case: dict[str, Array], gamma: float, gae_lambda: float, rho_max: float, c_max: float, seed: int
):
    ratios = np.exp(np.random.default_rng(seed).normal(size=case["rewards"].shape))
    limits = {"rho_max": rho_max, "c_max": c_max}
    targets, advantages = vtrace(**case, log_ratios=np.log(ratios), gamma=gamma, gae_lambda=gae_lambda, **limits)
    steps, envs = targets.shape
    for b in range(envs):
        for t in range(steps):
            total, traces, first = 0.0, 1.0, 0.0
            for i in range(t, steps):
                if not case["valid"][i, b]:
                    break
                bootstrap = 0.0 if case["terminated"][i, b] else case["next_values"][i, b]
                delta = case["rewards"][i, b] + gamma * bootstrap - case["values"][i, b]
                first = delta if i == t else first
                total += gamma ** (i - t) * traces * min(rho_max, ratios[i, b]) * delta
                if i == t:
                    after_first = total
                traces *= gae_lambda * min(c_max, ratios[i, b])
                if case["terminated"][i, b] or case["truncated"][i, b]:
                    break
            assert targets[t, b] == pytest.approx(case["values"][t, b] + total, abs=1e-8)
            if case["valid"][t, b]:
                c = min(c_max, ratios[t, b])
                assert advantages[t, b] == pytest.approx(first + (total - after_first) / c, abs=1e-7)


@given(cases, decays, decays)
def test_vtrace_of_the_same_policy_is_gae(case: dict[str, Array], gamma: float, gae_lambda: float):
    expected = gae(**case, gamma=gamma, gae_lambda=gae_lambda)
    targets, advantages = vtrace(**case, log_ratios=np.zeros_like(expected), gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(targets - case["values"], expected, atol=1e-9)
    np.testing.assert_allclose(advantages, expected, atol=1e-9)


@given(cases, decays)
def test_discounted_returns_are_gae_without_values(case: dict[str, Array], gamma: float):
    none = np.zeros_like(case["rewards"])
    found = discounted_returns(case["rewards"], case["terminated"], case["truncated"], gamma=gamma, valid=case["valid"])
    np.testing.assert_allclose(found, gae(**case | {"values": none, "next_values": none}, gamma=gamma, gae_lambda=1.0))


@given(cases, decays)
def test_running_returns_go_on_from_segment_to_segment(case: dict[str, Array], gamma: float):
    rewards, ended, valid = case["rewards"], case["terminated"] | case["truncated"], case["valid"]
    steps, envs = rewards.shape
    expected = np.zeros((steps, envs))
    for b in range(envs):
        total = 0.0
        for t in range(steps):
            total = gamma * total + rewards[t, b] if valid[t, b] else total
            expected[t, b] = total
            total = 0.0 if ended[t, b] else total
    cut, total = steps // 2, np.zeros(envs)
    parts = []
    for part in (slice(0, cut), slice(cut, steps)):
        if part.stop > part.start:
            flags = {"terminated": case["terminated"][part], "truncated": case["truncated"][part]}
            found, total = running_returns(rewards[part], **flags, start=total, gamma=gamma, valid=valid[part])
            parts.append(found)
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), decays)
def test_n_step_windows(seed: int, n: int, width: int, gamma: float):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(n, width))
    terminated = rng.random((n, width)) < 0.2
    last = terminated | (rng.random((n, width)) < 0.2)
    returns, discounts, steps = n_step(rewards, terminated, last, gamma=gamma)
    for i in range(width):
        total, m = 0.0, 0
        for t in range(n):
            total += gamma**t * rewards[t, i]
            m += 1
            if last[t, i]:
                break
        assert steps[i] == m
        assert returns[i] == pytest.approx(total, abs=1e-12)
        assert discounts[i] == pytest.approx(0.0 if terminated[m - 1, i] else gamma**m)


# -- rows that are not transitions -------------------------------------------------------------------------------------


@given(cases, decays, decays, st.sampled_from([np.nan, np.inf, 1e30]))
def test_what_invalid_rows_hold_does_not_matter(case: dict[str, Array], gamma: float, gae_lambda: float, junk: float):
    invalid = ~case["valid"]
    spoilt = {k: np.where(invalid, junk, v) if v.dtype == np.float64 else v for k, v in case.items()}
    ratios = np.zeros_like(case["rewards"])
    decay: dict[str, Any] = {"gamma": gamma, "gae_lambda": gae_lambda}
    with np.errstate(invalid="ignore", over="ignore"):
        dirty = [gae(**spoilt, **decay), *vtrace(**spoilt, log_ratios=np.where(invalid, junk, ratios), **decay)]
    clean = [gae(**case, **decay), *vtrace(**case, log_ratios=ratios, **decay)]
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a[case["valid"]], b[case["valid"]])
    assert not dirty[0][invalid].any()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["values", "next_values", "terminated", "truncated", "valid"])
def test_a_shape_that_would_broadcast_is_refused(wrong: str):
    arrays: dict[str, Array] = {name: np.ones((4, 3)) for name in ("rewards", "values", "next_values")}
    arrays |= {name: np.ones((4, 3), bool) for name in ("terminated", "truncated", "valid")}
    arrays[wrong] = arrays[wrong][:1]
    with pytest.raises(ValueError, match=rf"{wrong} has shape \[1, 3\], but rewards has \[4, 3\]"):
        gae(**arrays, gamma=0.9, gae_lambda=0.9)


def test_inputs_are_left_alone():
    case = made_up(1, 6, 3, True)
    before = {name: array.copy() for name, array in case.items()}
    gae(**case, gamma=0.9, gae_lambda=0.9)
    vtrace(**case, log_ratios=np.zeros((6, 3)), gamma=0.9)
    assert all((case[name] == before[name]).all() for name in case)
