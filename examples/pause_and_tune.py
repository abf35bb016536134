"""Follow a run by its events, hold it, change the learning rate between two updates, and let it go on.

python -m examples.pause_and_tune
"""

from __future__ import annotations

import asyncio

import aiorl


async def main(total_steps: int = 60_000, pause_at: int = 10) -> aiorl.Result:
    config = aiorl.Config(env="CartPole-v1", total_steps=total_steps, seed=1, envs=8, workers=1)
    async with aiorl.Run(config) as run:
        async for event in run:
            match event:
                case aiorl.Updated(version=version) if version == pause_at:
                    await run.pause()  # returns when nothing moves: no step, no update, no evaluation
                    before = run.status()
                    print(f"paused after {before.version} updates, {before.env_steps} env steps; have a look around")
                    assert run.status().env_steps == before.env_steps
                    await run.set(learning_rate=1e-4)  # takes effect between two updates
                    path = await run.checkpoint()
                    print("checkpoint:", path)
                    run.resume()
                case aiorl.SettingsChanged(changes=changes, version=version):
                    print(f"from update {version} on: {changes}")
                case aiorl.Evaluated(mean_return=mean, version=version):
                    print(f"version {version}: mean return {mean:.1f}")
                case aiorl.Lagged(dropped=dropped):  # only frequent events are ever left out, never those above
                    print(f"was too slow for {dropped} progress events")
                case _:
                    pass
    return run.result


if __name__ == "__main__":
    asyncio.run(main())
