"""What is sampled from a replay buffer. All arrays and tensors are copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aiorl.segments import Array


@dataclass(frozen=True)
class Batch:
    """n-step transitions: the target of `action` in `obs` is returns + discounts * V(next_obs)."""

    obs: dict[str, Any]
    """Observation leaves [N, …] as the environment gave them: arrays, or tensors if they are kept on a device."""
    action: Array
    """[N, …]"""
    returns: Array
    """[N] float64: discounted rewards of the steps that count."""
    discounts: Array
    """[N] float64: gamma to the number of those steps, or 0 after termination."""
    next_obs: dict[str, Any]
    """[N, …] what the last of those steps led to."""
    index: Array
    """[N] int64: where they begin (row * B + column)."""
    generation: Array
    """[N] int64: how often that row had been overwritten."""
    weights: Array
    """[N] float64: importance weights, the largest of them 1; all 1 where sampling is uniform."""
    columns: dict[str, Array] = field(default_factory=dict)
    """[N, …] the policy's own columns that the buffer keeps."""


@dataclass(frozen=True)
class Sequences:
    """Rows that followed each other in one environment, [L, N, …]. Beyond its end each sequence repeats its last row."""

    obs: dict[str, Any]
    action: Array
    reward: Array
    """[L, N] float64"""
    terminated: Array
    truncated: Array
    """[L, N] bool both"""
    next_obs: dict[str, Any]
    """What each step led to, true at episode ends too."""
    first: Array
    """[L, N] bool: an episode begins with the row, so nothing is to be carried over from the row before. Where row 0 is
    none of these, the sequence begins in the middle of an episode: what was carried over into it then is for the learner
    to say (a state that the policy kept in `columns`, or zeros and some rows of burn-in)."""
    mask: Array
    """[L, N] bool: False beyond the end."""
    index: Array
    """[N] int64: where they begin (row * B + column)."""
    generation: Array
    """[N] int64: how often that row had been overwritten."""
    weights: Array
    """[N] float64: importance weights, as those of a `Batch` of the rows that they begin with."""
    columns: dict[str, Array] = field(default_factory=dict)
    """[L, N, …] the policy's own columns that the buffer keeps."""
