"""What `bench.against_sb3` found: a table, verdicts, curves, MinAtar's paper beside it, and the place in docs/results.md."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiorl.cli.text import plural
from aiorl.metrics.curve import Curve, Picture, Point, write_svg
from aiorl.metrics.svg import short_number
from bench.common import summarise
from bench.equivalence import Estimate, chance, iqm_difference, verdict
from bench.peers.learning import TASKS, Task

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- begin: written by bench/against_sb3.py -->", "<!-- end: written by bench/against_sb3.py -->"
PAPER_BEGIN, PAPER_END = (mark.replace("written", "MinAtar's paper, written") for mark in (BEGIN, END))
PAPER = {"MinAtar/Breakout-v1": (9.2, 10.0), "MinAtar/Asterix-v1": (7.1, 16.7)}  # after 1M and 5M frames: see the document
MARGIN = 0.05  # of scores, as for `learning_vs_degree`
NAMES = {
    "async": "aiorl, 2 workers",
    "twin": "aiorl, sequential",
    "mean": "aiorl, 2 workers, mean network",
    "qrdqn": "aiorl QR-DQN, 2 workers",
    "sb3": "Stable-Baselines3",
}
AGAINST = {"async": ("sb3", "twin"), "twin": ("sb3",), "mean": ("sb3",), "qrdqn": ("sb3",)}  # whom each is judged by

Row = dict[str, Any]
Groups = dict[tuple[str, int, str], list[Row]]
Pairs = Sequence[tuple[Row, Row]]


def final(row: Row) -> float:
    return row["evaluations"][-1][2]


def mean_height(row: Row) -> float:
    """Mean of all evaluations: how good the run was on its way."""
    return statistics.fmean(evaluation[2] for evaluation in row["evaluations"])


def alone(row: Row) -> bool:
    """Whether the run had the machine to itself: only then its times say something."""
    return row.get("side_by_side", 1) == 1


def timed(rows: Sequence[Row]) -> list[Row]:
    """Those whose times count: the runs made alone, or all where there is none."""
    return [row for row in rows if alone(row)] or list(rows)


def grouped(rows: Sequence[Row]) -> Groups:
    """(env, steps, who) to rows by seed, in the order of `NAMES` within an environment."""
    order = list(NAMES)
    found: Groups = {}
    for row in sorted(rows, key=lambda row: (row["env"], row["steps"], order.index(row["who"]), row["seed"])):
        found.setdefault((row["env"], row["steps"], row["who"]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each environment and participant, medians [ranges] over the seeds."""
    heads = ("environment", "who", "final return", "mean of all evaluations", "training s", "wall s", "env steps/s", "seeds")
    lines = [f"| {' | '.join(heads)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for (env, steps, who), group in grouped(rows).items():
        watched = timed(group)
        cells = [
            f"{env}, {steps:,}",
            NAMES[who],
            summarise([final(row) for row in group]).text(),
            summarise([mean_height(row) for row in group]).text(),
            summarise([row["train_s"] for row in watched]).text(0),
            summarise([row["wall_s"] for row in watched]).text(0),
            summarise([row["env_steps"] / row["train_s"] for row in watched]).text(0),
            f"{len(group)}{_crowd(group)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _crowd(group: Sequence[Row]) -> str:
    """What to know about the times of a group: empty if all its runs were made alone."""
    lonely, most = sum(map(alone, group)), max(row.get("side_by_side", 1) for row in group)
    if lonely == len(group):
        return ""
    return f" (times of the {lonely} made alone)" if lonely else f" ({most} at once)"


# -- verdicts ----------------------------------------------------------------------------------------------------------


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether aiorl has come as far as Stable-Baselines3, whether both its ways learn alike, and who is sooner.

    Only seeds that both sides have count. As far: medians of the final returns. Alike: the 95 % interval of the difference
    of the interquartile means of the final scores lies within `MARGIN`. Sooner: judged by runs that were made alone.
    """
    groups, lines = grouped(rows), list[str]()
    for env, steps, who in groups:
        for other in AGAINST.get(who, ()):
            if pairs := _pairs(groups, env, steps, who, other):
                judge = _at_least if other == "sb3" else _alike
                about = f"{env}, {NAMES[who]} against {NAMES[other]}, {plural(len(pairs), 'seed')}"
                found = [judge(TASKS[env], pairs), *_sooner(pairs), *_memory(pairs)]
                lines += [f"{mark}  {about}: {text}" for mark, text in found]
    return lines


def together(rows: Sequence[Row]) -> list[str]:
    """All comparisons of three seeds or more at once, where each alone has too few to tell (Agarwal et al. 2021)."""
    groups, lines = grouped(rows), list[str]()
    for who in (who for who, others in AGAINST.items() if "sb3" in others):
        compared = [(env, steps, _pairs(groups, env, steps, who, "sb3")) for env, steps, one in groups if one == who]
        enough = [each for each in compared if len(each[2]) > 2]
        tasks = [(TASKS[env], pairs) for env, _, pairs in enough]
        if len(tasks) > 1:
            where = ", ".join(f"{env}, {steps:,} ({len(pairs)})" for env, steps, pairs in enough)
            about = f"{NAMES[who]} against {NAMES['sb3']}, all that have three seeds or more together: {where}"
            lines.append(f"{about}: {_told(_difference(tasks, final), _difference(tasks, mean_height))}")
    return lines


def pooled(rows: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Whether both of aiorl's ways learn alike, by all runs of two files. On two machines, where numbers round otherwise, a
    seed makes two runs; how many episodes an evaluation has changes no run."""
    lines: list[str] = []
    files = [grouped(file) for file in (rows, others)]
    for env, steps, who in files[0]:
        found = [_pairs(file, env, steps, who, "twin") for file in files if who == "async" and (env, steps, who) in file]
        pairs = [pair for some in found for pair in some]
        if all(found) and len(found) == len(files):
            about = f"{env}, {steps:,}, {NAMES['async']} against {NAMES['twin']}, {len(pairs)} runs of each in both files"
            text = _told(*(_difference([(TASKS[env], pairs)], measure) for measure in (final, mean_height)))
            lines.append(f"{about}: {text}")
    return lines


def _difference(tasks: Sequence[tuple[Task, Pairs]], measure: Callable[[Row], float]) -> Estimate:
    """Of the interquartile means of the scores."""
    ours, theirs = ([[task.score(measure(pair[side])) for pair in pairs] for task, pairs in tasks] for side in (0, 1))
    return iqm_difference(ours, theirs)


def _told(found: Estimate, on_the_way: Estimate) -> str:
    text = f"IQM of the scores differs by {found.text()}, margin {MARGIN}: {verdict(found, MARGIN)}"
    return f"{text}; of all evaluations' means by {on_the_way.text()}"


def _pairs(groups: Groups, env: str, steps: int, who: str, other: str) -> Pairs:
    """Rows of the seeds that both have."""
    theirs = {row["seed"]: row for row in groups.get((env, steps, other), [])}
    return [(row, theirs[row["seed"]]) for row in groups[env, steps, who] if row["seed"] in theirs]


def _at_least(task: Task, pairs: Pairs) -> tuple[str, str]:
    ours, theirs = ([final(pair[side]) for pair in pairs] for side in (0, 1))
    mine, other = statistics.median(ours), statistics.median(theirs)
    by_chance = f"; means as far apart by chance: p = {chance(ours, theirs):.1g}" if len(pairs) > 2 else ""
    return _mark(mine >= other), f"final return {mine:,.1f} against {other:,.1f} (medians){by_chance}"


def _alike(task: Task, pairs: Pairs) -> tuple[str, str]:
    if len(pairs) < 2:
        return _mark(False), "one seed does not tell whether they learn alike"

    found, on_the_way = (_difference([(task, pairs)], measure) for measure in (final, mean_height))
    return _mark(verdict(found, MARGIN) == "equivalent"), _told(found, on_the_way)


def _sooner(pairs: Pairs) -> list[tuple[str, str]]:
    counted = [pair for pair in pairs if all(map(alone, pair))]
    if not counted:
        most = max(row.get("side_by_side", 1) for pair in pairs for row in pair)
        return [("open   ", f"runs were made {most} at once, each on a core of its own: this does not tell who is faster")]
    some = f" ({len(counted)} of them made alone)" if len(counted) < len(pairs) else ""
    found: list[tuple[str, str]] = []
    for key, name in (("train_s", "training"), ("wall_s", "wall time")):
        ratio = summarise([theirs[key] / ours[key] for ours, theirs in counted])
        found.append((_mark(ratio.median > 1), f"{name} {ratio.text(2)} times as fast{some}"))
    return found


def _memory(pairs: Pairs) -> list[tuple[str, str]]:
    """Of images only: elsewhere it is that of the libraries."""
    if TASKS[pairs[0][0]["env"]].frame_stack == 1:
        return []
    ours, theirs = (max(pair[side]["memory_mib"] for pair in pairs) for side in (0, 1))
    return [(_mark(ours <= theirs), f"the learner's process had {ours:,} MiB at most, the other {theirs:,}")]


def _mark(reached: bool) -> str:
    return "reached" if reached else "MISSED "


# -- curves and the document -------------------------------------------------------------------------------------------


def curves(rows: Sequence[Row]) -> list[tuple[str, Curve]]:
    """Label and curve of each participant in one environment: means of the seeds, with their deviation as the spread."""
    found: list[tuple[str, Curve]] = []
    for (env, _, who), group in grouped(rows).items():
        points = [_point(column) for column in zip(*(row["evaluations"] for row in group), strict=False)]
        end = (points[-1].env_steps, statistics.fmean(row["wall_s"] for row in group))
        curve = Curve(env=env, algo=TASKS[env].algo, evaluations=points, end=end)
        found.append((f"{NAMES[who]}, {plural(len(group), 'seed')}", curve))
    return found


def _point(evaluations: Sequence[Sequence[float]]) -> Point:
    """The same evaluation of all seeds."""
    steps, seconds, means, _ = zip(*evaluations, strict=True)
    return Point(statistics.fmean(steps), statistics.fmean(seconds), statistics.fmean(means), statistics.pstdev(means))


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Two pictures for each environment and length, over env steps and over time. Returns their paths."""
    paths: list[Path] = []
    for env, steps in sorted({(row["env"], row["steps"]) for row in rows}):
        those = [row for row in rows if (row["env"], row["steps"]) == (env, steps)]
        on_time = [row for group in grouped(those).values() for row in timed(group)]
        for axis, drawn in (("steps", those), ("time", on_time)):
            labels, lines = zip(*curves(drawn), strict=True)
            paths.append(directory / f"against_sb3-{env.replace('/', '-')}-{short_number(steps)}-{axis}.svg")
            write_svg(Picture(lines, labels), paths[-1], axis)
    return paths


def report(rows: Sequence[Row]) -> str:
    """Markdown: table, verdicts, and what was held equal in each environment."""
    lines = [table(rows), "", *(f"    {line}" for line in [*verdicts(rows), *together(rows)]), ""]
    lines += [f"* {env}: {text}." for env, text in sorted({(row["env"], row["settings"]) for row in rows})]
    return "\n".join(lines)


def beside_paper(rows: Sequence[Row]) -> str:
    """Markdown: the MinAtar paper's DQN, and the runs of the length that tasks have by themselves (medians over seeds)."""
    whos = ("async", "mean", "qrdqn", "sb3")
    heads = ("game", "paper, 1M frames", "paper, 5M frames", *(NAMES[who] for who in whos))
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    groups = grouped(rows)
    for env, figures in PAPER.items():
        found = [groups.get((env, TASKS[env].steps, who), []) for who in whos]
        lines.append(f"| {' | '.join([env, *map(str, figures), *map(_train_and_greedy, found)])} |")
    return "\n".join(lines)


def _train_and_greedy(group: Sequence[Row]) -> str:
    """Return of the last 100 training episodes, as in the paper, and of the greedy policy."""
    trained = [row["train_return"] for row in group if row.get("train_return") is not None]
    if not trained:
        return "not yet run"
    greedy = statistics.median(final(row) for row in group)
    return f"{statistics.median(trained):.1f} (greedy {greedy:.1f})"


def write(rows: Sequence[Row], document: Path = DOCUMENT) -> None:
    """Draw all rows and put report and paper between their marks in the document."""
    whole = document.read_text(encoding="utf-8")
    for begin, end in ((BEGIN, END), (PAPER_BEGIN, PAPER_END)):
        if begin not in whole or end not in whole:
            raise SystemExit(f"{document} has no place for this: expected {begin} and {end}")
    pictures = [f"![{path.stem}](img/{path.name})" for path in plot(rows, document.parent / "img")]
    whole = _between(whole, BEGIN, END, "\n".join([report(rows), "", *pictures]))
    document.write_text(_between(whole, PAPER_BEGIN, PAPER_END, beside_paper(rows)), encoding="utf-8")


def _between(whole: str, begin: str, end: str, text: str) -> str:
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", whole, flags=re.DOTALL)
