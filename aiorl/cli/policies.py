"""What `eval` and `play` have in common: a saved policy and the environment it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiorl.algos import algorithm_class
from aiorl.checkpoint import load_manifest
from aiorl.cli.envs import spaces_text
from aiorl.cli.flags import Parser, field_value
from aiorl.config import EvalSuite
from aiorl.envs.games import TWINS
from aiorl.envs.make import probe
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import CheckpointError, ConfigError
from aiorl.policy import LoadedPolicy, find, foreign_algorithm, load
from aiorl.structs import convert

WHICH = ("best", "final", "latest")
BRIDGES = ("GymV21Environment-", "GymV26Environment-")
"""How ids begin whose argument `env_id` may name a module to import."""


def policy_parser(verb: str, description: str, usage: str) -> Parser:
    """A parser with the arguments that say which policy and environment are meant."""
    parser = Parser(verb, description, usage)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--which", metavar="|".join(WHICH), help="which one of a run (default: the first there is)")
    parser.add_argument("--suite", metavar="NAME", help="which evaluation suite's environment (default: the run's first)")
    parser.add_argument("--env", metavar="ENV", help="another environment, or the trusted name of the recorded one")
    parser.add_argument(
        "--env-kwargs", nargs="+", action="extend", metavar="KEY=VALUE", help="its arguments, over the recorded ones"
    )
    parser.add_argument("--algo", metavar="NAME", help="pkg.mod:Class of an algorithm that is not part of aiorl")
    return parser


def read_policy(given: Mapping[str, Any], verb: str) -> tuple[LoadedPolicy, EnvSpec, str]:
    """The policy, its environment (not made yet) and the path it came from. Raises ConfigError."""
    if "run" not in given:
        raise ConfigError(f"no run given\n  for example: python -m aiorl {verb} runs/CartPole-v1-ppo-0")
    policy, path = load_policy(given["run"], given)
    suite = suite_of(given, policy.config)
    env, kwargs = environment(policy.config, suite)
    if "env" in given:
        kwargs = kwargs if given["env"] == env else {}
        env = given["env"]
    else:
        env = without_import(env, f"suite {suite} plays" if suite else "the policy was trained on")
    kwargs = {**kwargs, **field_value("env_kwargs", given.get("env_kwargs", []), dict[str, Any])}
    found = probe(resolve_env(
        env, kwargs, in_process=True, native=False, frame_stack=policy.config.get("frame_stack", 1)
    ))  # fmt: skip
    if found.spaces != policy.spaces:
        raise CheckpointError(
            f"{path} was made for other spaces than {env} has\n"
            f"  saved: {spaces_text(policy.spaces)}\n  now:   {spaces_text(found.spaces)}"
        )
    return policy, found.spec, str(path)


def load_policy(run: str, given: Mapping[str, Any]) -> tuple[LoadedPolicy, Path]:
    """A run's policy, the one that `--which` and `--algo` in `given` mean, and its path. Raises ConfigError.

    No algorithm is imported because a file says so: names that are not in a registry have to be given on the command line.
    """
    which = given.get("which")
    if which is not None and which not in WHICH:
        raise ConfigError(f"--which {which}: expected one of {', '.join(WHICH)}")
    path = find(Path(run), which)
    foreign = foreign_algorithm(load_manifest(path).config)
    if foreign and "algo" not in given:
        raise _untrusted(f"the policy was trained with {foreign}, which is not part of aiorl", f"--algo {foreign}")
    return load(path, algo=algorithm_class(given["algo"]) if "algo" in given else None), path


def without_import(env: Any, what: str) -> str:
    """A recorded environment, if using it imports nothing but what is known here. Raises CheckpointError."""
    if not isinstance(env, str) or (":" in env and env not in TWINS):
        raise _untrusted(f"{what} {env}, which is not an id of gymnasium's", f"--env {env}")
    if env.startswith(BRIDGES):
        raise _untrusted(f"{what} {env}, which imports what its env_kwargs name", f"--env {env}")
    return env


def suite_of(given: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The suite that is meant: the one asked for, else the first, unless another environment than that is asked for."""
    first = primary_suite(config)
    other = "env" in given and given["env"] != environment(config, first)[0]
    return given.get("suite", "" if other else first)


def primary_suite(config: Mapping[str, Any]) -> str:
    """The first evaluation suite of a recorded configuration, "" if it has none."""
    return next(iter(config.get("eval_suites", {})), "")


def environment(config: Mapping[str, Any], suite: str) -> tuple[Any, dict[str, Any]]:
    """The environment of one of the recorded evaluation suites, and its arguments; of training where `suite` is "".

    Raises ConfigError if there is no suite of that name.
    """
    env, kwargs = config.get("env"), config.get("env_kwargs", {})
    if not suite:
        return env, kwargs
    suites: Mapping[str, Any] = config.get("eval_suites", {})
    if suite not in suites:
        raise ConfigError(f"--suite {suite}: expected {' or '.join(suites) or 'none, the run has no suites'}")
    found: EvalSuite = convert(suites[suite], EvalSuite, "checkpoint", f"eval_suites.{suite}.")
    return found.environment(env, kwargs)


def _untrusted(what: str, say: str) -> CheckpointError:
    return CheckpointError(f"{what}\n  a file must not decide what is imported: say so with {say}")
