"""What the watchdog sees: pure looking without clocks; a blocked loop and a run that stands still with real ones."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Toy, ToyLearner

import aiorl
from aiorl.metrics.lag import LagMeter
from aiorl.watchdog import BLOCKED_S, LOOKS, TOLD_MAX, LoopWatch, Place, Row, Seen, Stillness, View, table

HERE = Path(__file__).name


def view(*movement: int, beats: int = 0, resting: bool = False) -> View:
    return View(movement, resting, [Row("train", "waits"), Row("worker 0", "in rollout 3", beats)])


def test_what_moves_is_not_still() -> None:
    still = Stillness(1.0)
    assert [still.look(view(step), float(step)) for step in range(5)] == [0.0] * 5
    assert [still.look(view(4), float(t)) for t in (5, 6, 7)] == [1.0, 2.0, 3.0]
    assert still.look(view(5), 8.0) == 0.0, "it moved"


def test_who_rests_is_not_still() -> None:
    still = Stillness(1.0)
    assert [still.look(view(1, resting=True), float(t)) for t in range(5)] == [0.0] * 5
    assert still.look(view(1), 5.0) == 1.0, "the pause was over, nothing moved"


def test_time_without_looking_counts_as_two_looks() -> None:
    still = Stillness(1.0)
    still.look(view(1), 0.0)
    assert still.look(view(1), 1000.0) == 2.0, "the program was stopped, or its loop blocked, for that long"
    assert still.look(view(1), 1001.0) == 3.0


def test_each_part_has_its_own_time() -> None:
    still = Stillness(1.0)
    views = [view(t, beats=min(t, 1)) for t in range(4)]
    for t, seen in enumerate(views):
        still.look(seen, float(t))
    assert (still.seconds, still.of) == (0.0, {"worker 0": 2.0})
    assert table(views[0].rows, still.of) == "  train     waits\n  worker 0  in rollout 3; last step 2 s ago"


# -- a blocked loop ----------------------------------------------------------------------------------------------------


def burn(seconds: float, until: Callable[[], object] = lambda: True) -> None:
    """Hold the loop up for so long, and until the watching thread got to work too, for where a machine is busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:  # the fault itself
        pass
    while not until():
        burn(0.1)


class Watched:
    """A loop that is watched, and what is told of it."""

    def __init__(self, limit_s: float = 60.0) -> None:
        self.told: list[str] = []
        self.stuck: list[str] = []
        self._limit_s = limit_s

    async def __aenter__(self) -> Watched:
        lag = LagMeter()
        self._watch = LoopWatch(lag, lambda: view(1), self._limit_s, self.told.append, self.stuck.append)
        self._task = asyncio.ensure_future(lag.measure(self._watch.turned))
        await asyncio.sleep(0.1)
        return self

    def was_seen(self) -> bool:
        return self._watch._seen.most() is not None

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.1)
        self._watch.close()
        self._task.cancel()
        await asyncio.wait([self._task])


async def test_a_blocked_loop_is_told_with_its_line(no_leaks: None) -> None:
    async with Watched() as watched:
        for _ in range(2):
            asyncio.get_running_loop().call_soon(burn, 2 * BLOCKED_S, watched.was_seen)
            await asyncio.sleep(0.2)
    assert len(watched.told) == 2
    for text in watched.told:
        assert re.search(r"the event loop was blocked for \d", text)
        assert f"{HERE}:" in text
        assert "(burn)" in text


def test_who_held_the_loop_up_is_told_and_not_who_came_after() -> None:
    seen = Seen()
    for place in (Place(burn.__code__, 1), Place(burn.__code__, 2), None, Place(view.__code__, 7)):
        seen.add(place)
    assert str(seen.most()).endswith(f"{HERE}:2 (burn)")
    assert Seen().most() is None, "not seen at all: it waited for the machine"


async def test_a_loop_that_waits_is_not_blocked() -> None:
    async with Watched() as watched:
        await asyncio.sleep(3 * BLOCKED_S)
    assert watched.told == []


async def test_it_does_not_go_on_about_it() -> None:
    async with Watched() as watched:
        for _ in range(3 * TOLD_MAX):
            watched._watch._seen.add(Place(burn.__code__, 1))
            watched._watch.turned(1.0)
    assert len(watched.told) == TOLD_MAX
    assert "no more of these" in watched.told[-1]


