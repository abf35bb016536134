"""What is refused before any process is started."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from checking import make, refused
from run_envs import Counting
from toys import Toy

import aiorl
from aiorl import preflight
from aiorl.preflight import Preflight, check
from aiorl.segments import Column
from aiorl.testing.examine_algorithm import check_fit


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_a_checked_configuration_means() -> None:
    checked = check(make(workers="auto", off_policy_degree=0))
    assert isinstance(checked.config.workers, int)
    assert checked.directory == Path("run")
    assert checked.directory.is_dir()
    assert (checked.segment.steps, checked.segment.envs) == (8, 2)
    assert checked.segment.columns.keys() == {"action", "reward", "terminated", "truncated", "valid", "score"}
    assert checked.segment.obs == checked.spaces.obs_columns
    assert checked.saved is None
    assert not checked.needs_main


def test_looking_only_makes_nothing() -> None:
    check(make(), write=False)
    assert list(Path().iterdir()) == []


def test_more_environments_than_fit_the_memory() -> None:
    per_env = check(make(), write=False).segment.touched_nbytes / 2
    fits = int(2**20 / (per_env * 3))
    refused(
        f"{fits * 2} environments need", "the limit is 0.00 GiB", "memory_gb = 0.000976562", f"at most {fits}",
        "segment_length (now 8)", envs=fits * 2, memory_gb=2**-10, off_policy_degree=2, workers=0,
    )  # fmt: skip
    check(make(envs=fits - fits % 2, memory_gb=2**-10, off_policy_degree=2, workers=0), write=False)
    refused("shorter segment_length", segment_length=2**62)


def test_more_environments_than_this_machine_could_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1000)
    refused("8 environments need", "80 % of the memory available")
    monkeypatch.setattr(preflight, "available_bytes", lambda: None)
    check(make())


def test_more_workers_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (80, 10_000))
    refused("2 workers need about 88 open files, the limit is 80", "ulimit -n 88", "at most 1 workers")
    check(make(workers=1))
    shutil.rmtree("run")
    check(make(workers=0))


def test_an_output_directory_that_holds_another_run() -> None:
    Path("run").mkdir()
    Path("run/config.toml").write_text("")
    refused("run already holds a run", "python -m aiorl resume run")


def test_an_output_directory_that_is_none() -> None:
    Path("run").write_text("a file")
    refused("cannot write to run")
    refused("cannot write to run/inside", out="run/inside")


def test_an_output_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    refused("cannot write to run: Permission denied", "choose another out")


def test_environments_that_workers_cannot_import() -> None:
    class Local(Counting):
        pass

    refused("workers cannot import a lambda", "workers = 0", env=lambda: Counting(3))
    refused("workers cannot import", "Local", env=Local)
    for env in (lambda: Counting(3), Local):
        assert check(make(env=env, workers=0), write=False).spaces.action.nvec == (2,)
    assert check(make(env=Counting), write=False).env.name == "run_envs:Counting"


def test_an_algorithm_that_workers_cannot_import() -> None:
    class Inside(Toy, frozen=True, kw_only=True):
        name: ClassVar[str] = "inside"

    refused("workers cannot import the algorithm", "Inside", "top level of a module", algo=Inside())
    check(make(algo=Inside(), workers=0))


class Clashing(Toy, frozen=True, kw_only=True):
    name: ClassVar[str] = "clashing"

    def columns(self, spaces: Any) -> dict[str, Column]:
        return {"reward": Column(), "log_prob": Column(), "valid": Column()}


def test_an_algorithm_whose_columns_exist_already() -> None:
    refused("clashing declares columns that exist already: reward, valid", algo=Clashing())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": "CartPol-v1"}, ["CartPol-v1", "did you mean CartPole-v1"]),
        ({"env": "no_such_module:make"}, ["no_such_module"]),
        ({"env": "run_envs:Countin"}, ["Countin", "did you mean"]),
        ({"env_kwargs": {"lenght": 3}}, ["lenght"]),
    ],
)
def test_environments_that_are_not_there(changes: dict[str, Any], words: list[str]) -> None:
    refused(*words, **changes)


def test_warnings() -> None:
    assert check(make(), write=False).warnings == []
    (warning,) = check(make(workers=9), write=False).warnings
    assert "4 workers are enough for 4 groups" in warning
    checked = check(make(), write=False)
    inexact = replace(checked, probe=replace(checked.probe, why_inexact="it keeps its state to itself"))
    assert inexact.warnings == ["a resumed run may not be exact: it keeps its state to itself"]


def test_a_program_that_workers_must_import(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: Preflight = check(make(), write=False)
    assert not checked.needs_main
    monkeypatch.setattr(Toy, "__module__", "__main__")
    assert checked.needs_main


def test_experience_that_does_not_fit_the_memory() -> None:
    """Found before anything is started, and only what can come to be there counts."""
    algo = aiorl.DQN(capacity=1_000_000)
    fields = {"algo": algo, "total_steps": 2_000_000, "memory_gb": 0.0625, "workers": 0}
    text = refused("dqn.capacity = 1,000,000: 1,000,000 transitions and their copy in a checkpoint need", **fields)
    most = int(text.rpartition("at most ")[2].replace(",", ""))
    check(make(**{**fields, "algo": aiorl.DQN(capacity=most * 9 // 10)}), write=False)
    refused("use a capacity of at most", **{**fields, "algo": aiorl.DQN(capacity=most * 11 // 10)})
    check(make(**{**fields, "total_steps": most // 2}), write=False)


def test_experience_on_a_device_that_is_the_processor_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    fields = {"total_steps": 2_000_000, "memory_gb": 0.0625, "workers": 0, "device": "cpu"}
    there, here = (aiorl.DQN(capacity=10**6, storage=storage) for storage in ("device", "memory"))
    texts = [refused("dqn.capacity", algo=algo, **fields) for algo in (there, here)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    texts.append(refused("dqn.capacity", algo=there, **fields))
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": "eager", "off_policy_degree": 3}, "64 env steps, in the eager schedule up to 4 times as many"),
        ({"schedule": "eager", "off_policy_degree": 9}, "up to 4 times"),  # there are but four groups
    ],
)
def test_what_one_group_may_bring_at_once_must_fit_the_buffer(fields: dict[str, Any], words: str) -> None:
    common = {"algo": aiorl.DQN(capacity=64, warmup=32), "workers": 0, "segment_length": 8, **fields}
    text = refused(words, **common)
    assert text.endswith("raise dqn.capacity to 256 or more")
    for fits in ({"algo": aiorl.DQN(capacity=256, warmup=32)}, {"schedule": "ordered"}):
        check(make(**{**common, **fits}), write=False)


def test_windows_longer_than_what_the_buffer_holds_of_an_environment() -> None:
    short = aiorl.DQN(capacity=64, warmup=9, n_step=8)
    refused("n_step = 8, but the buffer holds 8 steps of each of 8", algo=short, workers=0)
    check(make(algo=aiorl.DQN(capacity=72, warmup=9, n_step=8, batch_size=8), workers=0, segment_length=8), write=False)


def test_a_run_that_only_acts_at_random_says_so() -> None:
    fields: dict[str, Any] = {"env": "Pendulum-v1", "workers": 0}
    for steps, told in ((1_000, True), (1_001, False)):
        warned = check(make(**fields, total_steps=steps, algo=aiorl.SAC(warmup=100)), write=False).warnings
        assert any("every action will be random: random_steps is 1,000" in text for text in warned) is told


class Levers(Counting):
    """Acts in a box from `low` to `high`."""

    def __init__(self, low: Any, high: Any) -> None:
        super().__init__(5)
        low, high = np.float32(low), np.float32(high)
        self.action_space = gymnasium.spaces.Box(low, high)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        ([100.0], [200.0], "dimension 0 of the actions is [100, 200]"),
        ([-1.0, -30.0], [1.0, 30.0], "dimension 1 of the actions is [-30, 30]"),
        ([-0.05], [0.05], "dimension 0 of the actions is [-0.05, 0.05]"),
        ([-0.4, -10.0, 0.0], [0.4, 10.0, 1.0], ""),
        ([5.0, -np.inf], [np.inf, np.inf], ""),  # which no wrapper could scale
        ([1.0], [1.0], ""),  # there is nothing to explore
    ],
)
def test_a_box_that_a_gaussian_around_0_does_not_explore(low: Any, high: Any, told: str) -> None:
    def warned(algo: Any) -> list[str]:
        checked = check(make(env=lambda: Levers(low, high), algo=algo, workers=0), write=False)
        return [text for text in checked.warnings if "gymnasium.wrappers.RescaleAction(env, -1, 1)" in text]

    assert [told in text for text in warned(aiorl.PPO())] == [True] * bool(told)
    if told:  # these scale by themselves
        assert warned(aiorl.SAC()) == warned(aiorl.TD3()) == []


def test_what_a_box_is_measured_by_is_the_initial_deviation() -> None:
    wide = {"env": lambda: Levers([-30.0], [30.0]), "workers": 0}
    assert check(make(**wide, algo=aiorl.PPO(log_std=2.0)), write=False).warnings == []
    doubts = [f for f in check_fit(aiorl.PPO(log_std=3.0), "Pendulum-v1", {}) if f.code == "doubtful"]
    assert ["dimension 0 of the actions is [-2, 2]" in f.message for f in doubts] == [True]
    assert check_fit(aiorl.PPO, "Pendulum-v1", {}) == []


IDLE: list[tuple[dict[str, Any], str]] = [
    ({"algo": aiorl.SAC(anneal_to=0.1)}, "sac.anneal_to = 0.1 does nothing: anneal is off"),
    (
        {"algo": aiorl.SAC(tune_alpha=False, target_entropy=-2.0)},
        "sac.target_entropy = -2.0 does nothing: tune_alpha is off",
    ),
    ({"algo": aiorl.TD3(priority_beta=0.5)}, "td3.priority_beta = 0.5 does nothing: priority_exponent is off"),
    ({"algo": aiorl.TD3(update_ratio=0)}, "nothing will be learned: td3.update_ratio is 0"),
    ({"algo": aiorl.PPO(), "warmup": 500}, "warmup = 500 does nothing: ppo has no warm-up"),
    (
        {"warmup": 5_000},
        "for 4,000 env steps a policy acts that has learned nothing: random_steps is 1,000, warm-up takes 5,000",
    ),
    ({"algo": aiorl.SAC(anneal=True, anneal_to=0.1, priority_beta=0.5, priority_exponent=0.6, target_entropy=-2.0)}, ""),
    ({"algo": aiorl.SAC(random_steps=5_000)}, ""),
    ({"algo": aiorl.PPO(), "warmup": None}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), IDLE)
def test_settings_that_do_nothing_are_said(changes: dict[str, Any], told: str) -> None:
    given = make(**{"env": "Pendulum-v1", "workers": 0, "total_steps": 20_000, "algo": aiorl.SAC(), **changes})
    assert check(given, write=False).warnings == ([told] if told else [])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this platform has no /proc")
def test_where_nothing_can_be_written_is_said_first() -> None:
    """A file system without a size says nothing of what is free."""
    refused("cannot write to /proc/here", algo=aiorl.DQN(), workers=0, out="/proc/here")


def test_frames_of_a_stack_count_once() -> None:
    spaces = check(make(env="CartPole-v1", frame_stack=4, workers=0), write=False).spaces
    alone = check(make(env="CartPole-v1", workers=0), write=False).spaces
    sizes = [aiorl.DQN().experience_bytes(s, 8, 10_000) for s in (alone, spaces)]
    assert spaces.features == 4 * alone.features
    assert sizes[0] <= sizes[1] < 1.5 * sizes[0]
