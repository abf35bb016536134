"""Which places of a ring can be sampled, and drawing from them without looking at all places."""

from __future__ import annotations

import numpy as np

from aiorl.segments import Array

MORE = 1.1  # times as many are tried as should be enough
RARE = 1 / 16  # share of marked places below which all are looked at


class Marks:
    """A set of places below `size`, empty at first."""

    def __init__(self, size: int) -> None:
        self._marked = np.zeros(size, bool)
        self._count = 0

    @staticmethod
    def nbytes_for(size: int) -> int:
        return size

    @property
    def nbytes(self) -> int:
        return self._marked.nbytes

    def __len__(self) -> int:
        return self._count

    def put(self, places: Array, marked: Array) -> None:
        """Mark or unmark different `places` [N], as `marked` [N] bool says."""
        self._count += int(np.count_nonzero(marked)) - int(np.count_nonzero(self._marked[places]))
        self._marked[places] = marked

    def has(self, places: Array) -> Array:
        """[N] bool: which places are marked."""
        return self._marked.take(places)

    def places(self) -> Array:
        """All that are marked, in order, int64."""
        return np.flatnonzero(self._marked)

    def draw(self, rng: np.random.Generator, size: int, below: int) -> Array:
        """[size] int64 marked places, with repetition, all with the same chance. There is at least one, all lie `below`."""
        if self._count == below:
            return rng.integers(below, size=size)
        if self._count < RARE * below:  # trying would take ever more, the fewer there are
            return self.places()[rng.integers(self._count, size=size)]
        tried = rng.integers(below, size=int(MORE * size * below / self._count) + 16)
        found = tried[self.has(tried)][:size]
        missing = size - len(found)
        return found if not missing else np.concatenate([found, self.draw(rng, missing, below)])
