"""Where the large arrays of a buffer lie: in memory, or in files that are mapped into it (for a GPU see `device`)."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal

import numpy as np

from aiorl.errors import ConfigError
from aiorl.segments import Array, Column

Storage = Literal["memory", "disk", "device"]


class Rows:
    """`array` [rows, …], zeros at first, which can grow without being copied (in memory: where the C library can do that).

    On "disk" it lies in a file of `directory` that has no name, so it vanishes with its owner, whatever becomes of the
    process. Raises ConfigError if there is no room for all of it.
    """

    def __init__(self, rows: int, row: Column, storage: Storage = "memory", directory: str | Path | None = None) -> None:
        self.row, self._directory = row, directory
        self._file: int | None = None
        if storage == "memory":
            self.array: Array = np.zeros((rows, *row.shape), row.dtype)
            return
        if storage != "disk" or directory is None:
            raise ConfigError(f"replay storage {storage!r} in {directory}: expected 'memory', or 'disk' with a directory")
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(f"replay storage: cannot write in {directory}: {error.strerror}") from None
        self._close = weakref.finalize(self, os.close, self._file)
        self._map(self._file, rows)

    def take(self, places: Array) -> Array:
        """The rows at `places` […], which are there."""
        return self.array.take(places, 0, mode="clip")  # which is quicker than "raise"

    def put(self, places: Array, values: Array) -> None:
        self.array[places] = values

    def grow(self, rows: int) -> None:
        """Have so many rows; the new ones are zeros. Who holds the array, or a view of it, holds what it was before."""
        if self._file is not None:
            self._map(self._file, rows)
            return
        array: Array = self.__dict__.pop("array")
        try:
            array.resize((rows, *self.row.shape))
        except ValueError:  # somebody holds it: a debugger, if nobody else
            held, array = array, np.zeros((rows, *self.row.shape), self.row.dtype)
            array[: len(held)] = held
        self.array = array

    def copy(self, count: int) -> Array:
        """The first `count` rows as they are now, kept where these are until the last array on them is gone. Raises OSError
        if there is no room for them on disk."""
        if self._file is None:
            return self.array[:count].copy()
        with tempfile.TemporaryFile(dir=self._directory) as file:
            copied = self._array(_mapped(file.fileno(), max(1, count * self.row.nbytes), self._directory), count)
        copied[...] = self.array[:count]
        return copied

    def close(self) -> None:
        self.array = np.zeros((0, *self.row.shape), self.row.dtype)
        if self._file is not None:
            self._close()

    def _map(self, file: int, rows: int) -> None:
        nbytes = max(1, rows * self.row.nbytes)
        try:
            mapped = _mapped(file, nbytes, self._directory)
        except OSError as error:
            raise ConfigError(
                f"the replay buffer needs {_gib(nbytes)} in {self._directory}, where {_free(self._directory)} are free: "
                f"{error.strerror}\n  use a smaller capacity or another directory, or keep it in memory"
            ) from None
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # rows are sampled singly: their neighbours need not be read as well
        self.array = self._array(mapped, rows)

    def _array(self, mapped: mmap.mmap, rows: int) -> Array:
        array = np.frombuffer(mapped, self.row.dtype, rows * self.row.nbytes // np.dtype(self.row.dtype).itemsize)
        return array.reshape(rows, *self.row.shape)


def _mapped(file: int, nbytes: int, directory: str | Path | None) -> mmap.mmap:
    """A file's bytes, zeros where it grows. Its blocks are taken now: a write into a mapped file that finds the disk full
    would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, nbytes)
        else:
            os.ftruncate(file, nbytes)
        return mmap.mmap(file, nbytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def free_bytes(directory: str | Path) -> int | None:
    """Room on the disk of a directory, which need not be there yet; None where the platform does not say."""
    path = Path(directory).absolute()
    try:
        usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
        return usage.free if usage.total else None  # /proc, say, has no size
    except OSError:
        return None


def _free(directory: str | Path | None) -> str:
    free = free_bytes(directory or ".")
    return "nobody knows how many" if free is None else _gib(free)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
