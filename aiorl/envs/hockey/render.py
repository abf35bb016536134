"""Drawing a game with pygame: in memory, where no screen is needed, or in a window."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aiorl.envs.hockey.game import FIRST, SECOND, Game
from aiorl.envs.hockey.rules import FPS, GOAL_HALF, HEIGHT, PIXELS, WIDTH
from aiorl.envs.hockey.world import GOAL, LONG_BOARD, PUCK_RADIUS, RACKET, SHORT_BOARD, SIDES
from aiorl.errors import ConfigError

SIZE = (round(WIDTH * PIXELS), round(HEIGHT * PIXELS))
FINE = 2  # drawn so many times larger and then shrunk, for smooth edges

_STANDS, _ICE, _LINE, _CENTRE = (30, 36, 46), (241, 246, 250), (176, 200, 224), (226, 170, 168)
_BOARD, _EDGE, _PUCK, _SHINE, _TEXT = (84, 97, 116), (120, 134, 154), (22, 24, 30), (92, 98, 110), (225, 230, 238)
_PLAYERS = ((208, 58, 48), (42, 98, 200))
_DARK, _PALE = ((140, 30, 24), (20, 56, 128)), ((246, 205, 200), (200, 217, 246))

_INNER_X, _INNER_Y = 235 / PIXELS, 200 / PIXELS  # where the boards begin
_AIM = 1.2  # units

Points = Iterable[tuple[float, float]]


def checked_mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, "rgb_array", "human"):
        raise ConfigError(f"hockey has no render mode {render_mode!r}\n  it has: rgb_array, human")
    return render_mode


class Painter:
    """Draws games; pygame is imported, and a window opened, when first needed."""

    def __init__(self) -> None:
        self._pygame: Any = None
        self._window: Any = None

    def frame(self, game: Game) -> np.ndarray[Any, Any]:
        """uint8 [480, 600, 3]."""
        return np.ascontiguousarray(self._pygame_of().surfarray.array3d(self._drawn(game)).swapaxes(0, 1))

    def show(self, game: Game) -> None:
        """Draw into the window, no sooner than 1/50 s after the last time."""
        pygame = self._pygame_of()
        if self._window is None:
            pygame.display.init()
            pygame.display.set_caption("hockey")
            self._window = pygame.display.set_mode(SIZE)
            self._clock = pygame.time.Clock()
        self._window.blit(self._drawn(game), (0, 0))
        pygame.event.pump()
        self._clock.tick(FPS)
        pygame.display.flip()

    def close(self) -> None:
        if self._window is not None:
            self._pygame.display.quit()
            self._window = None

    def _pygame_of(self) -> Any:
        if self._pygame is None:
            with contextlib.redirect_stdout(io.StringIO()):  # it greets
                import pygame

            pygame.font.init()
            self._pygame = pygame
            self._canvas = pygame.Surface((FINE * SIZE[0], FINE * SIZE[1]), depth=32)
            self._field = self._canvas.copy()
            _draw_field(pygame, self._field)
            self._fonts = {size: pygame.font.Font(None, FINE * size) for size in (18, 54)}
        return self._pygame

    def _drawn(self, game: Game) -> Any:
        pygame, canvas = self._pygame_of(), self._canvas
        canvas.blit(self._field, (0, 0))
        self._draw_clock(game)
        if game.world.rackets:
            self._draw_players(game)
        if not game.playing and game.steps:
            self._draw_end(game)
        return pygame.transform.smoothscale(canvas, SIZE)

    def _draw_players(self, game: Game) -> None:
        draw, canvas = self._pygame.draw, self._canvas
        for i, (x, y, angle, *_) in enumerate(game.world.rackets):
            held = game.keep_mode and game.observe(i)[16] > 0
            if held:  # where a shot would go
                reach = SIDES[i] * _AIM
                end = _pixel(x + reach * math.cos(angle), y + reach * math.sin(angle))
                draw.line(canvas, _PLAYERS[i], _pixel(x, y), end, 3 * FINE)
            outline = [(SIDES[i] * a, b) for a, b in RACKET]
            draw.polygon(canvas, _DARK[i], _placed(outline, x, y, angle))
            draw.polygon(canvas, _PLAYERS[i], _placed(((0.86 * a, 0.88 * b) for a, b in outline), x, y, angle))
        puck = _pixel(*game.world.puck[:2])
        radius = PUCK_RADIUS * PIXELS * FINE
        draw.circle(canvas, _PUCK, puck, radius)
        draw.circle(canvas, _SHINE, puck, 0.62 * radius, FINE)

    def _draw_clock(self, game: Game) -> None:
        """The time that is left, as a bar above the field that gets shorter on both sides, and in seconds."""
        left = max(0, game.limit - game.steps)
        half = _INNER_X * left / game.limit
        begin, end = _pixel(-half, 0)[0], _pixel(half, 0)[0]
        self._pygame.draw.rect(self._canvas, _EDGE, (begin, 8 * FINE, max(1, end - begin), 4 * FINE))
        self._write(f"{left / FPS:.1f} s", 18, _TEXT, (self._canvas.get_width() - 26 * FINE, 10 * FINE))

    def _draw_end(self, game: Game) -> None:
        word, colour = ("time", _BOARD) if game.winner is None else ("goal!", _PLAYERS[game.winner])
        width, height = self._canvas.get_size()
        self._write(word, 54, colour, (width / 2, height * 0.28))

    def _write(self, text: str, size: int, colour: tuple[int, int, int], centre: tuple[float, float]) -> None:
        picture = self._fonts[size].render(text, True, colour)
        self._canvas.blit(picture, picture.get_rect(center=centre))


def _draw_field(pygame: Any, canvas: Any) -> None:
    """Everything that does not move."""
    draw, line = pygame.draw, 3 * FINE
    canvas.fill(_STANDS)
    (left, top), (right, bottom) = _pixel(-_INNER_X, _INNER_Y), _pixel(_INNER_X, -_INNER_Y)
    ice = pygame.Rect(left, top, right - left, bottom - top)
    draw.rect(canvas, _ICE, ice)
    draw.line(canvas, _CENTRE, _pixel(0, -_INNER_Y), _pixel(0, _INNER_Y), line)
    draw.circle(canvas, _LINE, _pixel(0, 0), 100 * FINE, line)
    draw.circle(canvas, _CENTRE, _pixel(0, 0), 6 * FINE)
    for i in (FIRST, SECOND):
        side = -SIDES[i]
        canvas.set_clip(ice)
        draw.circle(canvas, _PALE[i], _pixel(side * _INNER_X, 0), 1.15 * GOAL_HALF * PIXELS * FINE)
        draw.circle(canvas, _LINE, _pixel(side * _INNER_X, 0), 1.15 * GOAL_HALF * PIXELS * FINE, line)
        canvas.set_clip(None)
        mouth = [_pixel(side * x, y) for x, y in GOAL]
        draw.polygon(canvas, _ICE, [_pixel(side * x, up * y) for up in SIDES for x, y in SHORT_BOARD[:2][:: int(up)]])
        draw.polygon(canvas, _PLAYERS[i], mouth)
        for k in range(1, 10):  # its net
            y = GOAL_HALF * (k / 5 - 1)
            draw.line(canvas, _DARK[i], _pixel(side * GOAL[0][0], y), _pixel(side * GOAL[1][0], y), FINE)
    for side in SIDES:
        boards = [[_pixel(x, side * y) for x, y in LONG_BOARD]]
        boards += [[_pixel(side * x, up * y) for x, y in SHORT_BOARD] for up in SIDES]
        for board in boards:
            draw.polygon(canvas, _BOARD, board)
    for side in SIDES:  # the edge that the puck bounces off
        draw.line(canvas, _EDGE, _pixel(-_INNER_X, side * _INNER_Y), _pixel(_INNER_X, side * _INNER_Y), line)
        for up in SIDES:
            ends = [_pixel(side * _INNER_X, up * y) for y in (_INNER_Y, SHORT_BOARD[0][1])]
            draw.line(canvas, _EDGE, *ends, line)


def _placed(corners: Points, x: float, y: float, angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [_pixel(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners]


def _pixel(x: float, y: float) -> tuple[float, float]:
    """Where a point of the field is on the canvas."""
    return FINE * (SIZE[0] / 2 + PIXELS * x), FINE * (SIZE[1] / 2 - PIXELS * y)
