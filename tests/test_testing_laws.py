"""The whole pipeline in simulation, with faults, keeps every law; and the kit finds the bugs that are planted in it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sims import SHAPES, STEPS, Folder, Still, Trial, trial

import aiorl
from aiorl.channel import Gate
from aiorl.envs import episodes, single
from aiorl.envs.aborts import Aborts
from aiorl.evaluation import Evaluator, Snapshot
from aiorl.faultpoints import POINTS
from aiorl.learning import Outcome, Trainer
from aiorl.ledger import Ledger
from aiorl.pacing import Ordered, RolloutPlan
from aiorl.report import Report
from aiorl.seeding import episode_seed, evaluation_seed
from aiorl.segments import Segment, SegmentHeader
from aiorl.session import Session
from aiorl.testing import (
    LEDGER_ENV,
    Deadlock,
    FaultPlan,
    FaultPoints,
    LawsBroken,
    Mark,
    Pace,
    Recording,
    SeedFailure,
    Sim,
    Simulated,
    World,
    armed,
    check_laws,
    explore,
    simulate,
    step,
    stored,
    tape_of,
)
from aiorl.workers.pool import ProcessWorkers
from aiorl.workers.records import Record
from aiorl.workers.station import Station
from aiorl.workers.supervision import Keeper
from aiorl.workers.weights import WeightStore

LIMIT_S = 60.0  # virtual; a run takes about two


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    made.close()


# -- everything at once ------------------------------------------------------------------------------------------------


def explored(folder: Folder, seeds: range) -> list[Trial]:
    """Many seeds of the whole pipeline; also, whatever the faults, ordered runs end with the same weights (promise 4)."""
    found = explore(lambda sim: trial(sim, folder), seeds, limit_s=LIMIT_S)
    hashes: dict[int, set[str]] = {}
    for seed, one in zip(seeds, found, strict=True):
        shape = SHAPES[seed % len(SHAPES)]
        assert one.error == ""
        fixed = shape["off_policy_degree"] >= 0 and "_turn" not in one.did
        if fixed and shape.get("schedule") != "eager" and one.status == "completed":
            hashes.setdefault(seed % len(SHAPES), set()).add(one.params_sha256)
    assert all(len(of_shape) == 1 for of_shape in hashes.values()), hashes
    assert len(hashes) >= 5
    return found


def test_the_pipeline_keeps_every_law(folder: Folder) -> None:
    found = explored(folder, range(100))
    assert sum(one.restarts for one in found) > 50, "hardly anything went wrong"
    did = {what for one in found for what in one.did}
    assert {"_pause", "_save", "_evaluate", "_turn", "_stop"} <= did


@pytest.mark.long
@pytest.mark.parametrize("first", [1000, 1500])  # for two processes
def test_the_pipeline_keeps_every_law_a_thousand_times(folder: Folder, first: int) -> None:
    explored(folder, range(first, first + 500))


def test_a_seed_repeats_itself(folder: Folder) -> None:
    """To the last bit and virtual second, so that a failure that was seen can be looked at."""
    seeds = [3, 5, 6, 13]  # with a tuner, which looks at the real clock, it would not
    first, second = (explore(lambda sim: trial(sim, folder), seeds, limit_s=LIMIT_S) for _ in range(2))
    assert first == second


def test_a_host_that_leaves_breaks_no_law(folder: Folder) -> None:
    async def leave(sim: Sim) -> str:
        world = World(sim, pace=Pace.random(sim.rng))
        run = aiorl.Run(folder.config(SHAPES[sim.seed % len(SHAPES)]), backends=world.backends)
        cut = bool(sim.rng.integers(2))
        try:
            async with run:
                await asyncio.sleep(float(sim.rng.exponential(0.3)))
                if cut:
                    asyncio.current_task().cancel()  # type: ignore[union-attr]
                    await asyncio.sleep(10)
        except asyncio.CancelledError:
            assert cut
        check_laws(run)
        await world.aclose()
        return run.result.status

    def one(sim: Sim) -> str:
        status = sim.run(leave(sim))
        assert not sim.left
        return status

    assert set(explore(one, 40, limit_s=LIMIT_S)) == {"stopped", "completed"}


def test_what_was_stopped_or_failed_is_resumed_exactly(folder: Folder) -> None:
    """Twice over and with faults all the way: the weights in the end are those of one go."""
    shapes = [number for number, shape in enumerate(SHAPES) if shape["off_policy_degree"] >= 0 and "schedule" not in shape]
    whole = {n: explore(lambda sim, n=n: trial(sim, folder, shape=n, meddle=False), 1)[0].params_sha256 for n in shapes}

    def one(sim: Sim) -> str:
        shape = shapes[sim.seed % len(shapes)]
        config = folder.config(SHAPES[shape])
        checkpoint = None
        for _ in range(2):
            failing = FaultPoints({"publish.before": int(sim.rng.integers(2, 9))} if sim.rng.random() < 0.5 else {})
            with armed(failing):
                host = Stopper(float(sim.rng.exponential(0.2)))
                done = again(sim, config, resume=checkpoint, host=host)
            if not list((done.run.directory / "checkpoints").glob("*/manifest.json")):
                return "nothing to resume"
            checkpoint = done.run.directory
            if done.run.result.updates * config.steps_per_rollout >= STEPS:
                break
        else:
            done = again(sim, config, resume=checkpoint)
        assert done.run.result.params_sha256 == whole[shape]
        assert done.run.result.env_steps == STEPS
        return done.run.result.status

    assert explore(one, 40).count("completed") > 20


def again(sim: Sim, config: aiorl.Config, **options: Any) -> Simulated:
    """One more simulated run with faults of its own."""
    inner = Sim(sim.seed * 1000 + int(sim.rng.integers(1000)), limit_s=LIMIT_S)
    plan = FaultPlan.random(inner.rng, int(config.workers), steps=STEPS)
    done = inner.run(simulate(inner, config, plan, pace=Pace.random(inner.rng), **options))
    done.check_laws()
    assert not inner.left
    return done


class Stopper:
    """Stops a run after a while."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s

    async def __call__(self, run: aiorl.Run) -> None:
        await asyncio.sleep(self._after_s)
        run.stop(final_evaluation=False)


