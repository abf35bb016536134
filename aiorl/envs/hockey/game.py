"""A game of hockey between two players: how it begins, what a step does, what each player sees and is paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gymnasium.error import ResetNeeded

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.rules import GOAL_HALF, HEIGHT, HOLD_STEPS, MODES, SHOOT_ABOVE, WIDTH, ZONE
from aiorl.envs.hockey.world import SIDES, World
from aiorl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

FIRST, SECOND = 0, 1
_START = 3 / 10 * WIDTH  # from the centre
_ROOM_X, _ROOM_Y = 3.5, 2.9  # where a racket is clear of the boards


class Game:
    """`keep_mode`: a puck that is caught stays with the racket until it is shot, and players act and see accordingly.

    `winner` is the player who scored, None while nobody has; `playing` ends with a goal or with the time. Raises ConfigError
    for a mode that does not exist.
    """

    def __init__(self, mode: str = "NORMAL", keep_mode: bool = True) -> None:
        if mode not in MODES:
            raise ConfigError(f"hockey has no mode {mode!r}\n  it has: {', '.join(MODES)}")
        self.mode, self.keep_mode = mode, keep_mode
        self.limit = MODES[mode]
        self.world = World()
        self.winner: int | None = None
        self.steps = 0
        self.playing = False
        self._starter = SECOND
        self._held = [0, 0]
        self._caught = [False, False]

    @property
    def actions(self) -> int:
        """How many numbers a player acts with."""
        return 4 if self.keep_mode else 3

    @property
    def observations(self) -> int:
        """How many numbers a player sees."""
        return 18 if self.keep_mode else 16

    @property
    def out_of_time(self) -> bool:
        """The game ended without a goal."""
        return self.winner is None and self.steps >= self.limit

    def reset(self, rng: np.random.Generator, starter: int | None = None) -> None:
        """Begin a game. `starter` has the puck at first in NORMAL mode; by default the players take turns."""
        self._starter = 1 - self._starter if starter is None else starter
        puck, impulse, second = (0.0, 0.0), (0.0, 0.0), (_START, 0.0)
        if self.mode != "NORMAL":
            second = (rng.uniform(ZONE, _ROOM_X), rng.uniform(-_ROOM_Y, _ROOM_Y))
        if self.mode == "TRAIN_DEFENSE":
            puck = (rng.uniform(0, WIDTH / 3), rng.uniform(-0.4, 0.4) * HEIGHT)
            aim = (-WIDTH / 2 - puck[0], rng.uniform(-0.6, 0.6) * GOAL_HALF - puck[1])
            scale = rules.SHOT / math.hypot(*aim)
            impulse = (aim[0] * scale, aim[1] * scale)
        else:
            left = self._starter == FIRST or self.mode == "TRAIN_SHOOTING"
            away = rng.uniform(HEIGHT / 8, HEIGHT / 4)
            puck = (-away if left else away, rng.uniform(-HEIGHT / 8, HEIGHT / 8))
        self.world.place([(-_START, 0.0), second], puck, impulse)
        self.winner, self.steps, self.playing = None, 0, True
        self._held, self._caught = [0, 0], [False, False]

    def step(self, first: Sequence[float], second: Sequence[float]) -> None:
        """Both players' actions for 1/50 s: push x, push y, turn and, in keep mode, shoot; beyond ±1 they are cut.

        Raises ValueError if an action is not of the right length or not a number, ResetNeeded if no game is being played.
        """
        if not self.playing:
            raise ResetNeeded("hockey: no game is being played\n  call reset() first, and after each game")
        world = self.world
        chosen = self._checked(first), self._checked(second)
        for i, (x, y, turn, *_) in enumerate(chosen):
            world.push(i, x, y, turn)
        if self.keep_mode:
            for i in (FIRST, SECOND):
                if self._held[i]:
                    self._hold(i, chosen[i][3])
        world.step()
        self.steps += 1
        self._caught = [False, False]
        for what, i, puck_vx in world.touched:
            if what == "goal":
                self.winner = 1 - i
            elif self.keep_mode and not self._held[i] and SIDES[i] * puck_vx < 0.1:
                self._held[i] = HOLD_STEPS
                self._caught[i] = True
        self.playing = self.winner is None and self.steps < self.limit

    def _checked(self, action: Sequence[float]) -> list[float]:
        if len(action) != self.actions:
            raise ValueError(f"hockey: an action has {self.actions} numbers, got {len(action)}")
        if not math.isfinite(sum(action)):
            raise ValueError(f"hockey: an action must be finite, got {[*action]}")
        return [-1.0 if value < -1 else 1.0 if value > 1 else value for value in action]

    def _hold(self, i: int, shoot: float) -> None:
        self.world.hold(i)
        self._held[i] -= 1
        if self._held[i] <= 1 or shoot > SHOOT_ABOVE:
            self.world.shoot(i)
            self._held[i] = 0

    def observe(self, i: int) -> list[float]:
        """What player i sees, in its own frame: its x, y, angle, vx, vy, angular velocity, the same of the other player,
        the puck's x, y, vx, vy and, in keep mode, for how many steps it and the other may still hold the puck."""
        side, world = SIDES[i], self.world
        x, y, angle, vx, vy, spin = world.rackets[i]
        ox, oy, other_angle, ovx, ovy, other_spin = world.rackets[1 - i]
        px, py, pvx, pvy = world.puck
        seen = [
            side * x, side * y, angle, side * vx, side * vy, spin,
            side * ox, side * oy, other_angle, side * ovx, side * ovy, other_spin,
            side * px, side * py, side * pvx, side * pvy,
        ]  # fmt: skip
        if self.keep_mode:
            seen += [float(self._held[i]), float(self._held[1 - i])]
        return seen

    def info(self, i: int) -> dict[str, float]:
        """`winner`: 1 if player i has scored, -1 if the other has, else 0; and terms that rewards are made from."""
        side, (px, py, pvx, _) = SIDES[i], self.world.puck
        x, y = self.world.rackets[i][:2]
        return {
            "winner": 0 if self.winner is None else 1 if self.winner == i else -1,
            "reward_closeness_to_puck": rules.closeness(
                side * x, side * y, side * px, side * py, side * pvx, self.limit
            ),
            "reward_touch_puck": float(self._caught[i]),
            "reward_puck_direction": rules.puck_direction(side * pvx, self.limit),
        }


def reward(info: dict[str, float]) -> float:
    """A player's reward for a step, from its `info`."""
    return rules.WIN_REWARD * info["winner"] + info["reward_closeness_to_puck"]
