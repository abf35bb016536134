"""Convolutions: which are chosen, that acting and learning compute the same, gradients against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aiorl import acting, networks
from aiorl.convolution import Convolutions, Network, convolutions_of
from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import ConfigError

ACTION = Leaf(name="action", kind="discrete", dtype="int64", nvec=(3,), start=(0,))
STACK = Leaf(name="obs.0", kind="box", dtype="uint8", shape=(4, 40, 44), low=(0.0,), high=(255.0,), stack=4)
GRID = Leaf(name="obs.1", kind="box", dtype="bool", shape=(10, 9, 4), low=(0.0,), high=(1.0,))
STACKED_GRID = Leaf(name="obs.2", kind="box", dtype="bool", shape=(2, 10, 9, 4), low=(0.0,), high=(1.0,), stack=2)
COLOURS_FIRST = Leaf(name="obs.3", kind="box", dtype="uint8", shape=(3, 8, 9), low=(0.0,), high=(255.0,))
DEEP = Leaf(name="obs.6", kind="box", dtype="float32", shape=(7, 7, 20))
DEEP_FIRST = Leaf(name="obs.7", kind="box", dtype="float32", shape=(20, 7, 7))
STACKED_DEEP = Leaf(name="obs.8", kind="box", dtype="float32", shape=(2, 7, 7, 20), stack=2)
VECTOR = Leaf(name="obs.4", kind="box", dtype="float32", shape=(3,))
CHOICE = Leaf(name="obs.5", kind="discrete", dtype="int64", nvec=(2,), start=(0,))
SEEN = {
    "stack": (STACK,), "grid": (GRID,), "stacked grid": (STACKED_GRID,), "colours first": (COLOURS_FIRST,),
    "between others": (VECTOR, GRID, CHOICE),
}  # fmt: skip


def spaces_with(*leaves: Leaf) -> Spaces:
    return Spaces(observation=leaves, action=ACTION)


def plan_of(*leaves: Leaf, network: Network = "auto") -> Convolutions:
    plan = convolutions_of(spaces_with(*leaves), network)
    assert plan is not None
    return plan


def image_of(leaf: Leaf, value: np.ndarray) -> np.ndarray:
    """[height, width, channels] of one value, by the plainest means."""
    if leaf is STACK:
        return np.stack([frame for frame in value], axis=-1)
    if leaf in (STACKED_GRID, STACKED_DEEP):
        return np.concatenate(list(value), axis=-1)
    return np.moveaxis(value, 0, -1) if leaf in (COLOURS_FIRST, DEEP_FIRST) else value


@pytest.mark.parametrize(
    "leaf",
    [STACK, GRID, STACKED_GRID, COLOURS_FIRST, DEEP, DEEP_FIRST, STACKED_DEEP],
    ids=lambda leaf: leaf.name,
)
def test_images_are_taken_out_of_an_encoded_observation(leaf: Leaf) -> None:
    rng = np.random.default_rng(0)
    spaces, plan = spaces_with(VECTOR, leaf, CHOICE), plan_of(VECTOR, leaf, CHOICE)
    value = rng.integers(0, 2, (5, *leaf.shape)).astype(leaf.dtype)
    obs = {leaf.name: value, VECTOR.name: rng.random((5, 3), np.float32), CHOICE.name: np.array([0, 1, 1, 0, 1])}
    x = spaces.encode(obs)
    scale = 1 / 255 if leaf.is_image else 1
    expected = np.stack([image_of(leaf, v) for v in value]) * np.float32(scale)
    np.testing.assert_array_equal(plan.images(x), expected)
    np.testing.assert_array_equal(plan.images(torch.from_numpy(x)).numpy(), expected)
    before, after = plan.rest(x)
    np.testing.assert_array_equal(before, obs[VECTOR.name])
    np.testing.assert_array_equal(after.argmax(1), obs[CHOICE.name])


@pytest.mark.parametrize(("hidden", "dueling"), [((32, 16), False), ((32, 16), True), ((16,), True)])
@pytest.mark.parametrize("seen", SEEN)
def test_gradients_are_those_of_autograd(seen: str, hidden: tuple[int, ...], dueling: bool) -> None:
    spaces, plan = spaces_with(*SEEN[seen]), plan_of(*SEEN[seen])
    rng = np.random.default_rng(1)
    net = networks.QNetwork(
        spaces.features, 3, hidden, "relu", networks.torch_rng(rng), dueling=dueling, plan=plan
    )  # fmt: skip
    parameters = networks.FlatParameters(net)
    x = torch.from_numpy(rng.random((6, spaces.features), np.float32))
    grad = torch.from_numpy(rng.random((6, 3), np.float32))
    with torch.no_grad():
        trace = net.trace(x)
        net.backward(trace, grad)
    written_out = parameters.grad.clone()
    parameters.grad.zero_()
    outputs = net(x)
    outputs.backward(grad)
    torch.testing.assert_close(trace[-1], outputs)
    torch.testing.assert_close(written_out, parameters.grad)
    assert all(view.grad is not None and bool(view.grad.any()) for view in net.parameters())


@pytest.mark.parametrize("dueling", [False, True])
def test_gradients_of_part_of_a_batch(dueling: bool) -> None:
    """Learners trace two batches at once and go back through one of them."""
    plan, rng = plan_of(GRID), np.random.default_rng(1)
    net = networks.QNetwork(plan.features, 3, (16,), "relu", networks.torch_rng(rng), dueling=dueling, plan=plan)
    parameters = networks.FlatParameters(net)
    x, grad = torch.from_numpy(rng.random((6, plan.features), np.float32)), torch.from_numpy(rng.random((4, 3), np.float32))
    with torch.no_grad():
        net.backward([part[:4] for part in net.trace(x)], grad)
        part = parameters.grad.clone()
        net.backward(net.trace(x[:4]), grad)
    torch.testing.assert_close(part, parameters.grad)


@pytest.mark.parametrize("seen", SEEN)
def test_acting_and_central_inference_compute_the_same(seen: str) -> None:
    spaces, plan = spaces_with(*SEEN[seen]), plan_of(*SEEN[seen])
    rng = np.random.default_rng(2)
    net = networks.make_network(
        spaces.features, (24, 5), "tanh", networks.torch_rng(rng), last_gain=1.0, plan=plan
    )  # fmt: skip
    module = torch.nn.ModuleDict({"actor": net})
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(-1, 1, generator=networks.torch_rng(rng))
    weights = networks.FlatParameters(module).arrays()
    x = rng.random((7, spaces.features), np.float32)
    with torch.no_grad():
        learned = net.trace(torch.from_numpy(x))[-1].numpy()
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        central = networks.apply_network(tensors, "actor", "tanh", torch.from_numpy(x), plan=plan).numpy()
    act = acting.make_network(weights, "actor", "tanh", plan=plan)
    np.testing.assert_allclose(act(x), learned, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(central, learned, rtol=1e-4, atol=1e-5)
    assert act(x).tobytes() == act(x.copy()).tobytes()
    assert act(x).shape == (7, 5)
    np.testing.assert_allclose(act(x[:2]), learned[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("leaf", "network", "layers", "shape"),
    [
        (STACK, "auto", 3, (1, 2, 64)),
        (STACK, "small", 1, (38, 42, 16)),
        (Leaf(name="obs", kind="box", dtype="uint8", shape=(4, 84, 84), stack=4), "light", 2, (9, 9, 32)),
        (Leaf(name="obs", kind="box", dtype="uint8", shape=(20, 20)), "light", 2, (1, 1, 32)),
        (GRID, "auto", 1, (8, 7, 16)),
        (Leaf(name="obs", kind="box", dtype="uint8", shape=(4, 84, 84), stack=4), "auto", 3, (7, 7, 64)),
        (Leaf(name="obs", kind="box", dtype="uint8", shape=(210, 160, 3)), "nature", 3, (22, 16, 64)),
        (Leaf(name="obs", kind="multi_binary", dtype="int8", shape=(6, 6)), "auto", 1, (4, 4, 16)),
        (DEEP, "auto", 1, (5, 5, 16)),
        (Leaf(name="obs", kind="box", dtype="bool", shape=(6, 6, 6)), "auto", 1, (4, 4, 16)),
        (Leaf(name="obs", kind="box", dtype="bool", shape=(7, 8, 20)), "auto", 1, (6, 18, 16)),
    ],
)
def test_what_is_chosen(leaf: Leaf, network: Network, layers: int, shape: tuple[int, int, int]) -> None:
    plan = plan_of(leaf, network=network)
    assert (len(plan.layers), plan.shape) == (layers, shape)


@pytest.mark.parametrize(
    "leaves",
    [
        (VECTOR,),
        (GRID, STACK),  # which of them?
        (Leaf(name="obs", kind="box", dtype="float32", shape=(8, 8)),),  # a table of numbers is no image
        (Leaf(name="obs", kind="box", dtype="float32", shape=(4, 3), stack=4),),
        (Leaf(name="obs", kind="box", dtype="uint8", shape=(3, 3)),),
        (Leaf(name="obs", kind="multi_discrete", dtype="int64", shape=(2, 2), nvec=(2,) * 4, start=(0,) * 4),),
    ],
)
def test_other_observations_get_an_mlp(leaves: tuple[Leaf, ...]) -> None:
    assert convolutions_of(spaces_with(*leaves), "auto") is None
    assert convolutions_of(spaces_with(*leaves), "mlp") is None


@pytest.mark.parametrize(("leaf", "network"), [(GRID, "nature"), (GRID, "light"), (VECTOR, "small")])
def test_a_network_that_does_not_fit_is_refused(leaf: Leaf, network: Network) -> None:
    with pytest.raises(ConfigError, match=f'(?s)network = "{network}" needs one image of at least .* use network = "auto"'):
        convolutions_of(spaces_with(leaf), network)
