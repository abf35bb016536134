"""Named places where a test may let something go wrong; in production each costs one comparison.

`fault_point("publish.before")` does nothing until a test arms the points with `armed`. What is given to `armed` is then
called with the name of every point that is passed, on the thread that passes it: it may count, raise, or kill a worker.
`aiorl.testing.FaultPoints` does the usual and reports which points no test has passed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

POINTS = {
    "credit.before": "a segment is granted, its worker has not been asked for it",
    "arrival": "a doorbell has rung, nothing has been made of it",
    "update.before": "an update has begun on the books, not on the learner's thread",
    "publish.before": "the new weights are written, nobody knows of them",
    "publish.after": "the new weights can be had, the update is not committed",
    "booking": "an update is committed and about to be reported",
    "checkpoint.write": "a file of a checkpoint is written, the manifest does not name it",
    "checkpoint.manifest": "all files are there, the old manifest is about to be replaced",
}
"""Every point there is, and what is the case when it is passed."""

_passing: Callable[[str], None] | None = None


def fault_point(name: str) -> None:
    """Pass the point `name`, one of POINTS."""
    if _passing is not None:
        _passing(name)


@contextlib.contextmanager
def armed(passing: Callable[[str], None]) -> Iterator[None]:
    """Within the block `passing` is called at every point. One at a time: RuntimeError if the points are armed already."""
    global _passing  # a test arms all points there are, whoever passes them
    if _passing is not None:
        raise RuntimeError("the fault points are armed already")
    _passing = passing
    try:
        yield
    finally:
        _passing = None
