"""What one environment does when it is used as aiorl uses it, and when it is used a little differently.

Everything here runs in the process that owns the environment; `check_env` sees to that being a worker process.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from aiorl.envs.contract import CRASHES, BrokenContract, ObsReader, crashed, flag, real, reset_obs, step_parts
from aiorl.envs.cursor import advance
from aiorl.envs.group import Group, blocking_group
from aiorl.envs.make import Probe, make_env, probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import AiorlError, EnvError, ReproductionError
from aiorl.segments import CORE_COLUMNS, Array, Column, Segment, SegmentLayout
from aiorl.testing.chance import watched
from aiorl.testing.findings import Finding, error, info, warning
from aiorl.testing.leaks import children, end
from aiorl.testing.reset_checks import ALIKE, carried_over, one_step

STEPS = 256
ENVS = 2
FIRST_SEED = 1000
SLOW_STEP_S = 10.0
SLOW_START_S = 2.0


def stages(spec: EnvSpec) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
    """The checks in their order, each with what it is doing; after one that was `fatal` the others make no sense."""
    look = Look(spec)
    yield "being made", look.make
    if look.probe is not None:
        yield "a segment of random steps", look.segments
        if look.single:
            yield "random steps", look.walk
            yield "an episode after others", look.episodes
            yield "a step after the end of an episode", look.step_after_done
        yield "being closed", look.close


def fatal(findings: Iterable[Finding]) -> bool:
    """Whether an environment cannot be used any further."""
    return any(finding.code in ("make", "contract", "crashes", "hangs") for finding in findings)


@dataclass
class Walk:
    """Random steps with one environment, and what was noticed on the way."""

    step_s: list[float] = field(default_factory=list[float])
    reset_s: list[float] = field(default_factory=list[float])
    ends: list[tuple[bool, bool, int]] = field(default_factory=list[tuple[bool, bool, int]])  # and the length
    reused: bool = False
    single: tuple[int, Any] = (0, None)  # seed and action of the last episode of one step
    outside: str = ""
    global_chance: set[str] = field(default_factory=set[str])


class Look:
    """One environment under examination."""

    def __init__(self, spec: EnvSpec) -> None:
        self._spec = spec
        self.probe: Probe | None = None
        self._env: Any = None
        self._explained = False  # it has been said why one seed and the same actions lead to different episodes
        self._threads, self._children = _threads(), children()

    @property
    def single(self) -> bool:
        return self.probe is not None and not self.probe.spec.vector_only

    @property
    def _spaces(self) -> Spaces:
        assert self.probe is not None
        return self.probe.spaces

    # -- made ------------------------------------------------------------------------------------------------------

    def make(self) -> Iterator[Finding]:
        begun = time.perf_counter()
        had_torch = "torch" in sys.modules
        try:
            found = probe(self._spec, ENVS)
        except AiorlError as failure:
            yield error("make", str(failure))
            return
        except CRASHES as failure:
            yield error("make", str(crashed(self._spec.name, "making or closing it", failure)))
            return
        took_s = time.perf_counter() - begun
        self.probe = found
        yield _start_up(took_s)
        if "torch" in sys.modules and not had_torch:
            yield warning(
                "imports-torch",
                "making it imports torch, which costs every worker seconds and hundreds of megabytes",
                "import torch only where it is used, or not at all in the module of the environment",
            )
        if found.why_single:
            yield info("vector-unused", f"its own vector implementation is not used: {found.why_single}")
        if found.why_inexact:
            yield warning("inexact", f"open episodes cannot be brought back exactly: {found.why_inexact}")
        for told in found.warnings:
            yield warning("doubtful", told)

    # -- as aiorl uses it ------------------------------------------------------------------------------------------

    def segments(self) -> Iterator[Finding]:
        """Through the library's own groups: the contract, seeds, and the way back to an open episode."""
        assert self.probe is not None
        layout = _layout(self._spaces, self.probe.state_bytes)
        try:
            first, again, other = (self._collect(layout, seed) for seed in (1, 1, 2))
        except EnvError as failure:
            yield error("contract", str(failure))
            return
        if not _same(first, again):
            self._explained = True
            yield error(
                "unseeded",
                "two environments reset with the same seeds and given the same actions went different ways",
                "draw all chance from self.np_random, which super().reset(seed=seed) seeds",
            )
            return
        if _same(first, other):
            yield info(
                "one-stream",
                "different seeds give the same stream: right if nothing is left to chance, else seeds are ignored",
            )
        if not self.probe.exact:
            return  # that has been said
        group = self._group(1)
        try:
            group.open(advance(None, first))
        except ReproductionError as failure:
            self._explained = True
            yield error("not-reproducible", str(failure))
        except EnvError as failure:
            yield error("contract", str(failure))
        finally:
            group.close()

    def _group(self, seed: int) -> Group:
        assert self.probe is not None
        return blocking_group(self.probe.spec, self._spaces, range(ENVS), seed)

    def _collect(self, layout: SegmentLayout, seed: int) -> Segment:
        segment, group, policy = layout.allocate(), self._group(seed), RandomPolicy(self._spaces)
        try:
            group.open(None)
            policy.begin({}, 0, np.random.default_rng(0), STEPS)
            group.collect(policy, segment, STEPS)
        finally:
            group.close()
        return segment

    # -- looked at directly ----------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Finding]:
        """Steps without the library in between, to see what it would hide."""
        assert self.probe is not None
        self._env = self._make_another()
        try:
            seen = walk(self._env, self._spaces, STEPS)
            for finding in one_step(seen.ends, seen.single, self._make_another):
                self._explained |= finding.severity == "error"
                yield finding
        except (*CRASHES, BrokenContract) as failure:
            yield error("contract", f"{type(failure).__name__}: {failure}")
            return
        yield from _about_steps(seen)
        yield from _about_ends(seen, self.probe.max_episode_steps)
        yield _step_times(seen)

    def episodes(self) -> Iterator[Finding]:
        """An episode after others is what it would be in a new environment, also where no observation shows it."""
        if self._explained or self.probe is None or not self.probe.exact:
            return
        try:
            yield from carried_over(self._env, self._make_another, self._spaces, STEPS)
        except (*CRASHES, BrokenContract) as failure:
            yield error("contract", f"{type(failure).__name__}: {failure}")

    def _make_another(self) -> Any:
        assert self.probe is not None
        return make_env(self.probe.spec)

    def step_after_done(self) -> Iterator[Finding]:
        """aiorl never does that. An environment that refuses helps those who do."""
        env, rng = self._env, np.random.default_rng(0)
        env.reset(seed=0)
        for _ in range(STEPS):
            result = env.step(self._spaces.env_action(self._spaces.sample_actions(1, rng)[0]))
            if result[2] or result[3]:
                break
        else:
            return
        try:
            env.step(self._spaces.env_action(self._spaces.sample_actions(1, rng)[0]))
        except CRASHES as refusal:
            yield info("step-after-done", f"a step after the end of an episode raises {type(refusal).__name__}: good")
            return
        yield info("step-after-done", "a step after the end of an episode is answered; aiorl always resets first")

    def close(self) -> Iterator[Finding]:
        if self._env is not None:
            for time_, call in (("first", "close()"), ("second", "a second close()")):
                try:
                    self._env.close()
                except CRASHES as failure:
                    yield warning(
                        f"close-{time_}",
                        f"{call} raised {type(failure).__name__}: {failure}",
                        "let close() be called twice and not fail",
                    )
        if left := sorted(_threads() - self._threads):
            yield warning(
                "leaves-threads",
                f"after close() these threads go on: {', '.join(left)}",
                "end and join them in close()",
            )
        if left := sorted(children() - self._children):
            yield warning(
                "leaves-processes", f"after close() these processes go on: {', '.join(left)}", "end them in close()"
            )
            end(left)


