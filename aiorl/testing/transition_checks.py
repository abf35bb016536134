"""Made-up experience of which everything is known, and what is wrong with transitions that are sampled of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import gymnasium
import numpy as np

from aiorl.buffers.observations import on_host
from aiorl.envs.spaces import spaces_of
from aiorl.segments import CORE_COLUMNS, Array, Column, Rollout, Segment, SegmentLayout
from aiorl.testing.findings import Finding, error

ENVS, STEPS, ROWS = 3, 5, 12
SAMPLES, GAMMA = 256, 0.9
FEATURES, ACTIONS, FINAL = 4, 5, 2.0
LONGEST = 16 * ENVS * STEPS  # rows of one environment


class Buffer(Protocol):
    def add(self, rollout: Rollout) -> None: ...


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
        self.given_up = last_of_segment & ~self.terminated & ~self.truncated & (rng.random(shape) < 0.3)
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
            segment.aborted[column] = begin > 0 and self.given_up[begin - 1, env]
            for t in range(STEPS):
                segment.obs[name][t, column] = self.seen(begin + t, env)
            segment.obs[name][STEPS, column] = (self.final if self.given_up[end - 1, env] else self.seen)(end, env)
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
        return self.terminated | self.truncated | self.given_up

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
