# pyright: basic, reportMissingImports=false
"""Stable-Baselines3."""

from __future__ import annotations

from functools import partial
from typing import Any

import stable_baselines3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from bench.peers import works
from bench.peers.works import Task, Training, dqn_figures

VECTORS = {"DummyVecEnv": DummyVecEnv, "SubprocVecEnv": partial(SubprocVecEnv, start_method="fork")}


def collect(task: Task) -> dict[str, Any]:
    name, kind = task.variant.split(" / ")
    act = works.acting(kind)
    venv = VECTORS[name.split()[0]](works.slow_makers() if task.work == "w5" else works.env_makers())
    obs = venv.reset()

    def step() -> int:
        nonlocal obs
        obs, *_ = venv.step(act(obs))
        return venv.num_envs

    try:
        return task.rate(step)
    finally:
        venv.close()


class Watch(BaseCallback):
    """Tells the clock of every finished episode, and stops when it is over."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self._clock = training

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._clock.episode(info["episode"]["r"], self.num_timesteps)
        return not self._clock.is_over(self.num_timesteps)


def train_ppo(task: Task) -> dict[str, Any]:
    h, venv = task.ppo, VecMonitor(VECTORS[task.variant](works.env_makers()))
    net_arch = {"pi": list(works.HIDDEN), "vf": list(works.HIDDEN)}
    model = stable_baselines3.PPO(
        "MlpPolicy", venv, n_steps=h.steps, batch_size=h.minibatch, n_epochs=h.epochs, learning_rate=h.learning_rate,
        gamma=h.gamma, gae_lambda=h.gae_lambda, clip_range=h.clip, ent_coef=h.entropy, vf_coef=h.value,
        max_grad_norm=h.grad_norm, seed=task.seed, device="cpu", policy_kwargs={"net_arch": net_arch},
    )  # fmt: skip
    training = Training(task, task.ppo)
    model.learn(h.cap, callback=Watch(training))
    figures = training.figures(model.num_timesteps)
    venv.close()
    return figures


def train_dqn(task: Task) -> dict[str, Any]:
    h = task.dqn
    model = stable_baselines3.DQN(
        "MlpPolicy", DummyVecEnv(works.env_makers(1, h.env)), learning_rate=h.learning_rate, batch_size=h.batch,
        buffer_size=h.capacity, learning_starts=h.warmup, train_freq=h.every, gradient_steps=1, gamma=h.gamma,
        target_update_interval=h.target_every * h.every, seed=task.seed, device="cpu",
        policy_kwargs={"net_arch": list(h.hidden)},
    )  # fmt: skip
    model.learn(h.warmup)
    before, begun = model._n_updates, task.begin()
    model.learn(h.steps, reset_num_timesteps=False)
    return dqn_figures(h.steps, model._n_updates - before, begun)


def train_sac(task: Task) -> dict[str, Any]:
    h, venv = task.sac, VecMonitor(DummyVecEnv(works.env_makers(1, task.sac.env)))
    model = stable_baselines3.SAC(
        "MlpPolicy", venv, learning_rate=h.learning_rate, batch_size=h.batch, buffer_size=h.capacity,
        learning_starts=h.warmup, train_freq=1, gradient_steps=1, gamma=h.gamma, tau=h.tau, seed=task.seed,
        device="cpu", policy_kwargs={"net_arch": list(h.hidden)},
    )  # fmt: skip
    training = Training(task, h)
    model.learn(h.cap, callback=Watch(training))
    return training.figures(model.num_timesteps, updates=model._n_updates)


if __name__ == "__main__":
    works.carry_out(
        lambda task: {"w2": train_ppo, "w3": train_dqn, "w4": train_sac}.get(task.work, collect)(task),
        "stable-baselines3",
    )