def test_what_fails_at_a_fault_point_breaks_no_law(folder: Folder) -> None:
    """The run may fail, but it accounts for every transition and ends; and each point is passed."""
    points = FaultPoints()

    def one(sim: Sim) -> Trial:
        name = list(POINTS)[sim.seed % len(POINTS)]
        failing = FaultPoints({name: int(sim.rng.integers(1, 10))})
        with armed(failing):
            found = trial(sim, folder, meddle=False)
        points.passed.update(failing.passed)
        return found

    found = explore(one, 48, limit_s=LIMIT_S)
    assert {one.status for one in found} == {"failed", "completed"}
    assert all("planned at" in one.error for one in found if one.status == "failed")
    assert not points.never, points.report()


def test_an_environment_that_does_not_reproduce_breaks_no_law_but_exactness(folder: Folder) -> None:
    """Its open episodes are aborted: no row is joined to one of another episode, and no return is made up."""

    def one(sim: Sim) -> int:
        plan = FaultPlan().kill(0, at=stored(int(sim.rng.integers(STEPS)))).kill(1, at=step(int(sim.rng.integers(40))))
        done = sim.run(simulate(sim, folder.config(SHAPES[3], env="run_envs:Unseeded"), plan))
        done.check_laws()
        tape = tape_of(done.run)
        return sum(int(taken.aborted.sum()) for taken in tape.rollouts)

    assert sum(explore(one, 10, limit_s=LIMIT_S)) > 10


