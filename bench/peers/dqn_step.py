# pyright: basic, reportMissingImports=false
"""Gradient steps of DQN here and in Stable-Baselines3: from the same weights, on the same batches.

    python -m bench.peers.dqn_step PEERS_DIR          where `python -m bench.against_sb3 --setup` installed it

Says how far apart the action values of both are after so many steps on batches of MinAtar's sizes, as a share of how far
they have come: all of it is rounding.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from aiorl.algos.base import LearnerContext
from aiorl.buffers.batch import Batch
from aiorl.envs.spaces import spaces_of
from bench.peers import learning_ours
from bench.peers.learning import DQN
from bench.peers.same_steps import samples, use_sb3

IMAGE, ACTIONS, FILTERS, SIDE = (10, 10, 4), 5, 16, 8
LOOKED_AT = (1, 10, 100, 1_000)
H = DQN(capacity=1_000, warmup=0)


class Space(gymnasium.Env):
    """Only its spaces are used."""

    dtype: Any = np.bool_  # as MinAtar has it
    observation_space = gymnasium.spaces.Box(0, 1, IMAGE, dtype)
    action_space = gymnasium.spaces.Discrete(ACTIONS)


def batch(rng: np.random.Generator) -> Batch:
    """Transitions whose reward has something to do with what is seen; some end the episode."""
    obs, following = (rng.random((H.batch, *IMAGE)) < 0.05 for _ in range(2))
    rewards = obs[:, 5, 5, 0] + (rng.random(H.batch) < 0.3).astype(float)
    goes_on, none = rng.random(H.batch) > 0.05, np.zeros(H.batch, int)
    action = rng.integers(ACTIONS, size=H.batch)
    return Batch({"obs": obs}, action, rewards, H.gamma * goes_on, {"obs": following}, none, none, np.ones(H.batch))


def copy_into(net: Any, arrays: dict[str, np.ndarray]) -> None:
    """Give a network of Stable-Baselines3 the weights of one of ours, whose images have their channels last."""
    dense = arrays["torso.dense.0.weight"].reshape(-1, SIDE, SIDE, FILTERS).transpose(0, 3, 1, 2)
    pairs = (
        (net.features_extractor.conv, arrays["torso.conv.0.weight"].transpose(0, 3, 1, 2), arrays["torso.conv.0.bias"]),
        (net.q_net[0], dense.reshape(len(dense), -1), arrays["torso.dense.0.bias"]),
        (net.q_net[2], arrays["advantage.0.weight"], arrays["advantage.0.bias"]),
    )
    with torch.no_grad():
        for layer, weight, bias in pairs:
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            layer.bias.copy_(torch.from_numpy(bias.copy()))


def follow() -> None:
    """Let both do the same gradient steps; print how far apart they are, as a share of how far they have come."""
    import stable_baselines3
    from stable_baselines3.common.logger import configure

    from bench.peers.learning_sb3 import features

    env, context = Space(), LearnerContext(seed=0, envs=2, segment_length=4, rollouts=100, off_policy_degree=1)
    algo = learning_ours.algorithm(H, "async")
    learner: Any = algo.learner(spaces_of(env.observation_space, env.action_space), context)
    target_every = round(H.target_every * H.ratio)
    model = stable_baselines3.DQN(
        "MlpPolicy", env, learning_rate=H.learning_rate, buffer_size=H.capacity, gamma=H.gamma,
        max_grad_norm=H.max_grad_norm, policy_kwargs=features(H),
    )  # fmt: skip
    model.set_logger(configure(None, []))
    for net in (model.q_net, model.q_net_target):
        copy_into(net, learner._parameters.arrays())
    rng = np.random.default_rng(1)
    seen = batch(rng).obs["obs"]

    def values() -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            ours = learner._head.values(learner._online.trace(learner._look({"obs": seen}))[-1])
            return np.asarray(ours), model.q_net(torch.from_numpy(seen)).numpy()

    _, begun = values()
    for step in range(1, LOOKED_AT[-1] + 1):
        given = batch(rng)
        model.replay_buffer.sample = lambda *_, given=given, **__: samples(given)
        with torch.no_grad():
            learner._step(given, H.learning_rate, rng)
        model.train(1, H.batch)
        if step % target_every == 0:
            model.q_net_target.load_state_dict(model.q_net.state_dict())
        if step in LOOKED_AT:
            ours, theirs = values()
            apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - begun)
            same = np.mean(ours.argmax(1) == theirs.argmax(1))
            print(f"{step:5d} steps: action values {apart:.1e}, the same best action in {same:.0%}", flush=True)


def main() -> None:
    use_sb3(__doc__)
    follow()


if __name__ == "__main__":
    main()
