"""Checks on everything an environment returns: shapes, dtypes, keys and numbers, before anything is stored.

Values are never broadcast and never cast with loss. The checks of one step cost well under a microsecond; that numbers
are finite and in range is checked once per segment, and in evaluations, which have none, once for the batch.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import EnvError, TrainingError
from aiorl.segments import CORE_COLUMNS, Array, Segment

CRASHES = (Exception, SystemExit)
"""What an environment may raise without ending its worker: `sys.exit()` in a simulator is an error like any other."""


_REAL = (float, int, np.floating, np.integer, np.bool_)
_BOOL = (bool, np.bool_)


class BrokenContract(ValueError):
    """An environment returned something that its spaces do not declare. The message starts with the field."""


Tree = int | dict[str, "Tree"] | tuple["Tree", ...]


class ObsReader:
    """Takes observations apart into leaves, each checked to have exactly the declared shape and dtype.

    `batch` is put before each shape: () for single environments, (n,) for a vector environment.
    """

    def __init__(self, leaves: tuple[Leaf, ...], batch: tuple[int, ...] = ()) -> None:
        self._leaves = leaves
        self._expected = [((*batch, *leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]
        self._tree = _tree(list(enumerate(leaves)), 0)
        self._only = self._expected[0] if self._tree == 0 else None

    def read(self, obs: Any) -> list[Any]:
        """The leaves of `obs`, in the order of the spaces; they may be its own arrays. Raises BrokenContract."""
        if self._only is not None:
            shape, dtype = self._only
            plain = type(obs) is np.ndarray and obs.dtype is dtype and obs.shape == shape
            return [obs if plain else _coerce(self._leaves[0], obs, shape, dtype)]
        values: list[Any] = [None] * len(self._leaves)
        _take_apart(self._tree, obs, values, "obs")
        for index, (shape, dtype) in enumerate(self._expected):
            value = values[index]
            if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != shape:
                values[index] = _coerce(self._leaves[index], value, shape, dtype)
        return values

    def write(self, obs: Any, rows: Sequence[Array], i: int) -> None:
        """Copy the leaves of `obs` to place `i` of `rows`, one array [n, …] for each leaf. Raises BrokenContract."""
        if self._only is None:
            for row, value in zip(rows, self.read(obs), strict=True):
                row[i] = value
            return
        shape, dtype = self._only
        if type(obs) is not np.ndarray or obs.dtype is not dtype or obs.shape != shape:
            obs = _coerce(self._leaves[0], obs, shape, dtype)
        rows[0][i] = obs


def _tree(leaves: Sequence[tuple[int, Leaf]], depth: int) -> Tree:
    """Nested dicts and tuples like the observation space, with the places of leaves at the ends."""
    first = leaves[0][1].path
    if len(first) == depth:
        return leaves[0][0]
    children: dict[str | int, list[tuple[int, Leaf]]] = {}
    for index, leaf in leaves:
        children.setdefault(leaf.path[depth], []).append((index, leaf))
    branches = {key: _tree(group, depth + 1) for key, group in children.items()}
    if isinstance(first[depth], int):
        return tuple(branches.values())
    return cast("dict[str, Tree]", branches)


def _take_apart(tree: Tree, obs: Any, values: list[Any], name: str) -> None:
    if isinstance(tree, int):
        values[tree] = obs
    elif isinstance(tree, dict):
        if not isinstance(obs, Mapping):
            raise BrokenContract(f"{name} expected a dict with {_listed(tree)}, got {_described(obs)}")
        obs = cast("Mapping[Any, Any]", obs)
        if obs.keys() != tree.keys():
            raise BrokenContract(_wrong_keys(name, tree, obs))
        for key, branch in tree.items():
            _take_apart(branch, obs[key], values, f"{name}.{key}")
    else:
        if not isinstance(obs, tuple | list) or len(cast("Sequence[Any]", obs)) != len(tree):
            raise BrokenContract(f"{name} expected a tuple of {len(tree)}, got {_described(obs)}")
        for place, branch in enumerate(tree):
            _take_apart(branch, obs[place], values, f"{name}.{place}")


def _wrong_keys(name: str, tree: dict[str, Tree], obs: Mapping[Any, Any]) -> str:
    missing, extra = tree.keys() - obs.keys(), obs.keys() - tree.keys()
    parts = [f"is missing {_listed(missing)}"] * bool(missing) + [f"has the undeclared {_listed(extra)}"] * bool(extra)
    return f"{name} {' and '.join(parts)}\n  return the keys that observation_space declares"


def _listed(keys: Any) -> str:
    return ", ".join(repr(key) for key in sorted(keys, key=str))


def _coerce(leaf: Leaf, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A value that is not just the declared array: accepted if nothing is lost, else BrokenContract."""
    integers = dtype.kind in "biu"
    if integers and isinstance(value, int | list | tuple) and not (shape and isinstance(value, int)):
        array = _from_python(value)
    elif not integers and not shape and type(value) is float:
        array = np.asarray(value, dtype)
    else:
        array = np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None
    if array is not None and array.shape == shape:
        if array.dtype == dtype:
            return array
        same_kind = array.dtype.kind in "biu" if integers else array.dtype.kind == dtype.kind
        if same_kind and np.can_cast(array.dtype, dtype):
            return array.astype(dtype)
        if same_kind and integers and np.array_equal(array, cast_back := array.astype(dtype)):
            return cast_back
    raise BrokenContract(_mismatch(leaf, value, shape, dtype))


