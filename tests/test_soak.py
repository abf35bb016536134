"""The soak's own parts can fail, and a short one goes through."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from aiorl.metrics import directory
from aiorl.seeding import episode_seed
from aiorl.testing.recording import Taken
from aiorl.workers.supervision import RESTART_WINDOW_S, RESTARTS_MAX
from bench import soak
from bench.soak_checks import Again, Resources, file_violations, growth
from bench.soak_faults import Disk, plan_faults

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ROOT, ROWS = 5, 60


def cartpole() -> Any:
    return gymnasium.make("CartPole-v1", disable_env_checker=True)


def played(env: int, actions: list[int]) -> Taken:
    """What one environment gives for these actions, as a rollout of its own."""
    made, episode = cartpole(), 0
    obs = [made.reset(seed=episode_seed(ROOT, env, 0))[0]]
    after: list[Any] = []
    rows: list[tuple[float, bool, bool]] = []
    for action in actions:
        seen, reward, terminated, truncated, _ = made.step(action)
        after.append(seen)
        rows.append((reward, terminated, truncated))
        if terminated or truncated:
            episode += 1
            seen, _ = made.reset(seed=episode_seed(ROOT, env, episode))
        obs.append(seen)
    reward, terminated, truncated = (np.array(column)[:, None] for column in zip(*rows, strict=True))
    columns = {"action": np.array(actions)[:, None], "reward": reward, "terminated": terminated, "truncated": truncated}
    return Taken(
        index=0, behaviour_version=0, envs=np.array([env]), obs={"": np.array(obs)[:, None]},
        next_obs={"": np.array(after)[:, None]}, columns={**columns, "valid": np.ones((len(rows), 1), bool)},
        aborted=np.zeros(1, bool),
    )  # fmt: skip


def one_more_bit(taken: Taken) -> Taken:
    taken.obs[""].view(np.uint32)[40, 0, 2] ^= 1
    return taken


def left_out(taken: Taken) -> Taken:
    taken.columns["valid"][30] = False
    return taken


def paid_twice(taken: Taken) -> Taken:
    taken.columns["reward"][20] = 2.0
    return taken


WRONG: dict[str, Callable[[Taken], Taken]] = {
    "row 40, episode .*: observation": one_more_bit,
    "row 31, episode .*: observation": left_out,
    r"row 20, episode .*: reward and end \(2.0": paid_twice,
    "row 0, episode 0: observation": lambda taken: replace(taken, envs=np.array([1])),
    "aborted": lambda taken: replace(taken, aborted=np.ones(1, bool)),
}


@pytest.mark.parametrize("complaint", WRONG)
def test_what_is_played_again_must_come_out_the_same(complaint: str):
    taken = played(3, np.random.default_rng(0).integers(0, 2, ROWS).tolist())
    again = Again(cartpole, ROOT)
    assert list(again.check(taken)) == []
    ended = np.count_nonzero(taken.columns["terminated"])
    assert again.episodes == len(again.recent) == ended > 0
    assert sum(again.recent) <= ROWS
    [violation] = Again(cartpole, ROOT).check(WRONG[complaint](taken))
    assert violation.law == "true"
    assert violation.what.startswith("rollout 0, environment ")
    with pytest.raises(AssertionError, match=complaint):
        raise AssertionError(violation.what)


def test_the_plan_keeps_to_the_budget_of_restarts_and_has_enough_faults():
    for seed in range(20):
        plan = plan_faults(np.random.default_rng(seed), 2, 1200.0)
        fatal = [fault for fault in plan.faults if fault.what != "slow"]
        assert len(fatal) >= 80, "with the full disks and the pauses more than 100"
        assert {fault.what for fault in plan.faults} == {"kill", "stop", "fail", "hang", "slow"}
        for worker in (-1, 0, 1):
            times = [fault.at.value for fault in fatal if fault.worker == worker]
            for begin in times:
                assert sum(begin <= t < begin + RESTART_WINDOW_S for t in times) < RESTARTS_MAX


def test_a_full_disk_takes_what_there_is_room_for(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    files = directory.RunFiles(tmp_path)
    with Disk() as disk:
        files.write(([], [{"k": 0}]))
        disk.room = 4
        with pytest.raises(OSError, match=f"{path.with_name('schedule.jsonl')}") as caught:
            files.write(([], [{"k": 1}]))
        assert caught.value.errno == errno.ENOSPC
        disk.room = None
        assert disk.refused > 0
    assert not hasattr(directory, "open")
    assert path.with_name("schedule.jsonl").read_bytes().startswith(b'{"k":0}\n')


def test_lines_that_are_torn_or_missing_are_told(tmp_path: Path):
    (tmp_path / "events.jsonl").write_bytes(b'{"event":"started"}\n{"eve{"event":"updated"}\n')
    (tmp_path / "schedule.jsonl").write_bytes(b'{"k":0}\n{"k":2}\n')
    torn, missing = file_violations(tmp_path, 3)
    assert torn.what == "events.jsonl: 1 of 2 lines are torn, line 2 first"
    assert "[1]" in missing.what


def test_growth_is_of_the_last_tenth_over_the_second():
    def sample(minute: int) -> Resources:
        return Resources(100.0 + minute, 50.0, 80.0, 10 + (minute >= 95), 4, 0, 3)

    found = growth([sample(minute) for minute in range(100)])
    assert found["rss"] == pytest.approx(194.5 / 114.5 - 1)
    assert found["descriptors"] == pytest.approx(0.05)
    assert (found["threads"], found["blocks"]) == (0.0, 0.0)


@pytest.mark.long
@pytest.mark.parametrize("algo", soak.ALGORITHMS)
async def test_a_short_soak(algo: str, no_leaks: None):
    found = await soak.soak(algo, 0.25, 0, lambda line: None)
    assert found.violations == []
    assert found.left == {}
    assert found.faults["disk"] > 0
    assert found.faults["pause"] > 0
    assert found.restarts > 0
    assert found.samples
    assert found.checkpoints > 0
