"""`python -m aiorl plot RUN…`: learning curves as SVG (no plotting library needed) or PNG (with matplotlib)."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiorl.cli.flags import Parser
from aiorl.errors import ConfigError
from aiorl.metrics.curve import Curve, Picture, metric_names, metrics_of, rates_of, read_curve, wins_of, write_svg
from aiorl.metrics.matrix import write_standings
from aiorl.metrics.svg import COLOURS, RETURNS, short_number, title_of

AXES = ("steps", "time")
WIDTH = 390
"""Of each of the two lines that an error has room for; longer ones would be cut off."""

NO_WINS = "no evaluation says how its episodes ended\n  the environment has to: info['outcome']"
NO_RATES = "no update tells of games won\n  it is drawn for self-play: --algo selfplay"
NO_STANDINGS = "there is no standings.json\n  runs of self-play have one: --algo selfplay"
ONE_RUN: dict[str, tuple[Callable[[Curve], Picture], str]] = {"wins": (wins_of, NO_WINS), "opponents": (rates_of, NO_RATES)}
"""Pictures that there are of a single run: what makes them, and why there may be nothing to draw."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("plot", "Draw the learning curves of runs into one picture.", "RUN… [--x steps|time] [--out FILE]")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories")
    parser.add_argument("--x", metavar="|".join(AXES), help="what lies along the picture (default: steps)")
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="what updates say (a column of metrics.csv) instead of returns; may be given several times",
    )  # fmt: skip
    parser.add_argument("--wins", action="store_true", help="of one run, the shares of episodes won in evaluations")
    parser.add_argument("--opponents", action="store_true", help="of one run, the shares of training games won in self-play")
    parser.add_argument("--standings", action="store_true", help="of one run, who did how against whom in self-play (.svg)")
    parser.add_argument(
        "--out", metavar="FILE",
        help=".svg or .png (default: RUN/curve.svg, curves.svg for several; else RUN/ and the name of what is drawn)",
    )  # fmt: skip
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    runs = [Path(run) for run in given.get("runs", [])]
    if not runs:
        raise ConfigError("no run given\n  for example: python -m aiorl plot runs/CartPole-v1-ppo-0")
    x = given.get("x", "steps")
    if x not in AXES:
        raise ConfigError(f"--x {x}: expected one of {', '.join(AXES)}")
    kinds = [kind for kind in ("metric", "wins", "opponents", "standings") if kind in given]
    if len(kinds) > 1:
        raise ConfigError(f"--{' and --'.join(kinds)} are pictures of their own\n  ask for one at a time")
    metrics = list(dict.fromkeys(given.get("metric", [])))
    out = Path(given.get("out", _default(runs, "-".join(metrics).replace("/", "_") or "".join(kinds))))
    endings = (".svg",) if kinds == ["standings"] else (".svg", ".png")
    if out.suffix.lower() not in endings:
        raise ConfigError(f"--out {out}: expected a file that ends in {' or '.join(endings)}")
    if kinds and kinds != ["metric"] and len(runs) > 1:
        raise ConfigError(f"--{kinds[0]}: expected one run, got {len(runs)}")
    try:
        _draw(runs, "".join(kinds), metrics, out, x)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    print(out)
    return 0


def _default(runs: Sequence[Path], name: str) -> Path:
    if name:
        return runs[0] / f"{name}.svg"
    return runs[0] / "curve.svg" if len(runs) == 1 else Path("curves.svg")


def _draw(runs: Sequence[Path], kind: str, metrics: Sequence[str], out: Path, x: str) -> None:
    """Write the picture. Raises ConfigError if there is nothing to draw."""
    if kind == "standings":
        if not write_standings(runs[0], out, read_curve(runs[0]).title):
            raise ConfigError(f"{runs[0]}: {NO_STANDINGS}")
        return
    if kind == "metric":
        picture = _metrics(runs, metrics)
    elif kind:
        make, why_not = ONE_RUN[kind]
        picture = make(read_curve(runs[0]))
        if not picture.curves:
            raise ConfigError(f"{runs[0]}: {why_not}")
    else:
        names, curves = _read(runs)
        picture = Picture(curves, names, RETURNS, title_of(curves))
    if out.suffix.lower() == ".png":
        write_png(picture, out, x)
    else:
        write_svg(picture, out, x)


