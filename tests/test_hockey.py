"""Hockey's rules: how games begin and end, what players may do, see and are paid. No gymnasium around it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.bots import BOTS, Chaser
from aiorl.envs.hockey.game import FIRST, SECOND, Game, reward
from aiorl.envs.hockey.rules import HOLD_STEPS, MODES
from aiorl.envs.hockey.world import World
from aiorl.errors import ConfigError
from bench import hockey_env

NOTHING = (0.0, 0.0, 0.0, 0.0)
AWAY = [(-3.0, 2.8), (3.0, 2.8)]
"""Rackets in corners, where the puck leaves them alone."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def placed(
    rackets: list[tuple[float, float]] = AWAY,
    puck: tuple[float, float] = (0.0, 0.0),
    velocity: tuple[float, float] = (0.0, 0.0),
    mode: str = "NORMAL",
    keep_mode: bool = True,
) -> Game:
    """A game with everything where a test wants it."""
    game = Game(mode, keep_mode)
    game.reset(rng())
    mass = 7.0 * math.pi * (13 / 60) ** 2
    game.world.place(rackets, puck, (velocity[0] * mass, velocity[1] * mass))
    return game


def until_over(game: Game, first: tuple[float, ...] = NOTHING, second: tuple[float, ...] = NOTHING) -> Game:
    while game.playing:
        game.step(first[: game.actions], second[: game.actions])
    return game


# -- how games begin ----------------------------------------------------------------------------------------------------


def test_the_players_take_turns_in_normal_mode():
    game, chance = Game(), rng()
    sides: list[bool] = []
    for _ in range(6):
        game.reset(chance)
        x, y, vx, vy = game.world.puck
        assert 1 <= abs(x) <= 2
        assert abs(y) <= 1
        assert (vx, vy) == (0, 0)
        assert [r[:2] for r in game.world.rackets] == [(-3, 0), (3, 0)]
        sides.append(x < 0)
    assert sides in ([True, False] * 3, [False, True] * 3)


def test_shooting_begins_with_the_puck_on_the_left_and_the_opponent_anywhere_in_its_half():
    game, chance = Game("TRAIN_SHOOTING"), rng()
    others = []
    for _ in range(200):
        game.reset(chance)
        assert -2 <= game.world.puck[0] <= -1
        others.append(game.world.rackets[SECOND][:2])
    low, high = np.min(others, axis=0), np.max(others, axis=0)
    assert np.all(low < [0.7, -2.6])
    assert np.all(high > [3.3, 2.6])
    assert np.all(low >= [0.5, -2.9])
    assert np.all(high <= [3.5, 2.9])


def test_defense_begins_with_a_shot_that_scores_unless_it_is_stopped():
    game, chance = Game("TRAIN_DEFENSE"), rng()
    scored = 0
    for _ in range(50):
        game.reset(chance)
        puck, other = game.world.puck[:2], game.world.rackets[SECOND][:2]
        if math.dist(puck, other) < 0.8:
            continue  # the opponent stands on the puck
        game.step(NOTHING, NOTHING)
        assert game.world.puck[2] < -25
        scored += until_over(game, (0.0, 1.0, 0.0, 0.0)).winner == SECOND
    assert scored > 20


def test_without_keep_mode_there_are_three_actions_and_sixteen_numbers_to_see():
    game = Game(keep_mode=False)
    game.reset(rng())
    assert (game.actions, game.observations, len(game.observe(FIRST))) == (3, 16, 16)
    game.step(NOTHING[:3], NOTHING[:3])


@pytest.mark.parametrize("mode", MODES)
def test_the_same_actions_lead_exactly_to_the_same_game(mode: str):
    """Whatever was played before: nothing carries over from one game to the next."""

    def record(game: Game, seed: int) -> list[list[float]]:
        chance = rng(seed)
        game.reset(chance, FIRST)
        bots = BOTS["strong"](chance), BOTS["random"](chance)
        seen = [game.observe(FIRST)]
        while game.playing:
            game.step(bots[0](game.observe(FIRST)), bots[1](game.observe(SECOND)))
            seen.append(game.observe(FIRST))
        return seen

    used = Game(mode)
    for seed in range(3):
        record(used, seed)
    for seed in range(4):
        assert record(used, seed) == record(Game(mode), seed)


