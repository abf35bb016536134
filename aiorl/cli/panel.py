"""The live panel of a terminal, drawn with rich: a few lines below the permanent ones (evaluations, warnings)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from aiorl.cli.progress import Notes, event_line, experience, fraction, header, opponents, stamp, state
from aiorl.cli.text import count, duration, number, rate, share, sparkline, spread
from aiorl.events import (
    AnyEvent,
    Checkpointed,
    Evaluated,
    Finished,
    Progress,
    Standings,
    Started,
    Status,
    Updated,
    Warned,
    WorkerGivenUp,
    WorkerRestarted,
)

LABEL = 11
HISTORY = 512
_STATE_STYLES = {
    "training": "green", "evaluating": "green", "completed": "green", "warm-up": "yellow", "paused": "magenta",
    "pausing": "magenta", "stopping": "yellow", "stopped": "yellow", "failed": "bold red",
}  # fmt: skip

Piece = tuple[str, str]  # text, style


class Panel:
    """Redrawn at each `Progress`, a few times a second; no thread of its own, so it never competes with the run."""

    def __init__(self, notes: Notes, err: IO[str], console: Console | None = None) -> None:
        self.console = console or Console(file=err, highlight=False)
        self._notes = notes
        self._history: list[float] = []
        self._evaluated: Evaluated | None = None
        self._wins: dict[str, Evaluated] = {}  # by suite, where they are told
        self._status: Status | None = None
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self._live.update(Text("starting the workers …", style="dim"), refresh=True)

    def show(self, event: AnyEvent) -> None:
        if isinstance(event, Updated):
            if event.train_return_mean_100 is not None:
                self._remember(event.train_return_mean_100)
        elif isinstance(event, Progress):
            self._status = event.status
            self._draw()
        elif isinstance(event, Started):
            line = header(event, self._notes, self.console.width)
            self._print(Text(line, style="bold"))
            if event.out not in line:
                self._print(Text(f"→ {event.out}", style="bold"))
        elif (line := event_line(event)) is not None:
            if isinstance(event, Evaluated):
                self._evaluated = event if event.primary else self._evaluated
                self._wins |= {event.suite: event} if event.wins is not None else {}
            noted = isinstance(event, Warned | WorkerGivenUp | WorkerRestarted)
            style = "yellow" if noted else "dim" if isinstance(event, Checkpointed | Standings) else ""
            if not isinstance(event, Finished):
                text = Text.assemble((stamp(event.seconds), "dim"), " ", (line, style))
                self._print(text, cut=isinstance(event, Evaluated | Checkpointed | Standings))

    def say(self, line: str) -> None:
        self._print(Text(line, style="yellow"))

    def close(self) -> None:
        self._live.stop()

    def _print(self, text: Text, cut: bool = False) -> None:
        """A permanent line above the panel; `cut` to the terminal's width where its end matters least."""
        self.console.print(text, no_wrap=cut, overflow="ellipsis" if cut else "fold")

    def _remember(self, value: float) -> None:
        """Keep the whole course of the run in bounded space: when full, neighbours are merged."""
        self._history.append(value)
        if len(self._history) >= HISTORY:
            self._history = [(a + b) / 2 for a, b in zip(self._history[::2], self._history[1::2], strict=False)]

    def _draw(self) -> None:
        if self._status is not None:
            lines = draw(self._status, self._notes, self._history, self._evaluated, self.console.width, self._wins)
            self._live.update(Group(*lines), refresh=True)


