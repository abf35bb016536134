"""Whole runs in simulation: the real pipeline from session to slots, with threads and processes in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiorl.config import Config
from aiorl.errors import AiorlError
from aiorl.run import Run
from aiorl.testing.faults import Fault, FaultPlan, drive
from aiorl.testing.laws import LawsBroken, Violation, violations
from aiorl.testing.sim import Sim
from aiorl.testing.world import Pace, World


@dataclass(frozen=True)
class Simulated:
    """A run that has ended, the world it was in, the faults that `drive` carried out, and the error that it failed of."""

    run: Run
    world: World
    struck: list[Fault]
    error: AiorlError | None

    def check_laws(self) -> None:
        """As `aiorl.testing.check_laws`, and nothing of the simulated world may be left. Raises LawsBroken."""
        broken = [*violations(self.run), *self._left_over()]
        if broken:
            raise LawsBroken(broken)

    def _left_over(self) -> list[Violation]:
        alive = [p.name for p in self.world.processes if p.exitcode is None and p.sentinel >= 0]
        found = [Violation("processes", f"{name} is still alive") for name in alive]
        sim, result, parts = self.world.sim, self.run.result, self.run._session.parts
        saved = self.run._session.made.checked.saved if self.run._session.made is not None else None
        expected = self.world.collected + (saved.manifest.env_steps if saved is not None else 0)
        whole = result.status == "completed" and result.stop_overshoot is None
        if parts is not None and whole and expected != parts.pacer.steps:
            found.append(Violation("kept", f"workers delivered {expected}, {parts.pacer.steps} arrived"))
        found += [Violation("processes", text) for text in self.world.too_many_starts()]
        return found + [Violation("tasks", text) for text in sim.problems]


Host = Callable[[Run], Awaitable[None]]
"""What the program around a run does to it while it goes on; it is cancelled when the run ends."""


async def simulate(
    sim: Sim,
    config: Config,
    plan: FaultPlan | None = None,
    *,
    pace: Pace | None = None,
    host: Host | None = None,
    resume: str | Path | None = None,
) -> Simulated:
    """Run `config` within `sim` to its end, with faults. Its own errors are in the result; any other is raised.

    `config` needs workers of its own: 0 of them have nothing that a plan could hit.
    """
    plan = plan or FaultPlan()
    world = World(sim, plan, pace)
    run = Run(config, resume=resume, backends=world.backends)
    error: AiorlError | None = None
    struck: list[Fault] = []
    outside = FaultPlan(tuple(fault for fault in plan.faults if fault.at.unit != "step"))
    try:
        async with run:
            driving = asyncio.ensure_future(drive(run, outside, world))
            hosting = asyncio.ensure_future(host(run)) if host is not None else None
            try:
                await run.wait()
            finally:
                struck = await driving
                if hosting is not None:
                    await _end(hosting)
    except AiorlError as failure:
        error = failure
    finally:
        await world.aclose()
    return Simulated(run, world, struck, error)


async def _end(hosting: asyncio.Future[None]) -> None:
    """What the host had begun ends with the run; what it ran into is raised."""
    await asyncio.sleep(0.1)
    hosting.cancel()
    await asyncio.wait([hosting])
    if not hosting.cancelled():
        hosting.result()
