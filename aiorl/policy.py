"""A trained policy by itself: no environment, no run, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from aiorl import checkpoint
from aiorl.algos import ALGORITHMS, algorithm_class, algorithm_name, leads_to, named_within
from aiorl.algos.base import Algorithm, Weights
from aiorl.checkpoint import Which, find
from aiorl.envs.spaces import Spaces
from aiorl.errors import CheckpointError, ConfigError
from aiorl.frames import Stack
from aiorl.segments import Array
from aiorl.structs import convert


class LoadedPolicy:
    """`policy(obs) -> action` for one observation as the environment gives it; deterministic.

    Where training stacked the newest observations, single ones are stacked here: say with `reset` that an episode begins.
    `config` is the run's configuration as plain data, `spaces` what it observes and does, `version` the number of updates
    it had, `notes` what was recorded with it (for a best policy its evaluation).
    """

    def __init__(
        self,
        algorithm: Algorithm,
        spaces: Spaces,
        weights: Weights,
        version: int,
        config: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.algorithm, self.spaces, self.version = algorithm, spaces, version
        self.config, self.notes = config or {}, notes or {}
        self.weights = {name: np.array(array) for name, array in weights.items()}
        self._policy = algorithm.policy(spaces)
        self._policy.begin(self.weights, 0, None, 0)
        self._first = np.ones(1, np.bool_)
        stacked = [leaf for leaf in spaces.observation if leaf.stack > 1]
        self._stacks = {leaf.name: Stack(leaf.stack, leaf.shape[1:], leaf.dtype) for leaf in stacked}

    def reset(self) -> None:
        """An episode begins (only policies with memory or stacked observations care)."""
        self._first[:] = True

    def _leaves(self, obs: Any) -> dict[str, Array]:
        """Of one observation, stacked if it is a single one. Raises ValueError if it does not fit."""
        try:
            return self._stacked(obs)
        except (TypeError, OverflowError) as error:  # what NumPy says of things that are no numbers
            raise ValueError(
                f"a {type(obs).__name__} does not fit the observation space: {error}\n  expected {self.spaces.describe()}"
            ) from error

    def _stacked(self, obs: Any) -> dict[str, Array]:
        if not self._stacks:
            return self.spaces.flatten_obs(obs)
        leaves = self.spaces.single.flatten_obs(obs)
        if any(leaves[leaf.name].shape == leaf.shape for leaf in self.spaces.observation):
            return self.spaces.flatten_obs(obs)
        _check_shapes(leaves, {leaf.name: leaf.shape for leaf in self.spaces.single.observation}, BATCH)
        put = Stack.begin if self._first[0] else Stack.push
        return {name: put(stack, leaves[name]) for name, stack in self._stacks.items()}

    def __call__(self, obs: Any) -> Any:
        """The action for one observation, in the form `env.step` takes. Raises ValueError for anything else."""
        leaves = self._leaves(obs)
        _check_shapes(leaves, {leaf.name: leaf.shape for leaf in self.spaces.observation}, BATCH)
        leaves = {name: leaf[None] for name, leaf in leaves.items()}
        action, _ = self._policy.act(leaves, self._first)
        self._first[:] = False
        return self.spaces.env_action(action[0])

    def act(self, obs: dict[str, Array]) -> Array:
        """Actions [N, …], as stored, for a batch of observation leaves [N, …]. Raises ValueError for anything else."""
        names = [leaf.name for leaf in self.spaces.observation]
        if not isinstance(cast(Any, obs), Mapping):
            raise ValueError(f"expected a dict of batches ({', '.join(names)}), got a {type(obs).__name__}{BATCH}")
        if missing := [name for name in names if name not in obs]:
            raise ValueError(f"{missing[0]} is missing: there are {', '.join(map(str, obs)) or 'no leaves'}{BATCH}")
        leaves = {name: np.asarray(obs[name]) for name in names}
        n = next((len(leaf) for leaf in leaves.values() if leaf.ndim), 1)
        _check_shapes(leaves, {leaf.name: (n, *leaf.shape) for leaf in self.spaces.observation}, "")
        return self._policy.act(obs, np.zeros(n, np.bool_))[0]


BATCH = "\n  policy(obs) takes one observation, policy.act({name: [N, …]}) a batch"


def _check_shapes(leaves: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """More axes than expected would go through a network all the same, and come out as something else."""
    for name, leaf in leaves.items():
        if leaf.shape != shapes[name]:
            raise ValueError(f"{name} has shape {leaf.shape}, expected {shapes[name]}{hint}")


def load(path: str | Path, *, which: Which | None = None, algo: type[Any] | None = None) -> LoadedPolicy:
    """Load a policy from a run directory (`which`: best, final or latest; by default the first there is) or a checkpoint.

    Only algorithms that ship with aiorl are looked up by the name in the file; pass `algo`, the class, for your own, also
    for one within self-play: a file must not decide what gets imported. Raises CheckpointError.
    """
    path = find(Path(path), which)
    manifest, parts = checkpoint.load(path, ("policy",))
    algorithm = algorithm_of(manifest, algo)

    def make() -> LoadedPolicy:
        return LoadedPolicy(algorithm, manifest.spaces, parts["policy"], manifest.version, manifest.config, manifest.notes)

    try:
        make().act({name: np.zeros((1, *c.shape), c.dtype) for name, c in manifest.spaces.obs_columns.items()})
        return make()  # another one: acting may have left a trace in the first
    except Exception as error:  # there is no end of what wrong contents may lead to
        raise CheckpointError(f"{path} does not fit its own description: {error!r}") from error


def algorithm_of(manifest: checkpoint.Manifest, algo: type[Any] | None = None) -> Algorithm:
    """The configured algorithm that a manifest describes."""
    name, kind = manifest.config.get("algo", ""), _class_of(manifest.config, algo)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        raise CheckpointError(f"algo must be a configuration class, got {kind!r}")
    own = str(getattr(kind, "name", ""))
    if own not in manifest.config:
        raise CheckpointError(f"the policy was trained with {name}, not with {own or kind.__name__}")
    if algorithm_name(kind) in ALGORITHMS:  # one from outside knows itself what it makes of its settings
        for inner in named_within(manifest.config[own]):
            if algo is None or not leads_to(inner, algo):
                raise _foreign(inner)
    try:
        return convert(manifest.config[own], kind, "checkpoint", f"{own}.")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _class_of(config: Mapping[str, Any], algo: Any) -> Any:
    """`algo`, unless that is none or the one within: then the name decides, which must be of aiorl's own."""
    name, foreign = str(config.get("algo", "")), foreign_algorithm(config)
    if algo is not None and (foreign in ("", name) or not leads_to(foreign, algo)):
        return algo
    if ":" in name:
        raise _foreign(name)
    try:
        return algorithm_class(name)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint: {error}") from None


def foreign_algorithm(config: Mapping[str, Any]) -> str:
    """The algorithm in a recorded configuration that is not part of aiorl, maybe within one that is; "" if there is none."""
    name = str(config.get("algo", ""))
    return name if ":" in name else next(named_within(config.get(name)), "")


def _foreign(name: str) -> CheckpointError:
    return CheckpointError(
        f"the policy was trained with {name}, which is not part of aiorl\n"
        "  a file must not decide what is imported: pass algo=YourClass"
    )
