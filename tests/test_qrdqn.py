"""QR-DQN: one step against autograd, acting with the means, distributions learned, everything exact and resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box, Discrete
from plain_loop import plain_loop
from torch.nn import functional as F

from aiorl.algos.base import Algorithm, CentralAlgorithm, Learner, Policy
from aiorl.algos.dqn import DQNLearner
from aiorl.algos.qrdqn import QRDQN
from aiorl.buffers.replay import Batch
from aiorl.envs.episodes import run_episodes
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError
from aiorl.segments import Array, Column

SMALL: dict[str, Any] = {
    "hidden": (16,), "batch_size": 8, "warmup": 20, "capacity": 200, "update_ratio": 0.3, "quantiles": 6,
}  # fmt: skip


def learner(config: QRDQN, actions: int = 2, **changes: Any) -> DQNLearner:
    return config.learner(spaces(Discrete(actions)), context(**changes))


def loop(config: QRDQN, rollouts: int, **changes: Any) -> Learner:
    fields: dict[str, Any] = {"envs": 4, "group_size": 2, "steps": 8, "seed": 5, "degree": 0, "planned_rollouts": 8}
    return plain_loop(config, resolve_env("CartPole-v1", in_process=True), rollouts=rollouts, **fields | changes)


def test_it_follows_the_protocols():
    config, space = QRDQN(), spaces()
    assert isinstance(config, Algorithm)
    assert isinstance(config, CentralAlgorithm)
    assert isinstance(config.policy(space), Policy)
    assert isinstance(config.learner(space, context()), Learner)
    with pytest.raises(ConfigError, match=r"qrdqn needs a Discrete action space, this environment has Box\n.*ppo"):
        QRDQN().check(spaces(Box(-1, 1, (2,), np.float32)))


def network(arrays: dict[str, Array], obs: torch.Tensor, quantiles: int) -> torch.Tensor:
    """[N, A, K] by hand."""
    x = F.linear(obs, arrays["torso.0.weight"], arrays["torso.0.bias"]).relu()
    return F.linear(x, arrays["advantage.0.weight"], arrays["advantage.0.bias"]).reshape(len(obs), -1, quantiles)


@pytest.mark.parametrize("double", [False, True])
def test_one_step_is_what_autograd_makes_of_the_papers_loss(double: bool):
    """Algorithm 1 of Dabney et al. 2018, with a loop over transitions, quantiles and targets; Adam's first step."""
    one = learner(QRDQN(**SMALL, kappa=0.7, double=double, learning_rate=0.01), actions=3)
    one._target_parameters.vector.mul_(1.3)
    before = one.state_dict()
    online = {k: torch.from_numpy(v.copy()).double().requires_grad_() for k, v in before["parameters"].items()}
    target = {k: torch.from_numpy(v.copy()).double() for k, v in before["target"].items()}
    rng = np.random.default_rng(0)
    obs, next_obs = ({"obs": rng.normal(size=(8, 3)).astype(np.float32)} for _ in range(2))
    discounts = np.where(rng.random(8) < 0.3, 0.0, 0.9)
    rows = {"index": np.arange(8), "generation": np.zeros(8, np.int64), "weights": np.ones(8)}
    batch = Batch(obs, rng.integers(3, size=8), rng.normal(size=8), discounts, next_obs, **rows)
    with torch.no_grad():
        found = one._step(batch, 0.01, rng)

    theta, following = network(online, torch.from_numpy(obs["obs"]).double(), 6), torch.from_numpy(next_obs["obs"]).double()
    with torch.no_grad():
        next_target = network(target, following, 6)
        best = (network(online, following, 6) if double else next_target).mean(2).argmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(8):
        goals = batch.returns[n] + batch.discounts[n] * next_target[n, best[n]]
        for i in range(6):
            for goal in goals:
                u = goal - theta[n, batch.action[n], i]
                size = u.abs()
                huber = 0.5 * u * u if size <= 0.7 else 0.7 * (size - 0.35)
                total = total + abs((2 * i + 1) / 12 - float(u < 0)) * huber / 6 / 8
    assert float(found["loss"]) == pytest.approx(total.item(), rel=1e-4)
    total.backward()
    norm = torch.cat([p.grad.reshape(-1) for p in online.values()]).norm().item()
    assert float(found["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    for name, after in one.state_dict()["parameters"].items():
        grad = online[name].grad
        expected = online[name].detach() - 0.01 * grad / (grad.abs() + 1e-8)
        sure = (grad.abs() > 1e-6) | (grad == 0)  # Adam's first step is a sign
        np.testing.assert_allclose(after[sure.numpy()], expected[sure].numpy(), atol=2e-4, err_msg=name)
    means = theta.detach().mean(2)
    np.testing.assert_allclose(found["q"], means, atol=1e-5)
    wanted = batch.returns + batch.discounts * next_target.mean(2).numpy()[np.arange(8), best]
    np.testing.assert_allclose(found["td_error"], means.numpy()[np.arange(8), batch.action] - wanted, atol=1e-5)


def test_acting_takes_the_greatest_mean_with_weights_no_larger_than_dqn_has():
    config, space = QRDQN(**SMALL), spaces(Discrete(5))
    one, policy = learner(config, actions=5), config.policy(space)
    obs = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    weights = {name: np.array(array) for name, array in one.weights().items()}
    assert weights["advantage.0.weight"].shape == (5, 16)
    assert weights["advantage.0.weight"].dtype == np.float32
    arrays = {name: torch.from_numpy(array) for name, array in one.state_dict()["parameters"].items()}
    means = network(arrays, torch.from_numpy(obs), 6).mean(2).numpy()
    policy.begin(weights, 0, None, 1)
    greedy = policy.act({"obs": obs}, np.zeros(len(obs), bool))[0]
    np.testing.assert_allclose(means[np.arange(len(obs)), greedy], means.max(1), atol=1e-5)
    outputs = config.forward(space).apply({k: torch.from_numpy(v) for k, v in weights.items()}, torch.from_numpy(obs))
    np.testing.assert_allclose(outputs.numpy(), means, atol=1e-5)


def test_how_far_the_greedy_actions_moved():
    one = learner(QRDQN(**SMALL))
    stream = Stream(spaces(), 4, 8, columns={"greedy": Column((), "int64")})
    rollout = stream.next()
    obs = rollout.obs["obs"][:-1]
    arrays = {name: torch.from_numpy(array) for name, array in one.state_dict()["parameters"].items()}
    now = network(arrays, torch.from_numpy(obs.reshape(-1, 3)), 6).mean(2).argmax(1).numpy().reshape(obs.shape[:2])
    rollout.segments[0].columns["greedy"][...] = now
    rollout.segments[0].columns["greedy"][:2] = 1 - now[:2]
    late = type(rollout)(3, 1, rollout.segments, rollout.envs)
    assert one.update(late)["off_policy_error"] == pytest.approx(2 / 8)


def test_it_learns_what_the_return_may_be():
    """Action 0 pays 0, action 1 pays -1 or 3 by chance: half of its quantiles are low, half high, the mean is 1."""
    options = {"update_ratio": 4, "warmup": 0, "quantiles": 8, "kappa": 0.1, "batch_size": 64, "capacity": 1000}
    one = learner(QRDQN(**SMALL | options, learning_rate=0.01))
    stream = Stream(spaces(), 4, 8)
    for k in range(12):
        rollout = stream.next()
        columns = rollout.segments[0].columns
        rollout.segments[0].obs["obs"][...] = 0.5
        chance = np.arange(32).reshape(8, 4) + k
        columns["action"][...] = chance // 2 % 2
        columns["reward"][...] = np.where(columns["action"] == 1, np.where(chance % 2 == 1, 3.0, -1.0), 0.0)
        columns["terminated"][...], columns["truncated"][...] = True, False
        metrics = one.update(rollout)
    with torch.no_grad():
        outputs = one._online.trace(one._tensor(np.full((1, 3), 0.5, np.float32)))[-1].reshape(2, 8).numpy()
    np.testing.assert_allclose(outputs[0], 0, atol=0.1)
    np.testing.assert_allclose(np.sort(outputs[1]), [-1] * 4 + [3] * 4, atol=0.25)
    assert metrics["q_max"] == pytest.approx(1, abs=0.15)


def test_it_learns_to_balance_a_pole():
    config = QRDQN(
        hidden=(64, 64), batch_size=64, warmup=500, update_ratio=0.25, learning_rate=1e-3, gamma=0.98, target_every=100,
        quantiles=16, epsilon_fraction=0.5, n_step=3, max_grad_norm=10.0,
    )  # fmt: skip
    spec = resolve_env("CartPole-v1", in_process=True)
    one = plain_loop(config, spec, envs=8, group_size=8, steps=32, seed=1, rollouts=40, degree=1, planned_rollouts=40)
    found = probe(spec, 8)
    policy = config.policy(found.spaces)
    policy.begin({name: np.array(array) for name, array in one.weights().items()}, 0, None, 0)
    returns, _ = run_episodes(found.spec, found.spaces, policy, 16, 0, 8)
    assert returns.mean() >= 100  # by chance: 22


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits():
    config = QRDQN(**SMALL, n_step=3, priority_exponent=0.5)
    a, b, c = (digest(loop(config, 5, degree=1, seed=seed).state_dict()) for seed in (5, 5, 6))
    assert a == b != c


def test_another_number_of_quantiles_is_refused_by_name():
    state = learner(QRDQN(**SMALL)).state_dict()
    with pytest.raises(ValueError, match=r"advantage\.0\.weight: expected float32 \[10, 16\], got float32 \[12, 16\]"):
        learner(QRDQN(**SMALL | {"quantiles": 5})).load_state_dict(state)
