"""Killing worker processes for good, at chosen moments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, cast

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


async def until(predicate: Callable[[], Any]) -> None:
    """Wait for something that happens in another process and that nobody announces."""
    async with asyncio.timeout(30):
        while not predicate():
            await asyncio.sleep(0.002)
