"""What one env step and one gradient step cost, against the environment alone and against a bare torch loop.

    python -m bench.steps [--only acting ppo dqn sac td3] [--seconds 6] [--compile] [--json FILE]

acting      a group collects segments of CartPole with PPO's policy (2x64); beside it the same environments are stepped with
            given actions and nothing else, and the policy acts without any environment. `overhead` is all that collecting
            takes beyond the environments: acting, checks, rows written, seeded resets, the books of the segment
ppo, dqn    `update` of the learner, by gradient step: everything an update does counts (CartPole: 16 x 128, 4 epochs of 8
            minibatches, 2x64 twice; LunarLander: batch 128, 2x256, a step every 4 env steps). `bare` is the least that torch
            allows with its own autograd and its fused Adam: one batch, which is always the same, and no bookkeeping
sac, td3    the same, sized for Pendulum and, `wide`, for HalfCheetah: batch 256, 2x256, a gradient step for each env step

All functions of a part are timed in turns, in CPU time of their thread, and the lower quartile counts; so other programs
slow both sides alike. `--compile` adds the bare loop with its loss under torch.compile, which takes half a minute to make.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import aiorl
from aiorl.algos.base import Algorithm, LearnerContext
from aiorl.envs.group import blocking_group
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.envs.spec import resolve_env
from aiorl.segments import CORE_COLUMNS, Column, Rollout, SegmentLayout
from bench.common import percentile, print_machine, write_json

Timed = dict[str, Callable[[], object]]
STEPS = 128


def cpu_us(functions: Timed, seconds: float) -> dict[str, float]:
    """Microseconds of CPU of one call of each, called in turns: the lower quartile."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while not all(times.values()) or time.perf_counter() < end:
        for name, function in functions.items():
            begun = time.thread_time_ns()
            function()
            times[name].append((time.thread_time_ns() - begun) / 1e3)
    return {name: percentile(values, 25) for name, values in times.items()}


def layout_of(algorithm: Algorithm, spaces: Spaces, steps: int, envs: int, state_bytes: int = 0) -> SegmentLayout:
    columns = {"action": spaces.action_column, "reward": Column((), "float64")}
    columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]} | algorithm.columns(spaces)
    return SegmentLayout(steps, envs, spaces.obs_columns, columns, state_bytes)


def context(envs: int, steps: int) -> LearnerContext:
    return LearnerContext(seed=0, envs=envs, segment_length=steps, rollouts=10**6, off_policy_degree=0)


# -- acting ------------------------------------------------------------------------------------------------------------


