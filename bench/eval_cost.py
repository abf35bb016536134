"""What evaluation costs a run: in the background, as a share of what it costs when training waits for it.

    python -m bench.eval_cost [--rounds 5] [--cycles 10] [--scale 0.1] [--json FILE]

The pattern of a report from practice, at `--scale` of its times and with real work in place of sleeps: ten updates of
0.3 s, 0.41 s of collecting for them, then an evaluation of 1 s. The learner thread trains PPO, one worker computes in its
environments (`bench.work`), another one evaluates. How much each has to do is adjusted first, by short runs. Then each
way is timed in turns:

    none     only the final evaluation, as in all of them
    newest   evaluation in the background, while training goes on (the default)
    wait     training waits until each evaluation has ended

Timed is what lies between two results: from the end of the fifth update to that of the final evaluation. A way costs
its time less that of `none` in the same round, and the share is cost(newest) / cost(wait). Three processes are busy at
times; with fewer than three cores free they take turns, and that counts against the background.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from statistics import median
from typing import Any, NamedTuple

import aiorl
from aiorl.cli.session import run_async
from bench.common import print_machine, summarise, write_json

STEPS, ENVS = 32, 4  # of a rollout
CYCLE = 10  # updates for each evaluation
BURN_IN = 5  # updates before the clock starts
EPISODES = 10  # of an evaluation, side by side
UPDATE_S, COLLECT_S, EVALUATE_S = 0.3, 0.41 / CYCLE, 1.0
WAYS: dict[str, dict[str, Any]] = {
    "none": {"eval_every": 0},
    "newest": {"eval_busy": "newest"},
    "wait": {"eval_busy": "wait"},
}
PILOTS = 3
GOAL = 0.05


class Load(NamedTuple):
    """How much there is to do: rounds of arithmetic in a step, passes over a rollout, rounds in a step of an evaluation."""

    collecting: int = 300
    epochs: int = 20
    evaluating: int = 3000


class Times(NamedTuple):
    """Seconds: of the run as described above, and medians of its parts while it went on."""

    wall: float
    collect: float
    update: float
    evaluate: float
    evaluations: int


async def measure(load: Load, way: str, cycles: int) -> Times:
    """One run of `cycles` times ten updates."""
    with tempfile.TemporaryDirectory() as out:
        fields: dict[str, Any] = {
            "env": "bench.work:Work",
            "env_kwargs": {"iterations": load.collecting},
            "algo": aiorl.PPO(epochs=load.epochs, minibatches=1, learning_rate=1e-4),
            "total_steps": cycles * CYCLE * STEPS * ENVS,
            "envs": ENVS,
            "group_size": ENVS,
            "workers": 1,
            "segment_length": STEPS,
            "off_policy_degree": 1,
            "eval_every": CYCLE * STEPS * ENVS,
            "eval_suites": {"bench": {"env_kwargs": {"iterations": load.evaluating}, "episodes": EPISODES}},
            "checkpoint_every": 0,
            "device": "cpu",
            "out": f"{out}/run",
            **WAYS[way],
        }
        updates, evaluations = list[aiorl.Updated](), list[aiorl.Evaluated]()
        async with aiorl.Run(aiorl.Config(**fields)) as run:
            async for event in run:
                if isinstance(event, aiorl.Updated):
                    updates.append(event)
                elif isinstance(event, aiorl.Evaluated):
                    evaluations.append(event)
            await run.wait()
    return Times(
        wall=evaluations[-1].seconds - next(e for e in updates if e.version >= BURN_IN).seconds,
        collect=median(e.collect_seconds for e in updates),
        update=median(e.update_seconds for e in updates),
        evaluate=median(e.eval_seconds for e in evaluations),
        evaluations=len(evaluations),
    )


async def calibrate(scale: float) -> Load:
    """Adjust the load until updates, collecting and evaluations take as long as they should."""
    load = Load()
    for _ in range(PILOTS):
        found = await measure(load, "wait", 2)
        load = Load(
            max(1, round(load.collecting * COLLECT_S * scale / found.collect)),
            max(1, round(load.epochs * UPDATE_S * scale / found.update)),
            max(1, round(load.evaluating * EVALUATE_S * scale / found.evaluate)),
        )
    return load


async def compare(load: Load, rounds: int, cycles: int) -> dict[str, list[Times]]:
    """All ways in turns; another one begins each round."""
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for index in range(rounds):
        begin = index % len(ways)
        for way in ways[begin:] + ways[:begin]:
            found = await measure(load, way, cycles)
            times[way].append(found)
            print(f"  round {index} {way:6}  {found.wall:7.3f} s  {found.evaluations:3} evaluations of "
                  f"{found.evaluate:.3f} s  update {found.update * 1e3:5.1f} ms  collect {found.collect * 1e3:5.1f} ms",
                  file=sys.stderr, flush=True)  # fmt: skip
    return times


def costs(times: dict[str, list[Times]], way: str) -> list[float]:
    """Seconds that evaluating in this way added, round by round."""
    return [found.wall - none.wall for found, none in zip(times[way], times["none"], strict=True)]


def shares(times: dict[str, list[Times]]) -> list[float]:
    """Cost in the background over cost when training waits, round by round."""
    return [b / w for b, w in zip(costs(times, "newest"), costs(times, "wait"), strict=True)]


def table(times: dict[str, list[Times]]) -> str:
    """A Markdown row for each way: medians over the rounds."""
    lines = ["| evaluation | evaluations | seconds | added | update ms | evaluation ms |", "|---|--:|--:|--:|--:|--:|"]
    for way, found in times.items():
        added = "—" if way == "none" else f"{median(costs(times, way)):+.3f}"
        cells = (
            way, str(found[0].evaluations), f"{median(t.wall for t in found):.3f}", added,
            f"{median(t.update for t in found) * 1e3:.1f}", f"{median(t.evaluate for t in found) * 1e3:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=10, help="evaluations of each run, with ten updates before each")
    parser.add_argument("--scale", type=float, default=0.1, help="of the times in the report")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    times = await compare(await calibrate(options.scale), options.rounds, options.cycles)
    found = summarise(shares(times))
    print(table(times))
    print(f"\nIn the background evaluation costs {found.median:.1%} [{found.low:.1%} … {found.high:.1%}] of what it costs "
          f"when training waits; the goal is less than {GOAL:.0%}.")  # fmt: skip
    figures = {way: [t._asdict() for t in rounds] for way, rounds in times.items()}
    settings = {"rounds": options.rounds, "cycles": options.cycles, "scale": options.scale}
    write_json(options.json, {**settings, "share": shares(times), "ways": figures})


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # as the command line does
    run_async(main())
