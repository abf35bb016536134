"""Sampling by priority (Schaul et al. 2016, arXiv 1511.05952): P(i) = p_i^alpha / sum of all, p_i = |TD error| + epsilon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from aiorl.errors import NonFiniteError
from aiorl.segments import Array

EPSILON = 1e-6  # so that a row without error is sampled now and then


class SumTree:
    """Weights of `size` places, the sums of which are kept in a binary tree: changing and finding take log2(size) steps.

    Every sum is made anew from the two below it, so the tree depends on the weights alone and no error adds up.
    """

    def __init__(self, size: int) -> None:
        self._leaves = 1 << max(0, size - 1).bit_length()
        self._sums = np.zeros(2 * self._leaves, np.float64)  # node i has the children 2i and 2i + 1; 1 is the root

    @staticmethod
    def nbytes_for(size: int) -> int:
        return 16 << max(0, size - 1).bit_length()

    @property
    def nbytes(self) -> int:
        return self._sums.nbytes

    def clear(self) -> None:
        """Set all weights to 0."""
        self._sums[:] = 0

    @property
    def total(self) -> float:
        return float(self._sums[1])

    def put(self, places: Array, weights: Array) -> None:
        """Set the weights [N] of `places` [N], none of them negative."""
        sums, nodes = self._sums, places + self._leaves
        sums[nodes] = weights
        while len(nodes) and nodes[0] > 1:  # all nodes are of one level
            nodes = nodes >> 1
            sums[nodes] = sums.take(2 * nodes) + sums.take(2 * nodes + 1)

    def take(self, places: Array) -> Array:
        return self._sums.take(places + self._leaves)

    def first(self, count: int) -> Array:
        """The weights of the places below `count` (a view)."""
        return self._sums[self._leaves : self._leaves + count]

    def find(self, targets: Array) -> Array:
        """The places [N] at which the sum of the weights up to there passes `targets` [N], from 0 to the total.

        Never a place of weight 0, unless all are.
        """
        sums, node, targets = self._sums, np.ones(len(targets), np.int64), targets.copy()
        while node[0] < self._leaves:
            left = 2 * node
            passed = sums.take(left)
            goes_right = (targets >= passed) & (sums.take(left + 1) > 0)
            targets -= passed * goes_right
            node = left + goes_right
        return node - self._leaves


class Priorities:
    """Priorities of the places of a ring; those that must not be sampled have none."""

    def __init__(self, size: int, exponent: float) -> None:
        self._exponent = exponent
        self._tree = SumTree(size)
        self._largest = 1.0  # priority, before it is raised to the exponent
        self._replaced: list[tuple[Array, Array]] | None = None  # places and their weights before: see `undone_by_failure`

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    def renew(self, places: Array, sampleable: Array) -> None:
        """New rows lie at `places` [N]: the ones that are sampleable get the largest priority so far."""
        self._tree.put(places, sampleable * self._largest**self._exponent)

    def withdraw(self, places: Array) -> None:
        """The rows at `places` [N] can be sampled no more."""
        self._tree.put(places, np.zeros(len(places)))

    def update(self, places: Array, errors: Array) -> None:
        """Rows at `places` [N] had TD errors [N]. Raises NonFiniteError, and then changes nothing."""
        if not np.isfinite(errors).all():
            raise NonFiniteError(
                "prioritised replay: a TD error is not finite\n"
                "  lower the learning rate or reward_scale, or set max_grad_norm"
            )
        if len(places):
            priorities = np.abs(errors.astype(np.float64)) + EPSILON
            self._largest = max(self._largest, float(priorities.max()))
            if self._replaced is not None:
                self._replaced.append((places, self._tree.take(places)))
            self._tree.put(places, priorities**self._exponent)

    @contextmanager
    def undone_by_failure(self) -> Iterator[None]:
        """If what is done within raises, the calls of `update` there are taken back. Nothing may be renewed meanwhile."""
        largest, self._replaced = self._largest, []
        try:
            yield
        except BaseException:
            self._largest = largest
            for places, weights in reversed(self._replaced):
                self._tree.put(places, weights)
            raise
        finally:
            self._replaced = None

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """`size` places, one from each of `size` equal shares of the whole (so each row as often as it should be)."""
        return self._tree.find((np.arange(size) + rng.random(size)) * (self._tree.total / size))

    def weights(self, places: Array, count: int, beta: float) -> Array:
        """Importance weights [N]: (count * P(i))^-beta, divided by the largest of them; `count` rows can be sampled."""
        weights = (count / self._tree.total * self._tree.take(places)) ** -beta
        return weights / weights.max()

    def chances(self, places: Array) -> Array:
        """P(i) of `places` [N]."""
        return self._tree.take(places) / self._tree.total

    def entropy(self, used: int) -> float:
        """Of P over the places below `used`, in nats: log(number of rows) if all are alike, 0 if there is only one."""
        weights = self._tree.first(used)
        shares = weights[weights > 0] / self._tree.total
        return float(-(shares * np.log(shares)).sum())

    def state_dict(self, used: int) -> dict[str, Any]:
        return {"largest": self._largest, "weights": self._tree.first(used).copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a state that has been checked in form. Raises ValueError if it holds what is no weight."""
        weights, largest = state["weights"], state["largest"]
        if not (np.isfinite(weights).all() and (weights >= 0).all() and np.isfinite(largest) and largest > 0):
            raise ValueError("priorities: expected finite weights, none of them negative")
        self._largest = float(largest)
        self._tree.clear()  # of what lies behind those that were saved
        self._tree.put(np.arange(len(weights)), weights)
