"""`python -m aiorl runs [DIR]`: what there is, how it went."""

from __future__ import annotations

import itertools
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aiorl.cli.flags import Parser
from aiorl.cli.text import count, duration, number, table
from aiorl.errors import ConfigError
from aiorl.filelock import state_of
from aiorl.metrics.directory import LOCK

HEADING = ("run", "status", "env", "algo", "seed", "steps", "return", "best eval", "time", "started")
RIGHT = frozenset({4, 5, 6, 7, 8})
RECENT_S = 30.0
"""A run without a summary or a lock whose events grew this recently is taken to be running."""

TAIL_BYTES = 1 << 16
FIRST_LINES = 100  # warnings may come before the workers are ready


def main(argv: Sequence[str]) -> int:
    parser = Parser("runs", "List the runs in a directory, newest last.", "[DIR] [--json]")
    parser.add_argument("dir", nargs="?", metavar="DIR", help="directory that holds run directories (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    directory = Path(given.get("dir", "runs"))
    if not directory.is_dir():
        raise ConfigError(f"there is no directory {directory}\n  runs are kept in runs/ unless --out says otherwise")
    found = list_runs(directory)
    if given.get("json", False):
        for run in found:
            print(msgspec.json.encode(run).decode())
    elif found:
        print(table([HEADING, *(_row(run) for run in found)], RIGHT))
    else:
        print(f"no runs in {directory}/")
    return 0


def list_runs(directory: Path) -> list[dict[str, Any]]:
    """What is known of each run directory at or right below `directory`, in the order in which they were begun."""
    try:
        paths = [directory, *directory.iterdir()]
    except OSError as error:
        raise ConfigError(f"cannot read {directory}: {error.strerror}") from None
    return sorted((describe(path) for path in paths if _may_be_run(path)), key=lambda run: run["started"])


def _may_be_run(path: Path) -> bool:
    try:
        return (path / "config.toml").is_file()
    except OSError:
        return path.is_dir()  # what is in it cannot be seen


class _Config(msgspec.Struct):
    """What is shown of config.toml; whatever else it holds is skipped, as in the others."""

    env: str | None = None
    algo: str | None = None
    seed: int | None = None


class _Best(msgspec.Struct):
    mean_return: float | None


class _Summary(msgspec.Struct):
    status: str
    env_steps: int
    wall_seconds: float
    total_seconds: float | None = None
    train_return_mean_100: float | None = None
    best: _Best | None = None


class _Event(msgspec.Struct):
    event: str
    seconds: float
    env_steps: int
    train_return_mean_100: float | None = None


class _Started(msgspec.Struct):
    unix_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e11)] | None = None  # what a calendar holds


def describe(path: Path) -> dict[str, Any]:
    """The main facts of a run: from its summary, or while it has none from its configuration and last events.

    One of which a file cannot be read or understood is damaged, and what was found until then is told.
    """
    facts: dict[str, Any] = {
        "run": os.fsencode(path).decode(errors="replace"), "status": "unfinished", "env": None, "algo": None, "seed": None,
        "env_steps": None, "train_return_mean_100": None, "best_evaluation": None, "wall_seconds": None,
        "started": path.stat().st_mtime,
    }  # fmt: skip
    try:
        _tell(path, facts)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        facts["status"] = "damaged"
    return facts


def _tell(path: Path, facts: dict[str, Any]) -> None:
    facts["started"] = (path / "config.toml").stat().st_mtime
    config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    facts.update(msgspec.structs.asdict(msgspec.convert(config, _Config)))
    events = path / "events.jsonl"
    if events.is_file():
        facts["started"] = _begun(events) or facts["started"]
    state = state_of(path / LOCK)
    if state != "free":
        facts["status"] = {"held": "running", "left": "killed"}[state]
    elif (path / "summary.json").is_file():
        summary = msgspec.json.decode((path / "summary.json").read_bytes(), type=_Summary)
        total = summary.total_seconds  # a resumed run's are those of all its sessions, like its steps
        facts.update(
            status=summary.status, env_steps=summary.env_steps, train_return_mean_100=summary.train_return_mean_100,
            wall_seconds=summary.wall_seconds if total is None else total,
            best_evaluation=summary.best.mean_return if summary.best else None,
        )  # fmt: skip
        return
    if events.is_file():
        if state == "free" and time.time() - events.stat().st_mtime < RECENT_S:
            facts["status"] = "running"
        for line in _last_lines(events):
            event = msgspec.json.decode(line, type=_Event)
            facts.update(env_steps=event.env_steps, wall_seconds=event.seconds)
            if event.train_return_mean_100 is not None:
                facts["train_return_mean_100"] = event.train_return_mean_100
            if event.event == "evaluated" and (mean := msgspec.json.decode(line, type=_Best).mean_return) is not None:
                best = facts["best_evaluation"]
                facts["best_evaluation"] = mean if best is None else max(best, mean)


def _begun(events: Path) -> float | None:
    """When the run was begun, if that is told. A resume replaces config.toml, and adds to the events."""
    with events.open("rb") as file:
        for line in itertools.islice(file, FIRST_LINES):
            if b'"started"' in line[:30]:
                return msgspec.json.decode(line, type=_Started).unix_seconds
    return None


def _last_lines(path: Path) -> list[bytes]:
    """The whole lines within the last 64 KiB of a file that may be being written."""
    with path.open("rb") as file:
        skipped = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(skipped)
        return file.read().split(b"\n")[1 if skipped else 0 : -1]


def _row(run: Mapping[str, Any]) -> list[str]:
    steps, seconds = run["env_steps"], run["wall_seconds"]
    return [
        Path(run["run"]).name,
        str(run["status"]),
        str(run["env"] or "?"),
        str(run["algo"] or "?"),
        "?" if run["seed"] is None else str(run["seed"]),
        "–" if steps is None else count(steps),
        number(run["train_return_mean_100"]),
        number(run["best_evaluation"]),
        "–" if seconds is None else duration(seconds),
        datetime.fromtimestamp(run["started"]).strftime("%Y-%m-%d %H:%M"),
    ]

