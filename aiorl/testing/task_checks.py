"""Does it act on what it has learned, and read the ends of episodes rightly? Asked in tasks that tell which action is right.

A policy that encodes observations otherwise than its learner, with the same shape, breaks no rule and raises nothing: it
acts as if on other observations, and only a task shows it. So it is with a target that takes one end for the other.
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
from aiorl.testing.chain import Place, Signs, is_high, shown
from aiorl.testing.findings import Finding, error, info, warning
from aiorl.testing.plain_loop import plain_loop
from aiorl.testing.replay_checks import changed

SIGNS = "aiorl.testing.chain:Signs"
ENVS, SEED, WARMUP, RATIO = 8, 2, 256, 0.25
ENDS_ENV_STEPS = 16_384
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

    def goes_high(self, obs: Array) -> list[bool]:
        """Where its deterministic policy takes the "high" action, of observations [N, 5]."""
        policy, discrete = self.algorithm.policy(self.spaces), self.spaces.action.kind != "box"
        policy.begin(self.weights, 0, None, 1)
        actions, _ = policy.act({self.spaces.observation[0].name: obs}, np.ones(len(obs), bool))
        return [is_high(action, discrete=discrete) for action in actions]

    def right(self, signs: Array) -> int:
        """In how many of the signs it takes the right action, if it is shown them so, [6, 5]."""
        return int(np.sum(self.goes_high(signs) == Signs.HIGH))


def tasks(bench: Bench) -> Iterator[Finding]:
    """Who does not act on what it learned shows nothing of what it learned of the ends of episodes."""
    found = [*acting(bench)]
    yield from found or ends_of_episodes(bench)


# -- acting ------------------------------------------------------------------------------------------------------------


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
    signs = Signs(dtype=dtype).signs
    tried: list[Trained] = []
    for rate, env_steps in ATTEMPTS:
        tried.append(_trained(bench, spec, spaces, rate, env_steps))
        if tried[-1].right(signs) == len(signs):
            return None
    best = max(trained.right(signs) for trained in tried)
    told = f"where each of {len(signs)} observations ({dtype}) tells the right action, it takes that in {best} of them"
    for how, encode in OTHERWISE.items():  # one attempt may be right by chance, two hardly
        if sum(trained.right(encode(signs).astype(np.float32)) == len(signs) for trained in tried) > 1:
            return error("acts-otherwise", f"{told}, and in all when they are {how} before it acts",
                         "encode an observation for acting as for learning, by one function")  # fmt: skip
    if best == len(signs) - 1:  # without a bias nothing tells the dim one from the bright one
        return None
    return warning(
        "not-learned", f"{told} after {ATTEMPTS[-1][1]:,} env steps; ends of episodes were not judged",
        "do policy and learner encode an observation alike: scale, order, frames? Right if it learns more slowly than that",
    )  # fmt: skip


def _trained(bench: Bench, spec: EnvSpec, spaces: Spaces, rate: float | None, env_steps: int) -> Trained:
    settings = {"reward_clip": None, "update_ratio": RATIO} | ({} if rate is None else {"learning_rate": rate})
    return _train(bench, changed(bench.algorithm, **settings), spec, spaces, 32, env_steps, warmup=WARMUP)


# -- ends of episodes --------------------------------------------------------------------------------------------------


def ends_of_episodes(bench: Bench) -> Iterator[Finding]:
    """Train on the chain and look at what it then does in the three places that tell."""
    algorithm = changed(bench.algorithm, reward_clip=None)  # both rewards may come to the same
    trained = _train(bench, algorithm, bench.env, bench.spaces, 64, ENDS_ENV_STEPS)
    places = [Place.TERMINATED, Place.TRUNCATED, Place.GOES_ON]
    high = dict(zip(places, trained.goes_high(np.stack([*map(shown, places)])), strict=True))
    if not high[Place.GOES_ON]:
        yield warning(
            "no-foresight",
            f"in {ENDS_ENV_STEPS:,} steps it did not learn to wait one step for a larger reward",
            "right if it only looks at the next reward (then nothing can be said about ends of episodes)",
        )
        return
    if high[Place.TERMINATED]:
        yield error(
            "bootstraps-termination",
            "it expects reward after a termination",
            "the value of what follows is 0 where `terminated` is True",
        )
    if not high[Place.TRUNCATED]:
        yield error(
            "cuts-truncation",
            "it takes a truncation for the end of everything",
            "where `truncated` is True, add the discounted value of rollout.next_obs(), the true last observation",
        )
    if high[Place.TRUNCATED] and not high[Place.TERMINATED]:
        yield info("ends", "truncation bootstraps, termination does not")


def _train(
    bench: Bench, algorithm: Algorithm, spec: EnvSpec, spaces: Spaces, longest: int, env_steps: int, *,
    warmup: int | None = None,
) -> Trained:  # fmt: skip
    """Trained in segments of `longest` steps at most."""
    steps = min(longest, algorithm.default_segment_length)
    learner = plain_loop(
        algorithm, spec, envs=ENVS, group_size=ENVS, steps=steps, seed=SEED, rollouts=env_steps // (ENVS * steps), degree=0,
        warmup=warmup, directory=bench.context.directory,
    )  # fmt: skip
    return Trained(algorithm, spaces, copied(learner.weights()))
