"""Stacked observations are what the plain ones make, in every kind of environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import pytest
from gymnasium.wrappers import FrameStackObservation, TimeLimit

from aiorl.envs.cursor import GroupCursor
from aiorl.envs.group import advance, blocking_group
from aiorl.envs.make import Probe, make_env, probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError
from aiorl.segments import Array, Segment
from tests.async_envs import walk as async_walk
from tests.envs_for_tests import ByObs, Walk, WalkVector, layout, sync_vector, transitions

K, STEPS, ENVS = 3, 25, 3
KINDS = ["box", "dict", "tuple", "discrete", "parts"]
MODES = ["NEXT_STEP", "SAME_STEP", "DISABLED"]


class Newest(ByObs):
    """Acts on the newest observation alone, so that stacking changes nothing but what is seen."""

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        if self.spaces.stack > 1:
            obs = {name: leaf[:, -1] for name, leaf in obs.items()}
        return super().act(obs, first)


def look(env: Any, k: int, **kwargs: Any) -> Probe:
    return probe(resolve_env(env, kwargs, in_process=True, frame_stack=k), ENVS)


def collect(found: Probe, segments: int, cursor: GroupCursor | None = None) -> tuple[list[Segment], GroupCursor]:
    group = blocking_group(found.spec, found.spaces, range(ENVS), 5)
    group.open(cursor)
    parts = [layout(found.spaces, STEPS, ENVS, state_bytes=found.state_bytes).allocate() for _ in range(segments)]
    for part in parts:
        group.collect(Newest(found.spaces), part, STEPS)
        cursor = advance(cursor, part)
    group.close()
    assert cursor is not None
    return parts, cursor


def stack_by_hand(stream: list[tuple[Any, ...]], leaves: int, k: int) -> list[tuple[Any, ...]]:
    """A stream of transitions (see `transitions`) with the newest `k` of an episode's observations in place of each."""
    stacked, episode = [], [stream[0][:leaves]]
    for row in stream:
        seen = join(episode, k)
        episode.append(row[-leaves:])
        stacked.append((*seen, *row[leaves:-leaves], *join(episode, k)))
        if row[leaves + 2] or row[leaves + 3]:
            episode = []
        if not episode:
            at = len(stacked)
            episode = [stream[at][:leaves]] if at < len(stream) else []
    return stacked


def join(episode: list[tuple[bytes, ...]], k: int) -> tuple[bytes, ...]:
    newest = [episode[max(0, len(episode) - k + i)] if len(episode) - k + i >= 0 else episode[0] for i in range(k)]
    return tuple(b"".join(parts) for parts in zip(*newest, strict=True))


def check(plain: Probe, stacked: Probe) -> None:
    assert stacked.spaces == Spaces(observation=stacked.spaces.observation, action=plain.spaces.action)
    assert [leaf.shape for leaf in stacked.spaces.observation] == [(K, *leaf.shape) for leaf in plain.spaces.observation]
    assert stacked.spaces.features == K * plain.spaces.features, "each choice is seen as such, also stacked"
    assert (plain.spaces.stack, stacked.spaces.stack) == (1, K)
    streams = transitions(collect(plain, 2)[0])
    expected = [stack_by_hand(stream, len(plain.spaces.observation), K) for stream in streams]
    assert transitions(collect(stacked, 2)[0]) == expected
    assert all(sum(row[-len(plain.spaces.observation) - 1] or row[-len(plain.spaces.observation) - 2] for row in s) > 1
               for s in streams), "no episode ended"  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_single_environments(kind: str) -> None:
    check(look(Walk, 1, kind=kind), look(Walk, K, kind=kind))


def test_async_environments() -> None:
    check(look(async_walk, 1, seeded=True), look(async_walk, K, seeded=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_vector_environments(mode: str, kind: str) -> None:
    plain, stacked = (look(sync_vector, k, mode=mode, kind=kind) for k in (1, K))
    assert stacked.native
    check(plain, stacked)


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_and_its_stacks_come_back_exactly(mode: str) -> None:
    found = look(WalkVector, K, mode=mode)
    assert found.exact
    whole, _ = collect(found, 3)
    _, cursor = collect(found, 1)
    assert transitions(collect(found, 2, cursor)[0]) == transitions(whole[1:])


def test_an_episode_and_its_stacks_come_back_exactly() -> None:
    found = look(Walk, K, seeded=True)
    whole, _ = collect(found, 3)
    _, cursor = collect(found, 1)
    assert transitions(collect(found, 2, cursor)[0]) == transitions(whole[1:])


def test_the_space_is_that_of_what_is_shown() -> None:
    env = make_env(look(Walk, K, kind="dict").spec)
    obs, _ = env.reset(seed=1)
    assert env.observation_space.contains(obs)
    env.close()


def own(kind: str = "box", padding: str = "reset", outside: str = "") -> gymnasium.Env[Any, Any]:
    env: Any = FrameStackObservation(Walk(kind), K, padding_type=padding)
    if outside == "limit":
        return TimeLimit(env, 5)
    if outside == "other":
        return gymnasium.wrappers.TransformObservation(env, lambda obs: -obs, env.observation_space)
    return env


@pytest.mark.parametrize("outside", ["", "limit"])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_gymnasiums_own_stack_is_known(kind: str, outside: str) -> None:
    found = look(own, 1, kind=kind, outside=outside)
    assert found.spaces == look(Walk, K, kind=kind).spaces
    plain = look(Walk, K, kind=kind, limit=5 if outside else 7)
    assert transitions(collect(found, 2)[0]) == transitions(collect(plain, 2)[0])


@pytest.mark.parametrize("kwargs", [{"padding": "zero"}, {"outside": "other"}])
def test_what_replay_could_not_make_again_is_not_taken_for_a_stack(kwargs: dict[str, str]) -> None:
    found = look(own, 1, **kwargs)
    assert found.spaces.stack == 1
    assert found.spaces.observation[0].shape == (K, 3)
    (told,) = found.warnings
    assert f"each frame is kept {K} times" in told
    assert f"use frame_stack = {K}" in told
    assert look(own, 1).warnings == look(Walk, K).warnings == ()


def test_stacks_of_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"stacks {K} observations already\n  leave out frame_stack = 2"):
        look(own, 2)


def test_what_cannot_be_stacked_is_refused() -> None:
    class Odd(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Text(5)

    with pytest.raises(ConfigError, match="observation space"):
        look(Odd, K)
