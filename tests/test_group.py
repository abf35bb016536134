"""Groups of single environments: true rows, exact return to open episodes, and errors that say where."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from aiorl.envs.episodes import run_episodes
from aiorl.envs.group import Group, GroupCursor, advance, make_group
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import EnvError, TrainingError
from aiorl.seeding import episode_seed
from aiorl.segments import Column, Segment
from tests.envs_for_tests import Broken, ByObs, ReusesBuffer, Unseeded, Walk, layout, transitions


def found(env: Any, **kwargs: Any) -> tuple[EnvSpec, Spaces]:
    look = probe(resolve_env(env, kwargs, in_process=True))
    return look.spec, look.spaces


def opened(
    env: Any, n: int = 3, cursor: GroupCursor | None = None, first: int = 0, **kwargs: Any
) -> tuple[Group, Spaces]:
    spec, spaces = found(env, **kwargs)
    group = make_group(spec, spaces, range(first, first + n), seed=5)
    group.open(cursor)
    return group, spaces


def collect(group: Group, spaces: Spaces, steps: int, segments: int = 1) -> list[Segment]:
    parts = [layout(spaces, steps, len(group.envs)).allocate() for _ in range(segments)]
    for part in parts:
        group.collect(ByObs(spaces), part, steps, None)
    return parts


def by_hand(n: int, count: int, **kwargs: Any) -> list[list[tuple[Any, ...]]]:
    """The stream that a plain loop over environments of the same seeds sees."""
    streams: list[list[tuple[Any, ...]]] = []
    for i in range(n):
        env = Walk(**kwargs)
        spaces = found(Walk, **kwargs)[1]
        stream: list[tuple[Any, ...]] = []
        episode = 0
        obs = spaces.flatten_obs(env.reset(seed=episode_seed(5, i, 0))[0])
        while len(stream) < count:
            batch = {k: np.stack([v] * n) for k, v in obs.items()}
            action = ByObs(spaces).act(batch, np.zeros(n, bool))[0][i]
            raw, reward, terminated, truncated, _ = env.step(action)
            after = spaces.flatten_obs(raw)
            stream.append((
                *(v.tobytes() for v in obs.values()), action.tobytes(), reward, terminated, truncated,
                *(v.tobytes() for v in after.values()),
            ))  # fmt: skip
            obs = after
            if terminated or truncated:
                episode += 1
                obs = spaces.flatten_obs(env.reset(seed=episode_seed(5, i, episode))[0])
        streams.append(stream)
    return streams


@pytest.mark.parametrize("kind", ["box", "dict", "tuple", "discrete"])
@pytest.mark.parametrize("seeded", [False, True])
def test_rows_are_what_a_plain_loop_sees(kind: str, seeded: bool):
    group, spaces = opened(Walk, kind=kind, seeded=seeded)
    seen = transitions(collect(group, spaces, steps=25, segments=2))
    assert seen == by_hand(3, 50, kind=kind, seeded=seeded)
    ends = {row[-len(spaces.observation) - 2 : -len(spaces.observation)] for stream in seen for row in stream}
    assert ends >= {(False, False), (True, False), (False, True)}, "not every way to end occurred"
    group.close()


def test_segment_length_does_not_change_the_stream():
    streams = []
    for steps, segments in ((1, 24), (6, 4), (24, 1)):
        group, spaces = opened(Walk, seeded=True)
        streams.append(transitions(collect(group, spaces, steps, segments)))
    assert streams[0] == streams[1] == streams[2]


def test_environments_are_seeded_by_their_global_index():
    whole = transitions(collect(*opened(Walk, n=4, seeded=True), steps=1))
    part = transitions(collect(*opened(Walk, n=2, first=2, seeded=True), steps=1))
    assert part[0][0][0] == whole[2][0][0]
    assert part[1][0][0] == whole[3][0][0]


class Dial(Walk):
    """Its action is a number in a box without axes."""

    def __init__(self, seeded: bool = True) -> None:
        super().__init__(seeded=seeded)
        self.action_space = gymnasium.spaces.Box(0, 1, ())

    def step(self, action: Any) -> Any:
        assert isinstance(action, np.ndarray)
        assert action.shape == ()
        return super().step(action > 0.5)


class Half(ByObs):
    def act(self, obs: Any, first: Any) -> Any:
        actions, extras = super().act(obs, first)
        return actions[:, None].astype(np.float32), extras


def test_actions_without_axes_are_arrays_also_where_an_episode_is_brought_back():
    group, spaces = opened(Dial)
    whole = [layout(spaces, 5, 3).allocate() for _ in range(2)]
    for part in whole:
        group.collect(Half(spaces), part, 5)
    again, _ = opened(Dial, cursor=advance(None, whole[0]))
    part = layout(spaces, 5, 3).allocate()
    again.collect(Half(spaces), part, 5)
    assert transitions([part]) == transitions([whole[1]])
    returns, _ = run_episodes(found(Dial)[0], spaces, Half(spaces), 3, 0, 3)
    assert len(returns) == 3


def test_a_buffer_used_again_by_the_environment_does_no_harm():
    plain, reusing = opened(Walk), opened(ReusesBuffer)
    assert transitions(collect(*reusing, steps=30)) == transitions(collect(*plain, steps=30))


def test_first_says_where_an_episode_begins():
    group, spaces = opened(Walk, n=2)
    policy = ByObs(spaces)
    segment = layout(spaces, 30, 2).allocate()
    group.collect(policy, segment, 30)
    group.collect(policy, segment, 1)
    firsts = np.stack(policy.firsts)
    ended = segment.columns["terminated"] | segment.columns["truncated"]
    group2, _ = opened(Walk, n=2)
    again = collect(group2, spaces, 31)[0]
    ended = again.columns["terminated"] | again.columns["truncated"]
    assert firsts[0].all()
    assert (firsts[1:] == ended[:-1]).all()
    assert ended[:-1].any()


def test_extra_columns_and_heartbeats():
    spec, spaces = found(Walk)
    extras = {"log_prob": Column(), "hidden": Column((4,), "float64")}
    group = make_group(spec, spaces, range(2), 0)
    group.open(None)
    segment = layout(spaces, 5, 2, extras).allocate()
    beats: list[int] = []
    group.collect(ByObs(spaces, extras), segment, 5, beats.append)
    assert beats == [0, 1, 2, 3, 4]
    assert (segment.columns["hidden"] == 0.5).all()
    assert segment.env_steps == 10


def test_a_short_collection_leaves_the_rest_invalid():
    group, spaces = opened(Walk)
    segment = layout(spaces, 20, 3).allocate()
    group.collect(ByObs(spaces), segment, 20)
    group.collect(ByObs(spaces), segment, 4)
    assert segment.env_steps == 12
    assert not segment.columns["truncated"][4:].any()


def test_a_used_slot_is_written_afresh():
    group, spaces = opened(Walk)
    segment = layout(spaces, 12, 3).allocate()
    for column in segment.columns.values():
        column.view(np.uint8)[...] = 1
    segment.header[:] = 7
    group.collect(ByObs(spaces), segment, 12)
    other, _ = opened(Walk)
    assert transitions([segment]) == transitions(collect(other, spaces, 12))


@pytest.mark.parametrize("kind", ["box", "dict", "tuple"])
@pytest.mark.parametrize("cut", [1, 3, 7, 14, 20])
def test_open_episodes_are_brought_back_exactly(kind: str, cut: int):
    group, spaces = opened(Walk, kind=kind, seeded=True)
    cursor = None
    for _ in range(2):
        cursor = advance(cursor, collect(group, spaces, cut)[0])
    restored, _ = opened(Walk, kind=kind, seeded=True, cursor=cursor)
    policies = ByObs(spaces), ByObs(spaces)
    parts = [layout(spaces, 25, 3).allocate() for _ in policies]
    for g, p, s in zip((group, restored), policies, parts, strict=True):
        g.collect(p, s, 25)
    assert transitions([parts[0]]) == transitions([parts[1]])
    assert [f.tolist() for f in policies[0].firsts] == [f.tolist() for f in policies[1].firsts]


def test_the_cursor_counts_episodes_and_keeps_open_actions():
    group, spaces = opened(Walk, n=2, limit=4)
    segment = collect(group, spaces, 10)[0]
    cursor = advance(None, segment)
    ended = segment.columns["terminated"] | segment.columns["truncated"]
    assert cursor.episodes.tolist() == ended.sum(axis=0).tolist()
    for i, actions in enumerate(cursor.actions):
        begin = np.flatnonzero(ended[:, i])[-1] + 1
        assert actions.tolist() == segment.columns["action"][begin:, i].tolist()
    segment.columns["action"][...] = 9  # the slot is given back and used again
    assert 9 not in cursor.actions[0]


def test_an_environment_that_does_not_reproduce_is_named():
    group, spaces = opened(Unseeded)
    cursor = advance(None, collect(group, spaces, 3)[0])
    with pytest.raises(EnvError, match=r"environment 0 does not reproduce.* obs is another one"):
        opened(Unseeded, cursor=cursor)


def test_an_episode_that_ends_while_it_is_replayed_is_named():
    group, spaces = opened(Walk, limit=7)
    cursor = advance(None, collect(group, spaces, 2)[0])
    with pytest.raises(EnvError, match=r"does not reproduce.*ended at step 1 of 2"):
        opened(Walk, limit=1, cursor=cursor)


def test_a_cursor_without_observations_is_not_compared():
    group, spaces = opened(Unseeded)
    cursor = advance(None, collect(group, spaces, 3)[0])
    free = GroupCursor(cursor.episodes + 1, tuple(a[:0] for a in cursor.actions), cursor.done, {}, b"")
    opened(Unseeded, cursor=free)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fault": "float64"}, r"obs\.pos expected \(2,\) float32, got \(1, 2\) float64"),
        ({"fault": "missing"}, r"obs is missing 'pos'"),
        ({"fault": "extra"}, r"obs has the undeclared 'more'"),
        ({"fault": "no dict"}, r"obs expected a dict with .*, got a list of 2"),
        ({"fault": "float_clock"}, r"obs\.clock expected \(\) int64, got 1\.5"),
        (
            {"fault": "float64", "kind": "box"},
            r"obs expected \(3,\) float32, got \(3,\) float64\n.*astype\(\"float32\"\)",
        ),
        ({"fault": "shape", "kind": "box"}, r"obs expected \(3,\) float32, got \(2,\) float32"),
        ({"fault": "batched", "kind": "box"}, r"got \(1, 3\) float32"),
        ({"fault": "scalar", "kind": "box"}, r"got 1\.0"),
        ({"fault": "list", "kind": "box"}, r"got a list of 3\n.*np\.asarray"),
        ({"fault": "none", "kind": "box"}, r"got None"),
        ({"fault": "reward none"}, r"reward expected a real number, got None"),
        ({"fault": "reward pair"}, r"reward expected a real number, got \(2,\) float64"),
        ({"fault": "reward text"}, r"reward expected a real number, got '1'"),
        ({"fault": "terminated none"}, r"terminated expected True or False, got None"),
        ({"fault": "terminated two"}, r"terminated expected True or False, got 2"),
        ({"fault": "terminated text"}, r"terminated expected True or False, got 'no'"),
        ({"fault": "four"}, r"step\(\) expected to return \(obs, reward, .*, got a tuple of 4"),
    ],
)
def test_a_broken_contract_names_environment_step_and_field(kwargs: dict[str, Any], message: str):
    group, spaces = opened(Broken, first=5, **kwargs)
    with pytest.raises(EnvError, match=message) as caught:
        collect(group, spaces, 6)
    assert str(caught.value).startswith("environment 5, step 4 of episode 0: ")
    assert str(caught.value).count("\n") < 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", r"environment 1, step 3 of the segment: obs\.pos is nan"),
        ("range", r"environment 1, step 3 of the segment: obs\.clock = 49 is outside of its discrete space \[-1, 48\]"),
        ("reward nan", r"environment 1, step 3 of the segment: reward is nan"),
    ],
)
def test_numbers_that_cannot_be_are_named(fault: str, message: str):
    group, spaces = opened(Broken, n=1, first=1, fault=fault)
    with pytest.raises(EnvError, match=message):
        collect(group, spaces, 6)


def test_a_bad_last_observation_is_found():
    group, spaces = opened(Broken, n=1, first=3, fault="nan", limit=4)
    with pytest.raises(EnvError, match=r"environment 3, step 3 of the segment: obs\.pos is nan"):
        collect(group, spaces, 6)


@pytest.mark.parametrize(
    ("fault", "text"), [("raise", "RuntimeError: the simulator fell over"), ("exit", "SystemExit: 3")]
)
def test_an_exception_names_environment_episode_and_step(fault: str, text: str):
    group, spaces = opened(Broken, first=5, fault=fault, at=4)
    with pytest.raises(EnvError, match=r"environment 5, step 4 of episode 0: step\(.*\) raised " + text) as caught:
        collect(group, spaces, 20)
    assert "in _break" in caught.value.detail


def test_an_exception_in_reset_is_named():
    with pytest.raises(EnvError, match=r"environment 2, step 0 of episode 0: reset\(seed=\d+\) raised RuntimeError"):
        opened(Broken, first=2, fault="raise", at=0)
    with pytest.raises(EnvError, match=r"reset\(\) expected to return \(obs, info\)"):
        opened(Broken, fault="reset alone", at=0)


class Odd(Walk):
    """Returns numbers in every form that is still a number."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        forms = [np.float32, int, np.array, lambda r: np.array([r]), lambda r: bool(r > 0), np.float64]
        reward = forms[self.t % len(forms)](reward)
        flags = [np.bool_, int, np.int8, lambda f: np.array([f])]
        return obs, reward, flags[self.t % 4](terminated), flags[(self.t + 1) % 4](truncated), info


