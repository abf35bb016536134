"""Replay of rollouts that groups come into as they are ready: twice, or not at all, in any column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
from experience import digest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.buffers.replay import Replay
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.frames import Stack
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentLayout

OWN = {"memory": Column((2,))}


@dataclass(frozen=True)
class Row:
    """One row of one environment. The reward is its number, which no other row has."""

    stack: list[float]
    led_to: list[float]
    reward: float
    terminated: bool
    truncated: bool
    valid: bool
    seam: bool  # the episode before it was given up
    memory: list[float]  # a column of the policy's own

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


class Crowd:
    """Groups of environments, what each did, and the rollouts that it came in.

    A share `alike` of all frames is blank, so that what an environment shows does not tell where it belongs. With
    `takes_a_row` resets take a row. Speeds [groups] say how often each is ready, in proportion.
    """

    def __init__(
        self, groups: int, size: int, steps: int, seed: int, *, k: int = 1, alike: float = 0.0, ends: float = 0.2,
        takes_a_row: bool = False, speeds: list[float] | None = None,
    ) -> None:  # fmt: skip
        self.groups, self.size, self.steps, self.k, self.alike, self.ends = groups, size, steps, k, alike, ends
        self.takes_a_row, self.rng, self.index, self.count = takes_a_row, np.random.default_rng(seed), 0, 0
        self.space = space_of(k)
        columns = {"action": self.space.action_column, "reward": Column((), "float64")}
        columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]} | OWN
        self.layout = SegmentLayout(steps, size, self.space.obs_columns, columns)
        self.speeds = np.array(speeds or np.ones(groups)) / np.sum(speeds or np.ones(groups))
        self.envs = groups * size
        self.stacks = [Stack(max(2, k), (), "float64") for _ in range(self.envs)]
        self.shown = [stack.begin(self._frame()) for stack in self.stacks]
        self.reset_is_due = [False] * self.envs
        self.rows: list[list[Row]] = [[] for _ in range(self.envs)]

    def _frame(self) -> Array:
        self.count += 1
        return np.array(0.0 if self.rng.random() < self.alike else float(self.count))

    def next(self, order: list[int] | None = None) -> Rollout:
        """Of the groups in `order`, by default those who are ready."""
        if order is None:
            order = [int(group) for group in self.rng.choice(self.groups, self.groups, p=self.speeds)]
        segments = tuple(self._segment(group) for group in order)
        envs = np.concatenate([np.arange(g * self.size, (g + 1) * self.size) for g in order])
        self.index += 1
        return Rollout(self.index - 1, self.index - 1, segments, envs)

    def _segment(self, group: int) -> Segment:
        segment = self.layout.allocate()
        segment.clear()
        envs = range(group * self.size, (group + 1) * self.size)
        for b, env in enumerate(envs):
            if self.rows[env] and self.rng.random() < 0.1 * bool(self.ends):
                segment.aborted[b] = True
                self.shown[env] = self.stacks[env].begin(self._frame())
                self.reset_is_due[env] = False
        for t in range(self.steps):
            for b, env in enumerate(envs):
                segment.obs["obs"][t, b] = self._seen(env)
                self._step(segment, t, b, env)
        segment.obs["obs"][self.steps] = [self._seen(env) for env in envs]
        return segment

    def _seen(self, env: int) -> Array:
        return self.shown[env][-self.k :]

    def _step(self, segment: Segment, t: int, b: int, env: int) -> None:
        columns, before, valid = segment.columns, self._seen(env).tolist(), not self.reset_is_due[env]
        terminated, truncated = (valid and bool(self.rng.random() < self.ends / 2) for _ in range(2))
        self.shown[env] = (self.stacks[env].push if valid else self.stacks[env].begin)(self._frame())
        after, self.reset_is_due[env] = self._seen(env), False
        if (terminated or truncated) and self.takes_a_row:
            self.reset_is_due[env] = True
        elif terminated or truncated:
            segment.add_final(t, b, {"obs": after})
            self.shown[env] = self.stacks[env].begin(self._frame())
        seam = t == 0 and bool(segment.aborted[b])
        row = Row(before, after.tolist(), float(self.count), terminated, truncated, valid, seam, [t, self.count])
        for name in ("reward", "memory", *CORE_COLUMNS[2:]):
            columns[name][t, b] = getattr(row, name)
        columns["action"][t, b] = len(self.rows[env]) % 3
        self.rows[env].append(row)

    def where(self) -> dict[float, tuple[int, int]]:
        """Environment and time of each row, by its reward."""
        return {row.reward: (env, t) for env, rows in enumerate(self.rows) for t, row in enumerate(rows)}


def space_of(k: int) -> Spaces:
    return spaces_of(gymnasium.spaces.Box(0, 1e9, (k,), np.float64), gymnasium.spaces.Discrete(3)).with_stack(k)


def goes_on(rows: list[Row], t: int) -> bool:
    return t + 1 < len(rows) and rows[t + 1].valid and not rows[t + 1].seam


def begins(rows: list[Row], t: int) -> bool:
    """Whether an episode begins with row t: it is the first, or the step before it was the last of another."""
    before = [row for row in rows[:t] if row.valid]
    return rows[t].seam or not before or before[-1].ended


def window(rows: list[Row], t: int, n: int, gamma: float) -> tuple[float, float, list[float]]:
    total, discount = rows[t].reward, gamma
    for _ in range(n - 1):
        if rows[t].ended or not goes_on(rows, t):
            break
        t += 1
        total, discount = total + discount * rows[t].reward, discount * gamma
    return total, 0.0 if rows[t].terminated else discount, rows[t].led_to


def check_transitions(replay: Replay, crowd: Crowd, n: int) -> None:
    """Everything that is held is what happened; nothing is cut that goes on, nothing goes on over a gap."""
    where, places = crowd.where(), replay._marks.places()
    one, many = replay.gather(places, 1, 1.0), replay.gather(places, n, 0.9)
    found = [where[float(reward)] for reward in one.returns]
    for i, (env, t) in enumerate(found):
        rows = crowd.rows[env]
        total, discount, led_to = window(rows, t, n, 0.9)
        assert one.obs["obs"][i].tolist() == many.obs["obs"][i].tolist() == rows[t].stack
        assert one.action[i] == t % 3
        assert one.next_obs["obs"][i].tolist() == rows[t].led_to
        assert (many.returns[i], many.discounts[i]) == pytest.approx((total, discount), rel=1e-12)
        assert many.next_obs["obs"][i].tolist() == led_to
    assert len(set(found)) == len(found) == len(replay)
    for env, rows in enumerate(crowd.rows):
        oldest = max(0, len(rows) - replay.rows)
        held = {(env, t) for t in range(oldest, len(rows)) if rows[t].valid}
        of_it = {place for place in found if place[0] == env}
        assert of_it <= held
        assert all(t < oldest + replay.stack - 1 for _, t in held - of_it), "only of the oldest rows the stack may be gone"


def check_sequences(replay: Replay, crowd: Crowd, length: int) -> None:
    where = crowd.where()
    found = replay.sequences(np.random.default_rng(crowd.index), 7, length, beta=0.5)
    begun = replay.sample(np.random.default_rng(crowd.index), 7, beta=0.5)
    for name in ("index", "generation", "weights"):
        assert getattr(found, name).tolist() == getattr(begun, name).tolist()
    assert found.columns["memory"][0].tolist() == begun.columns["memory"].tolist()
    for i in range(7):
        env, t = where[float(found.reward[0, i])]
        rows, alive = crowd.rows[env], True
        for step in range(length):
            if step:
                alive = alive and goes_on(rows, t)
                t += alive
            assert found.mask[step, i] == alive
            assert found.reward[step, i] == rows[t].reward
            assert found.obs["obs"][step, i].tolist() == rows[t].stack
            assert found.next_obs["obs"][step, i].tolist() == rows[t].led_to
            assert found.columns["memory"][step, i].tolist() == rows[t].memory
            assert found.first[step, i] == (alive and begins(rows, t))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(1, 2), steps=st.integers(1, 4),
    rollouts=st.integers(1, 8), rows=st.integers(1, 14), n=st.integers(1, 5), k=st.sampled_from([1, 1, 3]),
    alike=st.sampled_from([0.0, 0.7, 1.0]), takes_a_row=st.booleans(), resumed=st.booleans(),
    storage=st.sampled_from(["memory", "device"]), exponent=st.sampled_from([0.0, 0.6]),
)  # fmt: skip
def test_what_is_sampled_is_what_one_environment_did(
    seed: int, groups: int, size: int, steps: int, rollouts: int, rows: int, n: int, k: int, alike: float,
    takes_a_row: bool, resumed: bool, storage: Any, exponent: float,
):  # fmt: skip
    speeds = [1.0, 1.0, 0.5, 3.0][:groups]
    crowd = Crowd(groups, size, steps, seed, k=k, alike=alike, takes_a_row=takes_a_row, speeds=speeds)

    def make() -> Replay:
        return Replay(
            crowd.space, crowd.envs, rows * crowd.envs, storage=storage, priority_exponent=exponent, columns=OWN
        )

    replay = make()
    for _ in range(rollouts):
        replay.add(crowd.next())
        if resumed:
            other, used = make(), Crowd(groups, size, steps, seed + 1, k=k)
            for _ in range(5):  # it has held more, and other things
                other.add(used.next())
            other.load_state_dict(replay.state_dict())
            replay = other
        check_transitions(replay, crowd, n)
        if len(replay):
            check_sequences(replay, crowd, n + 2)
            batch = replay.sample(np.random.default_rng(seed), 20, n=n, gamma=0.9)
            assert replay._marks.has(batch.index).all()
            assert replay.reprioritise(batch, np.full(20, 2.0)) == 0
            assert replay.reprioritise(replay.sequences(np.random.default_rng(seed), 5, n), np.full(5, 3.0)) == 0
        kept = replay.state_dict()["obs"]
        assert replay._obs.kept_aside == len(kept["after"]["at"]) + len(kept["older"]["at"]) * (k - 1), "a place is lost"
    assert replay.env_steps == sum(row.valid for of in crowd.rows for row in of)


def test_a_window_does_not_pass_over_a_segment():
    """One group twice in each of two rollouts, and nothing that it shows tells so."""
    crowd = Crowd(2, 1, 2, 0, alike=1.0, ends=0.0)
    replay = Replay(crowd.space, 2, 64)
    for _ in range(2):
        replay.add(crowd.next([0, 0]))
    where = crowd.where()
    places = replay._marks.places()
    steps, returns = replay.gather(places, 1, 1.0).returns, replay.gather(places, 3, 1.0).returns
    for reward, total in zip(steps, returns, strict=True):
        _, t = where[float(reward)]
        assert total == sum(row.reward for row in crowd.rows[0][t : t + 3])


def test_groups_in_any_order_cost_what_groups_in_order_cost():
    """As many places are kept aside, and as many windows are short."""
    kept: list[int] = []
    short: list[float] = []
    for eager in (False, True):
        crowd = Crowd(8, 1, 4, 0, k=4, ends=0.0)
        replay = Replay(crowd.space, 8, 8 * 40)
        for _ in range(40):
            replay.add(crowd.next(None if eager else list(range(8))))
        batch = replay.gather(replay._marks.places(), 3, 0.5)
        short.append(float(np.mean(batch.discounts != 0.5**3)))
        kept.append(replay._obs.kept_aside)
        assert replay.nbytes == Replay.nbytes_for(crowd.space, 8, 8 * 40)
    assert kept == [8, 8]
    assert short == [2 / 40] * 2, "at the newest two rows of each"


def test_errors_of_rows_that_a_fast_group_overwrote_are_ignored():
    crowd = Crowd(2, 1, 4, 0)
    replay = Replay(crowd.space, 2, 16, priority_exponent=1.0)
    for _ in range(2):
        replay.add(crowd.next([0, 1]))
    batch = replay.gather(replay._marks.places(), 1, 1.0)
    env = np.array([crowd.where()[float(reward)][0] for reward in batch.returns])
    replay.add(crowd.next([1, 1]))
    assert replay.reprioritise(batch, np.full(len(env), 5.0)) == (env == 1).sum()
    again = replay.gather(batch.index, 1, 1.0)
    assert (again.generation - batch.generation == (env == 1)).all()


def test_a_state_of_uneven_lanes_goes_on_as_it_was():
    crowd = Crowd(3, 2, 3, 5, k=3, speeds=[1.0, 4.0, 2.0])
    make = lambda: Replay(crowd.space, crowd.envs, 12 * crowd.envs, priority_exponent=0.6)  # noqa: E731
    a, b = make(), make()
    for _ in range(5):
        a.add(crowd.next())
    b.load_state_dict(a.state_dict())
    for _ in range(6):
        rollout = crowd.next()
        for replay in (a, b):
            replay.add(rollout)
        assert digest(a.state_dict()) == digest(b.state_dict())
        one, other = (replay.sample(np.random.default_rng(3), 64, n=3, gamma=0.9, beta=0.5) for replay in (a, b))
        assert one.index.tobytes() + one.returns.tobytes() == other.index.tobytes() + other.returns.tobytes()
