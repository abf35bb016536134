"""What a run wrote, read as data: also of one that is still going on, or was killed. Nothing is run or imported."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aiorl.algos import ALGORITHMS, algorithm_class
from aiorl.errors import ConfigError
from aiorl.structs import as_in_a_file, without_none

S = TypeVar("S")
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading JSON raises for what is none, or too deep."""


@dataclass
class Story:
    """What is known of a run. `updates` are those that count: what a resumed run did again is there once. Each has the
    `total_steps` that was in force at it.

    A run that went on from a copied checkpoint has its beginning elsewhere: `before` updates, `stored_before` env steps.
    """

    path: Path
    config: dict[str, Any]
    settings: dict[str, Any]  # of the algorithm that learns
    summary: dict[str, Any]
    before: int = 0
    stored_before: int = 0
    updates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    told: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # all other events
    marks: list[int] = field(default_factory=list[int])  # of the weights after each update
    damaged: str = ""

    def metric(self, name: str) -> list[float]:
        """What the updates report under a name, where they do: what was not finite was written as null."""
        return [value for u in self.updates if (value := u["metrics"].get(name)) is not None]

    @property
    def returns(self) -> list[float]:
        """The mean of each update in which episodes ended."""
        return [u["return_mean"] for u in self.updates if u["episodes"] and u["return_mean"] is not None]

    def spoilt(self, how: str) -> None:
        """Only the first of what is damaged is told."""
        self.damaged = self.damaged or how

    @property
    def warmup(self) -> int:
        return int(self.config.get("warmup", self.settings.get("warmup", 0)))


def read(path: Path) -> Story:
    """Raises ConfigError if `path` is not a run directory, or a file in it cannot be read."""
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise ConfigError(f"{path} is not a run directory: {failure}") from None
    story = Story(path, config, _settings(config), {})
    _read_summary(story)
    total = config.get("total_steps", 0)
    for number, event, place in _lines(story, "events.jsonl", _Place):
        if place.event == "updated":
            del story.updates[max(0, place.version - 1 - story.before) :]
            if (known := story.before + len(story.updates)) != place.version - 1:
                story.spoilt(f"events.jsonl, line {number}: update {place.version} follows {known}")
            story.updates.append(event | {"total_steps": total})
            continue
        if place.event == "started":
            total = event.get("total_steps", total)
            if not any(e.get("event") == place.event for e in story.told):
                story.before, story.stored_before = place.resumed_from or 0, place.env_steps
        story.told.append(event)
    for number, _, rollout in _lines(story, "schedule.jsonl", _Rollout):
        del story.marks[max(0, rollout.k - story.before) :]
        if (known := story.before + len(story.marks)) != rollout.k:
            story.spoilt(f"schedule.jsonl, line {number}: rollout {rollout.k} follows {known - 1}")
        story.marks.append(rollout.crc)
    return story


class _Place(msgspec.Struct):
    """What of an event says where it belongs."""

    event: str
    version: int
    env_steps: int
    resumed_from: int | None = None


class _Rollout(msgspec.Struct):
    k: int
    crc: int = 0


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the algorithm, or of the one within it: those that were given, over aiorl's own defaults."""
    others = ("env_kwargs", "eval_suites")
    table: dict[str, Any] = next((v for k, v in config.items() if isinstance(v, dict) and k not in others), {})
    inner, name = table.get("inner"), str(table.get("algo"))
    if not isinstance(inner, dict):
        return table
    defaults = without_none(as_in_a_file(algorithm_class(name)())) if name in ALGORITHMS else {}
    return defaults | inner


def _lines(story: Story, name: str, kind: type[S]) -> Iterator[tuple[int, dict[str, Any], S]]:
    """The records of a file with their numbers and as a `kind`, but for a last line that was being written."""
    lines = _bytes(story.path / name).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield number, msgspec.json.decode(line, type=dict[str, Any]), msgspec.json.decode(line, type=kind)
        except UNREADABLE as failure:
            if number < len(lines) or isinstance(failure, msgspec.ValidationError):
                story.spoilt(f"{name}, line {number}: {failure}")


def _read_summary(story: Story) -> None:
    data = _bytes(story.path / "summary.json")
    try:
        story.summary = msgspec.json.decode(data, type=dict[str, Any]) if data else {}
    except UNREADABLE as failure:
        story.spoilt(f"summary.json: {failure}")


def _bytes(path: Path) -> bytes:
    """What is in a file; nothing if there is none. Raises ConfigError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as failure:
        raise ConfigError(f"cannot read {path}: {failure.strerror}") from None