def draw(
    status: Status, notes: Notes, history: Sequence[float], evaluated: Evaluated | None, width: int,
    wins: Mapping[str, Evaluated] = MappingProxyType({}),
) -> list[Text]:  # fmt: skip
    """The lines of the panel, none longer than `width`. `wins` has the last evaluation of each suite that tells outcomes."""
    room = width - LABEL
    words = state(status, notes)
    now: list[Piece] = [(words, _STATE_STYLES.get(words.partition(" ")[0], "cyan"))]
    if status.restarts:
        now.append((f"{status.restarts} restarts", "yellow"))
    if status.workers_given_up:
        now.append((f"{status.workers_given_up} workers given up", "yellow"))
    if status.dropped:
        now.append((f"dropped {sum(status.dropped.values()):,}", "yellow"))
    now.append((f"version {status.version:,}", "dim"))
    now += [(words, "dim") for words in experience(status)]
    lines = [
        _bar(status, width),
        _row("return", _return(status, history, room), room),
        _row("evaluation", _evaluation(status, evaluated), room),
        _row("won – lost", [(f"{suite} {_won(event)}".strip(), "cyan") for suite, event in wins.items()], room),
        _row("self-play", [(words, "") for words in opponents(status)], room),
        _row("staleness", _staleness(status), room),
        _row("busy", [(f"{name} {share(part)}", "") for name, part in status.busy.items()] + _lag(status), room),
        _row("state", now, room),
    ]
    return [line for line in lines if line.plain.strip()]


def _bar(status: Status, width: int) -> Text:
    """Progress bar with percentage, steps, speed and time left; what does not fit is left out from the right."""
    done = fraction(status)
    speed = status.env_steps_per_second
    left = duration((status.total_steps - status.env_steps) / speed) if speed > 0 else None
    tail = f" {100 * done:3.0f} % {count(status.env_steps)}/{count(status.total_steps)}"
    for extra in (f" · {rate(speed)} steps/s", f" · {left} left" if left else ""):
        if len(tail) + len(extra) + 12 <= width:
            tail += extra
    cells = max(4, width - len(tail))
    full = done * cells
    filled = "━" * int(full)
    half = "╸" if full - int(full) >= 0.5 and len(filled) < cells else ""
    rest = "━" * (cells - len(filled) - len(half))
    text = Text.assemble((filled + half, "green"), (rest, "bright_black"), (tail, ""))
    text.truncate(width)
    return text


def _return(status: Status, history: Sequence[float], room: int) -> list[Piece]:
    value = number(status.train_return_mean_100)
    line = sparkline(history, min(36, room - len(value) - 2))
    return [(f"{value}  {line}" if line else value, "cyan")]


def _evaluation(status: Status, evaluated: Evaluated | None) -> list[Piece]:
    if evaluated is None:
        return [] if status.last_evaluation is None else [(number(status.last_evaluation), "cyan")]
    pieces = [(spread(evaluated.mean_return, evaluated.std_return), "cyan")]
    if status.best_evaluation is not None:
        pieces.append((f"best {number(status.best_evaluation)}", ""))
    pieces.append((f"at {count(evaluated.env_steps)} steps", "dim"))
    return pieces


def _won(event: Evaluated) -> str:
    return f"{share(event.wins or 0.0)} – {share(event.losses or 0.0)}"


def _staleness(status: Status) -> list[Piece]:
    degree = status.off_policy_degree
    return [
        (f"mean {status.staleness_mean:.2f}", ""),
        (f"max {status.staleness_max}", ""),
        (f"degree {degree} (self-tuned)" if status.self_tuned else f"degree {degree}" if degree else "sequential", "dim"),
        (f"queue {status.queue}/{status.queue_bound}", ""),
    ]


def _lag(status: Status) -> list[Piece]:
    lag = status.event_loop_lag_ms.get("p99")
    return [] if lag is None else [(f"loop lag {lag:.1f} ms", "red" if lag > 5 else "dim")]


def _row(label: str, pieces: Sequence[Piece], room: int) -> Text:
    """A labelled line with as many of the pieces as fit."""
    if not pieces:
        return Text("")
    text = Text.assemble((label.ljust(LABEL), "bright_black"))
    used = 0
    for index, (words, style) in enumerate(pieces):
        separator = " · " if index else ""
        if used + len(separator) + len(words) > room and index:
            break
        text.append(separator, style="bright_black")
        text.append(words[: max(0, room)], style=style)
        used += len(separator) + len(words)
    return text
