"""Replay of stacked frames and of sequences, against a list of everything that acting saw."""

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
from aiorl.errors import ConfigError, EnvError
from aiorl.frames import Stack
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentLayout


def stacked_spaces(k: int) -> Spaces:
    box = gymnasium.spaces.Box
    observation = gymnasium.spaces.Dict({"image": box(0, 1e9, (k, 2, 1), np.float64), "n": box(0, 1e9, (k,), np.float64)})
    return spaces_of(observation, gymnasium.spaces.Discrete(3))


@dataclass
class Row:
    """One row of one column, as acting saw it: stacks of the numbers of frames."""

    stack: list[float]
    led_to: list[float]
    action: int
    reward: float
    terminated: bool
    truncated: bool
    valid: bool
    seam: bool  # it did not happen after the row before
    begins: bool  # an episode begins with it

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


class Filming:
    """Makes rollouts of environments whose every frame has its own number, and keeps what they showed.

    Episodes end both ways, are aborted, and other environments go on in a column; segments are cut short. With
    `takes_a_row` resets take rows. An episode begins with zeros before its first frame if `pads_with_zeros`.
    """

    def __init__(self, k: int, envs: int, steps: int, seed: int, *, takes_a_row: bool, pads_with_zeros: bool) -> None:
        self.k, self.envs, self.steps, self.takes_a_row, self.zeros = k, envs, steps, takes_a_row, pads_with_zeros
        self.space = stacked_spaces(k)
        columns = {"action": self.space.action_column, "reward": Column((), "float64")}
        columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}
        self.layout = SegmentLayout(steps, envs, self.space.obs_columns, columns)
        self.rng, self.frames, self.index = np.random.default_rng(seed), 0, 0
        self.stacks = [Stack(k, (), "float64") for _ in range(envs)]
        self.shown = [self._begin(b) for b in range(envs)]
        self.reset_is_due, self.begins = [False] * envs, [True] * envs
        self.numbers = np.arange(envs)
        self.rows: list[list[Row]] = [[] for _ in range(envs)]

    def _frame(self) -> Array:
        self.frames += 1
        return np.array(float(self.frames))

    def _begin(self, b: int) -> Array:
        if not self.zeros:
            return self.stacks[b].begin(self._frame())
        self.stacks[b].begin(np.array(0.0))
        for _ in range(self.k - 2):
            self.stacks[b].push(np.array(0.0))
        return self.stacks[b].push(self._frame())

    def _lead_elsewhere(self, segment: Segment, seams: set[int]) -> None:
        """Between two rollouts: an episode given up, or another environment in the middle of one of its own."""
        for b in range(self.envs) if self.index else ():
            kind = self.rng.random()
            if kind < 0.15:
                segment.aborted[b] = True
                self.shown[b] = self._begin(b)
            elif kind < 0.3:
                self.numbers = self.numbers + np.eye(self.envs, dtype=int)[b] * self.envs
                for _ in range(self.k):
                    self.shown[b] = self.stacks[b].push(self._frame())
            if kind < 0.3:
                self.reset_is_due[b], self.begins[b] = False, kind < 0.15
                seams.add(b)

    def next(self) -> Rollout:
        segment, rng, seams = self.layout.allocate(), self.rng, set[int]()
        segment.clear()
        self._lead_elsewhere(segment, seams)
        for leaf in segment.obs.values():
            leaf[...] = -7.0  # what a short segment leaves behind
        self._show(segment, 0)
        used = self.steps if rng.random() < 0.7 else int(rng.integers(1, self.steps + 1))
        segment.columns["action"][...] = rng.integers(3, size=(self.steps, self.envs))
        segment.columns["reward"][...] = rng.normal(size=(self.steps, self.envs))
        for t in range(used):
            for b in range(self.envs):
                self._step(segment, t, b, b in seams and t == 0)
            self._show(segment, t + 1)
        for row in (Row([], [], 0, 0.0, False, False, False, False, False) for _ in range(used, self.steps)):
            for rows in self.rows:
                rows.append(row)
        self.index += 1
        return Rollout(self.index - 1, self.index - 1, (segment,), self.numbers)

    def _show(self, segment: Segment, t: int) -> None:
        segment.obs["obs.image"][t] = np.array(self.shown)[..., None, None] + np.array([[0.0], [0.25]])
        segment.obs["obs.n"][t] = self.shown

    def _step(self, segment: Segment, t: int, b: int, seam: bool) -> None:
        columns, stack = segment.columns, self.shown[b]
        valid = not self.reset_is_due[b]
        terminated, truncated = (valid and bool(self.rng.random() < 0.15) for _ in range(2))
        if valid:
            after = self.shown[b] = self.stacks[b].push(self._frame())
        else:
            after = self.shown[b] = self._begin(b)
        if terminated or truncated:
            if self.takes_a_row:
                self.reset_is_due[b] = True
            else:
                segment.add_final(t, b, {"obs.image": after[:, None, None] + np.array([[0.0], [0.25]]), "obs.n": after})
                self.shown[b] = self._begin(b)
        else:
            self.reset_is_due[b] = False
        columns["valid"][t, b], columns["terminated"][t, b], columns["truncated"][t, b] = valid, terminated, truncated
        row = Row(
            stack.tolist(), after.tolist(), int(columns["action"][t, b]), float(columns["reward"][t, b]), terminated,
            truncated, valid, seam, self.begins[b],
        )  # fmt: skip
        self.begins[b] = terminated or truncated or (self.begins[b] and not valid)
        self.rows[b].append(row)


