"""The fault catalogue, part 2: data (F9, F10, F13-F18), learning (F23-F26), persistence and hostile input (F27-F29).

Each test is named by its row. Where the row and the design differ, the design holds: what an environment returns outside
of its Box is stored as it is, infos are not sent at all, and frames are stacked by the environment, once for all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue_envs import Breaks, FiveSteps, Hiccups, Infos, Raises, stacked
from checkpoints import edit_manifest, manifest, mark_of, part
from envs_for_tests import ByObs, Walk, layout, sync_vector, transitions
from experience import Stream, context, spaces
from kills import kill, until
from plain_loop import plain_loop
from run_envs import Counting
from toys import Toy

import aiorl
from aiorl import checkpoint
from aiorl.algos import ppo
from aiorl.buffers.replay import Replay
from aiorl.cli import main as cli
from aiorl.envs.aborts import Aborts
from aiorl.envs.group import AsyncGroup, make_group
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.errors import EnvError
from aiorl.events import AnyEvent, Updated
from aiorl.learning import params_sha256
from aiorl.ledger import Ledger
from aiorl.pacing import Grant
from aiorl.resuming import resumed_config
from aiorl.returns import gae
from aiorl.segments import Rollout, Segment
from aiorl.testing import crash_points

ROOT = Path(__file__).parent.parent
GAMMA = 0.9


def make(out: Path, **changes: Any) -> aiorl.Config:
    fields: dict[str, Any] = {
        "env": "run_envs:Counting", "algo": Toy(), "envs": 4, "group_size": 2, "workers": 1, "total_steps": 640,
        "off_policy_degree": 1, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


async def events_of(config: aiorl.Config, **given: Any) -> tuple[aiorl.Run, list[AnyEvent]]:
    async with asyncio.timeout(120), aiorl.Run(config, **given) as run:
        events = [event async for event in run.events(10_000)]
    return run, events


def collect(env: Any, n: int, steps: int, segments: int = 1, policy: Any = None, **kwargs: Any) -> list[Segment]:
    """What a group of n environments, 5, 6, …, shows in so many segments."""
    look = probe(resolve_env(env, kwargs, in_process=True), n)
    group = make_group(look.spec, look.spaces, range(5, 5 + n), 5)
    group.open(None)
    parts = [layout(look.spaces, steps, n, state_bytes=look.state_bytes).allocate() for _ in range(segments)]
    for one in parts:
        group.collect(policy or ByObs(look.spaces), one, steps)
    group.close()
    return parts


# -- what workers send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [k if k in ("local class", "10 MB") else pytest.param(k, marks=pytest.mark.long) for k in Raises.KINDS]
)
async def test_f9_exceptions_that_cannot_be_pickled_arrive_as_text(tmp_path: Path, kind: str) -> None:
    run, events = await events_of(make(tmp_path, env="catalogue_envs:Raises", env_kwargs={"kind": kind}))
    with pytest.raises(aiorl.AiorlError) as caught:
        await run.wait()
    names = {"local class": "Local", "two arguments": "TwoArguments", "lock": "RuntimeError", "10 MB": "ValueError"}
    text, detail = str(caught.value), caught.value.detail
    assert f"{names[kind]}: the arm is stuck" in text
    assert "worker-0" in text
    assert "environment 0, step" in text
    assert "in step" in detail or "Raises" in detail or kind == "10 MB", "no traceback"
    assert max(len(text), len(events[-1].error)) <= 8192  # type: ignore[union-attr, arg-type]
    assert "the arm is stuck" in (tmp_path / "error.txt").read_text()


def test_f10_infos_are_not_sent_and_not_kept() -> None:
    """10,000 steps with a lock and 1 MB of text each; the row asks for at most 50 MB."""
    tracemalloc.start()
    try:
        segments = collect(Infos, 2, 500, 10)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert sum(segment.env_steps for segment in segments) == 10_000
    assert grown <= 50e6


@pytest.mark.parametrize("workers", [0, 1])
async def test_f10_a_run_does_not_mind_what_infos_hold(tmp_path: Path, workers: int) -> None:
    run, _ = await events_of(make(tmp_path, env="catalogue_envs:Infos", workers=workers))
    assert (run.result.status, run.result.env_steps) == ("completed", 640)


# -- what environments return ------------------------------------------------------------------------------------------


def refused(fault: str) -> str:
    with pytest.raises(EnvError) as caught:
        collect(Breaks, 1, 8, fault=fault)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("shape (3,)", "obs.pos expected (2,) float32, got (3,) float32"),
        ("shape (1, 2)", "obs.pos expected (2,) float32, got (1, 2) float32"),
        ("float64", "obs.pos expected (2,) float32, got (2,) float64"), ("missing", "obs is missing 'pos'"),
        ("extra", "obs has the undeclared 'more'"),
    ],
)  # fmt: skip
def test_f13_shapes_dtypes_and_keys_are_the_declared_ones(fault: str, words: str) -> None:
    text = refused(fault)
    assert text.startswith(f"environment 5, step 3 of episode 0: {words}")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "step 2 of the segment: obs.pos is nan"), ("inf", "step 2 of the segment: obs.pos is -inf"),
        ("nan reward", "step 2 of the segment: reward is nan"), ("overflow", "step 2 of the segment: obs.pos is inf"),
        ("float64 1e300", "step 3 of episode 0: obs.pos expected (2,) float32, got (2,) float64"),
        ("clock", "step 2 of the segment: obs.clock = 10 is outside of its discrete space [0, 9]"),
    ],
)  # fmt: skip
def test_f14_what_is_not_finite_or_not_in_a_discrete_space(fault: str, words: str) -> None:
    assert refused(fault).startswith(f"environment 5, {words}")


def test_f14_a_value_outside_of_its_box_is_stored_as_it_is() -> None:
    assert collect(Breaks, 1, 8, fault="bounds")[0].obs["obs.pos"][3].tolist() == [[7.0, 7.0]]


@pytest.mark.parametrize("workers", [0, 1])
async def test_f14_a_value_outside_of_its_box_is_said_once_for_each_environment(tmp_path: Path, workers: int) -> None:
    """Breaks leaves its Box [-1, 1] in every episode, at a step and at an episode's end, where the value is a final one."""
    config = make(tmp_path, env="catalogue_envs:Breaks", env_kwargs={"fault": "bounds"}, workers=workers)
    run, events = await events_of(config)
    told = [e.message for e in events if isinstance(e, aiorl.Warned) and "outside" in e.message]
    where = "obs.pos of environment 0 is 7, outside of its declared bounds [-1, 1]; it is stored as it is"
    assert told == [f"{where}, as are others of environments 1, 2, 3"]
    assert (run.result.status, run.result.env_steps) == ("completed", 640)


