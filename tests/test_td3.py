"""TD3: target smoothing, delayed updates, one step against autograd, acting, everything resumable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box, Discrete
from plain_loop import plain_loop
from test_sac import critics, first_step_of_adam, mlp, tensors
from torch.nn import functional as F

from aiorl.algos.base import Algorithm, Learner, Policy
from aiorl.algos.td3 import TD3, TD3Learner
from aiorl.buffers.replay import Batch, gradient_steps_owed
from aiorl.continuous import smoothed
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError, NonFiniteError
from aiorl.segments import Array, Column

SMALL: dict[str, Any] = {
    "hidden": (8, 8), "batch_size": 8, "warmup": 20, "random_steps": 30, "capacity": 200, "update_ratio": 0.3,
}  # fmt: skip
LOW, HIGH = np.array([-2, 0], np.float32), np.array([2, 1], np.float32)
PLANE = Box(LOW, HIGH)


class Tape(Stream):
    """Experience with the column that the policy adds."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(spaces(PLANE), 4, 8, columns={"mean": Column((2,))}, **changes)


def learner(config: TD3, **changes: Any) -> TD3Learner:
    return config.learner(spaces(PLANE), context(**changes))


def batch_of(n: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    obs, next_obs = ({"obs": rng.normal(size=(n, 3)).astype(np.float32)} for _ in range(2))
    discounts = np.where(rng.random(n) < 0.3, 0.0, 0.9)
    action, returns, place = rng.uniform(LOW, HIGH, (n, 2)).astype(np.float32), rng.normal(size=n), np.arange(n)
    return Batch(obs, action, returns, discounts, next_obs, index=place, generation=place, weights=np.ones(n))


def test_it_follows_the_protocols_and_needs_finite_bounds():
    config, space = TD3(**SMALL), spaces(PLANE)
    assert isinstance(config, Algorithm)
    assert isinstance(config.policy(space), Policy)
    assert isinstance(config.learner(space, context()), Learner)
    config.check(space)
    for action in (Discrete(2), Box(-np.inf, np.inf, (2,), np.float32)):
        with pytest.raises(ConfigError, match=r"^td3 needs .*\n.*ppo"):
            config.check(spaces(action))


# -- what is learned, in closed form -----------------------------------------------------------------------------------


def test_smoothing_is_limited_twice():
    action = torch.tensor([[0.0], [0.0], [0.0], [0.9], [-0.9]])
    noise = torch.tensor([[0.1], [0.7], [-0.7], [0.3], [-9.0]])
    assert smoothed(action, noise, 0.5)[:, 0].tolist() == pytest.approx([0.1, 0.5, -0.5, 1.0, -1.0])
    with pytest.raises(ValueError, match=r"noise has shape \[5\]"):
        smoothed(action, noise[:, 0], 0.5)


def test_one_step_is_what_autograd_makes_of_the_papers_losses():
    config = TD3(**SMALL, policy_delay=1, target_noise=0.8, target_noise_clip=0.3, tau=0.1)
    one = learner(config)
    one._target_parameters.vector.mul_(1.5)
    before = one.state_dict()
    actor, critic = (tensors(s["parameters"], learned=True) for s in (before, before["critics"]))
    target_actor, target = tensors(before["target"]), tensors(before["critics"]["target"])
    batch = batch_of(16)
    with torch.no_grad():
        metrics = one._step(batch, 0.01, np.random.default_rng(7))

    noise = torch.from_numpy(0.8 * np.random.default_rng(7).standard_normal((16, 2), np.float32)).float()
    obs, next_obs = (torch.from_numpy(leaves["obs"]) for leaves in (batch.obs, batch.next_obs))
    with torch.no_grad():
        next_action = (mlp(target_actor, next_obs).tanh() + noise.clamp(-0.3, 0.3)).clamp(-1, 1)
        value = critics(target, next_obs, next_action).amin(0)
        targets = torch.from_numpy(batch.returns + batch.discounts * value.numpy()).float()
    unit = torch.from_numpy((batch.action - [0, 0.5]) / [2, 0.5]).float()
    loss = sum(0.5 * F.mse_loss(q, targets) for q in critics(critic, obs, unit))
    assert metrics["critic_loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for p in critic.values():
        first_step_of_adam(p, 0.01)
    actor_loss = -critics(critic, obs, mlp(actor, obs).tanh())[0].mean()
    assert metrics["actor_loss"] == pytest.approx(actor_loss.item(), rel=1e-4)
    actor_loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in actor.values()))
    assert metrics["actor_grad_norm"] == pytest.approx(norm, rel=1e-3)
    for p in actor.values():
        first_step_of_adam(p, 0.01)

    after = one.state_dict()
    pairs = [(actor, target_actor, after), (critic, target, after["critics"])]
    for learned, followed, found in pairs:
        for name, value in learned.items():
            np.testing.assert_allclose(found["parameters"][name], value.numpy(), atol=2e-4, err_msg=name)
            expected = followed[name] + 0.1 * (value - followed[name])
            np.testing.assert_allclose(found["target"][name], expected.numpy(), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_actor_and_targets_wait_for_their_turn(delay: int):
    """Also across updates: the turn is counted in gradient steps, of which these rollouts owe one each."""
    tape, one = Tape(), learner(TD3(**SMALL | {"update_ratio": 1 / 32, "warmup": 0}, policy_delay=delay))
    parts = ("actor", "actor's target", "critics", "critics' target")

    def look() -> list[str]:
        state = one.state_dict()
        critics = state["critics"]
        return [digest(s) for s in (state["parameters"], state["target"], critics["parameters"], critics["target"])]

    seen = look()
    for step in range(1, 8):
        metrics = one.update(tape.next())
        now = look()
        moved = {part for part, a, b in zip(parts, seen, now, strict=True) if a != b}
        assert moved == (set(parts) if step % delay == 0 else {"critics"})
        assert ("actor_loss" in metrics) == (step % delay == 0)
        seen = now


# -- acting ------------------------------------------------------------------------------------------------------------


def test_actions_are_the_mean_with_noise_within_bounds():
    config, space = TD3(**SMALL, noise=0.3), spaces(PLANE)
    one, policy = learner(config), config.policy(space)
    obs = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    actor = tensors({k: v for k, v in one.weights().items() if k.startswith("actor.")})
    mean = mlp(actor, torch.from_numpy(obs)).tanh().numpy()

    def act(rng: np.random.Generator | None, rollout: int = 9) -> tuple[Array, Any]:
        policy.begin(one.weights(), rollout, rng, 1)
        return policy.act({"obs": obs}, np.zeros(len(obs), bool))

    np.testing.assert_allclose(act(None)[0], mean * [2, 0.5] + [0, 0.5], atol=1e-5)
    drawn, extra = act(np.random.default_rng(0))
    np.testing.assert_allclose(extra["mean"], mean, atol=1e-5)
    assert ((drawn >= LOW) & (drawn <= HIGH)).all()
    noise = (drawn - [0, 0.5]) / [2, 0.5] - mean
    assert np.median(np.abs(noise)) == pytest.approx(0.3 * 0.6745, rel=0.1)
    uniform = act(np.random.default_rng(0), rollout=0)[0]
    assert np.quantile(uniform, [0.25, 0.75], axis=0) == pytest.approx(np.array([[-1, 0.25], [1, 0.75]]), abs=0.08)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_gradient_steps_follow_the_valid_transitions_exactly():
    tape, one = Tape(resets_take_a_row=True), learner(TD3(**SMALL))
    stored = done = 0
    for _ in range(8):
        rollout = tape.next()
        stored += rollout.env_steps
        metrics = one.update(rollout)
        done += int(metrics["gradient_steps"])
        assert done == gradient_steps_owed(stored, 20, 0.3) == one.state_dict()["critics"]["optimizer"]["steps"]
        assert all(math.isfinite(value) for value in metrics.values())
    assert done > 0


def test_it_finds_the_best_of_all_actions():
    """Reward 1 - |action - (0.5, 0.25)|^2 in units of the bounds, and each step ends the episode."""
    config = TD3(**SMALL | {"hidden": (32,), "update_ratio": 4, "warmup": 32, "capacity": 1000}, learning_rate=0.01)
    tape, one = Tape(), learner(config)
    best = np.array([0.5, 0.25])
    for _ in range(8):
        rollout = tape.next()
        columns = rollout.segments[0].columns
        rollout.segments[0].obs["obs"][...] = 0.5
        unit = (columns["action"] - [0, 0.5]) / [2, 0.5]
        columns["reward"][...] = 1 - np.square(unit - best).sum(2)
        columns["terminated"][...], columns["truncated"][...] = True, False
        one.update(rollout)
    with torch.no_grad():
        np.testing.assert_allclose(one._mean(np.full((1, 3), 0.5, np.float32))[0], best, atol=0.15)


def test_an_unusable_loss_leaves_everything_as_it_was():
    tape, one = Tape(), learner(TD3(**SMALL), warmup=0)
    one.update(tape.next())
    before, bad = digest(one._own_state()), tape.next()
    bad.segments[0].columns["reward"][...] = np.nan
    with pytest.raises(NonFiniteError, match=r"td3: .* critic_loss nan.*\n.*td3.learning_rate"):
        one.update(bad)
    assert digest(one._own_state()) == before
    assert one.state_dict()["practice"]["skipped_steps"] == 10


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits():
    def loop(seed: int) -> str:
        made = plain_loop(
            TD3(**SMALL, n_step=3), resolve_env("Pendulum-v1", in_process=True), envs=4, group_size=2, steps=8,
            seed=seed, rollouts=5, degree=1, planned_rollouts=8,
        )  # fmt: skip
        return digest(made.state_dict())

    assert loop(5) == loop(5) != loop(6)


def test_a_state_that_does_not_fit_is_refused_by_name():
    state = learner(TD3(**SMALL)).state_dict()
    for key in state:
        with pytest.raises(ValueError, match=f"{key}"):
            learner(TD3(**SMALL)).load_state_dict({k: v for k, v in state.items() if k != key})
