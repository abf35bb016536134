"""The bench programs still run and count right; what they measure is not judged here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import common, degree_speed, eval_cost, overhead, results, twin, work


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


def updates(ends_s: list[float], collect_s: float, update_s: float) -> list[Any]:
    times = {"collect_seconds": collect_s, "update_seconds": update_s, "staleness": 1}
    return [SimpleNamespace(seconds=end_s, **times) for end_s in ends_s]


def test_speed_by_degree_is_compared_with_what_overlap_can_save():
    # 20 ms of collecting and 10 ms of learning: one after the other 30 ms, at once 20 ms, which saves a third.
    base = degree_speed.point(updates([0.0, 0.03, 0.06], 0.02, 0.01), 0, 0.0)
    half = degree_speed.point(updates([5.0, 5.025, 5.05], 0.02, 0.01), 1, 0.0)
    full = degree_speed.point(updates([1.0, 1.02, 1.04], 0.02, 0.01), 1, 0.0)
    assert full.bound == pytest.approx(1 / 3)
    assert [p.efficiency for p in (base, half, full)] == pytest.approx([2 / 3, 0.8, 1.0])
    assert degree_speed.savings([half, full], [base, base]) == pytest.approx([1 / 6, 1 / 3])
    assert "misses 95% of the bound at 2:1 (80.0%)" in degree_speed.verdict({"2:1": {1: [half]}, "1:1": {1: [full]}})
    assert degree_speed.verdict({"1:1": {1: [full, half, full]}}) == "degree 1 reaches 95% of the bound at 1:1"
    assert degree_speed.row("2:1", 1, [full], [base]).startswith("| 2:1 | 1 | 50.0 | 33.3% | 33.3% | 100.0% [")


def test_speed_by_degree_leaves_out_what_is_not_known(capsys: pytest.CaptureFixture[str]):
    assert degree_speed.usable([4, -7, 1, 4]) == [0, 4, 1]
    assert "degree -7 is skipped" in capsys.readouterr().out


def test_work_is_fixed_by_its_iterations_and_the_seed():
    def play(iterations: int) -> tuple[bytes, bool]:
        env = work.Work(iterations)
        env.reset(seed=3)
        obs, _, terminated, truncated, _ = [env.step(np.int64(0)) for _ in range(work.EPISODE)][-1]
        assert env.observation_space.contains(obs)
        return obs.tobytes(), truncated and not terminated

    assert play(50) == play(50)
    assert play(50) != play(51)
    assert play(50)[1]


async def test_speed_by_degree_measures_a_run(no_leaks: None):
    found = await degree_speed.measure(degree_speed.Load(20, 1), 2, updates=6)
    assert (found.degree, found.wall > 0, found.collect > 0, found.update > 0) == (2, True, True, True)
    assert 0 <= found.staleness <= 2


def test_cost_of_evaluation_is_what_it_adds_in_the_same_round():
    def runs(*walls: float) -> list[eval_cost.Times]:
        return [eval_cost.Times(wall, 0.004, 0.03, 0.1, 10) for wall in walls]

    times = {"none": runs(3.0, 4.0), "newest": runs(3.1, 4.0), "wait": runs(4.0, 5.0)}
    assert eval_cost.costs(times, "wait") == [1.0, 1.0]
    assert eval_cost.shares(times) == pytest.approx([0.1, 0.0])
    assert "| wait | 10 | 4.500 | +1.000 | 30.0 | 100 |" in eval_cost.table(times)


@pytest.mark.long
async def test_cost_of_evaluation_measures_all_ways(no_leaks: None):
    times = await eval_cost.compare(eval_cost.Load(20, 1, 20), rounds=1, cycles=2)
    assert [times[way][0].evaluations for way in ("none", "wait")] == [1, 2]
    assert all(found.wall > 0 for (found,) in times.values())


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
