"""What a learner does that learns from a replay buffer: how often, from what, after which target, and what it comes to.

It is known by its settings: `update_ratio` and `warmup`, as those of `aiorl.DQN`. Where there is `target_every`, perhaps
with `target_tau`, or `tau`, perhaps with `policy_delay`, and its state has `target` beside `parameters`, the target is
measured. With `capacity` it must learn from all that it holds, with `priority_exponent` and `priority_beta` by weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from aiorl.algos.base import Algorithm
from aiorl.buffers.replay import gradient_steps_owed
from aiorl.checkpoint import flatten
from aiorl.envs.spec import EnvSpec
from aiorl.segments import Array, Rollout
from aiorl.testing.bench import ENVS, ROLLOUTS, STEPS, Bench, copied, same
from aiorl.testing.findings import Finding, error, warning
from aiorl.testing.learner_checks import other_rewards
from aiorl.testing.plain_loop import plain_loop

STEADY = "aiorl.testing.chain:Steady"
FEW = 32  # gradient steps: so many that a difference shows even where only signs of gradients count
SHARE, EVERY, NEAR = 0.25, 2, 1e-3
GAMMA, N_STEP = 0.55, 2  # so chosen that every wrong power of gamma takes values further off than may be
WORTH, OFF = 1 / (1 - GAMMA), 0.15  # what is expected, and how far off a mean may be
VALUE_ROLLOUTS, VALUE_STEPS, VALUE_RATE, VALUE_RATIO = 40, 32, 3e-3, 0.25
PART, STILL, AHEAD = 8, 0.03, 24  # of how many parts the last shows movement; how small; in how many more it may arrive


def learns_from_replay(algorithm: Algorithm) -> bool:
    return all(hasattr(algorithm, name) for name in ("update_ratio", "warmup"))


def changed(algorithm: Any, **settings: Any) -> Any:
    """With those settings that it has; others are left out."""
    fields = type(algorithm).__struct_fields__  # a property of that name cannot be set
    return msgspec.structs.replace(algorithm, **{k: v for k, v in settings.items() if k in fields})


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


# -- from what ---------------------------------------------------------------------------------------------------------


def held(bench: Bench) -> Iterator[Finding]:
    """Its oldest rows make a difference as long as they are held, and so do the weights of what priorities chose."""
    if not learns_from_replay(bench.algorithm) or not hasattr(bench.algorithm, "capacity"):
        return
    rows = ROLLOUTS * ENVS * STEPS
    algorithm = changed(bench.algorithm, capacity=2 * rows, batch_size=64, update_ratio=FEW / (ENVS * STEPS))
    before, plain = _late(bench, algorithm)
    if same(before, plain):
        return  # `update_ratio` and `moves` tell
    if same(plain, _late(bench, algorithm, other_rewards)[1]):
        seen = f"with {rows} rows in its buffer, other rewards in the first {ENVS * STEPS} make no difference"
        yield error("never-sampled", f"{seen} to {FEW} gradient steps", "sample from all that is held")
    if not all(hasattr(algorithm, name) for name in ("priority_exponent", "priority_beta")):
        return
    without, wholly = (
        _late(bench, changed(algorithm, priority_exponent=1.0, priority_beta=beta))[1] for beta in (0.0, 1.0)
    )
    if same(without, wholly):
        yield error(
            "importance-weights", "with priority_beta = 0 and with 1 it learns the same weights, to the last bit",
            "multiply each transition's loss by `batch.weights`, sampled with `beta`: else what is rare counts for too much",
        )  # fmt: skip


def _late(
    bench: Bench, algorithm: Algorithm, change: Callable[[Rollout], None] = lambda _: None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights before and after its last update, the only one with gradient steps, where the first rollout was changed."""
    learner = algorithm.learner(bench.spaces, replace(bench.context, warmup=(ROLLOUTS - 1) * ENVS * STEPS))
    first, *others, last = (recorded.rollout(recorded.copied()) for recorded in bench.tape)
    change(first)
    for rollout in (first, *others):
        learner.update(rollout)
    before = copied(learner.weights())
    learner.update(last)
    return before, copied(learner.weights())


