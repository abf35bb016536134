"""`python -m aiorl runs [DIR]`: what there is, how it went."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

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
    paths = [directory, *directory.iterdir()]
    runs = [describe(path) for path in paths if (path / "config.toml").is_file()]
    return sorted(runs, key=lambda run: run["started"])


def describe(path: Path) -> dict[str, Any]:
    """The main facts of a run: from its summary, or while it has none from its configuration and last events."""
    config = _toml(path / "config.toml")
    facts: dict[str, Any] = {
        "run": str(path), "status": "unfinished", "env": config.get("env"), "algo": config.get("algo"),
        "seed": config.get("seed"), "env_steps": None, "train_return_mean_100": None, "best_evaluation": None,
        "wall_seconds": None, "started": (path / "config.toml").stat().st_mtime,
    }  # fmt: skip
    summary = _json(path / "summary.json")
    state = state_of(path / LOCK)
    if state != "free":
        summary, facts["status"] = {}, {"held": "running", "left": "killed"}[state]
    if summary:
        facts.update({k: summary.get(k) for k in ("status", "env_steps", "train_return_mean_100", "wall_seconds")})
        facts["best_evaluation"] = (summary.get("best") or {}).get("mean_return")
        if summary.get("total_seconds") is not None:  # a resumed run's are those of all its sessions, like its steps
            facts["wall_seconds"] = summary["total_seconds"]
        return facts
    events = path / "events.jsonl"
    if events.is_file():
        if state == "free" and time.time() - events.stat().st_mtime < RECENT_S:
            facts["status"] = "running"
        for event in _last_events(events):
            facts.update(env_steps=event.get("env_steps"), wall_seconds=event.get("seconds"))
            if event.get("train_return_mean_100") is not None:
                facts["train_return_mean_100"] = event["train_return_mean_100"]
            if event.get("event") == "evaluated":
                best = facts["best_evaluation"]
                facts["best_evaluation"] = event["mean_return"] if best is None else max(best, event["mean_return"])
    return facts


def _last_events(path: Path) -> list[dict[str, Any]]:
    """The events within the last 64 KiB of a file that may be being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            events.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError:
            continue  # cut at either end
    return events


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


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return {}