async def test_a_loop_that_is_stuck_is_cried_out_by_the_thread() -> None:
    async with Watched(limit_s=0.5) as watched:
        burn(1.2, lambda: watched.stuck)
        burn(0.2)
        assert len(watched.stuck) == 1, "it must be told while the loop is still stuck, and once"
    (text,) = watched.stuck
    assert "stall_timeout_s = 0.5" in text
    assert "  worker 0  in rollout 3" in text, "the table"
    assert ", in burn" in text, "the stack"


# -- a run that stands still -------------------------------------------------------------------------------------------


class Slow(Toy, frozen=True, kw_only=True):
    """Its learner never comes back from the third update, or takes `pieces` times `seconds` for each."""

    seconds: float = 0.0
    pieces: int = 1

    def learner(self, spaces: Any, context: Any) -> Any:
        return SlowLearner(self, spaces, context)


class SlowLearner(ToyLearner):
    def __init__(self, config: Any, spaces: Any, context: Any) -> None:
        super().__init__(config, spaces, context)
        self._go_on = context.go_on

    def update(self, rollout: Any) -> Any:
        config: Any = self._config
        for _ in range(config.pieces):
            if rollout.index == 3 or config.seconds:
                time.sleep(config.seconds or 6.0)  # the fault itself
            self._go_on()
        return super().update(rollout)


def config(out: Path, **changes: Any) -> aiorl.Config:
    fields: dict[str, Any] = {
        "env": "run_envs:Counting", "algo": Toy(), "total_steps": 10**6, "envs": 4, "group_size": 2, "workers": 1,
        "eval_every": 0, "eval_episodes": 4, "checkpoint_every": 0, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


@pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")
async def test_a_stalled_run_fails_and_says_who_waits_for_whom(tmp_path: Path) -> None:
    setting = config(tmp_path / "run", algo=Slow(), stall_timeout_s=3.0, step_timeout_s=2.9, start_timeout_s=2.9)
    events: list[Any] = []
    async with asyncio.timeout(30), aiorl.Run(setting) as run:
        events = [event async for event in run.events()]
        with pytest.raises(aiorl.StalledError, match=r"nothing has moved for .* s \(stall_timeout_s = 3\)") as caught:
            await run.wait()
    (stalled,) = (e for e in events if isinstance(e, aiorl.Stalled))
    assert stalled.table == caught.value.detail
    rows = dict(line.split(maxsplit=1) for line in stalled.table.splitlines())
    assert "in update 3 at " in rows["train"]
    assert "test_watchdog.py" in rows["train"]
    assert "(update)" in rows["train"], "not the line that holds it up"
    assert "between segments" in rows["worker"]
    assert "0 credits to answer" in rows["worker"]
    assert "rollouts" in rows["queues"]
    assert run.result.status == "failed"
    assert stalled.table in (run.directory / "error.txt").read_text()


@pytest.mark.parametrize("what", ["pause", "slow", "many gradient steps"])
async def test_a_run_that_rests_or_is_slow_has_not_stalled(tmp_path: Path, what: str) -> None:
    changes: dict[str, Any] = {"stall_timeout_s": 0.4, "step_timeout_s": 0.3, "start_timeout_s": 0.3, "workers": 0}
    if what == "slow":
        changes |= {"algo": Slow(seconds=0.1), "total_steps": 300}
    elif what == "many gradient steps":
        changes |= {"algo": Slow(seconds=0.1, pieces=12), "total_steps": 64}
    async with asyncio.timeout(60), aiorl.Run(config(tmp_path / "run", **changes)) as run:
        if what == "pause":
            await run.pause()
            await asyncio.sleep(1.0)  # time in which a stall would be found
            run.resume()
            run.stop(final_evaluation=False)
        result = await run.wait()
    assert result.status in ("completed", "stopped")
    assert LOOKS >= 10


@pytest.mark.parametrize("field", ["step_timeout_s", "start_timeout_s"])
def test_a_worker_may_not_take_longer_than_the_whole_run(field: str, tmp_path: Path) -> None:
    with pytest.raises(aiorl.ConfigError, match="stall_timeout_s = 50: a worker may take 60 s"):
        config(tmp_path, stall_timeout_s=50, **{field: 60.0})
    assert config(tmp_path).stall_limit_s == 300
    assert config(tmp_path, **{field: 1000.0}).stall_limit_s == 2000
