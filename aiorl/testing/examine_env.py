"""Trying out an environment the way a run would use it: in a worker process, under a deadline, from the outside.

gymnasium's own checker looks at one environment in one process. What breaks trainings is mostly elsewhere: workers that
cannot import it, chance that no seed reaches, episodes that cannot be brought back, processes that stay behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.envs.make import make_env, probe
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import ConfigError
from aiorl.testing.child import END_GRACE_S, Child, redirect_stdout, tell
from aiorl.testing.env_checks import fatal, stages
from aiorl.testing.findings import Finding, error, info, sort, warning
from aiorl.testing.leaks import children, end
from aiorl.workers.launch import Launcher

PATIENCE_S = 60.0
"""A check that takes longer than this is taken to hang."""


def check_env(env: str | Callable[..., Any], /, **env_kwargs: Any) -> list[Finding]:
    """Look for everything that would make a training on `env` fail, come out wrong or leave something behind.

    `env` is what `Config.env` takes: a gymnasium id, "module:callable" or a callable. It runs in worker processes of
    its own, so it may crash, hang or print. Blocks for a second or more: in a coroutine, call it on a thread.
    """
    return examine(env, env_kwargs)


def examine(
    env: str | Callable[..., Any], env_kwargs: Mapping[str, Any], patience_s: float = PATIENCE_S
) -> list[Finding]:
    """As `check_env`; says that the environment hangs if one of the checks takes longer than `patience_s`."""
    try:
        spec = resolve_env(env, env_kwargs, in_process=False)
    except ConfigError as failure:
        return sort(_only_here(env, env_kwargs, str(failure)))
    try:
        reduction.ForkingPickler.dumps(spec)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as failure:
        return [error(
            "pickling",
            f"its arguments cannot be sent to a worker: {failure}",
            "give numbers, strings, lists and dicts in env_kwargs",
        )]  # fmt: skip
    launcher = Launcher(import_main=spec.name.startswith("__main__:"))
    try:
        with tempfile.TemporaryDirectory(prefix="aiorl-check-") as directory:
            findings = list(_in_worker(launcher, spec, Path(directory), patience_s))
            if not fatal(findings):
                findings += _ending(launcher, spec, Path(directory), patience_s)
    finally:
        launcher.close()
    return sort(findings)


def _only_here(env: Any, env_kwargs: Mapping[str, Any], why: str) -> Iterator[Finding]:
    """What can be said of an environment that no worker can import: it is looked at in this process."""
    try:
        spec = resolve_env(env, env_kwargs, in_process=True)
    except ConfigError as failure:
        yield error("resolve", str(failure))
        return
    yield error("importable", why)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for _, check in stages(spec):
            findings = list(check())
            yield from findings
            if fatal(findings):
                break
    yield from _about_output(printed.getvalue())


# -- in a worker process -----------------------------------------------------------------------------------------------


async def examine_here(fd: int, output: str, spec: EnvSpec) -> None:
    """Program of the first worker: the checks, each announced before it is begun."""
    redirect_stdout(output)
    for stage, check in stages(spec):
        tell(fd, stage=stage)
        findings = list(check())
        sys.stdout.flush()
        tell(fd, findings=[[f.code, f.severity, f.message] for f in findings])
        if fatal(findings):
            break
    tell(fd, done=True)


async def step_for_ever(fd: int, output: str, spec: EnvSpec) -> None:
    """Program of the second worker: to be ended from outside in the middle of its steps."""
    redirect_stdout(output)
    before = children()
    found = probe(spec)
    if found.spec.vector_only:
        return
    env, rng = make_env(found.spec), np.random.default_rng(0)
    env.reset(seed=0)
    told = False
    while True:
        result = env.step(found.spaces.env_action(found.spaces.sample_actions(1, rng)[0]))
        if result[2] or result[3]:
            env.reset(seed=0)
        if not told:
            tell(fd, started=sorted(children() - before), ends_at_once=_sigterm_ends())
            told = True


def _sigterm_ends() -> bool:
    """Whether the system ends this process at SIGTERM: nobody handles, ignores or blocks it, native code included."""
    with contextlib.suppress(OSError):  # not Linux: then what Python knows has to do
        lines = dict(line.split(":") for line in Path("/proc/thread-self/status").read_text().splitlines() if "Sig" in line)
        taken = (int(lines[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt"))
        return not any(mask >> (signal.SIGTERM - 1) & 1 for mask in taken)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.SIGTERM not in blocked


# -- seen from here ----------------------------------------------------------------------------------------------------


def _in_worker(launcher: Launcher, spec: EnvSpec, directory: Path, patience_s: float) -> Iterator[Finding]:
    """What the checks find in a process of their own, or what they do to it."""
    stage, done = "being imported", False
    with Child(launcher, examine_here, directory, spec) as worker:
        try:
            for message in worker.messages(patience_s):
                stage = message.get("stage", stage)
                yield from (Finding(*parts) for parts in message.get("findings", []))
                done = done or "done" in message
        except TimeoutError:
            text = f"it did not come back from {stage} within {patience_s:g} s"
            yield error("hangs", text, "a run would end its worker after step_timeout_s")
            return
        if not done:
            text = f"the worker process ended {worker.how_it_ended()} during {stage}"
            yield error("crashes", text, worker.last_words())
        printed = worker.printed()
    yield from _about_output(printed)


def _about_output(printed: str) -> Iterator[Finding]:
    if not printed.strip():
        return
    first = printed.strip().splitlines()[0][:120]
    yield warning(
        "prints",
        f"it prints, for example {first!r}",
        "what workers print goes into their log files: remove it, or use logging",
    )


def _ending(launcher: Launcher, spec: EnvSpec, directory: Path, patience_s: float) -> Iterator[Finding]:
    """SIGTERM in the middle of a step, and what that leaves."""
    with Child(launcher, step_for_ever, directory, spec) as worker:
        try:
            told = next((m for m in worker.messages(patience_s) if "started" in m), None)
        except TimeoutError:
            told = None
        if told is None or worker.ends_within(0):
            return  # it has ended by itself: a vector environment, which the groups have tried already
        started: list[str] = told["started"]
        worker.terminate()
        # How long takes the system is no fault of the environment's: the machine may be busy.
        ended = worker.ends_within(patience_s if told["ends_at_once"] else END_GRACE_S)
    if ended:
        yield info("sigterm", "a worker that is told to end while stepping does so at once")
    else:
        yield warning(
            "ignores-sigterm",
            "a worker that was told to end while stepping went on: the environment has taken over SIGTERM",
            "install no signal handler; a run kills such a worker, and then close() is never called",
        )
    orphans = [process for process in started if _alive(int(process.split()[0]))]
    end(orphans)
    if orphans:
        yield warning(
            "orphans",
            f"processes that it started outlive a worker that is ended: {', '.join(orphans)}",
            "let them end when their standard input closes, or set PR_SET_PDEATHSIG",
        )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
