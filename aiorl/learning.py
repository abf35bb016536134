"""The synchronous half of a run that lives on the learner thread: learner, books and weights move together here."""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aiorl.alarms import Alarms
from aiorl.algos.base import Algorithm, Closing, Learner, LearnerContext, Weights
from aiorl.envs.cursor import GroupCursor, advance
from aiorl.envs.spaces import Bounds, Spaces
from aiorl.errors import InvariantError, NonFiniteError, TrainingError
from aiorl.ledger import Aborted, Episode, Ledger
from aiorl.offload import Brake, set_torch_threads
from aiorl.pacing import RolloutPlan
from aiorl.seals import check_seal
from aiorl.segments import Array, Rollout, Segment, SegmentHeader


@dataclass(frozen=True)
class Outcome:
    """What one update did: metrics, gradient steps, the weights it made, the episodes it entered in the books.

    `segment_seconds` is how long each of the plan's parts was collected, `skipped` why the update changed nothing (None if
    it did), `alarms` what is new and wrong.
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
    aborted: tuple[Aborted, ...] = ()
    skipped: str | None = None
    alarms: tuple[str, ...] = ()

    @property
    def collect_seconds(self) -> float:
        """Of the longest segment."""
        return max(self.segment_seconds)

    @property
    def collected_seconds(self) -> float:
        """Of all segments together."""
        return sum(self.segment_seconds)


class Trainer:
    """Learner and ledger of one run. Used on the learner thread only, one call at a time, but for `where` and `abandon`."""

    def __init__(
        self,
        algorithm: Algorithm,
        spaces: Spaces,
        context: LearnerContext,
        ledger: Ledger,
        threads: int,
        settings: Mapping[int, Mapping[str, float]] | None = None,
        skips_max: int = 0,
        bounds: Mapping[str, Bounds] | None = None,
        brake: Brake | None = None,
        rollouts: Mapping[int, int] | None = None,
    ) -> None:
        """`settings`: changes to make after so many updates, and `rollouts` how many the run is to have in all from there on
        (when it is repeated). `skips_max`: how many updates in a row may be skipped because they come to NaN or infinity.
        `bounds`: of the observations, as declared. `brake`: holds an update between two gradient steps."""
        self.ledger = ledger
        self._alarms, self._skips_max, self._skips = Alarms(spaces, bounds), skips_max, 0
        self._storing = threading.Lock()
        self._settings, self._rollouts = settings or {}, rollouts or {}
        self.set_now: dict[str, float] = {}  # settings that were changed after the last update
        self._threads = threads
        self._threads_before = _set_torch_threads(threads)
        self._abandoned = threading.Event()
        self._brake = brake or Brake()
        self._algorithm, self._spaces = algorithm, spaces
        self._context = replace(context, abandoned=self._abandoned.is_set, rest=self._brake.rest)
        self.learner: Learner = algorithm.learner(spaces, self._context)
        self._fingerprint = fingerprint(self.learner.weights())

    def abandon(self) -> None:
        """Let an update that is under way end as soon as it can, also if it is held: the run ends without it. For any
        thread."""
        self._abandoned.set()
        self._brake.release()

    def update(self, plan: RolloutPlan, segments: tuple[Segment, ...]) -> Outcome:
        """Enter a rollout in the books and let the learner do all it owes for it.

        Raises TrainingError or what the learner raises, and InvariantError for segments that are not as they were sealed.
        """
        _check_seals(plan, segments)
        n = segments[0].envs
        envs = np.concatenate([np.arange(part.group * n, (part.group + 1) * n) for part in plan.parts])
        rollout = Rollout(plan.index, plan.behaviour_version, segments, envs)
        if plan.index in self._settings:
            self.set(self._settings[plan.index])
        begun, rested_s = time.perf_counter(), self._brake.rested_s
        metrics, skipped = self._learn(rollout)
        self.set_now = {}
        took_s = time.perf_counter() - begun - (self._brake.rested_s - rested_s)
        if "gradient_steps" not in metrics:
            raise TrainingError(
                f"{type(self.learner).__name__}.update returned no `gradient_steps`\n  add it to the metrics (0 in warm-up)"
            )
        _check_seals(plan, segments)  # nobody wrote into them while they were read
        weights = self.learner.weights()
        _check_finite(weights, plan.index)
        with self._storing:
            entries = self.ledger.store(plan.parts, segments)
        before, self._fingerprint = self._fingerprint, fingerprint(weights)
        alarms = self._alarms.update(
            plan.index, segments, metrics, changed=self._fingerprint != before, skipped=skipped
        )
        mark = self._fingerprint
        if self._rollouts.get(plan.index + 1, self._context.rollouts) != self._context.rollouts:
            weights = self._begin_anew(self._rollouts[plan.index + 1])
        times = [float(s.header[SegmentHeader.ENDED_S] - s.header[SegmentHeader.STARTED_S]) for s in segments]
        return Outcome(
            metrics={k: float(v) for k, v in metrics.items() if k != "gradient_steps"},
            gradient_steps=int(metrics["gradient_steps"]),
            weights=weights,
            fingerprint=mark,
            episodes=entries.episodes,
            aborted=tuple(entries.aborted),
            env_steps=rollout.env_steps,
            stored=self.ledger.stored,
            update_seconds=took_s,
            segment_seconds=tuple(times),
            skipped=skipped,
            alarms=(*alarms, *self._alarms.outside(rollout)),
        )

    def _learn(self, rollout: Rollout) -> tuple[dict[str, float], str | None]:
        """(metrics, None), or (no gradient steps, why the update was skipped) where it came to NaN and may be."""
        try:
            metrics = self.learner.update(rollout)
        except NonFiniteError as error:
            self._skips += 1
            if self._skips <= self._skips_max:
                return {"gradient_steps": 0.0}, str(error)
            if not self._skips_max:
                raise
            too_many = f"{self._skips_max} updates in a row were skipped, and one more was not finite"
            raise TrainingError(f"{too_many}\n  {error}") from error
        self._skips = 0
        return metrics, None

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
        self.set_now |= changes
        return self.ledger.rollouts

    def _begin_anew(self, rollouts: int) -> Weights:
        """Do to the learner what a resume does after which the run is to have so many rollouts in all: epsilon, an annealed
        learning rate and beta go by the new number from here on, already in the weights that are returned."""
        state = self.learner.state_dict()
        self._close_learner()
        self._context = replace(self._context, rollouts=rollouts)
        self.learner = self._algorithm.learner(self._spaces, self._context)
        self.learner.load_state_dict(state)
        weights = self.learner.weights()
        self._fingerprint = fingerprint(weights)
        return weights

    def capture(self, behaviour: Mapping[int, Weights]) -> dict[str, Any]:
        """Everything a resume needs, as it is between two updates: the parts of a checkpoint.

        `behaviour` are the older versions that rollouts after this point still act with.
        """
        return {
            "policy": {name: np.array(a) for name, a in self.learner.weights().items()},
            "learner": self.learner.state_dict(),
            "run": {
                "ledger": self.ledger.state_dict(),
                "set_now": dict(self.set_now),
                "behaviour": {str(v): {k: np.array(a) for k, a in w.items()} for v, w in behaviour.items()},
            },
        }

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Inverse of `capture`; ValueError names the first mismatch."""
        self.learner.load_state_dict(parts["learner"])
        self._fingerprint = fingerprint(self.learner.weights())
        self.ledger.load_state_dict(parts["run"]["ledger"])
        self.set_now = dict(parts["run"]["set_now"])

    def close(self) -> None:
        """Only the books can be used afterwards."""
        try:
            self._close_learner()
        finally:
            set_torch_threads(self._threads_before)

    def _close_learner(self) -> None:
        if isinstance(self.learner, Closing):
            self.learner.close()


def _check_seals(plan: RolloutPlan, segments: tuple[Segment, ...]) -> None:
    for part, segment in zip(plan.parts, segments, strict=True):
        check_seal(segment, part.group, part.ordinal)


def _check_finite(weights: Weights, update: int) -> None:
    """What is published is finite, whatever the algorithm looks at. The sum of an array tells, unless it overflows."""
    for name, array in weights.items():
        if array.dtype.kind == "f":
            with np.errstate(all="ignore"):
                finite = bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
            if not finite:
                what = f"update {update} made {name} not finite: it is not published"
                raise TrainingError(f"{what}\n  lower the learning rate")


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


def _set_torch_threads(threads: int) -> int:
    """Set the learner thread's torch threads; returns how many it had."""
    import torch

    before = set_torch_threads(threads)
    if torch.get_num_threads() != threads:
        raise TrainingError(f"torch uses {torch.get_num_threads()} threads on the learner thread, expected {threads}")
    return before
