"""When and what a run saves: periodic, requested, best and final checkpoints, written beside training."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from aiorl import checkpoint
from aiorl.assembly import Assembly
from aiorl.errors import TrainingError
from aiorl.events import AnyEvent, Checkpointed, CheckpointFailed
from aiorl.report import Report, library_versions

FAILURES_MAX = 3  # in a row; then the run ends


class Snapshot(NamedTuple):
    """An immutable policy: version, env steps it had seen, and the weight buffer held for it. `final`: the run's last."""

    version: int
    env_steps: int
    buffer: int
    final: bool


class Checkpointer:
    """Captures a run between two updates and writes it on the files' thread, one checkpoint at a time."""

    def __init__(
        self, made: Assembly, report: Report, emit: Callable[[AnyEvent], None], flush: Callable[[], Awaitable[None]]
    ) -> None:
        """`flush()` writes what the run has told of itself so far."""
        self._made, self._report, self._emit, self._flush = made, report, emit, flush
        self._config = made.checked.config.to_dict()
        self._libraries = library_versions()
        self._writing: asyncio.Task[Path] | None = None
        self._requested: set[asyncio.Task[Path]] = set()
        self._saving = 0
        self.written = 0  # grows while something is being written, on the files' thread
        self._failures = 0
        self._saved_version = -1

    @property
    def writing(self) -> bool:
        return self._saving > 0

    @property
    def _directory(self) -> Path:
        return self._made.checked.directory / "checkpoints"

    async def save_periodic(self) -> None:
        """Called between two updates: capture now, write while training goes on."""
        await self._settle()
        await self._start("periodic")

    async def look(self) -> None:
        """Called between two updates: report a write that has failed meanwhile at once, not when the next one is due."""
        if self._writing is not None and self._writing.done():
            await self._settle()

    async def save_requested(self) -> Path:
        """Wait for the running update, capture, write; the checkpoint's path."""
        async with self._made.parts.between_updates():
            writing = await self._begin("requested")
        self._requested.add(writing)
        writing.add_done_callback(self._requested.discard)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:  # it is written all the same
            writing.add_done_callback(self._tell_failure)
            raise

    async def save_final(self) -> None:
        """After the last update: a checkpoint to go on from, and `final/` to act with."""
        await self._settle()
        parts = self._made.parts
        version = parts.pacer.commits
        if self._saved_version != version:
            await self._start("final")
            await self._settle()
        buffer = parts.weights.acquire(version)
        try:
            await self._save_policy("final", version, self._report.stored, buffer, {})
        finally:
            parts.weights.release(buffer)

    async def save_best(self, snapshot: Snapshot, notes: dict[str, Any]) -> None:
        """`best/` becomes the very snapshot that was evaluated (its weight buffer is still held)."""
        await self._save_policy("best", snapshot.version, snapshot.env_steps, snapshot.buffer, notes)

    def close(self) -> None:
        """The run ends: a write under way goes on by itself, but nothing more is reported."""
        for writing in (*self._requested, *filter(None, [self._writing])):
            writing.cancel()

    # -- the work --------------------------------------------------------------------------------------------------

    async def _start(self, kind: str) -> None:
        try:
            self._writing = await self._begin(kind)
        except OSError as error:  # a copy on disk has no room
            self._note_failure(error)

    async def _begin(self, kind: str) -> asyncio.Task[Path]:
        """Capture; no update can come in between, the learner thread does one thing after the other."""
        parts = self._made.parts
        manifest = self._manifest(kind, parts.pacer.commits, self._report.stored, {})
        report_state = self._report.state_dict()
        degree = self._made.dial.state_dict() if self._made.dial is not None else {}
        # Once the degree has changed, a resumed run begins with the newest version: no older one is needed.
        held = {v: parts.weights.acquire(v) for v in parts.weights.versions if not degree or v == manifest.version}
        try:
            behaviour = {v: parts.weights.arrays(b) for v, b in held.items() if v != manifest.version}
            trees = await parts.learner_thread.run(parts.trainer.capture, behaviour)
        finally:
            for buffer in held.values():
                parts.weights.release(buffer)
        trees["run"] |= {"report": report_state, "degree": degree}
        return asyncio.get_running_loop().create_task(self._write(manifest, trees))

    async def _write(self, manifest: checkpoint.Manifest, trees: dict[str, Any]) -> Path:
        path = self._directory / f"{manifest.version:08d}"
        await self._flush()  # first: a run resumed from it goes on with its events and its record where they must be whole
        await self._save(path, manifest, trees)
        keep, newest = self._made.checked.config.keep, self._made.parts.pacer.commits
        await self._made.files_thread.run(checkpoint.prune, self._directory, keep, newest)
        self._saved_version = manifest.version
        self._note_success(path, manifest)
        return path

    async def _settle(self) -> None:
        """Wait for the write under way; a failure is reported, three in a row end the run."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            await writing
        except OSError as error:
            self._note_failure(error)

    async def _save_policy(self, kind: str, version: int, env_steps: int, buffer: int, notes: dict[str, Any]) -> None:
        weights = self._made.parts.weights.arrays(buffer)  # held by the caller: nobody writes into it meanwhile
        path = self._made.checked.directory / kind
        manifest = self._manifest(kind, version, env_steps, notes)
        try:
            await self._save(path, manifest, {"policy": weights})
        except OSError as error:
            self._note_failure(error)
        else:
            self._note_success(path, manifest)

    async def _save(self, path: Path, manifest: checkpoint.Manifest, parts: dict[str, Any]) -> None:
        self._saving += 1
        try:
            await self._made.files_thread.run(checkpoint.save, path, manifest, parts, self._wrote)
        finally:
            self._saving -= 1

    def _wrote(self) -> None:
        self.written += 1

    def _manifest(self, kind: str, version: int, env_steps: int, notes: dict[str, Any]) -> checkpoint.Manifest:
        return checkpoint.Manifest(
            schema=checkpoint.SCHEMA,
            kind=kind,
            version=version,
            env_steps=env_steps,
            config=self._config,
            spaces=self._made.checked.spaces,
            libraries=self._libraries,
            notes=notes,
        )

    def _note_success(self, path: Path, manifest: checkpoint.Manifest) -> None:
        self._failures = 0
        place = {**self._place(), "version": manifest.version, "env_steps": manifest.env_steps}
        self._emit(Checkpointed(**place, path=str(path), kind=manifest.kind))

    def _note_failure(self, error: OSError) -> None:
        self._failures += 1
        reason = f"{error.strerror or error} ({error.filename or self._directory})"
        self._emit(CheckpointFailed(**self._place(), reason=reason))
        if self._failures >= FAILURES_MAX:
            raise TrainingError(f"{FAILURES_MAX} checkpoints in a row could not be written: {reason}") from error

    def _tell_failure(self, writing: asyncio.Task[Path]) -> None:
        """Of a checkpoint that nobody waits for any more."""
        if not writing.cancelled() and (error := writing.exception()) is not None:
            self._emit(CheckpointFailed(**self._place(), reason=str(error)))

    def _place(self) -> dict[str, Any]:
        report = self._report
        return {"seconds": report.seconds, "version": self._made.parts.pacer.commits, "env_steps": report.stored}
