"""The bench programs still run and count right; what they measure is not judged here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import aiorl
from bench import common, degree_speed, eval_cost, hockey_train, overhead, results, twin, work
from bench import steps as step_costs
from bench.peers import __main__ as peers
from bench.peers import lineup, report, works


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


OURS, SYNC, EACH = (
    lineup.Entry("w1", "aiorl", "2 workers / mlp", lineup.WORKERS),
    lineup.Entry("w1", "gymnasium", "SyncVectorEnv / mlp", lineup.ONE),
    lineup.Entry("w1", "sb3", "SubprocVecEnv 16 processes / mlp", lineup.EACH),
)


def measured(round_: int, entry: lineup.Entry, rate: float, speed: float = 30.0) -> report.Row:
    return report.Row(round_, entry, {report.RATE: rate}, 2.0, 6.0, (30.0, speed))


def test_peers_are_compared_round_by_round():
    slow = [measured(0, OURS, 50.0), measured(0, SYNC, 25.0), measured(0, EACH, 4.0)]
    fast = [measured(1, OURS, 400.0), measured(1, SYNC, 100.0), measured(1, EACH, 50.0)]
    rows = [*slow, *fast, measured(2, SYNC, 1.0)]  # aiorl failed in the last round
    assert report.ratios(rows, OURS, SYNC, report.RATE) == [2.0, 4.0]
    assert [(v.found, v.reached) for v in report.verdicts("w1", rows)] == [(3.0, True), (10.25, True)]
    assert [(v.found, v.reached) for v in report.verdicts("w1", slow)] == [(2.0, False), (12.5, True)]
    assert "| sb3: SubprocVecEnv 16 processes / mlp | process per env | 27 [4 … 50] | 10.25 [8.00 … 12.50] | 2.0 |" in (
        report.table("w1", rows)
    )
    assert [row.round for row in report.disturbed([*fast, measured(3, OURS, 9.0, speed=20.0)])] == [3]
    assert report.rows(json.loads(json.dumps(report.raw(rows)))) == rows


def test_a_target_that_was_not_reached_is_said_and_not_counted():
    ours, other = (lineup.Entry("w2", peer, "PPO 2 workers", lineup.WORKERS) for peer in ("aiorl", "sb3"))
    rows = [
        report.Row(i, entry, {report.SECONDS: seconds}, 1.0, 9.0, (1.0, 1.0))
        for i, pair in enumerate([(1.0, 4.0), (1.0, None)])
        for entry, seconds in zip((ours, other), pair, strict=True)
    ]
    assert report.ratios(rows, ours, other, report.SECONDS) == [0.25]
    assert "4.00 [4.00 … 4.00], 1 of 2 not reached" in report.table("w2", rows)


def test_sac_is_held_against_the_best_peer_and_against_its_gradient_step_alone():
    way = {"SAC": lineup.WORKERS, "limit: gradient steps alone": lineup.LIMIT}
    ours, alone = (lineup.Entry("w4", "aiorl", variant, kind) for variant, kind in way.items())
    peer, other = (lineup.Entry("w4", name, "SAC", lineup.ONE) for name in ("handwritten", "sb3"))

    def row(entry: lineup.Entry, updates: float, seconds: float | None = None) -> report.Row:
        figures = {report.UPDATES: updates, report.RATE: 1.1 * updates, report.SECONDS: seconds}
        return report.Row(0, entry, figures, 1.0, 9.0, (1.0, 1.0))

    rows = [row(ours, 130.0, 30.0), row(alone, 150.0), row(peer, 90.0, 60.0), row(other, 65.0)]
    assert [(round(v.found, 2), v.reached) for v in report.verdicts("w4", rows)] == [(1.44, True), (0.87, False)]
    assert "handwritten: SAC" in report.verdicts("w4", rows)[0].goal
    assert "| 60.00 [60.00 … 60.00] | 0.50 [0.50 … 0.50] |" in report.table("w4", rows)
    assert "| 1 of 1 not reached |" in report.table("w4", rows)


def test_a_run_of_sac_is_given_up_at_its_cap():
    clock = works.Training(works.Task("w4", "", 0, 1.0), works.SAC(window=1, cap=90, rate_over=50))
    assert (clock.is_over(89), clock.is_over(90)) == (False, True)
    clock.episode(-200.0, 40)
    assert (clock.is_over(49), clock.is_over(50)) == (False, True)


def test_the_clock_of_training_waits_for_a_full_window():
    task = works.Task("w2", "", 0, 1.0, ppo=works.PPO(window=2, rate_over=50, cap=90))
    clock = works.Training(task, task.ppo)
    for steps, total in ((10, 500.0), (20, 400.0), (30, 500.0), (40, 440.0)):
        clock.episode(total, steps, seconds=steps / 10)
    assert not clock.is_over(89)
    clock.episode(510.0, 45, seconds=4.5)  # the mean of the last two is 475
    assert (clock.is_over(49), clock.is_over(50)) == (False, True)
    assert clock.figures(60, 6.0) == {"env_steps_per_s": 10.0, "seconds_to_target": 4.5, "env_steps_to_target": 45}
    assert clock.figures(60, 6.0, updates=30)[report.UPDATES] == 5.0


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = peers.parse(["--work", "w1", "--peers", "sb3", "--peers-dir", str(tmp_path), "--smoke"])
    asked = [entry for entry in lineup.chosen(options.work, options.peers, options.all)["w1"] if entry.is_peer]
    assert {entry.peer for entry in asked} == {"sb3"}
    assert peers.compare(asked, options, {}) == []
    assert [f"{entry.name}: skipped" in capsys.readouterr().out for entry in asked[:1]] == [True]


def test_the_line_up_names_programs_that_exist():
    assert len(set(lineup.LINEUP)) == len(lineup.LINEUP)
    home = Path(peers.__file__).parent
    assert all((home / f"{entry.module.rpartition('.')[2]}.py").exists() for entry in lineup.LINEUP)


@pytest.mark.long
@pytest.mark.parametrize("entry", [e for e in lineup.LINEUP if e.peer == "aiorl"], ids=lambda e: f"{e.work} {e.variant}")
def test_aiorl_does_its_part_of_the_comparison(entry: lineup.Entry, tmp_path: Path):
    row, versions = peers.measure(entry, entry.python(tmp_path), 0, seconds=0.5, smoke=True)
    assert versions["aiorl"]
    rates = {metric: row.figures[metric] for metric in (report.RATE, report.UPDATES) if metric in row.figures}
    assert rates
    assert all(rate and rate > 0 for rate in rates.values())


@pytest.mark.long
async def test_twin_measures_both_ways(no_leaks: None):
    figures = await twin.compare("CartPole-v1", rounds=1, steps=20_000)
    assert figures.keys() == {"steady", "all"}
    assert all(figures[kind][way][0] > 0 for kind in figures for way in ("async", "twin"))


@pytest.mark.parametrize("own", hockey_train.LEARNERS.values(), ids=hockey_train.LEARNERS)
async def test_the_buffer_of_hockey_grows_without_a_stall(own: dict[str, Any], no_leaks: None):
    """In small; the long one is `test_the_buffer_of_hockey_grows_to_a_million`."""
    growth = await hockey_train.grow(3_000, own, envs=4, workers=2)
    assert growth.wrong == []
    assert 3_000 <= growth.env_steps < 3_064
    assert growth.gradient_steps > 0
    assert growth.queue_bound <= 4


@pytest.mark.long
@pytest.mark.parametrize("own", hockey_train.LEARNERS.values(), ids=hockey_train.LEARNERS)
async def test_the_buffer_of_hockey_grows_to_a_million(own: dict[str, Any], no_leaks: None):
    growth = await hockey_train.grow(1_000_000, own)
    assert growth.wrong == []


async def test_a_stall_and_a_wrong_ratio_would_be_seen(tmp_path: Path):
    config = hockey_train.settings(str(tmp_path), 2_400, {"update_ratio": 0.01, "hidden": (8,)}, envs=4, workers=0)
    async with aiorl.Run(config) as run:
        updates = [event async for event in run.events(hockey_train.ALL) if isinstance(event, aiorl.Updated)]
    result = run.result
    assert result is not None
    assert hockey_train.differences(updates, result, config) == []
    idle, lazy, short = list(updates), list(updates), list(updates)
    idle[3] = msgspec.structs.replace(idle[3], env_steps=idle[2].env_steps)
    lazy[-1] = msgspec.structs.replace(lazy[-1], gradient_steps=lazy[-1].gradient_steps + 1)
    short[-1] = msgspec.structs.replace(short[-1], metrics={**short[-1].metrics, "replay_size": 1300.0})
    found = [hockey_train.differences(changed, result, config) for changed in (idle, lazy, short)]
    assert found == [
        ["update 4: stored 192 instead of 256"],
        [f"update {len(updates)}: gradient steps 5 instead of 4"],
        [f"update {len(updates)}: in the buffer 1300 instead of 2432"],
    ]
    lossy = msgspec.structs.replace(result, dropped={"stopped": 3})
    assert "dropped {'stopped': 3}" in hockey_train.differences(updates, lossy, config)[0]


@pytest.mark.long
async def test_asynchronous_hockey_is_compared_with_its_twin(no_leaks: None):
    figures = await hockey_train.compare(4_000, 1, 0.01)
    assert all(figures[way][0] > 0 for way in hockey_train.WAYS)


@pytest.mark.long
async def test_overhead_measures(no_leaks: None):
    assert (await overhead.handoff())["latency_us"]["p50"] > 0
    assert (await overhead.publish(megabytes=1))["on_loop_ms"] >= 0
    assert set(await overhead.start([2])) == {"forkserver 2", "spawn 2"}
    assert set(await overhead.pausing(1)) == {f"{algo} {env}" for algo, env in overhead.LEARNERS.items()}


def test_functions_are_timed_in_turns() -> None:
    calls: list[str] = []
    took = step_costs.cpu_us({name: lambda name=name: calls.append(name) for name in "ab"}, 0.0)
    assert calls == ["a", "b"] * 2  # the first time does not count
    assert took.keys() == {"a", "b"}
    assert min(took.values()) > 0


@pytest.mark.parametrize("native", [True, False])
def test_collecting_and_its_parts_can_be_timed(native: bool) -> None:
    for function in step_costs.collecting(native, 2).values():
        function()


def test_an_update_makes_the_gradient_steps_it_is_divided_by(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_costs.updating(aiorl.PPO(), 4, 2, 128, 16)()["gradient_steps"] == 4 * 8
    assert step_costs.updating(aiorl.DQN(hidden=(8,)), 8, 4, 32, 1, before=2_000 // 32)()["gradient_steps"] == 32 // 4
    for algorithm in (aiorl.SAC(hidden=(8,)), aiorl.TD3(hidden=(8,))):
        assert step_costs.updating(algorithm, 3, 2, 4, 1, before=1_200 // 4)()["gradient_steps"] == 4
    took = step_costs.gradient_steps("it", {"update": lambda: None, "bare": lambda: None}, 1, 0.0)
    assert took.keys() == {"update", "bare"}
    assert "x the bare loop's speed" in capsys.readouterr().out


@pytest.mark.parametrize("bare", [step_costs.bare_sac, step_costs.bare_td3])
def test_the_bare_loop_of_continuous_actions_moves_all_networks(bare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[step_costs.BareActorCritic] = []

    class Kept(step_costs.BareActorCritic):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            made.append(self)

    monkeypatch.setattr(step_costs, "BareActorCritic", Kept)
    step = bare(3, 2, lambda loss: loss)
    (nets,) = made
    all_of_them = [*nets.actor.parameters(), *nets.critic_parameters, *nets.target_parameters]
    before = [parameter.detach().clone() for parameter in all_of_them]
    step()
    moved = [not parameter.equal(old) for parameter, old in zip(all_of_them, before, strict=True)]
    assert all(moved[: -len(nets.target_parameters)])
    assert any(moved[-len(nets.target_parameters) :])
