"""How collection grows with the number of workers, and a model of it that larger machines can be planned with.

    python -m bench.scaling [--workers 10 25 50 100] [--seconds 15] [--only latency cpu baselines coroutines] [--json FILE]

Episodes of 38 steps. `latency`: a step sleeps lognormal(mean 10 ms, sigma 1), so one environment makes 2.6 episodes a second
and a perfect machine N times that. `cpu`: a step computes for about a millisecond, so the cores are the limit. PPO learns
all the while (schedule eager, off_policy_degree 4, group_size 1). `baselines`: one environment after the other
(workers = 0), and all of them waiting for the slowest at every step (segment_length 1, off_policy_degree 0). `coroutines`:
1,000 `async def` environments of 200 ms in 2 workers.

The model. With L the mean step, w what a step takes beyond L in its worker, f the cores that a run uses whatever it
collects and c the CPU time of an env step in all processes together, N workers on C cores make
min(N / (L + w), (C - f) / c)  env steps a second. The smallest number of workers gives w, the smallest two f, c and the
line of the start-up time. The table compares.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from typing import Any, NamedTuple, cast

import msgspec

import aiorl
from aiorl.cli.session import run_async
from aiorl.config import usable_cores
from aiorl.events import Updated
from aiorl.workers.pool import ProcessWorkers
from bench.common import print_machine, write_json
from bench.overhead import cpu_s, private_mib

EPISODE, MEAN_S, SIGMA = 38, 0.010, 1.0
CPU_ITERATIONS = 12_000  # of bench.work: about a millisecond
ASYNC_ENVS, ASYNC_MEAN_S = 1_000, 0.200
WARM_UP_UPDATES = 2
IDLE_S = 3.0


class Measured(NamedTuple):
    """One run. Rates are between two updates `seconds` apart; CPU is of all processes; memory is private, per worker."""

    workers: int
    envs: int
    start_s: float
    env_steps_per_s: float
    cpu_us_per_step: float
    main_cpu_share: float
    idle_cpu_share: float
    private_mib: float
    lag_p99_ms: float

    @property
    def episodes_per_s(self) -> float:
        return self.env_steps_per_s / EPISODE


def config(kind: str, workers: int, out: str, **changes: Any) -> aiorl.Config:
    env, kwargs = {
        "latency": ("bench.slow:Slow", {"mean_s": MEAN_S, "sigma": SIGMA, "episode": EPISODE}),
        "cpu": ("bench.work:Work", {"iterations": CPU_ITERATIONS}),
        "coroutines": ("bench.slow:AsyncSlow", {"mean_s": ASYNC_MEAN_S, "sigma": 0.5, "episode": EPISODE}),
    }[kind]
    settings: dict[str, Any] = {
        "envs": max(1, workers), "group_size": 1, "workers": workers, "segment_length": EPISODE, "schedule": "eager",
        "off_policy_degree": 4, "eval_every": 0, "checkpoint_every": 0, "total_steps": 10**12, "out": f"{out}/run",
    }  # fmt: skip
    return aiorl.Config(env=env, env_kwargs=kwargs, algo=aiorl.PPO(), **{**settings, **changes})


async def measure(kind: str, workers: int, seconds: float, **changes: Any) -> Measured:
    """Train until the rate has been seen for `seconds`, then pause and see what being idle costs."""
    with tempfile.TemporaryDirectory() as out:
        async with aiorl.Run(config(kind, workers, out, **changes)) as run:
            pool = cast(ProcessWorkers, run._session.parts.workers)  # type: ignore[union-attr]
            seen: list[tuple[float, int, float, float]] = []
            async for event in run:
                if isinstance(event, Updated) and event.version > WARM_UP_UPDATES:
                    seen.append((event.seconds, event.env_steps, cpu_s(pool.pids), time.process_time()))
                    if seen[-1][0] - seen[0][0] >= seconds:
                        break
            lag_ms = run.status().event_loop_lag_ms["p99"]
            idle = await _idle_share(run, pool)
            memory = max((private_mib(pid) for pid in pool.pids), default=0.0)
            run.stop(final_evaluation=False)
        result = run.result
    took_s, steps, workers_s, main_s = (b - a for a, b in zip(seen[0], seen[-1], strict=True))
    return Measured(
        workers, run.config.envs, result.start_seconds, steps / took_s, 1e6 * (workers_s + main_s) / steps,
        main_s / took_s, idle, memory, lag_ms,
    )  # fmt: skip


async def _idle_share(run: aiorl.Run, pool: ProcessWorkers) -> float:
    """CPU seconds per second of all processes while the run is paused."""
    await run.pause()
    begun_s = cpu_s(pool.pids) + time.process_time()
    await asyncio.sleep(IDLE_S)
    used_s = cpu_s(pool.pids) + time.process_time() - begun_s
    run.resume()
    return used_s / IDLE_S


# -- the model ---------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Costs on one machine, by which another one can be planned; see the top of this file. Lines: (at 0, each more)."""

    step_s: float
    beyond_s: float
    cores_used: tuple[float, float]
    start_s: tuple[float, float]

    @classmethod
    def of(cls, small: Measured, larger: Measured, step_s: float) -> Model:
        used = [m.cpu_us_per_step * m.env_steps_per_s / 1e6 for m in (small, larger)]
        return cls(
            step_s,
            small.envs / small.env_steps_per_s - step_s,
            _line((small.env_steps_per_s, used[0]), (larger.env_steps_per_s, used[1])),
            _line((small.workers, small.start_s), (larger.workers, larger.start_s)),
        )

    def env_steps_per_s(self, envs: int, cores: int) -> float:
        fixed, each = self.cores_used
        return min(envs / (self.step_s + self.beyond_s), (cores - fixed) / max(each, 1e-9))

    def seconds_to_start(self, workers: int) -> float:
        return self.start_s[0] + self.start_s[1] * workers


