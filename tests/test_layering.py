"""The map in `aiorl/__init__.py` is true: every module is on it, and imports go downwards only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import aiorl

PACKAGE = Path(aiorl.__file__).parent
EDGE = 99  # the command line and the test kit: they may import everything, and nothing imports them

# Layers below this one are synchronous: they are tested without an event loop, threads, processes or time.
FIRST_ASYNC_LAYER = 3
ASYNC_ONLY = {"asyncio", "concurrent", "multiprocessing", "selectors", "signal", "socket", "subprocess", "threading"}

# (importing file, imported module): why this one is allowed.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("cli/doctor.py", "aiorl.testing.examine_env"): "the doctor tries out the user's environment, when it is asked to",
    ("cli/doctor.py", "aiorl.testing.machine"): "and the machine",
    ("cli/doctor.py", "aiorl.testing.examine_algorithm"): "and the user's algorithm",
    ("cli/doctor.py", "aiorl.testing.examine_run"): "and looks at what a run wrote",
    ("cli/doctor.py", "aiorl.testing.catalogue"): "and says which faults its findings tell of",
    ("envs/coroutines.py", "asyncio"): "some environments are coroutines, and only this file knows what runs them",
    ("envs/coroutines.py", "concurrent.futures"): "and how functions wait for them",
    ("envs/coroutines.py", "threading"): "on a loop of their own",
}

# Only the learner imports these files, so they may import torch when they are imported.
TORCH_AT_TOP = {"continuous.py", "layers.py", "losses.py", "networks.py"}


@dataclass(frozen=True)
class Import:
    """`path` (relative to the package) imports `module` at `line`; `at_top`: when it is itself imported."""

    path: str
    module: str
    line: int
    at_top: bool

    def __str__(self) -> str:
        return f"aiorl/{self.path}:{self.line} imports {self.module}"


def read_map(text: str) -> dict[str, int]:
    """Unit name -> layer, from the table: names, three or more spaces, a description, the number (`-` is the edge)."""
    layers: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if not line.startswith("    "):
            continue
        names = re.split(r"\s{3,}", line.strip())[0].split()
        waiting += [name.rstrip("/") for name in names]
        number = re.search(r"\s(\d+|-)$", line.rstrip())
        if number:
            layers |= dict.fromkeys(waiting, EDGE if number[1] == "-" else int(number[1]))
            waiting = []
    assert not waiting, f"no layer number after {waiting}"
    return layers


def imports_in(source: str, path: str) -> Iterator[Import]:
    """All imports of a file, also those inside functions, but not those that only the type checker sees."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_top)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path)
            for alias in node.names:  # `from aiorl import run` imports the module aiorl.run
                full = f"{base}.{alias.name}"
                yield Import(path, full if base == "aiorl" else base, node.lineno, at_top)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top and not inside)

    yield from visit(ast.parse(source), True)


def _absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = ["aiorl", *Path(path).parent.parts][: -(node.level - 1) or None]
    return ".".join([*package, *([node.module] if node.module else [])])


def unit_of(path: str) -> str:
    """`algos/ppo.py` -> `algos`, `run.py` -> `run`."""
    return Path(path).parts[0].removesuffix(".py")


def unit_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "aiorl" and len(parts) > 1 else None


LAYERS = read_map(aiorl.__doc__ or "")
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
IMPORTS = [i for path in FILES for i in imports_in((PACKAGE / path).read_text(encoding="utf-8"), path)]


def upward(found: list[Import], layers: dict[str, int]) -> list[str]:
    """Imports of aiorl modules that lie higher than the importing file, or at the edge."""
    wrong: list[str] = []
    for item in found:
        above, below = unit_of_module(item.module), unit_of(item.path)
        if above in (None, below, "__version__") or (item.path, item.module) in EXCEPTIONS:
            continue
        if above in aiorl.__all__:  # reaches through the public names, which reach everything
            if layers[below] != EDGE:
                wrong.append(f"{item}: inside the package, import from the module that defines it")
        elif above not in layers:
            wrong.append(f"{item}: not on the map")
        elif layers[above] > layers[below] or (layers[above] == EDGE and not {above, below} <= {"cli", "__main__"}):
            wrong.append(f"{item}: layer {layers[below]} must not import layer {layers[above]}")
    return wrong


def test_every_module_is_on_the_map():
    missing = sorted({unit_of(path) for path in FILES} - set(LAYERS))
    assert not missing, f"place {missing} in the table in aiorl/__init__.py"


def test_the_map_names_nothing_that_does_not_exist():
    gone = sorted(set(LAYERS) - {unit_of(path) for path in FILES})
    assert not gone, f"take {gone} out of the table in aiorl/__init__.py"


