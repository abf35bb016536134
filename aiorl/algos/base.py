"""What an algorithm is: a configuration that can build an acting half and a learning half.

An algorithm lives in one file and is named by its configuration class, a frozen `msgspec.Struct` that follows
`Algorithm`. `--algo pkg.mod:Class` is enough to use one from outside aiorl. The acting half (`Policy`) runs in the
workers, one instance for each group of environments, and should need nothing heavier than NumPy. The learning half
(`Learner`) runs on the one learner thread of the training process. Neither sees asyncio, queues, processes or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from aiorl.envs.spaces import Spaces
from aiorl.errors import AbandonedError
from aiorl.seeding import ACT, ENV, EVAL_ACT, EVAL_ENV, LEARNER
from aiorl.segments import Array, Column, Rollout

if TYPE_CHECKING:
    import torch

__all__ = [
    "ACT", "AVERAGE", "ENV", "EVAL_ACT", "EVAL_ENV", "LEARNER", "Algorithm", "CentralAlgorithm", "Closing", "Doubting",
    "Filing", "Forward", "Learner", "LearnerContext", "Policy", "Recurrent", "RecurrentPolicy", "Remembering", "SplitPolicy",
    "StateTree", "Weights", "averages",
]  # fmt: skip

Weights = Mapping[str, Array]
"""Named arrays that a policy acts with (network weights, normaliser statistics): fixed names, shapes and dtypes."""

AVERAGE = "average."
"""Before the names of those weights that act where nothing is explored, if others learn and explore."""

StateTree = dict[str, Any]
"""Nested dicts with string keys; leaves are NumPy arrays, numbers, strings, None or lists of numbers."""


def averages(weights: Weights) -> dict[str, Array]:
    """The weights that act where nothing is explored, under the names of those that learn; empty if these act themselves."""
    return {name.removeprefix(AVERAGE): array for name, array in weights.items() if name.startswith(AVERAGE)}


@dataclass(frozen=True)
class LearnerContext:
    """What a learner may know about its run.

    `env_steps_per_rollout` is T * B; `rollouts` is how many rollouts the run is planned to use (for schedules that are
    functions of the rollout index). All randomness must come from `seed` through `rng`: never from a global generator.
    """

    seed: int
    envs: int
    segment_length: int
    rollouts: int
    off_policy_degree: int
    warmup: int | None = None
    """`Config.warmup`: if it is given, it goes before the algorithm's own setting."""
    device: str = "cpu"
    directory: Path | None = None
    """The run directory: for what is too large for memory. Leave nothing there that has a name."""
    abandoned: Callable[[], bool] = lambda: False
    """Whether the run is being ended at once. For any thread."""
    rest: Callable[[], None] = lambda: None
    """Waits while the run is paused."""

    def annealed(self, rollout: int, to: float = 0.0) -> float:
        """What is left of a setting that falls linearly over the run to `to` of it: never nothing.

        Rows that are spent on resets or given up make more rollouts than planned, which are to be learned from, too.
        """
        return max(1 / self.rollouts, 1 - (1 - to) * min(1.0, rollout / self.rollouts))

    def go_on(self) -> None:
        """To be called between gradient steps: waits while the run is paused, and raises AbandonedError if there is no more
        point in the update.

        An update without it is waited for by a pause, and when a run is left, for half a second; a thread that is still
        computing when the process ends may make it abort.
        """
        self.rest()
        if self.abandoned():
            raise AbandonedError("the run was ended in the middle of an update")

    @property
    def env_steps_per_rollout(self) -> int:
        return self.envs * self.segment_length

    def rng(self, *key: int) -> np.random.Generator:
        """An independent generator for `key`, e.g. (purpose, rollout index)."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(LEARNER, *key)))


@runtime_checkable
class Policy(Protocol):
    """The acting half. One instance serves one group, so it may keep state from step to step (recurrence, search).

    What it is to remember from one segment to the next has to be declared, see `Recurrent`: else it is lost with a worker
    or at a resume, and the run is not exact.
    """

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        """Start a segment of at most `steps` steps with these weights, which stay unchanged until the segment ends.

        `rollout` is the index for exploration schedules (in the eager schedule, where the rollout is not known yet, the
        first one that it may be: the version of the weights). `rng` is the only source of randomness; None asks for the
        deterministic policy (evaluation, play).
        """
        ...

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        """Choose actions for observation leaves [N, …]; `first` [N] is True where an episode begins.

        Returns actions as laid out by `Spaces.action` and the extra columns declared by `Algorithm.columns`, each [N, …]
        (they may be left out when `rng` was None).
        """
        ...


@runtime_checkable
class RecurrentPolicy(Policy, Protocol):
    """The policy of a `Recurrent` algorithm: one that remembers beyond `begin`."""

    def state(self) -> Mapping[str, Array]:
        """All that it remembers, each [N, …], at the end of a segment; copied by the caller."""
        ...

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from there: called before `begin`, with arrays of its own."""
        ...


