"""An environment that cannot be brought back: its open episode is aborted, counted, and nothing else is touched."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kills import kill, workers_of
from run_envs import Counting, Forgetful, Unseeded
from toys import Toy

import aiorl
from aiorl.buffers.replay import Replay
from aiorl.envs.cursor import advance
from aiorl.envs.group import make_group
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.ledger import Aborted, Ledger
from aiorl.pacing import Grant
from aiorl.seeding import episode_seed
from aiorl.segments import CORE_COLUMNS, Column, Rollout, Segment, SegmentLayout

LENGTH = 20
N = 3
Make = Callable[..., aiorl.Config]


class Ones:
    """Always takes action 1."""

    def begin(self, *_: Any) -> None: ...

    def act(self, obs: Any, first: Any) -> tuple[Any, dict[str, Any]]:
        return np.ones(len(first), np.int64), {}


def a_group(env: Any, **kwargs: Any) -> tuple[Any, Any, SegmentLayout]:
    """A group of N, not yet opened, its spaces and a layout of 8 steps."""
    found = probe(resolve_env(env, kwargs, in_process=True), N)
    kinds = {"action": found.spaces.action_column, "reward": Column((), "float64")}
    columns = {name: kinds.get(name, Column((), "bool")) for name in CORE_COLUMNS}
    layout = SegmentLayout(8, N, found.spaces.obs_columns, columns, found.state_bytes)
    return make_group(found.spec, found.spaces, range(N), 0), found.spaces, layout


def collected(group: Any, layout: SegmentLayout) -> Segment:
    segment = layout.allocate()
    group.collect(Ones(), segment, 8)
    return segment


def seam(env: Any, **kwargs: Any) -> tuple[Segment, Segment, list[str]]:
    """Two segments of a group, brought back in between as far as possible, and how that differed."""
    group, _, layout = a_group(env, **kwargs)
    group.open(None)
    before = collected(group, layout)
    again, _, _ = a_group(env, **kwargs)
    differences = again.open(advance(None, before), strict=False)
    return before, collected(again, layout), differences


def test_only_what_does_not_reproduce_is_aborted() -> None:
    odd = np.array([episode_seed(0, env, 0) % 2 == 1 for env in range(N)])
    assert 0 < odd.sum() < N, "the seeds do not tell the environments apart"
    before, after, differences = seam(Forgetful, length=LENGTH)
    assert after.aborted.tolist() == odd.tolist()
    assert after.obs["obs"][0, :, 1].tolist() == [0 if gone else 8 for gone in odd]
    assert (after.obs["obs"][0][~odd] == before.obs["obs"][8][~odd]).all(), "another environment lost its episode"
    assert len(differences) == odd.sum()
    assert all("does not reproduce" in text and "\n" not in text for text in differences)
    cursor = advance(advance(None, before), after)
    assert cursor.episodes.tolist() == odd.astype(int).tolist()
    assert [len(actions) for actions in cursor.actions] == [8 if gone else 16 for gone in odd]


def test_it_is_told_once() -> None:
    group, _, layout = a_group(Unseeded, length=LENGTH)
    group.open(None)
    cursor = advance(None, collected(group, layout))
    again, _, _ = a_group(Unseeded, length=LENGTH)
    assert len(again.open(cursor, strict=False)) == N
    segments = [collected(again, layout) for _ in range(2)]
    assert [segment.aborted.tolist() for segment in segments] == [[True] * N, [False] * N]


def test_the_episodes_of_a_vector_environment_are_aborted_together() -> None:
    group, _, layout = a_group("CartPole-v1")
    group.open(None)
    before = collected(group, layout)
    before.put_env_state(b"")  # as one whose state could not be captured
    cursor = advance(None, before)
    again, _, _ = a_group("CartPole-v1")
    (difference,) = again.open(cursor, strict=False)
    assert "environments 0-2 cannot be brought back" in difference
    after = collected(again, layout)
    assert after.aborted.all()
    fresh, _, _ = a_group("CartPole-v1")
    fresh.open(None)
    first = collected(fresh, layout)
    assert not (after.obs["obs"][0] == first.obs["obs"][0]).all(1).any(), "an episode was played a second time"


def test_an_aborted_episode_has_no_return() -> None:
    before, after, _ = seam(Unseeded, length=12)
    ledger = Ledger(1, N)
    ledger.store((Grant(0, 0, 0, 0),), (before,))
    entries = ledger.store((Grant(0, 1, 1, 0),), (after,))
    assert entries.aborted == [Aborted(env, 0, 8) for env in range(N)]
    assert (entries.episodes, ledger.stored, ledger.aborted, ledger.episodes) == ([], 16 * N, N, 0)
    third = after
    third.aborted[:] = False
    third.columns["terminated"][3] = True  # the new episode ends: it has 8 + 4 steps, those of the aborted one do not count
    ended = ledger.store((Grant(0, 2, 0, 0),), (third,)).episodes
    assert [(episode.total, episode.length) for episode in ended] == [(12.0, 12)] * N
    other = Ledger(1, N)
    other.load_state_dict(ledger.state_dict())
    assert other.aborted == N


def test_replay_does_not_look_past_the_seam() -> None:
    """Also where the fresh episode happens to begin with what the aborted one showed last."""
    group, spaces, layout = a_group(Counting, length=LENGTH)
    group.open(None)
    before, after = collected(group, layout), collected(group, layout)
    for aborted in (False, True):
        replay = Replay(spaces, N, 64)
        after.aborted[:] = [aborted, False, False]
        for index, segment in enumerate((before, after)):
            replay.add(Rollout(index, index, (segment,), np.arange(N)))
        batch = replay.gather(np.arange(7 * N, 8 * N), 3, 0.5)  # the last row before the seam
        assert batch.returns.tolist() == [1.0 if aborted else 1.75, 1.75, 1.75]


def test_ppo_scales_rewards_from_zero_after_the_seam() -> None:
    from aiorl.algos.base import LearnerContext
    from aiorl.algos.ppo import PPOLearner

    group, spaces, layout = a_group(Counting, length=LENGTH)
    group.open(None)
    segments = collected(group, layout), collected(group, layout)
    ppo = aiorl.PPO(normalise_rewards=True)
    learner = PPOLearner(ppo, spaces, LearnerContext(0, N, 8, 10, 0, None, "cpu"))
    segments[1].aborted[:] = [True, False, False]
    for index, segment in enumerate(segments):
        rollout = Rollout(index, index, (segment,), np.arange(N))
        ended = rollout.column("terminated"), rollout.column("truncated")
        learner._rewards(rollout, *ended, rollout.column("valid"))
    eight, sixteen = (sum(ppo.gamma**k for k in range(steps)) for steps in (8, 16))
    assert learner._running_return == pytest.approx([eight, sixteen, sixteen])


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Make:
    count = iter(range(100))

    def make(**changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": "run_envs:Unseeded", "env_kwargs": {"length": LENGTH}, "algo": Toy(), "total_steps": 3000, "envs": 8,
            "group_size": 2, "workers": 2, "off_policy_degree": 2, "eval_every": 0, "eval_episodes": 4,
            "checkpoint_every": 0, "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


def assert_told(run: aiorl.Run, events: list[Any], envs: set[int]) -> list[aiorl.EpisodeAborted]:
    """Each abort is an event and counted, each environment blamed once, no episode has another length than its own."""
    aborted = [e for e in events if isinstance(e, aiorl.EpisodeAborted)]
    assert {e.env for e in aborted} == envs
    assert run.result.aborted == len(aborted)
    warnings = [e.message for e in events if isinstance(e, aiorl.Warned) and "does not reproduce" in e.message]
    assert len(warnings) == len(envs)
    assert all("exactness is waived" in text for text in warnings)
    assert {e.length_mean for e in events if isinstance(e, aiorl.Updated)} <= {None, float(LENGTH)}
    assert run.result.status == "completed"
    assert run.result.dropped == {}
    assert run.result.ledger["produced"] == run.result.ledger["stored"] >= 3000
    return aborted


@pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")
async def test_a_killed_worker_whose_environments_do_not_reproduce(config: Make, no_leaks: None) -> None:
    async with asyncio.timeout(60), aiorl.Run(config()) as run:
        seen = run.events(10_000)
        await anext(e async for e in run.events() if isinstance(e, aiorl.Updated))
        kill(workers_of(run).pids[0])
        await run.wait()
    events = [event async for event in seen]
    aborted = assert_told(run, events, envs={0, 1, 2, 3})
    assert {e.worker for e in aborted} == {"worker 0"}
    assert run.result.restarts == 1
    assert "open episode aborted: environment 0 does not reproduce" in (run.directory / "worker-0.log").read_text()


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_resumed_run_whose_environments_do_not_reproduce(config: Make, workers: int) -> None:
    halves = config(workers=workers)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 5:
                run.stop(final_evaluation=False)
    async with aiorl.Run(halves, resume=run.directory) as again:
        events = [event async for event in again.events(10_000)]
    aborted = assert_told(again, events, envs=set(range(8)))
    assert {e.worker for e in aborted} == ({"worker 0", "worker 1"} if workers else {"this process"})
