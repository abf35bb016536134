"""Checkpoints: directories of plain arrays and JSON, with a manifest that is the last to be written.

The manifest names every file with its size and SHA-256, and its own SHA-256; the hash is part of the name a file has on
disk. So the files of a new checkpoint lie beside those of the one it replaces, and renaming the new manifest into place,
which is atomic, is the moment of change: before it the old checkpoint is complete, after it the new one. What an
interrupted write leaves behind is named by no manifest. Reading trusts nothing: names, sizes and hashes are checked before
any content is looked at, and no content can name code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

import msgspec
import numpy as np
from msgspec import Meta

from aiorl.envs.spaces import Spaces
from aiorl.errors import CheckpointError
from aiorl.faultpoints import fault_point
from aiorl.segments import Array

SCHEMA = 3
MANIFEST = "manifest.json"
JSON_BYTES_MAX = 256 * 2**20
CHUNK_BYTES = 2**20
LARGE_BYTES = 2**26  # of an array
_ZEROS = "0" * 64
_NAME = re.compile(r"([a-z0-9_]+)\.(safetensors|json)")
_STORED = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}\.(safetensors|json)|\.[a-z0-9_.]+\.tmp")

_DTYPES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip

_NUMPY = {name: dtype for dtype, name in _DTYPES.items()}

Tree = dict[str, Any]
Which = Literal["best", "final", "latest"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint is of. `version` is the number of updates done, `env_steps` the transitions stored.

    `sha256` is of the manifest's own text, with zeros in its place.
    """

    schema: int
    kind: str
    version: Annotated[int, Meta(ge=0)]
    env_steps: Annotated[int, Meta(ge=0)]
    config: dict[str, Any]
    spaces: Spaces
    libraries: dict[str, str]
    files: dict[str, FileEntry] = {}
    notes: dict[str, Any] = {}
    sha256: str = ""

    def path_of(self, directory: Path, name: str) -> Path:
        """Where the file that the manifest calls `name` lies."""
        stem, _, suffix = name.partition(".")
        return directory / f"{stem}-{self.files[name].sha256[:16]}.{suffix}"


