# pyright: basic, reportMissingImports=false
"""RLlib on its new interface: environment runners (W1, W5), PPO and APPO (W2), DQN (W3)."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import ray
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env

from bench.peers import works
from bench.peers.works import HIDDEN, Task, Training, dqn_figures

RUNNERS = {"local 16": (0, 16), "2 x 8": (2, 8), "8 x 4": (8, 4)}  # number of runners, environments of each
DQN_LIMIT = 10  # times the seconds of a measured rate


def base(task: Task, kind: Any, env: str, runners: tuple[int, int], model: DefaultModelConfig) -> Any:
    count, each = runners
    return (
        kind()
        .environment(env)
        .debugging(log_level="ERROR", seed=task.seed)
        .env_runners(num_env_runners=count, num_envs_per_env_runner=each, num_cpus_per_env_runner=1)
        .learners(num_learners=0)
        .reporting(metrics_num_episodes_for_smoothing=task.ppo.window, min_time_s_per_iteration=0)
        .rl_module(model_config=model)
    )


def ppo_like(task: Task, env: str = "CartPole-v1") -> Any:
    h, kind = task.ppo, APPOConfig if task.variant.startswith("APPO") else PPOConfig
    runners = next(value for name, value in RUNNERS.items() if name in task.variant)
    model = DefaultModelConfig(fcnet_hiddens=list(HIDDEN), fcnet_activation="tanh", vf_share_layers=False)
    config = base(task, kind, env, runners, model).training(
        lr=h.learning_rate, gamma=h.gamma, grad_clip=h.grad_norm, vf_loss_coeff=h.value, entropy_coeff=h.entropy
    )
    if kind is APPOConfig:
        return config.env_runners(rollout_fragment_length=50).training(train_batch_size_per_learner=500)
    return config.training(
        train_batch_size_per_learner=h.rollout, minibatch_size=h.minibatch, num_epochs=h.epochs,
        lambda_=h.gae_lambda, clip_param=h.clip, use_kl_loss=False, vf_clip_param=1e4,
    )  # fmt: skip


def collect(task: Task) -> dict[str, Any]:
    kind = task.variant.split(" / ")[1]
    chosen = {"random_actions": True} if kind == "random" else {"explore": True}
    if task.work == "w5":
        config = ppo_like(task, "slow_cartpole").env_runners(gym_env_vectorize_mode=gymnasium.VectorizeMode.ASYNC)
    else:
        config = ppo_like(task)
    algorithm = config.build_algo()
    group = algorithm.env_runner_group

    def sample(runner: Any) -> int:
        return sum(len(e) for e in runner.sample(num_timesteps=64 if task.work == "w5" else 512, **chosen))

    def step() -> int:
        if "local" in task.variant:
            return sample(algorithm.env_runner)
        if task.work == "w1":
            return sum(group.foreach_env_runner(sample, local_env_runner=False))
        group.foreach_env_runner_async(sample, tag="s")
        return sum(n or 0 for _, n in group.fetch_ready_async_reqs(tags="s", timeout_seconds=0.05))

    try:
        return task.rate(step)
    finally:
        algorithm.stop()


def train_ppo(task: Task) -> dict[str, Any]:
    """The target is met by RLlib's own smoothed mean over as many episodes, once an iteration."""
    algorithm, steps = ppo_like(task).build_algo(), 0
    training = Training(task, task.ppo)
    while not training.is_over(steps):
        found = algorithm.train()
        steps = int(found.get("num_env_steps_sampled_lifetime") or steps)
        mean = found["env_runners"].get("episode_return_mean", float("nan"))
        if mean >= task.ppo.target:
            for _ in range(task.ppo.window):
                training.episode(mean, steps)
    figures = training.figures(steps)
    algorithm.stop()
    return figures


def train_dqn(task: Task) -> dict[str, Any]:
    """For a limited time: at its rate the whole work would take minutes."""
    h = task.dqn
    model = DefaultModelConfig(fcnet_hiddens=list(h.hidden), fcnet_activation="relu")
    config = base(task, DQNConfig, h.env, (0, 1), model).env_runners(rollout_fragment_length=h.every)
    algorithm = config.training(
        lr=h.learning_rate, gamma=h.gamma, train_batch_size_per_learner=h.batch, double_q=False, dueling=False,
        training_intensity=h.batch / h.every, num_steps_sampled_before_learning_starts=h.warmup,
        target_network_update_freq=h.target_every * h.every,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": h.capacity},
    ).build_algo()  # fmt: skip
    seen: list[tuple[int, int]] = []  # env steps and transitions learned from, since warm-up
    begun = deadline = 0.0
    while not seen or time.perf_counter() < deadline:
        found = algorithm.train()
        learner = found.get("learners", {}).get("default_policy", {})
        if learned := int(learner.get("num_module_steps_trained_lifetime", 0)):
            if not seen:
                begun = task.begin()
                deadline = begun + DQN_LIMIT * task.seconds
            seen.append((int(found["num_env_steps_sampled_lifetime"]), learned))
    (first, first_learned), (last, last_learned) = seen[0], seen[-1]
    figures = dqn_figures(last - first, (last_learned - first_learned) // h.batch, begun)
    algorithm.stop()
    return figures


def measure(task: Task) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
             runtime_env={"env_vars": variables})  # fmt: skip
    register_env("slow_cartpole", lambda c: works.make_slow(c.worker_index * 100 + c.vector_index))
    try:
        return {"w2": train_ppo, "w3": train_dqn}.get(task.work, collect)(task)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    works.carry_out(measure, "ray")
