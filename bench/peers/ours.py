"""aiorl on the same work, through its public interface: `Config`, `Run` and its events."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np

import aiorl
from aiorl.algos.base import LearnerContext, Policy
from aiorl.cli.session import run_async
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout
from bench.peers import works
from bench.peers.works import ENVS, HIDDEN, SLOW_ENVS, Task, Training

WARM_S = 1.0
ENDLESS = 10**9
SINGLE = {"native_vector": False}


class Collecting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PPO that acts and never learns."""

    name: ClassVar[str] = "collecting"
    corrects_staleness: ClassVar[bool] = True
    default_segment_length: ClassVar[int] = 128

    acting: str = "mlp"

    def _ppo(self) -> aiorl.PPO:
        return aiorl.PPO(hidden=HIDDEN)

    def check(self, spaces: Spaces) -> None:
        self._ppo().check(spaces)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return self._ppo().columns(spaces)

    def policy(self, spaces: Spaces) -> Policy:
        return self._ppo().policy(spaces) if self.acting == "mlp" else RandomPolicy()

    def learner(self, spaces: Spaces, context: LearnerContext) -> Unlearning:
        return Unlearning(self._ppo().learner(spaces, context).weights())


class RandomPolicy:
    """Two actions, drawn anew in each step, as the peers do it."""

    def begin(self, weights: Mapping[str, Array], rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._rng = rng or np.random.default_rng(0)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        return self._rng.integers(0, 2, size=len(first)), {"log_prob": np.full(len(first), -0.6931, np.float32)}


class Unlearning:
    """A learner that has weights and keeps them."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = {name: array.copy() for name, array in weights.items()}

    def update(self, rollout: Rollout) -> dict[str, float]:
        return {"gradient_steps": 0.0}

    def weights(self) -> Mapping[str, Array]:
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def set(self, **changes: float) -> None:
        pass


def configuration(task: Task, out: str) -> aiorl.Config:
    """What the work and the variant ask for; the rest as aiorl has it by default."""
    way = task.variant.split(" / ")[0]
    found = {"w1": _collection, "w2": _ppo, "w3": _dqn, "w4": _sac, "w5": _slow}[task.work](task, way)
    return aiorl.Config(seed=task.seed, eval_every=0, checkpoint_every=0, device="cpu", out=f"{out}/run", **found)


def _collection(task: Task, way: str) -> dict[str, Any]:
    ways = {
        "2 workers": {"workers": 2},
        "2 workers, single environments": {"workers": 2, **SINGLE},
        "1 worker": {"workers": 1, "group_size": ENVS},
    }
    acting = Collecting(acting=task.variant.split(" / ")[1])
    shape = {"env": "CartPole-v1", "envs": ENVS, "segment_length": 512, "schedule": "eager", "off_policy_degree": 3}
    return {**shape, "algo": acting, "total_steps": ENDLESS, **ways[way]}


def _ppo(task: Task, way: str) -> dict[str, Any]:
    h = task.ppo
    ways = {
        "PPO 2 workers": {"workers": 2},
        "PPO 2 workers, single environments": {"workers": 2, **SINGLE},
        "PPO sequential": {"workers": 0, "off_policy_degree": 0},
    }
    algo = aiorl.PPO(
        learning_rate=h.learning_rate, anneal=False, epochs=h.epochs, minibatches=h.rollout // h.minibatch,
        gamma=h.gamma, gae_lambda=h.gae_lambda, clip_range=h.clip, entropy_coef=h.entropy, value_coef=h.value,
        max_grad_norm=h.grad_norm, hidden=HIDDEN, activation="tanh",
    )  # fmt: skip
    shape = {"env": "CartPole-v1", "envs": ENVS, "segment_length": h.steps, "total_steps": h.cap}
    return {**shape, "algo": algo, **ways[way]}


def _dqn(task: Task, way: str) -> dict[str, Any]:
    h = task.dqn
    ways: dict[str, dict[str, Any]] = {
        "DQN": {"workers": 1},
        "DQN, rollouts of 128": {"workers": 1, "segment_length": 128},
        "DQN, rollouts of 4": {"workers": 1, "segment_length": h.every},
        # Nothing but gradient steps: 16 for each env step instead of a quarter, and nothing beside them.
        "limit: gradient steps alone": {"workers": 0, "off_policy_degree": 0, "segment_length": 4},
    }
    algo = aiorl.DQN(
        learning_rate=h.learning_rate, batch_size=h.batch, capacity=h.capacity, warmup=h.warmup, gamma=h.gamma,
        update_ratio=16.0 if way.startswith("limit") else 1 / h.every, double=False, target_every=h.target_every,
        hidden=h.hidden, activation="relu",
    )  # fmt: skip
    return {"env": h.env, "envs": 1, "total_steps": h.warmup + h.steps, "algo": algo, **ways[way]}


def _sac(task: Task, way: str) -> dict[str, Any]:
    h = task.sac
    ways: dict[str, dict[str, Any]] = {
        "SAC": {"workers": 1},
        "SAC, rollouts of 1": {"workers": 1, "segment_length": 1},
        # 16 gradient steps for each env step, and nothing beside them.
        "limit: gradient steps alone": {"workers": 0, "off_policy_degree": 0, "segment_length": 4},
    }
    algo = aiorl.SAC(
        learning_rate=h.learning_rate, batch_size=h.batch, capacity=h.capacity, warmup=h.warmup, random_steps=h.warmup,
        update_ratio=16.0 if way.startswith("limit") else 1.0, gamma=h.gamma, tau=h.tau, hidden=h.hidden,
        activation="relu",
    )  # fmt: skip
    return {"env": h.env, "envs": 1, "total_steps": h.cap, "algo": algo, **ways[way]}


def _slow(task: Task, way: str) -> dict[str, Any]:
    ways: dict[str, dict[str, Any]] = {
        "2 workers, stepping in threads": {"workers": 2, "stepping": "threads"},
        "32 workers x 1": {"workers": SLOW_ENVS, "group_size": 1},
    }
    slow = {"env": works.make_slow, "envs": SLOW_ENVS, "algo": Collecting(), "total_steps": ENDLESS}
    # Segments that take unlike times wait for each other only as far as the degree's bound on staleness makes them.
    return {**slow, "schedule": "eager", "segment_length": 32, "off_policy_degree": 3, **ways[way]}


async def measure(task: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        async with aiorl.Run(configuration(task, out)) as run:
            if task.variant.startswith("limit"):
                return await learn_alone(task, run)
            if task.work in ("w2", "w4"):
                return await train(task, run)
            return await (learn if task.work == "w3" else collect)(task, run)


async def updates(run: aiorl.Run) -> AsyncIterator[aiorl.Updated]:
    """All its events of updates. Raises what makes the run fail."""
    async for event in run.events(keep=1 << 16):
        if isinstance(event, aiorl.Updated):
            yield event
    await run.wait()


def rates(first: aiorl.Updated, last: aiorl.Updated) -> dict[str, float]:
    return {"env_steps_per_s": (last.env_steps - first.env_steps) / (last.seconds - first.seconds)}


async def collect(task: Task, run: aiorl.Run) -> dict[str, Any]:
    """Env steps stored between two updates that are `seconds` apart."""
    first: aiorl.Updated | None = None
    started = run.status().seconds
    async for event in updates(run):
        if first is None:
            if event.seconds >= started + WARM_S:
                first = event
                task.begin()
        elif event.seconds >= first.seconds + task.seconds:
            return rates(first, event)
    raise SystemExit("the run ended too early")


async def train(task: Task, run: aiorl.Run) -> dict[str, Any]:
    """The clock starts when the workers are ready, as the peers' does when everything is built.

    An event has the mean of the episodes that ended in its rollout; each of them counts with that. It comes after the
    update, so the target is met no earlier than it could be known.
    """
    training, started = Training(task, task.ppo if task.work == "w2" else task.sac), run.status().seconds
    done = 0
    async for event in updates(run):
        done += event.gradient_steps
        for _ in range(event.episodes):
            training.episode(event.return_mean or 0.0, event.env_steps, event.seconds - started)
        if training.is_over(event.env_steps):
            count = done if task.work == "w4" else None
            return training.figures(event.env_steps, event.seconds - started, count)
    raise SystemExit("the run ended too early")


async def learn(task: Task, run: aiorl.Run) -> dict[str, Any]:
    """From the first update after warm-up to the last of the work."""
    first: aiorl.Updated | None = None
    done = 0
    last = None
    async for event in updates(run):
        if first is not None:
            done, last = done + event.gradient_steps, event
        elif event.env_steps >= task.dqn.warmup:
            first = event
            task.begin()
        if event.env_steps >= task.dqn.warmup + task.dqn.steps:
            break
    if first is None or last is None:
        raise SystemExit("no update was made after warm-up")
    return rates(first, last) | {"updates_per_s": done / (last.seconds - first.seconds)}


async def learn_alone(task: Task, run: aiorl.Run) -> dict[str, Any]:
    """Gradient steps over the time that the updates took."""
    steps, spent_s, ends = 0, 0.0, None
    async for event in updates(run):
        if not event.gradient_steps:
            continue
        if ends is None:
            task.begin()
            ends = time.perf_counter() + task.seconds
        else:
            steps, spent_s = steps + event.gradient_steps, spent_s + event.update_seconds
        if time.perf_counter() >= ends and steps:
            break
    return {"updates_per_s": steps / spent_s}


if __name__ == "__main__":
    works.carry_out(lambda task: run_async(measure(task)), "aiorl")
