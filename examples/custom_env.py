"""An environment of your own: any gymnasium environment that can be imported, given as `module:callable`.

python -m aiorl train examples.custom_env:GoToGoal --steps 50k
python -m examples.custom_env
"""

from __future__ import annotations

import asyncio
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

import aiorl

Obs = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


class GoToGoal(gymnasium.Env[Any, np.int64]):
    """A point on a line walks left, right or stays. -0.1 a step, +1 at the goal, cut off after `max_steps`."""

    def __init__(self, size: int = 10, max_steps: int = 40) -> None:
        self.observation_space = spaces.Dict(
            {"at": spaces.Box(0, 1, (1,), np.float32), "goal": spaces.Box(0, 1, (1,), np.float32)}
        )
        self.action_space = spaces.Discrete(3)
        self.size, self.max_steps = size, max_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)  # self.np_random is the only source of randomness, so a seed repeats an episode
        self.at, self.goal = self.np_random.choice(self.size, 2, replace=False)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        self.at = int(np.clip(self.at + (action - 1), 0, self.size - 1))
        self.steps += 1
        terminated = bool(self.at == self.goal)  # it is over: nothing is to be expected from here
        truncated = not terminated and self.steps >= self.max_steps  # only watched no longer: values go on
        return self._observe(), 1.0 if terminated else -0.1, terminated, truncated, {}

    def _observe(self) -> Obs:
        places = {"at": self.at, "goal": self.goal}
        return {name: np.array([place / (self.size - 1)], np.float32) for name, place in places.items()}


async def main(total_steps: int = 50_000) -> aiorl.Result:
    config = aiorl.Config(
        env="examples.custom_env:GoToGoal",  # by name, so that the worker processes can import it
        env_kwargs={"size": 6},
        total_steps=total_steps,
        envs=8,
        workers=1,
    )
    result = await aiorl.train(config)
    print("final evaluation:", result.final_evaluation)
    return result


if __name__ == "__main__":
    asyncio.run(main())
