"""Hockey for two players who act at the same time, as a PettingZoo environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from pettingzoo import ParallelEnv

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.bots import BOTS, Act
from aiorl.envs.hockey.env import action_space, begin, chosen, drawn, games_of, observation_space, observed
from aiorl.envs.hockey.game import reward
from aiorl.envs.hockey.render import Painter, checked_mode

PLAYERS = ("player_1", "player_2")

Array = np.ndarray[Any, Any]


class HockeyParallelEnv(ParallelEnv[str, Array, Any]):
    """Both players see and act in their own frame, so one policy plays either side; arguments and options as HockeyEnv's."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": rules.FPS, "name": "aiorl_hockey_v0"}

    def __init__(
        self, mode: str | Sequence[str] = "NORMAL", keep_mode: bool = True, discrete: bool = False,
        render_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.render_mode = checked_mode(render_mode)
        self._games = games_of(mode, keep_mode)
        self.game = self._games[0]
        self.possible_agents = list(PLAYERS)
        self.agents: list[str] = []
        self.observation_spaces = {player: observation_space(self.game) for player in PLAYERS}
        self.action_spaces = {player: action_space(self.game, discrete) for player in PLAYERS}
        self._discrete = discrete
        self._rng: np.random.Generator | None = None
        self._painter = Painter()

    @property
    def bots(self) -> dict[str, Callable[[np.random.Generator], Act]]:
        """Scripted players by name, made for one game each. They act as players of this environment do, where it is discrete
        with as many numbers as without, which `step` takes, too."""
        return {name: lambda rng, make=make: self._fitted(make(rng)) for name, make in BOTS.items()}

    def _fitted(self, act: Act) -> Act:
        return act if self.game.keep_mode else lambda obs: act(obs)[:3]

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, dict[str, Any]]]:
        if seed is not None or self._rng is None:
            self._rng, _ = seeding.np_random(seed)
        self.game = drawn(self._games, self._rng)
        begin(self.game, self._rng, seed, options)
        self.agents = list(PLAYERS)
        self._show()
        return self._observed(), self._infos()

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        game = self.game
        both = (actions[player] for player in PLAYERS)
        game.step(*(chosen(game, action, self._discrete and np.size(action) == 1) for action in both))
        infos = self._infos()
        terminated, truncated = game.winner is not None, game.out_of_time
        if terminated or truncated:
            self.agents = []
        self._show()
        return (
            self._observed(),
            {player: reward(infos[player]) for player in PLAYERS},
            dict.fromkeys(PLAYERS, terminated),
            dict.fromkeys(PLAYERS, truncated),
            infos,
        )

    def render(self) -> Array | None:
        """uint8 [480, 600, 3] in render mode "rgb_array"; the window of "human" draws itself."""
        return self._painter.frame(self.game) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self._painter.close()

    def _observed(self) -> dict[str, Array]:
        return {player: observed(self.game, i) for i, player in enumerate(PLAYERS)}

    def _infos(self) -> dict[str, dict[str, Any]]:
        return {player: self.game.info(i) for i, player in enumerate(PLAYERS)}

    def _show(self) -> None:
        if self.render_mode == "human":
            self._painter.show(self.game)
