"""The public test kit: checks of environments and algorithms, simulation in virtual time, faults, and the laws that must
hold after every run.

    from aiorl.testing import check_algorithm, check_env, errors

    assert not errors(check_env("my_package:MyEnv"))
    assert not errors(check_algorithm(MyAlgorithm))

    from aiorl.testing import LEDGER_ENV, FaultPlan, Mark, Recording, Sim, explore, simulate

    def one(sim: Sim):
        config = Config(env=LEDGER_ENV, algo=Recording.of(Mark()), workers=4, total_steps=2000, out=new_directory())
        simulated = sim.run(simulate(sim, config, FaultPlan.random(sim.rng, workers=4, steps=2000)))
        simulated.check_laws()

    explore(one, seeds=200)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aiorl.faultpoints import armed, fault_point

_EXPORTS = {
    "crashes": ["Crash", "CrashTestError", "crash_points"],
    "sim": ["Deadlock", "SeedFailure", "Sim", "explore"],
    "world": ["Pace", "World"],
    "simulation": ["Simulated", "simulate"],
    "faults": [
        "Doer", "Fault", "FaultEnv", "FaultPlan", "FaultPoints", "InjectedFault", "When", "drive", "seconds", "step",
        "stored",
    ],
    "laws": ["LEDGER_ENV", "LawsBroken", "Violation", "check_laws", "tape_of", "violations"],
    "ledger_env": ["LedgerEnv", "Mark"],
    "recording": ["Recording", "Tape"],
    "findings": ["Finding", "errors"],
    "examine_env": ["check_env"],
    "examine_algorithm": ["check_algorithm"],
    "examine_run": ["check_run"],
    "buffer_checks": ["check_replay"],
    "machine": ["check_machine"],
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "LEDGER_ENV", "Crash", "CrashTestError", "Deadlock", "Doer", "Fault", "FaultEnv", "FaultPlan", "FaultPoints",
    "Finding", "InjectedFault", "LawsBroken", "LedgerEnv", "Mark", "Pace", "Recording", "SeedFailure", "Sim",
    "Simulated", "Tape", "Violation", "When", "World", "armed", "check_algorithm", "check_env", "check_laws",
    "check_machine", "check_replay", "check_run", "crash_points", "drive", "errors", "explore", "fault_point", "seconds",
    "simulate", "step", "stored", "tape_of", "violations",
]  # fmt: skip

if TYPE_CHECKING:
    from aiorl.testing.buffer_checks import check_replay
    from aiorl.testing.crashes import Crash, CrashTestError, crash_points
    from aiorl.testing.examine_algorithm import check_algorithm
    from aiorl.testing.examine_env import check_env
    from aiorl.testing.examine_run import check_run
    from aiorl.testing.faults import (
        Doer,
        Fault,
        FaultEnv,
        FaultPlan,
        FaultPoints,
        InjectedFault,
        When,
        drive,
        seconds,
        step,
        stored,
    )
    from aiorl.testing.findings import Finding, errors
    from aiorl.testing.laws import LEDGER_ENV, LawsBroken, Violation, check_laws, tape_of, violations
    from aiorl.testing.ledger_env import LedgerEnv, Mark
    from aiorl.testing.machine import check_machine
    from aiorl.testing.recording import Recording, Tape
    from aiorl.testing.sim import Deadlock, SeedFailure, Sim, explore
    from aiorl.testing.simulation import Simulated, simulate
    from aiorl.testing.world import Pace, World


def __getattr__(name: str) -> Any:
    """Import at first use: a worker that makes a LedgerEnv needs nothing of the rest."""
    if name in _HOME:
        return getattr(importlib.import_module(f"aiorl.testing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'aiorl.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
