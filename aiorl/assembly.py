"""Putting the parts of a run together, and taking them apart again."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from aiorl import checkpoint, loops, preflight
from aiorl.algos.base import LearnerContext
from aiorl.channel import Channel, Gate
from aiorl.config import Config, env_name
from aiorl.degree import Dial, first_degree
from aiorl.envs.cursor import GroupCursor
from aiorl.errors import AiorlError, CheckpointError, ConfigError
from aiorl.filelock import FileLock
from aiorl.inference import Inference, Network
from aiorl.learning import Trainer
from aiorl.ledger import Ledger
from aiorl.metrics.curve import write_curve
from aiorl.metrics.directory import RunFiles, discard_empty, hold, write_atomically
from aiorl.offload import Brake, OffloadThread
from aiorl.pacing import Pacer
from aiorl.preflight import EVAL_WIDTH, Preflight
from aiorl.record import Record
from aiorl.report import Report, Result
from aiorl.resuming import Saved, check_newest, judged_alike, read_late
from aiorl.workers.inline import InlineWorkers
from aiorl.workers.launch import Launcher
from aiorl.workers.pool import ProcessWorkers, Workers, plan_stations
from aiorl.workers.questions import MailboxLayout
from aiorl.workers.station import StationSetup
from aiorl.workers.weights import WeightLayout, WeightStore

LEARNER_GRACE_S = 0.5
FILES_GRACE_S = 1.0  # a thread that is still busy after its grace ends by itself


def _launcher(import_main: bool, modules: Sequence[str]) -> Launcher:
    return Launcher(import_main=import_main, modules=modules)


@dataclass(frozen=True)
class Backends:
    """What a run blocks on and starts its workers with. `aiorl.testing` puts simulated ones in their place.

    `thread` gets a name, `launcher` whether workers import the host's `__main__`, and modules that all of them need.
    `watch_loop`: a thread watches the event loop in real time.
    """

    thread: Callable[[str], OffloadThread] = OffloadThread
    launcher: Callable[[bool, Sequence[str]], Launcher] = _launcher
    watch_loop: bool = True


REAL = Backends()


@dataclass
class Assembly:
    """A wired run: what the coroutines share, and what has to be closed or written at the end."""

    checked: Preflight
    parts: loops.Parts
    files: RunFiles
    files_thread: OffloadThread
    lock: FileLock
    dial: Dial | None  # None where a record decides
    files_error: str | None = None

    @property
    def env_name(self) -> str:
        return env_name(self.checked.config.env)

    async def flush_files(self) -> str | None:
        """Write what has gathered. A full disk does not stop the training: what cannot be written waits for room. The error
        is returned once, and again only if things had been written meanwhile."""
        try:
            await self.files_thread.run(self.files.write, self.files.take())
        except OSError as error:
            first, self.files_error = self.files_error is None, str(error)
            return self.files_error if first else None
        self.files_error = None
        return None

    async def write_files(self, result: Result | None, error: BaseException | None) -> None:
        """The last things in the run directory; closes the files' thread. A disk that is stuck does not hold the host."""
        with contextlib.suppress(Exception):  # what ended the run may be this very error
            async with asyncio.timeout(FILES_GRACE_S):
                await self.flush_files()
        with contextlib.suppress(AiorlError, OSError, TimeoutError):  # without events there is nothing to draw
            async with asyncio.timeout(FILES_GRACE_S):
                await self.files_thread.run(_write_end, self.checked.directory, result, error)
        with contextlib.suppress(OSError):
            self.lock.release()
        await self.files_thread.aclose(0.2)

    async def aclose(self) -> None:
        """End workers and learner and give the shared memory back. What cannot be closed is raised after all else is."""
        await _close(self.parts)


