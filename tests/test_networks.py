"""Networks, flat parameters and Adam against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from experience import spaces
from gymnasium.spaces import Box, MultiDiscrete

from aiorl.networks import MLP, ActorCritic, Adam, FlatParameters, QNetwork, categorical, gaussian, torch_rng


def rng(seed: int = 0) -> torch.Generator:
    return torch_rng(np.random.default_rng(seed))


@pytest.mark.parametrize("activate_last", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 16, 16, 2), (9, 7, 30)])
def test_the_fused_network_is_the_layered_one(sizes: tuple[int, ...], activation: str, activate_last: bool):
    net = MLP(sizes, activation, rng(), last_gain=1.0, activate_last=activate_last)
    x = torch.randn(11, sizes[0], generator=rng(1), requires_grad=True)
    direction = torch.randn(11, sizes[-1], generator=rng(2))
    fused, layered = net(x), net.layer_by_layer(x)
    torch.testing.assert_close(fused, layered, atol=1e-6, rtol=1e-5)
    inputs = [x, *net.parameters()]
    for a, b in zip(
        torch.autograd.grad(fused, inputs, direction), torch.autograd.grad(layered, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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
    log_prob, entropy = categorical(logits, actions)
    torch.testing.assert_close(log_prob, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())
    mean, log_std, chosen = torch.randn(6, 3), torch.randn(3), torch.randn(6, 3)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    log_prob, entropy = gaussian(mean, log_std, chosen)
    torch.testing.assert_close(log_prob, normal.log_prob(chosen), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, normal.entropy())


@pytest.mark.parametrize("action", [None, MultiDiscrete([3, 2]), Box(-1, 1, (2,), np.float32)])
def test_actor_and_critic_are_separate(action):
    space = spaces(action)
    net = ActorCritic(3, space.action, (8,), "tanh", rng())
    obs = torch.randn(5, 3)
    stored = torch.from_numpy(space.sample_actions(5, np.random.default_rng(0))).reshape(5, -1)
    log_prob, entropy = net.log_prob_and_entropy(obs, stored)
    assert log_prob.shape == entropy.shape == net.value(obs).shape == (5,)
    log_prob.sum().backward()
    assert all(p.grad is None for p in net.critic.parameters())
    assert all(p.grad is not None for p in net.actor.parameters())


def test_multi_discrete_is_the_sum_of_its_parts():
    space = spaces(MultiDiscrete([3, 2]))
    net = ActorCritic(3, space.action, (8,), "tanh", rng())
    obs, stored = torch.randn(4, 3), torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1]])
    parts = [torch.distributions.Categorical(logits=o) for o in net.actor(obs).split([3, 2], 1)]
    log_prob, entropy = net.log_prob_and_entropy(obs, stored)
    torch.testing.assert_close(log_prob, sum(p.log_prob(stored[:, i]) for i, p in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts))


def test_dueling_advantages_have_mean_zero():
    net = QNetwork(3, 4, (8,), "relu", rng(), dueling=True)
    assert net.state_value is not None
    obs = torch.randn(5, 3)
    torch.testing.assert_close(net(obs).mean(1, keepdim=True), net.state_value(net.torso(obs)))


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