def _line(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return a[1] - slope * a[0], slope


def report(kind: str, found: list[Measured], step_s: float) -> dict[str, Any]:
    """Print the table; for `cpu` the ideal is all cores at nothing but the environment."""
    cores = usable_cores()
    model = Model.of(found[0], found[min(1, len(found) - 1)], step_s) if len(found) > 1 else None
    print(f"\n{kind}: episodes/s, efficiency, model's episodes/s, ready in s (model), CPU us/step, main CPU, idle CPU, "
          "MiB a worker, lag p99 ms")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for m in found:
        most = m.envs / step_s if kind != "cpu" else min(m.envs, cores) / step_s
        efficiency = m.env_steps_per_s / most
        planned = model.env_steps_per_s(m.envs, cores) / EPISODE if model else 0.0
        ready = model.seconds_to_start(m.workers) if model else 0.0
        rows.append({**m._asdict(), "efficiency": efficiency, "model_episodes_per_s": planned, "model_start_s": ready})
        figures = f"{m.episodes_per_s:7.1f}  {efficiency:6.1%}  {planned:7.1f}  {m.start_s:5.2f} ({ready:.2f})"
        costs = f"{m.cpu_us_per_step:6.0f}  {m.main_cpu_share:5.1%}  {m.idle_cpu_share:5.2%}  {m.private_mib:5.1f}"
        print(f"{m.workers:4} workers  {figures}  {costs}  {m.lag_p99_ms:4.1f}", flush=True)
    if model is not None:
        rate, ready = model.env_steps_per_s(1_000, 64) / EPISODE, model.seconds_to_start(1_000)
        print(f"on paper, 1,000 workers on 64 such cores: {rate:,.0f} episodes/s, ready in {ready:.0f} s")
    return {"rows": rows, "model": model._asdict() if model else None, "step_s": step_s}


def cpu_step_s() -> float:
    """Of the computing environment by itself."""
    from bench.work import Work

    env = Work(CPU_ITERATIONS)
    env.reset(seed=0)
    times: list[float] = []
    for _ in range(200):
        begun = time.perf_counter()
        env.step(env.action_space.sample())
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("baselines", "latency", "cpu", "coroutines")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--workers", nargs="+", type=int, default=[10, 25, 50, 100])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    figures: dict[str, Any] = {}
    await measure("latency", 1, 0.5)  # what the machine has to load is loaded
    if "baselines" in options.only:
        alone = await measure("latency", 0, options.seconds, envs=1, off_policy_degree=0, schedule="ordered")
        locked = {"envs": 10, "segment_length": 1, "off_policy_degree": 0, "schedule": "ordered"}
        barrier = await measure("latency", 10, options.seconds, **locked)
        print(f"one after the other: {alone.episodes_per_s:.1f} episodes/s; 10 workers that wait for each other at every "
              f"step: {barrier.episodes_per_s:.1f} of {10 / MEAN_S / EPISODE:.1f}")  # fmt: skip
        figures["baselines"] = {"sequential": alone._asdict(), "barrier": barrier._asdict()}
    for kind, step_s in (("latency", MEAN_S), ("cpu", cpu_step_s())):
        if kind in options.only:
            found = [await measure(kind, workers, options.seconds) for workers in options.workers]
            figures[kind] = report(kind, found, step_s)
    if "coroutines" in options.only:
        m = await measure("coroutines", 2, options.seconds, envs=ASYNC_ENVS)
        figures["coroutines"] = report("coroutines", [m], ASYNC_MEAN_S)
    write_json(options.json, msgspec.to_builtins(figures))


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # as the command line does
    run_async(main())
