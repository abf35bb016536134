"""Small checkpoints that can be told apart."""

from __future__ import annotations

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


def part(mark: int) -> dict[str, checkpoint.Tree]:
    """The parts of a checkpoint that can be told from others."""
    return {"policy": {"w": np.full((2, 3), mark, np.float32)}, "run": {"mark": mark, "rows": np.arange(mark)}}


def mark_of(path: Path) -> int:
    found, parts = checkpoint.load(path, ("policy", "run"))
    marks = {found.version, int(parts["policy"]["w"][0, 0]), parts["run"]["mark"], len(parts["run"]["rows"])}
    assert len(marks) == 1, f"a mixture of checkpoints: {marks}"
    return marks.pop()
