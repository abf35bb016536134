"""The synchronous half of a run that lives on the learner thread: learner, books and weights move together here."""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiorl.algos.base import Algorithm, Learner, LearnerContext, Weights
from aiorl.envs.cursor import GroupCursor, advance
from aiorl.envs.spaces import Spaces
from aiorl.errors import InvariantError, TrainingError
from aiorl.ledger import Episode, Ledger
from aiorl.pacing import RolloutPlan
from aiorl.segments import Array, Rollout, Segment, SegmentHeader


@dataclass(frozen=True)
class Outcome:
    """What one update did: metrics, gradient steps, the weights it made, the episodes it entered in the books.

    `segment_seconds` is how long each of the plan's parts was collected.
    """

    metrics: dict[str, float]
    gradient_steps: int
    weights: Weights
    episodes: list[Episode]
    env_steps: int
    stored: int
    fingerprint: int
    update_seconds: float
    segment_seconds: tuple[float, ...]

    @property
    def collect_seconds(self) -> float:
        """Of the longest segment."""
        return max(self.segment_seconds)

    @property
    def collected_seconds(self) -> float:
        """Of all segments together."""
        return sum(self.segment_seconds)


class Trainer:
    """Learner and ledger of one run. Made and used on the learner thread only, one call at a time (but `where`)."""

    def __init__(
        self,
        algorithm: Algorithm,
        spaces: Spaces,
        context: LearnerContext,
        ledger: Ledger,
        threads: int,
        settings: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """`settings`: changes to make after so many updates (when a run is repeated)."""
        self.ledger = ledger
        self._storing = threading.Lock()
        self._settings = settings or {}
        self._threads = threads
        self._restore_threads = _set_torch_threads(threads)
        self.learner: Learner = algorithm.learner(spaces, context)

    def update(self, plan: RolloutPlan, segments: tuple[Segment, ...]) -> Outcome:
        """Enter a rollout in the books and let the learner do all it owes for it."""
        n = segments[0].envs
        envs = np.concatenate([np.arange(part.group * n, (part.group + 1) * n) for part in plan.parts])
        rollout = Rollout(plan.index, plan.behaviour_version, segments, envs)
        if plan.index in self._settings:
            self.learner.set(**self._settings[plan.index])
        begun = time.perf_counter()
        metrics = self.learner.update(rollout)
        took_s = time.perf_counter() - begun
        if "gradient_steps" not in metrics:
            raise TrainingError(
                f"{type(self.learner).__name__}.update returned no `gradient_steps`\n  add it to the metrics (0 in warm-up)"
            )
        with self._storing:
            episodes = self.ledger.store(plan.parts, segments)
        weights = self.learner.weights()
        times = [float(s.header[SegmentHeader.ENDED_S] - s.header[SegmentHeader.STARTED_S]) for s in segments]
        return Outcome(
            metrics={k: float(v) for k, v in metrics.items() if k != "gradient_steps"},
            gradient_steps=int(metrics["gradient_steps"]),
            weights=weights,
            fingerprint=fingerprint(weights),
            episodes=episodes,
            env_steps=rollout.env_steps,
            stored=self.ledger.stored,
            update_seconds=took_s,
            segment_seconds=tuple(times),
        )

    def where(self, group: int, delivered: Mapping[int, Segment]) -> GroupCursor | None:
        """Where a group goes on after the segments it has delivered (by ordinal), learned from or not; None if it has not
        begun. For any thread, also during an update; nobody may write into the segments meanwhile.
        """
        with self._storing:
            used, cursor = self.ledger.segments_used()[group], self.ledger.cursor(group)
        later = sorted(ordinal for ordinal in delivered if ordinal >= used)
        if later != list(range(used, used + len(later))):
            raise InvariantError(f"group {group} delivered segments {later}, expected those from {used} on")
        for ordinal in later:
            cursor = advance(cursor, delivered[ordinal])
        return cursor

    def set(self, changes: Mapping[str, float]) -> int:
        """Change settings of the learner; returns how many updates came before. ValueError for what it does not have."""
        self.learner.set(**changes)
        return self.ledger.rollouts

    def capture(self, behaviour: Mapping[int, Weights]) -> dict[str, Any]:
        """Everything a resume needs, as it is between two updates: the parts of a checkpoint.

        `behaviour` are the older versions that rollouts after this point still act with.
        """
        return {
            "policy": {name: np.array(a) for name, a in self.learner.weights().items()},
            "learner": self.learner.state_dict(),
            "run": {
                "ledger": self.ledger.state_dict(),
                "behaviour": {str(v): {k: np.array(a) for k, a in w.items()} for v, w in behaviour.items()},
            },
        }

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Inverse of `capture`; ValueError names the first mismatch."""
        self.learner.load_state_dict(parts["learner"])
        self.ledger.load_state_dict(parts["run"]["ledger"])

    def close(self) -> None:
        self._restore_threads()


def fingerprint(weights: Weights) -> int:
    """A quick mark of weights for the record of a run: CRC-32 over the beginning of each array, sorted by name.

    A difference spreads to all parameters within an update, so a part of each is enough to see where two runs part.
    """
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].reshape(-1)[:1024].tobytes(), crc)
    return crc


def params_sha256(weights: Mapping[str, Array]) -> str:
    """Hash of the policy's parameters: raw little-endian bytes, one array after the other, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _set_torch_threads(threads: int) -> Any:
    """Set the learner thread's torch threads; returns a function that undoes it.

    torch keeps the number per thread, but also remembers it for threads that have not used torch yet, so it is put back.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise TrainingError(f"torch uses {torch.get_num_threads()} threads on the learner thread, expected {threads}")
    return lambda: torch.set_num_threads(before)
