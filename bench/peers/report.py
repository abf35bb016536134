"""From measurements to tables, ratios and a verdict; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from bench.common import summarise
from bench.peers.lineup import EACH, EQUAL, LIMIT, ONE, WORKS, Entry
from bench.peers.works import SLOW_IDEAL

RATE, UPDATES, STEPS = "env_steps_per_s", "updates_per_s", "env_steps_to_target"
SECONDS, WITH_START = "seconds_to_target", "seconds_to_target_with_start_up"
METRICS = {
    RATE: ("env steps/s", 0),
    UPDATES: ("gradient steps/s", 0),
    SECONDS: ("seconds to target", 2),
    WITH_START: ("with start-up", 2),
    STEPS: ("env steps to target", 0),
}
DISTURBED = 0.9


class Row(NamedTuple):
    """One process. `start_s` is from its launch to the clock's start, `speed` that of this machine just before and after
    (millions of turns of an empty Python loop per second)."""

    round: int
    entry: Entry
    figures: dict[str, float | None]
    start_s: float
    wall_s: float
    speed: tuple[float, float]


Rows = Sequence[Row]


def values(rows: Rows, entry: Entry, metric: str) -> dict[int, float | None]:
    """By round; None where it was not reached."""
    return {row.round: row.figures[metric] for row in rows if row.entry == entry and metric in row.figures}


def reached(rows: Rows, entry: Entry, metric: str) -> list[float]:
    return [value for value in values(rows, entry, metric).values() if value is not None]


def ratios(rows: Rows, ours: Entry, other: Entry, metric: str) -> list[float]:
    """ours / other in each round that has both."""
    theirs = values(rows, other, metric)
    pairs = [(value, theirs.get(index)) for index, value in values(rows, ours, metric).items()]
    return [a / b for a, b in pairs if a is not None and b is not None]


def entries(rows: Rows, keep: Callable[[Entry], bool] = lambda _: True) -> list[Entry]:
    """In order of appearance in the line-up, each once."""
    return sorted({row.entry for row in rows if keep(row.entry)}, key=lambda e: (e.peer != "aiorl", e))


def same_kind(a: Entry, b: Entry) -> bool:
    """Whether both act at random, or neither."""
    return a.variant.endswith("random") == b.variant.endswith("random")


def primary(rows: Rows, other: Entry) -> Entry | None:
    """The row of aiorl that `other` is compared with: its first one that acts alike."""
    from bench.peers.lineup import LINEUP

    own = {row.entry for row in rows if row.entry.peer == "aiorl" and row.entry.kind != LIMIT}
    return next((e for e in LINEUP if e in own and same_kind(e, other)), None)


def table(work: str, rows: Rows) -> str:
    """Markdown: the rows of one work, best rate first."""
    metrics = [m for m in METRICS if any(m in row.figures for row in rows)]
    heads = [part for m in metrics for part in (METRICS[m][0], "aiorl / it")]
    lines = [f"| | how | {' | '.join(heads)} | start-up s |", f"|---|---|{'--:|' * (len(heads) + 1)}"]

    def speed(entry: Entry) -> float:
        found = reached(rows, entry, RATE) or reached(rows, entry, UPDATES)
        return median(found) if found else 0.0

    for entry in sorted(entries(rows), key=speed, reverse=True):
        cells = [entry.name, entry.kind]
        for metric in metrics:
            cells += [_value(rows, entry, metric), _ratio(rows, entry, metric)]
        start = summarise([row.start_s for row in rows if row.entry == entry])
        lines.append(f"| {' | '.join(cells)} | {start.median:.1f} |")
    return "\n".join([f"### {work.upper()}: {WORKS[work]}", "", f"Held equal: {EQUAL[work]}", "", *lines])


def _value(rows: Rows, entry: Entry, metric: str) -> str:
    found, count = reached(rows, entry, metric), len(values(rows, entry, metric))
    if not count:
        return ""
    parts = [summarise(found).text(METRICS[metric][1])] if found else []
    if len(found) < count:
        parts.append(f"{count - len(found)} of {count} not reached")
    return ", ".join(parts)


def _ratio(rows: Rows, entry: Entry, metric: str) -> str:
    ours = primary(rows, entry)
    if ours is None or ours == entry:
        return ""
    found = ratios(rows, ours, entry, metric)
    return summarise(found).text(2) if found else ""


class Verdict(NamedTuple):
    """A goal, what was measured, and whether that reaches it."""

    goal: str
    found: float
    reached: bool

    def line(self) -> str:
        return f"{'reached' if self.reached else 'MISSED '}  {self.found:6.2f}  {self.goal}"


def best(rows: Rows, among: Sequence[Entry], metric: str, pick: Any = max) -> Entry | None:
    """The entry with the best median."""
    found = {entry: median(v) for entry in among if (v := reached(rows, entry, metric))}
    return pick(found, key=found.__getitem__) if found else None


def verdicts(work: str, rows: Rows) -> list[Verdict]:
    """What aiorl sets out to reach in this work, as far as those it is compared with took part."""
    sampled = [row for row in rows if not row.entry.variant.endswith(("random", "numpy"))]
    peers = entries(sampled, lambda e: e.is_peer)
    own = next((e for e in (primary(sampled, p) for p in [*peers, *entries(sampled)]) if e), None)
    if own is None:
        return []

    def against(goal: str, other: Entry | None, metric: str, least: float | None = None, most: float = 0) -> list[Verdict]:
        found = ratios(sampled, own, other, metric) if other else []
        if not (found and other):
            return []
        ratio = median(found)
        return [Verdict(f"{goal}: {other.name}", ratio, ratio >= least if least is not None else ratio <= most)]

    if work == "w1":
        alone = best(sampled, [e for e in peers if e.kind == ONE], RATE)
        found = against("at least 2.5 times the best in one process", alone, RATE, 2.5)
        for entry in (e for e in peers if e.kind == EACH):
            found += against("at least 10 times one with a process per environment", entry, RATE, 10)
        return found
    if work == "w2":
        return [
            *against("at least 2 times the best rate", best(sampled, peers, RATE), RATE, 2.0),
            *against("at most half the time to 475 of the best", best(sampled, peers, SECONDS, min), SECONDS, most=0.5),
        ]
    if work in ("w3", "w4"):
        found = against("at least 1.3 times the best rate", best(sampled, peers, RATE), RATE, 1.3)
        for entry in entries(sampled, lambda e: e.kind == LIMIT):
            found += against("gradient steps/s at least 0.9 of the limit", entry, UPDATES, 0.9)
        return found
    top = best(sampled, entries(sampled, lambda e: e.peer == "aiorl"), RATE)
    share = median(reached(sampled, top, RATE)) / SLOW_IDEAL if top else 0.0
    return [Verdict(f"at least 0.95 of the ideal 3,200 env steps/s: {top.name}", share, share >= 0.95)] if top else []


def disturbed(rows: Rows) -> list[Row]:
    """Rows during which this machine was clearly slower than at its best: something else was running."""
    top = max((max(row.speed) for row in rows), default=0.0)
    return [row for row in rows if min(row.speed) < DISTURBED * top]


def raw(rows: Rows) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [{**row._asdict(), "entry": row.entry._asdict()} for row in rows]


def rows(raw_rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The inverse of `raw`."""
    return [
        Row(**{**row, "entry": Entry(**row["entry"]), "speed": (row["speed"][0], row["speed"][1])}) for row in raw_rows
    ]
