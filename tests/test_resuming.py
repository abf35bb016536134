"""What a run can be resumed from, and what is refused before any process is started."""

from __future__ import annotations

import asyncio
import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checking import make, refused
from checkpoints import edit_manifest, manifest, part
from toys import Toy

import aiorl
from aiorl import checkpoint, resuming
from aiorl.errors import CheckpointError, ConfigError
from aiorl.preflight import check
from aiorl.resuming import Saved, read_saved, resumed_config
from aiorl.structs import without_none


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
                if place[-1] in ("policy_state", "pending", "comparable_from"):
                    continue  # as in checkpoints from before there were policies that remember, and so on
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


ALGORITHM = {  # changed settings of DQN, and what is said
    "learning_rate": (1e-6, "dqn.learning_rate = 0.0005", "says 1e-06"),
    "update_ratio": (4.0, "dqn.update_ratio = 0.25", "says 4.0"),
    "warmup": (200, "dqn.warmup = 64", "says 200"),
    "priority_exponent": (0.9, "dqn.priority_exponent = 0.0", "says 0.9"),
    "reward_clip": (1.0, "dqn.reward_clip = None", "says 1.0"),
    "hidden": ((8,), "dqn.hidden = (16,)", "says (8,)"),
}


@pytest.fixture(scope="module")
def practised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("practised") / "run"
    fields = {"workers": 0, "total_steps": 128, "eval_episodes": 1, "seed": 4, "segment_length": 8}
    asyncio.run(aiorl.train(make(out=str(out), algo=dqn(), **fields)))
    return out


def dqn(**changes: Any) -> aiorl.DQN:
    return aiorl.DQN(**{"learning_rate": 5e-4, "warmup": 64, "hidden": (16,), "capacity": 512, **changes})


@pytest.mark.parametrize("key", ALGORITHM)
def test_a_checkpoint_of_other_settings_of_the_algorithm(practised: Path, key: str) -> None:
    value, *words = ALGORITHM[key]
    fields = again(segment_length=8, algo=dqn(**{key: value}))
    refused("was made with", "resume with the same value", *words, resume=practised, **fields)


def test_where_experience_lies_may_change(practised: Path) -> None:
    assert check(make(**again(segment_length=8, algo=dqn(storage="disk"))), practised, write=False).saved is not None


def test_a_setting_that_a_checkpoint_does_not_have_was_the_default(practised: Path) -> None:
    copied = Path(shutil.copytree(practised, "run"))
    edit_manifest(newest(copied), lambda m: m["config"]["dqn"].pop("priority_beta"))
    assert check(make(**again(segment_length=8, algo=dqn())), copied).saved is not None
    fields = again(segment_length=8, algo=dqn(priority_beta=0.5))
    refused("dqn.priority_beta = 0.4", "says 0.5", resume=copied, **fields)


def test_settings_of_an_algorithm_within_another(tmp_path: Path) -> None:
    def selfplay(rate: float) -> aiorl.SelfPlay:
        return aiorl.SelfPlay(algo="dqn", inner={"learning_rate": rate})

    made = {"selfplay": without_none(msgspec.to_builtins(selfplay(1e-3)))}
    saved = Saved(tmp_path, manifest(config=made), {})
    pairs = resuming.settings(saved, selfplay(2e-3))
    assert {key: pair for key, pair in pairs.items() if pair[0] != pair[1]} == {
        "selfplay.inner.learning_rate": (1e-3, 2e-3)
    }
    assert pairs["selfplay.inner.average"] == (0.0, 0.0), "a setting that an older checkpoint does not have"
    pairs = resuming.settings(saved, aiorl.SelfPlay.of(aiorl.DQN(learning_rate=1e-3)))
    assert all(before == now for before, now in pairs.values()), "a default is one whether it is written out or not"


def test_a_checkpoint_does_not_decide_what_is_imported(tmp_path: Path) -> None:
    """The run's config.toml may name a module, and does: what the checkpoint names besides is not looked at."""
    saved = Saved(tmp_path, manifest(config={"selfplay": {"algo": "antigravity:Algo"}}), {})
    with pytest.raises(CheckpointError, match="made with antigravity:Algo, which the configuration does not name"):
        resuming.settings(saved, aiorl.SelfPlay(algo="toys:Toy"))
    assert "antigravity" not in sys.modules
    saved = Saved(tmp_path, manifest(config={"selfplay": {"algo": "toys:Toy"}}), {})
    assert resuming.settings(saved, aiorl.SelfPlay(algo="toys:Toy"))["selfplay.algo"] == ("toys:Toy", "toys:Toy")


def test_a_new_total_is_told_with_what_goes_by_it(run: Path) -> None:
    (warning,) = check(make(**again()), run).warnings
    assert "total_steps was 128 and is 256 from here on" in warning
    assert check(make(**again(total_steps=128)), run).warnings == []
