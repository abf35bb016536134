"""Small environments and policies that tests, and the workers they start, can import by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout, Segment, SegmentLayout

_ever = itertools.count()


class Walk(gymnasium.Env[Any, Any]):
    """A walk on a line: action 1 goes right. It ends at 3 (terminated) or after `limit` steps (truncated).

    Without `seeded`, nothing depends on seeds: the start is 0, and the observation counts this instance's episodes.
    With it, the start is drawn from the generator that reset(seed=…) seeds, and nothing else is remembered.
    """

    metadata = {"render_modes": []}

    def __init__(self, kind: str = "box", limit: int = 7, seeded: bool = False) -> None:
        self.kind, self.limit, self.seeded = kind, limit, seeded
        self.x, self.t, self.episode = 0.0, 0, -1
        self.action_space = gym.Discrete(2)
        flat = gym.Box(-100, 100, (3,), np.float32)
        nested = {"pos": gym.Box(-100, 100, (2,), np.float32), "clock": gym.Discrete(50, start=-1)}
        self.observation_space = {
            "box": flat,
            "dict": gym.Dict({**nested, "in": gym.Dict({"im.g": gym.Box(0, 255, (2, 1), np.uint8)})}),
            "tuple": gym.Tuple((gym.MultiBinary(2), gym.Dict(nested))),
            "discrete": gym.Discrete(50),
            "parts": gym.MultiDiscrete([2, 50]),
        }[kind]

    def _obs(self) -> Any:
        flat = np.array([self.x, self.t, max(self.episode, 0)], np.float32)
        nested = {"pos": flat[:2], "clock": self.t - 1}
        if self.kind == "dict":
            return {"in": {"im.g": np.array([[self.t], [self.episode % 256]], np.uint8)}, **nested}
        if self.kind == "tuple":
            return (np.array([self.t % 2, self.episode % 2], np.int8), nested)
        if self.kind == "parts":
            return np.array([self.t % 2, self.t])
        return self.t if self.kind == "discrete" else flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += not self.seeded
        self.x, self.t = float(self.np_random.normal()) if self.seeded else 0.0, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.x += 1.0 if action == 1 else -0.5
        self.t += 1
        terminated = self.x >= 3
        return self._obs(), self.x * 0.5, terminated, self.t >= self.limit, {}


class Maker:
    """Makes walks; also as a class method and as an object that can be called."""

    @classmethod
    def make(cls, limit: int = 7) -> Walk:
        return Walk(limit=limit)

    def __call__(self) -> Walk:
        return Walk()


class ReusesBuffer(Walk):
    """Writes every observation into the same array."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = np.zeros(3, np.float32)

    def _obs(self) -> Any:
        self._buffer[...] = super()._obs()
        return self._buffer