def save(path: Path, manifest: Manifest, parts: Mapping[str, Tree], wrote: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint into the directory `path`, replacing the one that is there, if any.

    `wrote` is called again and again while it gets on. Raises OSError if the disk does not let it; then, as after a kill at
    any moment, the old one is still complete.
    """
    _make_directory(path)
    try:
        files: dict[str, FileEntry] = {}
        for name, tree in parts.items():
            arrays, plain = flatten(tree)
            files[f"{name}.safetensors"] = _store(path, f"{name}.safetensors", _told(encode_arrays(arrays), wrote))
            files[f"{name}.json"] = _store(path, f"{name}.json", _told([_encode_json(plain, name)], wrote))
        manifest = msgspec.structs.replace(manifest, files=files)
        _sync_directory(path)
        fault_point("checkpoint.manifest")
        _write(path / f".{MANIFEST}.tmp", [encode_manifest(manifest)])
        os.replace(path / f".{MANIFEST}.tmp", path / MANIFEST)
        _sync_directory(path)
        _sync_directory(path.parent)
    finally:
        remove_leftovers(path)


def encode_manifest(manifest: Manifest) -> bytes:
    """Its text, with its own hash in it."""
    blank = msgspec.structs.replace(manifest, sha256=_ZEROS)
    text = msgspec.json.format(msgspec.json.encode(blank))
    head, _, tail = text.rpartition(_ZEROS.encode())  # it is the last field
    return head + hashlib.sha256(text).hexdigest().encode() + tail


def find(path: Path, which: Which | None = None) -> Path:
    """The checkpoint meant by a run directory or by a checkpoint directory itself. Raises CheckpointError."""
    try:
        return _find(path, which)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None


def _find(path: Path, which: Which | None) -> Path:
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no run or checkpoint at {path}")
    for kind in (which,) if which else ("best", "final", "latest"):
        if kind == "latest":
            found = complete_checkpoints(path / "checkpoints")
            if found:
                return found[-1]
        elif (path / str(kind) / MANIFEST).is_file():
            return path / str(kind)
    raise CheckpointError(f"{path} holds no {which + ' ' if which else ''}checkpoint yet")


def load(path: Path, parts: tuple[str, ...] = ()) -> tuple[Manifest, dict[str, Tree]]:
    """Read the manifest and the named parts. Raises CheckpointError naming the file and what is wrong with it."""
    manifest = load_manifest(path)
    while True:
        try:
            return manifest, {name: _load_part(path, name, manifest) for name in parts}
        except FileNotFoundError as error:
            before, manifest = manifest, load_manifest(path)
            if manifest == before:
                raise CheckpointError(f"{error.filename} is missing") from None
            # else a running program has just replaced this checkpoint: read the new one


def load_manifest(path: Path) -> Manifest:
    """Read the manifest alone. Raises CheckpointError."""
    try:
        with _open(path / MANIFEST) as file:
            if os.fstat(file.fileno()).st_size > JSON_BYTES_MAX:
                raise CheckpointError(f"{path / MANIFEST} is damaged: it has more than {JSON_BYTES_MAX} bytes")
            text = file.read()
            manifest = msgspec.json.decode(text, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged or of another make: {error}") from None
    if manifest.schema != SCHEMA:
        raise CheckpointError(
            f"{path / MANIFEST} has checkpoint schema {manifest.schema}, this version of aiorl reads {SCHEMA}\n"
            f"  it was written by aiorl {manifest.libraries.get('aiorl', '?')}"
        )
    head, _, tail = text.rpartition(manifest.sha256.encode() or b"\n")
    if hashlib.sha256(head + _ZEROS.encode() + tail).hexdigest() != manifest.sha256:
        raise CheckpointError(f"{path / MANIFEST} does not match its own SHA-256: the file is damaged")
    for name in manifest.files:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST}: refusing the file name {name!r}")
    return manifest


def _load_part(path: Path, name: str, manifest: Manifest) -> Tree:
    if f"{name}.json" not in manifest.files or f"{name}.safetensors" not in manifest.files:
        raise CheckpointError(f"{path} holds no {name}: it is a {manifest.kind} checkpoint\n  use one of checkpoints/")
    plain = _decode_json(_checked(path, f"{name}.json", manifest))
    arrays = decode_arrays(_checked(path, f"{name}.safetensors", manifest))
    return unflatten(arrays, plain, path / name)


# -- directories of checkpoints ----------------------------------------------------------------------------------------


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    return [path for path in _numbered(directory) if (path / MANIFEST).is_file()]


def prune(directory: Path, keep: int, newest: int) -> None:
    """Keep the last `keep` checkpoints up to version `newest`; delete all others and what interrupted writes left.

    Later versions than the newest are of a future that was given up when the run was resumed from before it. What a link
    leads to is not the run's own: it is left alone.
    """
    own = [path for path in _numbered(directory) if not path.is_symlink()]
    kept = [path for path in own if (path / MANIFEST).is_file() and int(path.name) <= newest][-keep:]
    for path in own:
        if path in kept:
            remove_leftovers(path)
        else:
            with contextlib.suppress(OSError):  # as it is, or gone: what is left is deleted the next time
                (path / MANIFEST).unlink(missing_ok=True)  # first: half deleted it must not look complete,
                _sync_directory(path)  # nor after a power cut
                shutil.rmtree(path)



def clean(run: Path) -> None:
    """Delete what a killed program left unfinished in the run directory `run`: nothing that a manifest names."""
    for path in (*_numbered(run / "checkpoints"), run / "best", run / "final"):
        if not path.is_symlink():
            remove_leftovers(path)


def remove_leftovers(path: Path) -> None:
    """Delete what an interrupted write left in the checkpoint directory `path`, and the directory if that empties it."""
    try:
        manifest = load_manifest(path) if (path / MANIFEST).exists() else None
    except CheckpointError:
        return  # not to be understood: nothing in it is ours to delete
    named = {manifest.path_of(path, name) for name in manifest.files} if manifest else set[Path]()
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            if _STORED.fullmatch(file.name) and file not in named:
                file.unlink()
        if manifest is None:
            path.rmdir()


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


# -- trees of arrays and plain values ----------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Array], dict[str, Any]]:
    """Split a nested dict into arrays by path (`a/b/c`) and everything else by path. ValueError for what cannot be kept.

    In a path, a key's own `~` and `/` are written `~0` and `~1`, as in JSON pointers.
    """
    arrays: dict[str, Array] = {}
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"state key {key!r} under {prefix!r}: expected a str")
        path = prefix + key.replace("~", "~0").replace("/", "~1")
        if isinstance(value, np.ndarray):
            arrays[path] = cast(Array, value)
        elif isinstance(value, Mapping) and value:
            inner_arrays, inner_plain = flatten(cast("Mapping[str, Any]", value), f"{path}/")
            arrays |= inner_arrays
            plain |= inner_plain
        elif value is None or isinstance(value, str | int | float | list | tuple | Mapping):
            plain[path] = value
        elif isinstance(value, np.generic):
            plain[path] = value.item()
        else:
            raise ValueError(f"state {path!r} is a {type(value).__name__}: expected an array, number, str, list or None")
    return arrays, plain


def unflatten(arrays: Mapping[str, Array], plain: Mapping[str, Any], where: Path) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, value in [*arrays.items(), *plain.items()]:
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in path.split("/"))
        node = tree
        for key in parents:
            inner: Any = node.setdefault(key, {})
            if not isinstance(inner, dict):
                raise CheckpointError(f"{where}: {path} lies inside something that is not a group")
            node = cast(Tree, inner)
        if last in node:
            raise CheckpointError(f"{where}: {path} is there twice")
        node[last] = value
    return tree


def encode_arrays(arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: large arrays are neither copied nor do they hold up other threads.

    The format: 8 bytes, the length of the header; the header, JSON padded to a multiple of 8; the arrays, little-endian.
    """
    header: dict[str, Any] = {}
    pieces: list[Array] = []
    offset = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):  # wide ones first: aligned
        if array.dtype.name not in _DTYPES or name == "__metadata__":
            raise ValueError(f"state {name!r} is an array of {array.dtype}, which a checkpoint cannot hold under this name")
        end = offset + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": (offset, end)}
        pieces.append(array)
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in pieces:
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        yield plain.reshape(-1).view(np.uint8).data


