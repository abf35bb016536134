"""`python -m aiorl doctor`: what it checks, how it says it, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import aiorl
from aiorl.cli import main
from aiorl.testing import machine
from aiorl.testing.findings import Finding
from aiorl.testing.machine import check_machine

pytestmark = pytest.mark.usefixtures("no_leaks")

FACTS = {
    "python", "packages", "device", "cores", "threads", "memory", "shared-memory", "open-files", "clock", "workers",
    "run-directory",
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # other tests may be running


def found() -> dict[str, Finding]:
    return {f.code: f for f in check_machine()}


def test_a_sound_machine_and_environment(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "CartPole-v1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("machine\n")
    assert "\nCartPole-v1\n" in out
    for fact in FACTS | {"step-time", "sigterm"}:
        assert f"  {fact} " in out
    assert list(Path().iterdir()) == [], "looking leaves nothing behind"


def test_a_broken_environment(capsys: pytest.CaptureFixture[str]):
    command = ["doctor", "envs_for_tests:Broken", "--env-kwargs", "fault=raise", "kind=box"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "ERROR  contract" in out
    assert "the simulator fell over" in out
    assert "error" in out.splitlines()[-1]
    assert main([*command, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["about"] for line in lines} == {"machine", "envs_for_tests:Broken"}
    assert [line["code"] for line in lines if line["severity"] == "error"] == ["contract"]


def test_what_to_do_stands_under_what_was_seen(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "envs_for_tests:ReusesBuffer"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "reuses-obs" in line)
    assert lines[at].index("an observation") == lines[at + 1].index("aiorl copies")


def test_a_name_of_nothing_may_have_been_a_run(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "nowhere/run"]) == 1
    seen = " ".join(capsys.readouterr().out.split())
    assert "unknown environment 'nowhere/run'" in seen
    assert "a run: there is no directory nowhere/run" in seen
    assert main(["doctor", "nowhere.at:all"]) == 1
    assert "a run:" not in capsys.readouterr().out


def test_each_section_is_shown_when_it_is_found_the_quickest_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shown: list[str] = []

    def look(*_: object, **__: object) -> list[Finding]:
        shown.append(capsys.readouterr().out)
        return []

    for place in ("examine_algorithm.check_fit", "machine.check_machine", "examine_env.examine"):
        monkeypatch.setattr(f"aiorl.testing.{place}", look)
    monkeypatch.setattr("aiorl.testing.examine_algorithm.check_algorithm", look)
    assert main(["doctor", "--algo", "sac", "CartPole-v1"]) == 0
    well = "  ok     nothing wrong was found\n\n"
    assert shown == ["sac in CartPole-v1\n", f"{well}machine\n", f"{well}CartPole-v1\n", f"{well}sac\n"]
    assert capsys.readouterr().out == f"{well}nothing to complain about\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_looked_at_is_told_at_a_terminal_until_it_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
):
    def look(_: object, *, tell: Callable[[str], None]) -> list[Finding]:
        tell("its form")
        return []

    monkeypatch.setattr(machine, "check_machine", lambda out: [])
    monkeypatch.setattr("aiorl.testing.examine_algorithm.check_algorithm", look)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["doctor", "--algo", "sac"]) == 0
    told = capsys.readouterr().err
    assert ("\r\x1b[K  looking at its form …\r\x1b[K" in told, "looking" in told) == (terminal, terminal)


def test_an_algorithm_is_tried_with_the_settings_that_are_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tried: list[object] = []
    monkeypatch.setattr(machine, "check_machine", lambda out: [])
    monkeypatch.setattr("aiorl.testing.examine_algorithm.check_algorithm", lambda a, **_: tried.append(a) or [])
    assert main(["doctor", "--algo", "dqn", "--dqn.learning-rate", "1e-2", "--dqn.hidden", "8,8"]) == 0
    assert tried == [aiorl.DQN(learning_rate=1e-2, hidden=(8, 8))]
    assert main(["doctor", "--algo", "dqn"]) == 0
    assert tried[1:] == [aiorl.DQN]
    assert main(["doctor", "--algo", "dqn", "--dqn.learning-rate", "-1"]) == 2
    assert "--dqn.learning-rate -1: expected a number, > 0" in capsys.readouterr().err
    assert main(["doctor", "--algo", "dqn", "--help"]) == 0
    assert "--dqn.target-every" in capsys.readouterr().out


MISUSED = {
    "--nonsense": "unknown flag", "CartPole-v1 --env-kwargs gravity": "expected key=value",
    "--algo nonsense": "unknown algorithm", "--env-kwargs a=1": "without an environment",
    ". --algo dqn --env-kwargs a=1": ". is a directory: what a run wrote is only read, without --algo, --env-kwargs",
    ". --out x": "without --out", ". --algo dqn --dqn.gamma 0.5": "without --algo", ".": "is not a run directory",
}  # fmt: skip


@pytest.mark.parametrize("words", MISUSED)
def test_bad_usage(words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", *words.split()]) == 2
    told = capsys.readouterr().err
    assert MISUSED[words] in told
    assert len(told.splitlines()) <= 3


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from aiorl.cli import main; main(['doctor', '--help']); "
        "print([m for m in ('torch', 'gymnasium', 'aiorl.testing') if m in sys.modules])"
    )
    root = str(Path(machine.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Check this machine" in done.stdout


# -- what may be wrong with a machine ----------------------------------------------------------------------------------


def test_nothing_is_wrong_here_that_tests_could_run_with():
    facts = found()
    assert set(facts) == FACTS
    assert not [f for f in facts.values() if f.severity == "error"]
    assert "first worker is up after" in facts["workers"].message


def test_few_open_files():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (70, hard))
    try:
        (short,) = machine._descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (short.severity, "ulimit -n" in short.message) == ("error", True)


@pytest.mark.parametrize(("text", "severity"), [("150000 100000\n", "warning"), ("max 100000\n", "info"), ("?", "info")])
def test_a_quota_of_the_control_group(text: str, severity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    (cores,) = machine._cores()
    assert cores.severity == severity
    assert ("--workers 1" in cores.message) == (severity == "warning")


def test_one_core_and_a_busy_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    monkeypatch.setattr(machine, "CPU_QUOTA", Path("no such file"))
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert [(f.code, f.severity) for f in machine._cores()] == [("cores", "warning"), ("load", "warning")]


@pytest.mark.parametrize(("free", "severity"), [(1 << 28, "warning"), (1 << 36, "info"), (None, "info")])
def test_memory(free: int | None, severity: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: free)
    assert [f.severity for f in machine._memory()] == [severity, "info"]


def test_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    (threads,) = machine._threads()
    assert (threads.severity, "OMP_NUM_THREADS=4" in threads.message) == ("warning", True)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    listed, missing = machine._packages()
    assert "numpy " in listed.message
    assert (missing.severity, "pip install no-such-package" in missing.message) == ("error", True)


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "runs").write_text("a file is in the way")
    (found_,) = machine._disk(tmp_path / "runs")
    assert (found_.severity, "--out" in found_.message) == ("error", True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "LITTLE_DISK", 1 << 62)
    (found_,) = machine._disk(tmp_path / "runs")
    assert (found_.severity, "make room" in found_.message) == ("warning", True)


def test_workers_that_do_not_come_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_start_one", lambda launcher, directory: (_ for _ in ()).throw(TimeoutError()))
    (workers,) = machine._processes()
    assert workers.severity == "error"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(machine, "_clock", broken)
    assert "no /proc here" in next(f.message for f in check_machine() if f.severity == "error")
