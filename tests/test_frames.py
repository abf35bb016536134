"""Stacks of frames against gymnasium's."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.frames import Stack, stack_places


class Counting(gymnasium.Env[np.ndarray, int]):
    """Every frame is another one."""

    observation_space = gymnasium.spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self.frames = 0

    def _frame(self) -> np.ndarray:
        self.frames += 1
        return np.arange(self.frames, self.frames + 6, dtype=np.uint8).reshape(2, 3)

    def reset(self, **_: object) -> tuple[np.ndarray, dict[str, object]]:
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        return self._frame(), 0.0, False, False, {}


@settings(deadline=None)
@given(k=st.integers(1, 5), episodes=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_stacks_equal_gymnasiums(k: int, episodes: list[int]):
    theirs, plain, stack = FrameStackObservation(Counting(), k), Counting(), Stack(k, (2, 3), "uint8")
    for steps in episodes:
        seen = stack.begin(plain.reset()[0])
        np.testing.assert_array_equal(seen, theirs.reset()[0])
        for _ in range(steps):
            seen = stack.push(plain.step(0)[0])
            np.testing.assert_array_equal(seen, theirs.step(0)[0])
    assert seen.dtype == np.uint8


def test_a_stack_is_a_copy():
    stack = Stack(2, (1,), "float32")
    first = stack.begin(np.array([1.0]))
    stack.push(np.array([2.0]))
    stack.push(np.array([3.0]))
    assert first.tolist() == [[1], [1]]


def test_places_are_oldest_first_and_stop_at_the_beginning():
    before = np.array([0, 0, 1, 2, 4, 4])
    assert stack_places(before, np.array([3, 1, 5]), 3).tolist() == [[1, 2, 3], [0, 0, 1], [4, 4, 5]]


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="a stack of 0 frames"):
        Stack(0, (), "float32")
