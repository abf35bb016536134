"""Environments written as coroutines: the same rows as from functions, side by side, exactly brought back."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from async_envs import Async, Plain, broken, unseeded, walk

from aiorl.envs.aborts import Aborts
from aiorl.envs.coroutines import AsFunctions, OwnLoop, run_apart
from aiorl.envs.episodes import run_episodes
from aiorl.envs.group import AsyncGroup, GroupCursor, advance, blocking_group, make_group
from aiorl.envs.make import Probe, make_env, probe
from aiorl.envs.single import SingleGroup
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError, EnvError, ReproductionError
from aiorl.segments import Segment
from tests.envs_for_tests import Broken, ByObs, Walk, layout, transitions


def look(env: Any, **kwargs: Any) -> Probe:
    return probe(resolve_env(env, kwargs, in_process=True))


async def opened(
    env: Any, n: int = 3, cursor: GroupCursor | None = None, limit: Any = None, **kwargs: Any
) -> tuple[AsyncGroup, Any]:
    found = look(env, **kwargs)
    group = make_group(found.spec, found.spaces, range(n), 5, limit)
    assert isinstance(group, AsyncGroup)
    await group.open(cursor)
    return group, found.spaces


async def collect(group: AsyncGroup, spaces: Any, steps: int, segments: int = 1) -> list[Segment]:
    parts = [layout(spaces, steps, len(group.envs)).allocate() for _ in range(segments)]
    for part in parts:
        await group.collect(ByObs(spaces), part, steps)
    return parts


def from_functions(env: Any, n: int, steps: int, **kwargs: Any) -> list[Segment]:
    found = look(env, **kwargs)
    group = make_group(found.spec, found.spaces, range(n), 5)
    assert isinstance(group, SingleGroup)
    group.open(None)
    segment = layout(found.spaces, steps, n).allocate()
    group.collect(ByObs(found.spaces), segment, steps)
    return [segment]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["box", "dict", "tuple"])
async def test_rows_are_those_of_the_same_environment_written_as_functions(kind: str, n: int):
    group, spaces = await opened(walk, n, kind=kind, seeded=True)
    rows = await collect(group, spaces, 40)
    expected = from_functions(Walk, n, 40, kind=kind, seeded=True)
    assert transitions(rows) == transitions(expected)
    finals = [part.final_at[: part.finals].tolist() for part in (*rows, *expected)]
    assert finals[0] == finals[1] != [], "last observations are kept in the order of environments, not of arrival"
    await group.close()


async def test_all_of_a_group_step_at_the_same_time():
    class Meets(Plain):
        """Steps and resets only together with two others."""

        together = asyncio.Barrier(3)

        async def reset(self, **_: Any) -> Any:
            await self.together.wait()
            return await super().reset()

        async def step(self, action: Any) -> Any:
            await self.together.wait()
            return await super().step(action)

    async with asyncio.timeout(10):
        group, spaces = await opened(Meets)
        await collect(group, spaces, 5)


async def test_a_group_of_one_makes_no_task():
    seen: set[int] = set()

    class Looks(Plain):
        async def step(self, action: Any) -> Any:
            seen.add(len(asyncio.all_tasks()))
            return await super().step(action)

    group, spaces = await opened(Looks, 1)
    await collect(group, spaces, 5)
    assert seen == {len(asyncio.all_tasks())}


@pytest.mark.parametrize("allowed", [1, 2])
async def test_the_limit_is_held_by_each_step_and_reset(allowed: int):
    running: list[int] = [0]
    most: list[int] = [0]

    class Counts(Async):
        async def _give_way(self) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            await asyncio.sleep(0)
            running[0] -= 1

    group, spaces = await opened(lambda: Counts(Walk()), 4, limit=asyncio.Semaphore(allowed))
    await collect(group, spaces, 20)
    assert most == [allowed]


def test_the_limit_of_functions_is_held_too():
    held: list[bool] = []
    limit = threading.Semaphore(1)

    class Looks(Walk):
        def step(self, action: Any) -> Any:
            held.append(limit.acquire(blocking=False))
            return super().step(action)

    found = look(Looks)
    group = make_group(found.spec, found.spaces, range(2), 0, limit)
    assert isinstance(group, SingleGroup)
    group.open(None)
    group.collect(ByObs(found.spaces), layout(found.spaces, 10, 2).allocate(), 10)
    assert held == [False] * 20
    assert limit.acquire(blocking=False)


async def test_episodes_that_are_not_finite_are_aborted_as_from_functions():
    rows: list[Segment] = []
    for env in (broken, Broken):
        found = look(env, fault="nan", at=3)
        tell: list[str] = []
        group = make_group(found.spec, found.spaces, range(2), 5, aborts=Aborts(range(2), 9, tell.append))
        rows.append(layout(found.spaces, 12, 2).allocate())
        for work in (group.open(None), group.collect(ByObs(found.spaces), rows[-1], 12)):
            if asyncio.iscoroutine(work):
                await work
        assert tell
    assert transitions(rows[:1]) == transitions(rows[1:])
    assert rows[0].columns["valid"].tolist() == rows[1].columns["valid"].tolist()


# -- brought back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 20])
async def test_open_episodes_are_brought_back_exactly(cut: int):
    group, spaces = await opened(walk, seeded=True)
    cursor = advance(None, (await collect(group, spaces, cut))[0])
    restored, _ = await opened(walk, seeded=True, cursor=cursor)
    assert transitions(await collect(group, spaces, 25)) == transitions(await collect(restored, spaces, 25))


async def test_one_that_does_not_reproduce_is_named_or_given_up():
    group, spaces = await opened(unseeded)
    cursor = advance(None, (await collect(group, spaces, 3))[0])
    with pytest.raises(ReproductionError, match=r"environment \d does not reproduce.* obs is another one"):
        await opened(unseeded, cursor=cursor)
    found = look(unseeded)
    again = make_group(found.spec, found.spaces, range(3), 5)
    assert isinstance(again, AsyncGroup)
    differences = await again.open(cursor, strict=False)
    assert [text.partition(" does")[0] for text in differences] == [f"environment {i}" for i in range(3)]
    assert (await collect(again, spaces, 3))[0].aborted.tolist() == [True] * 3


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"environment \d, step 4 of episode 0: obs is missing 'pos'"),
        ("four", r"environment \d, step 4 of episode 0: step\(\) expected to return"),
        ("raise", r"environment \d, step 4 of episode 0: step\(.*\) raised RuntimeError: the simulator fell over"),
        ("exit", r"environment \d, step 4 of episode 0: step\(.*\) raised SystemExit: 3"),
        ("nan", r"environment 0, step 3 of the segment: obs\.pos is nan"),
    ],
)
async def test_what_goes_wrong_is_named(fault: str, message: str, n: int):
    group, spaces = await opened(broken, n, fault=fault)
    with pytest.raises(EnvError, match=message):
        await collect(group, spaces, 6)
    with pytest.raises(EnvError, match=r"step 0 of episode 0: reset\(seed=\d+\) raised RuntimeError"):
        await opened(broken, n, fault="raise", at=0)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_cancellation_from_within_is_an_error_of_the_environment(n: int):
    """Else the task of its group would end without a word."""

    class Loses(Plain):
        async def step(self, action: Any) -> Any:
            reading = asyncio.get_running_loop().create_future()
            reading.cancel()
            return await reading

    group, spaces = await opened(Loses, n)
    with pytest.raises(EnvError, match=r"environment \d, step 1 of episode 0: step\(.*\) raised CancelledError"):
        await collect(group, spaces, 2)


class Waits(Plain):
    """The first one made does as it is told, the others wait for ever and note that they were ended."""

    count = itertools.count()
    ended: list[int]
    fails: bool

    def __init__(self) -> None:
        self._number = next(self.count)

    async def step(self, action: Any) -> Any:
        if self._number == 0 and self.fails:
            raise ValueError("the first")
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(self._number)


def waiting(fails: bool) -> tuple[type[Waits], Any]:
    kind = type("Waits", (Waits,), {"count": itertools.count(-1), "ended": [], "fails": fails})  # -1 is looked at
    return kind, kind


async def test_the_first_error_ends_the_others():
    kind, env = waiting(fails=True)
    group, spaces = await opened(env)
    async with asyncio.timeout(10):
        with pytest.raises(EnvError, match=r"environment 0.* raised ValueError: the first"):
            await collect(group, spaces, 1)
    assert sorted(kind.ended) == [1, 2]


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_ends_all(n: int):
    kind, env = waiting(fails=False)
    group, spaces = await opened(env, n)
    before = asyncio.all_tasks()
    task = asyncio.create_task(collect(group, spaces, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(kind.ended) == list(range(n))
    assert asyncio.all_tasks() == before
    await group.close()


async def test_what_stops_a_collection_comes_through_as_it_is():
    class Enough(Exception):
        pass

    def stop(t: int) -> None:
        raise Enough

    group, spaces = await opened(walk)
    with pytest.raises(Enough):
        await group.collect(ByObs(spaces), layout(spaces, 3, 3).allocate(), 3, stop)


# -- the first look ----------------------------------------------------------------------------------------------------


def test_a_probe_tells_and_closes():
    made: list[Async] = []

    def make() -> Async:
        made.append(walk())
        return made[-1]

    found = look(make)
    assert found.spec.coroutines
    assert not found.native
    assert [env.closed for env in made] == [1]
    assert found.spaces == look(Walk).spaces
    assert not look(Walk).spec.coroutines


def test_close_may_be_left_out_or_a_function():
    assert look(Plain).spec.coroutines
    closed: list[int] = []
    assert look(type("Closes", (Plain,), {"close": lambda self: closed.append(1)})).spec.coroutines
    assert closed == [1]


class StepOnly(Plain):
    def reset(self, **_: Any) -> Any:  # type: ignore[override]
        return np.zeros(2, np.float32), {}


class ResetOnly(Plain):
    def step(self, action: Any) -> Any:  # type: ignore[override]
        return np.zeros(2, np.float32), 1.0, False, False, {}


class Inherits(gymnasium.Env[Any, Any]):
    observation_space, action_space = Plain.observation_space, Plain.action_space

    async def step(self, action: Any) -> Any:  # type: ignore[override]
        return np.zeros(2, np.float32), 1.0, False, False, {}


class Spaceless:
    reset, step = Plain.reset, Plain.step


async def made_later() -> Plain:
    return Plain()


class Whole(gymnasium.Env[Any, Any]):
    observation_space, action_space = Plain.observation_space, Plain.action_space
    reset, step = Plain.reset, Plain.step  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (StepOnly, r"StepOnly: step\(\) is `async def`, reset\(\) is not\n  write both"),
        (ResetOnly, r"ResetOnly: reset\(\) is `async def`, step\(\) is not"),
        (Inherits, r"Inherits: step\(\) is `async def`, reset\(\) is not"),
        (Spaceless, r"Spaceless has no observation_space\n  set it in __init__"),
        (made_later, r"made_later is an `async def`\n.*plain function, connect in its reset"),
        (lambda: gymnasium.wrappers.TimeLimit(Whole(), 5), r"the wrapper TimeLimit cannot be put around .*\n  leave it out"),
        (object, r"made a object, expected a gymnasium.Env\n.*or write reset and step with `async def`"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_way_out(env: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        look(env)


def test_functions_that_return_coroutines_are_told():
    class Returns(Walk):
        def step(self, action: Any) -> Any:
            return Plain().step(action)

    class ReturnsFromReset(Walk):
        def reset(self, **_: Any) -> Any:
            return Plain().reset()

    found = look(Returns)
    group = blocking_group(found.spec, found.spaces, range(1), 0)
    group.open(None)
    with pytest.raises(EnvError, match=r"step\(\) returned a coroutine to be awaited\n.*`async def`"):
        group.collect(ByObs(found.spaces), layout(found.spaces, 2, 1).allocate(), 2)
    found = look(ReturnsFromReset)
    with pytest.raises(EnvError, match=r"reset\(\) returned a coroutine to be awaited"):
        blocking_group(found.spec, found.spaces, range(1), 0).open(None)


async def test_a_registered_id_is_freed_from_wrappers():
    gymnasium.register("aiorl-tests/Async-v0", Whole)
    gymnasium.register("aiorl-tests/AsyncLimited-v0", Whole, max_episode_steps=5)
    try:
        group, spaces = await opened("aiorl-tests/Async-v0")
        assert (await collect(group, spaces, 2))[0].env_steps == 6
        with pytest.raises(ConfigError, match=r"the wrapper TimeLimit .*\n.*max_episode_steps"):
            look("aiorl-tests/AsyncLimited-v0")
    finally:
        del gymnasium.registry["aiorl-tests/Async-v0"], gymnasium.registry["aiorl-tests/AsyncLimited-v0"]


# -- used by functions -------------------------------------------------------------------------------------------------


def same_episodes(run: Callable[..., Any]) -> None:
    found, functions = look(walk, seeded=True), look(Walk, seeded=True)
    got = run(found.spec, found.spaces, ByObs(found.spaces), 8, 1, 3)
    expected = run_episodes(functions.spec, functions.spaces, ByObs(functions.spaces), 8, 1, 3)
    assert [a.tolist() for a in got] == [a.tolist() for a in expected]


def test_whole_episodes_are_those_of_functions():
    same_episodes(run_episodes)


async def test_whole_episodes_also_beside_a_running_loop():
    same_episodes(run_episodes)


def test_episodes_of_a_batch_step_at_the_same_time():
    class Meets(Async):
        together = asyncio.Barrier(4)

        async def _give_way(self) -> None:
            async with asyncio.timeout(10):
                await self.together.wait()

    class Steady(Walk):
        def step(self, action: Any) -> Any:
            return super().step(0)  # all episodes end by their limit, in the same step

    found = look(type("Quiet", (Plain,), {"observation_space": Walk().observation_space}))
    spec = look(Plain).spec
    spec = type(spec)(spec.name, target=lambda: Meets(Steady()), coroutines=True)
    _, lengths = run_episodes(spec, found.spaces, ByObs(found.spaces), 8, 0, 4)
    assert lengths.tolist() == [7] * 8


def test_environments_are_closed_when_episodes_are_stopped():
    made: list[Async] = []

    def make() -> Async:
        made.append(walk())
        return made[-1]

    def stop(t: int) -> None:
        raise TimeoutError

    found = look(make)
    with pytest.raises(TimeoutError):
        run_episodes(found.spec, found.spaces, ByObs(found.spaces), 4, 0, 2, on_step=stop)
    assert [env.closed for env in made] == [1] * 3


async def test_one_environment_as_functions():
    class Draws(Async):
        metadata = {"render_modes": ["ansi"]}

        async def render(self) -> str:
            return f"at {self.env.x}"

    async_spec = resolve_env(lambda: Draws(Walk()), in_process=True)
    env, plain = make_env(async_spec), Walk()
    assert isinstance(env, AsFunctions)
    for seed in (1, 2):
        assert env.reset(seed=seed)[0].tolist() == plain.reset(seed=seed)[0].tolist()
        assert env.step(1)[1:] == plain.step(1)[1:]
    assert (env.render(), env.metadata, env.env.t) == ("at 1.0", Draws.metadata, 1)
    threads = {thread.name for thread in threading.enumerate()}
    env.close()
    env.close()
    assert threads - {thread.name for thread in threading.enumerate()} == {"aiorl-async-envs"}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), ValueError("x")])
def test_whatever_a_coroutine_raises_is_heard(error: BaseException):
    async def fails() -> None:
        raise error

    expected = RuntimeError if isinstance(error, asyncio.CancelledError) else type(error)
    with pytest.raises(expected):
        run_apart(fails())


def test_a_loop_that_is_closed_leaves_nothing_running():
    ended: list[int] = []

    async def stays() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(stays())
        await asyncio.sleep(0)
        return task

    loop = OwnLoop()
    task = loop.run(start())
    loop.close()
    loop.close()
    assert ended == [1]
    assert task.cancelled()
