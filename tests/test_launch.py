"""Starting worker processes: what the launcher leans on in Python and aiomultiprocess, with real processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import aiomultiprocess.core
import pytest

import aiorl
from aiorl.workers.launch import Launcher, WorkerProcess, remove_leftovers
from aiorl.workers.memory import SharedBlock
from aiorl.workers.program import prepare

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")


@pytest.fixture(params=["forkserver", "spawn"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    launcher = Launcher(method=request.param)
    yield launcher
    launcher.close()


async def report(block: SharedBlock) -> None:
    """In the child: write down what it sees."""
    running = asyncio.get_running_loop().is_running()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    main = sys.modules["__main__"]
    print("printed by the worker", flush=True)
    block.buffer[:4] = bytes([running, ignored, hasattr(main, "pytest_marker"), "torch" in sys.modules])


async def fail() -> None:
    raise LookupError("as planned")


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


def start(launcher: Launcher, target: Any, *args: Any, log: Path | None = None) -> WorkerProcess:
    process = launcher.process("test-worker", target, args, prepare, (str(log) if log else None,))
    process.start()
    return process


def wait(process: WorkerProcess) -> int | None:
    assert connection.wait([process.sentinel], 20), "the process did not end"
    process.aio_process.join(20)  # the sentinel may be ahead of the exit code
    return process.exitcode


def test_a_worker_runs_its_coroutine_on_shared_memory(launcher: Launcher, tmp_path: Path) -> None:
    block = SharedBlock(16)
    log = tmp_path / "worker.log"
    process = start(launcher, report, block, log=log)
    assert wait(process) == 0
    running, ignored, main_imported, torch_imported = block.buffer[:4]
    assert running, "no event loop in the worker"
    assert ignored, "a Ctrl-C in the terminal would end the worker behind the run's back"
    assert not main_imported
    assert not torch_imported
    assert "printed by the worker" in log.read_text()
    block.close()


def test_its_failure_is_in_the_log_and_in_the_exit_code(launcher: Launcher, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    assert wait(start(launcher, fail, log=log)) == 1
    assert "LookupError: as planned" in log.read_text()


def test_a_killed_worker_shows_at_the_sentinel(launcher: Launcher) -> None:
    process = start(launcher, wait_for_ever)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL


def test_the_host_keeps_its_own_settings(launcher: Launcher) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    assert wait(start(launcher, report, SharedBlock(16))) == 0
    assert aiomultiprocess.core._manager is None, "a Manager process was started"
    assert multiprocessing.forkserver._forkserver._forkserver_pid is None, "Python's global fork server was used"  # type: ignore[attr-defined]
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_many_workers_from_one_fork_server_end_with_it() -> None:
    launcher = Launcher()
    processes = [start(launcher, wait_for_ever) for _ in range(8)]
    assert len({p.pid for p in processes}) == 8
    for process in processes:
        process.terminate()
    assert [wait(process) for process in processes] == [-signal.SIGTERM] * 8
    launcher.close()
    launcher.close()


async def leave_one_behind(block: SharedBlock) -> None:
    """In the child: start a process that outlives it, as an environment may."""
    left = os.fork()
    if left == 0:
        signal.pause()
    block.buffer[:8] = left.to_bytes(8, "little")


def test_whatever_a_worker_leaves_behind_is_not_waited_for() -> None:
    launcher, block = Launcher(), SharedBlock(16)
    assert wait(start(launcher, leave_one_behind, block)) == 0
    closing = threading.Thread(target=launcher.close, daemon=True)
    closing.start()
    closing.join(20)
    try:
        assert not closing.is_alive(), "leaving waits for what an environment has started"
    finally:
        os.kill(int.from_bytes(block.buffer[:8], "little"), signal.SIGKILL)
        closing.join(20)
    block.close()


def test_nobody_else_is_killed_in_place_of_a_fork_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, killed = Launcher(), list[int]()
    launcher.warm_up()
    pid: int = launcher._server._forkserver_pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # as a host does that reaps whatever has ended
    monkeypatch.setattr(os, "kill", lambda number, _: killed.append(number))
    launcher.give_up()
    launcher.close()
    assert killed == []


def test_a_host_may_have_its_children_reaped() -> None:
    """As daemons do that want no zombies: then nobody can be waited for."""
    launcher, block = Launcher(), SharedBlock(16)
    launcher.warm_up()
    assert launcher._mark is not None
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert wait(start(launcher, report, block)) == 0
        socket, mark = Path(launcher._server._forkserver_address), launcher._mark.path  # type: ignore[attr-defined]
        assert socket.exists()
        launcher.close()
        launcher.close()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not socket.exists()
    assert not mark.exists()
    block.close()


async def have_children(block: SharedBlock) -> None:
    """In the child: start processes in each way, as environments with a simulator of their own do."""
    for method in ("fork", "spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=os.getpid)
        child.start()
        child.join()
        block.buffer[0] += child.exitcode == 0


def test_a_worker_may_have_children(launcher: Launcher) -> None:
    block = SharedBlock(16)
    process = start(launcher, have_children, block)
    assert process.aio_process.daemon, "the host would wait for it at its exit"
    assert wait(process) == 0
    assert block.buffer[0] == 3
    block.close()


async def list_inheritable(block: SharedBlock) -> None:
    """In the child: what a program that is started here would get."""
    fds = [int(name) for name in os.listdir("/proc/self/fd")]
    given = [fd for fd in fds if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(fd)]
    block.buffer[0] = len(given)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed by /proc")
def test_programs_that_a_worker_starts_get_nothing_of_the_run() -> None:
    launcher, block = Launcher(), SharedBlock(16)
    assert wait(start(launcher, list_inheritable, block)) == 0
    assert block.buffer[0] == 0
    launcher.close()
    block.close()


@pytest.mark.skipif(sys.platform != "linux", reason="modules are shared on Linux only")
def test_workers_find_modules_of_the_fork_server_in_memory() -> None:
    """One that is not there is left to whoever makes the environment, who can say what is missing."""
    launcher, block = Launcher(modules=["there_is_no_such_module", "colorsys"]), SharedBlock(16)
    assert wait(start(launcher, see_modules, block)) == 0
    assert bytes(block.buffer[:2]) == bytes([True, False])
    launcher.close()
    block.close()


@pytest.mark.skipif(sys.platform != "linux", reason="modules are shared on Linux only")
@pytest.mark.parametrize("way", ["launching", "not yet"])
def test_a_fork_server_that_still_loads_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launcher, block = Launcher(modules=["slow_module"]), SharedBlock(16)
    launcher.warm_up()
    failures: list[BaseException] = []

    def launch() -> None:
        try:
            start(launcher, see_modules, block)
        except OSError as error:
            failures.append(error)

    launching = threading.Thread(target=launch)
    if way == "launching":
        launching.start()
        launching.join(0.2)
        launcher.give_up()
        launching.join(20)
        assert not launching.is_alive()
        assert len(failures) == 1
    begun = time.monotonic()
    launcher.close()
    assert time.monotonic() - begun < 20
    block.close()


def test_a_fork_server_that_serves_is_not_given_up(launcher: Launcher) -> None:
    block = SharedBlock(16)
    assert wait(start(launcher, see_modules, block)) == 0
    launcher.give_up()
    assert wait(start(launcher, see_modules, block)) == 0
    block.close()


async def see_modules(block: SharedBlock) -> None:
    block.buffer[:2] = bytes(["colorsys" in sys.modules, "chunk" in sys.modules])


PROGRAM = """
from pathlib import Path
from multiprocessing import util
from aiorl.workers.launch import Launcher
launcher = Launcher()
launcher.warm_up()
print(util.get_temp_dir())
launcher.close()
"""


def test_a_long_temporary_folder_is_no_hindrance(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert len(str(folder)) < 84
    assert not folder.exists(), "left behind"


def test_where_it_is_too_late_for_another_folder_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(tmp_path / ("long" * 30)))  # type: ignore[attr-defined]
    with pytest.raises(aiorl.ConfigError, match=r"too long a path.*\n  set TMPDIR"):
        Launcher().warm_up()


def test_leftovers_of_the_dead_are_removed_and_nothing_of_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folders = {name: tmp_path / f"pymp-{name}" for name in ("dead", "living", "used", "foreign")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "listener-abc").touch()
    (folders["dead"] / f"aiorl-{gone.pid}-0.lock").touch()
    (folders["living"] / f"aiorl-{os.getpid()}-0.lock").touch()  # made, and about to be locked
    (folders["used"] / f"aiorl-{gone.pid}-0.lock").touch()
    (folders["used"] / "something-else").touch()
    remove_leftovers()
    assert {name for name, folder in folders.items() if folder.exists()} == {"living", "used", "foreign"}
