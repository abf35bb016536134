"""The plain sequential loop that says what a run means: see `aiorl.testing.plain_loop`."""

from __future__ import annotations

from aiorl.testing.plain_loop import plain_loop

__all__ = ["plain_loop"]
