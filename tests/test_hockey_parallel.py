"""Hockey for two players, through PettingZoo."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("pettingzoo")

from pettingzoo.test import parallel_api_test, parallel_seed_test

from aiorl.envs.hockey.env import HockeyEnv
from aiorl.envs.hockey.parallel import PLAYERS, HockeyParallelEnv
from aiorl.envs.hockey.rules import MODES
from aiorl.errors import ConfigError

ONE, TWO = PLAYERS
Actions = dict[str, Any]


@pytest.mark.parametrize("kwargs", [{}, {"keep_mode": False}, {"discrete": True}, {"mode": "TRAIN_DEFENSE"}], ids=str)
def test_pettingzoo_finds_nothing_wrong(kwargs: dict[str, Any]):
    parallel_api_test(HockeyParallelEnv(**kwargs), num_cycles=600)


def test_seeds_repeat_games():
    parallel_seed_test(HockeyParallelEnv, num_cycles=300)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_player_sees_what_it_sees_against_a_bot(mode: str):
    """The same game through both environments, against an opponent that does nothing."""
    single, parallel = HockeyEnv("still", mode), HockeyParallelEnv(mode)
    chance = np.random.default_rng(0)
    for seed in range(3):
        obs, info = single.reset(seed=seed)
        seen, infos = parallel.reset(seed)
        over = False
        while not over:
            np.testing.assert_array_equal(obs, seen[ONE])
            assert info == infos[ONE]
            action = chance.uniform(-1, 1, 4).astype(np.float32)
            obs, reward, terminated, truncated, info = single.step(action)
            seen, rewards, ends, cuts, infos = parallel.step({ONE: action, TWO: np.zeros(4, np.float32)})
            assert (rewards[ONE], ends[ONE], cuts[ONE]) == (reward, terminated, truncated)
            over = terminated or truncated
        assert parallel.agents == []


def test_both_players_see_a_goal_from_their_side():
    env = HockeyParallelEnv("TRAIN_DEFENSE")
    still: Actions = {ONE: np.zeros(4, np.float32), TWO: np.zeros(4, np.float32)}
    ended: set[int] = set()
    for seed in range(30):
        env.reset(seed)
        while env.agents:
            _, rewards, ends, cuts, infos = env.step(still)
        winner = infos[ONE]["winner"]
        assert infos[TWO]["winner"] == -winner
        assert set(ends.values()) == {winner != 0}
        assert set(cuts.values()) == {winner == 0}
        assert rewards[ONE] == pytest.approx(10 * winner + infos[ONE]["reward_closeness_to_puck"])
        assert rewards[TWO] == pytest.approx(-10 * winner + infos[TWO]["reward_closeness_to_puck"])
        ended.add(winner)
    assert {0, -1} <= ended


def test_observations_are_mirrored():
    seen, _ = HockeyParallelEnv().reset(seed=0)
    signs = np.array([-1, -1, 1, -1, -1, 1], np.float32)
    np.testing.assert_array_equal(seen[TWO][:6], signs * seen[ONE][6:12])
    np.testing.assert_array_equal(seen[TWO][6:12], signs * seen[ONE][:6])
    np.testing.assert_array_equal(seen[TWO][12:16], -seen[ONE][12:16])


def test_spaces():
    env = HockeyParallelEnv(discrete=True, keep_mode=False)
    assert env.possible_agents == [ONE, TWO]
    for player in PLAYERS:
        assert env.observation_space(player) is env.observation_space(player)
        assert env.observation_space(player).shape == (16,)
        assert env.action_space(player) == gymnasium.spaces.Discrete(7)


def test_each_game_draws_one_of_several_modes():
    env, alone = HockeyParallelEnv(["NORMAL", "TRAIN_DEFENSE"]), HockeyParallelEnv(("NORMAL",))
    drawn: list[str] = []
    for seed in [*range(10), *range(10)]:
        env.reset(seed)
        drawn.append(env.game.mode)
        np.testing.assert_array_equal(alone.reset(seed)[0][ONE], HockeyParallelEnv().reset(seed)[0][ONE])
    assert drawn[:10] == drawn[10:]
    assert set(drawn) == {"NORMAL", "TRAIN_DEFENSE"}
    with pytest.raises(ConfigError, match="no mode 'EASY'"):
        HockeyParallelEnv(["NORMAL", "EASY"])
    with pytest.raises(ConfigError, match="mode is empty"):
        HockeyParallelEnv([])


def test_drawing():
    env = HockeyParallelEnv(render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame is not None
    assert frame.shape == (480, 600, 3)
    env.close()
    with pytest.raises(ConfigError, match="no render mode 'ansi'"):
        HockeyParallelEnv(render_mode="ansi")