def hiccups(where: str, segments: int = 6, steps: int = 8, limit: int = 20) -> tuple[list[Segment], list[str]]:
    """What three environments that return NaN at times show, and what was told of it."""
    look = probe(resolve_env(Hiccups, {"where": where}, in_process=True), 3)
    told: list[str] = []
    group = make_group(look.spec, look.spaces, range(5, 8), 5, aborts=Aborts(range(5, 8), limit, told.append))
    assert not isinstance(group, AsyncGroup)
    group.open(None)
    parts = [layout(look.spaces, steps, 3).allocate() for _ in range(segments)]
    for one in parts:
        group.collect(ByObs(look.spaces), one, steps)
    group.close()
    return parts, told


@pytest.mark.parametrize(("where", "steps"), [("reward", 8), ("obs", 8), ("end", 8), ("obs", 1), ("end", 1)])
def test_f14_a_step_that_is_not_finite_aborts_its_episode(where: str, steps: int) -> None:
    """Also where the step is the last one of its segment, or ends the episode; every other row is as it was."""
    parts, told = hiccups(where, 48 // steps, steps)
    whole = collect(Counting, 3, steps, 48 // steps)  # the same seeds
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns}
    obs, finals = np.concatenate([p.obs["obs"][:-1] for p in parts]), [p.final_obs["obs"][: p.finals] for p in parts]
    assert all(np.isfinite(a).all() for a in (obs, *finals, columns["reward"], *(p.obs["obs"] for p in parts)))
    spent = ~columns["valid"]
    assert (columns["truncated"] == spent).all(), "Counting truncates nothing"
    assert not (columns["terminated"] & spent).any()
    assert len(told) == spent.sum() >= 3
    line = re.compile(r"open episode aborted: environment [567], step \d of the segment: .* is (nan|-inf)")
    assert all(line.fullmatch(text) for text in told)
    for env in range(3):
        expected = {o.tobytes() for p in whole for o in p.obs["obs"][:, env]}
        assert all(o.tobytes() in expected for o in obs[: 16, env]), "an observation that no episode shows"
        for row in np.flatnonzero(spent[:-1, env]):
            assert obs[row + 1, env, 1] == 0, "the row after it does not begin an episode"
            assert obs[row, env, 1] == (6 if where == "end" else 3)
            assert obs[row + 1, env, 0] != obs[row, env, 0]
    # The books know them by number, and no return is made up.
    ledger, entries = Ledger(1, 3), []
    for ordinal, segment in enumerate(parts):
        entries.append(ledger.store((Grant(0, ordinal, ordinal, 0),), (segment,)))
    aborted = [one for entry in entries for one in entry.aborted]
    assert [one.reason for one in aborted] == ["not finite"] * int(spent.sum())
    assert {one.length for one in aborted} == {6 if where == "end" else 3}
    assert all(e.length == 7 for entry in entries for e in entry.episodes)
    assert ledger.stored == (~spent).sum()
    for env in range(3):
        numbers = sorted([e.episode for e in aborted if e.env == env])
        over = np.cumsum(columns["terminated"][:, env] | columns["truncated"][:, env])
        assert numbers == (over[spent[:, env]] - 1).tolist()


def test_f14_nothing_flows_through_a_row_that_was_spent() -> None:
    parts, _ = hiccups("obs", 1, 48)
    rollout = Rollout(0, 0, tuple(parts), np.arange(3))
    valid, ends = rollout.column("valid"), (rollout.column("terminated"), rollout.column("truncated"))
    values, after = value(rollout.obs["obs"][:-1][..., 1:]), value(rollout.next_obs()["obs"][..., 1:])
    targets = values + gae(rollout.column("reward"), values, after, *ends, gamma=GAMMA, gae_lambda=1.0, valid=valid)
    before = np.argwhere(~valid[1:])  # the rows before those that were spent: they bootstrap from what they led to
    assert len(before) >= 3
    replay = Replay(probe(resolve_env(Counting, in_process=True), 1).spaces, 3, 48 * 3)
    replay.add(rollout)
    for row, env in before.tolist():
        reward, bootstrap = rollout.column("reward")[row, env], GAMMA * after[row, env]
        assert after[row, env] == value(np.array([3.0]))
        assert targets[row, env] == pytest.approx(reward + bootstrap, abs=1e-6)
        batch = replay.gather(np.array([row * 3 + env]), 3, GAMMA)
        assert (batch.returns[0], batch.discounts[0]) == (reward, GAMMA)
        assert batch.next_obs["obs"][0, 1] == 3


def test_f14_a_reset_that_is_not_finite_is_done_again_with_another_seed() -> None:
    parts, told = hiccups("reset")
    assert all(segment.columns["valid"].all() and np.isfinite(segment.obs["obs"]).all() for segment in parts)
    assert len(told) >= 3
    assert all("reset for episode" in text and "the observation is nan" in text for text in told)
    again, _ = hiccups("reset")
    assert [p.obs["obs"].tobytes() for p in parts] == [p.obs["obs"].tobytes() for p in again]


def test_f14_too_many_aborted_episodes_in_a_row_are_an_error() -> None:
    with pytest.raises(EnvError, match=r"environment 5, step 3 of the segment: reward is nan\n  3 of its episodes in a row"):
        hiccups("always", limit=3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("algo", ["toy", "ppo", "dqn"])
async def test_f14_a_run_goes_on_without_what_is_not_finite(tmp_path: Path, algo: str, workers: int) -> None:
    config = make(
        tmp_path, env="catalogue_envs:Hiccups", env_kwargs={"where": "obs"}, workers=workers, algo=SMALL[algo],
        segment_length=8, on_nonfinite_env="abort_episode", total_steps=1000,
    )  # fmt: skip
    run, events = await events_of(config)
    aborted, result = [e for e in events if isinstance(e, aiorl.EpisodeAborted)], run.result
    assert {(e.reason, e.length) for e in aborted} == {("not finite", 3)}
    assert (result.status, result.restarts) == ("completed", 0)
    assert len(aborted) == result.aborted == result.dropped["not finite"] == result.ledger["dropped"] > 20
    assert result.ledger["produced"] == result.env_steps + result.aborted
    assert {e.length_mean for e in events if isinstance(e, Updated)} <= {None, 7.0}, "an aborted episode has a return"
    told = [e.message for e in events if isinstance(e, aiorl.Warned) and "NaN or infinity" in e.message]
    assert len(told) == len({e.env for e in aborted}) == 4, "once for each environment"
    assert "is aborted after 3 steps and that step is dropped" in told[0]
    if workers:
        assert re.search(r"environment 0, step \d of the segment: obs is -inf", (tmp_path / "worker-0.log").read_text())
    else:
        again, _ = await events_of(config.replace(out=str(tmp_path / "again"), workers=2))
        assert again.result.params_sha256 == result.params_sha256, "it depends on the number of workers"


async def test_f14_a_run_in_which_no_episode_is_finite_ends(tmp_path: Path) -> None:
    config = make(
        tmp_path, env="catalogue_envs:Hiccups", env_kwargs={"where": "always"}, on_nonfinite_env="abort_episode",
        nonfinite_env_max=5, workers=0,
    )  # fmt: skip
    run, _ = await events_of(config)
    with pytest.raises(aiorl.AiorlError, match=r"environment \d, step 5 of the segment: reward is nan\n  5 of its episodes"):
        await run.wait()


async def test_f14_a_native_vector_environment_cannot_abort_an_episode(tmp_path: Path) -> None:
    config = make(tmp_path, env="CartPole-v1", on_nonfinite_env="abort_episode")
    with pytest.raises(aiorl.ConfigError, match=r"CartPole-v1 is a vector: .*\n  set native_vector = false"):
        await aiorl.train(config)
    result = await aiorl.train(config.replace(native_vector=False))
    assert (result.status, result.aborted) == ("completed", 0)


@pytest.mark.parametrize("fault", ["shape (1, 2)", "nan", "overflow", "none reward"])
async def test_f13_f14_f15_nothing_of_a_bad_segment_is_stored(tmp_path: Path, fault: str) -> None:
    config = make(tmp_path, env="catalogue_envs:Breaks", env_kwargs={"fault": fault}, workers=0)
    run, _ = await events_of(config)
    with pytest.raises(aiorl.AiorlError, match=r"environment \d, step"):
        await run.wait()
    assert (run.result.updates, run.result.ledger["stored"]) == (0, 0)


@pytest.mark.parametrize("fault", ["array reward", "int reward", "bool reward", "float32 reward"])
def test_f15_a_reward_is_any_real_number(fault: str) -> None:
    (segment,) = collect(Breaks, 1, 6, fault=fault)
    assert segment.columns["reward"].dtype == np.float64
    assert segment.columns["reward"][:, 0].tolist() == [1.0] * 6


@pytest.mark.parametrize("fault", ["bool_ end", "int end", "array end"])
def test_f15_an_end_is_a_truth_value(fault: str) -> None:
    (segment,) = collect(Breaks, 1, 6, fault=fault)
    assert segment.columns["terminated"][:, 0].tolist() == [False, False, True] * 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none reward", "reward expected a real number, got None"), ("pair reward", "reward expected a real number"),
        ("text reward", "reward expected a real number, got '1'"),
        ("none end", "terminated expected True or False, got None"),
        ("two end", "terminated expected True or False, got 2"), ("text end", "terminated expected True or False"),
    ],
)  # fmt: skip
def test_f15_anything_else_is_not_guessed_at(fault: str, words: str) -> None:
    assert refused(fault).startswith(f"environment 5, step 3 of episode 0: {words}")


