"""`python -m aiorl play`: a trained policy in a window, in a video, as text in the terminal, or against others."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aiorl.cli import versus
from aiorl.cli.flags import field_value
from aiorl.cli.policies import policy_parser, read_policy
from aiorl.cli.record import STRIP_FRAMES, Recorder, check_recording
from aiorl.cli.text import number, plural
from aiorl.envs.episodes import run_episodes
from aiorl.envs.make import make_env
from aiorl.errors import ConfigError
from aiorl.policy import LoadedPolicy

EPISODES = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
SEED = Annotated[int, msgspec.Meta(ge=0)]
FRAMES = Annotated[int, msgspec.Meta(ge=1, le=100)]
FPS = Annotated[float, msgspec.Meta(gt=0, le=1000)]
DEFAULT_FPS = 30.0

Show = Callable[[Any], None]
"""Takes the environment after each step and shows or keeps what it looks like."""


def main(argv: Sequence[str]) -> int:
    parser = policy_parser(
        "play",
        "Watch a trained policy, or record it; with --versus, let policies and bots play games against each other. Text "
        "environments are drawn in the terminal.",
        "RUN [--episodes N] [--record FILE]\n"
        "       python -m aiorl play --versus PLAYER PLAYER… [--games N] [--record FILE]",
    )
    parser.add_argument("--episodes", metavar="N", help="how many episodes to show, of each match (default: 1)")
    parser.add_argument("--seed", metavar="N", help="seed of the episodes (default: the run's; 0 with --versus)")
    parser.add_argument(
        "--record", metavar="FILE", help="write a video (.gif, .mp4) or a strip of frames (.png) instead of opening a window"
    )
    parser.add_argument("--frames", metavar="N", help=f"frames in a strip (default: {STRIP_FRAMES})")
    parser.add_argument("--fps", metavar="X", help="frames per second (default: the environment's)")
    versus.add_arguments(parser)
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    frames = field_value("frames", given.get("frames", str(STRIP_FRAMES)), FRAMES)
    fps = field_value("fps", given["fps"], FPS) if "fps" in given else None
    record = Path(given["record"]) if "record" in given else None
    if "frames" in given and (record is None or record.suffix.lower() != ".png"):
        raise ConfigError("--frames is for a strip of frames\n  for example: --record strip.png --frames 6")
    if "versus" in given:
        return versus.main(given, record, fps, frames)
    refuse_without_versus(given)
    episodes = field_value("episodes", given.get("episodes", "1"), EPISODES)
    check_recording(record)
    policy, spec, _ = read_policy(given, "play")
    seed = field_value("seed", str(given.get("seed", policy.config.get("seed", 0))), SEED)
    env, mode = open_env(spec, record)
    try:
        fps = fps or float(env.metadata.get("render_fps") or DEFAULT_FPS)
        returns, lengths = play(policy, env, episodes, seed, mode, Recorder(record, fps, frames) if record else None, fps)
    finally:
        env.close()
    for index, (total, steps) in enumerate(zip(returns, lengths, strict=True), 1):
        print(f"episode {index}: return {number(total)}, {plural(steps, 'step')}")
    if record:
        print(record)
    return 0


def refuse_without_versus(given: Mapping[str, Any]) -> None:
    for name in ("games", "save", "json"):
        if name in given:
            raise ConfigError(f"--{name} is for tournaments\n  for example: play --versus weak strong --games 100")


def play(
    policy: LoadedPolicy, env: Any, episodes: int, seed: int, mode: str, recorder: Recorder | None, fps: float
) -> tuple[list[float], list[int]]:
    """Episodes one after the other, each frame recorded or shown: (returns, lengths). Raises EnvError."""
    acting = policy.algorithm.policy(policy.spaces)
    acting.begin(policy.weights, 0, None, 0)
    with recorder or nullcontext(_screen(mode, fps)) as show:
        returns, lengths = run_episodes([env], policy.spaces, acting, episodes, seed, 1, on_frame=show)
    return returns.tolist(), lengths.tolist()


def open_env(spec: Any, record: Path | None) -> tuple[Any, str]:
    """The environment in the render mode that suits, and that mode. Raises ConfigError if there is none."""
    if record is not None and not _has_screen():
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # frames are drawn in memory; SDL would complain that there is no screen
    plain = make_env(spec)
    modes = [str(m) for m in plain.metadata.get("render_modes", [])]
    plain.close()
    if record is not None:
        mode = "rgb_array"
    else:
        mode = "human" if "human" in modes and _has_screen() else "ansi" if "ansi" in modes else "human"
    if mode not in modes:
        offered = ", ".join(modes) or "none"
        raise ConfigError(f"{spec.name} cannot be shown this way: it needs render mode {mode}, it has {offered}")
    if mode == "human" and not _has_screen():
        raise ConfigError("there is no screen to open a window on\n  record a video instead: --record out.gif")
    return make_env(spec.with_kwargs(render_mode=mode)), mode


def _has_screen() -> bool:
    """A window can be opened; on Linux that takes a display server."""
    if not sys.platform.startswith("linux"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def _screen(mode: str, fps: float) -> Show:
    """A window draws itself (and keeps its own time); text is printed."""
    if mode == "human":
        return lambda env: None

    def show_text(env: Any) -> None:
        clear = "\033[H\033[2J" if sys.stdout.isatty() else ""
        print(f"{clear}{env.render()}", flush=True)
        if clear:
            time.sleep(1 / fps)

    return show_text
