"""What must hold in a soak, checked while it goes on: the laws of `aiorl.testing.laws`, and that no resource grows.

The tape of a recorded run grows with it, so here it is cut: every rollout is checked at once against an environment that is
played again beside it, every WINDOW rollouts the law of lag and versions is applied, and but for the last rollout they
are forgotten. Of all that was forgotten there remain counts, which the laws of the whole run are applied to at its end.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np

from aiorl.algos.base import LearnerContext
from aiorl.envs.spaces import Spaces
from aiorl.errors import InvariantError
from aiorl.seeding import episode_seed
from aiorl.segments import Array, Rollout
from aiorl.session import Session
from aiorl.testing import laws
from aiorl.testing.laws import Violation
from aiorl.testing.recording import RecordedLearner, Recording, Taken, Tape

WINDOW = 32  # rollouts
REPORTED_MAX = 20  # violations; the first ones tell


class Soaked(Recording, frozen=True):
    """A recorded algorithm whose tape is checked and cut while it is written. `env` is the environment's gymnasium id."""

    name: ClassVar[str] = "soaked"
    env: str = "CartPole-v1"

    def learner(self, spaces: Spaces, context: LearnerContext) -> SoakedLearner:
        again = Again(lambda: gymnasium.make(self.env, disable_env_checker=True), context.seed)
        return SoakedLearner(self.algorithm.learner(spaces, context), again)


class SoakedLearner(RecordedLearner):
    """Keeps to the tape's last rollouts. It needs to be given its run's `session` to judge them by."""

    def __init__(self, learner: Any, again: Again) -> None:
        super().__init__(learner)
        self.session: Session | None = None
        self.again = again
        self.given = 0  # transitions
        self._found: list[Violation] = []
        self._next = 0

    def update(self, rollout: Rollout) -> dict[str, float]:
        metrics = super().update(rollout)
        taken = self.tape.rollouts[-1]
        if taken.index != self._next:
            self._note([Violation("order", f"the learner was given rollout {taken.index}, expected {self._next}")])
        self._next = taken.index + 1
        self.given += int(np.count_nonzero(taken.columns["valid"]))
        self._note(self.again.check(taken))
        if len(self.tape.rollouts) > WINDOW and self.session is not None:
            self._note(laws._lag(self.session, self._window()))
            self._forget(self.session.config.degree_limit)
        return metrics

    def _note(self, violations: Iterator[Violation] | list[Violation]) -> None:
        for violation in violations:
            if len(self._found) < REPORTED_MAX:
                self._found.append(violation)

    def _window(self) -> Tape:
        """The rollouts of the tape as a run of their own: all versions that may have acted in them are known."""
        return Tape(rollouts=self.tape.rollouts, versions=self.tape.versions)

    def _forget(self, degree: int) -> None:
        """All rollouts but the last: the next window begins with it."""
        tape = self.tape
        gone = len(tape.rollouts) - 1
        del tape.rollouts[:gone]
        tape.first += gone
        tape.versions = {v: crc for v, crc in tape.versions.items() if v >= tape.first - degree}
        tape.weights.clear()

    def violations(self, session: Session) -> Iterator[Violation]:
        """Once the run has ended: what was found in it, and what its counts say."""
        assert session.parts is not None
        yield from self._found
        if isinstance(session.error, InvariantError):
            yield Violation("promises", str(session.error))
        yield from laws._lag(session, self._window())
        yield from laws._time(session, self._window())
        # One rollout stands for all of them: this law counts rows and nothing else.
        counted = {"valid": np.broadcast_to(np.True_, (self.given,)), "truncated": np.broadcast_to(np.False_, (self.given,))}
        yield from laws._kept(session, Tape(rollouts=[Taken(0, 0, np.zeros(0), {}, {}, counted, np.zeros(0))]))
        yield from laws._order(session, self.tape)
        yield from laws._rest(session)
        ledger = session.parts.trainer.ledger
        if ledger.episodes != self.again.episodes:
            yield Violation("returns", f"{self.again.episodes} episodes were stored, the books say {ledger.episodes}")
        if ledger.recent != self.again.recent:
            last, books = list(self.again.recent)[-3:], list(ledger.recent)[-3:]
            yield Violation("returns", f"the last returns are {last}, the books say {books}")


