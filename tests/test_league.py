"""The league: who is met how often, who is admitted and replaced, and when a place may be given away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.errors import InvariantError, TrainingError
from aiorl.league import BOTS, CODES, SELF, UNKNOWN, Game, League, bot_code, standings


def rules(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "pool": 3, "matchmaking": "hard", "replaced": "oldest", "bots": {"weak": 0.1, "strong": 0.2}, "self_share": 0.3,
        "admit_every": 1, "admit_win_rate": 0.0, "admit_games": 0, "memory": 100,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def weights(version: int) -> dict[str, Any]:
    return {"w": np.full((2, 3), version, np.float32), "b": np.array([version])}


def league(envs: int = 2, **changes: Any) -> League:
    return League(rules(**changes), weights(0), envs)


def between_games(one: League, version: int) -> None:
    """All environments have acted with `version` and play nobody."""
    one.watch(version, np.arange(len(one._acted)), np.full(len(one._acted), UNKNOWN))


def filled(count: int, **changes: Any) -> League:
    """With snapshots of versions 0 … count - 1."""
    one = league(**changes)
    for version in range(1, count):
        assert one.advance(version, weights(version))
    return one


def test_codes_are_exact_in_float32_and_never_shared():
    codes = [bot_code(name) for name in ("weak", "strong", "still", "random")]
    assert len(set(codes)) == 4
    assert all(BOTS <= code < CODES == int(np.float32(CODES - 1)) + 1 for code in codes)
    assert league().codes.tolist() == [SELF, bot_code("weak"), bot_code("strong"), 1, UNKNOWN, UNKNOWN, UNKNOWN]


def test_it_begins_with_the_first_version():
    one = league()
    assert (one.ids.tolist(), one.versions.tolist()) == ([1, 0, 0, 0], [0, -1, -1, -1])
    assert one.snapshots["w"].shape == (4, 2, 3)


def test_nobody_to_meet_but_itself_and_bots():
    assert league(pool=0).odds().tolist() == pytest.approx([0.7, 0.1, 0.2, 0])


@pytest.mark.parametrize(
    ("matchmaking", "interest"),
    [("uniform", lambda p: 1), ("hard", lambda p: (1 - p) ** 2), ("even", lambda p: p * (1 - p))],
)
def test_odds_follow_the_win_probability(matchmaking: str, interest: Any):
    one = filled(3, matchmaking=matchmaking, memory=10**9)
    one.record([Game(1, 1)] * 8 + [Game(2, -1)] * 6 + [Game(2, 0)] * 2)
    p = [9 / 10, (1 + 2 / 2) / 10, 1 / 2]
    assert one.scores[3:6].tolist() == pytest.approx(p)
    wanted = np.array([interest(x) for x in p])
    assert one.odds().tolist() == pytest.approx([0.3, 0.1, 0.2, *(0.4 * wanted / wanted.sum()), 0])


def test_old_results_fade():
    one = league(memory=2)
    one.record([Game(1, 1)] * 3)
    assert one.table[0, 3].tolist() == [1.75, 0, 0]
    one.record([Game(1, -1)])
    assert one.table[0, 3].tolist() == [0.875, 0, 1]


def test_elo_moves_by_what_was_not_expected():
    one = league()
    one.record([Game(bot_code("weak"), 1)])
    assert one.elo[:2].tolist() == [8, -8]
    one.record([Game(SELF, 1), Game(SELF, -1)])
    assert one.elo[0] == 8
    one.record([Game(bot_code("weak"), 0)])
    assert one.elo[0] == pytest.approx(8 + 16 * (0.5 - 1 / (1 + 10 ** (-16 / 400))))
    one.advance(1, weights(1))
    assert one.elo[4] == one.elo[0]


def test_a_stranger_is_refused():
    with pytest.raises(TrainingError, match=r"^a game was played against a bot .* it has: weak, strong\n  name all that"):
        league().record([Game(bot_code("other"), 1)])
    with pytest.raises(InvariantError, match="a game against snapshot 9 has ended, which is not in the pool"):
        league().record([Game(9, 1)])


# -- admission ---------------------------------------------------------------------------------------------------------


def test_one_every_so_many_updates():
    one = league(admit_every=3, pool=9)
    assert [version for version in range(1, 10) if one.advance(version, weights(version))] == [3, 6, 9]


def test_only_who_has_beaten_the_pool():
    one = league(admit_win_rate=0.6, admit_games=5)
    one.record([Game(1, 1)] * 4)
    assert not one.advance(1, weights(1)), "too few games"
    one.record([Game(bot_code("weak"), 1)] * 9)
    assert not one.advance(2, weights(2)), "bots are not the pool"
    one.record([Game(1, -1)] * 3)
    assert not one.advance(3, weights(3)), "4 of 7"
    one.record([Game(1, 0), Game(1, 1)])
    assert one.advance(4, weights(4)), "5.5 of 9"
    assert not one.advance(5, weights(5)), "the count begins anew"


def test_a_snapshot_brings_the_results_of_its_time():
    one = league()
    one.record([Game(bot_code("strong"), -1)])
    one.advance(1, weights(1))
    one.record([Game(2, 1)])
    assert one.table[2, 2].tolist() == [0, 0, 1]
    assert one.table[0, 4].tolist() == [1, 0, 0]
    assert not one.table[2, 4].any()
    told = standings(one.weights(), ["weak", "strong"])
    assert told["players"] == ["learner", "snapshot 1", "snapshot 2"]
    assert told["opponents"] == ["self", "weak", "strong", "snapshot 1", "snapshot 2"]
    assert told["losses"][2] == [0, 0, 1, 0, 0]
    assert told["wins"][0] == [0, 0, 0, 0, 1]
    assert told["versions"] == {"snapshot 1": 0, "snapshot 2": 1}


# -- replacement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replaced", "gone"), [("oldest", 1), ("easiest", 2)])
def test_who_makes_room(replaced: str, gone: int):
    one = filled(3, replaced=replaced)
    one.record([Game(2, 1)] * 5 + [Game(3, -1)] * 5)
    one.advance(3, weights(3))
    assert one.ids.tolist() == [1, 2, 3, 4]
    assert one.ids[~one.active].tolist() == [gone]
    assert one.odds()[2 + gone] == 0


def test_the_easiest_is_never_the_newest():
    one = filled(3, replaced="easiest")
    one.record([Game(1, -1)] * 5 + [Game(2, -1)] * 5 + [Game(3, -1)] * 5)
    one.advance(3, weights(3))
    assert one.ids[~one.active].tolist() == [1]


def test_a_place_waits_for_games_under_way():
    one = filled(4)  # retired at version 3: snapshot 1
    assert not one.advance(4, weights(4)), "no place is free"
    one.watch(2, np.array([0, 1]), np.array([UNKNOWN, UNKNOWN]))
    assert one.ids[0] == 1, "version 2 may still have begun a game"
    one.watch(3, np.array([0]), np.array([UNKNOWN]))
    assert one.ids[0] == 1, "environment 1 has not been heard of"
    one.watch(3, np.array([1]), np.array([1]))
    assert one.ids[0] == 1, "a game is under way"
    one.watch(5, np.array([1]), np.array([2]))
    assert one.ids[0] == 0
    assert not one.snapshots["w"][0].any()
    assert not one.table[:, 3].any()
    assert not one.table[1].any()
    assert one.advance(6, weights(6))
    assert (one.ids[0], one.versions[0]) == (5, 6)


def test_frozen_opponents_stay():
    one = League(rules(pool=2), weights(0), 1, [weights(77)])
    assert (one.ids.tolist(), one.versions.tolist()) == ([1, 2, 0], [-1, 0, -1])
    for version in range(1, 20):
        between_games(one, version)
        one.advance(version, weights(version))
    assert one.ids[0] == 1
    assert one.snapshots["w"][0, 0, 0] == 77
    full = League(rules(pool=1), weights(0), 1, [weights(77)])
    assert not any(full.advance(version, weights(version)) for version in range(1, 5))
    assert full.ids.tolist() == [1, 0]


def test_nothing_grows_as_the_pool_turns_over():
    one = filled(3)
    arrays = {id(a) for a in one.snapshots.values()}
    shapes = {name: (a.shape, a.dtype) for name, a in one.weights().items()}
    size = sum(a.nbytes for a in one.weights().values())
    for version in range(3, 500):
        between_games(one, version)
        one.record([Game(int(one.ids.max()), 1)])
        one.advance(version, weights(version))
    assert one.admitted > 450
    assert {id(a) for a in one.snapshots.values()} == arrays
    assert {name: (a.shape, a.dtype) for name, a in one.weights().items()} == shapes
    assert sum(a.nbytes for a in one.weights().values()) == size


def test_standings_are_in_the_order_of_age():
    """Whatever place a snapshot has been given."""
    one = filled(3)
    for version in range(3, 9):
        between_games(one, version)
        one.record([Game(int(one.ids.max()), 1)])
        one.advance(version, weights(version))
    alive = sorted(one.ids[one.ids > 0].tolist())
    assert one.ids[one.ids > 0].tolist() != alive
    told = standings(one.weights(), ["weak", "strong"])
    assert told["players"] == ["learner", *(f"snapshot {number}" for number in alive)]
    newest = one.versions[one.ids.argmax()]
    assert list(told["versions"].values())[-1] == newest
    assert list(told["elo"].values())[-1] == one.elo[3 + one.ids.argmax()].round(1)


# -- as a whole --------------------------------------------------------------------------------------------------------


def events(one: League, rng: np.random.Generator, version: int) -> None:
    codes = one.codes[one.codes != UNKNOWN]
    one.record([Game(int(rng.choice(codes)), int(rng.integers(-1, 2))) for _ in range(rng.integers(4))])
    one.watch(max(0, version - int(rng.integers(3))), np.arange(2), rng.choice(np.append(codes, UNKNOWN), 2))
    one.advance(version, weights(version))


def state(one: League) -> str:
    return repr(one.state_dict())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(0, 4), cut=st.integers(1, 40),
    matchmaking=st.sampled_from(["uniform", "hard", "even"]), replaced=st.sampled_from(["oldest", "easiest"]),
)  # fmt: skip
def test_it_goes_on_from_its_state(seed: int, size: int, cut: int, matchmaking: str, replaced: str):
    """A league brought back at any moment ends like one that went through; and some things are always true."""
    settings: dict[str, Any] = {"pool": size, "matchmaking": matchmaking, "replaced": replaced}
    one, rng = league(**settings), np.random.default_rng(seed)
    for version in range(1, 41):
        events(one, rng, version)
        if version == cut:
            other = league(**settings)
            other.load_state_dict(one.state_dict())
            assert state(other) == state(one)
            one = other
        assert one.odds().sum() == pytest.approx(1)
        assert one.active.sum() <= size
        assert not one.odds()[3:][~one.active].any()
        ids = one.ids[one.ids > 0]
        assert len(set(ids.tolist())) == len(ids)
        for place in np.flatnonzero(one.ids):
            assert (one.snapshots["w"][place] == one.versions[place]).all(), "not the weights of its version"
    whole, rng = league(**settings), np.random.default_rng(seed)
    for version in range(1, 41):
        events(whole, rng, version)
    assert state(whole) == state(one)


def test_another_pool_is_not_loaded():
    with pytest.raises(ValueError, match=r"^league\.snapshots\.w: expected float32 \[3, 2, 3\], got float32 \[4, 2, 3\]"):
        league(pool=2).load_state_dict(league().state_dict())