# -- episode boundaries ------------------------------------------------------------------------------------------------


def value(obs: Any) -> Any:
    """V of a state of FiveSteps: other than 0 everywhere, so that a false bootstrap shows."""
    return 3.0 + obs[..., 0].astype(np.float64)


@pytest.mark.parametrize("truncated", [False, True])
def test_f16_a_truncated_end_bootstraps_and_a_true_one_does_not(truncated: bool) -> None:
    (segment,) = collect(FiveSteps, 1, 20, truncated=truncated)
    rollout = Rollout(0, 0, (segment,), np.arange(1))
    after = 1 + GAMMA * (3.0 + 5.0) if truncated else 1.0  # the target of every last step: s' shows 5
    values, next_values = value(rollout.obs["obs"][:-1]), value(rollout.next_obs()["obs"])
    ends = rollout.column("terminated"), rollout.column("truncated")
    for gae_lambda in (0.0, 0.95, 1.0):
        targets = values + gae(
            rollout.column("reward"), values, next_values, *ends, gamma=GAMMA, gae_lambda=gae_lambda
        )
        assert targets[4::5, 0] == pytest.approx(after, abs=1e-6)
        expected = 1 + GAMMA * ((1 - gae_lambda) * value(np.array([4.0])) + gae_lambda * after)
        assert targets[3::5, 0] == pytest.approx(float(expected), abs=1e-6)
    replay = Replay(probe(resolve_env(FiveSteps, {"truncated": truncated}, in_process=True), 1).spaces, 1, 20)
    replay.add(rollout)
    for n, start in ((1, 4), (3, 2), (3, 3), (3, 4)):
        batch = replay.gather(np.arange(start, 20, 5), n, GAMMA)
        steps = 5 - start
        expected = sum(GAMMA**i for i in range(steps)) + (GAMMA**steps * 8.0 if truncated else 0.0)
        assert batch.returns + batch.discounts * value(batch.next_obs["obs"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_f17_every_autoreset_mode_gives_the_transitions_of_single_environments(mode: str) -> None:
    seeded = mode == "DISABLED"  # the others draw their later starts without being asked for a seed
    single = transitions(collect(Walk, 3, 40, 2, seeded=seeded))
    parts = collect(sync_vector, 3, 40, 2, mode=mode, seeded=seeded)
    vector = transitions(parts)
    for one, other in zip(single, vector, strict=True):
        assert other == one[: len(other)]
        assert len(other) > 60
    valid = np.concatenate([p.columns["valid"] for p in parts])
    assert (mode == "NEXT_STEP") == (not valid.all()), "the row of a reset is no transition"


class Watching(ByObs):
    """Keeps what it was shown when it chose."""

    def __init__(self, spaces: Any) -> None:
        super().__init__(spaces)
        self.seen: list[Any] = []

    def act(self, obs: Mapping[str, Any], first: Any) -> Any:
        self.seen.append(obs["obs"].copy())
        return super().act(obs, first)


def test_f18_learning_sees_the_stacks_that_acting_saw() -> None:
    """10,000 rows of 4 frames, in 20 environments; at one seam all open episodes were aborted."""
    space = probe(resolve_env(stacked, in_process=True), 20).spaces
    policy = Watching(space)
    parts = collect(stacked, 20, 100, 3, policy) + (rest := collect(stacked, 20, 100, 2, policy))
    rest[0].aborted[...] = True  # other environments went on in the place of the first ones
    replay = Replay(space, 20, 10_000)
    for k, segment in enumerate(parts):
        replay.add(Rollout(k, k, (segment,), np.arange(20)))
    acted = np.stack(policy.seen)
    batch = replay.gather(np.arange(10_000), 3, GAMMA)
    assert batch.obs["obs"].tobytes() == acted.reshape(10_000, *acted.shape[2:]).tobytes()
    rows, terminated = batch.obs["obs"].reshape(500, 20, 4, 3), [p.columns["terminated"] for p in parts]
    ended = np.concatenate(terminated) | np.concatenate([p.columns["truncated"] for p in parts])
    first = np.ones((500, 20), bool)
    first[1:] = ended[:-1]
    first[300] = True
    for frame in range(3):  # its own first frame, and nothing of the episode before
        assert (rows[first][:, frame] == rows[first][:, 3]).all()
    going_on = ~first[1:]
    assert (rows[1:][going_on][:, :3] == rows[:-1][going_on][:, 1:]).all()
    # Windows of 3 steps end with their episode, be it over or aborted.
    over = ended.copy()
    over[299] = over[499] = True
    steps = np.full((500, 20), 3)
    for back in (1, 0):
        for t in range(500 - back):
            steps[t][over[t + back]] = back + 1
    true_end = np.concatenate(terminated)[np.minimum(np.arange(500)[:, None] + steps - 1, 499), np.arange(20)]
    expected = np.where(true_end, 0.0, GAMMA**steps)
    assert batch.discounts.reshape(500, 20) == pytest.approx(expected, abs=1e-12)


# -- learning ----------------------------------------------------------------------------------------------------------

SMALL = {
    "toy": Toy(), "ppo": aiorl.PPO(hidden=(8,), epochs=1, minibatches=1),
    "dqn": aiorl.DQN(hidden=(8,), warmup=64, batch_size=16, update_ratio=0.125, capacity=500, target_every=7),
}  # fmt: skip


@pytest.mark.parametrize("algo", ["toy", *(pytest.param(algo, marks=pytest.mark.long) for algo in ("ppo", "dqn"))])
async def test_f23_degree_0_is_the_serial_loop_after_1000_updates(tmp_path: Path, algo: str) -> None:
    updates, steps = 1000, 8
    config = make(
        tmp_path, env="CartPole-v1", algo=SMALL[algo], segment_length=steps, total_steps=updates * 4 * steps, workers=2,
        off_policy_degree=0, native_vector=False,
    )  # fmt: skip
    result = await aiorl.train(config)
    learner = plain_loop(
        SMALL[algo], resolve_env("CartPole-v1", in_process=True, native=False), envs=4, group_size=2, steps=steps, seed=0,
        rollouts=updates, degree=0,
    )  # fmt: skip
    assert result.updates == updates
    assert result.params_sha256 == params_sha256(learner.weights())


@pytest.mark.parametrize("takes_a_row", [False, True])
def test_f24_every_window_of_the_ring_is_one_piece_of_one_episode(takes_a_row: bool) -> None:
    """A ring of 7 rows, 3 steps: 50,000 windows each way."""
    seed, n, envs, windows = int.from_bytes(os.urandom(4), "little"), 3, 3, 0
    rng = np.random.default_rng(seed)
    stream = Stream(spaces(), envs, 2, resets_take_a_row=takes_a_row, seed=seed)
    replay = Replay(stream.space, envs, 7 * envs)
    flags: dict[str, list[Any]] = {"terminated": [], "truncated": [], "valid": []}
    while windows < 50_000:
        rollout = stream.next()
        for name, rows in flags.items():
            rows.extend(np.array(rollout.column(name)))
        replay.add(rollout)
        if not len(replay):
            continue
        newest = len(flags["valid"]) - 1
        batch = replay.sample(rng, 40, n=n, gamma=0.5)
        windows += 40
        start, env, _ = batch.obs["obs"].astype(int).T
        end, same, _ = batch.next_obs["obs"].astype(int).T
        assert (same == env).all(), f"seed {seed}"
        length = end - start
        assert ((length >= 1) & (length <= n) & (start > newest - 7) & (end - 1 <= newest)).all(), f"seed {seed}"
        terminated, truncated, valid = (np.array(flags[k][-12:]) for k in ("terminated", "truncated", "valid"))
        shift, over = newest - len(valid) + 1, terminated | truncated
        for row in range(40):
            at, e = np.arange(start[row], end[row]) - shift, env[row]
            assert valid[at, e].all(), f"seed {seed}"
            assert not over[at[:-1], e].any(), f"seed {seed}"
            cut = over[at[-1], e] or end[row] > newest or not valid[at[-1] + 1, e]
            assert length[row] == n or cut, f"cut short without a reason, seed {seed}"
            assert batch.discounts[row] == (0 if terminated[at[-1], e] else 0.5 ** length[row])


def all_finite(directory: Path) -> bool:
    """Whether every array of every checkpoint below a directory is."""
    found = list(directory.rglob("*.safetensors"))
    assert found
    arrays = [array for path in found for array in checkpoint.decode_arrays(path).values()]
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")


def spoil(monkeypatch: pytest.MonkeyPatch, how: str, calls: set[int]) -> None:
    """These calls of the value loss go wrong: with one gradient step an update, these updates."""
    real, count = ppo.losses.value_loss, iter(range(10_000))

    def wrong(*args: Any) -> Any:
        loss, slope = real(*args)
        if next(count) not in calls:
            return loss, slope
        if how == "raise":
            raise ZeroDivisionError("once")
        return (loss * np.nan, slope) if how == "nan loss" else (loss, slope * np.inf)

    monkeypatch.setattr(ppo.losses, "value_loss", wrong)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("how", ["nan loss", "inf gradient", "raise"])
async def test_f25_what_is_not_finite_is_never_stepped_and_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, policy: str
) -> None:
    spoil(monkeypatch, how, {100})
    config = make(
        tmp_path, env="CartPole-v1", algo=SMALL["ppo"], workers=0, segment_length=4, total_steps=120 * 16,
        checkpoint_every=320, on_nonfinite=policy, native_vector=False,
    )  # fmt: skip
    run, events = await events_of(config)
    result = run.result
    assert run._session.snapshot is not None
    assert all(np.isfinite(array).all() for array in run._session.snapshot[1].values())
    assert all_finite(tmp_path)
    if policy == "skip" and how != "raise":
        assert (result.status, result.updates, result.skipped_updates) == ("completed", 120, {"nonfinite": 1})
        assert [event.rollout for event in events if isinstance(event, Updated) and event.skipped] == [100]
        return
    assert (result.status, result.updates, result.gradient_steps) == ("failed", 100, 100)
    parts = "ZeroDivisionError: once" if how == "raise" else r"policy_loss .*, value_loss .*, entropy .*, grad_norm"
    with pytest.raises(aiorl.TrainingError, match=parts):
        await run.wait()


async def test_f25_skipping_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "nan loss", {3, 4, 6, 7, 8})
    config = make(
        tmp_path, env="CartPole-v1", algo=SMALL["ppo"], workers=0, segment_length=4, on_nonfinite="skip", nonfinite_max=2
    )
    run, _ = await events_of(config)
    with pytest.raises(aiorl.TrainingError, match=r"2 updates in a row were skipped.*\n.*value_loss nan"):
        await run.wait()
    assert (run.result.updates, run.result.skipped_updates) == (8, {"nonfinite": 4})


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_f26_the_target_is_updated_once_on_schedule(tau: float) -> None:
    period, stream = 7, Stream(spaces(), 4, 8)
    algo = aiorl.DQN(hidden=(8,), warmup=0, update_ratio=1 / 32, target_every=period, target_tau=tau)
    learner = algo.learner(stream.space, context())
    target, changes = learner.state_dict()["target"], 0
    for update in range(1, 101):
        assert learner.update(stream.next())["gradient_steps"] == 1
        state = learner.state_dict()
        changed = any((state["target"][name] != target[name]).any() for name in target)
        assert changed == (update % period == 0)
        if changed:
            changes += 1
            for name, before in target.items():
                once = before + tau * (state["parameters"][name] - before)
                np.testing.assert_allclose(state["target"][name], once, atol=1e-6)
        target = state["target"]
    assert changes == 100 // period


