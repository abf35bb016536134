"""The arithmetic of tournaments, and matches of a toy game whose every number is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from aiorl.envs.spaces import spaces_of
from aiorl.errors import ConfigError, EnvError
from aiorl.matches import Scripted, Trained, play_match
from aiorl.metrics.matrix import Table, draw, draw_standings, markdown, match_rows, matrix_rows, write_standings
from aiorl.policy import LoadedPolicy
from aiorl.tournament import Matrix, Played, distinct, fixtures, pairs, score, wilson

trials = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))

# -- intervals ---------------------------------------------------------------------------------------------------------


@given(trials)
def test_an_interval_holds_the_share_and_is_a_mirror_image_of_that_of_the_rest(trial: tuple[int, int]):
    k, n = trial
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n))


@given(trials)
def test_more_games_narrow_an_interval_and_more_confidence_widens_it(trial: tuple[int, int]):
    k, n = trial
    width = [high - low for low, high in (wilson(4 * k, 4 * n), wilson(k, n), wilson(k, n, 0.99))]
    assert width[0] < width[1] < width[2]


@given(trials, st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_are_those_of_scipy(trial: tuple[int, int], confidence: float):
    k, n = trial
    known = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("n", [20, 100])
def test_an_interval_covers_the_truth_as_often_as_it_says(n: int):
    """Exactly, from the binomial distribution: 95 % on average over the truths, and for none of them far less."""
    intervals = [wilson(k, n) for k in range(n + 1)]
    covered: list[float] = []
    for p in np.linspace(0.05, 0.95, 91):
        odds = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered.append(sum(odd for odd, (low, high) in zip(odds, intervals, strict=True) if low <= p <= high))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.91


def test_an_interval_without_games_says_nothing():
    assert wilson(0, 0) == (0, 1)
    for part, whole, confidence in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)):
        with pytest.raises(ValueError):
            wilson(part, whole, confidence)


# -- schedule ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 2**31))
def test_each_seed_is_played_on_both_seats(games: int, seed: int):
    schedule = fixtures(games, seed)
    assert len(schedule) == games
    for first, second in zip(schedule[::2], schedule[1::2], strict=False):
        assert (first.pair, first.seed) == (second.pair, second.seed)
        assert {first.seats, second.seats} == {(0, 1), (1, 0)}
    seeds = [fixture.seed for fixture in schedule[::2]]
    assert len(set(seeds)) == len(seeds)
    assert fixtures(games + 7, seed)[:games] == schedule, "more games are the same games and some more"
    assert not games or fixtures(games, seed + 1) != schedule


@given(st.integers(0, 12))
def test_everybody_meets_everybody_else_once(n: int):
    met = pairs(n)
    assert len(met) == len(set(met)) == n * (n - 1) // 2
    assert all(a < b for a, b in met)


@given(st.lists(st.sampled_from(["a", "a (2)", "b"]), max_size=8))
def test_names_become_distinct(names: list[str]):
    made = distinct(names)
    assert len(set(made)) == len(made) == len(names)
    assert all(new.startswith(old) for new, old in zip(made, names, strict=True))


# -- results -----------------------------------------------------------------------------------------------------------

games_strategy = st.lists(st.builds(Played, st.sampled_from([-1, 0, 1]), st.tuples(st.floats(-9, 9), st.floats(-9, 9)), st.integers(1, 99)), min_size=1, max_size=30)  # fmt: skip  # noqa: E501


@given(games_strategy)
def test_a_match_is_seen_alike_from_both_sides(games: list[Played]):
    a, b = score(games, 0), score(games, 1)
    assert (a.wins, a.ties, a.losses) == (b.losses, b.ties, b.wins)
    assert a.games == len(games)
    assert a.points + b.points == len(games)
    assert sum(a.shares) == pytest.approx(1)
    assert a.mean_length == b.mean_length
    assert a.mean_return == pytest.approx(np.mean([game.returns[0] for game in games]))


def result(wins: int, ties: int, losses: int) -> list[Played]:
    return [Played(outcome, (0.0, 0.0), 1) for outcome, n in ((1, wins), (0, ties), (-1, losses)) for _ in range(n)]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_ratings_of_two_players_have_a_closed_form(wins: int, ties: int, losses: int):
    first, second = Matrix(["a", "b"], {(0, 1): result(wins, ties, losses)}).ratings()
    points, games = wins + ties / 2 + 0.5, wins + ties + losses + 1
    assert first + second == pytest.approx(2000)
    assert first - second == pytest.approx(400 * math.log10(points / (games - points)), abs=1e-3)


def test_ratings_find_the_strengths_that_made_the_results():
    """Expected points between ratings 900, 1000 and 1100, in so many games that the imagined tie does not count."""
    truth = [900.0, 1000.0, 1100.0]
    matches = {}
    for a, b in pairs(3):
        expected = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
        wins = round(100_000 * expected)
        matches[a, b] = [*result(wins, 0, 100_000 - wins)]
    assert Matrix("abc", matches).ratings() == pytest.approx(truth, abs=0.1)


def test_ratings_are_finite_where_somebody_always_wins_and_level_without_games():
    names = ["a", "b", "c"]
    best, middle, worst = Matrix(names, {pair: result(100, 0, 0) for pair in pairs(3)}).ratings()
    assert best > middle > worst
    assert all(map(math.isfinite, (best, middle, worst)))
    assert middle == pytest.approx(1000)
    assert Matrix(names, {}).ratings() == [1000.0] * 3


def test_a_matrix_as_text_as_a_picture_and_as_data():
    matrix = Matrix(["<weak>", "st|rong", "c"], {(0, 1): result(10, 60, 30), (0, 2): result(50, 25, 25)})
    rows = match_rows(matrix)
    assert rows[1][:6] == ["<weak>", "st|rong", "100", "0.10 (0.06–0.17)", "0.60 (0.50–0.69)", "0.30 (0.22–0.40)"]
    assert [row[1:4] for row in matrix_rows(matrix)[1:]] == [["–", "0.10", "0.50"], ["0.30", "–", "–"], ["0.25", "–", "–"]]
    lines = markdown(matrix).splitlines()
    assert lines[0] == "| won against | <weak> | st\\|rong | c | Elo |"
    assert {line.replace("\\|", "").count("|") for line in lines[:5]} == {6}
    svg = draw(matrix, "a & b")
    assert "&lt;weak&gt;" in svg
    assert "a &amp; b" in svg
    assert (svg.count(">0.10<"), svg.count(">0.60 – 0.30<"), svg.count('class="empty"')) == (1, 1, 5)
    data = matrix.to_dict()
    assert data["win_shares"][0] == [None, 0.1, 0.5]
    assert (data["matches"][0]["wins"], data["matches"][0]["win"]["share"]) == (10, 0.1)
    assert data["matches"][0]["win"]["low"] == pytest.approx(wilson(10, 100)[0])


def test_standings_as_a_picture():
    """Rows are the learner and its snapshots, columns all whom they met; of many snapshots the newest are drawn."""
    names = [f"snapshot {i}" for i in range(1, 31)]
    players, opponents = ["learner", *names], ["self", "weak", *names]
    none = [[0.0] * len(opponents) for _ in players]
    wins, ties, losses = ([list(row) for row in none] for _ in range(3))
    wins[0][1], ties[0][1], losses[0][1] = 2.5, 5.0, 2.5
    wins[30][1] = 4.0
    table = Table(players, opponents, wins, ties, losses, {name: 7.0 for name in opponents} | {"self": -12.0})
    svg = draw_standings(table, "a & b")
    assert "a &amp; b" in svg
    assert (svg.count(">0.25<"), svg.count(">0.50 – 0.25<"), svg.count(">1.00<")) == (1, 1, 1)
    assert (svg.count(">snapshot 30<"), svg.count(">snapshot 19<"), svg.count(">snapshot 18<")) == (2, 2, 0)
    assert (svg.count('class="empty"'), svg.count(">-12<")) == (13 * 14 - 2, 1)
    small = Table(["learner"], ["self"], [[0]], [[0]], [[0]], {"self": 0.0})
    assert ">learner<" in draw_standings(small, "")


def test_standings_that_are_damaged_are_refused(tmp_path: Path):
    picture = tmp_path / "standings.svg"
    assert not write_standings(tmp_path, picture, "")
    whole = {"players": ["learner"], "opponents": ["self"], "elo": {"self": 0}, "wins": [[1]], "ties": [[0]]}
    whole["losses"] = [[0]]
    changes: list[dict[str, Any]] = [{"players": [1]}, {"wins": [[]]}, {"players": ["learner", "a"]}, {"elo": {}}]
    for text in ("", "[1]", *(json.dumps(whole | change) for change in changes)):
        (tmp_path / "standings.json").write_text(text)
        with pytest.raises(ConfigError, match=r"standings\.json is damaged"):
            write_standings(tmp_path, picture, "")
    assert not picture.exists()
    (tmp_path / "standings.json").write_text(json.dumps(whole))
    assert write_standings(tmp_path, picture, "")


# -- matches -----------------------------------------------------------------------------------------------------------


class Auction:
    """Both seats see [seat, seed, step]; after 2 + seed % 3 steps whoever bid more in sum has won. It pays what was bid."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 10.0, (1,), np.float32)

    def reset(self, seed: int) -> tuple[Any, Any]:
        self.seed, self.steps, self.bids = seed, 0, np.zeros(2)
        return self._observed()

    def step(self, first: Any, second: Any) -> tuple[Any, tuple[float, float], bool, bool, Mapping[str, Any]]:
        bids = float(first[0]), float(second[0])
        self.bids += bids
        self.steps += 1
        ended = self.steps == 2 + self.seed % 3
        return self._observed(), bids, ended, False, {"winner": np.sign(self.bids[0] - self.bids[1])} if ended else {}

    def _observed(self) -> tuple[Any, Any]:
        return tuple(np.array([seat, self.seed % 1000, self.steps], np.float32) for seat in (0, 1))  # type: ignore[return-value]

    def render(self) -> None: ...

    def close(self) -> None: ...