def goes_on(rows: list[Row], t: int) -> bool:
    """Whether row t + 1 is there and happened after row t, maybe in another episode."""
    return t + 1 < len(rows) and rows[t + 1].valid and not rows[t + 1].seam


def window(rows: list[Row], t: int, n: int, gamma: float) -> tuple[float, float, list[float]]:
    total, discount = rows[t].reward, gamma
    for _ in range(n - 1):
        if rows[t].ended or not goes_on(rows, t):
            break
        t += 1
        total, discount = total + discount * rows[t].reward, discount * gamma
    return total, 0.0 if rows[t].terminated else discount, rows[t].led_to


def linked(rows: list[Row], t: int) -> bool:
    """Whether the stack of row t is the one that row t - 1 led to, so that it is rebuilt from rows before."""
    return t > 0 and rows[t - 1].valid and not rows[t].seam and rows[t - 1].led_to == rows[t].stack


def can_be_sampled(rows: list[Row], t: int, replay: Replay, length: int) -> bool:
    """Its stack is held: it goes back to no row that has been overwritten."""
    oldest, back = max(0, len(rows) - replay.rows), t
    # A rollout that fills the ring overwrites the row before it at once, so the stacks at its begin are kept whole.
    whole = oldest if length >= replay.rows else -1
    while back > t - replay.stack + 1 and back != whole and linked(rows, back):
        back -= 1
    return t >= oldest and rows[t].valid and back >= oldest


def check_transitions(replay: Replay, film: Filming, n: int) -> None:
    where = {rows[t].stack[-1]: (b, t) for b, rows in enumerate(film.rows) for t in range(len(rows)) if rows[t].valid}
    batch = replay.gather(replay._marks.places(), n, 0.9)
    seen: set[tuple[int, int]] = set()
    for i in range(len(replay)):
        stack = batch.obs["obs.n"][i].tolist()
        b, t = where[stack[-1]]
        row = film.rows[b][t]
        total, discount, led_to = window(film.rows[b], t, n, 0.9)
        assert stack == row.stack
        assert batch.obs["obs.image"][i, :, 1, 0].tolist() == [x + 0.25 for x in row.stack]
        assert batch.action[i] == row.action
        assert batch.returns[i] == pytest.approx(total, abs=1e-12)
        assert batch.discounts[i] == pytest.approx(discount, abs=1e-12)
        assert batch.next_obs["obs.n"][i].tolist() == led_to
        assert batch.next_obs["obs.image"][i, :, 0, 0].tolist() == led_to
        seen.add((b, t))
    assert seen == {
        (b, t) for b, rows in enumerate(film.rows) for t in range(len(rows)) if can_be_sampled(rows, t, replay, film.steps)
    }


