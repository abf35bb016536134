"""What is held equal between aiorl and its peers: environments, networks, hyper-parameters, and what the clock counts.

Every peer's program imports this in its own virtual environment, so it needs gymnasium and NumPy, and torch only where a
network is made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np

RESULT = "RESULT "  # begins the line that a program answers with: libraries print, too
ENVS = 16
SLOW_ENVS, SLOW_MEAN_S, SLOW_SIGMA = 32, 0.010, 1.0
SLOW_IDEAL = SLOW_ENVS / SLOW_MEAN_S  # env steps per second

HIDDEN = (64, 64)


@dataclass(frozen=True)
class PPO:
    """W2, with separate tanh networks of `HIDDEN` for policy and value and a constant learning rate."""

    steps: int = 128  # of each environment in a rollout
    minibatch: int = 256
    epochs: int = 4
    learning_rate: float = 1e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.0
    value: float = 0.5
    grad_norm: float = 0.5
    rate_over: int = 200_000  # env steps that are timed at least
    cap: int = 400_000  # env steps after which a run that has not reached the target is given up
    target: float = 475.0
    window: int = 20  # training episodes whose mean has to reach the target

    @property
    def rollout(self) -> int:
        return ENVS * self.steps


@dataclass(frozen=True)
class DQN:
    """W3, one environment, relu. Schedules of epsilon differ between libraries; they cost nothing."""

    env: str = "LunarLander-v3"
    hidden: tuple[int, ...] = (256, 256)
    batch: int = 128
    learning_rate: float = 6.3e-4
    gamma: float = 0.99
    capacity: int = 50_000
    warmup: int = 1_000
    every: int = 4  # env steps for each gradient step
    target_every: int = 250  # gradient steps
    steps: int = 20_000  # after warm-up


@dataclass(frozen=True)
class SAC:
    """W4, one environment, relu, a gradient step for each env step after the random ones. The temperature begins at 1 and is
    tuned to an entropy of minus the number of actions."""

    env: str = "Pendulum-v1"
    bound: float = 2.0  # of the actions
    hidden: tuple[int, ...] = (256, 256)
    batch: int = 256
    learning_rate: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.005
    capacity: int = 50_000
    warmup: int = 1_000  # env steps with random actions
    rate_over: int = 4_000
    cap: int = 10_000
    target: float = -200.0
    window: int = 10


class Slow(gymnasium.Wrapper[Any, Any, Any, Any]):
    """step() first sleeps a lognormal time."""

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        super().__init__(env)
        self._rng = np.random.default_rng(seed)
        self._mu = math.log(SLOW_MEAN_S) - SLOW_SIGMA**2 / 2

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        time.sleep(self._rng.lognormal(self._mu, SLOW_SIGMA))
        return self.env.step(action)


def make_env(name: str = "CartPole-v1") -> gymnasium.Env[Any, Any]:
    return gymnasium.make(name, disable_env_checker=True)


def make_slow(seed: int = 0) -> gymnasium.Env[Any, Any]:
    return Slow(make_env(), seed)


def env_makers(n: int = ENVS, name: str = "CartPole-v1") -> list[Callable[[], Any]]:
    return [partial(make_env, name) for _ in range(n)]


def slow_makers() -> list[Callable[[], Any]]:
    return [partial(make_slow, i) for i in range(SLOW_ENVS)]


def mlp(*sizes: int, activation: str = "Tanh") -> Any:
    """A torch network whose hidden layers are followed by an activation."""
    from torch import nn

    layers: list[Any] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), getattr(nn, activation)()]
    return nn.Sequential(*layers[:-1])


def acting(kind: str) -> Callable[[Any], Any]:
    """CartPole observations [N, 4] to actions [N] for environments that come without a policy.

    `random`, or a 64-64 tanh network in torch that samples through torch's Categorical (`categorical`), as libraries do, or
    by Gumbel noise (`mlp`), which takes less time. `numpy` is that without torch, which is how aiorl acts.
    """
    rng = np.random.default_rng(0)
    if kind == "random":
        return lambda obs: rng.integers(0, 2, size=len(obs))
    import torch

    net = mlp(4, *HIDDEN, 2)
    if kind == "numpy":
        pairs = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in net[::2]]

        def act_numpy(obs: Any) -> Any:
            x = np.asarray(obs, np.float32)
            for weight, bias in pairs[:-1]:
                x = np.tanh(x @ weight + bias)
            logits = x @ pairs[-1][0] + pairs[-1][1]
            return (logits - np.log(rng.standard_exponential(logits.shape, np.float32))).argmax(1)

        return act_numpy

    def act(obs: Any) -> Any:
        with torch.inference_mode():
            logits = net(torch.as_tensor(np.asarray(obs), dtype=torch.float32))
            if kind == "categorical":
                return torch.distributions.Categorical(logits=logits, validate_args=False).sample().numpy()
            return (logits - torch.empty_like(logits).exponential_().log_()).argmax(1).numpy()

    return act


@dataclass
class Task:
    """One measurement. `begun_at` is when the clock started (seconds of the epoch): what came before is start-up."""

    work: str
    variant: str
    seed: int
    seconds: float
    ppo: PPO = field(default_factory=PPO)
    dqn: DQN = field(default_factory=DQN)
    sac: SAC = field(default_factory=SAC)
    begun_at: float | None = None

    def begin(self) -> float:
        """Start the clock; `time.perf_counter()`."""
        self.begun_at = time.time()
        return time.perf_counter()

    def rate(self, step: Callable[[], int], warm_s: float = 0.5) -> dict[str, float]:
        """Env steps per second of a `step` that returns how many it made."""
        end = time.perf_counter() + warm_s
        while time.perf_counter() < end:
            step()
        steps, begun = 0, self.begin()
        while (elapsed := time.perf_counter() - begun) < self.seconds:
            steps += step()
        return {"env_steps_per_s": steps / elapsed}


class Training:
    """The clock of W2 and W4: when the mean of the last training episodes first met the target, and the rate of the whole
    run. Ends at the target or the cap, but no sooner than after `rate_over` env steps."""

    def __init__(self, task: Task, goal: PPO | SAC) -> None:
        self._goal, self._returns = goal, deque[float](maxlen=goal.window)
        self._solved: tuple[float, int] | None = None
        self._begun = task.begin()

    def episode(self, total: float, env_steps: int, seconds: float | None = None) -> None:
        """An episode has ended; `seconds` since the start if that is known better than by looking now."""
        self._returns.append(float(total))
        full = len(self._returns) == self._goal.window
        if self._solved is None and full and sum(self._returns) >= self._goal.target * self._goal.window:
            self._solved = (time.perf_counter() - self._begun if seconds is None else seconds, env_steps)

    def is_over(self, env_steps: int) -> bool:
        return env_steps >= (self._goal.cap if self._solved is None else self._goal.rate_over)

    def figures(
        self, env_steps: int, seconds: float | None = None, updates: int | None = None
    ) -> dict[str, float | None]:
        """`updates` are gradient steps, if they count."""
        elapsed = time.perf_counter() - self._begun if seconds is None else seconds
        solved_s, solved_steps = self._solved or (None, None)
        rates = {"env_steps_per_s": env_steps / elapsed}
        if updates is not None:
            rates["updates_per_s"] = updates / elapsed
        return {**rates, "seconds_to_target": solved_s, "env_steps_to_target": solved_steps}


def dqn_figures(env_steps: int, updates: int, begun: float) -> dict[str, float]:
    """Of W3, after warm-up."""
    elapsed = time.perf_counter() - begun
    return {"env_steps_per_s": env_steps / elapsed, "updates_per_s": updates / elapsed}


def carry_out(measure: Callable[[Task], dict[str, Any]], *packages: str) -> None:
    """The program of a peer: measure what the command line says, answer with one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--smoke", action="store_true", help="so little work that only its running is shown")
    options = parser.parse_args()
    task = Task(options.work, options.variant, options.seed, options.seconds)
    if options.smoke:
        task.seconds, task.ppo, task.dqn = 0.5, PPO(rate_over=8_192, cap=8_192), DQN(steps=2_000)
        task.sac = SAC(warmup=200, rate_over=400, cap=400)
    one_thread()
    figures = measure(task)
    installed = versions("torch", "gymnasium", "numpy", *packages)
    answer = {"figures": figures, "begun_at": task.begun_at, "versions": installed}
    print(RESULT + json.dumps(answer), flush=True)


def one_thread() -> None:
    """One torch thread here and in what is started from here; `__main__` has set it for NumPy's libraries."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def versions(*packages: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
