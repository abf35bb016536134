"""The books of a run: what was stored, which episodes ended, and where each environment stands.

The ledger advances with the updates, not with arrivals, so its state after update k is exactly what a checkpoint after
update k needs: the counters, and for every environment the open episode with its actions, by which it is brought back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from aiorl.envs.cursor import GroupCursor, advance
from aiorl.pacing import Grant
from aiorl.segments import Array, Segment, SegmentLayout
from aiorl.trees import check_tree


class Episode(NamedTuple):
    """One finished episode: `total` is the sum of its stored rewards (float64), `length` its env steps."""

    env: int
    total: float
    length: int
    terminated: bool


NOT_REPRODUCED, NOT_FINITE = "not reproduced", "not finite"


class Aborted(NamedTuple):
    """An episode that was given up, of which `length` env steps are stored. `reason`: its environment could not be brought
    back, or returned NaN or infinity (and that row is dropped)."""

    env: int
    episode: int
    length: int
    reason: str = NOT_REPRODUCED


class Entries(NamedTuple):
    """What came to its end with a rollout."""

    episodes: list[Episode]
    aborted: list[Aborted]


@dataclass
class GroupBooks:
    """Where one group stands after the last update that used it. `cursor` is None before the first."""

    first_env: int
    segments: int
    totals: Array  # [n] float64, reward of the open episode so far
    lengths: Array  # [n] its env steps
    cursor: GroupCursor | None = None

    def episode(self, env: int) -> int:
        """Index of the open episode of the group's environment `env`."""
        return 0 if self.cursor is None else int(self.cursor.episodes[env])


