"""Killing worker processes for good, at chosen moments."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any, cast

import pytest

import aiorl
from aiorl.workers.pool import ProcessWorkers


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone already is as good."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers_of(run: aiorl.Run) -> ProcessWorkers:
    parts = run._session.parts
    assert parts is not None
    return cast(ProcessWorkers, parts.workers)


def kill_fork_server_in_a_launch(patch: pytest.MonkeyPatch) -> None:
    """The next one that is asked for a process dies with the request before it."""
    ask = ForkServer.connect_to_new_process

    def ask_and_kill(server: Any, fds: list[int]) -> Any:
        patch.setattr(ForkServer, "connect_to_new_process", ask)
        server.ensure_running()
        os.kill(server._forkserver_pid, signal.SIGSTOP)
        os.waitpid(server._forkserver_pid, os.WUNTRACED)  # it stands
        answer = ask(server, fds)
        os.kill(server._forkserver_pid, signal.SIGKILL)
        return answer

    patch.setattr(ForkServer, "connect_to_new_process", ask_and_kill)


async def until(predicate: Callable[[], Any]) -> None:
    """Wait for something that happens in another process and that nobody announces."""
    async with asyncio.timeout(30):
        while not predicate():
            await asyncio.sleep(0.002)


def mortal_runs(folder: Path, **fields: Any) -> Callable[..., aiorl.Config]:
    """Makes configurations of runs in folders of their own. Given `deaths`, their environments go wrong as
    `run_envs.Mortal` says."""
    count = itertools.count()

    def make(deaths: list[tuple[str, int]] | None = None, **changes: Any) -> aiorl.Config:
        number = next(count)
        made = {**fields, "out": str(folder / str(number))}
        if deaths is not None:
            marks = folder / f"marks {number}" / str(os.getpid())
            marks.mkdir(parents=True)
            made["env"] = "run_envs:Mortal"
            made["env_kwargs"] = {"marks": str(marks), "deaths": [list(d) for d in deaths], "length": 20}
        return aiorl.Config(**{**made, **changes})

    return make
