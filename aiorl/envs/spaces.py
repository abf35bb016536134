"""Observation and action spaces as plain data, and the arithmetic between them and arrays.

A nested observation space is a tuple of *leaves*, each one array per step. `Spaces` needs nothing but NumPy and
msgspec, goes into checkpoints as JSON, and holds the one `encode` that acting and learning share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import numpy as np

from aiorl.errors import ConfigError
from aiorl.segments import Array, Column

if TYPE_CHECKING:
    import gymnasium

Kind = Literal["box", "discrete", "multi_discrete", "multi_binary"]

SUPPORTED_OBS = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"
SUPPORTED_ACTIONS = "Discrete, MultiDiscrete, MultiBinary and Box of floats"


class Leaf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """One array of an observation, or the action.

    `name` is "obs" for a space that is not nested, else "obs.KEY…"; `path` leads to the leaf (str: key of a Dict, int:
    place in a Tuple). `nvec` and `start` are the sizes and first values of a discrete (length 1) or multi-discrete
    space, flat. `low` and `high` bound a box, flat, of length 1 when all are equal, None where unbounded; observations
    keep them only when they are uniform. `stack` observations of the environment, the newest last, lie on the first axis of
    `shape`; at 1 there is no such axis.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...] = ()
    path: tuple[str | int, ...] = ()
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    stack: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is not supported")
        if any(size < 0 for size in self.shape) or any(n < 1 for n in self.nvec) or len(self.nvec) != len(self.start):
            raise ValueError(f"{self.name}: shape {self.shape}, nvec {self.nvec}, start {self.start} do not fit")
        if self.stack < 1 or (self.stack > 1 and self.shape[:1] != (self.stack,)):
            raise ValueError(f"{self.name}: shape {self.shape} does not begin with the stack of {self.stack}")

    @property
    def size(self) -> int:
        """Numbers in one value."""
        return math.prod(self.shape)

    @property
    def features(self) -> int:
        """Length of the encoded value."""
        return sum(self.nvec) if self.nvec else self.size

    @property
    def column(self) -> Column:
        return Column(self.shape, self.dtype)

    @property
    def is_image(self) -> bool:
        """Bytes from 0 to 255, which are scaled to [0, 1]."""
        return self.kind == "box" and self.dtype == "uint8" and self.low == (0.0,) and self.high == (255.0,)

    @cached_property
    def one_hot(self) -> tuple[Array, Array]:
        """For each feature of a discrete value: which number it looks at, and the value it stands for."""
        source = np.repeat(np.arange(len(self.nvec)), self.nvec)
        values = [np.arange(s, s + n) for s, n in zip(self.start, self.nvec, strict=True)]
        return source, np.concatenate(values)

    def encode(self, value: Array) -> Array:
        """[…, *shape] to float32 […, features]."""
        flat = value.reshape(*value.shape[: value.ndim - len(self.shape)], self.size)
        if self.nvec:
            source, stands_for = self.one_hot
            return (flat[..., source] == stands_for).astype(np.float32)
        if self.is_image:
            return flat * np.float32(1 / 255)
        return flat.astype(np.float32, copy=False)

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest action of a box, each of `shape` and `dtype`; infinite where unbounded."""
        low = [-np.inf if x is None else x for x in self.low]
        high = [np.inf if x is None else x for x in self.high]
        return tuple(np.broadcast_to(np.array(x, self.dtype), self.size).reshape(self.shape) for x in (low, high))  # type: ignore[return-value]


_DTYPES = {"bool", "float16", "float32", "float64"} | {f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)}


class Spaces(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """What one environment shows and takes."""

    observation: tuple[Leaf, ...]
    action: Leaf

    @property
    def obs_columns(self) -> dict[str, Column]:
        """Observation leaves as they are stored: the environment's own shapes and dtypes."""
        return {leaf.name: leaf.column for leaf in self.observation}

    @property
    def action_column(self) -> Column:
        """A stored action: int64 [] counting from 0 (discrete), int64 [k] (multi-discrete), float32 [k] (box, before
        clipping). Actions of more than one dimension are stored flat."""
        if self.action.kind == "discrete":
            return Column((), "int64")
        return Column((self.action.size,), "float32" if self.action.kind == "box" else "int64")

    @property
    def stack(self) -> int:
        """How many observations of the environment each of these holds (see `Leaf`): the same for all leaves."""
        return self.observation[0].stack if self.observation else 1

    def with_stack(self, k: int) -> Spaces:
        """The same, the first axis of each observation leaf known as a stack of `k`."""
        leaves = tuple(msgspec.structs.replace(leaf, stack=k) for leaf in self.observation)
        return self if k == self.stack else Spaces(observation=leaves, action=self.action)

    @cached_property
    def single(self) -> Spaces:
        """Without the axis of the stack. Of the observation leaves only names, paths, shapes and dtypes are right."""
        leaves = tuple(
            Leaf(name=leaf.name, path=leaf.path, kind="box", dtype=leaf.dtype, shape=leaf.shape[leaf.stack > 1 :])
            for leaf in self.observation
        )
        return Spaces(observation=leaves, action=self.action)

    @cached_property
    def features(self) -> int:
        """Length of an encoded observation."""
        return sum(leaf.features for leaf in self.observation)

    @cached_property
    def _encoded_as_is(self) -> bool:
        first = self.observation[0]
        return len(self.observation) == 1 and (first.kind, first.dtype, len(first.shape)) == ("box", "float32", 1)

    def encode(self, leaves: Mapping[str, Array]) -> Array:
        """Observation leaves […, *shape] to the one float32 array […, features] that networks see.

        Boxes are flattened, bytes from 0 to 255 scaled to [0, 1], discrete values one-hot, binary ones 0 or 1. A
        float32 vector is returned as it is, without a copy.
        """
        if self._encoded_as_is:
            return leaves[self.observation[0].name]
        parts = [leaf.encode(leaves[leaf.name]) for leaf in self.observation]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def env_actions(self, actions: Array) -> Array:
        """Stored actions [n, …] as `env.step` takes them, [n, *shape] in the space's dtype; always a new array.

        Discrete actions get the space's first value added; those of a box are clipped to its bounds.
        """
        leaf = self.action
        batch = actions.astype(leaf.dtype)
        if leaf.kind == "box":
            low, high = leaf.bounds
            batch = batch.reshape(-1, *leaf.shape)
            np.maximum(batch, low, out=batch)
            return np.minimum(batch, high, out=batch)
        if self._action_start is not None:
            batch += self._action_start
        return batch if len(leaf.shape) < 2 else batch.reshape(-1, *leaf.shape)

    def each_action(self, actions: Array) -> list[Any] | Array:
        """As `env_actions`, one to give to each of n environments: those of a box are arrays, also without axes."""
        batch = self.env_actions(actions)
        return [np.asarray(taken) for taken in batch] if self.action.kind == "box" and not self.action.shape else batch

    @cached_property
    def _action_start(self) -> Array | None:
        start = np.array(self.action.start, self.action.dtype)
        return None if not start.any() else start[0] if self.action.kind == "discrete" else start

    def env_action(self, action: Array) -> Any:
        """One stored action as `env.step` takes it (a NumPy integer for a discrete space)."""
        return self.each_action(np.asarray(action)[None])[0]

    def sample_actions(self, n: int, rng: np.random.Generator) -> Array:
        """Random stored actions [n, …]: uniform within the bounds, standard normal where there are none."""
        column = self.action_column
        if self.action.kind != "box":
            return rng.integers(self.action.nvec if column.shape else self.action.nvec[0], size=(n, *column.shape))
        low, high = (bound.reshape(-1).astype(np.float64) for bound in self.action.bounds)
        bounded = np.isfinite(low) & np.isfinite(high)
        uniform = rng.uniform(np.where(bounded, low, 0), np.where(bounded, high, 1), (n, *column.shape))
        normal = rng.standard_normal((n, *column.shape)).clip(low, high)
        return np.where(bounded, uniform, normal).astype(np.float32)

    def describe(self) -> str:
        """What is observed and done, in a line for people."""
        leaves = ", ".join(f"{leaf.name} {leaf.kind}{list(leaf.shape)}" for leaf in self.observation)
        return f"{leaves} -> {self.action.kind}{list(self.action.shape)}"

    def flatten_obs(self, obs: Any) -> dict[str, Array]:
        """The leaves of an observation as an environment returns it, or of a batch of them, […, *shape].

        Raises ValueError naming the leaf if a part is missing, has another shape, or numbers its dtype does not have.
        """
        leaves: dict[str, Array] = {}
        for leaf in self.observation:
            value = obs
            try:
                for key in leaf.path:
                    value = value[key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"{leaf.name} is missing from the observation (a {type(obs).__name__})") from None
            array = _as(leaf, value)
            if array.ndim < len(leaf.shape) or array.shape[array.ndim - len(leaf.shape) :] != leaf.shape:
                raise ValueError(
                    f"{leaf.name} expected {leaf.shape} {leaf.dtype} or a batch of such, got {array.shape}"
                )
            leaves[leaf.name] = array
        return leaves


