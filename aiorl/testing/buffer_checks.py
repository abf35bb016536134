"""Trying out a replay buffer: is everything that it samples something that happened, as it happened?

A made-up stream of experience is written to it, of which every number is known and occurs once. The ring wraps, episodes
end both ways and are given up, rows are no transitions, and the memory of a rollout is used again for something else after
it has been added, as in a run. Then once more as the eager schedule delivers it: environments are in a rollout as they are
ready, in any column, twice or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gymnasium
import numpy as np

from aiorl.buffers.observations import on_host
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentLayout
from aiorl.testing.findings import Finding, error, sort, warning

ENVS, STEPS, ROWS, ROLLOUTS = 3, 5, 12, 8
SAMPLES, GAMMA, HORIZONS = 256, 0.9, (1, 3)
FEATURES, ACTIONS, FINAL = 4, 5, 2.0
LONGEST = 2 * ENVS * ROLLOUTS * STEPS  # rows of one environment
DRAWS, BIAS = 128, 0.5  # for each row that is held; it may come up so much less often than the others
LARGE, BETA, OFF = 4.0, 0.5, 0.15  # an error among those of 1; how far off its share of draws may be


class Samples(Protocol):
    """A batch, as `aiorl.buffers.replay.Batch`."""

    @property
    def obs(self) -> dict[str, Any]: ...
    @property
    def action(self) -> Array: ...
    @property
    def returns(self) -> Array: ...
    @property
    def discounts(self) -> Array: ...
    @property
    def next_obs(self) -> dict[str, Any]: ...


class Buffer(Protocol):
    """What a replay buffer must have to be tried out."""

    def __len__(self) -> int: ...
    def add(self, rollout: Rollout) -> None: ...
    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float) -> Samples: ...


def check_replay(
    make: Callable[[Spaces, int, int], Any], *, stack: int = 1, priority_exponent: float = 0.0
) -> list[Finding]:
    """Look for everything in a replay buffer that makes a learner learn from what did not happen.

    `make(spaces, environments, capacity)` returns a new one, with `add(rollout)`, `len()` and
    `sample(rng, size, n=, gamma=)`, which returns what `aiorl.buffers.replay.Batch` has. If it has `reprioritise`, or
    `state_dict` and `load_state_dict`, see `aiorl.buffers.replay.Replay`, those are tried out as well. If it draws in
    proportion to errors raised to a `priority_exponent`, `sample` takes `beta=`, and chances and weights are looked at.
    Observations are `stack` frames on the first axis, oldest first, the first frame of an episode repeated; single frames
    without that axis if it is 1.
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


