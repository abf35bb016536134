"""Learn hockey by self-play: against bots, earlier versions and oneself, and see who would beat whom.

python -m examples.hockey_selfplay
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiorl

BOTS = {"weak": 0.2, "strong": 0.1}  # share of games against each; the rest is against what it was before


async def main(total_steps: int = 300_000, **changes: Any) -> aiorl.Result:
    inner = aiorl.TD3(learning_rate=5e-4, gamma=0.98, n_step=3, update_ratio=0.03, warmup=2_000, noise=0.2)
    config = aiorl.Config(
        env="aiorl.envs.hockey.selfplay:hockey",
        env_kwargs={"frame_skip": 2, "shaping": 2.0, "shaping_gamma": 0.98},  # an action lasts two steps of the game
        algo=aiorl.SelfPlay.of(inner, bots=BOTS, pool=5, admit_every=100, matchmaking="hard", self_share=0.1),
        total_steps=total_steps,
        envs=16,
        segment_length=16,
        off_policy_degree=1,
        eval_suites={bot: aiorl.EvalSuite(env_kwargs={"opponent": bot, "frame_skip": 1, "shaping": 0.0}) for bot in BOTS},
    ).replace(**changes)
    async with aiorl.Run(config) as run:
        async for event in run:
            match event:
                case aiorl.Evaluated(suite=bot, wins=float(wins), losses=float(losses), env_steps=steps):
                    print(f"{steps:>8} env steps: {wins:4.0%} won and {losses:4.0%} lost against {bot}")
                case aiorl.Standings(opponents=opponents, env_steps=steps):  # somebody has joined the pool, or the end
                    print(f"{steps:>8} env steps, by rating:")
                    for one in sorted(opponents, key=lambda one: -one.elo):  # "self" is the learner
                        print(f"{one.name:>20} {one.elo:5.0f}, {one.wins or 0:4.0%} of {one.games:3.0f} training games won")
    return run.result


if __name__ == "__main__":  # workers import this file again: without the guard each would start a training
    asyncio.run(main())