class RandomPolicy:
    """Actions at random, within the bounds of their space."""

    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces
        self._rng = np.random.default_rng(0)

    def begin(self, weights: Any, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._rng = rng or self._rng

    def act(self, obs: Any, first: Array) -> tuple[Array, dict[str, Array]]:
        return self._spaces.sample_actions(len(first), self._rng), {}


def walk(env: Any, spaces: Spaces, steps: int) -> Walk:
    """Step `env` at random. Raises BrokenContract, or what the environment raises."""
    seen, rng, reader = Walk(), np.random.default_rng(0), ObsReader(spaces.observation)
    actions = spaces.each_action(spaces.sample_actions(steps, rng))
    kept: list[Array] = []
    copies: list[Array] = []

    def look(obs: Any) -> None:
        nonlocal kept, copies
        seen.reused |= any(k.tobytes() != c.tobytes() for k, c in zip(kept, copies, strict=True))
        kept = reader.read(obs)
        seen.outside = seen.outside or outside(env.observation_space, obs)
        copies = [np.array(leaf) for leaf in kept]

    def reset(episode: int) -> None:
        with watched(seen.global_chance):
            begun = time.perf_counter()
            result = env.reset(seed=FIRST_SEED + episode)
            seen.reset_s.append(time.perf_counter() - begun)
        look(reset_obs(result))

    reset(0)
    length = 0
    with watched(seen.global_chance):
        for t in range(steps):
            begun = time.perf_counter()
            result = env.step(actions[t])
            seen.step_s.append(time.perf_counter() - begun)
            obs, reward, terminated, truncated, _ = step_parts(result)
            real(reward)
            look(obs)
            length += 1
            if flag(terminated, "terminated") or flag(truncated, "truncated"):
                if length == 1:
                    seen.single = FIRST_SEED + len(seen.ends), actions[t]
                seen.ends.append((bool(terminated), bool(truncated), length))
                length = 0
                reset(len(seen.ends))
    return seen


def outside(space: Any, obs: Any, name: str = "obs") -> str:
    """The first part of an observation that its space does not contain, and of an array the first element; "" if none."""
    if space.contains(obs):
        return ""
    inner = getattr(space, "spaces", ())
    keys = inner if isinstance(inner, Mapping) else range(len(inner))
    for key in keys:
        if text := outside(inner[key], obs[key], f"{name}.{key}"):
            return text
    array, expected = np.asarray(obs), " ".join(str(space).split())[:80]
    if isinstance(space, gymnasium.spaces.Box) and array.shape == space.shape:
        beyond = np.argwhere(~((array >= space.low) & (array <= space.high)))
        if len(beyond):
            at = tuple(beyond[0].tolist())
            where = f"{name}{list(at)}" if at else name
            return f"{where} is {array[at]:.6g}, expected {space.low[at]:.6g} to {space.high[at]:.6g}"
    return f"{name} is {f'{array.dtype}{list(array.shape)}' if array.size > 1 else repr(obs)[:80]}, expected {expected}"


# -- findings ----------------------------------------------------------------------------------------------------------


def _start_up(took_s: float) -> Finding:
    if took_s > SLOW_START_S:
        return warning(
            "slow-start",
            f"it takes {took_s:.1f} s to import and make: that long is every start of a worker, also after a fault",
            "load only what stepping needs, and load it once",
        )
    return info("start-up", f"imported and made in {took_s * 1e3:.0f} ms")


def _about_steps(seen: Walk) -> Iterator[Finding]:
    if seen.global_chance:
        yield error(
            "global-chance",
            f"it uses the global generator of {', '.join(sorted(seen.global_chance))}, which all code shares",
            "draw from self.np_random, which super().reset(seed=seed) seeds",
        )
    if seen.reused:
        yield warning(
            "reuses-obs",
            "an observation changed after it was returned: it lies in an array that is written again",
            "aiorl copies at once, but wrappers and vector environments may not: return a copy",
        )
    if seen.outside:
        yield warning(
            "outside-space",
            f"observation_space does not contain what is shown: {seen.outside}",
            "declare its true bounds, shape and dtype: scaling relies on them",
        )


def _about_ends(seen: Walk, limit: int | None) -> Iterator[Finding]:
    if not seen.ends:
        if limit is not None:
            return
        yield warning(
            "endless",
            f"no episode ended in {STEPS} random steps, and no limit is declared: there may be no return to report",
            "end episodes, or register it with max_episode_steps",
        )
        return
    terminated, truncated, lengths = zip(*seen.ends, strict=True)
    if any(a and b for a, b, _ in seen.ends):
        yield info("both-ends", "an episode ended both terminated and truncated: it counts as terminated")
    if not any(truncated) and limit is None and len(seen.ends) >= ALIKE and len(set(lengths)) == 1 and lengths[0] > 1:
        yield warning(
            "limit-as-termination",
            f"all {len(lengths)} episodes were terminated after exactly {lengths[0]} steps",
            "if that is a time limit, return truncated=True instead, so that what would have followed is counted",
        )
    elif not any(truncated) and limit is None:
        yield info(
            "no-time-limit", "episodes are terminated, never truncated; a policy that survives may go on for ever"
        )
    if not any(terminated):
        yield info("never-terminates", "in random play episodes are only truncated")


def _step_times(seen: Walk) -> Finding:
    p50, p90, p99, most = (1e6 * float(np.percentile(seen.step_s, q)) for q in (50, 90, 99, 100))
    reset = 1e6 * float(np.median(seen.reset_s))
    text = (
        f"a step takes {p50:,.0f} µs (90 %: {p90:,.0f}, 99 %: {p99:,.0f}, most: {most:,.0f}), a reset {reset:,.0f} µs"
    )
    if max(*seen.step_s, *seen.reset_s) > SLOW_STEP_S:
        return warning("slow-step", f"{text}", "set step_timeout_s well above the longest")
    return info("step-time", text)


def _layout(spaces: Spaces, state_bytes: int) -> SegmentLayout:
    columns = {"action": spaces.action_column, "reward": Column((), "float64")}
    columns |= {name: Column((), "bool") for name in CORE_COLUMNS[2:]}
    return SegmentLayout(STEPS, ENVS, spaces.obs_columns, columns, state_bytes)


def _same(a: Segment, b: Segment) -> bool:
    pairs = [(a.obs[name], b.obs[name]) for name in a.obs]
    pairs += [(a.columns[name], b.columns[name]) for name in CORE_COLUMNS]
    pairs += [(a.final_obs[name][: a.finals], b.final_obs[name][: b.finals]) for name in a.final_obs]
    return a.finals == b.finals and all(x.tobytes() == y.tobytes() for x, y in pairs)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
