"""The record of a run, `schedule.jsonl`: one line for each rollout, in order of use. It is all that a repetition needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from aiorl.errors import ConfigError
from aiorl.pacing import RecordedRollout, RolloutPlan

SCHEDULE, EVENTS = "schedule.jsonl", "events.jsonl"


class RecordLine(msgspec.Struct, frozen=True):
    """Rollout `k`: the groups side by side, the oldest version b_k that acted, each one's version where they differ, and a
    mark of the weights that update k made."""

    k: int
    b_k: int
    order: tuple[int, ...]
    versions: tuple[int, ...] = ()
    crc: int = 0


def record_line(plan: RolloutPlan, fingerprint: int) -> dict[str, Any]:
    """What is written for a rollout."""
    versions = [part.version for part in plan.parts]
    line = {"k": plan.index, "b_k": plan.behaviour_version, "order": [part.group for part in plan.parts]}
    return line | ({"versions": versions} if len(set(versions)) > 1 else {}) | {"crc": fingerprint}


class Record(msgspec.Struct, frozen=True):
    """What a run did: its rollouts in order, and by the number of updates that came before: the settings that were changed,
    and the `total_steps` that it was to have from there on, when it was begun and each time it was resumed."""

    lines: tuple[RecordLine, ...]
    settings: dict[int, dict[str, float]] = {}
    totals: dict[int, int] = {}

    @property
    def rollouts(self) -> list[RecordedRollout]:
        """As the pacer takes them."""
        return [RecordedRollout(line.order, line.versions or (line.b_k,) * len(line.order)) for line in self.lines]


def read_record(directory: Path) -> Record:
    """The record of the run in `directory`. Raises ConfigError if it is missing, damaged or has a gap."""
    path = directory / SCHEDULE
    lines: list[RecordLine] = []
    for number, text in enumerate(_read_lines(path), start=1):
        try:
            line = msgspec.json.decode(text, type=RecordLine)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        if line.k < len(lines):
            del lines[line.k :]  # the run was resumed from an earlier checkpoint and did these rollouts again
        if line.k != len(lines):
            raise ConfigError(f"{path}, line {number}: rollout {line.k} follows {len(lines) - 1}: there is a gap")
        lines.append(line)
    return Record(tuple(lines), *_read_events(directory / EVENTS))


class _Begun(msgspec.Struct, frozen=True, tag_field="event", tag="started"):
    total_steps: int
    resumed_from: int | None = None


class _Set(msgspec.Struct, frozen=True, tag_field="event", tag="settings_changed"):
    version: int
    changes: dict[str, float]


def _read_events(path: Path) -> tuple[dict[int, dict[str, float]], dict[int, int]]:
    """(settings, totals) of a record. A run that is resumed has given up what came after its checkpoint."""
    settings: dict[int, dict[str, float]] = {}
    totals: dict[int, int] = {}
    for text in _read_lines(path) if path.exists() else []:
        if b'"settings_changed"' not in text and b'"started"' not in text:
            continue
        try:
            event = msgspec.json.decode(text, type=_Begun | _Set)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: {error}") from None
        if isinstance(event, _Set):
            settings[event.version] = {**settings.get(event.version, {}), **event.changes}
            continue
        begun = event.resumed_from or 0
        settings = {version: changes for version, changes in settings.items() if version < begun}
        totals = {version: total for version, total in totals.items() if version < begun} | {begun: event.total_steps}
    return settings, totals


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}\n  only a recorded run can be repeated") from None
