"""The configuration: what it refuses and how it says so, and that a file of it makes the same run again."""

from __future__ import annotations

import functools
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from toys import Toy

import aiorl
from aiorl import presets
from aiorl.config import Config, auto_group_size, usable_cores
from aiorl.errors import ConfigError


def make(**changes: Any) -> Config:
    return Config(**{"env": "CartPole-v1", **changes})


def refusal(*words: str, call: Any = make, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(**changes)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert len(text.splitlines()) <= 3
    return text


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rate: float | None = None
    size: int = 3


class Tabled(Toy, frozen=True, kw_only=True):
    """An algorithm with settings in a table of their own, of which some are not set."""

    name: ClassVar[str] = "tabled"
    inner: Inner = Inner()
    other: Inner | None = None


def test_what_is_not_set_in_a_table_within_a_table_is_left_out(tmp_path: Path) -> None:
    for algo in (Tabled(), Tabled(inner=Inner(rate=0.5), other=Inner(size=4))):
        config = make(algo=algo).resolve()
        path = tmp_path / "config.toml"
        path.write_text(config.to_toml())
        assert "None" not in path.read_text()
        assert Config.from_toml(path) == config


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"envs": True}, "envs = True: expected int, got bool"),
        ({"envs": 16.0}, "envs = 16.0: expected int, got float"),
        ({"envs": "16"}, "envs = '16': expected int, got str"),
        ({"envs": None}, "envs = None: expected int"),
        ({"envs": 0}, "envs = 0: expected int >= 1"),
        ({"seed": -1}, "seed = -1: expected int >= 0"),
        ({"seed": 2**70}, "expected at most 9223372036854775807"),
        ({"env_kwargs": {"low": -(2**63) - 1}}, "= -9223372036854775809: expected at least -9223372036854775808"),
        ({"seed": len}, "values of type builtin_function_or_method cannot be written to TOML"),
        ({"seed": np.int64(3)}, "values of type int64 cannot be written to TOML"),
        ({"total_steps": 0}, "total_steps = 0: expected int >= 1"),
        ({"group_size": 0}, "group_size = 0: expected at least 1"),
        ({"group_size": "aut"}, "group_size = 'aut': expected int or auto"),
        ({"workers": -1}, "workers = -1: expected 0 or more"),
        ({"workers": True}, "workers = True: expected int or auto"),
        ({"segment_length": 0}, "segment_length = 0: expected at least 1"),
        ({"off_policy_degree": -2}, "off_policy_degree = -2: expected int >= -1"),
        ({"off_policy_degree": 10**6}, "off_policy_degree = 1000000: expected int <= 10000"),
        ({"schedule": "random"}, "schedule = 'random': expected ordered or eager"),
        ({"device": "tpu"}, "device = 'tpu': expected auto or cpu or cuda"),
        ({"warmup": -1}, "warmup = -1: expected 0 or more"),
        ({"eval_every": -1}, "eval_every = -1: expected 0 or more"),
        ({"eval_every": True}, "eval_every = True: expected int or none, got bool"),
        ({"checkpoint_every": -5}, "checkpoint_every = -5: expected 0 or more"),
        ({"eval_episodes": 0}, "eval_episodes = 0: expected int >= 1"),
        ({"keep": 0}, "keep = 0: expected int >= 1"),
        ({"stop_at": math.nan}, "stop_at = nan: expected a finite number"),
        ({"stop_at": "475"}, "stop_at = '475': expected float or none, got str"),
        ({"step_timeout_s": math.inf}, "step_timeout_s = inf: expected a finite number"),
        ({"step_timeout_s": 0}, "step_timeout_s = 0: expected float > 0.0"),
        ({"start_timeout_s": -1.0}, "start_timeout_s = -1.0: expected float > 0.0"),
        ({"torch_threads": 0}, "torch_threads = 0: expected int >= 1"),
        ({"memory_gb": 0.0}, "memory_gb = 0.0: expected more than 0"),
        ({"native_vector": 1}, "native_vector = 1: expected bool, got int"),
        ({"out": ""}, "out is empty: expected a directory"),
        ({"out": "bad\udcffname"}, r"out = 'bad\udcffname': expected a text that UTF-8 can hold"),
        ({"out": Path("runs")}, "cannot be written to TOML"),
        ({"env": 5}, 'env = 5: expected a gymnasium id, "module:callable" or a callable'),
        ({"env_kwargs": 5}, "env_kwargs = 5: expected table, got int"),
        ({"env_kwargs": {"x": object}}, "env_kwargs.x = <class 'object'>: values of type type cannot be written to TOML"),
        ({"env_kwargs": {"x": b"1"}}, "env_kwargs.x = b'1': values of type bytes cannot be written to TOML"),
        ({"env_kwargs": {"x": None}}, "env_kwargs: TOML cannot hold 'x' = None"),
        ({"env_kwargs": {"x": [1, [2, None]]}}, "env_kwargs.x[1][1]: TOML cannot hold None\n  leave it out, or use a value"),
        ({"env_kwargs": {"x": {"y": [1.0, math.nan]}}}, "env_kwargs.x.y[1] = nan: expected a finite number"),
        ({"env_kwargs": {1: 2}}, "env_kwargs: TOML cannot hold 1 = 2"),
        ({"algo": 5}, "algo = 5: expected an algorithm's name, or one configured such as aiorl.PPO()"),
        ({"algo": aiorl.PPO}, "algo = PPO: expected an instance, got the class\n  write algo=PPO()"),
        ({"algo": "pppo"}, "unknown algorithm 'pppo' — did you mean ppo?"),
        ({"algo": aiorl.PPO(learning_rate=-1)}, "ppo.learning_rate = -1: expected float > 0.0"),
        ({"algo": aiorl.PPO(gamma=math.nan)}, "ppo.gamma = nan: expected a finite number"),
        ({"algo": aiorl.PPO(activation="elu")}, "ppo.activation = 'elu': expected tanh or relu"),  # type: ignore[arg-type]
        ({"algo": aiorl.PPO(hidden=(64, -1.5))}, "ppo.hidden = (64, -1.5): expected int, got float"),  # type: ignore[arg-type]
        ({"group_size": 3}, "envs = 16 is not a multiple of group_size = 3\n  group sizes that fit: 1, 2, 4, 8, 16"),
        ({"envs": 10**9, "group_size": 7}, "group sizes that fit: 1, 2, 4, 5, 8, 10"),
        ({"envs": 10**6, "group_size": 1}, "make 1000000 groups: expected at most 65535"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_at_once(changes: dict[str, Any], message: str) -> None:
    refusal(message, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"step_timeout_s": 5}, {"stop_at": 475}, {"group_size": 16}, {"workers": 0}, {"eval_every": 0}, {"warmup": 0},
        {"env": dict}, {"env_kwargs": {"a": {"b": [1, 2.5, "c", True, (1, 2)]}}}, {"seed": 2**63 - 1},
        {"env_kwargs": {"low": -(2**63), "high": 1e38}},
        {"off_policy_degree": 0}, {"algo": Toy()},
    ],
    ids=str,
)  # fmt: skip
def test_right_values_are_taken(changes: dict[str, Any]) -> None:
    config = make(**changes)
    for name, value in changes.items():
        assert getattr(config, name) == value


