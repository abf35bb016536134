"""What all replay learners do alike: accumulation, rewards as learned from, priorities, statistics, what is told of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box

import aiorl
from aiorl import algos
from aiorl.algos import practice
from aiorl.algos.practice import Practice, encode
from aiorl.buffers.replay import Batch, Replay, gradient_steps_owed
from aiorl.cli.flags import members
from aiorl.config import Config
from aiorl.errors import AbandonedError, ConfigError, NonFiniteError
from aiorl.networks import FlatParameters
from aiorl.segments import Array, Column, Rollout

SMALL: dict[str, Any] = {"hidden": (8,), "batch_size": 8, "warmup": 20, "capacity": 200, "update_ratio": 0.3}
ALGORITHMS: dict[str, Any] = {"dqn": aiorl.DQN, "qrdqn": aiorl.QRDQN, "sac": aiorl.SAC, "td3": aiorl.TD3}
BOUNDED = ("sac", "td3")
every_learner = pytest.mark.parametrize("name", list(ALGORITHMS))


def setting(name: str, **changes: Any) -> Any:
    """A small configuration; `random_steps` is 0 where there is such a thing."""
    more = {"random_steps": 0} if name in BOUNDED else {"quantiles": 5} if name == "qrdqn" else {}
    return ALGORITHMS[name](**SMALL | more | changes)


def space_of(name: str) -> Any:
    return spaces(Box(-1, 1, (2,), np.float32)) if name in BOUNDED else spaces()


def stream_of(name: str, **changes: Any) -> Stream:
    columns = {"mean": Column((2,))} if name in BOUNDED else {"greedy": Column((), "int64")}
    return Stream(space_of(name), 4, 8, columns=columns, **changes)


def learner_of(name: str, config: Any = None, **changes: Any) -> Any:
    return (config or setting(name, **changes)).learner(space_of(name), context())


def batch_of(name: str, n: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    obs, next_obs = ({"obs": rng.normal(size=(n, 3)).astype(np.float32)} for _ in range(2))
    action = rng.uniform(-1, 1, (n, 2)).astype(np.float32) if name in BOUNDED else rng.integers(2, size=n)
    discounts = np.where(rng.random(n) < 0.3, 0.0, 0.9)
    return Batch(obs, action, rng.normal(size=n), discounts, next_obs, np.arange(n), np.zeros(n, np.int64), np.ones(n))


class Still(np.random.Generator):
    """Noise that is always 0, in whatever order it is drawn."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, size: Any = None, dtype: Any = float, out: Any = None) -> Any:
        return np.zeros(size, dtype)


def step(learner: Any, batch: Batch) -> dict[str, Any]:
    with torch.no_grad():
        return dict(learner._step(batch, 0.01, Still()))


def parameters_of(learner: Any) -> Array:
    """Of the values: the network's or the critics'."""
    state = learner.state_dict()
    arrays = state.get("critics", state)["parameters"]
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def constant(rollout: Rollout, **columns: Any) -> Rollout:
    for name, value in columns.items():
        rollout.segments[0].columns[name][...] = value
    return rollout


# -- gradient steps ----------------------------------------------------------------------------------------------------


@every_learner
def test_batches_that_are_accumulated_are_one_large_batch(name: str):
    one, other = learner_of(name, batch_size=12), learner_of(name, batch_size=4, accumulate=3)
    for seed in range(3):
        batch = batch_of(name, 12, seed)
        whole, parts = step(one, batch), step(other, batch)
        assert whole.keys() == parts.keys()
        for key, value in whole.items():
            if key not in ("q", "td_error"):
                assert float(parts[key]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), key
        np.testing.assert_allclose(np.sort(np.ravel(parts["td_error"])), np.sort(np.ravel(whole["td_error"])), atol=2e-4)
    np.testing.assert_allclose(parameters_of(one), parameters_of(other), atol=2e-4)
    actors = [{k: v for k, v in learner.weights().items() if v.dtype == np.float32} for learner in (one, other)]
    for key, value in actors[0].items():
        np.testing.assert_allclose(actors[1][key], value, atol=2e-4, err_msg=key)


def test_the_mean_gradient_is_the_mean():
    module = torch.nn.Linear(2, 1, bias=False)
    flat = FlatParameters(module)

    def gradient(value: float) -> float:
        flat.grad.fill_(value)
        return 2 * value

    assert flat.mean_grad([1.0, 2.0, 6.0], gradient) == [2.0, 4.0, 12.0]
    assert flat.grad.tolist() == pytest.approx([3.0, 3.0])