class Unseeded(Walk):
    """Starts somewhere else whenever it is reset, whatever the seed."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = -float(next(_ever))
        return self._obs(), {}


class Broken(Walk):
    """Breaks one rule at step `at` of each episode (0: in reset)."""

    def __init__(self, fault: str, at: int = 4, kind: str = "dict", limit: int = 7) -> None:
        super().__init__(kind, limit)
        self.fault, self.at = fault, at

    def _break(self, obs: Any) -> Any:
        if self.t != self.at:
            return obs
        if self.fault == "raise":
            raise RuntimeError("the simulator fell over")
        if self.fault == "exit":
            raise SystemExit(3)
        if self.kind == "box":
            return {
                "float64": lambda: obs.astype(np.float64), "shape": lambda: obs[:2], "scalar": lambda: 1.0,
                "list": obs.tolist, "none": lambda: None, "nan": lambda: obs * np.nan,
                "batched": lambda: obs[None],
            }.get(self.fault, lambda: obs)()  # fmt: skip
        change = {
            "float64": lambda: {"pos": obs["pos"].astype(np.float64)[None]},
            "nan": lambda: {"pos": obs["pos"] * np.nan},
            "range": lambda: {"clock": 49}, "float_clock": lambda: {"clock": 1.5}, "extra": lambda: {"more": 1},
        }.get(self.fault, dict)()  # fmt: skip
        if self.fault == "missing":
            return {k: v for k, v in obs.items() if k != "pos"}
        return [1, 2] if self.fault == "no dict" else {**obs, **change}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = super().reset(seed=seed)
        obs = self._break(obs)
        return obs if self.fault == "reset alone" else (obs, info)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        obs = self._break(obs)
        if self.t == self.at:
            reward = {"reward none": None, "reward nan": np.nan, "reward pair": np.ones(2), "reward text": "1"}.get(
                self.fault, reward
            )
            terminated = {"terminated none": None, "terminated two": 2, "terminated text": "no"}.get(
                self.fault, terminated
            )
            if self.fault == "four":
                return obs, reward, terminated, info
        return obs, reward, terminated, truncated, info


def sync_vector(num_envs: int, mode: str = "NEXT_STEP", kind: str = "box", seeded: bool = False) -> SyncVectorEnv:
    """A vector of walks that resets as `mode` says."""
    return SyncVectorEnv(
        [lambda: Walk(kind, seeded=seeded) for _ in range(num_envs)], autoreset_mode=AutoresetMode[mode]
    )


class WalkVector(VectorEnv[Any, Any, Any]):
    """Many seeded walks as one vector environment whose state is plain, in each autoreset mode.

    `hidden` keeps part of the state where it cannot be captured; `opaque` holds an object that cannot be captured.
    """

    def __init__(self, num_envs: int, mode: str = "NEXT_STEP", hidden: bool = False, opaque: bool = False) -> None:
        self.num_envs, self.mode, self.hidden = num_envs, mode, hidden
        self.metadata = {"autoreset_mode": AutoresetMode[mode]}
        self.single_observation_space = gym.Box(-100, 100, (2,), np.float32)
        self.single_action_space = gym.Discrete(2)
        self.observation_space = gym.Box(-100, 100, (num_envs, 2), np.float32)
        self.action_space = gym.MultiDiscrete([2] * num_envs)
        self.x, self.t, self.over = np.zeros(num_envs), np.zeros(num_envs, np.int32), np.zeros(num_envs, bool)
        self.notes: dict[str, Any] = {"steps": 0, "last": (None, 2**70, [np.float32(1.5)])}
        if opaque:
            self.simulator = object()
        count = itertools.count()
        self._drift = lambda: next(count)  # a function: taken to be constant

    def _obs(self) -> Array:
        return np.stack([self.x, self.t], axis=1).astype(np.float32)

    def _restart(self, where: Array) -> None:
        self.x[where] = self.np_random.normal(size=int(where.sum()))
        self.t[where] = 0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        where = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self._restart(where)
        self.over[where] = False
        return self._obs(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        self.notes["steps"] += 1
        drift = 0.01 * self._drift() if self.hidden else 0.0
        spent = self.over.copy() if self.mode == "NEXT_STEP" else np.zeros(self.num_envs, bool)
        self.x = np.where(spent, self.x, self.x + np.where(actions == 1, 1.0, -0.5) + drift)
        self.t = np.where(spent, self.t, self.t + 1).astype(np.int32)
        self._restart(spent)
        terminated, truncated = (self.x >= 3) & ~spent, (self.t >= 7) & ~spent
        reward = np.where(spent, 0.0, self.x)
        self.over = terminated | truncated
        info: dict[str, Any] = {}
        if self.mode == "SAME_STEP" and self.over.any():
            info = {"final_obs": self._obs(), "_final_obs": self.over.copy()}
            self._restart(self.over)
        return self._obs(), reward, terminated, truncated, info


class ByObs:
    """A policy without chance: the action is a function of the observation and the place in the batch."""

    def __init__(self, spaces: Spaces, extras: Mapping[str, Column] | None = None) -> None:
        self.spaces, self.extras = spaces, dict(extras or {})
        self.firsts: list[Array] = []

    def begin(self, weights: Any, rollout: int, rng: Any, steps: int) -> None:
        pass

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        self.firsts.append(first.copy())
        n = len(first)
        seen = np.concatenate([leaf.reshape(n, -1).astype(np.float64) for leaf in obs.values()], axis=1)
        total = np.nan_to_num(np.abs(seen).sum(axis=1))
        choice = (total * 3 + np.arange(n)).astype(np.int64) % 5 > 1
        return choice.astype(np.int64), {k: np.full((n, *c.shape), 0.5, c.dtype) for k, c in self.extras.items()}


def layout(
    spaces: Spaces, steps: int, envs: int, extras: Mapping[str, Column] | None = None, state_bytes: int = 0
) -> SegmentLayout:
    """The layout of a segment for a policy with these extra columns."""
    core = {"action": spaces.action_column, "reward": Column((), "float64")}
    core |= {name: Column((), "bool") for name in ("terminated", "truncated", "valid")}
    return SegmentLayout(steps, envs, spaces.obs_columns, {**core, **(extras or {})}, state_bytes)


def transitions(segments: list[Segment]) -> list[list[tuple[Any, ...]]]:
    """For each environment the valid transitions in order, as bytes and numbers that compare exactly."""
    streams: list[list[tuple[Any, ...]]] = [[] for _ in range(segments[0].envs)]
    for segment in segments:
        next_obs = Rollout(0, 0, (segment,), np.arange(segment.envs)).next_obs()
        columns = segment.columns
        for t, i in itertools.product(range(segment.steps), range(segment.envs)):
            if columns["valid"][t, i]:
                streams[i].append((
                    *(leaf[t, i].tobytes() for leaf in segment.obs.values()),
                    columns["action"][t, i].tobytes(), float(columns["reward"][t, i]),
                    bool(columns["terminated"][t, i]), bool(columns["truncated"][t, i]),
                    *(leaf[t, i].tobytes() for leaf in next_obs.values()),
                ))  # fmt: skip
    return streams
