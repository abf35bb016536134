"""The record of a run, and repeating a run from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from toys import Toy

import aiorl
from aiorl.record import Record, RecordLine, read_record
from aiorl.replay import replay
from aiorl.tuning import Decision, Measured, Tuner


def config(out: Path, **changes: Any) -> aiorl.Config:
    fields: dict[str, Any] = {
        "env": "run_envs:Jittery", "algo": Toy(), "total_steps": 1500, "envs": 8, "group_size": 2, "workers": 4,
        "eval_every": 0, "eval_episodes": 2, "checkpoint_every": 0, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


@asynccontextmanager
async def paused(run: aiorl.Run) -> AsyncIterator[None]:
    await run.pause()
    yield
    run.resume()


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "eager", "off_policy_degree": 4}, {"off_policy_degree": 2}],
    ids=["eager", "ordered"],
)
async def test_a_run_is_repeated_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = await aiorl.train(config(tmp_path / "first", **changes))
    assert [line.k for line in read_record(tmp_path / "first").lines] == list(range(first.updates))
    again = await replay(tmp_path / "first", workers=1)
    assert again.equal
    assert (again.rollouts, again.repeated_sha256) == (first.updates, first.params_sha256)


def degree_changes(run: Path) -> list[tuple[int, str]]:
    """What each change of degree in a run led to, and why."""
    events = [json.loads(text) for text in (run / "events.jsonl").read_text().splitlines()]
    return [(e["degree"], e["reason"]) for e in events if e["event"] == "degree_changed"]


async def test_a_self_tuned_run_is_repeated_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was stopped and resumed while the degree was on its way."""
    observe = Tuner.observe

    def measured(tuner: Tuner, m: Measured) -> Decision | None:
        """As on a machine where both sides take a second, and one if they overlap: how busy this one is plays no part."""
        return observe(tuner, m._replace(collect_s=1.0, train_s=1.0, interval_s=1.0 if m.staleness else 2.0))

    monkeypatch.setattr(Tuner, "observe", measured)
    tuned = config(
        tmp_path, env="CartPole-v1", algo=aiorl.PPO(hidden=(16,), epochs=2), segment_length=16, total_steps=12_000,
        workers=2, off_policy_degree=-1,
    )  # fmt: skip
    async with aiorl.Run(tuned) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 40:
                run.stop(final_evaluation=False)
    result = await aiorl.train(tuned, resume=tmp_path)
    assert result.status == "completed"
    assert degree_changes(tmp_path)[0] == (1, "supply"), "nothing was tuned, so this proves nothing"
    assert 1 <= result.staleness["max"] <= 8
    again = await replay(tmp_path, workers=1)
    assert again.equal
    assert (again.rollouts, again.repeated_sha256) == (result.updates, result.params_sha256)


@pytest.mark.parametrize("schedule", ["ordered", "eager"])
async def test_a_run_whose_degree_was_set_by_hand_is_resumed_and_repeated(tmp_path: Path, schedule: str) -> None:
    turned = config(tmp_path, schedule=schedule, off_policy_degree=0, degree_max=3)
    async with aiorl.Run(turned) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version in (3, 8):
                await run.set(off_policy_degree=3 if event.version == 3 else 2)
                assert run.status().off_policy_degree in (2, 3)
            if isinstance(event, aiorl.Updated) and event.version == 12:
                run.stop(final_evaluation=False)
    assert degree_changes(tmp_path) == [(3, "asked"), (2, "asked")]
    result = await aiorl.train(turned, resume=tmp_path)
    assert result.off_policy_degree == 2, "it stays as it was set"
    assert result.staleness["max"] <= 3
    if schedule == "ordered":
        assert result.staleness["max"] >= 2
    again = await replay(tmp_path, workers=2)
    assert again.equal
    assert again.repeated_sha256 == result.params_sha256


async def test_a_degree_out_of_reach_is_refused(tmp_path: Path) -> None:
    async with aiorl.Run(config(tmp_path, off_policy_degree=1)) as run:
        for degree, message in ((2, "can change it to 0 to 1"), (0.5, "expected a whole number")):
            with pytest.raises(aiorl.ConfigError, match=message):
                await run.set(off_policy_degree=degree)
        await run.set(off_policy_degree=0, learning_rate=0.3)
        assert run.status().off_policy_degree == 0


async def test_a_run_that_was_stopped_resumed_and_retuned_is_repeated(tmp_path: Path) -> None:
    halves = config(tmp_path, schedule="eager", off_policy_degree=3)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 5:
                await run.set(learning_rate=0.7)
                run.stop(final_evaluation=False)
    second = await aiorl.train(halves, resume=tmp_path)
    again = await replay(tmp_path, workers=2)
    assert again.repeated_sha256 == second.params_sha256


