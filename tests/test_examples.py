"""Every program in examples/ runs, with a small budget and in a directory of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import aiorl
from aiorl.offload import OffloadThread
from aiorl.testing import check_algorithm, check_env
from examples import (
    custom_algorithm,
    custom_env,
    custom_replay,
    custom_sequences,
    hockey_selfplay,
    log_to_tensorboard,
    pause_and_tune,
    quickstart,
    two_runs,
    websocket_env,
)

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("own_directory", "no_leaks")


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> str:
    """Run this Python with the arguments, here, and return what it prints; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_example_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("[a-z]*.py"):
        assert path.stem in here, f"examples/{path.name} has no test"


async def test_quickstart(capsys: pytest.CaptureFixture[str]):
    result = await quickstart.main(total_steps=6_000)
    assert result.status == "completed"
    assert result.env_steps >= 6_000
    assert "action for a pole" in capsys.readouterr().out


def test_quickstart_as_a_program():
    """Workers import the main module again, so the guard at its end matters."""
    short = "from examples import quickstart as q; q.main.__defaults__ = (4_000,)"
    Path("program.py").write_text(f"{short}\nif __name__ == '__main__': q.asyncio.run(q.main())\n")
    assert "action for a pole" in command("program.py")


async def test_pause_and_tune(capsys: pytest.CaptureFixture[str]):
    result = await pause_and_tune.main(total_steps=8_000, pause_at=2)
    assert result.status == "completed"
    printed = capsys.readouterr().out
    assert "paused after 2 updates" in printed
    assert "learning_rate" in printed


async def test_two_runs():
    results = [result for _ in range(2) for result in await two_runs.main(total_steps=3_000)]
    assert [r.status for r in results] == ["completed"] * 4
    assert len({r.directory for r in results}) == 4, "the second time it is in the way of nothing"
    assert results[0].params_sha256 == results[2].params_sha256 != results[1].params_sha256


async def test_log_to_tensorboard():
    result = await log_to_tensorboard.main(total_steps=10_000)
    files = list(Path(result.directory).glob("events.out.tfevents.*"))
    assert len(files) == 1
    written = files[0].read_bytes()
    for tag in (b"train/return", b"train/staleness", b"evaluation/mean_return"):
        assert tag in written


async def test_custom_env():
    result = await custom_env.main(total_steps=4_000)
    assert result.status == "completed"
    assert result.episodes > 0


def test_custom_env_keeps_the_gymnasium_contract():
    from gymnasium.utils.env_checker import check_env

    check_env(custom_env.GoToGoal(), skip_render_check=True)


def test_custom_env_and_algorithm_on_the_command_line():
    command(
        *("-m", "aiorl", "train", "examples.custom_env:GoToGoal", "--algo", "examples.custom_algorithm:Reinforce"),
        *("--steps", "4000", "--workers", "1", "--off-policy-degree", "0", "--reinforce.gamma", "0.95"),
        *("--out", "run", "--progress", "none"),
    )
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["status"], summary["algo"]) == ("completed", "reinforce")


async def test_hockey_selfplay(capsys: pytest.CaptureFixture[str]):
    result = await hockey_selfplay.main(
        total_steps=2_500, envs=8, workers=1, segment_length=32, eval_every=0, eval_episodes=2
    )
    assert (result.status, result.dropped) == ("completed", {})
    printed = capsys.readouterr().out
    for words in ("against weak", "against strong", "snapshot 1"):
        assert words in printed


async def test_websocket_env(monkeypatch: pytest.MonkeyPatch):
    """The simulators behind the socket are at work at the same time, with one worker."""
    at_work, most = 0, 0

    async def work(seconds: float) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(seconds)
        at_work -= 1

    monkeypatch.setattr(websocket_env, "asyncio", SimpleNamespace(sleep=work))
    result = await websocket_env.main(total_steps=3_000, envs=20)
    assert (result.status, result.dropped) == ("completed", {})
    assert aiorl.Config.from_toml(Path(result.directory) / "config.toml").group_size == 1
    assert most > 10


