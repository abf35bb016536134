"""Who won how often against whom: a tournament's results as rows of text, as Markdown and as a heat map in SVG, and the
standings of self-play as a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import msgspec

from aiorl.errors import ConfigError
from aiorl.league import ITSELF
from aiorl.metrics.svg import label, style
from aiorl.tournament import Interval, Matrix, Score, pairs

MATCH_HEADING: list[str] = ["first", "second", "games", "won (95 %)", "tied", "lost", "return", "steps"]
CELL_W, CELL_H, TOP, MARGIN = 112, 64, 96, 20
CHAR = 7.2  # estimated width of a character of 13 pixels
LEAST_WIDTH = 560  # the lines of text need it
SNAPSHOTS = 12  # of standings, in a picture
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
    about = "share of games that the player on the left won, its 95 % interval, and tied – lost"
    players = list(zip(matrix.names, matrix.ratings(), strict=True))
    return _picture(title, about, players, matrix.names, matrix.cells)


class Table(msgspec.Struct, frozen=True):
    """What a picture shows of standings.json (see `aiorl.league.standings`)."""

    players: list[str]
    opponents: list[str]
    wins: list[list[float]]
    ties: list[list[float]]
    losses: list[list[float]]
    elo: dict[str, float]

    def __post_init__(self) -> None:
        shape = [len(self.opponents)] * len(self.players)
        if any([len(row) for row in counts] != shape for counts in (self.wins, self.ties, self.losses)):
            raise ValueError(f"expected {len(self.players)} rows of {len(self.opponents)} counts")
        if missing := {ITSELF, *self.players[1:]} - self.elo.keys():
            raise ValueError(f"elo.{min(missing)} is missing")


def write_standings(run: Path, path: Path, title: str) -> bool:
    """Draw the standings of a run directory. False, and no file, if it has none.

    Raises ConfigError if they are damaged or cannot be read.
    """
    try:
        table = msgspec.json.decode((run / "standings.json").read_bytes(), type=Table)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot read {run / 'standings.json'}: {error.strerror}") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{run / 'standings.json'} is damaged: {error}") from None
    path.write_text(draw_standings(table, title), encoding="utf-8")
    return True


def draw_standings(table: Table, title: str) -> str:
    """The SVG text: how the learner, and each snapshot when it was the learner, did against everybody; of snapshots the
    newest `SNAPSHOTS`."""
    old = set(table.players[1 : max(1, len(table.players) - SNAPSHOTS)])
    rows = [i for i, name in enumerate(table.players) if name not in old]
    columns = [j for j, name in enumerate(table.opponents) if name not in old]
    cells: dict[tuple[int, int], Score] = {}
    for a, i in enumerate(rows):
        for b, j in enumerate(columns):
            counts = table.wins[i][j], table.ties[i][j], table.losses[i][j]
            if any(counts):
                cells[a, b] = Score(*counts, math.nan, math.nan)
    players = [(table.players[i], table.elo[table.players[i] if i else ITSELF]) for i in rows]
    about = "share of training games won, its 95 % interval, and tied – lost; a snapshot's as it joined"
    return _picture(title, about, players, [table.opponents[j] for j in columns], cells)


def _picture(
    title: str, about: str, players: Sequence[tuple[str, float]], opponents: Sequence[str],
    cells: Mapping[tuple[int, int], Score],
) -> str:  # fmt: skip
    """A row for each player, with its rating, and a column for each opponent."""
    n = len(opponents)
    left = MARGIN + max(90.0, CHAR * max(len(name) for name, _ in players) + 16)
    width, height = max(LEAST_WIDTH, left + n * CELL_W + 80 + MARGIN), TOP + len(players) * CELL_H + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f"<style>{style()}</style>",
        f'<rect class="background frame" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="8"/>',
        _ink(MARGIN, 34, title, 16, "start", 600),
        label(MARGIN, 53, about),
        label(left + n * CELL_W + 40, TOP - 12, "Elo", "middle"),
        label(MARGIN, height - 16, "blue: more than half of the points (a tie is half a point); orange: fewer"),
    ]
    for i, name in enumerate(opponents):
        parts.append(_ink(left + (i + 0.5) * CELL_W, TOP - 12, _fitting(name), 13, "middle"))
    for i, (name, rating) in enumerate(players):
        y = TOP + (i + 0.5) * CELL_H
        parts.append(_ink(left - 12, y + 5, name, 13, "end"))
        parts.append(_ink(left + n * CELL_W + 40, y + 5, f"{rating:.0f}", 13, "middle"))
    for a in range(len(players)):
        for b in range(n):
            parts += _cell(cells.get((a, b)), left + b * CELL_W, TOP + a * CELL_H)
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