async def _close(parts: loops.Parts) -> None:
    async with contextlib.AsyncExitStack() as stack:  # from the last to the first
        stack.callback(parts.weights.close)
        stack.push_async_callback(parts.learner_thread.aclose, 0.1)
        stack.push_async_callback(_close_trainer, parts)
        if parts.inference is not None:
            stack.push_async_callback(parts.inference.aclose, LEARNER_GRACE_S)
        stack.callback(parts.rollouts.close)
        stack.push_async_callback(parts.workers.aclose)
        parts.trainer.abandon()


async def _close_trainer(parts: loops.Parts) -> None:
    """Not waited for if it takes long: the learner may be in the middle of something."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LEARNER_GRACE_S):
            await parts.learner_thread.run(parts.trainer.close)


async def assemble(
    config: Config,
    report: Report,
    resume: str | Path | None = None,
    record: Record | None = None,
    backends: Backends = REAL,
) -> Assembly:
    """Check, then build everything; workers are made but not started. On an error nothing is left behind."""
    async with contextlib.AsyncExitStack() as stack:  # from the last to the first
        files_thread, on_files = backends.thread("aiorl-files"), contextlib.ExitStack()
        stack.push_async_callback(_undo, files_thread, on_files, FILES_GRACE_S)
        learner_thread, on_learner = backends.thread("aiorl-learner"), contextlib.ExitStack()
        stack.push_async_callback(_undo, learner_thread, on_learner, LEARNER_GRACE_S)
        checked = await files_thread.run(_check, on_files, config, resume)
        lock = await files_thread.run(_hold, on_files, checked.directory)
        if checked.saved is not None and resume is not None:
            await files_thread.run(check_newest, checked.saved, resume)
        launcher: Launcher | None = None
        if checked.config.workers:
            # It loads its modules while this process imports torch.
            launcher = backends.launcher(checked.needs_main, checked.modules)
            await files_thread.run(_warm_up, on_files, launcher)
        trainer = await learner_thread.run(_make_trainer, on_learner, checked, record, learner_thread.brake)
        if checked.saved is not None:
            await learner_thread.run(_restore, trainer, checked.saved)
        weights = await learner_thread.run(_make_weights, on_learner, checked, trainer)
        parts = _wire(stack, checked, launcher, learner_thread, trainer, weights, record, backends)
        files = await files_thread.run(_begin_directory, checked)
        dial = Dial(checked.config, parts.pacer, lanes=checked.lanes) if record is None else None
        if checked.saved is not None:
            _restore_counters(checked, parts, report, dial)
            late = await files_thread.run(read_late, checked.directory, report.pending, checked.config)
            report.catch_up(*late, comparable=judged_alike(checked.saved.manifest.config, checked.config))
        elif report.stop_return is None:
            report.stop_return = checked.probe.reward_threshold
        stack.pop_all()
    return Assembly(checked, parts, files, files_thread, lock, dial)


async def _undo(thread: OffloadThread, made: contextlib.ExitStack, grace_s: float) -> None:
    """Release what was made on a thread: there, so behind what it was making when its caller was cancelled. Not waited for
    if that takes long."""
    try:
        with contextlib.suppress(Exception):  # why there is no run is what has to be told
            async with asyncio.timeout(grace_s):
                await thread.run(made.close)
    finally:
        await thread.aclose(0.1)


def _check(made: contextlib.ExitStack, config: Config, resume: str | Path | None) -> Preflight:
    checked = preflight.check(config, resume)
    if config.out is None:  # chosen here, so nobody else's
        made.callback(discard_empty, checked.directory)
    return checked


def _hold(made: contextlib.ExitStack, directory: Path) -> FileLock:
    lock = hold(directory)
    made.callback(lock.release)
    return lock


def _warm_up(made: contextlib.ExitStack, launcher: Launcher) -> None:
    made.callback(launcher.close)
    launcher.warm_up()


def _make_trainer(made: contextlib.ExitStack, checked: Preflight, record: Record | None, brake: Brake) -> Trainer:
    config, record = checked.config, record or Record(())
    rollouts = {version: _rollouts(config, total) for version, total in record.totals.items()}
    context = LearnerContext(
        seed=config.seed,
        envs=config.envs,
        segment_length=config.steps_per_segment,
        rollouts=rollouts.get(0, _rollouts(config, config.total_steps)),
        off_policy_degree=config.degree_limit,
        warmup=config.warmup,
        device=_choose_device(config.device),
        directory=checked.directory.resolve(),
    )
    ledger = Ledger(config.groups, cast(int, config.group_size))
    skips_max = config.nonfinite_max if config.on_nonfinite == "skip" else 0
    trainer = Trainer(
        checked.algorithm, checked.spaces, context, ledger, config.torch_threads, record.settings, skips_max,
        checked.probe.bounds, brake, rollouts,
    )  # fmt: skip
    made.callback(trainer.close)
    return trainer


def _rollouts(config: Config, total_steps: int) -> int:
    return -(-total_steps // config.steps_per_rollout)


def _restore(trainer: Trainer, saved: Saved) -> None:
    try:
        trainer.restore(saved.parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path} does not fit this run: {error}") from error
    del saved.parts["learner"]  # a whole buffer of experience, maybe


def _choose_device(device: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device = cuda, but torch finds no CUDA device\n  use device = cpu or auto")
    return "cuda" if device == "auto" and available else device.replace("auto", "cpu")


def _buffers(config: Config) -> int:
    """Copies of the weights: each version that may act, and evaluation's: who waits, the best so far, the one under way."""
    being_written = under_way = 1
    return config.degree_limit + 1 + being_written + config.eval_places + config.eval_top + under_way


