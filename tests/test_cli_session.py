"""How the command line carries a run: signals, exit codes, what is written and said. With a made-up Run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiorl.cli import INTERRUPTED, TERMINATED, main, session
from aiorl.errors import ConfigError, WorkerError
from aiorl.events import AnyEvent, Checkpointed, CheckpointFailed
from tests.cli_events import run_events
from tests.test_progress import summary

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


class Summary(msgspec.Struct):
    fields: dict[str, Any]


class FakeRun:
    """Goes through a few events; `script` may act on the run after each one."""

    script: Callable[[FakeRun, int], Any] | None = None
    fails: Exception | None = None
    refuses: Exception | None = None
    home: Path

    def __init__(self, config: Any, *, resume: Any = None) -> None:
        self.config, self.resumed_from = config, resume
        self.stopped: list[bool] = []
        self.checkpoints = 0
        self.left = False
        type(self).last = self

    last: FakeRun

    async def __aenter__(self) -> FakeRun:
        if self.refuses is not None:
            raise self.refuses
        self.home.mkdir(exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left = True

    @property
    def directory(self) -> Path:
        if not self.home.is_dir():
            raise RuntimeError("not entered")
        return self.home

    @property
    def result(self) -> dict[str, Any]:
        return summary()

    def when_stuck(self, action: Callable[[], object]) -> None:
        self.action = action

    def stop(self, *, final_evaluation: bool = True) -> None:
        self.stopped.append(final_evaluation)

    async def checkpoint(self) -> Path:
        self.checkpoints += 1
        return self.home

    async def events(self, keep: int) -> AsyncIterator[AnyEvent]:
        with (self.home / "events.jsonl").open("wb") as file:
            for index, event in enumerate(run_events(10)):
                file.write(msgspec.json.encode(event) + b"\n")
                yield event
                if self.script is not None:
                    type(self).script(self, index)  # type: ignore[misc]
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if self.stopped:
                    return

    async def wait(self) -> None:
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeRun]:
    kind = type("Fake", (FakeRun,), {"home": tmp_path / "run"})
    monkeypatch.setattr(session, "Run", kind)
    return kind


def train(*words: str) -> int:
    return main(["train", "CartPole-v1", "--progress", "none", *words])


def test_summary_on_stdout_and_curve_in_the_directory(fake: type[FakeRun], capsys: pytest.CaptureFixture[str]):
    assert train() == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("completed")
    assert seen.err == ""
    assert "<svg" in (fake.home / "curve.svg").read_text(encoding="utf-8")
    assert fake.last.left


def test_json_lines_alone_on_stdout(fake: type[FakeRun], capsys: pytest.CaptureFixture[str]):
    assert train("--progress", "json") == 0
    seen = capsys.readouterr()
    rows = [msgspec.json.decode(line) for line in seen.out.splitlines()]
    assert (rows[0]["event"], rows[-1]["event"]) == ("started", "finished")
    assert seen.err.startswith("completed")


def test_failure_is_one_message_with_the_path_of_its_traceback(fake: type[FakeRun], capsys: pytest.CaptureFixture[str]):
    fake.fails = WorkerError("worker 1 died with exit code -9\n  look for memory")
    assert train() == 1
    text = capsys.readouterr().err
    assert text.startswith("error: worker 1 died with exit code -9\n")
    assert len(text.strip().splitlines()) == 3
    path = fake.home / "error.txt"
    assert str(path) in text
    assert "worker 1 died" in path.read_text(encoding="utf-8")
    assert (fake.home / "curve.svg").is_file()


def test_foreign_errors_are_short_too(fake: type[FakeRun], capsys: pytest.CaptureFixture[str]):
    fake.fails = ZeroDivisionError("by zero")
    assert train() == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ZeroDivisionError: by zero")
    assert "error.txt" in text


def test_refused_run_leaves_nothing(fake: type[FakeRun], capsys: pytest.CaptureFixture[str]):
    fake.refuses = ConfigError("no such thing\n  do something else")
    assert train() == 2
    assert capsys.readouterr().err == "error: no such thing\n  do something else\n"
    assert not fake.home.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_first_signal_stops_in_good_order(fake: type[FakeRun], number: int, code: int, capsys: pytest.CaptureFixture[str]):
    fake.script = lambda run, index: os.kill(os.getpid(), number) if index == 3 else None
    assert train() == code
    seen = capsys.readouterr()
    assert fake.last.stopped == [False]
    assert len(seen.err.strip().splitlines()) == 1
    assert "again ends at once" in seen.err
    assert seen.out.startswith("completed"), "the summary of what was done"


def test_second_signal_ends_at_once(fake: type[FakeRun], monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    monkeypatch.setattr(session, "GRACE_S", 0.0)
    monkeypatch.setattr(session, "SAME_REQUEST_S", 0.0)
    monkeypatch.setattr(session, "Signals", lambda say: REAL_SIGNALS(say, ended.append))
    fake.stop = lambda self, *, final_evaluation: None  # type: ignore[method-assign]  # one that takes its time
    fake.script = lambda run, index: os.kill(os.getpid(), signal.SIGINT) if index in (3, 5) else None
    assert train() == INTERRUPTED
    assert fake.last.left, "leaving the run is what ends its workers"
    assert set(ended) <= {INTERRUPTED}


REAL_SIGNALS = session.Signals


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_come_together_are_one_request(fake: type[FakeRun], second: int, capsys: pytest.CaptureFixture[str]):
    """As `timeout` sends them: to the program, then to its group."""
    asked: list[bool] = []

    def script(run: FakeRun, index: int) -> None:
        if index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        elif index == 4:
            os.kill(os.getpid(), second)
        elif index == 6:
            assert asked == [False]
            run.stopped = asked

    fake.stop = lambda self, *, final_evaluation: asked.append(final_evaluation)  # type: ignore[method-assign]
    fake.script = script
    assert train() == TERMINATED
    assert "at once:" not in capsys.readouterr().err
    assert fake.last.stopped == [False]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (["checkpoints/00000009", "final"], "everything is saved; the evaluation under way was cut off"),
        (["checkpoints/00000009"], "ended at once: what was not saved is lost"),
        (["", "final"], "ended at once: what was not saved is lost"),  # the state could not be written
        (["", "checkpoints/00000009", "final"], "everything is saved; the evaluation under way was cut off"),
    ],
)
def test_what_an_end_at_once_loses_is_said(
    fake: type[FakeRun], end: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The deadline of good order comes when all but an evaluation may be over."""
    place = {"seconds": 1.0, "version": 9, "env_steps": 9}

    async def events(self: FakeRun, keep: int) -> AsyncIterator[AnyEvent]:
        (self.home / "events.jsonl").touch()
        os.kill(os.getpid(), signal.SIGINT)
        for path in end:
            yield Checkpointed(**place, path=path, kind="final") if path else CheckpointFailed(**place, reason="full")
        await asyncio.Event().wait()

    fake.events = events  # type: ignore[method-assign]
    monkeypatch.setattr(session, "Signals", lambda say: REAL_SIGNALS(say, lambda code: None))  # the process goes on
    assert train("--shutdown-timeout", "0.2") == INTERRUPTED
    seen = capsys.readouterr()
    assert said in seen.err
    assert seen.out.startswith("completed") == said.startswith("everything"), "the summary of what was saved"


def test_sigusr1_saves_and_goes_on(fake: type[FakeRun]):
    fake.script = lambda run, index: os.kill(os.getpid(), signal.SIGUSR1) if index in (3, 5) else None
    assert train() == 0
    assert fake.last.checkpoints == 2
    assert not fake.last.stopped


def test_handlers_are_gone_afterwards(fake: type[FakeRun]):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert train() == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
