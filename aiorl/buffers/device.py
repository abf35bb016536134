"""Observations on the learner's device: what is sampled need not be sent there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import ConfigError
from aiorl.lazy import LazyModule
from aiorl.normalise import CLIP
from aiorl.segments import Array, Column

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

CHUNK_BYTES = 2**26  # that are sent to the device at once


class DeviceRows:
    """As `Rows`, but a tensor on a device; growing takes a copy. Raises ConfigError if there is no room for it."""

    def __init__(self, rows: int, row: Column, device: str) -> None:
        self.row, self._device = row, device
        self.array = self._zeros(rows)

    def _zeros(self, rows: int) -> torch.Tensor:
        try:
            dtype = torch.from_numpy(np.zeros(0, self.row.dtype)).dtype
            made = torch.zeros((rows, *self.row.shape), dtype=dtype, device=self._device)
            if rows:  # torch has types that it makes tensors of and cannot write to by places
                first = self._index(np.zeros(1, np.int64))
                made[first] = made[first]
            return made
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"the replay buffer needs {rows * self.row.nbytes / 2**30:.2f} GiB on {self._device} for {self.row.dtype}: "
                f"{str(error).partition('.')[0]}\n  use a smaller capacity, or storage = \"memory\""
            ) from None

    def take(self, places: Array) -> torch.Tensor:
        return self.array[self._index(places)]

    def put(self, places: Array, values: Array) -> None:
        at_once = max(1, len(places) * CHUNK_BYTES // max(1, values.nbytes))
        for i in range(0, len(places), at_once):
            part = slice(i, i + at_once)
            self.array[self._index(places[part])] = torch.tensor(values[part], device=self._device)

    def _index(self, places: Array) -> torch.Tensor:
        return torch.from_numpy(places).to(self._device)

    def grow(self, rows: int) -> None:
        longer = self._zeros(rows)
        longer[: len(self.array)] = self.array
        self.array = longer

    def copy(self, count: int) -> Array:
        return self.array[:count].to("cpu", copy=True).numpy()

    def close(self) -> None:
        self.array = self._zeros(0)


def encode(spaces: Spaces, leaves: Mapping[str, torch.Tensor], weights: Mapping[str, Array]) -> torch.Tensor:
    """The numbers that `aiorl.algos.practice.encode` makes of observation leaves [N, …], float32 [N, features]."""
    x = torch.cat([_encode_leaf(leaf, leaves[leaf.name]) for leaf in spaces.observation], 1)
    if "obs_mean" not in weights:
        return x
    mean, scale = (torch.from_numpy(weights[name]).to(x.device) for name in ("obs_mean", "obs_scale"))
    return ((x - mean) * scale).clamp(-CLIP, CLIP)


def _encode_leaf(leaf: Leaf, value: torch.Tensor) -> torch.Tensor:
    flat = value.reshape(len(value), leaf.size)
    if leaf.nvec:
        source, stands_for = (torch.from_numpy(array).to(value.device) for array in leaf.one_hot)
        return (flat[:, source] == stands_for).float()
    return flat.float() * float(np.float32(1 / 255)) if leaf.is_image else flat.float()
