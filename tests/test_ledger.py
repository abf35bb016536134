"""The books against a brute-force replay of random experience."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from experience import ends
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.envs.cursor import GroupCursor, advance
from aiorl.ledger import Episode, Ledger, check_state
from aiorl.pacing import Grant
from aiorl.segments import CORE_COLUMNS, Column, Segment, SegmentLayout

COLUMNS = {"action": Column((), "int64"), "reward": Column((), "float64")}
COLUMNS |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}
OBS = {"obs": Column((2,), "float32")}


def long_segment(rng: np.random.Generator, steps: int, n: int, *, takes_a_row: bool) -> Segment:
    """Random experience of one group; resets take a row of their own, or ends have a final observation."""
    segment = SegmentLayout(steps, n, OBS, COLUMNS, state_bytes=8).allocate()
    segment.obs["obs"][...] = rng.normal(size=segment.obs["obs"].shape)
    segment.columns["action"][...] = rng.integers(0, 9, (steps, n))
    segment.columns["reward"][...] = rng.normal(size=(steps, n)) * 10.0 ** rng.integers(-8, 8, (steps, n))
    for name, column in ends(rng, steps, n, resets_take_a_row=takes_a_row).items():
        segment.columns[name][...] = column
    if not takes_a_row:
        for t, env in np.argwhere(segment.columns["terminated"] | segment.columns["truncated"]).tolist():
            segment.add_final(t, env, {"obs": rng.normal(size=2)})
    segment.put_env_state(b"state")
    return segment


def cut(whole: Segment, start: int, steps: int) -> Segment:
    """The rows of a segment from `start`, as a segment of its own."""
    part = SegmentLayout(steps, whole.envs, OBS, COLUMNS, state_bytes=8).allocate()
    part.obs["obs"][...] = whole.obs["obs"][start : start + steps + 1]
    for name in COLUMNS:
        part.columns[name][...] = whole.columns[name][start : start + steps]
    for row in range(whole.finals):
        t, env = divmod(int(whole.final_at[row]), whole.envs)
        if start <= t < start + steps:
            part.add_final(t - start, env, {"obs": whole.final_obs["obs"][row]})
    part.put_env_state(whole.env_state)
    return part


def replay(whole: Segment, first_env: int, until: int) -> tuple[list[Episode], list[float], list[int], int]:
    """What a person with a pencil would write down: episodes, open totals, open lengths, valid rows."""
    episodes: list[Episode] = []
    totals, lengths, valid = [0.0] * whole.envs, [0] * whole.envs, 0
    columns = {name: column.tolist() for name, column in whole.columns.items()}
    for env in range(whole.envs):
        for t in range(until):
            if not columns["valid"][t][env]:
                continue
            valid += 1
            totals[env] += columns["reward"][t][env]
            lengths[env] += 1
            if columns["terminated"][t][env] or columns["truncated"][t][env]:
                episodes.append(Episode(first_env + env, totals[env], lengths[env], columns["terminated"][t][env]))
                totals[env], lengths[env] = 0.0, 0
    return episodes, totals, lengths, valid


def assert_same_cursor(seen: GroupCursor | None, expected: GroupCursor | None) -> None:
    assert seen is not None
    assert expected is not None
    assert seen.episodes.tolist() == expected.episodes.tolist()
    assert [a.tolist() for a in seen.actions] == [a.tolist() for a in expected.actions]
    assert seen.done.tolist() == expected.done.tolist()
    assert {k: v.tolist() for k, v in seen.obs.items()} == {k: v.tolist() for k, v in expected.obs.items()}
    assert seen.env_state == expected.env_state


def parts_of(order: list[int], ordinals: list[int]) -> tuple[Grant, ...]:
    return tuple(Grant(group, ordinals[group], 0, 0) for group in order)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 3),
    n=st.integers(1, 3),
    steps=st.integers(1, 6),
    rollouts=st.integers(1, 6),
    takes_a_row=st.booleans(),
    reload_at=st.integers(0, 6),
)
def test_books_equal_a_replay(
    seed: int, groups: int, n: int, steps: int, rollouts: int, takes_a_row: bool, reload_at: int
) -> None:
    rng = np.random.default_rng(seed)
    wholes = [long_segment(rng, steps * rollouts, n, takes_a_row=takes_a_row) for _ in range(groups)]
    ledger, booked = Ledger(groups, n), list[Episode]()
    for k in range(rollouts):
        if k == reload_at:  # a checkpoint and a resume in between change nothing
            state, ledger = ledger.state_dict(), Ledger(groups, n)
            ledger.load_state_dict(state)
        order = rng.permutation(groups).tolist()
        segments = tuple(cut(wholes[g], k * steps, steps) for g in order)
        ended = ledger.store(parts_of(order, [k] * groups), segments).episodes
        booked += ended

        replays = [replay(wholes[g], g * n, (k + 1) * steps) for g in range(groups)]
        expected = [episode for episodes, *_ in replays for episode in episodes]
        assert sorted(booked) == sorted(expected), "exactly, to the last bit of the returns"
        assert ledger.episodes == len(expected)
        assert ledger.stored == sum(valid for *_, valid in replays)
        assert ledger.rollouts == k + 1
        assert ledger.segments_used() == [k + 1] * groups
        groups_state = ledger.state_dict()["groups"]
        for g, (_, totals, lengths, _) in enumerate(replays):
            assert groups_state[str(g)]["totals"].tolist() == totals
            assert groups_state[str(g)]["lengths"].tolist() == lengths
            assert_same_cursor(ledger.cursor(g), advance(None, cut(wholes[g], 0, (k + 1) * steps)))
    recent = deque((episode.total for episode in booked), maxlen=100)
    assert ledger.return_mean_100 == (np.mean(recent) if recent else None)


def test_before_the_first_rollout() -> None:
    ledger = Ledger(2, 3)
    assert (ledger.stored, ledger.episodes, ledger.rollouts, ledger.return_mean_100) == (0, 0, 0, None)
    assert ledger.cursor(0) is None
    again = Ledger(2, 3)
    again.load_state_dict(ledger.state_dict())
    assert again.cursor(1) is None


def test_one_group_may_be_used_twice_in_a_rollout() -> None:
    """The eager schedule takes segments as they arrive."""
    rng = np.random.default_rng(1)
    wholes = [long_segment(rng, 12, 2, takes_a_row=False) for _ in range(2)]
    ledger = Ledger(2, 2)
    booked = ledger.store((Grant(0, 0, 0, 0), Grant(0, 1, 1, 0)), (cut(wholes[0], 0, 4), cut(wholes[0], 4, 4))).episodes
    booked += ledger.store((Grant(1, 0, 0, 0), Grant(0, 2, 0, 1)), (cut(wholes[1], 0, 4), cut(wholes[0], 8, 4))).episodes
    assert ledger.segments_used() == [3, 1]
    assert ledger.rollouts == 2
    assert sorted(booked) == sorted(replay(wholes[0], 0, 12)[0] + replay(wholes[1], 2, 4)[0])


def test_only_the_last_hundred_returns_count() -> None:
    layout = SegmentLayout(150, 1, OBS, COLUMNS, state_bytes=8)
    segment = layout.allocate()
    segment.columns["valid"][...] = segment.columns["terminated"][...] = True
    segment.columns["reward"][:, 0] = np.arange(150)
    ledger = Ledger(1, 1)
    ended = ledger.store((Grant(0, 0, 0, 0),), (segment,)).episodes
    assert [episode.total for episode in ended] == list(range(150))
    assert ledger.return_mean_100 == np.mean(np.arange(50, 150))


def test_the_books_keep_nothing_of_the_slot() -> None:
    """A slot is given back after the update and overwritten."""
    rng = np.random.default_rng(3)
    whole = long_segment(rng, 4, 2, takes_a_row=False)
    part = cut(whole, 0, 4)
    ledger = Ledger(1, 2)
    ledger.store((Grant(0, 0, 0, 0),), (part,))
    saved = ledger.state_dict()
    for column in (*part.obs.values(), *part.columns.values(), part.state):
        column[...] = 1
    assert_same_cursor(ledger.cursor(0), advance(None, whole))
    loaded = Ledger(1, 2)
    loaded.load_state_dict(saved)
    saved["groups"]["0"]["totals"][...] = 1e9  # nor of the state it was loaded from
    assert loaded.state_dict()["groups"]["0"]["totals"].tolist() == ledger.state_dict()["groups"]["0"]["totals"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: None, None),
        (lambda s: s.pop("stored"), r"ledger\.stored is missing"),
        (lambda s: s.update(episodes="3"), r"ledger\.episodes: expected int, got str"),
        (lambda s: s.update(recent=np.zeros((2, 2))), r"ledger\.recent: expected float64 \[2\], got float64 \[2, 2\]"),
        (lambda s: s.update(code=1), r"ledger\.code is not expected here"),
        (lambda s: s["groups"].pop("1"), r"ledger\.groups\.1 is missing"),
        (lambda s: s["groups"].update({"2": 1}), r"ledger\.groups\.2 is not expected"),
        (lambda s: s["groups"]["1"].update(totals=np.zeros(5)), r"groups\.1\.totals: expected float64 \[2\]"),
        (lambda s: s["groups"]["0"].update(lengths=np.zeros(2, np.float32)), r"groups\.0\.lengths: expected int64 \[2\]"),
        (lambda s: s["groups"]["0"].update(segments=1.5), r"groups\.0\.segments: expected int"),
        (lambda s: s["groups"]["0"]["cursor"].update(episodes=np.zeros(3)), r"cursor\.episodes: expected int64 \[2\]"),
        (lambda s: s["groups"]["0"]["cursor"]["actions"].pop("1"), r"cursor\.actions\.1 is missing"),
        (lambda s: s["groups"]["0"]["cursor"]["actions"].update({"1": np.zeros((2, 2))}), r"1: expected int64 \[2\]"),
        (lambda s: s["groups"]["0"]["cursor"].update(done=None), r"cursor\.done: expected bool \[2\]"),
        (lambda s: s["groups"]["0"]["cursor"]["obs"].update(obs=np.zeros((2, 3))), r"obs\.obs: expected float32 \[2, 2\]"),
        (lambda s: s["groups"]["0"]["cursor"].pop("obs"), r"cursor\.obs is missing"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_of_this_form_is_named(change: Any, message: str | None) -> None:
    rng = np.random.default_rng(5)
    layout, ledger = SegmentLayout(4, 2, OBS, COLUMNS), Ledger(2, 2)
    check_state(ledger.state_dict(), 2, layout)
    ledger.store(
        parts_of([0, 1], [0, 0]), tuple(cut(long_segment(rng, 4, 2, takes_a_row=False), 0, 4) for _ in range(2))
    )
    state = ledger.state_dict()
    change(state)
    if message is None:
        check_state(state, 2, layout)
    else:
        with pytest.raises(ValueError, match=message):
            check_state(state, 2, layout)


def test_parts_and_segments_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Ledger(1, 1).store((Grant(0, 0, 0, 0),), ())

