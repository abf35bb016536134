"""What a run knows about itself: counters on the way, `Status` at any moment, `Result` at the end."""

from __future__ import annotations

import functools
import platform
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from aiorl.events import Evaluated, Reevaluated, Status
from aiorl.learning import Outcome
from aiorl.metrics.staleness import StalenessBooks
from aiorl.pacing import RolloutPlan

LIBRARIES = ("torch", "numpy", "gymnasium", "aiomultiprocess", "uvloop", "msgspec", "safetensors")


class EvaluationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation as in summary.json. `seconds` is when it ended, since the start; the rest as in `Evaluated`."""

    version: int
    env_steps: int
    seconds: float
    episodes: int
    mean_return: float
    std_return: float
    suite: str = ""
    wins: float | None = None
    losses: float | None = None

    @classmethod
    def of(cls, event: Evaluated | Reevaluated, suite: str) -> EvaluationRecord:
        return cls(
            version=event.version,
            env_steps=event.env_steps,
            seconds=event.seconds,
            episodes=event.episodes,
            mean_return=event.mean_return,
            std_return=event.std_return,
            suite=suite,
            wins=event.wins,
            losses=event.losses,
        )


class ReportState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint keeps of a report."""

    seconds: float
    gradient_steps: int
    episodes: int
    staleness: StalenessBooks
    evaluations: list[EvaluationRecord]
    skipped_updates: dict[str, int]
    pending: list[tuple[int, int]] = []
    comparable_from: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended: the contents of summary.json.

    `wall_seconds` is all the time since the start, `start_seconds` what passed until the workers were ready, and
    `train_seconds` from then to the last update; the rates are over `train_seconds`. Counters of a resumed run go on from
    its checkpoint; seconds, rates and restarts are of this session, except in `evaluations`. `session_env_steps` are those
    of this session, `total_seconds` those of all.

    With several evaluation suites all figures but `evaluations` are of the primary one. `reevaluations` are those of the
    best at the end, with fresh episodes; where there are any, `best` is the best of them. `evaluation_points` says what
    became of the evaluations due in this session: due = evaluated + skipped. `stop_overshoot` is how far training went on
    after the snapshot that reached `stop_at`. `aborted` episodes were given up (see `EpisodeAborted`): their environment
    could not be brought back after a restart or a resume, and the run is not exact, or it returned NaN or infinity, which
    cost one dropped step each. `skipped_updates` changed nothing; the reason is nonfinite.
    `inference` tells of central inference: see `InferenceBooks`.
    """

    status: str
    error: str | None
    env: str
    algo: str
    seed: int
    versions: dict[str, str]
    env_steps: int
    episodes: int
    updates: int
    gradient_steps: int
    wall_seconds: float
    start_seconds: float
    train_seconds: float
    env_steps_per_second: float
    gradient_steps_per_second: float
    train_return_mean_100: float | None
    evaluations: list[EvaluationRecord]
    reevaluations: list[EvaluationRecord]
    evaluation_points: dict[str, int]
    stop_return: float | None
    first_evaluation_at_stop_return: dict[str, float] | None
    stop_overshoot: dict[str, int] | None
    best: EvaluationRecord | None
    final_evaluation: EvaluationRecord | None
    off_policy_degree: int
    staleness: dict[str, Any]
    dropped: dict[str, int]
    restarts: int
    ledger: dict[str, int]
    busy: dict[str, float]
    waiting: dict[str, float]
    event_loop_lag_ms: dict[str, float]
    queue: dict[str, int]
    params_sha256: str
    directory: str
    aborted: int = 0
    workers_given_up: int = 0
    skipped_updates: dict[str, int] = {}
    inference: dict[str, float] = {}
    session_env_steps: int | None = None
    total_seconds: float | None = None
    restart_reasons: dict[str, int] = {}

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self)


class Report:
    """Adds up what happens in a run. Belongs to the event loop's thread."""

    def __init__(self, stop_return: float | None, primary_suite: str = "") -> None:
        self.begun_s = time.perf_counter()
        self.ready_s: float | None = None
        self.trained_s: float | None = None
        self.stop_return = stop_return
        self.gradient_steps = 0
        self.stored = 0  # transitions the learner has been given
        self.session_steps = 0
        self.session_gradient_steps = 0
        self.episodes = 0
        self.staleness = StalenessBooks.empty()
        self.evaluations: list[EvaluationRecord] = []
        self.comparable_from = 0  # of `evaluations`: those before were of a run with another primary suite
        self.pending: list[tuple[int, int]] = []  # (version, env steps) of evaluations that are due and not done
        self.best_of_before: EvaluationRecord | None = None  # in a resumed run: that of `best/`
        self.reevaluations: list[EvaluationRecord] = []
        self.evaluation_points = {"due": 0, "evaluated": 0, "skipped": 0}
        self.stop_overshoot: dict[str, int] | None = None
        self.final_evaluation: EvaluationRecord | None = None
        self.returns: deque[float] = deque(maxlen=60)
        self.return_mean_100: float | None = None
        self.metrics: dict[str, float] = {}
        self.dropped: dict[str, int] = {}
        self.restarts = 0  # workers that have come back
        self.restart_reasons: dict[str, int] = {}  # the first line of each
        self.given_up = 0  # workers that have not
        self.aborted = 0  # episodes that were given up, also in earlier sessions
        self.skipped_updates: dict[str, int] = {}  # by reason
        self.busy_s = {"collect": 0.0, "train": 0.0, "evaluate": 0.0}
        self.paused_s = 0.0
        self._earlier_s = 0.0
        self._primary_suite = primary_suite

    @property
    def seconds(self) -> float:
        """Since the start; goes on from the checkpoint's time in a resumed run."""
        return self._earlier_s + time.perf_counter() - self.begun_s

    def ready(self) -> None:
        self.ready_s = time.perf_counter()

    def updated(self, plan: RolloutPlan, outcome: Outcome, return_mean_100: float | None) -> None:
        """One update is done."""
        self.gradient_steps += outcome.gradient_steps
        self.session_gradient_steps += outcome.gradient_steps
        if outcome.skipped is not None:
            self.skipped_updates["nonfinite"] = self.skipped_updates.get("nonfinite", 0) + 1
        self.stored = outcome.stored
        self.session_steps += outcome.env_steps
        self.episodes += len(outcome.episodes)
        self.staleness.enter(plan, outcome.metrics)
        self.busy_s["train"] += outcome.update_seconds
        self.busy_s["collect"] += outcome.collected_seconds
        self.return_mean_100 = return_mean_100
        if outcome.episodes:
            self.returns.append(sum(e.total for e in outcome.episodes) / len(outcome.episodes))
        if outcome.metrics:
            self.metrics = outcome.metrics

    def restarted(self, reason: str) -> None:
        """A worker has come back."""
        self.restarts += 1
        what = reason.splitlines()[0] if reason else "unknown"
        self.restart_reasons[what] = self.restart_reasons.get(what, 0) + 1

    def evaluated(self, event: Evaluated) -> None:
        record = EvaluationRecord.of(event, event.suite)
        self.evaluations.append(record)
        self.busy_s["evaluate"] += event.eval_seconds
        if event.final and event.primary:
            self.final_evaluation = record

    def reevaluated(self, events: list[Reevaluated]) -> None:
        """The best have played again."""
        self.reevaluations = [EvaluationRecord.of(event, self._primary_suite) for event in events]

    @property
    def primary_evaluations(self) -> list[EvaluationRecord]:
        return [record for record in self.evaluations[self.comparable_from :] if record.suite == self._primary_suite]

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation with the highest mean; of equals the earlier version. Of those at the end if there are any."""
        if self.reevaluations:
            return max(self.reevaluations, key=lambda e: e.mean_return)
        before = [self.best_of_before] if self.best_of_before is not None else []
        return max(self.primary_evaluations + before, key=lambda e: (e.mean_return, -e.version), default=None)

    def drop(self, reason: str, env_steps: int) -> None:
        if env_steps:
            self.dropped[reason] = self.dropped.get(reason, 0) + env_steps

    def ledger(self, in_flight: int) -> dict[str, int]:
        """Where every transition is: produced = stored + dropped + in_flight."""
        dropped = sum(self.dropped.values())
        return {
            "produced": self.stored + dropped + in_flight,
            "stored": self.stored,
            "dropped": dropped,
            "in_flight": in_flight,
        }

    def train_seconds(self) -> float:
        if self.ready_s is None:
            return 0.0
        return (self.trained_s or time.perf_counter()) - self.ready_s

    def rates(self) -> tuple[float, float]:
        """(env steps, gradient steps) per second of training in this session."""
        seconds = max(self.train_seconds(), 1e-9)
        return self.session_steps / seconds, self.session_gradient_steps / seconds

    def busy(self, lanes: int) -> dict[str, float]:
        """Share of the training time each part was at work; `collect` is the mean over the `lanes` that collect
        side by side."""
        seconds = max(self.train_seconds(), 1e-9)
        shares = {"collect": self.busy_s["collect"] / max(1, lanes)}
        shares |= {"train": self.busy_s["train"], "evaluate": self.busy_s["evaluate"]}
        return {name: round(min(1.0, s / seconds), 4) for name, s in shares.items()}

    def status(self, **given: Any) -> Status:
        """A `Status` from the counters here and what only the run knows."""
        per_second, gradients_per_second = self.rates()
        staleness = self.staleness.summary()
        evaluations, best = self.primary_evaluations, self.best
        return Status(
            seconds=self.seconds,
            env_steps=self.stored,
            episodes=self.episodes,
            gradient_steps=self.gradient_steps,
            env_steps_per_second=per_second,
            gradient_steps_per_second=gradients_per_second,
            train_return_mean_100=self.return_mean_100,
            recent_returns=tuple(self.returns),
            last_evaluation=evaluations[-1].mean_return if evaluations else None,
            best_evaluation=best.mean_return if best else None,
            staleness_mean=staleness["mean"],
            staleness_max=staleness["max"],
            dropped=dict(self.dropped),
            restarts=self.restarts,
            workers_given_up=self.given_up,
            aborted=self.aborted,
            metrics=self.metrics,
            **given,
        )

    def result(self, **given: Any) -> Result:
        """A `Result` from the counters here and what only the run knows."""
        per_second, gradients_per_second = self.rates()
        now = time.perf_counter()
        return Result(
            versions=library_versions(),
            env_steps=self.stored,
            episodes=self.episodes,
            gradient_steps=self.gradient_steps,
            wall_seconds=now - self.begun_s,
            start_seconds=(self.ready_s or now) - self.begun_s,
            train_seconds=self.train_seconds(),
            env_steps_per_second=per_second,
            gradient_steps_per_second=gradients_per_second,
            train_return_mean_100=self.return_mean_100,
            evaluations=self.evaluations,
            reevaluations=self.reevaluations,
            evaluation_points=self.evaluation_points,
            stop_return=self.stop_return,
            first_evaluation_at_stop_return=self.first_at_stop_return(),
            stop_overshoot=self.stop_overshoot,
            best=self.best,
            final_evaluation=self.final_evaluation,
            staleness=self.staleness.summary(),
            dropped=self.dropped,
            restarts=self.restarts,
            workers_given_up=self.given_up,
            aborted=self.aborted,
            skipped_updates=self.skipped_updates,
            session_env_steps=self.session_steps,
            total_seconds=self._earlier_s + now - self.begun_s,
            restart_reasons=self.restart_reasons,
            **given,
        )

    def first_at_stop_return(self) -> dict[str, float] | None:
        if self.stop_return is None:
            return None
        for record in self.primary_evaluations:
            if record.mean_return >= self.stop_return:
                return {"env_steps": record.env_steps, "seconds": record.seconds}
        return None

    def state_dict(self) -> dict[str, Any]:
        """Counters that a resumed run goes on with."""
        state = ReportState(
            seconds=self.seconds,
            gradient_steps=self.gradient_steps,
            episodes=self.episodes,
            staleness=self.staleness,
            evaluations=self.evaluations,
            skipped_updates=self.skipped_updates,
            pending=self.pending,
            comparable_from=self.comparable_from,
        )
        return msgspec.to_builtins(state, str_keys=True)

    def load_state_dict(self, state: dict[str, Any], stored: int) -> None:
        """Inverse of `state_dict`. ValueError for anything else."""
        saved = msgspec.convert(state, ReportState, str_keys=True)
        self._earlier_s, self.gradient_steps, self.episodes = saved.seconds, saved.gradient_steps, saved.episodes
        self.staleness, self.evaluations = saved.staleness, list(saved.evaluations)
        self.skipped_updates, self.pending = dict(saved.skipped_updates), list(saved.pending)
        self.comparable_from = saved.comparable_from
        self.stored = stored

    def catch_up(
        self, results: Mapping[int, Sequence[Evaluated]], best: Evaluated | None, *, comparable: bool = True
    ) -> None:
        """Take in what became known only after the checkpoint was captured: results of pending evaluations, by version
        (empty: it is known that there will be none), and what `best/` holds. Not `comparable`: none of the evaluations so
        far says what would be the best from here on."""
        for version, events in results.items():
            self.pending = [entry for entry in self.pending if entry[0] != version]
            self.evaluations += [EvaluationRecord.of(event, event.suite) for event in events]
        self.evaluations.sort(key=lambda record: record.version)
        if not comparable:
            self.comparable_from = len(self.evaluations)
        if best is not None:
            self.best_of_before = EvaluationRecord.of(best, self._primary_suite)


def library_versions() -> dict[str, str]:
    """Versions of Python, aiorl and what it stands on."""
    return dict(_library_versions())


@functools.cache  # reading their metadata takes milliseconds
def _library_versions() -> dict[str, str]:
    from importlib import metadata

    import aiorl

    versions = {"python": platform.python_version(), "aiorl": aiorl.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
