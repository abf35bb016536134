"""The opponents of a learner that plays against others: who they are, how it does against each, whom it meets next.

Everybody has a *code*, a number that fits into an observation and an action. SELF is the learner as it is now. A bot's code
is made from its name, so that environment and learner agree without a list. Snapshots, earlier versions of the learner,
count from 1 and never share a number, however often their places change hands.

All of this is a deterministic function of the games and weights it was given, in their order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from aiorl.errors import InvariantError, TrainingError
from aiorl.events import LOSS_RATE, WIN_RATE, Opponent
from aiorl.segments import Array
from aiorl.trees import check_tree

LEARNER, ITSELF = "learner", "self"  # as a player, and as an opponent
UNKNOWN = -1  # nobody has been met yet
SELF = 0
BOTS = 2**23  # the first code of a bot; all codes are below 2**24, so float32 holds them exactly
CODES = 2**24

Matchmaking = Literal["uniform", "hard", "even"]
Replaced = Literal["oldest", "easiest"]

WIN, TIE, LOSS = 0, 1, 2
ELO_STEP, ELO_SCALE = 16.0, 400.0
_PRIOR = np.array([1.0, 0.0, 1.0])  # a game won and one lost, so that nobody is given up for good after a few games


def bot_code(name: str) -> int:
    """The code of the bot `name`."""
    return BOTS + zlib.crc32(name.encode()) % BOTS


class Rules(Protocol):
    """What has to be settled about a league; `aiorl.algos.selfplay.SelfPlay` says what each means."""

    @property
    def pool(self) -> int: ...
    @property
    def matchmaking(self) -> Matchmaking: ...
    @property
    def replaced(self) -> Replaced: ...
    @property
    def bots(self) -> Mapping[str, float]: ...
    @property
    def self_share(self) -> float: ...
    @property
    def admit_every(self) -> int: ...
    @property
    def admit_win_rate(self) -> float: ...
    @property
    def admit_games(self) -> int: ...
    @property
    def memory(self) -> int: ...


class Game(NamedTuple):
    """A finished game: the opponent's code, and the learner's outcome, 1 won, 0 tied, -1 lost."""

    code: int
    outcome: int


class League:
    """Opponents stand in *columns*: the learner itself, the bots, then the places of snapshots, one more than `pool`.

    Once more than `pool` snapshots are in, one is *retired*: from that version on nobody is matched with it. Its place
    is given away only when no game against it can be under way or begin any more: each environment has delivered a segment
    that was acted with that version or a later one (versions never go back within an environment), and its last observation
    does not show it. Until a place is free no other is admitted. So `snapshots` hold everybody whom a game may need, in
    arrays that never grow.
    """

    def __init__(
        self, rules: Rules, weights: Mapping[str, Array], envs: int, frozen: Sequence[Mapping[str, Array]] = ()
    ) -> None:
        """`weights` are the learner's at the beginning, the first snapshot; `frozen` opponents are never replaced."""
        self._rules, self._frozen = rules, len(frozen)
        places, columns = rules.pool + 1, 2 + len(rules.bots) + rules.pool
        self._first = columns - places  # column of the first place
        self._bots = np.array([bot_code(name) for name in rules.bots], np.int64)
        self.snapshots = {name: np.zeros((places, *a.shape), a.dtype) for name, a in weights.items()}
        self.ids = np.zeros(places, np.int64)  # 0: empty
        self.versions = np.full(places, -1)  # -1: from a file
        self._retired = np.full(places, -1)  # the version from which nobody is matched with it
        self.table = np.zeros((1 + places, columns, 3))
        self.elo = np.zeros(columns)
        self._since = np.zeros(3)  # games against snapshots since the last admission
        self._updates = self.admitted = self.games = 0
        self._acted = np.full(envs, -1)  # the version behind each environment's last segment
        self._playing = np.full(envs, UNKNOWN)  # whom its last observation shows
        for opponent in frozen:
            self._enter(opponent, -1)
        if rules.pool > len(frozen):
            self._enter(weights, 0)

    # -- whom to meet ----------------------------------------------------------------------------------------------

    @property
    def codes(self) -> Array:
        """Who stands in each column, int64 [columns]; UNKNOWN for an empty place."""
        return np.concatenate([[SELF], self._bots, np.where(self.ids > 0, self.ids, UNKNOWN)])

    @property
    def active(self) -> Array:
        """[places] bool: snapshots that games are begun against."""
        return (self.ids > 0) & (self._retired < 0)

    @property
    def scores(self) -> Array:
        """[columns] the learner's expected points against each, a tie counting half."""
        counts = self.table[0] + _PRIOR
        return (counts[:, WIN] + counts[:, TIE] / 2) / counts.sum(1)

    def odds(self) -> Array:
        """[columns] float64: how probable it is to meet each. Without snapshots the learner meets itself instead."""
        odds = np.zeros(len(self.elo))
        shares = list(self._rules.bots.values())
        odds[1 : self._first] = shares
        odds[0] = self._rules.self_share
        rest = max(0.0, 1.0 - self._rules.self_share - sum(shares))
        active = self.active
        if not active.any():
            odds[0] += rest
            return odds
        p = self.scores[self._first :]
        interest = {"uniform": np.ones_like(p), "hard": (1 - p) ** 2, "even": p * (1 - p)}[self._rules.matchmaking]
        interest = interest * active
        odds[self._first :] = rest * interest / interest.sum()
        return odds

    # -- what came of it -------------------------------------------------------------------------------------------

    def record(self, games: Sequence[Game]) -> None:
        """Enter finished games, in their order. Raises TrainingError for a bot that is not of the league."""
        column_of = {code: column for column, code in enumerate(self.codes.tolist()) if code != UNKNOWN}
        fade = 1 - 1 / self._rules.memory
        for code, outcome in games:
            column = column_of.get(code)
            if column is None:
                raise _stranger(code, list(self._rules.bots))
            result = (LOSS, TIE, WIN)[outcome + 1]
            self.games += 1
            self.table[0, column] *= fade
            self.table[0, column, result] += 1
            if column >= self._first:
                self._since[result] += 1
            if column:
                self._rate(column, (outcome + 1) / 2)

    def _rate(self, column: int, points: float) -> None:
        expected = 1 / (1 + 10 ** ((self.elo[column] - self.elo[0]) / ELO_SCALE))
        self.elo[0] += ELO_STEP * (points - expected)
        self.elo[column] -= ELO_STEP * (points - expected)

    def watch(self, version: int, envs: Array, playing: Array) -> None:
        """Environments `envs` [B] have delivered segments acted with `version` or later; their last observations show the
        opponents `playing` [B], UNKNOWN between games."""
        self._acted[envs], self._playing[envs] = version, playing
        for place in np.flatnonzero(self._retired >= 0).tolist():
            if (self._acted >= self._retired[place]).all() and self.ids[place] not in self._playing:
                self._empty(place)

    # -- who belongs to it -----------------------------------------------------------------------------------------

    def advance(self, version: int, weights: Mapping[str, Array]) -> bool:
        """An update has made `version` with these weights: admit them if it is time. Returns whether they were."""
        self._updates += 1
        if not self._due() or self._rules.pool <= self._frozen or self.ids.all():
            return False
        self._enter(weights, version)
        self._updates = 0
        self._since[:] = 0
        if self.active.sum() > self._rules.pool:
            self._retired[self._least_useful()] = version
        return True

    def _due(self) -> bool:
        rules, played = self._rules, self._since.sum()
        if self._updates < rules.admit_every:
            return False
        if not rules.admit_win_rate:
            return True
        points = self._since[WIN] + self._since[TIE] / 2
        return played >= max(1, rules.admit_games) and points >= rules.admit_win_rate * played

    def _least_useful(self) -> int:
        """The place of the snapshot to retire: not the newest, nor one from a file."""
        choice = np.flatnonzero(self.active & (self.versions >= 0) & (self.ids < self.ids.max()))
        if self._rules.replaced == "oldest":
            return int(choice[self.ids[choice].argmin()])
        order = np.lexsort((self.ids[choice], -self.scores[self._first + choice]))
        return int(choice[order[0]])

    def _enter(self, weights: Mapping[str, Array], version: int) -> None:
        """A new snapshot: rated as the learner is, and with its results so far."""
        place = int(np.flatnonzero(self.ids == 0)[0])
        for name, rows in self.snapshots.items():
            rows[place] = weights[name]
        self.admitted += 1
        if self.admitted >= BOTS:
            raise InvariantError(f"the league has admitted {self.admitted} snapshots; there are numbers for {BOTS - 1}")
        self.ids[place], self.versions[place], self._retired[place] = self.admitted, version, -1
        self.table[1 + place] = self.table[0]
        self.table[:, self._first + place] = 0
        self.elo[self._first + place] = self.elo[0]

    def _empty(self, place: int) -> None:
        self.ids[place], self.versions[place], self._retired[place] = 0, -1, -1
        self.table[1 + place] = 0
        self.table[:, self._first + place] = 0
        self.elo[self._first + place] = 0
        for rows in self.snapshots.values():
            rows[place] = 0

    # -- telling ---------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Win and loss rates against each bot and against all snapshots that have been met, Elo, size."""
        found = {"elo": float(self.elo[0]), "games": float(self.games), "pool_size": float(self.active.sum())}
        found["pool_admitted"] = float(self.admitted)
        counts = {name: self.table[0, 1 + i] for i, name in enumerate(self._rules.bots)}
        counts["pool"] = self.table[0, self._first :][self.active].sum(0)
        for name, (wins, ties, losses) in counts.items():
            if played := wins + ties + losses:
                found |= {WIN_RATE + name: float(wins / played), LOSS_RATE + name: float(losses / played)}
        return found

    def weights(self) -> dict[str, Array]:
        """What a policy needs, and what `standings` reads: fixed names and shapes, prefixed `league.`"""
        told = {
            "codes": self.codes, "odds": self.odds(), "versions": self.versions, "table": self.table, "elo": self.elo,
        }  # fmt: skip
        return {f"league.{name}": array for name, array in told.items()} | {
            f"league.snapshots.{name}": rows for name, rows in self.snapshots.items()
        }

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "snapshots": {name: rows.copy() for name, rows in self.snapshots.items()},
            **{name: array.copy() for name, array in self._arrays().items()},
            "updates": self._updates, "admitted": self.admitted, "games": self.games,
        }  # fmt: skip

    def _arrays(self) -> dict[str, Array]:
        return {
            "ids": self.ids, "versions": self.versions, "retired": self._retired, "table": self.table, "elo": self.elo,
            "since": self._since, "acted": self._acted, "playing": self._playing,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], path: str = "league") -> None:
        """Raises ValueError naming the first mismatch."""
        check_tree(state, self.state_dict(), path)
        for name, rows in self.snapshots.items():
            rows[...] = state["snapshots"][name]
        for name, array in self._arrays().items():
            array[...] = state[name]
        self._updates, self.admitted, self.games = state["updates"], state["admitted"], state["games"]


