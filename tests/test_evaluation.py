"""Evaluation beside training: the same numbers whenever they are made, and every due point accounted for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_manifest
from hypothesis import given
from hypothesis import strategies as st
from toys import Toy

import aiorl
from aiorl import checkpoint
from aiorl.checkpointing import Snapshot
from aiorl.cli import main
from aiorl.cli.summary import summary_lines
from aiorl.config import Config
from aiorl.envs.episodes import run_episodes
from aiorl.envs.spec import resolve_env
from aiorl.evaluation import Skipped, WaitingRoom
from aiorl.metrics.curve import read_curve
from aiorl.preflight import EVAL_WIDTH

STEPS = 16  # env steps of one update
UPDATES = 40
BUSY = ["newest", "queue", "skip", "wait"]
Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """40 updates in this process; evaluations are due after each fifth. Each call has a directory of its own."""
    count = iter(range(1000))

    def make(**changes: Any) -> Config:
        fields: dict[str, Any] = {
            "env": "CartPole-v1", "algo": Toy(), "envs": 2, "group_size": 2, "workers": 0, "total_steps": UPDATES * STEPS,
            "off_policy_degree": 1, "eval_every": 5 * STEPS, "eval_episodes": 3, "checkpoint_every": 0,
            "native_vector": False, "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return Config(**{**fields, **changes})

    return make


def hold(run: aiorl.Run, until: Callable[[], bool]) -> list[int]:
    """Let no evaluation of this run begin before `until()`; returns the versions done when each one ended."""
    parts = run._session.parts
    assert parts is not None
    real, done = parts.workers.evaluate, []

    async def evaluate(*args: Any, **options: Any) -> Any:
        await parts.gate.wait_for(until)
        results = await real(*args, **options)
        done.append(parts.pacer.commits)
        return results

    parts.workers.evaluate = evaluate  # type: ignore[method-assign]
    return done


def commits(run: aiorl.Run) -> int:
    assert run._session.parts is not None
    return run._session.parts.pacer.commits


async def carry_out(config: Config, hold_until: int = 0) -> tuple[aiorl.Run, list[aiorl.AnyEvent]]:
    """A whole run whose evaluations wait until that many updates are done."""
    async with aiorl.Run(config) as run, asyncio.timeout(120):
        hold(run, lambda: commits(run) >= hold_until)
        events = [event async for event in run]
    await run.wait()
    return run, events


def evaluations(events: list[aiorl.AnyEvent]) -> list[aiorl.Evaluated]:
    return [event for event in events if isinstance(event, aiorl.Evaluated)]


def skips(events: list[aiorl.AnyEvent]) -> dict[int, str]:
    return {event.version: event.reason for event in events if isinstance(event, aiorl.EvaluationSkipped)}


def numbers(events: list[aiorl.AnyEvent]) -> dict[int, tuple[float, ...]]:
    return {e.version: (e.env_steps, e.mean_return, e.std_return, e.mean_length) for e in evaluations(events)}


# -- the waiting room --------------------------------------------------------------------------------------------------


@given(
    busy=st.sampled_from(BUSY), places=st.integers(1, 4), moves=st.lists(st.sampled_from(["offer", "take", "done"])),
    final=st.booleans(), cut_off=st.booleans(),
)  # fmt: skip
def test_every_due_point_ends_once(busy: Any, places: int, moves: list[str], final: bool, cut_off: bool) -> None:
    room = WaitingRoom(busy, places if busy == "queue" else 1)
    evaluated: list[Snapshot] = []
    skipped: list[Skipped] = []
    offered = 0

    def offer(last: bool) -> None:
        nonlocal offered
        offered += 1
        if (out := room.offer(Snapshot(offered, offered, offered, last))) is not None:
            skipped.append(out)

    def finish() -> None:
        if room.under_way is not None:
            evaluated.append(room.under_way)
            room.done()

    for move in moves:
        {"offer": lambda: offer(False), "take": room.take, "done": finish}[move]()
        under_way = room.under_way is not None
        assert room.due == offered == room.evaluated + room.skipped + room.waiting + under_way
        assert room.waiting <= places
        assert room.idle == (not under_way and not room.waiting)
    if final:
        offer(True)
    if cut_off:
        skipped += room.clear("ended", under_way=True)
    while not room.idle:
        finish()
        room.take()
    ends = [snapshot.version for snapshot in evaluated] + [snapshot.version for snapshot, _ in skipped]
    assert sorted(ends) == list(range(1, offered + 1)), "a due point was lost, or ended twice"
    assert room.counts == {"due": offered, "evaluated": len(evaluated), "skipped": len(skipped)}
    assert all(reason for _, reason in skipped)
    versions = [snapshot.version for snapshot in evaluated]
    assert versions == sorted(versions), "not in the order of training"
    if final and not cut_off:
        assert evaluated[-1].final, "the final version was not evaluated last"


def test_nothing_is_taken_while_one_is_under_way() -> None:
    room = WaitingRoom("queue", 3)
    for version in (1, 2):
        assert room.offer(Snapshot(version, 0, 0, False)) is None
    first = room.take()
    assert first is not None
    assert first.version == 1
    assert room.take() is None
    room.done()
    assert room.take() is not None


def test_the_final_one_stands_for_a_waiting_one_of_its_version() -> None:
    room = WaitingRoom("queue", 8)
    assert [room.offer(Snapshot(version, 0, version, False)) for version in (1, 2)] == [None, None]
    out = room.offer(Snapshot(2, 0, 2, True))
    assert out == (Snapshot(2, 0, 2, False), "the final evaluation is of the same version")
    assert room.waiting == 2


# -- what becomes of due points ----------------------------------------------------------------------------------------


async def test_newest_keeps_the_newest(config: Make) -> None:
    run, events = await carry_out(config(), hold_until=UPDATES)
    assert [e.version for e in evaluations(events)] == [5, 40]
    assert skips(events) == dict.fromkeys(range(10, 40, 5), "a newer version was due before it could begin")
    assert run.result.evaluation_points == {"due": 8, "evaluated": 2, "skipped": 6}


async def test_queue_keeps_all_of_them(config: Make) -> None:
    run, events = await carry_out(config(eval_busy="queue", off_policy_degree=0), hold_until=UPDATES)
    assert [e.version for e in evaluations(events)] == list(range(5, 41, 5))
    assert skips(events) == {}
    assert run.result.evaluation_points == {"due": 8, "evaluated": 8, "skipped": 0}


async def test_a_full_queue_keeps_its_first_and_the_newest(config: Make) -> None:
    """Also the bound on weight buffers: all that evaluation may hold are held here."""
    changes = {"eval_busy": "queue", "eval_every": STEPS, "eval_top": 9, "off_policy_degree": 2}
    run, events = await carry_out(config(**changes), hold_until=UPDATES)
    assert [e.version for e in evaluations(events)] == [1, *range(2, 9), 40]
    assert skips(events) == dict.fromkeys(
        range(9, 40), "8 were waiting already and a newer version was due before it could begin"
    )
    assert run.result.evaluation_points == {"due": 40, "evaluated": 9, "skipped": 31}
    assert len(run.result.reevaluations) == 9


async def test_skip_leaves_out_what_is_due_meanwhile(config: Make) -> None:
    run, events = await carry_out(config(eval_busy="skip"), hold_until=UPDATES)
    assert [e.version for e in evaluations(events)] == [5, 40]
    assert skips(events) == dict.fromkeys(range(10, 40, 5), "version 5 was still being evaluated")
    assert run.result.evaluation_points == {"due": 8, "evaluated": 2, "skipped": 6}


async def test_wait_lets_training_wait(config: Make) -> None:
    async with aiorl.Run(config(eval_busy="wait", off_policy_degree=2)) as run:
        ended_at = hold(run, lambda: True)
        events = [event async for event in run]
    assert [e.version for e in evaluations(events)] == ended_at == list(range(5, 41, 5))
    assert skips(events) == {}


@pytest.mark.parametrize("busy", ["newest", "queue"])
async def test_a_failure_accounts_for_the_due_points_it_leaves(config: Make, busy: str) -> None:
    async with aiorl.Run(config(algo=Toy(fail_at=23), eval_busy=busy)) as run:
        hold(run, lambda: False)
        events = [event async for event in run]
    assert run.result.status == "failed"
    assert evaluations(events) == []
    points = run.result.evaluation_points
    assert (points["due"], points["skipped"]) == (4, 4)
    lost = {version for version, reason in skips(events).items() if reason == "the run failed"}
    assert lost == ({5, 20} if busy == "newest" else {5, 10, 15, 20})
    assert isinstance(events[-1], aiorl.Finished), "told after the end"


@pytest.mark.parametrize("way", ["leave", "cancel"])
async def test_leaving_accounts_for_the_due_points_it_cuts_off(config: Make, no_leaks: None, way: str) -> None:
    events: list[aiorl.AnyEvent] = []
    run = aiorl.Run(config(total_steps=10**7, eval_busy="queue", eval_every=STEPS))

    async def host() -> None:
        async with run:
            hold(run, lambda: False)
            events_of_run = run.events()
            async for event in run:
                if isinstance(event, aiorl.Updated) and event.version >= 5:
                    break
            if way == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.Event().wait()
        events.extend([event async for event in events_of_run])

    task = asyncio.ensure_future(host())
    await asyncio.wait([task])
    points = run.result.evaluation_points
    assert points["due"] == points["skipped"] >= 5
    if way == "leave":
        reasons = skips(events)
        assert len(reasons) == points["due"]
        assert reasons[1] == "the run was ended at once", "the evaluation under way"
        assert reasons[2] == "the run was stopped"


# -- the same numbers --------------------------------------------------------------------------------------------------


async def test_the_same_numbers_blocking_in_the_background_on_demand_and_from_disk(
    config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with workers: what differs between them is only which versions were evaluated."""
    reference, events = await carry_out(config(eval_busy="wait", checkpoint_every=0))
    expected = numbers(events)
    assert list(expected) == list(range(5, 41, 5))
    assert len(set(expected.values())) > 4, "the same for all versions: this proves nothing"
    hashes, other = {reference.result.params_sha256}, {"sutton_barto_reward": True}
    for changes, until in (
        ({"eval_busy": "newest"}, 22), ({"eval_busy": "queue"}, 33), ({"eval_busy": "skip"}, 17),
        ({"eval_busy": "newest", "workers": 1}, 0), ({"eval_busy": "wait", "workers": 2}, 0),
        ({"eval_busy": "queue", "eval_top": 2, "eval_suites": {"a": {}, "b": {"env_kwargs": other}}}, 9),
    ):  # fmt: skip
        run, events = await carry_out(config(**changes), until)
        found = numbers([e for e in evaluations(events) if e.primary])
        assert found.items() <= expected.items(), changes
        assert 40 in found
        hashes.add(run.result.params_sha256)
    assert len(hashes) == 1, "evaluation changed the training"

    async with aiorl.Run(config(eval_every=0)) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 7:
                break
        await run.pause()
        asked, again = await run.evaluate(episodes=3), await run.evaluate(episodes=3)
        path = await run.checkpoint()
    assert numbers([asked]) == numbers([again])
    capsys.readouterr()
    command = ["eval", str(path), "--algo", "toys:Toy", "--episodes", "3", "--json"]
    assert main(command) == 0
    from_disk = json.loads(capsys.readouterr().out)
    mine = (from_disk["mean_return"], from_disk["std_return"], from_disk["mean_length"])
    assert numbers([asked])[asked.version][1:] == mine
    final = str(reference.directory / "final")
    assert main(["eval", final, *command[2:]]) == 0
    from_disk = json.loads(capsys.readouterr().out)
    assert (from_disk["mean_return"], from_disk["std_return"], from_disk["mean_length"]) == expected[40][1:]


