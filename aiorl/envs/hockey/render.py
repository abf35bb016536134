"""Drawing a game with pygame: in memory, where no screen is needed, or in a window."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aiorl.envs.hockey.rules import FPS, HEIGHT, PIXELS, WIDTH
from aiorl.envs.hockey.world import GOAL, LONG_BOARD, PUCK_RADIUS, RACKET, SHORT_BOARD, SIDES, World
from aiorl.errors import ConfigError

SIZE = (round(WIDTH * PIXELS), round(HEIGHT * PIXELS))
_ICE, _LINE, _BOARD, _PUCK = (238, 243, 247), (190, 205, 220), (60, 70, 85), (20, 20, 25)
_PLAYERS = ((205, 60, 50), (45, 95, 190))

Points = Iterable[tuple[float, float]]


def checked_mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, "rgb_array", "human"):
        raise ConfigError(f"hockey has no render mode {render_mode!r}\n  it has: rgb_array, human")
    return render_mode


class Painter:
    """Draws worlds; pygame is imported, and a window opened, when first needed."""

    def __init__(self) -> None:
        self._pygame: Any = None
        self._surface: Any = None
        self._window: Any = None
        self._clock: Any = None

    def frame(self, world: World) -> np.ndarray[Any, Any]:
        """uint8 [480, 600, 3]."""
        self._draw(world)
        return np.ascontiguousarray(self._pygame.surfarray.array3d(self._surface).swapaxes(0, 1))

    def show(self, world: World) -> None:
        """Draw into the window, no sooner than 1/50 s after the last time."""
        self._draw(world)
        if self._window is None:
            self._pygame.display.init()
            self._pygame.display.set_caption("hockey")
            self._window = self._pygame.display.set_mode(SIZE)
            self._clock = self._pygame.time.Clock()
        self._window.blit(self._surface, (0, 0))
        self._pygame.event.pump()
        self._clock.tick(FPS)
        self._pygame.display.flip()

    def close(self) -> None:
        if self._window is not None:
            self._pygame.display.quit()
            self._window = None

    def _draw(self, world: World) -> None:
        if self._pygame is None:
            with contextlib.redirect_stdout(io.StringIO()):  # it greets
                import pygame

            self._pygame = pygame
            self._surface = pygame.Surface(SIZE, depth=32)
        draw, surface = self._pygame.draw, self._surface
        surface.fill(_ICE)
        draw.line(surface, _LINE, _pixel(0, -HEIGHT), _pixel(0, HEIGHT), 3)
        draw.circle(surface, _LINE, _pixel(0, 0), 100, 3)
        for i, side in enumerate(SIDES):
            draw.polygon(surface, _PLAYERS[i], [_pixel(-side * x, y) for x, y in GOAL])
            draw.polygon(surface, _BOARD, [_pixel(x, side * y) for x, y in LONG_BOARD])
            for up in SIDES:
                draw.polygon(surface, _BOARD, [_pixel(side * x, up * y) for x, y in SHORT_BOARD])
        for i, (x, y, angle, *_) in enumerate(world.rackets):
            draw.polygon(surface, _PLAYERS[i], _placed(((SIDES[i] * a, b) for a, b in RACKET), x, y, angle))
        if world.rackets:
            draw.circle(surface, _PUCK, _pixel(*world.puck[:2]), round(PUCK_RADIUS * PIXELS))


def _placed(corners: Points, x: float, y: float, angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [_pixel(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners]


def _pixel(x: float, y: float) -> tuple[float, float]:
    return SIZE[0] / 2 + PIXELS * x, SIZE[1] / 2 - PIXELS * y