@every_learner
def test_accumulation_leaves_the_number_of_gradient_steps_as_it_was(name: str):
    learner, stream = learner_of(name, accumulate=2), stream_of(name)
    done, stored = 0, 0
    for _ in range(4):
        rollout = stream.next()
        stored += rollout.env_steps
        metrics = learner.update(rollout)
        done += int(metrics["gradient_steps"])
        assert done == gradient_steps_owed(stored, 20, 0.3)
        assert metrics["update_to_data"] == pytest.approx(done / (stored - 20))
    assert done > 0


@every_learner
def test_the_learning_rate_falls_to_what_is_left(name: str):
    learner, stream = learner_of(name, learning_rate=1e-2, anneal=True, anneal_to=0.25), stream_of(name)
    rates = [learner.update(stream.next())["learning_rate"] for _ in range(12)]
    expected = [1e-2 * (1 - 0.75 * min(1, k / 10)) for k in range(12)]
    assert rates == pytest.approx(expected)


@every_learner
def test_rollouts_beyond_those_planned_are_learned_from(name: str):
    """Rows that are spent on resets make them more than planned."""
    learner, stream = learner_of(name, learning_rate=1e-2, anneal=True), stream_of(name)
    rates = [learner.update(stream.next())["learning_rate"] for _ in range(12)]
    assert rates[9:] == pytest.approx([1e-3] * 3)


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_scaled_and_then_limited():
    rewards = np.array([-3.0, -0.4, 0.0, 0.4, 3.0])
    assert setting("dqn").reward(rewards) is rewards
    assert setting("dqn", reward_scale=2.0).reward(rewards).tolist() == [-6, -0.8, 0, 0.8, 6]
    assert setting("dqn", reward_clip=1.0).reward(rewards).tolist() == [-1, -0.4, 0, 0.4, 1]
    assert setting("dqn", reward_scale=2.0, reward_clip=1.0).reward(rewards).tolist() == [-1, -0.8, 0, 0.8, 1]


@every_learner
def test_each_reward_is_limited_before_they_are_summed_and_what_is_stored_stays_true(name: str):
    learner = learner_of(name, reward_scale=2.0, reward_clip=0.5, n_step=3, gamma=0.9)
    plain, stream, twin = Replay(space_of(name), 4, 200), stream_of(name), stream_of(name)
    rewards: list[Array] = []
    for _ in range(3):
        rollout, other = stream.next(), twin.next()
        rewards.append(other.column("reward").copy())
        learner.update(rollout)
        plain.add(constant(other, reward=(2 * other.column("reward")).clip(-0.5, 0.5)))
    index = np.arange(len(plain))
    own = learner._practice._replay
    found, expected = (replay.gather(index, 3, 0.9) for replay in (own, plain))
    np.testing.assert_allclose(found.returns, expected.returns)
    assert (found.discounts == expected.discounts).all()
    assert np.abs(found.returns).max() > 0.5, "no window has two rewards: the test shows nothing"
    stored = own.state_dict()["columns"]["reward"]
    assert (stored.reshape(-1, 4) == np.concatenate(rewards)).all()


# -- priorities --------------------------------------------------------------------------------------------------------


@every_learner
def test_weights_are_factors_on_the_losses(name: str):
    batch = batch_of(name, 8)
    heavy, none = (dataclasses.replace(batch, weights=np.full(8, value)) for value in (0.5, 0.0))
    norms = [
        float(step(learner_of(name, priority_exponent=exponent, max_grad_norm=1e9), x)["grad_norm"])
        for exponent, x in ((0.6, batch), (0.6, heavy), (0.6, none), (0.0, batch), (0.0, none))
    ]
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-4)
    assert norms[2] == 0 < norms[0]
    assert norms[3] == norms[4] == norms[0], "weights count without priorities"


def steps_of(learner: Any) -> list[dict[str, Any]]:
    """What the learner's gradient steps will say of themselves, as they are done."""
    steps: list[dict[str, Any]] = []
    own = learner._step

    def told(*arguments: Any) -> dict[str, Any]:
        steps.append(dict(own(*arguments)))
        return steps[-1]

    learner._step = told
    return steps


