"""Giving up an episode in which an environment returned NaN or infinity, instead of the run.

The step that did so is no transition. Its row is *spent*: not valid, and marked as truncated, which a row that is not valid
means nothing else by (see `aiorl.segments`). The row after it begins the environment's next episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from aiorl.envs.contract import all_finite
from aiorl.errors import EnvError
from aiorl.segments import Array, Segment


def untold(_: str) -> None:
    """Tell nobody."""


class Aborts:
    """Looks for NaN and infinity in what the environments `envs` return, row by row.

    No environment may do that in more than `limit` episodes in a row. `tell` gets a line for each.
    """

    def __init__(self, envs: range, limit: int, tell: Callable[[str], None] = untold) -> None:
        self._envs, self._limit, self._tell = envs, limit, tell
        self._in_a_row = np.zeros(len(envs), np.int64)

    def start(self, rows: Sequence[Array], i: int, episode: int) -> bool:
        """Whether environment `i` begins `episode` with finite numbers, which lie at place `i` of `rows`, one array [n, …]
        for each leaf. Raises EnvError if it has failed to too often."""
        bad = next((row[i] for row in rows if not all_finite(row[i])), None)
        if bad is not None:
            self._count(i, f"environment {self._envs[i]}, reset for episode {episode}: the observation is {_first(bad)}")
        return bad is None

    def spend(self, segment: Segment, t: int) -> list[int]:
        """Spend row `t`, which all environments have filled, where it is not finite.

        Returns the environments that have to begin another episode: those of the spent rows that have not begun one anyway.
        Raises EnvError for one that has returned such numbers too often.
        """
        columns = segment.columns
        terminated, truncated = columns["terminated"][t], columns["truncated"][t]
        ended = terminated | truncated
        why = self._not_finite(segment, t, ended)
        for i, name in why.items():
            self._count(i, f"environment {self._envs[i]}, step {t} of the segment: {name}")
            # Nothing may follow from a spent row, so it leads back to where it began.
            _lead_back(segment, t, i)
            columns["valid"][t, i], columns["reward"][t, i] = False, 0.0
            terminated[i], truncated[i] = False, True
        self._in_a_row[ended & columns["valid"][t]] = 0
        return [i for i in why if not ended[i]]

    def _not_finite(self, segment: Segment, t: int, ended: Array) -> dict[int, str]:
        """What is not finite in row `t`, with its value, by environment."""
        reward = segment.columns["reward"][t]
        found: dict[int, str] = {}
        if not all_finite(reward):
            found = {i: f"reward is {reward[i]}" for i in np.flatnonzero(~np.isfinite(reward)).tolist()}
        for name, leaf in segment.obs.items():
            if not all_finite(leaf[t + 1]):
                wrong = [i for i in range(segment.envs) if not all_finite(leaf[t + 1, i])]
                found |= {i: f"{name} is {_first(leaf[t + 1, i])}" for i in wrong}
        if ended.any():
            for row, i in segment.finals_of(t):
                for name, leaf in segment.final_obs.items():
                    if not all_finite(leaf[row]):
                        found[i] = f"{name} is {_first(leaf[row])}"
        return found

    def _count(self, i: int, what: str) -> None:
        self._in_a_row[i] += 1
        if self._in_a_row[i] > self._limit:
            raise EnvError(
                f"{what}\n  {self._limit} of its episodes in a row were aborted for the like; it must return finite numbers "
                "(nonfinite_env_max says how many may be)"
            )
        self._tell(f"open episode aborted: {what}")


def _lead_back(segment: Segment, t: int, i: int) -> None:
    """The observation that row `t` of environment `i` led to is the one it began with."""
    last = {name: leaf[t, i] for name, leaf in segment.obs.items()}
    place = next((row for row, env in segment.finals_of(t) if env == i), None)
    if place is None:
        segment.add_final(t, i, last)
    else:
        for name, value in last.items():
            segment.final_obs[name][place] = value


def _first(values: Array) -> float:
    """The first value that is not finite."""
    return float(np.ravel(values)[np.argmax(~np.isfinite(np.ravel(values)))])
