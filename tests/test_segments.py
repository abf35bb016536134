"""Segments in memory and rollouts made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.segments import ALIGN, CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentHeader, SegmentLayout

CORE = {"action": Column((), "int64"), "reward": Column((), "float64")}
CORE |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}


def layout(steps: int = 3, envs: int = 2, **changes: Any) -> SegmentLayout:
    fields: dict[str, Any] = {"obs": {"obs": Column((2,), "float32")}, "columns": CORE, "state_bytes": 10}
    return SegmentLayout(steps, envs, **{**fields, **changes})


def arrays_of(segment: Segment) -> dict[str, Array]:
    found = {"header": segment.header, "final_at": segment.final_at, "state": segment.state}
    for kind, named in (("obs", segment.obs), ("column", segment.columns), ("final", segment.final_obs)):
        found |= {f"{kind} {name}": array for name, array in named.items()}
    return found


DTYPES = st.sampled_from(["bool", "uint8", "float16", "int32", "float32", "int64", "float64"])
SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)
NAMED = st.dictionaries(st.text("abc", min_size=1, max_size=2), st.builds(Column, SHAPES, DTYPES), max_size=3)


@settings(deadline=None, max_examples=100)
@given(
    steps=st.integers(1, 4), envs=st.integers(1, 3), obs=NAMED, columns=NAMED, state=st.integers(0, 70), at=st.integers(0, 2)
)  # fmt: skip
def test_nothing_overlaps_and_all_is_inside(
    steps: int, envs: int, obs: dict[str, Column], columns: dict[str, Column], state: int, at: int
) -> None:
    made = SegmentLayout(steps, envs, obs, columns, state)
    memory = bytearray(made.nbytes * (at + 1) + 64)
    arrays = arrays_of(made.view(memoryview(memory), made.nbytes * at))
    for n, array in enumerate(arrays.values(), start=1):
        array.reshape(-1).view(np.uint8)[...] = n % 2 if array.dtype == bool else n
    for n, (name, array) in enumerate(arrays.items(), start=1):
        assert (array.reshape(-1).view(np.uint8) == (n % 2 if array.dtype == bool else n)).all(), f"{name} was overwritten"
    assert not any(memory[: made.nbytes * at]), "wrote before its slot"
    assert not any(memory[made.nbytes * (at + 1) :]), "wrote behind its slot"
    assert made.nbytes % ALIGN == 0
    assert made.touched_nbytes <= made.nbytes


def test_shapes_are_what_the_documentation_says() -> None:
    segment = layout(columns={**CORE, "log_prob": Column((), "float32")}).allocate()
    assert segment.obs["obs"].shape == (4, 2, 2)
    assert {name: a.shape for name, a in segment.columns.items()} == dict.fromkeys([*CORE, "log_prob"], (3, 2))
    assert segment.columns["reward"].dtype == np.float64
    assert segment.final_obs["obs"].shape == (6, 2), "room for every row"


def test_sizes_are_exact_however_large() -> None:
    """64-bit arithmetic would wrap around, and nonsense would pass the check of memory."""
    huge = layout(steps=2**62, envs=8)
    assert huge.touched_nbytes > 2**62 * 8 * 8
    assert Column((2**40, 2**40), "float64").nbytes == 2**83


def test_finals_and_state() -> None:
    segment = layout().allocate()
    assert (segment.finals, segment.env_state, segment.env_steps) == (0, b"", 0)
    segment.add_final(0, 1, {"obs": [1, 2]})
    segment.add_final(2, 0, {"obs": [3, 4]})
    segment.put_env_state(b"0123456789")
    segment.put_env_state(b"abc")
    segment.columns["valid"][:2] = True
    assert segment.finals == 2
    assert segment.final_at[:2].tolist() == [0 * 2 + 1, 2 * 2 + 0]
    assert segment.final_obs["obs"][:2].tolist() == [[1, 2], [3, 4]]
    assert segment.env_state == b"abc"
    assert segment.env_steps == 4
    segment.clear()
    assert (segment.finals, segment.env_state) == (0, b"")
    assert segment.header[SegmentHeader.STARTED_S] == 0


def test_a_full_segment_has_room_for_a_final_in_every_row() -> None:
    segment = layout(state_bytes=0).allocate()
    for t in range(3):
        for env in range(2):
            segment.add_final(t, env, {"obs": [t, env]})
    assert segment.finals == 6
    assert segment.final_at.tolist() == list(range(6))
    with pytest.raises(IndexError):
        segment.add_final(0, 0, {"obs": [0, 0]})


@pytest.mark.parametrize("sizes", [[2], [1, 3, 2]])
def test_a_rollout_lays_its_segments_side_by_side(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    segments: list[Segment] = []
    expected_next: list[Array] = []
    for size in sizes:
        segment = layout(envs=size).allocate()
        segment.obs["obs"][...] = rng.normal(size=segment.obs["obs"].shape)
        segment.columns["reward"][...] = rng.normal(size=(3, size))
        segment.columns["valid"][...] = rng.random((3, size)) < 0.5
        following = segment.obs["obs"][1:].copy()
        for t, env in np.argwhere(rng.random((3, size)) < 0.4).tolist():
            following[t, env] = rng.normal(size=2).astype(np.float32)
            segment.add_final(t, env, {"obs": following[t, env]})
        segments.append(segment)
        expected_next.append(following)
    rollout = Rollout(4, 3, tuple(segments), np.arange(sum(sizes)))
    assert rollout.steps == 3
    assert rollout.env_steps == sum(int(s.columns["valid"].sum()) for s in segments)
    np.testing.assert_array_equal(rollout.column("reward"), np.concatenate([s.columns["reward"] for s in segments], 1))
    np.testing.assert_array_equal(rollout.obs["obs"], np.concatenate([s.obs["obs"] for s in segments], 1))
    np.testing.assert_array_equal(rollout.next_obs()["obs"], np.concatenate(expected_next, 1))
    t, b, leaves = rollout.finals()
    for row in range(len(t)):
        np.testing.assert_array_equal(rollout.next_obs()["obs"][t[row], b[row]], leaves["obs"][row])
    before = segments[0].obs["obs"].copy()
    rollout.next_obs()["obs"][...] = 7
    np.testing.assert_array_equal(segments[0].obs["obs"], before, "next_obs must be a copy")
