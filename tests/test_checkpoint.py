"""Checkpoints: what is saved comes back, what is damaged or hostile is named, and a kill never leaves a mixture."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import manifest, mark_of, part
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from aiorl import checkpoint
from aiorl.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "00000003", manifest(), part(3))
    return tmp_path / "00000003"


def assert_same(seen: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert isinstance(seen, np.ndarray)
        assert (seen.dtype, seen.shape) == (expected.dtype.newbyteorder("="), expected.shape)
        np.testing.assert_array_equal(seen, expected)
        assert seen.flags.writeable
    elif isinstance(expected, dict):
        assert isinstance(seen, dict)
        assert seen.keys() == expected.keys()
        for key in expected:
            assert_same(seen[key], expected[key])
    elif isinstance(expected, float) and expected != expected:
        assert seen != seen
    else:
        assert (type(seen), seen) == (type(expected), expected)


# -- round trips -------------------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    "zero-d": np.array(3.5),
    "empty array": np.zeros((0, 3), np.int32),
    "bool": np.array([True, False]),
    "int64": np.array([-(2**63), 2**63 - 1]),
    "float64": np.array([np.nan, np.inf, -0.0, 5e-324]),
    "float16": np.arange(3, dtype=np.float16),
    "bytes": np.frombuffer(b"raw\0bytes", np.uint8),
    "not contiguous": np.arange(24).reshape(4, 6)[::2, ::-3],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "empty": {},
    "deep": {"er": {"still": {}, "x": None, "y": np.ones(1)}},
    "none": None,
    "seed": 2**127 + 1,
    "numbers": [1, 2.5, -3],
    "no numbers": [],
    "nan": float("nan"),
    "minus infinity": float("-inf"),
    "float": 0.1 + 0.2,
    "true": True,
    "one": 1,
    "text": "ü\n\"'/~",
    "a/b": {"~/": np.zeros(1), "~1": 1, "": 2, "é": 3},
    "": np.arange(2),
}


@pytest.mark.parametrize("large", [1, 2**26])
def test_every_kind_of_value_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", large)
    checkpoint.save(tmp_path / "1", manifest(), {"learner": TREE, "nothing": {}})
    found, parts = checkpoint.load(tmp_path / "1", ("learner", "nothing"))
    assert_same(parts["learner"], TREE)
    assert parts["nothing"] == {}
    assert found == manifest(files=found.files, sha256=found.sha256)
    np.testing.assert_array_equal(np.signbit(parts["learner"]["float64"]), np.signbit(TREE["float64"]))


def test_numpy_scalars_come_back_as_numbers(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "1", manifest(), {"run": {"n": np.int64(3), "x": np.float32(0.5), "t": (1, 2)}})
    assert checkpoint.load(tmp_path / "1", ("run",))[1]["run"] == {"n": 3, "x": 0.5, "t": [1, 2]}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_large_arrays_stay_in_their_file_and_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(checkpoint, "LARGE_BYTES", 4_000)
    tree = {"small": np.arange(999, dtype=np.float32), "large": np.arange(1000, dtype=np.float32)}
    checkpoint.save(tmp_path / "1", manifest(), {"learner": tree})
    _, parts = checkpoint.load(tmp_path / "1", ("learner",))
    assert mapped()
    parts["learner"]["large"][...] = 7
    assert (parts["learner"]["large"] == 7).all()
    _, again = checkpoint.load(tmp_path / "1", ("learner",))
    assert_same(again["learner"], tree)
    shutil.rmtree(tmp_path / "1")
    assert_same(again["learner"], tree)
    del parts, again
    assert not mapped()


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**130), 2**130), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.sampled_from([np.zeros((2, 0)), np.arange(3), np.array(True)]),
)  # fmt: skip
TREES = st.recursive(
    st.dictionaries(st.text("ab/~0 1é", max_size=4), LEAVES, max_size=4),
    lambda inner: st.dictionaries(st.text("ab/~0 1é", max_size=4), st.one_of(LEAVES, inner), max_size=4),
    max_leaves=10,
)


def test_what_is_written_moves_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", 100)
    moved: list[int] = []
    array = np.arange(1000, dtype=np.uint8)
    checkpoint.save(tmp_path / "1", manifest(), {"learner": {"array": array}}, lambda: moved.append(1))
    assert len(moved) >= 10
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "1", ("learner",))[1]["learner"]["array"], array)


@settings(deadline=None, max_examples=150)
@given(tree=TREES)
def test_flatten_and_back(tree: dict[str, Any]) -> None:
    arrays, plain = checkpoint.flatten(tree)
    assert_same(checkpoint.unflatten(arrays, json.loads(json.dumps(plain)), Path("x")), tree)


def test_the_array_file_is_a_safetensors_file_with_aligned_arrays(tmp_path: Path) -> None:
    arrays, _ = checkpoint.flatten({k: v for k, v in TREE.items() if k != ""})
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"".join(bytes(piece) for piece in checkpoint.encode_arrays(arrays)))
    for name, array in load_file(target).items():
        assert_same(array, arrays[name])
    header = json.loads(target.read_bytes()[8 : 8 + int.from_bytes(target.read_bytes()[:8], "little")])
    assert all(h["data_offsets"][0] % arrays[name].itemsize == 0 for name, h in header.items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2, complex), "complex128"), (np.array(["a"]), "<U1"), (np.array([None]), "object"),
        ({1, 2}, "set"), (object(), "object"), ({3: 4}, "key 3"), (b"x", "bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name_and_nothing_is_left(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.save(tmp_path / "1", manifest(), {"learner": {"outer": {"inner": value}}})
    assert "outer" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_not_read_unless_asked_for(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "1", manifest(), part(3))
    next((tmp_path / "1").glob("run-*.json")).write_bytes(b"damaged")
    assert checkpoint.load(tmp_path / "1", ("policy",))[1].keys() == {"policy"}
    with pytest.raises(CheckpointError, match="holds no learner: it is a periodic checkpoint"):
        checkpoint.load(tmp_path / "1", ("learner",))


# -- old or new, never between -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: from here on no operation has an effect."""


