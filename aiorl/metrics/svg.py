"""Draws learning curves as an SVG that looks right on light and dark pages (it brings its own background)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiorl.metrics.curve import Curve, Point

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 88, 56
LEGEND_ROW = 20

# Each with a darker shade for light pages and a lighter one for dark pages; told apart also by the colour-blind.
COLOURS = [
    ("#2563c9", "#6ea8ff"), ("#d1570b", "#ff9d5c"), ("#0f8a5f", "#4fd1a1"), ("#a23b9b", "#e28bdc"),
    ("#8a6d00", "#e3c34a"), ("#0b7f95", "#5cc8dc"), ("#b3263f", "#ff8196"), ("#5b5f6a", "#aab0bd"),
]  # fmt: skip

_INK = {
    "background": ("#ffffff", "#16181d"), "frame": ("#d5d9e0", "#343841"), "grid": ("#e9ecf1", "#272b33"),
    "ink": ("#1c2128", "#e8eaee"), "muted": ("#616975", "#9aa2af"), "goal": ("#3f7d20", "#8fd16a"),
}  # fmt: skip


RETURNS, WINS, RATES = "return", "episodes won", "training games won"
SUBTITLES = {
    WINS: "share of episodes won in evaluations ± one standard error",
    RATES: "share of games won in self-play, by opponent; old games fade",
}


def draw(
    curves: Sequence[Curve], x: str = "steps", labels: Sequence[str] = (), what: str = RETURNS, title: str = ""
) -> str:  # fmt: skip
    """The SVG text. A single curve of returns has colours for training and evaluation; else each has one of its own.

    Without a `title` each curve is taken to be of another run.
    """
    single = len(curves) == 1 and what == RETURNS
    entries = _legend_entries(curves, labels, single)
    rows = _legend_rows(entries)
    height = HEIGHT + LEGEND_ROW * (len(rows) - 1)
    plot = _Plot(curves, x, height - BOTTOM - LEGEND_ROW * len(rows), what)
    title = title or title_of(curves)
    subtitle = _subtitle(curves) if what == RETURNS else SUBTITLES.get(what, "of each update")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}: {escape(what)} over {'time' if x == 'time' else 'env steps'}</title>",
        f"<style>{style()}</style>",
        f'<rect class="background frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="ink" x="{LEFT}" y="32" font-size="17" font-weight="600">{escape(title)}</text>',
        f'<text class="muted" x="{LEFT}" y="51" font-size="12">{escape(subtitle)}</text>',
        *plot.axes(),
    ]
    for index, curve in enumerate(curves):
        parts += plot.curve(curve, index, single)
    parts += [*plot.goal(), *_legend(rows, height), "</svg>"]
    return "\n".join(parts) + "\n"


def nice_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def nice_times(end_s: float, about: int = 5) -> list[float]:
    """Ticks for [0, end_s] seconds at steps people use for time."""
    steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400]
    step = next((s for s in steps if s * about >= end_s), 86400.0 * math.ceil(end_s / about / 86400))
    return [round(i * step, 6) for i in range(int(end_s / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """1500 -> 1.5k, 2000000 -> 2M, 0.25 -> 0.25; 6e18, 1e−8 where there are no words for it."""
    size, unit = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if u[0] <= abs(value) < 1e12), (1.0, ""))
    digits, _, power = f"{value / size:.10g}".partition("e")
    return (f"{digits}e{int(power)}" if power else digits + unit).replace("-", "−")


def short_time(seconds: float, end_s: float) -> str:
    """In seconds, minutes or hours, whichever suits an axis that ends at `end_s`."""
    size, unit = (1.0, "s") if end_s < 120 else (60.0, "min") if end_s < 7200 else (3600.0, "h")
    return f"{round(seconds / size, 2):g} {unit}" if seconds else "0"


class _Plot:
    """Maps values to the plane and draws into it."""

    def __init__(self, curves: Sequence[Curve], x: str, bottom: float, what: str) -> None:
        self.curves, self.axis, self.bottom, self.what = curves, x, bottom, what
        self.show_time = len(curves) == 1 and x == "steps" and what == RETURNS
        self.top = TOP if self.show_time else TOP - 18
        self.x_end = max((c.end[1 if x == "time" else 0] for c in curves), default=0.0) or 1.0
        low, high = _value_range(curves)
        self.low, self.high = low, high

    def px(self, x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / self.x_end

    def py(self, y: float) -> float:
        return self.bottom - (self.bottom - self.top) * (y - self.low) / (self.high - self.low)

    def axes(self) -> list[str]:
        right = WIDTH - RIGHT
        parts: list[str] = []
        for y in nice_ticks(self.low, self.high):
            at = self.py(y)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(label(LEFT - 8, at + 4, short_number(y), anchor="end"))
        ticks = nice_times(self.x_end) if self.axis == "time" else nice_ticks(0, self.x_end)
        for x in ticks:
            at = self.px(x)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{self.bottom}" y2="{self.bottom + 5}"/>')
            name = short_time(x, self.x_end) if self.axis == "time" else short_number(x)
            parts.append(label(at, self.bottom + 19, name, anchor="middle"))
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        along = "wall time" if self.axis == "time" else "env steps"
        parts.append(label((LEFT + right) / 2, self.bottom + 37, along, anchor="middle"))
        parts.append(
            f'<text class="muted" font-size="12" text-anchor="middle" '
            f'transform="translate(18 {(self.top + self.bottom) / 2:.1f}) rotate(-90)">{escape(self.what)}</text>'
        )
        if self.show_time:
            parts += self._time_axis(self.curves[0])
        return parts

    def _time_axis(self, curve: Curve) -> list[str]:
        """When the run was where, along the upper edge."""
        points = sorted({(0.0, 0.0), curve.end, *((p.seconds, p.env_steps) for p in curve.smooth)} - {curve.end})
        points.append((curve.end[1], curve.end[0]))
        parts: list[str] = []
        last = -math.inf
        for seconds in nice_times(curve.end[1]):
            at = self.px(interpolate(points, seconds))
            if at - last < 48:
                continue
            last = at
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 5}" y2="{TOP}"/>')
            parts.append(label(at, TOP - 10, short_time(seconds, curve.end[1]), anchor="middle", size=11))
        return [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{TOP}" y2="{TOP}"/>', *parts]

    def curve(self, curve: Curve, index: int, single: bool) -> list[str]:
        train = f"c{index % len(COLOURS)}"
        evaluation = "c1" if single else train
        parts: list[str] = []
        if single:
            parts.append(self._line(curve.rollouts, f"line {train}", 'stroke-width="1" opacity="0.35"'))
        parts.append(self._band(curve.evaluations, evaluation, 0.18 if single else 0.10))
        parts.append(self._line(curve.smooth, f"line {train}", 'stroke-width="2"'))
        dashes = "" if single else 'stroke-dasharray="2 3" '
        parts.append(self._line(curve.evaluations, f"line {evaluation}", f'{dashes}stroke-width="1.6"'))
        for p in curve.evaluations:
            at = f'cx="{self.px(p.x(self.axis)):.1f}" cy="{self.py(p.value):.1f}"'
            parts.append(f'<circle class="dot {evaluation}" {at} r="3.4"/>')
        return [part for part in parts if part]

    def _line(self, points: Sequence[Point], css: str, extra: str) -> str:
        if len(points) < 2:
            return ""
        path = " ".join(f"{self.px(p.x(self.axis)):.1f},{self.py(p.value):.1f}" for p in points)
        return f'<polyline class="{css}" points="{path}" {extra}/>'

    def _band(self, points: Sequence[Point], css: str, opacity: float) -> str:
        if len(points) < 2 or not any(p.spread for p in points):
            return ""
        above = [(p.x(self.axis), p.value + p.spread) for p in points]
        below = [(p.x(self.axis), p.value - p.spread) for p in reversed(points)]
        limit: Callable[[float], float] = lambda y: min(max(y, self.low), self.high)  # noqa: E731
        path = " ".join(f"{self.px(x):.1f},{self.py(limit(y)):.1f}" for x, y in above + below)
        return f'<polygon class="area {css}" points="{path}" opacity="{opacity}"/>'

    def goal(self) -> list[str]:
        goals = sorted({c.goal for c in self.curves if c.goal is not None})
        parts: list[str] = []
        for goal in goals:
            at, right = self.py(goal), WIDTH - RIGHT
            parts.append(f'<line class="goal" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke-dasharray="6 4"/>')
            parts.append(
                f'<text class="goal-text" x="{LEFT + 6}" y="{at - 5:.1f}" font-size="11">goal {short_number(goal)}</text>'
            )
        return parts


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` on the line through `points` (sorted by their first number); constant outside."""
    after = bisect.bisect_left(points, (x, -math.inf))
    if after == 0 or after == len(points):
        return points[0 if after == 0 else -1][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y1 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _value_range(curves: Sequence[Curve]) -> tuple[float, float]:
    values = [p.value for c in curves for p in (*c.rollouts, *c.smooth)]
    values += [p.value + side * p.spread for c in curves for p in c.evaluations for side in (-1, 1)]
    values += [c.goal for c in curves if c.goal is not None]
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(1.0, abs(high) * 0.05)
    # Returns that are never negative get no axis below zero.
    return (0.0 if 0 <= low < 0.3 * high else low - margin), high + margin


def title_of(curves: Sequence[Curve]) -> str:
    """What the runs have in common, one curve for each."""
    if len(curves) == 1:
        return curves[0].title
    names = [sorted({getattr(c, key) for c in curves}) for key in ("env", "algo")]
    return " · ".join(values[0] if len(values) == 1 else f"{len(values)} {kind}" for values, kind in
                      zip(names, ("environments", "algorithms"), strict=True)) + f" · {len(curves)} runs"  # fmt: skip


def _subtitle(curves: Sequence[Curve]) -> str:
    if len(curves) > 1:
        return "lines: mean of the last 100 training episodes; dots: evaluations ± one standard deviation"
    curve = curves[0]
    text = f"{curve.end[0]:,.0f} env steps in {_duration(curve.end[1])}, off-policy degree {curve.off_policy_degree}"
    if curve.evaluations:
        last = curve.evaluations[-1]
        text += f", last evaluation {last.value:.1f} ± {last.spread:.1f}"
    return text.replace("-1", "−1") if curve.off_policy_degree < 0 else text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


Entry = tuple[str, str, str]  # mark (line, pale or dots), colour class, text


def _legend_entries(curves: Sequence[Curve], labels: Sequence[str], single: bool) -> list[Entry]:
    if single:
        entries = [("pale", "c0", "return of a rollout"), ("line", "c0", "mean of the last 100 episodes")]
        return [*entries, ("dots", "c1", "evaluation ± one std")] if curves[0].evaluations else entries
    names = labels or [c.title for c in curves]
    return [("dots", f"c{i % len(COLOURS)}", name) for i, name in enumerate(names)]


def _legend_rows(entries: Sequence[Entry]) -> list[list[tuple[float, Entry]]]:
    """Entries with their x, broken into rows by an estimate of the width of their text."""
    rows: list[list[tuple[float, Entry]]] = [[]]
    x = float(LEFT)
    for entry in entries:
        width = 44 + 6.6 * len(entry[2])
        if rows[-1] and x + width > WIDTH - RIGHT:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((x, entry))
        x += width
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, Entry]]], height: float) -> list[str]:
    parts: list[str] = []
    for index, row in enumerate(rows):
        y = height - 16 - LEGEND_ROW * (len(rows) - 1 - index)
        for x, (mark, css, text) in row:
            style = 'stroke-width="1" opacity="0.5"' if mark == "pale" else 'stroke-width="2"'
            parts.append(f'<line class="line {css}" x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" {style}/>')
            if mark == "dots":
                parts.append(f'<circle class="dot {css}" cx="{x + 11}" cy="{y - 4}" r="3.4"/>')
            parts.append(label(x + 28, y, text))
    return parts


