"""Networks, flat parameters and Adam against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from experience import spaces
from gymnasium.spaces import Box, MultiDiscrete

from aiorl.networks import MLP, ActorCritic, Adam, Categorical, FlatParameters, Gaussian, QNetwork, torch_rng


def rng(seed: int = 0) -> torch.Generator:
    return torch_rng(np.random.default_rng(seed))


def assert_gradients(flat: FlatParameters, module: torch.nn.Module, loss: torch.Tensor) -> None:
    """What `backward` has set is what autograd finds for `loss`."""
    expected = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(flat.grad, torch.cat([g.reshape(-1) for g in expected]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("activate_last", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 16, 16, 2), (9, 7, 30)])
def test_traces_and_their_gradients_are_those_of_autograd(sizes: tuple[int, ...], activation: str, activate_last: bool):
    net = MLP(sizes, activation, rng(), last_gain=1.0, activate_last=activate_last)
    flat = FlatParameters(net)
    x = torch.randn(11, sizes[0], generator=rng(1), requires_grad=True)
    direction = torch.randn(11, sizes[-1], generator=rng(2))
    with torch.no_grad():
        seen = net.trace(x)
        d_x = net.backward(seen, direction, to_input=True)
    y = net(x)
    torch.testing.assert_close(seen[-1], y, atol=1e-6, rtol=1e-5)
    loss = (y * direction).sum()
    assert_gradients(flat, net, loss)
    torch.testing.assert_close(d_x, torch.autograd.grad((net(x) * direction).sum(), x)[0], atol=1e-5, rtol=1e-5)


def test_weights_are_orthogonal_and_come_from_the_generator_alone():
    state = torch.random.get_rng_state()
    net, same, other = (MLP((4, 8, 2), "tanh", rng(seed), last_gain=0.01) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, last = net[0].weight, net[1].weight
    torch.testing.assert_close(first.t() @ first, 2 * torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(last @ last.t(), 1e-4 * torch.eye(2), atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first, other[0].weight)


def test_log_probabilities_and_entropies_are_those_of_torch():
    logits, actions = torch.randn(6, 4, generator=rng()), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.distributions.Categorical(logits=logits)
    found = Categorical(logits, actions)
    torch.testing.assert_close(found.log_prob, expected.log_prob(actions))
    torch.testing.assert_close(found.entropy, expected.entropy())
    mean, log_std, chosen = torch.randn(6, 3), torch.randn(3), torch.randn(6, 3)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    found = Gaussian(mean, log_std, chosen)
    torch.testing.assert_close(found.log_prob, normal.log_prob(chosen), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, normal.entropy())


@pytest.mark.parametrize("action", [None, MultiDiscrete([3, 2]), Box(-1, 1, (2,), np.float32)])
def test_gradients_of_actor_and_critic_are_those_of_autograd(action: Any):
    space = spaces(action)
    net = ActorCritic(3, space.action, (8,), "tanh", rng(), log_std=-0.3)
    with torch.no_grad():
        net.actor[-1].weight.mul_(100)  # away from the uniform policy, where the entropy has no gradient
    flat = FlatParameters(net)
    obs, a, c = torch.randn(5, 3), torch.randn(5), torch.randn(5)
    stored = torch.from_numpy(space.sample_actions(5, np.random.default_rng(0))).reshape(5, -1)
    with torch.no_grad():
        found = net.evaluate(obs, stored)
        found.backward(a, -0.3, c)
    expected = net.distribution(net.actor(obs), stored)
    torch.testing.assert_close(found.distribution.log_prob, expected.log_prob, atol=1e-5, rtol=1e-5)
    values = net.critic(obs).squeeze(1)
    torch.testing.assert_close(found.value, values)
    assert_gradients(flat, net, (expected.log_prob * a).sum() - 0.3 * expected.entropy.sum() + (values * c).sum())


@pytest.mark.parametrize("action", [None, MultiDiscrete([3, 2]), Box(-1, 1, (2,), np.float32)])
def test_arrays_give_what_tensors_give(action: Any):
    """On a GPU the learners compute with tensors throughout, in main memory with arrays after the last layer."""
    space = spaces(action)
    net = ActorCritic(3, space.action, (8,), "tanh", rng(), log_std=-0.3)
    flat, draw = FlatParameters(net), np.random.default_rng(0)
    obs = torch.from_numpy(draw.normal(size=(50, 3)).astype(np.float32))
    a, c = (draw.normal(size=50).astype(np.float32) for _ in range(2))
    stored = space.sample_actions(50, draw).reshape(50, -1)
    found: list[list[torch.Tensor]] = []
    for like in (torch.from_numpy, np.array):
        flat.grad.fill_(np.nan)
        with torch.no_grad():
            seen = net.evaluate(obs, like(stored))
            seen.backward(like(a), -0.3, like(c))
        values = (seen.distribution.log_prob, seen.distribution.entropy, seen.value)
        found.append([*(torch.tensor(x.tolist()) for x in values), flat.grad.clone()])
    for from_tensors, from_arrays in zip(*found, strict=True):
        torch.testing.assert_close(from_arrays, from_tensors, atol=1e-5, rtol=1e-5)


def test_multi_discrete_is_the_sum_of_its_parts():
    space = spaces(MultiDiscrete([3, 2]))
    net = ActorCritic(3, space.action, (8,), "tanh", rng())
    outputs, stored = torch.randn(4, 5), torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1]])
    parts = [torch.distributions.Categorical(logits=o) for o in outputs.split([3, 2], 1)]
    found = net.distribution(outputs, stored)
    torch.testing.assert_close(found.log_prob, parts[0].log_prob(stored[:, 0]) + parts[1].log_prob(stored[:, 1]))
    torch.testing.assert_close(found.entropy, parts[0].entropy() + parts[1].entropy())


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("hidden", [(8, 6), (8,)])
def test_action_values_and_their_gradients(hidden: tuple[int, ...], dueling: bool):
    net = QNetwork(3, 4, hidden, "relu", rng(), dueling=dueling)
    flat = FlatParameters(net)
    obs, direction = torch.randn(5, 3), torch.randn(5, 4)
    with torch.no_grad():
        seen = net.trace(obs)
        net.backward(seen, direction)
    q = net(obs)
    torch.testing.assert_close(seen[-1], q, atol=1e-6, rtol=1e-5)
    assert_gradients(flat, net, (q * direction).sum())
    if net.state_value is not None:
        torch.testing.assert_close(q.mean(1, keepdim=True), net.state_value(net.torso(obs)))


@pytest.mark.parametrize("hidden", [(16, 12), (12,)])
def test_dueling_streams_are_more_than_one_linear_layer_on_what_they_share(hidden: tuple[int, ...]):
    obs = torch.randn(200, 3, generator=rng())

    def unexplained(net: QNetwork) -> list[float]:
        """Share of the variance of the action values, and of both streams, that no linear layer on the torso gives."""
        shared, outputs = net.torso(obs), [net(obs), net.advantage(net.torso(obs))]
        if net.state_value is not None:
            outputs.append(net.state_value(shared))
        given = torch.cat([shared, torch.ones(len(obs), 1)], 1).detach().double().numpy()
        found = []
        for y in (out.detach().double().numpy() for out in outputs):
            rest = y - given @ np.linalg.lstsq(given, y, rcond=None)[0]
            found.append(rest.var() / y.var())
        return found

    assert max(unexplained(QNetwork(3, 4, hidden, "relu", rng(), dueling=False))) < 1e-9
    dueling = QNetwork(3, 4, hidden, "relu", rng(), dueling=True)
    for parameter in dueling.parameters():  # small ones are nearly linear
        parameter.data *= 4
    streams = unexplained(dueling)
    assert len(streams) == 3
    assert min(streams) > 0.01


def test_both_streams_have_a_last_hidden_layer_of_their_own():
    net = QNetwork(3, 4, (16, 12), "relu", rng(), dueling=True)
    sizes = {name: list(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert sizes == {
        "torso.0.weight": [16, 3], "advantage.0.weight": [12, 16], "advantage.1.weight": [4, 12],
        "state_value.0.weight": [12, 16], "state_value.1.weight": [1, 12],
    }  # fmt: skip


def test_parameters_and_gradients_are_views_of_two_vectors():
    net = MLP((3, 4, 2), "tanh", rng(), last_gain=1.0)
    flat = FlatParameters(net)
    net(torch.ones(2, 3)).sum().backward()
    grads = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    assert torch.equal(grads, flat.grad)
    assert grads.abs().sum() > 0
    before = flat.arrays()
    flat.vector.add_(1.0)
    np.testing.assert_allclose(net[0].weight.detach().numpy(), before["0.weight"] + 1)
    flat.load(before)
    assert all((before[name] == array).all() for name, array in flat.arrays().items())
    with pytest.raises(ValueError, match=r"parameters\.0\.bias: expected float32 \[4\], got float32 \[5\]"):
        flat.load(before | {"0.bias": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match=r"parameters\.1\.weight is missing"):
        flat.load({name: array for name, array in before.items() if name != "1.weight"})


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_torchs(max_norm: float):
    net = MLP((3, 4, 2), "tanh", rng(), last_gain=1.0)
    flat = FlatParameters(net)
    net(torch.ones(2, 3)).sum().backward()
    twin = [p.detach().clone().requires_grad_() for p in net.parameters()]
    for copy, p in zip(twin, net.parameters(), strict=True):
        copy.grad = p.grad.clone() if p.grad is not None else None
    expected = torch.nn.utils.clip_grad_norm_(twin, max_norm)
    torch.testing.assert_close(flat.clip_grad(max_norm), expected)
    torch.testing.assert_close(flat.grad, torch.cat([p.grad.reshape(-1) for p in twin if p.grad is not None]))


@pytest.mark.parametrize("dueling", [False, True])
def test_action_values_begin_as_in_the_paper_of_dqn(dueling: bool):
    """Every weight and bias uniform within 1 / sqrt(inputs), which is torch's default."""
    net = QNetwork(30, 5, (64, 48), "relu", rng(), dueling=dueling)
    for name, parameter in net.named_parameters():
        bound = net.get_parameter(name.replace("bias", "weight")).shape[1] ** -0.5
        assert 0.5 * bound < float(parameter.detach().abs().max()) <= bound, name
        assert parameter.numel() < 200 or float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    same, other = (QNetwork(30, 5, (64, 48), "relu", rng(seed), dueling=dueling) for seed in (0, 1))
    assert torch.equal(same.torso[0].weight, net.torso[0].weight)  # type: ignore[union-attr]
    assert not torch.equal(other.torso[0].weight, net.torso[0].weight)  # type: ignore[union-attr]


