"""Does it act on what it has learned, and read the ends of episodes rightly? Asked in tasks that tell which action is right.

A policy that encodes observations otherwise than its learner, with the same shape, breaks no rule and raises nothing: it
acts as if on other observations, and only a task shows it. So it is with a target that takes one end for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aiorl.algos.base import Algorithm, Weights
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import ConfigError
from aiorl.segments import Array
from aiorl.testing.bench import Bench, copied
from aiorl.testing.chain import Follow, Place, Signs, is_high, shown
from aiorl.testing.findings import Finding, error, info, warning
from aiorl.testing.plain_loop import plain_loop
from aiorl.testing.replay_checks import changed, learns_from_replay

SIGNS, FORK, FOLLOW = (f"aiorl.testing.chain:{name}" for name in ("Signs", "Fork", "Follow"))
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
        """Where its deterministic policy takes the "high" action, of observations [N, F]."""
        policy, discrete = self.algorithm.policy(self.spaces), self.spaces.action.kind != "box"
        policy.begin(self.weights, 0, None, 1)
        actions, _ = policy.act({self.spaces.observation[0].name: obs}, np.ones(len(obs), bool))
        return [is_high(action, discrete=discrete) for action in actions]

    def right(self, signs: Array) -> Array:
        """In which of the signs it takes the right action, if it is shown them so, [6, 5]."""
        return np.equal(self.goes_high(signs), Signs.HIGH)


def tasks(bench: Bench) -> Iterator[Finding]:
    """Who does not act on what it learned shows nothing of what it learned of the ends of episodes."""
    found = [*acting(bench)]
    yield from found or (*ends_of_episodes(bench), *following(bench), *windows(bench))


# -- acting ------------------------------------------------------------------------------------------------------------


def acting(bench: Bench) -> Iterator[Finding]:
    """It finds the right action for each of six observations, shown as numbers up to 1, and as bytes if it takes those."""
    for seed, dtype in enumerate(("float32", "uint8"), start=SEED):  # of two seeds: what was chance is so in one only
        spec = EnvSpec(SIGNS, {**bench.env.kwargs, "dtype": dtype}, SIGNS)
        spaces = probe(spec).spaces
        try:
            bench.algorithm.check(spaces)
        except (ConfigError, AssertionError):
            continue
        if (finding := _judged(bench, spec, spaces, dtype, seed)) is not None:
            yield finding
            return


def _judged(bench: Bench, spec: EnvSpec, spaces: Spaces, dtype: str, seed: int) -> Finding | None:
    signs = Signs(dtype=dtype).signs
    tried: list[Trained] = []
    for rate, env_steps in ATTEMPTS:
        tried.append(_trained(bench, spec, spaces, rate, env_steps, seed))
        if tried[-1].right(signs).all():
            return None
    right = [trained.right(signs) for trained in tried]
    best = max(int(r.sum()) for r in right)
    told = f"where each of {len(signs)} observations ({dtype}) tells the right action, it takes"
    at_best = f"{told} that in {best} of them"
    for how, encode in OTHERWISE.items():  # one attempt may be right by chance, two hardly
        if sum(bool(trained.right(encode(signs).astype(np.float32)).all()) for trained in tried) > 1:
            return error("acts-otherwise", f"{at_best}, and in all when they are {how} before it acts",
                         "encode an observation for acting as for learning, by one function")  # fmt: skip
    if sum(not r.any() for r in right) > 1:
        return error("acts-otherwise", f"{told} the other one in all of them, in more than one training",
                     "is there an argmin for an argmax, or a sign turned round?")  # fmt: skip
    if any(r[:2].any() and r[2:].all() for r in right):  # without a bias nothing tells the dim one from the bright one
        return None
    return warning(
        "not-learned", f"{at_best} after {ATTEMPTS[-1][1]:,} env steps; ends of episodes were not judged",
        "do both halves encode an observation alike, is each action stored with its own? Right if it learns more slowly",
    )  # fmt: skip


def _trained(bench: Bench, spec: EnvSpec, spaces: Spaces, rate: float | None, env_steps: int, seed: int) -> Trained:
    settings = {"reward_clip": None, "update_ratio": RATIO} | ({} if rate is None else {"learning_rate": rate})
    return _train(bench, changed(bench.algorithm, **settings), spec, spaces, 32, env_steps, seed=seed, warmup=WARMUP)


# -- ends of episodes --------------------------------------------------------------------------------------------------


def ends_of_episodes(bench: Bench) -> Iterator[Finding]:
    """Train on the chain and look at what it then does in the places that tell.

    What is wrong there must be so with its actions exchanged, too: who does not tell them apart does by chance, or by
    taking one of them everywhere, what a fault would do.
    """
    found: list[Finding] = []
    own = getattr(bench.algorithm, "update_ratio", 0.0)
    for ratio in dict.fromkeys((min(RATIO, own), own)):  # with large networks the whole of it takes minutes
        found = _judged_ends(bench, ratio, turned=False)
        if _codes(found) == ["ends"]:
            break
    if _codes(found) == ["ends"] or _codes(found) == _codes(_judged_ends(bench, own, turned=True)):
        yield from found
    else:
        yield _unlearned()


def _codes(findings: Sequence[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def _unlearned() -> Finding:
    return warning(
        "not-learned",
        f"in {ENDS_ENV_STEPS:,} steps it did not learn what either action leads to; ends of episodes were not judged",
        "is each action stored, and learned from, with the observation that it was taken on? Right if it learns more slowly",
    )


def _judged_ends(bench: Bench, ratio: float, *, turned: bool) -> list[Finding]:
    """With that `update_ratio`, if it has one; `turned`: in the chain that takes low for high."""
    # clipped, both rewards may come to the same
    algorithm = changed(bench.algorithm, reward_clip=None, update_ratio=ratio)
    spec = replace(bench.env, kwargs={**bench.env.kwargs, "turned": turned})
    trained = _train(bench, algorithm, spec, bench.spaces, 64, ENDS_ENV_STEPS, seed=SEED)
    places = [Place.TERMINATED, Place.TRUNCATED, Place.GOES_ON, Place.ENOUGH]
    goes_high = trained.goes_high(np.stack([*map(shown, places)]))
    high = {place: high != turned for place, high in zip(places, goes_high, strict=True)}
    if turned and high[Place.ENOUGH]:
        return [_unlearned()]
    if not high[Place.GOES_ON]:
        return [warning(
            "no-foresight",
            f"in {ENDS_ENV_STEPS:,} steps it did not learn to wait one step for a larger reward",
            "right if it only looks at the next reward (then nothing can be said about ends of episodes)",
        )]  # fmt: skip
    found: list[Finding] = []
    if high[Place.TERMINATED]:
        found.append(error(
            "bootstraps-termination",
            "it expects reward after a termination",
            "the value of what follows is 0 where `terminated` is True",
        ))  # fmt: skip
    if not high[Place.TRUNCATED]:
        found.append(error(
            "cuts-truncation",
            "it takes a truncation for the end of everything",
            "where `truncated` is True, add the discounted value of rollout.next_obs(), the true last observation",
        ))  # fmt: skip
    return found or [info("ends", "truncation bootstraps, termination does not")]


# -- what follows ------------------------------------------------------------------------------------------------------


def following(bench: Bench) -> Iterator[Finding]:
    """What follows is worth what the best action there is worth: with actions exchanged, too, see `ends_of_episodes`.

    Not where actions are continuous: there the actor chooses what follows, and `acting` shows what it chooses.
    """
    if bench.spaces.action.kind == "box" or not learns_from_replay(bench.algorithm):
        return
    if all(_shuns_what_it_knows_is_best(bench, turned=turned) for turned in (False, True)):
        yield warning(
            "follows-worst",
            "it takes 0.3 at once and not the step to a place where it would choose 1 over -1",
            "is there an argmin for an argmax? Right if it is to value a mean over what it does there (SARSA, entropy)",
        )


def _shuns_what_it_knows_is_best(bench: Bench, *, turned: bool) -> bool:
    algorithm = changed(bench.algorithm, reward_clip=None, n_step=1, gamma=0.9, update_ratio=RATIO)
    spec = EnvSpec(FOLLOW, {**bench.env.kwargs, "turned": turned}, FOLLOW)
    trained = _train(bench, algorithm, spec, bench.spaces, 64, ENDS_ENV_STEPS // 4, seed=SEED)
    first, second = trained.goes_high(np.stack([shown(Follow.FIRST), shown(Follow.SECOND)]))
    return first == turned and second != turned


# -- windows of several steps ------------------------------------------------------------------------------------------


def windows(bench: Bench) -> Iterator[Finding]:
    """Rewards of two steps are followed by the value of where the second led: with actions exchanged, too, for whoever takes
    one everywhere does in one of them what a fault would do.

    Not where actions are continuous: an actor that has gone for the reward that is found first may stay there.
    """
    if bench.spaces.action.kind == "box" or not all(hasattr(bench.algorithm, name) for name in ("n_step", "gamma")):
        return
    ways = [(quick, turned) for quick in (True, False) for turned in (False, True)]  # the later reward is found later
    if not any(_finds_the_later_reward(bench, quick=quick, turned=turned) for quick, turned in ways):
        yield error(
            "window-value",
            "with n_step = 2 it prefers 1 after two steps to 1.7 after three, whichever action leads there",
            "after n rewards comes the value of where the n-th step led (`next_obs` of what `sample(n=…)` gives)",
        )


def _finds_the_later_reward(bench: Bench, *, quick: bool, turned: bool) -> bool:
    algorithm = changed(bench.algorithm, reward_clip=None, n_step=2, gamma=0.9, **{"update_ratio": RATIO} if quick else {})
    env_steps = ENDS_ENV_STEPS // 4 if quick else ENDS_ENV_STEPS
    spec = EnvSpec(FORK, {**bench.env.kwargs, "turned": turned}, FORK)
    trained = _train(bench, algorithm, spec, bench.spaces, 64, env_steps, seed=SEED)
    return trained.goes_high(shown(Place(0))[None])[0] != turned


def _train(
    bench: Bench, algorithm: Algorithm, spec: EnvSpec, spaces: Spaces, longest: int, env_steps: int, *,
    seed: int, warmup: int | None = None,
) -> Trained:  # fmt: skip
    """Trained in segments of `longest` steps at most."""
    steps = min(longest, algorithm.default_segment_length)
    learner = plain_loop(
        algorithm, spec, envs=ENVS, group_size=ENVS, steps=steps, seed=seed, rollouts=env_steps // (ENVS * steps), degree=0,
        warmup=warmup, directory=bench.context.directory,
    )  # fmt: skip
    return Trained(algorithm, spaces, copied(learner.weights()))