def test_versions_are_told_apart_where_an_update_changes_nothing(folder: Folder) -> None:
    """A learning rate that was annealed to 0, and updates that came to NaN and were skipped."""
    still = {"algo": Recording.of(Still(after=4, not_finite=(2, 7))), "on_nonfinite": "skip"}
    found = explore(lambda sim: trial(sim, folder, shape=(3, 4, 6, 9)[sim.seed % 4], **still), 20, limit_s=LIMIT_S)
    assert "completed" in {one.status for one in found}
    assert sum(one.restarts for one in found) > 5


def test_an_update_that_fails_breaks_no_law(folder: Folder) -> None:
    """What it was given is not in the books."""

    def one(sim: Sim) -> str:
        failing = Recording.of(Still(after=99, not_finite=(3,)))
        done = sim.run(simulate(sim, folder.config(SHAPES[sim.seed % 4], algo=failing), pace=Pace.random(sim.rng)))
        done.check_laws()
        assert len(tape_of(done.run).rollouts) == 4
        return done.run.result.status

    assert explore(one, 4, limit_s=LIMIT_S) == ["failed"] * 4


def broken_env(folder: Folder, faults: list[list[Any]], **changes: Any) -> dict[str, Any]:
    """A configuration in which environments return what is not finite, and its episode is aborted."""
    marks = folder.path / f"marks {folder.config().out}".replace("/", "_")
    marks.mkdir()
    kwargs = {"wraps": LEDGER_ENV, "faults": faults, "marks": str(marks)}
    return {
        "env": "aiorl.testing.faults:FaultEnv", "env_kwargs": kwargs, "on_nonfinite_env": "abort_episode", "eval_every": 0,
        **changes,
    }  # fmt: skip


def test_aborted_episodes_break_no_law(folder: Folder) -> None:
    """An environment returns NaN now and then, while workers die: the step is dropped, the episode has no return."""

    def one(sim: Sim) -> int:
        faults = [["nan_obs" if k % 2 else "nan", int(sim.rng.integers(1, 30))] for k in range(6)]
        plan = FaultPlan.random(sim.rng, 2, steps=STEPS)
        shape = SHAPES[(2, 4, 5, 8)[sim.seed % 4]]
        done = sim.run(simulate(sim, folder.config(shape, **broken_env(folder, faults)), plan, pace=Pace.random(sim.rng)))
        done.check_laws()
        result = done.run.result
        assert result.status == "completed"
        assert result.dropped.get("not finite", 0) == result.aborted
        return result.aborted

    assert sum(explore(one, 20, limit_s=LIMIT_S)) > 60


# -- planted bugs ------------------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def nth(number: int) -> Callable[[], bool]:
    """True at every `number`-th call."""
    count = iter(range(1, 10**9))
    return lambda: next(count) % number == 0


def drop_a_segment(patch: pytest.MonkeyPatch) -> None:
    """The last segment of a rollout does not get to the learner."""
    update, due = Trainer.update, nth(6)

    def planted(self: Trainer, plan: RolloutPlan, segments: tuple[Segment, ...]) -> Outcome:
        if due():
            plan, segments = plan._replace(parts=plan.parts[:-1]), segments[:-1]
        return update(self, plan, segments)

    patch.setattr(Trainer, "update", planted)


def lose_a_doorbell(patch: pytest.MonkeyPatch) -> None:
    on_record, due = ProcessWorkers._on_record, nth(20)
    patch.setattr(ProcessWorkers, "_on_record", lambda self, record: None if due() else on_record(self, record))


def deliver_twice(patch: pytest.MonkeyPatch) -> None:
    """One segment takes the place of another one."""
    update, due = Trainer.update, nth(6)

    def planted(self: Trainer, plan: RolloutPlan, segments: tuple[Segment, ...]) -> Outcome:
        if due():
            plan = plan._replace(parts=(*plan.parts[:-1], plan.parts[0]))
            segments = (*segments[:-1], segments[0])
        return update(self, plan, segments)

    patch.setattr(Trainer, "update", planted)