@pytest.mark.filterwarnings("ignore:.*You are calling:UserWarning")  # that, too, is tried
async def test_websocket_env_is_one_to_train_on():
    """The doctor looks at it, from a thread, for the server runs here."""
    thread = OffloadThread("doctor")
    async with websocket_env.serve(websocket_env.simulate, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found = await thread.run(lambda: check_env("examples.websocket_env:RemoteCartPole", url=url))
    assert await thread.aclose(5)
    assert {f.code for f in found if f.severity != "info"} <= {"slow-start"}  # on a busy machine


async def return_on_cartpole(algo: Any, total_steps: int) -> float:
    """The mean of the last 100 training episodes."""
    config = aiorl.Config(
        env="CartPole-v1", algo=algo, total_steps=total_steps, seed=3, envs=8, workers=0, off_policy_degree=0,
        eval_every=0, eval_episodes=5,
    )  # fmt: skip
    result = await aiorl.train(config)
    assert result.train_return_mean_100 is not None
    return result.train_return_mean_100


async def test_custom_replay_learns():
    """A random policy returns about 22 on CartPole-v1."""
    assert await return_on_cartpole(custom_replay.TinyDQN(update_ratio=0.5), 20_000) > 60


def test_the_doctor_finds_nothing_wrong_with_custom_replay():
    assert [f for f in check_algorithm(custom_replay.TinyDQN()) if f.severity != "info"] == []


class Forgetful:
    """A policy that is told with each step that an episode begins."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def act(self, obs: Any, first: Any) -> Any:
        return self._policy.act(obs, np.ones_like(first))


async def test_custom_sequences_learns_what_needs_memory():
    """Two workers, acting one update behind: it remembers the sign (1; 0 is what anybody gets who does not), and without
    its memory it is lost."""
    from aiorl.envs.episodes import run_episodes
    from aiorl.envs.spec import resolve_env

    config = aiorl.Config(
        env="examples.custom_sequences:TMaze", algo=custom_sequences.RecurrentQ(), total_steps=8_000, seed=3, envs=8,
        workers=2, off_policy_degree=1, eval_every=0, eval_episodes=100,
    )  # fmt: skip
    result = await aiorl.train(config)
    assert (result.status, result.dropped, result.staleness["max"]) == ("completed", {}, 1)
    assert result.final_evaluation is not None
    assert result.final_evaluation.mean_return > 0.9
    loaded = aiorl.load(result.directory, algo=custom_sequences.RecurrentQ)
    forgetful: Any = Forgetful(loaded._policy)
    returns, _ = run_episodes(resolve_env(config.env, in_process=True), loaded.spaces, forgetful, 100, 0, 10)
    assert abs(returns.mean()) < 0.4, "four standard deviations"


async def test_custom_sequences_resumes_as_if_it_had_not_stopped():
    """Segments begin in the middle of episodes, with the memory that the last one ended with."""
    config = aiorl.Config(
        env="examples.custom_sequences:TMaze", algo=custom_sequences.RecurrentQ(warmup=200), total_steps=1_600, seed=0,
        envs=8, workers=0, off_policy_degree=0, segment_length=20, eval_every=0, eval_episodes=1,
    )  # fmt: skip
    whole = await aiorl.train(config)
    async with aiorl.Run(config) as run:
        async for event in run:
            if event.version >= 5:
                run.stop(final_evaluation=False)
    assert (await aiorl.train(config, resume=run.directory)).params_sha256 == whole.params_sha256


def test_the_gradient_of_custom_sequences_is_that_of_its_loss():
    rng, (steps, n, features, cells, hidden, actions) = np.random.default_rng(0), (4, 3, 2, 3, 5, 2)
    sizes = {"gate": (features, cells), "new": (features, cells), "hidden": (cells + features, hidden)}
    sizes |= {"q": (hidden, actions)}
    p = {f"w_{name}": rng.normal(size=size) for name, size in sizes.items()}
    p |= {f"b_{name}": rng.normal(size=size[1]) for name, size in sizes.items()}
    x, first, memory = rng.normal(size=(steps, n, features)), rng.random((steps, n)) < 0.3, rng.normal(size=(n, cells))
    action, target, weight = rng.integers(actions, size=(steps, n)), 3 * rng.normal(size=(steps, n)), rng.random((steps, n))

    def found() -> tuple[dict[str, Any], float]:
        gradient, error, _ = custom_sequences.gradient(p, x, first, memory, action, target, weight)
        size = np.abs(error)
        return gradient, float((weight * np.where(size < 1, size**2 / 2, size - 0.5)).sum())

    assert first[1:].any()
    gradient, _ = found()
    for name, array in p.items():
        for place in np.ndindex(array.shape):
            there, losses = array[place], list[float]()
            for moved in (1e-6, -1e-6):
                array[place] = there + moved
                losses.append(found()[1])
            array[place] = there
            assert gradient[name][place] == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-6), (name, place)


def test_the_doctor_finds_nothing_wrong_with_custom_sequences():
    assert [f for f in check_algorithm(custom_sequences.RecurrentQ()) if f.severity != "info"] == []


async def test_custom_algorithm_learns():
    """A random policy returns about 22 on CartPole-v1; this one is well above after 30k steps, for every seed tried."""
    assert await return_on_cartpole(custom_algorithm.Reinforce(), 30_000) > 50


def test_custom_algorithm_returns_bootstrap_where_they_should():
    """gamma 0.5 and a baseline that is 1 everywhere: terminated stops, truncated and the segment's end add 0.5 * 1."""
    from aiorl.envs.spaces import Leaf, Spaces
    from aiorl.segments import Column, Rollout, SegmentLayout

    spaces = Spaces(
        observation=(Leaf(name="obs", kind="box", dtype="float32", shape=(1,)),),
        action=Leaf(name="action", kind="discrete", dtype="int64", nvec=(2,), start=(0,)),
    )
    learner = custom_algorithm.Reinforce(gamma=0.5).learner(spaces, None)  # type: ignore[arg-type]
    learner.load_state_dict({"theta": np.zeros((2, 2)), "baseline": np.array([0.0, 1.0]), "learning_rate": 1.0})
    columns = {name: Column((), "bool") for name in ("terminated", "truncated", "valid")}
    columns |= {"action": spaces.action_column, "reward": Column((), "float64")}
    segment = SegmentLayout(3, 1, spaces.obs_columns, columns).allocate()
    segment.columns["reward"][:] = [[1], [2], [4]]
    segment.columns["valid"][:] = True

    def returns(**ends: int) -> list[float]:
        for name in ("terminated", "truncated"):
            segment.columns[name][:] = False
            if name in ends:
                segment.columns[name][ends[name]] = True
        return learner._returns(Rollout(0, 0, (segment,), np.arange(1)))[:, 0].tolist()

    assert returns() == [1 + 0.5 * (2 + 0.5 * 4.5), 2 + 0.5 * 4.5, 4.5]
    assert returns(terminated=1) == [2.0, 2.0, 4.5]
    assert returns(truncated=1) == [1 + 0.5 * 2.5, 2.5, 4.5]


# The web service is driven as a server would: one event loop, its lifespan, requests that overlap.


@asynccontextmanager
async def service(**changes: Any) -> AsyncIterator[Any]:
    import httpx

    from examples.embed_starlette import create_app

    config = aiorl.Config(env="CartPole-v1", total_steps=500_000, envs=8, workers=1, out="run").replace(**changes)
    app = create_app(config)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        yield client


async def test_embed_starlette_controls_the_run():
    async with service() as client:
        listening = asyncio.create_task(client.get("/events"))  # the answer is complete when the stream ends
        paused = (await client.post("/pause")).json()
        assert paused["state"] == "paused"
        again = (await client.get("/status")).json()
        assert (again["env_steps"], again["version"]) == (paused["env_steps"], paused["version"])
        made = (await client.post("/checkpoint")).json()["checkpoint"]
        assert (Path(made) / "manifest.json").is_file()
        assert (await client.post("/resume")).json()["state"] != "paused"
        await client.post("/stop")
        answer = await listening
        await client.get("/status")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    names = [event["event"] for event in events]
    assert names[-1] == "finished"
    assert {"paused", "resumed", "checkpointed"} <= set(names)
    assert events[-1]["status"] == "stopped"
    assert json.loads(Path("run/summary.json").read_text())["status"] == "stopped"


async def test_embed_starlette_survives_a_failing_run():
    """The training fails, the service answers and says so."""
    with pytest.raises(aiorl.ConfigError):
        async with service(env="no_such_module:Env"):
            pass
    async with service(env="run_envs:Faulty", env_kwargs={"fault": "kill"}) as client:
        answer = await client.get("/events")  # complete when the run has ended
        assert '"status":"failed"' in answer.text
        state = (await client.get("/status")).json()
        assert state["state"] == "failed"


def test_testing_your_own():
    """A file of tests, run as a user runs it; the plugin is named where aiorl is on the path but not installed."""
    installed = any(entry.value == "aiorl.testing.plugin" for entry in metadata.entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "aiorl.testing.plugin"]
    path = str(ROOT / "examples" / "testing_your_own.py")
    printed = command("-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, path)
    assert "3 passed" in printed
    again = command("-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, path, "-k", "program", "--aiorl-seed", "3")
    assert "1 passed" in again
