"""What a run knows about itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from aiorl.events import Evaluated
from aiorl.learning import Outcome
from aiorl.ledger import Episode
from aiorl.pacing import Grant, RolloutPlan
from aiorl.report import EvaluationRecord, Report, library_versions


def outcome(stored: int, episodes: tuple[float, ...] = (), **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "metrics": {"loss": 1.0}, "gradient_steps": 3, "weights": {}, "fingerprint": 0, "env_steps": 10, "stored": stored,
        "episodes": [Episode(0, total, 5, True) for total in episodes], "update_seconds": 0.25,
        "segment_seconds": (0.5, 0.5),
    }  # fmt: skip
    return Outcome(**fields | changes)


def plan(k: int, version: int) -> RolloutPlan:
    return RolloutPlan(k, (Grant(0, k, 0, version),))


def evaluated(version: int, mean: float, *, final: bool = False, steps: int | None = None) -> Evaluated:
    return Evaluated(
        seconds=float(version), version=version, env_steps=10 * version if steps is None else steps, episodes=5,
        mean_return=mean, std_return=1.0, mean_length=9.0, best=False, final=final, eval_seconds=0.5,
    )  # fmt: skip


def test_updates_add_up() -> None:
    report = Report(None)
    report.ready()
    report.updated(plan(0, 0), outcome(10, (1.0, 3.0)), 2.0)
    report.updated(plan(1, 0), outcome(20, metrics={}), 2.0)
    report.updated(plan(2, 0), outcome(30, (4.0,)), 8 / 3)
    assert (report.stored, report.gradient_steps, report.episodes) == (30, 9, 3)
    assert report.staleness.histogram == {0: 1, 1: 1, 2: 1}
    assert report.busy_s == {"collect": 3.0, "train": 0.75, "evaluate": 0.0}
    assert list(report.returns) == [2.0, 4.0]
    assert report.return_mean_100 == 8 / 3
    assert report.metrics == {"loss": 1.0}, "an update without metrics does not hide the last ones"
    per_second, gradients = report.rates()
    assert per_second / gradients == pytest.approx(30 / 9)


def test_an_empty_report() -> None:
    report = Report(None)
    assert report.staleness.summary()["mean"] == report.staleness.summary()["max"] == 0
    assert report.best is None
    assert report.rates() == (0.0, 0.0)
    assert report.train_seconds() == 0.0
    assert report.ledger(0) == {"produced": 0, "stored": 0, "dropped": 0, "in_flight": 0}


def test_every_transition_is_somewhere() -> None:
    report = Report(None)
    report.updated(plan(0, 0), outcome(100), None)
    report.drop("stopped", 7)
    report.drop("stopped", 3)
    report.drop("failed", 0)
    assert report.dropped == {"stopped": 10}, "nothing dropped is no reason"
    assert report.ledger(5) == {"produced": 115, "stored": 100, "dropped": 10, "in_flight": 5}


def test_the_best_of_equals_is_the_earlier_one() -> None:
    report = Report(None)
    for version, mean in ((1, 5.0), (3, 9.0), (2, 9.0), (4, 7.0)):
        report.evaluated(evaluated(version, mean, final=version == 4))
    assert report.best is not None
    assert report.best.version == 2
    assert report.final_evaluation is not None
    assert report.final_evaluation.version == 4
    assert report.busy_s["evaluate"] == 2.0


@pytest.mark.parametrize(("wanted", "steps"), [(None, None), (6.0, 20), (9.0, 30), (9.5, None)])
def test_when_the_return_that_was_asked_for_was_first_reached(wanted: float | None, steps: int | None) -> None:
    report = Report(wanted)
    for version, mean in ((1, 5.0), (2, 6.0), (3, 9.0), (4, 9.2)):
        report.evaluated(evaluated(version, mean))
    first = report.first_at_stop_return()
    assert (first["env_steps"] if first else None) == steps


def test_shares_of_time_are_shares() -> None:
    report = Report(None)
    assert report.busy(0) == {"collect": 0.0, "train": 0.0, "evaluate": 0.0}
    report.ready()
    report.updated(plan(0, 0), outcome(10, update_seconds=1e9, segment_seconds=(1e9,)), None)
    assert report.busy(2) == {"collect": 1.0, "train": 1.0, "evaluate": 0.0}


def test_a_resumed_run_goes_on_counting() -> None:
    report = Report(7.0)
    report.ready()
    for k in range(3):
        report.updated(plan(k, 0), outcome(10 * (k + 1), (1.0,)), 1.0)
    report.evaluated(evaluated(2, 8.0))
    state = msgspec.json.decode(msgspec.json.encode(report.state_dict()))

    again = Report(7.0)
    again.load_state_dict(state, 30)
    assert (again.stored, again.gradient_steps, again.episodes) == (30, 9, 3)
    assert again.staleness == report.staleness
    assert again.evaluations == report.evaluations
    assert again.best == report.best
    assert again.first_at_stop_return() == report.first_at_stop_return()
    assert again.seconds >= state["seconds"]
    again.ready()
    again.updated(plan(3, 3), outcome(40), None)
    assert (again.stored, again.session_steps) == (40, 10), "rates are of this session"


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": [{"version": "x"}]}, {"gradient_steps": "many"}, {"staleness": {"a": 1}}, {"staleness": None},
        {"seconds": None}, {"more": 1},
    ],
)  # fmt: skip
def test_counters_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Report(None).load_state_dict({**Report(None).state_dict(), **change}, 0)


def test_status_and_result_carry_the_counters() -> None:
    report = Report(None)
    report.ready()
    report.updated(plan(0, 0), outcome(10, (2.0,)), 2.0)
    report.evaluated(evaluated(1, 5.0, final=True))
    lag = {"p50": 0.0, "p99": 0.0, "max": 0.0}
    status = report.status(
        state="training", version=1, total_steps=100, off_policy_degree=0, self_tuned=False, queue=0, queue_bound=1,
        busy=report.busy(1), event_loop_lag_ms=lag, ledger=report.ledger(0),
    )  # fmt: skip
    assert (status.env_steps, status.episodes, status.last_evaluation, status.best_evaluation) == (10, 1, 5.0, 5.0)
    assert status.recent_returns == (2.0,)
    report.begun_s, report.ready_s, report.trained_s = 10.0, 12.0, 17.0
    result = report.result(
        status="completed", error=None, env="e", algo="a", seed=0, updates=1, off_policy_degree=0, ledger=report.ledger(0),
        busy={}, waiting={}, event_loop_lag_ms=lag, queue={}, params_sha256="", directory="d",
    )  # fmt: skip
    data = result.to_dict()
    assert (data["env_steps"], data["train_return_mean_100"], data["final_evaluation"]["mean_return"]) == (10, 2.0, 5.0)
    assert msgspec.convert(data["best"], EvaluationRecord) == report.best
    assert (data["start_seconds"], data["train_seconds"]) == (2.0, 5.0)
    assert (data["env_steps_per_second"], data["gradient_steps_per_second"]) == (10 / 5, 3 / 5)


def test_versions_of_what_it_stands_on() -> None:
    versions = library_versions()
    assert {"python", "aiorl", "numpy", "torch", "gymnasium"} <= versions.keys()
    assert all(isinstance(version, str) for version in versions.values())
