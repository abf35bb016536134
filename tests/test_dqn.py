"""DQN: acting, the exact number of gradient steps, targets, and everything exact and resumable."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from experience import Stream, context, digest, spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from plain_loop import plain_loop

from aiorl.algos.base import Algorithm, Learner, Policy, Weights
from aiorl.algos.dqn import DQN, epsilon_at
from aiorl.algos.qrdqn import QRDQN
from aiorl.buffers.replay import gradient_steps_owed
from aiorl.config import Config
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError, TrainingError
from aiorl.segments import Array

SMALL: dict[str, Any] = {"hidden": (16,), "batch_size": 8, "warmup": 20, "capacity": 200, "update_ratio": 0.3}


def loop(config: DQN, rollouts: int, **changes: Any) -> Learner:
    fields: dict[str, Any] = {"envs": 4, "group_size": 2, "steps": 8, "seed": 5, "degree": 0, "planned_rollouts": 8}
    return plain_loop(config, resolve_env("CartPole-v1", in_process=True), rollouts=rollouts, **fields | changes)


def test_it_follows_the_protocols():
    config, space = DQN(), spaces()
    assert isinstance(config, Algorithm)
    assert isinstance(config.policy(space), Policy)
    assert isinstance(config.learner(space, context()), Learner)


@pytest.mark.parametrize(
    ("action", "kind"), [(Box(-1, 1, (2,), np.float32), "Box"), (MultiDiscrete([2, 2]), "MultiDiscrete")]
)
def test_only_discrete_actions_and_a_word_on_what_fits(action: Any, kind: str):
    with pytest.raises(ConfigError, match=f"Discrete action space, this environment has {kind}\n.*ppo"):
        DQN().check(spaces(action))
    DQN().check(spaces())


# -- acting ------------------------------------------------------------------------------------------------------------


def test_epsilon_falls_linearly_by_rollout():
    schedule = np.array([1.0, 0.1, 4.0], np.float32)
    assert [epsilon_at(k, schedule) for k in range(6)] == pytest.approx([1, 0.775, 0.55, 0.325, 0.1, 0.1])
    assert epsilon_at(0, np.array([1.0, 0.1, 0.0], np.float32)) == pytest.approx(0.1)


@pytest.mark.parametrize(("hidden", "dueling"), [((16, 16), False), ((16, 16), True), ((16,), True)])
def test_actions_are_greedy_but_for_the_share_of_epsilon(hidden: tuple[int, ...], dueling: bool):
    config = DQN(hidden=hidden, dueling=dueling, epsilon_start=0.4, epsilon_end=0.0, epsilon_fraction=0.5)
    space = spaces(Discrete(5))
    learner = config.learner(space, context(rollouts=10))
    obs = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    q = learner._online(learner._tensor(obs)).detach().numpy()
    policy = config.policy(space)

    def act(rollout: int, rng: np.random.Generator | None) -> Array:
        policy.begin(learner.weights(), rollout, rng, 1)
        return policy.act({"obs": obs}, np.zeros(len(obs), bool))[0]

    greedy = act(0, None)
    assert (greedy == q.argmax(1)).all()
    assert (act(5, np.random.default_rng(0)) == greedy).all()
    weights = {name: torch.from_numpy(np.array(array)) for name, array in learner.weights().items()}
    central = config.forward(space).apply(weights, torch.from_numpy(obs)).numpy()
    assert (greedy == central.argmax(1)).all()
    assert (act(0, np.random.default_rng(0)) != greedy).mean() == pytest.approx(0.4 * 4 / 5, abs=0.03)
    assert (act(0, np.random.default_rng(1)) == act(0, np.random.default_rng(1))).all()


@pytest.mark.parametrize("hidden", [[8], [16, 8]])
def test_dueling_acts_from_images_without_the_stream_of_the_value(hidden: list[int]):
    space = spaces(Discrete(5), Box(0, 255, (6, 6, 2), np.uint8))
    config = DQN(hidden=tuple(hidden), dueling=True)
    learner = config.learner(space, context())
    learner._parameters.vector.mul_(4)  # so that not all images have the same best action
    assert not [name for name in learner.weights() if name.startswith("state_value")]
    images = np.random.default_rng(0).integers(256, size=(500, 6, 6, 2), dtype=np.uint8)
    q = learner._online(learner._tensor(space.encode({"obs": images}))).detach().numpy()
    policy = config.policy(space)
    policy.begin(learner.weights(), 0, None, 1)
    assert (policy.act({"obs": images}, np.zeros(500, bool))[0] == q.argmax(1)).all()
    assert len(set(q.argmax(1))) > 1


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_a_row", [False, True])
def test_gradient_steps_follow_the_valid_transitions_exactly(takes_a_row: bool):
    stream = Stream(spaces(), 4, 8, resets_take_a_row=takes_a_row)
    learner = DQN(**SMALL).learner(stream.space, context())
    start = learner.state_dict()["parameters"]
    stored = done = 0
    for _ in range(8):
        rollout = stream.next()
        stored += rollout.env_steps
        metrics = learner.update(rollout)
        done += int(metrics["gradient_steps"])
        assert done == gradient_steps_owed(stored, 20, 0.3)
        if stored <= 20:
            now = learner.state_dict()["parameters"]
            assert all((now[name] == start[name]).all() for name in start)
        assert all(math.isfinite(value) for value in metrics.values())
    assert done > 0


def test_the_runs_warmup_goes_before_the_algorithms():
    stream = Stream(spaces(), 4, 8)
    learner = DQN(**SMALL).learner(stream.space, context(warmup=64))
    assert [learner.update(stream.next())["gradient_steps"] for _ in range(4)] == [0, 0, 9, 10]
    none = DQN(**SMALL).learner(stream.space, context(warmup=0))
    assert none.update(stream.next())["gradient_steps"] == 9


@pytest.mark.parametrize("dueling", [False, True])
def test_it_learns_the_value_of_a_bandit(dueling: bool):
    """Action 0 pays 0, action 1 pays 1 and both end the episode: Q is (0, 1)."""
    stream = Stream(spaces(), 4, 8)
    config = DQN(**SMALL | {"update_ratio": 4, "warmup": 0}, learning_rate=0.01, dueling=dueling)
    learner = config.learner(stream.space, context())
    for _ in range(6):
        rollout = stream.next()
        columns = rollout.segments[0].columns
        rollout.segments[0].obs["obs"][...] = 0.5
        columns["reward"][...] = columns["action"]
        columns["terminated"][...], columns["truncated"][...] = True, False
        learner.update(rollout)
    q = learner._online(learner._tensor(np.full((1, 3), 0.5, np.float32)))
    assert q.detach().numpy()[0] == pytest.approx([0, 1], abs=0.05)


@pytest.mark.parametrize(("every", "tau"), [(1, 0.1), (4, 1.0)])
def test_targets_follow_in_gradient_steps(every: int, tau: float):
    stream = Stream(spaces(), 4, 8)
    options = {"update_ratio": 1 / 32, "warmup": 0, "target_every": every, "target_tau": tau}
    learner = DQN(**SMALL | options).learner(stream.space, context())
    target = {k: v.copy() for k, v in learner.state_dict()["target"].items()}
    for step in range(1, 9):
        learner.update(stream.next())  # one gradient step each
        state = learner.state_dict()
        assert state["optimizer"]["steps"] == step
        for name, online in state["parameters"].items():
            expected = target[name] + tau * (online - target[name]) if step % every == 0 else target[name]
            np.testing.assert_allclose(state["target"][name], expected, atol=1e-6)
            target[name] = state["target"][name]


AVERAGED = SMALL | {"update_ratio": 1 / 32, "warmup": 0, "average": 0.5}
averaging = pytest.mark.parametrize(
    "config", [DQN(**AVERAGED), DQN(**AVERAGED, dueling=True), QRDQN(**AVERAGED, quantiles=3)]
)


@averaging
def test_the_mean_network_follows_each_gradient_step(config: DQN | QRDQN):
    stream = Stream(spaces(), 4, 8)
    learner = config.learner(stream.space, context())
    mean = {k: v.copy() for k, v in learner.state_dict()["average"].items()}
    for step in range(1, 13):
        learner.update(stream.next())  # one gradient step each
        state = learner.state_dict()
        keep = min(0.5, step / (step + 9))
        for name, online in state["parameters"].items():
            expected = keep * mean[name] + (1 - keep) * online
            np.testing.assert_allclose(state["average"][name], expected, atol=1e-6)
            mean[name] = state["average"][name]


@averaging
def test_the_mean_network_acts_where_nothing_is_explored(config: DQN | QRDQN):
    learner, stream = config.learner(spaces(), context()), Stream(spaces(), 4, 8)
    for _ in range(4):
        learner.update(stream.next())
    plain = msgspec.structs.replace(config, average=0.0)
    state = learner.state_dict()
    newest = {name: part for name, part in state.items() if name != "average"}
    mean = newest | {"parameters": state["average"]}
    exploring = _outputs(config, learner.weights(), np.random.default_rng(0))
    np.testing.assert_array_equal(exploring, _outputs(plain, _loaded(plain, newest).weights(), None))
    deterministic = _outputs(config, learner.weights(), None)
    np.testing.assert_array_equal(deterministic, _outputs(plain, _loaded(plain, mean).weights(), None))
    assert not np.array_equal(exploring, deterministic)


def _loaded(config: DQN | QRDQN, state: dict[str, Any]) -> Learner:
    learner = config.learner(spaces(), context())
    learner.load_state_dict(state)
    return learner


def _outputs(config: DQN | QRDQN, weights: Weights, rng: np.random.Generator | None) -> Array:
    policy = config.policy(spaces())
    policy.begin(weights, 0, rng, 1)
    obs = {"obs": np.random.default_rng(1).random((50, 3)).astype(np.float32)}
    return policy._head(policy._torso(policy.features(obs, np.zeros(50, bool))))


def test_what_is_learned_is_the_same_with_a_mean_network():
    states = [loop(DQN(**SMALL, average=average), 5).state_dict() for average in (0.9, 0.0)]
    assert states[0].pop("average")
    assert digest(states[0]) == digest(states[1])


def test_an_unusable_loss_stops_before_the_parameters_change():
    stream = Stream(spaces(), 4, 8)
    learner = DQN(**SMALL, average=0.9).learner(stream.space, context(warmup=0))
    rollout = stream.next()
    rollout.segments[0].columns["reward"][...] = np.inf
    before = _vectors(learner)
    expected = pytest.raises(TrainingError, match=r"gradient step 0: loss .* target_mean inf.*\n.*learning_rate")
    with np.errstate(invalid="ignore"), expected:
        learner.update(rollout)
    assert _vectors(learner) == before


def _vectors(learner: Learner) -> dict[str, str]:
    return {name: digest(learner.state_dict()[name]) for name in ("parameters", "target", "average", "optimizer")}


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2])
def test_the_same_seed_gives_the_same_bits(degree: int):
    config = DQN(**SMALL, n_step=3, dueling=True, average=0.99)
    a, b, c = (digest(loop(config, 5, degree=degree, seed=seed).state_dict()) for seed in (5, 5, 6))
    assert a == b != c


def test_the_state_of_another_network_is_refused_by_name():
    """Of dueling heads that share all hidden layers, as they once did, too: its names are the plain network's and a few."""
    plain, dueling = (DQN(**SMALL | {"hidden": (16, 8)}, dueling=d).learner(spaces(), context()) for d in (False, True))
    with pytest.raises(ValueError, match=r"parameters\.advantage\.1\.weight is missing"):
        dueling.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"parameters\.torso\.1\.weight is missing"):
        plain.load_state_dict(dueling.state_dict())


