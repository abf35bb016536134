"""The configuration of a run: one frozen struct, checked when it is made, written to and read from TOML."""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from aiorl.algos import algorithm_class, algorithm_name
from aiorl.errors import ConfigError

Auto = Literal["auto"]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a run. Bad values raise ConfigError at once, naming field, value and what was expected.

    `algo` is an algorithm's name or a configured instance such as `aiorl.PPO(learning_rate=3e-4)`; `env` is a gymnasium
    id, `module:callable` or a callable that makes an environment.
    """

    env: Annotated[Any, Meta(description="gymnasium id, module:callable, or a callable")]
    env_kwargs: Annotated[dict[str, Any], Meta(description="keyword arguments for the environment")] = {}
    native_vector: Annotated[bool, Meta(description="use the environment's own vector implementation if it has one")] = True
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
    segment_length: Annotated[
        int | None, Meta(description="steps each environment contributes to a rollout (default: the algorithm's)")
    ] = None
    off_policy_degree: Annotated[
        int, Meta(description="how many versions acting may trail learning; 0 is the sequential loop", ge=0)
    ] = 1
    schedule: Annotated[
        Literal["ordered", "eager"],
        Meta(description="ordered: reproducible; eager: whoever is ready first"),
    ] = "ordered"
    allow_uncorrected: Annotated[
        bool, Meta(description="let an algorithm without off-policy correction run at a degree of 1 or more")
    ] = False
    warmup: Annotated[
        int | None, Meta(description="env steps stored before a replay learner's first update (default: the algorithm's)")
    ] = None
    eval_every: Annotated[
        int | None, Meta(description="env steps between evaluations (default: a tenth of the run; 0: only the final one)")
    ] = None
    eval_episodes: Annotated[int, Meta(description="episodes per evaluation", ge=1, le=100_000)] = 20
    stop_at: Annotated[
        float | None, Meta(description="stop once an evaluation reaches this mean return")
    ] = None
    checkpoint_every: Annotated[
        int | None, Meta(description="env steps between checkpoints (default: a fifth of the run; 0: only the final one)")
    ] = None
    keep: Annotated[int, Meta(description="how many periodic checkpoints to keep", ge=1)] = 2
    step_timeout_s: Annotated[
        float, Meta(description="seconds without a finished step after which a worker counts as hung", gt=0)
    ] = 60.0
    start_timeout_s: Annotated[float, Meta(description="seconds a worker may take until it is ready", gt=0)] = 60.0
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="where the learner computes")] = "auto"
    torch_threads: Annotated[int, Meta(description="torch threads of the learner", ge=1)] = 1
    memory_gb: Annotated[
        float | None, Meta(description="memory the run may plan for (default: 80 % of what is available)")
    ] = None
    out: Annotated[str | None, Meta(description="run directory (default: runs/ENV-ALGO-SEED)")] = None

    def __post_init__(self) -> None:
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
    def groups(self) -> int:
        size = auto_group_size(self.envs) if self.group_size == "auto" else self.group_size
        return self.envs // size

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)

    def resolve(self) -> Config:
        """A copy without "auto" or None where a value can be worked out: what the run directory records."""
        size = auto_group_size(self.envs) if self.group_size == "auto" else self.group_size
        groups = self.envs // size
        # A group is never split, so more workers than groups would have nothing to do.
        workers = min(groups, usable_cores() if self.workers == "auto" else self.workers)
        return self.replace(
            algo=self.algorithm,
            group_size=size,
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
        if not isinstance(algorithm, str):
            data["algo"] = algorithm_name(algorithm)
            fields = msgspec.to_builtins(algorithm)
            data[algorithm.name] = {k: v for k, v in fields.items() if v is not None}
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
            data["algo"] = convert(data.pop(algorithm.name, {}), algorithm, f"{where}: {algorithm.name}")
        if "env" not in data:
            raise ConfigError(f"{where}: no `env` given\n  name an environment, e.g. env = \"CartPole-v1\"")
        return convert(data, cls, where)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def preset(cls, env: str, algo: str = "ppo", **changes: Any) -> Config:
        """The tuned configuration for this environment and algorithm if there is one, with `changes` on top."""
        from aiorl.presets import preset

        return cls.from_dict({**preset(algo, env), "env": env, "algo": algo, **changes}, "preset")


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


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


def convert(data: Any, kind: type[Any], where: str) -> Any:
    """Build a struct from plain data; unknown keys get a suggestion."""
    known = [f.name for f in msgspec.structs.fields(kind)]
    if isinstance(data, Mapping):
        keys = [str(k) for k in cast("Mapping[Any, Any]", data)]
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f" — did you mean `{near[0]}`?" if near else f"\n  known: {', '.join(known)}"
                raise ConfigError(f"{where}: unknown key `{key}`{hint}")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error.__cause__


def check_bounds(struct: msgspec.Struct, prefix: str) -> None:
    """Check types and bounds of a struct that was made by hand (msgspec checks only what it decodes)."""
    for field in msgspec.structs.fields(type(struct)):
        value = getattr(struct, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{field.name}: expected a finite number, got {value}")
        if isinstance(value, msgspec.Struct) or callable(value):
            continue
        try:
            msgspec.convert(msgspec.to_builtins(value), field.type)
        except (msgspec.ValidationError, TypeError) as error:
            raise ConfigError(f"{prefix}{field.name} = {value!r}: {error}") from None


def _check_choices(config: Config) -> None:
    """Checks that need more than one field."""
    algorithm: Any = config.algorithm
    if isinstance(config.algorithm, msgspec.Struct):
        check_bounds(config.algorithm, f"{algorithm.name}.")
    for name in ("group_size", "segment_length"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name} = {value}: expected at least 1")
    for name in ("workers", "warmup", "eval_every", "checkpoint_every"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{name} = {value}: expected 0 or more")
    if not isinstance(config.group_size, str) and config.envs % config.group_size:
        divisors = [str(d) for d in range(1, config.envs + 1) if config.envs % d == 0]
        raise ConfigError(
            f"envs = {config.envs} is not a multiple of group_size = {config.group_size}\n"
            f"  group sizes that fit: {', '.join(divisors)}"
        )
    if config.off_policy_degree > 0 and not algorithm.corrects_staleness and not config.allow_uncorrected:
        raise ConfigError(
            f"{algorithm.name} does not correct for stale data, so off_policy_degree = {config.off_policy_degree} "
            "would bias it\n  set off_policy_degree = 0, or allow_uncorrected = true to accept that"
        )
    if config.memory_gb is not None and config.memory_gb <= 0:
        raise ConfigError(f"memory_gb = {config.memory_gb}: expected more than 0")


EnvFactory = Callable[..., Any]
