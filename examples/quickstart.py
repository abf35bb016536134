"""Train an agent inside your own async program, stop when it is good enough, and use it.

python -m examples.quickstart
"""

from __future__ import annotations

import asyncio

import numpy as np

import aiorl


async def main(total_steps: int = 200_000) -> aiorl.Result:
    config = aiorl.Config(
        env="CartPole-v1",
        algo=aiorl.PPO(learning_rate=2.5e-4),
        total_steps=total_steps,
        seed=7,
        envs=16,
        workers=2,
        off_policy_degree=1,
    )
    async with aiorl.Run(config) as run:  # returns when every worker is ready
        async for event in run:  # ends with the run; other coroutines of this program go on meanwhile
            match event:
                case aiorl.Evaluated(mean_return=mean, env_steps=steps):
                    print(f"{steps:>8} env steps: mean return {mean:.1f}")
                    if mean >= 475:
                        run.stop()
    policy = run.policy()
    print("action for a pole that stands still:", policy(np.zeros(4, np.float32)))
    print("everything else is in", run.directory)
    return run.result


if __name__ == "__main__":  # workers import this file again: without the guard each would start a training
    asyncio.run(main())