def decode_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file, which can be written to without changing it. Raises CheckpointError.

    Large ones stay in the file until they are looked at: experience that is kept on disk may be more than memory holds.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with cast(Any, safe_open)(path, framework="numpy") as file:  # it checks the header
            large = _map_large(path)
            return large | {name: file.get_tensor(name) for name in sorted({*file.keys()} - {*large})}
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from None


def _map_large(path: Path) -> dict[str, Array]:
    """The large arrays of a safetensors file with a sound header, as private mappings of it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        found: dict[str, Array] = {}
        for name, entry in header.items():
            begin, end = entry.get("data_offsets", (0, 0))
            if end - begin >= LARGE_BYTES and entry["dtype"] in _NUMPY:
                dtype = np.dtype(_NUMPY[entry["dtype"]]).newbyteorder("<")
                mapped = np.memmap(file, dtype, "c", 8 + length + begin, tuple(entry["shape"]))
                native = mapped.view(np.ndarray).astype(dtype.newbyteorder("="), copy=False)
                found[name] = np.require(native, requirements="A")
    return found


def _encode_json(plain: dict[str, Any], part: str) -> bytes:
    data = json.dumps(plain).encode()
    if len(data) > JSON_BYTES_MAX:
        raise ValueError(f"the state of {part!r} has {len(data)} bytes outside arrays: keep long lists as NumPy arrays")
    return data


def _decode_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_BYTES_MAX:
        raise CheckpointError(f"{path} is damaged: it has more than {JSON_BYTES_MAX} bytes")
    try:
        plain = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path} holds a {type(plain).__name__}, expected an object")
    return cast("dict[str, Any]", plain)


# -- files -------------------------------------------------------------------------------------------------------------


def _store(directory: Path, name: str, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a file of a coming manifest under its name with the hash in it."""
    temporary = directory / f".{name}.tmp"
    entry = _write(temporary, pieces)
    fault_point("checkpoint.write")
    stem, _, suffix = name.partition(".")
    os.replace(temporary, directory / f"{stem}-{entry.sha256[:16]}.{suffix}")
    return entry


def _told(pieces: Iterable[bytes | memoryview], wrote: Callable[[], None]) -> Iterator[bytes | memoryview]:
    """The same bytes, `wrote` called after each of them, large ones in several."""
    for piece in pieces:
        for start in range(0, len(piece), LARGE_BYTES):
            yield piece[start : start + LARGE_BYTES]
            wrote()


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def _make_directory(path: Path) -> None:
    """Make a directory and those it lies in, so that they are there after a power cut as well."""
    missing = [path, *path.parents]
    missing = missing[: next(n for n, directory in enumerate(missing) if directory.is_dir())]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing[1:]:  # `save` sees to the last one
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _checked(directory: Path, name: str, manifest: Manifest) -> Path:
    """The path of a file that is just as the manifest says. FileNotFoundError if it is missing."""
    path, entry = manifest.path_of(directory, name), manifest.files[name]
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {entry.size}: the file is damaged")
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{path} does not match its SHA-256 in the manifest: the file is damaged")
    return path


def _open(path: Path) -> BinaryIO:
    """Open a regular file, nothing else: no link, and no pipe on which reading would wait."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path} is not a regular file")
    return os.fdopen(fd, "rb")
