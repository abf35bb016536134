"""The conservation laws of a run, checked once it has ended, well or badly: nothing lost, nothing twice, nothing false.

    kept        every transition that the learner was given is in the books, and what arrived is stored or dropped by name
    order       rollouts come in order, each once; updates, gradient steps and versions are as many as there must be
    unique      no (environment, episode, step) is stored twice, none is left out, also across a resume      (LedgerEnv)
    true        every row is what one step of its environment returned: checksum, reward, end (LedgerEnv); all is finite
    contiguous  the next observation of a row is the observation of the row after it, byte for byte
    returns     an episode's reported return is the sum of its stored rewards; an aborted one has none
    lag         0 <= k - version <= off_policy_degree for the weights that chose every single action
    versions    a version is one set of weights; no environment goes back to an older one
    queues      no queue was ever fuller than its bound; nothing is left in one
    processes   no process is left; in simulation: restarts are within the budget
    time        a group fills one segment after the other; updates and waiting take no longer than there was time
    resume      a resumed run begins with the counters of its checkpoint, each environment with what it showed last
    evaluation  due = evaluated + skipped; the same version gets the same number each time; its weights, played again from
                the evaluation's own seeds, come to that number; no training episode had such a seed          (LedgerEnv)
    promises    aiorl found no promise of its own broken (InvariantError)

The run's algorithm must be a `Recording`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from aiorl.config import env_name
from aiorl.envs.episodes import run_episodes
from aiorl.errors import ConfigError, InvariantError
from aiorl.ledger import NOT_FINITE
from aiorl.preflight import EVAL_WIDTH
from aiorl.resuming import Saved
from aiorl.run import Run
from aiorl.seeding import evaluation_seed
from aiorl.segments import Array
from aiorl.session import Session
from aiorl.testing import row_laws
from aiorl.testing.ledger_env import LedgerEnv
from aiorl.testing.recording import ACTED_IN, ACTED_WITH, RecordedLearner, Tape, weights_crc
from aiorl.testing.row_laws import History, Open, Violation, histories

LEDGER_ENV = "aiorl.testing.ledger_env:LedgerEnv"
SLACK, SLACK_S = 0.02, 0.01  # of what clocks say


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
    booked = _without_the_failed(session, tape)
    yield from _kept(session, booked)
    yield from _order(session, tape)
    yield from _lag(session, tape)
    yield from _rest(session)
    yield from _time(session, tape)
    saved = _saved(session)
    begin = _beginnings(saved)
    joined = histories(tape)
    for history in joined.values():
        yield from row_laws.contiguous(history)
        yield from row_laws.finite(history)
    yield from _resumed(session, tape, saved, joined)
    yield from _returns(session, booked, saved)
    config = session.config
    if LEDGER_ENV in (env_name(config.env), config.env_kwargs.get("wraps")):
        may_abort = config.on_nonfinite_env == "abort_episode"
        for history in joined.values():
            where = begin.get(history.env, Open(0, 0))
            yield from row_laws.true(history, config.seed, where, may_abort=may_abort)
        yield from _played_again(session, tape)
        yield from _seeds(session, joined)


def _without_the_failed(session: Session, tape: Tape) -> Tape:
    """The rollout that a failing update was given is not in the books."""
    assert session.parts is not None
    learned = session.parts.trainer.ledger.rollouts - tape.first
    failed = session.result is not None and session.result.status == "failed"
    return replace(tape, rollouts=tape.rollouts[:learned]) if failed and learned == len(tape.rollouts) - 1 else tape


def _saved(session: Session) -> Saved | None:
    """The checkpoint that the run began with."""
    return session.made.checked.saved if session.made is not None else None


# -- counts ------------------------------------------------------------------------------------------------------------


def _kept(session: Session, tape: Tape) -> Iterator[Violation]:
    assert session.parts is not None
    assert session.result is not None
    result, pacer, ledger = session.result, session.parts.pacer, session.parts.trainer.ledger
    given = sum(int(np.count_nonzero(taken.columns["valid"])) for taken in tape.rollouts)
    saved = _saved(session)
    before = saved.manifest.env_steps if saved else 0
    if ledger.stored != before + given:
        yield Violation("kept", f"the learner was given {before + given} transitions, the books say {ledger.stored}")
    books, dropped = result.ledger, sum(result.dropped.values())
    if books["stored"] > ledger.stored or books["dropped"] != dropped or books["in_flight"] != 0:
        yield Violation("kept", f"stored {ledger.stored}, dropped {result.dropped}, and the summary says {books}")
    if books["produced"] != books["stored"] + books["dropped"] + books["in_flight"]:
        yield Violation("kept", f"produced is not the sum of the others: {books}")
    spent = result.dropped.get(NOT_FINITE, 0)
    part = books["produced"] - spent - pacer.steps  # of segments that were not complete
    most = session.config.envs * session.config.steps_per_segment * pacer.slots
    if not 0 <= part <= most:
        yield Violation("kept", f"{pacer.steps} transitions arrived, {books['produced']} are accounted for")
    rows = sum(int((~t.columns["valid"] & t.columns["truncated"]).sum()) for t in tape.rollouts)
    if rows != spent:
        yield Violation("kept", f"{rows} rows were spent on what is not finite, dropped are {spent}")
    if result.status == "completed" and result.stop_overshoot is None and result.dropped.keys() - {NOT_FINITE}:
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
    version_of = {crc: version for version, crc in (*_behaviour(_saved(session)).items(), *tape.versions.items())}
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
                yield Violation("versions", f"rollout {taken.index}, environment {env}: weights of no version acted")
                continue
            oldest = min(oldest, known[0])
            if not 0 <= taken.index - known[0] <= degree:
                yield Violation(
                    "lag", f"rollout {taken.index}, environment {env}: version {known[0]} acted, the degree is {degree}"
                )
            told = int(taken.columns[ACTED_IN][0, column])
            if not known[0] <= told <= taken.index:  # schedules of exploration go by it
                yield Violation("lag", f"rollout {taken.index}, environment {env}: it acted as if in rollout {told}")
            if known[0] < last.get(env, 0):
                yield Violation("versions", f"environment {env} went from version {last[env]} back to {known[0]}")
            last[env] = known[-1]
        if oldest != taken.behaviour_version:
            yield Violation(
                "versions", f"rollout {taken.index} is said to be of version {taken.behaviour_version}, {oldest} acted in it"
            )


def _behaviour(saved: Saved | None) -> dict[int, int]:
    """`weights_crc` of the older versions that a resumed run acts with at first."""
    return {int(v): weights_crc(w) for v, w in saved.parts["run"]["behaviour"].items()} if saved else {}


# -- time --------------------------------------------------------------------------------------------------------------


def _time(session: Session, tape: Tape) -> Iterator[Violation]:
    assert session.parts is not None
    report, waited_s = session.report, session.parts.waiting_s["train"]
    busy_s, wall_s = report.busy_s["train"], report.train_seconds()
    if busy_s + waited_s > wall_s * (1 + SLACK) + SLACK_S:
        told = f"the learner was busy for {busy_s:.3f} s and waited for {waited_s:.3f} s"
        yield Violation("time", f"{told}, but trained for {wall_s:.3f} s")
    last = dict[int, tuple[int, float]]()
    for taken in tape.rollouts:
        for env, (begun_s, ended_s) in zip(taken.envs.tolist(), taken.spans.tolist(), strict=False):
            before, end_s = last.get(env, (0, begun_s))
            if not end_s <= begun_s <= ended_s:
                told = f"environment {env} was to collect for rollout {taken.index} from {begun_s:.6f} to {ended_s:.6f} s"
                yield Violation("time", f"{told}, and for rollout {before} until {end_s:.6f} s")
            last[env] = taken.index, ended_s


# -- resuming ----------------------------------------------------------------------------------------------------------


def _books(saved: Saved) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(environment, its place in its group, the group's books) for all environments of a checkpoint."""
    env = 0
    for _, books in sorted(saved.parts["run"]["ledger"]["groups"].items(), key=lambda item: int(item[0])):
        for place in range(len(books["totals"])):
            yield env, place, books
            env += 1


