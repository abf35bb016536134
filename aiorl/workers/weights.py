"""Published weights: immutable, versioned, reference-counted buffers in shared memory.

A buffer is written once, while nobody else knows of it, and then only read until the last holder lets go. So there is no
lock a killed worker could keep and no torn read to detect. The training process alone counts: a credit that names a
buffer takes a reference, the doorbell that answers it gives the reference back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aiorl.errors import InvariantError, TrainingError
from aiorl.segments import ALIGN, Array, Column
from aiorl.workers.memory import SharedBlock


@dataclass(frozen=True)
class WeightLayout:
    """Names, shapes and dtypes of the arrays a policy acts with."""

    arrays: Mapping[str, Column]

    @classmethod
    def of(cls, weights: Mapping[str, Array]) -> WeightLayout:
        return cls({name: Column(tuple(a.shape), str(a.dtype)) for name, a in weights.items()})

    @property
    def nbytes(self) -> int:
        return sum(-(-c.nbytes // ALIGN) * ALIGN for c in self.arrays.values()) + ALIGN

    def view(self, memory: memoryview, buffer: int) -> dict[str, Array]:
        """The arrays of buffer number `buffer`."""
        offset = buffer * self.nbytes
        views: dict[str, Array] = {}
        for name, column in self.arrays.items():
            views[name] = np.frombuffer(memory, column.dtype, math.prod(column.shape), offset).reshape(column.shape)
            offset += -(-column.nbytes // ALIGN) * ALIGN
        return views


class WeightStore:
    """`buffers` copies of the weights and who holds which. All but `write` belongs to the event loop's thread."""

    def __init__(self, layout: WeightLayout, buffers: int) -> None:
        self.layout = layout
        self.block = SharedBlock(layout.nbytes * buffers)
        self._views = [layout.view(self.block.buffer, i) for i in range(buffers)]
        self._free = list(range(buffers))
        self._holders = [0] * buffers
        self._buffer_of: dict[int, int] = {}  # version -> buffer, for versions that may still be asked for

    def claim(self) -> int:
        """A buffer to write the next version into."""
        if not self._free:
            raise InvariantError(f"no free weight buffer; versions held: {sorted(self._buffer_of)}")
        return self._free.pop(0)

    def write(self, buffer: int, weights: Mapping[str, Array]) -> None:
        """Copy weights into a claimed buffer (on any thread)."""
        views = self._views[buffer]
        if weights.keys() != views.keys():
            raise TrainingError(f"weights changed their names: expected {sorted(views)}, got {sorted(weights)}")
        for name, array in weights.items():
            if array.shape != views[name].shape or array.dtype != views[name].dtype:
                raise TrainingError(
                    f"weight {name} changed: expected {views[name].shape} {views[name].dtype}, "
                    f"got {array.shape} {array.dtype}"
                )
            views[name][...] = array

    def publish(self, buffer: int, version: int) -> None:
        """The claimed buffer now holds `version`."""
        if version in self._buffer_of:
            raise InvariantError(f"version {version} was published twice")
        if buffer in self._free or self._holders[buffer]:
            raise InvariantError(f"weight buffer {buffer} was published without a claim")
        self._buffer_of[version] = buffer
        self._holders[buffer] = 1

    def acquire(self, version: int) -> int:
        """Hold `version`; returns its buffer. Give it back with `release`."""
        if version not in self._buffer_of:
            raise InvariantError(f"version {version} is gone; there are {sorted(self._buffer_of)}")
        buffer = self._buffer_of[version]
        self._holders[buffer] += 1
        return buffer

    def release(self, buffer: int) -> None:
        self._holders[buffer] -= 1
        if self._holders[buffer] < 0:
            raise InvariantError(f"weight buffer {buffer} was released more often than it was taken")
        if self._holders[buffer] == 0:
            self._free.append(buffer)

    def retire(self, oldest_needed: int) -> None:
        """Versions below `oldest_needed` will not be asked for any more."""
        for version in [v for v in self._buffer_of if v < oldest_needed]:
            self.release(self._buffer_of.pop(version))

    def arrays(self, buffer: int) -> dict[str, Array]:
        """Views on a held buffer: copy what must outlive the hold."""
        return self._views[buffer]

    @property
    def versions(self) -> list[int]:
        """Versions that may still be asked for, oldest first."""
        return sorted(self._buffer_of)

    def close(self) -> None:
        self._views.clear()
        self.block.close()
