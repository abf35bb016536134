"""The smallest environments that tell what a learner makes of them; first, whether it reads the ends of episodes rightly.

Six states, shown one-hot. Episodes begin in any state but VOID, and in ENOUGH only where the chain is turned:

    state      low action                  high action
    TERMINATED +0.3, terminated at VOID    0, terminated at GOAL       nothing follows: low is better
    TRUNCATED  +0.3, terminated at VOID    0, truncated at GOAL        the value of GOAL follows: high is better
    GOES_ON    +0.3, terminated at VOID    0, on to GOAL               high is better
    ENOUGH     +1.6, terminated at VOID    0, on to GOAL               low is better
    GOAL       +1, terminated at VOID      the same

Every learner that looks beyond the next reward finds "high" in GOES_ON. If it then acts the same in TRUNCATED and
differently in TERMINATED, it bootstraps where it must and only there (Pardo et al., "Time Limits in Reinforcement
Learning", ICML 2018). Whatever it makes of ends, it finds "low" in ENOUGH if it tells actions apart.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import gymnasium
import numpy as np

Obs = np.ndarray[Any, np.dtype[np.float32]]

SURE, ENOUGH = 0.3, 1.6  # as far below what GOAL is worth as above


class Place(IntEnum):
    TERMINATED, TRUNCATED, GOES_ON, ENOUGH, GOAL, VOID = range(6)


class Chain(gymnasium.Env[Any, Any]):
    """`action` is its kind of actions: discrete, multi_discrete, multi_binary or box (the larger, the likelier high).

    `turned` takes low for high and high for low, and begins in ENOUGH, too: who does not tell actions apart shows there.
    """

    def __init__(self, action: str = "discrete", turned: bool = False) -> None:
        spaces = gymnasium.spaces
        self.observation_space = spaces.Box(0, 1, (len(Place),), np.float32)
        self.action_space = {
            "discrete": lambda: spaces.Discrete(2),
            "multi_discrete": lambda: spaces.MultiDiscrete([2]),
            "multi_binary": lambda: spaces.MultiBinary(1),
            "box": lambda: spaces.Box(-1, 1, (1,), np.float32),
        }[action]()
        self.discrete, self.turned = action != "box", turned
        self.place = Place.GOAL

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        begins = [place for place in Place if place is not Place.VOID and (self.turned or place is not Place.ENOUGH)]
        self.place = begins[int(self.np_random.integers(len(begins)))]
        return shown(self.place), {}

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        place = self.place
        high = self._high(action) != self.turned
        self.place = Place.GOAL if high and place is not Place.GOAL else Place.VOID
        low = ENOUGH if place is Place.ENOUGH else SURE
        reward = 1.0 if place is Place.GOAL else 0.0 if high else low
        truncated = high and place is Place.TRUNCATED
        ended = place is Place.GOAL or not high or place is Place.TERMINATED
        return shown(self.place), reward, ended and not truncated, truncated, {}


    def _high(self, action: Any) -> bool:
        """Of a box with a chance that grows from -1 to 1, so that everywhere there is a way up for gradients to follow."""
        if self.discrete:
            return is_high(action, discrete=True)
        return bool(self.np_random.random() < (float(np.asarray(action).reshape(-1)[0]) + 1) / 2)


def shown(place: Place) -> Obs:
    return np.eye(len(Place), dtype=np.float32)[place]


def is_high(action: Any, *, discrete: bool) -> bool:
    """What an action of any kind means in a `Chain` that is not turned; of a box, what is likelier."""
    value = float(np.asarray(action).reshape(-1)[0])
    return value >= 1 if discrete else value >= 0


class Steady(Chain):
    """Every step is worth 1, whatever is done; every `LENGTH` steps an episode is truncated. Shows one of six states.

    As nothing is ever over, everything is worth 1 / (1 - gamma), at once and with any number of steps.
    """

    LENGTH = 50

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        self.time = 0
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return shown(Place(int(self.np_random.integers(len(Place))))), 1.0, False, self.time >= self.LENGTH, {}


class Fork(Chain):
    """Episodes of three steps: the first takes the way to a 1 at the second step (low), or to `LATE` at the third (high).

    With windows of two steps high is right; who takes the value of where one step led counts the 1 twice, and goes low.
    """

    LATE = 1.7

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        gymnasium.Env.reset(self, seed=seed)
        self.time, self.high = 0, False
        return shown(Place(0)), {}

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.time == 1:
            self.high = self._high(action) != self.turned
        reward = (0.0, 0.0, self.LATE) if self.high else (0.0, 1.0, 0.0)
        over = self.time == len(reward)
        place = len(Place) - 1 if over else self.time + 2 * self.high
        return shown(Place(place)), reward[self.time - 1], over, False, {}


class Follow(Chain):
    """Episodes of a sure 0.3 at once (low), or of a second step (high) that is worth 1 (high) or -1 (low).

    Who values the second place by its best action goes there; by its worst, or by a mean of both, does not.
    """

    FIRST, SECOND, OVER = Place(0), Place(1), Place(5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        gymnasium.Env.reset(self, seed=seed)
        self.place = self.FIRST
        return shown(self.place), {}

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        high = self._high(action) != self.turned
        low, best = (SURE, 0.0) if self.place is self.FIRST else (-1.0, 1.0)
        over = self.place is self.SECOND or not high
        self.place = self.OVER if over else self.SECOND
        return shown(self.place), best if high else low, over, False, {}


class Signs(Chain):
    """Episodes of one step: each of six observations tells which action is right. `dtype`: float32, or uint8 up to 255.

    The first two differ by their brightness alone: who scales them otherwise than they were learned from is wrong in one.
    A box is worth the more, the further it is on the right side.
    """

    SHOWN = np.array(
        [[0.4, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], np.float32
    )
    HIGH = np.array([False, True, False, True, True, False])

    def __init__(self, action: str = "discrete", dtype: str = "float32") -> None:
        super().__init__(action)
        top = 255 if dtype == "uint8" else 1
        self.observation_space = gymnasium.spaces.Box(0, top, self.SHOWN.shape[1:], np.dtype(dtype).type)
        self.signs = (self.SHOWN * top).round(1).astype(dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        gymnasium.Env.reset(self, seed=seed)
        self.sign = int(self.np_random.integers(len(self.signs)))
        return self.signs[self.sign].copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        value = float(np.asarray(action).reshape(-1)[0])
        high = value if self.discrete else (value + 1) / 2
        reward = high if self.HIGH[self.sign] else 1 - high
        return self.signs[self.sign].copy(), reward, True, False, {}
