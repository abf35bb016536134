"""Small games for two, with bots, as environments for self-play."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

from aiorl.envs.twoplayer import Bot, Pair, ParallelGame, SelfPlayEnv


class Matching:
    """Rock, paper, scissors, `rounds` of them: each pays 1 to who beats the other, and who is ahead in the end has won."""

    observation_space = spaces.Box(-1, 1, (7,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def reset(self, seed: int) -> Pair:
        self._round, self._lead, self._last = 0, 0, [-1, -1]
        return self._observed()

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        gain = (0, 1, -1)[(first - second) % 3]
        self._round, self._lead, self._last = self._round + 1, self._lead + gain, [first, second]
        ended = self._round == self._rounds
        info = {"winner": int(np.sign(self._lead))} if ended else {}
        return self._observed(), (float(gain), float(-gain)), ended, False, info

    def _observed(self) -> Pair:
        return self._seen(0), self._seen(1)

    def _seen(self, player: int) -> Any:
        row = np.zeros(7, np.float32)
        row[0] = 1
        for who, at in ((player, 1), (1 - player, 4)):
            if self._last[who] >= 0:
                row[at + self._last[who]] = 1
        return row

    def render(self) -> None: ...
    def close(self) -> None: ...


class Race:
    """Who is first at the end of a line of its own? Steps are of any length up to 1, but chance makes them shorter.

    Also as a PettingZoo environment, whose winner shows in the rewards alone.
    """

    observation_space = spaces.Box(-50, 50, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, goal: float = 4.0, limit: int = 20) -> None:
        self._goal, self._limit = goal, limit

    def reset(self, seed: int) -> Pair:
        self._rng = np.random.default_rng(seed)
        self._at, self._steps = self._rng.uniform(-1, 1, 2), 0
        return self._observed()

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        moves = np.array([float(first[0]), float(second[0])]) * self._rng.uniform(0.5, 1, 2)
        self._at, self._steps = self._at + moves, self._steps + 1
        ahead = int(np.sign(self._at[0] - self._at[1]))
        won = bool((self._at >= self._goal).any())
        pay = 5.0 * ahead if won else 0.0
        cut = not won and self._steps == self._limit
        rewards = (0.1 * float(moves[0]) + pay, 0.1 * float(moves[1]) - pay)
        return self._observed(), rewards, won, cut, {"winner": ahead if won else 0}

    def _observed(self) -> Pair:
        return self._at.astype(np.float32), self._at[::-1].astype(np.float32)

    def render(self) -> None: ...
    def close(self) -> None: ...


class ParallelRace(ParallelEnv[str, Any, Any]):
    metadata = {"name": "race"}

    def __init__(self) -> None:
        self._race = Race()
        self.possible_agents = ["red", "blue"]
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> Any:
        return self._race.observation_space

    def action_space(self, agent: str) -> Any:
        return self._race.action_space

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents = list(self.possible_agents)
        return self._named(self._race.reset(seed or 0)), {agent: {} for agent in self.agents}

    def step(self, actions: Any) -> Any:
        obs, rewards, ended, cut, _ = self._race.step(*(actions[agent] for agent in self.possible_agents))
        if ended or cut:
            self.agents = []
        flags = (dict.fromkeys(self.possible_agents, flag) for flag in (ended, cut))
        return self._named(obs), self._named(rewards), *flags, {agent: {} for agent in self.possible_agents}

    def _named(self, pair: Any) -> dict[str, Any]:
        return dict(zip(self.possible_agents, pair, strict=True))


def _always(action: Any) -> Any:
    def make(rng: np.random.Generator) -> Bot:
        return lambda _: action

    return make


def _anything(rng: np.random.Generator) -> Bot:
    return lambda _: int(rng.integers(3))


def _stroller(rng: np.random.Generator) -> Bot:
    return lambda _: np.array([rng.uniform(-0.5, 1)], np.float32)


def matching(opponent: str | None = None, rounds: int = 3, swap_seats: bool = True) -> SelfPlayEnv:
    return SelfPlayEnv(Matching(rounds), {"rock": _always(0), "anything": _anything}, opponent, swap_seats)


def race(opponent: str | None = None, swap_seats: bool = True) -> SelfPlayEnv:
    return SelfPlayEnv(Race(), {"stroller": _stroller, "still": _always(np.zeros(1, np.float32))}, opponent, swap_seats)


def parallel_race(opponent: str | None = None) -> SelfPlayEnv:
    return SelfPlayEnv(ParallelGame(ParallelRace()), {"stroller": _stroller}, opponent, swap_seats=False)


class Strict(Matching):
    """Takes what is in its action space, nothing else; whoever has chosen the greater numbers in sum has won."""

    SPACES: ClassVar[dict[str, spaces.Space[Any]]] = {
        "discrete": spaces.Discrete(3, start=2), "box": spaces.Box(-0.3, 0.1, (2, 1), np.float64),
        "many": spaces.MultiDiscrete([[2, 3], [2, 2]], dtype=np.int32),
    }  # fmt: skip

    def __init__(self, kind: str) -> None:
        super().__init__(rounds=4)
        self.action_space = self.SPACES[kind]

    def step(self, first: Any, second: Any) -> tuple[Pair, tuple[float, float], bool, bool, Mapping[str, Any]]:
        assert self.action_space.contains(first), f"{first!r} is not in {self.action_space}"
        assert self.action_space.contains(second), f"{second!r} is not in {self.action_space}"
        ahead = int(np.sign(np.sum(first) - np.sum(second)))
        obs, _, *end = super().step(0, 0)
        return obs, (float(ahead), float(-ahead)), end[0], end[1], {"winner": ahead}


def strict(kind: str) -> SelfPlayEnv:
    return SelfPlayEnv(Strict(kind))