class Operations:
    """Counts operations on files; the `limit`-th and all later ones fail, half written where they write."""

    NAMES = ("open", "replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "truncate")

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], *, for_ever: bool = True
    ) -> None:
        self.count, self.limit, self._error, self._for_ever = 0, 1 << 60, error, for_ever
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "open", self._open, raising=False)

    def step(self) -> None:
        self.count += 1
        if self.count == self.limit or (self.count > self.limit and self._for_ever):
            raise self._error()

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return real(*args, **kwargs)

        return call

    def _open(self, path: Any, mode: str) -> Any:
        self.step()
        return _HalfWriting(builtins.open(path, mode), self)


class _HalfWriting:
    def __init__(self, file: Any, operations: Operations) -> None:
        self._file, self._operations = file, operations

    def write(self, data: Any) -> None:
        self._file.write(bytes(data)[: len(data) // 2])
        self._operations.step()
        self._file.write(bytes(data)[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _HalfWriting:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def kill_at_every_operation(
    tmp_path: Path, error: Callable[[], BaseException], *, for_ever: bool
) -> Iterator[tuple[int, Path]]:
    """Saves over checkpoint 1 checkpoint 2, interrupted at operation 1, 2, … until none is left; yields what is there."""
    for limit in range(1, 1000):
        path = tmp_path / str(limit) / "best"
        checkpoint.save(path, manifest(version=1), part(1))
        with pytest.MonkeyPatch.context() as monkeypatch:
            operations = Operations(monkeypatch, error, for_ever=for_ever)
            operations.limit = limit
            try:
                checkpoint.save(path, manifest(version=2), part(2))
            except type(error()):
                pass
            ended = operations.count < limit
        yield limit, path
        if ended:
            return
    pytest.fail("there is no end of operations")


def files_of_a_clean_one(path: Path, mark: int) -> set[str]:
    checkpoint.save(path.parent / "clean", manifest(version=mark), part(mark))
    names = {p.name for p in (path.parent / "clean").iterdir()}
    shutil.rmtree(path.parent / "clean")
    return names


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    marks: list[int] = []
    for _, path in kill_at_every_operation(tmp_path, Killed, for_ever=True):
        marks.append(mark_of(path))
        checkpoint.remove_leftovers(path)
        assert {p.name for p in path.iterdir()} == files_of_a_clean_one(path, marks[-1])
        assert mark_of(path) == marks[-1]
    assert marks == sorted(marks), "it went back"
    assert set(marks) == {1, 2}
    assert len(marks) > 20, "operations were not counted"


def test_a_full_disk_leaves_the_old_checkpoint_and_no_leftovers(tmp_path: Path) -> None:
    """Any one operation fails, the following ones work."""
    for limit, path in kill_at_every_operation(tmp_path, lambda: OSError(28, "No space left on device"), for_ever=False):
        mark = mark_of(path)
        checkpoint.save(path, manifest(version=mark), part(mark))  # the next one in any case
        assert {p.name for p in path.iterdir()} == files_of_a_clean_one(path, mark), f"after operation {limit}"


def test_a_kill_in_the_first_save_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for limit in range(1, 1000):
        checkpoint.save(directory / "00000001", manifest(version=1), part(1))
        with pytest.MonkeyPatch.context() as monkeypatch:
            operations = Operations(monkeypatch, Killed)
            operations.limit = limit
            try:
                checkpoint.save(directory / "00000002", manifest(version=2), part(2))
            except Killed:
                pass
        complete = checkpoint.complete_checkpoints(directory)
        assert [mark_of(path) for path in complete] in ([1], [1, 2])
        checkpoint.prune(directory, keep=5, newest=9)
        assert sorted(directory.iterdir()) == complete
        shutil.rmtree(directory)
        if operations.count < limit:
            return


def test_what_the_manifest_names_is_on_the_disk_before_the_manifest(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut only what was synced is sure to be there, and renamings only once their directory was."""
    log: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(fd: int) -> None:
        log.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        fsync(fd)

    def logged_replace(source: Path, target: Path) -> None:
        log.append(f"rename {source.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    checkpoint.save(saved, manifest(version=4), part(4))
    files = [f".{name}.{kind}.tmp" for name in ("policy", "run") for kind in ("safetensors", "json")]
    order = [step for file in files for step in (f"sync {file}", f"rename {file}")]
    end = [f"sync {saved.name}", "sync .manifest.json.tmp", "rename .manifest.json.tmp", f"sync {saved.name}"]
    assert log[: len(order) + 4] == order + end
    assert log[len(order) + 4 :] == [f"sync {saved.parent.name}"]


def test_a_reader_meets_the_old_or_the_new_one_while_it_is_replaced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the manifest and reading the files the checkpoint is replaced and its old files deleted."""
    real, replaced = checkpoint._checked, False

    def checked(*args: Any) -> Path:
        nonlocal replaced
        if not replaced:
            replaced = True
            checkpoint.save(saved, manifest(version=4), part(4))
        return real(*args)

    monkeypatch.setattr(checkpoint, "_checked", checked)
    assert mark_of(saved) == 4


# -- directories of checkpoints ----------------------------------------------------------------------------------------


def test_complete_checkpoints_are_found_in_order_of_version(tmp_path: Path) -> None:
    for version in (100_000_000, 5, 40):
        checkpoint.save(tmp_path / f"{version:08d}", manifest(version=version), {})
    (tmp_path / "00000050").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "²").mkdir()
    (tmp_path / "7").write_text("a file")
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["00000005", "00000040", "100000000"]
    assert checkpoint.complete_checkpoints(tmp_path / "nowhere") == []


def test_prune_keeps_the_newest_and_removes_what_is_unfinished_or_of_a_given_up_future(tmp_path: Path) -> None:
    for version in (1, 2, 3, 4, 8, 9):
        checkpoint.save(tmp_path / f"{version:08d}", manifest(version=version), part(version))
    (tmp_path / "00000005").mkdir()
    (tmp_path / "00000005" / ".run.json.tmp").write_text("torn")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, keep=2, newest=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004", "notes.txt"]
    assert [mark_of(p) for p in checkpoint.complete_checkpoints(tmp_path)] == [3, 4]


def test_what_a_link_leads_to_is_not_touched(tmp_path: Path) -> None:
    """A user may keep one elsewhere, and a link to it among the others: it is not the run's to delete or to count."""
    elsewhere, directory = tmp_path / "elsewhere", tmp_path / "run" / "checkpoints"
    for version in (1, 2):
        checkpoint.save(directory / f"{version:08d}", manifest(version=version), part(version))
    for name in ("00000000", "00000003", "best"):
        checkpoint.save(elsewhere / name, manifest(), part(3))
        (elsewhere / name / ".policy.json.tmp").write_text("being written")
        link = directory / name if name != "best" else tmp_path / "run" / name
        link.symlink_to(elsewhere / name)
    before = sorted(elsewhere.rglob("*"))
    checkpoint.prune(directory, keep=2, newest=3)
    checkpoint.clean(tmp_path / "run")
    assert sorted(elsewhere.rglob("*")) == before
    assert [int(path.name) for path in checkpoint.complete_checkpoints(directory)] == [0, 1, 2, 3]


def test_what_cannot_be_deleted_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that cannot be removed, for example for lack of permission, must not lose the files that it names."""
    for version in (1, 2):
        checkpoint.save(tmp_path / f"{version:08d}", manifest(version=version), part(version))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        checkpoint.prune(tmp_path, keep=1, newest=2)
    assert [mark_of(p) for p in checkpoint.complete_checkpoints(tmp_path)] == [1, 2]
    checkpoint.prune(tmp_path, keep=1, newest=2)
    assert [mark_of(p) for p in checkpoint.complete_checkpoints(tmp_path)] == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]


def test_leftovers_are_told_from_what_somebody_else_put_there(saved: Path) -> None:
    mine = {p.name for p in saved.iterdir()}
    for name in ("notes.txt", "video-0123456789abcdef.mp4", "policy-export.json"):
        (saved / name).write_text("kept")
    for name in (".policy.json.tmp", "policy-0123456789abcdef.json", ".manifest.json.tmp"):
        (saved / name).write_text("torn")
    checkpoint.remove_leftovers(saved)
    assert {p.name for p in saved.iterdir()} == mine | {"notes.txt", "video-0123456789abcdef.mp4", "policy-export.json"}
    (saved / "manifest.json").write_text("damaged")
    before = set(saved.iterdir())
    checkpoint.remove_leftovers(saved)
    assert set(saved.iterdir()) == before, "what a damaged manifest names may still be of use"


