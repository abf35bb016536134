"""The runs on real tasks behind `bench.learning_vs_degree`: one row of raw results for each (task, degree, seed).

Scores are normalised: 0 is what a policy that acts at random reaches, 1 is what counts as solved (gymnasium's
`reward_threshold`); better than that is more than 1. Nothing is clipped.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aiorl
from aiorl.checkpoint import complete_checkpoints
from aiorl.envs.episodes import run_episodes
from aiorl.envs.spec import resolve_env

EVALUATIONS, EVALUATION_EPISODES, FINAL_EPISODES = 10, 10, 50
METRICS = ("log_ratio_m2", "ess", "clip_fraction", "approx_kl", "grad_norm")


class Task(NamedTuple):
    """An environment with its preset's settings, for `env_steps` (the learning rate falls to 0 over them)."""

    env: str
    env_steps: int
    random: float
    solved: float

    def normalise(self, mean_return: float) -> float:
        return (mean_return - self.random) / (self.solved - self.random)


TASKS = (
    Task("CartPole-v1", 100_000, 22.0, 475.0),
    Task("Acrobot-v1", 200_000, -500.0, -100.0),
    Task("LunarLander-v3", 500_000, -180.0, 200.0),
)


class Job(NamedTuple):
    """One run to make."""

    task: Task
    degree: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task.env, self.degree, self.seed


def carry_out(job: Job) -> dict[str, Any]:
    """Train in this process and return the raw row."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_train(job, f"{directory}/run"))


async def _train(job: Job, out: str) -> dict[str, Any]:
    task, begun_s = job.task, time.perf_counter()
    config = aiorl.Config.preset(
        task.env, "ppo", total_steps=task.env_steps, seed=job.seed, off_policy_degree=job.degree, schedule="ordered",
        workers=0, eval_every=0, eval_episodes=1, checkpoint_every=task.env_steps // EVALUATIONS, keep=EVALUATIONS, out=out,
    )  # fmt: skip
    updates: list[aiorl.Updated] = []
    async with aiorl.Run(config) as run:
        async for event in run:
            if isinstance(event, aiorl.Lagged):
                raise RuntimeError(f"{event.dropped} events were lost, so the means would be of a part")
            if isinstance(event, aiorl.Updated):
                updates.append(event)
        result = await run.wait()
    final = aiorl.load(out, which="final")
    return {
        "env": task.env,
        "degree": job.degree,
        "seed": job.seed,
        "env_steps": result.env_steps,
        "updates": result.updates,
        "evaluations": _curve(out, final, job, {event.version: event.env_steps for event in updates}),
        "final_return": round(_mean_return(final, job, FINAL_EPISODES), 3),
        **_staleness(updates, job.degree),
        "params_sha256": result.params_sha256,
        "seconds": round(time.perf_counter() - begun_s, 1),
    }


def _curve(out: str, final: aiorl.LoadedPolicy, job: Job, env_steps: Mapping[int, int]) -> list[list[float]]:
    """[env steps, mean return] of each version saved. Evaluated only now, so that none is skipped, whatever the timing."""
    saved = [aiorl.load(path) for path in complete_checkpoints(Path(out) / "checkpoints")]
    policies = {policy.version: policy for policy in [*saved, final]}
    return [[env_steps[v], round(_mean_return(policies[v], job, EVALUATION_EPISODES), 3)] for v in sorted(policies)]


def _mean_return(loaded: aiorl.LoadedPolicy, job: Job, episodes: int) -> float:
    """Of the deterministic policy. The episodes of a seed are the same at every degree."""
    policy = loaded.algorithm.policy(loaded.spaces)
    policy.begin(loaded.weights, 0, None, 0)
    spec = resolve_env(job.task.env, in_process=True)
    return float(run_episodes(spec, loaded.spaces, policy, episodes, job.seed, width=10)[0].mean())


def _staleness(updates: Sequence[aiorl.Updated], degree: int) -> dict[str, dict[str, float]]:
    """Mean and maximum of each metric over the updates of full staleness: all but the first `degree`."""
    rows = [event.metrics for event in updates if event.staleness == degree]
    columns = {name: [row[name] for row in rows] for name in METRICS}
    return {
        "means": {name: float(f"{np.mean(values):.5g}") for name, values in columns.items()},
        "maxima": {name: float(f"{max(values):.5g}") for name, values in columns.items()},
    }


def final_score(row: Mapping[str, Any]) -> float:
    """Normalised return of the final policy."""
    return _task(row).normalise(row["final_return"])


def area_score(row: Mapping[str, Any]) -> float:
    """Mean height of the normalised evaluation curve between its first and its last point (trapezoids)."""
    steps, returns = np.array(row["evaluations"], float).T
    return _task(row).normalise(float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])))


def rms_log_ratio(row: Mapping[str, Any], which: str = "means") -> float:
    """Root mean square of log pi - log behaviour as an update begins: what the self-tuning degree calls its error."""
    return math.sqrt(row[which]["log_ratio_m2"])


def _task(row: Mapping[str, Any]) -> Task:
    return next(task for task in TASKS if task.env == row["env"])


# -- the whole suite -------------------------------------------------------------------------------------------------


def run_missing(path: Path, degrees: Sequence[int], seeds: int, processes: int, envs: Sequence[str]) -> None:
    """Make every run that `path` has no row of, seed by seed, and add its row at once; can be interrupted and repeated."""
    rows = load_rows(path)
    known = {(row["env"], row["degree"], row["seed"]) for row in rows}
    jobs = [Job(task, d, seed) for seed in range(seeds) for task in TASKS if task.env in envs for d in degrees]
    missing = [job for job in jobs if job.key not in known]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them there already", flush=True)
    begun_s = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes, which import torch only then
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(19,)) as pool:
        futures = [pool.submit(carry_out, job) for job in missing]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                row = future.result()
                rows.append(row)
                write_rows(path, rows)
                left_s = (time.perf_counter() - begun_s) / done * (len(missing) - done)
                print(f"{row['env']:15} degree {row['degree']} seed {row['seed']:2}  final {row['final_return']:8.1f}  "
                      f"{row['seconds']:5.1f} s   {done}/{len(missing)}, about {left_s / 60:.0f} min left",
                      flush=True)  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def load_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], key: Sequence[str] = ("env", "degree", "seed")
) -> None:
    """Replace the file in one step, sorted by `key`: one line a row, so that differences can be read."""
    versions = json.dumps(_versions())
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: [row[name] for name in key]))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(f'{{"versions": {versions},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(scratch, path)


def _versions() -> dict[str, str]:
    from aiorl.report import library_versions

    return library_versions()
