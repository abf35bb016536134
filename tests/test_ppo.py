"""PPO: both halves agree, an update does what the paper says, and everything is exact, resumable and safe."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box, MultiDiscrete
from plain_loop import plain_loop

from aiorl.algos.base import Algorithm, Learner, Policy
from aiorl.algos.ppo import PPO, PPOLearner
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError, TrainingError
from aiorl.returns import gae
from aiorl.segments import Rollout

ACTIONS = [None, MultiDiscrete([3, 2]), Box(-1, 1, (2,), np.float32)]
SMALL: dict[str, Any] = {"hidden": (16,), "epochs": 2, "minibatches": 2}


def collected(learner: PPOLearner, config: PPO, stream: Stream, obs: float | None = None) -> Rollout:
    """A rollout whose actions and log-probabilities are those of the learner's own policy; it always sees `obs` if given."""
    rollout = stream.next()
    if obs is not None:
        rollout.obs["obs"][...] = obs
    policy = config.policy(stream.space)
    policy.begin(learner.weights(), rollout.index, np.random.default_rng(rollout.index), rollout.steps)
    columns = rollout.segments[0].columns
    for t in range(rollout.steps):
        action, extra = policy.act({"obs": rollout.obs["obs"][t]}, np.zeros(stream.envs, bool))
        columns["action"][t], columns["log_prob"][t] = action, extra["log_prob"]
    return rollout


def loop(config: PPO, rollouts: int, env: str = "CartPole-v1", **changes: Any) -> Learner:
    fields: dict[str, Any] = {"envs": 4, "group_size": 2, "steps": 16, "seed": 5, "degree": 0, "planned_rollouts": 8}
    return plain_loop(config, resolve_env(env, in_process=True), rollouts=rollouts, **fields | changes)


# -- the halves --------------------------------------------------------------------------------------------------------


def test_it_follows_the_protocols():
    config, space = PPO(), spaces()
    assert isinstance(config, Algorithm)
    assert isinstance(config.policy(space), Policy)
    assert isinstance(config.learner(space, context()), Learner)
    assert config.corrects_staleness
    assert not PPO(correction="none").corrects_staleness


@pytest.mark.parametrize("normalise_obs", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
def test_acting_and_learning_agree_on_every_log_probability(action: Any, normalise_obs: bool):
    """So at staleness 0 nothing is corrected: the weights are 1, up to rounding, before and after statistics changed."""
    config = PPO(**SMALL, normalise_obs=normalise_obs)
    stream = Stream(spaces(action), 4, 8)
    learner = config.learner(stream.space, context())
    for _ in range(3):
        metrics = learner.update(collected(learner, config, stream))
        assert metrics["ess"] == pytest.approx(1, abs=1e-6)
        assert metrics["log_ratio_m2"] < 1e-9


@pytest.mark.parametrize("action", ACTIONS)
def test_without_a_generator_the_policy_is_deterministic(action: Any):
    config, space = PPO(**SMALL), spaces(action)
    policy = config.policy(space)
    policy.begin(config.learner(space, context()).weights(), 0, None, 0)
    obs = {"obs": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}
    first, extra = policy.act(obs, np.ones(5, bool))
    assert (first == policy.act(obs, np.zeros(5, bool))[0]).all()
    assert first.shape == (5, *space.action_column.shape)
    assert not extra


def test_the_same_generator_gives_the_same_actions():
    config, space = PPO(**SMALL), spaces()
    weights = config.learner(space, context()).weights()
    obs = {"obs": np.zeros((6, 3), np.float32)}

    def actions(seed: int) -> list[int]:
        policy = config.policy(space)
        policy.begin(weights, 0, np.random.default_rng(seed), 10)
        return np.concatenate([policy.act(obs, np.zeros(6, bool))[0] for _ in range(10)]).tolist()

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)


def test_weights_are_what_acting_needs_and_no_more():
    assert set(PPO(**SMALL).learner(spaces(), context()).weights()) == {
        "actor.0.weight", "actor.0.bias", "actor.1.weight", "actor.1.bias",
    }  # fmt: skip
    names = set(PPO(**SMALL, normalise_obs=True).learner(spaces(ACTIONS[2]), context()).weights())
    assert {"log_std", "obs_mean", "obs_scale"} < names


