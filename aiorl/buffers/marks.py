"""Which places of a ring can be sampled, and the i-th of them, without looking at all places."""

from __future__ import annotations

import numpy as np

from aiorl.segments import Array

BLOCK = 2**16  # places at most that are looked at together after a change


class Marks:
    """A set of places below `size` (2^31 at most), all unmarked at first."""

    def __init__(self, size: int) -> None:
        self._block = min(size, BLOCK)
        blocks = -(-size // self._block)
        self._marked = np.zeros((blocks, self._block), bool)
        self._members = np.zeros((blocks, self._block), np.int32)  # of each block: its marked places in order
        self._counts = np.zeros(blocks, np.int64)
        self._ends = np.zeros(blocks, np.int64)  # marks in all blocks up to this one
        self._shifts = np.zeros(blocks, np.int64)  # where mark number i lies in the members, less i
        self._gapless = True  # the marks are the first so many places

    @staticmethod
    def nbytes_for(size: int) -> int:
        block = min(size, BLOCK)
        return -(-size // block) * (block * 5 + 24)

    @property
    def nbytes(self) -> int:
        return self.nbytes_for(self._marked.size)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def put(self, start: int, marked: Array) -> None:
        """Mark or unmark the places from `start` on, as `marked` [N] bool says."""
        stop = start + len(marked)
        self._marked.reshape(-1)[start:stop] = marked
        for block in range(start // self._block, -(-stop // self._block)):
            members = np.flatnonzero(self._marked[block])
            self._members[block, : len(members)] = members + block * self._block
            self._counts[block] = len(members)
        np.cumsum(self._counts, out=self._ends)
        np.subtract(np.arange(len(self._ends)) * self._block + self._counts, self._ends, out=self._shifts)
        count = len(self)
        self._gapless = not count or bool(self._find(np.array([count - 1]))[0] == count - 1)

    def has(self, places: Array) -> Array:
        """[N] bool: which places are marked."""
        return self._marked.reshape(-1).take(places)

    def nth(self, i: Array) -> Array:
        """The places [N] of the marks numbered `i` [N] int64, in order from 0."""
        return i if self._gapless else self._find(i)

    def _find(self, i: Array) -> Array:
        if len(self._ends) > 1:
            i = i + self._shifts.take(self._ends.searchsorted(i, side="right"))
        return self._members.reshape(-1).take(i).astype(np.int64)
