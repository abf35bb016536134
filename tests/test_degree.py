"""The dial: what it measures for the tuner, and how a change of degree takes effect and survives a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from aiorl.config import Config
from aiorl.degree import Dial, check_degree, first_degree
from aiorl.errors import ConfigError
from aiorl.learning import Outcome
from aiorl.pacing import Grant, Pacer, RolloutPlan
from aiorl.tuning import Measured

GROUPS = 4


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def config(degree: int = -1, **changes: Any) -> Config:
    return Config(env="CartPole-v1", envs=8, group_size=2, workers=2, off_policy_degree=degree, **changes)


def pacer(made: Config) -> Pacer:
    limit = made.degree_limit
    return Pacer(first_degree(made, {}), GROUPS, total_steps=10**6, segment_steps=10, degree_max=limit)


def plan(k: int, version: int) -> RolloutPlan:
    return RolloutPlan(k, tuple(Grant(g, k, 0, version) for g in range(GROUPS)), k)


def outcome(gradient_steps: int = 1, **metrics: float) -> Outcome:
    return Outcome(
        metrics=metrics, gradient_steps=gradient_steps, weights={}, fingerprint=0, env_steps=80, stored=80, episodes=[],
        update_seconds=0.2, segment_seconds=(0.1, 0.2, 0.3, 0.5),
    )  # fmt: skip


def spy(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """What reaches the tuner."""
    seen: list[Measured] = []
    monkeypatch.setattr(dial._tuner, "observe", seen.append)
    return seen


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = Clock(), config()
    dial = Dial(made, pacer(made), clock)
    seen = spy(dial, monkeypatch)
    dial.updated(plan(0, 0), outcome(), 5.0)
    assert not seen, "there is no earlier update to count from"
    clock.now_s += 2.0
    dial.updated(plan(1, 0), outcome(off_policy_error=0.1, clip_fraction=0.2, grad_norm=0.3), 0.5)
    (measured,) = seen
    assert measured.staleness == 1
    assert measured.collect_s == pytest.approx(0.8), "the busier worker: its two groups, one after the other"
    assert (measured.interval_s, measured.train_s) == (2.0, 1.5)
    assert (measured.error, measured.clip_fraction, measured.grad_norm) == (0.1, 0.2, 0.3)


def test_warm_up_and_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = Clock(), config()
    dial = Dial(made, pacer(made), clock)
    seen = spy(dial, monkeypatch)
    for k in range(3):
        clock.now_s += 1.0
        dial.updated(plan(k, 0), outcome(gradient_steps=0), 0.0)
    assert not seen
    clock.now_s += 1.0
    dial.updated(plan(3, 3), outcome(), 0.0)
    dial.forget_time()
    clock.now_s += 3600.0
    dial.updated(plan(4, 4), outcome(), 3600.0)
    assert [m.interval_s for m in seen] == [1.0]


def test_an_error_beyond_the_target_lowers_the_degree() -> None:
    """The whole way: what learners report, through the tuner, to what the pacer admits."""
    clock, made = Clock(), config(error_target=0.1)
    paced = pacer(made)
    dial = Dial(made, paced, clock)
    decisions: list[Any] = []
    for k in range(200):
        clock.now_s += 0.5
        staleness = min(k, paced.degree)
        decisions.append(dial.updated(plan(k, k - staleness), outcome(off_policy_error=0.5 * staleness), 0.0))
    up, down = [d for d in decisions if d is not None][:2]
    assert (up.reason, up.before, up.degree) == ("supply", 0, 1)
    assert (down.reason, down.before, down.degree) == ("error", 1, 0)
    assert "0.1" in down.detail, "the target is named"
    assert paced.degree == 0


def test_a_fixed_degree_stays_and_can_be_turned_by_hand() -> None:
    clock, made = Clock(), config(1, degree_max=3)
    paced = pacer(made)
    dial = Dial(made, paced, clock)
    for k in range(100):
        clock.now_s += 1.0
        assert dial.updated(plan(k, max(0, k - 1)), outcome(off_policy_error=100.0), 0.9) is None
    assert not dial.tunes_itself
    assert dial.state_dict() == {}
    dial.turn(3)
    assert paced.degree == 3
    with pytest.raises(ConfigError, match="off_policy_degree = 4: this run can change it to 0 to 3"):
        dial.turn(4)
    dial.turn(-1)
    assert dial.tunes_itself
    dial.turn(0)
    assert (dial.tunes_itself, paced.degree) == (False, 0)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_state_says_how_a_resumed_run_goes_on(by_hand: bool) -> None:
    made = config()
    paced = pacer(made)
    dial = Dial(made, paced)
    if by_hand:
        dial.turn(3)
    else:
        paced.change_degree(2)
    state = dial.state_dict()
    check_degree(state)
    assert first_degree(made, state) == (3 if by_hand else 2)
    again = Dial(made, pacer(made))
    again.load_state_dict(state)
    assert again.tunes_itself is not by_hand
    if not by_hand:
        assert again.state_dict()["tuner"] == state["tuner"]


def test_a_tuner_that_was_asked_for_by_hand_is_there_after_a_resume() -> None:
    made = config(1, degree_max=4)
    paced = pacer(made)
    dial = Dial(made, paced)
    dial.turn(-1)
    paced.change_degree(3)
    state = dial.state_dict()
    check_degree(state)
    assert first_degree(made, state) == 3
    again = Dial(made, pacer(made))
    again.load_state_dict(state)
    assert again.tunes_itself
    assert again.state_dict()["tuner"] == state["tuner"]
    twice = Dial(made, pacer(made))
    twice.load_state_dict(again.state_dict())
    assert twice.tunes_itself


def test_where_a_run_begins() -> None:
    assert first_degree(config(), {}) == 0
    assert first_degree(config(degree_max=0), {}) == 0
    assert first_degree(config(3), {}) == 3
    assert first_degree(config(3), {"degree": 1}) == 1, "set by hand, so it stays"
    assert first_degree(config(3), {"degree": 1, "tuner": {}}) == 3, "the configuration no longer says -1"


@pytest.mark.parametrize("state", [None, [], {"degree": -1}, {"degree": "1"}, {"tuner": {}}, {"degree": 1, "more": 2},
                                   {"degree": 1, "by_hand": True}, {"degree": 1, "tuner": {}, "by_hand": 1}])
def test_other_states_are_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="degree"):
        check_degree(state)


def test_the_bounds_of_the_configuration() -> None:
    assert config(2).degree_limit == 2
    assert config(2, degree_max=5).degree_limit == 5
    assert config().degree_limit == 8
    assert config(degree_max=3).degree_limit == 3
    with pytest.raises(ConfigError, match="degree_max = 1 is less than off_policy_degree = 2"):
        config(2, degree_max=1)
    with pytest.raises(ConfigError, match="off_policy_degree = -2"):
        config(-2)
    with pytest.raises(ConfigError, match="error_target = 0"):
        config(error_target=0.0)
