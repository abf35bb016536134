"""Whole trainings that are held equal: the environments, the learners' settings, and how a program of one run answers.

Both sides import this in their own virtual environments, so it needs neither of the two libraries, nor torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bench.peers import works


@dataclass(frozen=True)
class SAC:
    """2x256 relu networks for the actor and two critics, Adam, temperature tuned from 1 to minus the number of actions."""

    learning_rate: float = 3e-4
    batch: int = 256
    capacity: int = 1_000_000
    warmup: int = 10_000  # env steps with random actions and no gradient step
    ratio: float = 1.0  # gradient steps per env step
    gamma: float = 0.99
    tau: float = 0.005
    hidden: tuple[int, ...] = (256, 256)


@dataclass(frozen=True)
class DQN:
    """A convolutional network, relu, Adam, Huber loss, no double Q-learning.

    The numbers are those of Young and Tian 2019 (arXiv 1903.03176), who use RMSprop, and a gradient step for each env step.
    Their network, "small", has a convolution of 16 3x3 filters and a layer of 128; "nature" is that of Mnih et al. 2015.
    """

    learning_rate: float = 2.5e-4
    batch: int = 32
    capacity: int = 100_000
    warmup: int = 5_000
    ratio: float = 0.25  # with theirs a run of Stable-Baselines3 would take an hour
    gamma: float = 0.99
    target_every: int = 1_000  # env steps
    epsilon_end: float = 0.1
    epsilon_fraction: float = 0.1  # of the run, over which epsilon falls from 1
    max_grad_norm: float = 10.0
    network: Literal["small", "nature"] = "small"
    hidden: tuple[int, ...] = (128,)


# As Stable-Baselines3's zoo has it for Atari, with a shorter warm-up.
PONG = DQN(1e-4, warmup=10_000, epsilon_end=0.01, network="nature", hidden=(512,))


@dataclass(frozen=True)
class Task:
    """One training: `episodes` of the deterministic policy every `eval_every` env steps and at the end.

    Scores count from what acting at `random` returns (0) to `good` (1): gymnasium's `reward_threshold` where there is one,
    else a return that was chosen before anything was measured.
    """

    env: str
    learner: SAC | DQN
    steps: int
    envs: int
    eval_every: int
    random: float
    good: float
    episodes: int = 10
    frame_stack: int = 1

    @property
    def algo(self) -> str:
        return type(self.learner).__name__.lower()

    def of(self, steps: int) -> Task:
        """The same for another number of env steps. A buffer that holds them all is no larger than that."""
        capacity = min(self.learner.capacity, steps)
        return dataclasses.replace(self, steps=steps, learner=dataclasses.replace(self.learner, capacity=capacity))

    def small(self) -> Task:
        """So little that only its running is shown."""
        learner = dataclasses.replace(self.learner, warmup=200, hidden=(32,))
        return dataclasses.replace(self, learner=learner, eval_every=400, episodes=1).of(800)

    def score(self, mean_return: float) -> float:
        return (mean_return - self.random) / (self.good - self.random)

    @property
    def text(self) -> str:
        parts = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.learner).items())
        pace = "" if self.learner.ratio == 1 else f"; a gradient step every {1 / self.learner.ratio:g} env steps"
        stack = f" of {self.frame_stack} frames seen at once" if self.frame_stack > 1 else ""
        often = f"{self.episodes} episodes every {self.eval_every:,} env steps"
        return f"{self.algo} with {parts}{pace}; {self.envs} environments{stack}; {often}"


TASKS = {
    task.env: task
    for task in (
        Task("Pendulum-v1", SAC(1e-3, warmup=1_000), 20_000, 4, 2_000, random=-1_250, good=-200, episodes=20),
        Task("HalfCheetah-v5", SAC(), 100_000, 2, 10_000, random=-260, good=4_800),
        Task("Hopper-v5", SAC(), 100_000, 2, 10_000, random=18, good=3_800),
        Task("MinAtar/Breakout-v1", DQN(), 1_000_000, 8, 50_000, random=0.4, good=10, episodes=20),
        Task("MinAtar/Asterix-v1", DQN(), 1_000_000, 8, 50_000, random=0.5, good=10, episodes=20),
        Task("ALE/Pong-v5", PONG, 30_000, 8, 10_000, random=-20.7, good=18, episodes=2, frame_stack=4),
    )
}


OF_DQN = ("mean", "qrdqn")  # participants that there are only where DQN is trained


def chosen(env: str, steps: int | None, episodes: int | None, small: bool) -> Task:
    """The training of that name: so long, with evaluations of so many episodes (None: as it is there), or very small."""
    task = TASKS[env]
    if small:
        return task.small()
    return dataclasses.replace(task.of(steps or task.steps), episodes=episodes or task.episodes)


def told(name: str, seed: int, env_steps: float, seconds: float, mean: float) -> None:
    """A line about an evaluation, for whoever waits."""
    text = f"    {name} seed {seed}: {env_steps:,.0f} env steps in {seconds:,.0f} s, return {mean:,.1f}"
    print(text, file=sys.stderr, flush=True)


def carry_out(train: Callable[[Task, int, str], dict[str, Any]], *packages: str) -> None:
    """The program of one run: ENV WAY SEED STEPS, and one line as the answer.

    `train` returns env_steps, gradient_steps, train_return (mean of the last 100 training episodes, None if none ended),
    evaluations ([env steps, seconds, mean, deviation] each, the last one final), begun_at (when everything was imported, in
    seconds of the epoch; those of evaluations count from then) and train_s (up to the last gradient step, without the
    evaluations that training waited for). What the process had of memory at most is added, without processes of its own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("env", choices=TASKS)
    parser.add_argument("way")
    parser.add_argument("seed", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    task = chosen(options.env, options.steps, options.episodes, options.small)
    found = train(task, options.seed, options.way)
    installed = works.versions("torch", "gymnasium", "numpy", "mujoco", "minatar", *packages)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(works.RESULT + json.dumps({**found, "memory_mib": round(most), "versions": installed}), flush=True)
