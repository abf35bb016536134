"""Finding a game for two players by name, and opening tables to play it at."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from aiorl.envs.contract import CRASHES, crashed
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from aiorl.envs.twoplayer import Bot, TwoPlayerGame

    Bots = Mapping[str, Callable[[np.random.Generator], Bot]]

_HOCKEY = "aiorl.envs.hockey.parallel:HockeyParallelEnv"
TWINS = {"hockey": _HOCKEY, "aiorl/Hockey-v0": _HOCKEY, "aiorl.envs.hockey.selfplay:hockey": _HOCKEY}
"""An environment in which one player learns -> the same game for two."""


class Table(NamedTuple):
    """A game and what is known of it: `spaces` of one player, scripted players by name, frames a second."""

    name: str
    game: TwoPlayerGame
    spaces: Spaces
    bots: Bots
    fps: float


def find_game(env: str, kwargs: Mapping[str, Any]) -> Callable[[], Table]:
    """A function that opens a table for the game with these arguments.

    `env` is one of `TWINS`, or `module:callable` that makes a PettingZoo parallel environment with two agents, a
    `TwoPlayerGame` or a `SelfPlayEnv`; what is made may have `bots` and `metadata`. Raises ConfigError if it is not a game
    for two, EnvError for what making it raises.
    """
    spec = resolve_env(TWINS.get(env, env), kwargs, in_process=True)
    if spec.registration is not None:
        raise _not_for_two(env)
    module, _, attribute = str(spec.target).partition(":")
    target: Any = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)

    def make() -> Table:
        try:
            made = target(**kwargs)
        except ConfigError:
            raise
        except CRASHES as error:
            raise crashed(env, "making the game", error) from error
        game = _game(made, env)
        fps = float(getattr(made, "metadata", {}).get("render_fps") or 30.0)
        spaces = spaces_of(game.observation_space, game.action_space)
        return Table(env, game, spaces, getattr(made, "bots", {}), fps)

    return make


def _game(made: Any, env: str) -> TwoPlayerGame:
    import gymnasium

    from aiorl.envs.twoplayer import ParallelGame, SelfPlayEnv

    if isinstance(made, SelfPlayEnv):
        return made.game
    if hasattr(made, "possible_agents"):
        return ParallelGame(made)
    needed = ("observation_space", "action_space", "reset", "step", "close")
    if isinstance(made, gymnasium.Env) or not all(hasattr(made, name) for name in needed):
        raise _not_for_two(env)
    return made


def _not_for_two(env: str) -> ConfigError:
    return ConfigError(
        f"{env} is not a game for two players\n"
        '  --env hockey is one, or "module:callable" of a PettingZoo ParallelEnv with two agents'
    )
