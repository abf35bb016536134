"""`envs` and `algos`: what they tell is what `train` takes."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
from toys import Toy

from aiorl.algos import ALGORITHMS
from aiorl.cli import main
from aiorl.cli.parse import read_train
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError
from aiorl.presets import PRESETS


class LongName(Toy, frozen=True, kw_only=True):
    name: ClassVar[str] = "long_name"
    some_steps: int = 5

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError("it needs a Discrete action space")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "algo"),
    [("CartPole-v1", ""), ("Ant-v5", ""), ("ALE/Pong-v5", "dqn"), ("MinAtar/Breakout-v1", "dqn"), ("Hopper-v5", "sac")],
)
def test_the_command_that_is_suggested_has_a_preset_if_there_is_one(env: str, algo: str, capsys: pytest.CaptureFixture[str]):
    (command,) = re.findall(r"python -m aiorl train (.*)", printed(capsys, "envs", env))
    assert command == (f"{env} --algo {algo}" if algo else env)


def test_a_vector_that_has_to_be_asked_for_is_told(capsys: pytest.CaptureFixture[str]):
    assert "vector       one is taken if env_kwargs has vector = true" in printed(capsys, "envs", "ALE/Pong-v5")
    assert "vector       none of its own" in printed(capsys, "envs", "Acrobot-v1")


def test_environments_with_a_preset(capsys: pytest.CaptureFixture[str]):
    heading, *rows = printed(capsys, "envs", "--presets").splitlines()
    assert "presets" in heading
    assert {row.split()[0] for row in rows} == {env for _, env in PRESETS}
    (row,) = (row for row in rows if row.startswith("CartPole-v1"))
    assert "box 4 float32  discrete 2  dqn, ppo, qrdqn" in re.sub("  +", "  ", row)
    heading, *rows = printed(capsys, "envs", "pendulum", "--presets").splitlines()
    assert [row.split()[0] for row in rows] == ["Pendulum-v1"]
    assert main(["envs", "taxi", "--presets"]) == 2
    assert "no environment with a preset has 'taxi' in its id" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_names_the_environments_that_it_has_presets_for(algo: str, capsys: pytest.CaptureFixture[str]):
    text = re.sub(r"\s+", " ", printed(capsys, "algos", algo))
    assert f"presets {', '.join(env for name, env in PRESETS if name == algo)}" in text


def test_settings_are_those_that_train_takes(capsys: pytest.CaptureFixture[str]):
    name = f"{__name__}:LongName"
    text = printed(capsys, "algos", name)
    assert "presets     none" in text
    (flag,) = re.findall(r"--\S*some\S*", text)
    request = read_train(["CartPole-v1", "--algo", name, flag, "7"])
    assert not isinstance(request, str)
    assert request.config.algorithm.some_steps == 7
