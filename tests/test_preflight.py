"""What is refused before any process is started."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from checkpoints import edit_manifest, manifest, part
from run_envs import Counting
from toys import Toy

import aiorl
from aiorl import checkpoint, preflight
from aiorl.config import Config
from aiorl.errors import CheckpointError, ConfigError
from aiorl.preflight import Preflight, check, read_saved, resumed_config
from aiorl.segments import Column


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(**changes: Any) -> Config:
    fields: dict[str, Any] = {"env": "run_envs:Counting", "algo": Toy(), "envs": 8, "group_size": 2, "workers": 2}
    return Config(**{**fields, "out": "run", **changes})


def refused(*words: str, resume: str | Path | None = None, **changes: Any) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError) as caught:
        check(make(**changes), resume)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert len(text.splitlines()) <= 3
    assert sorted(Path().rglob("*")) == before, "a refused run left something behind"
    return text


# -- a fresh run -------------------------------------------------------------------------------------------------------


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


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that has ended."""
    out = tmp_path_factory.mktemp("finished") / "run"
    asyncio.run(aiorl.train(make(out=str(out), workers=0, total_steps=128, eval_episodes=1, off_policy_degree=1, seed=4)))
    return out


@pytest.fixture
def run(finished: Path) -> Path:
    """A copy of it, in the working directory as `run`."""
    shutil.copytree(finished, "run")
    return Path("run")


def newest(run: Path) -> Path:
    return checkpoint.complete_checkpoints(run / "checkpoints")[-1]


def again(**changes: Any) -> dict[str, Any]:
    return {"workers": 0, "total_steps": 256, "seed": 4, **changes}


@pytest.mark.parametrize("what", [Path, str, newest, lambda run: newest(run).absolute()])
def test_a_run_or_one_of_its_checkpoints(run: Path, what: Callable[[Path], Any]) -> None:
    checked = check(make(**again()), what(run))
    assert checked.saved is not None
    assert checked.saved.manifest.version == 2
    assert checked.saved.parts.keys() == {"policy", "learner", "run"}
    assert checked.directory.samefile(run)


def test_from_inside_the_directory_of_checkpoints(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = newest(run).name
    run = run.absolute()
    monkeypatch.chdir(run / "checkpoints")
    assert check(make(**again()), name).directory.samefile(run)
    assert resumed_config(name).out is not None
    monkeypatch.chdir(run)
    assert check(make(**again()), ".").directory.samefile(run)


def test_a_checkpoint_that_was_copied_elsewhere_begins_a_directory_of_its_own(run: Path) -> None:
    shutil.copytree(newest(run), "elsewhere/mine")
    checked = check(make(**again(out="new")), "elsewhere/mine")
    assert checked.directory == Path("new")
    assert sorted(p.name for p in Path("elsewhere").iterdir()) == ["mine"]


def test_the_configuration_of_a_run_with_changes(run: Path) -> None:
    config = resumed_config(run, total_steps=999)
    assert (config.total_steps, config.seed, config.algo, config.env) == (999, 4, Toy(), "run_envs:Counting")
    with pytest.raises(ConfigError, match="unknown key `total_stepz`"):
        resumed_config(run, total_stepz=1)
    with pytest.raises(CheckpointError, match="a policy to act with, not a state to go on from"):
        resumed_config(run / "best")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": "run_envs:Jittery"}, ["env = 'run_envs:Counting'", "'run_envs:Jittery'"]),
        ({"env_kwargs": {"length": 3}}, ["env_kwargs = {}", "{'length': 3}"]),
        ({"algo": "ppo"}, ["algo = 'toys:Toy'", "'ppo'"]),
        ({"seed": 5}, ["seed = 4", "says 5"]),
        ({"envs": 16}, ["envs = 8", "says 16"]),
        ({"group_size": 4}, ["group_size = 2", "says 4"]),
        ({"segment_length": 4}, ["segment_length = 8", "says 4"]),
        ({"schedule": "eager"}, ["schedule = 'ordered'", "'eager'"]),
        ({"native_vector": False}, ["native_vector = True", "False"]),
        ({"frame_stack": 2}, ["frame_stack = 1", "says 2"]),
    ],
)
def test_a_checkpoint_of_something_else(run: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused("was made with", "resume with the same value", *words, resume=run, **again(**changes))


def test_a_checkpoint_of_other_spaces(run: Path) -> None:
    edit_manifest(newest(run), lambda m: m["spaces"]["observation"][0].update(shape=[5]))
    refused("other spaces than run_envs:Counting has now", "saved: obs box[5]", "now:   obs box[2]", resume=run, **again())


def test_a_bare_policy(run: Path) -> None:
    for kind in ("best", "final"):
        refused(f"holds no learner: it is a {kind} checkpoint", "use one of checkpoints/", resume=run / kind, **again())


def test_nothing_to_resume() -> None:
    refused("there is no run or checkpoint at", resume="nowhere")
    Path("empty").mkdir()
    refused("holds no latest checkpoint yet", resume="empty")


def test_a_damaged_checkpoint(run: Path) -> None:
    next(newest(run).glob("learner-*.safetensors")).write_bytes(b"")
    refused("learner-", "the file is damaged", resume=run, **again())


def places(tree: dict[str, Any], *path: str) -> list[tuple[str, ...]]:
    """Where something is in a tree: the paths of all that it holds."""
    found = [(*path, key) for key in tree]
    return found + [p for key, value in tree.items() if isinstance(value, dict) for p in places(value, *path, key)]


def test_a_checkpoint_whose_contents_are_of_another_make(run: Path) -> None:
    """Files and hashes are right, but at some place there is nothing, or something else."""
    path = newest(run)
    found, parts = checkpoint.load(path, ("policy", "learner", "run"))
    assert check(make(**again()), run).saved is not None
    for place in places(parts["run"]):
        for change in ("delete", "replace"):
            wrong = copy.deepcopy(parts)
            node = wrong["run"]
            for key in place[:-1]:
                node = node[key]
            if change == "delete":
                if place[0] == "behaviour" and len(place) < 3:
                    continue  # a smaller degree would have fewer, which is for others to say
                if place[:2] == ("report", "staleness") and len(place) > 3:
                    continue  # a lag that never was
                del node[place[-1]]
            else:
                node[place[-1]] = {"x": "y"}
            checkpoint.save(path, found, wrong)
            refused(str(path.name), "is damaged or of another make", resume=run, **again())


@pytest.mark.parametrize("change", [{"version": 1}, {"version": 0}, {"env_steps": 5}])
def test_a_manifest_that_belongs_to_other_books(run: Path, change: dict[str, int]) -> None:
    edit_manifest(newest(run), lambda m: m.update(change))
    refused("is damaged or of another make", "8 segments with 128 env steps", resume=run, **again())


def test_parts_are_read_as_they_are() -> None:
    """Whether they fit is for those who use them to say; here only files are looked at."""
    checkpoint.save(Path("c/checkpoints/00000003"), manifest(), {**part(3), "learner": {}})
    assert read_saved(Path("c")).parts["run"]["mark"] == 3


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


def test_frames_of_a_stack_count_once() -> None:
    spaces = check(make(env="CartPole-v1", frame_stack=4, workers=0), write=False).spaces
    alone = check(make(env="CartPole-v1", workers=0), write=False).spaces
    sizes = [aiorl.DQN().experience_bytes(s, 8, 10_000) for s in (alone, spaces)]
    assert spaces.features == 4 * alone.features
    assert sizes[0] <= sizes[1] < 1.5 * sizes[0]