def _beginnings(saved: Saved | None) -> dict[int, Open]:
    """Where each environment goes on; nothing for those that have not begun."""
    if saved is None:
        return {}
    return {
        env: Open(int(books["cursor"]["episodes"][place]), len(books["cursor"]["actions"][str(place)]))
        for env, place, books in _books(saved)
        if books["cursor"]
    }


def _resumed(session: Session, tape: Tape, saved: Saved | None, joined: Mapping[int, History]) -> Iterator[Violation]:
    if saved is None:
        return
    report, manifest = session.report, saved.manifest
    if tape.first != manifest.version:
        yield Violation("resume", f"the learner began with version {tape.first}, saved was {manifest.version}")
    steps = report.stored - report.session_steps
    gradients = report.gradient_steps - report.session_gradient_steps
    if (steps, gradients) != (manifest.env_steps, saved.parts["run"]["report"]["gradient_steps"]):
        yield Violation("resume", f"it went on from {steps} env steps and {gradients} gradient steps, saved was {manifest}")
    for env, place, books in _books(saved):
        history = joined.get(env)
        if history is None or not len(history.place) or not books["cursor"] or history.fresh[0]:
            continue
        shown = books["cursor"]["obs"]
        for name, obs in history.obs.items() if not books["cursor"]["done"][place] else ():
            if name in shown and obs[0].tobytes() != shown[name][place].tobytes():
                told = f"{history.at(0)} begins with {name} {obs[0]}"
                yield Violation("resume", f"{told}, the checkpoint ended with {shown[name][place]}")


