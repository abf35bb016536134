"""Matches between two players: scripts and trained policies on either seat of a game, many games side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aiorl.algos.base import RecurrentPolicy
from aiorl.algos.selfplay import SelfPlay, inner_spaces, inner_weights
from aiorl.envs.contract import CRASHES, crashed
from aiorl.errors import EnvError
from aiorl.policy import LoadedPolicy
from aiorl.segments import Array
from aiorl.tournament import Fixture, Played, fixtures

if TYPE_CHECKING:
    from aiorl.envs.twoplayer import Bot, TwoPlayerGame

WIDTH = 20
"""Games of a match that are played side by side, if there are as many."""


class Player(Protocol):
    """Plays the games of a match, one to a slot; it never sits on both seats of one."""

    def begin(self, slots: int) -> None:
        """A match begins."""
        ...

    def reset(self, slot: int, rng: np.random.Generator) -> None:
        """A game begins; `rng` is the player's only source of chance in it."""
        ...

    def act(self, obs: Mapping[int, Any]) -> Mapping[int, Any]:
        """Actions for the slots with a game that goes on, given what the player observes in them."""
        ...


class Scripted:
    """A new bot for each game."""

    def __init__(self, make: Callable[[np.random.Generator], Bot]) -> None:
        self._make = make

    def begin(self, slots: int) -> None:
        self._bots: dict[int, Bot] = {}

    def reset(self, slot: int, rng: np.random.Generator) -> None:
        self._bots[slot] = self._make(rng)

    def act(self, obs: Mapping[int, Any]) -> dict[int, Any]:
        return {slot: self._bots[slot](seen) for slot, seen in obs.items()}


def one_player(policy: LoadedPolicy) -> LoadedPolicy:
    """A policy of self-play as one of the game's own spaces, without its opponents; any other as it is."""
    algorithm = policy.algorithm
    if not isinstance(algorithm, SelfPlay):
        return policy
    weights = inner_weights(policy.weights)
    return LoadedPolicy(
        algorithm.algorithm, inner_spaces(policy.spaces), weights, policy.version, policy.config, policy.notes
    )


class Trained:
    """A policy, deterministic, that acts for all slots at once. `repeat`: an action is kept for so many steps. `taken` makes
    of an action what the game takes, if that is something else.

    The batch always has a row for each slot, so that an action does not depend on which games are still going on.
    """

    def __init__(
        self, policy: LoadedPolicy, repeat: int = 1, taken: Callable[[Array], Any] | None = None
    ) -> None:
        self._loaded, self._spaces, self._repeat, self._taken = policy, policy.spaces, repeat, taken

    def begin(self, slots: int) -> None:
        self._policy = self._loaded.algorithm.policy(self._spaces)
        self._policy.begin(self._loaded.weights, 0, None, 0)
        self._seen = {name: np.zeros((slots, *c.shape), c.dtype) for name, c in self._spaces.obs_columns.items()}
        self._first = np.ones(slots, np.bool_)
        self._steps = np.zeros(slots, np.int64)
        self._chosen: dict[int, Any] = {}

    def reset(self, slot: int, rng: np.random.Generator) -> None:
        self._first[slot], self._steps[slot] = True, 0

    def act(self, obs: Mapping[int, Any]) -> dict[int, Any]:
        due = [slot for slot in obs if self._steps[slot] % self._repeat == 0]
        if due:
            self._choose({slot: obs[slot] for slot in due}, [slot for slot in obs if slot not in due])
        for slot in obs:
            self._steps[slot] += 1
        return {slot: self._chosen[slot] for slot in obs}

    def _choose(self, obs: Mapping[int, Any], others: list[int]) -> None:
        self._seen = {name: leaf.copy() for name, leaf in self._seen.items()}  # the policy may keep what it was shown
        for slot, seen in obs.items():
            for name, leaf in self._spaces.flatten_obs(seen).items():
                self._seen[name][slot] = leaf
        actions = self._spaces.env_actions(self._act(others))
        for slot in obs:
            self._chosen[slot] = self._taken(actions[slot]) if self._taken is not None else actions[slot]
            self._first[slot] = False

    def _act(self, others: list[int]) -> Array:
        """`others` keep their action: they have nothing new to show, what is remembered of their games must not move on."""
        policy = self._policy
        if not others or not isinstance(policy, RecurrentPolicy):
            return policy.act(self._seen, self._first)[0]
        kept = {name: leaf[others] for name, leaf in policy.state().items()}
        actions, _ = policy.act(self._seen, self._first)
        state = {name: leaf.copy() for name, leaf in policy.state().items()}
        for name, leaf in kept.items():
            state[name][others] = leaf
        policy.restore(state)
        policy.begin(self._loaded.weights, 0, None, 0)
        return actions