def _make_weights(made: contextlib.ExitStack, checked: Preflight, trainer: Trainer) -> WeightStore:
    """The store with the newest version in it, and after a resume the older ones that coming rollouts act with."""
    newest = trainer.learner.weights()
    store = WeightStore(WeightLayout.of(newest), _buffers(checked.config))
    made.callback(store.close)
    versions = {0: newest}
    if checked.saved is not None:
        commits = checked.saved.manifest.version
        # After a change of degree rollouts begin with the newest version.
        degree = 0 if _degree_to_resume(checked) is not None else checked.config.off_policy_degree
        versions = {int(v): w for v, w in checked.saved.parts["run"].get("behaviour", {}).items()}
        versions[commits] = newest
        missing = [v for v in range(max(0, commits - degree), commits) if v not in versions]
        if missing and checked.config.schedule == "ordered":
            raise CheckpointError(
                f"{checked.saved.path} was saved at a smaller off_policy_degree than {degree}: it lacks the weights of "
                f"versions {missing}\n  resume with the degree it was made with"
            )
        versions = {v: w for v, w in versions.items() if v >= commits - degree}
    for version in sorted(versions):
        buffer = store.claim()
        store.write(buffer, versions[version])
        store.publish(buffer, version)
    return store


def _wire(
    stack: contextlib.AsyncExitStack,
    checked: Preflight,
    launcher: Launcher | None,
    learner_thread: OffloadThread,
    trainer: Trainer,
    weights: WeightStore,
    record: Record | None,
    backends: Backends,
) -> loops.Parts:
    """What is made here is closed by `stack`."""
    config = checked.config
    group_size, groups = cast(int, config.group_size), config.groups
    saved_degree = checked.saved.degree if checked.saved is not None else {}
    pacer = Pacer(
        first_degree(config, saved_degree) if record is None else config.degree_limit,
        groups,
        total_steps=config.total_steps,
        segment_steps=checked.segment.steps * group_size,
        schedule=config.schedule,
        record=record.rollouts if record is not None else None,
        degree_max=config.degree_limit,
    )
    cursors: dict[int, GroupCursor | None] = {g: trainer.ledger.cursor(g) for g in range(groups)}
    common = StationSetup(
        index=0,
        env=checked.env,
        spaces=checked.spaces,
        algorithm=checked.algorithm,
        seed=config.seed,
        groups={},
        slots=pacer.slots,
        segment=checked.segment,
        weights=weights.layout,
        weight_block=weights.block,
        block=weights.block,
        eval_width=EVAL_WIDTH,
        stepping=config.stepping,
        steps_at_once=config.steps_at_once,
        eval_envs=tuple(suite.env for suite in checked.suites),
        aborts_max=config.nonfinite_env_max if config.on_nonfinite_env == "abort_episode" else 0,
        eager=config.schedule == "eager",
        mailbox=_mailbox(checked),
    )
    plan = plan_stations(common, groups, group_size, cast(int, config.workers), cursors)
    stack.callback(plan.close)
    workers: Workers
    network, inference = _network(checked, weights), None
    if launcher is None:
        compute = network.compute if network is not None else None
        workers = InlineWorkers(plan, backends.thread, compute, config.torch_threads)
    else:
        directory = str(checked.directory.resolve())
        workers = ProcessWorkers(
            plan, launcher, directory, config.start_timeout_s, config.step_timeout_s, trainer.where, backends.thread,
            config.min_workers,
        )  # fmt: skip
        if network is not None:
            thread = backends.thread("aiorl-inference")
            inference = Inference(network, workers, thread, config.inference_wait_ms / 1e3)
            stack.push_async_callback(inference.aclose, LEARNER_GRACE_S)
    stack.push_async_callback(workers.aclose)
    gate = Gate()
    workers.on_stand = learner_thread.on_stand = gate.wake
    return loops.Parts(
        pacer=pacer,
        workers=workers,
        weights=weights,
        learner_thread=learner_thread,
        trainer=trainer,
        gate=gate,
        rollouts=Channel(config.degree_limit + 1),
        inference=inference,
    )


