"""Atari, MinAtar and MiniGrid by id: what they show, and that an episode depends on nothing but its seed and actions."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiorl.envs.make import Probe, make_env, make_vector, probe
from aiorl.envs.spec import installed, resolve_env
from aiorl.errors import ConfigError
from aiorl.segments import Array

IDS = ["ALE/Pong-v5", "MinAtar/Breakout-v1", "MiniGrid-Empty-Random-6x6-v0", "BabyAI-GoToObj-v0"]


def look(env: str, k: int = 1, n: int = 2, native: bool = True, **kwargs: Any) -> Probe:
    return probe(resolve_env(env, kwargs, in_process=False, native=native, frame_stack=k), n)


@pytest.mark.parametrize(
    ("env", "kwargs", "shape", "dtype", "actions"),
    [
        ("ALE/Pong-v5", {}, (84, 84), "uint8", 6),
        ("ALE/Pong-v5", {"screen_size": 42, "grayscale_obs": False}, (42, 42, 3), "uint8", 6),
        ("ALE/Pong-v5", {"raw": True, "full_action_space": True}, (210, 160, 3), "uint8", 18),
        ("MinAtar/Breakout-v1", {}, (10, 10, 4), "bool", 3),
        ("MinAtar/Asterix-v1", {}, (10, 10, 4), "bool", 5),
        ("MiniGrid-Empty-Random-6x6-v0", {}, (7, 7, 3), "uint8", 7),
    ],
)
def test_what_they_show(env: str, kwargs: dict[str, Any], shape: tuple[int, ...], dtype: str, actions: int) -> None:
    found = look(env, **kwargs)
    (leaf,) = found.spaces.observation
    assert (leaf.shape, leaf.dtype, found.spaces.action.nvec) == (shape, dtype, (actions,))
    assert (found.native, found.exact) == (False, True)
    assert leaf.is_image == env.startswith("ALE"), "bytes of MiniGrid are no brightness"


def play(env: Any, seed: int, steps: int = 40) -> list[Array]:
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    seen = [np.array(obs)]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(rng.integers(env.action_space.n))
        seen += [np.array(obs), np.array(reward)]
        if terminated or truncated:
            break
    return seen


@pytest.mark.parametrize("env", IDS)
def test_an_episode_depends_on_its_seed_and_actions_alone(env: str) -> None:
    spec = look(env).spec
    used, fresh = make_env(spec), make_env(spec)
    for seed in (4, 5, 6):
        play(used, seed)
    again, first = play(used, 9), play(fresh, 9)
    assert len(again) == len(first)
    assert all(np.array_equal(a, b) for a, b in zip(again, first, strict=True))
    used.close()
    fresh.close()


@pytest.mark.parametrize("vector", [False, True])
def test_single_frames_of_a_game_are_warned_of(vector: bool) -> None:
    (told,) = look("ALE/Breakout-v5", vector=vector).warnings
    assert "frame_stack = 4" in told
    assert look("ALE/Breakout-v5", 4, vector=vector).warnings == look("MinAtar/Breakout-v1").warnings == ()


def test_rewards_are_clipped_if_asked_for() -> None:
    env: Any = make_env(look("ALE/MsPacman-v5", clip_rewards=True).spec)
    plain: Any = make_env(look("ALE/MsPacman-v5").spec)
    rewards, clipped = ({float(r) for r in play(e, 1, 120)[2::2]} for e in (plain, env))
    assert max(rewards) > 1
    assert clipped <= {-1.0, 0.0, 1.0}
    env.close()
    plain.close()


def test_the_vector_of_ale() -> None:
    found = look("ALE/Pong-v5", 4, vector=True)
    single = look("ALE/Pong-v5", 4)
    assert found.spaces == single.spaces
    assert found.native
    assert "cannot be captured" in found.why_inexact
    env = make_vector(found.spec, 2)
    obs, _ = env.reset(seed=[3, 4])
    assert (obs[:, 0] == obs[:, 3]).all(), "the first frame is repeated, as in replay"
    again, *_ = env.step(np.array([0, 0]))
    assert (again[:, :3] == obs[:, 1:]).all()
    env.close()
    assert not look("ALE/Pong-v5", 4, native=False, vector=True).native, "what plays alone needs no vector"


@pytest.mark.parametrize(
    ("env", "module", "expected"),
    [
        ("ALE/Pong-v5", "ale_py", r'ALE/Pong-v5 needs ale_py, .*\n  pip install "aiorl\[atari\]" \(ale-py is GPL-2.0\)'),
        ("ALE/Pong-v5", "cv2", r'ALE/Pong-v5 needs cv2, .*\n  pip install "aiorl\[atari\]"'),
        ("MinAtar/Breakout-v1", "minatar", r'needs minatar, .*\n  pip install "aiorl\[minatar\]" \(MinAtar is GPL-3.0\)'),
        ("MiniGrid-Empty-5x5-v0", "minigrid", r'needs minigrid, .*\n  pip install "aiorl\[minigrid\]"$'),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, env: str, module: str, expected: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: None if name == module else real(name, *package))
    with pytest.raises(ConfigError, match=expected) as error:
        resolve_env(env, in_process=True)
    assert len(str(error.value).splitlines()) <= 3


def test_every_extra_is_in_the_table_of_extras() -> None:
    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (root / "docs/environments.md").read_text(encoding="utf-8").partition("## Extras")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == sorted(extras)
    for extra, licence in {"atari": "GPL-2.0", "minatar": "GPL-3.0"}.items():
        assert re.search(rf"^\| `{extra}` .*{licence}", table, re.MULTILINE)


def test_an_unknown_game_or_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean MinAtar/Breakout-v1"):
        resolve_env("MinAtar/Brakout-v1", in_process=True)
    with pytest.raises(ConfigError, match="takes no argument 'noopmax'"):
        resolve_env("ALE/Pong-v5", {"noopmax": 3}, in_process=True)
    with pytest.raises(ConfigError, match="leave out raw, or vector"):
        look("ALE/Pong-v5", vector=True, raw=True)


def test_all_that_is_installed_is_listed() -> None:
    assert {*IDS, "aiorl/Hockey-v0", "CartPole-v1"} <= set(installed())


@pytest.mark.parametrize("env", ["Pong-v4", "PongNoFrameskip-v4", "PongDeterministic-v0", "Pong-ram-v4", "Pong"])
def test_old_ids_of_atari_games_give_way_to_todays(env: str) -> None:
    """ale_py registers some of them, to make the raw game; that is asked for by its name."""
    for _ in range(2):  # whether or not ale_py has been imported
        with pytest.raises(ConfigError, match=rf"unknown environment '{env}' — did you mean ALE/Pong-v5\?"):
            resolve_env(env, in_process=True)
        assert env not in installed()
    assert look("ale_py:Pong-v4").spaces.observation[0].shape == (210, 160, 3)
