"""Trying out a replay buffer: is everything that it samples something that happened, as it happened?

A made-up stream of experience is written to it, of which every number is known and occurs once. The ring wraps, episodes
end both ways and are given up, rows are no transitions, and the memory of a rollout is used again for something else after
it has been added, as in a run. Then once more as the eager schedule delivers it: environments are in a rollout as they are
ready, in any column, twice or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aiorl.buffers.observations import on_host
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array
from aiorl.testing.findings import Finding, error, sort, warning
from aiorl.testing.sequence_checks import judge_sequences
from aiorl.testing.transition_checks import ENVS, GAMMA, ROWS, SAMPLES, Truth

ROLLOUTS, HORIZONS = 8, (1, 3)
DRAWS, BIAS = 128, 0.5  # for each row that is held; it may come up so much less often than the others
LARGE, BETA, OFF = 4.0, 0.5, 0.15  # an error among those of 1; how far off its share of draws may be


def check_replay(
    make: Callable[[Spaces, int, int], Any], *, stack: int = 1, priority_exponent: float = 0.0
) -> list[Finding]:
    """Look for everything in a replay buffer that makes a learner learn from what did not happen.

    `make(spaces, environments, capacity)` returns a new one, with `add(rollout)`, `len()` and
    `sample(rng, size, n=, gamma=)`, which returns what `aiorl.buffers.replay.Batch` has. If it has
    `sequences(rng, size, length)`, `reprioritise`, or `state_dict` and `load_state_dict`, see `aiorl.buffers.replay.Replay`,
    those are tried out as well. If it draws in proportion to errors raised to a `priority_exponent`, `sample` takes `beta=`,
    and chances and weights are looked at. Observations are `stack` frames on the first axis, oldest first, the first frame
    of an episode repeated; single frames without that axis if it is 1.
    """
    found: dict[str, Finding] = {}
    new = _Maker(make, stack)
    try:
        for looks in (_rows(new, eager=False), _priorities(new, priority_exponent), _state(new), _rows(new, eager=True)):
            for finding in looks:
                found.setdefault(finding.code, finding)
    except Exception as failure:
        found["raised"] = error("raised", f"the buffer raised {type(failure).__name__}: {failure}")
    return sort(found.values())


class _Maker:
    """Makes buffers, and what they are to hold."""

    def __init__(self, make: Callable[[Spaces, int, int], Any], stack: int) -> None:
        self._make, self._stack = make, stack

    def truth(self, seed: int = 0, *, eager: bool = False) -> Truth:
        return Truth(self._stack, seed, eager=eager)

    def buffer(self, truth: Truth, rollouts: int = 0) -> Any:
        """A new one that holds the next rollouts of a truth."""
        made = self._make(truth.spaces, ENVS, ROWS * ENVS)
        for _ in range(rollouts):
            truth.add_to(made)
        return made


def _rows(new: _Maker, *, eager: bool) -> Iterator[Finding]:
    truth, rng = new.truth(eager=eager), np.random.default_rng(1)
    buffer = new.buffer(truth)
    for _ in range(ROLLOUTS):
        truth.add_to(buffer)
        if not len(buffer):
            yield error("empty", f"{truth.stored} transitions were added, it says that it holds none",
                        "the learner and whoever adds must have one and the same buffer")  # fmt: skip
            return
        if len(buffer) > truth.held:
            yield error("size", f"it says that it holds {len(buffer)} transitions, there are {truth.held}",
                        "count what is complete and can be sampled")  # fmt: skip
        for n in HORIZONS:
            yield from truth.judge(buffer.sample(rng, SAMPLES, n=n, gamma=GAMMA), n)
        if hasattr(buffer, "sequences"):
            yield from judge_sequences(truth, buffer)
    if not eager:  # else it depends on the buffer, whose rows are the oldest
        yield from _coverage(buffer, truth, rng)


def _coverage(buffer: Any, truth: Truth, rng: np.random.Generator) -> Iterator[Finding]:
    """Everything that is held is sampled, about equally often."""
    drawn = DRAWS * truth.held
    times, envs = truth.where(buffer.sample(rng, drawn, n=1, gamma=GAMMA))
    held = [(t, env) for env, now in enumerate(truth.time) for t in range(now - ROWS, now) if truth.valid[t, env]]
    counts = {(t, env): int(np.count_nonzero((times == t) & (envs == env))) for t, env in held}
    usual = int(np.median(list(counts.values())))
    if missing := sorted({t for (t, _), count in counts.items() if not count}):
        yield error("never-sampled", f"rows of the times {missing[:4]} are held and were never sampled in {drawn} draws",
                    "sample from all that is stored")  # fmt: skip
    elif min(counts.values()) < BIAS * usual:
        yield warning("biased", f"a row came up {min(counts.values())} times in {drawn} draws, others about {usual} times",
                      "right if it is meant: then the loss needs importance weights")  # fmt: skip


def _priorities(new: _Maker, exponent: float) -> Iterator[Finding]:
    """Errors become the priorities of the rows that had them, and of none that lies there since."""
    truth, rng = new.truth(), np.random.default_rng(1)
    buffer = new.buffer(truth, 3)
    if not hasattr(buffer, "reprioritise"):
        return
    size = DRAWS * truth.held
    batch = buffer.sample(rng, size, n=1, gamma=GAMMA)
    if ignored := buffer.reprioritise(batch, np.where(large := _has_large(truth, batch), LARGE, 1.0)):
        yield error("live-priorities", f"reprioritise ignored {ignored} of {size} errors of rows that are there still",
                    "compare the generation of a row with the one that was sampled")  # fmt: skip
    elif exponent:
        times, envs = truth.where(batch)
        held = [len({*zip(times[which], envs[which], strict=True)}) for which in (large, ~large)]
        again = buffer.sample(rng, size, n=1, gamma=GAMMA, beta=BETA)
        yield from _chances(_has_large(truth, again), again.weights, held, exponent)
    batch = buffer.sample(rng, SAMPLES, n=1, gamma=GAMMA)
    for _ in range(4):
        truth.add_to(buffer)
    ignored = buffer.reprioritise(batch, np.full(SAMPLES, 1e6))
    if ignored != SAMPLES:
        yield error("stale-priorities", f"reprioritise took over {SAMPLES - ignored} errors of rows overwritten since",
                    "compare the generation of a row with the one that was sampled")  # fmt: skip


def _has_large(truth: Truth, batch: Any) -> Array:
    """[N] bool: which rows of a batch are said to have had a large error."""
    times, envs = truth.where(batch)
    return (times + envs) % 2 == 0


def _chances(large: Array, weights: Array, held: list[int], exponent: float) -> Iterator[Finding]:
    """Of draws [N] of which those that are `large` had such an error, as `held[0]` of the rows, the others `held[1]`."""
    drawn, expected = np.count_nonzero(large), LARGE**exponent
    ratio = drawn / held[0] / max(1, len(large) - drawn) * held[1]
    if abs(ratio - expected) > OFF * expected:
        told = f"rows with {LARGE:g} times the error of others are drawn {ratio:.3g} times as often, expected {expected:.3g}"
        yield error("chances", told, f"P(i) is in proportion to the error to the power of {exponent:g}")
    elif weights.shape != large.shape or not np.allclose(weights, np.where(large, expected**-BETA, 1.0), rtol=0.02):
        seen = f"rows drawn {expected:.3g} times as often have weights of {_range(weights[large])}"
        seen += f", the others of {_range(weights[~large])}, expected {expected**-BETA:.3g} and 1"
        yield error("importance-weights", seen, "weights are (rows * P(i)) ** -beta, divided by the largest of them")


def _range(values: Array) -> str:
    return " to ".join(dict.fromkeys(f"{bound:.3g}" for bound in (values.min(), values.max())))


def _state(new: _Maker) -> Iterator[Finding]:
    """One that is loaded goes on as the one that was saved, whatever it held before."""
    if not all(hasattr(new.buffer(new.truth()), name) for name in ("state_dict", "load_state_dict")):
        return
    for rollouts, code, advice in (
        (0, "state", "save and load everything that it holds"),
        (ROLLOUTS, "state-leftover", "forget what it held before: sizes, marks and priorities of rows that are not loaded"),
    ):
        truth = new.truth()
        saved, loaded = new.buffer(truth, 2), new.buffer(new.truth(seed=7), rollouts)
        loaded.load_state_dict(saved.state_dict())
        alike = _sample_alike(saved, loaded)
        truth.add_to(saved, loaded)
        if not (alike and _sample_alike(saved, loaded)):
            held = f"that held {rollouts} rollouts" if rollouts else "that is new"
            yield error(code, f"a buffer {held} does not sample after load_state_dict what the saved one does", advice)
            return


def _sample_alike(a: Any, b: Any) -> bool:
    one, other = (buffer.sample(np.random.default_rng(0), SAMPLES, n=1, gamma=GAMMA) for buffer in (a, b))
    numbers = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("action", "returns", "discounts"))
    leaves = [(on_host(getattr(one, name)), on_host(getattr(other, name))) for name in ("obs", "next_obs")]
    return len(a) == len(b) and numbers and all(np.array_equal(x[name], y[name]) for x, y in leaves for name in x)
