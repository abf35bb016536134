"""The fault catalogue, part 1: workers (F1-F8, F11, F12) and the loop (F19-F22). Each test is named by its row.

Real processes and real signals where the row says so; the deadlines in seconds are those of the rows, which leave room.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing.util
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kills import kill, mortal_runs, until, workers_of
from sims import Folder
from toys import Toy, ToyLearner

import aiorl
from aiorl.buffers.replay import gradient_steps_owed
from aiorl.channel import Channel, Closed
from aiorl.cli import main as cli
from aiorl.cli.session import SAME_REQUEST_S, run_async
from aiorl.learning import Trainer
from aiorl.metrics.directory import RunFiles
from aiorl.pacing import Pacer
from aiorl.testing import LEDGER_ENV, Mark, Pace, Recording, check_laws, explore, simulate
from aiorl.workers import memory
from aiorl.workers.launch import Launcher
from aiorl.workers.pool import ProcessWorkers
from aiorl.workers.supervision import Keeper
from bench.soak_checks import Resources, resources

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and workers need POSIX")

HERE = Path(__file__).parent
WORKERS, ENVS = 8, 16
FIVE_TIMES = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))]
TOY = Recording.of(Toy())
Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """The common set-up of the catalogue, a little shorter; with `deaths` the environments are `run_envs.Mortal`."""
    return mortal_runs(
        tmp_path,
        env=LEDGER_ENV, algo=Recording.of(Mark()), total_steps=20_000, envs=ENVS, group_size=2,
        segment_length=32, workers=WORKERS, off_policy_degree=2, eval_every=0, eval_episodes=4,
        checkpoint_every=0,
    )  # fmt: skip


@pytest.fixture
def cli_loop() -> None:
    """libuv makes a pipe for signals at its first loop, and keeps it: no leak of the test that happens to be the first."""
    run_async(asyncio.sleep(0))


async def stored(run: aiorl.Run, steps: int) -> None:
    """Wait until so many transitions are stored."""
    await anext(e async for e in run.events() if isinstance(e, aiorl.Updated) and e.env_steps >= steps)


async def next_update(run: aiorl.Run) -> None:
    version = run.status().version
    await until(lambda: run.status().version > version or run.status().state not in ("training", "waiting for data"))


def restarts(events: list[Any]) -> list[aiorl.WorkerRestarted]:
    return [event for event in events if isinstance(event, aiorl.WorkerRestarted)]


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", FIVE_TIMES)
async def test_f01_sigkill_of_one_worker(config: Make, no_leaks: None, seed: int) -> None:
    """Noticed within 100 ms, training goes on within 2 s, nothing lost, nothing twice."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), aiorl.Run(config(total_steps=10**7)) as run:
        seen = run.events(10**6)
        await stored(run, random.Random(seed).randint(1000, 6000))
        victim = workers_of(run)._keepers[3]
        worker = victim._worker
        assert victim.pid is not None
        death = asyncio.ensure_future(asyncio.to_thread(_time_of_death, victim.pid))
        await asyncio.sleep(0.05)  # for the thread to look
        begun_s = loop.time()
        kill(victim.pid)
        async with asyncio.timeout(5):
            await worker.ended.wait()
        noticed_s = loop.time()
        # The first of the five runs beside anything; a machine that is busy elsewhere says nothing about us.
        assert noticed_s - await death <= (0.1 if seed else 1.0), "noticed too late"
        await next_update(run)
        assert loop.time() - begun_s <= 2.0, "training went on too late"
        await until(lambda: victim.restarts == 1)
        before = victim._worker.beats
        await until(lambda: victim._worker.beats != before)
        assert loop.time() - begun_s <= 5.0, "the worker was back too late"
        await next_update(run)
        run.stop(final_evaluation=False)
        await run.wait()
    (back,) = restarts([event async for event in seen])
    assert back.worker == "worker 3"
    assert "SIGKILL" in back.reason
    assert set(run.result.dropped) <= {"stopped"}, "a kill loses nothing: the segment is collected again"
    check_laws(run)


