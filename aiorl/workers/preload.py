"""Imported once by the fork server, so that every worker starts with these modules already in memory."""

from __future__ import annotations

import os

# Before NumPy is loaded: a worker acts on small batches, where more threads only take cores from the learner, and acting
# must round the same way in every process.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import gymnasium  # noqa: E402, F401
import numpy  # noqa: E402, F401

import aiorl.workers.program  # noqa: E402, F401