# -- how they end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_time_runs_out(mode: str):
    game = until_over(placed(mode=mode, puck=(0.0, 2.0)))
    assert (game.steps, game.out_of_time, game.winner) == (MODES[mode], True, None)
    assert game.info(FIRST)["winner"] == game.info(SECOND)["winner"] == 0


@pytest.mark.parametrize(("vx", "winner"), [(20.0, FIRST), (-20.0, SECOND)])
def test_a_goal_ends_the_game(vx: float, winner: int):
    game = until_over(placed(velocity=(vx, 0.0)))
    assert (game.winner, game.out_of_time) == (winner, False)
    assert 5 < game.steps < 15
    loser = 1 - winner
    assert (game.info(winner)["winner"], game.info(loser)["winner"]) == (1, -1)
    assert reward(game.info(winner)) == 10
    assert reward(game.info(loser)) < -10  # it also pays for being away from the puck
    with pytest.raises(ResetNeeded, match="call reset"):
        game.step(NOTHING, NOTHING)


def test_a_goal_at_the_last_moment_counts():
    game = placed(velocity=(20.0, 0.0))
    steps = until_over(placed(velocity=(20.0, 0.0))).steps
    game.limit = steps
    assert (until_over(game).winner, game.out_of_time, game.steps) == (FIRST, False, steps)


@pytest.mark.parametrize("y", [1.4, -1.4, 2.5])
def test_beside_the_goal_are_boards(y: float):
    game = until_over(placed(rackets=[(-3.0, 0.0), (3.0, -2.9 * np.sign(y))], puck=(2.0, y), velocity=(20.0, 0.0)))
    assert game.winner is None


def test_the_puck_stays_on_the_field():
    game, chance = Game(), rng(3)
    for _ in range(20):
        game.reset(chance)
        bot = BOTS["random"](chance)
        while game.playing:
            game.step(bot([]), bot([]))
            assert abs(game.world.puck[0]) < 4.6  # in a goal at most
            assert abs(game.world.puck[1]) < 3.35


# -- rackets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [(1, 0), (1, 1), (-1, 0), (0, -1), (-1, 1)])
def test_rackets_stay_in_their_half_and_below_their_speed(push: tuple[float, float]):
    game = placed(rackets=[(-3.0, 0.0), (3.0, 0.0)], puck=(0.0, 3.0))
    fastest = 0.0
    for _ in range(250):
        game.step((*push, 0.0, 0.0), (*push, 0.0, 0.0))
        for side, (x, y, _, vx, vy, _) in zip((1, -1), game.world.rackets, strict=True):
            assert -4.0 < side * x < -0.25
            assert abs(y) < 3.33
            fastest = max(fastest, math.hypot(vx, vy))
    assert 5 < fastest < rules.MAX_SPEED + rules.FORCE / 60 * rules.STEP_S + 1


def test_rackets_cannot_leave_through_the_goals():
    game = placed(rackets=[(-3.0, 0.0), (3.0, 0.0)], puck=(0.0, 3.0))
    for _ in range(100):
        game.step((-1.0, 0.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0))
    assert -3.9 < game.world.rackets[FIRST][0] < -3.4
    assert 3.4 < game.world.rackets[SECOND][0] < 3.9


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_the_angle_is_limited(turn: float):
    game = placed(puck=(0.0, 2.0))
    angles = []
    for _ in range(200):
        game.step((0.0, 0.0, turn, 0.0), NOTHING)
        angles.append(turn * game.world.rackets[FIRST][2])
    assert rules.MAX_ANGLE < max(angles) < 1.6
    assert abs(np.mean(angles[100:]) - rules.MAX_ANGLE) < 0.15


def test_thrust_is_cut_at_the_speed_limit_but_may_brake():
    push, brake = rules.thrust(-3, 11, 0, 1, 0, 60), rules.thrust(-3, 11, 0, -1, 0, 60)
    assert push == (0, 0, 20)
    assert brake == (-6000, 0, 20)
    assert rules.thrust(-3, 9, 0, 1, 0.5, 60) == (6000, 3000, 5)


def test_a_racket_bounces_back_near_the_centre_line_whatever_the_push():
    for push in (1, 0, -1):
        into, out = rules.thrust(-0.4, 2, 0, push, 0, 60), rules.thrust(-0.4, -2, 0, push, 0, 60)
        assert 2 + into[0] * rules.STEP_S / 60 == pytest.approx(-2 * 0.6)  # the velocity after this step, undamped
        assert -2 + out[0] * rules.STEP_S / 60 == pytest.approx(-2 * 1.4)


