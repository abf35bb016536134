"""Hockey for one player, against a scripted one."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.bots import BOTS
from aiorl.envs.hockey.game import FIRST, SECOND, Game, reward
from aiorl.envs.hockey.render import Painter, checked_mode
from aiorl.errors import ConfigError


class HockeyEnv(gymnasium.Env[Any, Any]):
    """Player 1 is the agent; `opponent` names the bot that plays the other side.

    Observes float32 [18] and acts with float32 [4] in [-1, 1] (16 and 3 without `keep_mode`), or, if `discrete`, with an
    index into `rules.DISCRETE_ACTIONS`. A goal terminates, the time limit truncates. `reset` takes the option `starter`, 1
    or 2, for the player who has the puck at first in NORMAL mode; without it a seed chooses, and an unseeded reset lets
    the players take turns. Raises ConfigError for arguments that do not exist, ResetNeeded for a step outside of a game.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": rules.FPS}

    def __init__(
        self,
        opponent: str = "weak",
        mode: str = "NORMAL",
        keep_mode: bool = True,
        discrete: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if opponent not in BOTS:
            raise ConfigError(f"hockey has no opponent {opponent!r}\n  it has: {', '.join(BOTS)}")
        self.render_mode = checked_mode(render_mode)
        self.game = Game(mode, keep_mode)
        self.observation_space = observation_space(self.game)
        self.action_space = action_space(self.game, discrete)
        self._make_rival, self._discrete = BOTS[opponent], discrete
        self._painter = Painter()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        super().reset(seed=seed)
        begin(self.game, self.np_random, seed, options)
        self._rival = self._make_rival(self.np_random)
        self._show()
        return observed(self.game, FIRST), self.game.info(FIRST)

    def step(self, action: Any) -> tuple[np.ndarray[Any, Any], float, bool, bool, dict[str, Any]]:
        game = self.game
        game.step(chosen(game, action, self._discrete), self._rival(game.observe(SECOND))[: game.actions])
        info = game.info(FIRST)
        self._show()
        return observed(game, FIRST), reward(info), game.winner is not None, game.out_of_time, info

    def render(self) -> np.ndarray[Any, Any] | None:
        """uint8 [480, 600, 3] in render mode "rgb_array"; the window of "human" draws itself."""
        return self._painter.frame(self.game.world) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self._painter.close()

    def _show(self) -> None:
        if self.render_mode == "human":
            self._painter.show(self.game.world)


# --- what the environments for one and for two players share -----------------------------------------------------------


def observation_space(game: Game) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (game.observations,), np.float32)


def action_space(game: Game, discrete: bool) -> spaces.Space[Any]:
    if discrete:
        return spaces.Discrete(len(rules.DISCRETE_ACTIONS) - (not game.keep_mode))
    return spaces.Box(-1.0, 1.0, (game.actions,), np.float32)


def begin(game: Game, rng: np.random.Generator, seed: int | None, options: dict[str, Any] | None) -> None:
    """Reset the game as `reset` was asked to: a seed decides everything, also whose turn it is."""
    starter = (options or {}).get("starter")
    if starter not in (None, 1, 2):
        raise ConfigError(f"hockey: the option starter expected 1 or 2, got {starter!r}")
    if starter is not None:
        game.reset(rng, starter - 1)
    else:
        game.reset(rng, None if seed is None else int(rng.integers(2)))


def observed(game: Game, player: int) -> np.ndarray[Any, Any]:
    return np.array(game.observe(player), np.float32)


def chosen(game: Game, action: Any, discrete: bool) -> list[float]:
    """An action of the environment as one of the game."""
    if discrete:
        return list(rules.DISCRETE_ACTIONS[int(action)][: game.actions])
    return np.asarray(action, np.float64).tolist()