def _time_of_death(pid: int) -> float:
    """When the kernel had ended a process: on a busy machine that comes some time after the signal."""
    import select

    fd = os.pidfd_open(pid)
    select.select([fd], [], [], 10)
    died_s = time.monotonic()
    os.close(fd)
    return died_s


@pytest.mark.parametrize("seed", FIVE_TIMES)
async def test_f02_sigkill_of_all_workers(config: Make, no_leaks: None, seed: int) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), aiorl.Run(config(total_steps=10**7)) as run:
        seen = run.events(10**6)
        await stored(run, random.Random(seed).randint(1000, 6000))
        version, begun_s = run.status().version, loop.time()
        for pid in workers_of(run).pids:
            kill(pid)  # no turn of the loop in between: as far as we can see at the same time
        await until(lambda: run.status().version > version + 3)  # more than had been collected by then
        assert loop.time() - begun_s <= 5.0
        run.stop(final_evaluation=False)
        await run.wait()
    assert {e.worker for e in restarts([event async for event in seen])} >= {f"worker {i}" for i in range(WORKERS)}
    check_laws(run)


async def test_f03_out_of_memory_raised(config: Make, no_leaks: None) -> None:
    setting = config([("raise", 57)], algo=TOY, total_steps=3000, workers=2).replace(env="run_envs:Hungry")
    async with asyncio.timeout(60), aiorl.Run(setting) as run:
        events = [event async for event in run]
    (back,) = restarts(events)
    assert re.search(r"failed in rollout 1, .*environment \d+, step \d+ of episode \d+: .*MemoryError", back.reason)
    assert run.result.status == "completed"
    assert run.result.dropped == {}
    check_laws(run)


async def test_f03_killed_for_memory(config: Make, no_leaks: None) -> None:
    """As the kernel does it."""
    async with asyncio.timeout(60), aiorl.Run(config([("kill", 57)], algo=TOY, total_steps=3000)) as run:
        events = [event async for event in run]
    (back,) = restarts(events)
    assert "SIGKILL (possibly out of memory)" in back.reason
    assert (run.result.status, run.result.dropped) == ("completed", {})
    check_laws(run)


def test_f04_an_environment_that_can_never_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cli_loop: None, no_leaks: None
) -> None:
    begun_s, made = time.monotonic(), []
    make = Launcher.process
    monkeypatch.setattr(Launcher, "process", lambda *args: made.append(args) or make(*args))
    out = tmp_path / "run"
    words = ["train", "run_envs:BadStart", "--env-kwargs", f"pid={os.getpid()}", "--envs", "16", "--group-size", "2"]
    assert cli([*words, "--workers", "8", "--progress", "none", "--out", str(out)]) == 1
    assert time.monotonic() - begun_s <= 10
    assert len(made) <= WORKERS + 3
    said = capsys.readouterr().err
    assert "no licence file" in said
    assert len(said.strip().splitlines()) <= 3
    text = (out / "error.txt").read_text()
    assert "BadStart" in text or "run_envs.py" in text, "the original traceback is lost"
    assert 'raise FileNotFoundError("no licence file")' in text


@pytest.mark.parametrize("env", ["Mortal", pytest.param("Deaf", marks=pytest.mark.long)])
async def test_f05_a_step_that_never_ends(config: Make, no_leaks: None, env: str) -> None:
    setting = config([("hang", 57)], algo=TOY, total_steps=3000, workers=2, step_timeout_s=2.0)
    async with asyncio.timeout(60), aiorl.Run(setting.replace(env=f"run_envs:{env}")) as run:
        events = [event async for event in run]
    (back,) = restarts(events)
    found = re.search(r"has not finished a step for (.*) s in rollout 1, step \d+ of the segment, environments", back.reason)
    assert found
    assert 2.0 <= float(found[1]) <= 3.0
    assert back.seconds_down <= (2.5 if env == "Deaf" else 2.0), "5 s in all, with those until it was noticed"
    assert (run.result.status, run.result.dropped) == ("completed", {})
    check_laws(run)