class Truth:
    """Experience of which everything is known: a frame [4] holds (time + 1, environment + 1, kind, checksum).

    Times are those of each environment. Episodes are also given up: within a segment by a row that is no transition, and
    between two. In an `eager` one each environment is a group, and comes into rollouts as chance has it.
    """

    def __init__(self, stack: int, seed: int = 0, *, eager: bool = False) -> None:
        self.stack, self._eager = stack, eager
        self.shape = (FEATURES,) if stack == 1 else (stack, FEATURES)
        box = gymnasium.spaces.Box(0, 1e6, self.shape, np.float32)
        self.spaces = spaces_of(box, gymnasium.spaces.Discrete(ACTIONS)).with_stack(stack)
        columns = {"action": self.spaces.action_column, "reward": Column((), "float64")}
        columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}
        self._layout = SegmentLayout(STEPS, 1 if eager else ENVS, self.spaces.obs_columns, columns)
        self._rng = rng = np.random.default_rng(seed)
        shape = (LONGEST, ENVS)
        self.reward, self.valid = rng.normal(size=shape), rng.random(shape) >= 0.06
        self.terminated, self.truncated = rng.random(shape) < 0.1, rng.random(shape) < 0.1
        self.terminated &= self.valid
        self.truncated = self.truncated & ~self.terminated | ~self.valid
        last_of_segment = np.arange(LONGEST)[:, None] % STEPS == STEPS - 1
        self._given_up = last_of_segment & ~self.terminated & ~self.truncated & (rng.random(shape) < 0.3)
        self.time = np.zeros(ENVS, int)
        self.index = 0

    @property
    def stored(self) -> int:
        return sum(int(self.valid[:now, env].sum()) for env, now in enumerate(self.time))

    @property
    def held(self) -> int:
        """A ring of stacks may be longer by what they reach back."""
        rows = ROWS + self.stack - 1
        if self._eager:
            return min(self.stored, rows * ENVS)
        return sum(int(self.valid[max(0, now - rows) : now, env].sum()) for env, now in enumerate(self.time))

    def add_to(self, *buffers: Buffer) -> None:
        """The next rollout."""
        order = [[int(env)] for env in self._rng.integers(ENVS, size=ENVS)] if self._eager else [[*range(ENVS)]]
        memory = [bytearray(self._layout.nbytes) for _ in order]
        segments = tuple(self._layout.view(memoryview(part)) for part in memory)
        for segment, envs in zip(segments, order, strict=True):
            self._fill(segment, envs)
        for buffer in buffers:
            buffer.add(Rollout(self.index, self.index, segments, np.concatenate(order)))
        for part in memory:
            part[:] = b"\x42" * len(part)
        self.index += 1

    def _fill(self, segment: Segment, envs: list[int]) -> None:
        (name,), columns = segment.obs, segment.columns
        for column, env in enumerate(envs):
            begin, end = int(self.time[env]), int(self.time[env]) + STEPS
            segment.aborted[column] = begin > 0 and self._given_up[begin - 1, env]
            for t in range(STEPS):
                segment.obs[name][t, column] = self.seen(begin + t, env)
            segment.obs[name][STEPS, column] = (self.final if self._given_up[end - 1, env] else self.seen)(end, env)
            columns["action"][:, column] = action_of(env, np.arange(STEPS), time=begin)
            for kind in ("reward", "terminated", "truncated", "valid"):
                columns[kind][:, column] = getattr(self, kind)[begin:end, env]
            ended = columns["valid"] & (columns["terminated"] | columns["truncated"])
            for t in np.flatnonzero(ended[:, column]).tolist():
                segment.add_final(t, column, {name: self.final(begin + t + 1, env)})
            self.time[env] = end

    @property
    def ended(self) -> Array:
        """After which rows another episode begins."""
        return self.terminated | self.truncated | self._given_up

    def seen(self, time: int, env: int) -> Array:
        """What an environment shows before the step at `time`."""
        return self._stacked([shown(t, env, 1.0) for t in self._times(time, time, env)])

    def final(self, time: int, env: int) -> Array:
        """What it showed after the step at `time` - 1, which ended an episode."""
        frames = [shown(t, env, 1.0) for t in self._times(time, time - 1, env)]
        return self._stacked([*frames[:-1], shown(time, env, FINAL)])

    def _times(self, newest: int, inside: int, env: int) -> list[int]:
        """Of the frames of a stack, oldest first, within the episode that the step at `inside` is one of."""
        ends = np.flatnonzero(self.ended[:inside, env])
        begun = int(ends[-1]) + 1 if len(ends) else 0
        return [max(begun, newest - back) for back in reversed(range(self.stack))]

    def _stacked(self, frames: list[Array]) -> Array:
        return frames[0] if self.stack == 1 else np.stack(frames)

    def newest(self, stacks: Array) -> Array:
        """The newest frame of each stack [N, …]."""
        return stacks if self.stack == 1 else stacks[:, -1]

    def where(self, batch: Any) -> tuple[Array, Array]:
        """(times, environments) of a batch, [N] int64 both."""
        (obs,) = on_host(batch.obs).values()
        frames = np.rint(self.newest(obs)).astype(int)
        return frames[:, 0] - 1, frames[:, 1] - 1

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge(self, batch: Any, n: int) -> Iterator[Finding]:
        """What is wrong with n-step transitions that were sampled."""
        (obs,), (after,) = on_host(batch.obs).values(), on_host(batch.next_obs).values()
        for name, leaf in (("obs", obs), ("next_obs", after)):
            if leaf.shape != (SAMPLES, *self.shape):
                yield error("shape", f"{name} is {leaf.shape}, expected {(SAMPLES, *self.shape)}: N rows as declared",
                            "store an observation in the shape that its space declares")  # fmt: skip
                return
        for what in ("action", "returns", "discounts"):
            if getattr(batch, what).shape != (SAMPLES,):
                shape = getattr(batch, what).shape
                yield error("shape", f"{what} is {shape}, expected {(SAMPLES,)}", "one number for each transition")
                return
        if (empty := ~self.newest(obs).any(1)).any():
            yield error("uninitialised", f"{np.count_nonzero(empty)} of {SAMPLES} sampled observations are all zero",
                        "sample only rows that are completely written; make them countable last")  # fmt: skip
            return
        for row in range(SAMPLES):
            if (wrong := self._wrong(batch, obs[row], after[row], row, n)) is not None:
                yield wrong

    def _wrong(self, batch: Any, obs: Array, after: Array, row: int, n: int) -> Finding | None:
        frame, led_to = self.newest(obs[None])[0], self.newest(after[None])[0]
        t, env = round(float(frame[0])) - 1, round(float(frame[1])) - 1
        known = 0 <= env < ENVS and 0 <= t < self.time[env]
        whole = known and np.array_equal(frame, shown(t, env, 1.0)) and batch.action[row] == action_of(env, 0, time=t)
        if not whole:
            return error("torn", f"a sampled row is none that was added: to {frame.tolist()} belongs another action",
                         "copy all of a row before it can be sampled, and before its memory is used again")  # fmt: skip
        if not np.array_equal(obs, self.seen(t, env)):
            return self._wrong_stack("obs", obs, self.seen(t, env))
        end, where = round(float(led_to[0])) - 1, round(float(led_to[1])) - 1
        steps = end - t
        if (where != env and 0 <= where < ENVS) or (where == env and steps > n):
            told = f"{n} steps from time {t} of environment {env} on are said to lead to time {end} of {where}"
            return error("gap", told, "go by rollout.envs: in the eager schedule columns change, and some are twice")
        if steps < 1 or end > self.time[env]:
            return error("wrap-around", f"what follows time {t} is said to be time {end}; {self.time[env]} is the newest",
                         "a window ends at the newest row: beyond it lie the oldest")  # fmt: skip
        return self._wrong_window(batch, after, row, t, env, steps)

    def _wrong_window(self, batch: Any, after: Array, row: int, t: int, env: int, steps: int) -> Finding | None:
        last, end = t + steps - 1, t + steps
        if not (valid := self.valid[t:end, env]).all():
            told = f"{steps} steps from time {t} on take in time {t + valid.argmin()}, which is no transition"
            return error("not-valid", told, "sample no row that is not `valid`, and end windows before it")
        if self.ended[t:last, env].any():
            return error("crosses-end", f"{steps} steps from time {t} on go past the end of an episode",
                         "cut a window where an episode ends, and where one was given up (rollout.aborted)")  # fmt: skip
        expected = self.final(end, env) if self.ended[last, env] else self.seen(end, env)
        led_to = self.newest(after[None])[0]
        if not np.array_equal(led_to, self.newest(expected[None])[0]):
            return error("torn", f"next_obs of time {t} is {led_to.tolist()}, which is not where {steps} steps led to",
                         "after an end of an episode next_obs is the final observation")  # fmt: skip
        if not np.array_equal(after, expected):
            return self._wrong_stack("next_obs", after, expected)
        return self._wrong_numbers(batch, row, t, env, steps)

    def _wrong_stack(self, name: str, given: Array, expected: Array) -> Finding:
        times = [[round(float(frame[0])) - 1 for frame in stack] for stack in (given, expected)]
        return error("stack", f"{name} stacks the frames of times {times[0]}, when it was acted on they were {times[1]}",
                     "stack with one function for acting and for sampling: aiorl.frames.stack_places")  # fmt: skip

    def _wrong_numbers(self, batch: Any, row: int, t: int, env: int, steps: int) -> Finding | None:
        rewards, last = self.reward[t : t + steps, env], t + steps - 1
        expected = float(GAMMA ** np.arange(steps) @ rewards)
        if not math.isclose(batch.returns[row], expected, rel_tol=1e-4, abs_tol=1e-6):
            code = "n-step-return" if steps > 1 else "torn"
            return error(code, f"a return of {steps} steps is {batch.returns[row]:.6g}, its rewards come to {expected:.6g}",
                         f"{steps} rewards, each discounted by its distance")  # fmt: skip
        over = bool(self.terminated[last, env])
        discount = 0.0 if over else GAMMA**steps
        if math.isclose(batch.discounts[row], discount, rel_tol=1e-4, abs_tol=1e-9):
            return None
        told = f"after {steps} steps{' and a termination' if over else ''} the discount is {batch.discounts[row]:.6g}"
        if over or not batch.discounts[row]:
            return error("end", f"{told}, expected {discount:.6g}",
                         "0 where the episode was terminated; a truncation is not the end")  # fmt: skip
        return error("n-step-discount", f"{told}, expected {discount:.6g}",
                     f"gamma to the power of the steps that were summed, {steps}")  # fmt: skip


def shown(time: int, env: int, kind: float) -> Array:
    """The observation of an environment at a time; `kind` is `FINAL` for the last one of an episode, otherwise 1."""
    return np.array([time + 1, env + 1, kind, (7 * time + 13 * env + 3 * kind) % 101 + 1], np.float32)


def action_of(env: Any, step: Any, *, time: int) -> Any:
    return (3 * (time + step) + env) % ACTIONS
