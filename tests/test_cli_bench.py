"""`python -m aiorl bench`: what it measures, and what it advises."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiorl.cli import main
from aiorl.cli.measure import EnvSpeed, Figures, Parts, RunSpeed, advice
from aiorl.cli.session import run_async
from aiorl.config import Config

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module", autouse=True)
def uvloop_has_run() -> None:
    """It keeps a pipe from its first loop on, for good."""
    run_async(asyncio.sleep(0))


def figures(*, cpu_share: float = 1.0, collect_us: float = 20.0, learn_us: float = 5.0, **run: Any) -> Figures:
    speed: dict[str, Any] = {
        "env_steps_per_second": 50_000.0, "gradient_steps_per_second": 100.0, "busy": {"collect": 0.9, "train": 0.3},
        "lag_ms": 1.0, "workers": 2, "off_policy_degree": 1, **run,
    }  # fmt: skip
    return Figures(
        env=EnvSpeed(name="CartPole-v1", step_us=15.0, cpu_share=cpu_share, native=False),
        parts=Parts(collect_us=collect_us, learn_us=learn_us, gradient_step_ms=0.5),
        run=RunSpeed(**speed),
        cores=4,
        load=0.0,
    )


def test_what_the_parts_allow():
    assert figures().bound_per_second == pytest.approx(2e6 / 20), "two workers, and the learner keeps up"
    assert figures(learn_us=40.0).bound_per_second == pytest.approx(1e6 / 40), "one learner"
    assert figures(off_policy_degree=0).bound_per_second == pytest.approx(1e6 / (20 / 2 + 5)), "in turns"
    assert figures(workers=0).bound_per_second == pytest.approx(1e6 / (20 + 5))
    assert figures(workers=100).bound_per_second == pytest.approx(4e6 / 25), "four cores"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "--workers 3 uses the other cores"),
        ({"workers": 3}, "a faster environment"),
        ({"workers": 3, "collect_us": 60.0}, "--group-size"),
        ({"learn_us": 50.0}, "the learner is the limit"),
        ({"busy": {"collect": 0.5, "train": 0.95}}, "the learner is the limit"),
        ({"off_policy_degree": 0}, "--off-policy-degree 1"),
        ({"workers": 0}, "--workers 1 or more"),
        ({"cpu_share": 0.1}, "--stepping threads"),
        ({"lag_ms": 8.0}, "--segment-length"),
        ({"workers": 4}, "share 4 cores"),
    ],
)
def test_the_flag_to_change(given: dict[str, Any], word: str):
    assert word in "\n".join(advice(figures(**given)))


def test_nothing_is_advised_that_would_not_help():
    said = "\n".join(advice(figures(workers=3)))
    for word in ("--stepping", "--off-policy-degree", "late", "share 4 cores", "busy (load"):
        assert word not in said


def test_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--seconds", "1", "--json", "--envs", "4", "--segment-length", "32", "--workers", "1"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["env"]["native"] is True
    assert found["env"]["name"] == "CartPole-v1"
    assert found["parts"]["collect_us"] > 0
    assert found["env"]["step_us"] > 0
    assert found["run"]["env_steps_per_second"] > 0
    assert found["run"]["workers"] == 1
    assert found["advice"]
    assert msgspec.convert({k: v for k, v in found.items() if k in Figures.__struct_fields__}, Figures)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["--workers", "1"], "CartPole-v1"),
        (["--workers", "1", "Acrobot-v1"], "Acrobot-v1"),
        (["--config", "file.toml"], "MountainCar-v0"),
        (["--config", "file.toml", "Acrobot-v1"], "Acrobot-v1"),
    ],
)
def test_the_environment_that_is_measured_is_the_one_that_is_named(
    words: list[str], env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async def measured(config: Config, seconds: float) -> Figures:
        return msgspec.structs.replace(figures(), env=EnvSpeed(name=config.env, step_us=1.0, cpu_share=1.0, native=False))

    monkeypatch.chdir(tmp_path)
    Path("file.toml").write_text('env = "MountainCar-v0"\n')
    monkeypatch.setattr("aiorl.cli.measure.measure", measured)
    assert main(["bench", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["environment", f"{env}:"]


def test_nothing_is_measured_in_a_dry_run(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--dry-run"]) == 2
    assert "train CartPole-v1 --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "soon"], ["--sceonds", "3"], ["CartPole-v9"]])
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3
