"""`python -m aiorl algos`: which algorithms there are and what each can do."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, get_origin

import msgspec

from aiorl.algos import ALGORITHMS, algorithm_class, algorithm_name
from aiorl.cli.flags import Parser, bare, description, members, show
from aiorl.cli.text import oneline, table
from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import ConfigError
from aiorl.presets import PRESETS

ACTIONS = {
    "discrete": Leaf(name="action", kind="discrete", dtype="int64", nvec=(3,), start=(0,)),
    "multi-discrete": Leaf(name="action", kind="multi_discrete", dtype="int64", shape=(2,), nvec=(3, 3), start=(0, 0)),
    "multi-binary": Leaf(name="action", kind="multi_binary", dtype="int8", shape=(2,)),
    "box": Leaf(name="action", kind="box", dtype="float32", shape=(2,), low=(-1.0,), high=(1.0,)),
}
"""One action space of each kind, to ask an algorithm whether it can act there."""

OBSERVATION = Leaf(name="obs", kind="box", dtype="float32", shape=(4,))


def main(argv: Sequence[str]) -> int:
    parser = Parser("algos", "List algorithms and what they can do.", "[NAME]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this one, with its settings; pkg.mod:Class is fine")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    if "name" in given:
        print(details(algorithm_class(given["name"])))
        return 0
    print("\n\n".join(outline(algorithm_class(name)) for name in ALGORITHMS))
    print("\n`python -m aiorl algos NAME` lists the settings of one.")
    return 0


def outline(algorithm: Any) -> str:
    """What an algorithm is and where it can be used."""
    tuned = ", ".join(env for name, env in PRESETS if name == algorithm_name(algorithm))
    return "\n".join(
        [
            textwrap.fill(f"{algorithm.name}: {oneline(_doc(algorithm))}", 80, subsequent_indent="  "),
            f"  acts in     {', '.join(actions_of(algorithm)) or 'spaces of its own kind'}",
            f"  stale data  {corrections(algorithm)}",
            f"  segment     {algorithm().default_segment_length} steps of each environment",
            textwrap.fill(f"  presets     {tuned or 'none'}", 80, subsequent_indent=" " * 14, break_on_hyphens=False),
        ]
    )


def details(algorithm: Any) -> str:
    """The same with all settings and their defaults."""
    rows = [("setting", "default", "")]
    for field in msgspec.structs.fields(algorithm):
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
        value = default() if callable(default) else default
        text = "–" if value is None or value is msgspec.NODEFAULT else show(value)
        flag = f"--{algorithm.name}.{field.name}".replace("_", "-")
        rows.append((flag, text, description(field.type)))
    return f"{outline(algorithm)}\n\n{table(rows)}"


def actions_of(algorithm: Any) -> list[str]:
    """The kinds of action space that the algorithm says it can act in."""
    found: list[str] = []
    for kind, leaf in ACTIONS.items():
        try:
            algorithm().check(Spaces(observation=(OBSERVATION,), action=leaf))
        except ConfigError:
            continue
        found.append(kind)
    return found


def corrections(algorithm: Any) -> str:
    """How the algorithm deals with rollouts of older versions."""
    choices = [
        ", ".join(str(m) for m in members(field.type) if isinstance(m, str) and m != "none")
        for field in msgspec.structs.fields(algorithm)
        if "correction" in field.name and get_origin(bare(field.type)) is not None
    ]
    if not algorithm().corrects_staleness:
        return "not corrected (degree 0 only)"
    if choices:
        return f"corrected: {choices[0]}"
    return f"sound at any degree{' while n_step is 1' if hasattr(algorithm, 'n_step') else ''}"


def _doc(algorithm: Any) -> str:
    """What the algorithm is: an algorithm has a file of its own, whose first line says it."""
    return inspect.getdoc(inspect.getmodule(algorithm)) or inspect.getdoc(algorithm) or ""
