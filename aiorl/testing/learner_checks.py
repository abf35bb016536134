"""What a learner does when it is handled as a run handles it: one check for each clause of its protocol."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aiorl.algos.base import Learner, LearnerContext, Weights
from aiorl.checkpoint import flatten
from aiorl.segments import Rollout
from aiorl.testing.bench import HALF, ROLLOUTS, Bench, alike, copied, difference, layout_of, same, unlike
from aiorl.testing.chance import watched
from aiorl.testing.findings import Finding, error, warning

ROUNDING = 1e-3  # acting and learning may round differently


def metrics(bench: Bench) -> Iterator[Finding]:
    learner = bench.learner()
    for recorded in bench.tape:
        found = learner.update(recorded.rollout())
        steps = found.get("gradient_steps")
        if steps is None:
            yield error(
                "gradient-steps", "update() returns no `gradient_steps`", "add it to the metrics (0 during warm-up)"
            )
            return
        for name, value in found.items():
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                yield error(
                    "metrics",
                    f"metric {name!r} is {value!r} after rollout {recorded.index}, expected a finite number",
                )
                return
        if steps < 0 or steps != int(steps):
            yield error(
                "gradient-steps",
                f"`gradient_steps` is {steps!r}, expected a whole number of steps done in this update",
            )
            return
        if abs(found.get("off_policy_error", 0.0)) > ROUNDING:
            yield error(
                "off-policy-error",
                f"`off_policy_error` is {found['off_policy_error']:g} for a rollout of the newest version",
                "compare who acted with who learns before anything is updated: it must be 0 here",
            )
            return


def weights(bench: Bench) -> Iterator[Finding]:
    """Names, shapes and dtypes stay; asking twice gives the same; what is not `update` changes nothing."""
    learner = bench.learner()
    first: Weights | None = None
    for updates, recorded in enumerate((None, *bench.tape)):
        if recorded is not None:
            learner.update(recorded.rollout())
        now = learner.weights()
        for name, value in now.items():
            if not isinstance(value, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
                yield error("weights", f"weights()[{name!r}] is a {type(value).__name__}, expected a NumPy array")
                return
        if first is not None and layout_of(now) != layout_of(first):
            yield error(
                "weights",
                f"weights() had {difference(layout_of(first), layout_of(now))} at first, later it had not",
                "names, shapes and dtypes are laid out once, in shared memory",
            )
            return
        if bad := [name for name, a in now.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]:
            yield error(
                "weights",
                f"weights()[{bad[0]!r}] is not finite after {updates} updates",
            )
            return
        first = first or copied(now)
        kept = copied(now)
        learner.state_dict()
        if not same(kept, learner.weights()) or not same(kept, now):
            yield error(
                "weights-move",
                "weights change without an update: by weights() or state_dict()",
                "let only update() and load_state_dict() change them",
            )
            return


def moves(bench: Bench) -> Iterator[Finding]:
    """What is learned changes something, and that reaches who acts."""
    for recorded, found in zip(bench.tape, bench.told, strict=True):
        steps = int(found.get("gradient_steps", 0))
        if steps and found.get("learning_rate") != 0 and found.get("grad_norm") == 0:
            yield error(
                "zero-gradient",
                f"the gradient is 0 in all {steps} gradient steps after rollout {recorded.index}",
                "is something detached, masked out, or are rewards and observations all zero?",
            )
            return
    total = int(sum(found.get("gradient_steps", 0) for found in bench.told))
    if not total:
        yield warning(
            "no-updates",
            f"{ROLLOUTS} rollouts after a warm-up of {bench.context.warmup} env steps led to no gradient step",
            "context.warmup goes before the setting of the algorithm",
        )
    elif same(bench.learner().weights(), bench.final):
        if unlike(_parameters(bench.learner()), _parameters(bench.trained(ROLLOUTS))):
            yield error(
                "unpublished",
                f"{total} gradient steps changed what is learned, and nothing in weights(), which is what acts",
                "return the parameters that are trained, as they are now",
            )
        else:
            yield error(
                "unchanged", f"{total} gradient steps changed no weights", "does the optimizer hold these very parameters?"
            )


def _parameters(learner: Learner) -> dict[str, Any]:
    """All floating-point arrays of a learner's state, but for experience."""
    arrays, _ = flatten(learner.state_dict())
    return {path: a for path, a in arrays.items() if a.dtype.kind == "f" and "replay" not in path.split("/")}


