"""Hockey for one player, against a scripted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.bots import BOTS
from aiorl.envs.hockey.game import FIRST, SECOND, Game
from aiorl.envs.hockey.game import reward as game_reward
from aiorl.envs.hockey.render import Painter, checked_mode
from aiorl.envs.hockey.shaping import Shaping
from aiorl.errors import ConfigError

T = TypeVar("T")


class HockeyEnv(gymnasium.Env[Any, Any]):
    """Player 1 is the agent; `opponent` names the bot that plays the other side.

    Observes float32 [18] and acts with float32 [4] in [-1, 1] (16 and 3 without `keep_mode`), or, if `discrete`, with an
    index into `rules.DISCRETE_ACTIONS`. A goal terminates, the time limit truncates. `reset` takes the option `starter`, 1
    or 2, for the player who has the puck at first in NORMAL mode; without it a seed chooses, and an unseeded reset lets
    the players take turns.

    `reward` is that of the "game", or its "outcome" alone: 1 for a goal, -1 for one conceded. At the end of each game
    `info["outcome"]` has the latter. For training: of several modes or opponents each game draws one; an action is repeated
    for `frame_skip` steps, which count as one; `shaping` is the weight of a reward by potential (see `shaping.py`), whose
    `shaping_gamma` has to be the learner's.

    Raises ConfigError for arguments that do not exist, ResetNeeded for a step outside of a game.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": rules.FPS}

    def __init__(
        self,
        opponent: str | Sequence[str] = "weak",
        mode: str | Sequence[str] = "NORMAL",
        keep_mode: bool = True,
        discrete: bool = False,
        frame_skip: int = 1,
        shaping: float = 0.0,
        shaping_gamma: float = 0.99,
        reward: str = "game",
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = checked_mode(render_mode)
        self._opponents = _names(opponent, "opponent")
        if unknown := [name for name in self._opponents if name not in BOTS]:
            raise ConfigError(f"hockey has no opponent {unknown[0]!r}\n  it has: {', '.join(BOTS)}")
        check_settings(frame_skip, shaping, shaping_gamma, reward)
        self._games = games_of(mode, keep_mode)
        self.game = self._games[0]
        self.observation_space = observation_space(self.game)
        self.action_space = action_space(self.game, discrete)
        self._discrete, self._frame_skip = discrete, frame_skip
        self._earned = game_reward if reward == "game" else outcome_reward
        self._shaping = Shaping(shaping, shaping_gamma) if shaping else None
        self._painter = Painter()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.game = drawn(self._games, self.np_random)
        opponent = drawn(self._opponents, self.np_random)
        begin(self.game, self.np_random, seed, options)
        self._rival = BOTS[opponent](self.np_random)
        seen = self.game.observe(FIRST)
        if self._shaping is not None:
            self._shaping.begin(seen)
        self._show()
        return np.array(seen, np.float32), self.game.info(FIRST)

    def step(self, action: Any) -> tuple[np.ndarray[Any, Any], float, bool, bool, dict[str, Any]]:
        game, mine, earned = self.game, chosen(self.game, action, self._discrete), 0.0
        info: dict[str, Any] = {}
        for _ in range(self._frame_skip):
            game.step(mine, self._rival(game.observe(SECOND))[: game.actions])
            info = game.info(FIRST)
            earned += self._earned(info)
            self._show()
            if not game.playing:
                info["outcome"] = float(info["winner"])
                break
        seen, scored = game.observe(FIRST), game.winner is not None
        if self._shaping is not None:
            earned += self._shaping.step(seen, scored)
        return np.array(seen, np.float32), earned, scored, game.out_of_time, info

    def render(self) -> np.ndarray[Any, Any] | None:
        """uint8 [480, 600, 3] in render mode "rgb_array"; the window of "human" draws itself."""
        return self._painter.frame(self.game) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self._painter.close()

    def _show(self) -> None:
        if self.render_mode == "human":
            self._painter.show(self.game)


def outcome_reward(info: dict[str, float]) -> float:
    """For who cares for nothing but winning."""
    return float(info["winner"])


def _names(given: str | Sequence[str], what: str) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ConfigError(f"hockey: {what} is empty\n  expected a name, or several of which each game draws one")
    return names


# --- what the environments for one and for two players share -----------------------------------------------------------


def check_settings(frame_skip: int, shaping: float, shaping_gamma: float, reward: str) -> None:
    """Those of training, see `HockeyEnv`. Raises ConfigError."""
    if reward not in ("game", "outcome"):
        raise ConfigError(f"hockey has no reward {reward!r}\n  it has: game, outcome")
    if frame_skip < 1:
        raise ConfigError(f"hockey: frame_skip = {frame_skip}: expected 1 or more")
    if shaping < 0 or not 0 <= shaping_gamma <= 1:
        seen = f"shaping = {shaping}, shaping_gamma = {shaping_gamma}"
        raise ConfigError(f"hockey: {seen}\n  expected 0 or more, and a number from 0 to 1")


def games_of(mode: str | Sequence[str], keep_mode: bool) -> list[Game]:
    """One of each mode. Raises ConfigError."""
    return [Game(name, keep_mode) for name in _names(mode, "mode")]


def drawn(choices: list[T], rng: np.random.Generator) -> T:
    """One of them; a single one takes nothing from the generator."""
    return choices[int(rng.integers(len(choices)))] if len(choices) > 1 else choices[0]


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
