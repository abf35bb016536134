"""Send a run's metrics somewhere else, here to TensorBoard: whatever is to be recorded is a reader of events.

pip install "aiorl[tb]" && python -m examples.log_to_tensorboard && tensorboard --logdir runs
"""

from __future__ import annotations

import asyncio

from tensorboardX import SummaryWriter

import aiorl


async def record(run: aiorl.Run) -> None:
    """Write what `run` reports until it ends, each value at its number of env steps."""
    with SummaryWriter(str(run.directory)) as writer:
        async for event in run.events():
            match event:
                case aiorl.Updated(metrics=metrics, return_mean=mean, staleness=staleness):
                    values = {**metrics, "staleness": staleness, "update_seconds": event.update_seconds}
                    if mean is not None:
                        values["return"] = mean
                    for name, value in values.items():
                        writer.add_scalar(f"train/{name}", value, event.env_steps)
                case aiorl.Evaluated(mean_return=mean):
                    writer.add_scalar("evaluation/mean_return", mean, event.env_steps)
                case _:
                    pass


async def main(total_steps: int = 100_000) -> aiorl.Result:
    config = aiorl.Config.preset("CartPole-v1", total_steps=total_steps)
    async with aiorl.Run(config) as run, asyncio.TaskGroup() as group:
        group.create_task(record(run))
        return await run.wait()


if __name__ == "__main__":
    asyncio.run(main())
