"""A tournament's results as rows of text, as Markdown, and as a heat map in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from aiorl.metrics.svg import label, style
from aiorl.tournament import Interval, Matrix, Score, pairs

MATCH_HEADING: list[str] = ["first", "second", "games", "won (95 %)", "tied", "lost", "return", "steps"]
CELL_W, CELL_H, TOP, MARGIN = 112, 64, 96, 20
CHAR = 7.2  # estimated width of a character of 13 pixels
LEAST_WIDTH = 560  # the lines of text need it
STRONGEST = 0.6  # opacity of a cell with all points: text stays legible on it


def share(value: float, interval: Interval) -> str:
    """0.13 (0.08–0.21)"""
    return f"{value:.2f} ({interval[0]:.2f}–{interval[1]:.2f})"


def match_rows(matrix: Matrix) -> list[list[str]]:
    """A heading and a row for each match, from the side of its first player."""
    rows = [MATCH_HEADING]
    for a, b in pairs(len(matrix.names)):
        if (a, b) in matrix.cells:
            cell, other = matrix.cells[a, b], matrix.cells[b, a]
            shares = [share(value, interval) for value, interval in zip(cell.shares, cell.intervals, strict=True)]
            returns = f"{cell.mean_return:.1f} : {other.mean_return:.1f}"
            rows.append([matrix.names[a], matrix.names[b], str(cell.games), *shares, returns, f"{cell.mean_length:.0f}"])
    return rows


def matrix_rows(matrix: Matrix) -> list[list[str]]:
    """A heading and a row for each player: the share of games it won against each other one, and its rating."""
    n, ratings = len(matrix.names), matrix.ratings()
    rows = [["won against", *matrix.names, "Elo"]]
    for a in range(n):
        cells = [matrix.cells.get((a, b)) for b in range(n)]
        rows.append([matrix.names[a], *(f"{c.shares[0]:.2f}" if c else "–" for c in cells), f"{ratings[a]:.0f}"])
    return rows


def markdown(matrix: Matrix) -> str:
    """Both tables."""
    return f"{_table(matrix_rows(matrix), 1)}\n{_table(match_rows(matrix), 2)}"


def _table(rows: Sequence[Sequence[str]], names: int) -> str:
    """`names`: how many columns come before those that are flush right."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    rule = " | ".join(["---"] * names + ["--:"] * (len(rows[0]) - names))
    return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))


def draw(matrix: Matrix, title: str) -> str:
    """The SVG text: in each row how a player did against those above, bluer the more points it took, else more orange."""
    n = len(matrix.names)
    left = MARGIN + max(90.0, CHAR * max(map(len, matrix.names)) + 16)
    width, height = max(LEAST_WIDTH, left + n * CELL_W + 80 + MARGIN), TOP + n * CELL_H + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f"<style>{style()}</style>",
        f'<rect class="background frame" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="8"/>',
        _ink(MARGIN, 34, title, 16, "start", 600),
        label(MARGIN, 53, "share of games that the player on the left won, its 95 % interval, and tied – lost"),
        label(left + n * CELL_W + 40, TOP - 12, "Elo", "middle"),
        label(MARGIN, height - 16, "blue: more than half of the points (a tie is half a point); orange: fewer"),
    ]
    for i, (name, rating) in enumerate(zip(matrix.names, matrix.ratings(), strict=True)):
        x, y = left + (i + 0.5) * CELL_W, TOP + (i + 0.5) * CELL_H
        parts.append(_ink(x, TOP - 12, _fitting(name), 13, "middle"))
        parts.append(_ink(left - 12, y + 5, name, 13, "end"))
        parts.append(_ink(left + n * CELL_W + 40, y + 5, f"{rating:.0f}", 13, "middle"))
    for a in range(n):
        for b in range(n):
            parts += _cell(matrix.cells.get((a, b)), left + b * CELL_W, TOP + a * CELL_H)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(score: Score | None, x: float, y: float) -> list[str]:
    """The rectangle with its corner at (x, y), and what is written on it."""
    place = f'x="{x + 2:.1f}" y="{y + 2:.1f}" width="{CELL_W - 4}" height="{CELL_H - 4}" rx="5"'
    if score is None:
        return [f'<rect class="empty" {place}/>']
    win, tie, loss = score.shares
    low, high = score.intervals[0]
    lead = 2 * score.points / score.games - 1
    middle = x + CELL_W / 2
    return [
        f'<rect class="area c{0 if lead >= 0 else 1}" opacity="{abs(lead) * STRONGEST:.3f}" {place}/>',
        f'<rect class="outline" {place}/>',
        _ink(middle, y + 24, f"{win:.2f}", 17, "middle", 600),
        label(middle, y + 39, f"{low:.2f}–{high:.2f}", "middle", 11),
        label(middle, y + 54, f"{tie:.2f} – {loss:.2f}", "middle", 11),
    ]


def _fitting(name: str) -> str:
    most = int(CELL_W / CHAR)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _ink(x: float, y: float, text: str, size: int, anchor: str, weight: int = 400) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text class="ink" {place}>{escape(text)}</text>'
