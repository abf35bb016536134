"""The catalogue of faults, runs: each planted in what a sound run wrote, and found in its directory by name."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from faulty_learner import Small
from permissions import without

import aiorl
from aiorl import checkpoint
from aiorl.algos.dqn import epsilon_at
from aiorl.cli import main
from aiorl.resuming import resumed_config
from aiorl.testing import check_run
from aiorl.testing.catalogue import FOUND_AS
from aiorl.testing.findings import Finding

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of DQN with which nothing is wrong."""
    directory = tmp_path_factory.mktemp("sound") / "run"
    trained(directory, aiorl.DQN(**SMALL_DQN, anneal=True))
    return directory


SMALL_DQN: dict[str, Any] = {"hidden": (8,), "warmup": 64, "capacity": 1_000, "batch_size": 8, "target_every": 10}


def trained(directory: Path, algo: Any, env: str = "CartPole-v1") -> None:
    config = aiorl.Config(
        env=env, algo=algo, envs=4, workers=0, segment_length=8, total_steps=640, eval_every=0, eval_episodes=1,
        checkpoint_every=0, out=str(directory),
    )  # fmt: skip
    asyncio.run(aiorl.train(config))


class Planted:
    """A copy of a run in which something can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, name: str, change: Change) -> None:
        lines = [json.loads(line) for line in (self.path / name).read_text().splitlines()]
        for line in lines:
            change(line)
        (self.path / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n")

    def updates(self, change: Change) -> None:
        self.lines("events.jsonl", lambda event: change(event) if event["event"] == "updated" else None)

    def cut(self, name: str, number: int) -> None:
        """Half of a line is left, as where something else was written over the rest."""
        lines = (self.path / name).read_text().splitlines()
        lines[number - 1] = lines[number - 1][: len(lines[number - 1]) // 2]
        (self.path / name).write_text("\n".join(lines) + "\n")

    def metrics(self, **changed: float) -> None:
        self.updates(lambda u: u["metrics"].update(changed) if u["gradient_steps"] else None)

    def event(self, **fields: Any) -> None:
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"seconds": 1.0, "version": 5, "env_steps": 160, **fields}) + "\n")

    def warned(self, message: str) -> None:
        self.event(event="warned", message=message)

    def summary(self, **changed: Any) -> None:
        file = self.path / "summary.json"
        file.write_bytes(msgspec.json.encode(json.loads(file.read_bytes()) | changed))

    def config(self, name: str, value: Any) -> None:
        file = self.path / "config.toml"
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", file.read_text())
        assert count == 1
        file.write_text(text)

    @property
    def found(self) -> dict[str, Finding]:
        return {f.code: f for f in check_run(self.path) if f.severity != "info"}


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Planted:
    shutil.copytree(sound, tmp_path / "run")
    return Planted(tmp_path / "run")


def halved(update: dict[str, Any]) -> None:
    update["gradient_steps"] //= 2


def at(version: int, **fields: Any) -> Change:
    return lambda update: update.update(fields) if update["version"] == version else None


FALLING = np.array([1.0, 0.05, 0.2 * 20])  # start and end of epsilon, and the rollouts over which it falls

PLANTED: dict[str, tuple[Callable[[Planted], None], str, str]] = {
    "zeros": (lambda r: r.warned("every observation of rollout 3 is 0"), "zeros", "rollout 3"),
    "no gradient": (lambda r: r.metrics(grad_norm=0.0), "no-gradient", "the gradient is 0 in"),
    "no gradient, said": (
        lambda r: r.warned("the gradient of update 4 is 0 in all 8 gradient steps"), "no-gradient", "update 4",
    ),
    "no change": (lambda r: r.lines("schedule.jsonl", lambda x: x.update(crc=7)), "no-change", "left the weights"),
    "no change, said": (lambda r: r.warned("update 3 changed no weights, with 8 gradient steps"), "no-change", "update 3"),
    "not finite": (lambda r: r.warned("update 3 reports loss = nan"), "not-finite", "loss = nan"),
    "skipped": (lambda r: r.summary(skipped_updates={"nonfinite": 2}), "not-finite", "{'nonfinite': 2}"),
    "explodes": (lambda r: r.metrics(q_max=1e9), "q-explodes", "values reach 1e+09"),
    "explodes, said": (lambda r: r.warned("the values of update 9 explode: from 0 to 1e9"), "q-explodes", "update 9"),
    "never": (lambda r: r.updates(lambda u: u.update(gradient_steps=0)), "never-updated", "no gradient step in"),
    "late": (lambda r: r.config("total_steps", 100), "late-start", "of 100 env steps"),
    "ratio": (lambda r: r.updates(halved), "update-ratio", "gradient steps after"),
    "stale": (lambda r: r.updates(at(5, behaviour_version=1, staleness=3)), "staleness", "at most 1 behind"),
    "ahead": (lambda r: r.updates(at(5, behaviour_version=6, staleness=-2)), "staleness", "which version 6"),
    "dropped": (lambda r: r.summary(dropped={"stopped": 12}), "dropped", "12 env steps were collected and not used"),
    "ledger": (
        lambda r: r.summary(ledger={"produced": 700, "stored": 640, "dropped": 0, "in_flight": 0}),
        "ledger", "produced is not",
    ),
    "epsilon": (
        lambda r: r.updates(lambda u: u["metrics"].update(epsilon=epsilon_at(max(0, u["rollout"] - 1), FALLING))),
        "epsilon", "epsilon is 1 in rollout 1, expected 0.7625",
    ),
    "another epsilon": (lambda r: r.updates(lambda u: u["metrics"].update(epsilon=0.5)), "epsilon", "expected 1"),
    "exploring": (lambda r: r.config("epsilon_end", 0.9), "epsilon", "epsilon is"),
    "annealing": (
        lambda r: r.updates(lambda u: u["metrics"].update(learning_rate=1e-3)), "learning-rate", "stays 0.001",
    ),
    "batch": (lambda r: r.config("batch_size", 2), "batch", "batch_size = 2"),
    "clipped": (lambda r: r.metrics(grad_norm=1e4), "clipped", "longer than 1e+04"),
    "one step": (lambda r: r.updates(lambda u: u.update(length_mean=1.0)), "one-step-episodes", "had one step"),
    "episodes": (lambda r: r.updates(lambda u: u.update(length_mean=900.0)), "episodes", "were stored"),
    "summary": (lambda r: r.summary(episodes=3), "episodes", "the summary says 3"),
    "no reward": (lambda r: r.updates(lambda u: u.update(return_mean=0.0)), "no-reward", "came to 0"),
    "loss only": (lambda r: r.updates(lambda u: u["metrics"].pop("q_mean", 0)), "loss-only", "q_mean"),
    "target": (lambda r: r.metrics(target_drift=4.0), "target-stands", "4 times"),
    "priorities": (lambda r: r.metrics(priority_entropy=0.01), "priorities", "a few transitions"),
    "failed": (lambda r: r.summary(status="failed", error="worker-0 died\n  see its log"), "failed", "worker-0 died"),
    "restarts": (
        lambda r: r.event(event="worker_restarted", worker="worker-0", reason="killed (signal 9)"), "restarts", "signal 9",
    ),
    "gap": (lambda r: r.lines("schedule.jsonl", lambda x: x.update(k=x["k"] + 1)), "damaged", "rollout 1 follows -1"),
    "torn": (lambda r: r.cut("events.jsonl", 9), "damaged", "events.jsonl, line 9"),
    "an update of nothing": (lambda r: r.event(event="updated", version=None), "damaged", "events.jsonl, line"),
    "a start of nothing": (lambda r: r.event(event="started", resumed_from="x"), "damaged", "events.jsonl, line"),
    "a rollout of nothing": (lambda r: r.lines("schedule.jsonl", lambda x: x.pop("k")), "damaged", "schedule.jsonl, line 1"),
    "no text": (
        lambda r: (r.path / "schedule.jsonl").write_bytes(b'{"k": "\xff"}\n{"k": 1}\n'), "damaged", "schedule.jsonl, line 1",
    ),
    "half a summary": (lambda r: r.cut("summary.json", 1), "damaged", "summary.json"),
    "without metrics": (lambda r: r.updates(lambda u: u.pop("metrics")), "damaged", "metrics"),
}  # fmt: skip


def test_a_sound_run(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [f.code for f in check_run(sound)] == ["progress"]
    assert main(["doctor", str(sound)]) == 0
    out = capsys.readouterr().out
    assert "q_mean" in out
    assert out.splitlines()[-1] == "nothing to complain about"


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_is_found_in_what_a_run_wrote(name: str, run: Planted) -> None:
    plant, code, words = PLANTED[name]
    plant(run)
    assert code in run.found
    assert words in run.found[code].message
    assert len(run.found[code].message.splitlines()) <= 3
    assert code in FOUND_AS


FLAWED: dict[str, tuple[Any, str]] = {
    "values that explode": (
        aiorl.DQN(**SMALL_DQN | {"target_every": 1}, learning_rate=2.0, gamma=0.9, huber_delta=1e3),
        "q-explodes clipped",
    ),
    "zero gradient": (Small(flaw="zero gradient"), "no-gradient no-change"),
    "weights unchanged": (Small(flaw="optimizes a copy"), "no-change"),
    "weights unpublished": (Small(flaw="publishes what it was"), "no-change"),
    "training before there is data": (Small(flaw="does not wait"), "update-ratio"),
    "training that never begins": (Small(flaw="waits for ever"), "never-updated"),
    "the loss only": (Small(flaw="tells the loss only"), "loss-only"),
    "a rate at which nothing moves": (aiorl.DQN(**SMALL_DQN, learning_rate=1e-9), "no-change"),
    "a rate at which nothing moves, and no target": (
        aiorl.DQN(**SMALL_DQN | {"target_every": 1}, learning_rate=1e-9), "no-change",
    ),
    "a target that is never updated": (aiorl.DQN(**SMALL_DQN | {"target_every": 10**6}), "target-stands"),
    "no exploration": (aiorl.DQN(**SMALL_DQN, epsilon_fraction=0.0), "stopped-exploring"),
    "exploration that ends in warm-up": (aiorl.DQN(**SMALL_DQN, epsilon_fraction=0.1), "stopped-exploring"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAWED)
def test_a_run_of_a_faulty_learner_is_found_out(name: str, tmp_path: Path) -> None:
    algo, codes = FLAWED[name]
    trained(tmp_path / "run", algo)
    found = {f.code: f.message for f in check_run(tmp_path / "run") if f.severity != "info"}
    assert set(found) == set(codes.split())
    for code, words in {"q-explodes": "the values of update", "no-gradient": "the gradient of update"}.items():
        assert words in found.get(code, words), "the run warned of it itself"


def test_what_the_return_does_not_show_stands_beside_it(run: Planted) -> None:
    """Planted: returns that stay as they were while values run away and the loss is 0."""
    run.updates(lambda u: u.update(return_mean=20.0 if u["episodes"] else None))
    run.updates(lambda u: u["metrics"].update(q_mean=-40.0 * u["version"], loss=0.0) if u["gradient_steps"] else None)
    (progress,) = check_run(run.path)
    assert progress.code == "progress"
    for part in ("return 20 -> 20", "q_mean -120 -> -840", "loss 0 -> 0", "epsilon 0.881 -> 0.05"):
        assert part in progress.message


SLOW_BUT_SOUND = {
    "dqn": aiorl.DQN(**SMALL_DQN, learning_rate=1e-5),
    "a new target at each step": aiorl.DQN(**SMALL_DQN | {"target_every": 1}),
    "a constant epsilon": aiorl.DQN(**SMALL_DQN, epsilon_start=0.1, epsilon_end=0.1),
    "no warm-up": aiorl.DQN(**SMALL_DQN | {"warmup": 0}, epsilon_fraction=0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW_BUT_SOUND)
def test_a_sound_run_is_not_accused(name: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", SLOW_BUT_SOUND[name])
    assert [f.code for f in check_run(tmp_path / "run") if f.severity != "info"] == []


def test_a_run_that_goes_on_is_not_accused_of_a_target_that_stands(tmp_path: Path) -> None:
    trained(tmp_path / "run", aiorl.DQN(**SMALL_DQN | {"target_every": 10**6}))
    (tmp_path / "run" / "summary.json").unlink()
    assert Planted(tmp_path / "run").found.keys() <= {"killed"}


def test_no_episode_ever_ends(run: Planted) -> None:
    run.updates(lambda u: u.update(episodes=0, return_mean=None, length_mean=None, env_steps=u["env_steps"] * 100))
    assert "no-episodes" in run.found


def test_what_was_not_finite_is_left_out(run: Planted) -> None:
    """It is written as null."""
    run.updates(lambda u: u["metrics"].update(dict.fromkeys(u["metrics"], None)) if u["version"] > 15 else None)
    assert run.found == {}
    (progress,) = check_run(run.path)
    assert "q_mean" in progress.message
    run.updates(lambda u: u["metrics"].update(dict.fromkeys(u["metrics"], None)))
    assert set(run.found) == {"loss-only"}


@pytest.mark.parametrize("name", ["events.jsonl", "schedule.jsonl", "summary.json"])
def test_what_cannot_be_read_is_not_taken_for_what_is_not_there(
    name: str, run: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    with without(run.path / name):
        assert main(["doctor", str(run.path)]) == 2
    assert f"cannot read {run.path / name}: Permission denied" in capsys.readouterr().err


def test_a_check_that_fails_is_no_damage(run: Planted) -> None:
    run.updates(at(5, episodes="many"))
    assert set(run.found) == {"not-checked"}
    assert "episodes could not be checked: ValueError" in run.found["not-checked"].message
    assert "disk" not in run.found["not-checked"].message


@pytest.mark.parametrize("env", ["test_check_env:Forgetful", "test_check_env:Brief"])
def test_episodes_of_one_step_are_noticed(env: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", aiorl.DQN(**SMALL_DQN), env)
    found = Planted(tmp_path / "run").found["one-step-episodes"]
    severity, words = {
        "Forgetful": ("warning", "episodes had one step, the first had more"),
        "Brief": ("error", "each of 640 episodes had one step"),
    }[env.split(":")[1]]
    assert (found.severity, words in found.message) == (severity, True), found


def test_no_gradient_step_where_none_is_asked_for(run: Planted) -> None:
    run.config("update_ratio", 0.0)
    run.updates(lambda u: u.update(gradient_steps=0))
    message = run.found["never-updated"].message
    assert "env steps: update_ratio is 0\n" in message
    assert "warm" not in message, "neither a shorter warm-up nor a longer run would help"


def test_most_actions_are_random_in_the_end(run: Planted) -> None:
    run.config("epsilon_end", 0.9)
    run.config("epsilon_start", 0.9)
    run.updates(lambda u: u["metrics"].update(epsilon=0.9))
    assert set(run.found) == {"still-exploring"}


def test_a_killed_run_is_told_from_one_that_goes_on(run: Planted) -> None:
    (run.path / "summary.json").unlink()
    assert "killed" not in run.found
    (run.path / "run.lock").write_text("999999999\n")
    assert "killed" in run.found


def test_what_a_resumed_run_did_again_counts_once(run: Planted) -> None:
    for name in ("events.jsonl", "schedule.jsonl"):
        lines = (run.path / name).read_text().splitlines()
        again = [x for x in lines if json.loads(x).get("version", 0) > 12 or json.loads(x).get("k", 0) >= 12]
        (run.path / name).write_text("\n".join(lines + again) + "\n")
    assert run.found == {}


def test_each_update_is_judged_by_the_total_that_was_in_force_at_it(run: Planted) -> None:
    asyncio.run(aiorl.train(resumed_config(run.path, total_steps=1280), resume=run.path))
    assert run.found == {}
    run.updates(lambda u: u["metrics"].update(epsilon=0.7) if u["version"] in (2, 30) else None)
    assert run.found["epsilon"].message.startswith("epsilon is 0.7 in rollout 1, expected 0.7625")
    run.updates(lambda u: u["metrics"].update(epsilon=0.7625) if u["version"] == 2 else None)
    assert run.found["epsilon"].message.startswith("epsilon is 0.7 in rollout 29, expected 0.05")


@pytest.fixture
def moved(sound: Path, tmp_path: Path) -> Planted:
    """A run that went on, in a directory of its own, from a checkpoint that had been copied elsewhere."""
    shutil.copytree(checkpoint.complete_checkpoints(sound / "checkpoints")[-1], tmp_path / "elsewhere" / "saved")
    config = resumed_config(sound, total_steps=1280).replace(out=str(tmp_path / "moved"))
    asyncio.run(aiorl.train(config, resume=tmp_path / "elsewhere" / "saved"))
    return Planted(tmp_path / "moved")


def test_a_run_whose_beginning_lies_elsewhere(moved: Planted) -> None:
    assert moved.found == {}
    moved.updates(halved)
    assert moved.found["update-ratio"].message.startswith("148 gradient steps after 672 env steps, expected 152")


def test_a_gap_in_a_run_whose_beginning_lies_elsewhere(moved: Planted) -> None:
    moved.lines("schedule.jsonl", lambda x: x.update(k=x["k"] + 1))
    assert "rollout 22 follows 20" in moved.found["damaged"].message


SELF_PLAY: dict[str, tuple[Callable[[Planted], None], str]] = {
    "update-ratio": (lambda r: r.updates(halved), "update_ratio = 0.25 for each env step after 64"),
    "epsilon": (lambda r: r.updates(lambda u: u["metrics"].update(epsilon=0.5)), "expected 1"),
    "loss-only": (lambda r: r.updates(lambda u: u["metrics"].pop("q_mean", 0)), "q_mean"),
    "batch": (lambda r: r.config("batch_size", 2), "batch_size = 2"),
    "clipped": (lambda r: r.metrics(grad_norm=1e4), "max_grad_norm = 10"),
    "priorities": (lambda r: r.metrics(priority_entropy=0.01), "a few transitions"),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in self-play of an algorithm of which only some settings were given."""
    directory = tmp_path_factory.mktemp("played") / "run"
    trained(directory, aiorl.SelfPlay(algo="dqn", inner=SMALL_DQN, admit_every=4, pool=2), "games:matching")
    return directory


@pytest.mark.parametrize("code", SELF_PLAY)
def test_in_self_play_the_algorithm_that_learns_is_judged(code: str, played: Path, tmp_path: Path) -> None:
    shutil.copytree(played, tmp_path / "run")
    run, (plant, words) = Planted(tmp_path / "run"), SELF_PLAY[code]
    assert run.found == {}
    plant(run)
    assert words in run.found[code].message


def test_a_line_that_was_being_written_is_left_out(run: Planted) -> None:
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event":"upd')
    assert run.found == {}


def test_the_command_says_ids_and_fails(run: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    run.metrics(q_max=1e9)
    assert main(["doctor", str(run.path)]) == 1
    assert "[7.1 9.1 9.4]" in capsys.readouterr().out
    assert main(["doctor", str(run.path), "--json"]) == 1
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["code"], first["catalogue"]) == ("q-explodes", ["7.1", "9.1", "9.4"])


def test_a_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
