"""What training on hockey adds to the game: shaping, repeated actions, mixtures, and how games end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiorl
from aiorl import cli
from aiorl.envs.hockey.bots import BOTS
from aiorl.envs.hockey.env import HockeyEnv
from aiorl.envs.hockey.rules import MODES
from aiorl.envs.hockey.selfplay import hockey
from aiorl.envs.hockey.shaping import Shaping, potential
from aiorl.errors import ConfigError
from aiorl.testing import check_env

ACTIONS = np.random.default_rng(1).uniform(-1, 1, (250, 4)).astype(np.float32)

Play = tuple[list[Any], list[float], bool, list[dict[str, Any]]]


def play(env: HockeyEnv, seed: int) -> Play:
    """A whole game as a bot plays it: (observations, rewards, whether it terminated, infos)."""
    act = BOTS["weak"](np.random.default_rng(seed))
    obs, info = env.reset(seed=seed)
    seen, rewards, infos = [obs], [], [info]
    terminated = truncated = False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = env.step(act(obs))
        seen.append(obs)
        rewards.append(reward)
        infos.append(info)
    return seen, rewards, terminated, infos


# -- shaping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_skip", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_discounted_sum_is_the_potential_at_the_end_less_that_at_the_start(mode: str, frame_skip: int):
    """And the end of a game that is over counts as 0, of one that is cut off by time as what it is."""
    weight, gamma = 3.0, 0.95
    plain = HockeyEnv("weak", mode, frame_skip=frame_skip)
    shaped = HockeyEnv("weak", mode, frame_skip=frame_skip, shaping=weight, shaping_gamma=gamma)
    ends: set[bool] = set()
    for seed in range(20):
        seen, rewards, _, _ = play(plain, seed)
        same, more, terminated, _ = play(shaped, seed)
        assert [obs.tobytes() for obs in same] == [obs.tobytes() for obs in seen]
        extra = np.array(more) - rewards
        last = 0.0 if terminated else weight * potential(seen[-1].tolist())
        expected = gamma ** len(extra) * last - weight * potential(seen[0].tolist())
        assert np.sum(extra * gamma ** np.arange(len(extra))) == pytest.approx(expected, abs=1e-4)
        ends.add(terminated)
    assert ends == {False, True}


@given(
    potentials=st.lists(st.tuples(*[st.floats(-4, 4)] * 4), min_size=2, max_size=30),
    gamma=st.floats(0, 1),
    terminated=st.booleans(),
)
def test_it_telescopes_for_any_path(potentials: list[tuple[float, ...]], gamma: float, terminated: bool):
    path = [[x, y, *[0.0] * 10, px, py] for x, y, px, py in potentials]
    shaping = Shaping(1.0, gamma)
    shaping.begin(path[0])
    last = len(path) - 1
    total = sum(gamma ** (t - 1) * shaping.step(path[t], terminated and t == last) for t in range(1, len(path)))
    end = 0.0 if terminated else gamma**last * potential(path[-1])
    assert total == pytest.approx(end - potential(path[0]), abs=1e-9)


def test_the_potential_rises_towards_the_puck_and_with_the_puck_towards_the_goal():
    def at(x: float, y: float, puck_x: float, puck_y: float) -> float:
        return potential([x, y, *[0.0] * 10, puck_x, puck_y])

    assert at(-3, 0, -1, 0) < at(-2, 0, -1, 0) < at(-1, 0, -1, 0)
    assert at(-1, 0, -1, 0) < at(-0.5, 0, 1, 0) < at(-0.5, 0, 4, 0) < at(-0.5, 0, 5, 0) <= 0
    assert at(-0.5, 1, 3, 1) > at(-0.5, -1, 3, 1), "before a puck that is out of reach"
    assert min(at(x, y, -x, -y) for x in (-4, 4) for y in (-3, 3)) >= -2


# -- repeated actions ---------------------------------------------------------------------------------------------------


def test_a_repeated_action_is_many_steps_of_the_game():
    once, thrice = HockeyEnv("strong"), HockeyEnv("strong", frame_skip=3)
    for seed in range(10):
        now, _ = once.reset(seed=seed)
        then, _ = thrice.reset(seed=seed)
        over, steps = False, 0
        while not over:
            assert now.tobytes() == then.tobytes()
            then, expected, *ends, _ = thrice.step(ACTIONS[steps])
            reward, taken, seen = 0.0, 0, (False, False)
            while taken < 3 and not any(seen):
                now, earned, *seen, _ = once.step(ACTIONS[steps])
                reward, taken = reward + earned, taken + 1
            assert (ends, expected) == ([*seen], reward)
            over, steps = any(ends), steps + 1
        assert thrice.game.steps == once.game.steps
        assert steps == -(-once.game.steps // 3)


# -- mixtures -----------------------------------------------------------------------------------------------------------


def test_each_game_draws_its_mode_and_its_opponent():
    env = HockeyEnv(["weak", "still"], ["NORMAL", "TRAIN_SHOOTING", "TRAIN_SHOOTING"])
    modes: Counter[str] = Counter()
    for seed in range(300):
        env.reset(seed=seed)
        modes[env.game.mode] += 1
    assert 0.58 < modes["TRAIN_SHOOTING"] / 300 < 0.75, "twice named, twice as often"
    again = HockeyEnv(["weak", "still"], ["NORMAL", "TRAIN_SHOOTING", "TRAIN_SHOOTING"])
    for seed in range(20):
        one, other = play(env, seed), play(again, seed)
        assert one[1:] == other[1:]


def test_opponents_that_are_drawn_play_differently():
    mixed, strong, still = HockeyEnv(["strong", "still"]), HockeyEnv("strong"), HockeyEnv("still")
    moves = {name: env for name, env in (("strong", strong), ("still", still))}
    found: Counter[str] = Counter()
    for seed in range(40):
        mixed.reset(seed=seed)
        found["strong" if np.abs(mixed.step(ACTIONS[0])[0][9:12]).sum() else "still"] += 1
    assert set(found) == set(moves)
    assert min(found.values()) >= 8


def test_nothing_is_drawn_where_there_is_no_choice():
    """So that the games of a seed are the same whether a list has one name or there is no list."""
    assert play(HockeyEnv(["weak"], ["NORMAL"]), 3)[1:] == play(HockeyEnv("weak", "NORMAL"), 3)[1:]


def test_aiorl_finds_nothing_wrong_with_all_of_it():
    kwargs = {"opponent": ["weak", "strong"], "mode": list(MODES), "frame_skip": 2, "shaping": 1.0}
    assert [f for f in check_env("hockey", **kwargs) if f.severity in ("error", "warning")] == []


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"opponent": ["weak", "best"]}, r"no opponent 'best'\n  it has: weak, strong"),
        ({"mode": ["NORMAL", "EASY"]}, r"no mode 'EASY'\n  it has: NORMAL"),
        ({"mode": []}, r"mode is empty\n  expected a name"),
        ({"frame_skip": 0}, r"frame_skip = 0: expected 1 or more"),
        ({"shaping": -1.0}, r"shaping = -1.0, shaping_gamma = 0.99\n  expected 0 or more"),
        ({"shaping_gamma": 1.5}, r"shaping_gamma = 1.5\n"),
        ({"reward": "win"}, r"no reward 'win'\n  it has: game, outcome"),
    ],
)
def test_arguments_that_do_not_exist(kwargs: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        HockeyEnv(**kwargs)
    if "opponent" not in kwargs:  # self-play has one alone, by name
        with pytest.raises(ConfigError, match=match):
            hockey(**kwargs)


# -- how games end ------------------------------------------------------------------------------------------------------


def test_the_last_info_tells_the_outcome_and_it_can_be_the_reward():
    game, outcome = HockeyEnv("weak", frame_skip=2), HockeyEnv("weak", frame_skip=2, reward="outcome")
    seen: set[float] = set()
    for seed in range(30):
        _, rewards, terminated, infos = play(game, seed)
        assert all("outcome" not in info for info in infos[:-1])
        ended = infos[-1]["outcome"]
        assert ended == infos[-1]["winner"]
        assert terminated == (ended != 0)
        assert play(outcome, seed)[1] == [0.0] * (len(rewards) - 1) + [ended]
        seen.add(ended)
    assert seen == {1.0, 0.0, -1.0}


async def test_evaluation_suites_tell_who_won(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Against each opponent, in the game as it is, whatever training does; and `best/` goes by the score."""
    config = aiorl.Config.preset(
        "hockey", "sac", total_steps=512, envs=4, workers=0, eval_episodes=10, eval_every=0, eval_top=0,
        out=str(tmp_path / "run"), sac={"warmup": 500, "hidden": (8,)},
    )  # fmt: skip
    result = await aiorl.train(config)
    by_suite = {record.suite: record for record in result.evaluations}
    assert list(by_suite) == ["weak", "strong", "shooting"]
    for record in by_suite.values():
        assert record.wins is not None
        assert record.losses is not None
        assert record.mean_return == pytest.approx(record.wins - record.losses)
        assert record.std_return**2 + record.mean_return**2 == pytest.approx(record.wins + record.losses)
    assert result.final_evaluation == by_suite["weak"]
    strong = by_suite["strong"]
    assert cli.main(["eval", str(tmp_path / "run"), "--suite", "strong", "--episodes", "10", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["wins"], again["losses"]) == (strong.wins, strong.losses)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["wins"] for e in events if e["event"] == "evaluated"] == [record.wins for record in result.evaluations]


async def test_the_training_system_is_exact(tmp_path: Path):
    """Mixtures, shaping and repeated actions leave no trace of which process played which game."""
    found: set[str] = set()
    for workers in (0, 2):
        config = aiorl.Config.preset(
            "hockey", "sac", total_steps=1_536, envs=4, workers=workers, eval_every=0, eval_suites={}, eval_episodes=1,
            eval_top=0, checkpoint_every=0, out=str(tmp_path / str(workers)),
            sac={"warmup": 512, "random_steps": 512, "hidden": (8,), "batch_size": 32},
        )  # fmt: skip
        result = await aiorl.train(config)
        assert result.gradient_steps > 0
        found.add(result.params_sha256)
    assert len(found) == 1
