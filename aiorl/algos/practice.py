"""The half of a replay learner that is the same for all: settings, experience, and the gradient steps it calls for."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from aiorl.algos.base import LearnerContext, StateTree, Weights
from aiorl.buffers import device
from aiorl.buffers.replay import Batch, Replay, gradient_steps_owed
from aiorl.buffers.storage import Storage
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError, NonFiniteError
from aiorl.lazy import LazyModule
from aiorl.normalise import RunningMoments, normalise
from aiorl.segments import Array, Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch

    from aiorl import losses, networks
else:
    torch, losses, networks = LazyModule("torch"), LazyModule("aiorl.losses"), LazyModule("aiorl.networks")

SAMPLE = 1  # what the random numbers are for; learners use other numbers for other purposes
LOOKED_AT = 64  # gradient steps of an update, the last ones, whose values and errors are described as a whole
TOLERANCE = 10.0  # values this many times larger than the largest that rewards allow have come loose
LONGEST_HORIZON = 1e4

Results = Mapping[str, Any]
"""What a gradient step says of itself, still on the device: single numbers, and two whole arrays: `q`, action values of the
batch, any shape, and `td_error`, how much each transition's value exceeds its target, [N] or [critics, N]."""

Positive = Annotated[float, Meta(gt=0)]
Rate = Annotated[float, Meta(description="Adam's step size", gt=0)]
BatchSize = Annotated[int, Meta(description="transitions in a batch", ge=1)]
Capacity = Annotated[int, Meta(description="transitions in the replay buffer", ge=1)]
Ratio = Annotated[float, Meta(description="gradient steps per env step after warm-up", ge=0)]
GradNorm = Annotated[
    Positive | None, Meta(description="longest gradient, of all critics together and of the actor (default: no limit)")
]
Hidden = Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(description="sizes of the hidden layers", min_length=1)]


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that all replay learners have."""

    name: ClassVar[str]
    default_segment_length: ClassVar[int]

    learning_rate: Rate = 3e-4
    anneal: Annotated[bool, Meta(description="let the learning rate fall linearly over the run")] = False
    anneal_to: Annotated[float, Meta(description="share of it that is left in the end, if it falls", ge=0, le=1)] = 0.0
    batch_size: BatchSize = 256
    accumulate: Annotated[int, Meta(description="batches whose mean gradient makes one gradient step", ge=1)] = 1
    capacity: Capacity = 1_000_000
    storage: Annotated[
        Storage,
        Meta(description="where the buffer's observations lie: disk, nameless files in the run directory; device, the GPU"),
    ] = "memory"
    warmup: Annotated[int, Meta(description="env steps stored before the first gradient step", ge=0)] = 1_000
    update_ratio: Ratio = 1.0
    gamma: Annotated[float, Meta(description="discount per step", ge=0, le=1)] = 0.99
    n_step: Annotated[int, Meta(description="rewards summed before bootstrapping", ge=1)] = 1
    priority_exponent: Annotated[
        float, Meta(description="power of the TD error by which transitions are drawn (0: all alike)", ge=0)
    ] = 0.0
    priority_beta: Annotated[
        float, Meta(description="how far weights make up for that at first; it rises linearly to 1", ge=0, le=1)
    ] = 0.4
    reward_scale: Annotated[float, Meta(description="factor on rewards", gt=0)] = 1.0
    reward_clip: Annotated[
        Positive | None, Meta(description="limit to the size of each reward, once scaled (default: none)")
    ] = None
    normalise_obs: Annotated[bool, Meta(description="standardise observations by running statistics")] = False
    max_grad_norm: GradNorm = None
    hidden: Hidden = (256, 256)
    activation: Annotated[Literal["tanh", "relu"], Meta(description="after each hidden layer")] = "relu"
    adam_eps: Annotated[float, Meta(description="Adam's epsilon", gt=0)] = 1e-8

    @property
    def corrects_staleness(self) -> bool:
        """One-step targets do not depend on which version acted."""
        return True

    def experience_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """Memory of a replay buffer with so many transitions and of its copy: on disk if it lies there, else here."""
        if self.storage == "device":
            there = torch.cuda.is_available()  # else the device is the processor
            own = self._buffer_bytes(spaces, envs, transitions, "device" if there else "memory")
            return own + self._buffer_bytes(spaces, envs, transitions, "memory")
        return 2 * self._buffer_bytes(spaces, envs, transitions, self.storage)

    def saved_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """What they take in a checkpoint."""
        return self._buffer_bytes(spaces, envs, transitions, "memory")

    def _buffer_bytes(self, spaces: Spaces, envs: int, transitions: int, storage: Storage) -> int:
        exponent = self.priority_exponent
        return Replay.nbytes_for(spaces, envs, transitions, priority_exponent=exponent, storage=storage)

    def disk_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """What the buffer takes on disk."""
        if self.storage != "disk":
            return 0
        whole = Replay.nbytes_for(spaces, envs, transitions)
        return whole - Replay.nbytes_for(spaces, envs, transitions, storage=self.storage)

    def reward(self, rewards: Array) -> Array:
        """The rewards to learn from, for those that the environment gave (any shape)."""
        scaled = rewards if self.reward_scale == 1 else rewards * self.reward_scale
        return scaled if self.reward_clip is None else scaled.clip(-self.reward_clip, self.reward_clip)


def encode(spaces: Spaces, leaves: Mapping[str, Array], weights: Weights) -> Array:
    """What a network sees of observation leaves [N, …], float32 [N, features]: for acting and for learning.

    It is standardised if `weights` have the statistics for it, `obs_mean` and `obs_scale` [features].
    """
    x = spaces.encode(leaves)
    return normalise(x, weights["obs_mean"], weights["obs_scale"]) if "obs_mean" in weights else x


class Practice:
    """Stores rollouts and does exactly `update_ratio` gradient steps for each transition stored after warm-up."""

    def __init__(self, config: ReplaySettings, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        if config.storage == "disk" and context.directory is None:
            raise ConfigError(
                f'{config.name}.storage = "disk": there is no run directory for its files\n'
                '  set LearnerContext.directory, or storage = "memory"'
            )
        try:
            self._replay = Replay(
                spaces, context.envs, config.capacity, priority_exponent=config.priority_exponent, learned=config.reward,
                storage=config.storage, directory=context.directory, device=context.device,
            )  # fmt: skip
        except MemoryError as error:  # room is asked for the whole of it, used as it fills
            raise ConfigError(
                f"{config.name}.capacity = {config.capacity:,}: the system does not give the buffer its room: {error}\n"
                "  use a smaller capacity"
            ) from error
        self._warmup = config.warmup if context.warmup is None else context.warmup
        self._settings = {"learning_rate": config.learning_rate}
        self._skipped_steps = 0  # gradient steps that were owed and given up
        self._largest_reward = 0.0  # in size, as learned from
        self._moments = RunningMoments((spaces.features,) if config.normalise_obs else ())
        self._statistics = self._statistics_now()
        self.steps = 0  # gradient steps done

    # -- update ----------------------------------------------------------------------------------------------------

    def update(
        self,
        rollout: Rollout,
        step: Callable[[Batch, float, np.random.Generator], Results],
        undo: Callable[[], Callable[[], None]],
        is_finite: Callable[[], bool],
    ) -> dict[str, float]:
        """Store a rollout and do the gradient steps that are owed; returns metrics, each the mean over those steps.

        `step(batch, learning rate, rng)` does one. `undo()` returns what takes everything that `step` changes back: if
        one fails none was done, and they are not owed any more. `is_finite()` says whether all parameters are. Raises
        NonFiniteError.
        """
        rate, beta = self._schedules(rollout.index)
        before, moments = self.steps, copy(self._moments)
        self._store(rollout)
        owed = gradient_steps_owed(self._replay.env_steps, self._warmup, self._config.update_ratio)
        owed -= self.steps + self._skipped_steps
        metrics = {"gradient_steps": float(owed), "learning_rate": rate, "replay_size": float(len(self._replay))}
        take_back = undo() if owed else lambda: None
        try:
            # What is not finite is found by looking at the results, all at once: a device need not wait for each step.
            with np.errstate(all="ignore"), self._replay.undone_by_failure():
                self._see(rollout)
                if owed:
                    metrics |= self._learn(owed, step, rate, beta, self._context.rng(SAMPLE, rollout.index))
                    self._check_finite(is_finite())
        except BaseException:
            take_back()
            self.steps, self._moments = before, moments
            self._statistics = self._statistics_now()
            self._skipped_steps += owed
            raise
        learned = max(1, self._replay.env_steps - self._warmup)
        return metrics | {"update_to_data": self.steps / learned}

    def _schedules(self, rollout: int) -> tuple[float, float]:
        """Learning rate and beta, as functions of the rollout's index."""
        config, done = self._config, min(1.0, rollout / self._context.rollouts)
        rate = self._settings["learning_rate"]
        if config.anneal:
            rate *= self._context.annealed(rollout, config.anneal_to)
        return rate, config.priority_beta + (1.0 - config.priority_beta) * done

    def _store(self, rollout: Rollout) -> None:
        self._replay.add(rollout)
        rewards = np.abs(self._config.reward(rollout.column("reward")[rollout.column("valid")]))
        self._largest_reward = float(rewards.max(initial=self._largest_reward, where=np.isfinite(rewards)))

    def _see(self, rollout: Rollout) -> None:
        """Take the rollout's observations into the statistics. Raises NonFiniteError."""
        if not self._config.normalise_obs:
            return
        valid = rollout.column("valid")
        self._moments.update(self._spaces.encode({name: leaf[:-1][valid] for name, leaf in rollout.obs.items()}))
        if not self._moments.is_finite:
            raise NonFiniteError(f"{self._config.name}: not finite after an update: the statistics of observations")
        self._statistics = self._statistics_now()

    def _learn(
        self, owed: int, step: Callable[[Batch, float, np.random.Generator], Results], rate: float, beta: float,
        rng: np.random.Generator,
    ) -> dict[str, float]:  # fmt: skip
        """Do the gradient steps; returns metrics. Raises NonFiniteError."""
        config, first = self._config, self.steps
        seen: list[Results] = []
        latest: deque[Results] = deque(maxlen=LOOKED_AT)
        ignored, spread = 0, 0.0
        for i in range(owed):
            self._context.go_on()
            batch = self._replay.sample(
                rng, config.batch_size * config.accumulate, n=config.n_step, gamma=config.gamma, beta=beta
            )
            if config.priority_exponent and not i:
                spread = -float(np.log(self._replay.chances(batch)).mean())
            found = dict(step(batch, rate, rng))
            latest.append({name: found.pop(name) for name in ("q", "td_error")})
            seen.append(found)
            if config.priority_exponent:
                ignored += self._feed_back(batch, latest[-1]["td_error"])
            self.steps += 1
        metrics = _means(config.name, seen, first) | _described(latest)
        horizon = min(LONGEST_HORIZON, 1 / (1 - config.gamma) if config.gamma < 1 else math.inf)
        metrics["q_limit"] = TOLERANCE * (max(1.0, self._largest_reward) + metrics.pop("bonus", 0.0)) * horizon
        if config.priority_exponent:
            # The mean of -log P over what P drew estimates the entropy of P, without a pass over the buffer.
            metrics["priority_entropy"] = spread / math.log(max(2, len(self._replay)))
            metrics |= {"priority_beta": beta, "priorities_ignored": float(ignored)}
        return metrics

    def _feed_back(self, batch: Batch, error: losses.Values) -> int:
        """Set the priorities of what was drawn; returns how many are ignored, for their rows hold something else by now."""
        error = np.abs(losses.array(error))
        return self._replay.reprioritise(batch, error if error.ndim == 1 else error.mean(0))

    def _check_finite(self, finite: bool) -> None:
        if not finite:  # the last step shows in no loss
            name = self._config.name
            raise NonFiniteError(f"{name}: not finite after an update: the parameters\n  {_advice(name)}")

    # -- batches ---------------------------------------------------------------------------------------------------

    def parts(self, batch: Batch) -> list[Batch]:
        """The batches that one gradient step accumulates, one after the other."""
        n, size = self._config.accumulate, self._config.batch_size
        return [batch] if n == 1 else [_rows(batch, slice(i * size, (i + 1) * size)) for i in range(n)]

    def importance(self, batch: Batch) -> Array | None:
        """The weights [N] of a batch's losses; None if all are 1."""
        return batch.weights if self._config.priority_exponent else None

    def encode(self, leaves: Mapping[str, Array]) -> Array:
        """What the network sees of observation leaves, float32 [N, features]: as the policy that is published next."""
        return encode(self._spaces, leaves, self._statistics)

    def see(self, *batches: Mapping[str, losses.Values]) -> torch.Tensor:
        """What the network sees of the observation leaves of batches, one after the other: on the learner's device."""
        if all(isinstance(leaf, np.ndarray) for leaves in batches for leaf in leaves.values()):
            seen = [self.encode(leaves) for leaves in batches]
            return torch.from_numpy(seen[0] if len(seen) == 1 else np.concatenate(seen)).to(self._context.device)
        return torch.cat([device.encode(self._spaces, leaves, self._statistics) for leaves in batches])

    def _statistics_now(self) -> dict[str, Array]:
        if not self._config.normalise_obs:
            return {}
        return {"obs_mean": self._moments.mean.astype(np.float32), "obs_scale": self._moments.scale.astype(np.float32)}

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Array]:
        """What a policy needs besides its network: see `encode`."""
        return self._statistics

    def state_dict(self) -> StateTree:
        return self._small_state() | {"replay": self._replay.state_dict()}

    def _small_state(self) -> StateTree:
        state = {"steps": self.steps, "skipped_steps": self._skipped_steps, "settings": dict(self._settings)}
        return state | {"largest_reward": self._largest_reward, "obs_moments": self._moments.state_dict()}

    def load_state_dict(self, state: StateTree, path: str = "practice") -> None:
        """Raises ValueError naming the first mismatch."""
        rest = {key: value for key, value in state.items() if key != "replay"}
        check_tree(rest, self._small_state(), path)
        self._replay.load_state_dict(state.get("replay", {}), f"{path}.replay")
        self.steps, self._skipped_steps = state["steps"], state["skipped_steps"]
        self._settings, self._largest_reward = dict(state["settings"]), state["largest_reward"]
        self._moments.load_state_dict(state["obs_moments"], f"{path}.obs_moments")
        self._statistics = self._statistics_now()

    def close(self) -> None:
        """Give the buffer's memory and files back; of no use afterwards."""
        self._replay.close()

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on. Raises ValueError for any other name."""
        for name, value in changes.items():
            if name not in self._settings:
                can = ", ".join(self._settings)
                raise ValueError(f"{self._config.name} cannot change {name!r} during training; it can change {can}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: expected a positive number")
        self._settings |= {name: float(value) for name, value in changes.items()}


# -- what gradient steps say -------------------------------------------------------------------------------------------


def together(found: Sequence[Results]) -> dict[str, Any]:
    """What several batches of one gradient step say, as if they were one: the mean of numbers, arrays side by side."""
    if len(found) == 1:
        return dict(found[0])
    module = losses.module_of(found[0]["q"])
    arrays = {name: module.concatenate([x[name] for x in found], -1) for name in ("q", "td_error")}
    return {name: arrays.get(name, sum(x[name] for x in found) / len(found)) for name in found[0]}


def standing(online: networks.FlatParameters, target: networks.FlatParameters) -> dict[str, float]:
    """The length of the parameters, and how far their targets are from them as a share of it."""
    length, distance = float(online.vector.norm()), float((target.vector - online.vector).norm())
    return {"parameter_norm": length, "target_drift": distance / max(length, 1e-12)}


def _advice(name: str) -> str:
    return f"lower {name}.learning_rate or reward_scale, or set max_grad_norm"


def _means(name: str, seen: Sequence[Results], first: int) -> dict[str, float]:
    """The mean of each number over the gradient steps that had it; `first` is the number of the first one.

    Raises NonFiniteError for the first step with a number that is not finite.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}  # not each step does all that a step may do
    for i, results in enumerate(seen):
        kinds.setdefault(tuple(results), []).append(i)
    tables = {names: losses.numbers([list(seen[i].values()) for i in steps]) for names, steps in kinds.items()}
    wrong = [
        (steps[int(row)], names, tables[names][row])
        for names, steps in kinds.items()
        for row in np.flatnonzero(~np.isfinite(tables[names]).all(1))[:1]
    ]
    if wrong:
        step, names, row = min(wrong, key=lambda found: found[0])
        parts = ", ".join(f"{key} {value:.4g}" for key, value in zip(names, row, strict=True))
        raise NonFiniteError(f"{name}: a loss is not finite at gradient step {first + step}: {parts}\n  {_advice(name)}")
    columns: dict[str, list[Array]] = {}
    for names, table in tables.items():
        for key, column in zip(names, table.T, strict=True):
            columns.setdefault(key, []).append(column)
    return {key: float(np.concatenate(parts).mean()) for key, parts in columns.items()}


def _described(latest: Sequence[Results]) -> dict[str, float]:
    """How action values and the size of TD errors are distributed."""
    q, error = (losses.joined([x[name].reshape(-1) for x in latest]) for name in ("q", "td_error"))
    error, mean = abs(error), losses.mean(q)
    names = ("q_mean", "q_std", "q_min", "q_max", "td_error", "td_error_max")
    values = (mean, losses.mean((q - mean) ** 2) ** 0.5, q.min(), q.max(), losses.mean(error), error.max())
    return dict(zip(names, losses.numbers([values])[0].tolist(), strict=True))


def _rows(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's transitions."""

    def cut(value: Any) -> Any:
        return {name: leaf[rows] for name, leaf in value.items()} if isinstance(value, Mapping) else value[rows]

    return Batch(**{field.name: cut(getattr(batch, field.name)) for field in dataclasses.fields(batch)})
