"""What serves credits: `Station`, some groups of environments with a policy each, and the slots they fill.

A worker's program and the training process itself (when there are no workers) use the same `Station`, so both ways run the
same lines. Its coroutines never wait where environments are ordinary ones: `at_once` runs them without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from aiorl.algos.base import Algorithm, Policy, RecurrentPolicy, SplitPolicy
from aiorl.envs.aborts import Aborts, untold
from aiorl.envs.checked import at_once
from aiorl.envs.cursor import GroupCursor
from aiorl.envs.episodes import run_episodes
from aiorl.envs.group import make_group
from aiorl.envs.single import OnStep
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import TrainingError
from aiorl.seals import seal
from aiorl.seeding import ACT
from aiorl.segments import ALIGN, Array, Segment, SegmentHeader, SegmentLayout
from aiorl.workers.control import Control, Counter, Phase, Stopped, control_bytes
from aiorl.workers.hold import Standing, unheld
from aiorl.workers.memory import SharedBlock
from aiorl.workers.questions import Ask, AskingPolicy, Mailbox, MailboxLayout, question
from aiorl.workers.records import Kind, Record
from aiorl.workers.weights import WeightLayout

EVAL_EPISODES_MAX = 100_000
EVAL_BYTES = EVAL_EPISODES_MAX * 24

Stepping = Literal["auto", "serial", "threads"]


@dataclass(frozen=True)
class StationSetup:
    """Everything a station needs; pickled into its process. `groups` maps group index -> its global env indices.

    `life` is the number of the process that may fill the slots (see `workers.control`).
    """

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
    aborts_max: int = 0  # episodes of an environment in a row that may be given up for not being finite
    stepping: Stepping = "auto"
    steps_at_once: int | None = None
    life: int = 0
    eager: bool = False  # which rollout a segment will be part of is not known beforehand
    mailbox: MailboxLayout | None = None  # with central inference

    @property
    def has_lanes(self) -> bool:
        """Whether its groups collect side by side: then one can wait while others go on."""
        waits = self.stepping == "auto" and self.env.coroutines
        return bool(self.groups) and (self.stepping == "threads" or waits or self.mailbox is not None)

    @property
    def takes_turns(self) -> bool:
        """Its groups are at work at the same time, but one at a time steps: one that stands still may wait for another."""
        return self.mailbox is not None and self.stepping != "threads" and not self.env.coroutines

    @property
    def mailboxes_offset(self) -> int:
        end = control_bytes(len(self.groups)) + len(self.groups) * self.slots * self.segment.nbytes
        return -(-end // ALIGN) * ALIGN

    @property
    def block_bytes(self) -> int:
        """What its shared block has to hold."""
        mailboxes = len(self.groups) * self.mailbox.nbytes if self.mailbox is not None else 0
        return self.mailboxes_offset + mailboxes + (EVAL_BYTES if self.eval_width else 0)


def segments_of(setup: StationSetup) -> dict[tuple[int, int], Segment]:
    """Views on every slot of a station's block, by (group, slot)."""
    begin = control_bytes(len(setup.groups))
    keys = [(group, slot) for group in setup.groups for slot in range(setup.slots)]
    return {
        key: setup.segment.view(setup.block.buffer, begin + position * setup.segment.nbytes)
        for position, key in enumerate(keys)
    }


def mailboxes_of(setup: StationSetup) -> dict[int, Mailbox]:
    """Views on the mailboxes of a station's block, by group; none without central inference."""
    layout, begin = setup.mailbox, setup.mailboxes_offset
    if layout is None:
        return {}
    return {g: layout.view(setup.block.buffer, begin + place * layout.nbytes) for place, g in enumerate(setup.groups)}


class Played(NamedTuple):
    """What an evaluation came to, each [episodes]: returns float64, lengths int64, outcomes float64 (see `outcome_of`)."""

    returns: Array
    lengths: Array
    outcomes: Array

    def first(self, episodes: int) -> Played:
        """A copy of so many."""
        return Played(*(np.array(column[:episodes]) for column in self))


def evaluation_results(setup: StationSetup) -> Played:
    """Places for EVAL_EPISODES_MAX episodes, at the end of an evaluating station's block."""
    begin = setup.block_bytes - EVAL_BYTES
    offsets = (begin + place * 8 * EVAL_EPISODES_MAX for place in range(3))
    types = (np.float64, np.int64, np.float64)
    return Played(
        *(
            np.frombuffer(setup.block.buffer, kind, EVAL_EPISODES_MAX, offset)
            for kind, offset in zip(types, offsets, strict=True)
        )
    )


