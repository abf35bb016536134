"""Whole runs of replay learners whose experience lies in the run directory: exact, resumable, and nothing left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box

import aiorl
from aiorl import checkpoint, preflight
from aiorl.algos.base import Closing
from aiorl.buffers import storage
from aiorl.buffers.replay import Batch, Replay
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError
from aiorl.events import CheckpointFailed
from aiorl.segments import Column
from aiorl.testing import Recording

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
SMALL: dict[str, Any] = {"hidden": (8,), "batch_size": 8, "warmup": 50, "capacity": 300, "update_ratio": 0.1}

Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """A small run, by default on disk; each call has a directory of its own."""
    count = iter(range(1000))

    def make(kept: str = "disk", **changes: Any) -> aiorl.Config:
        algo = aiorl.DQN(**SMALL, storage=kept, n_step=2, priority_exponent=0.6)
        fields: dict[str, Any] = {
            "env": "CartPole-v1", "algo": algo, "total_steps": 800, "envs": 4, "group_size": 2, "workers": 0,
            "segment_length": 10, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0,
            "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


def open_files(directory: str | Path) -> set[str]:
    """What this process has open or mapped in a directory and that has no name any more."""
    seen = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return {path for path in seen + mapped if path.startswith(str(directory)) and path.endswith("(deleted)")}


def learned(out: str | Path | None) -> str:
    """Digest of the learner in the newest checkpoint: parameters, optimizer, buffer."""
    _, parts = checkpoint.load(checkpoint.find(Path(str(out)), "latest"), ("learner",))
    return digest(parts["learner"])


# -- whole runs --------------------------------------------------------------------------------------------------------


async def test_what_is_stored_is_what_the_physics_does(
    config: Make, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """Through workers and shared memory into the buffer: each transition is stepped again from its observation, which is the
    whole state of Hopper but for the place, and that changes nothing."""
    pytest.importorskip("mujoco")
    kept: list[Batch] = []
    close = Replay.close

    def look_and_close(self: Replay) -> None:
        kept.append(self.gather(self._marks.places(), 1, 0.9))
        close(self)

    monkeypatch.setattr(Replay, "close", look_and_close)
    algo = aiorl.SAC(hidden=(8,), warmup=590, random_steps=600, capacity=1_000)
    fields: dict[str, Any] = {"env": "Hopper-v5", "envs": 2, "group_size": 1, "segment_length": 5, "off_policy_degree": 1}
    result = await aiorl.train(config(algo=algo, workers=2, total_steps=600, **fields))
    (batch,) = kept
    obs, following = batch.obs["obs"], batch.next_obs["obs"]
    assert len(obs) == 600
    assert (batch.discounts == 0).sum() == result.episodes > 10
    hopper: Any = gymnasium.make("Hopper-v5").unwrapped
    hopper.reset(seed=0)
    for i in np.flatnonzero(np.abs(obs[:, 5:]).max(1) < 10):  # faster than that it shows no more
        hopper.set_state(np.append(0, obs[i, :5]), obs[i, 5:])
        seen, reward, terminated, _, _ = hopper.step(batch.action[i].astype(np.float64))
        assert np.abs(seen - following[i]).max() < 1e-9
        assert abs(reward - batch.returns[i]) < 1e-6
        assert terminated == (batch.discounts[i] == 0)
    hopper.close()


@linux
@pytest.mark.parametrize("workers", [0, 2])
async def test_a_run_on_disk_is_the_run_in_memory(config: Make, no_leaks: None, workers: int) -> None:
    """The ring comes round. While the run goes on its files are open and have no name; afterwards there are none."""
    plain, disk = config("memory", workers=workers), config(workers=workers)
    await aiorl.train(plain)
    async with aiorl.Run(disk) as run:
        assert open_files(run.directory)
        await run.checkpoint()
        result = await run.wait()
    assert result.status == "completed"
    assert not open_files(str(disk.out))
    one, other = ({path.name for path in Path(str(c.out)).iterdir()} for c in (plain, disk))
    assert one == other
    assert learned(plain.out) == learned(disk.out)


@pytest.mark.parametrize(
    ("before", "after"), [("disk", "disk"), ("disk", "memory"), ("memory", "disk"), ("disk", "device"), ("device", "disk")]
)
async def test_a_resumed_run_goes_on_bit_for_bit_wherever_it_keeps_its_experience(
    config: Make, before: str, after: str
) -> None:
    whole = config("memory", total_steps=800)
    await aiorl.train(whole)
    half = config(before, total_steps=800)
    async with aiorl.Run(half) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 12:
                run.stop(final_evaluation=False)
    assert 12 <= run.result.updates < 20
    again = config(after, total_steps=800)
    async with aiorl.Run(again.replace(out=half.out), resume=half.out) as run:
        assert run._session.made is not None
        assert run._session.made.checked.saved is not None
        assert "learner" not in run._session.made.checked.saved.parts, "what was read stays in memory for the whole run"
        await run.wait()
    assert learned(half.out) == learned(whole.out)


@linux
async def test_the_end_of_one_run_leaves_the_other_its_files(config: Make, no_leaks: None) -> None:
    short, long = config(total_steps=400), config(total_steps=10**6)
    alone = config("memory", total_steps=400)
    await aiorl.train(alone)
    async with aiorl.Run(long) as other:
        async with aiorl.Run(short) as run:
            assert open_files(run.directory)
            assert open_files(other.directory)
            await run.wait()
        assert not open_files(str(short.out))
        assert open_files(other.directory)
        done = other.status().version
        async for event in other:
            if isinstance(event, aiorl.Updated) and event.version > done + 5:
                break
    assert not open_files(str(long.out))
    assert learned(short.out) == learned(alone.out)


@linux
@pytest.mark.parametrize("how", ["in an update", "in the making"])
async def test_a_run_that_fails_gives_its_files_back(config: Make, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    kept: list[Any] = []  # as a traceback would keep it
    real = Replay.__init__

    def remember(self: Replay, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        kept.append(self)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Replay, "__init__", remember)
    monkeypatch.setattr(Replay, "sample", fail)
    if how == "in the making":
        monkeypatch.setattr("aiorl.assembly._make_weights", fail)
    settings = config()
    with pytest.raises(aiorl.TrainingError, match="on purpose"):
        await aiorl.train(settings)
    assert len(kept) == 1
    assert not open_files(str(settings.out))


@linux
async def test_a_run_that_is_left_gives_its_files_back(config: Make) -> None:
    async with aiorl.Run(config(total_steps=10**6, workers=1)) as run:
        assert open_files(run.directory)
    assert run.result.status == "stopped"
    assert not open_files(run.directory)


# -- no room -----------------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_made(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(checkpoint_every=100)
    spaces = preflight.check(settings, write=False).spaces
    whole = settings.algo.disk_bytes(spaces, 4, 300)
    assert whole >= 300 * 16
    assert whole < settings.algo.disk_bytes(spaces, 4, 600)
    assert config("memory").algo.disk_bytes(spaces, 4, 300) == 0
    saved = settings.algo.saved_bytes(spaces, 4, 300)
    assert saved == config("memory").algo.saved_bytes(spaces, 4, 300) > whole
    three = 3 * saved  # two are kept until the next one is there
    for kept, needs, words in (
        ("disk", 2 * whole + three, ("dqn.capacity = 300 on disk: the buffer,", 'another out, or dqn.storage = "memory"')),
        ("memory", three, ("dqn.capacity = 300: checkpoints of 300 transitions (keep = 2) need", "keep, another out")),
    ):
        monkeypatch.setattr(preflight, "free_bytes", lambda _, free=needs: free)
        preflight.check(config(kept, checkpoint_every=100), write=False)
        monkeypatch.setattr(preflight, "free_bytes", lambda _, free=needs - 1: free)
        with pytest.raises(ConfigError) as caught:
            preflight.check(config(kept, checkpoint_every=100, out=str(settings.out)))
        assert all(word in str(caught.value) for word in words), caught.value
        assert len(str(caught.value).splitlines()) <= 3
    monkeypatch.setattr(preflight, "free_bytes", lambda _: saved)
    preflight.check(config("memory"), write=False)
    assert not Path(str(settings.out)).exists()
    monkeypatch.setattr(preflight, "free_bytes", lambda _: None)
    preflight.check(settings, write=False)


def test_what_lies_on_disk_needs_no_memory(config: Make) -> None:
    """Images of a capacity that memory would not do for."""
    space = spaces(observation=Box(0, 255, (84, 84), np.uint8))
    disk, memory = (config(kept).algo for kept in ("disk", "memory"))
    sizes = [algo.experience_bytes(space, 4, 10_000) for algo in (disk, memory)]
    assert sizes[0] + 2 * disk.disk_bytes(space, 4, 10_000) == sizes[1]
    assert disk.disk_bytes(space, 4, 10_000) >= 10_000 * 84 * 84 > 100 * sizes[0] / 2


def test_what_lies_on_a_device_needs_memory_once(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the copy in a checkpoint; twice where the device is the processor."""
    space = spaces(observation=Box(0, 255, (84, 84), np.uint8))
    sizes = {kept: config(kept).algo.experience_bytes(space, 4, 10_000) for kept in ("disk", "memory")}
    for there, needs in ((False, sizes["memory"]), (True, (sizes["disk"] + sizes["memory"]) / 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert config("device").algo.experience_bytes(space, 4, 10_000) == needs
    assert config("device").algo.disk_bytes(space, 4, 10_000) == 0


def test_room_is_that_of_the_disk_the_directory_will_be_on(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "not" / "there" / "yet") == pytest.approx(storage.free_bytes(tmp_path), rel=0.2)


async def test_a_copy_that_has_no_room_fails_the_checkpoint_not_the_run(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the run goes on, says so, and saves the next time."""
    real, failures = storage.Rows.copy, [0]

    def full(self: storage.Rows, count: int) -> Any:
        failures[0] += 1
        if failures[0] == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")
        return real(self, count)

    monkeypatch.setattr(storage.Rows, "copy", full)
    settings = config(checkpoint_every=200)
    async with aiorl.Run(settings) as run:
        events = [event async for event in run]
    assert [event.reason for event in events if isinstance(event, CheckpointFailed)] == ["No space left on device (there)"]
    assert run.result.status == "completed"
    assert learned(settings.out)


# -- one learner -------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("name", ["dqn", "qrdqn", "sac", "td3"])
def test_every_replay_learner_can_keep_its_experience_elsewhere(name: str, tmp_path: Path) -> None:
    kind: Any = {"dqn": aiorl.DQN, "qrdqn": aiorl.QRDQN, "sac": aiorl.SAC, "td3": aiorl.TD3}[name]
    bounded = name in ("sac", "td3")
    settings = {**SMALL, "normalise_obs": True, "accumulate": 2, **({"random_steps": 0} if bounded else {})}
    space = spaces(Box(-1, 1, (2,), np.float32)) if bounded else spaces()
    columns = {"mean": Column((2,))} if bounded else {"greedy": Column((), "int64")}
    stream = Stream(space, 4, 8, columns=columns)
    memory = kind(**settings).learner(space, context())
    disk = kind(**settings, storage="disk").learner(space, context(directory=tmp_path))
    device = kind(**settings, storage="device").learner(space, context())
    for _ in range(12):
        rollout = stream.next()
        assert memory.update(rollout) == disk.update(rollout) == device.update(rollout)
    assert digest(memory.state_dict()) == digest(disk.state_dict()) == digest(device.state_dict())
    assert isinstance(disk, Closing)
    disk.close()
    disk.close()
    assert not open_files(tmp_path)
    with pytest.raises(ConfigError, match=rf'{name}\.storage = "disk": there is no run directory'):
        kind(**settings, storage="disk").learner(space, context())


@linux
def test_who_wraps_a_learner_closes_it(tmp_path: Path) -> None:
    race = probe(resolve_env("games:race", in_process=True)).spaces
    for wrapper, space in ((Recording.of(aiorl.TD3(storage="disk", capacity=300)), spaces(Box(-1, 1, (2,), np.float32))),
                           (aiorl.SelfPlay.of(aiorl.TD3(storage="disk", capacity=300)), race)):  # fmt: skip
        learner = wrapper.learner(space, context(directory=tmp_path))
        assert open_files(tmp_path)
        learner.close()
        assert not open_files(tmp_path)


@linux
def test_a_copy_of_what_lies_on_disk_lies_on_disk(tmp_path: Path) -> None:
    stream = Stream(spaces(), 2, 50)
    replay = Replay(stream.space, 2, 100, storage="disk", directory=tmp_path)
    replay.add(stream.next())
    before = open_files(tmp_path)
    state = replay.state_dict()
    expected = digest(state)
    assert len(open_files(tmp_path)) == len(before) + 1, "it lies in memory"
    replay.add(stream.next())
    assert digest(state) == expected, "no copy"
    assert not list(tmp_path.iterdir())
    replay.close()
    assert digest(state) == expected
    del state
    assert not open_files(tmp_path)
