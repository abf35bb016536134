"""Who takes part in which work, and in which way."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

WORKS = {
    "w1": "Collection, CartPole-v1, 16 environments",
    "w2": "PPO, CartPole-v1, 16 environments",
    "w3": "DQN, LunarLander-v3, one environment",
    "w4": "SAC, Pendulum-v1, one environment",
    "w5": "32 environments whose step sleeps lognormal(mean 10 ms, sigma 1)",
}

EQUAL = {
    "w1": "64-64 tanh network on the CPU (`mlp`) or random actions (`random`), one sampled action for each environment and "
    "step, no learning; `categorical` is the network sampled as libraries do it. CartPoleVectorEnv "
    "is gymnasium's own NumPy CartPole, which aiorl finds by itself; the others, and aiorl's row with single environments, "
    "step 16 single ones. aiorl also computes log-probabilities and stores every transition, in segments of 512 steps, "
    "eagerly.",
    "w2": "separate 64-64 tanh networks for policy and value, 16 x 128 env steps in a rollout, minibatch 256, 4 epochs (32 "
    "gradient steps for 2,048 env steps), Adam 1e-3 constant, gamma 0.99, lambda 0.95, clip 0.2, no entropy bonus, "
    "gradient norm 0.5. The rate is that of the whole run, at least 200,000 env steps; the target is met when the mean of "
    "the last 20 training episodes is 475. The clock starts when everything is built and all workers are ready.",
    "w3": "2 x 256 relu network, batch 128, one gradient step for 4 env steps, target network copied "
    "every 250 gradient steps, buffer of 50,000; 20,000 env steps after 1,000 of warm-up. `limit` is the gradient "
    "step alone on one core: aiorl's with its sampling, and the hand-written one on a batch that stays the same. aiorl "
    "collects the next rollout, of 32 env steps if not said otherwise, while it learns from one; the others take turns.",
    "w4": "2 x 256 relu networks for actor and twin critics, batch 256, one gradient step of all for each env step after "
    "1,000 with random actions, Adam 1e-3, gamma 0.99, targets moved by 0.005 each step, temperature tuned from 1 to an "
    "entropy of -1, buffer of 50,000. The target is met when the mean of the last 10 training episodes is -200; the rate is "
    "that of the whole run, at least 4,000 env steps. `limit` is the gradient step alone on one core: aiorl's with its "
    "sampling, and the hand-written one on a batch that stays the same.",
    "w5": "CartPole-v1 and the network of W1; no learning. Waiting for nobody would make 3,200 env steps/s. aiorl collects "
    "segments of 32 steps in its eager schedule with an off_policy_degree of 3.",
}

VENVS = {
    "gymnasium": "common",
    "handwritten": "common",
    "sb3": "common",
    "puffer": "puffer",
    "sf": "sf",
    "tianshou": "tianshou",
    "torchrl": "torchrl",
    "rllib": "ray",
}
MODULES = {
    "aiorl": "ours",
    "gymnasium": "gymnasium_vectors",
    "sf": "sample_factory_runs",
    "tianshou": "tianshou_runs",
    "torchrl": "torchrl_runs",
    "rllib": "rllib_runs",
}  # the others are named like the peer

ONE, EACH, WORKERS, READY, LIMIT = "one process", "process per env", "several envs per process", "first ready", "limit"


class Entry(NamedTuple):
    """One way of doing a work. `rank` 1 always takes part, 2 if its peer is asked for by name, 3 with `--all`."""

    work: str
    peer: str
    variant: str
    kind: str
    rank: int = 1

    @property
    def name(self) -> str:
        return f"{self.peer}: {self.variant}"

    @property
    def is_peer(self) -> bool:
        return self.peer != "aiorl" and self.kind != LIMIT

    @property
    def module(self) -> str:
        return f"bench.peers.{MODULES.get(self.peer, self.peer)}"

    def python(self, directory: Path) -> Path:
        """The interpreter that has what this needs; aiorl has the one that runs now."""
        return directory / VENVS[self.peer] / "bin" / "python" if self.peer in VENVS else Path(sys.executable)


LINEUP = [
    Entry("w1", "aiorl", "1 worker / mlp", WORKERS),
    Entry("w1", "aiorl", "2 workers / mlp", WORKERS),
    Entry("w1", "aiorl", "2 workers, single environments / mlp", WORKERS),
    Entry("w1", "aiorl", "2 workers / random", WORKERS),
    Entry("w1", "gymnasium", "CartPoleVectorEnv / mlp", ONE),
    Entry("w1", "gymnasium", "CartPoleVectorEnv / categorical", ONE),
    Entry("w1", "gymnasium", "CartPoleVectorEnv / random", ONE),
    Entry("w1", "gymnasium", "CartPoleVectorEnv / numpy", ONE, 3),
    Entry("w1", "gymnasium", "SyncVectorEnv / mlp", ONE),
    Entry("w1", "gymnasium", "SyncVectorEnv / random", ONE, 3),
    Entry("w1", "gymnasium", "AsyncVectorEnv 16 processes / mlp", EACH),
    Entry("w1", "puffer", "Serial / mlp", ONE),
    Entry("w1", "puffer", "Serial / random", ONE, 3),
    Entry("w1", "puffer", "Serial / numpy", ONE, 3),
    Entry("w1", "puffer", "Multiprocessing 2 x 8, batch 8 / mlp", WORKERS),
    Entry("w1", "puffer", "Multiprocessing 2 x 8, full batch / mlp", WORKERS, 3),
    Entry("w1", "sb3", "DummyVecEnv / mlp", ONE, 2),
    Entry("w1", "sb3", "SubprocVecEnv 16 processes / mlp", EACH),
    Entry("w1", "tianshou", "DummyVectorEnv / mlp", ONE, 2),
    Entry("w1", "tianshou", "ShmemVectorEnv 16 processes / mlp", EACH),
    Entry("w1", "tianshou", "SubprocVectorEnv 16 processes / mlp", EACH, 3),
    Entry("w1", "torchrl", "MultiSync 2 x 8 / mlp", WORKERS, 2),
    Entry("w1", "torchrl", "MultiAsync 2 x 8 / mlp", WORKERS, 3),
    Entry("w1", "torchrl", "Collector SerialEnv / mlp", ONE, 3),
    Entry("w1", "torchrl", "Collector ParallelEnv 16 processes / mlp", EACH),
    Entry("w1", "sf", "2 workers x 8 / mlp", WORKERS, 2),
    Entry("w1", "rllib", "EnvRunner 2 x 8 / mlp", WORKERS, 2),
    Entry("w1", "rllib", "EnvRunner local 16 / mlp", ONE, 3),
    Entry("w2", "aiorl", "PPO 2 workers", WORKERS),
    Entry("w2", "aiorl", "PPO 2 workers, single environments", WORKERS),
    Entry("w2", "aiorl", "PPO sequential", ONE, 3),
    Entry("w2", "handwritten", "CartPoleVectorEnv", ONE),
    Entry("w2", "handwritten", "SyncVectorEnv", ONE),
    Entry("w2", "sb3", "DummyVecEnv", ONE),
    Entry("w2", "sb3", "SubprocVecEnv", EACH),
    Entry("w2", "sf", "APPO serial", ONE, 2),
    Entry("w2", "sf", "APPO 2 x 8 asynchronous", WORKERS, 2),
    Entry("w2", "sf", "APPO 2 x 8 synchronous", WORKERS, 3),
    Entry("w2", "tianshou", "DummyVectorEnv", ONE, 2),
    Entry("w2", "tianshou", "SubprocVectorEnv", EACH, 3),
    Entry("w2", "torchrl", "MultiAsync 2 x 8", WORKERS, 2),
    Entry("w2", "torchrl", "MultiSync 2 x 8", WORKERS, 3),
    Entry("w2", "torchrl", "Collector SerialEnv", ONE, 3),
    Entry("w2", "rllib", "PPO local 16", ONE, 2),
    Entry("w2", "rllib", "PPO 2 x 8", WORKERS, 3),
    Entry("w2", "rllib", "APPO 2 x 8", WORKERS, 3),
    Entry("w3", "aiorl", "DQN, rollouts of 128", WORKERS),
    Entry("w3", "aiorl", "DQN", WORKERS),
    Entry("w3", "aiorl", "DQN, rollouts of 4", WORKERS),
    Entry("w3", "aiorl", "limit: gradient steps alone", LIMIT),
    Entry("w3", "handwritten", "limit: gradient steps alone", LIMIT),
    Entry("w3", "handwritten", "DQN", ONE),
    Entry("w3", "sb3", "DQN", ONE),
    Entry("w3", "tianshou", "DQN", ONE, 2),
    Entry("w3", "torchrl", "DQN", ONE, 2),
    Entry("w3", "rllib", "DQN", ONE, 2),
    Entry("w4", "aiorl", "SAC", WORKERS),
    Entry("w4", "aiorl", "SAC, rollouts of 1", WORKERS),
    Entry("w4", "aiorl", "limit: gradient steps alone", LIMIT),
    Entry("w4", "handwritten", "limit: gradient steps alone", LIMIT),
    Entry("w4", "handwritten", "SAC", ONE),
    Entry("w4", "sb3", "SAC", ONE),
    Entry("w4", "tianshou", "SAC", ONE, 2),
    Entry("w4", "torchrl", "SAC", ONE, 2),
    Entry("w5", "aiorl", "2 workers, stepping in threads / mlp", READY),
    Entry("w5", "aiorl", "32 workers x 1 / mlp", READY),
    Entry("w5", "tianshou", "SubprocVectorEnv 32 processes, wait_num=1 / mlp", READY),
    Entry("w5", "tianshou", "SubprocVectorEnv 32 processes, wait_num=4 / mlp", READY, 3),
    Entry("w5", "sf", "32 workers x 1 / mlp", READY),
    Entry("w5", "torchrl", "AsyncEnvPool 32 processes / mlp", READY, 2),
    Entry("w5", "torchrl", "MultiAsyncCollector 32 x 1 / mlp", READY, 3),
    Entry("w5", "rllib", "EnvRunner 8 x 4 / mlp", READY, 2),
    Entry("w5", "sb3", "SubprocVecEnv 32 processes / mlp", EACH),
    Entry("w5", "gymnasium", "AsyncVectorEnv 32 processes / mlp", EACH, 2),
]


def chosen(works: list[str], peers: list[str], everything: bool) -> dict[str, list[Entry]]:
    """The entries of each work. Without names of `peers`: those that always take part."""
    rank = 3 if everything else 2 if peers else 1
    names = {"aiorl", *(peers or VENVS)}
    return {w: [e for e in LINEUP if (e.work, e.peer in names) == (w, True) and e.rank <= rank] for w in works}


def peers_directory() -> Path:
    return Path(os.environ.get("PEERS_DIR", Path(tempfile.gettempdir()) / "peers"))