def test_changes_are_checked_as_well() -> None:
    refusal("envs = -1: expected int >= 1", call=make().replace, envs=-1)
    refusal("unknown key `enbs` — did you mean `envs`?", call=make().replace, enbs=1)
    assert make().replace(envs=8, group_size=4).groups == 2


class Biased(Toy, frozen=True, kw_only=True):
    name: ClassVar[str] = "biased"
    corrects_staleness: ClassVar[bool] = False


def test_an_algorithm_without_correction_needs_leave_to_run_on_stale_data() -> None:
    refusal("biased does not correct for stale data", "off_policy_degree = 2", "allow_uncorrected", algo=Biased(),
            off_policy_degree=2)  # fmt: skip
    assert make(algo=Biased(), off_policy_degree=0).off_policy_degree == 0
    assert make(algo=Biased(), off_policy_degree=2, allow_uncorrected=True).off_policy_degree == 2
    assert make(algo=aiorl.PPO(), off_policy_degree=2).off_policy_degree == 2
    refusal("ppo does not correct", algo=aiorl.PPO(correction="none"), off_policy_degree=1)


class Nested(msgspec.Struct, frozen=True):
    depth: Annotated[int, Meta(ge=1)] = 2


class Clashing(Toy, frozen=True, kw_only=True):
    name: ClassVar[str] = "seed"


