"""What a learner does that learns from a replay buffer: how often, from what, after which target, and what it comes to.

It is known by its settings: `update_ratio` and `warmup`, as those of `aiorl.DQN`. Where there are `target_every` and
`target_tau`, or `tau` and perhaps `policy_delay`, and its state has `target` beside `parameters`, the target is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from aiorl.algos.base import Algorithm
from aiorl.buffers.replay import gradient_steps_owed
from aiorl.checkpoint import flatten
from aiorl.envs.spec import EnvSpec
from aiorl.segments import Array
from aiorl.testing.bench import ENVS, STEPS, Bench
from aiorl.testing.findings import Finding, error, warning
from aiorl.testing.plain_loop import plain_loop

STEADY = "aiorl.testing.chain:Steady"
SHARE, EVERY, NEAR = 0.25, 2, 1e-3
GAMMA, N_STEP, WORTH, OFF = 0.5, 3, 2.0, 0.15  # 1 / (1 - 0.5); how far off a mean may be
VALUE_ROLLOUTS, VALUE_STEPS = 40, 32


def learns_from_replay(algorithm: Algorithm) -> bool:
    return all(hasattr(algorithm, name) for name in ("update_ratio", "warmup"))


def changed(algorithm: Any, **settings: Any) -> Any:
    """With those settings that it has; others are left out."""
    return msgspec.structs.replace(algorithm, **{k: v for k, v in settings.items() if hasattr(algorithm, k)})


# -- how often ---------------------------------------------------------------------------------------------------------


def update_ratio(bench: Bench) -> Iterator[Finding]:
    """Gradient steps are those that were paid for with experience, rollout by rollout."""
    if not learns_from_replay(bench.algorithm):
        return
    algorithm: Any = bench.algorithm
    stored = done = 0
    for recorded, told in zip(bench.tape, bench.told, strict=True):
        stored += recorded.rollout().env_steps
        done += int(told.get("gradient_steps", 0))
        owed = gradient_steps_owed(stored, bench.context.warmup or 0, algorithm.update_ratio)
        if done != owed:
            seen = f"after {stored} env steps it has done {done} gradient steps, expected {owed}"
            yield error(
                "update-ratio", f"{seen}: {algorithm.update_ratio:g} for each one after {bench.context.warmup} of warm-up",
                "aiorl.buffers.replay.gradient_steps_owed counts them; context.warmup goes before the setting",
            )  # fmt: skip
            return


# -- after which target ------------------------------------------------------------------------------------------------


def target(bench: Bench) -> Iterator[Finding]:
    """One gradient step for each rollout, and after each a look at how far the target has moved towards what it follows."""
    if not learns_from_replay(bench.algorithm) or not (share := _shares(bench.algorithm)):
        return
    often = bool(share.get("target_every"))
    ratio = 1 / (ENVS * STEPS)
    algorithm = changed(bench.algorithm, update_ratio=ratio, learning_rate=1e-2, **share)
    every = EVERY if often else max(1, int(getattr(algorithm, "policy_delay", 1)))
    learner = algorithm.learner(bench.spaces, replace(bench.context, warmup=0))
    before = _pairs(learner.state_dict())
    if not before:
        return
    for step, recorded in enumerate(bench.tape, start=1):
        learner.update(recorded.rollout())
        now = _pairs(learner.state_dict())
        for name, (_, online) in now.items():
            moved = _share_moved(before[name][0], now[name][0], online)
            expected = SHARE if step % every == 0 else 0.0
            if moved is None or abs(moved - expected) <= NEAR:
                continue
            told = f"in gradient step {step} {name} took over {moved:.2g} of the way to the parameters, expected"
            if not expected or moved <= NEAR:
                yield error("target-interval", f"{told} {expected:g}: it is due every {every} steps",
                            "count gradient steps over the whole training")  # fmt: skip
            else:
                yield error("target-share", f"{told} {expected:g}{_twice(moved)}", "update the target in one place only")
            return
        before = now


def _shares(algorithm: Any) -> dict[str, Any]:
    if hasattr(algorithm, "target_every") and hasattr(algorithm, "target_tau"):
        return {"target_every": EVERY, "target_tau": SHARE}
    return {"tau": SHARE} if hasattr(algorithm, "tau") else {}


def _twice(moved: float) -> str:
    return ": it is updated twice" if abs(moved - (1 - (1 - SHARE) ** 2)) <= NEAR else ""


def _pairs(state: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
    """(target, parameters) as vectors, by the path of the target: every `target` that lies beside `parameters`."""
    arrays, _ = flatten(state)
    found: dict[str, list[str]] = {}
    for path in arrays:
        parts = path.split("/")
        for i, part in enumerate(parts):
            follows = "/".join([*parts[:i], "parameters", *parts[i + 1 :]])
            if part == "target" and follows in arrays:
                found.setdefault("/".join(parts[: i + 1]), []).append(path)
    return {
        name: (_vector([arrays[p] for p in paths]), _vector([arrays[p.replace(name, _online(name), 1)] for p in paths]))
        for name, paths in found.items()
    }


def _online(target: str) -> str:
    return "/".join([*target.split("/")[:-1], "parameters"])


def _vector(arrays: list[Array]) -> Array:
    return np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in arrays])


def _share_moved(before: Array, now: Array, online: Array) -> float | None:
    """How much of the way from `before` to `online` it went to `now`; None where there is no way to go."""
    way = online - before
    length = float(way @ way)
    return float((now - before) @ way) / length if length > 0 else None


# -- what it comes to --------------------------------------------------------------------------------------------------


def value(bench: Bench) -> Iterator[Finding]:
    """Where every step is worth 1 and nothing is ever over, everything is worth 1 / (1 - gamma), for any number of steps."""
    if not learns_from_replay(bench.algorithm):
        return
    given: Any = bench.algorithm
    algorithm = changed(
        given, gamma=GAMMA, n_step=N_STEP, learning_rate=3e-3, update_ratio=0.25, target_every=10, target_tau=0.5, tau=0.1,
        tune_alpha=False, alpha=1e-6, batch_size=64, capacity=5_000, anneal=False,
    )  # fmt: skip
    means: list[float] = []
    env = EnvSpec(STEADY, bench.env.kwargs, STEADY)
    plain_loop(
        algorithm, env, envs=ENVS, group_size=ENVS, steps=VALUE_STEPS, seed=3, rollouts=VALUE_ROLLOUTS, degree=0,
        warmup=VALUE_STEPS, each=lambda _, __, metrics: means.append(metrics.get("q_mean", np.nan)),
    )  # fmt: skip
    if np.isnan(means[-1]):
        yield warning("no-q-values", "update() returns no `q_mean`: a loss alone does not show whether values are sound",
                      "add the mean of the values that it learns to the metrics")  # fmt: skip
        return
    scale = float(getattr(algorithm, "reward_scale", 1.0))
    mean, expected = float(np.mean(means[-5:])) / scale, WORTH
    if abs(mean - expected) > OFF * expected:
        told = f"where each step is worth 1 for ever it learns values of {mean:.3g}, expected {expected:g}"
        yield error("value", f"{told} (gamma {GAMMA:g}, {getattr(algorithm, 'n_step', 1)} steps{_guess(mean)})",
                    "target = n rewards, each discounted, + gamma ** n * the value where they led")  # fmt: skip


def _guess(mean: float) -> str:
    """What would make such values of an n-step learner."""
    n_rewards = sum(GAMMA**i for i in range(N_STEP))
    wrong = {
        "one reward with gamma ** n": 1 / (1 - GAMMA**N_STEP),
        "n rewards with gamma ** 1": n_rewards / (1 - GAMMA),
        "no value of where they led": n_rewards,
    }
    near = [what for what, worth in wrong.items() if abs(mean - worth) < 0.5 * OFF * worth]
    return f"; {near[0]} would do that" if near else ""
