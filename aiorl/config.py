"""The configuration of a run: one frozen struct, checked when it is made, written to and read from TOML."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from aiorl.algos import algorithm_class, algorithm_name
from aiorl.algos.base import Algorithm, CentralAlgorithm
from aiorl.errors import ConfigError
from aiorl.structs import (
    as_in_a_file,
    check_bounds,
    check_plain,
    convert,
    fields_of,
    merge,
    not_for_toml,
    read_toml,
    refuse_unknown,
    without_none,
)

Auto = Literal["auto"]

SELF_TUNED_MAX = 8  # with segments of fixed length the speed is had by 2; the rest is for slow stragglers
STALL_TIMEOUT_S = 300.0
EVAL_QUEUE = 8  # snapshots that may wait with eval_busy = "queue"
GROUPS_MAX = 2**16 - 1  # the records between processes number groups with 16 bits


class EvalSuite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one evaluation suite has of its own; the rest is as in training. `Config` takes a plain table as well.

    `env` is a gymnasium id or `module:callable`. Without it `env_kwargs` go over those of the training environment.
    """

    env: str | None = None
    env_kwargs: dict[str, Any] = {}
    episodes: Annotated[int, Meta(ge=1, le=100_000)] | None = None

    def environment(self, env: Any, env_kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(env, env_kwargs) to evaluate in, given those of training."""
        return (env, {**env_kwargs, **self.env_kwargs}) if self.env is None else (self.env, self.env_kwargs)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a run. Bad values raise ConfigError at once, naming field, value and what was expected.

    `algo` is an algorithm's name or a configured instance such as `aiorl.PPO(learning_rate=3e-4)`; `env` is a gymnasium
    id, `module:callable` or a callable that makes an environment.
    """

    env: Annotated[Any, Meta(description="gymnasium id, module:callable, or a callable")]
    env_kwargs: Annotated[dict[str, Any], Meta(description="keyword arguments for the environment")] = {}
    native_vector: Annotated[bool, Meta(description="use the environment's own vector implementation if it has one")] = True
    frame_stack: Annotated[int, Meta(description="newest observations that are shown as one", ge=1, le=64)] = 1
    algo: Annotated[Any, Meta(description="algorithm: a name, pkg.mod:Class, or a configured instance")] = "ppo"
    total_steps: Annotated[int, Meta(description="env steps to train for", ge=1)] = 100_000
    seed: Annotated[int, Meta(description="root of all randomness", ge=0)] = 0
    envs: Annotated[int, Meta(description="environments in all", ge=1)] = 16
    group_size: Annotated[
        int | Auto, Meta(description="environments that act as one batch; part of the result, unlike workers")
    ] = "auto"
    workers: Annotated[
        int | Auto, Meta(description="worker processes; 0 runs the environments in this process, one after the other")
    ] = "auto"
    min_workers: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="with so many left the run goes on when a worker fails too often (default: all are needed)"),
    ] = None
    stepping: Annotated[
        Literal["auto", "serial", "threads"],
        Meta(
            description="how a worker's groups step: threads, each in its own, for environments that wait; serial, one "
            "after the other; auto, serial or, where step is async def, as coroutines"
        ),
    ] = "auto"
    steps_at_once: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="environment steps that may run at the same time in a worker, in threads or as coroutines"),
    ] = None
    inference: Annotated[
        Literal["worker", "central"],
        Meta(
            description="where the acting network is computed: in each worker, or in batches for all of them in the "
            "training process, on its device"
        ),
    ] = "worker"
    inference_wait_ms: Annotated[
        float, Meta(description="longest wait of the first group of such a batch for the others", ge=0, le=60_000)
    ] = 1.0
    segment_length: Annotated[
        int | None, Meta(description="steps each environment contributes to a rollout (default: the algorithm's)")
    ] = None
    off_policy_degree: Annotated[
        int,
        Meta(
            description="how many versions acting may trail learning; 0 is the sequential loop, -1 tunes itself",
            ge=-1,
            le=10_000,
        ),
    ] = 1
    degree_max: Annotated[
        Annotated[int, Meta(ge=0, le=10_000)] | None,
        Meta(description="largest degree while running; memory is laid out for it (default: the degree itself; 8 at -1)"),
    ] = None
    error_target: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="off-policy error that a self-tuned degree keeps to (default: the algorithm's)"),
    ] = None
    schedule: Annotated[
        Literal["ordered", "eager"],
        Meta(description="ordered: reproducible; eager: whoever is ready first"),
    ] = "ordered"
    allow_uncorrected: Annotated[
        bool, Meta(description="let an algorithm without off-policy correction run at a degree of 1 or more")
    ] = False
    warmup: Annotated[
        int | None,
        Meta(description="env steps stored before a replay learner's first update (default: the algorithm's own warmup)"),
    ] = None
    eval_every: Annotated[
        int | None, Meta(description="env steps between evaluations (default: a tenth of the run; 0: only the final one)")
    ] = None
    eval_episodes: Annotated[int, Meta(description="episodes per evaluation", ge=1, le=100_000)] = 20
    eval_busy: Annotated[
        Literal["newest", "queue", "skip", "wait"],
        Meta(description="when one is due during another: the newest waits, up to 8 queue, skip it, or training waits"),
    ] = "newest"
    eval_suites: Annotated[
        dict[str, EvalSuite],
        Meta(description="named evaluations with their own env, env_kwargs or episodes; the first decides what is best"),
    ] = {}
    eval_top: Annotated[
        int, Meta(description="how many of the best are evaluated again at the end, with fresh seeds", ge=0, le=100)
    ] = 0
    stop_at: Annotated[
        float | None, Meta(description="stop once an evaluation reaches this mean return")
    ] = None
    checkpoint_every: Annotated[
        int | None, Meta(description="env steps between checkpoints (default: a fifth of the run; 0: only the final one)")
    ] = None
    keep: Annotated[int, Meta(description="how many checkpoints to keep, with those that were asked for", ge=1)] = 2
    step_timeout_s: Annotated[
        float, Meta(description="seconds without a finished step after which a worker counts as hung", gt=0)
    ] = 60.0
    start_timeout_s: Annotated[float, Meta(description="seconds a worker may take until it is ready", gt=0)] = 60.0
    stall_timeout_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="seconds without any movement after which the run fails (default: 300, or more for slow workers)"),
    ] = None
    shutdown_timeout_s: Annotated[
        float, Meta(description="seconds that Ctrl-C waits for the running update and the final checkpoint", gt=0)
    ] = 5.0
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="where the learner computes")] = "auto"
    torch_threads: Annotated[int, Meta(description="torch threads of the learner", ge=1)] = 1
    memory_gb: Annotated[
        float | None, Meta(description="memory the run may plan for (default: 80 % of what is available)")
    ] = None
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        Meta(description="when an update comes to NaN or infinity: end the run, or go on without that update"),
    ] = "stop"
    nonfinite_max: Annotated[int, Meta(description="how many updates in a row may be skipped", ge=1)] = 3
    on_nonfinite_env: Annotated[
        Literal["stop", "abort_episode"],
        Meta(
            description="when an environment returns NaN or infinity in training: bring it back, and end the run if it does "
            "so again each time; or abort its episode and go on (an evaluation that meets it fails the run)"
        ),
    ] = "stop"
    nonfinite_env_max: Annotated[
        int, Meta(description="how many episodes of one environment in a row may be aborted for that", ge=1)
    ] = 10
    debug: Annotated[
        bool, Meta(description="check memory shared with workers by checksums; the command line shows tracebacks, too")
    ] = False
    out: Annotated[str | None, Meta(description="run directory (default: runs/ENV-ALGO-SEED)")] = None

    def __post_init__(self) -> None:
        check_plain(self.env_kwargs, "env_kwargs")
        msgspec.structs.force_setattr(self, "eval_suites", _suites(self.eval_suites))
        check_bounds(self, "")
        _check_choices(self)

    @property
    def algorithm(self) -> Any:
        """The configured algorithm (an instance, also when `algo` is a name)."""
        return algorithm_class(self.algo)() if isinstance(self.algo, str) else self.algo

    @property
    def steps_per_segment(self) -> int:
        return self.segment_length or self.algorithm.default_segment_length

    @property
    def steps_per_rollout(self) -> int:
        """Env steps of a full rollout, T * B."""
        return self.steps_per_segment * self.envs

    @property
    def degree_limit(self) -> int:
        """The largest degree that this run may take on: there are slots and weights for it."""
        if self.degree_max is not None:
            return self.degree_max
        return SELF_TUNED_MAX if self.off_policy_degree < 0 else self.off_policy_degree

    @property
    def groups(self) -> int:
        return self.envs // self._size_of_groups

    @property
    def _size_of_groups(self) -> int:
        if self.group_size != "auto":
            return self.group_size
        return 1 if self.stepping == "threads" else auto_group_size(self.envs)

    @property
    def stall_limit_s(self) -> float:
        """`stall_timeout_s`, worked out where it is not given."""
        return self.stall_timeout_s or max(STALL_TIMEOUT_S, 2 * self.step_timeout_s, 2 * self.start_timeout_s)

    @property
    def eval_places(self) -> int:
        """How many due snapshots may wait for their evaluation; there are weight buffers for them."""
        return EVAL_QUEUE if self.eval_busy == "queue" else 1

    @property
    def primary_suite(self) -> str:
        """The suite that best/ and `stop_at` go by: the first one, "" if there are none."""
        return next(iter(self.eval_suites), "")

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again."""
        refuse_unknown(changes, Config, "configuration")
        return msgspec.structs.replace(self, **changes)

    def resolve(self) -> Config:
        """A copy without "auto" or None where a value can be worked out: what the run directory records."""
        groups = self.groups
        # A group is never split, so more workers than groups would have nothing to do.
        workers = min(groups, usable_cores() if self.workers == "auto" else self.workers)
        env, env_kwargs = self.env, self.env_kwargs
        while isinstance(env, functools.partial) and not env.args:  # so that it can be written by name
            env, env_kwargs = env.func, {**env.keywords, **env_kwargs}
        check_plain(env_kwargs, "env_kwargs")
        return self.replace(
            env=env,
            env_kwargs=as_in_a_file(env_kwargs),
            algo=self.algorithm,
            group_size=self._size_of_groups,
            workers=workers,
            segment_length=self.steps_per_segment,
            eval_every=max(1, self.total_steps // 10) if self.eval_every is None else self.eval_every,
            checkpoint_every=max(1, self.total_steps // 5) if self.checkpoint_every is None else self.checkpoint_every,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in a TOML file: `algo` is a name, and a table of that name holds the algorithm's fields."""
        data = {k: v for k, v in msgspec.structs.asdict(self).items() if v is not None}
        algorithm: Any = self.algo
        data["env"] = env_name(self.env)
        data["eval_suites"] = without_none(msgspec.to_builtins(self.eval_suites))
        if not isinstance(algorithm, str):
            data["algo"] = algorithm_name(algorithm)
            data[algorithm.name] = without_none(msgspec.to_builtins(algorithm))
        return data

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> Config:
        """Inverse of `to_dict`. Unknown keys and wrong types raise ConfigError with the path of the key."""
        data = dict(data)
        algo = data.get("algo", "ppo")
        if isinstance(algo, str):
            algorithm = algorithm_class(algo)
            data["algo"] = convert(data.pop(algorithm.name, {}), algorithm, where, f"{algorithm.name}.")
        if "env" not in data:
            raise ConfigError(f"{where}: no `env` given\n  name an environment, e.g. env = \"CartPole-v1\"")
        return convert(data, cls, where)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def preset(cls, env: str, algo: str = "ppo", **changes: Any) -> Config:
        """The tuned configuration for this environment and algorithm if there is one, with `changes` on top."""
        from aiorl.presets import preset, suited

        settings, own = preset(algo, env), algorithm_class(algo).name
        if isinstance(changes.get(own), Mapping):
            settings = suited(settings, own, changes[own].get("algo"))
        return cls.from_dict({"env": env, **merge(settings, changes), "algo": algo}, "preset")


