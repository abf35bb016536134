# pyright: basic, reportMissingImports=false
"""Tianshou: raw vector environments (W1, W5), PPO (W2), DQN (W3), SAC (W4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tianshou.algorithm import DQN, PPO, SAC
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.modelfree.sac import AutoAlpha, SACPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, ShmemVectorEnv, SubprocVectorEnv
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode
from torch import nn

from bench.peers import works
from bench.peers.works import ENVS, HIDDEN, Task, Training, dqn_figures

VECTORS = {c.__name__: c for c in (DummyVectorEnv, ShmemVectorEnv, SubprocVectorEnv)}


def collect(task: Task) -> dict[str, Any]:
    """All environments in step, or with `wait_num=N` whichever N are ready first."""
    name, kind = task.variant.split(" / ")
    wait = int(name.partition("wait_num=")[2] or 0)
    makers = works.slow_makers() if task.work == "w5" else works.env_makers()
    venv, act = VECTORS[name.split()[0]](makers, wait_num=wait or None), works.acting(kind)
    obs, ids = np.asarray(venv.reset()[0]), np.arange(len(makers))

    def step() -> int:
        nonlocal obs, ids
        answer, _, terminated, truncated, info = venv.step(act(obs), ids)
        obs, ended = np.array(answer), terminated | truncated
        if wait:
            ids = np.array([i["env_id"] for i in info])
        if ended.any():
            obs[ended] = venv.reset(ids[ended])[0]
        return len(ids)

    try:
        return task.rate(step)
    finally:
        venv.close()


def train_ppo(task: Task) -> dict[str, Any]:
    h, (actor_net, critic_net) = task.ppo, (
        Net(state_shape=4, hidden_sizes=list(HIDDEN), activation=nn.Tanh) for _ in range(2)
    )
    policy = ProbabilisticActorPolicy(
        actor=DiscreteActor(preprocess_net=actor_net, action_shape=2, softmax_output=False),
        action_space=works.make_env().action_space,
        action_scaling=False,
        dist_fn=lambda logits: torch.distributions.Categorical(logits=logits),
    )
    algorithm = PPO(
        policy=policy, critic=DiscreteCritic(preprocess_net=critic_net), optim=AdamOptimizerFactory(lr=h.learning_rate),
        eps_clip=h.clip, vf_coef=h.value, ent_coef=h.entropy, max_grad_norm=h.grad_norm, gae_lambda=h.gae_lambda,
        gamma=h.gamma,
    )  # fmt: skip
    venv, buffer, steps = VECTORS[task.variant](works.env_makers()), VectorReplayBuffer(h.rollout, ENVS), 0
    venv.seed(task.seed)
    collector = Collector(algorithm, venv, buffer)
    collector.reset()
    training = Training(task, task.ppo)
    while not training.is_over(steps):
        with policy_within_training_step(algorithm.policy):
            found = collector.collect(n_step=h.rollout)
            steps += found.n_collected_steps
            for total in found.returns:
                training.episode(total, steps)
            with torch_train_mode(algorithm):
                algorithm.update(buffer, h.minibatch, h.epochs)
        collector.reset_buffer(keep_statistics=True)
    figures = training.figures(steps)
    venv.close()
    return figures


def train_dqn(task: Task) -> dict[str, Any]:
    h, steps, updates = task.dqn, 0, 0
    policy = DiscreteQLearningPolicy(
        model=Net(state_shape=8, action_shape=4, hidden_sizes=list(h.hidden)),
        action_space=works.make_env(h.env).action_space,
        eps_training=0.1,
    )
    algorithm = DQN(
        policy=policy, optim=AdamOptimizerFactory(lr=h.learning_rate), gamma=h.gamma, is_double=False,
        target_update_freq=h.target_every,
    )  # fmt: skip
    buffer = VectorReplayBuffer(h.capacity, 1)
    collector = Collector(algorithm, DummyVectorEnv(works.env_makers(1, h.env)), buffer, exploration_noise=True)
    collector.reset()
    collector.collect(n_step=h.warmup, random=True)
    begun = task.begin()
    while steps < h.steps:
        with policy_within_training_step(algorithm.policy):
            steps += collector.collect(n_step=h.every).n_collected_steps
            with torch_train_mode(algorithm):
                algorithm.update(buffer, h.batch)
        updates += 1
    return dqn_figures(steps, updates, begun)


def train_sac(task: Task) -> dict[str, Any]:
    h, adam = task.sac, AdamOptimizerFactory(lr=task.sac.learning_rate)
    body = {"state_shape": 3, "hidden_sizes": list(h.hidden)}
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(**body), action_shape=1, unbounded=True, conditioned_sigma=True
    )
    critics = [ContinuousCritic(preprocess_net=Net(**body, action_shape=1, concat=True)) for _ in range(2)]
    algorithm = SAC(
        policy=SACPolicy(actor=actor, action_space=works.make_env(h.env).action_space), policy_optim=adam,
        critic=critics[0], critic_optim=adam, critic2=critics[1], critic2_optim=adam, tau=h.tau, gamma=h.gamma,
        alpha=AutoAlpha(-1.0, 0.0, adam),
    )  # fmt: skip
    venv, buffer = DummyVectorEnv(works.env_makers(1, h.env)), VectorReplayBuffer(h.capacity, 1)
    venv.seed(task.seed)
    collector = Collector(algorithm, venv, buffer, exploration_noise=True)
    collector.reset()
    training = Training(task, h)
    steps = collector.collect(n_step=h.warmup, random=True).n_collected_steps
    while not training.is_over(steps):
        with policy_within_training_step(algorithm.policy):
            found = collector.collect(n_step=1)
            steps += found.n_collected_steps
            for total in found.returns:
                training.episode(total, steps)
            with torch_train_mode(algorithm):
                algorithm.update(buffer, h.batch)
    return training.figures(steps, updates=steps - h.warmup)


def measure(task: Task) -> dict[str, Any]:
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)
    return {"w2": train_ppo, "w3": train_dqn, "w4": train_sac}.get(task.work, collect)(task)


if __name__ == "__main__":
    works.carry_out(measure, "tianshou")
