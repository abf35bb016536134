"""What a worker does: serve credits until told to stop. The synchronous core is `Station`; `main` is its asyncio shell.

The same `Station` serves the training process itself when there are no workers, so both ways run the same lines.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aiorl.algos.base import Algorithm, Policy
from aiorl.envs.cursor import GroupCursor
from aiorl.envs.episodes import run_episodes
from aiorl.envs.group import Group, make_group
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import AiorlError
from aiorl.offload import BACKGROUND_NICENESS
from aiorl.seals import seal
from aiorl.seeding import ACT
from aiorl.segments import Array, Segment, SegmentHeader, SegmentLayout
from aiorl.workers.memory import SharedBlock
from aiorl.workers.records import READ_BYTES, RECORD_BYTES, Kind, Record, unpack
from aiorl.workers.weights import WeightLayout

CONTROL_COUNTERS = 16  # int64 each: ORDINAL, STEP, …
ERROR_BYTES = 32 * 1024
CONTROL_BYTES = CONTROL_COUNTERS * 8 + ERROR_BYTES
EVAL_EPISODES_MAX = 100_000
EVAL_BYTES = EVAL_EPISODES_MAX * 16


class Counter:
    """Places in a station's control block. Written only by the station, readable after its death."""

    PHASE, GROUP, ORDINAL, STEP, ERROR_LENGTH, BEATS = range(6)


class Phase:
    STARTING, IDLE, COLLECTING, EVALUATING = range(4)


@dataclass(frozen=True)
class StationSetup:
    """Everything a station needs; pickled into its process. `groups` maps group index -> its global env indices."""

    index: int
    env: EnvSpec
    spaces: Spaces
    algorithm: Algorithm
    seed: int
    groups: Mapping[int, range]
    slots: int
    segment: SegmentLayout
    weights: WeightLayout
    weight_block: SharedBlock
    block: SharedBlock
    cursors: Mapping[int, GroupCursor | None] = field(default_factory=dict[int, "GroupCursor | None"])
    eval_width: int = 0  # > 0: this station evaluates, with that many environments at once
    eval_envs: tuple[EnvSpec, ...] = ()  # of the suites; none: one suite, the training environment

    def segment_offset(self, group: int, slot: int) -> int:
        position = list(self.groups).index(group) * self.slots + slot
        return CONTROL_BYTES + position * self.segment.nbytes

    @staticmethod
    def block_bytes(groups: int, slots: int, segment: SegmentLayout, eval_width: int) -> int:
        return CONTROL_BYTES + groups * slots * segment.nbytes + (EVAL_BYTES if eval_width else 0)


class Control:
    """A station's counters and its last words, in its shared block."""

    def __init__(self, block: SharedBlock) -> None:
        self.counters = np.frombuffer(block.buffer, np.int64, CONTROL_COUNTERS)
        self._error = np.frombuffer(block.buffer, np.uint8, ERROR_BYTES, CONTROL_COUNTERS * 8)

    def reset(self) -> None:
        """As before the station began."""
        self.counters[:] = 0

    def put_error(self, error: BaseException) -> None:
        """Keep type, message and traceback as text: exceptions may be impossible to pickle."""
        message = str(error) or type(error).__name__
        if not isinstance(error, AiorlError):
            message = f"{type(error).__name__}: {message}"
        detail = getattr(error, "detail", "") or "".join(traceback.format_exception(error))
        text = {"type": type(error).__name__, "message": message[:4000], "detail": detail[-16_000:]}
        data = json.dumps(text).encode()
        if len(data) > ERROR_BYTES:
            data = json.dumps({**text, "detail": detail[-2000:]}).encode()[:ERROR_BYTES]
        self._error[: len(data)] = np.frombuffer(data, np.uint8)
        self.counters[Counter.ERROR_LENGTH] = len(data)

    def error(self) -> dict[str, str] | None:
        """What `put_error` kept, or None."""
        length = int(self.counters[Counter.ERROR_LENGTH])
        if not 0 < length <= ERROR_BYTES:
            return None
        try:
            text = json.loads(self._error[:length].tobytes())
        except ValueError:
            return None
        return {key: str(text.get(key, "")) for key in ("type", "message", "detail")}


def segments_of(setup: StationSetup) -> dict[tuple[int, int], Segment]:
    """Views on every slot of a station's block, by (group, slot)."""
    return {
        (group, slot): setup.segment.view(setup.block.buffer, setup.segment_offset(group, slot))
        for group in setup.groups
        for slot in range(setup.slots)
    }


def evaluation_results(setup: StationSetup) -> tuple[Array, Array]:
    """(returns float64, lengths int64), each [EVAL_EPISODES_MAX], at the end of an evaluating station's block."""
    offset = StationSetup.block_bytes(len(setup.groups), setup.slots, setup.segment, 0)
    returns = np.frombuffer(setup.block.buffer, np.float64, EVAL_EPISODES_MAX, offset)
    lengths = np.frombuffer(setup.block.buffer, np.int64, EVAL_EPISODES_MAX, offset + EVAL_EPISODES_MAX * 8)
    return returns, lengths


