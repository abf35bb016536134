"""Checkpoints: directories of plain arrays and JSON with a manifest, written beside and renamed into place.

A checkpoint is either complete or not there: files are written to a temporary directory and synced, the manifest (with size
and SHA-256 of each) last, then the directory is renamed. Reading trusts nothing: names, sizes and hashes are checked before
any content is looked at, and no content can name code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from aiorl.envs.spaces import Spaces
from aiorl.errors import CheckpointError
from aiorl.segments import Array

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES_MAX = 16 * 2**20
_FILE_NAME = re.compile(r"[a-z0-9_]+\.(safetensors|json)")

Tree = dict[str, Any]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint is of. `version` is the number of updates done, `env_steps` the transitions stored."""

    schema: int
    kind: str
    version: int
    env_steps: int
    config: dict[str, Any]
    spaces: Spaces
    libraries: dict[str, str]
    files: dict[str, FileEntry] = {}
    notes: dict[str, Any] = {}


def save(path: Path, manifest: Manifest, parts: Mapping[str, Tree]) -> None:
    """Write a checkpoint directory at `path`, replacing one that is there. Raises OSError if the disk does not let it."""
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files: dict[str, FileEntry] = {}
        for name, tree in parts.items():
            arrays, plain = flatten(tree)
            files[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", encode_arrays(arrays))
            files[f"{name}.json"] = _write(temporary / f"{name}.json", json.dumps(plain).encode())
        manifest = msgspec.structs.replace(manifest, files=files)
        _write(temporary / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        _sync_directory(temporary)
        _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move_into_place(temporary: Path, path: Path) -> None:
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(path: Path, parts: tuple[str, ...] = ()) -> tuple[Manifest, dict[str, Tree]]:
    """Read the manifest and the named parts. Raises CheckpointError naming the file and what is wrong with it."""
    manifest = load_manifest(path)
    trees: dict[str, Tree] = {}
    for name in parts:
        if f"{name}.json" not in manifest.files or f"{name}.safetensors" not in manifest.files:
            raise CheckpointError(f"{path} holds no {name}: it is a {manifest.kind} checkpoint\n  use one of checkpoints/")
        plain = _decode_json(_read(path, f"{name}.json", manifest), path / f"{name}.json")
        arrays = decode_arrays(_read(path, f"{name}.safetensors", manifest), path / f"{name}.safetensors")
        trees[name] = unflatten(arrays, plain, path / name)
    return manifest, trees


def load_manifest(path: Path) -> Manifest:
    try:
        data = _read_file(path / MANIFEST, MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged or of another make: {error}") from None
    if manifest.schema != SCHEMA:
        raise CheckpointError(
            f"{path} has checkpoint schema {manifest.schema}, this version of aiorl reads {SCHEMA}\n"
            f"  it was written by aiorl {manifest.libraries.get('aiorl', '?')}"
        )
    return manifest


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name))


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted write left behind."""
    if directory.is_dir():
        for path in directory.glob(".*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in directory.glob(".*.old-*"):
            shutil.rmtree(path, ignore_errors=True)


# -- trees of arrays and plain values ----------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Array], dict[str, Any]]:
    """Split a nested dict into arrays by path (`a/b/c`) and everything else by path."""
    arrays: dict[str, Array] = {}
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if "/" in key:
            raise ValueError(f"state key {prefix + key!r} must not contain '/'")
        if isinstance(value, Mapping):
            inner_arrays, inner_plain = flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}/")
            arrays |= inner_arrays
            plain |= inner_plain
        elif isinstance(value, np.ndarray):
            arrays[prefix + key] = cast(Array, value)
        else:
            plain[prefix + key] = value
    if not tree and prefix:
        plain[prefix] = None  # an empty dict
    return arrays, plain


def unflatten(arrays: Mapping[str, Array], plain: Mapping[str, Any], where: Path) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, value in [*arrays.items(), *plain.items()]:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{where}: {path} lies inside something that is not a group")
        if last:
            node[last] = value
    return tree


def encode_arrays(arrays: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save as encode

    return encode({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()})


def decode_arrays(data: bytes, where: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as decode

    try:
        return {name: array.copy() for name, array in decode(data).items()}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is not a valid safetensors file: {error}") from None


# -- files -------------------------------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> FileEntry:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path, name: str, manifest: Manifest) -> bytes:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{path}: refusing the file name {name!r}")
    entry = manifest.files[name]
    try:
        data = _read_file(path / name, entry.size)
    except FileNotFoundError:
        raise CheckpointError(f"{path / name} is missing") from None
    if len(data) != entry.size:
        raise CheckpointError(f"{path / name} has {len(data)} bytes, the manifest says {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{path / name} does not match its SHA-256 in the manifest: the file is damaged")
    return data


def _read_file(path: Path, bytes_max: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > bytes_max:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {bytes_max}")
        return file.read()


def _decode_json(data: bytes, where: Path) -> dict[str, Any]:
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{where} holds {type(plain).__name__}, expected an object")
    return cast("dict[str, Any]", plain)
