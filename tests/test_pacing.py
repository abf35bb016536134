"""The pacer: its invariants after every event of random histories, and its plain behaviour."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiorl.errors import ConfigError, InvariantError
from aiorl.pacing import Grant, Pacer, RecordedRollout, RolloutPlan

SEGMENT_STEPS = 10


def make(
    degree: int = 1, groups: int = 2, rollouts: int = 5, schedule: str = "ordered", degree_max: int | None = None
) -> Pacer:
    return Pacer(
        degree,
        groups,
        total_steps=rollouts * groups * SEGMENT_STEPS,
        segment_steps=SEGMENT_STEPS,
        schedule=schedule,
        degree_max=degree_max,
    )


class Histories(RuleBasedStateMachine):
    """Groups and updates that take any time, workers that die and do it again, changes of degree, pauses, a stop, a resume.

    The model keeps its own account of what the bound was when a rollout (`ordered`) or a segment (`eager`) was admitted.
    """

    @initialize(
        degree=st.integers(0, 4),
        more=st.integers(0, 4),
        groups=st.integers(1, 4),
        workers=st.integers(1, 4),
        rollouts=st.integers(1, 12),
        schedule=st.sampled_from(["ordered", "eager"]),
    )
    def begin(self, degree: int, more: int, groups: int, workers: int, rollouts: int, schedule: str) -> None:
        self.arguments = (degree, groups, rollouts, schedule, degree + more)
        self.ordered = schedule == "ordered"
        self.workers = min(workers, groups)
        self.degree = degree
        self.used: list[Grant] = []
        self.used_steps = 0
        self.renew()

    def renew(self) -> None:
        self.pacer = make(*self.arguments)
        self.flying: list[Grant] = []
        self.down: set[int] = set()  # workers that have died and are not back
        self.ready: list[RolloutPlan] = []
        self.running: RolloutPlan | None = None
        self.grants_seen = {(p.group, p.ordinal) for p in self.used}
        self.granted_under: dict[tuple[int, int], int] = {}
        self.admitted_under: list[int] = []  # degree at which each rollout was admitted
        self.steps_of: dict[tuple[int, int], int] = {}

    def note_admissions(self) -> None:
        admitted = self.pacer.statistics()["rollouts_admitted"]
        while len(self.admitted_under) < admitted:
            k = len(self.admitted_under)
            assert k <= self.pacer.commits + self.degree, "collection runs away"
            self.admitted_under.append(self.degree)

    def is_up(self, group: int) -> bool:
        return group * self.workers // self.pacer.groups not in self.down

    def take(self, granted: Grant) -> None:
        assert (granted.group, granted.ordinal) not in self.grants_seen, "granted twice"
        self.grants_seen.add((granted.group, granted.ordinal))
        assert self.pacer.oldest_needed_version <= granted.version <= self.pacer.commits, "no such version"
        if self.ordered and not self.pacer.degree_changed:
            assert granted.version == max(0, granted.ordinal - self.pacer.degree)
        self.granted_under[granted.group, granted.ordinal] = self.degree
        self.flying.append(granted)

    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        granted = self.pacer.grant(data.draw(st.integers(0, self.pacer.groups - 1)))
        if granted is not None:
            self.take(granted)

    def could_arrive(self) -> list[Grant]:
        """A group's segments arrive in order."""
        firsts = {g.group: g for g in reversed(self.flying) if self.is_up(g.group)}
        return sorted(firsts.values())

    @precondition(lambda self: self.could_arrive())
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        granted = data.draw(st.sampled_from(self.could_arrive()))
        steps = data.draw(st.integers(SEGMENT_STEPS // 2, SEGMENT_STEPS))
        self.flying.remove(granted)
        self.steps_of[granted.group, granted.ordinal] = steps
        self.ready += self.pacer.arrived(granted.group, granted.slot, steps)

    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        """What it had not delivered is sent again when it is back: the grants stand."""
        self.down.add(data.draw(st.integers(0, self.workers - 1)))

    @precondition(lambda self: self.down)
    @rule()
    def workers_are_back(self) -> None:
        self.down.clear()

    @precondition(lambda self: self.ready and self.running is None)
    @rule()
    def begin_update(self) -> None:
        self.running = self.ready.pop(0)
        self.pacer.begin_update(self.running)

    @precondition(lambda self: self.running is not None)
    @rule()
    def commit(self) -> None:
        assert self.running is not None
        assert self.pacer.commit() == self.running.index + 1
        self.used += self.running.parts
        self.used_steps += sum(self.steps_of[p.group, p.ordinal] for p in self.running.parts)
        self.running = None

    @rule(data=st.data())
    def change_degree(self, data: st.DataObject) -> None:
        degree = data.draw(st.integers(0, self.pacer.degree_max))
        self.pacer.change_degree(degree)
        self.note_admissions()  # what the old degree had room for
        self.degree = degree

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.pacer.paused = paused
        if paused:
            assert all(self.pacer.grant(g) is None for g in range(self.pacer.groups))

    @rule()
    def stop(self) -> None:
        """Cancelling a run leaves what was granted unanswered; nothing more is granted, and nothing is lost sight of."""
        self.pacer.stopped = True
        assert all(self.pacer.grant(g) is None for g in range(self.pacer.groups))
        flying, arrived = self.pacer.unused()
        assert sorted(flying) == sorted(self.flying)
        of_plans = [p for plan in self.ready for p in plan.parts]
        assert set(of_plans) <= set(arrived)
        learned = set(self.used) | set(self.running.parts if self.running else ())
        assert {(g.group, g.ordinal) for g in (*flying, *arrived, *learned)} == self.grants_seen
        self.pacer.stopped = False

    @precondition(lambda self: self.running is None)
    @rule()
    def crash_and_resume(self) -> None:
        """All that was not learned from is lost and granted again under the same names."""
        commits, changed = self.pacer.commits, self.pacer.degree_changed
        ordinals = [sum(p.group == g for p in self.used) for g in range(self.pacer.groups)]
        self.renew()
        self.pacer.resume(commits, ordinals, self.used_steps, self.degree if changed else None)
        self.admitted_under = [self.degree] * commits
        self.steps_of = {}

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "pacer"):
            return
        pacer = self.pacer
        self.note_admissions()
        assert pacer.degree == self.degree
        assert pacer.commits <= pacer.started <= pacer.commits + 1
        assert pacer.waiting == len(self.ready)
        assert pacer.in_flight == len(self.flying)
        for plan in [*self.ready, *([self.running] if self.running else [])]:
            assert len(plan.parts) == pacer.groups
            assert 0 <= plan.staleness <= pacer.degree_max
            if self.ordered:
                assert plan.staleness <= self.admitted_under[plan.index]
            else:
                assert all(plan.index - p.version <= self.granted_under[p.group, p.ordinal] for p in plan.parts)
        for group in range(pacer.groups):
            slots = [g.slot for g in self.flying if g.group == group]
            slots += [p.slot for plan in self.ready for p in plan.parts if p.group == group]
            assert len(slots) == len(set(slots)) <= pacer.slots, "two segments in one slot"

    @invariant()
    def something_can_happen(self) -> None:
        """No deadlock: with nothing under way and nothing ready, somebody may begin, unless the budget is used up."""
        if not hasattr(self, "pacer") or self.pacer.paused:
            return
        if not (self.flying or self.ready or self.running or self.pacer.finished):
            granted = [g for g in map(self.pacer.grant, range(self.pacer.groups)) if g is not None]
            assert granted, f"stuck: {self.pacer.statistics()}"
            for g in granted:
                self.take(g)

    def teardown(self) -> None:
        """Whatever happened, the rest runs to the end."""
        if not hasattr(self, "pacer"):
            return
        pacer = self.pacer
        pacer.paused = False
        self.down.clear()
        for _ in range(10_000):
            if pacer.finished and self.running is None and not self.flying:
                break
            for granted in map(pacer.grant, range(pacer.groups)):
                if granted is not None:
                    self.take(granted)
            self.bounds_hold()
            if self.running is not None:
                self.commit()
            elif self.ready:
                self.begin_update()
            elif self.flying:
                granted = self.flying.pop(0)
                self.steps_of[granted.group, granted.ordinal] = SEGMENT_STEPS
                self.ready += pacer.arrived(granted.group, granted.slot, SEGMENT_STEPS)
        assert pacer.finished, f"did not end: {pacer.statistics()}"
        assert pacer.unused() == ([], []), "something was collected in vain"
        assert pacer.steps == self.used_steps >= pacer.total_steps, "the budget was not used up"
        assert pacer.steps < pacer.total_steps + pacer.groups * SEGMENT_STEPS, "more than one rollout too many"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


@pytest.mark.long
def test_ten_thousand_histories() -> None:
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=10_000, stateful_step_count=40, deadline=None, database=None)
    )