async def test_an_asker_who_goes_away_disturbs_nobody(config: Make) -> None:
    async with aiorl.Run(config(total_steps=10**7, eval_every=0)) as run:
        await run.pause()
        expected = await run.evaluate(3)
        release = asyncio.Event()
        hold(run, release.is_set)
        first = asyncio.ensure_future(run.evaluate(100))
        await asyncio.sleep(0)
        while not run._session.evaluator._answering:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        first.cancel()
        others = [asyncio.ensure_future(run.evaluate(3)) for _ in range(20)]
        await asyncio.wait([first])
        release.set()
        run._session.parts.gate.wake()  # type: ignore[union-attr]
        results = await asyncio.gather(*others)
    assert first.cancelled()
    assert all(numbers([result]) == numbers([expected]) for result in results)


async def test_asking_does_not_keep_due_ones_waiting(config: Make) -> None:
    async with aiorl.Run(config(env="run_envs:Counting", total_steps=10**7, eval_every=STEPS)) as run:

        async def ask() -> None:
            while True:
                await run.evaluate(1)

        askers = [asyncio.ensure_future(ask()) for _ in range(3)]
        seen = 0
        async with asyncio.timeout(60):
            async for event in run:
                seen += isinstance(event, aiorl.Evaluated) and event.episodes == 3
                if seen == 3:
                    break
        for asker in askers:
            asker.cancel()
        await asyncio.wait(askers)


