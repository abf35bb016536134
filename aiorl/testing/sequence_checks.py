"""What is wrong with sequences that are sampled of made-up experience: did their rows follow each other, and do they say
where an episode begins?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from aiorl.buffers.observations import on_host
from aiorl.segments import Array
from aiorl.testing.findings import Finding, error, warning
from aiorl.testing.transition_checks import ENVS, FINAL, Truth, action_of, shown

COUNT, LENGTH = 64, 8


def judge_sequences(truth: Truth, buffer: Any) -> Iterator[Finding]:
    """Of a buffer that holds what was added of the truth. Rows beyond the end of a sequence are not looked at."""
    found = buffer.sequences(np.random.default_rng(truth.index), COUNT, LENGTH)
    frames = [_newest(truth, found.obs), _newest(truth, found.next_obs)]
    for name in ("action", "reward", "terminated", "truncated", "first", "mask"):
        if (shape := getattr(found, name).shape) != (LENGTH, COUNT):
            yield error("shape", f"{name} of sequences is {shape}, expected {(LENGTH, COUNT)}: rows in time, sequences")
            return
    mask = np.asarray(found.mask)
    if not mask[0].all() or (mask[1:] & ~mask[:-1]).any():
        yield error("sequence-mask", "the mask of a sequence is False before its end",
                    "True for each row that is one, from row 0 on; False for all beyond")  # fmt: skip
        return
    t, env = np.rint(frames[0][..., 0]).astype(int) - 1, np.rint(frames[0][..., 1]).astype(int) - 1
    known = (env >= 0) & (env < ENVS) & (t >= 0)
    t, env = np.where(known, t, 0), np.where(known, env, 0)
    known &= t < truth.time[env]
    for wrong in (
        _torn(truth, found, frames, t, env, mask, known), _order(truth, t, env, mask), _begins(truth, found, t, env, mask),
    ):  # fmt: skip
        if wrong is not None:
            yield wrong
            return
    yield from _short(truth, t, env, mask)


def _newest(truth: Truth, leaves: Any) -> Array:
    """The newest frames [L, N, …] of observations."""
    (leaf,) = on_host(leaves).values()
    return truth.newest(leaf.reshape(-1, *leaf.shape[2:])).reshape(*leaf.shape[:2], -1)


def _at(wrong: Array) -> tuple[int, int]:
    """(row, sequence) of the first of those that are wrong [L, N]."""
    row, column = np.argwhere(wrong)[0].tolist()
    return row, column


def _torn(
    truth: Truth, found: Any, frames: list[Array], t: Array, env: Array, mask: Array, known: Array
) -> Finding | None:
    """Rows that are none that were added."""
    kind = np.where(truth.ended[t, env], FINAL, 1.0)
    same = known & (frames[0] == _shown(t, env, np.ones(t.shape))).all(-1) & (frames[1] == _shown(t + 1, env, kind)).all(-1)
    same &= (found.action == action_of(env, t, time=0)) & np.isclose(found.reward, truth.reward[t, env], rtol=1e-4)
    valid = truth.valid[t, env]
    for name in ("terminated", "truncated"):
        same &= getattr(found, name) == getattr(truth, name)[t, env]
    if (wrong := mask & ~same & (valid | ~known)).any():
        told = f"row {_at(wrong)[0]} of a sequence is none that was added: numbers of different steps"
        return error("torn", told, "take obs, action, reward, ends and next_obs from one place")
    if (wrong := mask & ~valid).any():
        return error("not-valid", f"row {_at(wrong)[0]} of a sequence is no transition", "end sequences before such a row")
    return None


def _shown(t: Array, env: Array, kind: Array) -> Array:
    frames = [shown(*numbers) for numbers in zip(t.flat, env.flat, kind.flat, strict=True)]
    return np.stack(frames).reshape(*t.shape, -1)


def _order(truth: Truth, t: Array, env: Array, mask: Array) -> Finding | None:
    """Rows that did not happen after the one before."""
    wrong = mask[1:] & ((t[1:] != t[:-1] + 1) | (env[1:] != env[:-1]))
    if not wrong.any():
        return None
    row, n = _at(wrong)
    told = f"in a sequence time {t[row, n]} of environment {env[row, n]} is followed by time {t[row + 1, n]}"
    told += f" of environment {env[row + 1, n]}"
    if t[row, n] + 1 == truth.time[env[row, n]]:
        return error("sequence-order", told, "end sequences at the newest row: beyond it lie the oldest")
    return error("sequence-order", told, "go by rollout.envs, and end sequences where the next row is not the next step")


def _begins(truth: Truth, found: Any, t: Array, env: Array, mask: Array) -> Finding | None:
    """Ends of episodes that are passed without telling, and beginnings that are none."""
    begins = (t == 0) | truth.ended[np.maximum(t - 1, 0), env]
    wrong = mask & (found.first != begins)
    if not wrong.any():
        return None
    row, n = _at(wrong)
    if begins[row, n]:
        return error("sequence-first", f"an episode begins with row {row} of a sequence, and `first` is False there",
                     "True wherever nothing may be carried over from the row before")  # fmt: skip
    return error("sequence-first", f"`first` is True at row {row} of a sequence, in the middle of an episode",
                 "row 0 of a sequence is no begin, unless an episode begins there")  # fmt: skip


def _short(truth: Truth, t: Array, env: Array, mask: Array) -> Iterator[Finding]:
    """Sequences that end though the next step is held, too."""
    last = mask.sum(0) - 1
    t, env = (np.take_along_axis(x, last[None], 0)[0] for x in (t, env))
    cut = (last < LENGTH - 1) & (t + 1 < truth.time[env]) & ~truth.given_up[t, env]
    cut &= truth.valid[np.minimum(t + 1, len(truth.valid) - 1), env]
    if cut.any():
        told = f"{np.count_nonzero(cut)} of {COUNT} sequences end before the step that came next"
        yield warning("sequence-short", told, "right if it is meant: else go on, over ends of episodes, too")
