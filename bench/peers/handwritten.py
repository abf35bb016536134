"""PPO, DQN and SAC as a skilled user writes them in an afternoon: one file, torch, a gymnasium vector environment."""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from bench.peers import works
from bench.peers.works import ENVS, HIDDEN, Task, Training, dqn_figures


class PPOLoop:
    """Rollouts into preallocated tensors [T, B], then epochs over them.

    gymnasium's native CartPole spends a step on each reset (NEXT_STEP): such rows are not learned from.
    """

    def __init__(self, task: Task) -> None:
        self.h, steps = task.ppo, task.ppo.steps
        torch.manual_seed(task.seed)
        self.native = task.variant == "CartPoleVectorEnv"
        if self.native:
            self.venv: Any = gymnasium.make_vec("CartPole-v1", ENVS, vectorization_mode="vector_entry_point")
        else:
            self.venv = SyncVectorEnv(works.env_makers(), autoreset_mode=AutoresetMode.SAME_STEP)
        self.actor, self.critic = works.mlp(4, *HIDDEN, 2), works.mlp(4, *HIDDEN, 1)
        for net, last in ((self.actor, 0.01), (self.critic, 1.0)):
            for layer in net[::2]:
                nn.init.orthogonal_(layer.weight, last if layer is net[-1] else 2**0.5)
                nn.init.zeros_(layer.bias)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.adam = torch.optim.Adam(self.parameters, lr=self.h.learning_rate, eps=1e-5, fused=True)
        self.obs = torch.zeros(steps, ENVS, 4)
        self.actions = torch.zeros(steps, ENVS, dtype=torch.int64)
        self.log_prob, self.rewards, self.ended, self.values = (torch.zeros(steps, ENVS) for _ in range(4))
        self.bootstrap, self.valid = torch.zeros(steps, ENVS), torch.ones(steps, ENVS, dtype=torch.bool)
        self.returns, self.env_steps, self.spent = np.zeros(ENVS), 0, np.zeros(ENVS, bool)
        self.now, _ = self.venv.reset(seed=task.seed)

    @torch.no_grad()
    def collect(self, training: Training) -> None:
        for t in range(self.h.steps):
            self.obs[t] = torch.from_numpy(self.now)
            log_probs = torch.log_softmax(self.actor(self.obs[t]), -1)
            self.values[t] = self.critic(self.obs[t]).squeeze(-1)
            self.actions[t] = torch.multinomial(log_probs.exp(), 1).squeeze(-1)
            self.log_prob[t] = log_probs.gather(1, self.actions[t][:, None]).squeeze(-1)
            self.now, reward, terminated, truncated, info = self.venv.step(self.actions[t].numpy())
            ended = terminated | truncated
            self.returns += reward
            self.bootstrap[t] = 0.0
            for i in np.flatnonzero(truncated & ~terminated):
                final = self.now[i] if self.native else info["final_obs"][i]
                self.bootstrap[t, i] = self.critic(torch.as_tensor(final, dtype=torch.float32))[0]
            self.rewards[t] = torch.from_numpy(reward.astype(np.float32))
            self.ended[t] = torch.from_numpy(ended.astype(np.float32))
            if self.native:
                self.valid[t] = torch.from_numpy(~self.spent)
                self.spent = ended
            self.env_steps += int(self.valid[t].sum()) if self.native else ENVS
            for i in np.flatnonzero(ended):
                training.episode(self.returns[i], self.env_steps)
                self.returns[i] = 0

    @torch.no_grad()
    def advantages(self) -> torch.Tensor:
        following, last = self.critic(torch.from_numpy(self.now)).squeeze(-1), torch.zeros(ENVS)
        advantages = torch.zeros(self.h.steps, ENVS)
        for t in reversed(range(self.h.steps)):
            going = 1 - self.ended[t]
            delta = self.rewards[t] + self.h.gamma * (following * going + self.bootstrap[t]) - self.values[t]
            last = delta + self.h.gamma * self.h.gae_lambda * going * last
            advantages[t], following = last, self.values[t]
        return advantages

    def learn(self) -> None:
        h, advantages = self.h, self.advantages()
        columns = (self.obs, self.actions, self.log_prob, advantages, advantages + self.values)
        flat = [column.flatten(0, 1) for column in columns]
        if self.native:
            rows = self.valid.flatten().nonzero().squeeze(1)
            flat = [column[rows] for column in flat]
        for _ in range(h.epochs):
            order = torch.randperm(len(flat[0]))
            for rows in order.tensor_split(h.rollout // h.minibatch):
                obs, actions, old, advantage, target = (column[rows] for column in flat)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                log_prob = torch.log_softmax(self.actor(obs), -1).gather(1, actions[:, None]).squeeze(-1)
                ratio = (log_prob - old).exp()
                gain = torch.min(ratio * advantage, ratio.clamp(1 - h.clip, 1 + h.clip) * advantage).mean()
                loss = h.value * nn.functional.mse_loss(self.critic(obs).squeeze(-1), target) - gain
                self.adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, h.grad_norm)
                self.adam.step()


