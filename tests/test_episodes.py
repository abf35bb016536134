"""Whole episodes: the right number, seeded one by one, at a constant width."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import gymnasium
import numpy as np
import pytest

from aiorl.envs.checked import outcome_of
from aiorl.envs.episodes import run_episodes, shares
from aiorl.envs.make import make_env, make_vector, probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import EnvError
from aiorl.seeding import evaluation_seed
from tests.envs_for_tests import Broken, ByObs, Walk, WalkVector, sync_vector


def found(env: Any, width: int = 1, **kwargs: Any) -> tuple[EnvSpec, Spaces]:
    look = probe(resolve_env(env, kwargs, in_process=True), width)
    return look.spec, look.spaces


class Alike(ByObs):
    """Chooses by the observation alone, so that an episode is the same in every slot."""

    def act(self, obs: Any, first: Any) -> Any:
        actions, extras = super().act(obs, first)
        return (actions + np.arange(len(first))) % 2 * 0 + (obs["obs"][:, 0] * 7 % 2 > 1), extras


def by_hand(seed: int, episode: int) -> tuple[float, int]:
    env, policy = Walk(seeded=True), Alike(found(Walk)[1])
    obs, _ = env.reset(seed=evaluation_seed(seed, episode))
    total, length, over = 0.0, 0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(policy.act({"obs": obs[None]}, np.zeros(1, bool))[0][0])
        total, length, over = total + reward, length + 1, bool(terminated or truncated)
    return total, length


@pytest.mark.parametrize("width", [1, 3, 5, 8])
def test_each_episode_is_the_one_of_its_seed(width: int):
    spec, spaces = found(Walk, seeded=True)
    returns, lengths = run_episodes(spec, spaces, Alike(spaces), 8, 4, width)
    expected = [by_hand(4, e) for e in range(8)]
    assert returns.tolist() == [r for r, _ in expected]
    assert lengths.tolist() == [n for _, n in expected]
    assert len(set(returns.tolist())) == 8
    assert (returns.dtype, lengths.dtype) == (np.float64, np.int64)


class Contest(Walk):
    """Tells how it ended, in one of two ways or in none, by the episode's first observation."""

    def __init__(self, key: str, kind: type = float) -> None:
        super().__init__(seeded=True)
        self._key, self._kind, self.ended = key, kind, list[float]()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = super().reset(seed=seed, options=options)
        self._result = self._kind(evaluation_result(obs))
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | {self._key: self._result if terminated or truncated else 7}


def evaluation_result(obs: Any) -> int:
    return int(float(np.asarray(obs).sum()) * 1000) % 3 - 1


@pytest.mark.parametrize(("key", "kind"), [("outcome", float), ("outcome", np.float32), ("is_success", bool)])
def test_how_episodes_ended_is_what_their_last_info_says(key: str, kind: type):
    spec, spaces = found(lambda: Contest(key, kind))
    expected: list[float] = []
    for episode in range(9):
        env = Walk(seeded=True)
        expected.append(float(kind(evaluation_result(env.reset(seed=evaluation_seed(4, episode))[0]))))
    outcomes = np.empty(9)
    run_episodes(spec, spaces, Alike(spaces), 9, 4, 4, outcomes=outcomes)
    assert outcomes.tolist() == expected
    assert len(set(expected)) > 1
    won, lost = ([value > 0 for value in expected], [value < 0 for value in expected])
    assert shares(outcomes) == {"wins": np.mean(won), "losses": np.mean(lost)}


@pytest.mark.parametrize("info", [{}, {"outcome": "won"}, {"outcome": None}, {"outcome": [1, 2]}, None, 3])
def test_what_an_info_does_not_tell_is_not_known(info: Any):
    assert np.isnan(outcome_of(info))
    assert shares(np.array([np.nan])) == {"wins": None, "losses": None}
    assert shares(np.array([np.nan, 1.0, -1.0, 0.0, 0.0])) == {"wins": 0.25, "losses": 0.25}


def test_a_vector_environment_tells_no_outcomes():
    spec, spaces = found(WalkVector, 3)
    outcomes = np.zeros(4)
    run_episodes(spec, spaces, ByObs(spaces), 4, 1, 3, outcomes=outcomes)
    assert np.isnan(outcomes).all()