def ring_twice(patch: pytest.MonkeyPatch) -> None:
    on_record, due = ProcessWorkers._on_record, nth(9)

    def planted(self: ProcessWorkers, record: Record) -> None:
        on_record(self, record)
        if due():
            on_record(self, record)

    patch.setattr(ProcessWorkers, "_on_record", planted)


def tear_a_row(patch: pytest.MonkeyPatch) -> None:
    """The second half of an observation is that of the row before."""
    answer, due = Station.answer, nth(10)

    async def planted(self: Station, credit: Record) -> Record:
        reply = await answer(self, credit)
        if self._setup.groups and due():
            [leaf] = self._segments[credit.group, credit.slot].obs.values()
            leaf[2, 0, 2:] = leaf[1, 0, 2:]
        return reply

    patch.setattr(Station, "answer", planted)


def write_into_another_slot(patch: pytest.MonkeyPatch) -> None:
    """A worker overwrites a segment that the learner has not read yet."""
    answer, due = Station.answer, nth(10)

    async def planted(self: Station, credit: Record) -> Record:
        if self._setup.groups and due():
            reply = await answer(self, credit._replace(slot=(credit.slot + 1) % self._setup.slots))
            return reply._replace(slot=credit.slot)
        return await answer(self, credit)

    patch.setattr(Station, "answer", planted)


def act_with_older_weights(patch: pytest.MonkeyPatch) -> None:
    """The oldest weights that are still there instead of those that were asked for."""
    acquire = WeightStore.acquire
    patch.setattr(WeightStore, "acquire", lambda self, version: acquire(self, self.versions[0]))


def grant_beyond_the_bound(patch: pytest.MonkeyPatch) -> None:
    place = Ordered.place

    def planted(self: Ordered, group: int, ordinal: int) -> tuple[int, int] | None:
        found = place(self, group, ordinal)
        return found and (found[0], max(0, found[1] - 1))

    patch.setattr(Ordered, "place", planted)


def overwrite_weights_in_use(patch: pytest.MonkeyPatch) -> None:
    """Published weights change while workers act with them."""
    write = WeightStore.write

    def planted(self: WeightStore, buffer: int, weights: Any) -> None:
        write(self, buffer, weights)
        for used in self._buffer_of.values():
            write(self, used, weights)

    patch.setattr(WeightStore, "write", planted)


def forget_open_credits(patch: pytest.MonkeyPatch) -> None:
    """What a worker was doing when it died is not asked for again."""
    enter = Keeper.enter

    async def planted(self: Keeper) -> None:
        self._outstanding.clear()
        await enter(self)

    patch.setattr(Keeper, "enter", planted)


def forget_what_was_delivered(patch: pytest.MonkeyPatch) -> None:
    """The environments of a dead worker are brought back to where the learner is, not to where they were."""
    where = Trainer.where
    patch.setattr(Trainer, "where", lambda self, group, delivered: where(self, group, {}))


def lose_a_wake_up(patch: pytest.MonkeyPatch) -> None:
    """Another task may come between the look and the wait."""

    async def wait_for(self: Gate, predicate: Callable[[], bool]) -> None:
        while not predicate():
            await asyncio.sleep(0)
            await self.wait()

    patch.setattr(Gate, "wait_for", wait_for)


def forget_to_wake(patch: pytest.MonkeyPatch) -> None:
    wake, due = Gate.wake, nth(7)
    patch.setattr(Gate, "wake", lambda self: None if due() else wake(self))


def wait_twice(patch: pytest.MonkeyPatch) -> None:
    """What the learner waited for is counted twice."""
    booked = Session._booked

    async def planted(self: Session, plan: RolloutPlan, outcome: Outcome, waited_s: float) -> None:
        assert self.parts is not None
        self.parts.waiting_s["train"] += waited_s
        await booked(self, plan, outcome, waited_s)

    patch.setattr(Session, "_booked", planted)


