"""A made-up run as a stream of events, for tests of what people see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from aiorl.events import AnyEvent, Checkpointed, Evaluated, Finished, Progress, Started, Status, Updated


def status(version: int = 10, **changes: Any) -> Status:
    fields: dict[str, Any] = {
        "state": "training", "seconds": 2.0, "version": version, "env_steps": 1000 * version, "total_steps": 20_000,
        "episodes": 3 * version, "gradient_steps": 32 * version, "env_steps_per_second": 12_345.0,
        "gradient_steps_per_second": 99.0, "train_return_mean_100": 10.0 * version, "recent_returns": (1.0, 2.0),
        "last_evaluation": 80.0, "best_evaluation": 90.0, "off_policy_degree": 1, "self_tuned": False,
        "staleness_mean": 0.75,
        "staleness_max": 1, "queue": 1, "queue_bound": 4, "busy": {"collect": 0.9, "train": 0.7, "evaluate": 0.1},
        "event_loop_lag_ms": {"p50": 0.1, "p99": 1.5, "max": 4.0},
        "ledger": {"produced": 1000, "stored": 1000, "dropped": 0, "in_flight": 0}, "dropped": {}, "restarts": 0,
        "metrics": {"loss": 0.5},
    }  # fmt: skip
    return Status(**{**fields, **changes})


def started(**changes: Any) -> Started:
    fields: dict[str, Any] = {
        "seconds": 0.5, "version": 0, "env_steps": 0, "env": "CartPole-v1", "algo": "ppo", "seed": 3, "envs": 16,
        "groups": 2, "workers": 2, "off_policy_degree": 1, "schedule": "ordered", "total_steps": 20_000,
        "out": "runs/CartPole-v1-ppo-3", "start_seconds": 0.4,
    }  # fmt: skip
    return Started(**{**fields, **changes})


def updated(version: int, value: float | None, seconds: float | None = None) -> Updated:
    return Updated(
        seconds=0.5 + version if seconds is None else seconds, version=version, env_steps=1000 * version,
        rollout=version - 1, behaviour_version=max(0, version - 2), staleness=min(1, version - 1),
        staleness_in_queue=0, off_policy_degree=1, gradient_steps=32,
        collect_seconds=0.1, update_seconds=0.1, waited_seconds=0.0, episodes=0 if value is None else 3,
        return_mean=value, length_mean=value, train_return_mean_100=value, metrics={},
    )  # fmt: skip


def evaluated(version: int, value: float, **changes: Any) -> Evaluated:
    fields: dict[str, Any] = {
        "seconds": 0.5 + version, "version": version, "env_steps": 1000 * version, "episodes": 20,
        "mean_return": value, "std_return": 5.0, "mean_length": value, "best": True, "final": False,
        "eval_seconds": 0.2,
    }  # fmt: skip
    return Evaluated(**{**fields, **changes})


def run_events(updates: int = 20) -> Iterator[AnyEvent]:
    """A run whose return is 10 times its version."""
    yield started()
    for version in range(1, updates + 1):
        yield updated(version, 10.0 * version)
        yield Progress(seconds=0.5 + version, version=version, env_steps=1000 * version, status=status(version))
        if version % 5 == 0:
            yield evaluated(version, 10.0 * version, final=version == updates)
            yield Checkpointed(
                seconds=0.5 + version, version=version, env_steps=1000 * version, path=f"c/{version}", kind="periodic"
            )
    yield Finished(seconds=1.5 + updates, version=updates, env_steps=1000 * updates, status="completed", error=None)


def write_run(path: Path, events: Iterator[AnyEvent] | None = None, config: str = 'env = "CartPole-v1"\n') -> Path:
    """A run directory with just enough in it to be plotted and listed."""
    path.mkdir(parents=True)
    lines = [msgspec.json.encode(e) for e in events or run_events() if not isinstance(e, Progress)]
    (path / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (path / "config.toml").write_text(config)
    return path