# -- the puck -----------------------------------------------------------------------------------------------------------


def caught(game: Game) -> Game:
    """The game at the step in which player 1 has caught the puck."""
    for _ in range(40):
        game.step(NOTHING, NOTHING)
        if game.info(FIRST)["reward_touch_puck"]:
            return game
    raise AssertionError("not caught")


def test_a_caught_puck_is_held_and_then_shot():
    game = caught(placed(rackets=[(-3.0, 0.0), (3.0, 2.8)], puck=(-2.0, 0.0), velocity=(-5.0, 0.0)))
    assert game.observe(FIRST)[16:] == [HOLD_STEPS, 0]
    assert game.observe(SECOND)[16:] == [0, HOLD_STEPS]
    for left in range(HOLD_STEPS - 1, 1, -1):
        game.step(NOTHING, NOTHING)
        assert game.observe(FIRST)[16] == left
        assert game.info(FIRST)["reward_touch_puck"] == 0
        assert math.dist(game.world.puck[:2], game.world.rackets[FIRST][:2]) < 0.4
    game.step(NOTHING, NOTHING)
    assert game.observe(FIRST)[16] == 0
    assert game.world.puck[2] > 50


def test_a_player_shoots_where_its_racket_points():
    game = caught(placed(rackets=[(-3.0, 0.0), (3.0, 2.8)], puck=(-2.0, 0.0), velocity=(-5.0, 0.0)))
    while game.world.rackets[FIRST][2] < 0.4:
        game.step((0.0, 0.0, 1.0, 0.5), NOTHING)  # 0.5 does not shoot yet
    assert game.observe(FIRST)[16] > 1
    angle = game.world.rackets[FIRST][2]
    game.step((0.0, 0.0, 0.0, 0.6), NOTHING)
    _, _, vx, vy = game.world.puck
    assert math.atan2(vy, vx) == pytest.approx(angle, abs=0.1)


def test_a_puck_that_leaves_is_not_caught():
    game = placed(rackets=[(-3.0, 0.0), (3.0, 2.8)], puck=(-2.9, 0.0), velocity=(1.0, 0.0))
    for _ in range(20):
        game.step(NOTHING, NOTHING)
    assert game.observe(FIRST)[16] == 0


def test_without_keep_mode_the_puck_comes_back():
    game = placed(rackets=[(-3.0, 0.0), (3.0, 2.8)], puck=(-2.0, 0.0), velocity=(-5.0, 0.0), keep_mode=False)
    for _ in range(20):
        game.step(NOTHING[:3], NOTHING[:3])
    assert game.world.puck[2] > 4


def test_a_fast_puck_is_slowed_down():
    game = placed(puck=(-3.5, 0.0), velocity=(60.0, 0.0))
    speeds: list[float] = []
    for _ in range(8):
        game.step(NOTHING, NOTHING)
        speeds.append(game.world.puck[2])
    assert speeds[0] > 55
    assert 20 < speeds[-1] < rules.MAX_PUCK_SPEED
    assert speeds[-1] > 0.99 * speeds[-2]  # from here on it keeps its speed


# -- what players see and are paid --------------------------------------------------------------------------------------


def test_what_a_player_sees():
    game = placed(rackets=[(-3.0, 1.0), (2.0, -1.5)], puck=(0.5, 2.0))
    assert game.observe(FIRST) == [-3, 1, 0, 0, 0, 0, 2, -1.5, 0, 0, 0, 0, 0.5, 2, 0, 0, 0, 0]
    assert game.observe(SECOND) == [-2, 1.5, 0, 0, 0, 0, 3, -1, 0, 0, 0, 0, -0.5, -2, 0, 0, 0, 0]


def test_both_sides_play_the_same_game():
    """Seen from the other side: with exchanged players everything happens the same way."""
    puck, velocity, rackets = (-1.5, 0.3), (-6.0, 1.0), [(-3.0, 0.2), (2.5, 1.0)]
    turned = [(-x, -y) for x, y in rackets[::-1]]
    one = placed(rackets, puck, velocity)
    other = placed(turned, (-puck[0], -puck[1]), (-velocity[0], -velocity[1]))
    chance, met = rng(5), False
    for _ in range(40):
        first, second = chance.uniform(-1, 1, (2, 4)).tolist()
        one.step(first, second)
        other.step(second, first)
        for i in (FIRST, SECOND):
            np.testing.assert_allclose(one.observe(i), other.observe(1 - i), atol=1e-3)
            assert one.info(i) == pytest.approx(other.info(1 - i), abs=1e-3)
        met |= one.info(FIRST)["reward_touch_puck"] == 1
    assert met


