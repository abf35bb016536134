"""Observations of a replay buffer on disk, and whose turn it is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from experience import Stream, digest, spaces

from aiorl.algos.practice import encode
from aiorl.buffers import device
from aiorl.buffers.replay import Replay
from aiorl.buffers.storage import Rows
from aiorl.errors import ConfigError, InvariantError
from aiorl.segments import Column


def filling(stream: Stream, buffers: Sequence[Replay]) -> Iterator[int]:
    """Add the same 80 rollouts to all, one after the other; yields the index of each."""
    for index in range(80):
        rollout = stream.next()
        for replay in buffers:
            replay.add(rollout)
        yield index


def test_what_lies_on_disk_is_as_in_memory(tmp_path: Path):
    """Every second row ends an episode, so the file grows as well."""
    stream = Stream(spaces(), 2, 7)
    buffers = Replay(stream.space, 2, 400), Replay(stream.space, 2, 400, storage="disk", directory=tmp_path)
    for index in filling(stream, buffers):
        if index % 8 == 0:
            one, other = (replay.sample(np.random.default_rng(index), 50, n=2, gamma=0.9) for replay in buffers)
            assert one.obs["obs"].tobytes() == other.obs["obs"].tobytes()
            assert one.next_obs["obs"].tobytes() == other.next_obs["obs"].tobytes()
    assert digest(buffers[0].state_dict()) == digest(buffers[1].state_dict())
    again = Replay(stream.space, 2, 400, storage="disk", directory=tmp_path)
    again.load_state_dict(buffers[0].state_dict())
    assert digest(again.state_dict()) == digest(buffers[0].state_dict())


def open_files(directory: Path) -> list[str]:
    """What this process has open in a directory, files without a name included."""
    seen = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [path for path in seen + mapped if path.startswith(str(directory))]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_disk_is_given_back_at_close(tmp_path: Path):
    stream = Stream(spaces(), 2, 5)
    replay = Replay(stream.space, 2, 10_000, storage="disk", directory=tmp_path)
    assert open_files(tmp_path)
    assert not list(tmp_path.iterdir()), "a file has a name: it would stay if the process were killed"
    replay.close()
    replay.close()
    assert not open_files(tmp_path)
    with pytest.raises(ValueError, match="closed"):
        replay.sample(np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match="closed"):
        replay.add(stream.next())


def test_a_killed_process_leaves_nothing(tmp_path: Path):
    program = (
        "import sys; from experience import Stream, spaces; from aiorl.buffers.replay import Replay\n"
        "stream = Stream(spaces(), 2, 5)\n"
        "replay = Replay(stream.space, 2, 1000, storage='disk', directory=sys.argv[1])\n"
        "replay.add(stream.next()); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is not taken in advance here")
def test_a_disk_that_is_too_small_is_said_before_anything_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def full(file: int, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    image = spaces(observation=gymnasium.spaces.Box(0, 255, (84, 84), np.uint8))
    message = r"the replay buffer needs 6\.\d\d GiB in .* GiB are free: No space left"
    with pytest.raises(ConfigError, match=message) as caught:
        Replay(image, 8, 1_000_000, storage="disk", directory=tmp_path)
    assert asked[0] == pytest.approx(1e6 * 84 * 84, rel=0.02)
    assert "use a smaller capacity or another directory" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(("storage", "directory"), [("disk", None), ("tape", "."), ("disk", "/nowhere/at/all")])
def test_storage_that_cannot_be(storage: Any, directory: Any):
    with pytest.raises(ConfigError, match="replay storage"):
        Replay(spaces(), 2, 100, storage=storage, directory=directory)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_rows_grow_with_what_they_hold(storage: Any, tmp_path: Path):
    rows = Rows(3, Column((2,), "float32"), storage, tmp_path)
    rows.array[...] = np.arange(6).reshape(3, 2)
    rows.grow(100_000)
    assert rows.array.shape == (100_000, 2)
    assert rows.array[:3].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert not rows.array[3:].any()


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_rows_do_not_move_under_somebody_who_holds_them(storage: Any, tmp_path: Path):
    rows = Rows(3, Column(), storage, tmp_path)
    view = rows.array[1:]
    rows.array[...] = 7
    rows.grow(1_000_000)
    rows.array[...] = 8
    assert set(view.tolist()) <= {7, 8}
    assert len(rows.array) == 1_000_000


# -- on a device, which is the processor here --------------------------------------------------------------------------


def test_what_lies_on_a_device_is_as_in_memory(monkeypatch: pytest.MonkeyPatch):
    """Every second row ends an episode, so it grows as well. What is saved of one is loaded by the other, in parts."""
    stream = Stream(spaces(), 2, 7)
    buffers = Replay(stream.space, 2, 400), Replay(stream.space, 2, 400, storage="device")
    for index in filling(stream, buffers):
        if index % 8 == 0:
            one, other = (replay.sample(np.random.default_rng(index), 50, n=2, gamma=0.9) for replay in buffers)
            for a, b in ((one.obs, other.obs), (one.next_obs, other.next_obs)):
                assert isinstance(b["obs"], torch.Tensor)
                assert a["obs"].tobytes() == b["obs"].numpy().tobytes()
            one, other = (replay.sequences(np.random.default_rng(index), 5, 4) for replay in buffers)
            assert one.next_obs["obs"].tobytes() == other.next_obs["obs"].numpy().tobytes()
    state = buffers[1].state_dict()
    assert digest(state) == digest(buffers[0].state_dict())
    monkeypatch.setattr(device, "CHUNK_BYTES", 100)
    for storage in ("memory", "device"):
        again = Replay(stream.space, 2, 400, storage=storage)
        again.load_state_dict(state)
        assert digest(again.state_dict()) == digest(state)
    buffers[1].add(stream.next())
    assert digest(again.state_dict()) == digest(state), "no copy"
    assert buffers[1].nbytes == buffers[0].nbytes
    buffers[1].close()
    assert buffers[1].nbytes < 0.9 * buffers[0].nbytes


LEAVES = {
    "image": gymnasium.spaces.Box(0, 255, (2, 4, 3), np.uint8),
    "mode": gymnasium.spaces.Discrete(3, start=2),
    "parts": gymnasium.spaces.MultiDiscrete([2, 3]),
    "switches": gymnasium.spaces.MultiBinary(4),
    "wide": gymnasium.spaces.Box(-1, 1, (2,), np.float64),
    "one": gymnasium.spaces.Box(-1, 1, (), np.float32),
}


@pytest.mark.parametrize("standardised", [False, True])
def test_tensors_are_encoded_like_arrays(standardised: bool):
    space = spaces(observation=gymnasium.spaces.Dict(LEAVES))
    each = [gymnasium.spaces.Dict(LEAVES).sample() for _ in range(50)]
    leaves = {leaf.name: np.array([x[leaf.path[0]] for x in each], leaf.dtype) for leaf in space.observation}
    rng = np.random.default_rng(0)
    weights = {name: rng.random(space.features, np.float32) for name in ("obs_mean", "obs_scale")} if standardised else {}
    tensors = {name: torch.from_numpy(leaf) for name, leaf in leaves.items()}
    assert device.encode(space, tensors, weights).numpy().tobytes() == encode(space, leaves, weights).tobytes()


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory. Tried"), TypeError("no such dtype")])
def test_a_device_without_room_is_said_at_once(monkeypatch: pytest.MonkeyPatch, failure: Exception):
    def full(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(device.torch, "zeros", full)
    image = spaces(observation=gymnasium.spaces.Box(0, 255, (84, 84), np.uint8))
    with pytest.raises(ConfigError, match=r"needs 6\.\d\d GiB on cuda:3 for uint8: (CUDA out|no such)") as caught:
        Replay(image, 8, 1_000_000, storage="device", device="cuda:3")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64])
def test_types_that_a_device_cannot_write_are_said_at_once(dtype: Any):
    depth = spaces(observation=gymnasium.spaces.Box(0, 9, (4,), dtype))
    with pytest.raises(ConfigError, match=f'on cpu for {np.dtype(dtype)}: .*not implemented.*\\n.*storage = "memory"'):
        Replay(depth, 2, 100, storage="device")


# -- whose turn it is --------------------------------------------------------------------------------------------------


def test_two_threads_at_once_are_refused_by_name():
    stream = Stream(spaces(), 2, 5)
    replay = Replay(stream.space, 2, 100)
    replay.add(stream.next())
    failures: list[BaseException] = []

    class Meanwhile:
        """While it is asked for numbers, another thread adds."""

        def integers(self, high: int, size: int) -> Any:
            def add() -> None:
                try:
                    replay.add(stream.next())
                except InvariantError as error:
                    failures.append(error)

            thread = threading.Thread(target=add)
            thread.start()
            thread.join()
            return np.zeros(size, np.int64)

    generator: Any = Meanwhile()
    before = digest(replay.state_dict())
    replay.sample(generator, 4)
    assert "`add` was called while another thread is in `sample`" in str(failures[0])
    assert digest(replay.state_dict()) == before
    replay.add(stream.next())  # the turn was given back


def test_the_turn_is_given_back_after_a_failure():
    stream = Stream(spaces(), 2, 5)
    replay = Replay(stream.space, 2, 100)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing to sample"):
            replay.sample(np.random.default_rng(0), 4)
    replay.add(stream.next())
    assert len(replay) == 10