def bidder(amount: float, spread: float = 0.0) -> Scripted:
    def make(rng: np.random.Generator) -> Any:
        return lambda obs: [amount + spread * rng.random()]

    return Scripted(make)


def tables(n: int) -> list[Auction]:
    return [Auction() for _ in range(n)]


def test_results_go_to_the_side_that_earned_them_on_either_seat():
    games = play_match(tables(3), (bidder(2), bidder(1)), 10, 5)
    assert [game.length for game in games] == [2 + fixture.seed % 3 for fixture in fixtures(10, 5)]
    for game in games:
        assert (game.outcome, game.returns) == (1, (2 * game.length, game.length))
    assert {game.outcome for game in play_match(tables(3), (bidder(1), bidder(2)), 10, 5)} == {-1}
    assert {game.outcome for game in play_match(tables(3), (bidder(1), bidder(1)), 10, 5)} == {0}


def test_each_side_sees_its_own_seat():
    class Watching:
        def begin(self, slots: int) -> None:
            self.seen: dict[int, list[int]] = {slot: [] for slot in range(slots)}

        def reset(self, slot: int, rng: np.random.Generator) -> None: ...

        def act(self, obs: Mapping[int, Any]) -> dict[int, Any]:
            for slot, seen in obs.items():
                if seen[2] == 0:
                    self.seen[slot].append(int(seen[0]))
            return {slot: [0.0] for slot in obs}

    sides = Watching(), Watching()
    play_match(tables(1), sides, 5, 0)
    assert [side.seen[0] for side in sides] == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


