"""Sampling by priority: the tree, the chances, the weights, and whose errors count."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from experience import Stream, digest, spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.buffers.marks import Marks
from aiorl.buffers.priorities import EPSILON, Priorities, SumTree
from aiorl.buffers.replay import Replay
from aiorl.errors import NonFiniteError
from aiorl.segments import Array

weight = st.one_of(st.just(0.0), st.floats(1e-9, 1e6))


# -- the tree ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.lists(st.tuples(st.integers(0, 39), weight), max_size=6), max_size=6), st.data())
def test_the_tree_finds_where_the_running_sum_passes(size: int, changes: list[list[tuple[int, float]]], data: Any):
    tree, weights = SumTree(size), np.zeros(size)
    for change in changes:
        distinct = {place % size: value for place, value in change}
        places = np.array(list(distinct), np.int64)
        tree.put(places, np.array(list(distinct.values())))
        weights[places] = list(distinct.values())
    assert tree.take(np.arange(size)).tolist() == weights.tolist()
    assert tree.total == pytest.approx(weights.sum(), rel=1e-12)
    if not weights.any():
        return
    targets = np.array(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=9))) * tree.total
    found = tree.find(targets)
    assert (weights[found] > 0).all(), "a place that must not be sampled"
    ends = np.cumsum(weights)
    slack = 1e-12 * tree.total
    assert (targets <= ends[found] + slack).all()
    assert (targets >= ends[found] - weights[found] - slack).all()


def test_the_tree_depends_on_the_weights_alone():
    """A million changes leave no error behind: what is loaded from a checkpoint is the same tree."""
    rng, tree = np.random.default_rng(0), SumTree(1000)
    for _ in range(1000):
        tree.put(rng.integers(1000, size=1000), 10 ** rng.uniform(-8, 8, 1000))
    again = SumTree(1000)
    again.put(np.arange(1000), tree.take(np.arange(1000)))
    assert again._sums.tobytes() == tree._sums.tobytes()


# -- the marks ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 7, 2**16, 2**17 + 5]), st.integers(0, 10_000), st.floats(0, 1))
def test_marks_are_found_in_order(size: int, seed: int, share: float):
    rng, marks, truth = np.random.default_rng(seed), Marks(size), np.zeros(size, bool)
    for _ in range(5):
        start = int(rng.integers(size))
        marked = rng.random(rng.integers(size - start + 1)) < share
        marks.put(start + np.arange(len(marked)), marked)
        truth[start : start + len(marked)] = marked
        places = np.flatnonzero(truth)
        assert len(marks) == len(places)
        assert (marks.places() == places).all()
        if len(places):
            drawn = marks.draw(rng, 100, size)
            assert len(drawn) == 100
            assert truth[drawn].all()
        some = rng.integers(size, size=20)
        assert (marks.has(some) == truth[some]).all()


@pytest.mark.parametrize("marked", [range(500), range(0, 500, 7), [3, 499], [250], [i for i in range(500) if i % 100]])
def test_marks_are_drawn_with_the_same_chance(marked: Any):
    """Whether many, few or no places between them are not marked; by the place, and by when in a draw."""
    marks, truth = Marks(600), np.zeros(600, bool)
    truth[marked] = True
    marks.put(np.arange(600), truth)
    rng, each = np.random.default_rng(0), 2000
    draws = np.array([marks.draw(rng, len(marked), 500) for _ in range(each)])
    counts = np.bincount(draws.reshape(-1), minlength=600)
    assert counts.sum() == each * len(marked)
    assert not counts[~truth].any()
    assert np.abs(counts[truth] - each).max() < 5 * np.sqrt(each)
    mean = np.mean(list(marked))
    slack = 5 * max(1.0, float(np.std(list(marked)))) / np.sqrt(each)
    assert (np.abs(draws.mean(0) - mean) < slack).all()


def test_few_marks_among_many_take_no_memory():
    marks = Marks(1_000_000)
    marks.put(np.array([777_777]), np.ones(1, bool))
    tracemalloc.start()
    try:
        drawn = marks.draw(np.random.default_rng(0), 256, 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert set(drawn.tolist()) == {777_777}


# -- chances and weights -----------------------------------------------------------------------------------------------


def filled(exponent: float, rollouts: int = 3, **stream: Any) -> tuple[Replay, Stream]:
    made = Stream(spaces(), 2, 5, **stream)
    replay = Replay(made.space, 2, 40, priority_exponent=exponent)
    for _ in range(rollouts):
        replay.add(made.next())
    return replay, made


def everything(replay: Replay) -> Any:
    return replay.gather(replay._marks.places(), 1, 0.9)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_rows_are_drawn_in_proportion_to_their_priorities(alpha: float):
    replay, _ = filled(alpha, resets_take_a_row=True)
    rows = everything(replay)
    errors = np.random.default_rng(0).normal(size=len(replay)) ** 3
    assert replay.reprioritise(rows, errors) == 0
    chances = (np.abs(errors) + EPSILON) ** alpha
    chances /= chances.sum()
    batch = replay.sample(np.random.default_rng(1), 200_000, beta=0.7)
    drawn = np.bincount(batch.index, minlength=replay.rows * 2)[rows.index] / 200_000
    np.testing.assert_allclose(drawn, chances, atol=2e-4)
    assert drawn.sum() == pytest.approx(1), "rows that are no transitions were drawn"
    expected = (len(replay) * dict_of(rows.index, chances)[batch.index]) ** -0.7
    np.testing.assert_allclose(batch.weights, expected / expected.max(), rtol=1e-9)
    assert replay.chances(rows) == pytest.approx(chances)


def dict_of(index: Array, values: Array) -> Array:
    table = np.zeros(index.max() + 1)
    table[index] = values
    return table


def test_a_sample_has_one_row_of_each_equal_share():
    """Eight rows alike and eight drawn: each of them once, whatever the generator says."""
    replay, _ = filled(1.0)
    rows = everything(replay)
    few = np.where(np.arange(len(rows.index)) < 8, 1.0, 0.0)
    replay.reprioritise(rows, few)
    for seed in range(20):
        batch = replay.sample(np.random.default_rng(seed), 8)
        assert len(set(batch.index.tolist())) >= 7  # the others have the least priority that there is


def test_weights_undo_what_priorities_do():
    """With beta 1 a weighted mean over samples is the mean over all rows."""
    replay, _ = filled(0.6)
    rows = everything(replay)
    replay.reprioritise(rows, np.linspace(0.1, 3, len(replay)))
    batch = replay.sample(np.random.default_rng(0), 400_000, beta=1.0)
    mean = (batch.weights * batch.returns).sum() / batch.weights.sum()
    assert mean == pytest.approx(rows.returns.mean(), abs=2e-3)
    assert batch.weights.max() == 1
    assert set(replay.sample(np.random.default_rng(0), 50, beta=0.0).weights.tolist()) == {1.0}


def test_uniform_sampling_has_no_weights():
    replay, _ = filled(0.0)
    assert set(replay.sample(np.random.default_rng(0), 50).weights.tolist()) == {1.0}


def test_new_rows_have_the_largest_priority_so_far():
    replay, stream = filled(0.5, rollouts=1)
    rows = everything(replay)
    replay.reprioritise(rows, np.full(len(rows.index), 9.0))
    replay.reprioritise(rows, np.full(len(rows.index), 0.01))
    replay.add(stream.next())
    every = everything(replay)
    new = ~np.isin(every.index, rows.index)
    chances = replay.chances(every)
    assert chances[new] / chances[~new][0] == pytest.approx(((9.0 + EPSILON) / (0.01 + EPSILON)) ** 0.5)


def test_entropy_is_that_of_the_chances():
    replay, _ = filled(1.0)
    assert replay.priority_entropy() == pytest.approx(np.log(len(replay)))
    rows = everything(replay)
    replay.reprioritise(rows, np.arange(len(replay)) == 3)
    assert replay.priority_entropy() < 0.01
    assert filled(0.0)[0].priority_entropy() == pytest.approx(np.log(30))


# -- whose errors count ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(0, 7), st.booleans(), st.sampled_from([0.0, 0.7]))
def test_errors_of_overwritten_rows_are_ignored_and_counted(seed: int, later: int, takes_a_row: bool, exponent: float):
    """Four rollouts fill the ring: of a batch, rows are overwritten as its oldest rollouts are."""
    stream = Stream(spaces(), 2, 5, resets_take_a_row=takes_a_row, seed=seed)
    replay = Replay(stream.space, 2, 40, priority_exponent=exponent)
    for _ in range(6):
        replay.add(stream.next())
    batch = replay.sample(np.random.default_rng(seed), 30)
    for _ in range(later):
        replay.add(stream.next())
    overwritten = batch.obs["obs"][:, 0] < (6 + later - 4) * 5  # the first number is the time
    before = replay.chances(everything(replay))
    assert replay.reprioritise(batch, np.full(30, 100.0)) == overwritten.sum()
    every = everything(replay)
    known = np.isin(every.index, batch.index[~overwritten])
    after = replay.chances(every)
    if exponent and known.any() and not known.all():
        ratio = after[known][0] / after[~known][0] / (before[known][0] / before[~known][0])
        assert ratio == pytest.approx((100 + EPSILON) ** 0.7)
    elif not exponent or not known.any():
        assert after == pytest.approx(before)


def test_an_error_that_is_not_finite_changes_nothing():
    replay, _ = filled(0.6)
    before = digest(replay.state_dict())
    errors = np.ones(len(replay))
    errors[4] = np.nan
    with pytest.raises(NonFiniteError, match="a TD error is not finite"):
        replay.reprioritise(everything(replay), errors)
    assert digest(replay.state_dict()) == before


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_errors_count_for_good_or_not_at_all(exponent: float):
    """Rows that are drawn twice have what they had before the first time."""
    replay, _ = filled(exponent)
    before = digest(replay.state_dict())

    def errors(*scales: float) -> None:
        for scale in scales:
            batch = replay.sample(np.random.default_rng(0), 20)
            replay.reprioritise(batch, np.linspace(0, scale, 20))

    def fails(*scales: float) -> None:
        with replay.undone_by_failure():
            errors(*scales)
            raise KeyError

    with pytest.raises(KeyError):
        fails(3.0, 50.0, 0.1)
    assert digest(replay.state_dict()) == before
    with replay.undone_by_failure():
        errors(3.0, 50.0)
    after = digest(replay.state_dict())
    assert (after != before) == bool(exponent)
    with pytest.raises(KeyError):
        fails()
    assert digest(replay.state_dict()) == after, "what was kept before is taken back"


def test_rows_whose_stack_is_not_held_are_not_drawn():
    priorities = Priorities(8, 1.0)
    priorities.renew(np.arange(8), np.array([1, 1, 0, 1, 1, 1, 1, 1], bool))
    priorities.withdraw(np.array([5]))
    drawn = priorities.sample(np.random.default_rng(0), 10_000)
    assert set(drawn.tolist()) == {0, 1, 3, 4, 6, 7}


# -- state -------------------------------------------------------------------------------------------------------------


def test_priorities_are_part_of_the_state():
    a, stream = filled(0.6, rollouts=5)
    a.reprioritise(a.sample(np.random.default_rng(0), 30), np.linspace(0.1, 7, 30))
    b = Replay(stream.space, 2, 40, priority_exponent=0.6)
    b.load_state_dict(a.state_dict())
    more = stream.next()
    for replay in (a, b):
        replay.add(more)
    assert digest(a.state_dict()) == digest(b.state_dict())
    one, other = (replay.sample(np.random.default_rng(3), 64, n=3, gamma=0.9, beta=0.5) for replay in (a, b))
    assert one.index.tolist() == other.index.tolist()
    assert one.weights.tobytes() == other.weights.tobytes()
    assert one.generation.tolist() == other.generation.tolist()


def test_a_state_that_holds_less_leaves_nothing_of_what_was_held():
    a, _ = filled(0.6, rollouts=1)
    b, _ = filled(0.6, rollouts=5)
    b.load_state_dict(a.state_dict())
    assert digest(b.state_dict()) == digest(a.state_dict())
    assert b.priority_entropy() == a.priority_entropy()
    assert b.chances(everything(b)).sum() == pytest.approx(1)
    one, other = (replay.sample(np.random.default_rng(0), 64) for replay in (a, b))
    assert one.index.tobytes() == other.index.tobytes()
    assert set(other.index.tolist()) <= set(everything(a).index.tolist())


def test_priorities_that_are_none_are_refused():
    replay, stream = filled(0.6)
    state = replay.state_dict()
    state["priorities"]["weights"][3] = -1
    with pytest.raises(ValueError, match="expected finite weights, none of them negative"):
        Replay(stream.space, 2, 40, priority_exponent=0.6).load_state_dict(state)
    with pytest.raises(ValueError, match=r"replay\.priorities\.largest is not expected here"):
        Replay(stream.space, 2, 40).load_state_dict(state)