def check_sequences(replay: Replay, film: Filming, length: int) -> None:
    where = {rows[t].stack[-1]: (b, t) for b, rows in enumerate(film.rows) for t in range(len(rows)) if rows[t].valid}
    found = replay.sequences(np.random.default_rng(film.index), 7, length)
    assert found.mask.shape == (length, 7)
    for i in range(7):
        b, t = where[float(found.obs["obs.n"][0, i, -1])]
        rows, alive = film.rows[b], True
        for step in range(length):
            if step:
                alive = alive and goes_on(rows, t)
                t += alive
            assert found.mask[step, i] == alive
            row = rows[t]
            assert found.obs["obs.n"][step, i].tolist() == row.stack
            assert found.next_obs["obs.n"][step, i].tolist() == row.led_to
            numbers = found.action[step, i], found.reward[step, i], found.terminated[step, i], found.truncated[step, i]
            assert numbers == (row.action, row.reward, row.terminated, row.truncated)
            assert found.first[step, i] == (alive and row.begins)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000), k=st.integers(1, 4), envs=st.integers(1, 3), length=st.integers(1, 6),
    rollouts=st.integers(1, 6), rows=st.integers(1, 10), n=st.integers(1, 4), takes_a_row=st.booleans(),
    zeros=st.booleans(), resumed=st.booleans(), storage=st.sampled_from(["memory", "device"]),
)  # fmt: skip
def test_what_is_sampled_is_what_acting_saw(
    seed: int, k: int, envs: int, length: int, rollouts: int, rows: int, n: int, takes_a_row: bool, zeros: bool,
    resumed: bool, storage: Any,
):  # fmt: skip
    film = Filming(k, envs, length, seed, takes_a_row=takes_a_row, pads_with_zeros=zeros)
    make = lambda: Replay(film.space, envs, rows * envs, stack=k, storage=storage)  # noqa: E731
    replay = make()
    for _ in range(rollouts):
        replay.add(film.next())
        if resumed:
            other = make()
            for _ in range(2):  # the second time into one that is in use
                other.load_state_dict(replay.state_dict())
            assert digest(other.state_dict()) == digest(replay.state_dict())
            replay = other
        check_transitions(replay, film, n)
        if len(replay):
            check_sequences(replay, film, n + 2)
        kept = replay.state_dict()["obs"]
        assert replay._obs.kept_aside == len(kept["after"]["at"]) + len(kept["older"]["at"]) * (k - 1), "a place is lost"
    assert len(replay) >= sum(row.valid for rows_of in film.rows for row in rows_of[-rows:])


def test_a_whole_capacity_can_be_sampled():
    """Rows whose stack is not whole do not count: the ring is longer by as many."""
    film = Filming(4, 2, 5, 0, takes_a_row=False, pads_with_zeros=False)
    replay = Replay(film.space, 2, 24, stack=4)
    for _ in range(20):
        replay.add(film.next())
        assert len(replay) >= sum(row.valid for rows in film.rows for row in rows[-12:])
    assert replay.rows == 15


def test_errors_of_rows_whose_stack_is_gone_are_ignored():
    """They are there still, but must never be drawn again."""
    film = Filming(4, 2, 1, 3, takes_a_row=False, pads_with_zeros=False)
    replay, rng, ignored = Replay(film.space, 2, 12, stack=4, priority_exponent=1.0), np.random.default_rng(0), 0
    for _ in range(200):
        replay.add(film.next())
        batch = replay.sample(rng, 40)
        replay.add(film.next())
        dead = replay.reprioritise(batch, np.full(40, 5.0))
        there = (batch.generation == replay.gather(batch.index, 1, 1.0).generation).sum()
        ignored += dead - int(40 - there)
        shown = {rows[t].stack[-1]: rows[t] for rows in film.rows for t in range(len(rows)) if rows[t].valid}
        after = replay.sample(rng, 40)
        assert all(stack.tolist() == shown[stack[-1]].stack for stack in after.obs["obs.n"])
        assert replay._marks.has(after.index).all()
    assert ignored > 0


# -- stacks that are none ----------------------------------------------------------------------------------------------


def plain_rollout(film: Filming, index: int) -> Rollout:
    """One long episode, going on from rollout to rollout."""
    segment = film.layout.allocate()
    segment.clear()
    for name in ("terminated", "truncated"):
        segment.columns[name][...] = False
    segment.columns["valid"][...] = True
    for t in range(film.steps + 1):
        film._show(segment, t)
        if t < film.steps:
            film.shown = [stack.push(film._frame()) for stack in film.stacks]
    return Rollout(index, index, (segment,), np.arange(film.envs))


def reversed_stack(leaf: Array) -> Array:
    return leaf[:, :, ::-1]


def forgetful(leaf: Array) -> Array:
    """The history is cleared at one step."""
    broken = leaf.copy()
    broken[3] = leaf[3, :, -1:]
    return broken


def every_other(leaf: Array) -> Array:
    """Stacks skip frames."""
    return np.stack([np.maximum(leaf[:, :, -1] - 4 * i, 0) for i in range(leaf.shape[2] - 1, -1, -1)], 2)


