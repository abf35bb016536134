"""Whole episodes with a fixed policy: what evaluation and play count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.envs.checked import AsyncLimit, Batch, OneByOne, SideBySide, at_once
from aiorl.envs.contract import check_shown
from aiorl.envs.coroutines import AsCoroutines, run_apart
from aiorl.envs.make import make_async_env, make_env, make_vector
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.envs.vector import CheckedVector
from aiorl.errors import EnvError
from aiorl.seeding import evaluation_seed
from aiorl.segments import Array

if TYPE_CHECKING:
    from aiorl.algos.base import Policy


def run_episodes(
    envs: EnvSpec | Sequence[Any] | Any,
    spaces: Spaces,
    policy: Policy,
    episodes: int,
    seed: int,
    width: int,
    *,
    fresh: bool = False,
    threads: bool = False,
    limit: AsyncLimit | None = None,
    on_step: Callable[[int], None] | None = None,
    on_frame: Callable[[Any], None] | None = None,
    outcomes: Array | None = None,
) -> tuple[Array, Array]:
    """Run `episodes` episodes, `width` at a time; returns (returns float64, lengths int64), each [episodes].

    Episode e runs in slot e % width and is seeded by (seed, fresh, e), and the policy always acts on the whole batch, so
    the result is a function of the policy, `seed`, `fresh`, `episodes` and `width` alone. A slot that is through is shown
    its last observation. A vector environment resets in its own way: each slot contributes its first episodes, as many
    as it owes, so that short episodes are not favoured.

    `envs` is made from a spec and closed, or given: `width` single environments, or a vector environment.
    `policy.begin` has been called. `on_step(t)` follows each step of the batch and may raise to stop; `on_frame(env)`
    follows each reset and step of slot 0, and each step of a vector environment. `outcomes` [episodes] is filled with how
    each ended (see `outcome_of`; NaN in a vector environment). Raises EnvError.

    Async environments of a spec step at the same time, on a thread with an event loop of its own; with `threads` ordinary
    ones do, too, each on its own. `limit`, a semaphore of asyncio, say, is then held during each step and reset.
    """
    waits = isinstance(envs, EnvSpec) and (envs.coroutines or threads) and not envs.vector_only
    run = run_apart if waits else at_once
    return run(
        run_episodes_async(
            envs,
            spaces,
            policy,
            episodes,
            seed,
            width,
            fresh=fresh,
            threads=threads,
            limit=limit,
            on_step=on_step,
            on_frame=on_frame,
            outcomes=outcomes,
        )
    )


async def run_episodes_async(
    envs: EnvSpec | Sequence[Any] | Any, spaces: Spaces, policy: Policy, episodes: int, seed: int, width: int, *,
    fresh: bool = False, threads: bool = False, limit: AsyncLimit | None = None,
    on_step: Callable[[int], None] | None = None, on_frame: Callable[[Any], None] | None = None,
    outcomes: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """As `run_episodes`, on the running event loop. It waits only where environments step at the same time."""
    tally = _Tally(episodes, width)
    if outcomes is not None:
        outcomes[:] = np.nan
        tally.outcomes = outcomes

    def seed_of(episode: int) -> int:
        return evaluation_seed(seed, episode, fresh=fresh)

    if isinstance(envs, EnvSpec) and not envs.vector_only:
        batch: Batch = SideBySide(spaces, limit) if envs.coroutines or threads else OneByOne(spaces)
        try:
            for i in range(width):
                batch.add(_make(envs, threads), i)
            await _run_single(batch, policy, spaces, seed_of, tally, on_step, on_frame)
        finally:
            await batch.close()
    elif isinstance(envs, Sequence):
        given = OneByOne(spaces)
        for i, env in enumerate(envs):
            given.add(env, i)
        await _run_single(given, policy, spaces, seed_of, tally, on_step, on_frame)
    else:
        made = make_vector(envs, width) if isinstance(envs, EnvSpec) else envs
        vector = CheckedVector(made, spaces, width, lambda i, e: seed_of(i + e * width))
        try:
            _run_vector(vector, policy, spaces, tally, on_step, on_frame)
        finally:
            if made is not envs:
                made.close()
    return tally.returns, tally.lengths


def shares(outcomes: Array) -> dict[str, float | None]:
    """`wins` and `losses` as shares of the episodes that tell how they ended; None if none does."""
    told = outcomes[~np.isnan(outcomes)]
    return {
        "wins": float(np.mean(told > 0)) if len(told) else None,
        "losses": float(np.mean(told < 0)) if len(told) else None,
    }


def _make(spec: EnvSpec, threads: bool) -> Any:
    if spec.coroutines:
        return make_async_env(spec)
    return AsCoroutines(lambda: make_env(spec)) if threads else make_env(spec)


class _Tally:
    """Which episode each slot is at, and what has come of it so far."""

    def __init__(self, episodes: int, width: int) -> None:
        self.returns = np.zeros(episodes)
        self.lengths = np.zeros(episodes, np.int64)
        self.outcomes = np.full(episodes, np.nan)
        self.episode = np.arange(width)
        self.active = self.episode < episodes

    def add(self, slot: int, reward: float, ended: bool, outcome: float = math.nan) -> None:
        episode = self.episode[slot]
        self.returns[episode] += reward
        self.lengths[episode] += 1
        if ended:
            self.outcomes[episode] = outcome
            self.episode[slot] += len(self.episode)
            self.active[slot] = self.episode[slot] < len(self.returns)


def _zeros(spaces: Spaces, width: int) -> dict[str, Array]:
    return {name: np.zeros((width, *c.shape), c.dtype) for name, c in spaces.obs_columns.items()}


def _copied(spaces: Spaces, obs: Sequence[Array]) -> dict[str, Array]:
    return {leaf.name: value.copy() for leaf, value in zip(spaces.observation, obs, strict=True)}


async def _run_single(
    batch: Batch, policy: Policy, spaces: Spaces, seed_of: Callable[[int], int], tally: _Tally,
    on_step: Callable[[int], None] | None, on_frame: Callable[[Any], None] | None,
) -> None:  # fmt: skip
    async def begin(slots: list[int]) -> None:
        episodes = tally.episode.tolist()
        await batch.reset_all([(slot, seed_of(episodes[slot]), episodes[slot]) for slot in slots], rows)
        check(slots)
        if on_frame is not None and 0 in slots:
            on_frame(batch.envs[0].env)

    def check(slots: list[int]) -> None:
        shown = rows if len(slots) == width else [leaf[slots] for leaf in rows]
        check_shown(spaces.observation, shown, lambda place: batch.envs[slots[place]].where)

    width = len(batch.envs)
    obs, first, rewards = _zeros(spaces, width), np.ones(width, bool), np.zeros(width)
    rows = list(obs.values())
    await begin(np.flatnonzero(tally.active).tolist())
    t = 0
    while tally.active.any():
        actions, _ = policy.act(obs, first)
        obs = {name: leaf.copy() for name, leaf in obs.items()}  # the policy may keep what it was shown
        rows, first = list(obs.values()), np.zeros(width, bool)
        slots = np.flatnonzero(tally.active).tolist()
        ended = [slot for slot, _, _ in await batch.step_all(slots, spaces.each_action(actions), rows, rewards)]
        check(slots)
        if on_frame is not None and 0 in slots:
            on_frame(batch.envs[0].env)
        for slot in slots:
            tally.add(slot, rewards[slot], slot in ended, batch.envs[slot].outcome)
        again = [slot for slot in ended if tally.active[slot]]
        first[again] = True
        await begin(again)
        if on_step is not None:
            on_step(t)
        t += 1
    _check_finite(tally)


def _run_vector(
    vector: CheckedVector, policy: Policy, spaces: Spaces, tally: _Tally,
    on_step: Callable[[int], None] | None, on_frame: Callable[[Any], None] | None,
) -> None:  # fmt: skip
    def check(rows: Sequence[Array], first_env: int = 0) -> None:
        check_shown(
            spaces.observation, rows,
            lambda i: f"environment {first_env + i}, step {t} of the vector, in episode {tally.episode[first_env + i]}",
        )  # fmt: skip

    n, t = vector.n, 0
    shown, first = vector.reset(), np.ones(n, bool)
    check(shown)
    batch = _copied(spaces, shown)
    while tally.active.any():
        actions, _ = policy.act(batch, first)
        step = vector.step(actions)
        t += 1
        check(step.obs)
        for i, final in step.finals:
            check([leaf[None] for leaf in final], i)
        batch = _copied(spaces, step.obs)
        ended = step.terminated | step.truncated
        first = ~step.valid
        for i, _ in step.finals:
            first[i] = True
        for slot in np.flatnonzero(tally.active & step.valid).tolist():
            tally.add(slot, float(step.reward[slot]), bool(ended[slot]))
        if on_frame is not None:
            on_frame(vector.env)
        if on_step is not None:
            on_step(t - 1)
    _check_finite(tally)


def _check_finite(tally: _Tally) -> None:
    bad = np.flatnonzero(~np.isfinite(tally.returns))
    if len(bad):
        raise EnvError(f"evaluation episode {bad[0]}: the return is {tally.returns[bad[0]]}, expected finite rewards")