class WithNested(Toy, frozen=True, kw_only=True):
    name: ClassVar[str] = "nested"
    net: Nested = Nested()


def test_an_algorithm_of_ones_own() -> None:
    refusal("cannot be called 'seed'", algo=Clashing())
    refusal("nested.net.depth = 0: expected int >= 1", algo=WithNested(net=Nested(depth=0)))
    assert make(algo=WithNested()).to_dict()["nested"]["net"] == {"depth": 2}


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"env": "x", "envs": "a"}, "run.toml: envs = 'a': expected int, got str"),
        ({"env": "x", "envs": 0}, "run.toml: envs = 0: expected int >= 1"),
        ({"env": "x", "seed": math.nan}, "run.toml: seed = nan: expected int, got float"),
        ({"env": "x", "stop_at": math.nan}, "stop_at = nan: expected a finite number"),
        ({"env": "x", "schedule": "no"}, "run.toml: schedule = 'no': expected ordered or eager"),
        ({"env": "x", "env_kwargs": 3}, "run.toml: env_kwargs = 3: expected table, got int"),
        ({"env": "x", "learning_rate": 3}, "run.toml: unknown key `learning_rate`\n  known: env, env_kwargs"),
        ({"env": "x", "of_policy_degree": 3}, "unknown key `of_policy_degree` — did you mean `off_policy_degree`?"),
        ({"env": "x", "ppo": {"learnin_rate": 1}}, "unknown key `ppo.learnin_rate` — did you mean `ppo.learning_rate`?"),
        ({"env": "x", "ppo": {"learning_rate": "a"}}, "run.toml: ppo.learning_rate = 'a': expected float, got str"),
        ({"env": "x", "ppo": {"hidden": [64, "a"]}}, "run.toml: ppo.hidden = [64, 'a']: expected int, got str"),
        ({"env": "x", "ppo": {"activation": "elu"}}, "run.toml: ppo.activation = 'elu': expected tanh or relu"),
        ({"env": "x", "ppo": 5}, "run.toml: ppo = 5: expected a table"),
        ({"env": "x", "dqn": {}}, "run.toml: unknown key `dqn`"),
        ({"env": "x", "algo": "ppq"}, "unknown algorithm 'ppq'"),
        ({"env": "x", "algo": ["ppo"]}, "algo = ['ppo']: expected an algorithm's name"),
        ({"envs": 3}, "run.toml: no `env` given"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named_with_their_place(data: dict[str, Any], message: str) -> None:
    refusal(message, call=Config.from_dict, data=data, where="run.toml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    refusal("no configuration file at", call=Config.from_toml, path=tmp_path / "none.toml")
    for content in (b"env = ", b"\xff\xfe", b"env = 'x'\nenv = 'y'"):
        (tmp_path / "bad.toml").write_bytes(content)
        refusal("bad.toml", "cannot be read as TOML", call=Config.from_toml, path=tmp_path / "bad.toml")
    refusal("cannot be read", call=Config.from_toml, path=tmp_path)


def round_trip(config: Config, tmp_path: Path) -> Config:
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return Config.from_toml(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algo": "dqn"},
        {"algo": aiorl.PPO(learning_rate=1e-5, target_kl=0.01, hidden=(32,))},
        {"algo": aiorl.PPO(value_clip=0.5), "stop_at": -1e300, "memory_gb": 1.5, "out": "some/where 'ü'\n\"q\""},
        {"env": "run_envs:Counting", "env_kwargs": {"length": 3, "deep": {"list": [1, [2.5, "x"]], "empty": {}}}},
        {"env_kwargs": {"low": -(2**63), "high": 1e38}},
        {"env_kwargs": {"tuple": (1, (2, 3))}, "envs": 15, "workers": 0, "segment_length": 7, "seed": 2**63 - 1},
        {"algo": Toy(learning_rate=0.25)},
    ],
    ids=str,
)
def test_a_resolved_configuration_survives_its_file(changes: dict[str, Any], tmp_path: Path) -> None:
    resolved = make(**changes).resolve()
    again = round_trip(resolved, tmp_path)
    assert again == resolved
    assert again.to_toml() == resolved.to_toml()
    assert again.resolve() == resolved
    assert isinstance(resolved.group_size, int)
    assert isinstance(resolved.workers, int)
    assert "auto" not in [v for k, v in tomllib.loads(resolved.to_toml()).items() if k not in ("device", "stepping")]


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1), "envs": st.integers(1, 64), "workers": st.integers(0, 9) | st.just("auto"),
        "total_steps": st.integers(1, 10**12), "off_policy_degree": st.integers(0, 9),
        "stop_at": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "segment_length": st.none() | st.integers(1, 999), "eval_every": st.none() | st.integers(0, 999),
        "schedule": st.sampled_from(["ordered", "eager"]), "step_timeout_s": st.floats(1e-3, 1e9),
        "env_kwargs": st.dictionaries(st.text(max_size=3), st.integers(-9, 9) | st.text(max_size=3), max_size=3),
        "algo": st.builds(aiorl.PPO, learning_rate=st.floats(1e-9, 1.0), target_kl=st.none() | st.floats(1e-9, 9.0)),
    },
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(fields=FIELDS)
def test_any_configuration_survives_its_file(fields: dict[str, Any]) -> None:
    resolved = make(**fields).resolve()
    assert Config.from_dict(tomllib.loads(resolved.to_toml())) == resolved


