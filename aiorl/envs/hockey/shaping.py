"""Shaping by a potential (Ng et al. 1999, "Policy invariance under reward transformations"): a reward for getting nearer to
a goal, which changes how soon something is learned and not what is best.

A step from s to s' earns gamma * phi(s') - phi(s) on top. Discounted by the same gamma this adds up to
gamma^T * phi(s_T) - phi(s_0), whatever was done between. A game that ends has no future, so its end counts as 0; one that is
cut off at the time limit would go on, so there the potential stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aiorl.envs.hockey.rules import WIDTH, ZONE

_GOAL_X = WIDTH / 2


def potential(seen: Sequence[float]) -> float:
    """Of what a player sees, in [-2, 0]: the higher, the nearer it is to the puck and the puck to the other goal.

    A puck in the other half is out of reach: there the distance to the centre line in front of it counts.
    """
    x, y, puck_x, puck_y = seen[0], seen[1], seen[12], seen[13]
    to_puck = math.hypot(x - min(puck_x, -ZONE), y - puck_y)
    to_goal = math.hypot(_GOAL_X - puck_x, puck_y)
    return -(to_puck + to_goal) / WIDTH


class Shaping:
    """The reward by potential in one game after the other, for one player: `begin`, then `step` after each step."""

    def __init__(self, weight: float, gamma: float) -> None:
        self._weight, self._gamma = weight, gamma
        self._before = 0.0

    def begin(self, seen: Sequence[float]) -> None:
        self._before = self._weight * potential(seen)

    def step(self, seen: Sequence[float], terminated: bool) -> float:
        """What the step that led to `seen` earns."""
        after = 0.0 if terminated else self._weight * potential(seen)
        earned = self._gamma * after - self._before
        self._before = after
        return earned