def test_closeness_is_paid_for_a_puck_in_the_own_half_that_does_not_leave():
    cost = -5.0 * 30 / (250 / 60 * 125)
    assert rules.closeness(-3, 0, -3, 5, 0, 250) == pytest.approx(cost)
    assert rules.closeness(-3, 0, -3, 5, -1, 250) == pytest.approx(cost)
    assert rules.closeness(-3, 0, -3, 5, 0.1, 250) == 0
    assert rules.closeness(-3, 0, 0.1, 5, -1, 250) == 0
    game = placed(rackets=[(-3.0, 1.0), (3.0, 0.0)], puck=(1.0, 0.0))
    assert game.info(FIRST)["reward_closeness_to_puck"] == 0
    assert reward(game.info(SECOND)) == pytest.approx(-2 * 30 / (250 / 60 * 125))


def test_direction_is_paid_towards_the_other_goal():
    game = placed(velocity=(20.0, 0.0))
    game.step(NOTHING, NOTHING)
    assert game.info(FIRST)["reward_puck_direction"] == pytest.approx(20 / (250 * 25), rel=0.01)
    assert game.info(SECOND)["reward_puck_direction"] == -game.info(FIRST)["reward_puck_direction"]


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_a_mode_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"no mode 'normal'\n  it has: NORMAL, TRAIN_SHOOTING, TRAIN_DEFENSE"):
        Game("normal")


@pytest.mark.parametrize(
    ("action", "match"),
    [((0.0, 0.0), "has 4 numbers, got 2"), ((0.0, math.nan, 0.0, 0.0), "finite"), ((math.inf, 0.0, 0.0, 0.0), "finite")],
)
def test_actions_that_are_none(action: tuple[float, ...], match: str):
    game = placed()
    with pytest.raises(ValueError, match=match):
        game.step(NOTHING, action)


def test_actions_beyond_their_range_are_cut():
    one, other = placed(), placed()
    one.step((9.0, -9.0, 9.0, 9.0), NOTHING)
    other.step((1.0, -1.0, 1.0, 1.0), NOTHING)
    assert one.observe(FIRST) == other.observe(FIRST)


def test_a_game_begins_with_reset():
    with pytest.raises(ResetNeeded):
        Game().step(NOTHING, NOTHING)


# -- bots ---------------------------------------------------------------------------------------------------------------


def test_chasers_act_in_range_and_shoot_when_the_hold_is_about_to_end():
    bot = Chaser(10.0, rng())
    seen = [-3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert bot(seen)[0] == 1  # goes for a puck in front of it
    assert bot(seen)[3] == 0
    shoots = [bot([*seen[:16], float(left), 0.0])[3] for left in range(HOLD_STEPS + 1)]
    assert shoots == [0, *[1] * 6, *[0] * 9]
    away = [*seen[:14], 5.0, 0.0, 0.0, 0.0]
    assert bot(away)[0] == -1  # guards its goal


def test_play_is_about_that_of_the_reference():
    """A quick look at one row; the whole table is a long test."""
    expected = hockey_env.REFERENCE[4]
    assert hockey_env.differences(expected, hockey_env.play(*expected[:3], games=60)) == []


@pytest.mark.long
@pytest.mark.parametrize("expected", hockey_env.REFERENCE, ids=lambda row: "-".join(row[:3]))
def test_play_is_that_of_the_reference(expected: hockey_env.Row):
    assert hockey_env.differences(expected, hockey_env.play(*expected[:3], games=300)) == []


def test_differences_are_found():
    row = hockey_env.REFERENCE[0]
    assert hockey_env.differences(row, row) == []
    worse = row._replace(win=row.win + 0.09, length=row.length * 1.11)  # type: ignore[operator]
    assert hockey_env.differences(row, worse) == ["win 0.13 instead of 0.04", "length 191 instead of 172"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_games_leave_no_memory_behind():
    """Box2D frees its worlds, but not all that it is given to make them from."""
    world = World()

    def play_some() -> int:
        for _ in range(1500):
            world.place(AWAY, (0.0, 0.0), (0.0, 0.0))
            world.step()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    play_some()
    before = play_some()
    assert play_some() - before < 400  # KiB; a leak of one polygon for each game is 450
