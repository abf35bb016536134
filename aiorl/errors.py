"""Every error aiorl raises on purpose, as one tree.

    AiorlError
    ├── ConfigError          refused before any process starts (exit code 2)
    │   └── CheckpointError  a checkpoint or run directory that cannot be used
    ├── EnvError             an environment raised or broke its contract
    │   └── ReproductionError  an environment cannot be brought back to where it was
    ├── WorkerError          a worker process died, hung or never became ready
    ├── TrainingError        the learner failed or produced something unusable
    │   └── NonFiniteError   a loss, a gradient or a parameter is not finite; nothing was changed
    ├── StalledError         nothing in a run has moved for stall_timeout_s
    └── InvariantError       a promise of aiorl would have been broken: a bug in aiorl, please report it

A message says what was seen, what was expected and what to change, in three lines at most.
"""

from __future__ import annotations


class AiorlError(Exception):
    """Base of all errors raised by aiorl. `detail` holds a long text (a worker's traceback) or is empty."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class ConfigError(AiorlError):
    """The request cannot be carried out as written; nothing was started."""


class CheckpointError(ConfigError):
    """A checkpoint or run directory is missing, damaged, hostile or made for something else."""


class EnvError(AiorlError):
    """An environment raised an exception or broke its declared spaces."""


class ReproductionError(EnvError):
    """An environment that was to be brought back is not where it was: trying again would not help."""


class WorkerError(AiorlError):
    """A worker process died, missed a deadline or never became ready."""


class TrainingError(AiorlError):
    """The learner failed, or an update produced values that must not be used."""


class NonFiniteError(TrainingError):
    """An update would have made NaN or infinity. Who raises it has taken the learner back to where it was before.

    With `Config.on_nonfinite = "skip"` the run goes on without this update.
    """


class AbandonedError(AiorlError):
    """The run is being ended at once, so the learner has given up its update: nobody is waiting for it."""


class StalledError(AiorlError):
    """Nothing has moved for too long; `detail` is the table of who waits for whom."""


class InvariantError(AiorlError):
    """An internal promise (staleness bound, exactly-once accounting) would have been broken."""