Record = list[RecordedRollout]


def simulate(
    degree: int,
    groups: int,
    schedule: str,
    rng: random.Random,
    record: Record | None = None,
    degree_max: int | None = None,
    faults: float = 0.0,
) -> list[RolloutPlan]:
    """Run to the end with random durations on a virtual clock; returns the rollouts in order of use.

    `faults` is the probability that a segment is lost with its worker and collected again. With a `degree_max` the degree
    changes at random.
    """
    pacer = Pacer(
        degree,
        groups,
        total_steps=20 * groups * SEGMENT_STEPS,
        segment_steps=SEGMENT_STEPS,
        schedule=schedule,
        record=record,
        degree_max=degree_max,
    )
    now, events = 0.0, []
    speeds = [rng.choice([0.2, 1.0, 5.0]) for _ in range(groups)]
    ready: list[RolloutPlan] = []
    used: list[RolloutPlan] = []
    running: RolloutPlan | None = None
    busy_until = [0.0] * groups
    while not (pacer.finished and running is None):
        for group in range(groups):
            while (granted := pacer.grant(group)) is not None:
                attempts = 1
                while rng.random() < faults:
                    attempts += 1
                busy_until[group] = max(busy_until[group], now) + attempts * speeds[group] * rng.lognormvariate(0, 1)
                events.append((busy_until[group], "arrive", granted))
        if running is None and ready:
            running = ready.pop(0)
            pacer.begin_update(running)
            events.append((now + rng.lognormvariate(0, 1), "commit", running))
        assert events, f"deadlock: {pacer.statistics()}"
        events.sort(key=lambda e: e[0])
        now, what, item = events.pop(0)
        if what == "arrive":
            ready += pacer.arrived(item.group, item.slot, SEGMENT_STEPS)
        else:
            pacer.commit()
            used.append(item)
            running = None
            if degree_max is not None and rng.random() < 0.3:
                pacer.change_degree(rng.randint(0, degree_max))
    return used


