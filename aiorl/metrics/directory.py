"""The run directory: what is written while a run goes on, by one thread, in batches."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.events import AnyEvent, Progress, Updated

CSV_COLUMNS = (
    "seconds", "version", "env_steps", "rollout", "behaviour_version", "staleness", "gradient_steps", "collect_seconds",
    "update_seconds", "waited_seconds", "episodes", "return_mean", "length_mean", "train_return_mean_100",
)  # fmt: skip


def choose_directory(config: Config, env: str, algo: str) -> Path:
    """Where a run goes: `config.out`, refused if it holds another run, or a new directory under runs/."""
    if config.out is not None:
        path = Path(config.out)
        if (path / "config.toml").exists():
            raise ConfigError(
                f"{path} already holds a run\n  choose another out, or go on with it: python -m aiorl resume {path}"
            )
        return path
    stem = f"{env.rsplit('/', 1)[-1].replace(':', '.')}-{algo}-{config.seed}"
    for number in range(1, 100_000):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise ConfigError(f"no free name for {stem} under runs/\n  set out")


def make_writable(path: Path) -> None:
    """Create the directory and see that files can be written in it."""
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}\n  choose another out directory") from None


class RunFiles:
    """Appends to events.jsonl, metrics.csv and schedule.jsonl. `take` on the loop, `write` on the files' thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[AnyEvent] = []
        self._schedule: list[dict[str, Any]] = []
        self._metric_names: list[str] | None = None
        self._encoder = msgspec.json.Encoder()

    def event(self, event: AnyEvent) -> None:
        if not isinstance(event, Progress):
            self._events.append(event)

    def rollout(self, line: dict[str, Any]) -> None:
        self._schedule.append(line)

    def take(self) -> tuple[list[AnyEvent], list[dict[str, Any]]]:
        """What has come since the last time."""
        batch = self._events, self._schedule
        self._events, self._schedule = [], []
        return batch

    def write(self, batch: tuple[list[AnyEvent], list[dict[str, Any]]]) -> None:
        """Append a batch to the files."""
        events, schedule = batch
        self._append("events.jsonl", events)
        self._append("schedule.jsonl", schedule)
        updates = [event for event in events if isinstance(event, Updated)]
        if updates:
            self._append_metrics(updates)

    def _append(self, name: str, records: Iterable[Any]) -> None:
        data = b"".join(self._encoder.encode(record) + b"\n" for record in records)
        if data:
            with open(self.path / name, "ab") as file:
                file.write(data)

    def _append_metrics(self, updates: list[Updated]) -> None:
        target = self.path / "metrics.csv"
        text = io.StringIO()
        writer = csv.writer(text)
        if self._metric_names is None:
            self._metric_names = _existing_columns(target)
        if self._metric_names is None:
            # Some learners only report losses once warm-up is over: take the names when there are some to take.
            named = max(updates, key=lambda u: len(u.metrics))
            self._metric_names = sorted(named.metrics)
            writer.writerow([*CSV_COLUMNS, *self._metric_names])
        for update in updates:
            row = [getattr(update, name) for name in CSV_COLUMNS]
            writer.writerow([*row, *(update.metrics.get(name, "") for name in self._metric_names)])
        with open(target, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())


def _existing_columns(path: Path) -> list[str] | None:
    """Metric names of a file that a resumed run goes on with."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        header = next(csv.reader(file), [])
    return header[len(CSV_COLUMNS) :]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file as a whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
