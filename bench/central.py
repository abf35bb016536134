"""Central inference against networks in the workers: what each is worth for networks of several sizes.

    python -m bench.central [--envs 16] [--workers 2] [--hidden 64 512 1024] [--seconds 5] [--repeats 5] [--json FILE]

PPO's policy with two hidden layers acts and nothing learns (schedule eager, off_policy_degree 1), so env steps per second
are those of acting and environments alone. Both ways are measured in turns. Of central inference: groups per forward pass,
and how long a group waits for its answer. The loop's lag is that of the training process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any, Literal, get_args

import aiorl
from aiorl.cli.session import run_async
from aiorl.events import Updated
from bench.blank import Frozen
from bench.common import print_machine, summarise, write_json

WARM_UP_UPDATES = 3
Way = Literal["worker", "central"]
WAYS: tuple[Way, ...] = get_args(Way)


async def measure(env: str, hidden: int, way: Way, options: argparse.Namespace) -> dict[str, float]:
    """Env steps per second between two updates that lie `seconds` apart."""
    with tempfile.TemporaryDirectory() as out:
        config = aiorl.Config(
            env=env, algo=Frozen(hidden=(hidden, hidden)), envs=options.envs, workers=options.workers, inference=way,
            inference_wait_ms=options.wait_ms, schedule="eager", off_policy_degree=1, total_steps=10**12, eval_every=0,
            checkpoint_every=0, device=options.device, torch_threads=options.torch_threads, out=f"{out}/run",
        )  # fmt: skip
        async with aiorl.Run(config) as run:
            seen: list[tuple[float, int]] = []
            async for event in run:
                if isinstance(event, Updated) and event.version > WARM_UP_UPDATES:
                    seen.append((event.seconds, event.env_steps))
                    if seen[-1][0] - seen[0][0] >= options.seconds:
                        break
            run.stop(final_evaluation=False)
        result = run.result
    took_s, steps = (b - a for a, b in zip(seen[0], seen[-1], strict=True))
    return {"env_steps_per_s": steps / took_s, "lag_p99_ms": result.event_loop_lag_ms["p99"], **result.inference}


async def compare(env: str, hidden: int, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            found[way].append(await measure(env, hidden, way, options))
    rates = {way: summarise([m["env_steps_per_s"] for m in found[way]]) for way in WAYS}
    middle = {name: statistics.median(m[name] for m in found["central"]) for name in found["central"][0]}
    lags = {way: statistics.median(m["lag_p99_ms"] for m in found[way]) for way in WAYS}
    ratio = rates["central"].median / rates["worker"].median
    worker, central = (f"{rates[way].text(0):>26}" for way in WAYS)
    print(f"{env:16} 2x{hidden:<5} worker {worker}  central {central}  = {ratio:4.2f}; "
          f"{middle['questions_per_forward']:.1f} groups a forward, answered in {middle['answered_in_ms']:.2f} ms; "
          f"lag p99 {lags['worker']:.1f} and {lags['central']:.1f} ms", flush=True)  # fmt: skip
    return {"env": env, "hidden": hidden, "ratio": ratio, "runs": found}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1", "LunarLander-v3"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 512, 1024])
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wait-ms", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    print("env steps per second: median [range]")
    rows = [await compare(env, hidden, options) for env in options.env for hidden in options.hidden]
    write_json(options.json, {"settings": {k: v for k, v in vars(options).items() if k != "json"}, "rows": rows})


if __name__ == "__main__":
    run_async(main())