class _Slot:
    """A game and the fixtures it still has to play."""

    def __init__(self, game: TwoPlayerGame, left: list[tuple[int, Fixture]]) -> None:
        self.game, self.left = game, left
        self.obs: tuple[Any, Any] = (None, None)
        self.returns = [0.0, 0.0]  # by side
        self.length = 0

    def reset(self) -> Fixture:
        fixture = self.left[0][1]
        try:
            self.obs = self.game.reset(fixture.seed)
        except CRASHES as error:
            raise crashed("the game", "reset", error) from error
        self.returns, self.length = [0.0, 0.0], 0
        return fixture

    def step(self, actions: tuple[Any, Any]) -> int | None:
        """A step with the actions of side 0 and side 1; None, or the outcome for side 0 if the game has ended."""
        seats = self.left[0][1].seats
        try:
            self.obs, rewards, terminated, truncated, info = self.game.step(actions[seats[0]], actions[seats[1]])
        except CRASHES as error:
            raise crashed("the game", "step", error) from error
        if not np.isfinite(rewards).all():
            raise EnvError(f"the rewards of a step were {rewards[0]} and {rewards[1]}, expected finite ones")
        self.length += 1
        for seat, side in enumerate(seats):
            self.returns[side] += float(rewards[seat])
        if not (terminated or truncated):
            return None
        return int(np.sign(info["winner"])) * (1 if seats[0] == 0 else -1)

    def seen_by(self, side: int) -> Any:
        return self.obs[self.left[0][1].seats.index(side)]


def play_match(
    games: Sequence[TwoPlayerGame],
    sides: tuple[Player, Player],
    count: int,
    seed: int,
    *,
    on_end: Callable[[int, Played], None] | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> list[Played]:
    """Play the `fixtures(count, seed)` between two players, in order of the fixtures.

    Game i is played at `games[i % len(games)]`, so that the result is a function of players, `count`, `seed` and the number
    of games side by side. `on_end(i, …)` follows the end of game i; `on_frame(i)` each reset and step of it at `games[0]`,
    after `on_end` where it has ended. Raises EnvError.
    """
    schedule = list(enumerate(fixtures(count, seed)))
    slots = [_Slot(game, schedule[i :: len(games)]) for i, game in enumerate(games)]
    played: dict[int, Played] = {}

    def begin(i: int) -> None:
        fixture = slots[i].reset()
        for side, player in enumerate(sides):
            player.reset(i, np.random.default_rng((fixture.seed, side)))
        if on_frame is not None and i == 0:
            on_frame(slots[0].left[0][0])

    for player in sides:
        player.begin(len(slots))
    active = [i for i, slot in enumerate(slots) if slot.left]
    for i in active:
        begin(i)
    while active:
        actions = [player.act({i: slots[i].seen_by(side) for i in active}) for side, player in enumerate(sides)]
        for i in active:
            slot = slots[i]
            index = slot.left[0][0]
            outcome = slot.step((actions[0][i], actions[1][i]))
            if outcome is not None:
                played[index] = Played(outcome, (slot.returns[0], slot.returns[1]), slot.length)
                if on_end is not None:
                    on_end(index, played[index])
            if on_frame is not None and i == 0:
                on_frame(index)
            if outcome is not None:
                slot.left.pop(0)
                if slot.left:
                    begin(i)
        active = [i for i in active if slots[i].left]
    return [played[i] for i in range(count)]
