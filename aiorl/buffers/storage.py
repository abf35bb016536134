"""Where the large arrays of a buffer lie: in memory, or in files that are mapped into it."""

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

Storage = Literal["memory", "disk"]


class Rows:
    """`array` [rows, …], zeros at first, which can grow without being copied (in memory: where the C library can do that).

    On "disk" it lies in a file of `directory` that has no name, so it vanishes with its owner, whatever becomes of the
    process. Raises ConfigError if there is no room for all of it.
    """

    def __init__(self, rows: int, row: Column, storage: Storage = "memory", directory: str | Path | None = None) -> None:
        self._row, self._directory = row, directory
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

    def grow(self, rows: int) -> None:
        """Have so many rows; the new ones are zeros. Who holds the array, or a view of it, holds what it was before."""
        if self._file is not None:
            self._map(self._file, rows)
            return
        array: Array = self.__dict__.pop("array")
        try:
            array.resize((rows, *self._row.shape))
        except ValueError:  # somebody holds it: a debugger, if nobody else
            held, array = array, np.zeros((rows, *self._row.shape), self._row.dtype)
            array[: len(held)] = held
        self.array = array

    def close(self) -> None:
        self.array = np.zeros((0, *self._row.shape), self._row.dtype)
        if self._file is not None:
            self._close()

    def _map(self, file: int, rows: int) -> None:
        nbytes = max(1, rows * self._row.nbytes)
        try:
            _reserve(file, nbytes)
            mapped = mmap.mmap(file, nbytes)
        except OSError as error:
            raise ConfigError(
                f"the replay buffer needs {_gib(nbytes)} in {self._directory}, where {_free(self._directory)} are free: "
                f"{error.strerror}\n  use a smaller capacity or another directory, or keep it in memory"
            ) from None
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # rows are sampled singly: their neighbours need not be read as well
        self.array = np.frombuffer(mapped, self._row.dtype, rows * self._row.nbytes // np.dtype(self._row.dtype).itemsize)
        self.array = self.array.reshape(rows, *self._row.shape)


def _reserve(file: int, nbytes: int) -> None:
    """Take the blocks now: a write into a mapped file that finds the disk full would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)


def _free(directory: str | Path | None) -> str:
    try:
        return _gib(shutil.disk_usage(directory or ".").free)
    except OSError:
        return "nobody knows how many"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
