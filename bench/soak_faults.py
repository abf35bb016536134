"""What goes wrong in a soak: a plan that the budget of restarts bears, hands to carry it out, a disk that runs full."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from aiorl import checkpoint
from aiorl.metrics import directory
from aiorl.run import Run
from aiorl.testing.faults import Doer, Fault, FaultEnv, FaultPlan, What, pid_of, seconds

FATAL: tuple[What, ...] = ("kill", "kill", "kill", "stop", "stop", "fail", "hang")  # each costs a restart at most
FATAL_GAP_S = (30.0, 40.0)  # a third within 60 s comes only if one was noticed late; the fourth would end the run
SLOW_GAP_S = (5.0, 15.0)


def plan_faults(rng: np.random.Generator, workers: int, over_s: float) -> FaultPlan:
    """Kills, stops, raises, hangs and slow steps of each worker and of the evaluating one, at random within `over_s`."""
    plan = FaultPlan()
    for worker in range(-1, workers):
        at_s = float(rng.uniform(2.0, 12.0))
        while at_s < over_s:
            what = FATAL[int(rng.integers(len(FATAL)))]
            for_s = float(rng.uniform(0.2, 2.0)) if what == "stop" and rng.random() < 0.5 else None
            plan = plan.add(Fault(what, worker, seconds(at_s), for_s))
            at_s += float(rng.uniform(*FATAL_GAP_S))
        at_s = float(rng.uniform(1.0, 5.0))
        while at_s < over_s:
            plan = plan.slow(worker, seconds(at_s), float(rng.uniform(0.05, 0.8)))
            at_s += float(rng.uniform(*SLOW_GAP_S))
    return plan


class Hands(Doer):
    """Carries out a plan on a run's processes: signals from outside; what happens inside is left to its `SoakEnv`."""

    def __init__(self, run: Run, orders: Path) -> None:
        self._run, self._orders = run, orders
        self._given = Counter[str]()

    def send(self, pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return  # it has just died
        if number != signal.SIGCONT:
            self._given["kill" if number == signal.SIGKILL else "stop"] += 1

    def inside(self, fault: Fault) -> None:
        pid = pid_of(self._run, fault.worker)
        if pid is None or (self._orders / str(pid)).exists():
            return  # it is dead, or has not come to its last order yet
        written = self._orders / f".{pid}"
        written.write_text(f"{fault.what} {fault.for_s or 3600.0}", encoding="utf-8")
        written.replace(self._orders / str(pid))
        self._given[fault.what] += 1

    @property
    def done(self) -> Counter[str]:
        """Faults that have happened, by kind: orders that no environment has seen are none."""
        left = Counter(path.read_text(encoding="utf-8").split()[0] for path in self._orders.glob("[0-9]*"))
        return self._given - left


class SoakEnv(FaultEnv):
    """A FaultEnv that does at its next step what a file in `orders`, named by its process, says: a word and seconds."""

    def __init__(self, wraps: str, orders: str, kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__(wraps, [], orders, kwargs)
        self._order = Path(orders) / str(os.getpid())
        self._order_path = str(self._order)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._steps += 1
        result = self.env.step(action)
        if os.path.exists(self._order_path):
            what, for_s = self._order.read_text(encoding="utf-8").split()
            self._order.unlink()
            self._go_wrong(what, float(for_s))
        return cast(Any, result)


class Disk:
    """Within `with`, what aiorl appends and saves goes through here, and finds the disk full once `room` bytes are written.

    `room` None: there is no end to it. As on a real disk the last write before is cut short. Works for every user, root
    included. `refused` counts the writes that failed.
    """

    modules: tuple[ModuleType, ...] = (checkpoint, directory)

    def __init__(self) -> None:
        self.room: int | None = None
        self.refused = 0

    def __enter__(self) -> Disk:
        for module in self.modules:
            setattr(module, "open", self._open)  # noqa: B010  # a module has no such attribute: it hides the built-in one
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            delattr(module, "open")

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if self.room is None or mode.startswith("r"):
            return builtins.open(path, mode, **options)
        scarce = _Scarce(path, mode.strip("bt"), self)
        if options.get("buffering") == 0:
            return scarce
        buffered = io.BufferedWriter(scarce)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **options)

    def take(self, nbytes: int, path: object) -> int:
        """How many of `nbytes` can be written. Raises OSError if none."""
        if self.room is None:
            return nbytes
        if nbytes and not self.room:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        found = min(nbytes, self.room)
        self.room -= found
        return found


class _Scarce(io.FileIO):
    """A file on a disk that runs full."""

    def __init__(self, path: Any, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self._path, self._disk = path, disk

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        return super().write(view[: self._disk.take(len(view), self._path)]) or 0
