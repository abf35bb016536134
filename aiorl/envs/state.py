"""The whole state of a native vector environment as bytes, and back, without pickle.

The state is what the instance attributes of the environment and of its wrappers hold: numbers, strings, arrays,
generators, and lists, tuples and dicts of these. Spaces, specs, classes and functions are taken to be constant. An
environment that holds anything else (a simulator, a file, another environment) cannot be captured, and says so.

Decoding is safe on any bytes: it makes plain values only, and sets only attributes that could have been captured.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from aiorl.errors import ReproductionError

if TYPE_CHECKING:
    from aiorl.envs.spaces import Spaces

_GENERATORS = {"PCG64": np.random.PCG64, "PCG64DXSM": np.random.PCG64DXSM, "SFC64": np.random.SFC64}
_DTYPES = {dtype.str: dtype for dtype in map(np.dtype, "?bBhHiIlLqQefd")}
_CONSTANT_NAMES = {"metadata"}  # describes the class, though often set by __init__
_MAX_DEPTH = 16
_CHECK_STEPS = 48


class CannotCapture(ValueError):
    """The state holds something that has no plain form; the message names the attribute."""


class _Array(msgspec.Struct, frozen=True, tag="a", array_like=True):
    """`scalar`: a NumPy scalar rather than an array of no dimensions."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    scalar: bool


class _BigInt(msgspec.Struct, frozen=True, tag="i", array_like=True):
    hex: str


class _Generator(msgspec.Struct, frozen=True, tag="g", array_like=True):
    kind: str
    state: _Plain  # what its bit generator gives


class _Items(msgspec.Struct, frozen=True, tag="l", array_like=True):
    items: list[_Plain]
    is_tuple: bool


class _Table(msgspec.Struct, frozen=True, tag="d", array_like=True):
    keys: list[str | int]
    values: list[_Plain]


_Plain = None | bool | int | float | str | _Array | _BigInt | _Generator | _Items | _Table
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[dict[str, _Plain]]).decode


