"""Algorithms by name. Each lives in one file; one from outside is named `pkg.mod:Class`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

from aiorl.errors import ConfigError

ALGORITHMS: dict[str, str] = {
    "ppo": "aiorl.algos.ppo:PPO",
    "dqn": "aiorl.algos.dqn:DQN",
    "qrdqn": "aiorl.algos.qrdqn:QRDQN",
    "sac": "aiorl.algos.sac:SAC",
    "selfplay": "aiorl.algos.selfplay:SelfPlay",
    "td3": "aiorl.algos.td3:TD3",
}
"""Short name -> where its configuration class is (imported when asked for)."""


def algorithm_class(name: str) -> Any:
    """The configuration class of `name`, a short name or `pkg.mod:Class`. Raises ConfigError."""
    if ":" not in name:
        if name not in ALGORITHMS:
            near = difflib.get_close_matches(name.lower(), ALGORITHMS, 1)
            hint = f" — did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"unknown algorithm {name!r}{hint}\n  there are {', '.join(sorted(ALGORITHMS))}; your own: pkg.mod:Class"
            )
        name = ALGORITHMS[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"algorithm {name}: {module!r} cannot be imported: {error}") from error
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(importlib.import_module(module)), 1)
        hint = f" — did you mean {near[0]}?" if near else ""
        raise ConfigError(f"module {module!r} has no {attribute!r}{hint}") from None
    missing = [m for m in ("name", "check", "columns", "policy", "learner") if not hasattr(found, m)]
    if missing:
        raise ConfigError(
            f"{name} is not an algorithm: it has no {', '.join(missing)}\n  see aiorl.Algorithm for what one offers"
        )
    return found


def algorithm_name(algorithm: Any) -> str:
    """How an algorithm is written in a file: its short name, or `module:Class`."""
    kind = algorithm if isinstance(algorithm, type) else type(algorithm)
    where = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, place in ALGORITHMS.items() if place == where), where)


def leads_to(name: str, algorithm: type[Any]) -> bool:
    """Whether `pkg.mod:Class` is this class. Nothing is imported to find out."""
    module, _, attribute = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return found is algorithm


def named_within(settings: Any) -> Iterator[str]:
    """The algorithms from outside that an algorithm's settings, as plain data, name: making it would import them."""
    tables = [settings]
    while tables:
        table = tables.pop()
        if isinstance(table, Mapping):
            table = cast("Mapping[str, Any]", table)
            if ":" in (name := str(table.get("algo", ""))):
                yield name
            tables += table.values()
