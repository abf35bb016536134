"""`python -m aiorl eval RUN`: plays whole episodes with a saved policy and reports mean and spread of the return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from aiorl.cli.flags import field_value, show
from aiorl.cli.policies import policy_parser, read_policy, suite_of
from aiorl.cli.text import number, plural, share, spread

WIDTH = 10
"""Environments that an evaluation runs side by side: as many as during training, so that the numbers are the same."""

EPISODES = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
SEED = Annotated[int, msgspec.Meta(ge=0)]


def main(argv: Sequence[str]) -> int:
    parser = policy_parser(
        "eval",
        "Measure a trained policy. With the run's own seed (the default) the episodes are those of its evaluations.",
        "RUN [--episodes N] [--seed N] [--suite NAME] [--json]",
    )
    parser.add_argument("--episodes", metavar="N", help="how many episodes (default: 20)")
    parser.add_argument("--seed", metavar="N", help="seed of the episodes (default: the run's)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    episodes = field_value("episodes", given.get("episodes", "20"), EPISODES)
    result = evaluate(given, episodes)
    if given.get("json", False):
        print(msgspec.json.encode(result).decode())
        return 0
    returns = result["returns"]
    print(f"return   {spread(result['mean_return'], result['std_return'])} over {plural(episodes, 'episode')}")
    length = number(result["mean_length"])
    print(f"range    {number(min(returns))} to {number(max(returns))}, mean length {length} steps")
    if result["wins"] is not None:
        print(f"outcome  won {share(result['wins'])}, lost {share(result['losses'])}")
    told = ", ".join([result["env"], *(f"{key} = {show(value)}" for key, value in result["env_kwargs"].items())])
    print(f"policy   {result['policy']} (version {result['version']:,}), {told}, seed {result['seed']}")
    return 0


def evaluate(given: Mapping[str, Any], episodes: int) -> dict[str, Any]:
    """Returns, lengths and their means as plain data. Raises ConfigError or EnvError."""
    from aiorl.envs.episodes import run_episodes, shares

    policy, spec, path = read_policy(given, "eval")
    seed = field_value("seed", str(given.get("seed", policy.config.get("seed", 0))), SEED)
    acting = policy.algorithm.policy(policy.spaces)
    acting.begin(policy.weights, 0, None, 0)
    outcomes = np.empty(episodes)
    returns, lengths = run_episodes(
        spec, policy.spaces, acting, episodes, seed, min(WIDTH, episodes), outcomes=outcomes
    )  # fmt: skip
    return {
        "policy": path, "version": policy.version, "env": spec.name,
        "env_kwargs": dict(spec.kwargs), "suite": suite_of(given, policy.config), "seed": seed, "episodes": episodes,
        "mean_return": float(np.mean(returns)), "std_return": float(np.std(returns)),
        "mean_length": float(np.mean(lengths)), "returns": returns.tolist(), "lengths": lengths.tolist(),
        **shares(outcomes),
    }  # fmt: skip
