"""What `eval` and `play` have in common: a saved policy and the environment it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiorl.algos import algorithm_class
from aiorl.checkpoint import load_manifest
from aiorl.cli.envs import spaces_text
from aiorl.cli.flags import Parser
from aiorl.config import EvalSuite
from aiorl.envs.make import probe
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import CheckpointError, ConfigError
from aiorl.policy import LoadedPolicy, find, load
from aiorl.structs import convert

WHICH = ("best", "final", "latest")


def policy_parser(verb: str, description: str, usage: str) -> Parser:
    """A parser with the arguments that say which policy and environment are meant."""
    parser = Parser(verb, description, usage)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--which", metavar="|".join(WHICH), help="which one of a run (default: the first there is)")
    parser.add_argument("--suite", metavar="NAME", help="one of the run's evaluation suites, with its environment")
    parser.add_argument("--env", metavar="ENV", help="another environment, or the trusted name of the recorded one")
    parser.add_argument("--algo", metavar="NAME", help="pkg.mod:Class of an algorithm that is not part of aiorl")
    return parser


def read_policy(given: Mapping[str, Any], verb: str) -> tuple[LoadedPolicy, EnvSpec, str]:
    """The policy, its environment (not made yet) and the path it came from. Raises ConfigError.

    Neither an algorithm nor an environment is imported because a file says so: names that are not in a registry have to
    be given on the command line.
    """
    if "run" not in given:
        raise ConfigError(f"no run given\n  for example: python -m aiorl {verb} runs/CartPole-v1-ppo-0")
    which = given.get("which")
    if which is not None and which not in WHICH:
        raise ConfigError(f"--which {which}: expected one of {', '.join(WHICH)}")
    path = find(Path(given["run"]), which)
    recorded = str(load_manifest(path).config.get("algo", ""))
    if ":" in recorded and "algo" not in given:
        raise _untrusted(f"the policy was trained with {recorded}, which is not part of aiorl", f"--algo {recorded}")
    policy = load(path, algo=algorithm_class(given["algo"]) if "algo" in given else None)
    env, kwargs = policy.config.get("env"), policy.config.get("env_kwargs", {})
    if "suite" in given:
        env, kwargs = find_suite(policy.config, given["suite"]).environment(env, kwargs)
    if "env" in given:
        kwargs = kwargs if given["env"] == env else {}
        env = given["env"]
    elif not isinstance(env, str) or ":" in env:
        plays = f"suite {given['suite']} plays" if "suite" in given else "the policy was trained on"
        raise _untrusted(f"{plays} {env}, which is not an id of gymnasium's", f"--env {env}")
    found = probe(resolve_env(env, kwargs, in_process=True, native=False))
    if found.spaces != policy.spaces:
        raise CheckpointError(
            f"{path} was made for other spaces than {env} has\n"
            f"  saved: {spaces_text(policy.spaces)}\n  now:   {spaces_text(found.spaces)}"
        )
    return policy, found.spec, str(path)


def find_suite(config: Mapping[str, Any], name: str) -> EvalSuite:
    """An evaluation suite from a recorded configuration. Raises ConfigError if there is none of that name."""
    suites: Mapping[str, Any] = config.get("eval_suites", {})
    if name not in suites:
        raise ConfigError(f"--suite {name}: expected {' or '.join(suites) or 'none, the run has no suites'}")
    return convert(suites[name], EvalSuite, "checkpoint", f"eval_suites.{name}.")


def _untrusted(what: str, say: str) -> CheckpointError:
    return CheckpointError(f"{what}\n  a file must not decide what is imported: say so with {say}")
