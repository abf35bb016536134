"""How late the event loop is: the sin of an asyncio program is to hold its host's loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import numpy as np

INTERVAL_S = 0.05  # waking up more often would cost an idle run more than everything else in it
KEEP = 12_000  # ten minutes; older samples give way


class LagMeter:
    """Sleeps a fixed time again and again and notes by how much it woke up late."""

    def __init__(self) -> None:
        self._late_ms = np.zeros(KEEP)  # a ring
        self._count = 0
        self.max_ms = 0.0
        self.woke_s = math.inf  # when it woke up last, once it has begun

    async def measure(self, turned: Callable[[float], None] | None = None) -> None:
        """Run until cancelled. `turned` is told each time by how many seconds it was late."""
        while True:
            self.woke_s = time.perf_counter()
            due_s = self.woke_s + INTERVAL_S  # not loop.time(): uvloop's clock counts whole milliseconds
            await asyncio.sleep(INTERVAL_S)
            late_s = max(0.0, time.perf_counter() - due_s)
            self.note(late_s * 1000)
            if turned is not None:
                turned(late_s)

    def note(self, late_ms: float) -> None:
        self.max_ms = max(self.max_ms, late_ms)
        self._late_ms[self._count % KEEP] = late_ms
        self._count += 1

    def percentiles(self) -> dict[str, float]:
        """p50, p99 and max in milliseconds (0 before the first sample)."""
        if not self._count:
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        p50, p99 = np.percentile(self._late_ms[: self._count], (50, 99))
        return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(self.max_ms, 3)}
