"""Players that follow a script. Each is made for one game, with the game's generator, so that a seed repeats the game."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiorl.envs.hockey.rules import MAX_ANGLE, PIXELS

if TYPE_CHECKING:
    import numpy as np

Act = Callable[[Sequence[float]], tuple[float, ...]]
"""Takes what a player sees (16 or 18 numbers); returns four in [-1, 1], of which the last is left out without keep mode."""

_REACH_S = (0.1, 0.1, 1.0)  # it brakes when the goal of x, y or angle is that near
_KD = 0.5
_GUARD_X = -210 / PIXELS
_NEAR = 30 / PIXELS


class Chaser:
    """Stands before its goal, gets behind a puck that comes near and hits it, swinging the racket all the time.

    `strength` is the gain on the distance to where it wants to be: 0.5 plays weakly, 10 strongly.
    """

    def __init__(self, strength: float, rng: np.random.Generator) -> None:
        self._gains = (strength, strength / 5, strength / 2)
        self._rng = rng
        self._phase = rng.uniform(0, math.pi)

    def __call__(self, obs: Sequence[float]) -> tuple[float, ...]:
        x, y = obs[0], obs[1]
        puck_x, puck_y, puck_vx, puck_vy = obs[12:16]
        self._phase += 0.2 * self._rng.random()
        to_x, to_y = _GUARD_X, 0.0
        if puck_vx < _NEAR:
            to_y = puck_y
            if x < puck_x and abs(y - puck_y) < _NEAR:
                to_x = puck_x + 0.2
                to_y += 0.1 * puck_vy * math.hypot(x - puck_x, y - puck_y)
        wanted = (to_x, to_y, MAX_ANGLE * math.sin(self._phase))
        action: list[float] = []
        for target, at, v, gain, reach_s in zip(wanted, obs[0:3], obs[3:6], self._gains, _REACH_S, strict=True):
            error = target - at
            value = gain * error
            if abs(error) < reach_s * abs(v + 0.01):
                value -= _KD * v
            action.append(-1.0 if value < -1 else 1.0 if value > 1 else value)
        shoot = 1.0 if len(obs) == 18 and 0 < obs[16] < 7 else 0.0
        return (*action, shoot)


def _still(_: Sequence[float]) -> tuple[float, ...]:
    return (0.0, 0.0, 0.0, 0.0)


def _random(rng: np.random.Generator) -> Act:
    return lambda _: tuple((2 * rng.random(4) - 1).tolist())


BOTS: dict[str, Callable[[np.random.Generator], Act]] = {
    "weak": lambda rng: Chaser(0.5, rng),
    "strong": lambda rng: Chaser(10.0, rng),
    "still": lambda rng: _still,
    "random": _random,
}
"""Makes a player for one game, by name."""