@pytest.mark.parametrize("changing", [False, True], ids=["one degree", "changing degree"])
@pytest.mark.parametrize("schedule", ["ordered", "eager"])
def test_no_deadlock_and_no_violation_in_ten_thousand_timings(schedule: str, changing: bool) -> None:
    """2500 histories for each of four cases, with workers that die, on a virtual clock."""
    rng = random.Random(7)
    worst = 0
    for _ in range(2500):
        degree, groups = rng.randrange(5), rng.randrange(1, 6)
        degree_max = degree + rng.randrange(4) if changing else None
        used = simulate(degree, groups, schedule, rng, degree_max=degree_max, faults=rng.choice([0.0, 0.1]))
        assert [plan.index for plan in used] == list(range(20))
        assert all(0 <= plan.staleness <= (degree_max or degree) for plan in used)
        worst = max(worst, *(plan.staleness for plan in used))
    assert worst >= 4, "the bound should be met somewhere, else this test proves little"


def test_ordered_rollouts_do_not_depend_on_timing() -> None:
    runs = [simulate(2, 3, "ordered", random.Random(seed)) for seed in range(20)]
    summaries = {tuple((p.index, tuple((g.group, g.ordinal, g.version) for g in p.parts)) for p in run) for run in runs}
    assert len(summaries) == 1
    eager = {
        tuple((p.index, tuple((g.group, g.ordinal, g.version) for g in p.parts)) for p in run)
        for run in (simulate(2, 3, "eager", random.Random(seed)) for seed in range(20))
    }
    assert len(eager) > 1, "arrival order should matter in the eager schedule, else the first half proves nothing"


def test_a_record_repeats_any_run_in_any_timing() -> None:
    rng = random.Random(3)
    for _ in range(300):
        degree, groups = rng.randrange(5), rng.randrange(1, 6)
        schedule = rng.choice(["ordered", "eager"])
        degree_max = rng.choice([None, degree + 2])
        first = simulate(degree, groups, schedule, rng, degree_max=degree_max)
        record = [RecordedRollout(tuple(g.group for g in p.parts), tuple(g.version for g in p.parts)) for p in first]
        again = simulate(degree_max or degree, groups, schedule, rng, record)
        assert parts_of(again) == parts_of(first)


def parts_of(used: list[RolloutPlan]) -> list[tuple[int, list[tuple[int, int, int]]]]:
    return [(p.index, [(g.group, g.ordinal, g.version) for g in p.parts]) for p in used]


