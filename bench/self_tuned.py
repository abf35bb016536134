"""Real runs at `off_policy_degree = -1`, one in each regime: what the degree did and why.

    python -m bench.self_tuned [--updates 600] [--json FILE] [--plot FILE]

    balanced      collecting and updating take equally long (the work of bench.degree_speed)
    train-bound   an update takes four times as long as collecting
    error-bound   PPO on CartPole-v1 by its preset, with an `error_target` that leaves room for little lag

Every decision is printed with its reason. The rate at each degree is the median over the updates at that degree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from statistics import median
from typing import Any

import aiorl
from aiorl.cli.session import run_async
from bench.common import print_machine, write_json
from bench.degree_speed import Load, calibrate, configuration

CYCLE_MS = 40.0
ERROR_TARGET = 0.06
REGIMES = ("balanced", "train-bound", "error-bound")


async def regime(name: str, updates: int, out: str) -> aiorl.Config:
    """The configuration of a regime; for the first two the loads are adjusted on this machine."""
    if name == "error-bound":
        return aiorl.Config.preset(
            "CartPole-v1", total_steps=updates * 2048, off_policy_degree=-1, error_target=ERROR_TARGET, eval_every=0,
            checkpoint_every=0, out=f"{out}/run",
        )  # fmt: skip
    load = await calibrate("1:1" if name == "balanced" else "1:4", CYCLE_MS, Load(2000, 25))
    return configuration(load, -1, updates, out)


async def follow(name: str, updates: int) -> dict[str, Any]:
    """One run: the degree, the error and the time of each update, and the decisions."""
    rows: list[tuple[int, int, float, float]] = []  # version, degree, error, seconds
    decisions: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out:
        async with aiorl.Run(await regime(name, updates, out)) as run:
            async for event in run:
                if isinstance(event, aiorl.Updated):
                    error = event.metrics["off_policy_error"]
                    rows.append((event.version, event.off_policy_degree, error, event.seconds))
                    if len(rows) == updates:
                        run.stop(final_evaluation=False)
                elif isinstance(event, aiorl.DegreeChanged):
                    decision = event.to_dict()
                    decisions.append({key: decision[key] for key in ("version", "before", "degree", "reason", "detail")})
                    print(f"{name}, update {event.version}: {event.reason}: {event.detail}", flush=True)
            result = await run.wait()
    return {"rows": rows, "decisions": decisions, "staleness": result.staleness}


def rates(rows: list[Any]) -> dict[int, tuple[int, float]]:
    """For each degree how many updates it was in force, and the median rate (updates per second)."""
    times: dict[int, list[float]] = {}
    for (*_, before_s), (_, degree, _, now_s) in pairwise(rows):
        times.setdefault(degree, []).append(now_s - before_s)
    return {degree: (len(seconds), 1 / median(seconds)) for degree, seconds in sorted(times.items())}


def table(found: dict[str, Any]) -> str:
    lines = ["| regime | decisions | updates at each degree (updates/s) | mean staleness |", "|---|---|---|--:|"]
    for name, run in found.items():
        changes = "; ".join(f"{d['version']}: {d['before']} → {d['degree']} ({d['reason']})" for d in run["decisions"])
        shares = ", ".join(f"{degree}: {n} ({rate:.1f})" for degree, (n, rate) in rates(run["rows"]).items())
        lines.append(f"| {name} | {changes or 'none'} | {shares} | {run['staleness']['mean']:.2f} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: str) -> None:
    """Degree and off-policy error over the updates, a column for each regime."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 4.2), sharex="col", squeeze=False)
    for column, (name, run) in enumerate(found.items()):
        versions, degrees, errors, _ = zip(*run["rows"], strict=True)
        above, below = axes[0][column], axes[1][column]
        above.step(versions, degrees, where="post", color="tab:blue")
        for decision in run["decisions"]:
            above.annotate(
                decision["reason"], (decision["version"], decision["degree"]), xytext=(2, 4), textcoords="offset points",
                fontsize=7, color="tab:gray",
            )  # fmt: skip
        above.set_title(name, fontsize=10)
        above.set_ylim(-0.3, max(4, *degrees) + 0.9)
        below.plot(versions, errors, color="tab:orange", linewidth=0.7)
        if name == "error-bound":
            below.axhline(ERROR_TARGET, color="tab:red", linewidth=0.8, linestyle="--")
        below.set_xlabel("update")
    axes[0][0].set_ylabel("degree")
    axes[1][0].set_ylabel("off-policy error")
    figure.tight_layout()
    figure.savefig(path)
    print(f"plot in {path}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--json", default="bench/raw/self_tuned.json")
    parser.add_argument("--plot", default="docs/img/self_tuned.svg")
    options = parser.parse_args()
    print_machine()
    found = {name: await follow(name, options.updates) for name in options.regimes}
    print(f"\n{table(found)}")
    plot(found, options.plot)
    write_json(options.json, {"updates": options.updates, "error_target": ERROR_TARGET, "regimes": found})


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # as the command line does
    run_async(main())
