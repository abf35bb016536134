"""Whole trainings with aiorl: `async`, two workers at degree 1; `twin`, the same one after the other in one process; `mean`,
as `async`, but evaluated is the mean of DQN's networks; and `qrdqn`, as `async`, but QR-DQN with the settings of a DQN."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import aiorl
from aiorl.cli.session import run_async
from bench.peers import learning
from bench.peers.learning import DQN, OF_DQN, SAC, Task

WAYS: dict[str, dict[str, Any]] = {
    "async": {"workers": 2, "off_policy_degree": 1},
    "twin": {"workers": 0, "off_policy_degree": 0},
    "qrdqn": {"workers": 2, "off_policy_degree": 1},
    "mean": {"workers": 2, "off_policy_degree": 1},
}
AVERAGE = 0.999  # of `mean`
SEGMENT = 4  # steps of each environment in a rollout


def configuration(task: Task, seed: int, way: str, out: str) -> aiorl.Config:
    # Evaluations queue and none is left out; they run beside training, and their time counts in full.
    return aiorl.Config(
        env=task.env, envs=task.envs, frame_stack=task.frame_stack, algo=algorithm(task.learner, way), seed=seed,
        total_steps=task.steps, segment_length=SEGMENT, eval_every=task.eval_every, eval_episodes=task.episodes,
        eval_busy="queue", checkpoint_every=0, device="cpu", out=f"{out}/run", **WAYS[way],
    )  # fmt: skip


def algorithm(h: SAC | DQN, way: str) -> aiorl.SAC | aiorl.DQN | aiorl.QRDQN:
    """Raises ValueError for a way of DQN with the settings of SAC."""
    common: dict[str, Any] = {
        "learning_rate": h.learning_rate, "batch_size": h.batch, "capacity": h.capacity, "warmup": h.warmup,
        "update_ratio": h.ratio, "gamma": h.gamma, "hidden": h.hidden, "activation": "relu",
    }  # fmt: skip
    if isinstance(h, SAC):
        if way in OF_DQN:
            raise ValueError(f"{way} was asked for where SAC is trained, expected an environment of DQN")
        return aiorl.SAC(tau=h.tau, random_steps=h.warmup, **common)
    common |= {
        "network": h.network, "double": False, "target_every": round(h.target_every * h.ratio), "epsilon_end": h.epsilon_end,
        "epsilon_fraction": h.epsilon_fraction, "max_grad_norm": h.max_grad_norm,
    }  # fmt: skip
    if way == "qrdqn":
        return aiorl.QRDQN(**common)
    return aiorl.DQN(average=AVERAGE if way == "mean" else 0.0, **common)


async def train(task: Task, seed: int, way: str) -> dict[str, Any]:
    begun_at = time.time()
    with tempfile.TemporaryDirectory() as out:
        async with aiorl.Run(configuration(task, seed, way, out)) as run:
            async for event in run:
                if isinstance(event, aiorl.EvaluationSkipped):  # the machine had no time for them; means would not compare
                    raise RuntimeError(f"the evaluation after {event.env_steps:,} env steps was left out: {event.reason}")
                if isinstance(event, aiorl.Evaluated):
                    learning.told(f"aiorl {way} {task.env}", seed, event.env_steps, event.seconds, event.mean_return)
            result = await run.wait()
    found = [[e.env_steps, e.seconds, e.mean_return, e.std_return] for e in result.evaluations]
    return {
        "env_steps": result.env_steps, "gradient_steps": result.gradient_steps, "train_s": result.train_seconds,
        "train_return": result.train_return_mean_100, "begun_at": begun_at, "evaluations": found,
    }  # fmt: skip


if __name__ == "__main__":
    learning.carry_out(lambda task, seed, way: run_async(train(task, seed, way)), "aiorl")