@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (0.0, False)])
def test_gradients_are_clipped_unless_the_limit_is_0(limit: float, clipped: bool):
    config = DQN(**SMALL | {"warmup": 0, "update_ratio": 1 / 32}, max_grad_norm=limit)
    learner = config.learner(spaces(), context())
    found = learner.update(Stream(spaces(), 4, 8).next())
    length = float(learner._parameters.grad.norm())
    assert found["grad_norm"] > 1e-3
    assert length == pytest.approx(1e-3 if clipped else found["grad_norm"], rel=1e-3)
    given = Config(env="CartPole-v1", algo=config)
    assert Config.from_dict(given.to_dict()).algo == config


def test_a_state_that_does_not_fit_is_refused_by_name():
    state = DQN(**SMALL).learner(spaces(), context()).state_dict()
    with pytest.raises(ValueError, match=r"state\.target is missing"):
        DQN(**SMALL).learner(spaces(), context()).load_state_dict({k: v for k, v in state.items() if k != "target"})
    with pytest.raises(ValueError, match=r"replay\.rows: this ring has 25, the one saved 50"):
        DQN(**SMALL | {"capacity": 100}).learner(spaces(), context()).load_state_dict(state)


def test_settings():
    learner = DQN(**SMALL).learner(spaces(), context())
    learner.set(learning_rate=0.1)
    assert learner.update(Stream(spaces(), 4, 8).next())["learning_rate"] == 0.1
    with pytest.raises(ValueError, match="epsilon"):
        learner.set(epsilon=0.1)