def _as(leaf: Leaf, value: Any) -> Array:
    """In the dtype of the leaf. A camera of bytes that is shown as fractions would be all zeros."""
    given = np.asarray(value)
    with np.errstate(invalid="ignore"):
        array = given.astype(leaf.dtype, copy=False)
    if given.dtype.kind in "iuf" and array.dtype.kind in "iub" and not np.array_equal(given, array):
        raise ValueError(f"{leaf.name} expected {leaf.dtype}, got {given.dtype} with numbers {leaf.dtype} does not have")
    return array


def spaces_of(observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> Spaces:
    """Translate gymnasium spaces. Raises ConfigError naming the space and its place if one is not supported."""
    leaves = tuple(_obs_leaves(observation_space, ()))
    names = [leaf.name for leaf in leaves]
    if not leaves:
        raise ConfigError(f"observation space {_short(observation_space)} is empty: there is nothing to learn from")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two parts of the observation are both called {twice}\n  rename a key of the Dict space")
    return Spaces(observation=leaves, action=_action_leaf(action_space))


@dataclass(frozen=True)
class Bounds:
    """What a box declares, each of its shape, infinite where unbounded. Unlike in a `Leaf` they need not be uniform."""

    low: Array
    high: Array

    def hold(self, lowest: Array, highest: Array) -> bool:
        """Whether values that reach from `lowest` to `highest` are within."""
        return bool((lowest >= self.low).all() and (highest <= self.high).all())


def bounds_of(observation_space: gymnasium.Space[Any], spaces: Spaces) -> dict[str, Bounds]:
    """The bounds of all boxes that could be left, by leaf; those of bytes from 0 to 255, say, cannot."""
    found: dict[str, Bounds] = {}
    for leaf in spaces.observation:
        box: Any = observation_space
        for key in leaf.path:
            box = box[key]
        if leaf.kind != "box" or not leaf.size:
            continue
        bounds = Bounds(np.array(box.low), np.array(box.high))
        if not bounds.hold(*_extremes(np.dtype(leaf.dtype))):
            found[leaf.name] = bounds
    return found


def _extremes(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    if dtype.kind == "f":
        return np.array(-np.inf), np.array(np.inf)
    if dtype.kind == "b":
        return np.array(False), np.array(True)
    return np.array(np.iinfo(dtype).min), np.array(np.iinfo(dtype).max)


def _obs_leaves(space: Any, path: tuple[str | int, ...]) -> list[Leaf]:
    from gymnasium import spaces as gym

    if isinstance(space, gym.Dict):
        children = cast("Mapping[Any, Any]", space.spaces).items()
    elif isinstance(space, gym.Tuple):
        children = enumerate(cast("Sequence[Any]", space.spaces))
    else:
        return [_obs_leaf(space, path)]
    if path and not len(space.spaces):
        raise ConfigError(f"observation space {_name(path)}: {_short(space)} is empty\n  leave it out of the space it is in")
    leaves: list[Leaf] = []
    for key, child in children:
        if isinstance(space, gym.Dict) and not isinstance(key, str):
            raise ConfigError(f"{_name(path)}: key {key!r} of a Dict space is not a str\n  use str keys")
        leaves += _obs_leaves(child, (*path, key))
    return leaves


def _obs_leaf(space: Any, path: tuple[str | int, ...]) -> Leaf:
    from gymnasium import spaces as gym

    name = _name(path)
    if isinstance(space, gym.Box) and str(space.dtype) in _DTYPES:
        low, high = _bounds(space.low), _bounds(space.high)
        uniform = len(low) == len(high) == 1
        return Leaf(
            name=name, path=path, kind="box", shape=space.shape, dtype=str(space.dtype),
            low=low if uniform else (), high=high if uniform else (),
        )  # fmt: skip
    leaf = _discrete_leaf(space, name, path)
    if leaf is not None:
        return leaf
    if isinstance(space, gym.MultiBinary):
        return Leaf(name=name, path=path, kind="multi_binary", shape=tuple(space.shape), dtype=str(space.dtype))
    raise ConfigError(f"observation space {name}: {_short(space)} is not supported\n  supported: {SUPPORTED_OBS}")


def _action_leaf(space: Any) -> Leaf:
    from gymnasium import spaces as gym

    leaf = _discrete_leaf(space, "action", ())
    if leaf is not None:
        return msgspec.structs.replace(leaf, dtype=str(space.dtype))  # a space refuses integers of a wider one
    if isinstance(space, gym.MultiBinary):
        size = math.prod(space.shape)
        return Leaf(
            name="action", kind="multi_discrete", shape=tuple(space.shape), dtype=str(space.dtype),
            nvec=(2,) * size, start=(0,) * size,
        )  # fmt: skip
    if isinstance(space, gym.Box) and str(space.dtype) in ("float16", "float32", "float64"):
        return Leaf(
            name="action", kind="box", shape=space.shape, dtype=str(space.dtype),
            low=_bounds(space.low), high=_bounds(space.high),
        )  # fmt: skip
    raise ConfigError(f"action space {_short(space)} is not supported\n  supported: {SUPPORTED_ACTIONS}")


def _discrete_leaf(space: Any, name: str, path: tuple[str | int, ...]) -> Leaf | None:
    from gymnasium import spaces as gym

    if isinstance(space, gym.Discrete):
        return Leaf(
            name=name, path=path, kind="discrete", dtype="int64", nvec=(int(space.n),), start=(int(space.start),)
        )  # fmt: skip
    if isinstance(space, gym.MultiDiscrete):
        return Leaf(
            name=name, path=path, kind="multi_discrete", shape=space.nvec.shape, dtype=str(space.dtype),
            nvec=_ints(space.nvec), start=_ints(space.start),
        )  # fmt: skip
    return None


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in np.ravel(values))


def _bounds(values: Array) -> tuple[float | None, ...]:
    flat = [float(v) if np.isfinite(v) else None for v in np.unique(values)]
    if len(flat) > 1:
        flat = [float(v) if np.isfinite(v) else None for v in np.ravel(values)]
    return tuple(flat)


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(("obs", *(str(key) for key in path)))


def _short(space: Any) -> str:
    text = str(space)
    return text if len(text) <= 80 else f"{text[:77]}…"
