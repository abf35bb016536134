"""When collecting and learning may go on: `off_policy_degree` as a pure state machine.

Vocabulary. Rollout k takes one segment from each of the `G` groups (`ordered`) or the next `G` segments to arrive (`eager`).
Update k learns from rollout k and publishes version k + 1. b_k is the oldest version that acted in rollout k.

Invariants, checked at every call (a violation raises InvariantError, it is never logged and passed over):

    staleness        0 <= k - b_k <= D for every rollout that is learned from
    data causality   update k starts only after all of rollout k has arrived
    run-ahead        rollouts admitted <= updates done + D + 1
    exactly once     each granted segment arrives once and is part of exactly one rollout

`ordered`: rollout k is always collected by version b_k = max(0, k - D), which exists when the rollout is admitted (update
k - D - 1 is done). Everything but the timing is decided beforehand, so the result does not depend on it; every degree is
reproducible, and degree 0 is the sequential loop.

`recorded`: as `ordered`, but which segments, acted by which versions, make up each rollout is read from the record of an
earlier run. So every finished run can be repeated, also an eager one.

`eager`: an idle group gets the newest version at once, and segments are used in the order they arrive. A straggler may be
overtaken, so it is not enough to bound each segment when it starts: it also limits what may be admitted after it. A segment
acted by version b lands, at the latest, behind everything admitted so far; keeping admitted <= (b + D + 1) * G for the
oldest b in flight keeps its rollout index within b + D.

The degree may change while running, up to the `degree_max` that memory was laid out for. What has been admitted keeps the
bound that it was admitted under; what follows acts with no older version than the newest one at the change, so lowering
the degree only holds admission back until the new bound is met, and raising it asks for no version that is gone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from aiorl.errors import ConfigError, InvariantError


class Grant(NamedTuple):
    """Leave to collect one segment: the group's `ordinal`-th, into `slot`, acting with `version`."""

    group: int
    ordinal: int
    slot: int
    version: int


class RolloutPlan(NamedTuple):
    """Rollout `index` and the grants that make it up, in the order they are put side by side."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody needs tuple.index here
    parts: tuple[Grant, ...]
    arrived_at: int = 0  # how many updates were done when its last segment arrived

    @property
    def behaviour_version(self) -> int:
        """b_k: the oldest version that acted."""
        return min(part.version for part in self.parts)

    @property
    def staleness(self) -> int:
        return self.index - self.behaviour_version

    @property
    def staleness_in_queue(self) -> int:
        """The part of its staleness that came after it was complete; the rest came while it was collected."""
        return self.index - self.arrived_at


class RecordedRollout(NamedTuple):
    """One line of a run's record: the groups whose segments made up a rollout, side by side, and who acted in each."""

    order: tuple[int, ...]
    versions: tuple[int, ...]


class Script(Protocol):
    """Says beforehand which segments make up which rollout, and which version acts in them."""

    @property
    def rollouts(self) -> int | None:
        """How many there are, None if only the budget ends them."""
        ...

    def place(self, group: int, ordinal: int) -> tuple[int, int] | None:
        """(rollout, version) of a group's `ordinal`-th segment; None if the script has no such segment."""
        ...

    def parts(self, rollout: int) -> Sequence[tuple[int, int]]:
        """The (group, ordinal) of each segment of a rollout, in order."""
        ...


class Ordered:
    """Rollout k is the k-th segment of each group, acted by version max(0, k - D)."""

    rollouts: int | None = None

    def __init__(self, degree: int, groups: int) -> None:
        self._groups = groups
        self._changes = [(0, degree, 0)]  # (first rollout, degree, oldest version that may act from there on)

    def change_degree(self, degree: int, rollout: int, version: int) -> None:
        """From `rollout` on the degree is another one, and no version older than `version` acts."""
        self._changes.append((rollout, degree, version))

    def place(self, group: int, ordinal: int) -> tuple[int, int] | None:
        _, degree, oldest = self._changes[bisect_right(self._changes, ordinal, key=lambda change: change[0]) - 1]
        return ordinal, max(oldest, ordinal - degree)

    def parts(self, rollout: int) -> Sequence[tuple[int, int]]:
        return [(group, rollout) for group in range(self._groups)]


class Recorded:
    """What an earlier run did."""

    def __init__(self, record: Sequence[RecordedRollout], degree: int, groups: int) -> None:
        """Raises ConfigError if the record does not belong to a run of that degree and number of groups."""
        self.rollouts = len(record)
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._parts: list[list[tuple[int, int]]] = []
        ordinals = [0] * groups
        for k, line in enumerate(record):
            stale = [v for v in line.versions if not 0 <= k - v <= degree]
            known = all(0 <= group < groups for group in line.order)
            if len(line.order) != groups or len(line.versions) != groups or stale or not known:
                raise ConfigError(
                    f"rollout {k} of the record does not fit {groups} groups at off_policy_degree = {degree}: {line}"
                )
            self._parts.append([])
            for group, version in zip(line.order, line.versions, strict=True):
                self._places[group, ordinals[group]] = k, version
                self._parts[k].append((group, ordinals[group]))
                ordinals[group] += 1

    def place(self, group: int, ordinal: int) -> tuple[int, int] | None:
        return self._places.get((group, ordinal))

    def parts(self, rollout: int) -> Sequence[tuple[int, int]]:
        return self._parts[rollout]


