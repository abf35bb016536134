"""Algorithms by name. Each lives in one file; one from outside is named `pkg.mod:Class`."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

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