def _returns(session: Session, tape: Tape, saved: Saved | None) -> Iterator[Violation]:
    assert session.parts is not None
    ledger = session.parts.trainer.ledger
    before = saved.parts["run"]["ledger"] if saved else {"episodes": 0, "recent": np.zeros(0)}
    totals = {env: float(books["totals"][place]) for env, place, books in _books(saved)} if saved else {}
    recent = before["recent"].tolist()
    yield from row_laws.returns(tape, ledger, episodes=int(before["episodes"]), recent=recent, totals=totals)


# -- evaluation --------------------------------------------------------------------------------------------------------


def _played_again(session: Session, tape: Tape) -> Iterator[Violation]:
    """Every evaluation, from the weights that are still there: one version from its first step to its last."""
    assert session.made is not None
    assert session.result is not None
    checked, result = session.made.checked, session.result
    seed = session.config.seed
    elsewhere = {name for name, suite in session.config.eval_suites.items() if suite.env not in (None, LEDGER_ENV)}
    records = [(record, False) for record in result.evaluations if record.suite not in elsewhere]
    for record, fresh in (*records, *((record, True) for record in result.reevaluations)):
        weights = tape.weights.get(record.version)
        if weights is None:
            continue
        policy = checked.algorithm.policy(checked.spaces)
        policy.begin(weights, 0, None, 0)
        envs = [_Noted() for _ in range(min(EVAL_WIDTH, record.episodes))]
        totals, _ = run_episodes(envs, checked.spaces, policy, record.episodes, seed, len(envs), fresh=fresh)
        seeds = sorted(seed for env in envs for seed in env.seeds)
        if seeds != sorted(evaluation_seed(seed, e, fresh=fresh) for e in range(record.episodes)):
            yield Violation("evaluation", f"its episodes have the seeds {_shortened(seeds)}: not those of evaluation")
        if float(np.mean(totals)) != record.mean_return:
            told = f"version {record.version} got {record.mean_return} in {record.episodes} episodes"
            yield Violation("evaluation", f"{told}, and {float(np.mean(totals))} when they are played again")


class _Noted(LedgerEnv):
    """Remembers what it was reset with."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        self.seeds.append(-1 if seed is None else seed)
        return super().reset(seed=seed, options=options)


def _seeds(session: Session, joined: Mapping[int, History]) -> Iterator[Violation]:
    """Of numbers below 2**31 two are the same now and then, but hardly ever two pairs in a run that has a tape."""
    assert session.result is not None
    trained = {int(seed) for history in joined.values() for [obs] in [history.obs.values()] for seed in obs[:, 0]}
    most = max((record.episodes for record in session.result.evaluations), default=0)
    kinds = (False, True)
    played = {evaluation_seed(session.config.seed, e, fresh=fresh) for e in range(most) for fresh in kinds}
    if len(both := trained & played) > 1:
        told = f"{len(both)} training episodes have the seeds of evaluation"
        yield Violation("evaluation", f"{told}: {_shortened(sorted(both))}")


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:6]} … {numbers[-6:]}"