def test_imports_go_downwards():
    wrong = upward(IMPORTS, LAYERS)
    assert not wrong, "\n".join(wrong)


def test_the_test_kit_is_imported_late():
    """No training pays for it: an exception is made inside a function, when it is needed."""
    at_top = [i for i in IMPORTS if i.at_top and unit_of(i.path) != "testing"]
    wrong = [str(i) for i in at_top if unit_of_module(i.module) == "testing"]
    assert not wrong, "\n".join(wrong)


def test_no_cycle_within_a_layer():
    edges: dict[str, set[str]] = {}
    for item in IMPORTS:
        above, below = unit_of_module(item.module), unit_of(item.path)
        if above in LAYERS and above != below and LAYERS.get(below) == LAYERS[above] != EDGE:
            edges.setdefault(below, set()).add(above)
    reached = {unit: _reach(unit, edges) for unit in edges}
    cyclic = sorted(unit for unit, others in reached.items() if unit in others)
    assert not cyclic, f"modules of one layer import each other in a circle: {cyclic} ({edges})"


def _reach(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(edges.get(start, ()))
    while todo:
        unit = todo.pop()
        if unit not in found:
            found.add(unit)
            todo += edges.get(unit, ())
    return found


def test_low_layers_are_synchronous():
    wrong = [
        str(item)
        for item in IMPORTS
        if item.module.split(".")[0] in ASYNC_ONLY
        and LAYERS.get(unit_of(item.path), EDGE) < FIRST_ASYNC_LAYER
        and (item.path, item.module) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_workers_import_aiomultiprocess():
    wrong = [str(i) for i in IMPORTS if i.module.split(".")[0] == "aiomultiprocess" and unit_of(i.path) != "workers"]
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_late():
    """`import torch` takes seconds and hundreds of MB: workers and `--help` must not pay for it."""
    at_top = [i for i in IMPORTS if i.at_top and i.path not in TORCH_AT_TOP]
    wrong = [str(i) for i in at_top if i.module.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


def test_losses_and_networks_are_imported_late():
    """They import torch at once, so only the learner may reach them."""
    files = {f"aiorl.{Path(name).stem}" for name in TORCH_AT_TOP}
    wrong = [str(i) for i in IMPORTS if i.module in files and i.at_top and i.path not in TORCH_AT_TOP]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_in_use():
    stale = set(EXCEPTIONS) - {(i.path, i.module) for i in IMPORTS}
    assert not stale, f"no longer needed: {stale}"


# The test must be able to fail.


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("pacing.py", "from aiorl.run import Run", "must not import"),
        ("pacing.py", "def f():\n    import aiorl.loops", "must not import"),
        ("algos/ppo.py", "from ..workers import pool", "must not import"),
        ("algos/ppo.py", "from aiorl import run", "must not import"),
        ("run.py", "from aiorl.testing import tape", "must not import"),
        ("run.py", "from aiorl import Config", "inside the package"),
        ("run.py", "from aiorl.nowhere import x", "not on the map"),
    ],
)
def test_an_upward_import_is_found(path: str, source: str, complaint: str):
    found = upward(list(imports_in(source, path)), LAYERS | {"cli": EDGE, "testing": EDGE})
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("run.py", "from aiorl.loops import collect"),
        ("algos/ppo.py", "from .base import Policy"),
        ("pacing.py", "if TYPE_CHECKING:\n    from aiorl.run import Run"),
        ("cli/train.py", "from aiorl import Config"),
        ("__main__.py", "from aiorl.cli import main"),
        ("pacing.py", "import numpy as np"),
    ],
)
def test_a_downward_import_is_fine(path: str, source: str):
    assert upward(list(imports_in(source, path)), LAYERS | {"cli": EDGE, "__main__": EDGE}) == []


def test_the_map_is_read_with_continuation_lines():
    text = "Layers:\n\n    a  b/           what   0\n    c  d\n        e            more   1\n    f     edge   -\n"
    assert read_map(text) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1, "f": EDGE}


@pytest.mark.parametrize(
    "statement", ["import aiorl", "import aiorl; dir(aiorl)", "from aiorl.errors import AiorlError"]
)
def test_importing_aiorl_is_cheap(statement: str):
    heavy = ("torch", "gymnasium", "numpy", "rich", "asyncio")
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_configuring_a_run_imports_neither_torch_nor_gymnasium():
    code = (
        "import aiorl, sys\n"
        "aiorl.Config(env='CartPole-v1', algo=aiorl.PPO(), seed=1).to_toml()\n"
        "aiorl.Config(env='CartPole-v1', algo='dqn', off_policy_degree=0).resolve()\n"
        "print([m for m in ('torch', 'gymnasium') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