# -- suites ------------------------------------------------------------------------------------------------------------

SUITES = {
    "short": {"env_kwargs": {"length": 3}},
    "long": {"env": "run_envs:Counting", "env_kwargs": {"length": 11}, "episodes": 5},
}


@pytest.mark.parametrize("workers", [0, 1])
async def test_each_suite_plays_its_own_environment(config: Make, workers: int) -> None:
    changed = config(env="run_envs:Counting", eval_suites=SUITES, eval_busy="queue", workers=workers)
    async with aiorl.Run(changed) as run:
        asked = await run.evaluate(2, suite="long")
        default = await run.evaluate(2)
        with pytest.raises(aiorl.ConfigError, match="no evaluation suite 'weak'\n  this run has: 'short', 'long'"):
            await run.evaluate(suite="weak")
        events = [event async for event in run]
    assert (asked.suite, asked.primary, asked.mean_length) == ("long", False, 11)
    assert (default.suite, default.primary, default.mean_length) == ("short", True, 3)
    due = [e for e in evaluations(events) if e is not asked and e is not default and e.episodes != 2]
    assert [(e.version, e.suite) for e in due] == [(v, name) for v in range(5, 41, 5) for name in SUITES]
    assert {(e.suite, e.primary, e.episodes, e.mean_length) for e in due} == {
        ("short", True, 3, 3.0), ("long", False, 5, 11.0)
    }  # fmt: skip
    result = run.result
    assert [(e.version, e.suite) for e in result.evaluations] == [(e.version, e.suite) for e in due]
    assert result.evaluation_points == {"due": 8, "evaluated": 8, "skipped": 0}
    assert result.best is not None
    assert result.final_evaluation is not None
    assert result.best.suite == result.final_evaluation.suite == "short"
    assert result.best.mean_return <= 3 < max(e.mean_return for e in result.evaluations), "the wrong suite decides"
    assert not any(e.best for e in due if not e.primary)
    curve = read_curve(run.directory)
    assert {p.env_steps for p in curve.evaluations if p.value <= 3} >= {80.0 * k for k in range(1, 9)}
    assert not any(p.value > 3 for p in curve.evaluations)
    assert Config.from_toml(run.directory / "config.toml").eval_suites == run.config.eval_suites


