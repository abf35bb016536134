"""Pictures of episodes as a file: a video (.gif, .mp4), or some frames side by side in one picture (.png)."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.errors import ConfigError, EnvError
from aiorl.segments import Array
from aiorl.tournament import Played

NEEDS = {".gif": ("imageio", "PIL"), ".mp4": ("imageio", "imageio_ffmpeg"), ".png": ("PIL",)}
"""What can be written, and the modules of the extra `video` that it takes."""

STRIP_FRAMES = 6
STRIP_WIDTH = 2400
"""Pixels that a strip may be wide; its frames are made smaller to fit."""

_LOG = logging.getLogger("imageio_ffmpeg")
_GAP = 4
_CAPTION = 36


def check_recording(record: Path | None, captions: bool = False) -> None:
    """Find out before the first episode whether the file can be written. Raises ConfigError."""
    if record is None:
        return
    suffix = record.suffix.lower()
    if suffix not in NEEDS:
        raise ConfigError(f"--record {record}: expected a file that ends in .gif or .mp4, or in .png for a strip of frames")
    if not record.parent.is_dir():
        raise ConfigError(f"--record {record}: there is no directory {record.parent}")
    if record.is_dir():
        raise ConfigError(f"--record {record}: it is a directory, expected a file")
    needed = NEEDS[suffix] + (("PIL",) if captions and "PIL" not in NEEDS[suffix] else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'--record {record} needs {" and ".join(missing)}, not installed\n  pip install "aiorl[video]"')


def _not_of_the_end(record: logging.LogRecord) -> bool:
    """It warns where ffmpeg has ended by itself, or not: what that means is said here."""
    return "attempting stop" not in record.getMessage()


class Recorder:
    """Writes frames, uint8 [height, width, 3], as they come: a long episode does not have to fit into memory, but
    for a .gif.

    Raises EnvError if there was nothing to write, or where a frame is not a picture, and ConfigError if the disk does not
    take it.
    """

    def __init__(self, path: Path, fps: float, frames: int = STRIP_FRAMES) -> None:
        self._path, self._fps, self._count = path, fps, 0
        self._is_gif = path.suffix.lower() == ".gif"
        self._gif = io.BytesIO()  # in which it is made: its writer would try the disk again and again
        self._strip = Strip(frames) if path.suffix.lower() == ".png" else None

    def __enter__(self) -> Recorder:
        _LOG.addFilter(_not_of_the_end)
        self._append = self._strip.add if self._strip else self._open_video()
        return self

    def _open_video(self) -> Callable[[Array], None]:
        import imageio.v2 as imageio

        if self._is_gif:
            self._writer = imageio.get_writer(self._gif, format=".gif", duration=1000 / self._fps, loop=0)
        else:
            self._writer = imageio.get_writer(str(self._path), fps=self._fps, macro_block_size=2)
        return self._writer.append_data  # pyright: ignore[reportReturnType]

    @property
    def still_frames(self) -> int:
        """How many frames long the end of a game is shown: a second of a video."""
        return 1 if self._strip else max(1, round(self._fps))

    def add(self, frame: Any) -> None:
        picture = np.asarray(frame)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            seen = f"{type(frame).__name__} {picture.dtype} {list(picture.shape)}"
            raise EnvError(f"render() returned {seen}, expected an array uint8 [height, width, 3]")
        try:
            self._append(picture)
        except OSError as error:
            raise self._not_written(error) from None
        self._count += 1

    def __call__(self, env: Any) -> None:
        """Add what the environment looks like."""
        self.add(env.render())

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._strip is None:
                self._close_video(whole=kind is None)
            elif kind is None:
                self._strip.save(self._path)
        except OSError as error:
            raise self._not_written(error) from None
        finally:
            _LOG.removeFilter(_not_of_the_end)

    def _close_video(self, whole: bool) -> None:
        self._writer.close()
        if not self._count:
            return
        if self._is_gif:
            self._path.write_bytes(self._gif.getvalue())
        elif whole and b"moov" not in self._path.read_bytes():  # what an mp4 ends with; ffmpeg does not say how it went
            raise OSError("its end is missing")

    def _not_written(self, error: OSError) -> ConfigError:
        why = error.strerror or str(error).partition("\n")[0]
        return ConfigError(f"--record {self._path}: cannot write it: {why}\n  make room, or choose another file")


class Strip:
    """`count` frames spread evenly over however many come, the first and the last among them.

    Keeps fewer than 8 * `count`: when it has so many, every other one goes.
    """

    def __init__(self, count: int) -> None:
        self._count, self._every, self._seen = count, 1, 0
        self._kept: list[Array] = []
        self._last: Array | None = None

    def add(self, frame: Array) -> None:
        if self._seen % self._every == 0:
            self._kept.append(frame.copy())
            if len(self._kept) == 8 * self._count:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._seen += 1
        self._last = frame

    def frames(self) -> list[Array]:
        if self._last is None:
            return []
        frames = [*self._kept, self._last.copy()] if (self._seen - 1) % self._every else self._kept
        places = np.linspace(0, len(frames) - 1, min(self._count, len(frames)))
        return [frames[round(place)] for place in places]

    def save(self, path: Path) -> None:
        from PIL import Image

        frames = self.frames()
        if not frames:
            raise EnvError(f"{path}: no frame was drawn")
        height, width = frames[0].shape[:2]
        scale = min(1.0, (STRIP_WIDTH / len(frames) - _GAP) / width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        strip = Image.new("RGB", (len(frames) * (size[0] + _GAP) - _GAP, size[1]), (255, 255, 255))
        for i, frame in enumerate(frames):
            strip.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (i * (size[0] + _GAP), 0))
        strip.save(path)


def captioned(frame: Array, left: str, middle: str, right: str) -> Array:
    """The frame, uint8 [height, width, 3], under a line of text; its height grows by 36."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frame.shape[:2]
    picture = Image.new("RGB", (width, height + _CAPTION), (24, 28, 36))
    picture.paste(Image.fromarray(frame), (0, _CAPTION))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    for text, x, anchor in ((left, 12, "lm"), (middle, width // 2, "mm"), (right, width - 12, "rm")):
        draw.text((x, _CAPTION // 2), text, (236, 239, 244), font, anchor)
    return np.asarray(picture)


class Film:
    """The first `games` of each match that are played at one table, under their players' names and how it stands."""

    def __init__(self, recorder: Recorder, render: Callable[[], Any], games: int) -> None:
        self._recorder, self._render, self._games = recorder, render, games

    def match(self, first: str, second: str) -> None:
        """A match between these two begins."""
        self._names = first, second
        self._won = [0, 0]
        self._shown: list[int] = []
        self._over = False

    def ended(self, index: int, game: Played) -> None:
        if index in self._shown:
            self._over = True
            if game.outcome:
                self._won[0 if game.outcome > 0 else 1] += 1

    def frame(self, index: int) -> None:
        """How game `index` of the match looks now."""
        if index not in self._shown:
            if len(self._shown) == self._games:
                return
            self._shown.append(index)
        left, right = (0, 1) if index % 2 == 0 else (1, 0)
        standing = f"{self._won[left]} : {self._won[right]}"
        picture = captioned(np.asarray(self._render()), self._names[left], standing, self._names[right])
        for _ in range(self._recorder.still_frames if self._over else 1):
            self._recorder.add(picture)
        self._over = False
