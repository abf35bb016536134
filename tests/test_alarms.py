"""Updates that go wrong without an error are said once; those that come to NaN are never stepped, never published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from experience import Stream, context, digest, spaces

import aiorl
from aiorl.alarms import Alarms
from aiorl.algos.base import Learner, LearnerContext
from aiorl.envs.spaces import Spaces
from aiorl.errors import NonFiniteError
from aiorl.events import AnyEvent, Updated, Warned
from aiorl.networks import Adam
from aiorl.segments import Rollout, Segment
from tests.toys import Toy, ToyLearner

SPACES = spaces()


def segments(zero: bool = False) -> tuple[Segment, ...]:
    segment = Stream(SPACES, 2, 8).next().segments[0]
    if zero:
        segment.obs["obs"][...] = 0
    return (segment,)


FINE: dict[str, float] = {"gradient_steps": 4, "grad_norm": 0.5, "learning_rate": 1e-3, "loss": 1.0}


def sound(alarms: Alarms, k: int = 0, *, zero: bool = False, changed: bool = True, **metrics: float) -> list[str]:
    return alarms.update(k, segments(zero), {**FINE, **metrics}, changed=changed, skipped=None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"zero": True}, ["every observation of rollout 3 is 0"]),
        ({"grad_norm": 0.0}, ["the gradient of update 3 is 0 in all 4 gradient steps"]),
        ({"changed": False}, ["update 3 changed no weights, with 4 gradient steps at learning rate 0.001"]),
        ({"loss": math.nan, "kl": math.inf}, ["update 3 reports loss = nan, kl = inf"]),
    ],
)
def test_each_is_said_once_until_it_has_been_right_again(wrong: dict[str, Any], words: list[str]) -> None:
    alarms = Alarms(SPACES)
    assert sound(alarms, 2) == []
    assert sound(alarms, 3, **wrong) == words
    assert sound(alarms, 4, **wrong) == sound(alarms, 5, **wrong) == []
    assert sound(alarms, 6) == []
    assert len(sound(alarms, 7, **wrong)) == 1


def test_an_update_that_has_nothing_to_change_says_nothing() -> None:
    """In warm-up, and at the annealed end; it does not clear an alarm either."""
    alarms = Alarms(SPACES)
    for idle in ({"gradient_steps": 0}, {"learning_rate": 0.0}):
        assert sound(alarms, changed=False, grad_norm=0.0, **idle) == []
    assert len(sound(alarms, changed=False)) == 1
    assert sound(alarms, changed=False, gradient_steps=0) == []
    assert sound(alarms, changed=False) == [], "said twice"


def test_spaces_in_which_zero_is_a_sight_like_any_other() -> None:
    alarms = Alarms(spaces(observation=gymnasium.spaces.Discrete(3)))
    segment = Stream(SPACES, 2, 8).next().segments[0]
    segment.obs["obs"][...] = 0
    assert alarms.update(0, (segment,), FINE, changed=True, skipped=None) == []


def span_alarms(dtype: str, shown: Any, updates: int) -> list[list[str]]:
    """What updates of 16 steps say in which `shown(k)` is what is observed, [9, 2, 3]."""
    space = spaces(observation=gymnasium.spaces.Box(-(2.0**60), 2.0**60, (3,), np.dtype(dtype).type))
    alarms, segment = Alarms(space), Stream(space, 2, 8).next().segments[0]
    said: list[list[str]] = []
    for k in range(updates):
        segment.obs["obs"][...] = shown(k)
        said.append(alarms.update(k, (segment,), FINE, changed=True, skipped=None))
    return said


def clock(k: int) -> Any:
    """A constant, the time, and what differs by little, but not from itself."""
    rows = np.full((9, 2, 3), 5.0)
    rows[..., 1] = 1.7e9 + 50 + np.arange(9)[:, None]
    rows[..., 2] = 1e6 * (k + 1)
    rows[0, 0, 1] -= 50
    return rows


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_a_number_of_which_networks_see_one_value_is_said_once(dtype: str) -> None:
    said = span_alarms(dtype, clock, 80)
    assert [k for k, messages in enumerate(said) if messages] == [62], "said before or after 1,000 steps, or again"
    (message,) = said[62]
    assert message.startswith("obs[1] is between 1700000000")
    assert "and 1700000058" in message
    assert "subtract an offset" in message


def test_numbers_that_float32_tells_apart_are_not_said() -> None:
    assert not any(span_alarms("float32", clock, 80)), "the environment's own digits"
    assert not any(span_alarms("float64", lambda k: 1e3 + np.arange(3) + k / 1e9 * (k < 70) + k * (k > 40), 80))
    assert not any(span_alarms("float64", lambda k: np.array([np.nan, np.inf, -np.inf]), 80))
    assert not any(span_alarms("float64", lambda k: 1 / 3 + np.arange(3) * k * 2.0**-52, 80)), "a constant, but for rounding"


def test_the_last_row_counts_as_well() -> None:
    alarms, (segment,) = Alarms(SPACES), segments(zero=True)
    segment.obs["obs"][-1, -1, -1] = 1e-30
    assert alarms.update(0, (segment,), FINE, changed=True, skipped=None) == []


# -- the learners ------------------------------------------------------------------------------------------------------

PPO = aiorl.PPO(hidden=(8,), epochs=2, minibatches=2, normalise_obs=True, normalise_rewards=True)
DQN = aiorl.DQN(hidden=(8,), warmup=20, batch_size=16, target_every=3, capacity=1000)


def spoil(rollout: Rollout, how: str) -> None:
    segment = rollout.segments[0]
    if how == "reward":
        segment.columns["reward"][...] = np.nan
    else:
        segment.obs["obs"][...] = np.nan


def parts_of(learner: Learner) -> str:
    """Everything but the experience and how many steps were given up."""
    state = learner.state_dict()
    parts = state | state.pop("practice", {})
    return digest({k: v for k, v in parts.items() if k not in ("replay", "largest_reward", "skipped_steps")})


@pytest.mark.parametrize("how", ["reward", "obs"])
@pytest.mark.parametrize("algo", [PPO, DQN], ids=["ppo", "dqn"])
def test_an_update_that_is_not_finite_leaves_the_learner_as_it_was(algo: Any, how: str) -> None:
    stream = Stream(SPACES, 4, 8)
    learner = algo.learner(SPACES, context())
    for _ in range(3):
        learner.update(stream.next())
    before = parts_of(learner)
    rollout = stream.next()
    spoil(rollout, how)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"not finite.*: .*(nan|inf)"):
        learner.update(rollout)
    assert parts_of(learner) == before


@pytest.mark.parametrize("algo", [PPO, DQN], ids=["ppo", "dqn"])
def test_parameters_that_overflow_in_the_last_gradient_step_are_taken_back(
    algo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss shows it: the step was made from finite numbers."""
    stream = Stream(SPACES, 4, 8)
    learner = algo.learner(SPACES, context())
    learner.update(stream.next())
    before, step = parts_of(learner), Adam.step
    last = learner._adam.steps + (4 if algo is PPO else 8)

    def overflowing(adam: Adam, rate: float) -> None:
        step(adam, rate)
        if adam.steps == last:
            adam._parameters.vector[-1] = np.inf

    monkeypatch.setattr(Adam, "step", overflowing)
    with pytest.raises(NonFiniteError, match="not finite after an update: the parameters"):
        learner.update(stream.next())
    assert parts_of(learner) == before


