"""Hockey as users meet it: through gymnasium, through aiorl, and drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

import aiorl
from aiorl.cli import envs as envs_command
from aiorl.envs.hockey import ID
from aiorl.envs.hockey.bots import BOTS
from aiorl.envs.hockey.env import HockeyEnv
from aiorl.envs.hockey.rules import MODES
from aiorl.envs.make import make_env
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError
from aiorl.testing import check_env
from bench import hockey_env

STILL = np.zeros(4, np.float32)


def record(env: HockeyEnv, seed: int, actions: list[Any]) -> list[Any]:
    """Everything an episode shows, as far as it goes."""
    obs, info = env.reset(seed=seed)
    seen: list[Any] = [(obs.tobytes(), info)]
    for action in actions:
        obs, *rest = env.step(action)
        seen.append((obs.tobytes(), *rest))
        if rest[1] or rest[2]:
            break
    return seen


@pytest.mark.filterwarnings("ignore:.*Box observation space")
@pytest.mark.parametrize(
    "kwargs", [{}, {"keep_mode": False}, {"discrete": True}, {"mode": "TRAIN_DEFENSE", "opponent": "strong"}], ids=str
)
def test_gymnasium_finds_nothing_wrong(kwargs: dict[str, Any]):
    gymnasium_check(gymnasium.make(ID, **kwargs).unwrapped, skip_render_check=True)


def test_aiorl_finds_nothing_wrong():
    """Among much else: an open episode is brought back exactly in another process by replaying its actions."""
    assert [f for f in check_env("hockey", opponent="strong") if f.severity in ("error", "warning")] == []


@pytest.mark.parametrize("opponent", BOTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_seed_and_the_actions_repeat_an_episode(mode: str, opponent: str):
    used, fresh = HockeyEnv(opponent, mode), HockeyEnv(opponent, mode)
    actions = list(np.random.default_rng(1).uniform(-1, 1, (150, 4)).astype(np.float32))
    first = record(used, 5, actions)
    record(used, 6, actions)
    used.reset()  # another one, left open
    assert record(used, 5, actions) == first == record(fresh, 5, actions)
    assert record(used, 6, actions) != first


def test_a_seed_decides_who_starts_and_other_resets_take_turns():
    env = HockeyEnv()

    def starter(**how: Any) -> int:
        return 1 if env.reset(**how)[0][12] < 0 else 2

    assert {starter(seed=seed) for seed in range(10)} == {1, 2}
    first = starter(seed=3)
    assert [starter() for _ in range(4)] == [3 - first, first, 3 - first, first]
    assert [starter(options={"starter": i}) for i in (1, 1, 2, 2)] == [1, 1, 2, 2]


@pytest.mark.parametrize("mode", MODES)
def test_the_time_limit_truncates(mode: str):
    env = HockeyEnv("still", mode)
    ends: set[tuple[bool, bool]] = set()
    for seed in range(30):
        env.reset(seed=seed)
        terminated = truncated = False
        while not (terminated or truncated):
            _, reward, terminated, truncated, info = env.step(STILL)
        assert truncated == (info["winner"] == 0)
        assert terminated == (info["winner"] != 0)
        assert not truncated or env.game.steps == MODES[mode]
        assert reward == pytest.approx(10 * info["winner"] + info["reward_closeness_to_puck"])
        ends.add((terminated, truncated))
    assert (False, True) in ends
    assert mode != "TRAIN_DEFENSE" or (True, False) in ends


def test_spaces_and_what_is_seen():
    for kwargs, observations, actions in (({}, 18, 4), ({"keep_mode": False}, 16, 3)):
        env = gymnasium.make(ID, **kwargs)
        assert env.observation_space.shape == (observations,)
        assert env.action_space == gymnasium.spaces.Box(-1, 1, (actions,), np.float32)
        obs, info = env.reset(seed=0)
        assert obs.dtype == np.float32
        assert set(info) == {"winner", "reward_closeness_to_puck", "reward_touch_puck", "reward_puck_direction"}


def test_discrete_actions():
    env = HockeyEnv("still", discrete=True)
    assert env.action_space == gymnasium.spaces.Discrete(8)
    assert HockeyEnv(discrete=True, keep_mode=False).action_space == gymnasium.spaces.Discrete(7)
    moved: list[np.ndarray[Any, Any]] = []
    for action in range(8):
        env.reset(seed=0)
        moved.append(np.sign(env.step(action)[0][3:6]).round())
    along_x, along_y, turned = ([1, 0, 0], [0, 1, 0], [0, 0, 1])
    expected = [[0] * 3] + [[sign * v for v in way] for way in (along_x, along_y, turned) for sign in (-1, 1)] + [[0] * 3]
    assert np.array(moved).tolist() == expected


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"opponent": "Weak"}, r"no opponent 'Weak'\n  it has: weak, strong, still, random"),
        ({"mode": "SHOOTING"}, r"no mode 'SHOOTING'\n  it has: NORMAL"),
        ({"render_mode": "ansi"}, r"no render mode 'ansi'\n  it has: rgb_array, human"),
    ],
)
def test_arguments_that_do_not_exist(kwargs: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        HockeyEnv(**kwargs)


def test_a_starter_that_does_not_exist():
    with pytest.raises(ConfigError, match="starter expected 1 or 2, got 0"):
        HockeyEnv().reset(options={"starter": 0})


# -- found by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hockey", ID, f"aiorl.envs.hockey:{ID}"])
def test_it_is_found_by_name(name: str):
    env = make_env(resolve_env(name, {"opponent": "strong"}, in_process=False))
    assert isinstance(env.unwrapped, HockeyEnv)


def test_wrong_names_and_arguments_get_a_hint():
    with pytest.raises(ConfigError, match=r"no version 7 of aiorl/Hockey — did you mean aiorl/Hockey-v0\?"):
        resolve_env("aiorl/Hockey-v7", in_process=False)
    with pytest.raises(ConfigError, match=r"takes no argument 'oponent' — did you mean 'opponent'\?"):
        resolve_env("hockey", {"oponent": "weak"}, in_process=False)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "Box2D" else real(name, package)
    )
    with pytest.raises(ConfigError, match=r'needs Box2D, which is not installed\n  pip install "aiorl\[hockey\]"'):
        resolve_env("hockey", in_process=False)


def test_it_is_listed(capsys: pytest.CaptureFixture[str]):
    assert envs_command.main(["hockey"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]  # columns are as wide as what else is installed
    assert ["aiorl/Hockey-v0", "box", "18", "float32", "box", "4", "float32"] in [row[:7] for row in rows]


async def test_it_is_trained_on(tmp_path: Path):
    config = aiorl.Config(
        env="hockey", env_kwargs={"mode": "TRAIN_SHOOTING"}, algo=aiorl.PPO(epochs=1), total_steps=512, envs=4, workers=0,
        segment_length=64, eval_every=0, eval_episodes=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    result = await aiorl.train(config)
    assert (result.status, result.env_steps) == ("completed", 512)
    assert result.episodes >= 4


# -- drawn --------------------------------------------------------------------------------------------------------------


def test_a_frame_shows_what_is_where():
    env = gymnasium.make(ID, opponent="still", render_mode="rgb_array")
    obs, _ = env.reset(seed=0, options={"starter": 1})
    frame: Any = env.render()
    assert (frame.shape, frame.dtype) == ((480, 600, 3), np.uint8)

    def colour(x: float, y: float) -> tuple[int, ...]:
        return tuple(frame[round(240 - 60 * y), round(300 + 60 * x)])

    puck, ice = colour(obs[12], obs[13]), colour(1.0, -2.5)
    left, right = colour(obs[0] - 0.1, obs[1]), colour(obs[6] + 0.1, obs[7])
    assert len({puck, ice, left, right}) == 4
    assert left[0] > left[2]  # red against blue
    assert right[2] > right[0]
    env.step(np.array([0, 1, 0, 0], np.float32))
    for _ in range(20):
        obs = env.step(np.array([0, 1, 0, 0], np.float32))[0]
    frame = env.render()
    assert colour(obs[0] - 0.1, obs[1]) == left
    env.close()


def test_a_window():
    env = HockeyEnv(render_mode="human")
    env.reset(seed=0)
    for _ in range(3):
        env.step(STILL)
    assert env.render() is None
    env.close()
    env.close()


# -- measured -----------------------------------------------------------------------------------------------------------


def test_the_bench_program_measures():
    assert hockey_env.calibration() > 0
    (rate,) = hockey_env.steps_per_second(0.1, opponent="weak")
    assert rate > 0
    row = hockey_env.play("TRAIN_SHOOTING", "random", "still", games=5)
    assert "TRAIN_SHOOTING random still" in hockey_env.show(hockey_env.REFERENCE[6], row)


@pytest.mark.long
def test_it_is_fast_enough():
    assert max(hockey_env.steps_per_second(3.0, opponent="weak")) >= hockey_env.GOAL
