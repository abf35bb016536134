"""Groups of single environments: one after the other, or, where they are coroutines, side by side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aiorl.envs.aborts import Aborts
from aiorl.envs.checked import AsyncLimit, Batch, Checked, Limit, OneByOne, SideBySide, at_once
from aiorl.envs.contract import ChoiceWriter, check_segment
from aiorl.envs.cursor import GroupCursor
from aiorl.envs.make import make_async_env, make_env
from aiorl.envs.spaces import Spaces
from aiorl.errors import EnvError, ReproductionError
from aiorl.seeding import episode_seed
from aiorl.segments import Array, Segment

if TYPE_CHECKING:
    from aiorl.algos.base import Policy
    from aiorl.envs.spec import EnvSpec

OnStep = Callable[[int], Awaitable[None] | None]
"""Called after each step with its row; what it returns is awaited before the next one."""


class Acting(Protocol):
    """A policy that has begun a segment; its `act` may be a coroutine."""

    def act(self, obs: Mapping[str, Array], first: Array) -> Any: ...


class SingleGroup:
    """The group of environments `envs`, each a gymnasium environment of its own. See `aiorl.envs.group.Group`.

    `limit` is held during each step and reset.
    """

    def __init__(
        self, spec: EnvSpec, spaces: Spaces, envs: range, seed: int, limit: Limit | None = None, aborts: Aborts | None = None
    ) -> None:
        self.envs = envs
        self._spec, self._batch = spec, OneByOne(spaces, limit)
        self._members = _Members(self._batch, spaces, envs, seed, aborts)

    def open(self, cursor: GroupCursor | None, *, strict: bool = True) -> list[str]:
        """Make and reset the environments; with a cursor, bring back its open episodes. See `aiorl.envs.group.Group`."""
        for index in self.envs:
            self._batch.add(make_env(self._spec), index)
        return at_once(self._members.open(cursor, strict))

    def collect(
        self, policy: Policy, segment: Segment, steps: int, on_step: Callable[[int], None] | None = None
    ) -> None:
        """Fill the first `steps` rows of `segment`; `on_step(t)` follows each. Raises EnvError, TrainingError."""
        at_once(self.fill(policy, segment, steps, on_step))

    async def fill(self, policy: Acting, segment: Segment, steps: int, on_step: OnStep | None = None) -> None:
        """As `collect`; waits only for `policy`."""
        await self._members.collect(policy, segment, steps, on_step)

    def close(self) -> None:
        """Close the environments; may be called twice."""
        at_once(self._batch.close())


class AsyncGroup:
    """The group of environments `envs`, each an `AsyncEnv` of its own. As `aiorl.envs.group.Group`, to be awaited.

    Its environments step at the same time; what is stored is in their order. If a call is cancelled or raises, nothing of
    it goes on, and the group can only be closed.
    """

    def __init__(
        self, spec: EnvSpec, spaces: Spaces, envs: range, seed: int, limit: AsyncLimit | None = None,
        aborts: Aborts | None = None,
    ) -> None:  # fmt: skip
        self.envs = envs
        self._spec, self._batch = spec, SideBySide(spaces, limit)
        self._members = _Members(self._batch, spaces, envs, seed, aborts)

    async def open(self, cursor: GroupCursor | None, *, strict: bool = True) -> list[str]:
        for index in self.envs:
            self._batch.add(make_async_env(self._spec), index)
        return await self._members.open(cursor, strict)

    async def fill(self, policy: Acting, segment: Segment, steps: int, on_step: OnStep | None = None) -> None:
        await self._members.collect(policy, segment, steps, on_step)

    collect = fill

    async def close(self) -> None:
        await self._batch.close()


class _Members:
    """What a group does with its environments, however these are stepped."""

    def __init__(self, batch: Batch, spaces: Spaces, envs: range, seed: int, aborts: Aborts | None) -> None:
        self._batch, self._spaces, self._envs, self._seed, self._aborts = batch, spaces, envs, seed, aborts
        self._places = range(len(envs))
        # What the environments showed last, and where an episode begins with the next step.
        self._obs = {name: np.zeros((len(envs), *c.shape), c.dtype) for name, c in spaces.obs_columns.items()}
        self._first = np.ones(len(envs), bool)
        self._aborted = np.zeros(len(envs), bool)  # to be told with the next segment

    async def open(self, cursor: GroupCursor | None, strict: bool) -> list[str]:
        """Reset the environments, or bring them back to where `cursor` says."""
        rows = list(self._obs.values())
        if cursor is None:
            await self._begin([(i, 0) for i in self._places], rows)
            return []
        self._first = cursor.first
        differences = await self._batch.all(self._bring_back(i, cursor, rows, strict) for i in self._places)
        return [difference for difference in differences if difference]

    async def _begin(self, episodes: Sequence[tuple[int, int]], rows: Sequence[Array], again: int = 0) -> None:
        """Begin the episode of each (place, episode); `again` counts the resets before that could not be used."""
        seed, envs, aborts = self._seed, self._envs, self._aborts
        await self._batch.reset_all([(i, episode_seed(seed, envs[i], e, again), e) for i, e in episodes], rows)
        if aborts is not None and (bad := [(i, e) for i, e in episodes if not aborts.start(rows, i, e)]):
            await self._begin(bad, rows, again + 1)

    def _next(self, i: int) -> tuple[int, int]:
        return i, self._batch.envs[i].episode + 1

    async def _bring_back(self, i: int, cursor: GroupCursor, rows: Sequence[Array], strict: bool) -> str:
        """Replay an open episode; unless `strict`, one that differs is given up and its difference returned."""
        try:
            await self._begin([(i, int(cursor.episodes[i]))], rows)
            await self._replay(i, cursor.actions[i], rows)
            self._compare(i, cursor)
        except EnvError as error:
            if strict:
                raise
            self._aborted[i] = self._first[i] = True
            await self._begin([(i, int(cursor.episodes[i]) + 1)], rows)
            return str(error).partition("\n")[0]
        return ""

    async def _replay(self, i: int, actions: Array, rows: Sequence[Array]) -> None:
        """Take the recorded actions of an open episode again."""
        env = self._batch.envs[i]
        for action in self._spaces.each_action(actions):
            _, terminated, truncated = await self._batch.step(i, action, rows)
            if terminated or truncated:
                raise _differs(env, f"its episode {env.episode} ended at step {env.steps} of {len(actions)}")

    def _compare(self, i: int, cursor: GroupCursor) -> None:
        env = self._batch.envs[i]
        for name, shown in cursor.obs.items():
            if self._obs[name][i].tobytes() != shown[i].tobytes():
                raise _differs(env, f"{name} is another one at step {env.steps} of its episode {env.episode}")

    async def collect(self, policy: Acting, segment: Segment, steps: int, on_step: OnStep | None) -> None:
        """See `aiorl.envs.group.Group.fill`."""
        leaves, rewards, batch = {name: segment.obs[name] for name in self._obs}, segment.columns["reward"], self._batch
        choices, first, never = ChoiceWriter(segment), self._first, np.zeros(len(self._envs), bool)
        all_terminated, all_truncated = segment.columns["terminated"], segment.columns["truncated"]
        _clear(segment, steps)
        segment.aborted[:] = self._aborted
        self._aborted[:] = False
        for name, leaf in leaves.items():
            leaf[0] = self._obs[name]
        for t in range(steps):
            chosen = policy.act({name: leaf[t] for name, leaf in leaves.items()}, first)
            actions, extras = await chosen if isinstance(chosen, CoroutineType) else chosen
            taken = self._spaces.each_action(choices.write(t, actions, extras))
            first, rows = never, [leaf[t + 1] for leaf in leaves.values()]
            ends = await batch.step_all(self._places, taken, rows, rewards[t])
            if ends:
                first = never.copy()
                for i, terminated, truncated in ends:
                    first[i] = True
                    all_terminated[t, i], all_truncated[t, i] = terminated, truncated
                    segment.add_final(t, i, {name: row[i] for name, row in zip(leaves, rows, strict=True)})
                await self._begin([self._next(i) for i, _, _ in ends], rows)
            if self._aborts is not None and (again := self._aborts.spend(segment, t)):
                first = first.copy()
                first[again] = True
                await self._begin([self._next(i) for i in again], rows)
            if on_step is not None and (stand := on_step(t)) is not None:
                await stand
        self._first = first
        for name, leaf in leaves.items():
            self._obs[name][...] = leaf[steps]
        check_segment(self._spaces, segment, steps, self._envs.start)


def _clear(segment: Segment, steps: int) -> None:
    """No row has ended an episode yet; rows from `steps` on will not be used."""
    segment.clear()
    columns = segment.columns
    columns["terminated"][...] = columns["truncated"][...] = False
    columns["valid"][:steps], columns["valid"][steps:] = True, False


def _differs(env: Checked, how: str) -> ReproductionError:
    return ReproductionError(
        f"environment {env.index} does not reproduce: reset with its seed and given the same actions, {how}\n"
        "  draw all chance from the generator that reset(seed=…) seeds"
    )
