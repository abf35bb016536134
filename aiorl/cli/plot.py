"""`python -m aiorl plot RUN…`: learning curves as SVG (no plotting library needed) or PNG (with matplotlib)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from aiorl.cli.flags import Parser
from aiorl.errors import ConfigError
from aiorl.metrics.curve import Curve, read_curve, write_metric, write_rates, write_svg, write_wins
from aiorl.metrics.matrix import write_standings
from aiorl.metrics.svg import COLOURS, short_number

AXES = ("steps", "time")


class Picture(NamedTuple):
    """Of one run: writes (run, file, axis) and returns whether there was anything to draw; why there may be nothing."""

    write: Callable[[Path, Path, str], bool]
    why_not: str


ONE_RUN = {
    "wins": Picture(write_wins, "no evaluation says how its episodes ended\n  the environment has to: info['outcome']"),
    "opponents": Picture(write_rates, "no update tells of games won\n  it is drawn for self-play: --algo selfplay"),
    "standings": Picture(
        lambda run, out, _: write_standings(run, out, read_curve(run).title),
        "there is no standings.json\n  runs of self-play have one: --algo selfplay",
    ),
}


def main(argv: Sequence[str]) -> int:
    parser = Parser("plot", "Draw the learning curves of runs into one picture.", "RUN… [--x steps|time] [--out FILE]")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories")
    parser.add_argument("--x", metavar="|".join(AXES), help="what lies along the picture (default: steps)")
    parser.add_argument("--metric", metavar="NAME", help="what updates say (a column of metrics.csv) instead of returns")
    parser.add_argument("--wins", action="store_true", help="of one run, the shares of episodes won in evaluations")
    parser.add_argument("--opponents", action="store_true", help="of one run, the shares of training games won in self-play")
    parser.add_argument("--standings", action="store_true", help="of one run, who did how against whom in self-play")
    parser.add_argument("--out", metavar="FILE", help=".svg or .png (default: RUN/curve.svg, curves.svg for several)")
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
    if "metric" in given:
        return _plot_metric(runs, given["metric"], Path(given.get("out", runs[0] / f"{given['metric']}.svg")), x)
    for kind, picture in ONE_RUN.items():
        if given.get(kind, False):
            return _plot_one(kind, picture, runs, Path(given.get("out", runs[0] / f"{kind}.svg")), x)
    out = Path(given.get("out", runs[0] / "curve.svg" if len(runs) == 1 else "curves.svg"))
    if out.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"--out {out}: expected a file that ends in .svg or .png")
    names, curves = _read(runs)
    try:
        if out.suffix.lower() == ".png":
            write_png(curves, out, x, names)
        else:
            write_svg(curves, out, x, names)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    print(out)
    return 0


def _plot_metric(runs: Sequence[Path], metric: str, out: Path, x: str) -> int:
    if out.suffix.lower() != ".svg":
        raise ConfigError(f"--metric: expected an .svg, got {out}")
    try:
        drawn = write_metric(runs, metric, out, x, [run.name for run in runs])
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    if not drawn:
        there = runs[0] / "metrics.csv"
        raise ConfigError(f"--metric {metric}: no update tells it\n  the columns of {there} are what there is")
    print(out)
    return 0


def _plot_one(kind: str, picture: Picture, runs: Sequence[Path], out: Path, x: str) -> int:
    """A picture that there is of a single run."""
    if len(runs) > 1 or out.suffix.lower() != ".svg":
        raise ConfigError(f"--{kind}: expected one run and an .svg, got {len(runs)} and {out}")
    try:
        drawn = picture.write(runs[0], out, x)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    if not drawn:
        raise ConfigError(f"{runs[0]}: {picture.why_not}")
    print(out)
    return 0


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


def write_png(curves: Sequence[Curve], path: Path, x: str, labels: Sequence[str]) -> None:
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
    single = len(curves) == 1
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        thin = curve.thinned(x)
        colour = COLOURS[index % len(COLOURS)][0]
        evaluated = COLOURS[1][0] if single else colour
        if single:
            axes.plot([p.x(x) for p in thin.rollouts], [p.value for p in thin.rollouts], color=colour, alpha=0.3, lw=1)
        axes.plot(
            [p.x(x) for p in thin.smooth], [p.value for p in thin.smooth], color=colour, lw=2,
            label="mean of the last 100 episodes" if single else label,
        )  # fmt: skip
        at = [p.x(x) for p in thin.evaluations]
        low, high = ([p.value + side * p.spread for p in thin.evaluations] for side in (-1, 1))
        axes.fill_between(at, low, high, color=evaluated, alpha=0.12, lw=0)
        axes.plot(
            at, [p.value for p in thin.evaluations], "o-" if single else "o:", color=evaluated, ms=4, lw=1.4,
            label="evaluation ± one std" if single else None,
        )  # fmt: skip
    for goal in sorted({c.goal for c in curves if c.goal is not None}):
        axes.axhline(goal, color="#3f7d20", ls="--", lw=1)
    if x == "steps":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set(xlabel="wall time, s" if x == "time" else "env steps", ylabel="return")
    if single:
        axes.set_title(curves[0].title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
