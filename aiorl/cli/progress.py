"""What a person (or a program) sees of a run while it goes: a live panel, plain lines, JSON lines, or nothing.

A display is a reader of events and knows nothing of the run. Progress goes to stderr, results and JSON to stdout.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Literal, Protocol

import msgspec

from aiorl.cli.text import count, fit, number, plural, rate, share, spread
from aiorl.events import (
    LOSS_RATE,
    WIN_RATE,
    AnyEvent,
    Checkpointed,
    CheckpointFailed,
    DegreeChanged,
    EpisodeAborted,
    Evaluated,
    EvaluationSkipped,
    Finished,
    Paused,
    Progress,
    Reevaluated,
    Resumed,
    SettingsChanged,
    Stalled,
    Standings,
    Started,
    Status,
    Warned,
    WorkerGivenUp,
    WorkerRestarted,
)

Mode = Literal["auto", "rich", "plain", "json", "none"]

PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines of progress."""

OPPONENTS_MAX = 8
"""So many opponents are named in a line; there may be a thousand."""


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """What a display shows and no event says. `warmup` is in env steps, `rollout` is how many one has at most."""

    preset: bool = False
    device: str = ""
    warmup: int | None = None
    rollout: int = 0


class Display(Protocol):
    """Shows events as they come. `close` is called once, whatever happened."""

    def show(self, event: AnyEvent) -> None: ...

    def say(self, line: str) -> None:
        """A line of text outside the run, such as what Ctrl-C will do."""
        ...

    def close(self) -> None: ...


def make_display(mode: Mode, notes: Notes, out: IO[str] | None = None, err: IO[str] | None = None) -> Display:
    """The display for `mode`; `auto` is rich on a terminal and plain lines elsewhere."""
    results: IO[str] = out or sys.stdout
    shown: IO[str] = err or sys.stderr
    if mode == "auto":
        mode = "rich" if shown.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    if mode == "rich":
        from aiorl.cli.panel import Panel

        return Panel(notes, shown)
    if mode == "json":
        return JsonLines(results, shown)
    return PlainLines(notes, shown) if mode == "plain" else Silent(shown)


class Silent:
    """Shows nothing but what must be said."""

    def __init__(self, err: IO[str]) -> None:
        self._err = err

    def show(self, event: AnyEvent) -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=self._err, flush=True)

    def close(self) -> None:
        pass


class JsonLines(Silent):
    """Every event as one JSON object a line on stdout."""

    def __init__(self, out: IO[str], err: IO[str]) -> None:
        super().__init__(err)
        self._out = out

    def show(self, event: AnyEvent) -> None:
        print(msgspec.json.encode(event).decode(), file=self._out, flush=True)


class PlainLines(Silent):
    """A line at every important event, and one of progress every few seconds."""

    def __init__(self, notes: Notes, err: IO[str], every_s: float = PLAIN_EVERY_S) -> None:
        super().__init__(err)
        self._notes = notes
        self._every_s = every_s
        self._last_s = 0.0

    def show(self, event: AnyEvent) -> None:
        if isinstance(event, Started):
            self.say(header(event, self._notes, 200))
        elif isinstance(event, Progress):
            if event.seconds - self._last_s >= self._every_s:
                self._last_s = event.seconds
                self.say(f"{stamp(event.seconds)} {progress_line(event.status, self._notes)}")
        elif (line := event_line(event)) is not None:
            self.say(f"{stamp(event.seconds)} {line}")


def stamp(seconds: float) -> str:
    return f"[{seconds:6.1f}s]"


def header(event: Started, notes: Notes, width: int) -> str:
    """`CartPole-v1 · ppo · preset · 2 workers × 2 groups of 8 · cpu · seed 0 → runs/…`, as much of it as fits."""
    in_workers = plural(event.workers, "worker") if event.workers else "in this process"
    groups = f"{plural(event.groups, 'group')} of {event.envs // max(1, event.groups)}"
    middle = [
        "preset" if notes.preset else "",
        f"{in_workers} × {groups}" if event.workers else f"{in_workers}, {groups}",
        notes.device,
        f"seed {event.seed}",
    ]
    parts = [event.env, event.algo, *(part for part in middle if part)]
    whole = f"{' · '.join(parts)} → {event.out}"
    return whole if len(whole) <= width else fit(parts, width)


def progress_line(status: Status, notes: Notes) -> str:
    """All that matters of a status in one line."""
    parts = [
        f"{count(status.env_steps)}/{count(status.total_steps)} steps ({share(fraction(status))})",
        f"{rate(status.env_steps_per_second)} steps/s",
        f"return {number(status.train_return_mean_100)}",
        f"evaluation {number(status.last_evaluation)}" if status.last_evaluation is not None else "",
        f"staleness {status.staleness_mean:.2f}",
        *experience(status),
        *opponents(status),
        state(status, notes),
    ]
    return ", ".join(part for part in parts if part)