# -- persistence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_cut", [None, "torn"])
def test_f27_a_kill_at_any_file_operation_leaves_the_newest_complete_checkpoint(tmp_path: Path, power_cut: Any) -> None:
    """More of it, with whole runs, in test_checkpoint_crashes.py."""
    run = tmp_path / "run"

    def save(mark: int) -> None:
        checkpoint.save(run / "checkpoints" / f"{mark:08d}", manifest(version=mark), part(mark))

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        save(1)

    found = []
    for crash in crash_points(lambda: save(2), run, prepare=prepare, power_cut=power_cut):
        complete = checkpoint.complete_checkpoints(run / "checkpoints")
        found.append(mark_of(complete[-1]))
        checkpoint.clean(run)  # as the next start does
        assert not list(run.rglob("*.tmp")), crash
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert found[-1] == 2


def learner_sha256(directory: Path) -> str:
    """Everything that the newest checkpoint holds of the learner: parameters, optimizer, target, buffer, statistics."""
    newest = checkpoint.complete_checkpoints(directory / "checkpoints")[-1]
    arrays, plain = checkpoint.flatten(checkpoint.load(newest, ("learner",))[1]["learner"])
    digest = hashlib.sha256(repr(sorted(plain.items())).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def start(words: list[str], out: Path, *, by: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    command = [*by, sys.executable, "-m", "aiorl", "train", *words, "--out", str(out), "--progress", "none", "--no-preset"]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)


async def killed_program(words: list[str], out: Path, version: int) -> None:
    """A real `python -m aiorl train`, killed with SIGKILL once it has saved this version."""
    program = start(words, out)
    try:
        await until(lambda: program.poll() is not None or _newest(out) >= version)
        assert program.poll() is None, program.stderr.read().decode() if program.stderr else ""
    finally:
        kill(program.pid)
        program.communicate()
    assert program.returncode == -signal.SIGKILL


def _newest(out: Path) -> int:
    complete = checkpoint.complete_checkpoints(out / "checkpoints")
    return int(complete[-1].name) if complete else -1


@pytest.mark.parametrize("kill_number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3))])
@pytest.mark.parametrize("algo", ["ppo", "dqn"])
async def test_f28_a_killed_program_resumes_bit_for_bit(tmp_path: Path, algo: str, kill_number: int) -> None:
    chance = random.Random(seed := int.from_bytes(os.urandom(4), "little"))
    out, rollouts = tmp_path / "killed", 120
    words = [
        "CartPole-v1", "--algo", algo, "--off-policy-degree", "0", "--workers", "1", "--envs", "4", "--group-size", "2",
        "--segment-length", "32", "--steps", str(rollouts * 128), "--checkpoint-every", "640", "--eval-every", "0",
        "--eval-episodes", "1", f"--{algo}.hidden", "16",
    ]  # fmt: skip
    words += ["--ppo.normalise-obs"] if algo == "ppo" else ["--dqn.n-step", "3"]
    await killed_program(words, out, chance.randrange(5, rollouts - 60))
    killed_at = _newest(out)
    assert killed_at < rollouts, f"seed {seed}: it was over"
    resumed = await aiorl.train(resumed_config(out), resume=out)
    whole = await aiorl.train(resumed_config(out).replace(out=str(tmp_path / "whole")))
    assert (resumed.updates, resumed.env_steps) == (whole.updates, whole.env_steps)
    assert resumed.params_sha256 == whole.params_sha256, f"killed after {killed_at} updates, seed {seed}"
    assert learner_sha256(out) == learner_sha256(tmp_path / "whole")
    obs = np.random.default_rng(seed).normal(size=(1000, 4)).astype(np.float32)
    actions = [aiorl.load(path / "final").act({"obs": obs}).tolist() for path in (out, tmp_path / "whole")]
    assert actions[0] == actions[1]


@pytest.mark.skipif(sys.platform != "linux", reason="a file system of its own, or a limit on files")
def test_f28_a_full_disk_is_told_and_training_goes_on(tmp_path: Path) -> None:
    """Really full: a file system of 300 KiB, or a limit on the size of files where none may be mounted."""
    disk, words = tmp_path / "disk", ["CartPole-v1", "--workers", "0", "--envs", "4", "--group-size", "2", "--no-preset"]
    words += ["--segment-length", "32", "--eval-every", "0", "--eval-episodes", "1", "--progress", "none", "--seed", "1"]
    words += ["--ppo.hidden", "128", "128", "--ppo.epochs", "1", "--ppo.minibatches", "1", "--out", str(disk / "run")]
    disk.mkdir()
    train = f"{sys.executable} -m aiorl train {' '.join(words)} --steps 6400 --checkpoint-every 1280"
    mounted = f"mount -t tmpfs -o size=300k none {disk} && {train}; code=$?; cp -r {disk} {tmp_path}/copy; exit $code"
    tiny = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    may_mount = subprocess.run([*tiny[:5], "-c", f"mount -t tmpfs none {disk}"], capture_output=True, check=False).returncode
    command = ["sh", "-c", f"ulimit -f 200; {train}; code=$?; cp -r {disk} {tmp_path}/copy; exit $code"]  # blocks of 512
    done = subprocess.run(command if may_mount else tiny, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "3 checkpoints in a row could not be written" in done.stderr
    assert ("File too large" if may_mount else "No space left on device") in done.stderr
    lines = (tmp_path / "copy" / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    failed = [event for event in events if event["event"] == "checkpoint_failed"]
    assert len(failed) <= 3
    assert failed, "the failures are in no event"
    between = {event["version"] for event in events if event["event"] == "updated"}
    assert any(failed[0]["version"] < version for version in between), "training did not go on"


def _without_privileges(folder: Path) -> tuple[str, ...]:
    """How to start a program to which the modes of files apply: root is above them, but not in a name space of its own."""
    folder.mkdir(mode=0o500)
    for by in ((), ("unshare", "--user")):
        done = subprocess.run([*by, "sh", "-c", f"touch {folder}/{len(by)}"], capture_output=True, check=False)
        if done.returncode and b"Permission denied" in done.stderr:
            return by
    pytest.skip("root, who may write anywhere, and may not give that up here")


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
async def test_f28_a_lost_permission_is_told_and_training_goes_on(tmp_path: Path) -> None:
    by, out = _without_privileges(tmp_path / "locked"), tmp_path / "run"
    words = ["CartPole-v1", "--workers", "0", "--envs", "4", "--group-size", "2", "--segment-length", "32", "--steps", "10M"]
    words += ["--eval-every", "0", "--checkpoint-every", "640", "--ppo.hidden", "8", "--ppo.epochs", "1"]
    program = start(words, out, by=by)
    try:
        await until(lambda: program.poll() is not None or _newest(out) > 0)
        (out / "checkpoints").chmod(0o500)
        text = (await asyncio.to_thread(program.communicate, timeout=60))[1].decode()
    finally:
        (out / "checkpoints").chmod(0o700)
        if program.poll() is None:
            kill(program.pid)
            program.communicate()
    assert program.returncode == 1, text
    assert "3 checkpoints in a row could not be written" in text
    assert "Permission denied" in text
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["event"] == "checkpoint_failed"]
    assert 1 <= len(failed) <= 3
    assert all("Permission denied" in event["reason"] for event in failed)
    between = [event["version"] for event in events if event["event"] == "updated"]
    assert any(failed[0]["version"] < version for version in between), "training did not go on"
    assert _newest(out) > 0, "what was complete is lost"


# -- hostile files -----------------------------------------------------------------------------------------------------


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that could go on."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    config = make(path, env="CartPole-v1", algo=SMALL["ppo"], workers=0, off_policy_degree=0)
    asyncio.run(aiorl.train(config))
    return path


def _object_array(file: Path, marker: Path) -> None:
    with open(file, "wb") as stream:
        np.save(stream, np.array([Planted(marker)], object), allow_pickle=True)


def _linked(file: Path) -> None:
    elsewhere = file.parent.parent.parent / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


HOSTILE: dict[str, Callable[[Path, Path], Any]] = {
    "a pickle": lambda file, marker: file.write_bytes(pickle.dumps(Planted(marker))),
    "an object array": _object_array,
    "10 GB of nothing": lambda file, marker: os.truncate(file, 10 * 2**30),
    "a huge header": lambda file, marker: file.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "a link": lambda file, marker: _linked(file),
    "cut short": lambda file, marker: os.truncate(file, max(0, file.stat().st_size - 1)),
    "nothing": lambda file, marker: file.unlink(),
}


@pytest.mark.parametrize("pattern", ["policy-*.s*", "learner-*.json", "learner-*.s*", "run-*.json", "manifest.json"])
@pytest.mark.parametrize("how", HOSTILE)
def test_f29_no_file_of_a_checkpoint_is_believed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, how: str
) -> None:
    run, marker = shutil.copytree(finished, tmp_path / "run"), tmp_path / "marker"
    newest = checkpoint.complete_checkpoints(run / "checkpoints")[-1]
    (file,) = newest.glob(pattern)
    HOSTILE[how](file, marker)
    before, begun_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert cli(["resume", str(run), "--steps", "100k", "--progress", "none"]) == 2
    assert time.process_time() - begun_s <= 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 50 * 1024
    text = capsys.readouterr().err
    assert file.name in text or (file.name, how) == ("manifest.json", "nothing"), text
    assert len(text.splitlines()) <= 3
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../x.json", "/etc/passwd", "policy.json/../x.json"])
def test_f29_names_that_lead_out_of_the_checkpoint(finished: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    newest = checkpoint.complete_checkpoints(run / "checkpoints")[-1]
    edit_manifest(newest, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(aiorl.ConfigError, match="refusing the file name"):
        aiorl.load(newest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('env = "CartPole-v1"\nlearning_rat = 1', "unknown key `learning_rat`"),
        ('env = "CartPole-v1"\nenvs = "many"', "envs = 'many'"),
        ('env = "CartPole-v1"\n[ppo]\nlearning_rate = "__import__(\'os\').mkdir(\'marker\')"', "ppo.learning_rate = "),
        ('env = "CartPole-v1"\n[ppo]\nlr = 1', "unknown key `ppo.lr`"), ("env = [1, 2]", "env"), ("\xff\0", "TOML"),
        ('env = "CartPole-v1"\nstop_at = nan', "stop_at = nan"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_leaks")
def test_f29_configurations_are_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(text)
    assert cli(["train", "--config", "a.toml", "--progress", "none"]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.toml"], "something was started"
