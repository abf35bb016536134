"""Small checkpoints that can be told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from experience import spaces

from aiorl import checkpoint
from aiorl.checkpoint import Manifest


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "schema": checkpoint.SCHEMA, "kind": "periodic", "version": 3, "env_steps": 96, "config": {"seed": 2**62},
        "spaces": spaces(), "libraries": {"aiorl": "0.1"}, "notes": {"why": "a test"},
    }  # fmt: skip
    return Manifest(**fields | changes)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """Change a checkpoint's manifest; with `seal` so that it agrees with its own hash again, as an attacker would."""
    data = json.loads((path / checkpoint.MANIFEST).read_text())
    change(data)
    if seal:
        data["sha256"] = "0" * 64
        data["sha256"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(json.dumps(data))


def part(mark: int) -> dict[str, checkpoint.Tree]:
    """The parts of a checkpoint that can be told from others."""
    return {"policy": {"w": np.full((2, 3), mark, np.float32)}, "run": {"mark": mark, "rows": np.arange(mark)}}


def mark_of(path: Path) -> int:
    found, parts = checkpoint.load(path, ("policy", "run"))
    marks = {found.version, int(parts["policy"]["w"][0, 0]), parts["run"]["mark"], len(parts["run"]["rows"])}
    assert len(marks) == 1, f"a mixture of checkpoints: {marks}"
    return marks.pop()
