"""Games for two as environments for one learner, whose opponent acts through it: `SelfPlayEnv`.

The learner's policy gives both players' actions and says, as a game begins, who the opponent is; the environment keeps that
in mind and shows it. So policies stay without memory, and a game that is replayed from its recorded actions has the same
opponent. `aiorl.algos.selfplay` is the algorithm for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from aiorl.errors import ConfigError, EnvError
from aiorl.league import BOTS, CODES, SELF, UNKNOWN, bot_code
from aiorl.segments import Array

Bot = Callable[[Any], Any]
"""Takes what its player observes, returns an action of the game."""

Pair = tuple[Any, Any]


class TwoPlayerGame(Protocol):
    """What two players play; both observe in these spaces, each from its own side, and act at the same time.

    A player whose turn it is not has its action ignored.
    """

    @property
    def observation_space(self) -> spaces.Space[Any]: ...
    @property
    def action_space(self) -> spaces.Space[Any]: ...

    def reset(self, seed: int) -> Pair:
        """Begin a game, all of whose chance comes from `seed`: what both players observe."""
        ...

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        """(what both observe, both rewards, terminated, truncated, info). At the end of a game `info["winner"]` is 1 if the
        first player has won, -1 if the second has, 0 for a tie."""
        ...

    def render(self) -> Any: ...
    def close(self) -> None: ...


class ParallelGame:
    """A PettingZoo parallel environment with two agents of the same spaces as a `TwoPlayerGame`.

    Who has won is what `infos[first agent]["winner"]` says; without it whoever has the higher sum of rewards. Raises
    ConfigError for others.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        agents: list[str] = list(env.possible_agents)
        if len(agents) != 2:
            raise ConfigError(f"self-play is for two: {type(env).__name__} has the agents {', '.join(agents) or 'none'}")
        for what in ("observation_space", "action_space"):
            first, second = (getattr(env, what)(agent) for agent in agents)
            if first != second:
                raise ConfigError(
                    f"self-play needs players with the same {what}\n  {agents[0]} has {first}, {agents[1]} has {second}"
                )
        self.observation_space, self.action_space = env.observation_space(agents[0]), env.action_space(agents[0])
        self._agents = agents
        self._lead = 0.0

    @property
    def render_mode(self) -> str | None:
        return getattr(self._env, "render_mode", None)

    def reset(self, seed: int) -> Pair:
        self._lead = 0.0
        return self._both(self._env.reset(seed=seed)[0], "observation")

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        obs, rewards, terminated, truncated, infos = self._env.step(dict(zip(self._agents, (first, second), strict=True)))
        paid = self._both(rewards, "reward")
        self._lead += paid[0] - paid[1]
        ended, cut = any(terminated.values()), any(truncated.values())
        info = infos.get(self._agents[0], {})
        if ended or cut:
            info = {"winner": int(np.sign(self._lead)), **info}
        return self._both(obs, "observation"), paid, ended, cut and not ended, info

    def _both(self, of: Mapping[str, Any], what: str) -> Pair:
        if missing := [agent for agent in self._agents if agent not in of]:
            raise EnvError(f"{type(self._env).__name__} returned no {what} for {missing[0]}\n  a game ends for both at once")
        return of[self._agents[0]], of[self._agents[1]]

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


