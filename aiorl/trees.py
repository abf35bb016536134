"""State trees: nested dicts with string keys whose leaves are NumPy arrays, numbers, strings, None or lists of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_tree(state: Any, like: Any, path: str = "state") -> None:
    """Raise ValueError naming the first place where `state` has other keys, types, shapes or dtypes than `like`."""
    if isinstance(like, Mapping):
        if not isinstance(state, Mapping):
            raise ValueError(f"{path}: expected a table, got {type(state).__name__}")
        for key in like:
            if key not in state:
                raise ValueError(f"{path}.{key} is missing")
        for key in state:
            if key not in like:
                raise ValueError(f"{path}.{key} is not expected here")
            check_tree(state[key], like[key], f"{path}.{key}")
    elif isinstance(like, np.ndarray):
        seen = f"{state.dtype} {list(state.shape)}" if isinstance(state, np.ndarray) else type(state).__name__
        wanted = f"{like.dtype} {list(like.shape)}"
        if seen != wanted:
            raise ValueError(f"{path}: expected {wanted}, got {seen}")
    elif isinstance(like, bool) or like is None or isinstance(like, str | list):
        if type(state) is not type(like):
            raise ValueError(f"{path}: expected {type(like).__name__}, got {type(state).__name__}")
    elif isinstance(state, bool) or not isinstance(state, int if isinstance(like, int) else int | float):
        raise ValueError(f"{path}: expected {type(like).__name__}, got {type(state).__name__}")
