"""Constructs that must not occur in the package, each with its reason; found in the syntax tree, not in text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import aiorl

PACKAGE = Path(aiorl.__file__).parent

# (rule, path or folder in aiorl/): why it is right there. An entry that nothing needs any more fails the tests.
ALLOWED: dict[tuple[str, str], str] = {
    ("signals", "workers/program.py"): "a worker process is aiorl's own; Ctrl-C in the terminal must not reach it",
    ("signals", "cli"): "the command line is where the program belongs to aiorl",
    ("global randomness", "testing/chance.py"): "looks at the global generators to find who else uses them",
    ("forking", "testing/crashes.py"): "a crash test needs the process as it is, once for each operation",
    ("sleeping", "testing"): "simulated work takes virtual time; a fault that hangs is one",
    ("sleeping", "session.py"): "the clock tick of Progress events; nothing waits for it",
    ("sleeping", "cli/play.py"): "draws an episode at the speed that the environment asks for",
    ("sleeping", "workers/supervision.py"): "a worker that keeps dying is started again only after a while",
    ("sleeping", "watchdog.py"): "it looks whether something happens that ought to; its absence wakes nobody up",
    ("sleeping", "filelock.py"): "a lock that is looked at for a moment; the kernel tells nobody when it is free",
    ("sleeping", "metrics/lag.py"): "how late the loop wakes it up is what it measures",
}


@dataclass(frozen=True)
class Use:
    """A call (`arguments` is the node) or a mere mention of a dotted name, with import aliases resolved."""

    name: str
    call: ast.Call | None
    line: int

    def keyword(self, name: str) -> ast.expr | None:
        return next((k.value for k in self.call.keywords if k.arg == name), None) if self.call else None

    def is_true(self, keyword: str) -> bool:
        value = self.keyword(keyword)
        return value is not None and not (isinstance(value, ast.Constant) and value.value is False)

    @property
    def first(self) -> ast.expr | None:
        return self.call.args[0] if self.call and self.call.args else None


@dataclass(frozen=True)
class Rule:
    """`found` says whether a use is forbidden; every line of `bad` must be found and none of `good`."""

    name: str
    why: str
    found: Callable[[Use], bool]
    bad: tuple[str, ...]
    good: tuple[str, ...] = ()


def uses_in(source: str) -> Iterator[Use]:
    """Every dotted name in the source, once: calls with their arguments, other mentions without."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    aliases[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Use(f"{node.module}.{alias.name}", None, node.lineno)

    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield Use(_dotted(node, aliases), called.get(id(node)), node.lineno)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`np.random.seed` -> `numpy.random.seed`; `f(x).send` -> `?.send`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _is(*names: str) -> Callable[[Use], bool]:
    return lambda use: use.name in names


def _in(modules: tuple[str, ...], *attributes: str) -> Callable[[Use], bool]:
    return _is(*(f"{module}.{attribute}" for module in modules for attribute in attributes))


def _sleeps(use: Use) -> bool:
    """asyncio.sleep(0) gives way once; anything longer is waiting for time instead of for an event."""
    zero = isinstance(use.first, ast.Constant) and use.first.value == 0
    return use.name in ("time.sleep", "asyncio.sleep") and use.call is not None and not zero


def _default_executor(use: Use) -> bool:
    if use.name == "asyncio.to_thread" or use.name.endswith(".set_default_executor"):
        return True
    executor = use.first if use.first is not None else use.keyword("executor")
    none = isinstance(executor, ast.Constant) and executor.value is None
    return use.name.endswith(".ThreadPoolExecutor") or (use.name.endswith(".run_in_executor") and none)


def _signals(use: Use) -> bool:
    return use.name in ("signal.signal", "signal.setitimer", "signal.set_wakeup_fd") or use.name.endswith(
        (".add_signal_handler", ".remove_signal_handler")
    )


NUMPY_RNG = ("Generator", "SeedSequence", "BitGenerator", "PCG64", "PCG64DXSM", "Philox", "SFC64", "default_rng")
TORCH_DRAWS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "multinomial", "normal", "bernoulli")


def _global_rng(use: Use) -> bool:
    module, _, attribute = use.name.rpartition(".")
    if module == "random":  # the standard library's one generator for everybody
        return True
    if module == "numpy.random":
        return attribute not in NUMPY_RNG
    if module in ("torch", "torch.random", "torch.cuda", "torch.cuda.random"):
        if attribute in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state"):
            return True
        return module == "torch" and attribute in TORCH_DRAWS and use.call is not None and not use.keyword("generator")
    return False