class Station:
    """Groups of environments with a policy each, and the slots they fill."""

    def __init__(self, setup: StationSetup) -> None:
        self._setup = setup
        self.control = Control(setup.block)
        self._segments = segments_of(setup)
        self._groups: dict[int, Group] = {}
        self._policies: dict[int, Policy] = {g: setup.algorithm.policy(setup.spaces) for g in setup.groups}
        self._weights: dict[int, dict[str, Array]] = {}

    def open(self) -> list[str]:
        """Make and reset the environments, or bring them back to where their cursors say; returns how any differed."""
        setup = self._setup
        differences: list[str] = []
        for index, envs in setup.groups.items():
            group = make_group(setup.env, setup.spaces, envs, setup.seed)
            self._groups[index] = group
            differences += group.open(setup.cursors.get(index), strict=False)
        self.control.counters[Counter.PHASE] = Phase.IDLE
        return differences

    def serve(self, credit: Record) -> Record:
        """Do what a credit asks for and return the doorbell. On an error the control block holds the last words."""
        counters = self.control.counters
        try:
            if credit.kind is Kind.EVALUATE:
                counters[Counter.PHASE] = Phase.EVALUATING
                reply = self._evaluate(credit)
            else:
                counters[Counter.PHASE] = Phase.COLLECTING
                reply = self._collect(credit)
        except Exception as error:
            self.control.put_error(error)
            raise
        counters[Counter.PHASE] = Phase.IDLE
        return reply

    def _collect(self, credit: Record) -> Record:
        setup, counters = self._setup, self.control.counters
        counters[Counter.GROUP], counters[Counter.ORDINAL], counters[Counter.STEP] = credit.group, credit.ordinal, 0
        segment, policy = self._segments[credit.group, credit.slot], self._policies[credit.group]
        key = np.random.SeedSequence(setup.seed, spawn_key=(ACT, credit.ordinal, credit.group))
        started_s = time.monotonic()
        policy.begin(self._view(credit.buffer), credit.ordinal, np.random.default_rng(key), segment.steps)
        self._groups[credit.group].collect(policy, segment, segment.steps, self._beat)
        segment.header[SegmentHeader.STARTED_S] = started_s
        segment.header[SegmentHeader.ENDED_S] = time.monotonic()
        seal(segment, setup.index, credit.group, credit.ordinal)
        return credit._replace(kind=Kind.COLLECTED, value=segment.env_steps)

    def _evaluate(self, credit: Record) -> Record:
        setup = self._setup
        policy = setup.algorithm.policy(setup.spaces)
        policy.begin(self._view(credit.buffer), 0, None, 0)
        returns, lengths = evaluation_results(setup)
        episodes = credit.value
        env = setup.eval_envs[credit.group] if setup.eval_envs else setup.env
        width, fresh = min(setup.eval_width, episodes), credit.ordinal > 0
        totals, steps = run_episodes(
            env, setup.spaces, policy, episodes, setup.seed, width, fresh=fresh, on_step=self._beat
        )
        returns[:episodes], lengths[:episodes] = totals, steps
        return credit._replace(kind=Kind.EVALUATED)

    def _view(self, buffer: int) -> dict[str, Array]:
        if buffer not in self._weights:
            self._weights[buffer] = self._setup.weights.view(self._setup.weight_block.buffer, buffer)
        return self._weights[buffer]

    def _beat(self, step: int) -> None:
        counters = self.control.counters
        counters[Counter.STEP] = step + 1
        counters[Counter.BEATS] += 1

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


@dataclass(frozen=True)
class Pipes:
    """A worker's ends of its two pipes, as descriptors on their way into the process."""

    credits: Any
    doorbell: Any


def prepare(log_path: str | None) -> None:
    """First thing in a worker process: own log, no interest in the terminal's Ctrl-C, an end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when a worker stops
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked for the start
    os.nice(BACKGROUND_NICENESS)
    log = os.open(log_path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(2)
    threading.Thread(target=_end_with_parent, name="aiorl-parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the training process to be gone (also by SIGKILL), then end at once. PR_SET_PDEATHSIG would not do: under
    a fork server the parent that started this process is the server."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


async def main(setup: StationSetup, pipes: Pipes) -> None:
    """Serve credits from the pipe, one after the other, until STOP or the parent's end of the pipe is closed."""
    credits_fd, doorbell_fd = pipes.credits.detach(), pipes.doorbell.detach()
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Record | None] = asyncio.Queue()  # bounded by the credits outstanding

    def receive() -> None:
        data = os.read(credits_fd, READ_BYTES)
        for record in unpack(data):
            inbox.put_nowait(record)
        if len(data) < RECORD_BYTES:
            loop.remove_reader(credits_fd)
            inbox.put_nowait(None)

    loop.add_reader(credits_fd, receive)
    control = Control(setup.block)
    try:
        station = Station(setup)
        for difference in station.open():
            print(f"open episode aborted: {difference}", file=sys.stderr, flush=True)  # into the worker's log
        os.write(doorbell_fd, Record(Kind.READY, value=os.getpid()).pack())
        while (credit := await inbox.get()) is not None and credit.kind is not Kind.STOP:
            os.write(doorbell_fd, station.serve(credit).pack())
        station.close()
    except BrokenPipeError:
        pass  # the training process has gone on without this worker
    except BaseException as error:
        control.put_error(error)
        os.write(doorbell_fd, Record(Kind.FAILED).pack())
        raise SystemExit(1) from error
