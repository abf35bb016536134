"""What a run reports: typed, frozen records. `async for event in run` yields them; `events.jsonl` holds them.

Every event carries `seconds` since the run began and the counters that place it. Events are either *important*
(never dropped for a slow reader) or *frequent* (the oldest are dropped, and `Lagged` says how many).
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

WIN_RATE, LOSS_RATE = "win_rate_", "loss_rate_"
"""Begin the names of self-play's metrics (see `Updated.metrics`); an opponent's name follows."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events. `version` is the number of updates done, `env_steps` the transitions stored."""

    important: ClassVar[bool] = True

    seconds: float
    version: int
    env_steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the event's name under `event`, ready for JSON."""
        return msgspec.to_builtins(self)


class Started(Event, frozen=True, kw_only=True, tag="started"):
    """All workers are ready. `start_seconds` is what that took, `unix_seconds` the time of day, since 1970."""

    env: str
    algo: str
    seed: int
    envs: int
    groups: int
    workers: int
    off_policy_degree: int
    schedule: str
    total_steps: int
    out: str
    start_seconds: float
    resumed_from: int | None = None
    unix_seconds: float | None = None


class Updated(Event, frozen=True, kw_only=True, tag="updated"):
    """Update `version - 1` used rollout `rollout`, which version `behaviour_version` had collected.

    `staleness_in_queue` is the part of the staleness that came after the rollout was complete (the rest came in flight),
    `off_policy_degree` the bound in force now. `collect_seconds` is the longest segment's collection, `update_seconds` the
    learner's work, `waited_seconds` how long the learner had to wait for this rollout. `episodes`, `return_mean` and
    `length_mean` are of the episodes that ended in this rollout (None when none did). `skipped` says why the update changed
    nothing, for it came to NaN or infinity; None as a rule.
    """

    important: ClassVar[bool] = False

    rollout: int
    behaviour_version: int
    staleness: int
    staleness_in_queue: int
    off_policy_degree: int
    gradient_steps: int
    collect_seconds: float
    update_seconds: float
    waited_seconds: float
    episodes: int
    return_mean: float | None
    length_mean: float | None
    train_return_mean_100: float | None
    metrics: dict[str, float]
    skipped: str | None = None


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    """The state of the run, a few times a second: everything a display needs (see `Status`)."""

    important: ClassVar[bool] = False

    status: Status


class Evaluated(Event, frozen=True, kw_only=True, tag="evaluated"):
    """An evaluation of version `version` (snapshot taken at `env_steps`) has ended. `best`: it is the best so far.

    `suite` is its name, "" without suites; `primary`: it is the suite that `best/` and `stop_at` go by. `wins` and
    `losses` are shares of the episodes, None where the environment does not tell how they ended (see `outcome_of`).
    """

    episodes: int
    mean_return: float
    std_return: float
    mean_length: float
    best: bool
    final: bool
    eval_seconds: float
    suite: str = ""
    primary: bool = True
    wins: float | None = None
    losses: float | None = None


class EvaluationSkipped(Event, frozen=True, kw_only=True, tag="evaluation_skipped"):
    """A due evaluation of `version` was replaced by a newer snapshot, left out or cut off, with the reason."""

    reason: str


class Reevaluated(Event, frozen=True, kw_only=True, tag="reevaluated"):
    """One of the best versions has played again at the end, with fresh episodes. `best`: none before it did as well.

    `wins` and `losses` as in `Evaluated`.
    """

    episodes: int
    mean_return: float
    std_return: float
    mean_length: float
    best: bool
    eval_seconds: float
    wins: float | None = None
    losses: float | None = None


class Checkpointed(Event, frozen=True, kw_only=True, tag="checkpointed"):
    """A checkpoint is safely on disk. `kind` is periodic, requested, best or final."""

    path: str
    kind: str


class CheckpointFailed(Event, frozen=True, kw_only=True, tag="checkpoint_failed"):
    """A checkpoint could not be written; training goes on."""

    reason: str


class WorkerRestarted(Event, frozen=True, kw_only=True, tag="worker_restarted"):
    """A worker that died or hung has been started again and goes on where it was; nothing was lost but time (unless an
    environment does not reproduce, see `EpisodeAborted`).

    `reason` is what ended it, `restarts` how often this worker has come back, `seconds_down` from the notice of its end
    until its successor was ready.
    """

    worker: str
    reason: str
    restarts: int
    seconds_down: float


