"""The conservation laws of a run, checked once it has ended, well or badly: nothing lost, nothing twice, nothing false.

    kept        every transition that the learner was given is in the books, and what arrived is stored or dropped by name
    order       rollouts come in order, each once; updates, gradient steps and versions are as many as there must be
    unique      no (environment, episode, step) is stored twice, none is left out          (LedgerEnv)
    true        every row is what one step of its environment returned: checksum, reward, end     (LedgerEnv)
    contiguous  the next observation of a row is the observation of the row after it, byte for byte
    returns     an episode's reported return is the sum of its stored rewards; an aborted one has none
    lag         0 <= k - version <= off_policy_degree for the weights that chose every single action
    versions    a version is one set of weights; no environment goes back to an older one
    queues      no queue was ever fuller than its bound; nothing is left in one
    processes   no process is left; in simulation: restarts are within the budget
    evaluation  due = evaluated + skipped; the same version gets the same number each time
    promises    aiorl found no promise of its own broken (InvariantError)

The run's algorithm must be a `Recording`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aiorl.config import env_name
from aiorl.errors import ConfigError, InvariantError
from aiorl.run import Run
from aiorl.seeding import episode_seed
from aiorl.segments import Array
from aiorl.session import Session
from aiorl.testing import ledger_env
from aiorl.testing.recording import ACTED_WITH, RecordedLearner, Tape

LEDGER_ENV = "aiorl.testing.ledger_env:LedgerEnv"


class Violation(NamedTuple):
    """A law and how it was broken, in numbers."""

    law: str
    what: str


class LawsBroken(AssertionError):
    """At least one law does not hold. `violations` has them all, the message the first of each."""

    def __init__(self, violations: list[Violation]) -> None:
        first = {v.law: v for v in reversed(violations)}
        lines = [f"  {law}: {v.what}" for law, v in reversed(first.items())]
        super().__init__("\n".join([f"{len(violations)} violations", *lines]))
        self.violations = violations


def check_laws(run: Run) -> None:
    """Raise LawsBroken unless all laws hold for a run that has ended."""
    broken = list(violations(run))
    if broken:
        raise LawsBroken(broken)


def tape_of(run: Run) -> Tape:
    """What the learner of a recorded run was given."""
    parts = run._session.parts
    if parts is None:
        raise run._session.error or ConfigError("the run has not begun: enter it first")
    learner = parts.trainer.learner
    if not isinstance(learner, RecordedLearner):
        raise ConfigError("the run is not recorded\n  set algo = Recording.of(algorithm)")
    return learner.tape


def violations(run: Run) -> Iterator[Violation]:
    """Every law that does not hold."""
    session, tape = run._session, tape_of(run)
    if session.result is None:
        raise ConfigError("the run has not ended: await run.wait() first")
    if isinstance(session.error, InvariantError):
        yield Violation("promises", str(session.error))
    yield from _kept(session, tape)
    yield from _order(session, tape)
    yield from _lag(session, tape)
    yield from _rest(session)
    histories = _histories(tape)
    for history in histories.values():
        yield from _contiguous(history)
    config = session.config
    if LEDGER_ENV in (env_name(config.env), config.env_kwargs.get("wraps")):
        for history in histories.values():
            yield from _true(history, config.seed, from_the_start=tape.first == 0)
    yield from _returns(session, tape)


# -- counts ------------------------------------------------------------------------------------------------------------


def _kept(session: Session, tape: Tape) -> Iterator[Violation]:
    assert session.parts is not None
    assert session.result is not None
    result, pacer, ledger = session.result, session.parts.pacer, session.parts.trainer.ledger
    given = sum(int(np.count_nonzero(taken.columns["valid"])) for taken in tape.rollouts)
    before = session.made.checked.saved.manifest.env_steps if session.made and session.made.checked.saved else 0
    if ledger.stored != before + given:
        yield Violation("kept", f"the learner was given {before + given} transitions, the books say {ledger.stored}")
    books, dropped = result.ledger, sum(result.dropped.values())
    if books["stored"] > ledger.stored or books["dropped"] != dropped or books["in_flight"] != 0:
        yield Violation("kept", f"stored {ledger.stored}, dropped {result.dropped}, and the summary says {books}")
    if books["produced"] != books["stored"] + books["dropped"] + books["in_flight"]:
        yield Violation("kept", f"produced is not the sum of the others: {books}")
    part = books["produced"] - pacer.steps  # of segments that were not complete
    most = session.config.envs * session.config.steps_per_segment * pacer.slots
    if not 0 <= part <= most:
        yield Violation("kept", f"{pacer.steps} transitions arrived, {books['produced']} are accounted for")
    if result.status == "completed" and result.stop_overshoot is None and result.dropped:
        yield Violation("kept", f"a completed run dropped {result.dropped}")


def _order(session: Session, tape: Tape) -> Iterator[Violation]:
    assert session.parts is not None
    assert session.result is not None
    indices = [taken.index for taken in tape.rollouts]
    if indices != list(range(tape.first, tape.version)):
        yield Violation("order", f"the learner was given rollouts {_shortened(indices)}, expected {tape.first} and so on")
    updates = session.result.updates
    failed = session.result.status != "completed"
    if not updates <= tape.version <= updates + failed:
        yield Violation("order", f"{updates} updates are in the summary, the learner has done {tape.version}")
    steps, reported = tape.gradient_steps, session.report.session_gradient_steps
    if steps != reported and not failed:
        yield Violation("order", f"{steps} gradient steps were made, {reported} are reported")
    versions = session.parts.pacer.commits
    if versions != updates:
        yield Violation("order", f"{versions} updates are committed, {updates} are in the summary")


def _rest(session: Session) -> Iterator[Violation]:
    assert session.parts is not None
    assert session.result is not None
    parts, result = session.parts, session.result
    for name, channel in (("rollouts", parts.rollouts), ("arrivals", parts.workers.arrivals)):
        if channel.high_water > channel.bound:
            yield Violation("queues", f"{name} held {channel.high_water}, its bound is {channel.bound}")
    rollouts, arrivals = len(parts.rollouts), len(parts.workers.arrivals)
    if result.status == "completed" and result.stop_overshoot is None and rollouts + arrivals:
        yield Violation("queues", f"{rollouts} rollouts and {arrivals} arrivals are left")
    if pids := list(getattr(parts.workers, "pids", ())):
        yield Violation("processes", f"worker processes {pids} are still alive")
    points = result.evaluation_points
    if points["due"] != points["evaluated"] + points["skipped"]:
        yield Violation("evaluation", f"not every due evaluation is accounted for: {points}")
    numbers: dict[tuple[int, str, int], set[float]] = defaultdict(set)
    for record in result.evaluations:
        numbers[record.version, record.suite, record.episodes].add(record.mean_return)
    for (version, suite, _), means in numbers.items():
        if len(means) > 1:
            yield Violation("evaluation", f"version {version} was given {sorted(means)} in suite {suite!r}")


# -- weights -----------------------------------------------------------------------------------------------------------


def _lag(session: Session, tape: Tape) -> Iterator[Violation]:
    """Which version chose each action, and whether it may have."""
    config = session.config
    version_of = {crc: version for version, crc in tape.versions.items()}
    if len(version_of) < len(tape.versions):
        told = f"{len(tape.versions)} versions, but only {len(version_of)} different weights: an update that changes none"
        yield Violation("versions", f"{told} cannot be told from one that was lost (is the learning rate 0?)")
        return
    assert session.parts is not None
    degree = config.degree_limit if session.parts.pacer.degree_changed else session.parts.pacer.degree
    last = dict[int, int]()  # of each environment
    for taken in tape.rollouts:
        acted = taken.columns[ACTED_WITH]
        oldest = taken.index
        for column, env in enumerate(taken.envs.tolist()):
            crcs = np.unique(acted[:, column]).tolist()
            known = sorted(version_of[crc] for crc in crcs if crc in version_of)
            if len(crcs) > 1:
                yield Violation("versions", f"rollout {taken.index}, environment {env}: {len(crcs)} weights in a segment")
            if len(known) < len(crcs):
                if tape.first == 0:  # a resumed run begins with versions that an earlier learner made
                    yield Violation("versions", f"rollout {taken.index}, environment {env}: weights of no version acted")
                continue
            oldest = min(oldest, known[0])
            if not 0 <= taken.index - known[0] <= degree:
                yield Violation(
                    "lag", f"rollout {taken.index}, environment {env}: version {known[0]} acted, the degree is {degree}"
                )
            if known[0] < last.get(env, 0):
                yield Violation("versions", f"environment {env} went from version {last[env]} back to {known[0]}")
            last[env] = known[-1]
        if tape.first == 0 and oldest != taken.behaviour_version:
            yield Violation(
                "versions", f"rollout {taken.index} is said to be of version {taken.behaviour_version}, {oldest} acted in it"
            )


# -- rows --------------------------------------------------------------------------------------------------------------


class _History(NamedTuple):
    """All rows of one environment in order: leaves and columns [N, …]. `place` [N, 2]: rollout and row. `fresh` [N]: an
    episode begins although the row before did not end one, for it was aborted."""

    env: int
    obs: dict[str, Array]
    next_obs: dict[str, Array]
    columns: dict[str, Array]
    place: Array
    fresh: Array

    def at(self, row: int) -> str:
        rollout, t = self.place[row].tolist()
        return f"environment {self.env}, rollout {rollout}, row {t}"


def _histories(tape: Tape) -> dict[int, _History]:
    """The valid rows of each environment, joined over all rollouts."""
    pieces: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, taken in enumerate(tape.rollouts):
        for column, env in enumerate(taken.envs.tolist()):
            pieces[env].append((number, column))
    found: dict[int, _History] = {}
    for env, where in sorted(pieces.items()):
        valid = [tape.rollouts[n].columns["valid"][:, c] for n, c in where]

        def join(select: str, name: str, where: list[tuple[int, int]] = where, valid: list[Array] = valid) -> Array:
            parts = [getattr(tape.rollouts[n], select)[name] for n, _ in where]
            return np.concatenate([p[: len(v), c][v] for p, (_, c), v in zip(parts, where, valid, strict=True)])

        first = tape.rollouts[0]
        found[env] = _History(
            env,
            {name: join("obs", name) for name in first.obs},
            {name: join("next_obs", name) for name in first.next_obs},
            {name: join("columns", name) for name in first.columns},
            np.concatenate(
                [
                    np.column_stack([np.full(len(v), tape.rollouts[n].index), np.arange(len(v))])[v]
                    for (n, _), v in zip(where, valid, strict=True)
                ]
            ),
            np.concatenate(
                [
                    (tape.rollouts[n].aborted[c] & (np.arange(len(v)) == np.argmax(v)))[v]
                    for (n, c), v in zip(where, valid, strict=True)
                ]
            ),
        )
    return found


def _contiguous(history: _History) -> Iterator[Violation]:
    ended = history.columns["terminated"] | history.columns["truncated"]
    for name, obs in history.obs.items():
        before, after = history.next_obs[name][:-1], obs[1:]
        differs = np.any((before != after).reshape(len(after), -1), axis=1) if len(after) else np.zeros(0, bool)
        for row in np.flatnonzero(differs & ~ended[:-1] & ~history.fresh[1:]).tolist()[:3]:
            yield Violation(
                "contiguous", f"{history.at(row)}: {name} leads to {before[row]}, the next row begins with {after[row]}"
            )
    both = history.columns["terminated"] & history.columns["truncated"]
    if both.any():
        yield Violation("contiguous", f"{history.at(int(np.argmax(both)))} is both terminated and truncated")


def _true(history: _History, root: int, *, from_the_start: bool) -> Iterator[Violation]:
    """Every row of a LedgerEnv against what its seed says."""
    [obs], [after], columns = history.obs.values(), history.next_obs.values(), history.columns
    seed, t, action = obs[:, 0].astype(np.int64), obs[:, 1].astype(np.int64), columns["action"].astype(np.int64)
    ended = t + 1 >= ledger_env.length_of(seed)
    cut = ledger_env.is_cut(seed)
    tests = {
        "its observation has a false checksum": ~ledger_env.is_true(obs),
        "its next observation has a false checksum": ~ledger_env.is_true(after),
        "its next observation is not that of this step": (
            (after[:, 0] != seed) | (after[:, 1] != t + 1) | (after[:, 2] != action)
        ),
        "its reward is not that of this step": columns["reward"] != ledger_env.rewards(seed, t + 1, action),
        "terminated is false": columns["terminated"] != (ended & ~cut),
        "truncated is false": columns["truncated"] != (ended & cut),
    }
    for complaint, wrong in tests.items():
        if wrong.any():
            row = int(np.argmax(wrong))
            yield Violation("true", f"{history.at(row)}: {complaint} ({np.count_nonzero(wrong)} such rows)")
    if history.fresh.any():
        row = int(np.argmax(history.fresh))
        yield Violation("true", f"{history.at(row)}: aborted, although this environment can be brought back")
    yield from _unique(history, root, seed, t, from_the_start)


def _unique(history: _History, root: int, seed: Array, t: Array, from_the_start: bool) -> Iterator[Violation]:
    """The episodes of one environment are 0, 1, … with all their steps, each once."""
    places = list(zip(seed.tolist(), t.tolist(), strict=True))
    seen: dict[tuple[int, int], int] = {}
    for row, place in enumerate(places):
        if place in seen:
            yield Violation("unique", f"{history.at(row)} is {history.at(seen[place])} once more (step {place[1]})")
            return
        seen[place] = row
    if not from_the_start:
        return
    episode = 0
    expected = (episode_seed(root, history.env, 0), 0)
    for row, place in enumerate(places):
        if place != expected:
            yield Violation(
                "unique", f"{history.at(row)}: expected step {expected[1]} of episode {episode}, found {place}"
            )
            return
        if place[1] + 1 >= ledger_env.length_of(np.int64(place[0])):  # pyright: ignore[reportArgumentType]
            episode += 1
            expected = (episode_seed(root, history.env, episode), 0)
        else:
            expected = (place[0], place[1] + 1)


def _returns(session: Session, tape: Tape) -> Iterator[Violation]:
    """The last returns in the books, added up again from the rows."""
    assert session.parts is not None
    if tape.first:
        return
    ledger = session.parts.trainer.ledger
    totals: dict[int, float] = defaultdict(float)
    returns: list[float] = []
    for taken in tape.rollouts:
        c = taken.columns
        ended = (c["terminated"] | c["truncated"]).tolist()
        reward, valid = c["reward"].tolist(), c["valid"].tolist()
        for column, env in enumerate(taken.envs.tolist()):
            if taken.aborted[column]:
                totals.pop(env, None)
            for row in range(len(reward)):
                if valid[row][column]:
                    totals[env] += reward[row][column]
                if ended[row][column]:
                    returns.append(totals.pop(env))
    if ledger.episodes != len(returns):
        yield Violation("returns", f"{len(returns)} episodes were stored, the books say {ledger.episodes}")
    if list(ledger.recent) != returns[-100:]:
        yield Violation("returns", f"the last returns are {returns[-3:]}, the books say {list(ledger.recent)[-3:]}")


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:6]} … {numbers[-6:]}"
