"""Stacks of the newest frames: what an observation of `k` frames is made of, the same for acting and for sampling.

A stack [k, …] holds the oldest frame first. Where an episode has not lasted `k` frames yet, its first one is repeated.
`stack_places` alone says so: the environments' stacks (`Stack`) and those that replay rebuilds both ask it.
"""

from __future__ import annotations

import numpy as np

from aiorl.segments import Array


def stack_places(before: Array, newest: Array, k: int) -> Array:
    """Where the frames of stacks lie, […, k] int64, oldest first, for stacks whose newest frame lies at `newest` […].

    `before` [places] int64 says where the frame before each one lies, or the same place where an episode begins.
    """
    places = np.empty((*newest.shape, k), np.int64)
    places[..., -1] = newest
    for i in range(k - 1, 0, -1):
        places[..., i - 1] = before.take(places[..., i])
    return places


class Stack:
    """The newest `k` frames of one environment, each of the given shape and dtype."""

    def __init__(self, k: int, shape: tuple[int, ...], dtype: str) -> None:
        if k < 1:
            raise ValueError(f"a stack of {k} frames: expected 1 or more")
        self._frames = np.zeros((k, *shape), dtype)
        self._before = np.arange(k)
        self._newest = 0

    def begin(self, frame: Array) -> Array:
        """The stack [k, …] that an episode begins with (a copy)."""
        self._newest = 0
        self._before[0] = 0
        return self._put(frame)

    def push(self, frame: Array) -> Array:
        """The stack [k, …] after a step (a copy)."""
        before, self._newest = self._newest, (self._newest + 1) % len(self._before)
        self._before[self._newest] = before
        return self._put(frame)

    def _put(self, frame: Array) -> Array:
        self._frames[self._newest] = frame
        return self._frames.take(stack_places(self._before, np.asarray(self._newest), len(self._before)), 0)