def _metrics(runs: Sequence[Path], metrics: Sequence[str]) -> Picture:
    """Each metric of each run that tells it. Raises ConfigError with what there is for one that none tells."""
    told = {run: metric_names(run) for run in runs}
    known = list(dict.fromkeys(name for names in told.values() for name in names))
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, 3)
            hint = f" — did you mean {' or '.join(near)}?" if near else ""
            listed = f"there are {', '.join(known)}" if known else "there has been no update"
            lines = textwrap.wrap(listed, WIDTH, max_lines=2, placeholder=" …", break_on_hyphens=False)
            raise ConfigError(f"--metric {metric}: no update tells it{hint}\n  " + "\n  ".join(lines))
        for run in runs:
            if metric not in told[run]:
                print(f"left out: no update of {run} tells {metric}", file=sys.stderr)
    picture = metrics_of([(run.name or str(run), run) for run in runs], metrics)
    if not picture.curves:
        raise ConfigError(f"--metric {', '.join(metrics)}: no update has told a value yet")
    return picture


def _read(runs: Sequence[Path]) -> tuple[list[str], list[Curve]]:
    """Curves with their labels. Directories without events are named and left out, unless there is nothing else."""
    found: list[tuple[str, Curve]] = []
    for run in runs:
        try:
            found.append((run.name or str(run), read_curve(run)))
        except ConfigError as error:
            if len(runs) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise ConfigError("none of these is a run directory\n  `python -m aiorl runs` lists runs")
    return [name for name, _ in found], [curve for _, curve in found]


def write_png(picture: Picture, path: Path, x: str) -> None:
    """The same picture with matplotlib. Raises ConfigError naming the extra if that is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        raise ConfigError(
            f"{path}: PNG needs matplotlib, which is not installed\n"
            f'  pip install "aiorl[plot]", or use --out {path.stem}.svg'
        ) from None
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    single = len(picture.curves) == 1 and picture.what == RETURNS
    for index, (curve, label) in enumerate(zip(picture.curves, picture.labels, strict=True)):
        _add_curve(axes, curve.thinned(x), x, index, None if single else label)
    for goal in sorted({c.goal for c in picture.curves if c.goal is not None}):
        axes.axhline(goal, color="#3f7d20", ls="--", lw=1, label=f"goal {short_number(goal)}")
    numbers = FuncFormatter(lambda value, _: short_number(value))
    axes.yaxis.set_major_formatter(numbers)
    if x == "steps":
        axes.xaxis.set_major_formatter(numbers)
    axes.set(xlabel="wall time, s" if x == "time" else "env steps", ylabel=picture.what, title=picture.title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False, fontsize=9)  # said, or a slow machine is warned of how long it looks for it
    figure.savefig(path, dpi=150)


def _add_curve(axes: Any, curve: Curve, x: str, index: int, label: str | None) -> None:
    """Without a label it is the only curve: training and evaluation are told apart by colours."""
    single, colour = label is None, COLOURS[index % len(COLOURS)][0]
    evaluated = COLOURS[1][0] if single else colour
    if single:
        axes.plot(
            [p.x(x) for p in curve.rollouts], [p.value for p in curve.rollouts], color=colour, alpha=0.3, lw=1,
            label="return of a rollout",
        )  # fmt: skip
    axes.plot(
        [p.x(x) for p in curve.smooth], [p.value for p in curve.smooth], color=colour, lw=2,
        label=label or "mean of the last 100 episodes",
    )  # fmt: skip
    at = [p.x(x) for p in curve.evaluations]
    low, high = ([p.value + side * p.spread for p in curve.evaluations] for side in (-1, 1))
    axes.fill_between(at, low, high, color=evaluated, alpha=0.12, lw=0)
    axes.plot(
        at, [p.value for p in curve.evaluations], "o-" if single else "o:", color=evaluated, ms=4, lw=1.4,
        label="evaluation ± one std" if single else None,
    )  # fmt: skip
