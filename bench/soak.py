"""A soak: training goes on for minutes while things go wrong at random; then the laws hold and nothing has grown.

    python -m bench.soak [--minutes 20] [--algo ppo|dqn] [--seed 0] [--json FILE]

CartPole, two workers and the evaluating one. By a plan that the seed decides, each of the three is killed (SIGKILL),
stopped (SIGSTOP, for a moment or for good), made to raise or to hang every 30 to 40 s, which the budget of three restarts in
60 s bears, and makes a slow step every 5 to 15 s. The disk is full for a second or two at times, the run is paused and goes
on, checkpoints are written and read back. Every minute a line says where things are; in the end

    laws       nothing was lost, doubled or false (`bench.soak_checks`, `aiorl.testing.laws`): rows are checked as they
               come and then forgotten, so that the soak itself does not grow
    growth     of memory, descriptors, threads, shared blocks and children: the mean of the last tenth of the run is at most
               2 % above that of its second tenth, both taken while every worker has a process
    left       nothing is left once the run has ended

Fails (exit code 1) if one of them does not hold. In runs of less than 5 minutes growth is printed and not judged: memory
has not settled by then. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import aiorl
from aiorl import checkpoint
from aiorl.cli.session import run_async
from aiorl.testing.faults import drive, pid_of
from aiorl.testing.laws import Violation
from aiorl.testing.leaks import belongings, left_behind
from bench.common import print_machine, write_json
from bench.soak_checks import REPORTED_MAX, Resources, Soaked, SoakedLearner, file_violations, growth, resources
from bench.soak_faults import Disk, Hands, plan_faults

WORKERS, ENVS, STEPS = 2, 8, 64
GROWTH_MAX = 0.02
JUDGED_FROM_MINUTES = 5.0
SAMPLE_S, LINE_S = 1.0, 60.0
DISK_EVERY_S, PAUSE_EVERY_S = (25.0, 45.0), (20.0, 40.0)

ALGORITHMS: dict[str, Any] = {
    "ppo": aiorl.PPO(epochs=2, minibatches=4, anneal=False),
    "dqn": aiorl.DQN(warmup=2000, capacity=20_000, update_ratio=0.03, hidden=(64, 64), epsilon_start=0.2, target_every=50),
}


@dataclass
class Found:
    """What a soak came to. `left` is by kind what was there afterwards and not before."""

    faults: Counter[str] = field(default_factory=Counter[str])
    violations: list[Violation] = field(default_factory=list[Violation])
    samples: list[Resources] = field(default_factory=list[Resources])
    left: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    env_steps: int = 0
    updates: int = 0
    restarts: int = 0
    checkpoints: int = 0
    evaluations: int = 0

    def grown(self) -> dict[str, float]:
        """Growth of each resource, of which there are too few samples in a very short run."""
        return growth(self.samples) if self.samples else {}

    def holds(self, *, judge_growth: bool) -> bool:
        within = all(share <= GROWTH_MAX for share in self.grown().values())
        return not self.violations and not self.left and (within or not judge_growth)


def configuration(algo: str, seed: int, folder: Path) -> aiorl.Config:
    """The run that is soaked; it goes on until it is stopped."""
    return aiorl.Config(
        env="bench.soak_faults:SoakEnv",
        env_kwargs={"wraps": "CartPole-v1", "orders": str(folder / "orders"), "kwargs": {"disable_env_checker": True}},
        algo=Soaked.of(ALGORITHMS[algo]),
        total_steps=10**9,
        seed=seed,
        envs=ENVS,
        group_size=ENVS // WORKERS,
        workers=WORKERS,
        segment_length=STEPS,
        off_policy_degree=2,
        eval_every=40_000,
        eval_episodes=4,
        checkpoint_every=100_000,  # so seldom that a full disk does not meet three in a row
        step_timeout_s=3.0,  # a worker that was stopped is noticed after this
        device="cpu",
        out=str(folder / "run"),
    )


async def soak(algo: str, minutes: float, seed: int, say: Callable[[str], None] = print) -> Found:
    """Train for so many minutes under faults."""
    found, before = Found(), belongings()
    with tempfile.TemporaryDirectory() as name, Disk() as disk:
        folder = Path(name)
        (folder / "orders").mkdir()
        run = aiorl.Run(configuration(algo, seed, folder))
        async with run:
            soaking = _Soaking(run, disk, found, Hands(run, folder / "orders"), np.random.default_rng(seed))
            try:
                await soaking.conduct(60 * minutes, say)
                await run.wait()
            except aiorl.AiorlError as error:
                found.violations.append(Violation("run", f"it failed: {error}"))
        found.violations += soaking.learner.violations(run._session)
        found.violations += file_violations(folder / "run", run.result.updates)
        result = run.result
        found.env_steps, found.updates, found.restarts = result.env_steps, result.updates, result.restarts
        found.evaluations = result.evaluation_points["evaluated"]
        del run, soaking
    found.left = left_behind(before)
    return found


class _Soaking:
    """The coroutines that watch a run and trouble it."""

    def __init__(self, run: aiorl.Run, disk: Disk, found: Found, hands: Hands, rng: np.random.Generator) -> None:
        self._run, self._disk, self._found, self._hands, self._rng = run, disk, found, hands, rng
        parts = run._session.parts
        assert parts is not None
        assert isinstance(parts.trainer.learner, SoakedLearner)
        self.learner = parts.trainer.learner
        self.learner.session = run._session
        self._others = Counter[str]()  # faults that are not of a worker
        self._begun_s = time.monotonic()

    async def conduct(self, over_s: float, say: Callable[[str], None]) -> None:
        """All of them for so long, or until the run fails; then it is told to stop."""
        plan = plan_faults(self._rng, WORKERS, over_s - 2.0)
        seeds = self._rng.integers(2**31, size=2).tolist()
        troubles = (
            drive(self._run, plan, self._hands),
            self._fill_disk(np.random.default_rng(seeds[0])),
            self._pause(np.random.default_rng(seeds[1])),
            self._sample(say),
            self._count_events(),
        )
        tasks = [asyncio.ensure_future(trouble) for trouble in troubles]
        done, _ = await asyncio.wait(tasks, timeout=over_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[:-1]:
            task.cancel()
        await asyncio.wait(tasks[:-1])
        self._disk.room = None
        self._found.faults = self.faults
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._run.resume()
        self._run.stop()
        await asyncio.wait([tasks[-1]])
        for task in tasks:
            if not task.cancelled() and isinstance(error := task.exception(), Exception) and task in done:
                self._violated("soak", f"{type(error).__name__}: {error}")

    @property
    def faults(self) -> Counter[str]:
        return self._hands.done + self._others

    def _violated(self, law: str, what: str) -> None:
        self._found.violations.append(Violation(law, what))

    async def _fill_disk(self, rng: np.random.Generator) -> None:
        """A full disk at times: the checkpoint asked for then fails, the last one is whole, and afterwards all is well."""
        while True:
            await asyncio.sleep(float(rng.uniform(*DISK_EVERY_S)) if self._others["disk"] else 5.0)
            self._disk.room = int(rng.integers(0, 8192))
            self._others["disk"] += 1
            try:
                await self._run.checkpoint()
                self._violated("disk", "a checkpoint is said to be written to a full disk")
            except OSError:
                pass
            await asyncio.sleep(float(rng.uniform(0.2, 1.5)))
            self._read_back(checkpoint.complete_checkpoints(self._run.directory / "checkpoints")[-1:])
            self._disk.room = None
            self._read_back([await self._run.checkpoint()])

    def _read_back(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                checkpoint.load(path, ("policy", "learner", "run"))
            except aiorl.AiorlError as error:
                self._violated("disk", f"a checkpoint that was complete cannot be read: {error}")

    async def _pause(self, rng: np.random.Generator) -> None:
        """Pauses at times, also during other troubles. Nothing moves until the run goes on."""
        while True:
            await asyncio.sleep(float(rng.uniform(*PAUSE_EVERY_S)) if self._others["pause"] else 3.0)
            await self._run.pause()
            at_rest = self._run.status().ledger
            await asyncio.sleep(float(rng.uniform(0.1, 1.0)))
            if self._run.status().ledger != at_rest:
                self._violated("pause", f"the books were {at_rest}, then {self._run.status().ledger}")
            self._run.resume()
            self._others["pause"] += 1

    async def _count_events(self) -> None:
        async for event in self._run:
            self._found.checkpoints += isinstance(event, aiorl.Checkpointed)

    async def _sample(self, say: Callable[[str], None]) -> None:
        """Measure every second, while no worker is away; say something every minute."""
        said_s = self._begun_s
        while True:
            await asyncio.sleep(SAMPLE_S)
            now = resources()
            if all(pid_of(self._run, worker) is not None for worker in range(-1, WORKERS)):
                self._found.samples.append(now)
            if time.monotonic() - said_s >= LINE_S:
                said_s += LINE_S
                say(self._line(now))

    def _line(self, now: Resources) -> str:
        status, faults = self._run.status(), self.faults
        kinds = " ".join(f"{kind} {faults[kind]}" for kind in sorted(faults))
        return (
            f"{(time.monotonic() - self._begun_s) / 60:5.1f} min  {status.env_steps:,} env steps  "
            f"{faults.total()} faults ({kinds})  {status.restarts} restarts  RSS {now.rss:.1f} MiB  anon {now.anon:.1f}  "
            f"family {now.family_anon:.1f}  fds {now.descriptors}  threads {now.threads}  blocks {now.blocks}  "
            f"children {now.children}"
        )


def verdict(found: Found, *, judge_growth: bool) -> Iterator[str]:
    """The last lines."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.faults.items()))
    yield f"\nfaults    {found.faults.total()}: {kinds}"
    yield (f"run       {found.env_steps:,} env steps, {found.updates} updates, {found.restarts} restarts, "
           f"{found.checkpoints} checkpoints, {found.evaluations} evaluations")  # fmt: skip
    yield f"laws      {'hold' if not found.violations else f'{len(found.violations)} violations'}"
    yield from (f"          {violation.law}: {violation.what}" for violation in found.violations[:REPORTED_MAX])
    shares = found.grown()
    judged = "" if judge_growth else f" (not judged: less than {JUDGED_FROM_MINUTES:g} minutes)"
    worst = max(shares, key=lambda name: shares[name], default="nothing")
    within = shares.get(worst, 0.0) <= GROWTH_MAX
    yield f"growth    {'within' if within else 'BEYOND'} {GROWTH_MAX:.0%}{judged}, most: {worst}"
    yield f"          {', '.join(f'{name} {share:+.2%}' for name, share in shares.items())}"
    yield f"left      {found.left or 'nothing'}"
    yield "OK" if found.holds(judge_growth=judge_growth) else "FAILED"


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--algo", choices=sorted(ALGORITHMS), default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    judge_growth = options.minutes >= JUDGED_FROM_MINUTES
    found = await soak(options.algo, options.minutes, options.seed, lambda line: print(line, flush=True))
    print("\n".join(verdict(found, judge_growth=judge_growth)))
    figures = {
        "algo": options.algo, "minutes": options.minutes, "seed": options.seed, "faults": dict(found.faults),
        "env_steps": found.env_steps, "updates": found.updates, "restarts": found.restarts,
        "violations": [violation._asdict() for violation in found.violations], "growth": found.grown(),
        "left": found.left, "samples": [sample._asdict() for sample in found.samples],
    }  # fmt: skip
    write_json(options.json, figures)
    return 0 if found.holds(judge_growth=judge_growth) else 1


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # as the command line does
    sys.exit(run_async(main()))
