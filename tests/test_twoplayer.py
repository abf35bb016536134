"""Games for two as environments for one: sides, seats, opponents, bots, PettingZoo and hockey."""

from __future__ import annotations

from typing import Any

import games
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import parallel_api_test

from aiorl.envs.hockey.bots import Chaser
from aiorl.envs.hockey.env import HockeyEnv
from aiorl.envs.hockey.selfplay import hockey
from aiorl.envs.twoplayer import ParallelGame, SelfPlayEnv
from aiorl.errors import ConfigError, EnvError
from aiorl.league import SELF, UNKNOWN, bot_code

ROCK, PAPER, SCISSORS = range(3)


def play(env: Any, actions: Any, seed: int = 0) -> list[Any]:
    """All that an episode shows, after `reset` and after each step."""
    seen = [(env.reset(seed=seed)[0], 0.0, False, False, {})]
    for action in actions:
        seen.append(env.step(np.asarray(action)))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


def plain(obs: Any) -> Any:
    return {name: np.asarray(leaf).tolist() for name, leaf in obs.items()}


@pytest.mark.parametrize("make", [games.matching, games.race, games.parallel_race, hockey])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_it_is_a_gymnasium_environment(make: Any):
    check_env(make(opponent="self"), skip_render_check=True)


def test_both_sides_see_and_act():
    env = games.matching(swap_seats=False)
    start, first, second, *_ = play(env, [(ROCK, PAPER, 1), (PAPER, ROCK, 1)])
    assert plain(start[0])["opponent"] == UNKNOWN
    assert plain(first[0])["opponent"] == 1
    assert plain(first[0])["own"] == [1, 1, 0, 0, 0, 1, 0]
    assert plain(first[0])["other"] == [1, 0, 1, 0, 1, 0, 0]
    assert (first[1], second[1]) == (-1, 1)


def test_the_outcome_is_told_with_the_last_observation():
    env = games.matching(swap_seats=False)
    for moves, outcome in (((PAPER, ROCK), 1), ((ROCK, PAPER), -1), ((ROCK, ROCK), 0)):
        shown = play(env, [(*moves, SELF)] * 3)
        assert [plain(obs)["outcome"] for obs, *_ in shown] == [0, 0, 0, outcome]
        assert [info.get("outcome") for *_, info in shown] == [None, None, None, outcome]


def test_the_opponent_of_a_game_is_settled_by_its_first_action():
    env = games.matching()
    assert [plain(obs)["opponent"] for obs, *_ in play(env, [(0, 0, 5), (0, 0, 6), (0, 0, UNKNOWN)])] == [UNKNOWN, 5, 5, 5]
    assert [plain(obs)["opponent"] for obs, *_ in play(env, [(0, 0, 7)])] == [UNKNOWN, 7]


def test_a_bot_plays_for_itself():
    rock = bot_code("rock")
    env = games.matching(swap_seats=False)
    shown = play(env, [(PAPER, PAPER, rock), (PAPER, PAPER, 0), (PAPER, SCISSORS, 0)])
    assert [reward for _, reward, *_ in shown] == [0, 1, 1, 1]
    assert [info for *_, info in shown[1:]] == [{"opponent": "rock"}] * 2 + [
        {"winner": 1, "outcome": 1, "opponent": "rock"}
    ]


def test_a_fixed_opponent_goes_before_what_the_learner_says():
    env = games.matching(opponent="rock", swap_seats=False)
    shown = play(env, [(PAPER, PAPER, 9)] * 3)
    assert [plain(obs)["opponent"] for obs, *_ in shown] == [bot_code("rock")] * 4
    assert sum(reward for _, reward, *_ in shown) == 3


def test_the_learner_takes_either_seat():
    seats = {seed: games.race() for seed in range(20)}
    for seed, env in seats.items():
        obs, _ = env.reset(seed=seed)
        assert env._seat == int(obs["own"][0] == np.float32(env.game._at[1]))
        pay = env.step(np.array([1, -1, SELF], np.float32))[1]
        assert pay > 0, "paid as the other player"
    assert {env._seat for env in seats.values()} == {0, 1}


def test_who_has_won_is_told_from_the_learners_seat():
    seats: set[int] = set()
    for seed in range(10):
        env = games.matching("rock")
        obs, _, _, _, info = play(env, [(PAPER, 0, 0)] * 3, seed)[-1]
        assert (plain(obs)["outcome"], info["outcome"], info["winner"]) == (1, 1, -1 if env._seat else 1)
        seats.add(env._seat)
    assert seats == {0, 1}


@pytest.mark.parametrize("code", [bot_code("stroller"), 3])
def test_a_game_replays_from_its_actions(code: int):
    """Seat, bot and opponent are functions of seed and actions, whoever was played before."""
    rng = np.random.default_rng(0)
    actions = [np.array([rng.uniform(-1, 1), rng.uniform(-1, 1), code], np.float32) for _ in range(20)]
    used = games.race()
    play(used, [(1, 1, bot_code("still"))] * 20, seed=1)
    one, two = ([(plain(o), *rest) for o, *rest in play(env, actions, seed=7)] for env in (games.race(), used))
    assert one == two