def test_the_policy_always_sees_the_whole_batch():
    spec, spaces = found(Walk)
    policy = ByObs(spaces)
    run_episodes(spec, spaces, policy, 7, 0, 4)
    assert {len(first) for first in policy.firsts} == {4}
    assert sum(int(first.sum()) for first in policy.firsts) == 7


def test_results_repeat_and_depend_on_the_seed():
    spec, spaces = found(Walk, seeded=True)
    runs = [run_episodes(spec, spaces, ByObs(spaces), 6, seed, 4)[0].tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_given_environments_are_used_and_left_open():
    spec, spaces = found(Walk, seeded=True)
    envs = [make_env(spec) for _ in range(3)]
    expected = run_episodes(spec, spaces, ByObs(spaces), 6, 1, 3)[0].tolist()
    for _ in range(2):
        assert run_episodes(envs, spaces, ByObs(spaces), 6, 1, 3)[0].tolist() == expected


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_a_vector_counts_the_same_number_of_episodes_in_each_slot(mode: str):
    """Where nothing depends on seeds, the result is that of single environments, whatever the autoreset mode."""
    single, spaces = found(Walk)
    vector, _ = found(sync_vector, 3, mode=mode)
    expected = run_episodes(single, spaces, ByObs(spaces), 8, 1, 3)
    got = run_episodes(vector, spaces, ByObs(spaces), 8, 1, 3)
    assert got[0].tolist() == expected[0].tolist()
    assert got[1].tolist() == expected[1].tolist()


def test_a_vector_repeats_also_when_it_is_used_again():
    spec, spaces = found(WalkVector, 3)
    env = make_vector(spec, 3)
    runs = [run_episodes(given, spaces, ByObs(spaces), 7, 1, 3)[0].tolist() for given in (spec, env, env)]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) > 3


def test_frames_are_those_of_the_first_slot():
    spec, spaces = found(Walk, limit=4)
    frames: list[tuple[int, int]] = []
    beats: list[int] = []
    _, lengths = run_episodes(
        spec,
        spaces,
        ByObs(spaces),
        4,
        0,
        2,
        on_step=beats.append,
        on_frame=lambda env: frames.append((env.episode, env.t)),
    )
    expected = [(e, t) for e, length in enumerate(lengths[::2]) for t in range(length + 1)]
    assert frames == expected
    assert beats == list(range(max(lengths[::2].sum(), lengths[1::2].sum())))


def test_on_step_may_stop_it_and_environments_are_closed():
    closed: list[int] = []

    class Closes(Walk):
        def close(self) -> None:
            closed.append(1)

    spec, spaces = found(Closes)
    closed.clear()

    def stop(t: int) -> None:
        if t == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        run_episodes(spec, spaces, ByObs(spaces), 4, 0, 2, on_step=stop)
    assert len(closed) == 2


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("raise", r"environment 0, step 3 of episode 0: step\(.*\) raised RuntimeError"),
        ("reward nan", r"evaluation episode 0: the return is nan"),
        ("missing", "environment 0, step 3 of episode 0: obs is missing 'pos'"),
        ("nan", r"environment 0, step 3 of episode 0: obs\.pos is nan"),
        ("range", r"environment 0, step 3 of episode 0: obs\.clock = 49 is outside of its discrete space \[-1, 48\]"),
    ],
)
def test_errors_name_slot_episode_and_step(fault: str, match: str):
    spec, spaces = found(Broken, fault=fault, at=3)
    with pytest.raises(EnvError, match=match):
        run_episodes(spec, spaces, ByObs(spaces), 4, 0, 2)


def test_what_a_reset_shows_is_checked():
    spec, spaces = found(Broken, fault="nan", at=0)
    with pytest.raises(EnvError, match=r"environment 0, step 0 of episode 0: obs\.pos is nan"):
        run_episodes(spec, spaces, ByObs(spaces), 4, 0, 2)