def train_ppo(task: Task) -> dict[str, Any]:
    loop, training = PPOLoop(task), Training(task, task.ppo)
    while not training.is_over(loop.env_steps):
        loop.collect(training)
        loop.learn()
    loop.venv.close()
    return training.figures(loop.env_steps)


class Replay:
    """A ring of transitions as tensors."""

    def __init__(self, capacity: int, features: int, dtype: torch.dtype = torch.int64) -> None:
        """Actions are one number each."""
        self._obs, self._next = torch.zeros(capacity, features), torch.zeros(capacity, features)
        self._action = torch.zeros(capacity, 1, dtype=dtype)
        self._reward, self._terminated = torch.zeros(capacity), torch.zeros(capacity)
        self._added, self._rng = 0, np.random.default_rng(0)

    def add(self, obs: Any, action: float, reward: float, next_obs: Any, terminated: bool) -> None:
        i = self._added % len(self._obs)
        self._obs[i], self._next[i] = torch.from_numpy(obs), torch.from_numpy(next_obs)
        self._action[i], self._reward[i], self._terminated[i] = action, float(reward), float(terminated)
        self._added += 1

    def sample(self, batch: int) -> tuple[torch.Tensor, ...]:
        rows = torch.from_numpy(self._rng.integers(0, min(self._added, len(self._obs)), batch))
        return tuple(c[rows] for c in (self._obs, self._action, self._reward, self._next, self._terminated))


def train_dqn(task: Task) -> dict[str, Any]:
    h = task.dqn
    torch.manual_seed(task.seed)
    env, rng = works.make_env(h.env), np.random.default_rng(task.seed)
    online = works.mlp(8, *h.hidden, 4, activation="ReLU")
    target = copy.deepcopy(online)
    adam = torch.optim.Adam(online.parameters(), lr=h.learning_rate, fused=True)
    replay, updates, begun = Replay(h.capacity, 8), 0, 0.0
    obs, _ = env.reset(seed=task.seed)
    for step in range(h.warmup + h.steps):
        if step == h.warmup:
            begun = task.begin()
        if rng.random() < max(0.05, 1 - step / 5000):
            action = int(rng.integers(4))
        else:
            with torch.inference_mode():
                action = int(online(torch.from_numpy(obs)).argmax())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, float(reward), next_obs, terminated)
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step >= h.warmup and step % h.every == 0:
            learn_dqn(online, target, adam, replay.sample(h.batch), h.gamma)
            updates += 1
            if updates % h.target_every == 0:
                target.load_state_dict(online.state_dict())
    return dqn_figures(h.steps, updates, begun)


def learn_dqn(online: Any, target: Any, adam: Any, batch: tuple[torch.Tensor, ...], gamma: float) -> None:
    """One gradient step."""
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        wanted = reward + gamma * (1 - terminated) * target(next_obs).max(1).values
    descend(adam, nn.functional.smooth_l1_loss(online(obs).gather(1, action).squeeze(1), wanted))


