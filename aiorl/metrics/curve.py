"""The learning curve of a run: read from its events, drawn as one self-contained SVG without any plotting library.

    write_curve("runs/CartPole-v1-ppo-0", "curve.svg")

The picture shows the training return (each rollout pale, the mean of the last 100 episodes solid), the evaluations with
a band of one standard deviation, and the return that the run was to reach. Several runs can share a picture. Another one,
`write_wins`, shows the share of episodes won in each evaluation suite, where the environment tells, `write_rates` that of
games won in self-play. `metrics_of` makes one of what is told of each update.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aiorl.errors import ConfigError
from aiorl.events import WIN_RATE
from aiorl.metrics.svg import RATES, RETURNS, WINS, draw, title_of

POINTS = 400
"""Most points a line is drawn with: more cannot be told apart at the size of the picture."""

TOLD = (
    "staleness", "staleness_in_queue", "off_policy_degree", "gradient_steps", "collect_seconds", "update_seconds",
    "waited_seconds", "episodes", "return_mean", "length_mean", "train_return_mean_100",
)  # fmt: skip
"""What every update tells besides its learner's metrics."""


class _Row(msgspec.Struct, frozen=True):
    """The fields of an event that a curve needs; whatever else the event has is skipped."""

    event: str
    seconds: float
    env_steps: int
    env: str = ""
    algo: str = ""
    seed: int = 0
    off_policy_degree: int = 0
    return_mean: float | None = None
    train_return_mean_100: float | None = None
    mean_return: float = 0.0
    std_return: float = 0.0
    primary: bool = True
    suite: str = ""
    episodes: int = 0
    wins: float | None = None
    staleness: int = 0
    staleness_in_queue: int = 0
    gradient_steps: int = 0
    collect_seconds: float = 0.0
    update_seconds: float = 0.0
    waited_seconds: float = 0.0
    length_mean: float | None = None
    metrics: dict[str, float | None] = {}


@dataclass(frozen=True)
class Point:
    """One value with both of its abscissae. `spread` is a standard deviation (0 where there is none)."""

    env_steps: float
    seconds: float
    value: float
    spread: float = 0.0

    def x(self, axis: str) -> float:
        return self.seconds if axis == "time" else self.env_steps


@dataclass
class Curve:
    """What a picture shows of one run: training returns by rollout and smooth, and evaluations with their spread.

    `wins` has the shares of episodes won by suite, each with its standard error, `rates` those of training games by
    opponent.
    """

    env: str = ""
    algo: str = ""
    seed: int = 0
    off_policy_degree: int = 0
    goal: float | None = None
    rollouts: list[Point] = field(default_factory=list["Point"])
    smooth: list[Point] = field(default_factory=list["Point"])
    evaluations: list[Point] = field(default_factory=list["Point"])
    wins: dict[str, list[Point]] = field(default_factory=dict[str, list["Point"]])
    rates: dict[str, list[Point]] = field(default_factory=dict[str, list["Point"]])
    end: tuple[float, float] = (0.0, 0.0)

    @property
    def title(self) -> str:
        return f"{self.env} · {self.algo} · seed {self.seed}"

    def thinned(self, axis: str) -> Curve:
        """A copy with at most `POINTS` points a line (each the mean of its neighbours along `axis`)."""
        return replace(self, rollouts=thin(self.rollouts, axis), smooth=thin(self.smooth, axis))


class Picture(NamedTuple):
    """Curves that are drawn together, each under its label (none for a single one); what their values are, and whose."""

    curves: Sequence[Curve]
    labels: Sequence[str] = ()
    what: str = RETURNS
    title: str = ""


def read_curve(source: str | Path | Iterable[Any], goal: float | None = None, metric: str | None = None) -> Curve:
    """The curve of a run directory, or of a sequence of events; with `metric` (see `metric_names`), of that instead.

    A run that was resumed goes on where its checkpoint was: points after it, which were done again, are left out.
    Raises ConfigError when the directory holds no events.
    """
    if isinstance(source, (str, Path)):
        directory = Path(source)
        rows, goal = _read_rows(directory), _read_goal(directory) if goal is None else goal
    else:
        rows = (msgspec.convert(event.to_dict(), _Row) for event in source)
    curve = Curve(goal=goal)
    shift = 0.0
    for row in rows:
        if row.event == "started":
            shift = _begin(curve, row)
        steps, seconds = float(row.env_steps), row.seconds + shift
        curve.end = (max(curve.end[0], steps), max(curve.end[1], seconds))
        if metric is not None:
            if (value := _told(row, metric)) is not None:
                curve.smooth.append(Point(steps, seconds, value))
        elif row.event == "updated":
            if row.return_mean is not None:
                curve.rollouts.append(Point(steps, seconds, row.return_mean))
            if row.train_return_mean_100 is not None:
                curve.smooth.append(Point(steps, seconds, row.train_return_mean_100))
            for name, value in row.metrics.items():
                if name.startswith(WIN_RATE) and value is not None:
                    curve.rates.setdefault(name.removeprefix(WIN_RATE), []).append(Point(steps, seconds, value))
        elif row.event == "evaluated":
            if row.primary:
                curve.evaluations.append(Point(steps, seconds, row.mean_return, row.std_return))
            if row.wins is not None:
                error = math.sqrt(row.wins * (1 - row.wins) / max(1, row.episodes))
                curve.wins.setdefault(row.suite, []).append(Point(steps, seconds, row.wins, error))
    for points in (curve.evaluations, *curve.wins.values()):
        points.sort(key=lambda point: point.env_steps)
    return curve