def fraction(status: Status) -> float:
    """How much of the run is done, in [0, 1]."""
    return min(1.0, status.env_steps / max(1, status.total_steps))


def experience(status: Status) -> list[str]:
    """`1,234 episodes (48.0/s)`, and for a replay learner how much its buffer holds."""
    per_second = status.episodes / status.seconds if status.seconds > 0 else 0.0
    held = status.metrics.get("replay_size")
    return [f"{status.episodes:,} episodes ({rate(per_second)}/s)", *([] if held is None else [f"buffer {count(held)}"])]


def opponents(status: Status) -> list[str]:
    """In self-play: `weak 45 % – 20 %`, won and lost in training against each bot and the pool; its size and the rating."""
    told = status.metrics
    names = [name.removeprefix(WIN_RATE) for name in told if name.startswith(WIN_RATE)]
    rates = [f"{name} {share(told[WIN_RATE + name])} – {share(told.get(LOSS_RATE + name, 0.0))}" for name in names]
    size = [plural(int(told["pool_size"]), "snapshot")] if "pool_size" in told else []
    return [*rates[:OPPONENTS_MAX], *size, *([f"Elo {number(told['elo'])}"] if "elo" in told else [])]


def state(status: Status, notes: Notes) -> str:
    """The state in words; a warm-up says how far it is, also while the learner waits for data.

    Env steps are counted when their update is done: the one that ends the warm-up goes on with the count of the one before.
    """
    if status.gradient_steps or status.state not in ("warm-up", "waiting for data"):
        return status.state
    warmup, updating = notes.warmup or 0, status.state == "warm-up"
    if status.env_steps + notes.rollout * updating < warmup:
        return f"warm-up {count(status.env_steps)}/{count(warmup)}"
    return "first update" if updating and (warmup or not status.version) else status.state


def event_line(event: AnyEvent) -> str | None:
    """One line for an important event, None for one that needs none."""
    match event:
        case Evaluated():
            kind = f"{'final ' * event.final}evaluation{' ' * bool(event.suite)}{event.suite}"
            text = f"{kind} {spread(event.mean_return, event.std_return)} at {count(event.env_steps)} steps"
            return f"{text} ({plural(event.episodes, 'episode')}{_ended(event)}){', best so far' if event.best else ''}"
        case Reevaluated():
            text = f"version {event.version} again, with fresh episodes: {spread(event.mean_return, event.std_return)}"
            return f"{text} ({plural(event.episodes, 'episode')}{_ended(event)}){', best so far' if event.best else ''}"
        case EvaluationSkipped():
            return f"evaluation of version {event.version} left out: {event.reason}"
        case Checkpointed():
            return f"checkpoint ({event.kind}) {event.path}" if event.kind in ("periodic", "requested") else None
        case CheckpointFailed():
            return f"warning: no checkpoint could be written, training goes on: {event.reason}"
        case Paused():
            return f"paused at {count(event.env_steps)} steps"
        case Resumed():
            return "going on after the pause"
        case SettingsChanged():
            return "changed " + ", ".join(f"{name} = {value:g}" for name, value in event.changes.items())
        case DegreeChanged():
            return f"off_policy_degree {event.before} -> {event.degree} ({event.reason}): {event.detail}"
        case Standings():
            met = [one for one in event.opponents if one.wins is not None and one.losses is not None]
            each = [f"{one.name} {share(one.wins or 0)} – {share(one.losses or 0)}" for one in met[:OPPONENTS_MAX]]
            more = [f"{len(met) - OPPONENTS_MAX} more"] if len(met) > OPPONENTS_MAX else []
            return f"won – lost against {', '.join(each + more) or 'nobody yet'} (Elo {number(event.elo)})"
        case Warned():
            return f"warning: {event.message}"
        case WorkerRestarted():
            return f"{event.worker} is back after {event.seconds_down:.1f} s (restart {event.restarts}): it {event.reason}"
        case WorkerGivenUp():
            left = f"{event.heir} takes over its groups ({event.workers} left)"
            return f"{event.worker} is given up, {left}: it {event.reason}"
        case EpisodeAborted():
            what = f"episode {event.episode} of environment {event.env} aborted after {event.length} steps"
            return f"{event.worker}: {what} ({event.reason})"
        case Stalled():
            return f"nothing moves:\n{event.table}"
        case Finished():
            return event.status if event.error is None else None
        case _:
            return None


def _ended(event: Evaluated | Reevaluated) -> str:
    """`, won 55 %, lost 10 %` where the environment tells."""
    return "" if event.wins is None or event.losses is None else f", won {share(event.wins)}, lost {share(event.losses)}"