class Again:
    """The run's environments, played again with the actions that were stored: every row must come out to the last byte.

    So a row that is torn, false, doubled, left out or filed under another environment is noticed, as are the returns.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], root: int) -> None:
        self._make, self._root = make, root
        self._envs: dict[int, gymnasium.Env[Any, Any]] = {}
        self._obs: dict[int, Any] = {}
        self._episode: dict[int, int] = {}
        self._total: dict[int, float] = {}
        self._lost = set[int]()
        self.episodes = 0
        self.recent: deque[float] = deque(maxlen=100)

    def check(self, taken: Taken) -> Iterator[Violation]:
        """The rows of a rollout, each environment's with its first one that is not so."""
        for column, env in enumerate(taken.envs.tolist()):
            if env not in self._envs:
                self._envs[env] = self._make()
                self._begin(env, 0)
            if env not in self._lost and (complaint := self._compare(taken, column, env)):
                self._lost.add(env)  # where it stands is not known any more
                yield Violation("true", f"rollout {taken.index}, environment {env}, {complaint}")

    def _begin(self, env: int, episode: int) -> None:
        self._obs[env], _ = self._envs[env].reset(seed=episode_seed(self._root, env, episode))
        self._episode[env], self._total[env] = episode, 0.0

    def _compare(self, taken: Taken, column: int, env: int) -> str:
        """"" or what is not as it comes out again."""
        if taken.aborted[column]:
            return "its episode was aborted, although it can be brought back"
        [obs], [after] = taken.obs.values(), taken.next_obs.values()
        columns = {name: taken.columns[name][:, column] for name in ("action", "reward", "terminated", "truncated")}
        for t in np.flatnonzero(taken.columns["valid"][:, column]).tolist():
            row = f"row {t}, episode {self._episode[env]}: "
            if not _same(obs[t, column], self._obs[env]):
                return f"{row}observation {obs[t, column]}, expected {self._obs[env]}"
            self._obs[env], reward, terminated, truncated, _ = self._envs[env].step(columns["action"][t])
            if not _same(after[t, column], self._obs[env]):
                return f"{row}next observation {after[t, column]}, expected {self._obs[env]}"
            stored = tuple(columns[name][t].item() for name in ("reward", "terminated", "truncated"))
            if stored != (reward, terminated, truncated):
                return f"{row}reward and end {stored}, expected {(reward, terminated, truncated)}"
            self._total[env] += float(reward)
            if terminated or truncated:
                self._ended(env)
        return ""

    def _ended(self, env: int) -> None:
        self.episodes += 1
        self.recent.append(self._total[env])
        self._begin(env, self._episode[env] + 1)


def _same(stored: Array, again: Any) -> bool:
    return stored.tobytes() == np.asarray(again, stored.dtype).tobytes()


def file_violations(run_directory: Path, updates: int) -> Iterator[Violation]:
    """What the files of a run that has ended must show, however full the disk was at times."""
    for name in ("events.jsonl", "schedule.jsonl"):
        lines = (run_directory / name).read_bytes().splitlines()
        torn = [number for number, line in enumerate(lines, start=1) if not _is_json(line)]
        if torn:
            yield Violation("files", f"{name}: {len(torn)} of {len(lines)} lines are torn, line {torn[0]} first")
    lines = (run_directory / "schedule.jsonl").read_bytes().splitlines()
    known = [json.loads(line)["k"] for line in lines if _is_json(line)]
    if known != list(range(updates)):
        missing = sorted(set(range(updates)) - set(known))
        detail = f"rollouts {missing[:3]} … are missing" if missing else "some are there twice"
        yield Violation("files", f"schedule.jsonl has {len(known)} of {updates} rollouts: {detail}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# -- resources ---------------------------------------------------------------------------------------------------------


class Resources(NamedTuple):
    """What a training process has.

    Memory in MiB: all of it (RSS), what no file stands behind (`anon`: the heap, no libraries or shared blocks), and that of
    the process and its descendants, each page counted once (`family_anon`). USS and PSS as a whole would change with other
    programs that have the same libraries mapped.
    """

    rss: float
    anon: float
    family_anon: float
    descriptors: int
    threads: int
    blocks: int
    children: int


def resources() -> Resources:
    """Of this process now (Linux)."""
    own, links = _memory("self"), [_link(name) for name in os.listdir("/proc/self/fd")]
    family = _descendants(os.getpid())
    return Resources(
        rss=own["Rss"] / 1024,
        anon=own["Anonymous"] / 1024,
        family_anon=(own["Pss_Anon"] + sum(_memory(pid).get("Pss_Anon", 0) for pid in family)) / 1024,
        descriptors=sum(1 for link in links if link),
        threads=len(os.listdir("/proc/self/task")),
        blocks=sum(1 for link in links if link.startswith("/memfd:")),
        children=len(family),
    )


def _memory(pid: int | str) -> dict[str, int]:
    """Fields of smaps_rollup in KiB; none for a process that has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return {line.split(":")[0]: int(line.split()[1]) for line in file.readlines()[1:]}
    except OSError:
        return {}


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""  # the one that the listing was read with


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in listing.read_text(encoding="ascii").split()]
        except OSError:
            continue  # the thread ended between the two looks
    return found + [one for child in found for one in _descendants(child)]


def growth(samples: Sequence[Resources]) -> dict[str, float]:
    """By how much each resource grew: the mean of the last tenth over that of the second tenth, less 1."""
    tenth = max(1, len(samples) // 10)
    found: dict[str, float] = {}
    for name in Resources._fields:
        values = [float(getattr(sample, name)) for sample in samples]
        before, after = fmean(values[tenth : 2 * tenth] or values[:1]), fmean(values[-tenth:])
        found[name] = after / before - 1 if before else float(after > 0)
    return found