class Turn:
    """A place among the steps that may run at the same time. The counters of its group, or of the station in an
    evaluation, show whether it has one: while it waits for its turn it does not hang."""

    def __init__(self, places: Any, row: memoryview) -> None:
        """`places`: a semaphore of threading, or of asyncio; each is entered in its own way."""
        self._places, self._row = places, row

    def __enter__(self) -> None:
        self._places.acquire()
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._row[Counter.STEPPING] -= 1
        self._places.release()

    async def __aenter__(self) -> None:
        await self._places.acquire()
        self._begin()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def _begin(self) -> None:
        self._row[Counter.STEPPING] += 1
        self._row[Counter.BEATS] += 1


class Station:
    """See the module. What has to do with one group alone may run beside the same for other groups.

    `places` caps the environment steps under way (a semaphore, see `Turn`). `drive` is how `open`, `serve` and `close` get
    a coroutine done: those of environments that wait need an event loop. `tell` gets a line for each episode given up, `ask`
    the questions of central inference. `standing` is where a group waits that is held.
    """

    def __init__(
        self,
        setup: StationSetup,
        places: Any = None,
        drive: Callable[[Coroutine[Any, Any, Any]], Any] = at_once,
        tell: Callable[[str], None] = untold,
        ask: Ask | None = None,
        standing: Standing = unheld,
    ) -> None:
        self._setup, self._places, self._drive, self._tell, self._ask = setup, places, drive, tell, ask
        self._standing, self._stood_s = standing, dict.fromkeys(setup.groups, 0.0)
        self.control = Control(setup.block, setup.groups)
        self._row = self.control.row()
        self._rows = {group: self.control.row(group) for group in setup.groups}
        self._segments, self._mailboxes = segments_of(setup), mailboxes_of(setup)
        self._groups: dict[int, Any] = {}  # Group, or AsyncGroup where environments are coroutines
        self._policies: dict[int, Policy] = {g: setup.algorithm.policy(setup.spaces) for g in setup.groups}
        self._weights: dict[int, dict[str, Array]] = {}

    # -- as a whole, one thing after the other -------------------------------------------------------------------------

    def open(self) -> None:
        """Make and reset the environments, or bring them back to where their cursors say."""
        self._drive(self.open_all())
        self.ready()

    def serve(self, credit: Record) -> Record:
        """Do what a credit asks for and return the doorbell. On an error the control block holds the last words."""
        return self._drive(self.answer(credit))

    def close(self) -> None:
        self._drive(self.close_all())

    # -- as coroutines, and part by part -------------------------------------------------------------------------------

    @property
    def groups(self) -> Mapping[int, range]:
        return self._setup.groups

    @property
    def threads(self) -> bool:
        """Its groups have threads of their own."""
        return self._setup.stepping == "threads"

    @property
    def waits(self) -> bool:
        """Its coroutines wait: they need an event loop, and leave others time to run."""
        return self._setup.env.coroutines

    async def open_all(self) -> None:
        """See `open`."""
        for group in self.groups:
            await self.open_group(group)

    async def close_all(self) -> None:
        for group in list(self._groups):
            await self.close_group(group)

    async def open_group(self, index: int) -> None:
        """See `open`."""
        setup, envs = self._setup, self._setup.groups[index]
        aborts = Aborts(envs, setup.aborts_max, self._tell) if setup.aborts_max else None
        limit = Turn(self._places, self._rows[index]) if self._places is not None else None
        group: Any = make_group(setup.env, setup.spaces, envs, setup.seed, aborts=aborts, limit=limit)
        self._groups[index] = group
        opened = group.open(setup.cursors.get(index), strict=False)
        for difference in await opened if self.waits else opened:
            self._tell(f"open episode aborted: {difference}")
        cursor = setup.cursors.get(index)
        if cursor is not None and cursor.policy_state:
            own = {name: leaf.copy() for name, leaf in cursor.policy_state.items()}
            cast(RecurrentPolicy, self._policies[index]).restore(own)

    def ready(self) -> None:
        """All groups are open."""
        self._row[Counter.PHASE] = Phase.IDLE

    async def answer(self, credit: Record) -> Record:
        """See `serve`."""
        try:
            return await (self._evaluate(credit) if credit.kind is Kind.EVALUATE else self.collect(credit))
        except Stopped:
            raise
        except Exception as error:
            self.fail(error, credit)
            raise

    def fail(self, error: BaseException, credit: Record) -> None:
        """Keep the last words: what this credit came to."""
        self.control.put_error(error, credit.group if credit.kind is Kind.COLLECT else None)

    async def collect(self, credit: Record) -> Record:
        """Fill a slot."""
        self._go_on()
        if self._row[Counter.HELD]:
            await self._stand(credit.group)
        self._stood_s[credit.group] = 0.0
        with self._filling(credit) as (policy, segment, on_step):
            await self._groups[credit.group].fill(policy, segment, segment.steps, on_step)
        return credit._replace(kind=Kind.COLLECTED, value=segment.env_steps)

    @contextlib.contextmanager
    def _filling(self, credit: Record) -> Iterator[tuple[Policy | AskingPolicy, Segment, OnStep]]:
        """What `Group.fill` needs, with all that is to be done before and after it."""
        setup, row = self._setup, self._rows[credit.group]
        row[Counter.STEP], row[Counter.ORDINAL] = 0, credit.ordinal
        row[Counter.PHASE] = Phase.COLLECTING
        segment, policy = self._segments[credit.group, credit.slot], self._policies[credit.group]
        key = np.random.SeedSequence(setup.seed, spawn_key=(ACT, credit.ordinal, credit.group))
        started_s = time.monotonic()
        rollout = credit.value if setup.eager else credit.ordinal  # the first that this version's segments may be part of
        policy.begin(self._view(credit.buffer), rollout, np.random.default_rng(key), segment.steps)
        yield self._asking(policy, credit), segment, functools.partial(self._stepped, credit.group)
        if segment.policy_state:
            _keep_state(cast(RecurrentPolicy, policy), segment)
        segment.header[SegmentHeader.STARTED_S] = started_s + self._stood_s[credit.group]
        segment.header[SegmentHeader.ENDED_S] = time.monotonic()
        seal(segment, setup.index, credit.group, credit.ordinal)
        row[Counter.PHASE] = Phase.IDLE

    def _asking(self, policy: Policy, credit: Record) -> Policy | AskingPolicy:
        """With central inference one that asks for its outputs."""
        if self._ask is None or (mailbox := self._mailboxes.get(credit.group)) is None:
            return policy
        return AskingPolicy(cast(SplitPolicy, policy), mailbox, self._ask, question(credit, self._setup.life))

    async def _evaluate(self, credit: Record) -> Record:
        setup = self._setup
        self._row[Counter.PHASE] = Phase.EVALUATING
        policy = setup.algorithm.policy(setup.spaces)
        policy.begin(self._view(credit.buffer), 0, None, 0)
        env = setup.eval_envs[credit.group] if setup.eval_envs else setup.env
        episodes, fresh = credit.value, credit.ordinal > 0
        on_step = functools.partial(self._beat, self._row)
        width = min(setup.eval_width, episodes)
        threads = setup.stepping == "threads"
        # Not the places that groups have: these may be of threads, and an evaluation waits on a loop of its own.
        limit = Turn(asyncio.Semaphore(setup.steps_at_once), self._row) if setup.steps_at_once is not None else None
        results = evaluation_results(setup)
        results.returns[:episodes], results.lengths[:episodes] = run_episodes(
            env, setup.spaces, policy, episodes, setup.seed, width, fresh=fresh, threads=threads, limit=limit,
            on_step=on_step, outcomes=results.outcomes[:episodes],
        )  # fmt: skip
        self._row[Counter.PHASE] = Phase.IDLE
        return credit._replace(kind=Kind.EVALUATED)

    def _view(self, buffer: int) -> dict[str, Array]:
        if buffer not in self._weights:
            self._weights[buffer] = self._setup.weights.view(self._setup.weight_block.buffer, buffer)
        return self._weights[buffer]

    def _stepped(self, group: int, step: int) -> Coroutine[Any, Any, None] | None:
        """After a step of a group: what it has to wait for, if it is held."""
        self._beat(self._rows[group], step)
        return self._stand(group) if self._row[Counter.HELD] else None

    def _beat(self, row: memoryview, step: int) -> None:
        row[Counter.STEP] = step + 1
        row[Counter.BEATS] += 1
        self._go_on()

    def _go_on(self) -> None:
        if self._row[Counter.LIFE] != self._setup.life:
            raise Stopped

    async def _stand(self, group: int) -> None:
        row, begun_s = self._rows[group], time.monotonic()
        while self._is_held():
            row[Counter.HELD] = 1
            await self._standing(self._is_held)
            row[Counter.HELD] = 0  # then look again: the next pause may have begun, and have seen the 1
        self._stood_s[group] += time.monotonic() - begun_s
        self._go_on()

    def _is_held(self) -> bool:
        return self._row[Counter.HELD] != 0 and self._row[Counter.LIFE] == self._setup.life

    async def close_group(self, index: int) -> None:
        group = self._groups.pop(index, None)
        if group is not None:
            closed = group.close()
            if self.waits:
                await closed


def _keep_state(policy: RecurrentPolicy, segment: Segment) -> None:
    """Let what the policy remembers travel with the segment. Raises TrainingError if it is not what was declared."""
    state = {name: np.asarray(leaf) for name, leaf in policy.state().items()}
    for name in {**segment.policy_state, **state}:
        seen, declared = (_layout(arrays.get(name)) for arrays in (state, segment.policy_state))
        if seen != declared:
            raise TrainingError(
                f"{type(policy).__name__}.state() has {seen} {name!r}, policy_state() declares {declared}\n"
                "  let both name the same arrays, [N, …] each, of the same dtypes"
            )
        segment.policy_state[name][...] = state[name]


def _layout(array: Array | None) -> str:
    return "no" if array is None else f"{array.dtype}{list(array.shape)}"
