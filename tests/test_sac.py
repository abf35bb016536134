"""SAC: losses against autograd and closed forms, the temperature, acting, the exact ratio, everything resumable."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from plain_loop import plain_loop
from scipy import stats
from torch.nn import functional as F

from aiorl.acting import LOG_STD_MAX, LOG_STD_MIN
from aiorl.algos.base import Algorithm, Learner, Policy
from aiorl.algos.bounded import ActionRange
from aiorl.algos.sac import SAC, SACLearner
from aiorl.buffers.replay import Batch, gradient_steps_owed
from aiorl.continuous import Ensemble, SquashedGaussian, TwinCritics, twin_loss
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


def learner(config: SAC, **changes: Any) -> SACLearner:
    return config.learner(spaces(PLANE), context(**changes))


def test_it_follows_the_protocols():
    config, space = SAC(**SMALL), spaces(PLANE)
    assert isinstance(config, Algorithm)
    assert isinstance(config.policy(space), Policy)
    assert isinstance(config.learner(space, context()), Learner)
    assert config.corrects_staleness


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Discrete(2), "needs a Box action space, this environment has Discrete\n.*ppo"),
        (MultiDiscrete([2, 2]), "needs a Box action space, this environment has MultiDiscrete\n.*ppo"),
        (Box(np.float32([-1, 0]), np.float32([1, np.inf])), r"finite bounds .* number 1 has \[0, inf\]\n"),
        (Box(-1e300, 1e300, (1,), np.float64), r"finite bounds .* number 0 has \[-inf, inf\]\n"),  # in float32
        (Box(-1, 1, (0,), np.float32), "action space is empty"),
    ],
)
def test_only_boxes_with_finite_bounds(action: Any, words: str):
    with pytest.raises(ConfigError, match=f"^sac.*{words}"):
        SAC().check(spaces(action))
    SAC().check(spaces(PLANE))


def test_actions_fill_their_bounds():
    range_ = ActionRange(spaces(PLANE).action)
    unit = np.array([[-1, -1], [0, 0], [1, 1]], np.float32)
    stored = range_.stored(unit)
    assert stored.tolist() == [LOW.tolist(), [0, 0.5], HIGH.tolist()]
    assert range_.unit(stored).tolist() == unit.tolist()
    nothing = ActionRange(spaces(Box(np.float32([1, 0]), np.float32([1, 1]))).action)
    assert nothing.unit(nothing.stored(unit))[:, 0].tolist() == [0, 0, 0]


# -- what is learned, in closed form -----------------------------------------------------------------------------------


def test_the_log_density_has_the_correction_for_tanh():
    rng = np.random.default_rng(0)
    outputs, noise = (rng.normal(0, 0.5, (64, n)).astype(np.float32) for n in (4, 2))
    found = SquashedGaussian(torch.from_numpy(outputs), torch.from_numpy(noise))
    action = found.action.double().numpy()
    mean, std = outputs[:, :2], np.exp(outputs[:, 2:])
    np.testing.assert_allclose(action, np.tanh(mean + std * noise), rtol=1e-5)
    expected = stats.norm.logpdf(np.arctanh(action), mean, std) - np.log(1 - action**2)
    np.testing.assert_allclose(found.log_prob.numpy(), expected.sum(1), rtol=1e-3, atol=1e-3)


def test_the_log_density_is_that_of_something_with_area_one():
    u = torch.linspace(-12, 12, 20_001).unsqueeze(1)
    found = SquashedGaussian(torch.tensor([0.3, -0.2]).expand(len(u), 2), (u - 0.3) / math.exp(-0.2))
    assert torch.trapezoid(found.log_prob.double().exp(), found.action[:, 0].double()).item() == pytest.approx(1, abs=1e-4)
    far = SquashedGaussian(torch.tensor([[40.0, 0.0]]), torch.zeros(1, 1))  # where 1 - tanh^2 is 0 in float32
    assert far.log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 40), rel=1e-5)


def test_deviations_are_limited_and_get_no_gradient_beyond():
    outputs = torch.tensor([[0.0, -50.0], [0.0, 0.0], [0.0, 50.0]])
    found = SquashedGaussian(outputs, torch.full((3, 1), 1e-3))
    limited = torch.tensor([LOG_STD_MIN, 0.0, LOG_STD_MAX])
    assert found.action[:, 0].tolist() == pytest.approx((limited.exp() * 1e-3).tanh().tolist())
    grad = found.backward(torch.ones(3, 1), torch.tensor(1.0))
    assert (grad[:, 1] != 0).tolist() == [False, True, False]


def batch_of(n: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    obs, next_obs = ({"obs": rng.normal(size=(n, 3)).astype(np.float32)} for _ in range(2))
    discounts = np.where(rng.random(n) < 0.3, 0.0, 0.9)
    action, returns, place = rng.uniform(LOW, HIGH, (n, 2)).astype(np.float32), rng.normal(size=n), np.arange(n)
    return Batch(obs, action, returns, discounts, next_obs, index=place, generation=place, weights=np.ones(n))


def mlp(parameters: dict[str, torch.Tensor], obs: torch.Tensor) -> torch.Tensor:
    x = obs
    for i in range(3):
        x = F.linear(x.relu() if i else x, parameters[f"actor.{i}.weight"], parameters[f"actor.{i}.bias"])
    return x


def critics(parameters: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """[2, N]"""
    rows: list[torch.Tensor] = []
    for which in (0, 1):
        x = torch.cat(inputs, 1)
        for i in range(3):
            x = F.linear(x.relu() if i else x, parameters[f"weight.{i}"][which], parameters[f"bias.{i}"][which])
        rows.append(x.squeeze(1))
    return torch.stack(rows)


def tensors(arrays: dict[str, Array], *, learned: bool = False) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()).requires_grad_(learned) for name, array in arrays.items()}


def first_step_of_adam(parameter: torch.Tensor, rate: float) -> None:
    """Its moments are the gradient and its square. The parameter is not learned any further."""
    grad = parameter.grad
    parameter.requires_grad_(False).sub_(rate * grad / (grad.abs() + 1e-8))


def test_one_step_is_what_autograd_makes_of_the_papers_losses():
    """Gradients of critics, actor and temperature, and Adam's and Polyak's steps in their order."""
    config = SAC(**SMALL, alpha=0.4, tau=0.1, target_entropy=-1.5, learning_rate=0.01)
    one = learner(config)
    before = one.state_dict()
    actor, critic = (tensors(s["parameters"], learned=True) for s in (before, before["critics"]))
    target, log_alpha = tensors(before["critics"]["target"]), actor.pop("log_alpha")
    batch = batch_of(16)
    with torch.no_grad():
        metrics = one._step(batch, 0.01, np.random.default_rng(7))

    noise = torch.from_numpy(np.random.default_rng(7).standard_normal((32, 2), np.float32))
    obs, next_obs = (torch.from_numpy(leaves["obs"]) for leaves in (batch.obs, batch.next_obs))

    def act(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = mlp(actor, x).chunk(2, 1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = mean + normal.scale * noise
        return u.tanh(), (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum(1)

    with torch.no_grad():
        next_action, next_log_prob = act(next_obs, noise[16:])
        soft = critics(target, next_obs, next_action).amin(0) - 0.4 * next_log_prob
        targets = torch.from_numpy(batch.returns + batch.discounts * soft.numpy()).float()
    unit = torch.from_numpy((batch.action - [0, 0.5]) / [2, 0.5]).float()
    loss = sum(0.5 * F.mse_loss(q, targets) for q in critics(critic, obs, unit))
    assert metrics["critic_loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in critic.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for p in critic.values():
        first_step_of_adam(p, 0.01)

    action, log_prob = act(obs, noise[:16])
    actor_loss = (0.4 * log_prob - critics(critic, obs, action).amin(0)).mean()
    alpha_loss = -(log_alpha * (log_prob.detach() - 1.5)).sum() / 16
    assert metrics["actor_loss"] == pytest.approx(actor_loss.item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(-log_prob.mean().item(), rel=1e-4)
    (actor_loss + alpha_loss).backward()
    for p in (*actor.values(), log_alpha):
        first_step_of_adam(p, 0.01)

    after = one.state_dict()
    for name, value in (actor | {"log_alpha": log_alpha}).items():
        np.testing.assert_allclose(after["parameters"][name], value.detach().numpy(), atol=2e-4, err_msg=name)
    for name, value in critic.items():
        np.testing.assert_allclose(after["critics"]["parameters"][name], value.numpy(), atol=2e-4, err_msg=name)
        followed = target[name] + 0.1 * (value - target[name])
        np.testing.assert_allclose(after["critics"]["target"][name], followed.numpy(), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradients_of_the_ensemble(activation: str):
    net = Ensemble(2, 5, (7, 6), activation, torch.Generator().manual_seed(1))
    x, coef = torch.randn(9, 5, requires_grad=True), torch.randn(2, 9)
    activate = torch.tanh if activation == "tanh" else torch.relu
    y = x.expand(2, 9, 5)
    for i, (weight, bias) in enumerate(zip(net.weight, net.bias, strict=True)):
        y = torch.bmm(activate(y) if i else y, weight.transpose(1, 2)) + bias.unsqueeze(1)
    (y.squeeze(2) * coef).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    with torch.no_grad():
        seen = net.trace(x)
        assert torch.allclose(seen[-1], y, atol=1e-6)
        for p in net.parameters():
            p.grad.zero_()
        net.backward(seen, coef)
        assert all(torch.allclose(p.grad, e, atol=1e-5) for p, e in zip(net.parameters(), expected, strict=True))
        assert torch.allclose(net.input_gradient(seen, coef, 2), x.grad[:, 2:], atol=1e-5)


def test_a_mistaken_shape_is_refused():
    with pytest.raises(ValueError, match=r"values has shape \[4\], but targets has \[4, 1\]"):
        twin_loss(torch.zeros(2, 4), torch.zeros(4, 1))


@pytest.mark.parametrize(("target", "rises"), [(-10.0, False), (10.0, True)])
def test_the_temperature_goes_after_the_target_entropy(target: float, rises: bool):
    one = learner(SAC(**SMALL, target_entropy=target))
    free, fixed = (
        np.exp(learner(c).state_dict()["parameters"]["log_alpha"]) for c in (SAC(**SMALL), SAC(**SMALL, alpha=0.2))
    )
    assert (free.item(), fixed.item()) == pytest.approx((1.0, 0.2))
    with torch.no_grad():
        for seed in range(20):
            metrics = one._step(batch_of(16, seed), 0.01, np.random.default_rng(seed))
    assert (metrics["alpha"] > 1.0) == rises
    still = learner(SAC(**SMALL, tune_alpha=False, alpha=0.2))
    with torch.no_grad():
        assert still._step(batch_of(16), 0.01, np.random.default_rng(0))["alpha"] == pytest.approx(0.2)
    assert still.state_dict()["parameters"]["log_alpha"] == pytest.approx(math.log(0.2))


def test_a_clipped_gradient_leaves_the_temperature_alone():
    short, free = (learner(SAC(**SMALL, max_grad_norm=limit, target_entropy=-50.0)) for limit in (1e-3, None))
    with torch.no_grad():
        a, b = (one._step(batch_of(16), 0.01, np.random.default_rng(0)) for one in (short, free))
    assert a["grad_norm"] == b["grad_norm"] > 1e-3
    moments = short.state_dict(), free.state_dict()
    clipped, whole = (np.concatenate([x.ravel() for x in s["critics"]["optimizer"]["mean"].values()]) for s in moments)
    assert np.linalg.norm(clipped) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert np.linalg.norm(whole) > 1e-3
    clipped, whole = (s["optimizer"]["mean"]["log_alpha"] for s in moments)
    assert clipped == whole != 0


# -- acting ------------------------------------------------------------------------------------------------------------


def test_acting_is_what_the_learner_thinks_it_is():
    config, space = SAC(**SMALL), spaces(PLANE)
    one, policy = learner(config), config.policy(space)
    assert not any("log_alpha" in name or "weight." in name for name in one.weights() if not name.startswith("actor."))
    obs = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    outputs = mlp(tensors({k: v for k, v in one.weights().items() if k.startswith("actor.")}), torch.from_numpy(obs)).numpy()

    def act(rng: np.random.Generator | None, rollout: int = 9) -> tuple[Array, Any]:
        policy.begin(one.weights(), rollout, rng, 1)
        return policy.act({"obs": obs}, np.zeros(len(obs), bool))

    greedy = act(None)[0]
    np.testing.assert_allclose(greedy, np.tanh(outputs[:, :2]) * [2, 0.5] + [0, 0.5], atol=1e-5)
    drawn, extra = act(np.random.default_rng(0))
    np.testing.assert_allclose(extra["mean"], np.tanh(outputs[:, :2]), atol=1e-5)
    z = (np.arctanh((drawn - [0, 0.5]) / [2, 0.5]) - outputs[:, :2]) / np.exp(outputs[:, 2:])
    assert stats.kstest(z.ravel(), "norm").pvalue > 0.01
    assert (act(np.random.default_rng(0))[0] == drawn).all()


def test_the_first_rollouts_are_random():
    config, space = SAC(**SMALL), spaces(PLANE)  # 30 steps are less than one rollout of 4 x 8
    one, policy = learner(config), config.policy(space)
    obs = {"obs": np.zeros((4000, 3), np.float32)}
    for rollout, uniform in ((0, True), (1, False)):
        policy.begin(one.weights(), rollout, np.random.default_rng(0), 1)
        action = policy.act(obs, np.zeros(4000, bool))[0]
        assert all(
            (stats.kstest(action[:, i], "uniform", (LOW[i], HIGH[i] - LOW[i])).pvalue > 0.01) == uniform for i in (0, 1)
        )
        policy.begin(one.weights(), rollout, None, 1)
        assert len(np.unique(policy.act(obs, np.zeros(4000, bool))[0], axis=0)) == 1
    assert learner(SAC(**SMALL | {"random_steps": 33})).weights()["random_rollouts"].tolist() == [2]
    assert learner(SAC(**SMALL | {"random_steps": 0})).weights()["random_rollouts"].tolist() == [0]


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_acting_imports_no_torch(name: str):
    code = (
        f"import sys, numpy as np\nfrom aiorl import {name} as Algorithm\n"
        "from aiorl.envs.spaces import Leaf, Spaces\n"
        "s = Spaces(observation=(Leaf(name='obs', kind='box', dtype='float32', shape=(3,)),),"
        " action=Leaf(name='action', kind='box', dtype='float32', shape=(2,), low=(-1.0,), high=(1.0,)))\n"
        f"w = {{'actor.0.weight': np.ones(({4 if name == 'SAC' else 2}, 3), np.float32),"
        f" 'actor.0.bias': np.ones({4 if name == 'SAC' else 2}, np.float32), 'random_rollouts': np.ones(1, np.int64)}}\n"
        "Algorithm().check(s)\n"
        "for rollout in (0, 1):\n"
        "    policy = Algorithm().policy(s)\n"
        "    policy.begin(w, rollout, np.random.default_rng(0), 4)\n"
        "    policy.act({'obs': np.zeros((2, 3), np.float32)}, np.ones(2, bool))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_a_row", [False, True])
def test_gradient_steps_follow_the_valid_transitions_exactly(takes_a_row: bool):
    tape, one = Tape(resets_take_a_row=takes_a_row), learner(SAC(**SMALL))
    start = digest(one._own_state())
    stored = done = 0
    for _ in range(8):
        rollout = tape.next()
        stored += rollout.env_steps
        metrics = one.update(rollout)
        done += int(metrics["gradient_steps"])
        assert done == gradient_steps_owed(stored, 20, 0.3) == one.state_dict()["critics"]["optimizer"]["steps"]
        assert (digest(one._own_state()) == start) == (done == 0)
        assert all(math.isfinite(value) for value in metrics.values())
    assert done > 0


def test_how_far_the_policy_moved_since_it_acted():
    config, tape = SAC(**SMALL | {"random_steps": 0}), Tape()
    one = learner(config)
    rollout = tape.next()
    mean = rollout.segments[0].columns["mean"]
    with torch.no_grad():
        mean[...] = one._mean(rollout.obs["obs"][:-1].reshape(-1, 3)).reshape(mean.shape) + 0.25
    late = type(rollout)(3, 1, rollout.segments, rollout.envs)
    assert one.update(late)["off_policy_error"] == pytest.approx(0.25, rel=1e-4)
    assert one.update(tape.next())["off_policy_error"] == 0  # the newest version acted
    assert learner(SAC(**SMALL | {"random_steps": 1000})).update(late)["off_policy_error"] == 0  # chance acted


def test_truncation_bootstraps_and_termination_does_not():
    """Reward 1 always, gamma 0.5, the next of three places by chance: in the first the episode terminates, in the second it
    is truncated on the way to the third, so v = (1, 1 + v3 / 2, 1 + (v1 + v2 + v3) / 6)."""
    space, made = spaces(PLANE, Box(0, 1, (3,), np.float32)), Tape()
    config = SAC(**SMALL | {"hidden": (32,), "update_ratio": 2, "warmup": 0, "batch_size": 32}, gamma=0.5, tau=0.1,
                 learning_rate=0.01, alpha=1e-6, tune_alpha=False)  # fmt: skip
    one = config.learner(space, context())
    places = np.eye(3, dtype=np.float32)
    for _ in range(12):
        rollout = made.next()
        (segment,) = rollout.segments
        kind = made.rng.integers(3, size=(9, 4))
        segment.obs["obs"][...] = places[kind]
        segment.columns["reward"][...] = 1.0
        segment.columns["terminated"][...], segment.columns["truncated"][...] = kind[:-1] == 0, kind[:-1] == 1
        segment.clear()
        for t, b in np.argwhere(kind[:-1] < 2).tolist():
            segment.add_final(t, b, {"obs": places[2]})
        one.update(rollout)
    values = one._critics.online.trace(torch.cat([torch.eye(3), torch.zeros(3, 2)], 1))[-1].squeeze(2).detach()
    np.testing.assert_allclose(values.numpy(), [[1, 17 / 9, 16 / 9]] * 2, atol=0.15)


def test_it_finds_the_best_of_all_actions():
    """Reward 1 - |action - (0.5, 0.25)|^2 in units of the bounds, and each step ends the episode."""
    config = SAC(**SMALL | {"hidden": (32,), "update_ratio": 4, "warmup": 32, "capacity": 1000}, learning_rate=0.01,
                 alpha=0.01, tune_alpha=False)  # fmt: skip
    tape, one = Tape(), learner(config)
    best = np.array([0.5, 0.25])
    for _ in range(8):
        rollout = tape.next()
        columns = rollout.segments[0].columns
        rollout.segments[0].obs["obs"][...] = 0.5
        columns["reward"][...] = 1 - np.square((columns["action"] - [0, 0.5]) / [2, 0.5] - best).sum(2)
        columns["terminated"][...], columns["truncated"][...] = True, False
        one.update(rollout)
    with torch.no_grad():
        np.testing.assert_allclose(one._mean(np.full((1, 3), 0.5, np.float32))[0], best, atol=0.2)


def test_an_unusable_loss_leaves_everything_as_it_was_and_is_not_owed_any_more():
    tape, one = Tape(), learner(SAC(**SMALL), warmup=0)
    one.update(tape.next())
    before, bad = digest(one._own_state()), tape.next()
    bad.segments[0].columns["reward"][...] = np.inf
    with pytest.raises(NonFiniteError, match=r"sac: .* gradient step 9: critic_loss (inf|nan).*\n.*sac.learning_rate"):
        one.update(bad)
    assert digest(one._own_state()) == before
    assert one.state_dict()["practice"]["skipped_steps"] == 10
    broken = learner(SAC(**SMALL), warmup=0)
    broken.set(learning_rate=1e38)
    start = digest(broken._own_state())
    with pytest.raises(NonFiniteError):
        broken.update(Tape().next())
    assert digest(broken._own_state()) == start


@pytest.mark.parametrize("part", ["actor", "critics"])
def test_parameters_that_overflow_in_the_last_gradient_step_are_taken_back(part: str, monkeypatch: pytest.MonkeyPatch):
    """No loss shows it: the step was made from finite numbers."""
    one, follow = learner(SAC(**SMALL), warmup=0), TwinCritics.follow
    start, parameters = digest(one._own_state()), one._parameters if part == "actor" else one._critics.parameters

    def overflowing(critics: TwinCritics, tau: float) -> None:
        follow(critics, tau)
        if one._practice.steps == 8:  # of 9
            parameters.vector[-1] = np.inf

    monkeypatch.setattr(TwinCritics, "follow", overflowing)
    with pytest.raises(NonFiniteError, match="sac: not finite after an update: the parameters"):
        one.update(Tape().next())
    assert digest(one._own_state()) == start


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2])
def test_the_same_seed_gives_the_same_bits(degree: int):
    def loop(seed: int) -> str:
        made = plain_loop(
            SAC(**SMALL, n_step=3), resolve_env("Pendulum-v1", in_process=True), envs=4, group_size=2, steps=8,
            seed=seed, rollouts=5, degree=degree, planned_rollouts=8,
        )  # fmt: skip
        return digest(made.state_dict())

    assert loop(5) == loop(5) != loop(6)


def test_a_state_that_does_not_fit_is_refused_by_name():
    state = learner(SAC(**SMALL)).state_dict()
    for key in state:
        with pytest.raises(ValueError, match=f"{key}"):
            learner(SAC(**SMALL)).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"practice\.replay\.rows: this ring has 25, the one saved 50"):
        learner(SAC(**SMALL | {"capacity": 100})).load_state_dict(state)


def test_settings():
    one = learner(SAC(**SMALL, anneal=True))
    one.set(learning_rate=0.1)
    tape = Tape()
    assert [one.update(tape.next())["learning_rate"] for _ in range(3)] == pytest.approx([0.1, 0.09, 0.08])
    with pytest.raises(ValueError, match=r"sac cannot change 'alpha' .* learning_rate"):
        one.set(alpha=0.1)
    with pytest.raises(ValueError, match="positive"):
        one.set(learning_rate=-1.0)
