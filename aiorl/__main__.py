"""`python -m aiorl`: the command line. This process is the program's own, so what belongs to a process is set here."""

from __future__ import annotations

import io
import os
import sys
import threading


def limit_threads() -> None:
    """One BLAS thread unless the user says otherwise; has to happen before NumPy is imported.

    Acting in this process (`--workers 0`) must give the same bits as in the workers, which have one thread each, and
    busy workers need the cores that idle BLAS threads would spin on.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def mend_streams() -> None:
    """What is printed is never a reason to fail: a stream that was closed leads nowhere, and signs that the terminal's
    encoding does not have are shown as `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order each gets its own descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for good)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main() -> int:
    """Run the command that this process was started with; returns the exit code."""
    mend_streams()
    limit_threads()
    # The event loop waits at most this long for the learner thread to let go of the interpreter (default: 5 ms).
    sys.setswitchinterval(0.0005)
    from aiorl.cli import main as cli

    code = cli(sys.argv[1:])
    _end_if_busy(code)
    return code


def _end_if_busy(code: int) -> None:
    """End here and now if a thread of a run that was given up is still busy, say importing torch: C++ that is run into by
    Python's own end calls abort()."""
    if any(thread.daemon and thread.name.startswith("aiorl-") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