def test_actions_come_as_the_game_takes_them():
    taken: list[Any] = []

    class Odd(games.Race):
        action_space = spaces.Box(np.float32([[-1], [0]]), np.float32([[1], [2]]))

        def step(self, first: Any, second: Any) -> Any:
            taken.append((first, second))
            return super().step(first[0], second[0])

    env: Any = SelfPlayEnv(Odd(), swap_seats=False)
    assert env.action_space.low.tolist() == [-1, 0, -1, 0, 0]
    play(env, [(0.5, 1.5, -0.5, 0.25, SELF)])
    assert [a.tolist() for a in taken[0]] == [[[0.5], [1.5]], [[-0.5], [0.25]]]


def test_actions_of_float64_are_within_the_bounds_of_the_game():
    """What the learner sees are those of float32, which are a little further apart here."""
    taken: list[Any] = []

    class Exact(games.Race):
        action_space = spaces.Box(-0.3, 0.1, (1,), np.float64)

        def step(self, first: Any, second: Any) -> Any:
            taken.extend((first, second))
            return super().step(first, second)

    env: Any = SelfPlayEnv(Exact(), swap_seats=False)
    assert env.action_space.high[0] > Exact.action_space.high[0]
    play(env, [[env.action_space.low[0], env.action_space.high[0], SELF]])
    assert [action.tolist() for action in taken] == [[-0.3], [0.1]]
    assert all(Exact.action_space.contains(action) for action in taken)


@pytest.mark.parametrize("space", [spaces.MultiBinary(2), spaces.Box(0, 255, (2,), np.uint8)])
def test_other_actions_are_refused(space: Any):
    game = games.Race()
    game.action_space = space  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"^self-play does not do with the action space .*\n  supported: Box of floats"):
        SelfPlayEnv(game)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"^there is no opponent 'stone'\n  there are: rock, anything, self"):
        games.matching(opponent="stone")
    with pytest.raises(EnvError, match=r"does not have\n  name these in selfplay\.bots: rock, anything"):
        play(games.matching(), [(0, 0, bot_code("stone"))])


# -- PettingZoo --------------------------------------------------------------------------------------------------------


def test_a_parallel_environment_is_a_game():
    parallel_api_test(games.ParallelRace(), num_cycles=50)
    env, actions = games.parallel_race(), [(1, 0.5, SELF)] * 20
    shown = play(env, actions)
    assert shown[-1][2]
    assert shown[-1][-1]["winner"] == 1
    assert plain(shown[-1][0])["outcome"] == 1
    same = play(games.race(swap_seats=False), actions)
    assert [plain(obs) for obs, *_ in shown] == [plain(obs) for obs, *_ in same]
    assert [reward for _, reward, *_ in shown] == [reward for _, reward, *_ in same]


def test_a_parallel_environment_that_is_not_for_two_of_a_kind_is_refused():
    crowd = games.ParallelRace()
    crowd.possible_agents = ["red", "blue", "green"]
    with pytest.raises(ConfigError, match=r"^self-play is for two: ParallelRace has the agents red, blue, green"):
        ParallelGame(crowd)

    class Unlike(games.ParallelRace):
        def action_space(self, agent: str) -> Any:
            return spaces.Discrete(2 if agent == "red" else 3)

    with pytest.raises(ConfigError, match=r"the same action_space\n  red has Discrete\(2\), blue has Discrete\(3\)"):
        ParallelGame(Unlike())


# -- hockey ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"frame_skip": 3, "shaping": 0.5, "reward": "outcome"}, {"discrete": True}, {"mode": "TRAIN_SHOOTING"}],
)
def test_hockey_is_the_game_it_was(settings: dict[str, Any]):
    """From the same start against the same bot, a game with and without self-play goes the same way."""
    alone: Any = HockeyEnv("strong", **settings)
    env: Any = hockey("strong", swap_seats=False, **settings)
    env.reset(seed=3)
    alone.reset(seed=3)
    alone.game.reset(np.random.default_rng(5), 0)
    env.game._game.reset(np.random.default_rng(5), 0)
    alone._rival, twin = (Chaser(10.0, np.random.default_rng(5)) for _ in range(2))
    env._bot = lambda _: twin
    if settings.get("shaping"):
        for shaping in (alone._shaping, env.game._shaping[0]):
            shaping.begin(alone.game.observe(0))
    rng, ends = np.random.default_rng(0), [False]
    for _ in range(300):
        own = int(rng.integers(8)) if settings.get("discrete") else rng.uniform(-1, 1, 4).astype(np.float32)
        joint = np.append(np.append(own, np.zeros_like(own)), 0)
        obs, reward, *ends, _ = alone.step(own)
        seen, paid, *over, info = env.step(joint)
        assert np.array_equal(obs, seen["own"])
        assert (paid, over) == (pytest.approx(reward), ends)
        if any(ends):
            assert seen["outcome"] == info["winner"]
            break
    assert any(ends)


def test_hockey_draws_one_of_several_modes():
    env: Any = hockey(mode=["NORMAL", "TRAIN_DEFENSE"])
    drawn: list[str] = []
    for seed in [*range(10), *range(10)]:
        env.reset(seed=seed)
        drawn.append(env.game._game.mode)
    assert drawn[:10] == drawn[10:]
    assert set(drawn) == {"NORMAL", "TRAIN_DEFENSE"}
    for wrong, words in (({"mode": []}, "mode is empty"), ({"reward": "x"}, "no reward 'x'"), ({"frame_skip": 0}, "= 0")):
        with pytest.raises(ConfigError, match=words):
            hockey(**wrong)  # type: ignore[arg-type]


def test_hockey_can_be_drawn():
    env = hockey(render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (480, 600, 3)
    assert "rgb_array" in env.metadata["render_modes"]
    env.close()
