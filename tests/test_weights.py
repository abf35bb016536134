"""Published weights: no buffer is ever free while somebody holds it, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiorl.errors import InvariantError, TrainingError
from aiorl.segments import Array, Column
from aiorl.workers.weights import WeightLayout, WeightStore


def weights(mark: float = 0.0) -> dict[str, Array]:
    return {
        "a.weight": np.full((3, 5), mark, np.float32),
        "count": np.array(int(mark), np.int64),
        "empty": np.zeros((0, 4)),
        "flags": np.array([bool(mark)] * 3),
        "tail": np.full(17, mark, np.float64),
    }


@pytest.fixture
def store() -> Iterator[WeightStore]:
    made = WeightStore(WeightLayout.of(weights()), 3)
    yield made
    made.close()


def published(store: WeightStore, version: int) -> int:
    buffer = store.claim()
    store.write(buffer, weights(version))
    store.publish(buffer, version)
    return buffer


def assert_holds(store: WeightStore, buffer: int, version: int) -> None:
    arrays, expected = store.arrays(buffer), weights(version)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(arrays[name], array)


def test_layout() -> None:
    layout = WeightLayout.of(weights())
    assert layout.arrays["a.weight"] == Column((3, 5), "float32")
    memory = memoryview(bytearray(layout.nbytes * 2))
    spans = sorted(
        (array.ctypes.data, array.ctypes.data + array.nbytes)
        for buffer in range(2)
        for array in layout.view(memory, buffer).values()
        if array.size
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "arrays overlap"
    assert len(spans) == 8


def test_versions_are_written_published_held_and_retired(store: WeightStore) -> None:
    for version in range(3):
        published(store, version)
    assert store.versions == [0, 1, 2]
    with pytest.raises(InvariantError, match=r"no free weight buffer; versions held: \[0, 1, 2\]"):
        store.claim()
    held = store.acquire(0)
    assert_holds(store, held, 0)
    store.retire(2)
    assert store.versions == [2]
    with pytest.raises(InvariantError, match=r"version 0 is gone; there are \[2\]"):
        store.acquire(0)
    assert published(store, 3) != held, "a held buffer was given away"
    assert_holds(store, held, 0)
    store.release(held)
    assert store.claim() == held


def test_mistakes_are_refused(store: WeightStore) -> None:
    buffer = published(store, 0)
    other = store.claim()
    with pytest.raises(InvariantError, match="version 0 was published twice"):
        store.publish(other, 0)
    with pytest.raises(InvariantError, match=f"buffer {buffer} was published without a claim"):
        store.publish(buffer, 1)
    with pytest.raises(InvariantError, match="published without a claim"):
        store.publish(2, 1)
    store.retire(1)
    with pytest.raises(InvariantError, match="released more often"):
        store.release(buffer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": np.zeros(16)}, r"weight tail changed: expected \(17,\) float64, got \(16,\) float64"),
        ({"tail": np.zeros(17, np.float32)}, "got .* float32"),
        ({"more": np.zeros(1)}, "changed their names"),
    ],
)
def test_weights_that_change_their_form_are_refused(store: WeightStore, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        store.write(store.claim(), {**weights(), **change})


class HoldersOfWeights(RuleBasedStateMachine):
    """Random holders against a model that knows who holds what."""

    @initialize(buffers=st.integers(2, 5))
    def begin(self, buffers: int) -> None:
        self.store = WeightStore(WeightLayout.of(weights()), buffers)
        self.buffers, self.next_version = buffers, 0
        self.current: set[int] = set()  # versions that may be asked for
        self.held: list[tuple[int, int]] = []  # (version, buffer), once for each holder

    def needed(self) -> set[int]:
        return self.current | {version for version, _ in self.held}

    @rule()
    def publish(self) -> None:
        if len(self.needed()) == self.buffers:
            with pytest.raises(InvariantError):
                self.store.claim()
            return
        buffer = self.store.claim()
        assert buffer not in {b for _, b in self.held}, "a held buffer was claimed"
        self.store.write(buffer, weights(self.next_version))
        self.store.publish(buffer, self.next_version)
        self.current.add(self.next_version)
        self.next_version += 1

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.current)))
        self.held.append((version, self.store.acquire(version)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version, buffer = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert_holds(self.store, buffer, version)
        self.store.release(buffer)

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        oldest = data.draw(st.integers(0, self.next_version))
        self.store.retire(oldest)
        self.current = {version for version in self.current if version >= oldest}

    @invariant()
    def what_is_held_stays_as_it_was(self) -> None:
        assert self.store.versions == sorted(self.current)
        for version, buffer in self.held:
            assert int(self.store.arrays(buffer)["count"]) == version

    def teardown(self) -> None:
        self.store.close()


TestHoldersOfWeights = HoldersOfWeights.TestCase
TestHoldersOfWeights.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