class Ledger:
    """Books for `groups` groups of `group_size` environments each."""

    def __init__(self, groups: int, group_size: int) -> None:
        self.stored = 0
        self.episodes = 0
        self.aborted = 0
        self.recent: deque[float] = deque(maxlen=100)
        self._books = [
            GroupBooks(g * group_size, 0, np.zeros(group_size, np.float64), np.zeros(group_size, np.int64))
            for g in range(groups)
        ]

    @property
    def return_mean_100(self) -> float | None:
        """Mean return of the last 100 finished episodes."""
        return float(np.mean(self.recent)) if self.recent else None

    def store(self, parts: tuple[Grant, ...], segments: tuple[Segment, ...]) -> Entries:
        """Enter the segments of one rollout; returns the episodes that ended in it, or were aborted before it."""
        ended: list[Episode] = []
        aborted: list[Aborted] = []
        for part, segment in zip(parts, segments, strict=True):
            aborted += self._abort(self._books[part.group], segment)
            closed = self._enter(self._books[part.group], segment)
            ended += closed.episodes
            aborted += closed.aborted
        self.episodes += len(ended)
        self.aborted += len(aborted)
        self.recent.extend(e.total for e in ended)
        return Entries(ended, aborted)

    def _abort(self, books: GroupBooks, segment: Segment) -> list[Aborted]:
        """Close the open episodes that the segment does not go on with: they have no return."""
        given_up: list[Aborted] = []
        for env in np.flatnonzero(segment.aborted).tolist():
            given_up.append(Aborted(books.first_env + env, books.episode(env), int(books.lengths[env])))
            books.totals[env], books.lengths[env] = 0.0, 0
        return given_up

    def _enter(self, books: GroupBooks, segment: Segment) -> Entries:
        columns = segment.columns
        valid, reward = columns["valid"], columns["reward"]
        over = columns["terminated"] | columns["truncated"]
        entries = Entries([], [])
        for env in range(segment.envs):
            begin, number = 0, books.episode(env) + int(segment.aborted[env])
            for end in np.flatnonzero(over[:, env]).tolist():
                episode = self._close_episode(books, segment, env, begin, end + 1)
                if valid[end, env]:
                    entries.episodes.append(episode)
                else:
                    entries.aborted.append(Aborted(episode.env, number, episode.length, NOT_FINITE))
                begin, number = end + 1, number + 1
            rows = valid[begin:, env]
            books.totals[env] = _add_up(books.totals[env], reward[begin:, env][rows])
            books.lengths[env] += np.count_nonzero(rows)
        self.stored += int(np.count_nonzero(valid))
        books.segments += 1
        books.cursor = advance(books.cursor, segment)
        return entries

    def _close_episode(self, books: GroupBooks, segment: Segment, env: int, begin: int, end: int) -> Episode:
        columns = segment.columns
        rows = columns["valid"][begin:end, env]
        total = _add_up(books.totals[env], columns["reward"][begin:end, env][rows])
        length = int(books.lengths[env] + np.count_nonzero(rows))
        books.totals[env], books.lengths[env] = 0.0, 0
        return Episode(books.first_env + env, total, length, bool(columns["terminated"][end - 1, env]))

    def cursor(self, group: int) -> GroupCursor | None:
        """Where the group goes on; None if it has not begun."""
        return self._books[group].cursor

    def segments_used(self) -> list[int]:
        """How many segments of each group have been learned from."""
        return [books.segments for books in self._books]

    @property
    def rollouts(self) -> int:
        """How many rollouts have been learned from: each takes as many segments as there are groups."""
        return sum(self.segments_used()) // len(self._books)

    def state_dict(self) -> dict[str, Any]:
        """Everything above as a tree of arrays and numbers (copies)."""
        groups: dict[str, Any] = {}
        for index, books in enumerate(self._books):
            groups[str(index)] = {
                "segments": books.segments,
                "totals": books.totals.copy(),
                "lengths": books.lengths.copy(),
                "cursor": _cursor_tree(books.cursor),
            }
        return {
            "stored": self.stored,
            "episodes": self.episodes,
            "aborted": self.aborted,
            "recent": np.array(self.recent, np.float64),
            "groups": groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for a state that `check_state` lets pass."""
        self.stored, self.episodes, self.aborted = (int(state[name]) for name in ("stored", "episodes", "aborted"))
        self.recent = deque(state["recent"].tolist(), maxlen=100)
        for index, books in enumerate(self._books):
            saved = state["groups"][str(index)]
            books.segments, books.cursor = int(saved["segments"]), _cursor_from(saved["cursor"])
            books.totals, books.lengths = saved["totals"].copy(), saved["lengths"].copy()


def check_state(state: dict[str, Any], groups: int, layout: SegmentLayout) -> None:
    """Raise ValueError naming the first thing that is not as in the state of a ledger of so many groups and this layout."""
    n, action = layout.envs, layout.columns["action"]
    like = Ledger(groups, n).state_dict()
    like["recent"] = _as_long_as(state.get("recent"), np.zeros(0))
    check_tree({**state, "groups": {}}, {**like, "groups": {}}, "ledger")
    check_tree({key: None for key in state["groups"]}, {key: None for key in like["groups"]}, "ledger.groups")
    for index, books in like["groups"].items():
        where, saved = f"ledger.groups.{index}", state["groups"][index]
        check_tree({**saved, "cursor": {}}, {**books, "cursor": {}}, where)
        if cursor := saved["cursor"]:
            actions = {str(env): np.zeros((0, *action.shape), action.dtype) for env in range(n)}
            like_cursor = {
                "episodes": np.zeros(n, np.int64),
                "actions": {env: _as_long_as(cursor.get("actions", {}).get(env), like) for env, like in actions.items()},
                "done": np.zeros(n, np.bool_),
                "obs": {name: np.zeros((n, *leaf.shape), leaf.dtype) for name, leaf in layout.obs.items()},
                "env_state": _as_long_as(cursor.get("env_state"), np.zeros(0, np.uint8)),
                "policy_state": {k: np.zeros((n, *c.shape), c.dtype) for k, c in layout.policy_state.items()},
            }
            check_tree({"policy_state": {}, **cursor}, like_cursor, f"{where}.cursor")  # older ones have none


def _as_long_as(value: Any, like: Array) -> Array:
    """An array like `like`, with as many rows as `value` has."""
    rows = len(cast(Array, value)) if isinstance(value, np.ndarray) and value.ndim else 0
    return np.zeros((rows, *like.shape[1:]), like.dtype)


def _cursor_tree(cursor: GroupCursor | None) -> dict[str, Any]:
    if cursor is None:
        return {}
    return {
        "episodes": cursor.episodes.copy(),
        "actions": {str(env): actions for env, actions in enumerate(cursor.actions)},
        "done": cursor.done.copy(),
        "obs": dict(cursor.obs),
        "env_state": np.frombuffer(cursor.env_state, np.uint8).copy(),
        "policy_state": {name: leaf.copy() for name, leaf in cursor.policy_state.items()},
    }


def _cursor_from(tree: dict[str, Any]) -> GroupCursor | None:
    if not tree:
        return None
    return GroupCursor(
        episodes=tree["episodes"],
        actions=tuple(tree["actions"][str(env)] for env in range(len(tree["actions"]))),
        done=tree["done"],
        obs=tree["obs"],
        env_state=tree["env_state"].tobytes(),
        policy_state=tree.get("policy_state", {}),
    )


def _add_up(start: float, values: Array) -> float:
    """start + values[0] + values[1] + …, in that order (np.sum adds pairwise, which rounds differently). Spoils `values`."""
    if not len(values):
        return float(start)
    values[0] += start
    return float(values.cumsum()[-1])