@pytest.mark.parametrize("fault", [reversed_stack, forgetful, every_other])
def test_a_stack_of_other_frames_is_refused_by_name(fault: Any):
    film = Filming(3, 2, 6, 0, takes_a_row=False, pads_with_zeros=False)
    replay = Replay(film.space, 2, 100, stack=3)
    replay.add(plain_rollout(film, 0))
    wrong = [plain_rollout(film, index) for index in range(1, 7)]
    for leaf in (leaf for rollout in wrong for leaf in rollout.segments[0].obs.values()):
        leaf[...] = fault(leaf)

    def add_all() -> None:  # another row is looked at each time
        for rollout in wrong:
            replay.add(rollout)

    with pytest.raises(EnvError, match=r"stack mismatch: acting saw obs\.\w+ whose frame \d of 3"):
        add_all()


def test_an_end_that_is_no_stack_is_refused():
    film = Filming(3, 1, 4, 0, takes_a_row=False, pads_with_zeros=False)
    replay, rollout = Replay(film.space, 1, 100, stack=3), plain_rollout(film, 0)
    (segment,) = rollout.segments
    segment.columns["truncated"][1, 0] = True
    wrong = {name: leaf[2, 0] + np.float64(1000) for name, leaf in segment.obs.items()}
    segment.add_final(1, 0, wrong)
    with pytest.raises(EnvError, match="stack mismatch"):
        replay.add(rollout)


def test_nan_frames_are_no_mismatch():
    film = Filming(3, 1, 4, 0, takes_a_row=False, pads_with_zeros=False)
    film.shown[0][:] = np.nan
    replay = Replay(film.space, 1, 100, stack=3)
    replay.add(plain_rollout(film, 0))
    assert len(replay) == 4


def test_a_leaf_that_is_no_stack_of_so_many_is_refused():
    with pytest.raises(ConfigError, match=r"obs\.image has the shape \[4, 2, 1\], which does not begin with the stack of 3"):
        Replay(stacked_spaces(4), 1, 10, stack=3)


def test_a_state_with_another_stack_is_refused_by_name():
    state = Replay(stacked_spaces(4), 1, 10, stack=4).state_dict()
    with pytest.raises(ValueError, match=r"replay\.rows: this ring has 10, the one saved 13"):
        Replay(stacked_spaces(4), 1, 10).load_state_dict(state)
    with pytest.raises(ValueError, match=r"replay\.stack: this ring has 1, the one saved 4"):
        Replay(stacked_spaces(4), 1, 13).load_state_dict(state)
    at = {"at": np.array([3]), "obs.image": np.zeros((1, 2, 1)), "obs.n": np.zeros(1)}
    with pytest.raises(ValueError, match=r"replay\.obs\.after\.at: expected places in order, below 0"):
        Replay(stacked_spaces(4), 1, 10, stack=4).load_state_dict(state | {"obs": state["obs"] | {"after": at}})


def test_the_spaces_say_how_many_frames_a_stack_has():
    assert Replay(stacked_spaces(4).with_stack(4), 1, 10).stack == 4
    assert Replay(stacked_spaces(4), 1, 10).stack == 1


# -- memory ------------------------------------------------------------------------------------------------------------

ATARI = spaces_of(gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8), gymnasium.spaces.Discrete(18))


def test_a_million_stacks_of_four_cost_seven_gigabytes():
    stored_whole = 2 * 1_000_000 * 4 * 84 * 84
    needed = Replay.nbytes_for(ATARI, 8, 1_000_000, stack=4)
    assert 7.0e9 < needed < 7.3e9 < stored_whole / 7
    assert Replay.nbytes_for(ATARI, 8, 1_000_000, stack=4, storage="disk") < 0.07e9


@pytest.mark.parametrize("exponent", [0.0, 0.6])
@pytest.mark.parametrize("stack", [1, 4])
def test_the_estimate_is_what_a_new_buffer_takes(stack: int, exponent: float):
    given = {"stack": stack, "priority_exponent": exponent, "columns": {"memory": Column((16,))}}
    assert Replay(ATARI, 3, 1000, **given).nbytes == Replay.nbytes_for(ATARI, 3, 1000, **given)


def test_what_is_kept_aside_is_given_back():
    """A hundred rounds of the ring: as much is kept as the ends and seams that it holds need."""
    film = Filming(4, 2, 5, 1, takes_a_row=False, pads_with_zeros=True)
    replay = Replay(film.space, 2, 20, stack=4)
    most = 0
    for _ in range(200):
        replay.add(film.next())
        most = max(most, replay._obs.kept_aside)
    assert replay._obs._slots <= 2 * most
    assert most <= replay.rows * 2 * 4