def experience(bench: Bench) -> Iterator[Finding]:
    """Other rewards, or other observations, lead to other weights: the learner looks at what it is given."""
    if same(bench.learner().weights(), bench.half):
        return  # `moves` tells, if it is wrong
    changes: dict[str, Callable[[Rollout], None]] = {"rewards": other_rewards, "observations": _other_observations}
    for what, change in changes.items():
        if same(bench.half, _trained_otherwise(bench, HALF, change).weights()):
            yield error(
                f"ignores-{what}",
                f"with other {what} in every row it learns the same weights, to the last bit",
                "does it sample from the very buffer that rollouts are stored in? Are batches all zero?",
            )


def _trained_otherwise(bench: Bench, rollouts: int, change: Callable[[Rollout], None]) -> Learner:
    """A new learner that has been through the first `rollouts` of the tape, each changed."""
    learner = bench.learner()
    for recorded in bench.tape[:rollouts]:
        rollout = recorded.rollout(recorded.copied())
        change(rollout)
        learner.update(rollout)
    return learner


def other_rewards(rollout: Rollout) -> None:
    for segment in rollout.segments:
        segment.columns["reward"][...] = 0.5 - segment.columns["reward"]


def _other_observations(rollout: Rollout) -> None:
    """Every leaf backwards."""
    for segment in rollout.segments:
        for leaf in (*segment.obs.values(), *segment.final_obs.values()):
            leaf[...] = leaf[..., ::-1].copy()


def repeatable(bench: Bench) -> Iterator[Finding]:
    """One seed, one result, and nothing of the rollout's memory kept or changed."""
    used: set[str] = set()
    asked = Asked(**vars(bench.context))
    with watched(used):
        expected = bench.trained(ROLLOUTS, asked)
    if used:
        yield error(
            "global-chance",
            f"the learner uses the global generator of {', '.join(sorted(used))}",
            "draw from context.rng(…) only: then a seed repeats a run, whatever else the program does",
        )
        return
    yield from _asked_again(asked)
    if not alike(expected, bench.trained(ROLLOUTS)):
        yield error(
            "not-repeatable",
            "two learners with one seed and the same rollouts came to differ",
            "draw all chance from context.rng(…)",
        )
        return
    learner = bench.learner()
    for recorded in bench.tape:
        memory = recorded.copied()
        learner.update(recorded.rollout(memory))
        if memory != recorded.memory:
            yield error(
                "writes-into-rollout",
                "update() changes the arrays of its rollout, which are the run's books until it returns",
                "work on a copy",
            )
            return
        memory[:] = b"\xa5" * len(memory)
    if not alike(expected, learner):
        yield error(
            "keeps-rollout",
            "the learner looks at a rollout after its update: its memory is used again by then",
            "copy what must outlive the call",
        )


@dataclass(frozen=True)
class Asked(LearnerContext):
    """Counts what random numbers are asked for."""

    keys: Counter[tuple[int, ...]] = field(default_factory=Counter[tuple[int, ...]])

    def rng(self, *key: int) -> np.random.Generator:
        self.keys[key] += 1
        return super().rng(*key)


def _asked_again(asked: Asked) -> Iterator[Finding]:
    """Every key is asked for once: else two networks begin alike, or all updates draw the same."""
    for key, times in asked.keys.items():
        if times > 1:
            yield warning(
                "same-chance",
                f"context.rng({', '.join(map(str, key))}) is asked for {times} times: the same random numbers each time",
                "give each purpose and each rollout a key of its own, as rng(SAMPLE, rollout.index)",
            )
            return