def auto_group_size(envs: int) -> int:
    """Largest divisor of `envs` that is at most 8 and leaves two groups: depends on nothing but `envs`."""
    limit = max(1, min(8, envs // 2))
    return next(size for size in range(limit, 0, -1) if envs % size == 0)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def env_name(env: Any) -> str:
    """How an environment is written in a file: its id, or `module:callable`."""
    if isinstance(env, str):
        return env
    return f"{getattr(env, '__module__', '?')}:{getattr(env, '__qualname__', type(env).__qualname__)}"


def _check_choices(config: Config) -> None:
    """Checks that need more than one field, or more than a type."""
    if not (isinstance(config.env, str) or callable(config.env)):
        raise ConfigError(f"env = {config.env!r}: expected a gymnasium id, \"module:callable\" or a callable")
    _check_algorithm(config.algorithm)
    if config.out == "":
        raise ConfigError("out is empty: expected a directory")
    for name in ("group_size", "segment_length"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name} = {value}: expected at least 1")
    for name in ("workers", "warmup", "eval_every", "checkpoint_every"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{name} = {value}: expected 0 or more")
    worker_s = max(config.step_timeout_s, config.start_timeout_s)
    if config.stall_timeout_s is not None and config.stall_timeout_s <= worker_s:
        raise ConfigError(
            f"stall_timeout_s = {config.stall_timeout_s:g}: a worker may take {worker_s:g} s by step_timeout_s or "
            "start_timeout_s\n  expected more than that, or leave it out"
        )
    if config.memory_gb is not None and config.memory_gb <= 0:
        raise ConfigError(f"memory_gb = {config.memory_gb}: expected more than 0")
    _check_groups(config)
    _check_workers(config)
    algorithm = config.algorithm
    if config.inference == "central" and not isinstance(config.algorithm, CentralAlgorithm):
        raise ConfigError(
            f"inference = \"central\": {algorithm.name} has no `forward`, so only workers can compute its network\n"
            "  leave inference at \"worker\", or give the algorithm one (see aiorl.algos.base.CentralAlgorithm)"
        )
    if config.degree_limit < config.off_policy_degree:
        raise ConfigError(
            f"degree_max = {config.degree_max} is less than off_policy_degree = {config.off_policy_degree}\n"
            "  raise degree_max, or leave it out"
        )
    if config.degree_limit > 0 and not algorithm.corrects_staleness and not config.allow_uncorrected:
        raise ConfigError(
            f"{algorithm.name} does not correct for stale data, so off_policy_degree = {config.off_policy_degree} "
            "would bias it\n  set off_policy_degree = 0, or allow_uncorrected = true to accept that"
        )


def _check_workers(config: Config) -> None:
    least, workers = config.min_workers, config.workers
    if least is not None and isinstance(workers, int) and least > workers:
        there = "no workers that could fail" if workers == 0 else f"only {workers} workers"
        raise ConfigError(f"min_workers = {least}: there are {there}\n  expected at most workers, or leave it out")


def _check_algorithm(algorithm: Any) -> None:
    if isinstance(algorithm, type):
        name = algorithm.__name__
        raise ConfigError(f"algo = {name}: expected an instance, got the class\n  write algo={name}()")
    if not (isinstance(algorithm, Algorithm) and isinstance(algorithm, msgspec.Struct)):
        raise ConfigError(f"algo = {algorithm!r}: expected an algorithm's name, or one configured such as aiorl.PPO()")
    if algorithm.name in (field.name for field in fields_of(Config)):
        raise ConfigError(f"algo: an algorithm cannot be called {algorithm.name!r}, as a field of Config is\n  rename it")
    check_bounds(algorithm, f"{algorithm.name}.")


def _suites(given: Any) -> dict[str, EvalSuite]:
    """Suites from structs or plain tables, with lists for tuples as a file gives them."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"eval_suites = {given!r}: expected a table of tables")
    suites: dict[str, EvalSuite] = {}
    for name, suite in cast("Mapping[Any, Any]", given).items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)):
            raise ConfigError(f"eval_suites: {name!r} cannot name a suite\n  use letters, digits, dots, - and _")
        where = f"eval_suites.{name}"
        try:
            table = msgspec.to_builtins(suite)
        except TypeError:
            raise not_for_toml(where, suite) from None
        check_plain(table, where)
        suites[name] = convert(as_in_a_file(table), EvalSuite, where)
    return suites


def _check_groups(config: Config) -> None:
    if not isinstance(config.group_size, str) and config.envs % config.group_size:
        sizes = [str(size) for size in range(1, min(config.envs, 256) + 1) if config.envs % size == 0]
        raise ConfigError(
            f"envs = {config.envs} is not a multiple of group_size = {config.group_size}\n"
            f"  group sizes that fit: {', '.join(sizes)}"
        )
    if config.groups > GROUPS_MAX:
        raise ConfigError(f"envs = {config.envs} make {config.groups} groups: expected at most {GROUPS_MAX}\n"
                          "  use a larger group_size, or fewer environments")  # fmt: skip
