"""What bench programs share: summaries of repeated measurements and a description of the machine."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiorl.report import library_versions


class Summary(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1) -> str:
        return f"{self.median:,.{digits}f} [{self.low:,.{digits}f} … {self.high:,.{digits}f}]"


def summarise(values: Sequence[float]) -> Summary:
    return Summary(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of unsorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def machine() -> dict[str, Any]:
    """Figures mean something only beside these: cores, load of other programs, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **library_versions(),
    }


def print_machine() -> None:
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    print()


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")