def test_statistics_that_overflow_are_taken_back() -> None:
    """A scale of 1 / infinity would make every reward to come 0, without a word."""
    stream = Stream(SPACES, 4, 8)
    learner = PPO.learner(SPACES, context())
    rollout = stream.next()
    rollout.segments[0].columns["reward"][0, 0] = 1e300
    before = parts_of(learner)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="the statistics of returns"):
        learner.update(rollout)
    assert parts_of(learner) == before


def test_gradient_steps_that_were_given_up_are_not_owed_any_more() -> None:
    stream = Stream(SPACES, 4, 8)
    algo = aiorl.DQN(hidden=(8,), warmup=0, update_ratio=0.5, capacity=32)
    learner = algo.learner(SPACES, context())
    bad = stream.next()
    spoil(bad, "reward")
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError):
        learner.update(bad)
    done = learner.update(stream.next())["gradient_steps"]  # its 32 rows replace all others
    assert done == 16
    again = algo.learner(SPACES, context())
    again.load_state_dict(learner.state_dict())
    assert again.update(stream.next())["gradient_steps"] == 16


# -- whole runs --------------------------------------------------------------------------------------------------------


class Sick(Toy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A learner whose updates `at` go wrong in one of many ways."""

    name: ClassVar[str] = "sick"
    at: tuple[int, ...] = ()
    how: str = "nonfinite"

    def learner(self, spaces: Spaces, context: LearnerContext) -> SickLearner:
        return SickLearner(self, spaces, context)


class SickLearner(ToyLearner):
    def __init__(self, config: Sick, spaces: Spaces, context: LearnerContext) -> None:
        super().__init__(config, spaces, context)
        self._sick = config

    def update(self, rollout: Rollout) -> dict[str, float]:
        if rollout.index not in self._sick.at:
            return super().update(rollout)
        if self._sick.how == "nonfinite":
            raise NonFiniteError(f"sick: loss nan at rollout {rollout.index}")
        if self._sick.how == "weights":
            self._w[1, 1] = np.inf
        if self._sick.how == "raise":
            raise ZeroDivisionError("the sums went wrong")
        return {"gradient_steps": 2.0, "grad_norm": 0.0 if self._sick.how == "gradient" else 1.0}

    def weights(self) -> Mapping[str, Any]:
        assert np.isfinite(self._w).all() or self._sick.how == "weights"
        return super().weights()


def make(out: Path, **changes: Any) -> aiorl.Config:
    """20 updates."""
    fields: dict[str, Any] = {
        "env": "run_envs:Counting", "envs": 2, "group_size": 2, "workers": 0, "total_steps": 320, "off_policy_degree": 1,
        "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


async def events_of(config: aiorl.Config) -> tuple[aiorl.Run, list[AnyEvent]]:
    async with aiorl.Run(config) as run:
        events = [event async for event in run.events(10_000)]
    return run, events


def warnings(events: list[AnyEvent]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


async def test_a_run_goes_on_without_the_updates_that_are_skipped(tmp_path: Path) -> None:
    config = make(tmp_path, algo=Sick(at=(4, 5, 9)), on_nonfinite="skip", nonfinite_max=2)
    run, events = await events_of(config)
    result = run.result
    assert (result.status, result.updates, result.gradient_steps) == ("completed", 20, 17)
    assert result.skipped_updates == {"nonfinite": 3}
    assert result.ledger["stored"] == result.env_steps == 320, "what was collected for it is in the books"
    skipped = {e.rollout: e.skipped for e in events if isinstance(e, Updated) and e.skipped}
    assert skipped == {k: f"sick: loss nan at rollout {k}" for k in (4, 5, 9)}
    assert [text for text in warnings(events) if "skipped" in text] == [
        f"update {k} was skipped, its weights are those of before: sick: loss nan at rollout {k}" for k in (4, 9)
    ]
    again, _ = await events_of(config.replace(out=str(tmp_path / "again")))
    assert again.result.params_sha256 == result.params_sha256


async def test_more_in_a_row_than_allowed_end_the_run(tmp_path: Path) -> None:
    config = make(tmp_path, algo=Sick(at=(4, 5, 6, 7)), on_nonfinite="skip", nonfinite_max=3)
    run, _ = await events_of(config)
    with pytest.raises(aiorl.TrainingError, match=r"3 updates in a row were skipped, .*\n.*loss nan at rollout 7"):
        await run.wait()
    assert (run.result.updates, run.result.skipped_updates) == (7, {"nonfinite": 3})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nonfinite", "sick: loss nan at rollout 4"), ("weights", "update 4 made w not finite: it is not published"),
        ("raise", "ZeroDivisionError: the sums went wrong"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["stop", "skip"])
async def test_what_cannot_be_used_is_never_published(tmp_path: Path, how: str, words: str, policy: str) -> None:
    config = make(tmp_path, algo=Sick(at=(4, 5), how=how), on_nonfinite=policy, nonfinite_max=1)
    run, _ = await events_of(config)
    with pytest.raises(aiorl.TrainingError, match=words if policy == "stop" or how != "nonfinite" else "in a row"):
        await run.wait()
    assert run._session.snapshot is not None
    version, weights = run._session.snapshot
    assert version == run.result.updates == (5 if (policy, how) == ("skip", "nonfinite") else 4)
    assert all(np.isfinite(array).all() for array in weights.values())


@pytest.mark.parametrize(
    ("how", "words"),
    [("gradient", "the gradient of update 4 is 0 in all 2"), ("still", "update 4 changed no weights, with 2 gradient")],
)
async def test_alarms_are_events(tmp_path: Path, how: str, words: str) -> None:
    run, events = await events_of(make(tmp_path, algo=Sick(at=(4, 5, 6), how=how)))
    assert run.result.status == "completed"
    assert sum(words in text for text in warnings(events)) == 1
    assert len([text for text in warnings(events) if "changed no weights" in text]) == 1


@pytest.mark.parametrize("algo", ["ppo", "dqn"])
async def test_a_sound_run_raises_no_alarm(tmp_path: Path, algo: str) -> None:
    own = PPO if algo == "ppo" else DQN
    _, events = await events_of(make(tmp_path, env="CartPole-v1", algo=own, envs=4, total_steps=4096, workers=0))
    assert warnings(events) == []
