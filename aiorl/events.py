"""What a run reports: typed, frozen records. `async for event in run` yields them; `events.jsonl` holds them.

Every event carries `seconds` since the run began and the counters that place it. Events are either *important*
(never dropped for a slow reader) or *frequent* (the oldest are dropped, and `Lagged` says how many).
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


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
    """All workers are ready. `start_seconds` is what that took."""

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


class Updated(Event, frozen=True, kw_only=True, tag="updated"):
    """Update `version - 1` used rollout `rollout`, which version `behaviour_version` had collected.

    `collect_seconds` is the longest segment's collection, `update_seconds` the learner's work, `waited_seconds` how long
    the learner had to wait for this rollout. `episodes`, `return_mean` and `length_mean` are of the episodes that ended in
    this rollout (None when none did).
    """

    important: ClassVar[bool] = False

    rollout: int
    behaviour_version: int
    staleness: int
    gradient_steps: int
    collect_seconds: float
    update_seconds: float
    waited_seconds: float
    episodes: int
    return_mean: float | None
    length_mean: float | None
    train_return_mean_100: float | None
    metrics: dict[str, float]


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    """The state of the run, a few times a second: everything a display needs (see `Status`)."""

    important: ClassVar[bool] = False

    status: Status


class Evaluated(Event, frozen=True, kw_only=True, tag="evaluated"):
    """An evaluation of version `version` (snapshot taken at `env_steps`) has ended. `best`: it is the best so far."""

    episodes: int
    mean_return: float
    std_return: float
    mean_length: float
    best: bool
    final: bool
    eval_seconds: float


class EvaluationSkipped(Event, frozen=True, kw_only=True, tag="evaluation_skipped"):
    """A due evaluation of `version` was replaced by a newer snapshot or left out, with the reason."""

    reason: str


class Checkpointed(Event, frozen=True, kw_only=True, tag="checkpointed"):
    """A checkpoint is safely on disk. `kind` is periodic, requested, best or final."""

    path: str
    kind: str


class CheckpointFailed(Event, frozen=True, kw_only=True, tag="checkpoint_failed"):
    """A checkpoint could not be written; training goes on."""

    reason: str


class Paused(Event, frozen=True, kw_only=True, tag="paused"):
    """Nothing moves until `run.resume()`."""


class Resumed(Event, frozen=True, kw_only=True, tag="resumed"):
    """Training goes on after a pause."""


class SettingsChanged(Event, frozen=True, kw_only=True, tag="settings_changed"):
    """`run.set(...)` took effect before the next update."""

    changes: dict[str, float]


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
    failed. `ledger` has produced, stored, dropped and in_flight transitions.
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


AnyEvent = (
    Started | Updated | Progress | Evaluated | EvaluationSkipped | Checkpointed | CheckpointFailed | Paused | Resumed
    | SettingsChanged | Warned | Lagged | Finished
)  # fmt: skip
