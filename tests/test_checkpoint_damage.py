"""Damaged and hostile checkpoints: each is refused with the name of the file, and none runs code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import edit_manifest, manifest, mark_of, part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiorl import checkpoint
from aiorl.checkpoint import FileEntry
from aiorl.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "00000003", manifest(), part(3))
    return tmp_path / "00000003"


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, ("policy", "run"))
    text = str(caught.value)
    for word in words:
        assert word in text
    assert len(text.splitlines()) <= 3
    return text


FILES = ("policy-*.safetensors", "policy-*.json", "run-*.safetensors", "run-*.json")


@pytest.mark.parametrize("pattern", FILES)
def test_each_damaged_file_is_named(saved: Path, pattern: str) -> None:
    (file,) = saved.glob(pattern)
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(saved, file.name, "SHA-256")
    file.write_bytes(whole[:-1])
    refused(saved, file.name, f"{len(whole) - 1} bytes")
    file.write_bytes(whole + b" ")
    refused(saved, file.name, f"{len(whole) + 1} bytes")
    file.unlink()
    refused(saved, file.name, "missing")
    file.mkdir()
    refused(saved, file.name, "not a regular file")
    file.rmdir()
    os.mkfifo(file)  # reading it would wait for ever
    refused(saved, file.name, "not a regular file")
    file.unlink()
    elsewhere = saved.parent / "elsewhere"
    elsewhere.write_bytes(whole)
    file.symlink_to(elsewhere)
    refused(saved, file.name, "cannot be read")
    file.unlink()
    file.write_bytes(whole)
    assert mark_of(saved) == 3


def test_each_damaged_bit_of_the_manifest_is_noticed(saved: Path) -> None:
    """What it says of itself has a checksum as well: a flipped digit is as good a number as any other."""
    file = saved / "manifest.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 2, 4, 16, 32, 128):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            refused(saved, "manifest.json")
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        if whole[length:].strip():
            refused(saved, "manifest.json")
    file.write_bytes(whole)
    assert mark_of(saved) == 3


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_file_is_noticed_and_named(saved: Path, data: st.DataObject) -> None:
    files = sorted(path for path in saved.iterdir() if path.is_file())
    before = {path: path.read_bytes() for path in files}
    path = data.draw(st.sampled_from(files))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "swap", "missing", "twice"]))
    whole = before[path]
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.sampled_from([file for file in files if file != path]))
    after = {
        "flip": whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :],
        "cut": whole[:at], "insert": whole[:at] + data.draw(st.binary(min_size=1, max_size=9)) + whole[at:],
        "overwrite": whole[:at] + data.draw(st.binary(min_size=1, max_size=99)) + whole[at + 99 :],
        "swap": before[other], "missing": None, "twice": whole * 2,
    }[how]  # fmt: skip
    try:
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        if after != whole and not (path.name == "manifest.json" and after is not None and after.strip() == whole.strip()):
            refused(saved, path.name)
    finally:
        for file, contents in before.items():
            file.write_bytes(contents)
    assert mark_of(saved) == 3


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema":' * 50_000, b"1" * 5000]
)
def test_nonsense_for_a_manifest(saved: Path, text: bytes) -> None:
    (saved / "manifest.json").write_bytes(text)
    refused(saved, "manifest.json", "damaged or of another make")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=99), ["schema 99", f"reads {checkpoint.SCHEMA}", "aiorl 0.1"]),
        (lambda m: m.update(code="os.system"), ["code"]),
        (lambda m: m.update(version=-1), ["version"]),
        (lambda m: m.update(env_steps="many"), ["env_steps"]),
        (lambda m: m.pop("spaces"), ["spaces"]),
        (lambda m: m["spaces"]["action"].update(dtype="object"), ["dtype 'object'"]),
        (lambda m: m["spaces"]["action"].update(load="x"), ["load"]),
        (lambda m: m["files"]["run.json"].update(size=-1), ["size"]),
        (lambda m: m["files"]["run.json"].update(sha256="../../x"), ["sha256"]),
        (lambda m: m["files"]["run.json"].update(sha256="0" * 63), ["sha256"]),
        (lambda m: m["files"]["run.json"].update(path="/x"), ["path"]),
        (lambda m: m["files"].pop("run.json"), ["holds no run"]),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_as_it_should_be(saved: Path, change: Any, words: list[str]) -> None:
    edit_manifest(saved, change)
    refused(saved, *words)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/b.json", "..", "", "x.pkl", "x.json\n", "x.json/../y.json", "X.json", "x\0.json"]
)
def test_file_names_that_lead_elsewhere(saved: Path, name: str) -> None:
    edit_manifest(saved, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    refused(saved, "refusing the file name", repr(name))


def replace_file(saved: Path, name: str, data: bytes) -> None:
    """Put other contents in a file, with a manifest that agrees."""
    entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    edit_manifest(saved, lambda m: m["files"].update({name: msgspec.to_builtins(entry)}))
    found = checkpoint.load_manifest(saved)
    found.path_of(saved, name).write_bytes(data)


class Planted:
    """Unpickling this makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["policy.safetensors", "policy.json", "run.safetensors", "run.json", "manifest.json"])