class NanVector(WalkVector):
    """One environment shows NaN from its first end on."""

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(actions)
        self.bad = getattr(self, "bad", False) or terminated[1] or truncated[1]
        if self.bad:
            for shown in (obs, info.get("final_obs", obs)):
                shown[1] = np.nan
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_what_a_vector_shows_is_checked(mode: str):
    spec, spaces = found(NanVector, 3, mode=mode)
    with pytest.raises(EnvError, match=r"environment 1, step \d of the vector, in episode 1: obs is nan"):
        run_episodes(spec, spaces, ByObs(spaces), 6, 0, 3)


class Later(Walk):
    """Its observations do not have the zero that is there before it has shown any."""

    def __init__(self) -> None:
        super().__init__("discrete", seeded=True)
        self.observation_space = gymnasium.spaces.Discrete(50, start=5)

    def _obs(self) -> Any:
        return super()._obs() + 5


def test_places_without_an_episode_are_not_checked():
    spec, spaces = found(Later)
    returns, _ = run_episodes([make_env(spec) for _ in range(3)], spaces, ByObs(spaces), 2, 0, 3)
    assert len(returns) == 2


# -- in threads --------------------------------------------------------------------------------------------------------


class Meeting(Walk):
    """Its steps wait for those of the others, and it notes which threads it was used on."""

    barrier = threading.Barrier(1)
    threads: list[set[int]] = []

    def __init__(self) -> None:
        super().__init__(seeded=True)
        self.mine = {threading.get_ident()}
        self.threads.append(self.mine)

    def reset(self, **kwargs: Any) -> Any:
        self.mine.add(threading.get_ident())
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.mine.add(threading.get_ident())
        self.barrier.wait()
        return super().step(action)

    def close(self) -> None:
        self.mine.add(threading.get_ident())
        super().close()


def test_in_threads_they_step_at_the_same_time_each_on_its_own(monkeypatch: pytest.MonkeyPatch):
    spec, spaces = found(Meeting)
    # One episode each; who is through leaves the others, so they can only meet at first.
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(3, timeout=20))
    monkeypatch.setattr(Meeting, "threads", [])

    def met(t: int) -> None:
        Meeting.barrier = threading.Barrier(1)

    returns, _ = run_episodes(spec, spaces, Alike(spaces), 3, 4, 3, threads=True, on_step=met)
    assert returns.tolist() == [by_hand(4, e)[0] for e in range(3)]
    assert [len(used) for used in Meeting.threads] == [1, 1, 1]
    assert len(set.union(*Meeting.threads)) == 3


class Alone(Walk):
    """Raises if another one is stepped or reset at the same time."""

    lock = threading.Lock()

    def reset(self, **kwargs: Any) -> Any:
        return self._alone(super().reset, **kwargs)

    def step(self, action: Any) -> Any:
        return self._alone(super().step, action)

    def _alone(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("not alone")
        try:
            return call(*args, **kwargs)
        finally:
            self.lock.release()


def test_in_threads_no_more_step_at_once_than_allowed():
    spec, spaces = found(Alone, seeded=True)
    returns, _ = run_episodes(spec, spaces, Alike(spaces), 8, 4, 4, threads=True, limit=asyncio.Semaphore(1))
    assert returns.tolist() == [by_hand(4, e)[0] for e in range(8)]


class Unmade(Walk):
    works = True

    def __init__(self) -> None:
        if not self.works:
            raise RuntimeError("no license")
        super().__init__()


@pytest.mark.parametrize(("fault", "match"), [("raise", "raised RuntimeError"), ("exit", "raised SystemExit")])
def test_in_threads_errors_are_the_same(fault: str, match: str):
    spec, spaces = found(Broken, fault=fault, at=3)
    with pytest.raises(EnvError, match=rf"environment \d, step 3 of episode \d: step\(.*\) {match}"):
        run_episodes(spec, spaces, ByObs(spaces), 3, 0, 3, threads=True)


def test_in_threads_one_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch):
    spec, spaces = found(Unmade)
    monkeypatch.setattr(Unmade, "works", False)
    with pytest.raises(EnvError, match="making the environment raised RuntimeError: no license"):
        run_episodes(spec, spaces, ByObs(spaces), 3, 0, 3, threads=True)
