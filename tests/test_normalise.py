"""Running statistics against those of all samples at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl.normalise import RunningMoments, normalise


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 1000), st.floats(-1e3, 1e3))
def test_any_division_into_batches_gives_the_same_moments(sizes: list[int], seed: int, offset: float):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(size=(n, 2)) * [1, 10] + offset for n in sizes]
    moments = RunningMoments((2,))
    for batch in batches:
        moments.update(batch)
    everything = np.concatenate(batches)
    assert moments.count == len(everything)
    if len(everything):
        np.testing.assert_allclose(moments.mean, everything.mean(0), atol=1e-9, rtol=1e-9)
        np.testing.assert_allclose(moments.var, everything.var(0), atol=1e-7, rtol=1e-7)


def test_nothing_is_changed_before_the_first_sample():
    moments = RunningMoments((2,))
    x = np.array([[0.5, -3.0]], np.float32)
    found = normalise(x, moments.mean.astype(np.float32), moments.scale.astype(np.float32))
    np.testing.assert_allclose(found, x, rtol=1e-6)


def test_normalised_samples_have_mean_0_and_deviation_1_and_outliers_are_cut():
    x = np.random.default_rng(0).normal(5, 3, (1000, 1)).astype(np.float32)
    moments = RunningMoments((1,))
    moments.update(x)
    mean, scale = moments.mean.astype(np.float32), moments.scale.astype(np.float32)
    found = normalise(x, mean, scale)
    assert found.mean() == pytest.approx(0, abs=1e-4)
    assert found.std() == pytest.approx(1, abs=1e-4)
    assert found.dtype == np.float32
    assert normalise(np.float32([[1e9], [-1e9]]), mean, scale).tolist() == [[10], [-10]]


def test_constant_features_stay_finite():
    moments = RunningMoments((1,))
    moments.update(np.full((5, 1), 7.0))
    assert normalise(np.float32([[7.0]]), moments.mean, moments.scale).tolist() == [[0]]


def test_state_round_trip():
    a, b = RunningMoments((2,)), RunningMoments((2,))
    a.update(np.random.default_rng(0).normal(size=(9, 2)))
    b.load_state_dict(a.state_dict())
    more = np.random.default_rng(1).normal(size=(4, 2))
    a.update(more)
    b.update(more)
    assert a.state_dict()["mean"].tobytes() == b.state_dict()["mean"].tobytes()
    assert a.state_dict()["var"].tobytes() == b.state_dict()["var"].tobytes()
    with pytest.raises(ValueError, match=r"moments\.mean: expected float64 \[3\], got float64 \[2\]"):
        RunningMoments((3,)).load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="expected samples"):
        a.update(np.zeros((3, 4)))
