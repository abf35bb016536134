"""A group that is one native gymnasium vector environment: the same stream is stored in each autoreset mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiorl.envs.checked import Limit, at_once, within
from aiorl.envs.contract import (
    CRASHES,
    BrokenContract,
    ChoiceWriter,
    ObsReader,
    check_segment,
    crashed,
    reset_obs,
    step_parts,
)
from aiorl.envs.cursor import GroupCursor
from aiorl.envs.make import NEXT_STEP, SAME_STEP, autoreset_mode, make_vector
from aiorl.envs.single import Acting, OnStep
from aiorl.envs.spaces import Spaces
from aiorl.envs.state import CannotCapture, StateCapture
from aiorl.errors import EnvError, ReproductionError
from aiorl.seeding import episode_seed
from aiorl.segments import Array, Segment

if TYPE_CHECKING:
    from aiorl.algos.base import Policy
    from aiorl.envs.spec import EnvSpec


_BOOL = np.dtype(bool)


class VectorStep(NamedTuple):
    """What one step of all environments gave.

    `obs`: leaves [n, …] to act on next. `ended` [n] is where an episode ended, `spent` [n] where the step was spent on a
    reset; None is nowhere. `finals`: for each environment that was reset within the step, the last observation of its
    episode. Arrays may be the environment's own: what is kept has to be copied before the next call.
    """

    obs: list[Array]
    reward: Array
    terminated: Array
    truncated: Array
    ended: Array | None
    spent: Array | None
    finals: Sequence[tuple[int, list[Array]]]

    @property
    def valid(self) -> Array:
        """[n]: the row is a transition."""
        return np.ones(len(self.reward), bool) if self.spent is None else ~self.spent


class CheckedVector:
    """A vector environment whose every answer is checked, with one way of stepping for the three autoreset modes.

    `seed_of(i, episode)` gives the seed of an episode of environment i. Environments that take a list of seeds get one
    for each; they are used for the first episodes and, in DISABLED mode, for all. Others get the first alone.
    """

    def __init__(
        self, env: Any, spaces: Spaces, n: int, seed_of: Callable[[int, int], int], first_env: int = 0,
        limit: Limit | None = None,
    ) -> None:  # fmt: skip
        self.env, self.n, self._wrapped = env, n, env.unwrapped is not env
        self._step, self._reset = within(limit, env.step), within(limit, env.reset)
        self.ended: Array | None = None  # [n]: the last step ended an episode, and the next one is spent on the reset
        self.episodes = np.zeros(n, np.int64)
        self._mode, self._seed_of, self._label = (
            autoreset_mode(env),
            seed_of,
            f"environments {first_env}-{first_env + n - 1}",
        )
        self._batch, self._one = ObsReader(spaces.observation, (n,)), ObsReader(spaces.observation)
        self._spaces, self._takes_lists, self._steps = spaces, True, 0
        self._shape, self._no = (n,), bytes(n)  # flags are compared as bytes: a tenth of the time of `any()`

    @property
    def where(self) -> str:
        return f"{self._label}, step {self._steps}"

    def reset(self) -> list[Array]:
        """Begin the episodes `episodes`, at first 0 each. Raises EnvError."""
        seeds = [self._seed_of(i, int(episode)) for i, episode in enumerate(self.episodes)]
        try:
            result = self._reset(seed=seeds)
        except Exception:  # most implementations take one number only; a true fault shows again
            self._takes_lists = False
            try:
                result = self._reset(seed=seeds[0])
            except CRASHES as error:
                raise crashed(self.where, f"reset(seed={seeds[0]})", error) from error
        try:
            return self._batch.read(reset_obs(result))
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None

    def step(self, actions: Array) -> VectorStep:
        """Step all environments with stored actions [n, …]. Raises EnvError."""
        self._steps += 1
        batch = self._spaces.env_actions(actions)
        try:
            result = self._step(batch)
        except CRASHES as error:
            raise crashed(self.where, "step()", error) from error
        try:
            if type(result) is not tuple or len(result) != 5:
                result = step_parts(result)
            raw_obs, reward, terminated, truncated, info = result
            obs, shape = self._batch.read(raw_obs), self._shape
            # Arrays just as declared, which is nearly all that there is, are not worth a call each.
            if type(reward) is not np.ndarray or reward.shape != shape or reward.dtype.kind not in "fiub":
                reward = _numbers("reward", reward, shape)
            if type(terminated) is not np.ndarray or terminated.shape != shape or terminated.dtype is not _BOOL:
                terminated = _flags("terminated", terminated, shape)
            if type(truncated) is not np.ndarray or truncated.shape != shape or truncated.dtype is not _BOOL:
                truncated = _flags("truncated", truncated, shape)
            no = self._no
            ended = terminated | truncated if terminated.tobytes() != no or truncated.tobytes() != no else None
            if self.ended is None and ended is None:
                return VectorStep(obs, reward, terminated, truncated, None, None, ())
            return self._normalise(obs, reward, terminated, truncated, ended, info)
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None

    def _normalise(
        self, obs: list[Array], reward: Array, terminated: Array, truncated: Array, ended: Array | None, info: Any
    ) -> VectorStep:
        if self._mode == NEXT_STEP:
            spent, self.ended = self.ended, ended
            if spent is not None:
                paid = bool(np.count_nonzero(reward[spent]))
                # A reward may be what a wrapper makes of 0. Without one it tells that this is no NEXT_STEP environment.
                if (paid and not self._wrapped) or (ended is not None and np.count_nonzero(ended[spent])):
                    raise BrokenContract("a step spent on a reset expected reward 0 and no end of an episode")
                if paid:
                    reward = np.where(spent, 0, reward)
            return VectorStep(obs, reward, terminated, truncated, ended, spent, ())
        assert ended is not None
        where = np.flatnonzero(ended).tolist()
        if self._mode == SAME_STEP:
            finals = [(i, self._final_obs(info, i)) for i in where]
        else:
            finals = [(i, [leaf[i].copy() for leaf in obs]) for i in where]
            # The environment may write into what it returned when it is reset.
            reward, terminated, truncated = reward.copy(), terminated.copy(), truncated.copy()
            self.episodes += ended
            obs = self._reset_where(ended, obs)
        return VectorStep(obs, reward, terminated, truncated, ended, None, finals)

    def _final_obs(self, info: Any, i: int) -> list[Array]:
        """The last observation of the episode that environment `i` ended: one object for each, or all in a batch."""
        final = info.get("final_obs") if isinstance(info, Mapping) else None
        if final is None:
            raise BrokenContract("info expected 'final_obs' where a SAME_STEP environment ended an episode, got none")
        if isinstance(final, np.ndarray) and final.dtype == object:
            return self._one.read(final[i])
        return [leaf[i] for leaf in self._batch.read(final)]

    def _reset_where(self, ended: Array, obs: list[Array]) -> list[Array]:
        """Reset the environments that `ended`; the others keep their observation."""
        seeds = [self._seed_of(i, int(e)) for i, e in enumerate(self.episodes)] if self._takes_lists else None
        obs = [leaf.copy() for leaf in obs]
        try:
            result = self._reset(seed=seeds, options={"reset_mask": ended.copy()})
        except CRASHES as error:
            raise crashed(self.where, "reset(options={'reset_mask': …})", error) from error
        for leaf, fresh in zip(obs, self._batch.read(reset_obs(result)), strict=True):
            leaf[ended] = fresh[ended]
        return obs

    def close(self) -> None:
        # Nothing can be lost any more.
        with contextlib.suppress(Exception):
            self.env.close()


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    array = np.array(value)
    if array.shape != shape or array.dtype.kind not in "biuf":
        raise BrokenContract(f"{name} expected {shape} real numbers, got {array.shape} {array.dtype}")
    return array


def _flags(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    array = np.array(value)
    if array.shape != shape or array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
        raise BrokenContract(f"{name} expected {shape} bool, got {array.shape} {array.dtype}")
    return array.astype(bool)


class VectorGroup:
    """The group of environments `envs` as one native vector environment. See `aiorl.envs.group.Group`.

    `limit` is held during each step and reset of all of them.
    """

    def __init__(self, spec: EnvSpec, spaces: Spaces, envs: range, seed: int, limit: Limit | None = None) -> None:
        self.envs = envs
        self._spec, self._spaces, self._seed, self._limit = spec, spaces, seed, limit
        self._vector: CheckedVector | None = None
        self._capture: StateCapture | None = None
        self._obs: list[Array] = []
        self._first = np.ones(len(envs), bool)
        self._aborted = np.zeros(len(envs), bool)  # to be told with the next segment

    def open(self, cursor: GroupCursor | None, *, strict: bool = True) -> list[str]:
        """Make and reset the environments; with a cursor, set their state, all or none. See `aiorl.envs.group.Group`."""
        n = len(self.envs)
        env = make_vector(self._spec, n)
        vector = CheckedVector(env, self._spaces, n, self._seed_of, self.envs.start, self._limit)
        self._vector, self._capture = vector, StateCapture(vector.env)
        self._obs = [leaf.copy() for leaf in vector.reset()]
        if cursor is None:
            return []
        try:
            self._bring_back(cursor, vector, self._capture)
        except ReproductionError as error:
            if strict:
                raise
            vector.episodes[:] = cursor.episodes + 1
            self._obs = [leaf.copy() for leaf in vector.reset()]
            self._aborted[:] = True
            return [str(error).partition("\n")[0]]
        return []

    def _bring_back(self, cursor: GroupCursor, vector: CheckedVector, capture: StateCapture) -> None:
        if not cursor.env_state:
            raise ReproductionError(
                f"the open episodes of environments {self.envs.start}-{self.envs.stop - 1} cannot be brought back: the "
                f"state of the vector environment {self._spec.name} could not be captured\n  set native_vector = false"
            )
        capture.restore(cursor.env_state)
        self._obs = [cursor.obs[leaf.name].copy() for leaf in self._spaces.observation]
        self._first = cursor.first
        vector.ended, vector.episodes = cursor.done.copy() if cursor.done.any() else None, cursor.episodes.copy()

    def _seed_of(self, i: int, episode: int) -> int:
        return episode_seed(self._seed, self.envs[i], episode)

    def collect(
        self, policy: Policy, segment: Segment, steps: int, on_step: Callable[[int], None] | None = None
    ) -> None:
        """Fill the first `steps` rows of `segment`; `on_step(t)` follows each. Raises EnvError, TrainingError."""
        at_once(self.fill(policy, segment, steps, on_step))

    async def fill(self, policy: Acting, segment: Segment, steps: int, on_step: OnStep | None = None) -> None:
        """As `collect`; waits only for `policy`."""
        assert self._vector is not None
        assert self._capture is not None
        leaves = {leaf.name: segment.obs[leaf.name] for leaf in self._spaces.observation}
        columns, choices, first, never = segment.columns, ChoiceWriter(segment), self._first, np.zeros(len(self.envs), bool)
        reward, valid, terminated, truncated = (columns[n] for n in ("reward", "valid", "terminated", "truncated"))
        segment.clear()
        segment.aborted[:] = self._aborted
        self._aborted[:] = False
        valid[:steps], valid[steps:] = True, False
        terminated[...] = truncated[...] = False
        rows = list(leaves.values())
        for leaf, value in zip(rows, self._obs, strict=True):
            leaf[0] = value
        for t in range(steps):
            chosen = policy.act({name: leaf[t] for name, leaf in leaves.items()}, first)
            actions, extras = await chosen if isinstance(chosen, CoroutineType) else chosen
            step = self._vector.step(choices.write(t, actions, extras))
            for leaf, value in zip(rows, step.obs, strict=True):
                leaf[t + 1] = value
            reward[t], first = step.reward, never
            if step.ended is not None:
                terminated[t], truncated[t] = step.terminated, step.truncated
                first = step.ended if step.finals else never
                for i, final in step.finals:
                    segment.add_final(t, i, dict(zip(leaves, final, strict=True)))
            if step.spent is not None:
                valid[t], first = ~step.spent, step.spent
            if on_step is not None and (stand := on_step(t)) is not None:
                await stand
        self._first = first
        self._obs = [leaf[steps].copy() for leaf in rows]
        check_segment(self._spaces, segment, steps, self.envs.start)
        self._put_state(segment)

    def _put_state(self, segment: Segment) -> None:
        assert self._capture is not None
        try:
            state = self._capture.capture()
        except CannotCapture:
            state = b""
        segment.put_env_state(state if len(state) <= len(segment.state) else b"")

    def close(self) -> None:
        """Close the environments; may be called twice."""
        if self._vector is not None:
            self._vector.close()
            self._vector = None
