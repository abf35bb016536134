"""The replay ring against a list of everything that ever happened."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from experience import Stream, digest, spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.buffers.replay import Replay, gradient_steps_owed
from aiorl.segments import Column, Rollout

# -- how many gradient steps -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(0, 1000), st.decimals(0, 4, places=3))
def test_gradient_steps_are_exact_however_the_steps_arrive(rollouts: list[int], warmup: int, ratio: object):
    stored = done = 0
    for env_steps in rollouts:
        stored += env_steps
        owed = gradient_steps_owed(stored, warmup, float(ratio)) - done  # type: ignore[arg-type]
        assert owed >= 0
        done += owed
        if stored <= warmup:
            assert done == 0
    assert done == int(max(0, stored - warmup) * Fraction(str(ratio)))


@pytest.mark.parametrize(
    ("env_steps", "warmup", "ratio", "owed"),
    [(100, 0, 0.29, 29), (30, 0, 0.1, 3), (999, 1000, 1.0, 0), (1003, 1000, 1.0, 3), (10, 0, 2.5, 25), (7, 0, 0.5, 3)],
)
def test_gradient_steps_owed(env_steps: int, warmup: int, ratio: float, owed: int):
    assert gradient_steps_owed(env_steps, warmup, ratio) == owed


# -- against brute force -----------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One row of one environment, as it happened."""

    obs: list[float]
    action: int
    reward: float
    terminated: bool
    ended: bool
    valid: bool
    next_obs: list[float]


def history(rollouts: list[Rollout], envs: int) -> list[list[Step]]:
    """Everything that happened, by environment."""
    steps: list[list[Step]] = [[] for _ in range(envs)]
    for rollout in rollouts:
        obs, next_obs = rollout.obs["obs"], rollout.next_obs()["obs"]
        column = rollout.column
        for t in range(rollout.steps):
            for b in range(envs):
                terminated = bool(column("terminated")[t, b])
                step = Step(
                    obs[t, b].tolist(), int(column("action")[t, b]), float(column("reward")[t, b]), terminated,
                    terminated or bool(column("truncated")[t, b]), bool(column("valid")[t, b]), next_obs[t, b].tolist(),
                )  # fmt: skip
                steps[b].append(step)
    return steps


def brute_force(steps: list[Step], start: int, n: int, gamma: float) -> tuple[float, float, list[float]]:
    """(return, discount, next observation) of at most n steps from `start`."""
    total, discount = 0.0, 1.0
    for step in steps[start : start + n]:
        assert step.valid
        total += discount * step.reward
        discount *= gamma
        if step.ended:
            break
    return total, 0.0 if step.terminated else discount, step.next_obs


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000), envs=st.integers(1, 3), length=st.integers(1, 7), rollouts=st.integers(1, 6),
    rows=st.integers(1, 12), n=st.integers(1, 5), takes_a_row=st.booleans(),
)  # fmt: skip
def test_n_step_transitions(seed: int, envs: int, length: int, rollouts: int, rows: int, n: int, takes_a_row: bool):
    stream = Stream(spaces(), envs, length, resets_take_a_row=takes_a_row, seed=seed)
    replay = Replay(stream.space, envs, rows * envs + envs - 1)
    assert replay.rows == rows
    made = [stream.next() for _ in range(rollouts)]
    for rollout in made:
        replay.add(rollout)
    steps = history(made, envs)
    total = rollouts * length
    alive = {(t, b) for t in range(max(0, total - rows), total) for b in range(envs) if steps[b][t].valid}
    assert len(replay) == len(alive)
    assert replay.env_steps == sum(step.valid for env in steps for step in env)
    if not alive:
        return
    batch = replay.gather(replay._marks.places(), n, 0.9)
    seen = set()
    for i in range(len(alive)):
        time, env, _ = batch.obs["obs"][i].astype(int).tolist()
        start = (time, env)
        seen.add(start)
        expected = brute_force(steps[env], time, n, 0.9)
        assert batch.action[i] == steps[env][time].action
        assert batch.returns[i] == pytest.approx(expected[0], abs=1e-12)
        assert batch.discounts[i] == pytest.approx(expected[1], abs=1e-12)
        assert batch.next_obs["obs"][i].tolist() == expected[2]
    assert seen == alive


def test_sampling_is_uniform_over_valid_transitions():
    stream = Stream(spaces(), 2, 10, resets_take_a_row=True)
    replay = Replay(stream.space, 2, 100)
    replay.add(stream.next())
    batch = replay.sample(np.random.default_rng(0), 20_000)
    keys, counts = np.unique(batch.obs["obs"], axis=0, return_counts=True)
    assert len(keys) == len(replay)
    np.testing.assert_allclose(counts / 20_000, 1 / len(replay), atol=0.01)


def test_counts_below_1_are_refused_by_name():
    stream = Stream(spaces(), 1, 3)
    replay, rng = Replay(stream.space, 1, 9), np.random.default_rng(0)
    replay.add(stream.next())
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"replay: envs = {count}, expected 1 or more"):
            Replay(stream.space, count, 9)
        with pytest.raises(ValueError, match=f"replay: n = {count}, expected 1 or more"):
            replay.sample(rng, 1, n=count)
        with pytest.raises(ValueError, match=f"replay: n = {count}, expected 1 or more"):
            replay.gather(np.array([0]), count, 0.9)
        with pytest.raises(ValueError, match=f"replay: length = {count}, expected 1 or more"):
            replay.sequences(rng, 1, count)
    assert len(replay.sample(rng, 1).index) == 1, "whoever comes next is not kept out"


