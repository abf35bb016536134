"""Carries one Run from start to end for the command line: event loop, signals, display, curve, summary, exit code.

The library sets no signal handler and chooses no event loop; this file does both, because here the process is ours.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aiorl.cli import FAILED, INTERRUPTED, TERMINATED
from aiorl.cli.progress import Display, Mode, Notes, make_display
from aiorl.cli.summary import summary_lines
from aiorl.config import Config
from aiorl.errors import AiorlError, ConfigError
from aiorl.events import AnyEvent, Checkpointed, CheckpointFailed
from aiorl.metrics.curve import read_curve, write_curve, write_rates, write_wins
from aiorl.metrics.matrix import write_standings
from aiorl.run import Run

T = TypeVar("T")

SAME_REQUEST_S = 0.3
"""Signals that come so close after each other are one request: `timeout`, say, signals a program and then its group."""

GRACE_S = 5.0
"""How long leaving may take after a second Ctrl-C before the process simply ends (its workers notice that)."""

JSON_KEEP = 1 << 16
"""Frequent events kept for a slow reader of JSON lines; a display has no use for old ones."""


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def carry_out(config: Config, mode: Mode, *, preset: bool = False, resume: str | Path | None = None) -> int:
    """Train to the end; returns the exit code. Raises what made the run fail, `log` set to the traceback's file."""
    return run_async(_carry_out(config, mode, preset, resume))


async def _carry_out(config: Config, mode: Mode, preset: bool, resume: str | Path | None) -> int:
    run = Run(config, resume=resume)
    display = make_display(mode, notes_for(config, preset))
    signals = Signals(display.say)
    try:
        with signals:
            async with run:
                signals.run = run
                run.when_stuck(lambda: os._exit(FAILED))  # the loop is blocked for good: nobody else can end this process
                await _follow(run, display, mode, signals)
    except asyncio.CancelledError:
        if signals.code is None:
            raise
        if not signals.saved:
            display.say("ended at once: what was not saved is lost")
            return signals.code
        display.say("everything is saved; the evaluation under way was cut off")
    except Exception as error:
        if not isinstance(error, ConfigError):
            _keep_traceback(error, run)
        raise
    finally:
        display.close()
        _draw_curve(run, display)
    out = sys.stderr if mode == "json" else sys.stdout
    print("\n".join(summary_lines(msgspec.to_builtins(run.result), run.directory)), file=out, flush=True)
    return signals.code or 0


async def _follow(run: Run, display: Display, mode: Mode, signals: Signals) -> None:
    async for event in run.events(JSON_KEEP if mode == "json" else 256):
        display.show(event)
        signals.note(event)
    await run.wait()


def notes_for(config: Config, preset: bool) -> Notes:
    warmup = config.warmup if config.warmup is not None else getattr(config.algorithm, "warmup", None)
    device = "" if config.device == "auto" else config.device
    return Notes(preset=preset, device=device, warmup=warmup, rollout=config.steps_per_rollout)


class Signals:
    """Ctrl-C and SIGTERM: the first stops the run in good order, the second ends it at once. SIGUSR1 saves.

    `code` is the exit code of the signal that came, or None. A signal before the workers are ready ends at once: there
    is nothing to save yet. Good order must not take longer than `shutdown_timeout_s` either. `saved` says whether there
    is nothing to save any more.
    """

    def __init__(self, say: Callable[[str], None], end: Callable[[int], None] = os._exit) -> None:
        self.code: int | None = None
        self.run: Run | None = None
        self.saved = self._failed = False
        self._say, self._end = say, end
        self._task: asyncio.Task[Any] | None = None
        self._checkpoints: set[asyncio.Task[Any]] = set()
        self._handled: list[signal.Signals] = []
        self._leaving = False
        self._asked_s = -math.inf
        self._deadline: asyncio.TimerHandle | None = None

    def __enter__(self) -> Signals:
        self._task = asyncio.current_task()
        for name, action in self._actions().items():
            number = getattr(signal, name, None)
            if number is None:
                continue  # Windows has no SIGUSR1
            with suppress(NotImplementedError):  # nor signal handlers in its event loop: there Ctrl-C cancels the run
                asyncio.get_running_loop().add_signal_handler(number, action)
                self._handled.append(number)
        return self

    def __exit__(self, *_: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for number in self._handled:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _actions(self) -> dict[str, Callable[[], None]]:
        return {
            "SIGINT": lambda: self._stop(INTERRUPTED),
            "SIGTERM": lambda: self._stop(TERMINATED),
            "SIGUSR1": self._checkpoint,
        }

    def note(self, event: AnyEvent) -> None:
        """See from the events whether all is saved: `final/` is written last, after what a resumed run goes on from."""
        if isinstance(event, CheckpointFailed):
            self._failed = True
        elif isinstance(event, Checkpointed):
            self.saved = Path(event.path).name == "final" and not self._failed
            self._failed = False

    def _stop(self, code: int) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._asked_s < SAME_REQUEST_S:
            return
        self._asked_s = now_s
        if self._leaving:
            self._end(self.code or code)
        if self.code is None and self.run is not None:
            self.code = code
            self.run.stop(final_evaluation=False)
            self._say("stopping: the update in progress is finished and saved (Ctrl-C again ends at once)")
            self._deadline = asyncio.get_running_loop().call_later(self.run.config.shutdown_timeout_s, self._leave)
            return
        self.code = self.code or code
        self._leave()

    def _leave(self) -> None:
        """End at once."""
        assert self.code is not None
        self._leaving = True
        last_resort = threading.Timer(GRACE_S, self._end, [self.code])
        last_resort.daemon = True
        last_resort.start()
        if self._task is not None:
            self._task.cancel()

    def _checkpoint(self) -> None:
        if self.run is not None:
            task = asyncio.ensure_future(_saved(self.run, self._say))
            self._checkpoints.add(task)
            task.add_done_callback(self._checkpoints.discard)


async def _saved(run: Run, say: Callable[[str], None]) -> None:
    """A checkpoint on request; the event that follows says where it is, and a failure must not end the run."""
    try:
        await run.checkpoint()
    except (AiorlError, OSError, RuntimeError) as error:
        say(f"no checkpoint: {error}")


def _directory(run: Run) -> Path | None:
    """Where the run writes, or None if it was refused before that was settled."""
    try:
        return run.directory
    except RuntimeError:
        return None


def _keep_traceback(error: Exception, run: Run) -> None:
    """Put the path of the whole story on the error, for the last line of the message; tell the story if nobody has."""
    directory = _directory(run)
    if directory is None or not directory.is_dir():
        return
    path = directory / "error.txt"
    try:
        if not path.exists():
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        error.log = f"traceback: {path}"  # type: ignore[attr-defined]
    except OSError:
        return


def _draw_curve(run: Run, display: Display) -> None:
    """The picture is made of whatever there is, also after a failure; it is never a reason to fail."""
    directory = _directory(run)
    if directory is None or not (directory / "events.jsonl").is_file():
        return
    try:
        write_curve(directory, directory / "curve.svg")
        write_wins(directory, directory / "wins.svg")
        write_rates(directory, directory / "opponents.svg")
        write_standings(directory, directory / "standings.svg", read_curve(directory).title)
    except (OSError, AiorlError) as error:
        display.say(f"no curve.svg: {error}")
