"""What must not pass unnoticed in an update, though it stops nothing: each is said once until it has been right again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from aiorl.envs.spaces import Bounds, Leaf, Spaces
from aiorl.ledger import NOT_FINITE, Aborted
from aiorl.segments import Array, Rollout, Segment

SPAN_STEPS = 1000  # env steps after which a number should have moved
ROUNDING, SPAN = 2.0**-40, 2.0**-22  # of its size: what may be arithmetic's, and what float32 has but four numbers for


class Spans:
    """How far the observations of a run lie apart in boxes of more digits than float32, which is what networks see."""

    def __init__(self, boxes: Sequence[Leaf]) -> None:
        self._names = [leaf.name for leaf in boxes if not np.can_cast(leaf.dtype, np.float32)]
        self._extremes: dict[str, tuple[Array, Array]] = {}
        self._steps = 0

    def take_in(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._steps += segment.steps * segment.envs
            for name in self._names:
                rows = segment.obs[name]
                low, high = rows.min((0, 1)), rows.max((0, 1))
                lowest, highest = self._extremes.get(name, (low, high))
                self._extremes[name] = np.minimum(lowest, low), np.maximum(highest, high)

    def lost(self) -> str:
        """What is said of a number that is another one each time, and to networks the same; "" if there is none."""
        if self._steps < SPAN_STEPS:
            return ""
        for name, (low, high) in self._extremes.items():
            with np.errstate(all="ignore"):
                span, size = (high - low).astype(np.float64), np.maximum(abs(low), abs(high)).astype(np.float64)
                found = np.argwhere((span > size * ROUNDING) & (span < size * SPAN))
            if len(found):
                at = tuple(found[0].tolist())
                return (
                    f"{name}{list(at) if at else ''} is between {low[at]} and {high[at]}, which float32, what networks see, "
                    "hardly tells apart: subtract an offset in the environment"
                )
        return ""


class Alarms:
    """The messages of one run. `update` is called after each update, with everything in order or not."""

    def __init__(self, spaces: Spaces, bounds: Mapping[str, Bounds] | None = None) -> None:
        """`bounds` are those that the environment declares (see `aiorl.envs.spaces.bounds_of`)."""
        self._boxes = [leaf for leaf in spaces.observation if leaf.kind == "box" and leaf.size]
        self._spans = Spans(self._boxes)
        self._on: set[str] = set()
        self._bounds = dict(bounds or {})
        self._outside: set[tuple[str, int]] = set()  # leaf and environment that have been told of

    def outside(self, rollout: Rollout) -> list[str]:
        """New messages on what was observed outside of its declared bounds, once for each leaf and environment."""
        found: list[str] = []
        for name, bounds in self._bounds.items():
            strays = dict[int, str]()  # what is wrong with each environment
            first = 0
            for segment in rollout.segments:
                envs = rollout.envs[first : first + segment.envs].tolist()
                first += segment.envs
                if any((name, env) not in self._outside for env in envs):
                    strays |= {envs[i]: what for i, what in outside_of(bounds, segment, name).items()}
            new = [env for env in strays if (name, env) not in self._outside]
            self._outside.update((name, env) for env in new)
            if new:
                others = f", as are others of environments {', '.join(map(str, new[1:]))}" if new[1:] else ""
                found.append(f"{name} of environment {new[0]} is {strays[new[0]]}; it is stored as it is{others}")
        return found

    def update(
        self,
        rollout: int,
        segments: Sequence[Segment],
        metrics: Mapping[str, float],
        *,
        changed: bool,
        skipped: str | None,
    ) -> list[str]:
        """New messages. `changed`: the weights are not those of before; `skipped`: why the update did nothing at all.

        `metrics` with `gradient_steps`; `grad_norm`, `learning_rate`, and `q_max` and `q_min` with the `q_limit` that
        rewards set them, count if they are there. An update of no gradient
        steps, or at a learning rate of 0 (the end of an annealed run), has nothing to change.
        """
        steps, rate = int(metrics["gradient_steps"]), metrics.get("learning_rate")
        learned = steps > 0 and rate != 0
        self._spans.take_in(segments)
        not_finite = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
        at = "" if rate is None else f" at learning rate {rate:.4g}"
        wrong = {
            "skipped": skipped and f"update {rollout} was skipped, its weights are those of before: {_one_line(skipped)}",
            "zeros": all_zero(self._boxes, segments) and f"every observation of rollout {rollout} is 0",
            "span": self._spans.lost(),
            "values": explodes(rollout, metrics),
            "not finite": not_finite and f"update {rollout} reports {', '.join(not_finite)}",
            "no gradient": learned
            and metrics.get("grad_norm") == 0
            and f"the gradient of update {rollout} is 0 in all {steps} gradient steps",
            "no change": learned
            and not changed
            and f"update {rollout} changed no weights, with {steps} gradient steps{at}",
        }
        found = [message for kind, message in wrong.items() if message and kind not in self._on]
        # An update without gradient steps says nothing about what gradients do.
        unknown = set[str]() if learned or skipped else {"no gradient", "no change"}
        self._on = {kind for kind, message in wrong.items() if message} | (self._on & unknown)
        return found


def blame(aborted: Aborted, log: str) -> str:
    """What is wrong with an environment whose episode had to be given up; `log` is where to find more."""
    gone = f"its episode {aborted.episode} is aborted after {aborted.length} steps"
    if aborted.reason == NOT_FINITE:
        return f"environment {aborted.env} returned NaN or infinity: {gone} and that step is dropped{log}"
    return (
        f"environment {aborted.env} does not reproduce: {gone}, exactness is waived{log}; "
        "draw all chance from the generator that reset(seed=…) seeds"
    )


def explodes(rollout: int, metrics: Mapping[str, float]) -> str:
    """What is said of action values that no rewards so far can make up for; "" if they are in bounds or unknown."""
    limit = metrics.get("q_limit", math.inf)
    lowest, highest = metrics.get("q_min", 0.0), metrics.get("q_max", 0.0)
    if max(-lowest, highest) <= limit:
        return ""
    told = f"the values of update {rollout} explode: from {lowest:.4g} to {highest:.4g}, rewards allow {limit:.4g}"
    return f"{told}; lower learning_rate or reward_scale, or update the target more slowly"


def outside_of(bounds: Bounds, segment: Segment, name: str) -> dict[int, str]:
    """The first value outside of the bounds, and these, by column of the segment. Usually the extremes tell that there is
    none."""
    found: dict[int, str] = {}
    finals = segment.final_obs[name][: segment.finals]
    for rows, column in ((segment.obs[name], None), (finals, segment.final_at[: segment.finals] % segment.envs)):
        axes = (0, 1) if column is None else (0,)
        if not len(rows) or bounds.hold(rows.min(axes), rows.max(axes)):
            continue
        wrong = (rows < bounds.low) | (rows > bounds.high)
        for env in range(segment.envs):
            mine = np.nonzero(wrong[:, env] if column is None else wrong[column == env])
            if len(mine[0]) and env not in found:
                _, *place = (int(index[0]) for index in mine)
                value = (rows[:, env] if column is None else rows[column == env])[mine][0]
                within = f"[{bounds.low[tuple(place)]:g}, {bounds.high[tuple(place)]:g}]"
                found[env] = f"{value:g}, outside of its declared bounds {within}"
    return found


def all_zero(boxes: Sequence[Leaf], segments: Sequence[Segment]) -> bool:
    """Whether all that is observed in numbers is 0 in all rows. Usually the first row tells."""
    if not boxes:
        return False
    return not any(row.any() for segment in segments for leaf in boxes for row in segment.obs[leaf.name])


def _one_line(text: str) -> str:
    return " ".join(text.split())
