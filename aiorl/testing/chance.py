"""Watching the generators that all code of a process shares, to see who uses them. Nothing here draws or seeds."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def _states() -> dict[str, str]:
    """A fingerprint of each global generator that is loaded, by its name."""
    kind, keys, position, *rest = np.random.get_state(legacy=True)
    states = {
        "random": repr(random.getstate()).encode(),
        "numpy.random": repr((kind, position, rest)).encode() + np.asarray(keys).tobytes(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = torch.get_rng_state().numpy().tobytes()
    return {name: hashlib.sha256(state).hexdigest() for name, state in states.items()}


@contextmanager
def watched(used: set[str]) -> Iterator[None]:
    """Add the names of global generators that the block changes to `used`."""
    before = _states()
    yield
    after = _states()
    used.update(name for name in before if after[name] != before[name])