class WorkerGivenUp(Event, frozen=True, kw_only=True, tag="worker_given_up"):
    """A worker has failed too often and is not started again: the run goes on with `workers` of them (see `min_workers`).

    `reason` is what ended it last. Its groups of environments go on where they were, in the worker `heir`, which is started
    again for that: nothing is lost but time.
    """

    worker: str
    reason: str
    heir: str
    workers: int


class EpisodeAborted(Event, frozen=True, kw_only=True, tag="episode_aborted"):
    """Environment `env` of worker `worker` has begun another episode before this one, its `episode`-th, was over.

    Of the aborted one `length` env steps are stored: it has no return, and learning does not look past its last row.
    `reason` is "not reproduced": the environment could not be brought back to where it was, and from here on the run is not
    exact (it would not come out the same again); or "not finite": it returned NaN or infinity, and that step is dropped.
    """

    worker: str
    env: int
    episode: int
    length: int
    reason: str = "not reproduced"


class Paused(Event, frozen=True, kw_only=True, tag="paused"):
    """Nothing moves until `run.resume()`."""


class Resumed(Event, frozen=True, kw_only=True, tag="resumed"):
    """Training goes on after a pause."""


class SettingsChanged(Event, frozen=True, kw_only=True, tag="settings_changed"):
    """`run.set(...)` took effect before the next update."""

    changes: dict[str, float]


class DegreeChanged(Event, frozen=True, kw_only=True, tag="degree_changed"):
    """`off_policy_degree` is another one from the next rollout on. `reason` is what bound it: supply (speed), error, alarm,
    rollback (the speed foreseen was not had) or asked (`run.set`); `detail` says it in words.

    `throughput` is the rate foreseen for each degree, in updates per second; `error_per_lag` the off-policy error that one
    version of lag makes, None while unknown.
    """

    degree: int
    before: int
    reason: str
    detail: str
    throughput: dict[int, float] = {}
    error_per_lag: float | None = None


class Opponent(msgspec.Struct, frozen=True, kw_only=True):
    """How a learner does against one opponent: shares of `games` (old ones fade) that it won and lost, None without any.

    `version` is that of a snapshot, None for others and for those from files.
    """

    name: str
    games: float
    wins: float | None
    losses: float | None
    elo: float
    version: int | None = None


class Standings(Event, frozen=True, kw_only=True, tag="standings"):
    """How a learner in self-play does against all whom it may meet, itself (`self`) included. Told when its pool has a new
    member, and at the end. `elo` is its own rating."""

    elo: float
    opponents: tuple[Opponent, ...]


class Stalled(Event, frozen=True, kw_only=True, tag="stalled"):
    """Nothing has moved for `stall_timeout_s`: the run fails. `table` says who waits for whom, a line each."""

    table: str


class Warned(Event, frozen=True, kw_only=True, tag="warned"):
    """Something the user should know that does not stop the run."""

    message: str


class Lagged(Event, frozen=True, kw_only=True, tag="lagged"):
    """This reader was too slow: `dropped` frequent events before this one were left out for it."""

    dropped: int


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    """The last event. `status` is completed, stopped or failed; `error` is the one cause, else None."""

    status: str
    error: str | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a run, made without waiting. Seconds are since the start; shares are of the wall time so far.

    `state` is starting, warm-up, training, waiting for data, pausing, paused, evaluating, stopping, completed, stopped or
    failed. `off_policy_degree` is the one in force, `self_tuned` says whether it may change by itself.
    `ledger` has produced, stored, dropped and in_flight transitions, `aborted` counts episodes (see `EpisodeAborted`).
    """

    state: str
    seconds: float
    version: int
    env_steps: int
    total_steps: int
    episodes: int
    gradient_steps: int
    env_steps_per_second: float
    gradient_steps_per_second: float
    train_return_mean_100: float | None
    recent_returns: tuple[float, ...]
    last_evaluation: float | None
    best_evaluation: float | None
    off_policy_degree: int
    self_tuned: bool
    staleness_mean: float
    staleness_max: int
    queue: int
    queue_bound: int
    busy: dict[str, float]
    event_loop_lag_ms: dict[str, float]
    ledger: dict[str, int]
    dropped: dict[str, int]
    restarts: int
    metrics: dict[str, float]
    aborted: int = 0
    workers_given_up: int = 0


AnyEvent = (
    Started | Updated | Progress | Evaluated | EvaluationSkipped | Reevaluated | Checkpointed | CheckpointFailed
    | Paused | Resumed | SettingsChanged | DegreeChanged | Standings | Warned | WorkerRestarted | WorkerGivenUp
    | EpisodeAborted | Stalled | Lagged | Finished
)  # fmt: skip
