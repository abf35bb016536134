"""A group of single environments, stepped one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorl.envs.contract import (
    CRASHES,
    BrokenContract,
    ChoiceWriter,
    ObsReader,
    check_segment,
    crashed,
    flag,
    real,
    reset_obs,
    step_parts,
)
from aiorl.envs.cursor import GroupCursor
from aiorl.envs.make import make_env
from aiorl.envs.spaces import Spaces
from aiorl.errors import EnvError, ReproductionError
from aiorl.seeding import episode_seed
from aiorl.segments import Array, Segment

if TYPE_CHECKING:
    from aiorl.algos.base import Policy
    from aiorl.envs.spec import EnvSpec


class CheckedEnv:
    """One gymnasium environment whose every answer is checked, and whose errors say where it was.

    Observations are written to place `i` of `rows`, one array [n, …] for each leaf, so it does not matter whether the
    environment uses its buffers again.
    """

    def __init__(self, env: Any, spaces: Spaces, index: int) -> None:
        self.env, self.index = env, index
        self.episode, self.steps = -1, 0
        self._write = ObsReader(spaces.observation).write
        self._step = env.step

    @property
    def where(self) -> str:
        return f"environment {self.index}, step {self.steps} of episode {self.episode}"

    def reset(self, seed: int, episode: int, rows: Sequence[Array], i: int) -> None:
        """Begin an episode and write its first observation. Raises EnvError."""
        self.episode, self.steps = episode, 0
        try:
            result = self.env.reset(seed=seed)
        except CRASHES as error:
            raise crashed(self.where, f"reset(seed={seed})", error) from error
        try:
            self._write(reset_obs(result), rows, i)
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None

    def step(self, action: Any, rows: Sequence[Array], i: int) -> tuple[float, bool, bool]:
        """Step, write the observation, and return (reward, terminated, truncated). Raises EnvError."""
        self.steps += 1
        try:
            result = self._step(action)
        except CRASHES as error:
            raise crashed(self.where, f"step({action!r})", error) from error
        try:
            if type(result) is not tuple or len(result) != 5:
                result = step_parts(result)
            obs, reward, terminated, truncated, _ = result
            if type(reward) is not float:
                reward = real(reward)
            if terminated is not False:
                terminated = flag(terminated, "terminated")
            if truncated is not False:
                truncated = flag(truncated, "truncated")
            self._write(obs, rows, i)
        except BrokenContract as error:
            raise EnvError(f"{self.where}: {error}") from None
        return reward, terminated, truncated

    def close(self) -> None:
        # Nothing can be lost any more, and the other environments must be closed too.
        with contextlib.suppress(Exception):
            self.env.close()


class SingleGroup:
    """The group of environments `envs`, each a single environment of its own. See `aiorl.envs.group.Group`."""

    def __init__(self, spec: EnvSpec, spaces: Spaces, envs: range, seed: int) -> None:
        self.envs = envs
        self._spec, self._spaces, self._seed = spec, spaces, seed
        self._checked: list[CheckedEnv] = []
        # What the environments showed last, and where an episode begins with the next step.
        self._obs = {name: np.zeros((len(envs), *c.shape), c.dtype) for name, c in spaces.obs_columns.items()}
        self._first = np.ones(len(envs), bool)
        self._aborted = np.zeros(len(envs), bool)  # to be told with the next segment

    def open(self, cursor: GroupCursor | None, *, strict: bool = True) -> list[str]:
        """Make and reset the environments; with a cursor, bring back its open episodes. See `aiorl.envs.group.Group`."""
        for index in self.envs:
            self._checked.append(CheckedEnv(make_env(self._spec), self._spaces, index))
        rows = list(self._obs.values())
        if cursor is None:
            for i, env in enumerate(self._checked):
                self._begin(env, 0, rows, i)
            return []
        self._first = cursor.first
        differences: list[str] = []
        for i, env in enumerate(self._checked):
            try:
                self._bring_back(env, cursor, rows, i)
            except EnvError as error:
                if strict:
                    raise
                differences.append(str(error).partition("\n")[0])
                self._aborted[i] = self._first[i] = True
                self._begin(env, int(cursor.episodes[i]) + 1, rows, i)
        return differences

    def _bring_back(self, env: CheckedEnv, cursor: GroupCursor, rows: Sequence[Array], i: int) -> None:
        self._begin(env, int(cursor.episodes[i]), rows, i)
        self._replay(env, cursor.actions[i], rows, i)
        self._compare(env, cursor, i)

    def _begin(self, env: CheckedEnv, episode: int, rows: Sequence[Array], i: int) -> None:
        env.reset(episode_seed(self._seed, env.index, episode), episode, rows, i)

    def _replay(self, env: CheckedEnv, actions: Array, rows: Sequence[Array], i: int) -> None:
        """Take the recorded actions of an open episode again."""
        for action in self._spaces.env_actions(actions):
            _, terminated, truncated = env.step(action, rows, i)
            if terminated or truncated:
                raise _differs(env, f"its episode {env.episode} ended at step {env.steps} of {len(actions)}")

    def _compare(self, env: CheckedEnv, cursor: GroupCursor, i: int) -> None:
        for name, shown in cursor.obs.items():
            if self._obs[name][i].tobytes() != shown[i].tobytes():
                raise _differs(env, f"{name} is another one at step {env.steps} of its episode {env.episode}")

    def collect(
        self, policy: Policy, segment: Segment, steps: int, on_step: Callable[[int], None] | None = None
    ) -> None:
        """Fill the first `steps` rows of `segment`; `on_step(t)` follows each. Raises EnvError, TrainingError."""
        leaves, rewards = {name: segment.obs[name] for name in self._obs}, segment.columns["reward"]
        choices, first, never = ChoiceWriter(segment), self._first, np.zeros(len(self.envs), bool)
        _clear(segment, steps)
        segment.aborted[:] = self._aborted
        self._aborted[:] = False
        for name, leaf in leaves.items():
            leaf[0] = self._obs[name]
        for t in range(steps):
            actions, extras = policy.act({name: leaf[t] for name, leaf in leaves.items()}, first)
            taken = self._spaces.env_actions(choices.write(t, actions, extras))
            first, reward_row = never, rewards[t]
            rows = [leaf[t + 1] for leaf in leaves.values()]
            for i, env in enumerate(self._checked):
                reward_row[i], terminated, truncated = env.step(taken[i], rows, i)
                if terminated or truncated:
                    first = never.copy() if first is never else first
                    first[i] = True
                    segment.columns["terminated"][t, i], segment.columns["truncated"][t, i] = terminated, truncated
                    segment.add_final(t, i, {name: row[i] for name, row in zip(leaves, rows, strict=True)})
                    self._begin(env, env.episode + 1, rows, i)
            if on_step is not None:
                on_step(t)
        self._first = first
        for name, leaf in leaves.items():
            self._obs[name][...] = leaf[steps]
        check_segment(self._spaces, segment, steps, self.envs.start)

    def close(self) -> None:
        """Close the environments; may be called twice."""
        while self._checked:
            self._checked.pop().close()


def _clear(segment: Segment, steps: int) -> None:
    """No row has ended an episode yet; rows from `steps` on will not be used."""
    segment.clear()
    columns = segment.columns
    columns["terminated"][...] = columns["truncated"][...] = False
    columns["valid"][:steps], columns["valid"][steps:] = True, False


def _differs(env: CheckedEnv, how: str) -> ReproductionError:
    return ReproductionError(
        f"environment {env.index} does not reproduce: reset with its seed and given the same actions, {how}\n"
        "  draw all chance from the generator that reset(seed=…) seeds"
    )
