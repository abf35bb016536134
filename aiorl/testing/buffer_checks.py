"""Trying out a replay buffer: is everything that it samples something that happened, as it happened?

A made-up stream of experience is written to it, of which every number is known and occurs once. The ring wraps, episodes
end both ways, and the memory of a rollout is used again for something else after it has been added, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gymnasium
import numpy as np

from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentLayout
from aiorl.testing.findings import Finding, error, sort, warning

ENVS, STEPS, ROWS, ROLLOUTS = 3, 5, 12, 8
SAMPLES, GAMMA, HORIZONS = 256, 0.9, (1, 3)
FEATURES, ACTIONS, FINAL = 4, 5, 2.0
BIAS = 0.5  # a row may come up so much less often than the others


class Samples(Protocol):
    """A batch, as `aiorl.buffers.replay.Batch`."""

    @property
    def obs(self) -> dict[str, Array]: ...
    @property
    def action(self) -> Array: ...
    @property
    def returns(self) -> Array: ...
    @property
    def discounts(self) -> Array: ...
    @property
    def next_obs(self) -> dict[str, Array]: ...


class Buffer(Protocol):
    """What a replay buffer must have to be tried out."""

    def __len__(self) -> int: ...
    def add(self, rollout: Rollout) -> None: ...
    def sample(self, rng: np.random.Generator, size: int, *, n: int, gamma: float) -> Samples: ...


def check_replay(make: Callable[[Spaces, int, int], Any], *, stack: int = 1) -> list[Finding]:
    """Look for everything in a replay buffer that makes a learner learn from what did not happen.

    `make(spaces, environments, capacity)` returns a new one, with `add(rollout)`, `len()` and
    `sample(rng, size, n=, gamma=)`, which returns what `aiorl.buffers.replay.Batch` has. If it has `reprioritise`, see
    `aiorl.buffers.replay.Replay`, that is tried out as well. Observations are `stack` frames on the first axis, oldest
    first, the first frame of an episode repeated; single frames without that axis if it is 1.
    """
    found: dict[str, Finding] = {}
    try:
        for finding in _look(make, stack):
            found.setdefault(finding.code, finding)
    except Exception as failure:
        found["raised"] = error("raised", f"the buffer raised {type(failure).__name__}: {failure}")
    return sort(found.values())


def _look(make: Callable[[Spaces, int, int], Any], stack: int) -> Iterator[Finding]:
    truth = Truth(stack)
    buffer: Any = make(truth.spaces, ENVS, ROWS * ENVS)
    rng = np.random.default_rng(1)
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
    yield from _coverage(buffer, truth, rng)
    if hasattr(buffer, "reprioritise"):
        yield from _priorities(make(truth.spaces, ENVS, ROWS * ENVS), Truth(stack), rng)


def _coverage(buffer: Any, truth: Truth, rng: np.random.Generator) -> Iterator[Finding]:
    """Everything that is held is sampled, about equally often."""
    drawn = 64 * truth.held
    (obs,) = buffer.sample(rng, drawn, n=1, gamma=GAMMA).obs.values()
    times = np.rint(truth.newest(obs)[:, 0]).astype(int) - 1
    counts = {t: int(np.count_nonzero(times == t)) for t in range(truth.time - ROWS, truth.time)}
    usual = int(np.median(list(counts.values())))
    if missing := [t for t, count in counts.items() if not count]:
        yield error("never-sampled", f"the rows of time {missing[:4]} are held and were never sampled in {drawn} draws",
                    "sample from all that is stored")  # fmt: skip
    elif min(counts.values()) < BIAS * usual:
        yield warning("biased", f"a row came up {min(counts.values())} times in {drawn} draws, others about {usual} times",
                      "right if it is meant: then the loss needs importance weights")  # fmt: skip


def _priorities(buffer: Any, truth: Truth, rng: np.random.Generator) -> Iterator[Finding]:
    """Errors of rows that have been overwritten since must not become the priority of what lies there now."""
    for _ in range(3):
        truth.add_to(buffer)
    batch = buffer.sample(rng, SAMPLES, n=1, gamma=GAMMA)
    for _ in range(4):
        truth.add_to(buffer)
    ignored = buffer.reprioritise(batch, np.full(SAMPLES, 1e6))
    if ignored != SAMPLES:
        yield error("stale-priorities", f"reprioritise took over {SAMPLES - ignored} errors of rows overwritten since",
                    "compare the generation of a row with the one that was sampled")  # fmt: skip


class Truth:
    """Experience of which everything is known: a frame [4] holds (time + 1, environment + 1, kind, checksum)."""

    def __init__(self, stack: int, seed: int = 0) -> None:
        self.stack = stack
        self.shape = (FEATURES,) if stack == 1 else (stack, FEATURES)
        box = gymnasium.spaces.Box(0, 1e6, self.shape, np.float32)
        self.spaces = spaces_of(box, gymnasium.spaces.Discrete(ACTIONS)).with_stack(stack)
        columns = {"action": self.spaces.action_column, "reward": Column((), "float64")}
        columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}
        self._layout = SegmentLayout(STEPS, ENVS, self.spaces.obs_columns, columns)
        rng, shape = np.random.default_rng(seed), (ROLLOUTS * STEPS, ENVS)
        self.reward = rng.normal(size=shape)
        self.terminated, self.truncated = rng.random(shape) < 0.12, rng.random(shape) < 0.12
        self.truncated &= ~self.terminated
        self.time = self.index = 0

    @property
    def stored(self) -> int:
        return self.time * ENVS

    @property
    def held(self) -> int:
        """A ring of stacks may be longer by what they reach back."""
        return min(self.stored, (ROWS + self.stack - 1) * ENVS)

    def add_to(self, buffer: Buffer) -> None:
        memory = bytearray(self._layout.nbytes)
        segment = self._layout.view(memoryview(memory))
        self._fill(segment)
        buffer.add(Rollout(self.index, self.index, (segment,), np.arange(ENVS)))
        memory[:] = b"\x42" * len(memory)
        self.index, self.time = self.index + 1, self.time + STEPS

    def _fill(self, segment: Segment) -> None:
        (obs,) = segment.obs.values()
        rows = slice(self.time, self.time + STEPS)
        for t in range(STEPS + 1):
            for env in range(ENVS):
                obs[t, env] = self.seen(self.time + t, env)
        segment.columns["action"][...] = action_of(*np.indices((STEPS, ENVS))[::-1], time=self.time)
        for name in ("reward", "terminated", "truncated"):
            segment.columns[name][...] = getattr(self, name)[rows]
        segment.columns["valid"][...] = True
        for t, env in np.argwhere(self.ended[rows]).tolist():
            segment.add_final(t, env, {next(iter(segment.obs)): self.final(self.time + t + 1, env)})

    @property
    def ended(self) -> Array:
        return self.terminated | self.truncated

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

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge(self, batch: Any, n: int) -> Iterator[Finding]:
        """What is wrong with n-step transitions that were sampled."""
        (obs,), (after,) = batch.obs.values(), batch.next_obs.values()
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
        known = 0 <= t < self.time and 0 <= env < ENVS
        whole = known and np.array_equal(frame, shown(t, env, 1.0)) and batch.action[row] == action_of(env, 0, time=t)
        if not whole:
            return error("torn", f"a sampled row is none that was added: to {frame.tolist()} belongs another action",
                         "copy all of a row before it can be sampled, and before its memory is used again")  # fmt: skip
        if not np.array_equal(obs, self.seen(t, env)):
            return self._wrong_stack("obs", obs, self.seen(t, env))
        end, steps = round(float(led_to[0])) - 1, round(float(led_to[0])) - 1 - t
        if steps < 1 or end > self.time:
            return error("wrap-around", f"what follows time {t} is said to be time {end}; {self.time} is the newest",
                         "a window ends at the newest row: beyond it lie the oldest")  # fmt: skip
        last = t + steps - 1
        if self.ended[t:last, env].any():
            return error("crosses-end", f"{steps} steps from time {t} on go past the end of an episode",
                         "cut a window where an episode ends")  # fmt: skip
        expected = self.final(end, env) if self.ended[last, env] else self.seen(end, env)
        if steps > n or not np.array_equal(led_to, self.newest(expected[None])[0]):
            return error("torn", f"next_obs of time {t} is {led_to.tolist()}, which is not where {n} steps led to",
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
        if not np.isclose(batch.returns[row], expected, rtol=1e-4, atol=1e-6):
            code = "n-step-return" if steps > 1 else "torn"
            return error(code, f"a return of {steps} steps is {batch.returns[row]:.6g}, its rewards come to {expected:.6g}",
                         f"{steps} rewards, each discounted by its distance")  # fmt: skip
        over = bool(self.terminated[last, env])
        discount = 0.0 if over else GAMMA**steps
        if np.isclose(batch.discounts[row], discount, rtol=1e-4, atol=1e-9):
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
