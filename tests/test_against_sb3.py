"""The comparison of whole trainings counts right and keeps what is finished; the other library takes no part here."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from bench import against_sb3 as against
from bench.peers import learning, learning_ours
from bench.peers.learning import DQN, TASKS

CHEETAH = TASKS["HalfCheetah-v5"]


def row(who: str, seed: int, returns: list[float], train_s: float) -> dict[str, Any]:
    evaluations = [[1000.0 * (i + 1), 10.0 * i, mean, 1.0] for i, mean in enumerate(returns)]
    base = {"env": "HalfCheetah-v5", "steps": 2000, "who": who, "seed": seed, "env_steps": 2000}
    base |= {"settings": "sac with its settings; 2 environments"}
    return {**base, "train_s": train_s, "wall_s": train_s + 5.0, "evaluations": evaluations}


ROWS = [
    row("sb3", 0, [0.0, 100.0], 40.0),
    row("async", 0, [50.0, 200.0], 20.0),
    row("sb3", 1, [0.0, 300.0], 60.0),
    row("async", 1, [50.0, 250.0], 20.0),
    row("sb3", 2, [0.0, 900.0], 60.0),  # without a counterpart
]


def test_learners_are_compared_by_the_medians_of_the_seeds_that_both_have():
    returns, training, wall = against.verdicts(ROWS)
    assert returns.startswith("reached  HalfCheetah-v5, aiorl, 2 workers against Stable-Baselines3, 2 seeds: ")
    assert returns.endswith("final return 225.0 against 200.0 (medians)")
    assert training.endswith(": training 2.50 [2.00 … 3.00] times as fast")
    assert wall.endswith(": wall time 2.20 [1.80 … 2.60] times as fast")
    worse = [row("twin", 0, [0.0, 99.0], 50.0), ROWS[0]]
    assert [line[:7] for line in against.verdicts(worse)] == ["MISSED "] * 3


@pytest.mark.parametrize(("shift", "judged"), [(0.01, "equivalent"), (0.04, "undecided"), (0.2, "worse")])
def test_ways_learn_alike_if_the_interval_of_the_difference_lies_within_the_margin(shift: float, judged: str):
    task = CHEETAH
    rows = [
        row(who, seed, [task.random + (task.good - task.random) * (0.8 + 0.01 * (seed % 5) - lost)], train_s)
        for seed in range(10)
        for who, lost, train_s in (("async", shift, 10.0), ("twin", 0.0, 15.0))
    ]
    alike, training, _ = against.verdicts(rows)
    assert f"margin 0.05: {judged}; " in alike
    assert alike.count(f" by -{shift:.3f} [") == 2  # one evaluation is both the last one and all of them
    assert alike[:7] == ("reached" if judged == "equivalent" else "MISSED ")
    assert "training 1.50" in training
    assert "one seed does not tell" in against.verdicts(rows[:2])[0]


def test_the_table_has_a_line_for_each_participant():
    lines = against.table(ROWS).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["aiorl, 2 workers", "Stable-Baselines3"]
    assert "| 225.0 [200.0 … 250.0] | 137.5 [125.0 … 150.0] | 20 [20 … 20] | 25 [25 … 25] | 100 [100 …" in lines[0]


def test_a_curve_is_the_mean_of_the_seeds_and_both_are_in_one_picture(tmp_path: Path):
    (label, curve), _ = against.curves(ROWS)
    assert label == "aiorl, 2 workers, 2 seeds"
    assert [(p.env_steps, p.value, p.spread) for p in curve.evaluations] == [(1000.0, 50.0, 0.0), (2000.0, 225.0, 25.0)]
    paths = against.plot(ROWS, tmp_path)
    assert [path.name for path in paths] == [f"against_sb3-HalfCheetah-v5-2k-{axis}.svg" for axis in ("steps", "time")]
    assert all("Stable-Baselines3, 3 seeds" in path.read_text(encoding="utf-8") for path in paths)


def test_the_report_replaces_the_one_before_and_nothing_else(tmp_path: Path):
    (tmp_path / "img").mkdir()
    document = tmp_path / "results.md"
    document.write_text(f"before\n{against.BEGIN}\nold\n{against.END}\nafter\n", encoding="utf-8")
    against.write(ROWS[:2], document)
    against.write(ROWS, document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| HalfCheetah-v5, 2,000 |") == 2
    assert "* HalfCheetah-v5: sac with its settings; 2 environments; 10 episodes every 10,000 env steps." in text
    assert all((tmp_path / path).exists() for path in re.findall(r"\]\((img/.*?)\)", text))
    document.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place"):
        against.write(ROWS, document)


def options(path: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"json": str(path), "quick": False, "threads": 1, "peers_dir": path.parent, **changes})


def test_a_finished_run_is_not_made_again_and_a_failed_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    failing = {1}

    def carry_out(job: against.Job, _: argparse.Namespace) -> dict[str, Any]:
        made.append((job.who, job.seed))
        if job.seed in failing:
            raise RuntimeError("no answer")
        return {**row(job.who, job.seed, [1.0], 1.0), "steps": job.task.steps, "settings": job.task.text}

    monkeypatch.setattr(against, "carry_out", carry_out)
    work = against.jobs([CHEETAH.of(2000)], ["async", "sb3"], 2)
    assert len(against.run_missing(work, options(tmp_path / "rows.json"))) == 2
    assert made == [("async", 0), ("sb3", 0), ("sb3", 1), ("async", 1)]  # another one begins each seed
    made.clear()
    failing.clear()
    assert len(against.run_missing(work, options(tmp_path / "rows.json"))) == 4
    assert made == [("sb3", 1), ("async", 1)]
    longer = against.jobs([CHEETAH.of(3000)], ["async"], 1)
    assert len(against.run_missing(longer, options(tmp_path / "rows.json"))) == 1  # another length is another run
    changed = dataclasses.replace(CHEETAH.of(2000), envs=4)
    with pytest.raises(SystemExit, match=r"4 environments\nname another file"):
        against.run_missing(against.jobs([changed], ["async"], 1), options(tmp_path / "rows.json"))


def test_each_side_runs_in_its_own_environment(tmp_path: Path):
    ours, theirs = (against.Job(CHEETAH, who, 3).command(tmp_path, small=True) for who in ("twin", "sb3"))
    assert ours[1:] == ["-m", "bench.peers.learning_ours", "HalfCheetah-v5", "twin", "3", "100000", "--small"]
    assert theirs[0] == str(tmp_path / "common" / "bin" / "python")
    assert theirs[2] == "bench.peers.learning_sb3"


@pytest.mark.parametrize("env", TASKS)
def test_settings_are_those_that_are_held_equal(env: str, tmp_path: Path):
    task = TASKS[env].of(20_000)
    config, h = learning_ours.configuration(task, 1, "async", str(tmp_path)), task.learner
    assert (config.envs, config.total_steps, config.eval_every, config.eval_episodes) == (
        task.envs, 20_000, task.eval_every, task.episodes,
    )  # fmt: skip
    algo: Any = config.algo
    assert (algo.learning_rate, algo.batch_size, algo.update_ratio) == (h.learning_rate, h.batch, h.ratio)
    assert algo.capacity == 20_000
    if isinstance(h, DQN):
        assert (algo.target_every, algo.double, algo.network) == (1_000, False, "small")
    else:
        assert (algo.tau, algo.random_steps, algo.tune_alpha) == (0.005, h.warmup, True)


@pytest.mark.long
@pytest.mark.parametrize("way", learning_ours.WAYS)
async def test_aiorl_trains_as_the_task_says(way: str, no_leaks: None):
    found = await learning_ours.train(TASKS["Pendulum-v1"].small(), 0, way)
    assert (found["env_steps"], found["gradient_steps"]) == (800, 600)
    assert [evaluation[0] for evaluation in found["evaluations"]] == [400, 800]


def test_a_small_task_still_learns():
    small = CHEETAH.small()
    assert 0 < small.learner.warmup < small.steps
    assert small.steps == 2 * small.eval_every == small.learner.capacity
    assert learning.TASKS["HalfCheetah-v5"] == CHEETAH