def write_curve(source: str | Path | Iterable[Any], path: str | Path, x: str = "steps") -> None:
    """Draw the curve of a run directory or of a sequence of events into an SVG file. `x` is "steps" or "time"."""
    write_svg(Picture([read_curve(source)]), path, x)


def write_wins(source: str | Path | Iterable[Any], path: str | Path, x: str = "steps") -> bool:
    """Draw the shares of episodes won, a line for each evaluation suite. False, and no file, if none has been told."""
    return _write(wins_of(read_curve(source)), path, x)


def write_rates(source: str | Path | Iterable[Any], path: str | Path, x: str = "steps") -> bool:
    """Draw the shares of training games won, a line for each opponent. False, and no file, if none has been told."""
    return _write(rates_of(read_curve(source)), path, x)


def _write(picture: Picture, path: str | Path, x: str) -> bool:
    if picture.curves:
        write_svg(picture, path, x)
    return bool(picture.curves)


def wins_of(curve: Curve) -> Picture:
    """The shares of episodes won in each evaluation suite; no curves if none has been told."""
    bare = replace(curve, goal=None, rollouts=[], smooth=[])
    lines = [replace(bare, evaluations=points) for points in curve.wins.values()]
    return Picture(lines, [suite or "evaluation" for suite in curve.wins], WINS, curve.title)


def rates_of(curve: Curve) -> Picture:
    """The shares of training games won against each opponent; no curves if none has been told."""
    bare = replace(curve, goal=None, rollouts=[], evaluations=[])
    return Picture([replace(bare, smooth=points) for points in curve.rates.values()], list(curve.rates), RATES, curve.title)


def metrics_of(runs: Sequence[tuple[str, str | Path]], metrics: Sequence[str]) -> Picture:
    """Metrics of the updates of several runs, each run under a label; only curves with points. Raises ConfigError."""
    lines: list[tuple[str, Curve]] = []
    of_each: list[Curve] = []
    for label, run in runs:
        found = {metric: replace(read_curve(run, metric=metric), goal=None) for metric in metrics}
        drawn = {metric: curve for metric, curve in found.items() if curve.smooth}
        of_each += list(drawn.values())[:1]
        names = {metric: [label] * (len(runs) > 1) + [metric] * (len(metrics) > 1) for metric in drawn}
        lines += [(" · ".join(names[metric]) or metric, curve) for metric, curve in drawn.items()]
    what = ", ".join(metrics)
    return Picture([curve for _, curve in lines], [name for name, _ in lines], what, title_of(of_each) if lines else "")


def metric_names(source: str | Path) -> list[str]:
    """What the updates of a run tell, its learner's metrics first; nothing before the first one. Raises ConfigError."""
    told = [row.metrics for row in _read_rows(Path(source)) if row.event == "updated"]
    return [*sorted({name for metrics in told for name in metrics}), *TOLD] if told else []


def write_svg(picture: Picture, path: str | Path, x: str = "steps") -> None:
    """Draw it into one SVG file. `x` is "steps" or "time"."""
    curves = [curve.thinned(x) for curve in picture.curves]
    Path(path).write_text(draw(curves, x, picture.labels, picture.what, picture.title), encoding="utf-8")


def thin(points: Sequence[Point], axis: str, most: int = POINTS) -> list[Point]:
    """At most `most` points: the means of equal slices of the axis. Few points are returned as they are."""
    if len(points) <= most:
        return list(points)
    first, last = points[0].x(axis), points[-1].x(axis)
    width = (last - first) / most or 1.0
    bins: dict[int, list[Point]] = {}
    for point in points:
        bins.setdefault(min(most - 1, int((point.x(axis) - first) / width)), []).append(point)
    return [_mean(bins[index]) for index in sorted(bins)]


def _mean(points: Sequence[Point]) -> Point:
    n = len(points)
    return Point(sum(p.env_steps for p in points) / n, sum(p.seconds for p in points) / n, sum(p.value for p in points) / n)


def _begin(curve: Curve, row: _Row) -> float:
    """Take the run's name; at a resume also cut what was done again. Returns what to add to later seconds."""
    curve.env, curve.algo, curve.seed = row.env, row.algo, row.seed
    curve.off_policy_degree = row.off_policy_degree
    if not curve.end[1]:
        return 0.0
    for name in ("rollouts", "smooth", "evaluations"):
        setattr(curve, name, [p for p in getattr(curve, name) if p.env_steps <= row.env_steps])
    for named in (curve.wins, curve.rates):
        for name, points in named.items():
            named[name] = [p for p in points if p.env_steps <= row.env_steps]
    known = [p.seconds for p in (*curve.rollouts, *curve.smooth, *curve.evaluations)]
    curve.end = (float(row.env_steps), max(known, default=0.0))
    return max(0.0, curve.end[1] - row.seconds)


def _told(row: _Row, metric: str) -> float | None:
    """What an update says under this name; None for another event."""
    if row.event != "updated":
        return None
    return row.metrics.get(metric, getattr(row, metric) if metric in TOLD else None)


def _read_rows(directory: Path) -> Iterator[_Row]:
    path = directory / "events.jsonl"
    try:
        if not path.is_file():
            raise ConfigError(f"{directory} is not a run directory: it has no events.jsonl")
        lines = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    decode = msgspec.json.Decoder(_Row).decode
    with lines:
        for line in lines:
            try:
                yield decode(line)
            except (msgspec.DecodeError, msgspec.ValidationError):
                continue  # the line a killed run was writing


def _read_goal(directory: Path) -> float | None:
    """The return that the run was measured by: from its summary, or while it has none from its configuration."""
    for name, key, decode in (("summary.json", "stop_return", json.loads), ("config.toml", "stop_at", tomllib.loads)):
        try:
            value = decode((directory / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(value, (int, float)):
            return float(value)
    return None
