"""`check_env` finds each planted mistake, and nothing in sound environments."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from envs_for_tests import Walk

from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.testing import Finding, check_env, errors, examine_env
from aiorl.testing.env_checks import SLOW_START_S, _start_up, walk
from aiorl.testing.env_checks import Walk as Seen
from aiorl.testing.examine_env import examine
from aiorl.testing.findings import sort, warning

pytestmark = pytest.mark.usefixtures("no_leaks")


def codes(findings: list[Finding], *severities: str) -> list[str]:
    """A slow start is left out: where the machine is busy, everything is slow."""
    told = [f for f in findings if f.code != "slow-start"]
    return [f.code for f in told if f.severity in (severities or ("error", "warning"))]


# -- sound -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "examples.custom_env:GoToGoal"])
def test_nothing_is_wrong_with_sound_environments(env: str):
    found = check_env(env)
    assert codes(found) == []
    told = {f.code: f.message for f in found}
    assert "a step takes" in told["step-time"]
    assert "imported and made in" in told["start-up"]
    assert "at once" in told["sigterm"]


def test_a_slow_start_is_warned_of():
    assert [_start_up(took_s).severity for took_s in (0.9 * SLOW_START_S, 1.1 * SLOW_START_S)] == ["info", "warning"]


def test_keyword_arguments_and_classes():
    assert codes(check_env(Walk, seeded=True, kind="dict")) == []
    (found,) = check_env(Walk, seed=True)
    assert (found.severity, found.code) == ("error", "resolve")
    assert "did you mean 'seeded'" in found.message


def test_a_vector_environment():
    assert codes(check_env("envs_for_tests:WalkVector")) == []
    assert codes(check_env("envs_for_tests:WalkVector", hidden=True)) == ["inexact"]


def test_facts_that_are_no_faults():
    told = {f.code: f for f in check_env("CliffWalking-v1")}
    assert codes(list(told.values())) == ["endless"], "random play does not get there"
    assert "same stream" in told["one-stream"].message, "it always begins in the same place"
    told = {f.code: f for f in check_env(Strict, seeded=True)}
    assert codes(list(told.values())) == []
    assert "raises RuntimeError: good" in told["step-after-done"].message
    assert "both terminated and truncated" in told["both-ends"].message


class Strict(Walk):
    """Refuses to be stepped after its end."""

    over = False

    def reset(self, **arguments: Any) -> Any:
        self.over = False
        return super().reset(**arguments)

    def step(self, action: Any) -> Any:
        if self.over:
            raise RuntimeError("reset first")
        result = super().step(action)
        self.over = result[2] or result[3]
        return result


# -- each mistake ------------------------------------------------------------------------------------------------------


class Faulty(Walk):
    """A sound walk with one mistake, done at `at`: "make", "reset", "step" or "close"."""

    def __init__(self, at: str, fault: str, kind: str = "box") -> None:
        super().__init__(kind, seeded=True)
        self.at, self.fault = at, fault
        self._do("make")

    def _do(self, at: str) -> None:
        if at == self.at:
            getattr(self, f"_{self.fault}")()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        result = super().reset(seed=seed)
        self._do("reset")
        return result

    def step(self, action: Any) -> Any:
        self._do("step")
        return super().step(action)

    def close(self) -> None:
        self._do("close")

    def _numpy(self) -> None:
        self.x += np.random.random() * 1e-3

    def _python(self) -> None:
        random.random()

    def _print(self) -> None:
        print("step!")

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def _leave(self) -> None:
        os._exit(3)

    def _hang(self) -> None:
        time.sleep(1000)

    def _torch(self) -> None:
        state = types.SimpleNamespace(numpy=lambda: np.zeros(1))
        fake: Any = types.SimpleNamespace(get_rng_state=lambda: state)
        sys.modules["torch"] = fake  # as if it had been imported, without the seconds

    def _defy(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _thread(self) -> None:
        threading.Thread(target=time.sleep, args=(1000,), name="physics", daemon=True).start()

    def _process(self) -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)

    def _fall(self) -> None:
        raise RuntimeError("already closed")


class Once(Faulty):
    """Its second close() does what the first did not."""

    closed = False

    def close(self) -> None:
        if self.closed:
            super().close()
        self.closed = True


class Endless(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, *_, info = super().step(action)
        return obs, reward, False, False, info


class Limited(Walk):
    """Takes its time limit for a termination."""

    def step(self, action: Any) -> Any:
        obs, reward, *_, info = super().step(action)
        return obs, reward, self.t >= 6, False, info


class Narrow(Walk):
    """Shows more than it declares."""

    def __init__(self) -> None:
        super().__init__(seeded=True)
        self.observation_space = gymnasium.spaces.Box(0, 1, (3,), np.float32)


class NarrowPart(Walk):
    """Shows more than it declares in one part of several."""

    def __init__(self) -> None:
        super().__init__(kind="dict", seeded=True)
        declared: Any = self.observation_space
        part = {"pos": gymnasium.spaces.Box(-100, np.array([100, 2], np.float32), (2,), np.float32)}
        self.observation_space = gymnasium.spaces.Dict({**declared.spaces, **part})


class Forgetful(Walk):
    """Its reset forgets the clock, and nothing shows it but the ends of episodes."""

    def __init__(self) -> None:
        super().__init__(seeded=True)
        self.observation_space = gymnasium.spaces.Box(-100, 1e6, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        before = self.t
        result = super().reset(seed=seed)
        self.t = before
        return result


class Carries(Walk):
    """Its episodes go by how many there were before, and only `what` shows it."""

    def __init__(self, what: str) -> None:
        super().__init__(seeded=True)
        self.what, self.before = what, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.before += 1
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.what == "reward":
            reward *= 1 + self.before
        elif self.what == "terminated":
            terminated |= self.t == 2 and self.before > 0
        elif self.what == "truncated":
            truncated |= self.t == 2 and self.before > 0
        elif self.what == "obs" and self.t == 1:  # not what a group that is brought back looks at
            obs[1] += self.before
        return obs, reward, terminated, truncated, info


class Brief(Walk):
    """Rightly, episodes have one step: all, or all but those whose seed is a multiple of `longer`."""

    def __init__(self, longer: int = 0) -> None:
        super().__init__(limit=1, seeded=True)
        self.longer = longer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.limit = 5 if self.longer and seed is not None and seed % self.longer == 0 else 1
        return super().reset(seed=seed)


MISTAKES = [
    (Faulty, {"at": "step", "fault": "numpy"}, ["unseeded", "global-chance"], "generator of numpy.random"),
    (Faulty, {"at": "reset", "fault": "python"}, ["global-chance"], "generator of random"),
    (Faulty, {"at": "step", "fault": "print"}, ["prints"], "'step!'"),
    (Faulty, {"at": "step", "fault": "die"}, ["crashes"], "by SIGSEGV during a segment of random steps"),
    (Faulty, {"at": "make", "fault": "leave"}, ["crashes"], "with exit code 3 during being made"),
    (Faulty, {"at": "make", "fault": "torch"}, ["imports-torch"], "seconds"),
    (Faulty, {"at": "make", "fault": "defy"}, ["ignores-sigterm"], "no signal handler"),
    (Faulty, {"at": "close", "fault": "fall"}, ["make"], "closing it raised RuntimeError: already closed"),
    (Once, {"at": "close", "fault": "fall"}, ["close-second"], "a second close() raised RuntimeError"),
    ("envs_for_tests:Unseeded", {}, ["unseeded", "outside-space"], "self.np_random"),
    ("envs_for_tests:ReusesBuffer", {}, ["not-reproducible", "reuses-obs"], "return a copy"),
    ("envs_for_tests:Broken", {"fault": "nan", "kind": "box"}, ["contract"], "finite"),
    ("envs_for_tests:Broken", {"fault": "shape", "kind": "box"}, ["contract"], "expected (3,) float32, got (2,)"),
    ("envs_for_tests:Broken", {"fault": "exit"}, ["contract"], "SystemExit"),
    (Endless, {"seeded": True}, ["outside-space", "endless"], "max_episode_steps"),
    (Limited, {"seeded": True}, ["limit-as-termination"], "after exactly 6 steps"),
    (Narrow, {}, ["outside-space"], "true bounds"),
    (NarrowPart, {}, ["outside-space"], "obs.pos[1] is 3, expected -100 to 2"),
    (Forgetful, {}, ["one-step-episodes"], "where a new environment goes on"),
    (Carries, {"what": "reward"}, ["carries-over"], "step 1 of an episode: reward is "),
    (Carries, {"what": "terminated"}, ["carries-over"], "step 2 of an episode: terminated is True, expected False"),
    (Carries, {"what": "truncated"}, ["carries-over"], "step 2 of an episode: truncated is True, expected False"),
    (Carries, {"what": "obs"}, ["carries-over"], "step 1 of an episode: obs[1] is "),
]


@pytest.mark.parametrize(("env", "kwargs", "expected", "words"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_is_found_and_explained(env: Any, kwargs: dict[str, Any], expected: list[str], words: str):
    found = check_env(env, **kwargs)
    assert codes(found) == expected
    assert any(words in f.message for f in found if f.code in expected), found
    assert all(len(f.message.splitlines()) <= 3 for f in found)


def test_a_busy_machine_is_not_the_environments_fault(monkeypatch: pytest.MonkeyPatch):
    """Nobody has taken over SIGTERM, so it does not matter how long the end takes."""
    monkeypatch.setattr(examine_env, "END_GRACE_S", 0.0)
    assert codes(check_env("CartPole-v1")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the disposition of a signal is read in /proc")
@pytest.mark.parametrize(
    ("taken", "ends"),
    [
        ("", True),
        ("signal.signal(signal.SIGTERM, lambda *_: None)", False),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])", False),
        ("ctypes.CDLL(None).signal(15, handler)", False),  # as native code does: Python is not told
    ],
    ids=["nobody", "python", "blocked", "native"],
)
def test_who_has_taken_over_sigterm(taken: str, ends: bool):
    program = (
        "import ctypes, signal\nfrom aiorl.testing.examine_env import _sigterm_ends\n"
        f"handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)\n{taken}\nprint(_sigterm_ends())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{ends}\n"


def test_what_it_leaves_running_is_found_and_ended():
    found = {f.code: f.message for f in check_env(Faulty, at="make", fault="process")}
    assert "outlive a worker" in found["orphans"]
    told = found["leaves-processes"] + found["orphans"]
    pids = [int(pid) for pid in re.findall(r"(\d+) \S+ -c import time; time\.sleep\(1000\)", told)]
    assert len(pids) > 2
    assert [pid for pid in pids if _sleeps(pid)] == []


def _sleeps(pid: int) -> bool:
    try:
        return b"time.sleep(1000)" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_thread_that_goes_on():
    assert codes(check_env(Faulty, at="make", fault="thread")) == ["leaves-threads"]


def test_one_that_hangs_is_given_up():
    found = examine(Faulty, {"at": "step", "fault": "hang"}, patience_s=1.0)
    assert codes(found) == ["hangs"]
    assert "from a segment of random steps within 1 s" in found[0].message


@pytest.mark.parametrize("longer", [0, 5])
def test_episodes_may_have_one_step(longer: int):
    seen = walk(Brief(longer), probe(resolve_env(Brief, in_process=True)).spaces, 50)
    lengths = [length for *_, length in seen.ends]
    assert lengths[0] == (5 if longer else 1)
    assert 2 * lengths.count(1) > len(lengths)
    assert codes(check_env(Brief, longer=longer)) == []


# -- what no worker can import -----------------------------------------------------------------------------------------


def test_a_local_class_is_looked_at_here():
    class Local(Walk):
        pass

    found = check_env(Local)
    assert codes(found)[0] == "importable"
    assert "defined inside a function" in found[0].message
    assert "step-time" in {f.code for f in found}, "the rest is checked nevertheless"


def test_arguments_that_cannot_be_sent():
    (found,) = check_env("envs_for_tests:Walk", limit=lambda: 7)
    assert found.code == "pickling"


def test_an_unknown_id():
    (found,) = check_env("CartPole-v9")
    assert (found.severity, found.code) == ("error", "resolve")
    assert "did you mean CartPole-v1" in found.message


# -- findings ----------------------------------------------------------------------------------------------------------


def test_errors_are_what_must_be_mended():
    found = [warning("a", "seen", "do"), Finding("b", "error", "x"), Finding("c", "info", "y")]
    assert found[0].message == "seen\n  do"
    assert [f.code for f in errors(found)] == ["b"]
    assert [f.code for f in sort(found)] == ["b", "a", "c"]


def test_the_walk_leaves_the_global_generators_as_they_are():
    before = (random.getstate(), np.random.get_state()[1].tobytes())
    seen = walk(Walk(seeded=True), probe(resolve_env(Walk, in_process=True)).spaces, 50)
    assert isinstance(seen, Seen)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    assert seen.global_chance == set()
