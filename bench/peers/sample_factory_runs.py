# pyright: basic, reportMissingImports=false
"""Sample Factory: its sampling interface (W1, W5) and APPO (W2). It has no off-policy algorithm."""

from __future__ import annotations

import shutil
import tempfile
import time
from typing import Any

from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.algo.sampling.simplified_sampling_api import SyncSamplingAPI
from sample_factory.algo.utils.env_info import obtain_env_info_in_a_separate_process
from sample_factory.algo.utils.rl_utils import samples_per_trajectory
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner
from sample_factory.utils.utils import log

from bench.peers import works
from bench.peers.works import HIDDEN, Task, Training

SETTINGS: dict[str, dict[str, Any]] = {
    "APPO serial": {
        "serial_mode": True, "async_rl": False, "num_workers": 1, "num_envs_per_worker": 16, "worker_num_splits": 1,
    },
    "APPO 2 x 8 asynchronous": {"async_rl": True},
    "APPO 2 x 8 synchronous": {"async_rl": False},
    "2 workers x 8": {"worker_num_splits": 1, "rollout": 32},
    "2 workers x 8, 2 splits": {"rollout": 32},
    "32 workers x 1": {"num_workers": 32, "num_envs_per_worker": 1, "worker_num_splits": 1, "rollout": 32},
}  # fmt: skip


def make(name: str, cfg: Any = None, env_config: Any = None, render_mode: Any = None) -> Any:
    if name == "slow_cartpole":
        return works.make_slow(int(getattr(env_config, "env_id", 0) or 0) if env_config else 0)
    return works.make_env(name)


def settings(task: Task, env: str, directory: str) -> Any:
    h = task.ppo
    register_env(env, make)
    chosen: dict[str, Any] = {
        "env": env, "experiment": "x", "train_dir": directory, "algo": "APPO", "device": "cpu", "seed": task.seed,
        "use_rnn": False, "recurrence": 1, "encoder_mlp_layers": HIDDEN, "nonlinearity": "tanh",
        "actor_critic_share_weights": False, "normalize_input": False, "normalize_returns": False, "rollout": h.steps,
        "batch_size": h.minibatch, "num_batches_per_epoch": h.rollout // h.minibatch, "num_epochs": h.epochs,
        "learning_rate": h.learning_rate, "gamma": h.gamma, "gae_lambda": h.gae_lambda, "ppo_clip_ratio": h.clip,
        "exploration_loss_coeff": h.entropy, "value_loss_coeff": h.value, "max_grad_norm": h.grad_norm,
        "num_workers": 2, "num_envs_per_worker": 8, "worker_num_splits": 2, "save_every_sec": 100_000,
        "save_best_every_sec": 100_000, "stats_avg": h.window, "decorrelate_envs_on_one_worker": False,
        "decorrelate_experience_max_seconds": 0, "restart_behavior": "overwrite", "value_bootstrap": True,
        "train_for_env_steps": h.rate_over * 5 // 4, **SETTINGS[task.variant.split(" / ")[0]],
    }  # fmt: skip
    arguments: list[str] = []
    for name, value in chosen.items():
        arguments += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    parser, _ = parse_sf_args(argv=arguments)
    return parse_full_cfg(parser, arguments)


def collect(task: Task, directory: str) -> dict[str, Any]:
    config = settings(task, "slow_cartpole" if task.work == "w5" else "CartPole-v1", directory)
    sampler = SyncSamplingAPI(config, obtain_env_info_in_a_separate_process(config))
    sampler.start()
    for _ in range(32 if task.work == "w5" else 8):
        sampler.get_trajectories_sync()
    try:
        return task.rate(lambda: samples_per_trajectory(sampler.get_trajectories_sync()), warm_s=0)
    finally:
        sampler.stop()


class Clock(AlgoObserver):
    """When the first and the last training step came, and the env steps by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def on_training_step(self, runner: Any, training_iteration_since_resume: int) -> None:
        self.seen = [*self.seen[:1], (time.perf_counter(), sum(runner.env_steps.values()))]


def train_ppo(task: Task, directory: str) -> dict[str, Any]:
    _, runner = make_runner(settings(task, "CartPole-v1", directory))
    clock = Clock()
    runner.register_observer(clock)
    runner.init()
    training = Training(task, task.ppo)

    def on_episode(runner: Any, message: Any, policy_id: int) -> None:
        found = message.get("episodic", message)
        if "reward" in found:
            training.episode(found["reward"], sum(runner.env_steps.values()))

    runner.register_episodic_stats_handler(on_episode)
    runner.run()
    (first_s, first), (last_s, last) = clock.seen
    return training.figures(last) | {"env_steps_per_s": (last - first) / (last_s - first_s)}


def measure(task: Task) -> dict[str, Any]:
    log.setLevel("ERROR")
    directory = tempfile.mkdtemp(prefix="bench-peers-")
    try:
        return (train_ppo if task.work == "w2" else collect)(task, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    works.carry_out(measure, "sample-factory")
