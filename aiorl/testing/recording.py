"""What a run's learner was given, kept for `check_laws`: `Recording.of(algorithm)` trains like it and writes it down.

The tape grows with the run (all rows, copied): it is meant for runs of up to some million transitions. Learner and tape live
in the training process, so this works in simulation and with worker processes alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import numpy as np

from aiorl.algos import algorithm_class, algorithm_name
from aiorl.algos.base import (
    CentralAlgorithm,
    Closing,
    Forward,
    LearnerContext,
    Recurrent,
    RecurrentPolicy,
    StateTree,
    Weights,
)
from aiorl.envs.spaces import Spaces
from aiorl.errors import ConfigError
from aiorl.segments import Array, Column, Rollout, SegmentHeader
from aiorl.structs import as_in_a_file, convert, without_none

ACTED_WITH = "acted_with"
"""The column that says which weights chose an action: `weights_crc` of them, int64."""

ACTED_IN = "acted_in"
"""The column that says of which rollout its policy was told to be when it chose an action, int64."""

STAMP = "recorded_version"
"""Goes with the weights, int64 [1]: two versions differ even where an update has changed nothing."""

KEPT_BYTES = 2**16
"""Weights of a version up to this size stay on the tape."""


def weights_crc(weights: Weights) -> int:
    """CRC-32 of all arrays, sorted by name."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(np.ascontiguousarray(weights[name]).reshape(-1).view(np.uint8).data, crc)
    return crc


@dataclass(frozen=True)
class Taken:
    """One rollout as the learner was given it; every array is a copy. B columns, T rows.

    `columns` hold action, reward, terminated, truncated, valid, ACTED_WITH and ACTED_IN, [T, B, …]; `obs` leaves are
    [T + 1, B, …], `next_obs` leaves [T, B, …]. `aborted` [B]: the column does not go on with its environment's open
    episode. `spans` [B, 2]: when its collection began and ended, on the monotonic clock.
    """

    index: int
    behaviour_version: int
    envs: Array
    obs: dict[str, Array]
    next_obs: dict[str, Array]
    columns: dict[str, Array]
    aborted: Array
    spans: Array = field(default_factory=lambda: np.zeros((0, 2)))


@dataclass
class Tape:
    """Everything a learner was given and what weights it made of it. `versions` maps a version to its `weights_crc`,
    `weights` to copies of them if they are small.

    `first` is the version that the learner began with (more than 0 in a resumed run), `gradient_steps` their sum.
    """

    first: int = 0
    rollouts: list[Taken] = field(default_factory=list[Taken])
    versions: dict[int, int] = field(default_factory=dict[int, int])
    weights: dict[int, dict[str, Array]] = field(default_factory=dict[int, "dict[str, Array]"])
    gradient_steps: int = 0

    @property
    def version(self) -> int:
        """The learner's version now."""
        return self.first + len(self.rollouts)


class Recording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another algorithm, recorded: `Recording.of(aiorl.PPO())`. The tape is `tape_of(run)`.

    Its fields are plain, so that a recorded run is written to its config.toml and can be resumed from it.
    """

    name: ClassVar[str] = "recording"
    algo: str
    settings: dict[str, Any] = {}

    @classmethod
    def of(cls, algorithm: Any) -> Recording:
        return cls(algo=algorithm_name(algorithm), settings=without_none(as_in_a_file(algorithm)))

    @property
    def algorithm(self) -> Any:
        """The one that is recorded."""
        return convert(self.settings, algorithm_class(self.algo), "recording", "settings.")

    @property
    def default_segment_length(self) -> int:
        return self.algorithm.default_segment_length

    @property
    def default_error_target(self) -> float:
        return getattr(self.algorithm, "default_error_target", 0.3)

    @property
    def corrects_staleness(self) -> bool:
        return self.algorithm.corrects_staleness

    def check(self, spaces: Spaces) -> None:
        self.algorithm.check(spaces)

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {**self.algorithm.columns(spaces), ACTED_WITH: Column((), "int64"), ACTED_IN: Column((), "int64")}

    def policy_state(self, spaces: Spaces) -> dict[str, Column]:
        algorithm = self.algorithm
        return algorithm.policy_state(spaces) if isinstance(algorithm, Recurrent) else {}

    def policy(self, spaces: Spaces) -> RecordedPolicy:
        return RecordedPolicy(self.algorithm.policy(spaces))

    def forward(self, spaces: Spaces) -> Forward:
        algorithm = self.algorithm
        if not isinstance(algorithm, CentralAlgorithm):
            raise ConfigError(f"{algorithm.name} has no `forward`\n  leave inference at \"worker\"")
        return algorithm.forward(spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> RecordedLearner:
        return RecordedLearner(self.algorithm.learner(spaces, context))


class RecordedPolicy:
    """Adds to each action the mark of the weights that chose it, taken anew at every step: they must not change."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._weights: Weights = {}
        self._rollout = 0

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._weights, self._rollout = weights, rollout
        self._policy.begin({name: array for name, array in weights.items() if name != STAMP}, rollout, rng, steps)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        return self._marked(self._policy.act(obs, first))

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        return self._policy.features(obs, first)

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        return self._marked(self._policy.choose(outputs))

    def state(self) -> Mapping[str, Array]:
        return self._policy.state() if isinstance(self._policy, RecurrentPolicy) else {}

    def restore(self, state: Mapping[str, Array]) -> None:
        self._policy.restore(state)

    def _marked(self, chosen: tuple[Array, Mapping[str, Array]]) -> tuple[Array, Mapping[str, Array]]:
        actions, extras = chosen
        told = {ACTED_WITH: weights_crc(self._weights), ACTED_IN: self._rollout}
        return actions, {**extras, **{name: np.full(len(actions), value, np.int64) for name, value in told.items()}}


class RecordedLearner:
    """A learner with a tape of all it was given."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.tape = Tape()

    def update(self, rollout: Rollout) -> dict[str, float]:
        names = ("action", "reward", "terminated", "truncated", "valid", ACTED_WITH, ACTED_IN)
        clock = slice(SegmentHeader.STARTED_S, SegmentHeader.ENDED_S + 1)
        self.tape.rollouts.append(
            Taken(
                index=rollout.index,
                behaviour_version=rollout.behaviour_version,
                envs=rollout.envs.copy(),
                obs={name: leaf.copy() for name, leaf in rollout.obs.items()},
                next_obs=rollout.next_obs(),
                columns={name: np.array(rollout.column(name)) for name in names},
                aborted=rollout.aborted.copy(),
                spans=np.concatenate([np.tile(s.header[clock], (s.envs, 1)) for s in rollout.segments]),
            )
        )
        metrics = self._learner.update(rollout)
        self.tape.gradient_steps += int(metrics["gradient_steps"])
        return metrics

    def weights(self) -> Weights:
        version = self.tape.version
        weights = {**self._learner.weights(), STAMP: np.array([version])}
        self.tape.versions[version] = weights_crc(weights)
        if sum(array.nbytes for array in weights.values()) <= KEPT_BYTES:
            self.tape.weights[version] = {name: np.array(array) for name, array in weights.items()}
        return weights

    def state_dict(self) -> StateTree:
        return {"learner": self._learner.state_dict(), "version": self.tape.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learner.load_state_dict(state["learner"])
        self.tape = Tape(first=int(state["version"]))

    def set(self, **changes: float) -> None:
        self._learner.set(**changes)

    def close(self) -> None:
        if isinstance(self._learner, Closing):
            self._learner.close()
