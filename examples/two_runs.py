"""Two trainings side by side in one event loop, sharing nothing: compare two learning rates.

python -m examples.two_runs
"""

from __future__ import annotations

import asyncio

import aiorl


async def train_one(learning_rate: float, total_steps: int) -> aiorl.Result:
    config = aiorl.Config(
        env="CartPole-v1",
        algo=aiorl.PPO(learning_rate=learning_rate),
        total_steps=total_steps,
        envs=8,
        workers=1,
    )
    return await aiorl.train(config)  # a Run from start to end; cancelling this task ends its processes


async def main(total_steps: int = 50_000, learning_rates: tuple[float, ...] = (1e-3, 1e-4)) -> list[aiorl.Result]:
    async with asyncio.TaskGroup() as group:  # one failing run ends the other, as with any two tasks
        tasks = [group.create_task(train_one(rate, total_steps)) for rate in learning_rates]
    results = [task.result() for task in tasks]
    for rate, result in zip(learning_rates, results, strict=True):
        print(f"learning rate {rate:g}, in {result.directory}: {result.final_evaluation}")
    return results


if __name__ == "__main__":
    asyncio.run(main())
