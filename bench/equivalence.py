"""Statistics of repeated learning: interquartile means, bootstrap intervals, and what they say about equality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aiorl.segments import Array

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def iqm(x: Array, axis: int = -1) -> Array:
    """Interquartile mean: of the middle half of the values (Agarwal et al. 2021, arXiv 2108.13264)."""
    return stats.trim_mean(x, 0.25, axis=axis)


def chance(a: Sequence[float], b: Sequence[float]) -> float:
    """Probability that means lie as far apart as these if it is chance alone which value is whose: a two-sided
    permutation test, exact for up to eleven values a side. With three it is never below 0.1."""

    def difference(x: Array, y: Array, axis: int) -> Array:
        return x.mean(axis=axis) - y.mean(axis=axis)

    test = stats.permutation_test((a, b), difference, vectorized=True, n_resamples=10**6, rng=np.random.default_rng(0))
    return float(test.pvalue)


def paired_mean(differences: Sequence[float] | Array, resamples: int = RESAMPLES) -> Estimate:
    """Mean of paired differences, with a percentile bootstrap over the pairs."""
    x = np.asarray(differences, float)
    found = stats.bootstrap(
        (x,), np.mean, n_resamples=resamples, method="percentile", batch=500, rng=np.random.default_rng(0)
    )
    return _estimate(x.mean(), found)


def iqm_difference(
    scores: Sequence[Sequence[float] | Array],
    reference: Sequence[Sequence[float] | Array],
    resamples: int = RESAMPLES,
) -> Estimate:
    """IQM of `scores` minus that of `reference`, each a list of tasks with the scores of their seeds.

    All runs of all tasks are pooled; the bootstrap is stratified: it draws seeds anew within each task and side.
    """
    samples = [np.asarray(x, float) for x in (*scores, *reference)]
    tasks = len(scores)

    def difference(*parts: Array, axis: int = -1) -> Array:
        sides = np.concatenate(parts[:tasks], axis), np.concatenate(parts[tasks:], axis)
        return iqm(sides[0], axis) - iqm(sides[1], axis)

    value = float(difference(*samples))
    found = stats.bootstrap(
        samples, difference, n_resamples=resamples, method="percentile", vectorized=True, batch=500,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return _estimate(value, found)


def verdict(difference: Estimate, margin: float) -> str:
    """What an interval says about a difference to a reference, higher being better."""
    if difference.high < -margin:
        return "worse"
    if difference.low <= -margin:
        return "undecided"
    return "equivalent" if difference.high < margin else "not worse"


def _estimate(value: float, found: Any) -> Estimate:
    return Estimate(float(value), float(found.confidence_interval.low), float(found.confidence_interval.high))
