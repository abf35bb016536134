"""The comparison of whole trainings counts right and keeps what is finished; the other library takes no part here."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import against_sb3 as against
from bench import sb3_report
from bench.equivalence import chance
from bench.learning_runs import load_rows
from bench.peers import learning, learning_ours
from bench.peers.learning import DQN, TASKS

CHEETAH = TASKS["HalfCheetah-v5"]


def row(who: str, seed: int, returns: list[float], train_s: float) -> dict[str, Any]:
    evaluations = [[1000.0 * (i + 1), 10.0 * i, mean, 1.0] for i, mean in enumerate(returns)]
    base = {"env": "HalfCheetah-v5", "steps": 2000, "who": who, "seed": seed, "env_steps": 2000}
    base |= {"settings": "sac with its settings; 2 environments; 10 episodes every 10,000 env steps"}
    return {**base, "train_s": train_s, "wall_s": train_s + 5.0, "evaluations": evaluations}


ROWS = [
    row("sb3", 0, [0.0, 100.0], 40.0),
    row("async", 0, [50.0, 200.0], 20.0),
    row("sb3", 1, [0.0, 300.0], 60.0),
    row("async", 1, [50.0, 250.0], 20.0),
    row("sb3", 2, [0.0, 900.0], 60.0),  # without a counterpart
]


def test_learners_are_compared_by_the_medians_of_the_seeds_that_both_have():
    returns, training, wall = sb3_report.verdicts(ROWS)
    assert returns.startswith("reached  HalfCheetah-v5, aiorl, 2 workers against Stable-Baselines3, 2 seeds: ")
    assert returns.endswith("final return 225.0 against 200.0 (medians)")
    assert training.endswith(": training 2.50 [2.00 … 3.00] times as fast")
    assert wall.endswith(": wall time 2.20 [1.80 … 2.60] times as fast")
    worse = [row("twin", 0, [0.0, 99.0], 50.0), ROWS[0]]
    assert [line[:7] for line in sb3_report.verdicts(worse)] == ["MISSED "] * 3


def test_three_seeds_also_tell_what_chance_alone_would_do():
    rows = [row(who, seed, [value + 10 * seed], 9.0) for who, value in (("async", 0.0), ("sb3", 100.0)) for seed in range(3)]
    judged = sb3_report.verdicts(rows)[0]
    assert judged.endswith("final return 10.0 against 110.0 (medians); means as far apart by chance: p = 0.1")
    assert chance([1.0, 2.0], [1.0, 2.0]) == 1
    assert chance([1.0, 2.0, 3.0], [2.0, 3.0, 7.0]) == pytest.approx(10 / 20)  # ways to deal them


@pytest.mark.parametrize(("shift", "judged"), [(0.01, "equivalent"), (0.04, "undecided"), (0.2, "worse")])
def test_ways_learn_alike_if_the_interval_of_the_difference_lies_within_the_margin(shift: float, judged: str):
    task = CHEETAH
    rows = [
        row(who, seed, [task.random + (task.good - task.random) * (0.8 + 0.01 * (seed % 5) - lost)], train_s)
        for seed in range(10)
        for who, lost, train_s in (("async", shift, 10.0), ("twin", 0.0, 15.0))
    ]
    alike, training, _ = sb3_report.verdicts(rows)
    assert f"margin 0.05: {judged}; " in alike
    assert alike.count(f" by -{shift:.3f} [") == 2  # one evaluation is both the last one and all of them
    assert alike[:7] == ("reached" if judged == "equivalent" else "MISSED ")
    assert "training 1.50" in training
    assert "one seed does not tell" in sb3_report.verdicts(rows[:2])[0]


def test_few_seeds_in_each_of_several_environments_are_judged_together_too():
    def runs(env: str, ours: float, seeds: int, steps: int = 2_000) -> list[dict[str, Any]]:
        task, scores = TASKS[env], {"async": ours, "sb3": 0.5}
        at = {who: task.random + (task.good - task.random) * score for who, score in scores.items()}
        runs = [row(who, seed, [at[who]], 9.0) for seed in range(seeds) for who in scores]
        return [{**run, "env": env, "steps": steps} for run in runs]

    rows = [*runs("HalfCheetah-v5", 0.6, 3), *runs("Hopper-v5", 0.8, 3), *runs("Pendulum-v1", 9.0, 2)]
    (told,) = sb3_report.together(rows)
    about, judged = told.split(": ", 1)
    assert about == "aiorl, 2 workers against Stable-Baselines3, all that have three seeds or more together"
    assert judged.startswith("HalfCheetah-v5, 2,000 (3), Hopper-v5, 2,000 (3): IQM of the scores differs by +0.200 [+0.200,")
    assert "margin 0.05: not worse; of all evaluations' means by +0.200" in judged
    assert f"\n    {told}\n" in sb3_report.report(rows)
    assert sb3_report.together(rows[:6]) == [], "one comparison is judged by itself"
    (both,) = sb3_report.together([*runs("Hopper-v5", 0.6, 4), *runs("Hopper-v5", 0.6, 3, steps=9_000)])
    assert "together: Hopper-v5, 2,000 (4), Hopper-v5, 9,000 (3): " in both
    alone = [run for run in runs("Hopper-v5", 9.0, 3, steps=9_000) if run["who"] == "async"]
    (longer,) = sb3_report.together([*rows, *alone])
    assert longer == told, "what has no counterpart hides nothing"


def beside(row: dict[str, Any], others: int) -> dict[str, Any]:
    return {**row, "side_by_side": others}


def test_times_are_judged_only_by_runs_that_were_made_alone():
    crowded = [beside(row, 2) for row in ROWS[:4]]
    returns, times = sb3_report.verdicts(crowded)
    assert returns.endswith("final return 225.0 against 200.0 (medians)")
    assert times.startswith("open     HalfCheetah-v5, aiorl, 2 workers against Stable-Baselines3, 2 seeds: ")
    assert "runs were made 2 at once" in times
    assert sb3_report.table(crowded).count("| 2 (2 at once) |") == 2
    _, training, wall = sb3_report.verdicts([*ROWS[:2], *crowded[2:]])  # one seed of two
    assert training.endswith(": training 2.00 [2.00 … 2.00] times as fast (1 of them made alone)")
    assert wall.endswith(": wall time 1.80 [1.80 … 1.80] times as fast (1 of them made alone)")
    half = sb3_report.table([*ROWS[:2], *crowded[2:]])
    assert "| 225.0 [200.0 … 250.0] | 137.5 [125.0 … 150.0] | 20 [20 … 20] |" in half
    assert half.count("| 2 (times of the 1 made alone) |") == 2
    assert sb3_report.verdicts([ROWS[0], crowded[1]])[1].startswith("open ")  # one side of a pair is not enough


def test_qrdqn_is_judged_like_the_asynchronous_dqn():
    rows = [{**row(who, 0, [final], 10.0), "env": "MinAtar/Asterix-v1"} for who, final in (("qrdqn", 2.0), ("sb3", 3.0))]
    returns, training, _ = sb3_report.verdicts(rows)
    assert returns.startswith("MISSED   MinAtar/Asterix-v1, aiorl QR-DQN, 2 workers against Stable-Baselines3, 1 seed: ")
    assert "training 1.00" in training


def test_with_images_memory_counts():
    sides = (("async", 900), ("sb3", 3_000))
    rows = [{**row(who, 0, [1.0], 10.0), "env": "ALE/Pong-v5", "memory_mib": most} for who, most in sides]
    told = sb3_report.verdicts(rows)[-1]
    assert told.startswith("reached  ALE/Pong-v5, ")
    assert told.endswith(": the learner's process had 900 MiB at most, the other 3,000")
    assert sb3_report.verdicts([{**one, "memory_mib": 3_900 - one["memory_mib"]} for one in rows])[-1][:6] == "MISSED"


def test_the_table_has_a_line_for_each_participant():
    lines = sb3_report.table(ROWS).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["aiorl, 2 workers", "Stable-Baselines3"]
    assert "| 225.0 [200.0 … 250.0] | 137.5 [125.0 … 150.0] | 20 [20 … 20] | 25 [25 … 25] | 100 [100 …" in lines[0]


def test_a_curve_is_the_mean_of_the_seeds_and_both_are_in_one_picture(tmp_path: Path):
    (label, curve), _ = sb3_report.curves(ROWS)
    assert label == "aiorl, 2 workers, 2 seeds"
    assert [(p.env_steps, p.value, p.spread) for p in curve.evaluations] == [(1000.0, 50.0, 0.0), (2000.0, 225.0, 25.0)]
    paths = sb3_report.plot(ROWS, tmp_path)
    assert [path.name for path in paths] == [f"against_sb3-HalfCheetah-v5-2k-{axis}.svg" for axis in ("steps", "time")]
    assert all("Stable-Baselines3, 3 seeds" in path.read_text(encoding="utf-8") for path in paths)


def test_the_report_replaces_the_one_before_and_nothing_else(tmp_path: Path):
    (tmp_path / "img").mkdir()
    document = tmp_path / "results.md"
    marks = (sb3_report.BEGIN, sb3_report.END, sb3_report.PAPER_BEGIN, sb3_report.PAPER_END)
    document.write_text("before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*marks), encoding="utf-8")
    sb3_report.write(ROWS[:2], document)
    sb3_report.write(ROWS, document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert f"{sb3_report.END}\nbetween\n{sb3_report.PAPER_BEGIN}\n| game |" in text
    assert text.count("| HalfCheetah-v5, 2,000 |") == 2
    assert "* HalfCheetah-v5: sac with its settings; 2 environments; 10 episodes every 10,000 env steps." in text
    assert all((tmp_path / path).exists() for path in re.findall(r"\]\((img/.*?)\)", text))
    document.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place"):
        sb3_report.write(ROWS, document)


def test_runs_of_two_files_are_judged_together():
    """A seed that is in both is two runs."""
    there = [row(who, 0, [final], 10.0) for who, final in (("async", 1000.0), ("twin", 1000.0), ("sb3", 0.0))]
    elsewhere = [row(who, seed, [1500.0], 10.0) for seed in (0, 1) for who in ("async", "twin")]
    (line,) = sb3_report.pooled(there, elsewhere)
    assert "HalfCheetah-v5, 2,000, aiorl, 2 workers against aiorl, sequential, 3 runs of each in both files: " in line
    assert "IQM of the scores differs by +0.000 [" in line
    assert sb3_report.pooled(there, [{**each, "steps": 3000} for each in elsewhere]) == [], "of another length"
    assert sb3_report.pooled(there[::2], elsewhere) == [], "without a twin"


def test_the_papers_figures_stand_beside_runs_of_the_same_length():
    def minatar(who: str, steps: int, trained: float) -> dict[str, Any]:
        return {**row(who, 0, [12.0], 1.0), "env": "MinAtar/Breakout-v1", "steps": steps, "train_return": trained}

    assert sb3_report.beside_paper([]).count("not yet run") == 8
    rows = [minatar("async", 1_000_000, 9.5), minatar("qrdqn", 800, 0.5), minatar("sb3", 1_000_000, 8.0)]
    breakout = sb3_report.beside_paper(rows).splitlines()[2]
    there = ("9.5 (greedy 12.0)", "not yet run", "not yet run", "8.0 (greedy 12.0)")
    assert breakout == f"| MinAtar/Breakout-v1 | 9.2 | 10.0 | {' | '.join(there)} |"


def test_the_document_has_a_place_for_both(tmp_path: Path):
    (tmp_path / "img").mkdir()
    copy = tmp_path / "results.md"
    copy.write_text(sb3_report.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    sb3_report.write(ROWS, copy)
    assert "| MinAtar/Asterix-v1 | 7.1 | 16.7 |" in copy.read_text(encoding="utf-8")


def options(path: Path, **changes: Any) -> argparse.Namespace:
    common = {"json": str(path), "quick": False, "threads": 1, "jobs": 1, "peers_dir": path.parent}
    return argparse.Namespace(**{**common, **changes})


def made(job: against.Job) -> dict[str, Any]:
    return {**row(job.who, job.seed, [1.0], 1.0), "steps": job.task.steps, "settings": job.task.text}


async def test_a_finished_run_is_not_made_again_and_a_failed_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    failing = {1}

    async def carry_out(job: against.Job, _: argparse.Namespace, core: int | None) -> dict[str, Any]:
        asked.append((job.who, job.seed))
        assert core is None  # alone it has them all
        if job.seed in failing:
            raise RuntimeError("no answer")
        return made(job)

    monkeypatch.setattr(against, "carry_out", carry_out)
    work, file = against.jobs([CHEETAH.of(2000)], ["async", "sb3"], 2), options(tmp_path / "rows.json")
    assert len(await against.run_missing(work, file)) == 2
    assert asked == [("async", 0), ("sb3", 0), ("sb3", 1), ("async", 1)]  # another one begins each seed
    asked.clear()
    failing.clear()
    assert len(await against.run_missing(work, file)) == 4
    assert asked == [("sb3", 1), ("async", 1)]
    longer = against.jobs([CHEETAH.of(3000)], ["async"], 1)
    assert len(await against.run_missing(longer, file)) == 1  # another length is another run
    changed = learning.chosen(CHEETAH.env, 2000, 50, small=False)
    with pytest.raises(SystemExit, match=r"; 50 episodes every 10,000 env steps\nname another file"):
        await against.run_missing(against.jobs([changed], ["async"], 1), file)


async def test_runs_made_at_once_are_all_kept_in_whatever_order_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun: asyncio.Queue[tuple[against.Job, int | None, asyncio.Event]] = asyncio.Queue()

    async def carry_out(job: against.Job, _: argparse.Namespace, core: int | None) -> dict[str, Any]:
        end = asyncio.Event()
        begun.put_nowait((job, core, end))
        await end.wait()
        return made(job)

    monkeypatch.setattr(against, "carry_out", carry_out)
    monkeypatch.setattr(against, "lanes", lambda n: list(range(n)))
    path = tmp_path / "rows.json"
    work = against.jobs([CHEETAH.of(2000)], ["async", "sb3"], 2)
    task = asyncio.create_task(against.run_missing(work, options(path, jobs=2)))
    first, second = await begun.get(), await begun.get()
    assert begun.empty()
    assert {first[1], second[1]} == {0, 1}
    second[2].set()
    third = await begun.get()  # whoever is free takes the next one, on its own core
    assert third[1] == second[1]
    assert [(row["who"], row["seed"]) for row in load_rows(path)] == [second[0].key[2:]]
    with pytest.raises(SystemExit, match="in use: held by process"):
        await against.run_missing(work, options(path))
    third[2].set()
    first[2].set()
    (await begun.get())[2].set()
    assert len(await task) == 4
    assert len(load_rows(path)) == 4
    assert list(tmp_path.iterdir()) == [path]


ANSWER = """
import json, os
found = {"env_steps": 5, "gradient_steps": 1, "train_s": 1.0, "begun_at": 0.0, "evaluations": [[1, 2.0, 3.0, 4.0]]}
print("RESULT " + json.dumps({**found, "core": sorted(os.sched_getaffinity(0)), "omp": os.environ["OMP_NUM_THREADS"]}))
"""
WAITING = "import os, signal, sys; open(sys.argv[1], 'w').write(str(os.getpid())); signal.pause()"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be assigned to processes here")
async def test_a_run_beside_others_has_one_core_and_one_thread_and_its_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    core = max(os.sched_getaffinity(0))
    monkeypatch.setattr(against.Job, "command", lambda *_: [sys.executable, "-c", ANSWER])
    job = against.Job(CHEETAH.of(2000), "async", 7)
    row = await against.carry_out(job, options(tmp_path / "rows.json", jobs=2), core)
    assert (row["core"], row["omp"]) == ([core], "1")
    assert (row["side_by_side"], row["threads"], row["cores"], row["seed"]) == (2, 1, 1, 7)
    alone = await against.carry_out(job, options(tmp_path / "rows.json"), None)
    assert alone["core"] == sorted(os.sched_getaffinity(0))
    assert alone["side_by_side"] == 1


async def test_who_is_told_to_end_leaves_no_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    monkeypatch.setattr(against.Job, "command", lambda *_: [sys.executable, "-c", WAITING, str(begun)])
    path = tmp_path / "rows.json"
    task = asyncio.create_task(against.until_told(against.jobs([CHEETAH], ["async"], 1), options(path)))
    pid = int(await asyncio.to_thread(begun.read_text))
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not path.with_suffix(".lock").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--envs Hopper-v5 MinAtar/Asterix-v1 --ours qrdqn", "qrdqn takes part where DQN does, and not in Hopper-v5"),
        ("--envs Pendulum-v1 --ours async mean", "mean takes part where DQN does, and not in Pendulum-v1"),
        ("--jobs 0", "between 1 and a run for each core"),
        ("--jobs 9999", "between 1 and a run for each core"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: str, text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        against.parse(arguments.split())
    assert text in capsys.readouterr().err


def test_runs_beside_others_have_one_thread_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    assert against.lanes(1) == [None]
    assert against.lanes(2) == [0, 1]
    assert (against.parse(["--jobs", "2"]).threads, against.parse([]).threads) == (1, 0)
    with pytest.raises(SystemExit):
        against.parse(["--jobs", "2", "--threads", "2"])
    assert "expected one thread on a core" in capsys.readouterr().err


def test_each_side_runs_in_its_own_environment(tmp_path: Path):
    ours, theirs = (against.Job(CHEETAH, who, 3).command(tmp_path, small=True) for who in ("twin", "sb3"))
    run = ["HalfCheetah-v5", "twin", "3", "100000", "--episodes", "10", "--small"]
    assert ours[1:] == ["-m", "bench.peers.learning_ours", *run]
    assert theirs[0] == str(tmp_path / "common" / "bin" / "python")
    assert theirs[2] == "bench.peers.learning_sb3"


@pytest.mark.parametrize("way", ["async", "mean", "qrdqn"])
@pytest.mark.parametrize("env", TASKS)
def test_settings_are_those_that_are_held_equal(env: str, way: str, tmp_path: Path):
    task = TASKS[env].of(20_000)
    h = task.learner
    if way != "async" and not isinstance(h, DQN):
        with pytest.raises(ValueError, match="where SAC is trained"):
            learning_ours.configuration(task, 1, way, str(tmp_path))
        return
    config = learning_ours.configuration(task, 1, way, str(tmp_path))
    assert (config.envs, config.total_steps, config.eval_every, config.eval_episodes) == (
        task.envs, 20_000, task.eval_every, task.episodes,
    )  # fmt: skip
    algo: Any = config.algo
    assert (algo.learning_rate, algo.batch_size, algo.update_ratio) == (h.learning_rate, h.batch, h.ratio)
    assert algo.capacity == 20_000
    if isinstance(h, DQN):
        assert algo.name == ("qrdqn" if way == "qrdqn" else "dqn")
        assert (algo.target_every, algo.double, algo.network) == (250, False, h.network)  # 1,000 env steps
        assert algo.average == (0.999 if way == "mean" else 0)
        assert config.frame_stack == task.frame_stack
    else:
        assert (algo.tau, algo.random_steps, algo.tune_alpha) == (0.005, h.warmup, True)


def test_a_learner_that_rests_between_env_steps_says_so():
    assert "; a gradient step every 4 env steps; 8 environments" in TASKS["MinAtar/Breakout-v1"].text
    assert "a gradient step every" not in CHEETAH.text


@pytest.mark.long
@pytest.mark.parametrize(
    ("env", "way", "gradient_steps"),
    [
        ("Pendulum-v1", "async", 600), ("Pendulum-v1", "twin", 600),
        ("MinAtar/Breakout-v1", "async", 150), ("MinAtar/Breakout-v1", "qrdqn", 150),
    ],
)  # fmt: skip
async def test_aiorl_trains_as_the_task_says(env: str, way: str, gradient_steps: int, no_leaks: None):
    pytest.importorskip("minatar") if env.startswith("MinAtar") else None
    found = await learning_ours.train(TASKS[env].small(), 0, way)
    assert (found["env_steps"], found["gradient_steps"]) == (800, gradient_steps)
    assert len(found["evaluations"]) == 2


def test_evaluations_of_more_episodes_are_another_measurement():
    more = learning.chosen("HalfCheetah-v5", None, 200, small=False)
    assert (more.steps, more.episodes) == (CHEETAH.steps, 200)
    assert more.text == CHEETAH.of(CHEETAH.steps).text.replace("10 episodes", "200 episodes")
    assert learning.chosen("HalfCheetah-v5", None, None, small=False) == CHEETAH.of(CHEETAH.steps)


def test_a_small_task_still_learns():
    small = CHEETAH.small()
    assert learning.chosen(CHEETAH.env, None, 200, small=True) == small
    assert 0 < small.learner.warmup < small.steps
    assert small.steps == 2 * small.eval_every == small.learner.capacity
    assert learning.TASKS["HalfCheetah-v5"] == CHEETAH
