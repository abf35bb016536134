"""Where a group's open episodes are: enough to bring them back exactly after a worker's death or a resume."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from aiorl.segments import Array, Segment


@dataclass(frozen=True)
class GroupCursor:
    """The state of a group between two segments; `n` is the number of its environments.

    `episodes` [n] int64 is the index of each environment's open episode (0, 1, …) and `actions` the stored actions
    taken in it so far, one array [t, …] for each environment. `done` [n] bool: the last row ended an episode and the
    reset is still to come, in a row of its own (NEXT_STEP vector environments). `obs`, leaves [n, …], is what the
    environments showed last; it is compared after restoring, unless it is empty. `env_state` is a native vector
    environment's state, b"" otherwise. `policy_state`, [n, …] each, is what a recurrent policy remembers, by name.
    """

    episodes: Array
    actions: tuple[Array, ...]
    done: Array
    obs: dict[str, Array]
    env_state: bytes
    policy_state: dict[str, Array] = field(default_factory=dict[str, Array])

    @property
    def first(self) -> Array:
        """[n] bool: an episode begins with the next step."""
        return np.array([len(a) == 0 for a in self.actions]) & ~self.done


def advance(cursor: GroupCursor | None, segment: Segment, steps: int | None = None) -> GroupCursor:
    """The cursor after the first `steps` rows of `segment` (default: all), given the one before it (None at the start).

    Everything is copied, so the segment's slot may be given back.
    """
    steps = segment.steps if steps is None else steps
    columns = {name: segment.columns[name][:steps] for name in ("action", "terminated", "truncated", "valid")}
    ended = columns["terminated"] | columns["truncated"]
    actions: list[Array] = []
    aborted = segment.aborted
    for env in range(segment.envs):
        ends = np.flatnonzero(ended[:, env])
        begin = int(ends[-1]) + 1 if len(ends) else 0
        taken = columns["action"][begin:, env][columns["valid"][begin:, env]]
        if cursor is not None and not len(ends) and not aborted[env]:
            taken = np.concatenate([cursor.actions[env], taken])
        actions.append(taken)
    episodes = ended.sum(axis=0) + aborted  # an aborted episode is over too
    done = ended[-1].copy()
    reset_at = segment.final_at[: segment.finals]
    done[reset_at[reset_at // segment.envs == steps - 1] % segment.envs] = False
    return GroupCursor(
        episodes=episodes if cursor is None else cursor.episodes + episodes,
        actions=tuple(actions),
        done=done,
        obs={name: leaf[steps].copy() for name, leaf in segment.obs.items()},
        env_state=segment.env_state,
        policy_state={name: leaf.copy() for name, leaf in segment.policy_state.items()},
    )
