"""Quantile regression DQN: the distribution of returns as quantiles of equal weight (Dabney et al. 2018, arXiv 1710.10044).

Departures: by default fewer quantiles, a larger learning rate and a smaller Adam epsilon, for small environments (the paper
has 200, 5e-5 and 3.125e-4); `update_ratio` gradient steps for each env step stored after warm-up, exactly, done rollout by
rollout; epsilon is a function of the rollout index, also during warm-up, which is no phase of random actions. What the paper
does not have is off by default: the online network chooses the next action (`double`), n-step returns, clipped gradients,
priorities (by the difference of the means; Schaul et al. 2016, 1511.05952), a mean network that is evaluated (`average`).

Which version acted does not matter to one-step targets, so any staleness is sound. n-step returns (`n_step` > 1) depend on
the actions of the version that acted, and are corrected neither for that nor for the age of what is in the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from aiorl.algos.base import LearnerContext
from aiorl.algos.dqn import DQNLearner, Fit, Goal, QSettings
from aiorl.algos.practice import Positive
from aiorl.envs.spaces import Spaces
from aiorl.lazy import LazyModule
from aiorl.segments import Array

if TYPE_CHECKING:
    from aiorl import losses
else:
    losses = LazyModule("aiorl.losses")


class QRDQN(QSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of QR-DQN."""

    name: ClassVar[str] = "qrdqn"

    quantiles: Annotated[int, Meta(description="of the return of each action", ge=1)] = 32
    kappa: Annotated[Positive, Meta(description="error from which the loss grows linearly")] = 1.0
    double: Annotated[bool, Meta(description="let the online network choose the next action")] = False

    def learner(self, spaces: Spaces, context: LearnerContext) -> DQNLearner:
        return DQNLearner(self, spaces, context, Quantiles(self.quantiles, self.kappa))


@dataclass(frozen=True)
class Quantiles:
    """Outputs are, for one action after the other, the quantiles of its return; their mean is its value."""

    width: int
    kappa: float

    def _of(self, outputs: losses.Values) -> losses.Values:
        """[N, A * width] as [N, A, width]."""
        return outputs.reshape(len(outputs), -1, self.width)

    def values(self, outputs: losses.Values) -> losses.Values:
        return self._of(outputs).mean(2)

    def fit(self, outputs: losses.Values, goal: Goal) -> Fit:
        every = self._of(outputs)
        online = None if goal.next_online is None else self._of(goal.next_online)
        targets = losses.quantile_targets(goal.returns, goal.discounts, self._of(goal.next_target), online)
        quantiles = losses.choose(every, goal.action)
        loss, slope = losses.quantile_huber(quantiles, targets, self.kappa, goal.weight)
        slope = losses.spread(slope, goal.action, every).reshape(outputs.shape)
        return Fit(loss, slope, quantiles.mean(1) - targets.mean(1), targets.mean())

    def acting(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The last layer has no activation, so its mean over the quantiles gives theirs: workers need no more."""
        heads = {name: array for name, array in arrays.items() if name.startswith("advantage.")}
        means = {name: array.reshape(-1, self.width, *array.shape[1:]).mean(1) for name, array in heads.items()}
        return arrays | means