@every_learner
def test_priorities_are_the_errors_of_the_step_that_drew_them(name: str, monkeypatch: pytest.MonkeyPatch):
    learner, stream = learner_of(name, priority_exponent=0.6, update_ratio=0.1), stream_of(name)
    seen: list[tuple[Batch, Array]] = []
    put = Replay.reprioritise

    def spy(self: Replay, batch: Batch, errors: Array) -> int:
        seen.append((batch, errors))
        return put(self, batch, errors)

    monkeypatch.setattr(Replay, "reprioritise", spy)
    steps = steps_of(learner)
    metrics = [learner.update(stream.next()) for _ in range(3)]
    assert len(seen) == len(steps) == sum(m["gradient_steps"] for m in metrics) > 1
    for (_, errors), found in zip(seen, steps, strict=True):
        expected = np.abs(np.asarray(found["td_error"]))
        assert errors == pytest.approx(expected if expected.ndim == 1 else expected.mean(0))
        assert (errors >= 0).all()
    assert metrics[-1]["priorities_ignored"] == 0
    monkeypatch.setattr(Replay, "reprioritise", lambda *_: 2)
    last = learner.update(stream.next())
    assert last["priorities_ignored"] == 2 * last["gradient_steps"] > 0, "not counted"


def test_beta_rises_to_one_with_the_rollouts():
    learner, stream = learner_of("dqn", priority_exponent=0.6, priority_beta=0.4), stream_of("dqn")
    metrics = [learner.update(stream.next()) for _ in range(12)]
    assert [m["priority_beta"] for m in metrics[1:]] == pytest.approx([0.4 + 0.6 * min(1, k / 10) for k in range(1, 12)])


def test_what_surprises_is_seen_again_and_the_entropy_tells():
    """Of the four environments one has rewards of 1000, the others of 0: its rows come to be most of a batch."""
    stream, twin = stream_of("dqn"), stream_of("dqn")
    config = {"warmup": 0, "update_ratio": 4, "gamma": 0.0, "learning_rate": 1e-5, "batch_size": 32}
    even = learner_of("dqn", **config)
    uneven = learner_of("dqn", **config, priority_exponent=1.0)
    rewards = np.array([0.0, 0.0, 0.0, 1000.0])
    for _ in range(5):
        metrics = uneven.update(constant(stream.next(), reward=rewards))
        other = even.update(constant(twin.next(), reward=rewards))
    buffers = [learner._practice._replay for learner in (even, uneven)]
    shares = [np.mean(buffer.sample(np.random.default_rng(0), 1000).index % 4 == 3) for buffer in buffers]
    assert shares[0] == pytest.approx(0.25, abs=0.05)
    assert shares[1] > 0.9
    assert "priority_entropy" not in other
    exact = buffers[1].priority_entropy() / math.log(len(buffers[1]))
    assert metrics["priority_entropy"] == pytest.approx(exact, abs=0.1)
    assert metrics["priority_entropy"] < 0.95


@every_learner
def test_an_error_that_is_not_finite_takes_the_update_back(name: str):
    learner, stream = learner_of(name, priority_exponent=0.6, warmup=0, normalise_obs=True), stream_of(name)
    learner.update(stream.next())
    before = digest(learner._own_state()), learner.weights()
    moments = digest(learner._practice._moments.state_dict())
    with pytest.raises(NonFiniteError, match="not finite"):
        learner.update(constant(stream.next(), reward=np.inf))
    assert digest(learner._own_state()) == before[0]
    assert digest(dict(learner.weights())) == digest(dict(before[1]))
    assert digest(learner._practice._moments.state_dict()) == moments
    assert learner.state_dict()["practice"]["skipped_steps"] > 0


@pytest.mark.parametrize("failure", [AbandonedError("the run is left"), None])
@every_learner
def test_priorities_of_an_update_that_fails_are_taken_back(name: str, failure: Exception | None):
    """At the third gradient step, given up or with errors that are not finite: what was stored stays, and nothing else."""
    learner, stream = learner_of(name, priority_exponent=0.6, warmup=0), stream_of(name)
    for _ in range(8):  # the ring has come round
        learner.update(stream.next())
    replay = Replay(space_of(name), 4, 200, priority_exponent=0.6)
    replay.load_state_dict(learner.state_dict()["practice"]["replay"])
    own, steps, rollout = learner._step, [0], stream.next()

    def fails(*arguments: Any) -> dict[str, Any]:
        steps[0] += 1
        found = dict(own(*arguments))
        if steps[0] == 3:
            if failure is not None:
                raise failure
            found["td_error"] = found["td_error"] * np.nan
        else:
            found["td_error"] = found["td_error"] * 1000  # above the largest so far
        return found

    learner._step = fails
    with pytest.raises(AbandonedError if failure is not None else NonFiniteError):
        learner.update(rollout)
    replay.add(rollout)
    assert steps == [3]
    assert digest(learner._practice._replay.state_dict()) == digest(replay.state_dict())
    learner._step = own
    learner.update(stream.next())
    assert digest(learner._practice._replay.state_dict()["priorities"]) != digest(replay.state_dict()["priorities"])