# -- after which target ------------------------------------------------------------------------------------------------


def target(bench: Bench) -> Iterator[Finding]:
    """One gradient step for each rollout, and after each a look at how far the target has moved towards what it follows."""
    if not learns_from_replay(bench.algorithm):
        return
    if (schedule := _schedule(bench.algorithm)) is None:
        yield _unmeasured("there is no setting `target_every` or `tau`")
        return
    settings, share, every = schedule
    algorithm = changed(bench.algorithm, update_ratio=1 / (ENVS * STEPS), learning_rate=1e-2, **settings)
    learner = algorithm.learner(bench.spaces, replace(bench.context, warmup=0))
    before = _pairs(learner.state_dict())
    if not before:
        yield _unmeasured("its state has no `target` beside `parameters`")
        return
    yield from _unused(bench)
    for step, recorded in enumerate(bench.tape, start=1):
        learner.update(recorded.rollout())
        now = _pairs(learner.state_dict())
        for name, (_, online) in now.items():
            moved = _share_moved(before[name][0], now[name][0], online)
            expected = share if step % every == 0 else 0.0
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


def _unused(bench: Bench) -> Iterator[Finding]:
    """Another target leads to other gradient steps."""
    algorithm = changed(bench.algorithm, update_ratio=FEW / (ENVS * STEPS), target_every=10**6)
    learners = [algorithm.learner(bench.spaces, replace(bench.context, warmup=0)) for _ in range(2)]
    state = copy.deepcopy(learners[0].state_dict())
    for name in _pairs(state):
        _change(state, name.split("/"))
    learners[1].load_state_dict(state)
    for learner in learners:
        learner.update(bench.tape[0].rollout())
    found, other = (_pairs(learner.state_dict()) for learner in learners)
    if all(np.array_equal(found[name][1], other[name][1]) for name in found):
        yield error("target-unused", "with another target it learns the same parameters, to the last bit",
                    "take the value of what follows from the target: from what is trained, values may run away")  # fmt: skip


def _change(tree: Any, path: list[str]) -> None:
    """Make all numbers under `path` quite other ones: what was worth something is worth less than nothing."""
    *way, last = path
    for name in way:
        tree = tree[name]
    if isinstance(tree[last], Mapping):
        for name in tree[last]:
            _change(tree[last], [name])
    elif tree[last].dtype.kind == "f":
        tree[last] = np.asarray(-1, tree[last].dtype) - tree[last]


def _schedule(algorithm: Any) -> tuple[dict[str, Any], float, int] | None:
    """Settings to measure the target with, the share that it takes over then, and every how many gradient steps."""
    if hasattr(algorithm, "target_every"):
        share = SHARE if hasattr(algorithm, "target_tau") else 1.0  # or else it is a copy
        return {"target_every": EVERY, "target_tau": share}, share, EVERY
    if hasattr(algorithm, "tau"):
        return {"tau": SHARE}, SHARE, max(1, int(getattr(algorithm, "policy_delay", 1)))
    return None


