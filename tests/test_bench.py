"""The bench programs still run and count right; what they measure is not judged here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import common, overhead, results, twin


def test_percentiles_are_nearest_rank():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [common.percentile(values, p) for p in (0, 50, 100)] == [1.0, 3.0, 5.0]
    assert common.summarise(values) == (3.0, 1.0, 5.0)


def summary(*returns: float) -> dict[str, Any]:
    evaluations = [
        {"env_steps": 1000 * (i + 1), "seconds": float(i), "mean_return": mean} for i, mean in enumerate(returns)
    ]
    final = evaluations[-1]
    return {"evaluations": evaluations, "final_evaluation": final, "env_steps": final["env_steps"], "wall_seconds": 9.0}


def test_results_count_the_final_evaluation_not_the_best():
    case = results.Case("ppo", "CartPole-v1", 475, 2)
    row = results.row(case, [summary(100, 500, 500), summary(500, 400)])
    assert "| 1 of 2 |" in row
    assert "500.0, 400.0" in row
    assert "2k / 0 s" in row  # median of 2000 and 1000 steps, rounded to even
    assert results.first_at(475, summary(1, 2)) is None


def test_results_replace_only_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document = tmp_path / "results.md"
    document.write_text(f"before\n{results.BEGIN}\n{results.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(results, "DOCUMENT", document)
    one, other = results.CASES[0], results.CASES[5]
    results.write({other.name: results.row(other, [summary(1)])})
    results.write({one.name: results.row(one, [summary(500)])})
    results.write({one.name: results.row(one, [summary(499)])})
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert [text.count(f"`{c.command} --seed S`") for c in (one, other)] == [1, 1]
    assert "499.0" in text
    assert "500.0" not in text


@pytest.mark.long
async def test_twin_measures_both_ways(no_leaks: None):
    figures = await twin.compare("CartPole-v1", rounds=1, steps=20_000)
    assert figures.keys() == {"steady", "all"}
    assert all(figures[kind][way][0] > 0 for kind in figures for way in ("async", "twin"))


@pytest.mark.long
async def test_overhead_measures(no_leaks: None):
    assert (await overhead.handoff())["latency_us"]["p50"] > 0
    assert (await overhead.publish(megabytes=1))["on_loop_ms"] >= 0
    assert set(await overhead.start([2])) == {"forkserver 2", "spawn 2"}
