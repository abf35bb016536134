# pyright: basic, reportMissingImports=false
"""pufferlib's vector environments: W1. The wheel that can be installed has no trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pufferlib.emulation
import pufferlib.vector

from bench.peers import works
from bench.peers.works import Task

SETTINGS: dict[str, dict[str, Any]] = {
    "Serial": {"backend": pufferlib.vector.Serial},
    "Multiprocessing 2 x 8, full batch": {"backend": pufferlib.vector.Multiprocessing, "num_workers": 2},
    "Multiprocessing 2 x 8, batch 8": {"backend": pufferlib.vector.Multiprocessing, "num_workers": 2, "batch_size": 8},
}


def make() -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=works.make_env)


def measure(task: Task) -> dict[str, Any]:
    name, kind = task.variant.split(" / ")
    act = works.acting(kind)
    venv = pufferlib.vector.make(make, num_envs=works.ENVS, **SETTINGS[name])
    venv.async_reset(task.seed)

    def step() -> int:
        obs = venv.recv()[0]
        venv.send(act(np.asarray(obs).view(np.float32).reshape(len(obs), -1)[:, :4]))
        return len(obs)

    try:
        return task.rate(step)
    finally:
        venv.close()


if __name__ == "__main__":
    works.carry_out(measure, "pufferlib")