def _unmeasured(why: str) -> Finding:
    return warning("not-checked", f"how its target moves was not looked at: {why}",
                   "name them so, or test it yourself; right if it has no target")  # fmt: skip


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
    """Where every step is worth 1 and nothing is ever over, everything is worth 1 / (1 - gamma), for any number of steps.

    Judged are values that have settled: at one learning rate for all if they do, or else at the algorithm's own.
    """
    if not learns_from_replay(bench.algorithm):
        return
    given: Any = bench.algorithm
    tried: list[Array] = []
    for rate in dict.fromkeys((VALUE_RATE, getattr(given, "learning_rate", VALUE_RATE))):
        tried.append(_means(bench, rate))
        if not len(tried[-1]):
            yield warning("no-q-values", "update() returns no `q_mean`: a loss alone does not show whether values are sound",
                          "add the mean of the values that it learns to the metrics")  # fmt: skip
            return
        if _settled(tried[-1]):
            break
    means = max(tried, key=lambda means: (_settled(means), _leaves(means)))
    before, mean = _lately(means)
    told = f"where each step is worth 1 for ever it learns values of {mean:.3g}, expected {WORTH:.3g}"
    if not _settled(means) and not _leaves(means):
        steps = int(VALUE_RATIO * VALUE_ROLLOUTS * VALUE_STEPS * ENVS)
        yield warning("not-settled", f"{told}, and they still move: shortly before they were {before:.3g}",
                      f"to have them judged, give it a learning_rate for which {steps:,} gradient steps do: "
                      f"--{given.name}.learning-rate, or check_algorithm of an instance")  # fmt: skip
    elif not _near(mean):
        n = N_STEP if hasattr(given, "n_step") else 1
        yield error("value", f"{told} (gamma {GAMMA:g}, {n} steps{_guess(mean)})",
                    "target = n rewards, each discounted, + gamma ** n * the value where they led")  # fmt: skip


def _means(bench: Bench, rate: float) -> Array:
    """The mean value after each update that tells of one; the first has made a single gradient step."""
    given: Any = bench.algorithm
    # without what makes it another value (a clip of rewards) or one that is not reached yet (a target that hardly moves)
    algorithm = changed(
        given, gamma=GAMMA, n_step=N_STEP, learning_rate=rate, update_ratio=VALUE_RATIO, target_every=10, target_tau=0.5,
        tau=0.1, policy_delay=EVERY, reward_clip=None, tune_alpha=False, alpha=1e-6, batch_size=64, capacity=5_000,
        anneal=False,
    )  # fmt: skip
    told: list[float | None] = []
    env = EnvSpec(STEADY, bench.env.kwargs, STEADY)
    plain_loop(
        algorithm, env, envs=ENVS, group_size=ENVS, steps=VALUE_STEPS, seed=3, rollouts=VALUE_ROLLOUTS, degree=0,
        warmup=VALUE_STEPS * ENVS - round(1 / VALUE_RATIO), directory=bench.context.directory,
        each=lambda _, __, metrics: told.append(metrics.get("q_mean")),
    )  # fmt: skip
    return np.array([mean for mean in told if mean is not None]) / float(getattr(given, "reward_scale", 1.0))


def _lately(means: Array) -> tuple[float, float]:
    """In the part before the last, and in the last."""
    size = max(1, len(means) // PART)
    return float(means[-2 * size :][:size].mean()), float(means[-size:].mean())


def _near(mean: float) -> bool:
    return abs(mean - WORTH) <= OFF * WORTH


def _leaves(means: Array) -> bool:
    """Whether it went beyond what is expected and goes on, to infinity as it may be."""
    before, mean = _lately(means)
    return not (_near(mean) or abs(mean) < WORTH or abs(mean - WORTH) < abs(before - WORTH))


def _settled(means: Array) -> bool:
    """Whether there was hardly any movement lately, and none that could yet lead to where it should."""
    before, mean = _lately(means)
    moved, left = mean - before, WORTH - mean
    if _near(mean):
        return abs(moved) <= STILL * WORTH
    arrives = moved * left > 0 and abs(left) <= AHEAD * abs(moved)
    return not arrives and abs(moved) <= STILL * abs(mean - float(means[0]))


def _guess(mean: float) -> str:
    """What would make such values of an n-step learner."""
    n_rewards = sum(GAMMA**i for i in range(N_STEP))
    wrong = {
        "one reward with gamma ** n": 1 / (1 - GAMMA**N_STEP),
        "n rewards with gamma ** 1": n_rewards / (1 - GAMMA),
        "n rewards with gamma ** 2n": n_rewards / (1 - GAMMA ** (2 * N_STEP)),
        "no value of where they led": n_rewards,
    }
    near = min(wrong, key=lambda what: abs(mean - wrong[what]))
    return f"; {near} would do that" if abs(mean - wrong[near]) < 0.5 * OFF * wrong[near] else ""
