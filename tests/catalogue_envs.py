"""Environments with the faults of the catalogue, for tests that name them; workers import them by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces as gym
from run_envs import Counting


class TwoArguments(Exception):
    """Cannot be made again from its text."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")


class Raises(Counting):
    """Raises, at its 20th step, what cannot be pickled."""

    KINDS = ("local class", "two arguments", "lock", "10 MB")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind, self._steps = kind, 0

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == 20:
            raise self._error()
        return super().step(action)

    def _error(self) -> Exception:
        class Local(Exception):
            pass

        if self._kind == "local class":
            return Local("the arm is stuck")
        if self._kind == "two arguments":
            return TwoArguments(7, "the arm is stuck")
        if self._kind == "lock":
            error = RuntimeError("the arm is stuck")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            return error
        return ValueError("the arm is stuck " + "x" * 10_000_000)


class Infos(Counting):
    """Its infos cannot be sent anywhere: a lock, and 1 MB of text each step."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"lock": threading.Lock(), "text": "x" * 2**20}


class Breaks(gymnasium.Env[Any, Any]):
    """At step 3 of each episode one part of the answer is another one; `fault` says which."""

    observation_space = gym.Dict({"pos": gym.Box(-1, 1, (2,), np.float32), "clock": gym.Discrete(10)})
    action_space = gym.Discrete(2)
    PARTS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "shape (3,)": lambda obs: {**obs, "pos": np.zeros(3, np.float32)},
        "shape (1, 2)": lambda obs: {**obs, "pos": np.zeros((1, 2), np.float32)},
        "float64": lambda obs: {**obs, "pos": obs["pos"].astype(np.float64)},
        "float64 1e300": lambda obs: {**obs, "pos": np.full(2, 1e300)},
        "missing": lambda obs: {"clock": obs["clock"]},
        "extra": lambda obs: {**obs, "more": 1},
        "nan": lambda obs: {**obs, "pos": np.array([0, np.nan], np.float32)},
        "inf": lambda obs: {**obs, "pos": np.array([-np.inf, 0], np.float32)},
        "overflow": lambda obs: {**obs, "pos": _to_float32(np.full(2, 1e300))},
        "clock": lambda obs: {**obs, "clock": 10},
        "bounds": lambda obs: {**obs, "pos": np.full(2, 7, np.float32)},
    }
    REWARDS: ClassVar[dict[str, Any]] = {
        "array reward": np.array([1.0]), "int reward": 1, "bool reward": True, "float32 reward": np.float32(1),
        "none reward": None, "nan reward": float("nan"), "text reward": "1", "pair reward": np.ones(2),
    }  # fmt: skip
    ENDS: ClassVar[dict[str, Any]] = {
        "bool_ end": np.bool_(True), "int end": 1, "array end": np.array([True]), "none end": None, "two end": 2,
        "text end": "no",
    }  # fmt: skip

    def __init__(self, fault: str) -> None:
        self._fault, self._t = fault, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        obs, reward, end = self._obs(), 1.0, self._t >= 6
        if self._t == 3:
            obs = self.PARTS.get(self._fault, lambda obs: obs)(obs)
            reward = self.REWARDS.get(self._fault, reward)
            end = self.ENDS.get(self._fault, end)
        return obs, reward, end, False, {}

    def _obs(self) -> dict[str, Any]:
        return {"pos": np.full(2, self._t / 10, np.float32), "clock": self._t}


def _to_float32(array: Any) -> Any:
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


class Hiccups(Counting):
    """Returns NaN or infinity as `where` says in one episode of three, at its 4th step; at the reset, in one seed of three.

    `where`: reward, obs, end (in the step that ends the episode), reset; or always: every reward is NaN.
    """

    def __init__(self, where: str, length: int = 7) -> None:
        super().__init__(length)
        self._where = where

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self._sick = int(self._mark * 1e6) % 3 == 0
        return (obs * np.float32(np.nan) if self._sick and self._where == "reset" else obs), info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        now = self._sick and self._t == (self._length if self._where == "end" else 4)
        if self._where == "always" or (now and self._where == "reward"):
            reward = float("nan")
        elif now and self._where in ("obs", "end"):
            obs = np.array([obs[0], -np.inf], np.float32)
        return obs, reward, terminated, truncated, info


class Tardy(Counting):
    """Waits 20 ms for each step, as for a simulator elsewhere."""

    def step(self, action: Any) -> Any:
        time.sleep(0.02)  # the fault itself
        return super().step(action)


class FiveSteps(gymnasium.Env[Any, Any]):
    """Pays 1 each step and is over after 5: truly, or by a time limit. Shows the step."""

    observation_space = gym.Box(0, 10, (1,), np.float32)
    action_space = gym.Discrete(2)

    def __init__(self, truncated: bool) -> None:
        self._truncated, self._t = truncated, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._t = 0
        return np.array([self._t], np.float32), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        over = self._t == 5
        return np.array([self._t], np.float32), 1.0, over and not self._truncated, over and self._truncated, {}


def stacked() -> Any:
    """Walks with an own start each time, four frames at once."""
    from envs_for_tests import Walk
    from gymnasium.wrappers import FrameStackObservation

    return FrameStackObservation(Walk(seeded=True), 4)
