"""What asynchrony costs: handing a segment over, publishing weights, starting workers, event-loop lag, pausing, importing.

    python -m bench.overhead [--only handoff publish start lag pause import] [--workers 1 8 32] [--json FILE]

Lag and latency are of this machine as it is: other programs on its cores show in the maxima.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np

import aiorl
from aiorl.assembly import Assembly, assemble
from aiorl.cli.session import run_async
from aiorl.metrics.lag import LagMeter
from aiorl.offload import OffloadThread
from aiorl.pacing import Grant
from aiorl.report import Report
from aiorl.segments import SegmentHeader
from aiorl.workers.pool import ProcessWorkers
from aiorl.workers.weights import WeightLayout, WeightStore
from bench.blank import ENVS, Idle
from bench.common import percentile, print_machine, summarise, write_json

SEGMENTS = 300


@contextlib.asynccontextmanager
async def assembled(**changes: Any) -> AsyncIterator[Assembly]:
    """The parts of a run that does not run, with workers made and not started."""
    with tempfile.TemporaryDirectory() as out:
        config = aiorl.Config(env="bench.blank:Blank", algo=Idle(), total_steps=10**9, out=f"{out}/run", **changes)
        made = await assemble(config, Report(None))
        try:
            yield made
        finally:
            await made.aclose()
            await made.files_thread.aclose(1.0)


async def handoff(rounds: int = 3) -> dict[str, Any]:
    """From "the last row is written" in the worker to "here it is" on this event loop; this process's CPU for it.

    In turns with the least there is: another process that works as long writes when it was done into a bare pipe that this
    loop reads. Waking a core that has slept takes most of either.
    """
    found: dict[str, tuple[list[float], list[float]]] = {"segment": ([], []), "bare": ([], [])}
    size = 0
    for _ in range(rounds):
        latencies, cpu_us, size, every_s = await _segments_over()
        bare, bare_cpu_us = await _words_over(every_s)
        for name, taken, cpu in (("segment", latencies, cpu_us), ("bare", bare, bare_cpu_us)):
            found[name][0].extend(taken)
            found[name][1].append(cpu)
    taken, cpu = found["segment"]
    bare, bare_cpu = found["bare"]
    figures = {
        "segment_bytes": size,
        "latency_us": {f"p{p}": round(percentile(taken, p), 1) for p in (50, 99)},
        "main_cpu_us_per_segment": round(float(np.median(cpu)), 1),
        "bare_latency_us": {f"p{p}": round(percentile(bare, p), 1) for p in (50, 99)},
        "bare_cpu_us": round(float(np.median(bare_cpu)), 1),
    }
    print(
        f"hand-off of {size / 1e6:.2f} MB: {figures['latency_us']} us, "
        f"main CPU {figures['main_cpu_us_per_segment']:.0f} us a segment; "
        f"16 bytes by a bare pipe: {figures['bare_latency_us']} us, {figures['bare_cpu_us']:.0f} us"
    )
    return figures


async def _segments_over() -> tuple[list[float], float, int, float]:
    """Latencies in us, CPU in us a segment, a segment's bytes, seconds from one to the next."""
    async with assembled(envs=ENVS, group_size=ENVS, workers=1) as made:
        workers, buffer = made.parts.workers, made.parts.weights.acquire(0)
        await workers.start()
        latencies: list[float] = []
        segment = workers.segment(0, 0)
        begun, cpu_s = time.monotonic(), time.process_time()
        for ordinal in range(SEGMENTS):
            workers.collect(Grant(0, ordinal, 0, 0), buffer)
            await workers.arrivals.get()
            latencies.append((time.monotonic() - float(segment.header[SegmentHeader.ENDED_S])) * 1e6)
        cpu_us = (time.process_time() - cpu_s) / SEGMENTS * 1e6
        return latencies, cpu_us, made.checked.segment.touched_nbytes, (time.monotonic() - begun) / SEGMENTS


_WORDS = """
import os, struct, sys, time
asked, answer, busy_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
while len(os.read(asked, 16)) == 16:
    end = time.monotonic() + busy_s
    while time.monotonic() < end:
        pass
    os.write(answer, struct.pack("=dq", time.monotonic(), 0))
"""


async def _words_over(busy_s: float) -> tuple[list[float], float]:
    """Latencies in us, CPU in us a word, of words from a process that works for so long before each one."""
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    line = ["-c", _WORDS, str(asked), str(answer), str(busy_s)]
    process = await asyncio.create_subprocess_exec(sys.executable, *line, pass_fds=(asked, answer))
    os.close(asked)
    os.close(answer)
    loop, latencies = asyncio.get_running_loop(), list[float]()
    heard: asyncio.Future[None] = loop.create_future()

    def hear() -> None:
        written_s, _ = struct.unpack("=dq", os.read(answers, 16))
        latencies.append((time.monotonic() - written_s) * 1e6)
        heard.set_result(None)

    loop.add_reader(answers, hear)
    cpu_s = time.process_time()
    for _ in range(SEGMENTS):
        heard = loop.create_future()
        os.write(ask, bytes(16))
        await heard
    cpu_us = (time.process_time() - cpu_s) / SEGMENTS * 1e6
    loop.remove_reader(answers)
    os.close(ask)  # it ends
    await process.wait()
    os.close(answers)
    return latencies, cpu_us


