"""Central inference as the workers see it: a group asks for its network's outputs, and goes on when they are there.

A question is a record on the way of the doorbells, its answer one on the way of the credits, 16 bytes each; features and
outputs lie in the group's mailbox in shared memory. A group has at most one question open. Question and answer carry the
number of the process that asked, so that no answer reaches its successor.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from aiorl.algos.base import SplitPolicy
from aiorl.channel import Gate
from aiorl.segments import ALIGN, Array
from aiorl.workers.control import Stopped
from aiorl.workers.records import Kind, Record

Ask = Callable[[Record], Awaitable[None]]
"""Rings a question and returns when it has been answered. Raises Stopped if it will not be."""


class Mailbox(NamedTuple):
    """What a group asks and what it is told: `features` [N, F] and `outputs` [N, K], float32."""

    features: Array
    outputs: Array


@dataclass(frozen=True)
class MailboxLayout:
    """Sizes of a mailbox; it begins at a multiple of ALIGN."""

    envs: int
    features: int
    outputs: int

    @property
    def nbytes(self) -> int:
        return self._features_nbytes + _aligned(4 * self.envs * self.outputs)

    @property
    def _features_nbytes(self) -> int:
        return _aligned(4 * self.envs * self.features)

    def view(self, memory: memoryview, offset: int) -> Mailbox:
        features = np.frombuffer(memory, np.float32, self.envs * self.features, offset)
        outputs = np.frombuffer(memory, np.float32, self.envs * self.outputs, offset + self._features_nbytes)
        return Mailbox(features.reshape(self.envs, self.features), outputs.reshape(self.envs, self.outputs))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def question(credit: Record, life: int) -> Record:
    """What the process number `life` asks while it fills the slot of `credit`: `buffer` and `value` are weights and version,
    `slot` is the process."""
    return credit._replace(kind=Kind.ASK, slot=life & 0xFFFF)


# -- in a worker -------------------------------------------------------------------------------------------------------


class AskingPolicy:
    """Acts as `policy`, which has begun a segment, but somebody else computes its network. `act` is to be awaited."""

    def __init__(self, policy: SplitPolicy, mailbox: Mailbox, ask: Ask, asked: Record) -> None:
        self._policy, self._mailbox, self._ask, self._asked = policy, mailbox, ask, asked

    async def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        """As `Policy.act`."""
        self._mailbox.features[...] = self._policy.features(obs, first)
        await self._ask(self._asked)
        return self._policy.choose(self._mailbox.outputs.copy())


class Asking:
    """The groups of a process that wait for an answer: each in a thread of its own, or as tasks of the event loop."""

    def __init__(self, ring: Callable[[Record], None], *, threads: bool) -> None:
        self._ring, self._threads = ring, threads
        self._waiting: dict[int, tuple[Record, Callable[[], None]]] = {}
        self._over = False

    async def ask(self, asked: Record) -> None:
        """See `Ask`. In a thread it blocks."""
        if self._threads:
            event = threading.Event()
            self._waiting[asked.group] = asked, event.set
            self._begin(asked)
            event.wait()
        else:
            answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[asked.group] = asked, partial(_wake, answered)
            self._begin(asked)
            await answered
        if self._over:
            raise Stopped

    def _begin(self, asked: Record) -> None:
        if self._over:  # looked at only now that `close` would wake it
            raise Stopped
        self._ring(asked)

    def answered(self, answer: Record) -> None:
        """An answer has come, on the event loop. One to a process that was there before is none."""
        asked, wake = self._waiting.get(answer.group, (None, None))
        if asked is not None and wake is not None and asked.slot == answer.slot:
            del self._waiting[answer.group]
            wake()

    def close(self) -> None:
        """Nothing will be answered any more."""
        self._over = True
        for _, wake in list(self._waiting.values()):
            wake()


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


# -- in the training process -------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A record, the features [N, F] in its mailbox, and when it was heard, by the loop's clock."""

    record: Record
    features: Array
    heard_s: float

    @property
    def version(self) -> int:
        """Of the weights that are to answer it."""
        return self.record.value


class Questions:
    """What all workers have asked, and who may ask. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.gate = Gate()
        self._waiting: dict[int, Question] = {}  # by group: of two, the older one is from a process that has ended
        self._credits: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def collecting(self) -> int:
        """How many groups have credits."""
        return len(self._credits)

    @property
    def first_s(self) -> float:
        """When the oldest was heard."""
        return min(asked.heard_s for asked in self._waiting.values())

    def all_asked(self) -> bool:
        """Whether no group that collects is still to come."""
        return len(self._waiting) >= len(self._credits)

    def granted(self, group: int) -> None:
        self._credits[group] += 1

    def filled(self, group: int) -> None:
        self._credits[group] -= 1
        if not self._credits[group]:
            del self._credits[group]
            self._waiting.pop(group, None)
            self.gate.wake()

    def put(self, record: Record, features: Array) -> None:
        self._waiting[record.group] = Question(record, features, asyncio.get_running_loop().time())
        self.gate.wake()

    def take(self) -> list[Question]:
        """All of them, by group."""
        taken = [self._waiting[group] for group in sorted(self._waiting)]
        self._waiting.clear()
        return taken