@pytest.mark.parametrize("width", [2, 3, 20])
def test_scripted_players_do_not_notice_what_is_played_beside(width: int):
    players = bidder(1, 1), bidder(1, 1)
    games = play_match(tables(width), players, 14, 3)
    assert games == play_match(tables(1), players, 14, 3)
    assert {game.outcome for game in games} == {1, -1}
    for first, second in zip(games[::2], games[1::2], strict=True):
        assert first == second, "the same seed and the same chance: only the seats differ"


def test_frames_and_ends_are_told_in_order():
    told: list[tuple[str, int]] = []
    play_match(
        tables(2), (bidder(1), bidder(2)), 4, 1,
        on_end=lambda i, _: told.append(("end", i)), on_frame=lambda i: told.append(("frame", i)),
    )  # fmt: skip
    lengths = [2 + fixture.seed % 3 for fixture in fixtures(4, 1)]
    assert [i for what, i in told if what == "frame"] == [0] * (lengths[0] + 1) + [2] * (lengths[2] + 1)
    assert sorted(i for what, i in told if what == "end") == [0, 1, 2, 3]
    assert told.index(("end", 0)) == max(at for at, item in enumerate(told) if item == ("frame", 0)) - 1


def test_what_a_game_raises_becomes_an_error_of_three_lines():
    class Broken(Auction):
        def step(self, first: Any, second: Any) -> Any:
            raise RuntimeError("the arena is closed")

    class Priceless(Auction):
        def step(self, first: Any, second: Any) -> Any:
            obs, _, *rest = super().step(first, second)
            return (obs, (math.nan, 0.0), *rest)

    for game, message in ((Broken(), "step raised RuntimeError: the arena is closed"), (Priceless(), "expected finite")):
        with pytest.raises(EnvError, match=message):
            play_match([game], (bidder(1), bidder(2)), 1, 0)


