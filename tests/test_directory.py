"""The run directory: where it is, and what the files in it hold after warm-up, a resume or a kill."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_broadcast import finished, frequent, important
from test_events import example

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.events import AnyEvent, Progress, Updated
from aiorl.metrics import directory
from aiorl.metrics.directory import (
    CSV_COLUMNS,
    RunFiles,
    append_whole,
    choose_directory,
    make_writable,
    write_atomically,
)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(**changes: Any) -> Config:
    return Config(env="CartPole-v1", seed=3, **changes)


def updated(n: int, **metrics: float) -> Updated:
    event = frequent(n)
    return Updated(**{name: getattr(event, name) for name in event.__struct_fields__ if name != "metrics"}, metrics=metrics)


def write(files: RunFiles, *events: AnyEvent, rollouts: tuple[int, ...] = ()) -> None:
    for event in events:
        files.event(event)
    for k in rollouts:
        files.rollout({"k": k, "b_k": k, "order": [0]})
    files.write(files.take())


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def table() -> list[dict[str, str]]:
    with open("metrics.csv", newline="") as file:
        return list(csv.DictReader(file, strict=True))


# -- which directory ---------------------------------------------------------------------------------------------------


def test_the_first_free_name_under_runs() -> None:
    assert choose_directory(config(), "CartPole-v1", "ppo") == Path("runs/CartPole-v1-ppo-3")
    assert not Path("runs").exists(), "looking makes nothing"
    assert choose_directory(config(), "CartPole-v1", "ppo", create=True) == Path("runs/CartPole-v1-ppo-3")
    assert choose_directory(config(), "CartPole-v1", "ppo", create=True) == Path("runs/CartPole-v1-ppo-3-2")
    assert choose_directory(config(), "ALE/Pong-v5", "dqn") == Path("runs/Pong-v5-dqn-3")
    assert choose_directory(config(), "my.module:Env.make", "ppo") == Path("runs/my.module.Env.make-ppo-3")


def test_two_runs_that_start_together_get_directories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run makes its directory between looking and making."""
    real = Path.exists

    def exists(path: Path, **given: Any) -> bool:
        seen = real(path, **given)
        if not seen and path.name == "CartPole-v1-ppo-3":
            path.mkdir(parents=True)
        return seen

    monkeypatch.setattr(Path, "exists", exists)
    assert choose_directory(config(), "CartPole-v1", "ppo", create=True) == Path("runs/CartPole-v1-ppo-3-2")


def test_a_directory_that_is_asked_for() -> None:
    assert choose_directory(config(out="here"), "CartPole-v1", "ppo") == Path("here")
    Path("here").mkdir()
    Path("here/notes.txt").write_text("mine")
    assert choose_directory(config(out="here"), "CartPole-v1", "ppo") == Path("here")
    for name in ("config.toml", "summary.json"):
        Path("here", name).write_text("")
        with pytest.raises(ConfigError, match=r"here already holds a run\n.*python -m aiorl resume here"):
            choose_directory(config(out="here"), "CartPole-v1", "ppo")
        Path("here", name).unlink()


def test_making_it_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    make_writable(Path("deep/down/run"))
    make_writable(Path("deep/down/run"))
    assert list(Path("deep/down/run").iterdir()) == []
    Path("file").write_text("x")
    for path in ("file", "file/inside"):
        with pytest.raises(ConfigError, match=rf"cannot write to {path}: .*\n  choose another out"):
            make_writable(Path(path))
    with pytest.raises(ConfigError, match="cannot write to"):
        choose_directory(config(), "x/" + "n" * 300, "ppo", create=True)


def test_a_link_to_nowhere_cannot_be_written_to() -> None:
    """As where what `runs` leads to is not mounted."""
    Path("runs").symlink_to("scratch/runs")
    for asked, path in ((config(), "runs"), (config(out="runs/mine"), "runs/mine")):
        with pytest.raises(ConfigError, match=f"cannot write to {path}: a file or a link to nowhere is in the way\n"):
            make_writable(choose_directory(asked, "CartPole-v1", "ppo", create=True))


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_summary_of_the_session_before_goes_with_the_first_lines_of_the_next() -> None:
    Path("summary.json").write_text("{}")
    files = RunFiles(Path())
    write(files)
    assert Path("summary.json").exists(), "nothing has happened yet"
    write(files, important(1))
    assert not Path("summary.json").exists()


def test_events_and_schedule_are_appended_in_order() -> None:
    files = RunFiles(Path())
    write(files)
    assert list(Path().iterdir()) == [], "nothing to write makes no file"
    write(files, important(1), updated(2, loss=0.5), rollouts=(0, 1))
    write(files, finished(3), rollouts=(2,))
    assert [line["event"] for line in lines("events.jsonl")] == ["warned", "updated", "finished"]
    assert lines("events.jsonl")[1] == updated(2, loss=0.5).to_dict()
    assert [line["k"] for line in lines("schedule.jsonl")] == [0, 1, 2]
    assert files.take() == ([], [])


def test_progress_is_for_displays() -> None:
    files = RunFiles(Path())
    files.event(example(Progress))
    assert files.take() == ([], [])


def test_metrics_are_a_table() -> None:
    files = RunFiles(Path())
    write(files, updated(1, loss=0.1, entropy=2.0), important(2), updated(3, loss=1 / 3, entropy=float("inf")))
    rows = table()
    assert list(rows[0]) == [*CSV_COLUMNS, "entropy", "loss"]
    assert [(row["version"], float(row["loss"]), row["entropy"]) for row in rows] == [("1", 0.1, "2.0"), ("3", 1 / 3, "inf")]
    assert rows[0]["return_mean"] == "", "nothing ended: an empty cell"