class Pacer:
    """Decides who may do what next. It owns no task and reads no clock.

    `degree` is off_policy_degree, `degree_max` the largest that it may be changed to (default: no other),
    `segment_steps` the most transitions one segment can hold, `total_steps` the budget: a rollout is admitted only if
    it is needed however few valid steps the outstanding ones turn out to hold, so none is collected in vain.
    """

    def __init__(
        self,
        degree: int,
        groups: int,
        *,
        total_steps: int,
        segment_steps: int,
        schedule: str = "ordered",
        record: Sequence[RecordedRollout] | None = None,
        degree_max: int | None = None,
    ) -> None:
        self.degree_max = degree if degree_max is None else degree_max
        if not 0 <= degree <= self.degree_max:
            raise ConfigError(f"off_policy_degree = {degree}: expected 0 to {max(0, self.degree_max)}")
        if groups < 1 or segment_steps < 1 or total_steps < 1:
            raise ConfigError(
                f"nothing could ever be collected: groups = {groups}, segment_steps = {segment_steps}, "
                f"total_steps = {total_steps}; all must be at least 1"
            )
        if schedule not in ("ordered", "eager"):
            raise ConfigError(f"schedule = {schedule!r}: expected ordered or eager")
        self.degree, self.groups = degree, groups
        self._script: Script | None = Ordered(degree, groups) if schedule == "ordered" else None
        if record is not None:
            self._script = Recorded(record, self.degree_max, groups)
        self.segment_steps, self.total_steps = segment_steps, total_steps
        self.slots = self.degree_max + 1
        self.degree_changed = False
        self.commits = 0  # updates done = the newest version
        self.started = 0  # updates begun
        self.steps = 0  # transitions in all arrived segments
        self.stopped = self.paused = False
        self._decided = 0  # rollouts that are known to be needed
        self._ordinals = [0] * groups  # next segment of each group
        self._flying: list[list[Grant]] = [[] for _ in range(groups)]  # granted, not arrived, oldest first
        self._landed: dict[tuple[int, int], Grant] = {}  # arrived, not yet in a rollout, in order of arrival
        self._latest: dict[tuple[int, int], int] = {}  # of these two: the last rollout each may be part of
        self._planned = 0  # rollouts made up so far
        self._in_use: dict[int, RolloutPlan] = {}  # made up and not yet learned from
        self._free = [set(range(self.slots)) for _ in range(groups)]

    # -- admission -------------------------------------------------------------------------------------------------

    def grant(self, group: int) -> Grant | None:
        """The next grant for `group`, claimed at once, or None if it must wait."""
        if self.stopped or self.paused or not self._free[group]:
            return None
        ordinal = self._ordinals[group]
        self._decide()
        if self._script is None:
            version, latest = self.commits, self.commits + self.degree
            if self._flying[group] or not self._may_admit_eagerly(latest):
                return None
        else:
            place = self._script.place(group, ordinal)
            if place is None or place[0] >= self._decided or place[1] > self.commits:
                return None
            latest, version = place
        slot = min(self._free[group])
        self._free[group].remove(slot)
        granted = Grant(group, ordinal, slot, version)
        self._ordinals[group] += 1
        self._flying[group].append(granted)
        self._latest[group, ordinal] = latest
        return granted

    def change_degree(self, degree: int) -> None:
        """Admit under another degree from the next rollout on. Raises ConfigError if memory was not laid out for it.

        A repeated run keeps to its record, whatever the degree.
        """
        if not 0 <= degree <= self.degree_max:
            raise ConfigError(f"off_policy_degree = {degree}: this run can change it to 0 to {self.degree_max}")
        self._decide()
        self.degree, self.degree_changed = degree, True
        if isinstance(self._script, Ordered):
            self._script.change_degree(degree, self._decided, self.commits)

    def _decide(self) -> None:
        """Admit further rollouts while the bound on run-ahead allows and the budget, or the record, needs them."""
        known = self._script.rollouts if self._script is not None else None
        if known is not None:
            self._decided = min(known, self.commits + self.degree + 1)
            return
        while self._decided <= self.commits + self.degree:
            outstanding = self._decided * self.groups - self._arrived
            if self.steps + outstanding * self.segment_steps >= self.total_steps:
                return
            self._decided += 1

    def _may_admit_eagerly(self, latest: int) -> bool:
        """Whether one more segment leaves everything in flight, and itself, within the last rollout it may be part of."""
        in_flight = [self._latest[g.group, g.ordinal] for flying in self._flying for g in flying]
        return sum(self._ordinals) < min(self._decided, min([latest, *in_flight]) + 1) * self.groups

    @property
    def _arrived(self) -> int:
        """Segments that have arrived since rollout 0."""
        return self._planned * self.groups + len(self._landed)

    # -- arrival and learning --------------------------------------------------------------------------------------

    def arrived(self, group: int, slot: int, env_steps: int) -> list[RolloutPlan]:
        """A granted segment is complete; returns the rollouts that this makes ready, in order."""
        flying = self._flying[group]
        if not flying or flying[0].slot != slot:
            raise InvariantError(f"group {group} delivered slot {slot} without a grant; outstanding: {flying}")
        granted = flying.pop(0)
        self.steps += env_steps
        self._landed[granted.group, granted.ordinal] = granted
        plans: list[RolloutPlan] = []
        while (parts := self._next_parts()) is not None:
            plans.append(self._plan(tuple(self._landed.pop(part) for part in parts)))
        return plans

    def _next_parts(self) -> list[tuple[int, int]] | None:
        """What the next rollout is made of, if all of that has arrived."""
        if self._script is None:
            return list(self._landed)[: self.groups] if len(self._landed) >= self.groups else None
        if self._script.rollouts is not None and self._planned >= self._script.rollouts:
            return None
        parts = list(self._script.parts(self._planned))
        return parts if all(part in self._landed for part in parts) else None

    def _plan(self, parts: tuple[Grant, ...]) -> RolloutPlan:
        plan = RolloutPlan(self._planned, parts, self.commits)
        latest = min(self._latest.pop((part.group, part.ordinal)) for part in parts)
        if not 0 <= plan.staleness <= self.degree_max or plan.index > latest:
            raise InvariantError(
                f"rollout {plan.index} has staleness {plan.staleness}, the bound is {self.degree} (at most "
                f"{self.degree_max}), and may be no later one than {latest}"
            )
        self._planned += 1
        self._in_use[plan.index] = plan
        return plan

    def begin_update(self, plan: RolloutPlan) -> None:
        """Update `plan.index` starts. Updates start in order, one at a time, each after all of its rollout arrived."""
        if plan.index != self.started or self.started != self.commits or plan.index not in self._in_use:
            raise InvariantError(f"update {plan.index} must not start: {self.started} begun, {self.commits} done")
        self.started += 1

    def commit(self) -> int:
        """The running update is done: its slots are free again. Returns the new version."""
        if self.started != self.commits + 1:
            raise InvariantError(f"no update to commit: {self.started} begun, {self.commits} done")
        for part in self._in_use.pop(self.commits).parts:
            self._free[part.group].add(part.slot)
        self.commits += 1
        return self.commits

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """The budget is used up and every rollout has been learned from."""
        self._decide()
        return self.commits == self._decided

    @property
    def missing(self) -> list[int]:
        """The groups whose segment the next rollout waits for (of an eager schedule: that have none waiting)."""
        if self._script is None:
            landed = {group for group, _ in self._landed}
            return [group for group in range(self.groups) if group not in landed]
        if self._script.rollouts is not None and self._planned >= self._script.rollouts:
            return []
        return [group for group, ordinal in self._script.parts(self._planned) if (group, ordinal) not in self._landed]

    @property
    def in_flight(self) -> int:
        """Segments granted and not yet arrived."""
        return sum(len(flying) for flying in self._flying)

    @property
    def waiting(self) -> int:
        """Rollouts complete and not yet begun."""
        return self._planned - self.started

    @property
    def oldest_needed_version(self) -> int:
        """No later grant asks for an older version than this, also after a resume from the newest update."""
        return max(0, self.commits - self.degree_max)

    def unused(self) -> tuple[list[Grant], list[Grant]]:
        """What no update has used: (grants still in flight, segments that have arrived)."""
        flying = [g for flying in self._flying for g in flying]
        whole = [part for plan in self._in_use.values() if plan.index >= self.started for part in plan.parts]
        return flying, whole + list(self._landed.values())

    def resume(self, commits: int, ordinals: list[int], steps: int, degree: int | None = None) -> None:
        """Go on after `commits` updates that stored `steps` transitions and used `ordinals[g]` segments of each group.

        `degree` is what it had been changed to, None if never: then rollouts act with the very versions that they would
        have acted with. After a change they begin with the newest.
        """
        if self.commits or self.in_flight or len(ordinals) != self.groups or sum(ordinals) != commits * self.groups:
            raise InvariantError(f"cannot resume at update {commits} with segments {ordinals} of {self.groups} groups")
        self.commits = self.started = self._planned = self._decided = commits
        self.steps, self._ordinals = steps, list(ordinals)
        if degree is not None:
            self.degree, self.degree_changed = degree, True
            if isinstance(self._script, Ordered):
                self._script.change_degree(degree, commits, commits)

    def statistics(self) -> dict[str, Any]:
        """Counters, for status and error messages."""
        return {
            "updates_done": self.commits,
            "updates_started": self.started,
            "rollouts_admitted": self._decided,
            "rollouts_waiting": self.waiting,
            "segments_in_flight": self.in_flight,
        }