# -- statistics of observations ----------------------------------------------------------------------------------------


@every_learner
def test_acting_and_learning_see_the_same(name: str):
    config = setting(name, normalise_obs=True)
    learner, policy = learner_of(name, config), config.policy(space_of(name))
    stream = stream_of(name, resets_take_a_row=True)
    every: list[Array] = []
    for _ in range(3):
        rollout = stream.next()
        every.append(rollout.obs["obs"][:-1][rollout.column("valid")])
        learner.update(rollout)
    seen, weights = np.concatenate(every).astype(np.float64), learner.weights()
    np.testing.assert_allclose(weights["obs_mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(weights["obs_scale"], 1 / np.sqrt(seen.var(0) + 1e-8), rtol=1e-5)
    policy.begin({k: np.array(v) for k, v in weights.items()}, 9, None, 1)
    leaves = {"obs": every[0]}
    features = policy.features(leaves, np.zeros(len(every[0]), bool))
    assert (features == learner._practice.encode(leaves)).all()
    expected = (every[0] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    np.testing.assert_allclose(features, expected.clip(-10, 10), rtol=1e-3, atol=1e-3)


@every_learner
def test_without_statistics_nothing_is_changed_or_carried_along(name: str):
    learner, stream = learner_of(name), stream_of(name)
    learner.update(stream.next())
    assert not any(key.startswith("obs_") for key in learner.weights())
    leaves = {"obs": np.full((2, 3), 100, np.float32)}
    assert (encode(space_of(name), leaves, learner.weights()) == 100).all()


def test_statistics_are_kept_from_what_is_not_finite_in_warm_up_too():
    learner, stream = learner_of("dqn", normalise_obs=True, warmup=1000), stream_of("dqn")
    learner.update(stream.next())
    before, rollout = digest(dict(learner.weights())), stream.next()
    rollout.segments[0].obs["obs"][3] = np.nan
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="the statistics of observations"):
        learner.update(rollout)
    assert digest(dict(learner.weights())) == before


# -- everything at once ------------------------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "priority_exponent": 0.6, "normalise_obs": True, "accumulate": 2, "n_step": 3, "anneal": True, "anneal_to": 0.1,
    "reward_scale": 0.5, "reward_clip": 0.4, "max_grad_norm": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"n_step": 3}, ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("before", [0, 1, 8])
@every_learner
def test_a_loaded_learner_goes_on_bit_for_bit(name: str, before: int, settings: dict[str, Any]):
    """From an empty buffer, in warm-up, and after the ring has wrapped around; between two target or policy updates."""
    stream = stream_of(name, resets_take_a_row=True)
    own = {"td3": {"policy_delay": 3}, "sac": {}}.get(name, {"target_every": 3})
    a, b = (learner_of(name, **settings, **own) for _ in range(2))
    for _ in range(before):
        a.update(stream.next())
    state = a.state_dict()
    b.load_state_dict(state)
    for _ in range(3):
        rollout = stream.next()
        assert a.update(rollout) == b.update(rollout)
        assert digest(a.state_dict()) == digest(b.state_dict())
        assert digest(dict(a.weights())) == digest(dict(b.weights()))
    assert digest(a.state_dict()) != digest(state)


@every_learner
def test_settings_survive_a_file(name: str):
    algo = setting(name, **ALL) if name != "dqn" else setting(name, **ALL, huber_delta=0.0)
    config = Config(env="Pendulum-v1" if name in BOUNDED else "CartPole-v1", algo=algo)
    assert Config.from_dict(config.to_dict()).algo == algo


@pytest.mark.parametrize("name", list(algos.ALGORITHMS))
def test_no_setting_is_lost_in_a_file_for_being_none(name: str):
    """TOML cannot say None: it must be what a setting is if nothing is said."""
    for field in msgspec.structs.fields(algos.algorithm_class(name)):
        assert type(None) not in members(field.type) or field.default is None, field.name


# -- what is told ------------------------------------------------------------------------------------------------------


@every_learner
def test_what_is_told_of_values_errors_and_parameters(name: str):
    learner, stream = learner_of(name, warmup=0, reward_scale=3.0), stream_of(name)
    steps = steps_of(learner)
    rollouts = [stream.next() for _ in range(3)]
    for rollout in rollouts:
        steps.clear()
        metrics = learner.update(rollout)
    q, error = (np.concatenate([np.ravel(s[key]) for s in steps]).astype(np.float64) for key in ("q", "td_error"))
    error = np.abs(error)
    expected = {
        "q_mean": q.mean(), "q_std": q.std(), "q_min": q.min(), "q_max": q.max(), "td_error": error.mean(),
        "td_error_max": error.max(),
    }  # fmt: skip
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.mean([float(s["grad_norm"]) for s in steps]), rel=1e-5)
    state = learner.state_dict()
    values = state.get("critics", state)
    online, target = (np.concatenate([x.ravel() for x in values[key].values()]) for key in ("parameters", "target"))
    assert metrics["parameter_norm"] == pytest.approx(np.linalg.norm(online), rel=1e-4)
    drift = np.linalg.norm(online - target) / np.linalg.norm(online)
    assert metrics["target_drift"] == pytest.approx(drift, rel=1e-3)
    assert drift > 0
    largest = max(np.abs(r.column("reward")[r.column("valid")]).max() for r in rollouts)
    bonus = float(np.mean([float(s.get("bonus", 0.0)) for s in steps]))
    assert (bonus > 0) is (name == "sac")
    assert metrics["q_limit"] == pytest.approx(practice.TOLERANCE * (3 * largest + bonus) / (1 - 0.99))
    assert max(-metrics["q_min"], metrics["q_max"]) < metrics["q_limit"]


