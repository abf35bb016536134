"""The pytest plugin; pytest finds it when aiorl is installed. Costs nothing where nothing of it is used.

@pytest.mark.aiorl_chaos(seeds=50)          an async test runs in 50 simulations, each with another interleaving
async def test_x(aiorl_sim): ...            `aiorl_sim`, if asked for, is the simulation: its clock, its chance

pytest --aiorl-seed 17                      only that one again
pytestmark = pytest.mark.usefixtures("aiorl_no_leaks")
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from aiorl.testing.leaks import belongings, left_behind

if TYPE_CHECKING:
    from aiorl.testing.sim import Sim

MARKER, SIM, SEEDS = "aiorl_chaos", "aiorl_sim", 50
_SEED_VARIABLE = "AIORL_SEED"  # as in `sim`, which imports NumPy
_before = pytest.StashKey["str | None"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("aiorl").addoption(
        "--aiorl-seed", type=int, metavar="N", help="run simulated tests with this seed only (as AIORL_SEED=N)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(seeds={SEEDS}): run the test in that many simulations, in virtual time and in another order each",
    )
    seed = config.getoption("--aiorl-seed")
    if seed is not None:
        config.stash[_before] = os.environ.get(_SEED_VARIABLE)
        os.environ[_SEED_VARIABLE] = str(seed)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _before not in config.stash:
        return
    before = config.stash[_before]
    if before is None:
        os.environ.pop(_SEED_VARIABLE, None)
    else:
        os.environ[_SEED_VARIABLE] = before


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Innermost, so that a plugin for async tests sees an ordinary function and leaves it alone."""
    found = yield
    for item in found if isinstance(found, list) else [found]:
        marker = item.get_closest_marker(MARKER) if isinstance(item, pytest.Function) else None
        if marker is not None:
            item.obj = _simulated(item.obj, **{"seeds": SEEDS, **marker.kwargs})
    return found


def _simulated(test: Callable[..., Any], seeds: int, **options: float) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        from aiorl.testing.sim import explore

        def one(sim: Sim) -> None:
            given = {**kwargs, SIM: sim} if SIM in kwargs else kwargs
            result = test(*args, **given)
            if hasattr(result, "__await__"):
                sim.run(result)
            assert not sim.left, f"tasks that were not done when the test was: {sim.left}"
            assert not sim.problems, f"the event loop complained: {sim.problems}"

        explore(one, seeds, **options)

    return run


@pytest.fixture
def aiorl_sim() -> None:
    """The simulation that the test runs in, a `Sim`. Only for tests marked `aiorl_chaos`, which put it in place."""


@pytest.fixture
def aiorl_no_leaks() -> Iterator[None]:
    """Fail if the test leaves a task, a thread, a child process, an open pipe or socket, or a shared block."""
    before = belongings()
    yield
    left = left_behind(before)
    assert not left, f"left behind after the test: {left}"