def _unseeded(use: Use) -> bool:
    module, _, attribute = use.name.rpartition(".")
    fresh = use.call is not None and not use.call.args and not use.call.keywords
    return module == "numpy.random" and attribute in NUMPY_RNG and fresh


RULES = (
    Rule(
        "unpickling",
        "reading a pickle runs whatever its author wanted",
        lambda use: (
            _in(("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal"), "load", "loads", "Unpickler")(use)
            or _is("shelve.open", "joblib.load", "pandas.read_pickle", "torch.load", "torch.jit.load")(use)
            or _in(("yaml",), "load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")(use)
            or use.is_true("allow_pickle")
        ),
        bad=(
            "import pickle; pickle.loads(b'')",
            "from pickle import loads",
            "import pickle as p; p.Unpickler(f).load()",
            "import marshal; marshal.load(f)",
            "import shelve; shelve.open('x')",
            "import dill; f = dill.loads",
            "import torch; torch.load(path, weights_only=True)",
            "import numpy as np; np.load(path, allow_pickle=True)",
            "import numpy as np; np.lib.format.read_array(f, allow_pickle=flag)",
            "import yaml; yaml.load(f, Loader=yaml.Loader)",
            "from yaml import unsafe_load",
        ),
        good=(
            "import pickle; pickle.dumps(x)",
            "import numpy as np; np.load(path)",
            "import numpy as np; np.load(path, allow_pickle=False)",
            "import yaml; yaml.safe_load(f)",
            "import json; json.loads(s)",
        ),
    ),
    Rule(
        "evaluation",
        "text is parsed by type, never run",
        _is("eval", "exec", "compile", "builtins.eval", "builtins.exec", "__import__", "runpy.run_path", "runpy.run_module"),
        bad=(
            *("eval('1')", "exec('x = 1')", "compile('1', '', 'eval')", "__import__(name)"),
            "import runpy; runpy.run_path(p)",
        ),
        good=("policy.eval()", "re.compile('a')", "torch.compile(f)", "model.train(False)"),
    ),
    Rule(
        "wait_for",
        "asyncio.wait_for may swallow a cancellation on Python 3.11; use asyncio.timeout",
        _is("asyncio.wait_for"),
        bad=("import asyncio\nasync def f(): await asyncio.wait_for(g(), 1)", "from asyncio import wait_for as w"),
        good=("async def f(): await condition.wait_for(ready)",),
    ),
    Rule(
        "default executor",
        "its threads are joined at exit and shared with the host; use offload.OffloadThread",
        _default_executor,
        bad=(
            "import asyncio; asyncio.to_thread(f)",
            "loop.run_in_executor(None, f)",
            "self._loop.run_in_executor(None, f)",
            "loop.run_in_executor(executor=None, func=f)",
            "loop.set_default_executor(e)",
            "from concurrent.futures import ThreadPoolExecutor",
        ),
        good=("loop.run_in_executor(self._executor, f)",),
    ),
    Rule(
        "shell",
        "no text reaches a shell",
        lambda use: (
            use.is_true("shell")
            or _is("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")(use)
            or use.name.endswith(".create_subprocess_shell")
        ),
        bad=(
            "import subprocess; subprocess.run('ls', shell=True)",
            "import os; os.system('ls')",
            "import subprocess; subprocess.getoutput('ls')",
            "import asyncio; asyncio.create_subprocess_shell('ls')",
        ),
        good=("import subprocess; subprocess.run(['ls'])", "import subprocess; subprocess.run(['ls'], shell=False)"),
    ),
    Rule(
        "process machinery",
        "queues, pools and managers lose work or hang when a child dies, named memory outlives a kill; the start method "
        "belongs to the host",
        lambda use: (
            _in(
                ("multiprocessing", "mp", "torch.multiprocessing"),
                *("Queue", "SimpleQueue", "JoinableQueue", "Pool", "Manager", "set_start_method", "Process"),
            )(use)
            or _in(("aiomultiprocess", "aiomultiprocess.core"), "Pool", "Worker", "set_start_method")(use)
            or _in(("multiprocessing.managers",), "BaseManager", "SyncManager")(use)
            or use.name.endswith((".Manager", ".get_manager", ".qsize", ".ProcessPoolExecutor", ".SharedMemory"))
            or (use.name.startswith("?.") and use.name.endswith((".Pool", ".SimpleQueue", ".JoinableQueue")))
        ),
        bad=(
            "import multiprocessing as mp; q = mp.Queue()",
            "from multiprocessing import Pool",
            "import multiprocessing; multiprocessing.get_context('spawn').Manager()",
            "import multiprocessing; multiprocessing.get_context('spawn').Pool(2)",
            "import concurrent.futures; concurrent.futures.ProcessPoolExecutor()",
            "from multiprocessing import shared_memory; shared_memory.SharedMemory(create=True, size=1)",
            "import aiomultiprocess; aiomultiprocess.Pool()",
            "from aiomultiprocess import Worker",
            "import multiprocessing; multiprocessing.set_start_method('spawn')",
            "q.qsize()",
        ),
        good=("import aiomultiprocess; aiomultiprocess.Process(target=f)", "import asyncio; asyncio.Queue()"),
    ),
    Rule(
        "forking",
        "a fork copies locks that other threads hold, and hangs on them",
        _in(("os",), "fork", "forkpty"),
        bad=("import os; os.fork()", "from os import fork"),
        good=("import os; os.getpid()",),
    ),
    Rule(
        "sleeping",
        "wait for the event itself; polling costs time when idle and latency when busy",
        _sleeps,
        bad=(
            "import time; time.sleep(1)",
            "from time import sleep; sleep(0.1)",
            "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0.01)",
        ),
        good=("import asyncio\nasync def f(): await asyncio.sleep(0)", "loop.call_later(1, f)"),
    ),
    Rule(
        "global randomness",
        "a global generator belongs to the host, and two users of it change each other's results",
        _global_rng,
        bad=(
            "import random; random.random()",
            "from random import choice",
            "import numpy as np; np.random.seed(0)",
            "import numpy; numpy.random.rand(3)",
            "import torch; torch.manual_seed(0)",
            "import torch; torch.randperm(5)",
        ),
        good=(
            "import numpy as np; np.random.default_rng(7).random()",
            "import numpy as np; np.random.Generator(np.random.PCG64(s))",
            "import torch; torch.randperm(5, generator=g)",
            "rng.random()",
        ),
    ),
    Rule(
        "unseeded randomness",
        "without a seed no run can be repeated",
        _unseeded,
        bad=("import numpy as np; np.random.default_rng()", "from numpy.random import SeedSequence; SeedSequence()"),
        good=("import numpy as np; np.random.default_rng(seed)",),
    ),
    Rule(
        "signals",
        "signals belong to the program, not to a library",
        _signals,
        bad=("import signal; signal.signal(signal.SIGINT, f)", "loop.add_signal_handler(2, f)"),
        good=("import signal; os.kill(pid, signal.SIGTERM)",),
    ),
    Rule(
        "host settings",
        "event loop, logging and warnings are the host's to set up",
        _is(
            *("asyncio.set_event_loop_policy", "asyncio.set_event_loop", "uvloop.install", "logging.basicConfig"),
            *("logging.config.dictConfig", "warnings.filterwarnings", "warnings.simplefilter", "sys.excepthook"),
        ),
        bad=(
            "import asyncio; asyncio.set_event_loop_policy(p)",
            "import uvloop; uvloop.install()",
            "import logging; logging.basicConfig()",
        ),
        good=("import uvloop; uvloop.new_event_loop()", "import logging; logging.getLogger('aiorl')"),
    ),
)


