"""What goes wrong, and when: one plan for simulated workers and for real ones, faults of environments, and fault points.

    plan = FaultPlan().kill(worker=1, at=stored(5000)).stop(worker=0, at=seconds(2.0), for_s=0.5)

`drive(run, plan)` carries it out on real processes, `simulate(sim, config, plan)` in virtual time. What only happens inside
a worker (`hang`, `fail`, `slow`) a simulated worker does by itself; in a real one `FaultEnv` does it. `refuse` is for the
simulation alone.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import gymnasium
import numpy as np

from aiorl.errors import ConfigError
from aiorl.faultpoints import POINTS
from aiorl.run import Run
from aiorl.workers.pool import ProcessWorkers

What = Literal["kill", "stop", "hang", "fail", "slow", "refuse"]
FROM_OUTSIDE: tuple[What, ...] = ("kill", "stop")
_KINDS: tuple[What, ...] = ("kill", "kill", "stop", "hang", "fail", "slow")  # of a random plan


class InjectedFault(Exception):
    """Raised on purpose, by a test."""


class When(NamedTuple):
    """`stored`: so many transitions have been learned from. `step`: the worker has made so many steps with its groups, over
    all its processes. `seconds`: so long after the run was ready, in virtual time if that is what the run has."""

    unit: Literal["stored", "step", "seconds"]
    value: float


def stored(transitions: int) -> When:
    return When("stored", transitions)


def step(number: int) -> When:
    return When("step", number)


def seconds(after_s: float) -> When:
    return When("seconds", after_s)


class Fault(NamedTuple):
    """`what` happens to worker number `worker` (-1: the evaluating one) `at` a moment; `for_s` None: for ever."""

    what: What
    worker: int
    at: When
    for_s: float | None = None


@dataclass(frozen=True)
class FaultPlan:
    """Faults, each of which happens once. The methods return a longer plan."""

    faults: tuple[Fault, ...] = ()

    def add(self, fault: Fault) -> FaultPlan:
        return FaultPlan((*self.faults, fault))

    def kill(self, worker: int, at: When) -> FaultPlan:
        """SIGKILL: the segment under way is lost."""
        return self.add(Fault("kill", worker, at))

    def stop(self, worker: int, at: When, for_s: float | None = None) -> FaultPlan:
        """SIGSTOP, which also SIGTERM cannot end; after `for_s` seconds SIGCONT, and what is late is delivered late."""
        return self.add(Fault("stop", worker, at, for_s))

    def hang(self, worker: int, at: When) -> FaultPlan:
        """A step of an environment never returns; SIGTERM ends it."""
        return self.add(Fault("hang", worker, at))

    def fail(self, worker: int, at: When) -> FaultPlan:
        """A step of an environment raises."""
        return self.add(Fault("fail", worker, at))

    def slow(self, worker: int, at: When, for_s: float) -> FaultPlan:
        """One step takes `for_s` longer."""
        return self.add(Fault("slow", worker, at, for_s))

    def refuse(self, worker: int, at: When) -> FaultPlan:
        """From then on the next process that is started for this worker cannot be."""
        return self.add(Fault("refuse", worker, at))

    @classmethod
    def random(cls, rng: np.random.Generator, workers: int, *, steps: int, most: int = 4, over_s: float = 1.0) -> FaultPlan:
        """Up to `most` faults of all kinds, for a run of `steps` transitions that takes about `over_s` seconds.

        Fewer than would use up a worker's budget of restarts, so that a run that they hit goes on.
        """
        plan, hits = cls(), Counter[int]()
        for _ in range(int(rng.integers(0, most + 1))):
            worker = int(rng.integers(-1, workers))
            hits[worker] += 1
            if hits[worker] > 2:
                continue
            what: What = _KINDS[int(rng.integers(len(_KINDS)))]
            at = (
                stored(int(rng.integers(0, steps))),
                step(int(rng.integers(1, 2 + steps // (4 * workers)))),
                seconds(float(rng.random()) * over_s),
            )[int(rng.integers(3))]
            lasting = float(rng.random()) * 0.5
            plan = plan.add(Fault(what, worker, at, lasting if what == "slow" or rng.random() < 0.5 else None))
        return plan


class Doer:
    """How a plan is carried out on real processes. The simulated world is another one."""

    def send(self, pid: int, number: int) -> None:
        """A signal to a process."""
        os.kill(pid, number)

    def inside(self, fault: Fault) -> None:
        """Have it happen inside the worker at its next step."""
        raise ConfigError(f"{fault.what} cannot be done to a process from outside\n  use FaultEnv, or a simulation")


async def drive(run: Run, plan: FaultPlan, doer: Doer | None = None) -> list[Fault]:
    """Carry out a plan on a run that goes on; returns what happened, at the run's end. A worker that is dead is left alone.

    Faults `at` a step happen inside workers: they are for the simulation and for FaultEnv. ConfigError for others that
    cannot be done.
    """
    doer = doer or Doer()
    real = type(doer) is Doer
    for fault in plan.faults:
        if real and (fault.what not in FROM_OUTSIDE or fault.at.unit == "step"):
            doer.inside(fault)
    loop = asyncio.get_running_loop()
    done: list[Fault] = []
    timers: list[asyncio.TimerHandle] = []
    waiting = [fault for fault in plan.faults if fault.at.unit == "stored"]

    def strike(fault: Fault) -> None:
        pid = pid_of(run, fault.worker)
        if fault.what not in FROM_OUTSIDE:
            doer.inside(fault)
        elif pid is None:
            return
        elif fault.what == "kill":
            doer.send(pid, signal.SIGKILL)
        else:
            doer.send(pid, signal.SIGSTOP)
            if fault.for_s is not None:
                timers.append(loop.call_later(fault.for_s, _go_on, doer, pid))
        done.append(fault)

    events = run.events()
    try:
        for fault in plan.faults:
            if fault.at.unit == "seconds":
                timers.append(loop.call_later(fault.at.value, strike, fault))
        async for event in events:
            for fault in [f for f in waiting if f.at.value <= event.env_steps]:
                waiting.remove(fault)
                strike(fault)
    finally:
        run.unsubscribe(events)
        for timer in timers:
            timer.cancel()
    return done


def _go_on(doer: Doer, pid: int) -> None:
    try:
        doer.send(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it was taken for hanging, and ended


def pid_of(run: Run, worker: int) -> int | None:
    """Process id of a worker (-1: the evaluating one), None while it is dead."""
    parts = run._session.parts
    workers = parts.workers if parts is not None else None
    if not isinstance(workers, ProcessWorkers) or not -1 <= worker < len(workers._keepers) - 1:
        raise ConfigError(f"this run has no worker process {worker}")
    return workers._keepers[worker].pid


# -- in an environment -------------------------------------------------------------------------------------------------


class FaultEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment in which things go wrong, each once in all processes together.

    `wraps` is `module:callable`, or a gymnasium id, with `kwargs`. `faults` are [what, step] or [what, step, seconds] each:
    the first environment to make its `step`-th step, counted from its making and with replayed ones, does `what`: kill,
    stop, hang, exit, fail, slow, nan (a reward), nan_obs (all of an array). `marks` is an empty directory that keeps what
    has happened. Nothing that would end the process happens in a process without a parent: it is the one that trains.
    """

    def __init__(
        self, wraps: str, faults: list[list[Any]], marks: str, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        module, _, name = wraps.partition(":")
        made = getattr(importlib.import_module(module), name) if name else gymnasium.make
        super().__init__(made(**(kwargs or {})) if name else made(wraps, **(kwargs or {})))
        self._marks = Path(marks)
        self._faults = {
            index: (str(fault[0]), int(fault[1]), float(fault[2]) if len(fault) > 2 else 3600.0)
            for index, fault in enumerate(faults)
        }
        self._steps = 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._steps += 1
        result = self.env.step(action)
        for index, (what, at, for_s) in self._faults.items():
            if at == self._steps and self._first_to_mark(index):
                if what == "nan":
                    return (result[0], float("nan"), *result[2:])
                if what == "nan_obs":
                    return (np.full_like(result[0], np.nan), *result[1:])
                self._go_wrong(what, for_s)
        return cast(Any, result)

    def _first_to_mark(self, index: int) -> bool:
        try:
            (self._marks / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _go_wrong(self, what: str, for_s: float) -> None:
        if what == "fail":
            raise InjectedFault(f"planned for step {self._steps}")
        if what == "slow":
            time.sleep(for_s)  # the fault itself
            return
        if multiprocessing.parent_process() is None:
            raise InjectedFault(f"{what} would end the training process: it needs worker processes")
        if what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        elif what == "exit":
            os._exit(3)
        elif what == "hang":
            while True:
                time.sleep(3600)  # the fault itself
        else:
            raise ConfigError(f"fault {what!r}: expected kill, stop, hang, exit, fail, slow, nan or nan_obs")


# -- fault points ------------------------------------------------------------------------------------------------------


class FaultPoints:
    """Counts the points that are passed, and raises InjectedFault where it is told to. Give it to `faultpoints.armed`.

    `fail` maps a point to the number of the passing (from 1 on) that raises; `then` is called there instead of raising.
    """

    def __init__(self, fail: Mapping[str, int] | None = None, then: Callable[[str], None] | None = None) -> None:
        unknown = (fail or {}).keys() - POINTS.keys()
        if unknown:
            raise ConfigError(f"there is no fault point {', '.join(sorted(unknown))}\n  there are {', '.join(POINTS)}")
        self.passed = Counter[str]()
        self._fail, self._then = dict(fail or {}), then

    def __call__(self, name: str) -> None:
        if name not in POINTS:
            raise ConfigError(f"fault_point({name!r}): list it in aiorl.faultpoints.POINTS")
        self.passed[name] += 1
        if self._fail.get(name) == self.passed[name]:
            if self._then is None:
                raise InjectedFault(f"planned at {name}, passing {self.passed[name]}")
            self._then(name)

    @property
    def never(self) -> list[str]:
        """Points that nothing has passed: what a test claims to cover and does not."""
        return [name for name in POINTS if not self.passed[name]]

    def report(self) -> str:
        """One line for each point: how often it was passed, and what is the case there."""
        return "\n".join(f"{self.passed[name] or 'never':>8}  {name}: {what}" for name, what in POINTS.items())
