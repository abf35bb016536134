"""What must not pass unnoticed in an update, though it stops nothing: each is said once until it has been right again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from aiorl.envs.spaces import Leaf, Spaces
from aiorl.segments import Segment


class Alarms:
    """The messages of one run. `update` is called after each update, with everything in order or not."""

    def __init__(self, spaces: Spaces) -> None:
        self._boxes = [leaf for leaf in spaces.observation if leaf.kind == "box" and leaf.size]
        self._on: set[str] = set()

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

        `metrics` with `gradient_steps`; `grad_norm` and `learning_rate` count if they are there. An update of no gradient
        steps, or at a learning rate of 0 (the end of an annealed run), has nothing to change.
        """
        steps, rate = int(metrics["gradient_steps"]), metrics.get("learning_rate")
        learned = steps > 0 and rate != 0
        not_finite = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
        at = "" if rate is None else f" at learning rate {rate:.4g}"
        wrong = {
            "skipped": skipped and f"update {rollout} was skipped, its weights are those of before: {_one_line(skipped)}",
            "zeros": all_zero(self._boxes, segments) and f"every observation of rollout {rollout} is 0",
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


def all_zero(boxes: Sequence[Leaf], segments: Sequence[Segment]) -> bool:
    """Whether all that is observed in numbers is 0 in all rows. Usually the first row tells."""
    if not boxes:
        return False
    return not any(row.any() for segment in segments for leaf in boxes for row in segment.obs[leaf.name])


def _one_line(text: str) -> str:
    return " ".join(text.split())