async def test_what_was_set_in_a_future_that_was_given_up_is_not_repeated(tmp_path: Path) -> None:
    """The run is resumed from before; what was set when the checkpoint was made, and by it alone, stays in force."""
    given_up, path, at = config(tmp_path, keep=9, workers=0), tmp_path, -1
    async with aiorl.Run(given_up) as run:
        async for event in run:
            match event:
                case aiorl.Updated(version=3):
                    async with paused(run):
                        await run.set(learning_rate=0.5)
                        path = await run.checkpoint()
                        at = run.status().version
                        await run.set(learning_rate=0.6)
                case aiorl.Updated(version=9):
                    await run.set(learning_rate=0.9)
                    run.stop(final_evaluation=False)
    result = await aiorl.train(given_up, resume=path)
    assert read_record(tmp_path).settings == {at: {"learning_rate": 0.5}}
    again = await replay(tmp_path, workers=1)
    assert again.equal
    assert again.repeated_sha256 == result.params_sha256


@pytest.mark.parametrize(
    "algo",
    [
        aiorl.PPO(hidden=(8,), epochs=1, anneal=True),
        aiorl.DQN(hidden=(8,), batch_size=8, warmup=64, capacity=512, epsilon_fraction=0.5, storage="disk"),
    ],
    ids=["ppo", "dqn"],
)
async def test_a_run_that_was_resumed_with_another_total_is_repeated(tmp_path: Path, algo: Any) -> None:
    """Its learning rate or epsilon fell more steeply before, also for the rollouts that were under way meanwhile."""
    fields = {"env": "run_envs:Counting", "segment_length": 8, "schedule": "eager", "workers": 0}
    short = config(tmp_path, algo=algo, total_steps=1_000, **fields)
    async with aiorl.Run(short) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 7:
                run.stop(final_evaluation=False)
    await aiorl.train(short, resume=tmp_path)
    for total in (2_000, 2_500):
        result = await aiorl.train(short.replace(total_steps=total), resume=tmp_path)
    assert list(read_record(tmp_path).totals.values()) == [1_000, 1_000, 2_000, 2_500]
    again = await replay(tmp_path, workers=1)
    assert again.equal
    assert again.repeated_sha256 == result.params_sha256


async def test_the_first_rollout_that_differs_is_named(tmp_path: Path) -> None:
    await aiorl.train(config(tmp_path, off_policy_degree=2))
    path = tmp_path / "schedule.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[9])
    changed["versions"] = [changed["b_k"], changed["b_k"], changed["b_k"], 9]
    lines[9] = json.dumps(changed)
    path.write_text("\n".join(lines))
    again = await replay(tmp_path, workers=2)
    assert not again.equal
    assert again.first_difference == 9


async def test_a_record_that_ends_early_is_refused(tmp_path: Path) -> None:
    """As when the disk was full, or only a part was copied: what is missing is no difference."""
    await aiorl.train(config(tmp_path, workers=0, total_steps=640))
    path = tmp_path / "schedule.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(aiorl.ConfigError, match=r"schedule\.jsonl has 5 of 10 rollouts\n  copy all of it"):
        await replay(tmp_path)


async def test_a_run_that_may_go_on_with_fewer_workers_is_repeated_with_fewer(tmp_path: Path) -> None:
    await aiorl.train(config(tmp_path, total_steps=640, workers=2, min_workers=2))
    assert (await replay(tmp_path, workers=1)).equal


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (path / "schedule.jsonl").write_text(text)
    return path


def line(k: int, crc: int = 0) -> dict[str, Any]:
    return {"k": k, "b_k": max(0, k - 1), "order": [0, 1], "crc": crc}


def test_rollouts_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    found = read_record(write(tmp_path, line(0), line(1), line(2, crc=5), line(2, crc=6), line(3)))
    assert [(entry.k, entry.crc) for entry in found.lines] == [(0, 0), (1, 0), (2, 6), (3, 0)]
    assert found.rollouts[3] == ((0, 1), (2, 2))
    assert Record((RecordLine(5, 3, (1, 0), (4, 3)),)).rollouts == [((1, 0), (4, 3))]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0), line(2)], "line 2: rollout 2 follows 0: there is a gap"),
        ([line(0), "{nonsense"], "line 2"),
        ([{"k": "zero", "b_k": 0, "order": []}], "line 1"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(aiorl.ConfigError, match=message):
        read_record(write(tmp_path, *lines))


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(aiorl.ConfigError, match="cannot be read"):
        read_record(tmp_path)
