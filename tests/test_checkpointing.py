"""When a run saves and what it does when it cannot, in whole runs inside this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Toy

import aiorl
from aiorl import checkpoint
from aiorl.checkpoint import Manifest
from aiorl.events import AnyEvent, Checkpointed, CheckpointFailed, Evaluated, Finished

FULL = OSError(28, "No space left on device", "where")


def make(out: Path, **changes: Any) -> aiorl.Config:
    """40 updates of 16 env steps each."""
    fields: dict[str, Any] = {
        "env": "run_envs:Counting", "algo": Toy(), "envs": 2, "group_size": 2, "workers": 0, "total_steps": 640,
        "off_policy_degree": 1, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 160, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


async def events_of(config: aiorl.Config, **given: Any) -> tuple[aiorl.Run, list[AnyEvent]]:
    async with aiorl.Run(config, **given) as run:
        async with asyncio.timeout(60):
            events = [event async for event in run]
    return run, events


def versions(out: Path) -> list[int]:
    return [int(path.name) for path in checkpoint.complete_checkpoints(out / "checkpoints")]


def saves(monkeypatch: pytest.MonkeyPatch, before: Callable[[Path, Manifest], Any]) -> None:
    """Call `before` at the beginning of each save."""
    real = checkpoint.save

    def save(path: Path, manifest: Manifest, parts: Any, wrote: Callable[[], None]) -> None:
        before(path, manifest)
        real(path, manifest, parts, wrote)

    monkeypatch.setattr(checkpoint, "save", save)


async def test_periodic_ones_are_pruned_and_the_last_is_of_the_last_update(tmp_path: Path) -> None:
    run, events = await events_of(make(tmp_path, keep=2))
    saved = [(event.kind, event.version) for event in events if isinstance(event, Checkpointed)]
    assert [version for kind, version in saved if kind == "periodic"] == [10, 20, 30]
    assert ("final", 40) in saved
    assert versions(tmp_path) == [30, 40]
    assert checkpoint.load_manifest(tmp_path / "checkpoints" / "00000030").env_steps == 480
    assert checkpoint.load_manifest(tmp_path / "final").version == run.result.updates == 40
    for event in events:
        if isinstance(event, Checkpointed):
            assert Path(event.path).parent in (tmp_path, tmp_path / "checkpoints")
            assert event.env_steps == 16 * event.version


async def test_what_a_checkpoint_goes_on_from_is_told_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill at that moment leaves a run whose events and record have a gap for good."""
    told: dict[int, tuple[list[int], list[int]]] = {}

    def before(path: Path, manifest: Manifest) -> None:
        if path.parent.name == "checkpoints":
            events, schedule = (
                [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                for name in ("events", "schedule")
            )
            updates = [event["version"] for event in events if event["event"] == "updated"]
            told[manifest.version] = updates[: manifest.version], [line["k"] for line in schedule][: manifest.version]

    saves(monkeypatch, before)
    await events_of(make(tmp_path))
    for version, (updates, rollouts) in told.items():
        assert (updates, rollouts) == ([*range(1, version + 1)], [*range(version)])
    assert [*told] == [10, 20, 30, 40]


@pytest.mark.parametrize("kind", ["periodic", "best", "final"])
async def test_a_long_save_is_shown_and_seen_to_get_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Else gigabytes on a slow disk are taken for a stall."""
    begun, go_on, real = asyncio.Event(), threading.Event(), checkpoint.save
    loop = asyncio.get_running_loop()

    def save(path: Path, manifest: Manifest, parts: Any, wrote: Callable[[], None]) -> None:
        if manifest.kind == kind:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(60)
        real(path, manifest, parts, wrote)

    monkeypatch.setattr(checkpoint, "save", save)
    async with aiorl.Run(make(tmp_path, eval_every=64)) as run:
        await begun.wait()
        view = run._session.view
        assert [row.does for row in view().rows if row.who == "save"] == ["writes a checkpoint"]
        go_on.set()
        await run.wait()
    checkpointer = run._session.checkpointer
    assert checkpointer is not None
    assert not checkpointer.writing
    assert checkpointer.written > 0


async def test_none_but_the_last_without_periods(tmp_path: Path) -> None:
    await events_of(make(tmp_path, checkpoint_every=0))
    assert versions(tmp_path) == [40]


async def test_best_is_only_replaced_by_a_better_one(tmp_path: Path) -> None:
    _, events = await events_of(make(tmp_path, eval_every=64, eval_episodes=4))
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    best = -float("inf")
    for event in evaluations:
        assert event.best == (event.mean_return > best)
        best = max(best, event.mean_return)
    manifest = checkpoint.load_manifest(tmp_path / "best")
    last_best = [event for event in evaluations if event.best][-1]
    assert (manifest.version, manifest.env_steps) == (last_best.version, last_best.env_steps)
    assert manifest.notes["evaluation"]["mean_return"] == last_best.mean_return


async def test_resuming_from_an_earlier_checkpoint_gives_the_later_ones_up(tmp_path: Path) -> None:
    config = make(tmp_path, keep=10)
    await events_of(config)
    assert versions(tmp_path) == [10, 20, 30, 40]
    longer = config.replace(total_steps=10**6, checkpoint_every=0)
    async with aiorl.Run(longer, resume=tmp_path / "checkpoints" / "00000010") as run:
        assert versions(tmp_path) == [10, 20, 30, 40], "nothing is given up before there is something new"
        await run.pause()
        version = int((await run.checkpoint()).name)
        assert versions(tmp_path) == sorted({v for v in (10, 20, 30, 40) if v <= version} | {version})
        run.resume()


async def test_a_full_disk_is_reported_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, manifest: Manifest) -> None:
        if manifest.kind == "periodic" and manifest.version in (5, 10, 20, 25):
            raise FULL

    saves(monkeypatch, fail)
    run, events = await events_of(make(tmp_path, checkpoint_every=80, keep=9))
    failures = [event for event in events if isinstance(event, CheckpointFailed)]
    assert [event.reason for event in failures] == ["No space left on device (where)"] * 4
    assert run.result.status == "completed"
    assert versions(tmp_path) == [15, 30, 35, 40], "a success in between starts the count again"


async def test_three_failures_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, manifest: Manifest) -> None:
        raise FULL

    saves(monkeypatch, fail)
    run, events = await events_of(make(tmp_path, total_steps=10_000))
    assert sum(isinstance(event, CheckpointFailed) for event in events) == 3
    assert isinstance(events[-1], Finished)
    assert events[-1].status == "failed"
    with pytest.raises(aiorl.TrainingError, match="3 checkpoints in a row could not be written: No space left on device"):
        await run.wait()
    assert run.result.updates < 10_000 / 16


@pytest.mark.parametrize("full", [False, True])
async def test_a_requested_one_that_nobody_waits_for_any_more_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    begun, go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def before(path: Path, manifest: Manifest) -> None:
        if manifest.kind == "requested":
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(60)
            if full:
                raise FULL

    saves(monkeypatch, before)
    async with aiorl.Run(make(tmp_path, total_steps=10**7, checkpoint_every=0)) as run:
        asking = asyncio.create_task(run.checkpoint())
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        async with asyncio.timeout(60):
            async for event in run:
                if isinstance(event, CheckpointFailed if full else Checkpointed):
                    break
    assert asking.cancelled()
    assert (len(versions(tmp_path)) == 2) is not full, "the requested one, and that of the end"


async def test_a_requested_one_tells_who_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = True

    def fail(path: Path, manifest: Manifest) -> None:
        if failing and manifest.kind == "requested":
            raise FULL

    saves(monkeypatch, fail)
    async with aiorl.Run(make(tmp_path, total_steps=10**6, checkpoint_every=0)) as run:
        with pytest.raises(OSError, match="No space left"):
            await run.checkpoint()
        failing = False
        paths = await asyncio.gather(*(run.checkpoint() for _ in range(3)))
        marks = [checkpoint.load_manifest(path) for path in set(paths)]
        assert all(int(path.name) == mark.version for path, mark in zip(set(paths), marks, strict=True))
    assert run.result.status == "stopped"


async def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is not finished until 5 more updates are done."""
    let_go = threading.Event()

    def wait(path: Path, manifest: Manifest) -> None:
        if manifest.version == 10:
            assert let_go.wait(30), "training waited for the disk"

    saves(monkeypatch, wait)
    async with aiorl.Run(make(tmp_path, keep=9)) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 15:
                let_go.set()
    assert 10 in versions(tmp_path)
    _, parts = checkpoint.load(tmp_path / "checkpoints" / "00000010", ("learner",))
    assert parts["learner"]["updates"] == 10, "what was captured changed while it was written"
