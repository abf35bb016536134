"""Self-play on hockey as it comes with aiorl: the preset, what is refused before it starts, a short run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import aiorl
from aiorl import cli
from aiorl.cli.parse import Request, read_train
from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.preflight import check

GAME = "aiorl.envs.hockey.selfplay:hockey"


def asked(*words: str) -> Config:
    request = read_train(["hockey", "--algo", "selfplay", *words])
    assert isinstance(request, Request)
    return request.config


# -- the preset --------------------------------------------------------------------------------------------------------


def test_one_command_trains_by_self_play():
    config = asked()
    assert config.env == GAME
    assert config.to_dict() == Config.preset("hockey", "selfplay").to_dict()
    plays = config.algorithm
    assert (plays.algo, plays.matchmaking) == ("sac", "hard")
    assert plays.bots.keys() == {"weak", "strong"}
    assert plays.admit_win_rate > 0
    assert plays.pool > 1
    assert sum(plays.bots.values()) + plays.self_share < 1, "nothing is left for the pool"


def test_what_learns_is_set_as_without_self_play():
    plays, alone = Config.preset("hockey", "selfplay"), Config.preset("hockey", "sac")
    assert plays.algorithm.algorithm == alone.algorithm
    assert {**plays.env_kwargs, "opponent": ["weak", "strong"]} == alone.env_kwargs
    for field in ("total_steps", "envs", "segment_length", "eval_every", "eval_episodes", "eval_top"):
        assert getattr(plays, field) == getattr(alone, field)
    assert list(plays.eval_suites) == list(alone.eval_suites)


def test_parts_of_it_can_be_changed():
    config = asked("--selfplay.inner", "hidden=[8]", "--selfplay.bots", "random=0.1", "--selfplay.pool", "2")
    assert config.algorithm.algorithm == Config.preset("hockey", "sac", sac={"hidden": (8,)}).algorithm
    assert config.algorithm.bots == {"weak": 0.2, "strong": 0.2, "random": 0.1}
    assert config == Config.preset("hockey", "selfplay", selfplay={
        "inner": {"hidden": [8]}, "bots": {"random": 0.1}, "pool": 2,
    })  # fmt: skip


def test_another_algorithm_within_takes_what_it_has_too(tmp_path: Path):
    wanted = Config.preset("hockey", "td3").algorithm
    (tmp_path / "a.toml").write_text('algo = "selfplay"\n[selfplay]\nalgo = "td3"\n')
    for config in (
        asked("--selfplay.algo", "td3"),
        asked("--config", str(tmp_path / "a.toml")),
        Config.preset("hockey", "selfplay", selfplay={"algo": "td3"}),
    ):
        assert config.algorithm.algorithm == aiorl.TD3(
            **{name: getattr(wanted, name) for name in wanted.__struct_fields__ if name != "noise"}
        )


def test_without_the_preset_hockey_is_for_one(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "hockey", "--algo", "selfplay", "--no-preset"]) == 2
    assert "selfplay needs a game for two" in capsys.readouterr().err


# -- what is refused before it starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "changes", "words"),
    [
        ({"capacity": 100}, {}, "{}.capacity = 100, but {}.warmup is 1,000: some would be overwritten"),
        ({"capacity": 200, "warmup": 10}, {"envs": 64}, "{}.capacity = 200, but a rollout has 512 env steps"),
        ({"warmup": 5_000}, {}, "{}.warmup = 5,000: the run ends after 5,000 env steps"),
        ({"capacity": 100}, {"warmup": 2_000}, "{}.capacity = 100, but warmup is 2,000"),
        ({}, {"total_steps": 200_000, "memory_gb": 2**-9}, "{}.capacity = 1,000,000: 200,000 transitions and their copy"),
    ],
)
def test_the_learner_within_is_looked_at_like_any_other(
    tmp_path: Path, learner: dict[str, Any], changes: dict[str, Any], words: str
):
    inner = aiorl.SAC(**learner)
    fields: dict[str, Any] = {"total_steps": 5_000, "workers": 0, "envs": 4, "out": str(tmp_path / "run"), **changes}
    texts: list[str] = []
    for env, algo in (("Pendulum-v1", inner), ("games:race", aiorl.SelfPlay.of(inner))):
        with pytest.raises(ConfigError) as caught:
            check(Config(env=env, algo=algo, **fields), write=False)
        texts.append(str(caught.value))
    alone, within = texts
    assert words.replace("{}", "sac") in alone
    assert words.replace("{}", "selfplay.inner") in within
    assert len(within.splitlines()) <= 3


def test_a_bot_that_the_game_does_not_have(tmp_path: Path):
    for bots, words in (
        ({"strolling": 0.1}, "'strolling' — did you mean stroller?"),
        ({"still": 0.1, "x": 0.1}, "'x'"),
    ):
        config = Config(env="games:race", algo=aiorl.SelfPlay(bots=bots), workers=0, out=str(tmp_path / "run"))
        with pytest.raises(ConfigError) as caught:
            check(config, write=False)
        assert str(caught.value) == f"selfplay.bots: games:race has no bot {words}\n  it has: stroller, still"


def test_a_learner_without_a_buffer_is_not_asked_for_one(tmp_path: Path):
    algo = aiorl.SelfPlay.of(aiorl.PPO(minibatches=2))
    config = Config(env="games:race", algo=algo, workers=0, memory_gb=0.1, out=str(tmp_path / "run"))
    assert check(config, write=False).algorithm == algo


def test_the_experience_of_one_side_is_what_is_counted(tmp_path: Path):
    """The other side's observations are not kept."""
    config = Config.preset("hockey", "selfplay", workers=0, out=str(tmp_path / "run"))
    checked = check(config, write=False)
    learner, spaces, _ = config.algorithm.within(checked.spaces)
    alone = check(Config.preset("hockey", "sac", workers=0, out=str(tmp_path / "run")), write=False).spaces
    sizes = [learner.experience_bytes(seen, 16, 1_000_000) for seen in (spaces, alone, checked.spaces)]
    assert sizes[0] == sizes[1] < sizes[2]


# -- a short run -------------------------------------------------------------------------------------------------------


async def test_the_whole_system_is_exact_and_leaves_its_standings(tmp_path: Path):
    """Which process played which game, bots and snapshots, leaves no trace."""
    found: set[str] = set()
    for workers in (0, 2):
        config = Config.preset(
            "hockey", "selfplay", total_steps=2_048, envs=4, workers=workers, eval_every=0, eval_episodes=2, eval_top=0,
            checkpoint_every=0, off_policy_degree=1, out=str(tmp_path / str(workers)),
            selfplay={
                "inner": {"warmup": 512, "random_steps": 512, "hidden": [8], "batch_size": 32}, "admit_every": 2,
                "admit_games": 1, "admit_win_rate": 0.3, "pool": 2, "bots": {"weak": 0.1, "strong": 0.1},
            },
        )  # fmt: skip
        result = await aiorl.train(config)
        assert result.gradient_steps > 0
        assert [record.suite for record in result.evaluations] == ["weak", "strong", "shooting"]
        assert all(record.wins is not None for record in result.evaluations)
        found.add(result.params_sha256)
    assert len(found) == 1
    told = [json.loads((tmp_path / workers / "standings.json").read_text()) for workers in ("0", "2")]
    assert told[0] == told[1]
    assert told[0]["opponents"][:3] == ["self", "weak", "strong"]
    assert len(told[0]["players"]) > 2, "nobody was admitted"
