"""Root passes over permissions; these tests are about people whom they bind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_VERSION_3 = 0x20080522
_PASSES_OVER_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def without(path: Path, mode: int = 0) -> Iterator[None]:
    """`path` with these permissions, which bind this thread also if it is root's."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with _bound():
            yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def _bound() -> Iterator[None]:
    if os.geteuid():
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("permissions do not bind root")
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    effective = data[0]
    data[0] = effective & ~_PASSES_OVER_PERMISSIONS
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = effective
        libc.capset(header, data)
