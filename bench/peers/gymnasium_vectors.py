"""gymnasium's vector environments: W1 and W5. The loop around them and the policy are ours."""

from __future__ import annotations

from typing import Any

import gymnasium

from bench.peers import works
from bench.peers.works import Task

MAKERS = {
    "SyncVectorEnv": lambda: gymnasium.vector.SyncVectorEnv(works.env_makers()),
    "AsyncVectorEnv 16 processes": lambda: gymnasium.vector.AsyncVectorEnv(works.env_makers()),
    "CartPoleVectorEnv": lambda: gymnasium.make_vec(
        "CartPole-v1", num_envs=works.ENVS, vectorization_mode="vector_entry_point"
    ),
    "AsyncVectorEnv 32 processes": lambda: gymnasium.vector.AsyncVectorEnv(works.slow_makers()),
}


def measure(task: Task) -> dict[str, Any]:
    name, kind = task.variant.split(" / ")
    act, venv = works.acting(kind), MAKERS[name]()
    obs, _ = venv.reset(seed=task.seed)

    def step() -> int:
        nonlocal obs
        obs, *_ = venv.step(act(obs))
        return venv.num_envs

    try:
        return task.rate(step)
    finally:
        venv.close()


if __name__ == "__main__":
    works.carry_out(measure)