def test_the_bonus_for_entropy_is_among_what_values_may_be(monkeypatch: pytest.MonkeyPatch):
    learner, stream = learner_of("sac", warmup=0, alpha=20.0, tune_alpha=False), stream_of("sac")
    metrics = learner.update(constant(stream.next(), reward=0.0))
    bonus = 20.0 * abs(metrics["entropy"])
    assert metrics["q_limit"] == pytest.approx(practice.TOLERANCE * (1 + bonus) / (1 - 0.99), rel=1e-3)
    assert "bonus" not in metrics


def test_only_the_last_gradient_steps_are_kept_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(practice, "LOOKED_AT", 3)
    learner, stream = learner_of("dqn", warmup=0), stream_of("dqn")
    steps = steps_of(learner)
    metrics = learner.update(stream.next())
    assert len(steps) > 3
    assert metrics["q_max"] == pytest.approx(max(float(s["q"].max()) for s in steps[-3:]))
    assert metrics["loss"] == pytest.approx(np.mean([s["loss"] for s in steps]))


def test_values_without_discount_have_a_limit_all_the_same():
    learner, stream = learner_of("dqn", warmup=0, gamma=1.0), stream_of("dqn")
    metrics = learner.update(constant(stream.next(), reward=0.5))
    assert metrics["q_limit"] == practice.TOLERANCE * practice.LONGEST_HORIZON
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_practice_has_no_more_metrics_than_it_needs_in_warm_up():
    metrics = learner_of("dqn", warmup=1000).update(stream_of("dqn").next())
    assert metrics["gradient_steps"] == metrics["update_to_data"] == 0
    assert "q_max" not in metrics
    assert isinstance(learner_of("dqn")._practice, Practice)


@every_learner
def test_tensors_give_what_arrays_give(name: str, monkeypatch: pytest.MonkeyPatch):
    """As on a device, where nothing is looked at through NumPy."""
    one, other, stream = learner_of(name, **ALL), learner_of(name, **ALL), stream_of(name)
    rollouts = [stream.next() for _ in range(2)]
    expected = [one.update(rollout) for rollout in rollouts][-1]
    with monkeypatch.context() as context:
        context.setattr(practice.losses, "near", lambda x: x)
        context.setattr("aiorl.losses.near", lambda x: x)
        found = [other.update(rollout) for rollout in rollouts][-1]
    assert found == pytest.approx(expected, rel=5e-3, abs=1e-4)
    np.testing.assert_allclose(parameters_of(other), parameters_of(one), atol=1e-3)


# -- room --------------------------------------------------------------------------------------------------------------


def test_room_that_the_system_does_not_give_is_told_by_the_setting():
    algo = aiorl.DQN(capacity=10**15, hidden=(8,))
    with pytest.raises(ConfigError, match=r"dqn\.capacity = 1,000,000,000,000,000: .*\n  use a smaller capacity"):
        algo.learner(spaces(), context())