def _from_python(value: Any) -> Array | None:
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        return None


def _mismatch(leaf: Leaf, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    text = f"{leaf.name} expected {shape} {dtype}, got {_described(value)}"
    if not isinstance(value, np.ndarray):
        return f"{text}\n  return np.asarray(…, {str(dtype)!r})"
    if value.shape == shape:
        return f'{text}\n  return it with .astype("{dtype}"), or declare {value.dtype} in observation_space'
    return f"{text}\n  return it in the shape that observation_space declares"


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.shape} {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dict with {_listed(cast('Mapping[Any, Any]', value)) or 'no keys'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(cast('Sequence[Any]', value))}"
    text = repr(value)
    return text if value is None or len(text) <= 40 else f"a {type(value).__name__}"


def real(value: Any) -> float:
    """A reward as a float: any real number, also in an array of one element. Raises BrokenContract."""
    if isinstance(value, _REAL):
        return float(value)
    array = value if isinstance(value, np.ndarray) else None
    if array is None or array.size != 1 or array.dtype.kind not in "biuf":
        raise BrokenContract(f"reward expected a real number, got {_described(value)}\n  return float(reward)")
    return float(array.item())


def flag(value: Any, name: str) -> bool:
    """`terminated` or `truncated` as a bool: a bool, 0 or 1, also in an array of one element. Raises BrokenContract."""
    if isinstance(value, _BOOL):
        return bool(value)
    array = np.asarray(value) if isinstance(value, int | np.ndarray | np.integer) else None
    if array is None or array.size != 1 or array.dtype.kind not in "biu" or array.item() not in (0, 1):
        raise BrokenContract(f"{name} expected True or False, got {_described(value)}\n  return bool({name})")
    return bool(array.item())


def step_parts(result: Any) -> tuple[Any, Any, Any, Any, Any]:
    """What `env.step` returned, if it has five parts. Raises BrokenContract."""
    if not isinstance(result, tuple | list) or len(cast("Sequence[Any]", result)) != 5:
        _refuse_coroutine("step", result)
        raise BrokenContract(
            f"step() expected to return (obs, reward, terminated, truncated, info), got {_described(result)}"
        )
    return tuple(result)  # type: ignore[return-value]


def reset_obs(result: Any) -> Any:
    """The observation in what `env.reset` returned. Raises BrokenContract."""
    if not isinstance(result, tuple | list) or len(cast("Sequence[Any]", result)) != 2:
        _refuse_coroutine("reset", result)
        raise BrokenContract(f"reset() expected to return (obs, info), got {_described(result)}")
    return result[0]


def _refuse_coroutine(call: str, result: Any) -> None:
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # else Python complains that nobody awaited it
        raise BrokenContract(
            f"{call}() returned a {type(result).__name__} to be awaited\n"
            "  declare reset and step with `async def`, and take off wrappers that do not"
        )


def crashed(where: str, call: str, error: BaseException) -> EnvError:
    """The error to raise when `call` of an environment raised."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if len(text) > 400:
        text = f"{text[:400]}…"
    return EnvError(f"{where}: {call} raised {text}", detail="".join(traceback.format_exception(error)))


class ChoiceWriter:
    """Writes what a policy chose into a segment's columns, checked to be of their shapes."""

    def __init__(self, segment: Segment) -> None:
        self._action = segment.columns["action"]
        self._shape = self._action.shape[1:]
        extras = {name: c for name, c in segment.columns.items() if name not in CORE_COLUMNS}
        self._extras = [(name, column, column.shape[1:]) for name, column in extras.items()]

    def write(self, t: int, actions: Array, extras: Mapping[str, Array]) -> Array:
        """Fill row `t`; returns the actions as stored, so that what was acted on is what can be replayed."""
        if actions.shape != self._shape:
            raise TrainingError(f"policy.act: actions expected {self._shape}, got {actions.shape}")
        row = self._action[t]
        row[...] = actions
        for name, column, shape in self._extras:
            value = extras.get(name)
            if value is None or value.shape != shape:
                got = "nothing" if value is None else f"{value.shape}"
                raise TrainingError(f"policy.act: column {name!r} expected {shape}, got {got}")
            column[t] = value
        return row


def check_segment(spaces: Spaces, segment: Segment, steps: int, first_env: int) -> None:
    """Check the numbers of `steps` collected rows: finite, and within the range of a discrete space.

    Raises EnvError naming environment, row of the segment and field; TrainingError if the policy chose such an action.
    """
    actions = segment.columns["action"][:steps]
    if not all_finite(actions):
        t, env = np.argwhere(~np.isfinite(actions))[0][:2]
        raise TrainingError(
            f"the policy chose {actions[t, env]} for environment {first_env + env}, step {t} of the segment\n"
            "  its weights or inputs are no longer finite: a smaller learning rate, or bounded rewards, may help"
        )
    _check_rows("reward", segment.columns["reward"][:steps], None, first_env)
    for leaf in spaces.observation:
        _check_rows(leaf.name, segment.obs[leaf.name][: steps + 1], leaf, first_env)
        finals = segment.final_obs[leaf.name][: segment.finals]
        bad = _first_bad(finals, leaf)
        if bad is not None:
            t, env = divmod(int(segment.final_at[bad[0]]), segment.envs)
            raise EnvError(_bad_value(_in_segment(first_env + env, t), leaf.name, finals[bad], leaf))


def check_shown(leaves: Sequence[Leaf], rows: Sequence[Array], where: Callable[[int], str]) -> None:
    """Check the numbers that some environments show, one array [n, …] for each leaf, as in a segment.

    Raises EnvError that begins with `where(i)`, i the place of the environment in the rows.
    """
    for leaf, values in zip(leaves, rows, strict=True):
        bad = _first_bad(values, leaf)
        if bad is not None:
            raise EnvError(_bad_value(where(bad[0]), leaf.name, values[bad], leaf))


def _check_rows(name: str, rows: Array, leaf: Leaf | None, first_env: int) -> None:
    bad = _first_bad(rows, leaf)
    if bad is not None:
        # Row t of the observations is what step t - 1 led to.
        step = bad[0] - (leaf is not None)
        raise EnvError(_bad_value(_in_segment(first_env + bad[1], step), name, rows[bad], leaf))


def _in_segment(env: int, step: int) -> str:
    return f"environment {env}, step {step} of the segment" if step >= 0 else f"environment {env}, at the segment's start"


def _bad_value(where: str, name: str, value: Any, leaf: Leaf | None) -> str:
    if np.isfinite(value):
        return f"{where}: {name} = {value} is outside of its discrete space {_ranges(leaf)}"
    return f"{where}: {name} is {value}\n  the environment must return finite numbers"


def _ranges(leaf: Leaf | None) -> str:
    if leaf is None or not leaf.nvec:
        return "{0, 1}"
    low, high = min(leaf.start), max(s + n - 1 for s, n in zip(leaf.start, leaf.nvec, strict=True))
    return f"[{low}, {high}]"


def _first_bad(values: Array, leaf: Leaf | None) -> tuple[int, ...] | None:
    """Index of the first value that is not finite, or not in the leaf's discrete space."""
    if leaf is None or leaf.kind == "box":
        if all_finite(values):
            return None
        bad = ~np.isfinite(values)
    else:
        start = np.array(leaf.start or 0).reshape(leaf.shape if leaf.nvec else ())
        offset = values - start
        bad = (offset < 0) | (offset >= np.array(leaf.nvec or 2).reshape(start.shape))
        if not bad.any():
            return None
    return tuple(int(i) for i in np.argwhere(bad)[0])


def all_finite(values: Array) -> bool:
    """Whether all are finite; the sum tells in one pass without a temporary array, unless it overflows."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
