"""Does it act on what it has learned? Asked in a task where an observation tells which action is right.

A policy that encodes observations otherwise than its learner, with the same shape, breaks no rule and raises nothing: it
acts as if on other observations, and only this shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aiorl.algos.base import Algorithm, Weights
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import ConfigError
from aiorl.segments import Array
from aiorl.testing.bench import Bench, copied
from aiorl.testing.chain import Signs, is_high
from aiorl.testing.findings import Finding, error, warning
from aiorl.testing.plain_loop import plain_loop
from aiorl.testing.replay_checks import changed

SIGNS = "aiorl.testing.chain:Signs"
ENVS, SEED, WARMUP, RATIO = 8, 2, 256, 0.25
ATTEMPTS: tuple[tuple[float | None, int], ...] = ((None, 2_048), (3e-4, 4_096), (None, 8_192))
"""(learning rate, None for the algorithm's own; env steps): each where the one before did not lead to the right actions."""

OTHERWISE: dict[str, Callable[[Array], Array]] = {
    "divided by 255": lambda x: x / np.float32(255),
    "multiplied by 255": lambda x: x * np.float32(255),
    "in reverse order": lambda x: x[:, ::-1],
}
"""Ways in which an observation may be encoded for one half and not for the other."""


@dataclass(frozen=True)
class Trained:
    """What an attempt came to."""

    algorithm: Algorithm
    spaces: Spaces
    weights: Weights

    def right(self, shown: Array) -> int:
        """In how many of the signs it takes the right action, if it is shown them so, [6, 5]."""
        policy, discrete = self.algorithm.policy(self.spaces), self.spaces.action.kind != "box"
        policy.begin(self.weights, 0, None, 1)
        actions, _ = policy.act({self.spaces.observation[0].name: shown}, np.ones(len(shown), bool))
        return sum(is_high(a, discrete=discrete) == high for a, high in zip(actions, Signs.HIGH.tolist(), strict=True))


def acting(bench: Bench) -> Iterator[Finding]:
    """It finds the right action for each of six observations, shown as numbers up to 1, and as bytes if it takes those."""
    for dtype in ("float32", "uint8"):
        spec = EnvSpec(SIGNS, {**bench.env.kwargs, "dtype": dtype}, SIGNS)
        spaces = probe(spec).spaces
        try:
            bench.algorithm.check(spaces)
        except (ConfigError, AssertionError):
            continue
        if (finding := _judged(bench, spec, spaces, dtype)) is not None:
            yield finding
            return


def _judged(bench: Bench, spec: EnvSpec, spaces: Spaces, dtype: str) -> Finding | None:
    shown = Signs(dtype=dtype).signs
    tried: list[Trained] = []
    for rate, env_steps in ATTEMPTS:
        tried.append(_trained(bench, spec, spaces, rate, env_steps))
        if tried[-1].right(shown) == len(shown):
            return None
    best = max(trained.right(shown) for trained in tried)
    told = f"where each of {len(shown)} observations ({dtype}) tells the right action, it takes that in {best} of them"
    for how, encode in OTHERWISE.items():  # one attempt may be right by chance, two hardly
        if sum(trained.right(encode(shown).astype(np.float32)) == len(shown) for trained in tried) > 1:
            return error("acts-otherwise", f"{told}, and in all when they are {how} before it acts",
                         "encode an observation for acting as for learning, by one function")  # fmt: skip
    if best == len(shown) - 1:  # without a bias nothing tells the dim one from the bright one
        return None
    return warning(
        "not-learned", f"{told} after {ATTEMPTS[-1][1]:,} env steps; ends of episodes were not judged",
        "do policy and learner encode an observation alike: scale, order, frames? Right if it learns more slowly than that",
    )  # fmt: skip


def _trained(bench: Bench, spec: EnvSpec, spaces: Spaces, rate: float | None, env_steps: int) -> Trained:
    settings = {"reward_clip": None, "update_ratio": RATIO} | ({} if rate is None else {"learning_rate": rate})
    algorithm = changed(bench.algorithm, **settings)
    steps = min(32, algorithm.default_segment_length)
    learner = plain_loop(
        algorithm, spec, envs=ENVS, group_size=ENVS, steps=steps, seed=SEED, rollouts=env_steps // (ENVS * steps), degree=0,
        warmup=WARMUP, directory=bench.context.directory,
    )  # fmt: skip
    return Trained(algorithm, spaces, copied(learner.weights()))