@pytest.mark.parametrize(
    "line",
    [
        RecordedRollout((0,), (0,)),
        RecordedRollout((0, 5), (0, 0)),
        RecordedRollout((0, 1), (1, 0)),
        RecordedRollout((0, 1), (0,)),
    ],
    ids=["groups missing", "no such group", "version of the future", "versions missing"],
)
def test_a_record_of_something_else_is_refused(line: RecordedRollout) -> None:
    with pytest.raises(ConfigError, match="rollout 0 of the record does not fit 2 groups"):
        Pacer(1, 2, total_steps=100, segment_steps=10, record=[line])


def test_degree_0_alternates() -> None:
    pacer = make(degree=0, groups=1)
    for k in range(3):
        granted = pacer.grant(0)
        assert granted == Grant(0, k, 0, k)
        assert pacer.grant(0) is None, "a second segment before the update would be stale"
        (plan,) = pacer.arrived(0, 0, SEGMENT_STEPS)
        pacer.begin_update(plan)
        assert pacer.grant(0) is None, "the update is still running"
        pacer.commit()


def test_a_straggler_does_not_break_the_bound_in_the_eager_schedule() -> None:
    pacer = make(degree=1, groups=2, rollouts=50, schedule="eager")
    slow = pacer.grant(0)
    assert slow is not None
    commits = 0
    while True:
        fast = pacer.grant(1)
        if fast is None:
            break
        for plan in pacer.arrived(1, fast.slot, SEGMENT_STEPS):
            pacer.begin_update(plan)
            pacer.commit()
            commits += 1
    assert commits == 1, "the fast group goes on until the straggler would become too stale, no further"
    plans = pacer.arrived(0, slow.slot, SEGMENT_STEPS)
    assert [plan.staleness for plan in plans] == [1]


@pytest.mark.parametrize("schedule", ["ordered", "eager"])
def test_a_lower_degree_only_holds_admission_back(schedule: str) -> None:
    pacer = make(degree=3, groups=1, rollouts=50, schedule=schedule)
    plans: list[RolloutPlan] = []
    while (granted := pacer.grant(0)) is not None:
        plans += pacer.arrived(0, granted.slot, SEGMENT_STEPS)
    assert [plan.behaviour_version for plan in plans] == [0, 0, 0, 0]
    pacer.change_degree(0)
    for plan in plans:
        assert pacer.grant(0) is None, "what the old degree admitted must be learned from first"
        pacer.begin_update(plan)
        pacer.commit()
    granted = pacer.grant(0)
    assert granted is not None
    assert granted.version == 4
    assert pacer.grant(0) is None


def test_a_higher_degree_asks_for_no_version_that_is_gone() -> None:
    pacer = make(degree=0, groups=1, rollouts=50, degree_max=3)
    for _ in range(5):
        granted = pacer.grant(0)
        assert granted is not None
        (plan,) = pacer.arrived(0, granted.slot, SEGMENT_STEPS)
        pacer.begin_update(plan)
        pacer.commit()
    pacer.change_degree(3)
    versions = [granted.version for granted in iter(lambda: pacer.grant(0), None)]
    assert versions == [5, 5, 5, 5]


def test_a_degree_beyond_the_memory_is_refused() -> None:
    pacer = make(degree=1, degree_max=2)
    with pytest.raises(ConfigError, match="off_policy_degree = 3: this run can change it to 0 to 2"):
        pacer.change_degree(3)


def test_wrong_calls_are_refused() -> None:
    pacer = make()
    with pytest.raises(InvariantError, match="without a grant"):
        pacer.arrived(0, 0, 1)
    with pytest.raises(InvariantError, match="must not start"):
        pacer.begin_update(RolloutPlan(0, (Grant(0, 0, 0, 0),)))
    with pytest.raises(InvariantError, match="no update"):
        pacer.commit()
    with pytest.raises(InvariantError, match="cannot resume"):
        pacer.resume(3, [3, 2], 10)


@pytest.mark.parametrize(
    ("degree", "groups", "steps", "schedule", "message"),
    [
        (-1, 1, 1, "ordered", "off_policy_degree = -1"),
        (0, 0, 1, "ordered", "groups = 0"),
        (0, 1, 0, "ordered", "segment_steps = 0"),
        (0, 1, 1, "newest", "schedule = 'newest'"),
    ],
)
def test_limits_that_cannot_work_are_refused(degree: int, groups: int, steps: int, schedule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pacer(degree, groups, total_steps=10, segment_steps=steps, schedule=schedule)
