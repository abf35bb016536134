"""What all tests share. Sizes and threads are set before anything imports NumPy or torch."""

from __future__ import annotations

import os

import pytest

from aiorl.testing.plugin import aiorl_no_leaks

# One compute thread: quicker for small networks, and tests do not take the cores from the worker processes.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "hide")  # as gymnasium sets it, whenever that is imported


no_leaks = aiorl_no_leaks  # the public fixture, under a shorter name


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started again without waiting for seconds before that, where the wait is not what is tested."""
    monkeypatch.setattr("aiorl.workers.supervision.BACK_OFF_S", (0.0, 0.02, 0.05))
