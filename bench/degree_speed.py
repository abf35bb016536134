"""How much each `off_policy_degree` saves, for slow and for fast environments, with real work on both sides.

    python -m bench.degree_speed [--rounds 3] [--updates 60] [--ratios 2:1 1:1 …] [--degrees 0 1 2 …]
                                 [--cycle-ms 60] [--json FILE]

A worker process computes in its environments (`bench.work`), the learner thread trains PPO on what they show. How much
both have to do is adjusted first, by short runs at degree 1, until collecting a rollout takes c and an update t with
c : t the wanted ratio and c + t = `--cycle-ms`. Then every degree is timed in turns, `--rounds` times. In each run

    wall         time per update, from one update's end to another's `--updates` later
    c, t         mean time of collecting a rollout and of an update, in that very run: two busy cores slow each other.
                 (Means, as wall is one: where a core's speed drifts, a median would belong to other updates.)
    bound        min(c, t) / (c + t): the most that doing both at once can save of doing one after the other
    efficiency   max(c, t) / wall: the speed-up (c + t) / wall over its bound (c + t) / max(c, t)
    saving       1 - wall / wall at degree 0 in the same round; what slows two busy cores counts against it
    staleness    mean of the rollouts used: what is paid for the speed

For -1, which tunes itself, the table also says which degree was in force at the end. Figures are medians over the
rounds, with their range where it matters. Run it on two idle cores: where fewer are free, both sides take turns and no
degree saves anything. On Linux each run also says for which share of its time something had to wait for a core; if that
is much, other programs took part in the figures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import aiorl
from aiorl.cli.session import run_async
from bench.common import print_machine, summarise, write_json

STEPS, ENVS = 64, 4  # of a rollout
RATIOS, DEGREES = ["2:1", "1:1", "1:2", "4:1", "1:4"], [0, 1, 2, 4, 8, 16, 64, -1]
BURN_IN, SETTLE = 5, 120  # updates before the clock starts; the second where the degree tunes itself
PILOTS, PILOT_UPDATES = 3, 12
GOAL = 0.95  # efficiency to reach at degree 1
PRESSURE = Path("/proc/pressure/cpu")


class Load(NamedTuple):
    """How much there is to do: rounds of arithmetic in an environment step, passes over a rollout in an update."""

    iterations: int
    epochs: int


class Point(NamedTuple):
    """What one run showed; times in milliseconds."""

    wall: float
    collect: float
    update: float
    staleness: float
    degree: int
    crowded: float | None = None
    """Share of the time in which something on this machine waited for a core; None where the system does not tell."""

    @property
    def bound(self) -> float:
        return min(self.collect, self.update) / (self.collect + self.update)

    @property
    def efficiency(self) -> float:
        return max(self.collect, self.update) / self.wall


def configuration(load: Load, degree: int, updates: int, out: str) -> aiorl.Config:
    """A run that is long enough for the budget not to hold collection back before it is stopped."""
    rollouts = updates + max(degree, 64) + 2
    return aiorl.Config(
        env="bench.work:Work",
        env_kwargs={"iterations": load.iterations},
        algo=aiorl.PPO(epochs=load.epochs, minibatches=1, learning_rate=1e-4),
        total_steps=rollouts * STEPS * ENVS,
        envs=ENVS,
        group_size=ENVS,  # one segment is a whole rollout, so its time is the rollout's
        workers=1,
        segment_length=STEPS,
        off_policy_degree=degree,
        eval_every=0,
        checkpoint_every=0,
        device="cpu",
        out=f"{out}/run",
    )


async def measure(load: Load, degree: int, updates: int) -> Point:
    """One run, stopped after the measured updates."""
    burn_in = SETTLE if degree < 0 else BURN_IN
    seen: list[aiorl.Updated] = []
    in_force, waits_s = degree, 0.0
    with tempfile.TemporaryDirectory() as out:
        async with aiorl.Run(configuration(load, degree, burn_in + updates, out)) as run:
            async for event in run:
                if isinstance(event, aiorl.Updated):
                    seen.append(event)
                    if len(seen) == burn_in:
                        waits_s = core_waits_s()
                    if len(seen) == burn_in + updates:
                        waits_s = core_waits_s() - waits_s
                        in_force = run.status().off_policy_degree
                        run.stop(final_evaluation=False)
                        break
            await run.wait()
    return point(seen[burn_in - 1 :], in_force, waits_s)


def point(events: list[aiorl.Updated], degree: int, waits_s: float) -> Point:
    """From the events of successive updates; the first only says when the next one could begin."""
    first, *measured = events
    wall_s = measured[-1].seconds - first.seconds
    return Point(
        wall=wall_s / len(measured) * 1e3,
        collect=fmean(e.collect_seconds for e in measured) * 1e3,
        update=fmean(e.update_seconds for e in measured) * 1e3,
        staleness=fmean(e.staleness for e in measured),
        degree=degree,
        crowded=waits_s / wall_s if PRESSURE.exists() else None,
    )


def core_waits_s() -> float:
    """Seconds so far in which something on this machine was ready and had no core; 0 where it cannot be known."""
    if not PRESSURE.exists():
        return 0.0
    return int(PRESSURE.read_text().split("total=")[1].split()[0]) / 1e6  # of the first line, "some"


async def calibrate(ratio: str, cycle_ms: float, load: Load) -> Load:
    """Adjust a load until c : t is `ratio` and c + t is `cycle_ms`, both sides running."""
    collect, update = (float(part) for part in ratio.split(":"))
    collect_ms, update_ms = (cycle_ms * part / (collect + update) for part in (collect, update))
    for _ in range(PILOTS):
        found = await measure(load, 1, PILOT_UPDATES)
        load = Load(
            max(1, round(load.iterations * collect_ms / found.collect)),
            max(1, round(load.epochs * update_ms / found.update)),
        )
    return load


def usable(degrees: list[int]) -> list[int]:
    """The degrees that this version of aiorl knows, 0 first: the savings are against it."""
    known = [0]
    for degree in degrees:
        try:
            configuration(Load(1, 1), degree, 1, "")
        except aiorl.ConfigError as error:
            print(f"degree {degree} is skipped: {str(error).splitlines()[0]}\n")
        else:
            known += [degree] if degree not in known else []
    return known


async def compare(ratio: str, degrees: list[int], rounds: int, updates: int, load: Load) -> dict[int, list[Point]]:
    """All degrees in turns; another one begins each round."""
    points: dict[int, list[Point]] = {degree: [] for degree in degrees}
    for index in range(rounds):
        begin = index * len(degrees) // rounds
        for degree in degrees[begin:] + degrees[:begin]:
            found = await measure(load, degree, updates)
            points[degree].append(found)
            print(f"  {ratio} round {index} degree {degree:3}  wall {found.wall:6.2f} ms  c {found.collect:6.2f}  "
                  f"t {found.update:6.2f}  efficiency {found.efficiency:.3f}"
                  + ("" if found.crowded is None else f"  crowded {found.crowded:.2f}"),
                  file=sys.stderr, flush=True)  # fmt: skip
    return points


HEAD = """| collect:train | degree | updates/s | saving | bound | efficiency | c ms | t ms | staleness |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def row(ratio: str, degree: int, points: list[Point], base: list[Point]) -> str:
    """The Markdown row of a degree; `base` are the same rounds at degree 0."""
    efficiency = summarise([p.efficiency for p in points])
    settled = ", ".join(str(d) for d in sorted({p.degree for p in points}))
    cells = (
        ratio,
        f"{degree}" if degree >= 0 else f"-1 → {settled}",
        f"{median(1e3 / p.wall for p in points):.1f}",
        f"{median(savings(points, base)):.1%}" if degree else "—",
        f"{median(p.bound for p in points):.1%}",
        f"{efficiency.median:.1%}" + (f" [{efficiency.low:.1%} … {efficiency.high:.1%}]" if degree else ""),
        f"{median(p.collect for p in points):.1f}",
        f"{median(p.update for p in points):.1f}",
        f"{median(p.staleness for p in points):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def savings(points: list[Point], base: list[Point]) -> list[float]:
    """Share of the time of degree 0 that is saved, round by round."""
    return [1 - p.wall / b.wall for p, b in zip(points, base, strict=True)]


def verdict(results: dict[str, dict[int, list[Point]]]) -> str:
    """Whether degree 1 reaches the goal at every ratio."""
    reached = {r: median(p.efficiency for p in points[1]) for r, points in results.items() if 1 in points}
    short = [f"{ratio} ({value:.1%})" for ratio, value in reached.items() if value < GOAL]
    if not reached:
        return "degree 1 was not measured"
    if short:
        return f"degree 1 misses {GOAL:.0%} of the bound at {', '.join(short)}"
    return f"degree 1 reaches {GOAL:.0%} of the bound at {', '.join(reached)}"


def crowd(results: dict[str, dict[int, list[Point]]]) -> str:
    """How much the cores were in demand, where that is known."""
    points = [point for by_degree in results.values() for rounds in by_degree.values() for point in rounds]
    shares = [point.crowded for point in points if point.crowded is not None]
    if not shares:
        return ""
    return f"; for {median(shares):.0%} of the time (at most {max(shares):.0%}) something had to wait for a core"


def figures(results: dict[str, dict[int, list[Point]]]) -> dict[str, Any]:
    """All runs, for the JSON file."""
    return {
        ratio: {
            str(degree): {
                "rounds": [p._asdict() | {"bound": p.bound, "efficiency": p.efficiency} for p in points],
                "saving": savings(points, by_degree[0]),
            }
            for degree, points in by_degree.items()
        }
        for ratio, by_degree in results.items()
    }


def ratio_text(text: str) -> str:
    """The text of a ratio if it is one, for argparse."""
    collect, _, update = text.partition(":")
    if float(collect) <= 0 or float(update) <= 0:
        raise ValueError(text)
    return text


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=60, help="updates that are timed in each run")
    parser.add_argument("--ratios", nargs="+", type=ratio_text, default=RATIOS, metavar="C:T")
    parser.add_argument("--degrees", nargs="+", type=int, default=DEGREES)
    parser.add_argument("--cycle-ms", type=float, default=60.0, help="c + t of each ratio")
    parser.add_argument("--json", default="bench/raw/degree_speed.json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    degrees = usable(options.degrees)
    load, results = Load(2000, 25), dict[str, dict[int, list[Point]]]()
    for ratio in options.ratios:
        load = await calibrate(ratio, options.cycle_ms, load)
        results[ratio] = await compare(ratio, degrees, options.rounds, options.updates, load)
    print(HEAD)
    for ratio, points in results.items():
        for degree in degrees:
            print(row(ratio, degree, points[degree], points[0]))
    print(f"\nc + t = {options.cycle_ms:g} ms, medians of {options.rounds} rounds of {options.updates} updates"
          f"{crowd(results)}.")  # fmt: skip
    print(f"Verdict: {verdict(results)}.")
    settings = {"rounds": options.rounds, "updates": options.updates, "cycle_ms": options.cycle_ms}
    write_json(options.json, {**settings, "ratios": figures(results)})


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # as the command line does
    run_async(main())
