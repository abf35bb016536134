"""The run directory: what is written while a run goes on, by one thread, in batches."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.events import AnyEvent, Progress, Updated
from aiorl.filelock import FileLock, Held

CSV_COLUMNS = (
    "seconds", "version", "env_steps", "rollout", "behaviour_version", "staleness", "staleness_in_queue",
    "off_policy_degree", "gradient_steps", "collect_seconds", "update_seconds", "waited_seconds", "episodes",
    "return_mean", "length_mean", "train_return_mean_100",
)  # fmt: skip

APPENDED = ("events.jsonl", "schedule.jsonl", "metrics.csv")
"""Files that a resumed run adds to."""


def choose_directory(config: Config, env: str, algo: str, *, create: bool = False) -> Path:
    """Where a run goes: `config.out`, refused if it holds another run, or a new directory under runs/.

    With `create` a new one is made at once, so that no other run can choose it too.
    """
    if config.out is not None:
        path = Path(config.out)
        if (path / "config.toml").exists() or (path / "summary.json").exists():
            raise ConfigError(
                f"{path} already holds a run\n  choose another out, or go on with it: python -m aiorl resume {path}"
            )
        return path
    stem = f"{env.rsplit('/', 1)[-1].replace(':', '.')}-{algo}-{config.seed}"
    for number in range(1, 100_000):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists() and (not create or _make_new(path)):
            return path
    raise ConfigError(f"no free name for {stem} under runs/\n  set out")


def _make_new(path: Path) -> bool:
    """Create a directory; False if it exists by now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise _not_writable(path, error) from None
    return True


def make_writable(path: Path) -> None:
    """Create the directory and see that files can be written in it, also those that are there."""
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None
    for file in (*(path / name for name in APPENDED), *path.glob("worker-*.log")):
        try:
            file.open("r+b").close()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(
                f"cannot add to {file}: {error.strerror}\n  a run adds to what is there: let it be read and written"
            ) from None


def discard_empty(path: Path) -> None:
    """Take a directory away that a run was to have, unless there is something in it."""
    with contextlib.suppress(OSError):
        path.rmdir()


LOCK = "run.lock"


def hold(path: Path) -> FileLock:
    """Make a run directory this process's own. ConfigError if it is in use."""
    try:
        return FileLock(path / LOCK)
    except Held as held:
        who = f"by process {held.pid}" if held.pid else "by another process"
        raise ConfigError(f"{path} is in use {who}\n  wait for it to end, stop it, or choose another out") from None
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: Path, error: OSError) -> ConfigError:
    in_the_way = isinstance(error, FileExistsError)
    why = "a file or a link to nowhere is in the way" if in_the_way else error.strerror
    return ConfigError(f"cannot write to {path}: {why}\n  choose another out directory")


class RunFiles:
    """Appends to events.jsonl, metrics.csv and schedule.jsonl, also to those of a run that is resumed, and replaces
    standings.json. What a resumed run does again is in metrics.csv once, in the others a second time.

    Make it and call `write` on the files' thread, the rest on the loop.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[AnyEvent] = []
        self._schedule: list[dict[str, Any]] = []
        self._encoder = msgspec.json.Encoder()
        self._standings: dict[str, Any] | None = None  # the newest, and what is in the file
        self._standing: dict[str, Any] | None = None
        # What has been taken and is not in a file yet: on a full disk it waits here until there is room.
        self._lines = {"events.jsonl": b"", "schedule.jsonl": b""}
        self._updates: list[Updated] = []
        _remove_leftovers(path)
        for name in APPENDED:
            _drop_torn_line(path / name)
        self._metric_names = _metric_names(path / "metrics.csv")
        self._goes_on = (path / "metrics.csv").exists()

    def event(self, event: AnyEvent) -> None:
        if not isinstance(event, Progress):
            self._events.append(event)

    def rollout(self, line: dict[str, Any]) -> None:
        self._schedule.append(line)

    def standings(self, table: dict[str, Any]) -> None:
        """What standings.json is to hold from the next `write` on."""
        self._standings = table

    def take(self) -> tuple[list[AnyEvent], list[dict[str, Any]]]:
        """What has come since the last time."""
        batch = self._events, self._schedule
        self._events, self._schedule = [], []
        return batch

    def write(self, batch: tuple[list[AnyEvent], list[dict[str, Any]]]) -> None:
        """Append a batch to the files, and what could not be written before. OSError if something has to wait now."""
        events, schedule = batch
        for name, records in (("events.jsonl", events), ("schedule.jsonl", schedule)):
            self._lines[name] += b"".join(self._encoder.encode(record) + b"\n" for record in records)
        self._updates += [event for event in events if isinstance(event, Updated)]
        if any(self._lines.values()):  # from here on the summary of the session before, if any, is not of these files
            (self.path / "summary.json").unlink(missing_ok=True)
        for name, lines in self._lines.items():
            if lines:
                append_whole(self.path / name, lines)
                self._lines[name] = b""
        if self._updates:
            self._append_metrics()
            self._updates = []
        if (table := self._standings) is not self._standing:
            write_atomically(self.path / "standings.json", msgspec.json.format(self._encoder.encode(table)) + b"\n")
            self._standing = table

    def _append_metrics(self) -> None:
        target, updates = self.path / "metrics.csv", self._updates
        if self._goes_on and target.exists():
            _drop_rows(target, updates[0].version)
        self._goes_on = False
        new = {name for update in updates for name in update.metrics}.difference(self._metric_names)
        if new or not target.exists():
            # Some learners report losses only once warm-up is over: the rows so far get empty cells for them.
            _widen(target, [*CSV_COLUMNS, *self._metric_names, *sorted(new)])
            self._metric_names += sorted(new)
        rows = [
            [getattr(update, name) for name in CSV_COLUMNS] + [update.metrics.get(name, "") for name in self._metric_names]
            for update in updates
        ]
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        append_whole(target, text.getvalue().encode())


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data`, or nothing: what a full disk has cut short is taken back. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        length, view = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError:
            file.truncate(length)
            raise


def _widen(path: Path, columns: list[str]) -> None:
    """Give a CSV file these columns, of which it may have the first ones already."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows, None)
            writer.writerows(row + [""] * (len(columns) - len(row)) for row in rows)
    write_atomically(path, text.getvalue().encode())


def _drop_rows(path: Path, first: int) -> None:
    """Take the rows from version `first` on away: of a future that was given up when the run was resumed from before it."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    at = CSV_COLUMNS.index("version")
    kept = [row for row in rows if not (len(row) > at and row[at].isdecimal() and int(row[at]) >= first)]
    if len(kept) < len(rows):
        text = io.StringIO()
        csv.writer(text).writerows(kept)
        write_atomically(path, text.getvalue().encode())


def _metric_names(path: Path) -> list[str]:
    """Metric names in a file that a resumed run goes on with."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file))[len(CSV_COLUMNS) :]


def _remove_leftovers(path: Path) -> None:
    """Files that a killed run had not given their name yet."""
    written = r"config\.toml|metrics\.csv|summary\.json|standings\.json|curve\.svg|error\.txt"
    names = re.compile(rf"\.({written})\.tmp|\.write-test-\d+")
    for file in path.iterdir():
        if names.fullmatch(file.name):
            with contextlib.suppress(OSError):
                file.unlink()


def _drop_torn_line(path: Path) -> None:
    """Cut off the line that a killed run did not finish writing."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole == 0:
            path.unlink()
        elif whole < len(data):
            os.truncate(path, whole)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