def _mailbox(checked: Preflight) -> MailboxLayout | None:
    if checked.forward is None:
        return None
    return MailboxLayout(cast(int, checked.config.group_size), checked.forward.features, checked.forward.outputs)


def _network(checked: Preflight, weights: WeightStore) -> Network | None:
    """The network of central inference, on the learner's device."""
    config = checked.config
    if checked.forward is None:
        return None
    return Network(
        checked.forward,
        config.groups,
        cast(int, config.group_size),
        weights.arrays,
        keep=config.degree_limit + 1,
        device=_choose_device(config.device),
        threads=config.torch_threads,
    )


def _degree_to_resume(checked: Preflight) -> int | None:
    """What a resumed run's degree has been changed to, None if it never was."""
    assert checked.saved is not None
    tunes_itself = checked.config.off_policy_degree < 0
    return first_degree(checked.config, checked.saved.degree) if checked.saved.degree or tunes_itself else None


def _restore_counters(checked: Preflight, parts: loops.Parts, report: Report, dial: Dial | None) -> None:
    assert checked.saved is not None
    ledger, saved = parts.trainer.ledger, checked.saved
    parts.pacer.resume(saved.manifest.version, ledger.segments_used(), ledger.stored, _degree_to_resume(checked))
    try:
        report.load_state_dict(saved.parts["run"]["report"], ledger.stored)
        if dial is not None:
            dial.load_state_dict(saved.degree)
    except (KeyError, ValueError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{saved.path} does not fit this run: {error}") from error
    report.return_mean_100, report.aborted = ledger.return_mean_100, ledger.aborted
    if report.stop_return is None:
        report.stop_return = checked.probe.reward_threshold


def _begin_directory(checked: Preflight) -> RunFiles:
    config = checked.config.replace(out=str(checked.directory))
    checkpoint.clean(checked.directory)
    write_atomically(checked.directory / "config.toml", config.to_toml().encode())
    return RunFiles(checked.directory)


def _write_end(directory: Path, result: Result | None, error: BaseException | None) -> None:
    if error is not None:
        text = "".join(traceback.format_exception(error))
        detail = error.detail if isinstance(error, AiorlError) else ""
        write_atomically(directory / "error.txt", f"{text}\n{detail}".encode())
    if result is not None:
        data = msgspec.json.format(msgspec.json.encode(result), indent=2)
        write_atomically(directory / "summary.json", data)
        write_curve(directory, directory / "curve.svg")