def test_adam_is_torchs():
    net = MLP((3, 4, 2), "tanh", rng(), last_gain=1.0)
    flat = FlatParameters(net)
    adam = Adam(flat, eps=1e-5)
    twin = flat.vector.clone().requires_grad_()
    torchs = torch.optim.Adam([twin], eps=1e-5)
    for step, rate in enumerate((0.1, 0.1, 0.01, 0.0)):
        flat.grad.copy_(torch.randn(flat.grad.shape, generator=rng(step)))
        twin.grad = flat.grad.clone()
        torchs.param_groups[0]["lr"] = rate
        torchs.step()
        adam.step(rate)
        torch.testing.assert_close(flat.vector, twin.detach(), atol=1e-6, rtol=1e-5)


def test_adam_keeps_nothing_subnormal_of_gradients_that_stay_zero():
    flat = FlatParameters(MLP((8, 16, 4), "relu", rng(), last_gain=1.0))
    adam = Adam(flat, eps=1e-8)
    twin = flat.vector.clone().requires_grad_()
    torchs = torch.optim.Adam([twin], eps=1e-8, fused=True)
    dead = torch.rand(flat.grad.shape, generator=rng(1)) < 0.5
    for step in range(1_200):
        flat.grad.copy_(torch.randn(flat.grad.shape, generator=rng(step)))
        if step >= 100:
            flat.grad[dead] = 0.0
        twin.grad = flat.grad.clone()
        torchs.step()
        adam.step(1e-3)
    assert torch.equal(flat.vector, twin.detach())

    def subnormal(numbers: np.ndarray) -> int:
        return int(((numbers != 0) & (np.abs(numbers) < np.finfo(np.float32).tiny)).sum())

    assert subnormal(torchs.state[twin]["exp_avg"].numpy()) == int(dead.sum())
    state = adam.state_dict()
    assert sum(subnormal(array) for key in ("mean", "square") for array in state[key].values()) == 0


def test_adam_goes_on_from_its_state():
    def make(seed: int) -> tuple[FlatParameters, Adam]:
        flat = FlatParameters(MLP((3, 4, 2), "tanh", rng(seed), last_gain=1.0))
        return flat, Adam(flat, eps=1e-5)

    (a, adam_a), (b, adam_b) = make(0), make(1)
    a.grad.fill_(0.5)
    adam_a.step(0.1)
    b.load(a.arrays())
    adam_b.load_state_dict(adam_a.state_dict())
    for flat, adam in ((a, adam_a), (b, adam_b)):
        flat.grad.fill_(-0.3)
        adam.step(0.1)
    assert torch.equal(a.vector, b.vector)
    wrong = adam_a.state_dict()
    wrong["square"]["0.weight"] = wrong["square"]["0.weight"].astype(np.float64)
    with pytest.raises(ValueError, match=r"optimizer\.square\.0\.weight: expected float32 .* got float64"):
        adam_b.load_state_dict(wrong)