def collect_two_at_once(patch: pytest.MonkeyPatch) -> None:
    """A segment was begun before the one before it was full."""
    update, due = Trainer.update, nth(6)

    def planted(self: Trainer, plan: RolloutPlan, segments: tuple[Segment, ...]) -> Outcome:
        if due():
            segments[0].header[SegmentHeader.STARTED_S] -= 60.0
        return update(self, plan, segments)

    patch.setattr(Trainer, "update", planted)


def evaluate_another_version(patch: pytest.MonkeyPatch) -> None:
    """The oldest weights that are still there instead of the newest."""

    def planted(self: Evaluator, final: bool) -> Snapshot:
        version, weights = self._parts.pacer.commits, self._parts.weights
        return Snapshot(version, self._report.stored, weights.acquire(weights.versions[0]), final)

    patch.setattr(Evaluator, "_newest", planted)


def evaluate_with_training_seeds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(episodes, "evaluation_seed", lambda root, episode, *, fresh: episode_seed(root, 0, episode))


def train_with_evaluation_seeds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(single, "episode_seed", lambda root, env, episode, again=0: evaluation_seed(root, episode))


@pytest.mark.parametrize(
    ("plant", "shape", "laws"),
    [
        (drop_a_segment, 2, {"unique", "order", "kept", "contiguous"}),
        (lose_a_doorbell, 2, {"deadlock", "promises"}),
        (deliver_twice, 2, {"unique"}),
        (ring_twice, 3, {"promises"}),
        (tear_a_row, 2, {"true"}),
        (write_into_another_slot, 3, {"unique", "true"}),
        (act_with_older_weights, 9, {"lag"}),
        (grant_beyond_the_bound, 2, {"promises"}),
        (overwrite_weights_in_use, 3, {"versions"}),
        (forget_open_credits, 2, {"deadlock", "promises"}),  # nobody answers, or somebody whom nobody asked
        (forget_what_was_delivered, 4, {"unique"}),
        (lose_a_wake_up, 1, {"deadlock"}),
        (forget_to_wake, 0, {"deadlock"}),
        (wait_twice, 0, {"time"}),
        (collect_two_at_once, 2, {"time"}),
        (evaluate_another_version, 3, {"evaluation"}),
        (evaluate_with_training_seeds, 1, {"evaluation"}),
        (train_with_evaluation_seeds, 1, {"evaluation"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_bug_is_found(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, plant: Plant, shape: int, laws: set[str]
) -> None:
    explore(lambda sim: trial(sim, folder, shape=shape, meddle=False), 3, limit_s=LIMIT_S)  # there is nothing to find
    plant(monkeypatch)
    with pytest.raises(SeedFailure) as found:
        explore(lambda sim: trial(sim, folder, shape=shape, meddle=False), 100, limit_s=LIMIT_S)
    cause = found.value.__cause__
    assert isinstance(cause, Deadlock | LawsBroken)
    broken = {violation.law for violation in cause.violations} if isinstance(cause, LawsBroken) else {"deadlock"}
    assert broken & laws, str(cause)


def test_stale_weights_are_found_where_all_weights_are_the_same(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_with_older_weights(monkeypatch)
    with pytest.raises(SeedFailure) as found:
        explore(lambda sim: trial(sim, folder, shape=9, meddle=False, algo=Recording.of(Still())), 20, limit_s=LIMIT_S)
    assert isinstance(found.value.__cause__, LawsBroken)
    assert "lag" in {violation.law for violation in found.value.__cause__.violations}


def keep_the_row(patch: pytest.MonkeyPatch) -> None:
    """The row that a step was spent on is stored as it is."""
    spend = Aborts.spend

    def planted(self: Aborts, segment: Segment, t: int) -> list[int]:
        again = spend(self, segment, t)
        segment.columns["valid"][t] = True
        return again

    patch.setattr(Aborts, "spend", planted)


def go_on_in_the_same_episode(patch: pytest.MonkeyPatch) -> None:
    spend = Aborts.spend
    patch.setattr(Aborts, "spend", lambda self, segment, t: spend(self, segment, t)[:0])


def count_no_drop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Report, "drop", lambda self, reason, env_steps: None)


@pytest.mark.parametrize(
    ("plant", "laws"),
    [
        (keep_the_row, {"kept", "unique", "returns"}), (go_on_in_the_same_episode, {"unique", "true"}),
        (count_no_drop, {"kept"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_a_planted_bug_in_aborting_is_found(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, plant: Plant, laws: set[str]
) -> None:
    plant(monkeypatch)
    faults = [[what, at] for at in (3, 9, 17) for what in ("nan", "nan_obs")]

    def abort_some(sim: Sim) -> None:
        sim.run(simulate(sim, folder.config(SHAPES[2], **broken_env(folder, faults)))).check_laws()

    with pytest.raises(SeedFailure) as found:  # not every schedule comes to a fault
        explore(abort_some, 30, limit_s=LIMIT_S)
    assert isinstance(found.value.__cause__, LawsBroken)
    assert {violation.law for violation in found.value.__cause__.violations} & laws


def begin_anew(patch: pytest.MonkeyPatch) -> None:
    """A resumed run's environments begin with their first episode again."""
    patch.setattr(Ledger, "cursor", lambda self, group: None)


def forget_a_counter(patch: pytest.MonkeyPatch) -> None:
    load = Report.load_state_dict

    def planted(self: Report, state: dict[str, Any], stored: int) -> None:
        load(self, state, stored)
        self.gradient_steps = 0

    patch.setattr(Report, "load_state_dict", planted)


def skip_a_step(patch: pytest.MonkeyPatch) -> None:
    """The environment of each group takes one step more than is told."""
    load = Ledger.load_state_dict

    def planted(self: Ledger, state: dict[str, Any]) -> None:
        load(self, state)
        for books in self._books:
            books.lengths += 1
            books.totals += 1.0

    patch.setattr(Ledger, "load_state_dict", planted)


@pytest.mark.parametrize(
    ("plant", "laws"),
    [(begin_anew, {"unique", "resume"}), (forget_a_counter, {"resume"}), (skip_a_step, {"returns"})],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_bug_in_resuming_is_found(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, plant: Plant, laws: set[str]
) -> None:
    config = folder.config(SHAPES[2])

    async def stop(run: aiorl.Run) -> None:
        await anext(e async for e in run.events() if e.version == 3)
        run.stop(final_evaluation=False)

    sim = Sim(0, limit_s=LIMIT_S)
    first = sim.run(simulate(sim, config, host=stop))
    first.check_laws()
    half = folder.path / f"half {plant.__name__}"
    shutil.copytree(first.run.directory, half)
    for planted in (False, True):
        if planted:
            plant(monkeypatch)
        sim = Sim(1, limit_s=LIMIT_S)
        copy = folder.path / f"{half.name} {planted}"
        shutil.copytree(half, copy)
        done = sim.run(simulate(sim, config.replace(out=str(copy)), resume=copy))
        if not planted:
            done.check_laws()
            continue
        with pytest.raises(LawsBroken) as found:
            done.check_laws()
        assert {violation.law for violation in found.value.violations} & laws, str(found.value)


# -- the tape ----------------------------------------------------------------------------------------------------------


def test_the_tape_has_everything_that_was_learned_from(folder: Folder) -> None:
    sim = Sim(0)
    done = sim.run(simulate(sim, folder.config(SHAPES[3])))
    tape = tape_of(done.run)
    assert sum(int(taken.columns["valid"].sum()) for taken in tape.rollouts) == done.run.result.env_steps == STEPS
    assert len(tape.versions) == done.run.result.updates + 1


def test_laws_need_a_recording(folder: Folder) -> None:
    sim = Sim(0)
    done = sim.run(simulate(sim, folder.config(algo=Mark())))
    with pytest.raises(aiorl.ConfigError, match=r"not recorded\n.*Recording"):
        check_laws(done.run)