def state(bench: Bench) -> Iterator[Finding]:
    """`state_dict` holds everything, as copies; `load_state_dict` takes over everything, as copies."""
    learner = bench.trained(HALF)
    saved = learner.state_dict()
    try:
        flatten(saved)
    except (ValueError, AttributeError) as failure:
        yield error("state-leaves", f"state_dict() cannot be saved: {failure}")
        return
    kept = copy.deepcopy(saved)
    # Of another state, far off, so that everything has to be taken over, and shows if it is not.
    other = _trained_otherwise(bench, HALF - 1, other_rewards)
    given = copy.deepcopy(kept)
    other.load_state_dict(given)
    if place := unlike(kept, other.state_dict()):
        yield error(
            "state-round-trip",
            f"after load_state_dict, state_dict() differs at {place}",
            "load everything that is saved",
        )
        return
    if not same(learner.weights(), other.weights()):
        yield error("state-weights", "after load_state_dict, weights() are not those of the learner that was saved")
        return
    for recorded in bench.tape[HALF:]:
        learner.update(recorded.rollout())
        other.update(recorded.rollout())
    if not alike(learner, other):
        yield error(
            "state-incomplete",
            "a learner that was loaded goes on differently from the one that was saved",
            "something is missing from state_dict: optimizer moments, targets, buffer, statistics, counters?",
        )
    elif not alike(learner, _loaded_late(bench, kept)):
        yield error(
            "state-leftover",
            "a learner that had learned for longer when it was loaded goes on differently from the one that was saved",
            "let load_state_dict clear what it does not overwrite: rows of a buffer that held more, their priorities",
        )
    if unlike(kept, saved):
        yield error("state-aliased", "what state_dict() returned changed in a later update", "return copies")
    if unlike(kept, given):
        yield error("state-taken", "load_state_dict keeps the arrays it was given and changes them", "copy them")
    yield from _damaged(bench, kept)


def _loaded_late(bench: Bench, saved: Mapping[str, Any]) -> Learner:
    """One that has been through the whole tape, is loaded and goes on from there."""
    learner = bench.trained(ROLLOUTS)
    learner.load_state_dict(copy.deepcopy(dict(saved)))
    for recorded in bench.tape[HALF:]:
        learner.update(recorded.rollout())
    return learner


def _damaged(bench: Bench, saved: Mapping[str, Any]) -> Iterator[Finding]:
    arrays, _ = flatten(saved)
    damages: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [("without {!r}", lambda d: d.pop(next(iter(d))))]
    if any("/" not in path for path in arrays):
        damages.append(("with another shape of {!r}", _reshape))
    for how, damage in damages:
        broken = copy.deepcopy(dict(saved))
        damage(broken)
        try:
            bench.learner().load_state_dict(broken)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
        name = next(k for k in saved if k not in broken or unlike({k: saved[k]}, {k: broken[k]}))
        yield warning(
            "accepts-damage",
            f"load_state_dict accepts a state {how.format(name)}",
            "raise ValueError naming the first mismatch: aiorl.trees.check_tree does that",
        )
        return


def _reshape(tree: dict[str, Any]) -> None:
    name = next(k for k, v in tree.items() if isinstance(v, np.ndarray))
    tree[name] = np.concatenate([tree[name].reshape(-1), tree[name].reshape(-1)[:1]])


def settings(bench: Bench) -> Iterator[Finding]:
    """What cannot be changed is refused, what is accepted has an effect."""
    try:
        bench.learner().set(no_such_setting=1.0)
    except ValueError:
        pass
    else:
        yield warning("set", "set(no_such_setting=1.0) is accepted", "raise ValueError naming what can be changed")
        return
    learner, rate = bench.learner(), 0.5 * float(getattr(bench.algorithm, "learning_rate", 0))
    if not rate or same(learner.weights(), bench.half):
        return  # there is nothing to halve, or nothing that would show it: `moves` tells
    try:
        learner.set(learning_rate=rate)
    except ValueError:
        return
    for recorded in bench.tape[:HALF]:
        learner.update(recorded.rollout())
    if same(learner.weights(), bench.half):
        yield error(
            "set-unused",
            "set(learning_rate=…) is accepted, and with half of it it learns the same weights, to the last bit",
            "let the next update use it, or raise ValueError: `run.set` tells its caller that it was changed",
        )


def not_finite(bench: Bench) -> Iterator[Finding]:
    """The environment's contract refuses rewards that are no numbers; a learner should still not go on silently."""
    learner = bench.trained(HALF)
    recorded = bench.tape[HALF]
    memory = recorded.copied()
    recorded.rollout(memory).segments[0].columns["reward"][...] = np.nan
    try:
        learner.update(recorded.rollout(memory))
    except Exception:
        return
    if all(np.isfinite(a).all() for a in learner.weights().values() if a.dtype.kind == "f"):
        return
    yield warning(
        "not-finite",
        "a reward that is not a number makes the weights not finite, and update() says nothing",
        "raise TrainingError",
    )
