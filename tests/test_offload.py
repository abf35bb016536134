"""Blocking work on a thread of its own: order, errors, cancellation, and an end that never hangs."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable

import pytest

from aiorl.offload import OffloadThread


@pytest.fixture
async def thread() -> AsyncIterator[OffloadThread]:
    made = OffloadThread("test-offload")
    yield made
    assert await made.aclose(5)
    assert "test-offload" not in {t.name for t in threading.enumerate()}


async def test_calls_run_one_after_the_other_in_order_on_one_thread(thread: OffloadThread) -> None:
    seen: list[tuple[int, int]] = []
    await asyncio.gather(*(thread.run(lambda n=n: seen.append((n, threading.get_ident()))) for n in range(50)))
    assert [n for n, _ in seen] == list(range(50))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()


async def test_arguments_and_results(thread: OffloadThread) -> None:
    assert await thread.run(divmod, 17, 5) == (3, 2)
    assert await thread.run(int, "ff", base=16) == 255


async def test_an_error_comes_home_with_its_traceback_and_the_thread_goes_on(thread: OffloadThread) -> None:
    def fail() -> None:
        raise KeyError("deep down")

    with pytest.raises(KeyError, match="deep down") as caught:
        await thread.run(fail)
    assert any(entry.name == "fail" for entry in caught.traceback)
    assert await thread.run(lambda: "alive") == "alive"


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt("key"), asyncio.CancelledError("not ours"), StopIteration(1)], ids=repr
)
async def test_what_would_end_or_hang_the_host_comes_as_an_ordinary_error(
    thread: OffloadThread, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError, match=type(error).__name__) as caught:
        async with asyncio.timeout(5):
            await thread.run(fail)
    assert caught.value.__cause__ is error
    assert await thread.run(lambda: "alive") == "alive"


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_leaves_its_call_running_unheard(thread: OffloadThread, fails: bool) -> None:
    begun, let_go = threading.Event(), threading.Event()
    finished: list[str] = []

    def work() -> None:
        begun.set()
        assert let_go.wait(10)
        finished.append("done")
        if fails:
            raise ValueError("nobody hears this")

    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, problem: problems.append(problem))
    caller = asyncio.create_task(thread.run(work))
    while not begun.is_set():
        await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not finished
    let_go.set()
    assert await thread.run(lambda: list(finished)) == ["done"]
    assert not problems


async def test_closing_lets_queued_calls_end_and_refuses_new_ones() -> None:
    thread = OffloadThread("test-offload")
    seen: list[int] = []
    calls = [asyncio.create_task(thread.run(seen.append, n)) for n in range(5)]
    await asyncio.sleep(0)
    assert await thread.aclose(5)
    assert await thread.aclose(5), "closing again says the same"
    await asyncio.gather(*calls)
    assert seen == list(range(5))
    with pytest.raises(RuntimeError, match="test-offload is closed"):
        await thread.run(print)


async def test_closing_does_not_wait_for_a_stuck_call() -> None:
    thread = OffloadThread("test-offload")
    let_go = threading.Event()
    stuck = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    assert await thread.aclose(0.01) is False
    assert next(t for t in threading.enumerate() if t.name == "test-offload").daemon, "it would hold up the exit"
    let_go.set()
    assert await stuck
    assert await thread.aclose(5) is True


async def test_arguments_do_not_live_on_in_the_thread(thread: OffloadThread) -> None:
    class Big:
        pass

    big = Big()
    mark = weakref.ref(big)
    await thread.run(lambda b: None, big)
    del big
    async with asyncio.timeout(5):
        while mark() is not None:  # the thread may still be leaving the call
            await asyncio.sleep(0)


def test_a_host_that_closes_its_loop_meanwhile_hears_nothing_and_no_thread_stays() -> None:
    let_go, ended = threading.Event(), threading.Event()
    problems: list[object] = []
    before, threading.excepthook = threading.excepthook, problems.append

    async def host() -> None:
        thread = OffloadThread("test-offload")
        running = asyncio.create_task(thread.run(_wait_then(let_go, ended)))
        await asyncio.sleep(0)
        assert await thread.aclose(0.01) is False
        running.cancel()

    try:
        asyncio.run(host())
        let_go.set()
        assert ended.wait(5)
        for left in [t for t in threading.enumerate() if t.name == "test-offload"]:
            left.join(5)
            assert not left.is_alive()
    finally:
        threading.excepthook = before
    assert not problems


def _wait_then(let_go: threading.Event, ended: threading.Event) -> Callable[[], None]:
    def work() -> None:
        assert let_go.wait(10)
        ended.set()

    return work
