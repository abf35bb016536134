"""`python -m aiorl envs [FILTER|ENV]`: environments that can be trained on, and what they need."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from aiorl.cli.flags import Parser, show
from aiorl.cli.text import number, oneline, table
from aiorl.envs.make import probe
from aiorl.envs.spaces import Leaf, Spaces
from aiorl.envs.spec import installed, resolve_env
from aiorl.errors import AiorlError, ConfigError
from aiorl.presets import PRESETS, preset

HEADING = ("environment", "observation", "action", "presets", "")
LOOK_AT = 40
"""Up to so many environments are made to see their spaces; a longer list only gives names."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("envs", "List environments, their spaces and presets, and which extra is missing.", "[FILTER|ENV]")
    parser.add_argument("filter", nargs="?", metavar="FILTER", help="part of an id; a whole one gives details")
    parser.add_argument("--all", action="store_true", help="older versions, too")
    parser.add_argument("--presets", action="store_true", help="only those that an algorithm has settings for")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    word = given.get("filter", "")
    if given.get("presets", False):
        print(listing(with_presets(word), everything=True))
        return 0
    known = known_ids(given.get("all", False))
    if ":" in word or word in installed():
        print(details(word))
        return 0
    found = [env for env in known if word.lower() in env.lower()]
    if not found:
        resolve_env(word, in_process=True)  # says why there is no such id, and which one may have been meant
    print(listing(found, everything=bool(word) or given.get("all", False)))
    return 0


def with_presets(word: str) -> list[str]:
    """Environments with a preset and `word` in their ids. Raises ConfigError if there are none."""
    found = sorted({env for _, env in PRESETS if word.lower() in env.lower()}, key=str.lower)
    if not found:
        raise ConfigError(f"no environment with a preset has {word!r} in its id\n  `envs {word}` lists those without")
    return found


def known_ids(older: bool) -> list[str]:
    """Registered ids in alphabetical order, without superseded versions unless asked for."""
    newest: dict[str, tuple[int, str]] = {}
    ids: list[str] = []
    for env in installed():
        match = re.fullmatch(r"(.+)-v(\d+)", env)
        family, version = (match[1], int(match[2])) if match else (env, 0)
        if older:
            ids.append(env)
        elif version >= newest.get(family, (-1, ""))[0]:
            newest[family] = (version, env)
    return sorted(ids or [env for _, env in newest.values()], key=str.lower)


def listing(ids: Sequence[str], everything: bool) -> str:
    """A table of environments; spaces are shown where the list is short enough to make each of them once.

    Those that need something no extra of aiorl brings are left out unless `everything` is asked for.
    """
    rows: list[tuple[str, ...]] = [HEADING]
    for env in ids:
        observation, action, note = look(env) if len(ids) <= LOOK_AT else ("", "", "")
        if everything or not note or note.startswith("needs aiorl"):
            rows.append((env, observation, action, ", ".join(presets_for(env)), note))
    if len(ids) > LOOK_AT:
        rows = [(row[0], row[3]) for row in rows]
        rest = f"\n{len(ids)} environments; give a part of a name to see spaces and what is missing"
        return table(rows) + rest
    return table(rows)


def look(env: str) -> tuple[str, str, str]:
    """(observation, action, what stands in the way) of an environment."""
    try:
        found = probe(resolve_env(env, in_process=True, native=False))
    except AiorlError as error:
        lines = str(error).splitlines()
        extra = re.search(r'pip install "(aiorl\[\w+\])"', str(error))
        return "", "", f"needs {extra[1]}" if extra else oneline(lines[0].removeprefix(f"{env}: "), 60)
    return observation_text(found.spaces), leaf_text(found.spaces.action), ""


def presets_for(env: str) -> list[str]:
    return sorted(algo for algo in {algo for algo, _ in PRESETS} if preset(algo, env))


def details(env: str) -> str:
    """Everything about one environment. Raises ConfigError if it cannot be made."""
    found = probe(resolve_env(env, in_process=True))
    spaces = found.spaces
    lines = [env]
    for leaf in spaces.observation:
        lines.append(_line("observes" if len(spaces.observation) == 1 else leaf.name, leaf_text(leaf)))
    lines.append(_line("acts", leaf_text(spaces.action)))
    lines.append(_line("vector", "its own, used in workers" if found.native else found.why_single or "none of its own"))
    if found.max_episode_steps:
        lines.append(_line("episode", f"at most {found.max_episode_steps:,} steps"))
    if found.reward_threshold is not None:
        lines.append(_line("solved at", number(found.reward_threshold)))
    algos = presets_for(env)
    for algo in algos:
        values = ", ".join(f"{k}={show(v)}" for k, v in flat(preset(algo, env)).items())
        lines.append(_line(f"{algo} preset", values))
    choice = f" --algo {algos[0]}" if algos and "ppo" not in algos else ""  # ppo is what `train` takes by itself
    lines.append(_line("train", f"python -m aiorl train {env}{choice}"))
    return "\n".join(lines)


def flat(table_: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with its keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in table_.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def spaces_text(spaces: Spaces) -> str:
    """`box 4 float32 -> discrete 2`."""
    return f"{observation_text(spaces)} -> {leaf_text(spaces.action)}"


def observation_text(spaces: Spaces) -> str:
    if len(spaces.observation) == 1:
        return leaf_text(spaces.observation[0])
    names = [leaf.name.removeprefix("obs.") for leaf in spaces.observation]
    return f"{len(names)} parts: {', '.join(names)}"


def leaf_text(leaf: Leaf) -> str:
    """`box 4 float32`, `discrete 2`, `image 84×84×4`."""
    size = "×".join(map(str, leaf.shape)) or "1"
    if leaf.kind == "discrete":
        return f"discrete {leaf.nvec[0]}"
    if leaf.kind == "multi_discrete":
        return f"multi-discrete {'×'.join(map(str, leaf.nvec))}"
    if leaf.kind == "multi_binary":
        return f"multi-binary {size}"
    return f"image {size}" if leaf.is_image and len(leaf.shape) >= 2 else f"box {size} {leaf.dtype}"


def _line(label: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"  {label:<12} ", subsequent_indent=" " * 15)
