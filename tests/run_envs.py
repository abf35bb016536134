"""Environments for tests of whole runs; workers import them by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np


class Counting(gymnasium.Env[Any, Any]):
    """Observes (episode's seed fraction, step); an episode takes 7 steps and pays 1 for action 1."""

    observation_space = gymnasium.spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int = 7) -> None:
        self._length = length
        self._t = 0
        self._mark = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._t, self._mark = 0, float(self.np_random.random())
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._t += 1
        return self._observe(), float(action), self._t >= self._length, False, {}

    def _observe(self) -> Any:
        return np.array([self._mark, self._t], np.float32)


class Noted(Counting):
    """Appends a byte to a file for each step made for training."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        os.write(self._file, b".")
        return super().step(action)

    def close(self) -> None:
        os.close(self._file)


class Unseeded(Counting):
    """Ignores its seed: what it shows cannot be reproduced."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=int.from_bytes(os.urandom(4), "little"))


class Forgetful(Counting):
    """Ignores its seed where that is odd: some episodes can be reproduced and others cannot."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=int.from_bytes(os.urandom(4), "little") if seed is None or seed % 2 else seed)


class Faulty(Counting):
    """Does `fault` at env step `at` (counted over all episodes): raise, exit, kill, hang, nan, unpicklable."""

    def __init__(self, fault: str = "raise", at: int = 50) -> None:
        super().__init__()
        self._fault, self._at, self._steps = fault, at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._steps == self._at:
            self._go_wrong()
        return super().step(action)

    def _go_wrong(self) -> None:
        if self._fault == "raise":
            raise ZeroDivisionError("the physics broke")
        if self._fault == "unpicklable":

            class Local(Exception):
                def __init__(self, a: int, b: int) -> None:
                    self.lock = object()
                    super().__init__(f"local trouble {a} {b}")

            raise Local(1, 2)
        if self._fault == "exit":
            os._exit(3)
        if self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "hang":
            while True:
                time.sleep(3600)  # the fault itself


class Mortal(Faulty):
    """Goes wrong once for each of `deaths`, a (fault, step) each: counted over all processes, by files in folder `marks`.

    The step is counted from the making of the environment, with replayed ones; at 0 it is the making itself.
    """

    def __init__(self, marks: str, deaths: list[list[Any]], length: int = 7) -> None:
        super().__init__(at=-1)
        self._length, self._marks, self._deaths = length, Path(marks), deaths
        self._maybe()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        result = super().step(action)
        self._maybe()
        return result

    def _maybe(self) -> None:
        died = len(list(self._marks.iterdir()))
        if died < len(self._deaths) and self._deaths[died][1] == self._steps and os.getpid() != self._first_pid:
            try:
                (self._marks / str(died)).touch(exist_ok=False)
            except FileExistsError:
                return  # another one was quicker
            self._fault = self._deaths[died][0]
            self._go_wrong()

    @property
    def _first_pid(self) -> int:
        return int(self._marks.name)  # of the process that looks at its spaces


class Hungry(Mortal):
    """Its fault, whatever it is called, is to allocate until there is no more, within 256 MiB of what the process has."""

    def _go_wrong(self) -> None:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
        hoard: list[bytearray] = []
        while True:
            hoard.append(bytearray(2**24))


class Closing(Counting):
    """Leaves a file in `folder` for each one made, with a line for each time that it was closed."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._file = Path(folder) / uuid.uuid4().hex
        self._file.touch()

    def close(self) -> None:
        with self._file.open("a") as file:
            file.write("closed\n")


class WithHelper(Counting):
    """Has a simulator in a process of its own, which ends with the one that made it, however that ends."""

    def __init__(self) -> None:
        super().__init__()
        multiprocessing.Process(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


class Deaf(Mortal):
    """Cannot be ended by SIGTERM."""

    def _go_wrong(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        super()._go_wrong()


class BadStart(Counting):
    """Cannot be made in a worker (but in the process that looks at its spaces first)."""

    def __init__(self, pid: int = 0) -> None:
        super().__init__()
        if os.getpid() != pid:
            raise FileNotFoundError("no licence file")


class DelayedStart(Counting):
    """Takes for ever to be made in a worker."""

    def __init__(self, pid: int = 0) -> None:
        super().__init__()
        if os.getpid() != pid:
            time.sleep(3600)  # the fault itself


class Jittery(Counting):
    """Steps take a random time, so segments arrive in any order."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep((time.perf_counter_ns() % 1000) * 2e-6)  # the fault itself: uneven speed
        return super().step(action)
