"""What one env step and one gradient step cost, against the environment alone and against a bare torch loop.

    python -m bench.steps [--only acting ppo dqn] [--seconds 6] [--compile] [--json FILE]

acting      a group collects segments of CartPole with PPO's policy (2x64); beside it the same environments are stepped with
            given actions and nothing else, and the policy acts without any environment. `overhead` is all that collecting
            takes beyond the environments: acting, checks, rows written, seeded resets, the books of the segment
ppo, dqn    `update` of the learner, by gradient step: everything an update does counts (CartPole: 16 x 128, 4 epochs of 8
            minibatches, 2x64 twice; LunarLander: batch 128, 2x256, a step every 4 env steps). `bare` is the least that torch
            allows with its own autograd and its fused Adam: one batch, which is always the same, and no bookkeeping

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


def acting(seconds: float) -> dict[str, Any]:
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
    columns["action"][...] = rng.integers(spaces.action.nvec[0], size=(steps, envs))
    columns["reward"][...], columns["valid"][...] = rng.normal(size=(steps, envs)), True
    columns["terminated"][...] = rng.random((steps, envs)) < 0.01
    if "log_prob" in columns:
        columns["log_prob"][...] = -np.log(spaces.action.nvec[0])
    return Rollout(0, 0, (segment,), np.arange(envs))


def updating(algorithm: Algorithm, features: int, actions: int, steps: int, envs: int, before: int = 0) -> Callable[[], Any]:
    """The update of a learner that has had `before` rollouts."""
    spaces = spaces_of(gymnasium.spaces.Box(-9, 9, (features,), np.float32), gymnasium.spaces.Discrete(actions))
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


def gradient_steps(what: str, functions: Timed, steps: int, seconds: float) -> dict[str, float]:
    """Prints and returns microseconds for each gradient step: an update makes so many, a bare loop one a call."""
    took = cpu_us(functions, seconds)
    took = {name: us / steps if name.startswith("update") else us for name, us in took.items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("acting", "ppo", "dqn")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each part's measurements")
    parser.add_argument("--compile", action="store_true", help="also the bare loops under torch.compile")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for part in options.only:
        figures[part] = acting(options.seconds) if part == "acting" else (
            {"ppo": ppo, "dqn": dqn}[part](options.seconds, options.compile)
        )  # fmt: skip
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
