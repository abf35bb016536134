"""Checkpoints when the program is killed for good, at every file operation, and when the machine goes down with it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  # before the children are made: they would import it one by one
from checkpoints import manifest, mark_of, part
from toys import Toy

import aiorl
from aiorl import checkpoint
from aiorl.testing import Crash, crash_points

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

POWER = [None, "lost", *(pytest.param(how, marks=pytest.mark.long) for how in ("torn", "partly"))]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory if possible: whether a real disk keeps what was synced is not what is tested, and it takes its time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="crashes-", dir="/dev/shm") as path:
        yield Path(path)


def save(run: Path, place: str, mark: int) -> None:
    checkpoint.save(run / place, manifest(version=mark), part(mark))


def names(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def expected_names(run: Path) -> set[str]:
    """What manifests name, and the directories that it lies in."""
    found = set[str]()
    for path in run.rglob("manifest.json"):
        listed = checkpoint.load_manifest(path.parent)
        files = [path, *(listed.path_of(path.parent, name) for name in listed.files)]
        found |= {file.relative_to(run).as_posix() for file in (*files, path.parent, path.parent.parent) if file != run}
    return found


def saving(run: Path, power_cut: Any) -> Iterator[Crash]:
    """Two checkpoints and a best one are there; the third is saved, the first pruned, and best/ replaced."""

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        for mark in (1, 2):
            save(run, f"checkpoints/{mark:08d}", mark)
        save(run, "best", 1)

    def go_on() -> None:
        save(run, "checkpoints/00000003", 3)
        checkpoint.prune(run / "checkpoints", keep=2, newest=3)
        save(run, "best", 3)

    return crash_points(go_on, run, prepare=prepare, power_cut=power_cut)


@pytest.mark.parametrize("power_cut", POWER)
def test_the_newest_complete_checkpoint_is_the_old_or_the_new_one(tmp_path: Path, power_cut: Any) -> None:
    run = tmp_path / "run"
    newest, best, crashes = list[int](), list[int](), list[Crash]()
    for crash in saving(run, power_cut):
        complete = checkpoint.complete_checkpoints(run / "checkpoints")
        assert [mark_of(path) for path in complete] == [int(path.name) for path in complete], crash
        assert len(complete) >= 2, crash
        newest.append(mark_of(complete[-1]))
        best.append(mark_of(run / "best"))
        checkpoint.clean(run)
        assert names(run) == expected_names(run) | {"checkpoints"}, crash
        assert [mark_of(path) for path in complete] == [int(path.name) for path in complete]
        crashes.append(crash)
    if power_cut != "partly":  # where chance decides what reaches the disk before it is synced
        assert newest == sorted(newest), "it went back"
        assert best == sorted(best), "it went back"
    assert (set(newest), set(best)) == ({2, 3}, {1, 3})
    assert (newest[-1], best[-1]) == (3, 3), "what is saved is there whatever happens then"
    counted = {crash.operation for crash in crashes}
    assert {"open", "write", "second half of a write", "fsync", "replace", "unlink", "mkdir", "rmdir"} <= counted
    assert len(crashes) > 60


@pytest.mark.parametrize("power_cut", POWER)
def test_a_first_checkpoint_is_there_or_not(tmp_path: Path, power_cut: Any) -> None:
    run = tmp_path / "disk" / "run"
    marks = list[int]()
    for _ in crash_points(
        lambda: save(run, "checkpoints/00000001", 1),
        tmp_path / "disk",
        prepare=lambda: shutil.rmtree(tmp_path / "disk", ignore_errors=True),
        power_cut=power_cut,
    ):
        complete = checkpoint.complete_checkpoints(run / "checkpoints")
        marks.append(mark_of(complete[0]) if complete else 0)
        checkpoint.clean(run)
        assert not list((tmp_path / "disk").rglob("*.tmp"))
    assert power_cut == "partly" or marks == sorted(marks)
    assert (marks[0], marks[-1]) == (0, 1), "what is saved is there whatever happens then"


@pytest.mark.parametrize("power_cut", ["lost", "partly"])
def test_a_given_up_future_does_not_come_back_in_parts(tmp_path: Path, power_cut: Any) -> None:
    """Resumed from 1, the later 8 and 9 are deleted: whatever of them comes back is whole, or does not look it."""
    directory = tmp_path / "checkpoints"

    def prepare() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        for mark in (1, 8, 9):
            checkpoint.save(directory / f"{mark:08d}", manifest(version=mark), part(mark))

    for crash in crash_points(
        lambda: checkpoint.prune(directory, keep=2, newest=1), directory, prepare=prepare, power_cut=power_cut
    ):
        for path in checkpoint.complete_checkpoints(directory):
            assert mark_of(path) == int(path.name), crash


# -- whole runs --------------------------------------------------------------------------------------------------------


def make(out: Path) -> aiorl.Config:
    """6 updates with a checkpoint after each, and evaluations that make best/."""
    return aiorl.Config(
        env="run_envs:Counting", algo=Toy(), envs=2, group_size=2, workers=0, total_steps=96, off_policy_degree=0,
        eval_every=32, eval_episodes=1, checkpoint_every=16, out=str(out),
    )  # fmt: skip


def killed_and_resumed(tmp_path: Path, points: Iterable[int]) -> set[str]:
    """Kill a run at these operations in its directory, resume each time; which operations it was."""
    whole = asyncio.run(aiorl.train(make(tmp_path / "whole"))).params_sha256
    run, before = tmp_path / "run", 0
    struck = set[str]()
    for crash in crash_points(
        lambda: asyncio.run(aiorl.train(make(run))),
        run,
        prepare=lambda: shutil.rmtree(run, ignore_errors=True),
        points=points,
    ):
        if crash.completed:
            break
        struck.add(crash.operation)
        complete = checkpoint.complete_checkpoints(run / "checkpoints")
        if not complete:
            assert before <= 2, f"nothing to go on from at {crash}"
            continue
        before = int(complete[-1].name)
        if before == 6:
            continue  # it was over
        result = asyncio.run(aiorl.train(make(run), resume=run))
        assert (result.params_sha256, result.updates) == (whole, 6), crash
        assert not list(run.rglob(".*")), f"left behind after {crash}"
        assert expected_names(run) <= names(run)
    return struck


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    chance = random.Random(seed := int.from_bytes(os.urandom(4), "little"))
    struck = killed_and_resumed(tmp_path, sorted(chance.sample(range(60, 330), 8)))
    assert struck, f"seed {seed}"


@pytest.mark.long
def test_a_run_killed_at_any_operation_goes_on_exactly(tmp_path: Path) -> None:
    struck = killed_and_resumed(tmp_path, range(1, 100_000, 2))
    assert {"open", "write", "second half of a write", "fsync", "replace", "unlink", "mkdir"} <= struck
