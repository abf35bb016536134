"""Running statistics and normalisation by them, in NumPy: the same function for acting and for learning."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiorl.segments import Array
from aiorl.trees import check_tree

CLIP = 10.0
EPSILON = 1e-8


def normalise(x: Array, mean: Array, scale: Array) -> Array:
    """(x - mean) * scale within [-10, 10], for float32 x […, F] and statistics [F]; a new array."""
    result = x - mean
    result *= scale
    np.maximum(result, -CLIP, out=result)
    return np.minimum(result, CLIP, out=result)


class RunningMoments:
    """Mean and variance of all samples so far, per feature, in float64 (merging: Chan, Golub and LeVeque 1979).

    Before the first sample the mean is 0 and the variance 1, so that normalising changes nothing.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)

    def update(self, samples: Array) -> None:
        """Take in samples [N, *shape]; none at all is fine."""
        if samples.shape[1:] != self.mean.shape:
            raise ValueError(f"expected samples [N, {list(self.mean.shape)}], got {list(samples.shape)}")
        n = len(samples)
        if n == 0:
            return
        mean, var = samples.mean(0, dtype=np.float64), samples.var(0, dtype=np.float64)
        total = self.count + n
        shift = mean - self.mean
        weight = n / total
        if self.count == 0:
            self.mean, self.var = mean, var
        else:
            self.mean = self.mean + weight * shift
            self.var = (1 - weight) * self.var + weight * var + weight * (1 - weight) * shift**2
        self.count = total

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.var).all())

    @property
    def scale(self) -> Array:
        """1 / standard deviation."""
        return 1.0 / np.sqrt(self.var + EPSILON)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": np.array(self.mean), "var": np.array(self.var)}

    def load_state_dict(self, state: dict[str, Any], path: str = "moments") -> None:
        """Raises ValueError naming the first mismatch."""
        check_tree(state, self.state_dict(), path)
        self.count, self.mean, self.var = state["count"], np.array(state["mean"]), np.array(state["var"])