# -- what is worked out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("envs", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (15, 5), (16, 8), (17, 1), (64, 8), (18, 6)])
def test_the_automatic_group_size_depends_on_envs_alone(envs: int, size: int) -> None:
    assert auto_group_size(envs) == size
    assert {make(envs=envs, workers=w).resolve().group_size for w in (0, 1, 7)} == {size}


def test_workers_are_no_more_than_groups_or_cores() -> None:
    assert make(envs=16, group_size=8, workers=5).resolve().workers == 2
    assert make(envs=16, group_size=8, workers=0).resolve().workers == 0
    assert make(envs=1024, group_size=1).resolve().workers == usable_cores()


def test_what_is_left_open_is_filled_in() -> None:
    resolved = make(total_steps=1000).resolve()
    assert (resolved.eval_every, resolved.checkpoint_every) == (100, 200)
    assert resolved.segment_length == resolved.steps_per_segment == aiorl.PPO.default_segment_length
    assert resolved.steps_per_rollout == 128 * 16
    assert resolved.algo == aiorl.PPO()
    assert make(total_steps=1).resolve().eval_every == 1
    assert make(eval_every=0, checkpoint_every=0).resolve().eval_every == 0


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"envs": 4, "total_steps": 5000, "ppo": {"learning_rate": 0.5, "epochs": 3}}
    monkeypatch.setattr(presets, "PRESETS", {("ppo", "CartPole-v1"): own})


@pytest.mark.usefixtures("known")
def test_a_preset_lies_under_what_is_given() -> None:
    plain = Config.preset("CartPole-v1")
    assert (plain.envs, plain.total_steps, plain.algo) == (4, 5000, aiorl.PPO(learning_rate=0.5, epochs=3))
    changed = Config.preset("CartPole-v1", envs=8, ppo={"epochs": 9})
    assert (changed.envs, changed.total_steps, changed.algo) == (8, 5000, aiorl.PPO(learning_rate=0.5, epochs=9))
    assert Config.preset("CartPole-v1") == plain, "the preset itself was changed"
    assert Config.preset("Acrobot-v1").envs == make().envs
    assert Config.preset("CartPole-v1", "dqn", off_policy_degree=0).algo == aiorl.DQN()
    refusal("unknown key `enbs`", call=Config.preset, env="CartPole-v1", enbs=3)


def make_counting(length: int = 7) -> object:
    return length


def test_a_partial_is_written_by_name_with_its_arguments():
    config = Config(env=functools.partial(make_counting, length=3), env_kwargs={}).resolve()
    assert config.to_dict()["env"] == f"{__name__}:make_counting"
    assert config.env_kwargs == {"length": 3}


@pytest.mark.parametrize(("workers", "least"), [(0, 1), (2, 3), ("auto", 10_000)])
def test_more_workers_than_there_are_cannot_be_needed(workers: Any, least: int) -> None:
    with pytest.raises(aiorl.ConfigError, match=f"min_workers = {least}: there are .*workers"):
        make(workers=workers, min_workers=least, envs=16).resolve()


@pytest.mark.parametrize("field", ["min_workers", "steps_at_once"])
def test_none_at_all_is_no_number_of_workers_or_steps(field: str) -> None:
    with pytest.raises(aiorl.ConfigError, match=f"{field} = 0"):
        make(workers=2, **{field: 0})