PROGRAM = """
import asyncio, sys
sys.path[:0] = sys.argv[2:]
import aiorl
from toys import Toy
async def main():
    config = aiorl.Config(env="run_envs:Counting", algo=Toy(), total_steps=10**8, envs=8, group_size=2, workers=4,
                          eval_every=0, checkpoint_every=500, out=sys.argv[1])
    async with aiorl.Run(config) as run:
        async for event in run.events():
            if isinstance(event, aiorl.Checkpointed):
                print("READY", flush=True)
asyncio.run(main())
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """With a path so short that sockets are made in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_f06_sigkill_of_the_parent(
    tmp_path: Path, short_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descendants after 2 s; the run says that it was killed, goes on from its checkpoint, and the leftovers are gone."""
    (tmp_path / "program.py").write_text(PROGRAM)
    out, temporary = tmp_path / "runs" / "one", short_folder
    command = [sys.executable, str(tmp_path / "program.py"), str(out), str(HERE), str(HERE.parent)]
    blocks = set(Path("/dev/shm").glob("aiorl*")) if Path("/dev/shm").is_dir() else set()
    environ = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "READY\n"
        descendants = list(_descendants(parent.pid))
        assert len(descendants) >= 5, "fewer than the workers"
        assert cli(["runs", str(tmp_path / "runs")]) == 0
        assert " running " in capsys.readouterr().out
        assert cli(["resume", str(out), "--progress", "none"]) == 2, "two processes must not write to one directory"
        assert f"is in use by process {parent.pid}" in capsys.readouterr().err
        parent.send_signal(signal.SIGKILL)
    ended_s = time.monotonic()
    for pid in descendants:
        _wait_until_gone(pid, 2.0 - (time.monotonic() - ended_s))
    assert {p for p in Path("/dev/shm").glob("aiorl*") if "test" not in p.name} <= blocks
    assert cli(["runs", str(tmp_path / "runs")]) == 0
    assert " killed " in capsys.readouterr().out

    (out / ".config.toml.tmp").touch()  # as if it had been killed while writing it
    left = list(temporary.glob("pymp-*"))
    assert left
    multiprocessing.util.get_temp_dir()  # this process has its own elsewhere
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.syspath_prepend(str(HERE))
    steps = json.loads(next(iter(sorted(out.glob("checkpoints/*/manifest.json"))[-1:])).read_text())["env_steps"]
    assert cli(["resume", str(out), "--steps", str(steps + 200), "--progress", "plain"]) == 0
    assert f"the last session was killed: going on from its checkpoint at {steps} env steps" in capsys.readouterr().err
    assert not any(path.exists() for path in left), "the folder with its sockets is still there"
    assert not list(out.rglob("*.tmp"))
    assert not (out / "run.lock").exists()
    assert cli(["runs", str(tmp_path / "runs")]) == 0
    assert " completed " in capsys.readouterr().out


def _descendants(pid: int) -> Iterator[int]:
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child
                yield from _descendants(child)


def _wait_until_gone(pid: int, timeout_s: float) -> None:
    import select

    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        ready, _, _ = select.select([fd], [], [], max(0.0, timeout_s))
        os.close(fd)
        assert ready, f"process {pid} outlived its parent"


class Program:
    """`aiorl train` in a process group of its own, in the middle of training. `laws.txt` says which laws it broke."""

    def __init__(self, folder: Path, *words: str, algo: str = "toys:Toy") -> None:
        self.out, self.made = folder / "run", folder / "made"
        self.made.mkdir()
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        command = [
            sys.executable, "-m", "laws_cli", "train", "run_envs:Closing", "--env-kwargs", f"folder={self.made}",
            "--algo", "aiorl.testing.recording:Recording", "--recording.algo", algo,
            "--steps", "100M", "--envs", "8", "--group-size", "2", "--workers", "2", "--out", str(self.out), *words,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        self.wait_for("updated")

    def wait_for(self, event: str, count: int = 1) -> None:
        """Until the run has told of so many events of a kind."""
        end_s = time.monotonic() + 30
        while self.told(event) < count:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end_s, f"no {event}"
            time.sleep(0.01)  # for a file that another process writes

    def told(self, event: str) -> int:
        path = self.out / "events.jsonl"
        return path.read_text().count(f'"event":"{event}"') if path.exists() else 0

    def ended(self) -> tuple[int, list[str], float]:
        """Exit code, lines on stderr, and the seconds it took from now."""
        begun_s = time.monotonic()
        _, text = self.process.communicate(timeout=30)
        return self.process.returncode, text.strip().splitlines(), time.monotonic() - begun_s


def assert_in_good_order(program: Program, descendants: list[int], code: int) -> None:
    got, lines, took_s = program.ended()
    assert (got, took_s <= 6.0) == (code, True), (got, took_s, lines)
    assert len(lines) <= 3, lines
    for pid in descendants:
        _wait_until_gone(pid, 2.0)
    summary = json.loads((program.out / "summary.json").read_text())
    assert summary["status"] == "stopped"
    ledger = summary["ledger"]
    assert ledger["produced"] == ledger["stored"] + ledger["dropped"]
    assert (program.out / "laws.txt").read_text() == ""
    versions = [int(path.name) for path in (program.out / "checkpoints").iterdir()]
    assert max(versions) == summary["updates"], "the last update was not saved"
    closed = [path.read_text() for path in program.made.iterdir()]
    assert set(closed) == {"closed\n"}, "every environment is to be closed once"
    assert not (program.out / "run.lock").exists()


@pytest.mark.parametrize("progress", ["none", pytest.param("plain", marks=pytest.mark.long)])
def test_f07_ctrl_c(tmp_path: Path, progress: str) -> None:
    program = Program(tmp_path, "--progress", progress)
    if progress == "plain":
        assert program.process.stderr is not None
        program.process.stderr.readline()  # the heading is no part of the end
    descendants = list(_descendants(program.process.pid))
    os.killpg(program.process.pid, signal.SIGINT)
    assert_in_good_order(program, descendants, 130)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_f08_a_signal_to_the_parent_only(tmp_path: Path, number: int, code: int) -> None:
    program = Program(tmp_path, "--progress", "none")
    descendants = list(_descendants(program.process.pid))
    program.process.send_signal(number)
    assert_in_good_order(program, descendants, code)


@pytest.mark.long
def test_f07_ctrl_c_twice(tmp_path: Path) -> None:
    program = Program(tmp_path, "--progress", "none")
    descendants = list(_descendants(program.process.pid))
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.process.stderr is not None
    assert "again" in program.process.stderr.readline(), "two signals of one kind at once would be one"
    time.sleep(SAME_REQUEST_S)  # and two shortly after one another are one request
    os.killpg(program.process.pid, signal.SIGINT)
    code, lines, took_s = program.ended()
    assert (code, took_s <= 6.0, len(lines) <= 3) == (130, True, True), (took_s, lines)
    for pid in descendants:
        _wait_until_gone(pid, 2.0)


@pytest.mark.long
def test_f07_ctrl_c_in_an_update_that_takes_for_ever(tmp_path: Path) -> None:
    """Good order has a deadline."""
    program = Program(tmp_path, "--progress", "none", "--shutdown-timeout", "1.5", algo="test_watchdog:Slow")
    program.wait_for("updated", 3)
    os.killpg(program.process.pid, signal.SIGINT)
    code, lines, took_s = program.ended()
    assert (code, len(lines) <= 3) == (130, True), lines
    assert 1.0 <= took_s <= 3.5, "it was waited for"
    assert "what was not saved is lost" in lines[-1]


@pytest.mark.long
def test_f07_ctrl_c_at_any_moment_of_the_start(tmp_path: Path) -> None:
    for number, delay_s in enumerate((0.2, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1)):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "aiorl", "train", "CartPole-v1", "--workers", "4", "--progress", "none"]
        with subprocess.Popen(
            [*command, "--steps", "100M", "--out", str(out)],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True, cwd=HERE.parent,
        ) as process:  # fmt: skip
            time.sleep(delay_s)  # the moment is the point
            os.killpg(process.pid, signal.SIGINT)
            _, text = process.communicate(timeout=30)
        if delay_s > 0.5:  # before that Python itself may still be starting
            assert (process.returncode, len(text.strip().splitlines()) <= 3) == (130, True), (delay_s, text)


@pytest.mark.long
def test_a_loop_that_is_blocked_for_good_ends_the_program(tmp_path: Path) -> None:
    """Nobody reads its output: the print blocks the loop, which can notice nothing any more. The watchdog's thread does."""
    command = [
        sys.executable, "-m", "aiorl", "train", "CartPole-v1", "--steps", "100M", "--workers", "2", "--progress", "json",
        "--out", str(tmp_path / "run"), "--step-timeout", "1", "--start-timeout", "5", "--stall-timeout", "5.5",
        "--eval-every", "0",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "started" in process.stdout.readline()
        descendants = list(_descendants(process.pid))
        said = process.stderr.read()  # nobody reads stdout
        assert process.wait(30) == 1
    assert "the event loop has been blocked for" in said
    assert "(show)" in said, "the line that blocks it"
    assert re.search(r"^  train +(waits for|in update)", said, re.M)
    assert re.search(r"^  worker 0 \(process \d+\) ", said, re.M)
    assert (tmp_path / "run" / "stall.txt").read_text() in said
    for pid in descendants:
        _wait_until_gone(pid, 2.0)


@pytest.mark.long
def test_sigusr1_saves_and_training_goes_on(tmp_path: Path) -> None:
    program = Program(tmp_path, "--progress", "none", "--checkpoint-every", "0")
    for count in (1, 2):
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for("checkpointed", count)
    before = program.told("updated")
    program.wait_for("updated", before + 1)
    program.process.send_signal(signal.SIGTERM)
    assert program.ended()[0] == 143


async def test_cancelling_the_task_around_a_run_is_like_a_stop(config: Make, no_leaks: None) -> None:
    runs: list[aiorl.Run] = []

    async def host() -> None:
        async with aiorl.Run(config(algo=Toy(), env="run_envs:Counting", workers=2, total_steps=10**7)) as run:
            runs.append(run)
            await run.wait()

    task = asyncio.ensure_future(host())
    await until(lambda: runs and runs[0].status().version > 3)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    (run,) = runs
    assert run.result.status == "stopped"
    assert aiorl.load(run.directory, which="latest", algo=Toy).version == run.result.updates, "nothing was saved at the end"


# -- what is refused before anything is started ------------------------------------------------------------------------


def test_f11_an_environment_that_workers_cannot_import(
    tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from run_envs import Counting

    class Local(Counting):
        pass

    def never(*_: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(Launcher, "process", never)
    monkeypatch.setattr(Launcher, "warm_up", never)
    for env in (lambda: Counting(), Local):  # noqa: PLW0108  # the lambda is the point
        begun_s = time.monotonic()
        with pytest.raises(aiorl.ConfigError, match=r"workers cannot import (a lambda|Local)"):
            asyncio.run(aiorl.train(config(env=env, algo=Toy())))
        assert time.monotonic() - begun_s <= 1.0
    program = tmp_path / "unguarded.py"
    program.write_text(
        "import asyncio, sys\n"
        f"sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "print('ONCE', flush=True)\n"
        "import aiorl\nfrom toys import Toy\nfrom run_envs import Counting\n"
        "class Mine(Counting): pass\n"
        f"asyncio.run(aiorl.train(aiorl.Config(env=Mine, algo=Toy(), workers=2, out={str(tmp_path / 'x')!r})))\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=30)
    assert done.stdout == "ONCE\n", "workers ran the program again"
    assert "aiorl.errors.ConfigError" in done.stderr
    assert "__main__" in done.stderr


def test_f12_no_shared_memory_and_too_few_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cli_loop: None, no_leaks: None
) -> None:
    words = ["train", "CartPole-v1", "--envs", "32", "--group-size", "2", "--workers", "4", "--progress", "none"]
    begun_s = time.monotonic()
    assert cli([*words, "--memory-gb", "0.00001", "--out", str(tmp_path / "a")]) == 2
    assert re.search(r"need .* GiB of shared memory, the limit is", capsys.readouterr().err)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory.os, "ftruncate", full)
    assert cli([*words, "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "MiB of shared memory cannot be had: No space left on device" in said
    assert "MiB of memory are available" in said
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert cli([*words, "--out", str(tmp_path / "c")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert re.search(r"need about \d+ open files, the limit is 64", capsys.readouterr().err)
    assert time.monotonic() - begun_s <= 9.0, "3 s each"


LARGE = ["CartPole-v1", "--envs", "32", "--group-size", "16", "--workers", "2", "--segment-length", "512"]
LARGE += ["--steps", "16384", "--eval-every", "0", "--eval-episodes", "1", "--progress", "none", "--no-preset"]
LARGE += ["--ppo.hidden", "8"]


def test_f12_memory_that_the_kernel_refuses(tmp_path: Path) -> None:
    """Really too little: no file of this process may be larger than 256 KiB, which goes for shared memory as well."""
    command = f"ulimit -f 512; exec {sys.executable} -m aiorl train {' '.join(LARGE)} --out {tmp_path / 'run'}"
    done = subprocess.run(["sh", "-c", command], cwd=HERE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(r"MiB of shared memory cannot be had: File too large; \d+ MiB of memory are available", done.stderr)


def test_f12_a_tiny_dev_shm_does_not_matter(tmp_path: Path) -> None:
    """64 KiB of /dev/shm, as in a container: our memory has no name there, so there is nothing to run out of."""
    tiny = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k none /dev/shm"
    if subprocess.run([*tiny, mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system of its own")
    train = f"{sys.executable} -m aiorl train {' '.join(LARGE)} --out {tmp_path / 'run'}"
    command = f"{mount} && {train}; code=$?; ls -A /dev/shm; exit $code"
    done = subprocess.run([*tiny, command], cwd=HERE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("files"), "something is left in /dev/shm"


# -- the loop ----------------------------------------------------------------------------------------------------------


def hog() -> None:
    end_s = time.perf_counter() + 0.8
    while time.perf_counter() < end_s:  # the fault itself
        pass


@pytest.mark.parametrize("step_timeout_s", [60.0, 0.3])
async def test_f19_a_callback_that_blocks_the_loop(config: Make, no_leaks: None, step_timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    setting = config(total_steps=10**7, workers=2, step_timeout_s=step_timeout_s)
    async with asyncio.timeout(60), aiorl.Run(setting) as run:
        seen = run.events(10**6)
        for _ in range(5):
            await next_update(run)
            loop.call_soon(hog)
            await asyncio.sleep(0.2)
        run.stop(final_evaluation=False)
        await run.wait()
    events = [event async for event in seen]
    told = [e.message for e in events if isinstance(e, aiorl.Warned) and "was blocked" in e.message]
    mine = [text for text in told if "test_catalogue_workers.py" in text and "(hog)" in text]
    assert 4 <= len(mine) <= 6, told
    assert all(float(re.findall(r"blocked for ([\d.]+) s", text)[0]) >= 0.7 for text in mine), mine
    assert restarts(events) == [], "a worker was judged by a loop that was late"


async def test_f19_the_whole_program_is_stopped_for_a_while(tmp_path: Path) -> None:
    """Ctrl-Z and fg: nobody is hung, nothing has stalled."""
    program = Program(tmp_path, "--progress", "none", "--step-timeout", "0.4")
    os.killpg(program.process.pid, signal.SIGSTOP)
    await asyncio.sleep(1.5)
    os.killpg(program.process.pid, signal.SIGCONT)
    before = program.told("updated")
    program.wait_for("updated", before + 50)
    assert program.told("worker_restarted") == 0
    program.process.send_signal(signal.SIGTERM)
    assert program.ended()[0] == 143


@pytest.mark.parametrize("where", ["update", "evaluation", "collect", "drain", "supervision", "files"])
async def test_f20_an_exception_anywhere_ends_the_run(
    config: Make, no_leaks: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    loop, unheard = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    setting = config(
        algo=Toy(), env="run_envs:Counting", workers=2, eval_every=200, total_steps=10**7, step_timeout_s=1.0
    )
    raised_s: list[float] = []

    def boom(*_: Any, **__: Any) -> Any:
        raised_s.append(time.monotonic())
        raise ArithmeticError("boom")

    async def boom_later(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(0.05)
        boom()

    async with aiorl.Run(setting) as run:
        target, name = {
            "update": (Trainer, "update"), "evaluation": (ProcessWorkers, "evaluate"),
            "collect": (ProcessWorkers, "collect"), "drain": (Pacer, "arrived"),
            "supervision": (Keeper, "_hangs"), "files": (RunFiles, "write"),
        }[where]  # fmt: skip
        monkeypatch.setattr(target, name, boom_later if where == "evaluation" else boom)
        with pytest.raises(aiorl.AiorlError, match="boom") as caught:
            async with asyncio.timeout(30):
                await run.wait()
        assert time.monotonic() - raised_s[0] <= 2.0
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert run.result.status == "failed"
    assert asyncio.all_tasks() == {asyncio.current_task()}
    import gc

    gc.collect()
    assert unheard == []


def test_f20_the_program_ends_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = tmp_path / "now"
    monkeypatch.setenv("FAIL_WHEN_THERE_IS", str(now))
    program = Program(tmp_path, "--progress", "none", algo="test_catalogue_workers:FailsThen")
    now.touch()
    code, lines, took_s = program.ended()
    assert (code, len(lines) <= 3) == (1, True), lines
    assert "planned failure" in "".join(lines)
    assert took_s <= 4.0, "2 s for the run, as above, and some for its laws and the end of the interpreter"
    assert (program.out / "laws.txt").read_text() == ""


class FailsThen(Toy, frozen=True):
    """Its update raises once there is a certain file."""

    def learner(self, spaces: Any, context: Any) -> Any:
        return FailsThenLearner(self, spaces, context)


class FailsThenLearner(ToyLearner):
    def update(self, rollout: Any) -> Any:
        if os.path.exists(os.environ["FAIL_WHEN_THERE_IS"]):
            raise RuntimeError("planned failure")
        return super().update(rollout)


async def test_f21_closing_a_queue_wakes_everybody() -> None:
    full: Channel[int] = Channel(4)
    for item in range(4):
        full.put_nowait(item)
    producers = [asyncio.ensure_future(full.put(10 + i)) for i in range(8)]
    empty: Channel[int] = Channel(4)
    consumers = [asyncio.ensure_future(empty.get()) for _ in range(3)]
    await asyncio.sleep(0)
    full.close()
    empty.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(task.done() for task in (*producers, *consumers)), "somebody sleeps on"
    assert all(isinstance(task.exception(), Closed) for task in (*producers, *consumers))
    assert [item async for item in full] == [0, 1, 2, 3], "what was accepted is delivered"


@pytest.mark.parametrize("scale", [1.0, pytest.param(50.0, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "pace", [Pace(segment_s=0.02, update_s=2.0), Pace(segment_s=2.0, update_s=0.02)],
    ids=["slow trainer", "slow collectors"],
)  # fmt: skip
def test_f22_one_side_a_hundred_times_slower(pace: Pace, scale: float) -> None:
    """A minute of virtual time, or an hour. The laws know the queues' bounds, the lag, the ratio of updates to data."""
    folder = Folder()

    def one(sim: Any) -> None:
        setting = folder.config(total_steps=1600, step_timeout_s=2000, start_timeout_s=60)
        slower = replace(pace, segment_s=scale * pace.segment_s, update_s=scale * pace.update_s)
        simulated = sim.run(simulate(sim, setting, pace=slower))
        simulated.check_laws()
        result = simulated.run.result
        assert (result.status, result.restarts) == ("completed", 0)
        assert result.updates * folder.config().steps_per_rollout == result.env_steps
        assert sim.now_s >= 60 * scale

    try:
        explore(one, seeds=1, limit_s=100_000)
    finally:
        folder.close()


async def lived(run: aiorl.Run, over_s: float) -> tuple[Resources, Resources, float, float]:
    """What the run holds at the beginning and end of some seconds, and the shares of a core that the training process and,
    each, the collecting ones use meanwhile."""
    pids = list(workers_of(run).pids)[:2]
    before, own_s, theirs_s, begun_s = resources(), time.process_time(), sum(map(_cpu_s, pids)), time.monotonic()
    await asyncio.sleep(over_s)
    took_s = time.monotonic() - begun_s
    shares = (time.process_time() - own_s) / took_s, (sum(map(_cpu_s, pids)) - theirs_s) / took_s / len(pids)
    return before, resources(), *shares


def assert_flat(before: Resources, after: Resources) -> None:
    """Memory of the training process and of all together: at most 10 % more."""
    assert after.rss <= 1.1 * before.rss
    assert after.family_anon <= 1.1 * before.family_anon
    assert after.descriptors <= before.descriptors


@pytest.mark.parametrize("over_s", [5.0, pytest.param(60.0, marks=pytest.mark.long)])
async def test_f22_a_slow_trainer(config: Make, no_leaks: None, over_s: float) -> None:
    """Updates take 100 times as long as what they are for takes to collect: collectors sleep, nothing piles up."""
    from test_watchdog import Slow

    setting = config(algo=Slow(seconds=0.5), env="run_envs:Counting", workers=2, total_steps=10**7, segment_length=8)
    async with asyncio.timeout(90 + over_s), aiorl.Run(setting) as run:
        await until(lambda: run.status().version == 3)  # they have filled what there is to fill
        before, after, _, share = await lived(run, over_s)
        run.stop(final_evaluation=False)
    assert share <= 0.05
    assert run.result.queue["high_water"] <= run.result.queue["bound"]
    assert_flat(before, after)


@pytest.mark.parametrize("over_s", [5.0, pytest.param(60.0, marks=pytest.mark.long)])
async def test_f22_slow_collectors(config: Make, no_leaks: None, over_s: float) -> None:
    """The trainer waits, and does not make up for it by learning from the same data more often than it is to."""
    ratio, warmup = 0.25, 64
    algo = aiorl.DQN(hidden=(8,), warmup=warmup, batch_size=16, update_ratio=ratio, capacity=2000)
    setting = config(
        algo=algo, env="catalogue_envs:Tardy", workers=2, envs=4, group_size=2, total_steps=10**7, segment_length=8
    )
    async with asyncio.timeout(90 + over_s), aiorl.Run(setting) as run:
        await until(lambda: run.status().env_steps > 2 * warmup)
        before, after, share, _ = await lived(run, over_s)
        run.stop(final_evaluation=False)
    result = run.result
    assert share <= 0.25, "it does not sleep"
    assert result.gradient_steps == gradient_steps_owed(result.env_steps, warmup, ratio) > 0
    assert_flat(before, after)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
