"""Who plays whom, what came of it, and how sure that is: the arithmetic of a tournament. No games are played here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, count
from statistics import NormalDist, fmean
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aiorl.seeding import MATCH, env_seed

ELO_MEAN, ELO_DOUBLE = 1000.0, 400 / math.log(10)
Interval = tuple[float, float]


class Fixture(msgspec.Struct, frozen=True):
    """One game of a match between side 0 and side 1: `seats[s]` is the side on seat s, `seed` resets the game.

    `pair` is the same for the two games that differ only in who sits where.
    """

    pair: int
    seats: tuple[int, int]
    seed: int


class Played(msgspec.Struct, frozen=True):
    """A finished game, by side: `outcome` is 1 if side 0 won, -1 if side 1 did, 0 for a tie."""

    outcome: Annotated[int, Meta(ge=-1, le=1)]
    returns: tuple[float, float]
    length: int


def fixtures(games: int, seed: int) -> list[Fixture]:
    """The games of a match: each seed is played on both seats, so neither side gains by where it sits or who begins.

    Of an odd number the last seed is played once. The seeds do not depend on who plays.
    """
    return [Fixture(g // 2, (0, 1) if g % 2 == 0 else (1, 0), env_seed(seed, MATCH, g // 2)) for g in range(games)]


def pairs(players: int) -> list[tuple[int, int]]:
    """Everybody against everybody else, once."""
    return list(combinations(range(players), 2))


def wilson(part: float, whole: float, confidence: float = 0.95) -> Interval:
    """The interval of the share behind `part` of `whole` independent trials (Wilson's score interval).

    Unlike the mean plus or minus so many standard errors it stays within [0, 1] and has a width at 0 and at 1. Two games
    of one seed depend on each other; where the seed favours a seat the interval is then wider than it need be.
    """
    if not 0 <= part <= whole or not 0 < confidence < 1:
        raise ValueError(f"expected 0 <= part <= whole and 0 < confidence < 1, got {part} of {whole}, {confidence}")
    if not whole:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = part / whole, z * z / whole
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / whole + spread / (4 * whole)) / (1 + spread)
    # At the ends of the range the bound is the end, which rounding may miss.
    return 0.0 if part == 0 else max(0.0, centre - half), 1.0 if part == whole else min(1.0, centre + half)


class Score(msgspec.Struct, frozen=True):
    """How one side did against another; means are NaN without a game. Counts are whole, unless old games fade."""

    wins: float
    ties: float
    losses: float
    mean_return: float
    mean_length: float

    @property
    def games(self) -> float:
        return self.wins + self.ties + self.losses

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of games won, tied and lost; NaN without a game."""
        return tuple(n / self.games if self.games else math.nan for n in (self.wins, self.ties, self.losses))  # type: ignore[return-value]

    @property
    def intervals(self) -> tuple[Interval, Interval, Interval]:
        """Of the same shares, 95 %."""
        return tuple(wilson(n, self.games) for n in (self.wins, self.ties, self.losses))  # type: ignore[return-value]

    @property
    def points(self) -> float:
        """A win counts 1, a tie 1/2."""
        return self.wins + self.ties / 2


def score(games: Sequence[Played], side: int) -> Score:
    """What a match looks like from side 0 or from side 1."""
    wanted = 1 if side == 0 else -1
    outcomes = [game.outcome * wanted for game in games]
    mean_return = fmean(game.returns[side] for game in games) if games else math.nan
    mean_length = fmean(game.length for game in games) if games else math.nan
    return Score(outcomes.count(1), outcomes.count(0), outcomes.count(-1), mean_return, mean_length)


class Matrix:
    """A tournament's results: `cells[a, b]` is how player a did against player b, for all a != b that played."""

    def __init__(self, names: Sequence[str], matches: Mapping[tuple[int, int], Sequence[Played]]) -> None:
        self.names = tuple(names)
        self.cells: dict[tuple[int, int], Score] = {}
        for (a, b), games in matches.items():
            self.cells[a, b], self.cells[b, a] = score(games, 0), score(games, 1)

    def ratings(self) -> list[float]:
        """Elo ratings that explain all results together, with a mean of 1000; a difference of 400 means ten points to one.

        They are the Bradley-Terry strengths of greatest likelihood, with one imagined tie for each match: without it whoever
        never lost a point would be infinitely strong.
        """
        n = len(self.names)
        points = [sum(cell.points + 0.5 for (a, _), cell in self.cells.items() if a == i) for i in range(n)]
        games = {pair: cell.games + 1 for pair, cell in self.cells.items()}
        logs = [0.0] * n
        for _ in range(10_000):  # minorisation-maximisation: each round is an improvement
            weights = [math.exp(x) for x in logs]
            owed = [sum(g / (weights[i] + weights[b]) for (a, b), g in games.items() if a == i) for i in range(n)]
            new = [math.log(p / o) if p else x for p, o, x in zip(points, owed, logs, strict=True)]
            new = [x - fmean(new) for x in new]
            moved = max((abs(x - y) for x, y in zip(new, logs, strict=True)), default=0.0)
            logs = new
            if moved < 1e-9:
                break
        return [ELO_MEAN + ELO_DOUBLE * x for x in logs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each match from the side of its first player, win shares as a matrix, ratings."""
        n = len(self.names)
        matches: list[dict[str, Any]] = []
        for a, b in pairs(n):
            if (a, b) in self.cells:
                matches.append(_match(self.names[a], self.names[b], self.cells[a, b], self.cells[b, a]))
        wins = [[self.cells[a, b].shares[0] if (a, b) in self.cells else None for b in range(n)] for a in range(n)]
        ratings = dict(zip(self.names, self.ratings(), strict=True))
        return {"players": list(self.names), "matches": matches, "win_shares": wins, "ratings": ratings}


def _match(first: str, second: str, score: Score, other: Score) -> dict[str, Any]:
    shares = zip(("win", "tie", "loss"), score.shares, score.intervals, strict=True)
    return {
        "first": first, "second": second, "games": score.games,
        "wins": score.wins, "ties": score.ties, "losses": score.losses,
        **{name: {"share": share, "low": low, "high": high} for name, share, (low, high) in shares},
        "mean_returns": [score.mean_return, other.mean_return], "mean_length": score.mean_length,
    }  # fmt: skip


def distinct(names: Sequence[str]) -> list[str]:
    """The names, each made different from those before it by a number."""
    taken: list[str] = []
    for name in names:
        numbered = (name if n == 1 else f"{name} ({n})" for n in count(1))
        taken.append(next(candidate for candidate in numbered if candidate not in taken))
    return taken
