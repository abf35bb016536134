"""What a run says: events, to all readers and to its files."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np

from aiorl.alarms import blame
from aiorl.algos.base import Ranked, Weights
from aiorl.assembly import Assembly
from aiorl.events import (
    AnyEvent,
    EpisodeAborted,
    SettingsChanged,
    Stalled,
    Standings,
    Started,
    Updated,
    Warned,
    WorkerGivenUp,
    WorkerRestarted,
)
from aiorl.league import ITSELF, opponents
from aiorl.learning import Outcome
from aiorl.ledger import NOT_FINITE, Aborted
from aiorl.metrics.broadcast import Broadcast
from aiorl.pacing import RolloutPlan
from aiorl.report import Report
from aiorl.workers.supervision import GivenUp, Restart


class Teller:
    """Makes events, and counts in the report what they tell of. For the event loop's thread."""

    def __init__(self, report: Report) -> None:
        self.broadcast = Broadcast()
        self._report = report
        self._made: Assembly | None = None
        self._blamed: set[tuple[int, str]] = set()  # environments, and what they have been told off for
        self._admitted: float | None = None  # opponents, so far

    def about(self, made: Assembly) -> None:
        """The run has been wired: from here on events go to its files too."""
        self._made = made

    def emit(self, event: AnyEvent) -> None:
        """Send an event to all readers and to the files."""
        self.broadcast.emit(event)
        if self._made is not None:
            self._made.files.event(event)

    def now(self) -> dict[str, Any]:
        """The fields that every event carries."""
        version = self._made.parts.pacer.commits if self._made is not None else 0
        return {"seconds": self._report.seconds, "version": version, "env_steps": self._report.stored}

    def warned(self, message: str) -> None:
        self.emit(Warned(**self.now(), message=message))

    def stalled(self, table: str) -> None:
        self.emit(Stalled(**self.now(), table=table))

    def started(self) -> None:
        """All workers are ready."""
        made = self._made
        assert made is not None
        config, saved = made.checked.config, made.checked.saved
        self.emit(
            Started(
                **self.now(),
                env=made.env_name,
                algo=made.checked.algorithm.name,
                seed=config.seed,
                envs=config.envs,
                groups=config.groups,
                workers=cast(int, config.workers),
                off_policy_degree=config.off_policy_degree,
                schedule=config.schedule,
                total_steps=config.total_steps,
                out=str(made.checked.directory),
                start_seconds=time.perf_counter() - self._report.begun_s,
                resumed_from=saved.manifest.version if saved else None,
                unix_seconds=time.time(),
            )
        )

    def settings_changed(self, changes: dict[str, float], version: int | None = None) -> None:
        """They are in force from the update after `version` on (None: from the next one on)."""
        told = self.now()
        self.emit(SettingsChanged(**told | ({} if version is None else {"version": version}), changes=changes))

    def updated(self, plan: RolloutPlan, outcome: Outcome, waited_s: float) -> None:
        """An update has been booked."""
        assert self._made is not None
        ended = outcome.episodes
        self.emit(
            Updated(
                **self.now(),
                rollout=plan.index,
                behaviour_version=plan.behaviour_version,
                staleness=plan.staleness,
                staleness_in_queue=plan.staleness_in_queue,
                off_policy_degree=self._made.parts.pacer.degree,
                gradient_steps=outcome.gradient_steps,
                collect_seconds=outcome.collect_seconds,
                update_seconds=outcome.update_seconds,
                waited_seconds=waited_s,
                episodes=len(ended),
                return_mean=float(np.mean([e.total for e in ended])) if ended else None,
                length_mean=float(np.mean([e.length for e in ended])) if ended else None,
                train_return_mean_100=self._report.return_mean_100,
                metrics=outcome.metrics,
                skipped=outcome.skipped,
            )
        )
        for message in outcome.alarms:
            self.warned(message)
        self._aborted(self._made, outcome)
        admitted = outcome.metrics.get("pool_admitted", self._admitted)
        if admitted != self._admitted:
            self._admitted = admitted
            self.standings(outcome.weights)

    def standings(self, weights: Weights) -> None:
        """How the learner does against its opponents, if it is one that has any."""
        assert self._made is not None
        algorithm = self._made.checked.algorithm
        if isinstance(algorithm, Ranked):
            now, table = self.now(), algorithm.standings(weights)
            self.emit(Standings(**now, elo=table["elo"][ITSELF], opponents=opponents(table)))
            self._made.files.standings({"version": now["version"], "env_steps": now["env_steps"], **table})

    def _aborted(self, made: Assembly, outcome: Outcome) -> None:
        """Every episode that was given up is an event; the environment is blamed once."""
        config = made.checked.config
        for env, episode, length, reason in outcome.aborted:
            station = made.parts.workers.worker_of(env // cast(int, config.group_size))
            worker = f"worker {station}" if config.workers else "this process"
            self.emit(
                EpisodeAborted(**self.now(), worker=worker, env=env, episode=episode, length=length, reason=reason)
            )
            if reason == NOT_FINITE:
                self._report.drop(reason, 1)
            if (env, reason) not in self._blamed:
                self._blamed.add((env, reason))
                log = f" (how: worker-{station}.log)" if config.workers else ""
                self.warned(blame(Aborted(env, episode, length, reason), log))
        self._report.aborted += len(outcome.aborted)

    def mended(self, done: Restart | GivenUp) -> None:
        """A worker has been started anew, or given up."""
        if isinstance(done, GivenUp):
            self._report.given_up += 1
            self.emit(WorkerGivenUp(**self.now(), **done._asdict()))
        else:
            self._report.restarted(done.reason)
            self.emit(WorkerRestarted(**self.now(), **done._asdict()))