class Echo:
    """An algorithm whose policy bids the step it is shown plus one, and remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[bool]]] = []

    def policy(self, spaces: Any) -> Echo:
        return self

    def begin(self, weights: Any, rollout: int, rng: Any, steps: int) -> None:
        assert rng is None, "it plays as well as it can"

    def act(self, obs: Mapping[str, Any], first: Any) -> tuple[Any, dict[str, Any]]:
        self.batches.append((len(first), first.tolist()))
        return obs["obs"][:, 2:] + 1, {}


def test_a_policy_acts_for_all_tables_at_once_and_each_action_is_for_its_game():
    algorithm: Any = Echo()
    policy = LoadedPolicy(algorithm, spaces_of(Auction.observation_space, Auction.action_space), {}, 0)
    games = play_match(tables(4), (Trained(policy), bidder(1.5)), 7, 2)
    for game in games:
        assert game.returns[0] == sum(range(1, game.length + 1))
    assert {size for size, _ in algorithm.batches} == {4}, "a row for each table, also for those that are through"
    assert algorithm.batches[0][1] == [True] * 4


def test_an_action_is_repeated_within_a_game_and_not_into_the_next():
    algorithm: Any = Echo()
    policy = LoadedPolicy(algorithm, spaces_of(Auction.observation_space, Auction.action_space), {}, 0)
    games = play_match(tables(1), (Trained(policy, repeat=2), bidder(1.5)), 9, 3)
    assert {game.length for game in games} == {2, 3, 4}
    assert [game.returns[0] for game in games] == [sum([1, 1, 3, 3][: game.length]) for game in games]
    firsts = [first for _, (first,) in algorithm.batches]
    assert firsts == [at == 0 for game in games for at in range(math.ceil(game.length / 2))]


class Counting(Echo):
    """Bids how often it has acted in this game."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = np.zeros(0, np.int64)

    def act(self, obs: Mapping[str, Any], first: Any) -> tuple[Any, dict[str, Any]]:
        self.acts = np.where(first, 0, np.resize(self.acts, len(first))) + 1
        return self.acts[:, None].astype(np.float32), {}

    def state(self) -> dict[str, Any]:
        return {"acts": self.acts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.acts = state["acts"]


@pytest.mark.parametrize("at_once", [1, 4])
def test_what_a_policy_remembers_of_a_game_does_not_depend_on_the_games_beside_it(at_once: int):
    algorithm: Any = Counting()
    policy = LoadedPolicy(algorithm, spaces_of(Auction.observation_space, Auction.action_space), {}, 0)
    games = play_match(tables(at_once), (Trained(policy, repeat=2), bidder(1.5)), 9, 3)
    assert {game.length for game in games} == {2, 3, 4}
    assert [game.returns[0] for game in games] == [sum([1, 1, 2, 2][: game.length]) for game in games]