def test_columns_of_metrics_that_appear_only_after_warm_up() -> None:
    files = RunFiles(Path())
    write(files, updated(1), updated(2))
    assert list(table()[0]) == list(CSV_COLUMNS)
    write(files, updated(3), updated(4, loss=0.4, q=4.0))
    write(files, updated(5, loss=0.5, q=5.0, epsilon=0.05))
    write(files, updated(6, q=6.0))
    rows = table()
    assert list(rows[0]) == [*CSV_COLUMNS, "loss", "q", "epsilon"]
    assert [row["version"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["q"] for row in rows] == ["", "", "", "4.0", "5.0", "6.0"]
    assert [row["epsilon"] for row in rows] == ["", "", "", "", "0.05", ""]
    assert None not in rows[0], "a row is longer than the header"


def test_a_resumed_run_goes_on_in_the_same_files() -> None:
    write(RunFiles(Path()), updated(1, b=1.0, a=2.0), rollouts=(0,))
    write(RunFiles(Path()), updated(2, a=3.0, b=4.0, c=5.0), rollouts=(1,))
    assert [line["version"] for line in lines("events.jsonl")] == [1, 2]
    assert [line["k"] for line in lines("schedule.jsonl")] == [0, 1]
    rows = table()
    assert [(row["a"], row["b"], row["c"]) for row in rows] == [("2.0", "1.0", ""), ("3.0", "4.0", "5.0")]


def test_updates_that_a_resumed_run_does_again_stand_in_the_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the future that was given up go when the first of the new one comes: all of them, and in one stroke."""
    write(RunFiles(Path()), *(updated(n, loss=n / 8) for n in range(1, 6)), important(6))
    before = Path("metrics.csv").read_bytes()
    files = RunFiles(Path())
    write(files, important(7))
    assert Path("metrics.csv").read_bytes() == before, "nothing has been done again yet"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write(files, updated(3, loss=0.0))
    assert Path("metrics.csv").read_bytes() == before
    write(files, updated(4, loss=0.0))
    assert [(row["version"], float(row["loss"])) for row in table()] == [("1", 0.125), ("2", 0.25), ("3", 0.0), ("4", 0.0)]
    assert [line["version"] for line in lines("events.jsonl") if line["event"] == "updated"] == [1, 2, 3, 4, 5, 3, 4]


@pytest.mark.parametrize("name", ["events.jsonl", "schedule.jsonl", "metrics.csv"])
@pytest.mark.parametrize("cut", [1, 5, 10_000])
def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(name: str, cut: int) -> None:
    write(RunFiles(Path()), updated(1, loss=1.0), updated(2, loss=2.0), rollouts=(0, 1))
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: max(5, len(whole) - cut)])
    write(RunFiles(Path()), updated(3, loss=3.0), rollouts=(2,))
    kept = ["1"] if cut < 10_000 else []
    if name == "metrics.csv":
        assert [(row["version"], row["loss"]) for row in table()] == [*((v, "1.0") for v in kept), ("3", "3.0")]
    else:
        key = "k" if name == "schedule.jsonl" else "version"
        assert [line[key] for line in lines(name)] == [*(int(v) - (key == "k") for v in kept), 3 - (key == "k")]


def test_writing_a_small_file_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("config.toml")
    write_atomically(path, b"old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(Path().iterdir()) == [path], "no temporary file is left"
    monkeypatch.undo()


class FullDisk:
    """Hides `open` of the module: after `room` bytes a write is cut short, then refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        monkeypatch.setattr(directory, "open", self.open, raising=False)

    def open(self, path: Path, mode: str, **options: Any) -> Any:
        disk = self

        class Scarce(io.FileIO):
            def write(self, data: Any, /) -> int:
                if disk.room is None:
                    return super().write(data)
                view = memoryview(data)  # which the traceback of an error keeps
                if not disk.room:
                    raise OSError(errno.ENOSPC, "no space left")
                part = view[: disk.room]
                disk.room -= len(part)
                return super().write(part)

        return Scarce(path, mode.strip("b")) if options.get("buffering") == 0 else open(path, mode, **options)


def test_what_a_full_disk_refuses_is_written_later_and_nothing_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, files = FullDisk(monkeypatch), RunFiles(tmp_path)
    write(files, updated(1, a=1.0), rollouts=(0,))
    errors: list[OSError] = []  # who keeps them keeps nothing of what has to be written
    for version, room in ((2, 7), (3, 0), (4, 300)):
        disk.room = room
        with pytest.raises(OSError, match="no space left") as caught:
            write(files, updated(version, a=1.0), rollouts=(version - 1,))
        errors.append(caught.value)
    names = ("events.jsonl", "schedule.jsonl", "metrics.csv")
    assert all((tmp_path / name).read_bytes().endswith(b"\n") for name in names), "a torn line stays"
    disk.room = None
    write(files, updated(5, a=1.0), rollouts=(4,))
    events, schedule = ((tmp_path / name).read_text().splitlines() for name in names[:2])
    assert [json.loads(text)["version"] for text in events] == [1, 2, 3, 4, 5]
    assert [json.loads(text)["k"] for text in schedule] == [0, 1, 2, 3, 4]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 5


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, path = FullDisk(monkeypatch), tmp_path / "f"
    append_whole(path, b"before\n")
    disk.room = 3
    with pytest.raises(OSError, match="no space left"):
        append_whole(path, b"after\n")
    assert path.read_bytes() == b"before\n"
