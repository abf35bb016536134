"""From the words after `train` (and `resume`) to a checked Config: defaults < preset < --config file < flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

import msgspec

from aiorl.algos import algorithm_class
from aiorl.cli.flags import NAMES, Parser, add_fields, field_value
from aiorl.cli.progress import Mode
from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.presets import preset, suited
from aiorl.structs import merge, read_toml

GROUPS = {
    "what to train": ("algo", "total_steps", "seed", "env_kwargs", "out", "device", "torch_threads", "memory_gb"),
    "collecting": (
        "envs", "group_size", "workers", "min_workers", "stepping", "steps_at_once", "inference", "inference_wait_ms",
        "segment_length", "native_vector", "step_timeout_s", "start_timeout_s",
    ),
    "asynchrony": (
        "off_policy_degree", "degree_max", "error_target", "schedule", "warmup", "allow_uncorrected",
    ),
    "evaluation and checkpoints": (
        "eval_every", "eval_episodes", "eval_busy", "eval_suites", "eval_top", "stop_at", "checkpoint_every", "keep",
    ),
    "when something is wrong": (
        "stall_timeout_s", "shutdown_timeout_s", "on_nonfinite", "nonfinite_max", "on_nonfinite_env", "nonfinite_env_max",
        "debug",
    ),
}  # fmt: skip
"""Where each field of Config appears in the help; fields not named here come last."""

RESUMABLE = (
    "total_steps", "workers", "min_workers", "stepping", "steps_at_once", "inference_wait_ms", "eval_every", "eval_episodes",
    "eval_busy", "eval_suites", "eval_top", "stop_at", "checkpoint_every", "keep", "step_timeout_s", "start_timeout_s",
    "stall_timeout_s", "shutdown_timeout_s", "device", "torch_threads", "memory_gb",
    "on_nonfinite", "nonfinite_max", "on_nonfinite_env", "nonfinite_env_max", "debug",
)  # fmt: skip
"""What may be changed when a run goes on: nothing that would make it another experiment."""

RESUMABLE_OWN = ("storage",)
"""And of the settings of its algorithm, or of one within that: `--dqn.storage`, `--selfplay.inner.storage`."""

MODES = get_args(Mode)


@dataclass(frozen=True)
class Request:
    """What the user asked for. `preset` says whether a preset took part, `given` which fields came from flags."""

    config: Config
    preset: bool
    progress: Mode
    dry_run: bool
    given: Mapping[str, Any]


def read_train(argv: Sequence[str], default_env: str | None = None) -> Request | str:
    """The request, or the help text when that was asked for. Raises ConfigError for whatever cannot be understood.

    `default_env` is the environment if neither the words nor a file name one.
    """
    early, _ = _early_parser().parse_known_args(list(argv))
    file = _read_file(Path(early.config)) if "config" in early else {}
    name = getattr(early, "algo", file.get("algo", "ppo"))
    if not isinstance(name, str):
        raise ConfigError(f'{early.config}: algo = {name!r}: expected a text, for example algo = "ppo"')
    algorithm = algorithm_class(name)
    given = _train_parser(algorithm, {}).read(argv)
    env = given.get("env", file.get("env", default_env))
    found = preset(name, env) if given.get("preset", True) and isinstance(env, str) else {}
    own = file.get(algorithm.name)
    inner = own.get("algo") if isinstance(own, Mapping) else None
    found = suited(found, algorithm.name, given.get(f"{algorithm.name}.algo", inner))
    base = merge(found, file)
    if given.pop("help", False):
        return _train_parser(algorithm, base, _origins(algorithm.name, preset=found, file=file)).format_help()
    if env is None:
        raise ConfigError("no environment given\n  for example: python -m aiorl train CartPole-v1\n"
                          "  `python -m aiorl envs` lists what is installed")  # fmt: skip
    if file:
        _check_file(file, early.config, algorithm)
    progress = _mode(given.pop("progress", "auto"))
    dry_run = given.pop("dry_run", False)
    flags = _typed({k: v for k, v in given.items() if k not in ("config", "preset")}, algorithm)
    config = Config.from_dict({**merge(base, flags), "algo": name, "env": found.get("env", env)}, "configuration")
    return Request(config, bool(found), progress, dry_run, flags)


def _read_file(path: Path) -> dict[str, Any]:
    """A configuration file. That of a run names the directory that it lies in, which is not for the next run."""
    file = read_toml(path)
    if isinstance(file.get("out"), str) and Path(file["out"], "config.toml").resolve() == path.resolve():
        del file["out"]
    return file


def read_resume(argv: Sequence[str]) -> tuple[str, dict[str, Any], Mode] | str:
    """The run to go on with, the fields to change and how to show it; or the help text.

    A setting of an algorithm, "dqn.storage", is a text still: which algorithm a run has only the run can tell.
    """
    parser = Parser("resume", "Go on with a run from its newest checkpoint.", "RUN [--steps N] [options]")
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory, or one of its checkpoints")
    group = parser.add_argument_group("what may change (default: as it was)")
    add_fields(parser, group, Config, RESUMABLE, dict.fromkeys(RESUMABLE))
    group.add_argument("--ALGO.storage", metavar="NAME", help="where experience lies, such as --dqn.storage disk")
    for flag in sorted(_refuse_fixed(argv) - {"--ALGO.storage"}):
        parser.add_argument(flag, dest=flag[2:])
    _add_progress(parser)
    given = parser.read(argv)
    if given.pop("help", False):
        return parser.format_help()
    run = given.pop("run", None)
    if run is None:
        raise ConfigError("no run given\n  for example: python -m aiorl resume runs/CartPole-v1-ppo-0")
    progress = _mode(given.pop("progress", "auto"))
    own = {key: given.pop(key) for key in list(given) if "." in key}
    return run, _typed(given, None) | own, progress


def _refuse_fixed(argv: Sequence[str]) -> set[str]:
    """The flags that are of an algorithm. Raises ConfigError for one of what a run goes on with as it was made."""
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    own = {flag for flag in flags if "." in flag}
    fields = {f.name for f in msgspec.structs.fields(Config)}.difference(RESUMABLE)
    fixed = {no + NAMES.get(name, name).replace("_", "-") for name in fields for no in ("--", "--no-")}
    for flag in sorted(flags & fixed | {flag for flag in own if flag.rpartition(".")[2] not in RESUMABLE_OWN}):
        table, _, name = flag.rpartition(".")
        near = difflib.get_close_matches(name, RESUMABLE_OWN, 1) if table else []
        meant = f" — did you mean `{table}.{near[0]}`?" if near else ""
        raise ConfigError(
            f"unknown flag `{flag}`{meant}\n  a run goes on with what it was made with; "
            "`python -m aiorl resume --help` lists what may change"
        )
    return own


def _origins(algorithm: str, **tables: Mapping[str, Any]) -> dict[str, str]:
    """Which of the tables, the last one that has it, each setting is from; those of the algorithm as "name.setting"."""
    found: dict[str, str] = {}
    for word, table in tables.items():
        own = cast("Mapping[str, Any]", table.get(algorithm, {}))
        found |= dict.fromkeys([*table, *(f"{algorithm}.{name}" for name in own)], word)
    return found


def _early_parser() -> Parser:
    """Finds what decides which flags there are."""
    parser = Parser("train", "")
    parser.add_argument("--algo")
    parser.add_argument("--config")
    return parser


def _train_parser(algorithm: Any, base: Mapping[str, Any], origins: Mapping[str, str] = MappingProxyType({})) -> Parser:
    parser = Parser(
        "train",
        "Train an agent. A preset for the algorithm and environment goes over the defaults, --config over that, and "
        "flags over all.",
        "ENV [--algo NAME] [--steps N] [options]",
        f"Numbers may be written 200k, 1.5M, 1e6 or 200_000. The [{algorithm.name}] options change with --algo.",
    )
    parser.add_argument("env", nargs="?", metavar="ENV", help="gymnasium id such as CartPole-v1, or module:callable")
    named = {name for names in GROUPS.values() for name in names} | {"env"}
    other = tuple(f.name for f in msgspec.structs.fields(Config) if f.name not in named)
    for title, names in {**GROUPS, "other": other}.items():
        if names:
            add_fields(parser, parser.add_argument_group(title), Config, names, base, origins=origins)
    own = tuple(f.name for f in msgspec.structs.fields(algorithm))
    table = cast("Mapping[str, Any]", base.get(algorithm.name, {}))
    group = parser.add_argument_group(f"{algorithm.name} options")
    add_fields(parser, group, algorithm, own, table, f"{algorithm.name}.", origins)
    command = _add_progress(parser)
    command.add_argument("--config", metavar="FILE", help="TOML file with any of these, such as config.toml of a run")
    command.add_argument("--preset", action=argparse.BooleanOptionalAction, help="use the preset (default: yes)")
    command.add_argument("--dry-run", action="store_true", help="print the resolved configuration as TOML and exit")
    return parser


def _add_progress(parser: Parser) -> Any:
    group = parser.add_argument_group("command")
    group.add_argument("--progress", metavar="|".join(MODES), help="how to show progress (default: auto)")
    return group


def _mode(text: str) -> Mode:
    if text not in MODES:
        raise ConfigError(f"--progress {text}: expected one of {', '.join(MODES)}")
    return cast(Mode, text)


def _typed(given: Mapping[str, Any], algorithm: Any) -> dict[str, Any]:
    """Flags as a nested table of values of the right types."""
    kinds = {f.name: f.type for f in msgspec.structs.fields(Config)}
    result: dict[str, Any] = {}
    for key, text in given.items():
        table, _, name = key.rpartition(".")
        if table:
            own = {f.name: f.type for f in msgspec.structs.fields(algorithm)}
            result.setdefault(table, {})[name] = field_value(key, text, own[name])
        elif key != "env":
            result[key] = field_value(key, text, kinds[key])
    return result


def _check_file(file: Mapping[str, Any], path: str, algorithm: Any) -> None:
    """Each key of a file on its own, so that a mistake is reported with the file's name and not as one of the flags."""
    _check_table(path, "", {k: v for k, v in file.items() if k != algorithm.name}, Config)
    own = file.get(algorithm.name, {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{path}: {algorithm.name} = {own!r}: expected a table [{algorithm.name}]")
    _check_table(path, f"{algorithm.name}.", cast("Mapping[str, Any]", own), algorithm)


def _check_table(path: str, prefix: str, table: Mapping[str, Any], struct: type[msgspec.Struct]) -> None:
    kinds = {f.name: f.type for f in msgspec.structs.fields(struct)}
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, list(kinds), 1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known keys: {', '.join(kinds)}"
            raise ConfigError(f"{path}: unknown key `{prefix}{key}`\n  {hint}")
        try:
            msgspec.convert(value, kinds[key])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: {prefix}{key} = {value!r}: {error}") from None
