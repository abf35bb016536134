"""Small environments of images that tests, and the workers they start, can import by name."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Falling(gymnasium.Env[Any, Any]):
    """A dot falls from the top, drifting to a side that only its motion shows; the racket below is moved to catch it."""

    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, size: int = 8, kind: str = "uint8") -> None:
        self.size, self.kind = size, np.dtype(kind)
        high = 255 if kind == "uint8" else 1
        self.observation_space = gymnasium.spaces.Box(0, high, (size, size), self.kind.type)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.y, self.x, self.racket = 0, int(self.np_random.integers(self.size)), self.size // 2
        self.drift = int(self.np_random.integers(-1, 2))
        return self._image(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.y, self.x = self.y + 1, (self.x + self.drift) % self.size
        self.racket = int(np.clip(self.racket + action - 1, 0, self.size - 1))
        landed = self.y == self.size - 1
        reward = float(abs(self.x - self.racket) <= 1) if landed else 0.0
        return self._image(), reward, landed, False, {}

    def _image(self) -> Any:
        image = np.zeros((self.size, self.size), self.kind)
        image[self.y, self.x] = image[-1, self.racket] = 255 if self.kind == np.uint8 else 1
        return image
