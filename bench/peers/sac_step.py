# pyright: basic, reportMissingImports=false
"""One gradient step of SAC here and in Stable-Baselines3: from the same weights, on the same batch, with the same noise.

    python -m bench.peers.sac_step PEERS_DIR          where `python -m bench.against_sb3 --setup` installed it

Says how far apart both are after so many steps on batches of HalfCheetah's sizes, as a share of how far they have come.
Stable-Baselines3 adds 1e-6 within the logarithm of its density: without that all that is left is rounding, which grows.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import gymnasium
import numpy as np
import torch

from aiorl.algos.base import LearnerContext
from aiorl.algos.sac import SAC
from aiorl.buffers.batch import Batch
from aiorl.envs.spaces import spaces_of
from bench.peers.same_steps import samples, use_sb3

OBS, ACTIONS, BATCH, RATE, GAMMA = 17, 6, 256, 3e-4, 0.99
LOOKED_AT = (1, 10, 100)


class Space(gymnasium.Env):
    """Only its spaces are used."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)


class Noise:
    """Gives the noise that it was made with, as a generator or as a distribution's."""

    def __init__(self, noise: np.ndarray) -> None:
        self._noise, self._parts = noise, list(torch.from_numpy(noise).split(BATCH))

    def standard_normal(self, shape: Any, dtype: Any) -> np.ndarray:
        assert (shape, dtype) == (self._noise.shape, np.float32)
        return self._noise

    def rsample(self, normal: torch.distributions.Normal) -> torch.Tensor:
        return normal.loc + normal.scale * self._parts.pop(0)


def batch(rng: np.random.Generator) -> Batch:
    """Transitions whose reward has something to do with what was done; some end the episode."""
    obs = rng.standard_normal((BATCH, OBS), np.float32) * np.r_[np.ones(8), 3 * np.ones(9)].astype(np.float32)
    action = rng.uniform(-1, 1, (BATCH, ACTIONS)).astype(np.float32)
    following = obs + 0.3 * rng.standard_normal((BATCH, OBS), np.float32)
    rewards = (obs[:, 8] / 2 + action[:, 0] * obs[:, 0] + 3 * action[:, 1] - 0.1 * (action**2).sum(1)).astype(float)
    goes_on, none = rng.random(BATCH) >= 0.01, np.zeros(BATCH, int)
    return Batch({"obs": obs}, action, rewards, GAMMA * goes_on, {"obs": following}, none, none, np.ones(BATCH))


def layers_of(model: Any) -> tuple[Any, Any, Any]:
    """Linear layers of the actor (the last one as two), of the critics and of their targets."""
    actor = [model.actor.latent_pi[0], model.actor.latent_pi[2], model.actor.mu, model.actor.log_std]
    online, target = ([[q[i] for i in (0, 2, 4)] for q in c.q_networks] for c in (model.critic, model.critic_target))
    return actor, online, target


def copy_into(model: Any, learner: Any) -> None:
    """Give Stable-Baselines3's model the learner's weights."""
    own, critics = learner._parameters.arrays(), learner._critics
    actor, online, target = layers_of(model)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            arrays = [own[f"actor.{i}.{kind}"] for i in range(2)] + np.split(own[f"actor.2.{kind}"], 2)
            for layer, array in zip(actor, arrays, strict=True):
                getattr(layer, kind).copy_(torch.from_numpy(array))
            for nets, held in ((online, critics.parameters.arrays()), (target, critics.target_parameters.arrays())):
                for j, net in enumerate(nets):
                    for i, layer in enumerate(net):
                        getattr(layer, kind).copy_(torch.from_numpy(held[f"{kind}.{i}"][j]))
        model.log_ent_coef.copy_(learner._policy.log_alpha)


def flat(model: Any) -> dict[str, np.ndarray]:
    """What Stable-Baselines3's model has learned, as one vector each."""
    actor, online, target = layers_of(model)
    parts = {"actor": [actor], "critics": online, "targets": target}
    found = {name: [x for net in nets for layer in net for x in (layer.weight, layer.bias)] for name, nets in parts.items()}
    found["temperature"] = [model.log_ent_coef]
    return {name: torch.cat([x.detach().reshape(-1) for x in held]).numpy().copy() for name, held in found.items()}


def follow(epsilon: float, steps: int) -> None:
    """Let both do the same gradient steps; print how far apart they are, as a share of how far they have come."""
    import stable_baselines3
    from stable_baselines3.common.logger import configure

    env, context = Space(), LearnerContext(seed=0, envs=2, segment_length=4, rollouts=100, off_policy_degree=1)
    spaces = spaces_of(env.observation_space, env.action_space)
    learner: Any = SAC(learning_rate=RATE, capacity=1_000, warmup=0, random_steps=0).learner(spaces, context)
    settings: dict[str, Any] = {"learning_rate": RATE, "buffer_size": 1_000, "policy_kwargs": {"net_arch": [256, 256]}}
    model, mirror = (stable_baselines3.SAC("MlpPolicy", env, **settings) for _ in range(2))
    # The mirror holds what the learner has, to be compared with.
    model.set_logger(configure(None, []))
    model.actor.action_dist.epsilon = epsilon
    copy_into(model, learner)
    begun, rng = flat(model), np.random.default_rng(1)
    for step in range(1, steps + 1):
        given, noise = batch(rng), Noise(rng.standard_normal((2 * BATCH, ACTIONS), np.float32))
        model.replay_buffer.sample = lambda *_, given=given, **__: samples(given)
        with torch.no_grad():
            learner._step(given, RATE, noise)
        with patch.object(torch.distributions.Normal, "rsample", lambda self, *_, noise=noise: noise.rsample(self)):
            model.train(1, BATCH)
        if step in LOOKED_AT:
            copy_into(mirror, learner)
            ours, theirs = flat(mirror), flat(model)
            length = np.linalg.norm
            told = [f"{k} {length(ours[k] - theirs[k]) / length(theirs[k] - begun[k]):.1e}" for k in ours]
            print(f"epsilon {epsilon:g}, {step:4d} steps: {', '.join(told)}", flush=True)


def main() -> None:
    use_sb3(__doc__)
    for epsilon in (1e-30, 1e-6):
        follow(epsilon, LOOKED_AT[-1])


if __name__ == "__main__":
    main()