def acting(seconds: float, compiled: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for native, envs in ((True, 8), (True, 16), (False, 8), (False, 16)):
        took = cpu_us(collecting(native, envs), seconds)
        step, alone, act = (took[name] / STEPS for name in ("collect", "environments", "act"))
        name = f"{'native vector' if native else 'single'} x {envs}"
        figures[name] = {"collect_us": step, "environments_us": alone, "act_us": act}
        figures[name] |= {"act_share": act / alone, "overhead_share": step / alone - 1}
        print(f"{name:20} a step of all: {step:6.1f} us, environments {alone:6.1f} us; acting {act:5.1f} us = "
              f"{act / alone:4.0%} of theirs, overhead {step / alone - 1:4.0%}", flush=True)  # fmt: skip
    return figures


def collecting(native: bool, envs: int) -> Timed:
    """A segment collected, its steps by the environments alone, and by the policy alone."""
    algorithm, rng = aiorl.PPO(), np.random.default_rng(0)
    found = probe(resolve_env("CartPole-v1", in_process=True, native=native), envs)
    segment = layout_of(algorithm, found.spaces, STEPS, envs, found.state_bytes).allocate()
    weights = algorithm.learner(found.spaces, context(envs, STEPS)).weights()
    group, policy = blocking_group(found.spec, found.spaces, range(envs), 0), algorithm.policy(found.spaces)
    group.open(None)

    def collect() -> None:
        policy.begin(weights, 0, rng, STEPS)
        group.collect(policy, segment, STEPS)

    def act() -> None:
        policy.begin(weights, 0, rng, STEPS)
        first = np.zeros(envs, bool)
        for t in range(STEPS):
            policy.act({"obs": segment.obs["obs"][t]}, first)

    return {"collect": collect, "environments": vector_steps(envs) if native else single_steps(envs), "act": act}


def vector_steps(envs: int) -> Callable[[], object]:
    env = gymnasium.make_vec("CartPole-v1", envs)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(2, size=(STEPS, envs))
    return lambda: [env.step(row) for row in actions]


def single_steps(envs: int) -> Callable[[], object]:
    made = [gymnasium.make("CartPole-v1") for _ in range(envs)]
    for env in made:
        env.reset(seed=0)
    actions = np.random.default_rng(0).integers(2, size=(STEPS, envs))

    def steps() -> None:
        for row in actions:
            for env, action in zip(made, row, strict=True):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

    return steps


# -- learning ----------------------------------------------------------------------------------------------------------


def made_up(algorithm: Algorithm, spaces: Spaces, steps: int, envs: int) -> Rollout:
    """A rollout with random contents and an end of an episode every hundred steps or so."""
    rng, segment = np.random.default_rng(0), layout_of(algorithm, spaces, steps, envs).allocate()
    segment.obs["obs"][...] = rng.normal(size=segment.obs["obs"].shape)
    columns = segment.columns
    discrete = spaces.action.kind == "discrete"
    shape = columns["action"].shape
    columns["action"][...] = rng.integers(spaces.action.nvec[0], size=shape) if discrete else rng.uniform(-1, 1, shape)
    columns["reward"][...], columns["valid"][...] = rng.normal(size=(steps, envs)), True
    columns["terminated"][...] = rng.random((steps, envs)) < 0.01
    if "log_prob" in columns:
        columns["log_prob"][...] = -np.log(spaces.action.nvec[0])
    return Rollout(0, 0, (segment,), np.arange(envs))


def updating(algorithm: Algorithm, features: int, actions: int, steps: int, envs: int, before: int = 0) -> Callable[[], Any]:
    """The update of a learner that has had `before` rollouts. `actions`: of SAC and TD3 in [-1, 1], of others to choose."""
    bounded = isinstance(algorithm, aiorl.SAC | aiorl.TD3)
    acts = gymnasium.spaces.Box(-1, 1, (actions,), np.float32) if bounded else gymnasium.spaces.Discrete(actions)
    spaces = spaces_of(gymnasium.spaces.Box(-9, 9, (features,), np.float32), acts)
    learner, rollout = algorithm.learner(spaces, context(envs, steps)), made_up(algorithm, spaces, steps, envs)
    for _ in range(before):
        learner.update(rollout)
    return lambda: learner.update(rollout)


def ppo(seconds: float, compiled: bool) -> dict[str, float]:
    functions: Timed = {"update": updating(aiorl.PPO(), 4, 2, 128, 16), "bare": bare_ppo(lambda loss: loss)}
    if compiled:
        functions["bare, compiled"] = bare_ppo(torch.compile)
    return gradient_steps("PPO", functions, 4 * 8, seconds)


def dqn(seconds: float, compiled: bool) -> dict[str, float]:
    functions: Timed = {}
    for name, double in (("update", False), ("update, double", True)):
        algorithm = aiorl.DQN(batch_size=128, hidden=(256, 256), double=double, huber_delta=1.0)
        functions[name] = updating(algorithm, 8, 4, 32, 1, before=2_000 // 32)
    functions["bare"] = bare_dqn(lambda loss: loss)
    if compiled:
        functions["bare, compiled"] = bare_dqn(torch.compile)
    return gradient_steps("DQN", functions, 32 // 4, seconds)


def sac(seconds: float, compiled: bool) -> dict[str, float]:
    return continuous("SAC", aiorl.SAC(), bare_sac, seconds, compiled)


def td3(seconds: float, compiled: bool) -> dict[str, float]:
    return continuous("TD3", aiorl.TD3(), bare_td3, seconds, compiled, bare_steps=2)  # the actor's is every second one


def continuous(
    what: str, algorithm: Algorithm, bare: Callable[..., Any], seconds: float, compiled: bool, bare_steps: int = 1
) -> dict[str, float]:
    found: dict[str, float] = {}
    for size, features, actions in (("", 3, 1), (" wide", 17, 6)):
        functions: Timed = {"update": updating(algorithm, features, actions, 4, 1, before=1_200 // 4)}
        functions["bare"] = bare(features, actions, lambda loss: loss)
        if compiled:
            functions["bare, compiled"] = bare(features, actions, torch.compile)
        took = gradient_steps(what + size, functions, 4, seconds, bare_steps)
        found |= {name + size: us for name, us in took.items()}
    return found


def gradient_steps(what: str, functions: Timed, steps: int, seconds: float, bare: int = 1) -> dict[str, float]:
    """Prints and returns microseconds for each gradient step: an update makes `steps` of them, a bare loop `bare` a call."""
    took = cpu_us(functions, seconds)
    took = {name: us / (steps if name.startswith("update") else bare) for name, us in took.items()}
    for name, us in took.items():
        rate = "" if name == "bare" else f" = {took['bare'] / us:.2f} x the bare loop's speed"
        print(f"{what} gradient step, {name:15} {us:7.0f} us{rate}", flush=True)
    return took


def mlp(*sizes: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def bare_ppo(wrap: Callable[[Any], Any]) -> Callable[[], None]:
    actor, critic = mlp(4, 64, 64, 2, activation=nn.Tanh), mlp(4, 64, 64, 1, activation=nn.Tanh)
    parameters = [*actor.parameters(), *critic.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    obs, actions, old = torch.randn(256, 4), torch.randint(2, (256, 1)), torch.full((256,), -0.69)
    advantages, targets = torch.randn(256), torch.randn(256)

    def loss() -> torch.Tensor:
        log_probs = F.log_softmax(actor(obs), -1)
        ratio = (log_probs.gather(1, actions).squeeze(1) - old).exp()
        gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        return 0.5 * F.mse_loss(critic(obs).squeeze(1), targets) - gain - 0.0 * entropy

    compute = wrap(loss)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        compute().backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        adam.step()

    return step


def bare_dqn(wrap: Callable[[Any], Any]) -> Callable[[], None]:
    online = mlp(8, 256, 256, 4, activation=nn.ReLU)
    target = copy.deepcopy(online)
    adam = torch.optim.Adam(online.parameters(), lr=1e-5, fused=True)
    obs, next_obs, actions = torch.randn(128, 8), torch.randn(128, 8), torch.randint(4, (128, 1))
    rewards, going = torch.randn(128), torch.ones(128)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            targets = rewards + 0.99 * going * target(next_obs).max(1).values
        return F.smooth_l1_loss(online(obs).gather(1, actions).squeeze(1), targets)

    compute = wrap(loss)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        compute().backward()
        adam.step()

    return step


class BareActorCritic:
    """Networks of one actor and two critics with their targets, fused Adams, and one batch of 256."""

    def __init__(self, features: int, actions: int, outputs: int) -> None:
        self.actor = mlp(features, 256, 256, outputs, activation=nn.ReLU)
        self.critics = [mlp(features + actions, 256, 256, 1, activation=nn.ReLU) for _ in range(2)]
        self.targets = copy.deepcopy(self.critics)
        self.critic_parameters = [p for critic in self.critics for p in critic.parameters()]
        self.target_parameters = [p for critic in self.targets for p in critic.parameters()]
        self.adam = torch.optim.Adam(self.actor.parameters(), lr=1e-5, fused=True)
        self.critic_adam = torch.optim.Adam(self.critic_parameters, lr=1e-5, fused=True)
        self.obs, self.next_obs = torch.randn(256, features), torch.randn(256, features)
        self.actions = torch.rand(256, actions) * 2 - 1
        self.rewards, self.going = torch.randn(256, 1), torch.ones(256, 1)

    def critic_loss(self, targets: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([self.obs, self.actions], 1)
        return sum((F.mse_loss(critic(seen), targets) for critic in self.critics), torch.zeros(()))

    def descend(self, adam: torch.optim.Adam, compute: Callable[[], Any]) -> Any:
        """One step of `adam`; what `compute` returns is the loss, or begins with it."""
        found = compute()
        adam.zero_grad(set_to_none=True)
        (found[0] if isinstance(found, tuple) else found).backward()
        adam.step()
        return found

    def descend_actor(self, compute: Callable[[], Any]) -> Any:
        for parameter in self.critic_parameters:
            parameter.requires_grad_(False)
        found = self.descend(self.adam, compute)
        for parameter in self.critic_parameters:
            parameter.requires_grad_(True)
        return found


@torch.no_grad()
def follow(targets: list[Any], online: list[Any]) -> None:
    torch._foreach_lerp_(targets, online, 0.005)  # pyright: ignore[reportPrivateImportUsage]


def bare_sac(features: int, actions: int, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    nets, log_alpha = BareActorCritic(features, actions, 2 * actions), torch.zeros(1, requires_grad=True)
    alpha_adam = torch.optim.Adam([log_alpha], lr=1e-5, fused=True)

    def act(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = nets.actor(obs).chunk(2, 1)
        log_std, noise = log_std.clamp(-20, 2), torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.919 - 2 * (0.693 - u - F.softplus(-2 * u))
        return u.tanh(), log_prob.sum(1, keepdim=True)

    def critic_loss() -> torch.Tensor:
        with torch.no_grad():
            action, log_prob = act(nets.next_obs)
            seen = torch.cat([nets.next_obs, action], 1)
            value = torch.min(nets.targets[0](seen), nets.targets[1](seen)) - log_alpha.exp() * log_prob
            targets = nets.rewards + 0.99 * nets.going * value
        return nets.critic_loss(targets)

    def actor_loss() -> tuple[torch.Tensor, torch.Tensor]:
        action, log_prob = act(nets.obs)
        seen = torch.cat([nets.obs, action], 1)
        value = torch.min(nets.critics[0](seen), nets.critics[1](seen))
        return (log_alpha.exp().detach() * log_prob - value).mean(), log_prob.detach()

    of_critics, of_actor = wrap(critic_loss), wrap(actor_loss)

    def step() -> None:
        nets.descend(nets.critic_adam, of_critics)
        _, log_prob = nets.descend_actor(of_actor)
        nets.descend(alpha_adam, lambda: -(log_alpha * (log_prob - actions)).mean())
        follow(nets.target_parameters, nets.critic_parameters)

    return step


def bare_td3(features: int, actions: int, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    nets = BareActorCritic(features, actions, actions)
    target_actor = copy.deepcopy(nets.actor)
    online = [*nets.critic_parameters, *nets.actor.parameters()]
    targets = [*nets.target_parameters, *target_actor.parameters()]

    def critic_loss() -> torch.Tensor:
        with torch.no_grad():
            noise = (torch.randn_like(nets.actions) * 0.2).clamp(-0.5, 0.5)
            seen = torch.cat([nets.next_obs, (target_actor(nets.next_obs).tanh() + noise).clamp(-1, 1)], 1)
            value = torch.min(nets.targets[0](seen), nets.targets[1](seen))
        return nets.critic_loss(nets.rewards + 0.99 * nets.going * value)

    def actor_loss() -> torch.Tensor:
        return -nets.critics[0](torch.cat([nets.obs, nets.actor(nets.obs).tanh()], 1)).mean()

    of_critics, of_actor = wrap(critic_loss), wrap(actor_loss)

    def two_steps() -> None:
        for _ in range(2):
            nets.descend(nets.critic_adam, of_critics)
        nets.descend_actor(of_actor)
        follow(targets, online)

    return two_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"acting": acting, "ppo": ppo, "dqn": dqn, "sac": sac, "td3": td3}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seconds", type=float, default=6.0, help="for each part's measurements")
    parser.add_argument("--compile", action="store_true", help="also the bare loops under torch.compile")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for part in options.only:
        figures[part] = parts[part](options.seconds, options.compile)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