async def publish(megabytes: int = 100) -> dict[str, Any]:
    """Copying weights on the learner thread and making them known on the loop; how long the loop was held meanwhile."""
    weights = {"w": np.ones(megabytes * 250_000, np.float32)}
    store, thread, meter = WeightStore(WeightLayout.of(weights), 2), OffloadThread("learner"), LagMeter()
    lag = asyncio.create_task(meter.measure())
    copy_ms: list[float] = []
    loop_ms: list[float] = []
    for version in range(20):
        buffer = store.claim()
        begun = time.perf_counter()
        await thread.run(store.write, buffer, weights)
        copied = time.perf_counter()
        store.publish(buffer, version)
        store.retire(version + 1)
        loop_ms.append((time.perf_counter() - copied) * 1e3)
        copy_ms.append((copied - begun) * 1e3)
        await asyncio.sleep(0.02)
    lag.cancel()
    await thread.aclose(1.0)
    figures = {"copy_ms": summarise(copy_ms)._asdict(), "on_loop_ms": max(loop_ms), "lag_ms": meter.percentiles()}
    print(f"publishing {megabytes} MB: copy {summarise(copy_ms).text()} ms on the learner thread, "
          f"{max(loop_ms):.3f} ms on the loop, lag {meter.percentiles()} ms")  # fmt: skip
    store.close()
    return figures


async def start(counts: list[int]) -> dict[str, Any]:
    """From the request until all workers are ready, their private memory, and what they use when idle."""
    figures: dict[str, Any] = {}
    for method in ("forkserver", "spawn"):
        for count in counts:
            begun = time.perf_counter()
            async with assembled(envs=count, group_size=1, workers=count, segment_length=8) as made:
                workers = cast(ProcessWorkers, made.parts.workers)
                workers._launcher._method = method  # pyright: ignore[reportPrivateUsage]
                prepared = time.perf_counter()
                await workers.start()
                ready_s, all_s = time.perf_counter() - prepared, time.perf_counter() - begun
                used_s, memory = cpu_s(workers.pids), [private_mib(pid) for pid in workers.pids]
                await asyncio.sleep(2)
                idle = (cpu_s(workers.pids) - used_s) / 2
            figures[f"{method} {count}"] = {"ready_s": ready_s, "with_preparation_s": all_s, "idle_cpu_share": idle}
            figures[f"{method} {count}"]["private_mib"] = max(memory)
            print(f"{count:3} workers + 1 for evaluation, {method:10}: ready in {ready_s:.2f} s, with preparation "
                  f"{all_s:.2f} s; {max(memory):.0f} MiB private each; idle CPU {idle:.1%}", flush=True)  # fmt: skip
    return figures


async def lag() -> dict[str, Any]:
    """Event-loop lag while PPO trains beside it with two workers, with the switch interval of the command line."""
    sys.setswitchinterval(0.0005)
    figures: dict[str, Any] = {}
    for env in ("CartPole-v1", "LunarLander-v3"):
        with tempfile.TemporaryDirectory() as out:
            result = await aiorl.train(aiorl.Config.preset(env, total_steps=400_000, workers=2, out=f"{out}/run"))
        figures[env] = result.event_loop_lag_ms
        print(f"event-loop lag while {env} trains: {result.event_loop_lag_ms} ms")
    return figures


LEARNERS = {"ppo": "LunarLander-v3", "dqn": "CartPole-v1", "sac": "Pendulum-v1", "td3": "Pendulum-v1"}


async def pausing(times: int = 10) -> dict[str, Any]:
    """From `pause()` in the middle of learning until nothing moves: a gradient step and an environment step are finished."""
    figures: dict[str, Any] = {}
    for algo, env in LEARNERS.items():
        took_ms: list[float] = []
        with tempfile.TemporaryDirectory() as out:
            config = aiorl.Config.preset(env, algo, total_steps=10**9, workers=2, eval_every=0, out=f"{out}/run")
            async with aiorl.Run(config) as run:
                await anext(e async for e in run.events() if isinstance(e, aiorl.Updated) and e.gradient_steps)
                for number in range(times):
                    await asyncio.sleep(0.05 + 0.013 * number)  # at any moment of an update
                    asked = time.perf_counter()
                    await run.pause()
                    took_ms.append((time.perf_counter() - asked) * 1e3)
                    run.resume()
                run.stop(final_evaluation=False)
        figures[f"{algo} {env}"] = {"p50_ms": percentile(took_ms, 50), "max_ms": max(took_ms)}
        print(f"pausing {algo} on {env}: p50 {percentile(took_ms, 50):.0f} ms, longest {max(took_ms):.0f} ms", flush=True)
    return figures


async def importing() -> dict[str, Any]:
    """`import aiorl` and `python -m aiorl --help` as new processes, less an empty one."""
    figures: dict[str, Any] = {}
    empty = _process_ms("-c", "pass")
    for name, arguments in {"import aiorl": ("-c", "import aiorl"), "--help": ("-m", "aiorl", "--help")}.items():
        figures[name] = round(_process_ms(*arguments) - empty, 1)
        print(f"{name}: {figures[name]:.0f} ms over an empty process ({empty:.0f} ms)")
    return figures


def _process_ms(*arguments: str) -> float:
    times: list[float] = []
    for _ in range(7):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - begun) * 1e3)
    return min(times)


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of processes so far, where /proc tells."""
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(user) + int(system) for user, system in ticks) / 100


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("handoff", "publish", "start", "lag", "pause", "import")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    measure = {
        "handoff": handoff,
        "publish": publish,
        "start": lambda: start(options.workers),
        "lag": lag,
        "pause": pausing,
        "import": importing,
    }
    write_json(options.json, {part: await measure[part]() for part in options.only})


if __name__ == "__main__":
    run_async(main())  # on uvloop where it is installed, as the command line does
