"""`off_policy_degree = -1`: the degree is tuned while the run goes on, from what its updates measure.

The smallest degree is sought whose predicted speed is within 2 % of the best and whose off-policy error keeps to its target.

    supply     The measured times of the last 256 updates are replayed through the pipeline's recurrence under every degree:
               what each would have made of the same work. Nothing has to be tried out to know.
    error      The error of a rollout grows with its lag, so one number, its slope kappa, says which degrees keep to the
               target: kappa x degree <= target. The bound is that of the oldest rollouts admitted, not of the average one.
    alarm      A median clip fraction above 0.4, or a gradient norm above 3 times that at lower lag, lowers by one: such
               signs come before some collapses that the error does not announce.
    rollback   On few cores overlap itself slows both sides, which no replay of earlier times can foresee. So a raise is on
               trial: if it does not bring half of its predicted gain in measured speed, it is undone. That is how 0 is
               reached. A raise from 0 waits until that gain can be told from noise; there is no trial where it cannot be.

Nothing oscillates. Supply raises from below 97 % of the best until 98 % and lowers to what reached 99 % throughout 256
updates. The error's slope counts at its upper edge (two standard errors) for a raise and at its lower edge for a
lowering. And a degree that was left by error, alarm or rollback is barred for a time that doubles at each repetition; at
degree 0, where there is no lag to measure, the end of that time is what allows another try.

Both sides' times change with the degree where they contend for cores. The ratios between degrees of 1 and more do not: they
overlap alike. Between 0 and 1 they do, and there the measured speed decides, against a prediction made before the raise.

Begin at degree 0: what overlap costs can only be seen by coming from there. The constants were chosen by simulation, with
lognormal times of a coefficient of variation of 0.53; tests/test_tuning.py repeats the judgement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard

import msgspec
from msgspec import Meta

from aiorl.errors import ConfigError

WINDOW = 256  # updates whose times are replayed
EVALUATE_EVERY = 16  # updates between two replays, which take about half a millisecond
FIRST = 16  # updates before the first decision
DWELL = 32  # updates between a change and the next raise, and of a median
RAISE_BELOW, RAISE_TO = 0.97, 0.98  # of the best predicted speed: raises begin below the one and end at the other
ENOUGH = 0.99  # of the best predicted speed: what a lower degree must reach, at every replay of a whole window
ENOUGH_KEPT = WINDOW // EVALUATE_EVERY
ERRORS_MIN = 8  # lagged rollouts at this degree before their error may lower it …
ERRORS_KEPT = 64  # … and the most that the slope is fitted to
EDGE = 2.0  # standard errors, for the slope of the error
PREPARED = 3.5  # standard errors that a predicted gain should stand out by, before it is put on trial …
JUDGED = 2.5  # … and must, to be judged in the end
PASSED = 0.5  # standard errors beyond half of the gain that pass a trial
DOUBT, DOUBT_AT_END = 3.0, 1.5  # standard errors short of half of the gain that fail it, at once and in the end
CLIP_FRACTION_MAX = 0.4
NORM_RATIO_MAX = 3.0
PREPARE_UPDATES = 128  # after which a raise from 0 no longer waits to be prepared
TRIAL_UPDATES = 256  # the longest trial
BARRED_UPDATES = {"error": 256, "alarm": 256, "rollback": 512}  # the first time
BARRED_UPDATES_MAX = 2**20
_CEILING = 1e9  # of any measured value: sums of them stay finite
_INSTANT_S = 1e-9

Reason = Literal["supply", "error", "alarm", "rollback"]


class Measured(NamedTuple):
    """What one update measured. Times are of work alone, without waits; `interval_s` is without pauses.

    `staleness` is k - b_k of its rollout, `collect_s` the longest worker's time to collect it, `train_s` the update's,
    `interval_s` the time since the previous update's end. `error` is the rollout's off-policy error as the update began:
    rms of log pi_now - log b, or for value learners the share of actions that differ. None: the learner cannot tell.
    """

    staleness: int
    collect_s: float
    train_s: float
    interval_s: float
    error: float | None
    clip_fraction: float | None
    grad_norm: float | None


class Decision(NamedTuple):
    """The degree changes from `before` to `degree`, because of what `reason` names; `detail` says it with the numbers.

    `throughput`: predicted updates per second of each degree. `error_per_lag`: the slope kappa, None if not yet known.
    """

    degree: int
    before: int
    reason: Reason
    detail: str
    throughput: dict[int, float]
    error_per_lag: float | None


def predict_throughput(collect_s: Sequence[float], train_s: Sequence[float], degree: int) -> float:
    """Updates per second if rollouts that take `collect_s` and updates that take `train_s` ran under `degree`.

    The exact recurrence of the pipeline: rollout k is admitted at A_k = max(C_{k-1}, F_{k-degree-1}), collected at
    C_k = A_k + c_k, learned from at F_k = max(C_k, F_{k-1}) + t_k. 0 if there are none.
    """
    finished_s = [0.0] * (degree + 1)  # of the last degree + 1 updates: F_{k-degree-1} stands where F_k will
    collected = finished = 0.0
    for k, (collect, train) in enumerate(zip(collect_s, train_s, strict=True)):
        place = k % (degree + 1)
        collected = max(collected, finished_s[place]) + collect
        finished_s[place] = finished = max(collected, finished) + train
    return len(collect_s) / max(finished, _INSTANT_S)


def legacy_degree(buffer_size: int, batch_size: int) -> int:
    """A tenth of the buffer in batches, at least 1: what an earlier tuner of this kind chose, once, without measuring.

    Kept to compare with. It is often far beyond what brings speed: 10000 transitions in batches of 32 give 31.
    """
    return max(1, buffer_size // batch_size // 10)


class Trial(msgspec.Struct):
    """A raise that is being judged: measured seconds per update before it, their standard error, the gain predicted."""

    interval_s: float
    deviation_s: float
    gain: float

    @property
    def half_s(self) -> float:
        """Seconds per update at half of the predicted gain: what must be reached."""
        return self.interval_s / (1 + self.gain / 2)

    @property
    def margin_s(self) -> float:
        """By how much the predicted gain surpasses that half."""
        return self.half_s - self.interval_s / (1 + self.gain)


class State(msgspec.Struct, forbid_unknown_fields=True):
    """All that the tuner knows. Lists hold the newest last; those after `since` begin anew when the degree changes."""

    degree: int
    barred_until: list[int]  # of each degree: it is not raised to before this update …
    barred_updates: list[int]  # … which is this many after it was left; 0 once it has done well
    norms: list[list[float]]  # gradient norms by staleness, the last `WINDOW` of each
    times: list[tuple[float, float]] = []  # (collect_s, train_s)
    updates: int = 0
    kappa: float | None = None
    trial: Trial | None = None
    enough: list[int] = []  # the smallest degree that was enough in each replay of the last `WINDOW` updates
    climbing: bool = False
    since: int = 0  # updates at this degree
    settling: int = 0  # updates whose interval still belongs to the change
    intervals_s: list[float] = []
    errors: list[tuple[Annotated[int, Meta(ge=1)], float]] = []  # (lag, error), lag >= 1
    clips: list[float] = []
    recent_norms: list[float] = []


class Tuner:
    """Chooses `degree` in 0..degree_max. Reads no clock: what it decides follows from what it has observed alone."""

    def __init__(self, *, degree: int, degree_max: int, error_target: float) -> None:
        """Begin at `degree`. Raises ConfigError for a degree beyond `degree_max` or a target that is not above 0."""
        if not 0 <= degree <= degree_max:
            raise ConfigError(f"off_policy_degree = {degree} to begin with: expected 0 to {degree_max}")
        if not 0 < error_target < math.inf:
            raise ConfigError(f"error_target = {error_target}: expected a number above 0")
        self.degree_max, self.error_target = degree_max, error_target
        count = degree_max + 1
        self._state = State(degree, [0] * count, [0] * count, [[] for _ in range(count)])

    @property
    def degree(self) -> int:
        return self._state.degree

    def observe(self, measured: Measured) -> Decision | None:
        """Take in one update. Returns a decision only if the degree changes; it holds from the next rollout on."""
        self._record(measured)
        return self._error_too_large() or self._alarmed() or self._trial_failed() or self._supply()

    def state_dict(self) -> dict[str, Any]:
        """Plain tables, lists and numbers."""
        return msgspec.to_builtins(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. ValueError for anything else, or if it was saved under another `degree_max`."""
        loaded = msgspec.convert(state, State)
        sizes = {len(loaded.barred_until), len(loaded.barred_updates), len(loaded.norms)}
        if sizes != {self.degree_max + 1} or not 0 <= loaded.degree <= self.degree_max:
            raise ValueError(f"the tuner's state does not fit degrees 0 to {self.degree_max}")
        self._state = loaded

    def _record(self, measured: Measured) -> None:
        state = self._state
        state.updates += 1
        state.since += 1
        _push(state.times, (_bounded(measured.collect_s), _bounded(measured.train_s)), WINDOW)
        if state.since > state.settling:
            _push(state.intervals_s, _bounded(measured.interval_s), WINDOW)
        if measured.staleness >= 1 and _known(measured.error):
            _push(state.errors, (measured.staleness, _bounded(measured.error)), ERRORS_KEPT)
        if _known(measured.clip_fraction):
            _push(state.clips, _bounded(measured.clip_fraction), DWELL)
        if _known(measured.grad_norm):
            norm = _bounded(measured.grad_norm)
            _push(state.recent_norms, norm, DWELL)
            _push(state.norms[min(max(measured.staleness, 0), self.degree_max)], norm, WINDOW)
        if state.since > state.barred_updates[state.degree]:
            state.barred_updates[state.degree] = 0  # it has done well for as long as it was barred

    # -- reasons to lower ------------------------------------------------------------------------------------------

    def _error_too_large(self) -> Decision | None:
        state, target = self._state, self.error_target
        if state.degree == 0:
            return None
        if len(state.errors) < ERRORS_MIN:
            if state.degree == 1 or state.since < DWELL or state.errors:
                return None
            return self._change(1, "error", "The learner reports no off-policy error, so the degree must not exceed 1")
        state.kappa, deviation = _slope(state.errors)
        edge = state.kappa - EDGE * deviation
        if edge * state.degree <= target:
            return None
        # Not to 0 at one go: the slope seen at large lags may be steeper than that at lag 1, which can then be measured.
        allowed = max((d for d in range(state.degree) if state.kappa * d <= target), default=0)
        lower = max(allowed, min(1, state.degree - 1))
        return self._change(
            lower, "error", f"The off-policy error is {state.kappa:.3g} per update of lag, so degree {state.degree} would "
            f"exceed the target of {target:.3g}"
        )  # fmt: skip

    def _alarmed(self) -> Decision | None:
        state = self._state
        if state.degree == 0 or state.updates % EVALUATE_EVERY:
            return None
        if len(state.clips) >= DWELL and (clip := median(state.clips)) > CLIP_FRACTION_MAX:
            told = f"The median clip fraction is {clip:.2f}, above {CLIP_FRACTION_MAX}"
            return self._change(state.degree - 1, "alarm", told)
        earlier = [norm for norms in state.norms[: state.degree] for norm in norms]
        if len(state.recent_norms) >= DWELL and len(earlier) >= FIRST:
            norm, usual = median(state.recent_norms), median(earlier)
            if norm > NORM_RATIO_MAX * usual:
                told = f"The median gradient norm is {norm:.3g}, above {NORM_RATIO_MAX:g} times the {usual:.3g} of lower lag"
                return self._change(state.degree - 1, "alarm", told)
        return None

    def _trial_failed(self) -> Decision | None:
        """Undo a raise whose measured gain is less than half of the predicted one: once beyond doubt, or in the end."""
        state, trial = self._state, self._state.trial
        if trial is None or len(state.intervals_s) < DWELL:
            return None
        interval_s, doubt_s = self._measured_against(trial)
        over = state.since >= TRIAL_UPDATES
        late = (interval_s - trial.half_s) / max(doubt_s, _INSTANT_S)  # in standard errors
        if late > DOUBT or (over and late > DOUBT_AT_END and trial.margin_s > JUDGED * doubt_s):
            before, after = 1 / max(trial.interval_s, _INSTANT_S), 1 / max(interval_s, _INSTANT_S)
            told = f"Degree {state.degree} makes {after:.3g} updates per second, degree {state.degree - 1} made {before:.3g}"
            return self._change(
                state.degree - 1, "rollback", f"{told}, and {before * (1 + trial.gain):.3g} were expected"
            )
        if over or late < -PASSED:
            state.trial = None
        return None

    # -- supply ----------------------------------------------------------------------------------------------------

    def _supply(self) -> Decision | None:
        state = self._state
        if state.updates < FIRST or state.updates % EVALUATE_EVERY:
            return None
        speeds = self._speeds()
        best, reached = max(speeds), speeds[state.degree]
        _push(state.enough, next(d for d, speed in enumerate(speeds) if speed >= ENOUGH * best), ENOUGH_KEPT)
        state.climbing = reached < (RAISE_TO if state.climbing else RAISE_BELOW) * best
        told = f"Degree {state.degree} is predicted to reach {reached / best:.0%} of the best speed"
        if state.climbing and self._may_raise(speeds):
            return self._change(state.degree + 1, "supply", told, speeds)
        if len(state.enough) == ENOUGH_KEPT and (enough := max(state.enough)) < state.degree:
            return self._change(enough, "supply", f"{told}, degree {enough} {speeds[enough] / best:.0%}", speeds)
        return None

    def _may_raise(self, speeds: list[float]) -> bool:
        """Whether error, bars and an open trial leave room for one degree more."""
        state = self._state
        if state.since < (FIRST if state.since == state.updates else DWELL):
            return False
        if state.trial is not None or state.updates < state.barred_until[state.degree + 1]:
            return False
        if state.degree == 0:  # no lag is seen here: only a try can tell the error at 1
            return state.since >= PREPARE_UPDATES or self._trial_of(1, speeds, PREPARED) is not None
        if len(state.errors) < FIRST:
            return False
        kappa, deviation = _slope(state.errors)
        return (kappa + EDGE * deviation) * (state.degree + 1) <= self.error_target

    def _speeds(self) -> list[float]:
        """Predicted updates per second of each degree."""
        collect_s, train_s = zip(*self._state.times, strict=True)
        return [predict_throughput(collect_s, train_s, degree) for degree in range(self.degree_max + 1)]

    def _trial_of(self, degree: int, speeds: list[float], stands_out: float) -> Trial | None:
        """The trial of a raise to `degree` now; None if its gain could not be told from the noise of this degree's speed."""
        if len(self._state.intervals_s) < EVALUATE_EVERY // 2:
            return None
        trial = Trial(*_typical(self._state.intervals_s), speeds[degree] / speeds[self.degree] - 1)
        return trial if trial.margin_s > stands_out * trial.deviation_s / (1 + trial.gain / 2) else None

    def _measured_against(self, trial: Trial) -> tuple[float, float]:
        """(Seconds per update at this degree, standard error of their difference from `trial.half_s`)."""
        interval_s, deviation_s = _typical(self._state.intervals_s)
        return interval_s, math.hypot(deviation_s, trial.deviation_s / (1 + trial.gain / 2))

    def _change(self, degree: int, reason: Reason, detail: str, speeds: list[float] | None = None) -> Decision:
        """Go over to `degree`; what was measured at the former one is forgotten where it no longer applies."""
        state, before = self._state, self._state.degree
        speeds = speeds or self._speeds()
        state.trial = None
        if reason in BARRED_UPDATES:
            barred = min(max(BARRED_UPDATES[reason], 2 * state.barred_updates[degree + 1]), BARRED_UPDATES_MAX)
            state.barred_updates[degree + 1] = barred
            state.barred_until[degree + 1] = state.updates + barred
        elif degree > before:
            state.trial = self._trial_of(degree, speeds, PREPARED if before else JUDGED)
        state.degree, state.since, state.settling = degree, 0, before + degree + 1
        state.intervals_s, state.errors, state.clips, state.recent_norms = [], [], [], []
        verb = "raised" if degree > before else "lowered"
        told = f"{detail}: {verb} from {before} to {degree}."
        return Decision(degree, before, reason, told, dict(enumerate(speeds)), state.kappa)


def _push(values: list[Any], value: Any, most: int) -> None:
    """Append, and keep the newest `most`."""
    values.append(value)
    del values[:-most]


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _bounded(value: float) -> float:
    return min(max(float(value), 0.0), _CEILING)


def _slope(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(kappa, its standard error) of error = kappa * lag, by least squares through the origin, for two points or more."""
    weight = sum(lag * lag for lag, _ in points)
    kappa = sum(lag * error for lag, error in points) / weight
    rest = sum((error - kappa * lag) ** 2 for lag, error in points)
    return kappa, math.sqrt(rest / (len(points) - 1) / weight)


def _typical(values: Sequence[float]) -> tuple[float, float]:
    """(Mean, its standard error) without the largest sixteenth: a hiccup of the machine must not decide."""
    kept = sorted(values)[: len(values) - len(values) // 16]
    mean = sum(kept) / len(kept)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in kept) / (len(kept) - 1) / len(kept))
