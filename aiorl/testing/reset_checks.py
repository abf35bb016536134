"""What an episode owes to those before it in its environment: nothing, if reset() resets all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aiorl.envs.contract import ObsReader, flag, real, reset_obs, step_parts
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array
from aiorl.testing.findings import Finding, error, warning

ALIKE = 4
"""From so many episodes on that ended alike, a time limit is suspected, or a reset that forgets."""

SEED = 2000
BEFORE, SHORT = 3, 8  # episodes before the one that is compared, and their steps: play may have had none that ended


def one_step(ends: Sequence[tuple[bool, bool, int]], last: tuple[int, Any], make: Callable[[], Any]) -> Iterator[Finding]:
    """What goes before an episode must not end it: the last one of one step, its seed and action, again in a new one."""
    first, *later = [length for *_, length in ends] or [1]
    if first == 1 or len(later) < ALIKE or 2 * later.count(1) <= len(later):
        return
    seed, action = last
    env = make()
    try:
        env.reset(seed=seed)
        result = env.step(action)
    finally:
        env.close()
    told = f"the first episode had {first} steps, {later.count(1)} of {len(later)} after it had one"
    todo = "reset in reset() all that ends an episode, such as a counter of steps"
    if not (result[2] or result[3]):
        yield error("one-step-episodes", f"{told}, where a new environment goes on", todo)
    elif later.count(1) == len(later):
        yield warning("one-step-episodes", told, f"right if most end so soon; if not: {todo}")


def carried_over(used: Any, make: Callable[[], Any], spaces: Spaces, steps: int) -> Iterator[Finding]:
    """An episode of at most `steps` steps in an environment that has been played, and again in a new one."""
    for episode in range(BEFORE):
        _play(used, spaces, SEED + episode, SHORT)
    seed = SEED + BEFORE
    after, new = _play(used, spaces, seed, steps), make()
    try:
        expected = _play(new, spaces, seed, steps)
    finally:
        new.close()
    for t, (seen, wanted) in enumerate(zip(after, expected, strict=False)):  # the first that ends sooner differs in that
        if how := next(filter(None, (_differs(name, seen[name], wanted[name]) for name in wanted)), ""):
            yield error(
                "carries-over",
                f"after other episodes, {f'step {t}' if t else 'the reset'} of an episode: {how}",
                "expected is what a new environment shows with the same seed and actions: "
                "keep nothing from one episode to the next",
            )
            return


def _play(env: Any, spaces: Spaces, seed: int, steps: int) -> list[dict[str, Array]]:
    """An episode with random actions, cut off after `steps`: what its reset and each step returned, by name."""
    reader, names = ObsReader(spaces.observation), [leaf.name for leaf in spaces.observation]

    def copied(obs: Any) -> dict[str, Array]:
        return {name: np.array(leaf) for name, leaf in zip(names, reader.read(obs), strict=True)}

    seen = [copied(reset_obs(env.reset(seed=seed)))]
    for action in spaces.each_action(spaces.sample_actions(steps, np.random.default_rng(seed))):
        obs, reward, terminated, truncated, _ = step_parts(env.step(action))
        ends = {"terminated": flag(terminated, "terminated"), "truncated": flag(truncated, "truncated")}
        told = {"reward": real(reward), **ends}
        seen.append({**copied(obs), **{name: np.array(value) for name, value in told.items()}})
        if any(ends.values()):
            break
    return seen


def _differs(name: str, seen: Array, wanted: Array) -> str:
    """The first element that is another one; "" if none."""
    other = (seen != wanted) & ~((seen != seen) & (wanted != wanted))
    if not other.any():
        return ""
    at = tuple(np.argwhere(other)[0].tolist())
    where = f"{name}[{', '.join(map(str, at))}]" if at else name
    return f"{where} is {seen[at]}, expected {wanted[at]}"
