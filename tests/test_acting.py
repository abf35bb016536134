"""The NumPy acting half against torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from experience import spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from aiorl import acting, networks
from aiorl.acting import Categorical, Gaussian, NoiseTape


def generator(seed: int = 0) -> torch.Generator:
    return networks.torch_rng(np.random.default_rng(seed))


@pytest.mark.parametrize("activate_last", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_evaluator_is_the_torch_module(activation: str, activate_last: bool):
    net = networks.MLP((4, 64, 64, 3), activation, generator(), last_gain=1.0, activate_last=activate_last)
    weights = {f"actor.{name}": p.detach().numpy() for name, p in net.named_parameters()}
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    found = acting.MLP(weights, "actor", activation, activate_last=activate_last)(x)
    expected = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_weights_are_used_in_place_and_a_missing_layer_is_named():
    weights = {"actor.0.weight": np.ones((2, 3), np.float32), "actor.0.bias": np.zeros(2, np.float32)}
    mlp = acting.MLP(weights, "actor", "tanh")
    weights["actor.0.bias"][:] = 5
    assert mlp(np.zeros((1, 3), np.float32)).tolist() == [[5, 5]]
    with pytest.raises(KeyError, match=r"critic\.0\.weight"):
        acting.MLP(weights, "critic", "tanh")


def test_there_may_be_no_hidden_layers():
    x = np.ones((2, 3), np.float32)
    assert acting.MLP({}, "torso", "relu", activate_last=True)(x).tolist() == x.tolist()


@pytest.mark.parametrize("activate_last", [False, True])
def test_results_are_new_arrays_and_the_batch_may_change_its_size(activate_last: bool):
    net = networks.MLP((4, 8, 8, 3), "tanh", generator(), last_gain=1.0, activate_last=activate_last)
    weights = {f"actor.{name}": p.detach().numpy() + np.float32(0.5) for name, p in net.named_parameters()}
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    def fresh(rows: np.ndarray) -> list[list[float]]:
        return acting.MLP(weights, "actor", "tanh", activate_last=activate_last)(rows).tolist()

    mlp = acting.MLP(weights, "actor", "tanh", activate_last=activate_last)
    sizes = (5, 2, 2, 5, 1)
    given = [x[:n] * np.float32(i + 1) for i, n in enumerate(sizes)]
    before = [rows.copy() for rows in given]
    found = [mlp(rows) for rows in given]  # all kept: none may be written over by a later call
    assert [rows.tolist() for rows in found] == [fresh(rows) for rows in before]
    assert [rows.tolist() for rows in given] == [rows.tolist() for rows in before]


def test_one_layer_leaves_its_input_alone():
    weights = {"actor.0.weight": np.ones((2, 3), np.float32), "actor.0.bias": np.ones(2, np.float32)}
    x = np.ones((2, 3), np.float32)
    assert acting.MLP(weights, "actor", "relu", activate_last=True)(x).tolist() == [[4, 4], [4, 4]]
    assert x.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_samples_of_batches_of_any_size_follow_each_other():
    head = acting.distribution(spaces(MultiDiscrete([2, 3])).action)
    for n in (4, 2, 7, 4):
        logits = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
        actions, log_prob = head.sample(logits, np.zeros((n, 5), np.float32))
        assert actions.tolist() == head.mode(logits).tolist()
        assert log_prob.shape == (n,)


def test_discrete_log_probabilities_are_exact_and_frequencies_right():
    head = acting.distribution(spaces(Discrete(3)).action)
    assert isinstance(head, Categorical)
    logits = np.tile(np.array([[2.0, 0.0, -1.0]], np.float32), (5000, 1))
    actions, log_prob = head.sample(logits, head.noise(np.random.default_rng(0), 1, 5000)[0])
    expected = torch.distributions.Categorical(logits=torch.from_numpy(logits))
    np.testing.assert_allclose(log_prob, expected.log_prob(torch.from_numpy(actions)).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.bincount(actions) / 5000, expected.probs[0].numpy(), atol=0.02)
    assert (actions.dtype, log_prob.dtype) == (np.int64, np.float32)
    assert head.mode(logits[:2]).tolist() == [0, 0]


def test_multi_discrete_log_probabilities_and_frequencies():
    head = acting.distribution(spaces(MultiDiscrete([2, 3])).action)
    assert isinstance(head, Categorical)
    logits = np.tile(np.array([[1.0, 0.0, 0.0, 0.5, -2.0]], np.float32), (5000, 1))
    actions, log_prob = head.sample(logits, head.noise(np.random.default_rng(0), 1, 5000)[0])
    assert actions.shape == (5000, 2)
    parts = [torch.distributions.Categorical(logits=torch.from_numpy(logits[:, cut])) for cut in (slice(0, 2), slice(2, 5))]
    expected = sum(part.log_prob(torch.from_numpy(actions[:, i])) for i, part in enumerate(parts))
    np.testing.assert_allclose(log_prob, expected.numpy(), atol=1e-6)  # type: ignore[union-attr]
    for i, part in enumerate(parts):
        np.testing.assert_allclose(np.bincount(actions[:, i]) / 5000, part.probs[0].numpy(), atol=0.02)
    assert head.mode(logits[:1]).tolist() == [[0, 1]]


def test_extreme_logits_stay_finite():
    head = acting.distribution(spaces(Discrete(3)).action)
    logits = np.array([[1e30, 0, -1e30], [-1e4, -1e4, -1e4]], np.float32)
    actions, log_prob = head.sample(logits, head.noise(np.random.default_rng(0), 1, 2)[0])
    assert np.isfinite(log_prob).all()
    assert actions[0] == 0


def test_gaussian_log_densities_are_of_the_action_as_rounded():
    head = acting.distribution(spaces(Box(-1, 1, (2,), np.float32)).action)
    assert isinstance(head, Gaussian)
    log_std = np.array([-1.0, 0.5], np.float32)
    head.load(log_std)
    mean = np.tile(np.array([[3.0, -2.0]], np.float32), (5000, 1))
    actions, log_prob = head.sample(mean, head.noise(np.random.default_rng(0), 1, 5000)[0])
    normal = torch.distributions.Normal(torch.from_numpy(mean).double(), torch.from_numpy(log_std).double().exp())
    expected = normal.log_prob(torch.from_numpy(actions)).sum(1)
    np.testing.assert_allclose(log_prob, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(actions.mean(0), [3, -2], atol=0.1)
    np.testing.assert_allclose(actions.std(0), np.exp(log_std), atol=0.05)
    assert actions.dtype == np.float32
    assert head.mode(mean[:1]).tolist() == [[3, -2]]


def test_gaussian_log_densities_stay_exact_where_rounding_matters():
    head = acting.distribution(spaces(Box(-1, 1, (1,), np.float32)).action)
    assert isinstance(head, Gaussian)
    head.load(np.array([-9.0], np.float32))
    mean = np.full((100, 1), 100.0, np.float32)  # neighbouring floats are a tenth of a deviation apart
    actions, log_prob = head.sample(mean, head.noise(np.random.default_rng(0), 1, 100)[0])
    normal = torch.distributions.Normal(torch.from_numpy(mean).double(), np.exp(-9.0))
    np.testing.assert_allclose(log_prob, normal.log_prob(torch.from_numpy(actions)).sum(1).numpy(), atol=1e-4)


def test_noise_is_drawn_for_whole_segments_and_depends_on_the_generator_alone():
    calls: list[tuple[int, int]] = []

    def draw(rng: np.random.Generator, steps: int, n: int) -> np.ndarray:
        calls.append((steps, n))
        return rng.random((steps, n))

    tape = NoiseTape(draw)
    tape.rewind(np.random.default_rng(1), 3)
    seen = [tape.next(2) for _ in range(4)]
    assert calls == [(3, 2), (3, 2)]
    again = np.random.default_rng(1)
    np.testing.assert_array_equal(seen[:3], again.random((3, 2)))
    np.testing.assert_array_equal(seen[3], again.random((3, 2))[0])
    tape.rewind(np.random.default_rng(1), 3)
    np.testing.assert_array_equal(tape.next(2), seen[0])


def test_acting_imports_no_torch():
    code = (
        "import sys, numpy as np\n"
        "from aiorl.algos.ppo import PPO\nfrom aiorl.algos.dqn import DQN\n"
        "from aiorl.envs.spaces import Leaf, Spaces\n"
        "s = Spaces(observation=(Leaf(name='obs', kind='box', dtype='float32', shape=(3,)),),"
        " action=Leaf(name='action', kind='discrete', dtype='int64', nvec=(2,), start=(0,)))\n"
        "w = {f'{n}.0.{k}': np.ones(x, np.float32) for n, i, o in (('actor', 3, 2), ('torso', 3, 8), ('advantage', 8, 2))"
        " for k, x in (('weight', (o, i)), ('bias', o))} | {'epsilon': np.ones(3, np.float32)}\n"
        "for algorithm in (PPO(), DQN()):\n"
        "    policy = algorithm.policy(s)\n"
        "    policy.begin(w, 0, np.random.default_rng(0), 4)\n"
        "    policy.act({'obs': np.zeros((2, 3), np.float32)}, np.ones(2, bool))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
