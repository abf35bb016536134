"""Hockey for self-play: env = "aiorl.envs.hockey.selfplay:hockey"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from aiorl.envs.hockey.bots import BOTS, Act
from aiorl.envs.hockey.env import (
    action_space,
    check_settings,
    chosen,
    games_of,
    observation_space,
    outcome_reward,
)
from aiorl.envs.hockey.game import FIRST, SECOND
from aiorl.envs.hockey.game import reward as game_reward
from aiorl.envs.hockey.render import Painter, checked_mode
from aiorl.envs.hockey.rules import FPS
from aiorl.envs.hockey.shaping import Shaping
from aiorl.envs.twoplayer import Bot, Pair, SelfPlayEnv


def hockey(
    opponent: str | None = None, swap_seats: bool = True, mode: str | Sequence[str] = "NORMAL", keep_mode: bool = True,
    discrete: bool = False, frame_skip: int = 1, shaping: float = 0.0, shaping_gamma: float = 0.99, reward: str = "game",
    render_mode: str | None = None,
) -> SelfPlayEnv:  # fmt: skip
    """A `SelfPlayEnv` with the bots of hockey; the arguments after `swap_seats` are those of `HockeyEnv`."""
    game = HockeyGame(mode, keep_mode, discrete, frame_skip, shaping, shaping_gamma, reward, render_mode)
    return SelfPlayEnv(game, {name: _bot(make) for name, make in BOTS.items()}, opponent, swap_seats)


def _bot(make: Callable[[np.random.Generator], Act]) -> Callable[[np.random.Generator], Bot]:
    """The bot itself is its action: so it sees every step of a repeated one, and more digits than are observed."""

    def player(rng: np.random.Generator) -> Bot:
        act = make(rng)
        return lambda _: act

    return player


class HockeyGame:
    """Hockey as a `TwoPlayerGame`: both are paid as in `HockeyEnv`. An action may also be a function that chooses it from
    what its player sees."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": FPS}

    def __init__(
        self, mode: str | Sequence[str], keep_mode: bool, discrete: bool, frame_skip: int, shaping: float,
        shaping_gamma: float, reward: str, render_mode: str | None,
    ) -> None:  # fmt: skip
        check_settings(frame_skip, shaping, shaping_gamma, reward)
        self.render_mode = checked_mode(render_mode)
        self._games = games_of(mode, keep_mode)
        self._game = self._games[0]
        self.observation_space, self.action_space = observation_space(self._game), action_space(self._game, discrete)
        self._discrete, self._frame_skip = discrete, frame_skip
        self._earned = game_reward if reward == "game" else outcome_reward
        self._shaping = [Shaping(shaping, shaping_gamma) for _ in (FIRST, SECOND)] if shaping else []
        self._painter = Painter()

    def reset(self, seed: int) -> Pair:
        rng = np.random.default_rng(seed)
        self._game = self._games[int(rng.integers(len(self._games)))]
        self._game.reset(rng, int(rng.integers(2)))
        for player, shaping in enumerate(self._shaping):
            shaping.begin(self._game.observe(player))
        self._show()
        return self._observed()

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        game, paid = self._game, [0.0, 0.0]
        acts = [self._act(FIRST, first), self._act(SECOND, second)]
        for _ in range(self._frame_skip):
            game.step(*(act() for act in acts))
            for i in (FIRST, SECOND):
                paid[i] += self._earned(game.info(i))
            self._show()
            if not game.playing:
                break
        scored = game.winner is not None
        for i, shaping in enumerate(self._shaping):
            paid[i] += shaping.step(game.observe(i), scored)
        return self._observed(), (paid[FIRST], paid[SECOND]), scored, game.out_of_time, game.info(FIRST)

    def _act(self, player: int, action: Any) -> Callable[[], Sequence[float]]:
        """What gives this player's action for one step of the game."""
        game = self._game
        if callable(action):
            act = cast(Act, action)
            return lambda: act(game.observe(player))[: game.actions]
        fixed = chosen(game, action, self._discrete)
        return lambda: fixed

    def render(self) -> Any:
        return self._painter.frame(self._game) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self._painter.close()

    def _show(self) -> None:
        if self.render_mode == "human":
            self._painter.show(self._game)

    def _observed(self) -> Pair:
        return tuple(np.array(self._game.observe(i), np.float32) for i in (FIRST, SECOND))  # type: ignore[return-value]
