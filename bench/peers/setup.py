"""The peers' virtual environments: one each where their requirements do not agree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

TORCH = "torch>=2.13,<2.14"
GYMNASIUM = "gymnasium[classic-control,box2d]>=1.4,<1.5"

# pufferlib fetches parts of itself from elsewhere when it is built, from 2.0 on; 1.0 pins old versions and needs none of
# them. RLlib pins a gymnasium whose box2d extra has to be compiled, so it gets the wheel by its own name.
STEPS: dict[str, list[list[str]]] = {
    "common": [
        [TORCH],
        ["stable-baselines3>=2.9,<2.10", GYMNASIUM, "gymnasium[mujoco,atari]", "opencv-python-headless", "minatar"],
    ],
    "puffer": [
        [TORCH, "numpy<2", "Cython", "wheel", "setuptools<80", "pettingzoo", "psutil"],
        ["--no-deps", "--no-build-isolation", "pufferlib==1.0.1"],
        ["--no-build-isolation", "gym==0.23", "gymnasium==0.29.1", "numpy<2"],
    ],
    "sf": [[TORCH], ["sample-factory>=2.1.1,<2.2", "gymnasium[classic-control]"]],
    "tianshou": [[TORCH], ["tianshou>=2.0.1,<2.1", GYMNASIUM]],
    "torchrl": [[TORCH], ["torchrl>=0.14,<0.15", "tensordict>=0.14,<0.15", GYMNASIUM]],
    "ray": [[TORCH], ["ray[rllib]>=2.60,<2.61", "gymnasium[classic-control]", "Box2D"]],
}


def set_up(directory: Path, names: Iterable[str] = STEPS) -> None:
    """Make those of `names` that are not there yet, a few minutes in all. What pip says goes to NAME.log beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        steps = STEPS[name]
        home, begun = directory / name, time.perf_counter()
        if is_ready(home / "bin" / "python"):
            print(f"{name}: already there")
            continue
        with (directory / f"{name}.log").open("w", encoding="utf-8") as log:
            commands = [[sys.executable, "-m", "venv", str(home)]]
            commands += [[str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *step] for step in steps]
            environment = {**os.environ, "NO_OCEAN": "1"}
            done = all(subprocess.call(c, stdout=log, stderr=log, env=environment) == 0 for c in commands)
        if done:
            (home / ".ok").touch()
        state = "ready" if done else f"failed, see {log.name}"
        print(f"{name}: {state} after {time.perf_counter() - begun:.0f} s", flush=True)


def is_ready(python: Path) -> bool:
    """Whether everything was installed for this interpreter."""
    return python.exists() and (python == Path(sys.executable) or (python.parents[1] / ".ok").exists())
