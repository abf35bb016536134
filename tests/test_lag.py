"""The meter of the event loop's lateness."""

from __future__ import annotations

import asyncio

import pytest

from aiorl.metrics import lag
from aiorl.metrics.lag import LagMeter


def test_nothing_measured_yet() -> None:
    assert LagMeter().percentiles() == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_percentiles() -> None:
    meter = LagMeter()
    for late_ms in range(101):
        meter.note(float(late_ms))
    assert meter.percentiles() == {"p50": 50.0, "p99": 99.0, "max": 100.0}


def test_old_samples_give_way_but_the_worst_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "KEEP", 10)
    meter = LagMeter()
    meter.note(1000.0)
    for _ in range(9):
        meter.note(5.0)
    for _ in range(10):
        meter.note(2.0)
    assert meter.percentiles() == {"p50": 2.0, "p99": 2.0, "max": 1000.0}


async def test_a_held_loop_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is made up: the first sleep takes 15 ms more than was asked for, the second as long as it should."""
    once, twice = lag.INTERVAL_S + 0.015, 2 * lag.INTERVAL_S + 0.015
    clock = iter([0.0, once, once, twice, twice])
    monkeypatch.setattr(lag.time, "perf_counter", lambda: next(clock))
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(lag.asyncio, "sleep", sleep)
    meter = LagMeter()
    with pytest.raises(asyncio.CancelledError):
        await meter.measure()
    assert asked == [lag.INTERVAL_S] * 3
    assert meter.percentiles()["max"] == pytest.approx(15.0)
    assert meter.percentiles()["p50"] == pytest.approx(7.5)
