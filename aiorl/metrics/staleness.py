"""How old the data was that a run learned from, and what it did to learning, lag by lag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from aiorl.pacing import RolloutPlan

PER_LAG = (
    "off_policy_error", "ess", "log_ratio_m2", "action_disagreement", "approx_kl", "clip_fraction", "grad_norm",
)  # fmt: skip
"""Metrics of an update that are averaged for each lag."""


class StalenessBooks(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Counts of updates by the staleness of their rollout. Its fields are its state."""

    histogram: dict[int, int]
    in_queue: int  # sum over the updates; the rest of the staleness came in flight
    sums: dict[int, dict[str, tuple[int, float]]]  # lag -> metric -> (updates that had it, sum)

    @classmethod
    def empty(cls) -> StalenessBooks:
        return cls(histogram={}, in_queue=0, sums={})

    def enter(self, plan: RolloutPlan, metrics: Mapping[str, float]) -> None:
        """One update is done."""
        lag = plan.staleness
        self.histogram[lag] = self.histogram.get(lag, 0) + 1
        self.in_queue += plan.staleness_in_queue
        of_lag = self.sums.setdefault(lag, {})
        for name in PER_LAG:
            if name in metrics:
                count, total = of_lag.get(name, (0, 0.0))
                of_lag[name] = count + 1, total + metrics[name]

    def summary(self) -> dict[str, Any]:
        """As in summary.json: mean = mean_in_flight + mean_in_queue; `by_lag` has the mean of each metric."""
        updates = sum(self.histogram.values())
        mean = sum(lag * n for lag, n in self.histogram.items()) / max(1, updates)
        in_queue = self.in_queue / max(1, updates)
        by_lag = {
            str(lag): {name: round(total / count, 6) for name, (count, total) in of_lag.items()}
            for lag, of_lag in sorted(self.sums.items())
        }
        return {
            "mean": round(mean, 4),
            "max": max(self.histogram, default=0),
            "histogram": {str(lag): n for lag, n in sorted(self.histogram.items())},
            "mean_in_flight": round(mean - in_queue, 4),
            "mean_in_queue": round(in_queue, 4),
            "by_lag": by_lag,
        }