def test_statistics_change_after_the_update_that_uses_them():
    config = PPO(**SMALL, normalise_obs=True)
    stream = Stream(spaces(), 4, 8, resets_take_a_row=True)
    learner = config.learner(stream.space, context())
    rollout = collected(learner, config, stream)
    before = learner.weights()
    assert before["obs_mean"].tolist() == [0, 0, 0]
    learner.update(rollout)
    valid = rollout.column("valid")
    np.testing.assert_allclose(learner.weights()["obs_mean"], rollout.obs["obs"][:-1][valid].mean(0), rtol=1e-6)


# -- the update --------------------------------------------------------------------------------------------------------


def test_one_gradient_step_is_the_papers():
    """One epoch of one minibatch against the loss written out with torch's own parts."""
    config = PPO(
        hidden=(8,), epochs=1, minibatches=1, gamma=0.9, gae_lambda=0.8, entropy_coef=0.01, value_coef=0.5,
        max_grad_norm=0.5, learning_rate=0.01, anneal=False,
    )  # fmt: skip
    stream = Stream(spaces(), 4, 8)
    learner = config.learner(stream.space, context())
    rollout = collected(learner, config, stream)
    start = {k: torch.from_numpy(v).requires_grad_() for k, v in learner.state_dict()["parameters"].items()}

    def net(name: str, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(torch.nn.functional.linear(x, start[f"{name}.0.weight"], start[f"{name}.0.bias"]))
        return torch.nn.functional.linear(x, start[f"{name}.1.weight"], start[f"{name}.1.bias"])

    obs = torch.from_numpy(rollout.obs["obs"][:-1].reshape(-1, 3))
    values = net("critic", obs).squeeze(1)
    next_values = net("critic", torch.from_numpy(rollout.next_obs()["obs"].reshape(-1, 3))).squeeze(1)
    flags = {name: rollout.column(name) for name in ("terminated", "truncated")}
    old, then = (v.detach().numpy().reshape(8, 4) for v in (values, next_values))
    advantages = gae(rollout.column("reward"), old, then, **flags, gamma=0.9, gae_lambda=0.8)
    targets = torch.from_numpy((advantages + old).reshape(-1)).float()
    advantage = torch.from_numpy(advantages.reshape(-1)).float()
    advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
    policy = torch.distributions.Categorical(logits=net("actor", obs))
    log_prob = policy.log_prob(torch.from_numpy(rollout.column("action").reshape(-1)))
    loss = -(log_prob.exp() / log_prob.detach().exp() * advantage).mean()
    loss = loss + 0.5 * 0.5 * (values - targets).square().mean() - 0.01 * policy.entropy().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(start.values(), 0.5)
    torch.optim.Adam(start.values(), lr=0.01, eps=1e-5).step()

    metrics = learner.update(rollout)
    for name, array in learner.state_dict()["parameters"].items():
        np.testing.assert_allclose(array, start[name].detach().numpy(), atol=2e-5, err_msg=name)
    assert metrics["gradient_steps"] == 1
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("correction", ["decoupled", "vtrace", "none"])
def test_corrections_are_one_thing_at_staleness_0(correction: Any):
    """All three give the same parameters up to rounding when the acting policy is the newest."""
    results = []
    for name in ("decoupled", correction):
        config = PPO(**SMALL, correction=name, learning_rate=1e-3)
        stream = Stream(spaces(), 4, 8)
        learner = config.learner(stream.space, context())
        learner.update(collected(learner, config, stream))
        results.append(learner.state_dict()["parameters"])
    for name, array in results[0].items():
        np.testing.assert_allclose(array, results[1][name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("correction", ["decoupled", "vtrace", "none"])
def test_stale_rollouts_are_learned_from_and_measured(correction: Any):
    config = PPO(**SMALL, correction=correction, learning_rate=0.05, anneal=False)
    stream = Stream(spaces(), 4, 8)
    learner = config.learner(stream.space, context())
    stale = [collected(learner, config, stream) for _ in range(3)]
    metrics = [learner.update(rollout) for rollout in stale]
    assert metrics[0]["ess"] == pytest.approx(1, abs=1e-6)
    assert metrics[2]["ess"] < 0.999
    assert metrics[2]["log_ratio_m2"] > 1e-4
    assert all(math.isfinite(value) for row in metrics for value in row.values())


@pytest.mark.parametrize("correction", ["decoupled", "vtrace", "none"])
def test_invalid_rows_change_nothing(correction: Any):
    """Junk in rows that are no transitions leaves no trace in parameters, statistics or metrics."""
    results = []
    for junk, action in ((0.0, 0), (1e6, 1), (np.nan, 0)):
        config = PPO(**SMALL, normalise_obs=True, normalise_rewards=True, correction=correction)
        stream = Stream(spaces(), 4, 8, resets_take_a_row=True)
        learner = config.learner(stream.space, context())
        for _ in range(2):
            rollout = collected(learner, config, stream)
            columns = rollout.segments[0].columns
            invalid = ~columns["valid"]
            assert invalid.any()
            columns["reward"][invalid], columns["log_prob"][invalid], columns["action"][invalid] = junk, junk, action
            metrics = learner.update(rollout)
        results.append((digest(learner.state_dict()), metrics))
    assert results[0] == results[1] == results[2]


def test_a_rollout_without_transitions_is_no_update():
    stream = Stream(spaces(), 4, 1)
    learner = PPO(**SMALL).learner(stream.space, context(segment_length=1))
    rollout = stream.next()
    rollout.segments[0].columns["valid"][...] = False
    before = digest(learner.state_dict())
    assert learner.update(rollout) == {"gradient_steps": 0.0}
    assert digest(learner.state_dict()) == before


@pytest.mark.parametrize(("options", "steps"), [({}, 12), ({"minibatches": 100}, 3 * 32), ({"target_kl": 1e-12}, 4)])
def test_gradient_steps(options: dict[str, Any], steps: int):
    config = PPO(**{"hidden": (8,), "epochs": 3, "minibatches": 4, "learning_rate": 0.01} | options)
    stream = Stream(spaces(), 4, 8)
    learner = config.learner(stream.space, context())
    metrics = learner.update(collected(learner, config, stream))
    assert metrics["gradient_steps"] == steps
    expected = {
        "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance", "grad_norm", "ess",
        "log_ratio_m2", "off_policy_error", "learning_rate", "gradient_steps",
    }  # fmt: skip
    assert set(metrics) == expected


def test_the_learning_rate_is_a_function_of_the_rollout():
    stream = Stream(spaces(), 4, 8)
    learner = PPO(**SMALL, learning_rate=0.01).learner(stream.space, context(rollouts=4))
    rates = [learner.update(stream.next())["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0025])  # the fifth was not planned
    learner.set(learning_rate=0.5)
    assert learner.update(Rollout(2, 2, stream.next().segments, np.arange(4)))["learning_rate"] == pytest.approx(0.25)


def test_rewards_are_scaled_by_the_deviation_of_returns():
    config = PPO(**SMALL, normalise_rewards=True)
    stream = Stream(spaces(), 4, 8)
    learner = config.learner(stream.space, context())
    rollout = stream.next()
    rollout.segments[0].columns["reward"][...] *= 1e6
    metrics = learner.update(rollout)
    assert metrics["value_loss"] < 100


def test_returns_of_an_environment_that_is_in_a_rollout_twice_go_on_within_it():
    """As it comes from the eager schedule: the same two segments are one rollout, or two."""
    config = PPO(**SMALL, normalise_rewards=True)
    stream = Stream(spaces(), 2, 8)
    first, second = stream.next(), stream.next()
    for rollout in (first, second):
        rollout.segments[0].columns["terminated"][...] = rollout.segments[0].columns["truncated"][...] = False
    found: list[np.ndarray] = []
    for rollouts in (
        [Rollout(0, 0, (*first.segments, *second.segments), np.array([0, 1, 0, 1]))],
        [Rollout(k, k, part.segments, np.array([0, 1])) for k, part in enumerate((first, second))],
    ):
        learner = config.learner(stream.space, context(envs=4))
        for rollout in rollouts:
            learner.update(rollout)
        found.append(learner.state_dict()["running_return"])
    assert found[0].tolist() == found[1].tolist()
    assert (found[0][:2] != 0).all()


def test_an_unusable_loss_stops_before_the_parameters_change():
    stream = Stream(spaces(), 4, 8)
    learner = PPO(**SMALL).learner(stream.space, context())
    rollout = stream.next()
    rollout.segments[0].columns["reward"][3, 1] = np.inf
    before = learner.state_dict()["parameters"]
    expected = pytest.raises(TrainingError, match=r"policy_loss nan, value_loss .*\n.*learning_rate")
    with np.errstate(invalid="ignore"), expected:
        learner.update(rollout)
    after = learner.state_dict()["parameters"]
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(("action", "degree"), [(None, 0), (MultiDiscrete([2, 2]), 1), (Box(-2, 2, (1,), np.float32), 2)])
def test_it_learns_what_pays(action: Any, degree: int):
    """Reward 1 for choosing the last of each discrete action, or for being near 1 with a continuous one."""
    config = PPO(hidden=(16,), learning_rate=0.01, anneal=False, gamma=0.0)
    stream = Stream(spaces(action), 8, 32)
    learner = config.learner(stream.space, context(envs=8, segment_length=32))
    waiting: list[Rollout] = []
    for _ in range(30):
        rollout = collected(learner, config, stream, obs=0.5)
        columns = rollout.segments[0].columns
        chosen = columns["action"].reshape(32, 8, -1)
        columns["reward"][...] = -((chosen - 1.0) ** 2).sum(2)
        waiting.append(rollout)
        if len(waiting) > degree:
            learner.update(waiting.pop(0))
    policy = config.policy(stream.space)
    policy.begin(learner.weights(), 0, None, 0)
    best, _ = policy.act({"obs": np.full((1, 3), 0.5, np.float32)}, np.ones(1, bool))
    np.testing.assert_allclose(best.reshape(-1), 1, atol=0.2)


def test_an_unusable_gradient_stops_as_well():
    """The losses are finite, but their gradient is not."""
    stream = Stream(spaces(), 4, 8)
    learner = PPO(**SMALL, value_coef=1e38).learner(stream.space, context())
    rollout = stream.next()
    rollout.segments[0].columns["reward"][...] *= 1e6
    before = learner.state_dict()["parameters"]
    with pytest.raises(TrainingError, match=r"grad_norm (inf|nan)"):
        learner.update(rollout)
    after = learner.state_dict()["parameters"]
    assert all((before[name] == after[name]).all() for name in before)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_same_seed_gives_the_same_bits(env: str, degree: int):
    config = PPO(**SMALL, normalise_obs=True, normalise_rewards=True)
    np.random.seed(1)
    torch.manual_seed(1)
    a = digest(loop(config, 4, env, degree=degree).state_dict())
    np.random.seed(2)
    torch.manual_seed(2)
    assert digest(loop(config, 4, env, degree=degree).state_dict()) == a
    assert digest(loop(config, 4, env, degree=degree, seed=6).state_dict()) != a


@pytest.mark.parametrize("action", ACTIONS)
def test_a_loaded_learner_goes_on_bit_for_bit(action: Any):
    config = PPO(**SMALL, normalise_obs=True, normalise_rewards=True)
    stream = Stream(spaces(action), 4, 8, resets_take_a_row=True)
    a, b = (config.learner(stream.space, context()) for _ in range(2))
    for _ in range(2):
        a.update(stream.next())
    a.set(entropy_coef=0.02)
    state = a.state_dict()
    b.load_state_dict(state)
    for _ in range(2):
        rollout = stream.next()
        assert a.update(rollout) == b.update(rollout)
        assert digest(a.state_dict()) == digest(b.state_dict())
    assert digest(a.state_dict()) != digest(state)


def test_a_state_that_does_not_fit_is_refused_by_name():
    state = PPO(**SMALL).learner(spaces(), context()).state_dict()
    other = PPO(**SMALL | {"hidden": (8,)}).learner(spaces(), context())
    with pytest.raises(ValueError, match=r"state\.parameters\.actor\.0\.weight: expected .* \[8, 3\], got .* \[16, 3\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state\.running_return is missing"):
        other.load_state_dict({k: v for k, v in state.items() if k != "running_return"})


def test_settings():
    learner = PPO().learner(spaces(), context())
    with pytest.raises(ValueError, match=r"gama.*learning_rate, entropy_coef, clip_range"):
        learner.set(gama=0.9)
    with pytest.raises(ValueError, match="learning_rate = -1"):
        learner.set(learning_rate=-1)
    learner.set(entropy_coef=0)


def test_empty_spaces_are_refused():
    with pytest.raises(ConfigError, match="observation space is empty"):
        PPO().check(spaces(observation=gymnasium.spaces.Box(-1, 1, (0,), np.float32)))