def violations() -> Iterator[tuple[Rule, str, int]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        uses = list(uses_in(path.read_text(encoding="utf-8")))
        for rule in RULES:
            yield from ((rule, path.relative_to(PACKAGE).as_posix(), use.line) for use in uses if rule.found(use))


FOUND = list(violations())


def _allowance(rule: str, path: str) -> tuple[str, str] | None:
    return next((key for key in ALLOWED if key[0] == rule and (path == key[1] or path.startswith(f"{key[1]}/"))), None)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_package_is_free_of(rule: Rule):
    wrong = [f"aiorl/{path}:{line}" for r, path, line in FOUND if r is rule and not _allowance(rule.name, path)]
    assert not wrong, f"{rule.name} at {', '.join(wrong)}\n{rule.why}"


def test_allowances_are_in_use():
    needed = {_allowance(rule.name, path) for rule, path, _ in FOUND}
    assert set(ALLOWED) <= needed, f"no longer needed: {set(ALLOWED) - needed}"


# Each guard must be able to fail, and to tell what it forbids from what looks like it.


@pytest.mark.parametrize(("rule", "source"), [pytest.param(r, s, id=s) for r in RULES for s in r.bad])
def test_the_guard_finds(rule: Rule, source: str):
    assert any(rule.found(use) for use in uses_in(source))


@pytest.mark.parametrize(("rule", "source"), [pytest.param(r, s, id=s) for r in RULES for s in r.good])
def test_the_guard_leaves_alone(rule: Rule, source: str):
    assert not any(rule.found(use) for use in uses_in(source))
