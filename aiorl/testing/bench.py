"""An algorithm at work on a small environment, recorded, so that its halves can be given the same again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.algos.base import ACT, Algorithm, Learner, LearnerContext, Weights
from aiorl.checkpoint import flatten
from aiorl.envs.group import blocking_group
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, SegmentLayout

ENVS, STEPS, ROLLOUTS, SEED = 4, 32, 6, 11
HALF = ROLLOUTS // 2


@dataclass
class Recorded:
    """A rollout in memory of its own."""

    index: int
    layout: SegmentLayout
    memory: bytearray

    def rollout(self, memory: bytearray | None = None) -> Rollout:
        segment = self.layout.view(memoryview(memory if memory is not None else self.memory))
        return Rollout(self.index, self.index, (segment,), np.arange(ENVS))

    def copied(self) -> bytearray:
        return bytearray(self.memory)


@dataclass(frozen=True)
class Bench:
    """An algorithm at work on a tiny environment: what it collected and learned from, one rollout after the other."""

    algorithm: Algorithm
    env: EnvSpec
    spaces: Spaces
    context: LearnerContext
    tape: tuple[Recorded, ...]
    told: tuple[dict[str, float], ...]
    """The metrics of each update."""
    half: dict[str, Array]
    """Weights after the first `HALF` rollouts."""
    final: dict[str, Array]
    """And after all of them."""

    def learner(self, context: LearnerContext | None = None) -> Learner:
        return self.algorithm.learner(self.spaces, context or self.context)

    def trained(self, rollouts: int, context: LearnerContext | None = None) -> Learner:
        """A new learner that has been through the first `rollouts` of the tape."""
        learner = self.learner(context)
        for recorded in self.tape[:rollouts]:
            learner.update(recorded.rollout())
        return learner


def context(**changes: Any) -> LearnerContext:
    plain = LearnerContext(
        seed=SEED, envs=ENVS, segment_length=STEPS, rollouts=ROLLOUTS, off_policy_degree=0, warmup=STEPS
    )
    return replace(plain, **changes)


def record(algorithm: Algorithm, env: EnvSpec, directory: Path | None = None) -> Bench:
    """Collect and learn in turn, as at degree 0, and keep what was collected. `directory` is for files of learners."""
    found = probe(env, ENVS)
    spaces = found.spaces
    columns = {"action": spaces.action_column, "reward": Column((), "float64")}
    columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]} | algorithm.columns(spaces)
    layout = SegmentLayout(STEPS, ENVS, spaces.obs_columns, columns, found.state_bytes)
    given = context(directory=directory)
    learner = algorithm.learner(spaces, given)
    group, policy = blocking_group(found.spec, spaces, range(ENVS), SEED), algorithm.policy(spaces)
    tape: list[Recorded] = []
    told: list[dict[str, float]] = []
    half: dict[str, Array] = {}
    try:
        group.open(None)
        for k in range(ROLLOUTS):
            recorded = Recorded(k, layout, bytearray(layout.nbytes))
            rng = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(ACT, k, 0)))
            policy.begin(copied(learner.weights()), k, rng, STEPS)
            group.collect(policy, recorded.rollout().segments[0], STEPS)
            tape.append(recorded)
            told.append(learner.update(Recorded(k, layout, recorded.copied()).rollout()))
            if k == HALF - 1:
                half = copied(learner.weights())
    finally:
        group.close()
    return Bench(algorithm, env, spaces, given, tuple(tape), tuple(told), half, copied(learner.weights()))


# -- comparing --------------------------------------------------------------------------------------------------------


def copied(weights: Weights) -> dict[str, Array]:
    return {name: np.array(array) for name, array in weights.items()}


def same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return layout_of(a) == layout_of(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


def layout_of(weights: Weights) -> dict[str, str]:
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in weights.items()}


def difference(a: dict[str, str], b: dict[str, str]) -> str:
    return next(f"{name} {layout}" for name, layout in [*a.items(), *b.items()] if a.get(name) != b.get(name))


def alike(a: Learner, b: Learner) -> bool:
    return same(a.weights(), b.weights()) and not unlike(a.state_dict(), b.state_dict())


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first place where two state trees differ, "" if none."""
    (arrays, plain), (other_arrays, other_plain) = flatten(a), flatten(b)
    for path in [*arrays, *other_arrays]:
        x, y = arrays.get(path), other_arrays.get(path)
        if x is None or y is None or x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
            return path
    return next((p for p in [*plain, *other_plain] if repr(plain.get(p)) != repr(other_plain.get(p))), "")