def test_numbers_may_come_in_many_forms():
    group, spaces = opened(Odd)
    plain, _ = opened(Walk)
    odd, expected = transitions(collect(group, spaces, 20)), transitions(collect(plain, spaces, 20))
    assert [[row[:2] + row[3:] for row in s] for s in odd] == [[row[:2] + row[3:] for row in s] for s in expected]


class Wrong(ByObs):
    """A policy that returns something else than it declared."""

    def __init__(self, spaces: Spaces, what: str) -> None:
        super().__init__(spaces, {"log_prob": Column()})
        self.what = what

    def act(self, obs: Any, first: Any) -> Any:
        actions, extras = super().act(obs, first)
        if self.what == "action":
            return actions[:, None], extras
        return actions, {} if self.what == "missing" else {"log_prob": np.zeros(1)}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", r"actions expected \(3,\), got \(3, 1\)"),
        ("missing", r"column 'log_prob' expected \(3,\), got nothing"),
        ("broadcast", r"column 'log_prob' expected \(3,\), got \(1,\)"),
    ],
)
def test_a_policy_that_breaks_its_word_is_told(what: str, message: str):
    group, spaces = opened(Walk)
    segment = layout(spaces, 4, 3, {"log_prob": Column()}).allocate()
    with pytest.raises(TrainingError, match=message):
        group.collect(Wrong(spaces, what), segment, 4)


def test_an_action_that_is_not_finite_is_blamed_on_the_policy():
    import gymnasium

    class Continuous(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

        def step(self, action: Any) -> Any:
            return super().step(1)

    class Lost(ByObs):
        def act(self, obs: Any, first: Any) -> Any:
            return np.full((len(first), 2), np.nan, np.float32), {}

    group, spaces = opened(Continuous)
    with pytest.raises(TrainingError, match=r"the policy chose \[nan nan\] for environment 0, step 0"):
        group.collect(Lost(spaces), layout(spaces, 3, 3).allocate(), 3)


def test_close_may_come_twice_and_before_open():
    group, _ = opened(Walk)
    group.close()
    group.close()
    spec, spaces = found(Walk)
    make_group(spec, spaces, range(2), 0).close()
