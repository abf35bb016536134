"""How fast the parts of a configured run are by themselves, how fast the run is, and what that says about its settings."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from aiorl.config import Config, usable_cores
from aiorl.envs.make import make_env, make_vector, probe
from aiorl.envs.spec import resolve_env
from aiorl.events import Updated
from aiorl.offload import OffloadThread
from aiorl.report import Result
from aiorl.run import Run

SETTLED = 4  # updates before any figure counts
FULL = 0.85  # busy for this share of the time: nothing else holds it up
WAITS = 0.5  # an environment whose steps take less processor time than this share of their duration waits for something
LAG_MS = 5.0
CROWDED = 0.8  # of the predicted speed


class EnvSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """The environment by itself with random actions: microseconds per env step, and the share of them it computes."""

    name: str
    step_us: float
    cpu_share: float
    native: bool


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """One after the other in one process: microseconds per env step of collecting (environment and policy together) and of
    learning; milliseconds per gradient step."""

    collect_us: float
    learn_us: float
    gradient_step_ms: float


class RunSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """The run as configured. `busy` are shares of the training time, `lag_ms` the event loop's p99."""

    env_steps_per_second: float
    gradient_steps_per_second: float
    busy: dict[str, float]
    lag_ms: float
    workers: int
    off_policy_degree: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured. `bound_per_second` is what the parts by themselves would allow."""

    env: EnvSpeed
    parts: Parts
    run: RunSpeed
    cores: int
    load: float

    @property
    def collect_per_second(self) -> float:
        """Env steps that the workers could collect if nothing held them up, with a core for each."""
        return 1e6 / self.parts.collect_us * max(1, self.run.workers)

    @property
    def learn_per_second(self) -> float:
        return 1e6 / max(self.parts.learn_us, 1e-3)

    @property
    def bound_per_second(self) -> float:
        collect, learn = self.collect_per_second, self.learn_per_second
        overlaps = self.run.workers > 0 and self.run.off_policy_degree != 0
        if not overlaps:
            return 1 / (1 / collect + 1 / learn)
        work_us = self.parts.collect_us * self.env.cpu_share + self.parts.learn_us  # that keeps a core busy
        return min(collect, learn, self.cores * 1e6 / work_us)


async def measure(config: Config, seconds: float) -> Figures:
    """Measure for about `seconds` in all. Raises what a run of this configuration raises."""
    share_s = seconds / 4
    resolved = config.resolve()
    thread = OffloadThread("aiorl-bench")
    try:
        env = await thread.run(_env_speed, resolved, share_s)
    finally:
        await thread.aclose(1.0)
    events, _ = await _try_out(config.replace(workers=0, off_policy_degree=0), share_s)
    parts = _parts(events, resolved)
    events, result = await _try_out(config, 2 * share_s)
    run = RunSpeed(
        env_steps_per_second=result.env_steps_per_second,
        gradient_steps_per_second=result.gradient_steps_per_second,
        busy=result.busy,
        lag_ms=result.event_loop_lag_ms["p99"],
        workers=cast(int, resolved.workers),
        off_policy_degree=resolved.off_policy_degree,
    )
    return Figures(env=env, parts=parts, run=run, cores=usable_cores(), load=_load())


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _env_speed(config: Config, seconds: float) -> EnvSpeed:
    """Step one environment, or one group where they are stepped as one."""
    size = cast(int, config.group_size)
    spec = resolve_env(
        config.env, config.env_kwargs, in_process=True, native=config.native_vector, frame_stack=config.frame_stack
    )
    found = probe(spec, size)
    if found.spec.coroutines:
        # it waits on purpose, side by side with others
        return EnvSpeed(name=spec.name, step_us=0.0, cpu_share=0.0, native=False)
    env: Any = make_vector(found.spec, size) if found.native else make_env(found.spec)
    width = size if found.native else 1
    try:
        env.action_space.seed(0)
        env.reset(seed=0)
        steps, begun_s, begun_cpu_s = 0, time.perf_counter(), time.thread_time()
        while (took_s := time.perf_counter() - begun_s) < seconds:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            steps += width
            if not found.native and (terminated or truncated):
                env.reset()
        cpu_s = time.thread_time() - begun_cpu_s
    finally:
        env.close()
    share = min(1.0, cpu_s / took_s)
    return EnvSpeed(name=spec.name, step_us=1e6 * took_s / steps, cpu_share=share, native=found.native)


async def _try_out(config: Config, seconds: float) -> tuple[list[Updated], Result]:
    """Train for a while, in a directory that is thrown away: the updates that made gradient steps, and the result."""
    with tempfile.TemporaryDirectory(prefix="aiorl-bench-") as out:
        tried = config.replace(total_steps=10**12, out=f"{out}/run", eval_every=0, checkpoint_every=0, stop_at=None)
        updates: list[Updated] = []
        async with Run(tried) as run:
            async for event in run:
                if isinstance(event, Updated):
                    updates.append(event)
                    learning = [update for update in updates if update.gradient_steps]
                    if len(learning) > SETTLED and event.seconds - learning[0].seconds > seconds:
                        run.stop(final_evaluation=False)
        result = await run.wait()
    return [update for update in updates if update.gradient_steps][1:], result


def _parts(updates: Sequence[Updated], config: Config) -> Parts:
    steps, size = config.steps_per_segment, cast(int, config.group_size)
    learn_s = statistics.median(update.update_seconds for update in updates)
    gradient_steps = statistics.median(update.gradient_steps for update in updates)
    return Parts(
        collect_us=1e6 * statistics.median(update.collect_seconds for update in updates) / (steps * size),
        learn_us=1e6 * learn_s / (steps * config.envs),
        gradient_step_ms=1e3 * learn_s / gradient_steps,
    )


def advice(figures: Figures) -> list[str]:
    """What bounds the run, and which flag to change; the most important first."""
    run, env = figures.run, figures.env
    found = [_bound(figures)]
    if 0 < env.cpu_share < WAITS:
        found.append(
            f"the environment computes in {_percent(env.cpu_share)} of a step and waits for the rest: "
            "--stepping threads lets the steps of a worker overlap"
        )
    if run.workers == 0:
        found.append("--workers 1 or more collects beside the learner, in processes of its own")
    elif run.off_policy_degree == 0:
        beside = min(figures.collect_per_second, figures.learn_per_second)
        gain = beside / figures.bound_per_second
        found.append(f"collecting and learning take turns: --off-policy-degree 1 lets them overlap (at most {gain:.2f} x)")
    if run.workers + 1 > figures.cores and env.cpu_share >= WAITS:
        found.append(f"{run.workers} workers and the learner share {figures.cores} cores")
    if figures.load > figures.cores:
        found.append(f"the machine is busy (load {figures.load:.1f} on {figures.cores} cores): measure again when it is not")
    if run.lag_ms > LAG_MS:
        found.append(f"the event loop is late by up to {run.lag_ms:.1f} ms (p99): larger segments (--segment-length) help")
    return found


def _bound(figures: Figures) -> str:
    run, parts = figures.run, figures.parts
    waits_for_nothing = run.busy["train"] >= FULL
    if waits_for_nothing or figures.learn_per_second <= figures.collect_per_second:
        busy = f"busy {_percent(run.busy['train'])}, {parts.gradient_step_ms:.2f} ms a gradient step"
        by = f"the learner is the limit ({busy})"
        return f"{by}: fewer or cheaper gradient steps, or --device cuda for large networks"
    acting = max(0.0, 1 - figures.env.step_us / parts.collect_us)
    busy = f"workers busy {_percent(run.busy['collect'])}, {_percent(acting)} of it not the environment"
    by = f"collecting is the limit ({busy})"
    if run.workers + 1 < figures.cores:
        return f"{by}: --workers {figures.cores - 1} uses the other cores"
    if acting > WAITS:
        return f"{by}: larger groups (--group-size) or a smaller policy network act more cheaply"
    return f"{by}: more cores, or a faster environment"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
