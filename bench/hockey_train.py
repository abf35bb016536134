"""The training system of hockey: does asynchrony pay, and does the buffer grow without a stall?

    python -m bench.hockey_train [--steps 40000] [--rounds 3] [--ratios 0.1 0.03 0.01] [--transitions 1000000] [--json FILE]

Twin: SAC by its preset, asynchronous at degree 1 and as its sequential twin (`workers = 0`), in turns, at equal gradient
steps per env step. Start-up and warm-up are left out. What can be gained is the smaller one of collecting and training, so
the ratio depends on how many gradient steps an env step is worth.

Growth: a long run whose queue has the least bound there is, once with a learner that is slow beside the collecting and once
with one that is fast. After every update the buffer has to hold what was stored, the gradient steps have to be exactly those
owed, the first one has to come as soon as warm-up is over, and nothing may be dropped. A pause between two updates is shown,
and held against nothing but a minute: machines are busy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiorl
from aiorl.buffers.replay import gradient_steps_owed
from bench.common import print_machine, summarise, write_json

WAYS: dict[str, dict[str, Any]] = {
    "async": {"workers": 1, "off_policy_degree": 1},
    "twin": {"workers": 0, "off_policy_degree": 0},
}
WARMUP = 2_000
LEARNERS: dict[str, dict[str, Any]] = {
    "slow": {"update_ratio": 0.01},
    "fast": {"update_ratio": 0.001, "hidden": (16,), "batch_size": 32},
}
PAUSE_S = 60.0
ALL = 10**9  # events: none may be left out for a slow reader


class Growth(NamedTuple):
    """How a run went: what was wrong in words, and its figures."""

    wrong: list[str]
    env_steps: int
    gradient_steps: int
    seconds: float
    longest_pause_s: float
    queue_high_water: int
    queue_bound: int


def settings(out: str, steps: int, own: dict[str, Any], **changes: Any) -> aiorl.Config:
    """The preset without evaluations and checkpoints; `own` goes over its settings of SAC."""
    return aiorl.Config.preset(
        "hockey", "sac", total_steps=steps, eval_every=0, eval_suites={}, eval_episodes=1, eval_top=0, checkpoint_every=0,
        out=f"{out}/run", sac={"warmup": WARMUP, "random_steps": WARMUP, **own}, **changes,
    )  # fmt: skip


async def steady_rate(steps: int, way: str, update_ratio: float, seed: int) -> float:
    """Env steps per second of one run, between the first gradient step and the last."""
    with tempfile.TemporaryDirectory() as out:
        config = settings(out, steps, {"update_ratio": update_ratio}, seed=seed, **WAYS[way])
        async with aiorl.Run(config) as run:
            trained = [e async for e in run if isinstance(e, aiorl.Updated) and e.gradient_steps]
    if len(trained) < 2:
        raise SystemExit(f"{steps} steps are too few to measure")
    return (trained[-1].env_steps - trained[0].env_steps) / (trained[-1].seconds - trained[0].seconds)


async def compare(steps: int, rounds: int, update_ratio: float) -> dict[str, Any]:
    """Alternate both ways, and who begins, for `rounds` rounds."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(rounds):
        for way in list(WAYS) if index % 2 == 0 else reversed(list(WAYS)):
            rates[way].append(await steady_rate(steps, way, update_ratio, seed=index))
    ratios = summarise([a / t for a, t in zip(rates["async"], rates["twin"], strict=True)])
    each = "  ".join(f"{way} {summarise(rates[way]).text(0)} steps/s" for way in WAYS)
    print(f"{update_ratio:g} gradient steps per env step: {each}  ratio {ratios.text(2)}", flush=True)
    return {"update_ratio": update_ratio, "ratio": ratios._asdict(), **rates}


async def grow(transitions: int, own: dict[str, Any], **changes: Any) -> Growth:
    """Train until so many transitions are stored, and look at every update on the way."""
    own = {"capacity": max(transitions, WARMUP), **own}
    with tempfile.TemporaryDirectory() as out:
        config = settings(out, transitions, own, off_policy_degree=1, **changes)
        async with aiorl.Run(config) as run:
            updates = [event async for event in run.events(ALL) if isinstance(event, aiorl.Updated)]
        result = run.result
    assert result is not None
    longest_s = max(after.seconds - before.seconds for before, after in itertools.pairwise(updates))
    wrong = differences(updates, result, config)
    if longest_s > PAUSE_S:
        wrong.append(f"nothing was stored for {longest_s:.0f} s")
    queue = result.queue
    return Growth(
        wrong, result.env_steps, result.gradient_steps, result.train_seconds, longest_s, queue["high_water"], queue["bound"]
    )


def differences(updates: Sequence[aiorl.Updated], result: aiorl.Result, config: aiorl.Config) -> list[str]:
    """What did not go as it has to, in words."""
    own, wrong, done = config.algorithm, list[str](), 0
    for number, update in enumerate(updates, 1):
        stored = min(number * config.steps_per_rollout, result.env_steps)
        done += update.gradient_steps
        owed = gradient_steps_owed(stored, own.warmup, own.update_ratio)
        seen = {"stored": update.env_steps, "in the buffer": update.metrics["replay_size"], "gradient steps": done}
        expected = {"stored": stored, "in the buffer": min(stored, own.capacity), "gradient steps": owed}
        wrong += [
            f"update {number}: {name} {seen[name]:g} instead of {expected[name]:g}"
            for name in expected
            if seen[name] != expected[name]
        ]
    ledger = result.ledger
    if result.dropped or ledger["produced"] != ledger["stored"] + ledger["in_flight"]:
        wrong.append(f"dropped {result.dropped}, ledger {ledger}")
    if result.queue["high_water"] > result.queue["bound"]:
        wrong.append(f"the queue held {result.queue['high_water']} of {result.queue['bound']}")
    return wrong


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000, help="env steps of each run of the comparison")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison; 0 leaves it out")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.03, 0.01], help="gradient steps per env step")
    parser.add_argument("--transitions", type=int, default=1_000_000, help="that the buffer is to reach; 0 leaves it out")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    figures: dict[str, Any] = {"twin": [], "growth": {}}
    if options.rounds:
        figures["twin"] = [await compare(options.steps, options.rounds, ratio) for ratio in options.ratios]
    for name, own in LEARNERS.items() if options.transitions else ():
        growth = await grow(options.transitions, own)
        print(
            f"{name} learner: {growth.env_steps:,} transitions and {growth.gradient_steps:,} gradient steps in "
            f"{growth.seconds:.0f} s, longest pause {growth.longest_pause_s:.1f} s, queue {growth.queue_high_water} of "
            f"{growth.queue_bound}: {'; '.join(growth.wrong[:3]) or 'ok'}",
            flush=True,
        )
        figures["growth"][name] = growth._asdict()
    write_json(options.json, figures)


if __name__ == "__main__":
    asyncio.run(main())