class SelfPlayEnv(gymnasium.Env[Any, Any]):
    """A game for two as the learner sees it.

    Observes a Dict: `own`, what the learner's player sees; `other`, what the opponent's does; `opponent`, int64, its code
    (see `aiorl.league`), UNKNOWN until the first step; `outcome`, int8, in a game's last observation 1 if the learner has
    won and -1 if it has lost, else 0. An action is the learner's, the opponent's and the opponent's code, one behind the
    other and flat; the code counts in the first step of a game. With the code of a bot the environment asks that, and the
    opponent's action is not looked at. The game's `info` also tells the `opponent` and, in the end, the `outcome`.

    `bots` make players for one game by name, each with a generator of its own. `opponent`, a bot's name or "self", goes
    before any code. With `swap_seats` each game draws which of the two players the learner is. Raises ConfigError.
    """

    def __init__(
        self, game: TwoPlayerGame, bots: Mapping[str, Callable[[np.random.Generator], Bot]] | None = None,
        opponent: str | None = None, swap_seats: bool = True,
    ) -> None:  # fmt: skip
        self.game, self.bots, self._swap_seats = game, dict(bots or {}), swap_seats
        self._bots = {bot_code(name): make for name, make in (bots or {}).items()}
        self._names = {bot_code(name): name for name in bots or {}} | {SELF: "self"}
        if len(self._bots) < len(bots or {}):
            raise ConfigError(f"two of the bots {', '.join(bots or {})} have the same code\n  rename one")
        if opponent is not None and opponent not in self._names.values():
            raise ConfigError(f"there is no opponent {opponent!r}\n  there are: {', '.join(self._names.values())}")
        self._fixed = next((code for code, name in self._names.items() if name == opponent), UNKNOWN)
        self.observation_space = spaces.Dict({
            "own": game.observation_space, "other": game.observation_space,
            "opponent": spaces.Box(UNKNOWN, CODES - 1, (), np.int64), "outcome": spaces.Box(-1, 1, (), np.int8),
        })  # fmt: skip
        self.action_space, self._size = _joint(game.action_space)
        self._seat, self._code, self._bot = 0, UNKNOWN, None
        self._views: Pair = (None, None)

    @property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        return getattr(self.game, "metadata", {"render_modes": []})

    @property
    def render_mode(self) -> str | None:  # type: ignore[override]
        return getattr(self.game, "render_mode", None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        seat, self._bot_seed, game_seed = (int(x) for x in self.np_random.integers(2**31, size=3))
        self._seat = seat % 2 if self._swap_seats else 0
        self._views = self.game.reset(game_seed)
        self._meet(self._fixed)
        return self._observed(0), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        flat, n = np.asarray(action).reshape(-1), self._size
        if self._code == UNKNOWN:
            self._meet(int(flat[2 * n]))
        space = self.game.action_space
        own = taken(space, flat[:n])
        other = taken(space, flat[n : 2 * n]) if self._bot is None else self._bot(self._views[1 - self._seat])
        pair = (other, own) if self._seat else (own, other)
        self._views, rewards, terminated, truncated, info = self.game.step(*pair)
        outcome, told = 0, {**info, "opponent": self._names.get(self._code, f"snapshot {self._code}")}
        if terminated or truncated:
            outcome = told["outcome"] = -int(info["winner"]) if self._seat else int(info["winner"])
        return self._observed(outcome), rewards[self._seat], terminated, truncated, told

    def render(self) -> Any:
        return self.game.render()

    def close(self) -> None:
        self.game.close()

    def _meet(self, code: int) -> None:
        """From now on the opponent has this code."""
        if code >= BOTS and code not in self._bots:
            known = ", ".join(name for known, name in self._names.items() if known != SELF) or "none"
            raise EnvError(
                f"the learner asked for a bot that this game does not have\n  name these in selfplay.bots: {known}"
            )
        self._code = code
        make = self._bots.get(code)
        self._bot = None if make is None else make(np.random.default_rng(self._bot_seed))

    def _observed(self, outcome: int) -> dict[str, Any]:
        own, other = self._views if self._seat == 0 else self._views[::-1]
        return {"own": own, "other": other, "opponent": np.array(self._code), "outcome": np.array(outcome, np.int8)}


def taken(space: spaces.Space[Any], action: Array) -> Any:
    """A player's action as a game of that action space takes it. `action` is flat, a discrete one counts from 0."""
    flat = action.reshape(-1)
    if isinstance(space, spaces.Discrete):
        return int(flat[0]) + int(space.start)
    shaped = flat.reshape(space.shape).astype(space.dtype)
    if isinstance(space, spaces.Box) and space.dtype == np.float64:  # its bounds need not be among float32's numbers
        np.clip(shaped, space.low, space.high, out=shaped)
    return shaped


def _joint(space: spaces.Space[Any]) -> tuple[spaces.Space[Any], int]:
    """The space of (own action, opponent's action, code), and the numbers in one player's action."""
    if isinstance(space, spaces.Box) and space.dtype is not None and space.dtype.kind == "f":
        low, high = (np.tile(bound.reshape(-1), 2) for bound in (space.low, space.high))
        joint = spaces.Box(
            np.append(low, 0).astype(np.float32), np.append(high, CODES - 1).astype(np.float32), dtype=np.float32
        )
        return joint, space.low.size
    if isinstance(space, spaces.Discrete):
        return spaces.MultiDiscrete([int(space.n), int(space.n), CODES]), 1
    if isinstance(space, spaces.MultiDiscrete) and not space.start.any():
        nvec = space.nvec.reshape(-1)
        return spaces.MultiDiscrete([*nvec, *nvec, CODES]), nvec.size
    raise ConfigError(
        f"self-play does not do with the action space {space}\n  supported: Box of floats, Discrete, MultiDiscrete from 0"
    )
