"""What asynchrony gains: the same PPO training with 2 workers at degree 1, and as its sequential twin, in turns.

    python -m bench.twin [--rounds 5] [--steps 200000] [--envs LunarLander-v3 CartPole-v1] [--json FILE]

The twin (`workers = 0`, `off_policy_degree = 0`) runs the same code in one process. Two rates are shown: `steady`
leaves out start-up and the first tenth of the run; `all` counts everything from the request to the end, with the final
evaluation. Ratios are taken within a round, so that a machine that is slower for a while slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from typing import Any, NamedTuple

import aiorl
from bench.common import print_machine, summarise, write_json

WAYS: dict[str, dict[str, Any]] = {
    "async": {"workers": 2, "off_policy_degree": 1},
    "twin": {"workers": 0, "off_policy_degree": 0},
}


class Rates(NamedTuple):
    """Env steps per second."""

    steady: float
    all: float


async def measure(env: str, way: str, steps: int, seed: int) -> Rates:
    """One run, timed from outside and by its own events."""
    with tempfile.TemporaryDirectory() as out:
        config = aiorl.Config.preset(env, total_steps=steps, seed=seed, eval_every=0, checkpoint_every=0, **WAYS[way])
        begun = time.perf_counter()
        first = last = None
        async with aiorl.Run(config.replace(out=f"{out}/run", stop_at=None)) as run:
            async for event in run:
                if isinstance(event, aiorl.Updated):
                    if first is None and event.env_steps >= steps / 10:
                        first = event
                    last = event
            wall_s = time.perf_counter() - begun
    if first is None or last is None or first is last:
        raise SystemExit(f"{steps} steps of {env} are too few to measure")
    steady = (last.env_steps - first.env_steps) / (last.seconds - first.seconds)
    return Rates(steady, last.env_steps / wall_s)


async def compare(env: str, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate both ways, and who begins, for `rounds` rounds."""
    for way in WAYS:  # not counted: the first run of a process imports torch
        await measure(env, way, steps // 10, seed=rounds)
    results: dict[str, list[Rates]] = {way: [] for way in WAYS}
    for index in range(rounds):
        for way in list(WAYS) if index % 2 == 0 else reversed(list(WAYS)):
            rates = await measure(env, way, steps, seed=index)
            print(f"  {env} round {index} {way:5}  steady {rates.steady:8,.0f}  all {rates.all:8,.0f}", flush=True)
            results[way].append(rates)
    figures: dict[str, Any] = {}
    for kind in Rates._fields:
        values = {way: [getattr(r, kind) for r in results[way]] for way in WAYS}
        ratios = [a / t for a, t in zip(values["async"], values["twin"], strict=True)]
        figures[kind] = {"ratio": summarise(ratios)._asdict(), **values}
        each = "  ".join(f"{way} {summarise(values[way]).text(0)}" for way in WAYS)
        print(f"{env} {kind:6}  {each}  ratio {summarise(ratios).text(2)}")
    return figures


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000, help="env steps of each run")
    parser.add_argument("--envs", nargs="+", default=["LunarLander-v3", "CartPole-v1"])
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    figures = {env: await compare(env, options.rounds, options.steps) for env in options.envs}
    write_json(options.json, {"rounds": options.rounds, "steps": options.steps, "env_steps_per_second": figures})


if __name__ == "__main__":
    asyncio.run(main())