def test_no_file_is_ever_unpickled(saved: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps(Planted(marker))
    if name == "manifest.json":
        (saved / name).write_bytes(data)
    else:
        replace_file(saved, name, data)
    refused(saved, name.partition(".")[0])
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the trap would not have worked"


def tensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 8, b"\xff" * 100, bytes(1000), tensors(b"{}" * 3), tensors(b"[" * 50_000), tensors({"w": 3}),
        tensors({"w": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 0]}}),
        tensors({"w": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}),
        tensors({"w": {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]}}),
        tensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}, b"12345678"),
        tensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [800, 808]}}, b"12345678"),
        tensors({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        tensors({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
        tensors({"w": {"dtype": "os.system", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_hostile_array_file_with_the_right_hash(saved: Path, data: bytes) -> None:
    replace_file(saved, "policy.safetensors", data)
    refused(saved, "policy-", "not a valid safetensors file")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"nonsense", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_hostile_json_file_with_the_right_hash(saved: Path, data: bytes) -> None:
    replace_file(saved, "run.json", data)
    refused(saved, "run-")


@pytest.mark.parametrize("plain", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"rows": 1}, {"rows/x": 1}])
def test_paths_that_contradict_each_other(saved: Path, plain: dict[str, Any]) -> None:
    replace_file(saved, "run.json", json.dumps(plain).encode())
    refused(saved, "run")


@pytest.mark.parametrize("name", ["policy.safetensors", "run.json", "manifest.json"])
def test_a_huge_sparse_file_is_not_read(saved: Path, name: str) -> None:
    found = checkpoint.load_manifest(saved)
    os.truncate(saved / name if name == "manifest.json" else found.path_of(saved, name), 10 * 2**30)
    refused(saved, name.partition(".")[0], "bytes")


def test_too_much_json_is_refused_when_it_is_saved_and_when_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "JSON_BYTES_MAX", 1000)
    with pytest.raises(ValueError, match="keep long lists as NumPy arrays"):
        checkpoint.save(saved, manifest(), {"run": {"long": list(range(1000))}})
    monkeypatch.undo()
    assert mark_of(saved) == 3
    replace_file(saved, "run.json", b'{"mark": 3}' + b" " * 5000)
    edit_manifest(saved, lambda m: m.update(config={}))
    monkeypatch.setattr(checkpoint, "JSON_BYTES_MAX", 4000)
    refused(saved, "run-", "more than 4000 bytes")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("x"), lambda p: p.mkdir()])
def test_what_is_no_checkpoint_at_all(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "thing")
    refused(tmp_path / "thing", "is not a checkpoint: it has no manifest.json")