@runtime_checkable
class Learner(Protocol):
    """The learning half. Every method is called on the learner thread, one call at a time."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Do everything that is owed for this rollout and return metrics.

        Rollouts come in order, each exactly once. The metric `gradient_steps` is required (0 during warm-up). These steer a
        self-tuned `off_policy_degree`: `off_policy_error`, how far the policy that acted is from the one that learns, as
        the update begins (0 for the newest version, in proportion to the lag; the algorithm's `default_error_target` is what
        it may reach, 0.3 if it has none), `clip_fraction` and `grad_norm`. The rollout's arrays are only valid during the
        call. A `grad_norm` of 0, unless `learning_rate` is, raises an alarm, and so do a `q_min` or `q_max` beyond a
        `q_limit` (what rewards allow), weights that do not change, and a metric that is not finite. Raise NonFiniteError
        where a loss, gradient or parameter is not finite, with everything but a buffer of experience taken back to what it
        was before the call.
        """
        ...

    def weights(self) -> Weights:
        """The arrays that a policy needs, as they are now; copied by the caller before the next update."""
        ...

    def state_dict(self) -> StateTree:
        """Everything needed to go on exactly, as copies: parameters, optimizer, targets, buffer, statistics, counters."""
        ...

    def load_state_dict(self, state: StateTree) -> None:
        """Inverse of `state_dict`. Raises ValueError naming the first mismatch in name, shape or dtype."""
        ...

    def set(self, **changes: float) -> None:
        """Change settings such as `learning_rate` between updates. Raises ValueError for an unknown name."""
        ...


@runtime_checkable
class Closing(Protocol):
    """What a `Learner` has besides if it holds files, or memory that should not wait for the garbage collector."""

    def close(self) -> None:
        """Give them back. Called on the learner thread when the run has ended; nothing else is called afterwards."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """The configuration of an algorithm, and the factory of its halves. Implement it as a frozen `msgspec.Struct`."""

    name: ClassVar[str]
    """Short name: `--algo NAME`, the `[NAME]` table of a TOML file, the `--NAME.field` flags."""

    default_segment_length: ClassVar[int]
    """Steps per segment when the configuration does not say."""

    @property
    def corrects_staleness(self) -> bool:
        """Whether learning stays sound for rollouts that an older version collected (needed at off_policy_degree >= 1)."""
        ...

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError, naming the space, if the algorithm cannot act in these spaces."""
        ...

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        """Extra columns the policy returns with each action."""
        ...

    def policy(self, spaces: Spaces) -> Policy:
        """A new acting half (called in the worker)."""
        ...

    def learner(self, spaces: Spaces, context: LearnerContext) -> Learner:
        """A new learning half (called on the learner thread)."""
        ...


@runtime_checkable
class Recurrent(Protocol):
    """What an `Algorithm` has besides if its policies, `RecurrentPolicy` all, remember from one segment to the next.

    Their state travels with each segment, so that a worker that is replaced, and a run that is resumed, go on from it.
    """

    def policy_state(self, spaces: Spaces) -> dict[str, Column]:
        """What they remember for each environment, under the names that `RecurrentPolicy.state` uses."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What an `Algorithm` has besides if its learner keeps experience; `capacity` is how many transitions."""

    @property
    def capacity(self) -> int: ...

    def experience_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """Memory that so many of them take in the learner's process, with their copy while a checkpoint is written."""
        ...


@runtime_checkable
class Filing(Remembering, Protocol):
    """What a `Remembering` one has besides if its experience comes to lie in the run directory."""

    def disk_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """Room that so many of them take there while they are learned from: 0 if they are kept in memory."""
        ...

    def saved_bytes(self, spaces: Spaces, envs: int, transitions: int) -> int:
        """Room that so many of them take in a checkpoint."""
        ...


@runtime_checkable
class Doubting(Protocol):
    """What an `Algorithm` has besides if there are spaces in which it learns, but hardly as it is meant."""

    def doubts(self, spaces: Spaces) -> Sequence[str]:
        """A line for each reason, of which a run begins with a warning."""
        ...


@runtime_checkable
class Wrapping(Protocol):
    """What an `Algorithm` has besides if another one, with settings of its own, learns within it."""

    def within(self, spaces: Spaces) -> tuple[Algorithm, Spaces, str]:
        """The one that learns, the spaces that it sees, and where its settings stand, such as "selfplay.inner"."""
        ...

    def written_out(self) -> Self:
        """The same, with all settings of the one that learns: also of those that were left at their defaults."""
        ...


@runtime_checkable
class Ranked(Protocol):
    """What an `Algorithm` has besides if its learner plays against others, who travel with the weights.

    The metric `pool_admitted` of its updates says how many have joined them so far.
    """

    @property
    def bots(self) -> Mapping[str, float]:
        """Those that the environment plays, by name."""
        ...

    def standings(self, weights: Weights) -> dict[str, Any]:
        """How everybody has done against everybody: see `aiorl.league.standings`."""
        ...


# -- central inference -------------------------------------------------------------------------------------------------


@runtime_checkable
class SplitPolicy(Policy, Protocol):
    """A policy whose network can be computed elsewhere: `act` is `choose` of what the network makes of `features`.

    Everything else stays with it: normalisation, noise, the choice. `begin` should not copy weights, for they may be large.
    """

    def features(self, obs: Mapping[str, Array], first: Array) -> Array:
        """What the network sees, float32 [N, F]; the arguments are those of `act`."""
        ...

    def choose(self, outputs: Array) -> tuple[Array, Mapping[str, Array]]:
        """What `act` returns, given the network's outputs, float32 [N, K]."""
        ...


class Forward(NamedTuple):
    """The network of an acting half, for many groups at once: `features` (F) and `outputs` (K) are its widths.

    `apply(weights, x)` turns x, float32 [N, F], into float32 [N, K], each row for itself. All are tensors on one device,
    the weights by name as `Learner.weights` gives them; it is called without gradients.
    """

    features: int
    outputs: int
    apply: Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


@runtime_checkable
class CentralAlgorithm(Protocol):
    """What an `Algorithm` has besides if it can act with `inference = "central"`. Its policies are `SplitPolicy`."""

    def forward(self, spaces: Spaces) -> Forward:
        """Raises ConfigError if it cannot, for these settings."""
        ...
