"""Everything that can be refused is refused here, before any process is started."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from aiorl.algos.base import (
    Algorithm,
    CentralAlgorithm,
    Doubting,
    Filing,
    Forward,
    Ranked,
    Recurrent,
    RecurrentPolicy,
    Remembering,
    SplitPolicy,
    Wrapping,
)
from aiorl.buffers.storage import free_bytes
from aiorl.config import Config, env_name
from aiorl.envs.make import Probe, probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec, main_is_guarded, resolve_env
from aiorl.errors import ConfigError
from aiorl.metrics.directory import choose_directory, make_writable
from aiorl.resuming import Saved, check_fits, check_state, read_saved
from aiorl.segments import Column, SegmentLayout
from aiorl.workers.memory import available_bytes

SWITCHES = {"anneal_to": "anneal", "priority_beta": "priority_exponent", "target_entropy": "tune_alpha"}
"""Settings of learners, and those without which they do nothing."""

EVAL_WIDTH = 10  # environments an evaluation runs side by side


class Suite(NamedTuple):
    """One of the evaluations of a snapshot: its name ("" if it is the only one), environment and number of episodes."""

    name: str
    env: EnvSpec
    episodes: int


@dataclass(frozen=True)
class Preflight:
    """A checked configuration and what it means: the environment, its spaces, the memory layout of a segment."""

    config: Config
    algorithm: Algorithm
    env: EnvSpec
    probe: Probe
    segment: SegmentLayout
    directory: Path
    suites: tuple[Suite, ...]
    saved: Saved | None = None
    idle_workers: int = 0
    forward: Forward | None = None  # with central inference

    @property
    def spaces(self) -> Spaces:
        return self.probe.spaces

    @property
    def warnings(self) -> list[str]:
        """What the user should know before it matters."""
        found: list[str] = []
        now = self.config.total_steps
        before = now if self.saved is None else self.saved.manifest.config.get("total_steps", now)
        if before != now:
            found.append(
                f"total_steps was {before:,} and is {now:,} from here on: what falls or "
                "rises over a run (epsilon, an annealed learning rate, beta) goes by the new total"
            )
        if self.probe.why_inexact:
            found.append(f"a resumed run may not be exact: {self.probe.why_inexact}")
        found += self.probe.warnings
        found += self.doubts
        found += _idle_settings(self.config, _learning(self.algorithm, self.spaces))
        if self.idle_workers:
            found.append(
                f"{self.config.workers} workers are enough for {self.config.groups} groups of environments; for more, "
                "use more envs or a smaller group_size"
            )
        return found

    @property
    def doubts(self) -> list[str]:
        """What the algorithm says of these spaces."""
        learning = _learning(self.algorithm, self.spaces)
        return list(learning.algorithm.doubts(learning.spaces)) if isinstance(learning.algorithm, Doubting) else []

    @property
    def lanes(self) -> int:
        """How many groups are collected at the same time."""
        config, workers = self.config, cast(int, self.config.workers)
        waits = config.stepping == "auto" and self.env.coroutines
        side_by_side = config.stepping == "threads" or waits or self.forward is not None
        return config.groups if workers and side_by_side else max(1, workers)

    @property
    def needs_main(self) -> bool:
        """Whether workers must import the program that is running: its environment or algorithm is defined there."""
        return any(e.name.startswith("__main__:") for e in self._envs) or type(self.algorithm).__module__ == "__main__"

    @property
    def modules(self) -> list[str]:
        """What workers import to make their environments and can share, see `EnvSpec.modules`."""
        return sorted({module for env in self._envs for module in env.modules})

    @property
    def _envs(self) -> list[EnvSpec]:
        return [self.env, *(suite.env for suite in self.suites)]


def check(config: Config, resume: str | Path | None = None, *, write: bool = True) -> Preflight:
    """Check a configuration against this machine, the environment and, when resuming, the checkpoint.

    Makes one environment, so call it on a thread of its own. With `write` the run directory is created. Raises ConfigError.
    """
    saved = None
    if resume is not None:
        saved = read_saved(Path(resume))
    asked, config = config, config.resolve()
    algorithm = cast(Algorithm, config.algorithm)
    spec = resolve_env(
        config.env, config.env_kwargs, in_process=config.workers == 0, native=config.native_vector,
        frame_stack=config.frame_stack,
    )  # fmt: skip
    found = probe(spec, cast(int, config.group_size))
    if found.spec.coroutines and asked.group_size == "auto":
        config = asked.replace(group_size=1).resolve()  # a worker serves them all at once: none needs to wait for others
    algorithm.check(found.spaces)
    forward = _forward(config, algorithm, found.spaces)
    _check_practice(config, _learning(algorithm, found.spaces))
    _check_bots(algorithm, found)
    _check_can_abort(config, found)
    _check_stepping(config, found)
    suites = find_suites(config, found)
    _check_importable(algorithm, cast(int, config.workers))
    segment = segment_layout(config, algorithm, found)
    _check_memory(config, algorithm, found.spaces, segment)
    _check_descriptors(cast(int, config.workers))
    if saved is not None:
        check_fits(saved, config, found.spaces)
        check_state(saved, config, segment)
    own = saved.path.parent.parent if saved is not None and saved.path.parent.name == "checkpoints" else None
    _check_disk(config, _learning(algorithm, found.spaces), own or Path(config.out or "runs"))
    directory = own or choose_directory(config, env_name(config.env), algorithm.name, create=write)
    if write:
        make_writable(directory)
    idle = asked.workers - cast(int, config.workers) if isinstance(asked.workers, int) else 0
    return Preflight(config, algorithm, found.spec, found, segment, directory, suites, saved, idle, forward)


def _forward(config: Config, algorithm: Algorithm, spaces: Spaces) -> Forward | None:
    """The network of central inference, if that is asked for."""
    if config.inference != "central":
        return None
    forward = cast(CentralAlgorithm, algorithm).forward(spaces)
    if not isinstance(algorithm.policy(spaces), SplitPolicy):
        raise ConfigError(
            f"inference = \"central\": the policy of {algorithm.name} has no `features` and `choose`\n"
            "  give it both (see aiorl.algos.base.SplitPolicy), or leave inference at \"worker\""
        )
    return forward


class Learning(NamedTuple):
    """The algorithm that learns, the spaces that it sees, and where its settings stand ("sac", "selfplay.inner")."""

    algorithm: Algorithm
    spaces: Spaces
    settings: str


def _learning(algorithm: Algorithm, spaces: Spaces) -> Learning:
    """The algorithm itself, or the one within."""
    if isinstance(algorithm, Wrapping):
        return Learning(*algorithm.within(spaces))
    return Learning(algorithm, spaces, algorithm.name)


def _check_practice(config: Config, learning: Learning) -> None:
    """A buffer must hold what is to be learned from, when it is: for algorithms with `capacity` and `warmup` settings."""
    algorithm, _, settings = learning
    capacity, own = getattr(algorithm, "capacity", None), getattr(algorithm, "warmup", None)
    if not (isinstance(capacity, int) and isinstance(own, int)):
        return
    warmup, name = (own, f"{settings}.warmup") if config.warmup is None else (config.warmup, "warmup")
    if warmup >= config.total_steps:
        raise ConfigError(
            f"{name} = {warmup:,}: the run ends after {config.total_steps:,} env steps, before the first gradient step\n"
            f"  expected less than total_steps: lower {name}, or train for longer"
        )
    rows, n_step = capacity // config.envs, getattr(algorithm, "n_step", 1)
    if n_step > 1 and n_step >= rows:
        raise ConfigError(
            f"{settings}.n_step = {n_step}, but the buffer holds {rows} steps of each of {config.envs} environments\n"
            f"  use a smaller n_step, or a capacity of more than {config.envs * n_step:,}"
        )
    rollout, times = config.steps_per_rollout, 1
    if config.schedule == "eager":  # one group may fill a rollout alone, with all the segments that it may be ahead
        times = min(config.groups, config.degree_limit + 1)
    one = f"a rollout has {rollout:,} env steps"
    of_one = one if times == 1 else f"{one}, in the eager schedule up to {times} times as many of an environment"
    for what, needs in ((f"{name} is {warmup:,}", warmup), (of_one, rollout * times)):
        if needs > capacity:
            raise ConfigError(
                f"{settings}.capacity = {capacity:,}, but {what}: some would be overwritten before they are used\n"
                f"  raise {settings}.capacity to {needs:,} or more"
            )


def _idle_settings(config: Config, learning: Learning) -> Iterator[str]:
    """What is set and does nothing, or leaves a gap."""
    algorithm, _, settings = learning
    usual = {field.name: field.default for field in msgspec.structs.fields(cast(Any, algorithm))}
    for name, switch in SWITCHES.items():
        given = getattr(algorithm, name, None)
        if name in usual and given != usual[name] and not getattr(algorithm, switch, True):
            yield f"{settings}.{name} = {given} does nothing: {switch} is off"
    warmup = getattr(algorithm, "warmup", None) if config.warmup is None else config.warmup
    if config.warmup is not None and "warmup" not in usual:
        yield f"warmup = {config.warmup:,} does nothing: {algorithm.name} has no warm-up"
    if getattr(algorithm, "update_ratio", None) == 0:
        yield f"nothing will be learned: {settings}.update_ratio is 0"
    random_steps, steps = getattr(algorithm, "random_steps", None), config.total_steps
    if random_steps is not None and random_steps >= steps:
        yield f"every action will be random: random_steps is {random_steps:,}, the run has {steps:,} env steps"
    elif random_steps is not None and warmup is not None and warmup - random_steps >= config.steps_per_rollout:
        yield (
            f"for {warmup - random_steps:,} env steps a policy acts that has learned nothing: random_steps is "
            f"{random_steps:,}, warm-up takes {warmup:,}"
        )


def _check_bots(algorithm: Algorithm, found: Probe) -> None:
    """Otherwise a worker would find out, as the first game against it begins."""
    if isinstance(algorithm, Ranked) and found.bots is not None:
        for name in algorithm.bots:
            if name not in found.bots:
                near = difflib.get_close_matches(name, found.bots, 1)
                hint = f" — did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"{algorithm.name}.bots: {found.spec.name} has no bot {name!r}{hint}\n"
                    f"  it has: {', '.join(found.bots) or 'none'}"
                )


def _check_can_abort(config: Config, found: Probe) -> None:
    """An episode of its own is what a part of a vector environment does not have."""
    if config.on_nonfinite_env == "abort_episode" and found.native:
        raise ConfigError(
            f"on_nonfinite_env = \"abort_episode\": {found.spec.name} is a vector: no episode can be given up alone\n"
            "  set native_vector = false, or on_nonfinite_env = \"stop\""
        )


def _check_stepping(config: Config, found: Probe) -> None:
    if config.stepping == "threads" and found.spec.coroutines:
        raise ConfigError(
            f"stepping = \"threads\": the steps of {found.spec.name} are `async def` and wait on one event loop\n"
            "  leave stepping at \"auto\""
        )


def _check_importable(algorithm: Algorithm, workers: int) -> None:
    """Workers import the algorithm by name."""
    kind = type(algorithm)
    if workers == 0:
        return
    if "<locals>" in kind.__qualname__ or (kind.__module__ == "__main__" and not main_is_guarded()):
        raise ConfigError(
            f"workers cannot import the algorithm {kind.__qualname__} from {kind.__module__}\n"
            "  put it at the top level of a module (or guard the program with `if __name__ == \"__main__\":`), "
            "or set workers = 0"
        )


def find_suites(config: Config, found: Probe) -> tuple[Suite, ...]:
    """The evaluations of each snapshot. Raises ConfigError naming a suite that this policy cannot play."""
    if not config.eval_suites:
        return (Suite("", found.spec, config.eval_episodes),)
    suites: list[Suite] = []
    for name, suite in config.eval_suites.items():
        spec = found.spec
        if suite.env is not None or suite.env_kwargs:
            env, kwargs = suite.environment(config.env, config.env_kwargs)
            try:
                seen = probe(resolve_env(
                    env, kwargs, in_process=config.workers == 0, native=False, frame_stack=config.frame_stack
                ))  # fmt: skip
            except ConfigError as error:
                raise ConfigError(f"eval_suites.{name}: {error}", detail=error.detail) from error
            if seen.spaces != found.spaces:
                raise ConfigError(
                    f"eval_suites.{name}: {env_name(env)} has other spaces than the training environment\n"
                    f"  training: {found.spaces.describe()}\n  suite:    {seen.spaces.describe()}"
                )
            spec = seen.spec
        suites.append(Suite(name, spec, suite.episodes or config.eval_episodes))
    return tuple(suites)


def segment_layout(config: Config, algorithm: Algorithm, found: Probe) -> SegmentLayout:
    spaces = found.spaces
    columns = {
        "action": spaces.action_column,
        "reward": Column((), "float64"),
        "terminated": Column((), "bool"),
        "truncated": Column((), "bool"),
        "valid": Column((), "bool"),
    }
    own = algorithm.columns(spaces)
    if clash := own.keys() & columns.keys():
        raise ConfigError(f"{algorithm.name} declares columns that exist already: {', '.join(sorted(clash))}")
    return SegmentLayout(
        steps=config.steps_per_segment,
        envs=cast(int, config.group_size),
        obs=spaces.obs_columns,
        columns={**columns, **own},
        state_bytes=found.state_bytes,
        guarded=config.debug,
        policy_state=_policy_state(algorithm, spaces),
    )


def _policy_state(algorithm: Algorithm, spaces: Spaces) -> dict[str, Column]:
    """What recurrent policies remember. Raises ConfigError if the policy cannot say it, or checkpoints cannot keep it."""
    if not isinstance(algorithm, Recurrent):
        return {}
    policy = algorithm.policy(spaces)
    if not isinstance(policy, RecurrentPolicy):
        raise ConfigError(
            f"{algorithm.name} declares a policy_state, and {type(policy).__name__} lacks state() or restore()\n"
            "  give it both, see RecurrentPolicy in aiorl.algos.base"
        )
    state = algorithm.policy_state(spaces)
    for name, column in state.items():
        if np.dtype(column.dtype).kind not in "biuf":
            raise ConfigError(
                f"{algorithm.name}: policy_state {name!r} is {column.dtype}, which a checkpoint cannot hold\n"
                "  declare numbers that are real (a complex one as two of them)"
            )
    return state


def _check_memory(config: Config, algorithm: Algorithm, spaces: Spaces, segment: SegmentLayout) -> None:
    """Refuse what cannot fit: slots, groups x (degree + 1) segments, and the experience that a learner keeps."""
    if config.memory_gb is not None:
        limit, source = int(config.memory_gb * 2**30), f"memory_gb = {config.memory_gb:g}"
    else:
        available = available_bytes()
        if available is None:
            return
        limit, source = int(available * 0.8), "80 % of the memory available"
    need = config.groups * (config.degree_limit + 1) * segment.touched_nbytes
    if need > limit:
        fits = max(1, config.envs * limit // need)
        raise ConfigError(
            f"{config.envs} environments need {need / 2**30:.2f} GiB of shared memory, the limit is {limit / 2**30:.2f} GiB "
            f"({source})\n  use at most {fits} environments, a shorter segment_length (now {segment.steps}) "
            "or a smaller off_policy_degree or degree_max"
        )
    _check_experience(config, _learning(algorithm, spaces), limit - need, source)


def _check_experience(config: Config, learning: Learning, limit: int, source: str) -> None:
    algorithm, spaces, settings = learning
    if not isinstance(algorithm, Remembering):
        return
    kept = min(algorithm.capacity, config.total_steps)
    if config.device == "cpu" and getattr(algorithm, "storage", None) == "device":
        algorithm = msgspec.structs.replace(cast(Any, algorithm), storage="memory")  # the device's memory is this one
    need = algorithm.experience_bytes(spaces, config.envs, kept)
    if need > limit:
        raise ConfigError(
            f"{settings}.capacity = {algorithm.capacity:,}: {kept:,} transitions and their copy in a checkpoint need "
            f"{need / 2**30:.2f} GiB, there are {max(0, limit) / 2**30:.2f} GiB ({source})\n"
            f"  use a capacity of at most {max(1, kept * limit // need):,}"
        )


def _check_disk(config: Config, learning: Learning, place: Path) -> None:
    """Experience on disk has its room taken at once, and is there once more while it is copied for a checkpoint.

    Each checkpoint holds all experience. The oldest goes when the newest is complete.
    """
    algorithm, spaces, settings = learning
    free = free_bytes(place)
    if not isinstance(algorithm, Filing) or free is None:
        return
    kept, checkpoints = min(algorithm.capacity, config.total_steps), config.keep + 1 if config.checkpoint_every else 1
    need = sum(algorithm.disk_bytes(spaces, config.envs, size) for size in (algorithm.capacity, kept))
    where, other = (" on disk: the buffer, its copy and", f", or {settings}.storage = \"memory\"") if need else (":", "")
    need += checkpoints * algorithm.saved_bytes(spaces, config.envs, kept)
    there = sum(file.stat().st_size for file in place.glob("checkpoints/*/*"))  # of a run that goes on
    if need > free + there:
        raise ConfigError(
            f"{settings}.capacity = {algorithm.capacity:,}{where} checkpoints of {kept:,} transitions (keep = {config.keep})"
            f" need {need / 2**30:.2f} GiB in {place}, where {(free + there) / 2**30:.2f} GiB are free\n"
            f"  use a smaller capacity or keep, another out{other}"
        )


def _check_descriptors(workers: int) -> None:
    if sys.platform == "win32" or workers == 0:
        return
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 8 * (workers + 1) + 64
    if need > soft:
        raise ConfigError(
            f"{workers} workers need about {need} open files, the limit is {soft}\n"
            f"  raise it (ulimit -n {need}) or use at most {max(1, (soft - 64) // 8 - 1)} workers"
        )