class StateCapture:
    """Captures and restores one vector environment; keep it, for it remembers which attributes are constant."""

    def __init__(self, env: Any) -> None:
        self._layers = _layers(env)
        self._constant = [set(_CONSTANT_NAMES) for _ in self._layers]

    def capture(self) -> bytes:
        """The state now. Raises CannotCapture."""
        return _encode(
            [self._attributes(layer, constant) for layer, constant in zip(self._layers, self._constant, strict=True)]
        )

    def _attributes(self, layer: Any, constant: set[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in vars(layer).items():
            if name in constant:
                continue
            try:
                found[name] = _plain(value, 0)
            except CannotCapture as error:
                if not _is_constant(value) and not any(value is other for other in self._layers):
                    raise CannotCapture(f"{type(layer).__name__}.{name} {error}") from None
                constant.add(name)
        return found

    def restore(self, data: bytes) -> None:
        """Set the state of an environment that was made the same way and has been reset. Raises ReproductionError."""
        try:
            layers = _decode(data)
            if len(layers) != len(self._layers):
                raise ValueError(f"{len(layers)} wrappers, expected {len(self._layers)}")
            values = [{name: _unplain(value) for name, value in attributes.items()} for attributes in layers]
            for layer, attributes in zip(self._layers, values, strict=True):
                _check_names(layer, attributes)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ReproductionError(f"the saved state of the vector environment does not fit it: {error}") from None
        for layer, attributes in zip(self._layers, values, strict=True):
            for name, value in attributes.items():
                setattr(layer, name, value)


def _layers(env: Any) -> list[Any]:
    """The wrappers from the outside in, and the environment itself."""
    layers = [env]
    while layers[-1] is not env.unwrapped:
        layers.append(layers[-1].env)
    return layers


def _is_constant(value: Any) -> bool:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    fixed = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    return isinstance(value, (*fixed, gymnasium.Space, EnvSpec, enum.Enum, np.dtype))


def _check_names(layer: Any, attributes: dict[str, Any]) -> None:
    """Allowed are attributes that the fresh environment holds as plain values too, or will only get while running."""
    for name in attributes:
        if name in vars(layer):
            allowed = name not in _CONSTANT_NAMES and not _is_constant(vars(layer)[name])
        else:
            allowed = name.isidentifier() and not hasattr(layer, name)
        if not allowed or name.startswith("__"):
            raise ValueError(f"{name!r} is no part of the state of {type(layer).__name__}")


def _plain(value: Any, depth: int) -> Any:
    """A value in the form that is encoded. Raises CannotCapture."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else _BigInt(hex(value))
    if (kind is np.ndarray or issubclass(kind, np.generic)) and value.dtype.str in _DTYPES:
        return _Array(value.dtype.str, value.shape, value.tobytes(), kind is not np.ndarray)
    if depth > _MAX_DEPTH:
        raise CannotCapture("is nested too deeply")
    if kind in (list, tuple):
        return _Items([_plain(item, depth + 1) for item in value], kind is tuple)
    if kind is dict and all(type(key) in (str, int) for key in value):
        return _Table(list(value), [_plain(item, depth + 1) for item in value.values()])
    if kind is np.random.Generator and type(value.bit_generator).__name__ in _GENERATORS:
        return _Generator(type(value.bit_generator).__name__, _plain(value.bit_generator.state, depth + 1))
    raise CannotCapture(f"is a {kind.__module__}.{kind.__qualname__}, which has no plain form")


def _unplain(value: Any) -> Any:
    """Inverse of `_plain`; raises ValueError, TypeError or KeyError for what it cannot have made."""
    if isinstance(value, _Array):
        array = np.frombuffer(value.data, _DTYPES[value.dtype]).reshape(value.shape).copy()
        return array[()] if value.scalar else array
    if isinstance(value, _BigInt):
        return int(value.hex, 16)
    if isinstance(value, _Items):
        items = [_unplain(item) for item in value.items]
        return tuple(items) if value.is_tuple else items
    if isinstance(value, _Table):
        return dict(zip(value.keys, map(_unplain, value.values), strict=True))
    if isinstance(value, _Generator):
        bits = _GENERATORS[value.kind]()
        bits.state = cast("Any", _unplain(value.state))
        return np.random.Generator(bits)
    return value


def reproduces(make: Callable[[], Any], spaces: Spaces, n: int) -> str:
    """Check that a captured state brings a vector environment of `n` back exactly: "" if so, else the reason why not.

    One environment runs for a while, its state is restored into another, and both must go on alike.
    """
    rng = np.random.default_rng(0)
    original, restored = make(), make()
    try:
        original.reset(seed=1)
        restored.reset(seed=2)
        mode = original.metadata.get("autoreset_mode")
        for _ in range(_CHECK_STEPS):
            _step(original, spaces, spaces.sample_actions(n, rng), mode)
        state = StateCapture(original).capture()
        StateCapture(restored).restore(state)
        for _ in range(_CHECK_STEPS):
            actions = spaces.sample_actions(n, rng)
            if not _same(_step(original, spaces, actions, mode), _step(restored, spaces, actions, mode)):
                return "its attributes do not hold its whole state: brought back, it went on differently"
        if StateCapture(original).capture() != StateCapture(restored).capture():
            return "its attributes do not hold its whole state: brought back, they came to differ"
    except CannotCapture as error:
        return f"its state cannot be captured: {error}"
    finally:
        original.close()
        restored.close()
    return ""


def _step(env: Any, spaces: Spaces, actions: Any, mode: Any) -> list[Any]:
    """One step, and the reset it asks for where the environment does not do that itself."""
    obs, reward, terminated, truncated, _ = env.step(spaces.env_actions(actions))
    done = np.logical_or(terminated, truncated)
    if getattr(mode, "name", mode) == "DISABLED" and done.any():
        obs, _ = env.reset(options={"reset_mask": done.copy()})
    leaves = spaces.flatten_obs(obs)
    return [*(leaf.copy() for leaf in leaves.values()), *map(np.array, (reward, terminated, truncated))]


def _same(a: list[Any], b: list[Any]) -> bool:
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