def test_a_rollout_that_does_not_follow_cuts_the_window():
    """The same environment brought back elsewhere, or another environment in its column: the older end bootstraps."""
    stream = Stream(spaces(), 1, 3)
    a, b = stream.next(), stream.next()
    for rollout in (a, b):
        rollout.segments[0].columns["terminated"][...] = rollout.segments[0].columns["truncated"][...] = False
        rollout.segments[0].clear()

    def discount_of_last(second: Rollout) -> float:
        replay = Replay(stream.space, 1, 10)
        replay.add(a)
        replay.add(second)
        return float(replay.gather(np.array([2]), 3, 0.5).discounts[0])

    assert discount_of_last(b) == pytest.approx(0.5**3)
    assert discount_of_last(Rollout(1, 1, b.segments, np.array([7]))) == pytest.approx(0.5)
    b.segments[0].obs["obs"][0] += 1
    assert discount_of_last(b) == pytest.approx(0.5)


def test_a_window_does_not_go_on_into_a_row_that_is_no_transition():
    """Rows that a shorter segment left unused follow without an episode's end."""
    stream = Stream(spaces(), 1, 4)
    rollout = stream.next()
    columns = rollout.segments[0].columns
    columns["terminated"][...] = columns["truncated"][...] = False
    columns["reward"][:, 0], columns["valid"][:, 0] = [1, 1, 100, 100], [True, True, False, False]
    rollout.segments[0].clear()
    replay = Replay(stream.space, 1, 10)
    replay.add(rollout)
    batch = replay.gather(np.array([0]), 3, 0.5)
    assert (batch.returns[0], batch.discounts[0]) == (1.5, 0.25)
    assert batch.next_obs["obs"][0].tolist() == [2, 0, 0]


def test_only_the_end_of_a_long_rollout_is_kept():
    stream = Stream(spaces(), 2, 10)
    replay = Replay(stream.space, 2, 6)
    replay.add(stream.next())
    assert replay.env_steps == 20
    assert sorted(set(replay.sample(np.random.default_rng(0), 200).obs["obs"][:, 0].tolist())) == [7, 8, 9]


def test_a_rollout_of_more_environments_than_the_buffer_has_is_refused_by_name():
    replay = Replay(spaces(), 2, 6)
    with pytest.raises(ValueError, match=r"replay: a rollout of 3 environments, expected 2 at most\n  make it .* envs = 3"):
        replay.add(Stream(spaces(), 3, 4).next())
    replay.add(Stream(spaces(), 2, 4).next())
    assert replay.env_steps == 8


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollouts", [0, 1, 5])
def test_state_round_trip_is_exact(rollouts: int):
    stream = Stream(spaces(), 2, 4, resets_take_a_row=True)
    a, b = Replay(stream.space, 2, 20), Replay(stream.space, 2, 20)
    for _ in range(rollouts):
        a.add(stream.next())
    b.load_state_dict(a.state_dict())
    assert digest(a.state_dict()) == digest(b.state_dict())
    more = stream.next()
    for replay in (a, b):
        replay.add(more)
    assert digest(a.state_dict()) == digest(b.state_dict())
    for x, y in zip(*(r.sample(np.random.default_rng(0), 9, n=3, gamma=0.9).returns for r in (a, b)), strict=True):
        assert x == y


def test_a_state_without_the_columns_that_are_kept_is_refused_by_name():
    stream = Stream(spaces(), 2, 4)
    with_own, without = Replay(stream.space, 2, 20, columns={"log_prob": Column()}), Replay(stream.space, 2, 20)
    for replay, rollout in ((with_own, stream.next()), (without, stream.next())):
        replay.add(rollout)
    with pytest.raises(ValueError, match=r"replay\.columns\.own\.log_prob"):
        with_own.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match=r"replay\.columns\.own\.log_prob"):
        without.load_state_dict(with_own.state_dict())


def test_a_state_that_does_not_fit_is_refused_by_name():
    stream = Stream(spaces(), 2, 4)
    replay = Replay(stream.space, 2, 20)
    replay.add(stream.next())
    state = replay.state_dict()
    with pytest.raises(ValueError, match=r"replay\.rows: this ring has 5, the one saved 10"):
        Replay(stream.space, 2, 10).load_state_dict(state)
    with pytest.raises(ValueError, match=r"replay\.columns\.reward: expected float64 \[4, 2\], got float32 \[4, 2\]"):
        replay.load_state_dict(state | {"columns": state["columns"] | {"reward": np.zeros((4, 2), np.float32)}})
    with pytest.raises(ValueError, match=r"replay\.lanes"):
        replay.load_state_dict({k: v for k, v in state.items() if k != "lanes"})
    with pytest.raises(ValueError, match=r"replay\.columns\.action: expected int64 \[10, 2\], got int64 \[4, 2\]"):
        replay.load_state_dict(state | {"lanes": state["lanes"] | {"written": np.array([99, 4])}})
    with pytest.raises(ValueError, match=r"replay\.lanes\.written: -3 rows, expected none below 0"):
        replay.load_state_dict(state | {"lanes": state["lanes"] | {"written": np.array([-3, 4])}})