def _stranger(code: int, bots: list[str]) -> Exception:
    if code < BOTS:
        return InvariantError(f"a game against snapshot {code} has ended, which is not in the pool")
    known = ", ".join(bots) or "none"
    return TrainingError(
        f"a game was played against a bot that selfplay.bots does not name; it has: {known}\n"
        "  name all that the environment may play; a share of 0 will do"
    )


def standings(weights: Mapping[str, Array], bots: Sequence[str]) -> dict[str, Any]:
    """Plain data for JSON from a policy's weights: players, snapshots by age, ratings, versions, how each player did against
    each opponent.

    A snapshot's row is the learner's at its admission. `wins`, `ties` and `losses` are [players, opponents] counts in which
    old games fade.
    """
    codes, table = weights["league.codes"], weights["league.table"]
    first = 1 + len(bots)
    snapshots = codes[first:].tolist()  # places are given anew, codes rise
    places = sorted((place for place, code in enumerate(snapshots) if code != UNKNOWN), key=snapshots.__getitem__)
    names = {place: f"snapshot {codes[first + place]}" for place in places}
    columns = [*range(first), *(first + place for place in places)]
    rows = table[[0, *(1 + place for place in places)]][:, columns].round(3)
    opponents = [ITSELF, *bots, *names.values()]
    return {
        "players": [LEARNER, *names.values()],
        "opponents": opponents,
        "versions": {name: int(weights["league.versions"][place]) for place, name in names.items()},
        "elo": dict(zip(opponents, weights["league.elo"][columns].round(1).tolist(), strict=True)),
        **{name: rows[:, :, i].tolist() for i, name in enumerate(("wins", "ties", "losses"))},
    }


def opponents(table: Mapping[str, Any]) -> tuple[Opponent, ...]:
    """The learner's row of `standings`."""
    rows = zip(table["opponents"], *(table[name][0] for name in ("wins", "ties", "losses")), strict=True)
    return tuple(_opponent(table, *row) for row in rows)


def _opponent(table: Mapping[str, Any], name: str, wins: float, ties: float, losses: float) -> Opponent:
    games, version = wins + ties + losses, table["versions"].get(name, -1)
    won, lost = (wins / games, losses / games) if games else (None, None)
    elo = table["elo"][name]
    return Opponent(name=name, games=games, wins=won, losses=lost, elo=elo, version=version if version >= 0 else None)
