# pyright: basic, reportMissingImports=false
"""Whole trainings with Stable-Baselines3."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from gymnasium import wrappers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import nn

from bench.peers import learning, works
from bench.peers.learning import DQN, SAC, Task


class Convolution(BaseFeaturesExtractor):
    """16 filters of 3x3 over [N, height, width, channels], flat."""

    def __init__(self, observation_space: Any) -> None:
        height, width, channels = observation_space.shape
        super().__init__(observation_space, 16 * (height - 2) * (width - 2))
        self.conv = nn.Conv2d(channels, 16, 3)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.conv(observations.permute(0, 3, 1, 2)).relu().flatten(1)


class Evaluating(BaseCallback):
    """Evaluates the deterministic policy when it is due; training waits."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self._task, self._seed, self._due = task, seed, task.eval_every
        self._env = make_env(task)
        self._env.reset(seed=seed + 10_000)
        self.found: list[list[float]] = []
        self.spent_s, self.begun_s = 0.0, time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._due < self._task.steps:
            self._due += self._task.eval_every
            self.evaluate()
        return True

    def evaluate(self) -> None:
        begun = time.perf_counter()
        totals = [self.episode() for _ in range(self._task.episodes)]
        now = time.perf_counter()
        self.spent_s += now - begun
        mean, deviation = float(np.mean(totals)), float(np.std(totals))
        self.found.append([self.num_timesteps, now - self.begun_s, mean, deviation])
        learning.told(f"sb3 {self._task.env}", self._seed, *self.found[-1][:3])

    def episode(self) -> float:
        obs, _ = self._env.reset()
        total, over = 0.0, False
        while not over:
            action, _ = self.model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = self._env.step(action)
            total, over = total + float(reward), terminated or truncated
        return total


def make_env(task: Task) -> Any:
    """As aiorl makes it: Atari by gymnasium's preprocessing, rewards not clipped, episodes not ended with a life."""
    if not task.env.startswith("ALE/"):
        return works.make_env(task.env)
    game = wrappers.AtariPreprocessing(gymnasium.make(task.env, disable_env_checker=True, frameskip=1))
    return wrappers.FrameStackObservation(game, task.frame_stack, padding_type="zero")


def features(h: DQN) -> dict[str, Any]:
    if h.network == "nature":
        return {"features_extractor_class": NatureCNN, "net_arch": []}  # its 512 are what features have
    return {"features_extractor_class": Convolution, "net_arch": list(h.hidden)}


def model_of(task: Task, seed: int) -> Any:
    h, venv = task.learner, VecMonitor(DummyVecEnv([partial(make_env, task)] * task.envs))
    gradient_steps = h.ratio * task.envs  # after each step of all environments
    common: dict[str, Any] = {
        "learning_rate": h.learning_rate, "batch_size": h.batch, "buffer_size": h.capacity, "learning_starts": h.warmup,
        "train_freq": 1, "gradient_steps": int(gradient_steps), "gamma": h.gamma, "seed": seed, "device": "cpu",
    }  # fmt: skip
    if gradient_steps != common["gradient_steps"]:
        raise SystemExit(f"{gradient_steps} gradient steps for a step of {task.envs} environments cannot be done")
    if isinstance(h, SAC):
        return stable_baselines3.SAC("MlpPolicy", venv, tau=h.tau, policy_kwargs={"net_arch": list(h.hidden)}, **common)
    assert isinstance(h, DQN)
    return stable_baselines3.DQN(
        "MlpPolicy", venv, target_update_interval=h.target_every, exploration_fraction=h.epsilon_fraction,
        exploration_final_eps=h.epsilon_end, max_grad_norm=h.max_grad_norm,
        policy_kwargs=features(h), **common,
    )  # fmt: skip


def train(task: Task, seed: int, way: str) -> dict[str, Any]:
    if task.env.startswith("ALE/"):
        import ale_py

        gymnasium.register_envs(ale_py)
    if task.env.startswith("MinAtar/"):
        from minatar.gym import register_envs

        register_envs()
    # In its favour: Adam's means of dead units become subnormal, and its step then takes several times as long.
    torch.set_flush_denormal(True)
    begun_at, watch = time.time(), Evaluating(task, seed)
    model = model_of(task, seed)
    model.learn(task.steps, callback=watch)
    train_s = time.perf_counter() - watch.begun_s - watch.spent_s
    watch.evaluate()
    returns = [float(episode["r"]) for episode in model.ep_info_buffer]  # of the last 100
    return {
        "env_steps": model.num_timesteps, "gradient_steps": model._n_updates, "train_s": train_s, "begun_at": begun_at,
        "train_return": float(np.mean(returns)) if returns else None, "evaluations": watch.found,
    }  # fmt: skip


if __name__ == "__main__":
    learning.carry_out(train, "stable-baselines3")
