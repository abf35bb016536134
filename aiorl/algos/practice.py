"""The half of a replay learner that is the same for all: experience, and the gradient steps it calls for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from aiorl.algos.base import LearnerContext, StateTree
from aiorl.buffers.replay import Batch, Replay, gradient_steps_owed
from aiorl.envs.spaces import Spaces
from aiorl.errors import NonFiniteError
from aiorl.lazy import LazyModule
from aiorl.segments import Rollout
from aiorl.trees import check_tree

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SAMPLE = 1  # what the random numbers are for; learners use other numbers for other purposes

Results = Mapping[str, "torch.Tensor"]
"""What a gradient step says of itself: numbers still on the device."""


class ReplaySettings(Protocol):
    """What the settings of an algorithm have to say about its practice."""

    name: ClassVar[str]

    @property
    def learning_rate(self) -> float: ...
    @property
    def anneal(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def update_ratio(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def n_step(self) -> int: ...


class Practice:
    """Stores rollouts and does exactly `update_ratio` gradient steps for each transition stored after warm-up."""

    def __init__(self, config: ReplaySettings, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._context = config, context
        self._replay = Replay(spaces, context.envs, config.capacity)
        self._warmup = config.warmup if context.warmup is None else context.warmup
        self._settings = {"learning_rate": config.learning_rate}
        self._skipped_steps = 0  # gradient steps that were owed and given up
        self.steps = 0  # gradient steps done

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
        self._replay.add(rollout)
        owed = gradient_steps_owed(self._replay.env_steps, self._warmup, self._config.update_ratio)
        owed -= self.steps + self._skipped_steps
        rate = self._settings["learning_rate"]
        if self._config.anneal:
            rate *= max(0.0, 1.0 - rollout.index / self._context.rollouts)
        metrics = {"gradient_steps": float(owed), "learning_rate": rate, "replay_size": float(len(self._replay))}
        if not owed:
            return metrics
        before, take_back = self.steps, undo()
        rng = self._context.rng(SAMPLE, rollout.index)
        seen: list[Results] = []
        try:
            # What is not finite is found by looking at the results, all at once: a device need not wait for each step.
            with np.errstate(all="ignore"):
                for _ in range(owed):
                    seen.append(step(self._sample(rng), rate, rng))
                    self.steps += 1
            return metrics | self._means(seen, before, is_finite)
        except BaseException:
            take_back()
            self.steps = before
            self._skipped_steps += owed
            raise

    def _sample(self, rng: np.random.Generator) -> Batch:
        config = self._config
        return self._replay.sample(rng, config.batch_size, n=config.n_step, gamma=config.gamma)

    def _means(self, seen: list[Results], first: int, is_finite: Callable[[], bool]) -> dict[str, float]:
        """The mean of each result over the gradient steps that had it; `first` is the number of the first one."""
        name = self._config.name
        advice = f"lower {name}.learning_rate or reward_scale, or set max_grad_norm"
        found: dict[str, list[float]] = {}
        for step, results in enumerate(seen, first):
            row = dict(zip(results, torch.stack([x.reshape(()) for x in results.values()]).tolist(), strict=True))
            if not all(map(math.isfinite, row.values())):
                parts = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
                raise NonFiniteError(f"{name}: a loss is not finite at gradient step {step}: {parts}\n  {advice}")
            for key, value in row.items():
                found.setdefault(key, []).append(value)
        if not is_finite():  # the last step shows in no loss
            raise NonFiniteError(f"{name}: not finite after an update: the parameters\n  {advice}")
        return {key: float(np.mean(values)) for key, values in found.items()}

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateTree:
        return self._small_state() | {"replay": self._replay.state_dict()}

    def _small_state(self) -> StateTree:
        return {"steps": self.steps, "skipped_steps": self._skipped_steps, "settings": dict(self._settings)}

    def load_state_dict(self, state: StateTree, path: str = "practice") -> None:
        """Raises ValueError naming the first mismatch."""
        rest = {key: value for key, value in state.items() if key != "replay"}
        check_tree(rest, self._small_state(), path)
        self._replay.load_state_dict(state.get("replay", {}), f"{path}.replay")
        self.steps, self._skipped_steps = state["steps"], state["skipped_steps"]
        self._settings = dict(state["settings"])

    def set(self, **changes: float) -> None:
        """Change learning_rate (before annealing) from the next update on. Raises ValueError for any other name."""
        for name, value in changes.items():
            if name not in self._settings:
                can = ", ".join(self._settings)
                raise ValueError(f"{self._config.name} cannot change {name!r} during training; it can change {can}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: expected a positive number")
        self._settings |= {name: float(value) for name, value in changes.items()}
