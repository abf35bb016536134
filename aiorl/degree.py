"""`off_policy_degree` while a run goes on: what is measured for the tuner, and how a decision takes effect."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from aiorl.config import Config
from aiorl.learning import Outcome
from aiorl.pacing import Pacer, RolloutPlan
from aiorl.tuning import Decision, Measured, Tuner

FIRST_DEGREE = 0  # a self-tuned run begins with it: what overlap brings or costs is seen by coming from there
ERROR_TARGET = 0.3  # for algorithms that name none


class Dial:
    """Turns the pacer's degree: by itself if the configuration says -1, by hand with `turn`. On the event loop's thread."""

    def __init__(
        self, config: Config, pacer: Pacer, clock: Callable[[], float] = time.perf_counter, lanes: int | None = None
    ) -> None:
        """`lanes`: how many groups are collected at the same time (default: one in each worker)."""
        self._pacer, self._clock = pacer, clock
        self._groups_per = config.groups, lanes or max(1, int(config.workers) if config.workers != "auto" else 1)
        default = getattr(config.algorithm, "default_error_target", ERROR_TARGET)
        self._error_target = default if config.error_target is None else config.error_target
        self._tuner: Tuner | None = None
        self._by_hand = False  # the tuner was asked for, the configuration has none
        self._configured = config.off_policy_degree
        self._last_s: float | None = None
        if config.off_policy_degree < 0:
            self._tune(pacer.degree)

    @property
    def tunes_itself(self) -> bool:
        return self._tuner is not None

    def _tune(self, degree: int) -> None:
        self._tuner = Tuner(degree=degree, degree_max=self._pacer.degree_max, error_target=self._error_target)

    def updated(self, plan: RolloutPlan, outcome: Outcome, waited_s: float) -> Decision | None:
        """After each update: take its measures, and apply and return the change they lead to, if any.

        `waited_s` is how long the learner had nothing to learn from. Updates without a gradient step (warm-up) tell nothing
        about training and do not count.
        """
        now_s = self._clock()
        last_s, self._last_s = self._last_s, now_s
        if self._tuner is None or last_s is None or not outcome.gradient_steps:
            return None
        interval_s = now_s - last_s
        metrics = outcome.metrics
        decision = self._tuner.observe(
            Measured(
                staleness=plan.staleness,
                collect_s=self._collect_s(plan, outcome),
                train_s=max(0.0, interval_s - waited_s),
                interval_s=interval_s,
                error=metrics.get("off_policy_error"),
                clip_fraction=metrics.get("clip_fraction"),
                grad_norm=metrics.get("grad_norm"),
            )
        )
        if decision is not None:
            self._pacer.change_degree(decision.degree)
        return decision

    def _collect_s(self, plan: RolloutPlan, outcome: Outcome) -> float:
        """How long the busiest worker collected for this rollout, or the slowest group if they do so side by side."""
        groups, workers = self._groups_per
        busy_s = [0.0] * workers
        for part, seconds in zip(plan.parts, outcome.segment_seconds, strict=True):
            busy_s[part.group * workers // groups] += seconds
        return max(busy_s)

    def forget_time(self) -> None:
        """The time since the last update was a pause."""
        self._last_s = None

    def turn(self, degree: int) -> None:
        """Set the degree by hand and leave it there; -1 hands it back to the tuner. ConfigError if it is out of reach."""
        if degree < 0:
            if self._tuner is None:
                self._tune(self._pacer.degree)
                self._pacer.change_degree(self._pacer.degree)
                self._by_hand = self._configured >= 0
            return
        self._pacer.change_degree(degree)
        self._tuner = None

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; empty while the degree is as configured, so that a resume is exact."""
        if self._tuner is not None:
            by_hand = {"by_hand": True} if self._by_hand else {}
            return {"degree": self._pacer.degree, "tuner": self._tuner.state_dict(), **by_hand}
        return {"degree": self._pacer.degree} if self._pacer.degree_changed else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as saved (the degree itself is the pacer's to resume). Raises ValueError for what is no such state."""
        if not state:
            return
        if "tuner" not in state:
            self._tuner = None  # the degree had been set by hand
            return
        self._by_hand = state.get("by_hand", False)
        if self._tuner is None and self._by_hand:
            self._tune(self._pacer.degree)
        if self._tuner is not None:
            self._tuner.load_state_dict(state["tuner"])


def check_degree(state: Any) -> None:
    """Raise ValueError unless `state` has the form of a `Dial.state_dict`."""
    known = ("degree", "tuner", "by_hand")  # each only with those before it
    if not isinstance(state, dict) or state.keys() not in [set(known[:n]) for n in range(4)]:
        raise ValueError(f"degree: expected a table with `degree` and `tuner`, got {state!r}")
    table = cast("dict[str, Any]", state)
    degree = table.get("degree", 0)
    if table.get("by_hand", True) is not True:
        raise ValueError(f"degree.by_hand = {table['by_hand']!r}: expected true")
    if type(degree) is not int or degree < 0:
        raise ValueError(f"degree.degree = {degree!r}: expected 0 or more")


def first_degree(config: Config, saved: Mapping[str, Any]) -> int:
    """The degree that a run begins with, or goes on with if `saved` is not empty (see `Dial.state_dict`)."""
    set_by_hand = bool(saved) and ("tuner" not in saved or "by_hand" in saved)
    if config.off_policy_degree >= 0 and not set_by_hand:
        return config.off_policy_degree
    return min(config.degree_limit, int(saved["degree"]) if saved else FIRST_DEGREE)