def label(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    """A text in the muted colour."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text class="muted" {place}>{escape(text)}</text>'


def style() -> str:
    """Colours as CSS classes, once for light pages and again for dark ones."""

    def rules(shade: int) -> str:
        ink = {name: shades[shade] for name, shades in _INK.items()}
        css = (
            f".background{{fill:{ink['background']}}}.frame{{stroke:{ink['frame']}}}.grid{{stroke:{ink['grid']}}}"
            f".outline{{fill:none;stroke:{ink['grid']}}}.empty{{fill:{ink['grid']}}}"
            f".axis{{stroke:{ink['muted']}}}.ink{{fill:{ink['ink']}}}.muted{{fill:{ink['muted']}}}"
            f".goal{{stroke:{ink['goal']};stroke-width:1.3}}.goal-text{{fill:{ink['goal']}}}"
            f".dot{{stroke:{ink['background']}}}"
        )
        for index, shades in enumerate(COLOURS):
            css += f".line.c{index}{{stroke:{shades[shade]}}}.dot.c{index},.area.c{index}{{fill:{shades[shade]}}}"
        return css

    shape = ".line{fill:none;stroke-linejoin:round;stroke-linecap:round}"
    return f"{shape}{rules(0)}@media (prefers-color-scheme: dark){{{rules(1)}}}"
