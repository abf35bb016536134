"""The plain sequential loop that says what a run means: no asyncio, no workers, no pacing.

Rollout k is collected with version max(0, k - degree), then learned from, which makes version k + 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.algos.base import ACT, Algorithm, Learner, LearnerContext, Weights
from aiorl.envs.group import blocking_group
from aiorl.envs.make import probe
from aiorl.envs.spec import EnvSpec
from aiorl.segments import CORE_COLUMNS, Column, Rollout, SegmentLayout


def plain_loop(
    algorithm: Algorithm, env: EnvSpec, *, envs: int, group_size: int, steps: int, seed: int, rollouts: int, degree: int,
    planned_rollouts: int | None = None, warmup: int | None = None, directory: Path | None = None,
    each: Callable[[int, Learner, dict[str, float]], Any] | None = None,
) -> Learner:  # fmt: skip
    """Train for `rollouts` rollouts of `steps` x `envs` and return the learner. `each(k, learner, metrics)` follows each.

    `planned_rollouts` is what schedules count with, if the loop ends before; `directory` is for files of the learner.
    """
    found = probe(env, group_size)
    spaces = found.spaces
    algorithm.check(spaces)
    context = LearnerContext(
        seed=seed, envs=envs, segment_length=steps, rollouts=planned_rollouts or rollouts, off_policy_degree=degree,
        warmup=warmup, directory=directory,
    )  # fmt: skip
    learner = algorithm.learner(spaces, context)
    columns = {"action": spaces.action_column, "reward": Column((), "float64")}
    columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]} | algorithm.columns(spaces)
    layout = SegmentLayout(steps, group_size, spaces.obs_columns, columns, found.state_bytes)
    starts = range(0, envs, group_size)
    groups = [blocking_group(found.spec, spaces, range(start, start + group_size), seed) for start in starts]
    policies = [algorithm.policy(spaces) for _ in groups]
    segments = tuple(layout.allocate() for _ in groups)
    for group in groups:
        group.open(None)

    versions: deque[Weights] = deque([_copy(learner.weights())], maxlen=degree + 1)  # the oldest is max(0, k - degree)
    for k in range(rollouts):
        for g, (group, policy, segment) in enumerate(zip(groups, policies, segments, strict=True)):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ACT, k, g)))
            policy.begin(versions[0], k, rng, steps)
            group.collect(policy, segment, steps)
        metrics = learner.update(Rollout(k, max(0, k - degree), segments, np.arange(envs)))
        versions.append(_copy(learner.weights()))
        if each is not None:
            each(k, learner, metrics)
    for group in groups:
        group.close()
    return learner


def _copy(weights: Weights) -> Weights:
    return {name: np.array(array) for name, array in weights.items()}
