# pyright: basic, reportMissingImports=false
"""TorchRL: collectors (W1, W5), PPO (W2), DQN (W3) and SAC (W4) with its losses."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import AsyncEnvPool, GymWrapper, ParallelEnv, RewardSum, SerialEnv, TransformedEnv
from torchrl.modules import EGreedyModule, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, DQNLoss, HardUpdate, SACLoss, SoftUpdate

from bench.peers import works
from bench.peers.works import ENVS, HIDDEN, Task, Training, dqn_figures

warnings.filterwarnings("ignore")
logging.getLogger("torchrl").setLevel(logging.ERROR)


def wrapped(name: str = "CartPole-v1", slow: int | None = None) -> Any:
    env = works.make_env(name) if slow is None else works.make_slow(slow)
    return GymWrapper(env, categorical_action_encoding=True)


def serial(n: int) -> Any:
    return TransformedEnv(SerialEnv(n, wrapped), RewardSum())


def actor() -> Any:
    net = TensorDictModule(works.mlp(4, *HIDDEN, 2), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )


def collector(variant: str, policy: Any, frames: int) -> Any:
    """The collector that the variant names."""
    if variant.startswith("MultiAsyncCollector 32 x 1"):
        makers = [partial(wrapped, slow=i) for i in range(works.SLOW_ENVS)]
        return MultiAsyncCollector(makers, policy, frames_per_batch=16, total_frames=-1)
    halves = [partial(serial, ENVS // 2)] * 2
    if variant.startswith("MultiSync"):
        return MultiSyncCollector(halves, policy, frames_per_batch=frames, total_frames=-1, cat_results=0)
    if variant.startswith("MultiAsync"):
        return MultiAsyncCollector(halves, policy, frames_per_batch=frames, total_frames=-1)
    env = ParallelEnv(ENVS, wrapped) if "ParallelEnv" in variant else partial(serial, ENVS)
    return Collector(env, policy, frames_per_batch=frames, total_frames=-1)


def collect(task: Task) -> dict[str, Any]:
    kind = task.variant.split(" / ")[1]
    made = collector(task.variant, None if kind == "random" else actor(), 512)
    batches = iter(made)
    for _ in range(2 * works.SLOW_ENVS if task.work == "w5" else 4):
        next(batches)
    try:
        return task.rate(lambda: next(batches).numel(), warm_s=0)
    finally:
        made.shutdown()


def pool(task: Task) -> dict[str, Any]:
    policy, made = actor(), [partial(wrapped, slow=i) for i in range(works.SLOW_ENVS)]
    env = AsyncEnvPool(made, backend="multiprocessing", exchange="auto")
    now = env.reset()

    def step() -> int:
        nonlocal now
        with torch.no_grad():
            found = policy(now)
        env.async_step_and_maybe_reset_send(found.exclude("logits", "action_log_prob"))
        _, now = env.async_step_and_maybe_reset_recv(min_get=8)
        return now.numel()

    try:
        return task.rate(step)
    finally:
        env.close(raise_if_closed=False)


def train_ppo(task: Task) -> dict[str, Any]:
    h, policy = task.ppo, actor()
    critic = TensorDictModule(works.mlp(4, *HIDDEN, 1), in_keys=["observation"], out_keys=["state_value"])
    loss = ClipPPOLoss(policy, critic, clip_epsilon=h.clip, entropy_bonus=False, critic_coeff=h.value,
                       loss_critic_type="l2", normalize_advantage=True)  # fmt: skip
    loss.make_value_estimator(gamma=h.gamma, lmbda=h.gae_lambda)
    adam = torch.optim.Adam(loss.parameters(), lr=h.learning_rate, eps=1e-5)
    made = collector(task.variant, policy, h.rollout)
    batches, steps = iter(made), 0
    if task.variant.startswith("Multi"):
        next(batches)  # its processes start with the first batch
    training = Training(task, task.ppo)
    while not training.is_over(steps):
        found = next(batches)
        steps += found.numel()
        for total in found["next", "episode_reward"][found["next", "done"]].tolist():
            training.episode(total, steps)
        with torch.no_grad():
            loss.value_estimator(found, params=loss.critic_network_params,
                                 target_params=loss.target_critic_network_params)  # fmt: skip
        flat = found.reshape(-1)
        for _ in range(h.epochs):
            for rows in torch.randperm(flat.numel()).split(h.minibatch):
                parts = loss(flat[rows])
                adam.zero_grad()
                (parts["loss_objective"] + parts["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), h.grad_norm)
                adam.step()
        made.update_policy_weights_()
    figures = training.figures(steps)
    made.shutdown()
    return figures


def train_dqn(task: Task) -> dict[str, Any]:
    h, env = task.dqn, wrapped(task.dqn.env)
    net = QValueActor(works.mlp(8, *h.hidden, 4, activation="ReLU"), in_keys=["observation"], spec=env.action_spec,
                      action_space="categorical")  # fmt: skip
    policy = TensorDictSequential(net, EGreedyModule(spec=env.action_spec, eps_init=0.1, eps_end=0.1))
    loss = DQNLoss(net, action_space="categorical", delay_value=True)
    loss.make_value_estimator(gamma=h.gamma)
    target = HardUpdate(loss, value_network_update_interval=h.target_every)
    adam = torch.optim.Adam(loss.parameters(), lr=h.learning_rate)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(h.capacity), batch_size=h.batch)
    made = Collector(env, policy, frames_per_batch=h.every, init_random_frames=h.warmup, total_frames=-1)
    steps, updates, begun = -h.warmup, 0, 0.0
    for found in made:
        replay.extend(found.reshape(-1))
        steps += found.numel()
        if steps <= 0:
            begun = task.begin()
            continue
        part = loss(replay.sample())["loss"]
        adam.zero_grad()
        part.backward()
        adam.step()
        target.step()
        updates += 1
        if steps >= h.steps:
            break
    figures = dqn_figures(steps, updates, begun)
    made.shutdown()
    return figures


def train_sac(task: Task) -> dict[str, Any]:
    h = task.sac
    env = TransformedEnv(wrapped(h.env), RewardSum())
    body = nn.Sequential(works.mlp(3, *h.hidden, 2, activation="ReLU"), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]), in_keys=["loc", "scale"],
        spec=env.action_spec, distribution_class=TanhNormal,
        distribution_kwargs={"low": -h.bound, "high": h.bound, "tanh_loc": False}, return_log_prob=False,
    )  # fmt: skip
    critic = ValueOperator(Joined(works.mlp(4, *h.hidden, 1, activation="ReLU")), in_keys=["observation", "action"])
    loss = SACLoss(policy, critic, num_qvalue_nets=2, loss_function="l2", alpha_init=1.0, target_entropy=-1.0)
    loss.make_value_estimator(gamma=h.gamma)
    target = SoftUpdate(loss, tau=h.tau)
    adam = torch.optim.Adam(loss.parameters(), lr=h.learning_rate)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(h.capacity), batch_size=h.batch)
    made = Collector(env, policy, frames_per_batch=1, init_random_frames=h.warmup, total_frames=-1)
    steps, training = 0, Training(task, h)
    for found in made:
        replay.extend(found.reshape(-1))
        steps += found.numel()
        for total in found["next", "episode_reward"][found["next", "done"]].tolist():
            training.episode(total, steps)
        if steps > h.warmup:
            parts = loss(replay.sample())
            adam.zero_grad()
            (parts["loss_actor"] + parts["loss_qvalue"] + parts["loss_alpha"]).backward()
            adam.step()
            target.step()
        if training.is_over(steps):
            break
    made.shutdown()
    return training.figures(steps, updates=steps - h.warmup)


class Joined(nn.Module):
    """A network of observation and action side by side."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([observation, action], -1))


def measure(task: Task) -> dict[str, Any]:
    torch.manual_seed(task.seed)
    if task.variant.startswith("AsyncEnvPool"):
        return pool(task)
    return {"w2": train_ppo, "w3": train_dqn, "w4": train_sac}.get(task.work, collect)(task)


if __name__ == "__main__":
    works.carry_out(measure, "torchrl", "tensordict")
