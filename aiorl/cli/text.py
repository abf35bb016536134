"""Numbers, durations and little graphs as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
TINY = 1e-3  # three decimals do not show what is smaller


def number(value: float | None, digits: int = 1) -> str:
    """412.3; fewer digits for large values, more for small ones, a dash for none."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if 0 < abs(value) < TINY:
        return f"{value:.3g}"
    if abs(value) >= 10_000:
        digits = 0
    elif 0 < abs(value) < 1:
        digits = 3
    return f"{value:z,.{digits}f}"


def count(value: float) -> str:
    """12,345 up to 99,999, then 123k, 1.23M."""
    if abs(value) < 100_000:
        return f"{value:,.0f}"
    digits, unit = _scaled(value, (1e3, "k", 0), (1e6, "M", 2), (1e9, "G", 2))
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def rate(per_second: float) -> str:
    """Steps per second: 812, 9.7k, 33.0k, 1.20M."""
    return "".join(_scaled(per_second, (1.0, "", 0 if per_second >= 10 else 1), (1e3, "k", 1), (1e6, "M", 2)))


def _scaled(value: float, *units: tuple[float, str, int]) -> tuple[str, str]:
    """Digits and unit: the first of `units` (size, name, decimals) in which it is less than 1000 once it is rounded."""
    shown = [(f"{value / size:.{decimals}f}", name) for size, name, decimals in units]
    return next((text for text in shown if abs(float(text[0])) < 1000), shown[-1])


def duration(seconds: float) -> str:
    """0:07, 12:05, 1:02:03, 2d 03:04."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def share(part: float) -> str:
    return f"{100 * part:.0f} %"


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def spread(mean: float, std: float) -> str:
    """475.0 ± 12.3, both with as many digits as the mean is given."""
    if 0 < max(abs(mean), std) < TINY:
        return f"{mean:.3g} ± {std:.3g}"
    digits = 0 if abs(mean) >= 10_000 else 3 if max(abs(mean), std) < 1 else 1
    return f"{mean:z,.{digits}f} ± {std:,.{digits}f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` in at most `width` characters; neighbours share one when there are more of them."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or width < 1:
        return ""
    if len(finite) > width:
        edges = [len(finite) * i // width for i in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(finite), max(finite)
    span = high - low
    if not 0 < span < math.inf:
        return BARS[0] * len(finite)
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in finite)


def fit(parts: Sequence[str], width: int, separator: str = " · ") -> str:
    """As many of `parts` as fit into `width`, the first ones first; empty ones are left out."""
    kept = [p for p in parts if p]
    while len(kept) > 1 and len(separator.join(kept)) > width:
        kept.pop()
    line = separator.join(kept)
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows in aligned columns, the first one being the heading; columns in `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def oneline(text: str, width: int = 160) -> str:
    """The first line of a text, cut to `width`."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= width else line[: width - 1] + "…"