class SACLoop:
    """Networks and optimizers of W4, for one action in [-1, 1]."""

    def __init__(self, h: works.SAC) -> None:
        self.h = h
        self.actor = works.mlp(3, *h.hidden, 2, activation="ReLU")
        self.critics = [works.mlp(4, *h.hidden, 1, activation="ReLU") for _ in range(2)]
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.online = [p for critic in self.critics for p in critic.parameters()]
        self.following = [p for target in self.targets for p in target.parameters()]
        groups: Any = (list(self.actor.parameters()), self.online, [self.log_alpha])
        self.adam, self.critic_adam, self.alpha_adam = (
            torch.optim.Adam(group, lr=h.learning_rate, fused=True) for group in groups
        )

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions [N, 1] and their log-densities [N]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        log_std, noise = log_std.clamp(-20, 2), torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        squash = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return u.tanh(), (normal - squash).sum(-1)

    def smaller(self, critics: list[Any], obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([obs, action], -1)
        return torch.min(critics[0](seen), critics[1](seen)).squeeze(-1)

    def learn(self, batch: tuple[torch.Tensor, ...]) -> None:
        """One gradient step of all."""
        obs, action, reward, next_obs, terminated = batch
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            following, log_prob = self.act(next_obs)
            value = self.smaller(self.targets, next_obs, following) - alpha * log_prob
            wanted = reward + self.h.gamma * (1 - terminated) * value
        seen = torch.cat([obs, action], -1)
        losses = [nn.functional.mse_loss(critic(seen).squeeze(-1), wanted) for critic in self.critics]
        descend(self.critic_adam, losses[0] + losses[1])
        for parameter in self.online:  # their gradients would be computed for nothing
            parameter.requires_grad_(False)
        chosen, log_prob = self.act(obs)
        descend(self.adam, (alpha * log_prob - self.smaller(self.critics, obs, chosen)).mean())
        for parameter in self.online:
            parameter.requires_grad_(True)
        descend(self.alpha_adam, -(self.log_alpha * (log_prob.detach() - 1.0)).mean())
        with torch.no_grad():
            torch._foreach_lerp_(self.following, self.online, self.h.tau)  # pyright: ignore[reportPrivateImportUsage]


def descend(adam: Any, loss: torch.Tensor) -> None:
    adam.zero_grad()
    loss.backward()
    adam.step()


def train_sac(task: Task) -> dict[str, Any]:
    h = task.sac
    torch.manual_seed(task.seed)
    env, rng, loop = works.make_env(h.env), np.random.default_rng(task.seed), SACLoop(h)
    replay, step, total = Replay(h.capacity, 3, torch.float32), 0, 0.0
    obs, _ = env.reset(seed=task.seed)
    training = Training(task, h)
    while not training.is_over(step):
        if step < h.warmup:
            action = rng.uniform(-1, 1, 1).astype(np.float32)
        else:
            with torch.no_grad():
                action = loop.act(torch.from_numpy(obs)[None])[0][0].numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action * h.bound)
        replay.add(obs, float(action[0]), float(reward), next_obs, terminated)
        obs, total, step = next_obs, total + float(reward), step + 1
        if terminated or truncated:
            training.episode(total, step)
            obs, total = env.reset()[0], 0.0
        if step > h.warmup:
            loop.learn(replay.sample(h.batch))
    return training.figures(step, updates=step - h.warmup)


def limit_sac(task: Task) -> Any:
    h = task.sac
    loop, column = SACLoop(h), torch.randn(h.batch)
    batch = (torch.randn(h.batch, 3), torch.rand(h.batch, 1) * 2 - 1, column, torch.randn(h.batch, 3), torch.zeros(h.batch))
    return lambda: loop.learn(batch)


def limit_dqn(task: Task) -> Any:
    h = task.dqn
    online = works.mlp(8, *h.hidden, 4, activation="ReLU")
    target, adam = copy.deepcopy(online), torch.optim.Adam(online.parameters(), lr=h.learning_rate, fused=True)
    obs, next_obs = torch.randn(h.batch, 8), torch.randn(h.batch, 8)
    batch = (obs, torch.randint(0, 4, (h.batch, 1)), torch.randn(h.batch), next_obs, torch.zeros(h.batch))
    return lambda: learn_dqn(online, target, adam, batch, h.gamma)


def limit(task: Task) -> dict[str, Any]:
    """The gradient step of W3 or W4 and nothing else, always on the same batch."""
    learn = {"w3": limit_dqn, "w4": limit_sac}[task.work](task)

    def step() -> int:
        learn()
        return 1

    return {"updates_per_s": task.rate(step)["env_steps_per_s"]}


TRAIN = {"w2": train_ppo, "w3": train_dqn, "w4": train_sac}

if __name__ == "__main__":
    works.carry_out(lambda task: limit(task) if task.variant.startswith("limit") else TRAIN[task.work](task))