async def test_a_due_point_is_not_done_before_its_last_suite(config: Make) -> None:
    async with aiorl.Run(config(env="run_envs:Counting", eval_suites=SUITES, eval_busy="wait")) as run:
        ended = hold(run, lambda: not ended)
        watcher = run.events()
        async for event in run:
            if isinstance(event, aiorl.Evaluated):
                break
    events = [event async for event in watcher]
    assert [(e.version, e.suite) for e in evaluations(events)] == [(5, "short")]
    assert skips(events) == {5: "the run was ended at once"}
    assert run.result.evaluation_points == {"due": 1, "evaluated": 0, "skipped": 1}


async def test_stop_at_goes_by_the_first_suite(config: Make) -> None:
    changes = {"env": "run_envs:Counting", "env_kwargs": {"length": 5}, "stop_at": 4.0}
    result = await aiorl.train(config(**changes, eval_suites={"short": {"env_kwargs": {"length": 3}}, "train": {}}))
    assert result.updates == UPDATES
    assert result.stop_overshoot is None
    assert result.first_evaluation_at_stop_return is None
    assert max(e.mean_return for e in result.evaluations if e.suite == "train") >= 4.0, "this proves nothing"


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"env": "CartPole-v1"}, "eval_suites.odd: CartPole-v1 has other spaces than the training environment"),
        ({"env_kwargs": {"lenght": 3}}, "eval_suites.odd: run_envs:Counting takes no argument 'lenght'"),
        ({"env": "run_envs:Absent"}, "eval_suites.odd: module run_envs has no 'Absent'"),
        ({"env": "CartPole-v9"}, "eval_suites.odd: there is no version 9 of CartPole"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
async def test_a_suite_that_cannot_be_played_is_refused_by_name(
    config: Make, no_leaks: None, suite: dict[str, Any], message: str, workers: int
) -> None:
    changed = config(env="run_envs:Counting", eval_suites={"fine": {}, "odd": suite}, workers=workers)
    with pytest.raises(aiorl.ConfigError) as caught:
        await aiorl.train(changed)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not Path(str(changed.out)).exists(), "something was begun"


@pytest.mark.parametrize(
    ("suites", "message"),
    [
        ([1], "eval_suites = [1]: expected a table of tables"),
        ({"a b": {}}, "eval_suites: 'a b' cannot name a suite"),
        ({"a": {"epsiodes": 3}}, "eval_suites.a: unknown key `epsiodes` — did you mean `episodes`?"),
        ({"a": {"episodes": 0}}, "eval_suites.a: episodes = 0: expected int >= 1"),
        ({"a": {"env": len}}, "eval_suites.a = {'env': <built-in function len>}"),
        ({"a": 3}, "eval_suites.a: the whole = 3: expected a table"),
    ],
)
def test_a_table_that_is_no_suite_is_refused(config: Make, suites: Any, message: str) -> None:
    with pytest.raises(aiorl.ConfigError) as caught:
        config(eval_suites=suites)
    assert message in str(caught.value)
    with pytest.raises(aiorl.ConfigError, match="eval_suites"):
        Config.from_dict({"env": "CartPole-v1", "eval_suites": suites})


def test_suites_are_the_same_from_tables_structs_and_a_file(config: Make) -> None:
    made = config(eval_suites={"a": {"env_kwargs": {"x": (1, 2)}}, "b": aiorl.EvalSuite(env="m:E", episodes=2)})
    assert made.eval_suites["a"] == aiorl.EvalSuite(env_kwargs={"x": [1, 2]})
    assert made.primary_suite == "a"
    assert Config.from_dict(json.loads(json.dumps(made.to_dict()))).eval_suites == made.eval_suites
    assert made.eval_suites["a"].environment("train", {"y": 1, "x": 0}) == ("train", {"y": 1, "x": [1, 2]})
    assert made.eval_suites["b"].environment("train", {"y": 1}) == ("m:E", {})


async def test_the_command_line_plays_a_suite(config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = await carry_out(config(env="run_envs:Counting", eval_suites=SUITES))
    capsys.readouterr()
    command = ["eval", str(run.directory), "--algo", "toys:Toy", "--episodes", "2"]
    for suite, length in (("short", 3), ("long", 11)):
        assert main([*command, "--suite", suite, "--env", "run_envs:Counting", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["lengths"] == [length] * 2
    assert main([*command, "--suite", "long"]) == 2
    assert "suite long plays run_envs:Counting" in capsys.readouterr().err
    assert main([*command, "--suite", "weak"]) == 2
    assert "--suite weak: expected short or long" in capsys.readouterr().err


# -- the best, again ---------------------------------------------------------------------------------------------------


async def test_the_best_play_again_with_fresh_episodes(config: Make) -> None:
    run, events = await carry_out(config(eval_busy="queue", eval_top=3))
    ranked = sorted(evaluations(events), key=lambda e: (-e.mean_return, e.version))
    again = [event for event in events if isinstance(event, aiorl.Reevaluated)]
    assert [e.version for e in again] == [e.version for e in ranked[:3]]
    assert [e.mean_return for e in again] != [e.mean_return for e in ranked[:3]], "the episodes were not fresh"
    result = run.result
    assert [(e.version, e.mean_return) for e in result.reevaluations] == [(e.version, e.mean_return) for e in again]
    winner = max(again, key=lambda e: e.mean_return)
    assert result.best is not None
    assert (result.best.version, result.best.mean_return) == (winner.version, winner.mean_return)
    assert again[0].best, "the first is the best so far"
    assert [e for e in again if e.best][-1] == winner

    best = aiorl.load(run.directory, which="best", algo=Toy)
    assert best.version == winner.version
    assert best.notes["reevaluation"]["mean_return"] == winner.mean_return
    assert best.notes["evaluation"]["version"] == winner.version
    policy = Toy().policy(best.spaces)
    policy.begin(best.weights, 0, None, 0)
    spec = resolve_env("CartPole-v1", in_process=True)
    returns, _ = run_episodes(spec, best.spaces, policy, 3, run.config.seed, min(3, EVAL_WIDTH), fresh=True)
    assert returns.mean() == winner.mean_return, "best/ holds other weights"
    lines = "\n".join(summary_lines(result.to_dict(), run.directory))
    assert "of 3 evaluated again" in lines


async def test_no_more_play_again_than_there_are(config: Make) -> None:
    stopped = await aiorl.train(config(eval_busy="wait", stop_at=0.0, eval_top=3))
    assert [e.version for e in stopped.evaluations] == [5, 5]
    assert [e.version for e in stopped.reevaluations] == [5], "one version played twice"
    result = await aiorl.train(config(eval_every=0, eval_top=5))
    assert [e.version for e in result.reevaluations] == [UPDATES]
    assert (await aiorl.train(config(eval_every=0))).reevaluations == []


async def test_the_best_from_before_a_resume_plays_too(config: Make) -> None:
    changed = config(env="run_envs:Counting", eval_busy="wait", algo=Toy(learning_rate=0.0), eval_top=1)
    first = await aiorl.train(changed)
    assert first.best is not None
    again = await aiorl.train(changed.replace(total_steps=(UPDATES + 20) * STEPS), resume=first.directory)
    before = checkpoint.load_manifest(Path(first.directory) / "best")
    assert {e.version for e in again.reevaluations} >= {first.best.version}
    assert len(again.reevaluations) == 2
    assert again.best is not None
    assert before.version == again.best.version


async def test_an_evaluation_that_does_not_end_is_told_of_once(config: Make) -> None:
    async with aiorl.Run(config(workers=0, eval_busy="wait", stall_timeout_s=121.0)) as run:
        evaluator = run._session.evaluator
        assert evaluator is not None
        evaluator._warn_of_length(5)
        evaluator._warn_of_length(10)
        events = [event async for event in run]
    (told,) = (event.message for event in events if isinstance(event, aiorl.Warned) and "goes on" in event.message)
    assert "evaluation of version 5 has taken 121 s" in told


# -- going on ----------------------------------------------------------------------------------------------------------


def without(directory: Path, event: str) -> None:
    """As if the process had been killed before this was written."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["event"] != event))


async def test_a_result_that_came_after_its_checkpoint_is_not_lost(config: Make) -> None:
    """Evaluations begin after update 12: those of versions 5 and 10 are due and not done when their checkpoints are made."""
    run, _ = await carry_out(config(eval_busy="queue", checkpoint_every=5 * STEPS, keep=10), hold_until=12)
    whole = [(e.version, e.mean_return) for e in run.result.evaluations]
    assert [version for version, _ in whole] == [5, 10, 15, 20, 25, 30, 35, 40]
    resumed = await aiorl.train(run.config, resume=run.directory / "checkpoints" / "00000010")
    assert [(e.version, e.mean_return) for e in resumed.evaluations] == whole
    assert resumed.evaluation_points == {"due": 6, "evaluated": 6, "skipped": 0}, "those of this session"


async def test_what_was_due_when_a_run_was_killed_is_evaluated_or_reported(config: Make) -> None:
    run, _ = await carry_out(config(eval_busy="queue", checkpoint_every=5 * STEPS, keep=10), hold_until=12)
    whole = [(e.version, e.mean_return) for e in run.result.evaluations]
    without(run.directory, "evaluated")
    async with aiorl.Run(run.config, resume=run.directory / "checkpoints" / "00000010") as again:
        events = [event async for event in again]
    result = await again.wait()
    assert [(e.version, e.mean_return) for e in result.evaluations] == whole[1:], "version 10 is there to be evaluated"
    (skipped,) = (event for event in events if isinstance(event, aiorl.EvaluationSkipped))
    assert (skipped.version, skipped.env_steps) == (5, 5 * STEPS)
    assert "its checkpoint is of a newer version" in skipped.reason
    assert result.evaluation_points == {"due": 8, "evaluated": 7, "skipped": 1}
    without(run.directory, "evaluated")
    once_more = await aiorl.train(run.config, resume=run.directory / "checkpoints" / "00000010")
    assert once_more.evaluation_points == {"due": 7, "evaluated": 7, "skipped": 0}, "what was reported is not reported again"


async def test_a_resumed_run_keeps_a_best_that_is_newer_than_its_checkpoint(config: Make) -> None:
    run, _ = await carry_out(config(eval_busy="wait", checkpoint_every=5 * STEPS, keep=10))
    best = run.directory / "best"

    def better(manifest: dict[str, Any]) -> None:
        manifest["notes"]["evaluation"] |= {"version": 39, "mean_return": 1e6}

    edit_manifest(best, better)
    before = (best / checkpoint.MANIFEST).read_bytes()
    result = await aiorl.train(run.config, resume=run.directory / "checkpoints" / "00000010")
    assert (best / checkpoint.MANIFEST).read_bytes() == before
    assert result.best is not None
    assert (result.best.version, result.best.mean_return) == (39, 1e6)
    assert 39 not in [e.version for e in result.evaluations]
    edit_manifest(best, lambda manifest: manifest["notes"].pop("evaluation"))
    again = await aiorl.train(run.config, resume=run.directory / "checkpoints" / "00000010")
    assert again.best is not None
    assert again.best.mean_return < 1e6, "of one that says nothing nothing is known"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"short": 3}),
        ({"long": 11}, {"short": 3, "long": 11}),
        ({"long": 11, "short": 3}, {"short": 3, "long": 11}),
        ({"one": 11}, {"one": 3}),
    ],
)
async def test_what_was_best_in_another_suite_is_not_the_best_of_this_one(
    config: Make, before: dict[str, int], after: dict[str, int]
) -> None:
    """It may be of another name, or another task under the same name: `best/` begins anew, with what is evaluated now."""
    suites = [{name: {"env_kwargs": {"length": n}} for name, n in one.items()} for one in (before, after)]
    settings = config(env="run_envs:Counting", eval_busy="wait", checkpoint_every=5 * STEPS, keep=10, eval_suites=suites[0])
    run, _ = await carry_out(settings)
    best, primary = run.directory / "best", next(iter(after))
    edit_manifest(best, lambda manifest: manifest["notes"]["evaluation"].update(version=39, mean_return=1e6))
    changed = run.config.replace(eval_suites=suites[1])
    result = await aiorl.train(changed, resume=run.directory / "checkpoints" / "00000010")
    assert result.best is not None
    assert result.best.version >= 15
    saved = checkpoint.load_manifest(best)
    assert saved.notes["evaluation"]["suite"] == result.best.suite == primary
    assert (saved.version, saved.notes["evaluation"]["mean_return"]) == (result.best.version, result.best.mean_return)
    again = await aiorl.train(changed, resume=run.directory / "checkpoints" / "00000030")
    assert again.best is not None
    assert (again.best.version, again.best.suite) == (result.best.version, primary), "now it is of this suite"
    assert len(again.evaluations) == len(result.evaluations) >= 8


# -- stopping early ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("busy", "late"), [("newest", 12), ("queue", 7), ("wait", 0)])
async def test_an_early_stop_says_how_far_training_went_on(config: Make, busy: str, late: int) -> None:
    changed = config(total_steps=10**6, eval_busy=busy, stop_at=0.0)
    run, events = await carry_out(changed, hold_until=5 + late)
    result = run.result
    assert result.status == "completed"
    beyond = result.updates - 5
    assert beyond >= late
    assert result.stop_overshoot == {"updates": beyond, "env_steps": beyond * STEPS}
    assert beyond == 0 or busy != "wait"
    lines = "\n".join(summary_lines(result.to_dict(), run.directory))
    assert f"training stopped {beyond} update" in lines
    assert f"({beyond * STEPS:,} env steps) later" in lines
    ends = len(evaluations(events)), len(skips(events))
    assert result.evaluation_points == {"due": sum(ends), "evaluated": ends[0], "skipped": ends[1]}


async def test_a_run_that_was_not_stopped_early_overshoots_nothing(config: Make) -> None:
    for stop_at in (None, 1e6):
        assert (await aiorl.train(config(stop_at=stop_at))).stop_overshoot is None
