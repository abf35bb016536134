"""Native vector environments: one stream whatever the autoreset mode, and state that comes back exactly."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl.envs.episodes import run_episodes
from aiorl.envs.group import GroupCursor, advance, make_group
from aiorl.envs.make import make_vector, probe
from aiorl.envs.single import SingleGroup
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.envs.state import CannotCapture, StateCapture, reproduces
from aiorl.envs.vector import CheckedVector, VectorGroup
from aiorl.errors import ConfigError, EnvError
from aiorl.segments import Segment
from tests.envs_for_tests import ByObs, Walk, WalkVector, layout, sync_vector, transitions

MODES = ["NEXT_STEP", "SAME_STEP", "DISABLED"]


def found(env: Any, n: int, **kwargs: Any) -> tuple[EnvSpec, Spaces, int]:
    look = probe(resolve_env(env, kwargs, in_process=True), n)
    return look.spec, look.spaces, look.state_bytes


def collect(
    env: Any, n: int, steps: int, segments: int, cursor: GroupCursor | None = None, **kwargs: Any
) -> tuple[list[Segment], list[np.ndarray], GroupCursor]:
    spec, spaces, state_bytes = found(env, n, **kwargs)
    group = make_group(spec, spaces, range(n), 5)
    group.open(cursor)
    policy = ByObs(spaces)
    parts = [layout(spaces, steps, n, state_bytes=state_bytes).allocate() for _ in range(segments)]
    for part in parts:
        group.collect(policy, part, steps)
        cursor = advance(cursor, part)
    group.close()
    assert cursor is not None
    return parts, policy.firsts, cursor


@pytest.mark.parametrize("kind", ["box", "dict", "tuple", "discrete"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_stream_of_single_environments(kind: str, mode: str):
    single = transitions(collect(Walk, 3, 30, 2, kind=kind)[0])
    parts, firsts, _ = collect(sync_vector, 3, 30, 2, mode=mode, kind=kind)
    vector = transitions(parts)
    lengths = [min(len(a), len(b)) for a, b in zip(single, vector, strict=True)]
    assert min(lengths) > 40
    for a, b, length in zip(single, vector, lengths, strict=True):
        assert a[:length] == b[:length]
    if mode == "NEXT_STEP":
        assert all(len(b) < 60 for b in vector), "no row was spent on a reset"
    else:
        assert all(len(b) == 60 for b in vector)
    # An episode begins where the step before it ended one, a spent row aside.
    begun = np.stack(firsts)[np.concatenate([p.columns["valid"] for p in parts])]
    assert begun.sum() > 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [7, 8, 9, 20])
def test_a_plain_state_comes_back_exactly(mode: str, cut: int):
    whole, firsts, _ = collect(WalkVector, 3, cut, 3, mode=mode)
    _, _, cursor = collect(WalkVector, 3, cut, 1, mode=mode)
    rest, rest_firsts, _ = collect(WalkVector, 3, cut, 2, cursor=cursor, mode=mode)
    assert transitions(whole[1:]) == transitions(rest)
    assert [f.tolist() for f in firsts[cut:]] == [f.tolist() for f in rest_firsts]


def paid_less(num_envs: int) -> Any:
    return gymnasium.wrappers.vector.TransformReward(WalkVector(num_envs), lambda reward: reward - 1)


def test_what_a_wrapper_pays_for_a_reset_is_dropped():
    whole, _, cursor = collect(WalkVector, 3, 20, 2)
    paid, _, paid_cursor = collect(paid_less, 3, 20, 2)
    for part, plain in zip(paid, whole, strict=True):
        valid = plain.columns["valid"]
        assert not valid.all()
        assert part.columns["valid"].tolist() == valid.tolist()
        assert part.columns["reward"].tolist() == np.where(valid, plain.columns["reward"] - 1, 0).tolist()
    assert (paid_cursor.obs["obs"] == cursor.obs["obs"]).all()
    look = probe(resolve_env(paid_less, in_process=True), 3)
    returns, lengths = run_episodes(look.spec, look.spaces, ByObs(look.spaces), 6, 1, 3)
    expected, _ = run_episodes(WalkVector(3), look.spaces, ByObs(look.spaces), 6, 1, 3)
    np.testing.assert_allclose(returns, expected - lengths)


def test_cartpole_comes_back_exactly():
    look = probe(resolve_env("CartPole-v1", in_process=True), 6)
    assert look.native
    assert look.exact
    assert look.autoreset_mode == "NEXT_STEP"
    assert (look.reward_threshold, look.max_episode_steps) == (475.0, 500)
    whole, _, _ = collect("CartPole-v1", 6, 40, 4)
    _, _, cursor = collect("CartPole-v1", 6, 40, 2)
    rest, _, _ = collect("CartPole-v1", 6, 40, 2, cursor=cursor)
    assert transitions(whole[2:]) == transitions(rest)


def test_the_state_fits_the_room_that_the_probe_asks_for():
    parts, _, _ = collect("CartPole-v1", 8, 50, 3)
    assert all(0 < len(p.env_state) <= len(p.state) for p in parts)


def test_native_can_be_declined():
    look = probe(resolve_env("CartPole-v1", in_process=True, native=False), 4)
    assert not look.native
    assert isinstance(make_group(look.spec, look.spaces, range(4), 0), SingleGroup)
    native = probe(resolve_env("CartPole-v1", in_process=True), 4)
    assert isinstance(make_group(native.spec, native.spaces, range(4), 0), VectorGroup)


def test_episodes_without_a_limit_are_those_of_single_environments():
    """-1 is gymnasium's word for none; its vectors would take it for a number of steps, and truncate each one."""
    parts, _, _ = collect("CartPole-v1", 3, 60, 2, max_episode_steps=-1)
    ends = [np.concatenate([p.columns[name] for p in parts]) for name in ("truncated", "terminated", "valid")]
    assert [bool(x.any()) for x in ends] == [False, True, True]
    assert ends[2].all(), "a row was spent on a reset"
    assert not found("CartPole-v1", 3, max_episode_steps=None)[0].native
    limited, _, _ = collect("CartPole-v1", 3, 60, 2, max_episode_steps=5)
    assert np.concatenate([p.columns["truncated"] for p in limited]).any()
    assert found("CartPole-v1", 3, max_episode_steps=5)[0].native


def both(num_envs: int | None = None, wide: bool = False, hidden: bool = False) -> Any:
    """A single environment, or a vector: `wide` with other spaces, `hidden` with state that cannot be captured."""
    if num_envs is None:
        return Walk() if wide else gymnasium.wrappers.TransformObservation(
            Walk(), lambda o: o[:2], gymnasium.spaces.Box(-100, 100, (2,), np.float32)
        )  # fmt: skip
    return WalkVector(num_envs, hidden=hidden)


def test_a_vector_that_is_not_the_same_or_not_exact_gives_way_to_single_environments():
    assert probe(resolve_env(both, in_process=True), 3).native
    other = probe(resolve_env(both, {"wide": True}, in_process=True), 3)
    assert not other.native
    assert "other spaces" in other.why_single
    hidden = probe(resolve_env(both, {"hidden": True}, in_process=True), 3)
    assert not hidden.native
    assert "do not hold its whole state" in hidden.why_single


def test_a_vector_without_a_single_environment_is_used_as_it_is():
    look = probe(resolve_env(sync_vector, in_process=True), 3)
    assert look.native
    assert look.spec.vector_only
    assert not look.exact
    assert "SyncVectorEnv.env" in look.why_inexact


def test_what_could_not_be_captured_is_not_brought_back():
    _, _, cursor = collect(sync_vector, 2, 5, 1)
    assert cursor.env_state == b""
    with pytest.raises(EnvError, match=r"environments 0-1 cannot be brought back.*could not be captured"):
        collect(sync_vector, 2, 5, 1, cursor=cursor)


def test_disabled_mode_seeds_every_episode():
    """Where an environment takes a seed for each, the stream is that of single environments, chance included."""
    single = transitions(collect(Walk, 3, 40, 1, seeded=True)[0])
    assert transitions(collect(sync_vector, 3, 40, 1, mode="DISABLED", seeded=True)[0]) == single
    one_seed = transitions(collect(WalkVector, 3, 40, 1, mode="DISABLED")[0])
    assert one_seed[0][0] != one_seed[1][0]


# --- the contract -----------------------------------------------------------------------------------------------------


class Bad(WalkVector):
    """Breaks one rule at step 4."""

    def __init__(self, num_envs: int, fault: str, mode: str = "NEXT_STEP") -> None:
        super().__init__(num_envs, mode)
        self.fault, self.k = fault, 0

    def step(self, actions: Any) -> Any:
        self.k += 1
        obs, reward, terminated, truncated, info = super().step(actions)
        if self.fault == "no final":
            info = {}
        if self.k == 4:
            if self.fault == "raise":
                raise RuntimeError("fell over")
            obs = {"float64": obs.astype(np.float64), "short": obs[:1], "nan": obs * np.nan}.get(self.fault, obs)
            reward = {"reward": reward[:, None], "reward none": None}.get(self.fault, reward)
            terminated = {"flags": terminated * 2.0, "scalar": False}.get(self.fault, terminated)
        if self.fault == "misdeclared":
            reward = np.ones_like(reward)
        if self.fault == "ends twice":
            terminated = truncated = np.ones_like(terminated)
            reward = np.zeros_like(reward)
        if self.fault == "half":
            truncated = truncated * 1 + 2
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("fault", "mode", "message"),
    [
        ("float64", "NEXT_STEP", r"environments 4-6, step 4: obs expected \(3, 2\) float32, got \(3, 2\) float64"),
        ("short", "NEXT_STEP", r"obs expected \(3, 2\) float32, got \(1, 2\)"),
        ("nan", "NEXT_STEP", r"environment 4, step 3 of the segment: obs is nan"),
        ("reward", "NEXT_STEP", r"reward expected \(3,\) real numbers, got \(3, 1\)"),
        ("reward none", "NEXT_STEP", r"reward expected \(3,\) real numbers"),
        ("flags", "NEXT_STEP", r"terminated expected \(3,\) bool, got \(3,\) float64"),
        ("scalar", "NEXT_STEP", r"terminated expected \(3,\) bool, got \(\) bool"),
        ("raise", "NEXT_STEP", r"environments 4-6, step 4: step\(\) raised RuntimeError: fell over"),
        ("no final", "SAME_STEP", r"info expected 'final_obs'"),
        ("misdeclared", "NEXT_STEP", r"a step spent on a reset expected reward 0"),
        ("ends twice", "NEXT_STEP", r"environments 4-6, step 2: a step spent on a reset expected reward 0 and no end"),
        ("half", "NEXT_STEP", r"truncated expected \(3,\) bool, got \(3,\) int64"),
    ],
)
def test_a_broken_contract_is_named(fault: str, mode: str, message: str):
    spec = EnvSpec("bad", {"fault": fault, "mode": mode}, Bad, native=True, vector_only=True)
    spaces = found(WalkVector, 3)[1]
    group = make_group(spec, spaces, range(4, 7), 0)
    group.open(None)
    with pytest.raises(EnvError, match=message):
        group.collect(ByObs(spaces), layout(spaces, 20, 3).allocate(), 20)
    group.close()


def test_a_vector_must_say_when_it_resets():
    class Silent(WalkVector):
        def __init__(self, num_envs: int) -> None:
            super().__init__(num_envs)
            self.metadata = {}

    with pytest.raises(ConfigError, match="does not say when it resets"):
        probe(resolve_env(Silent, in_process=True), 2)


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="made a vector of 4 environments, expected 3"):
        probe(resolve_env(lambda: WalkVector(4), in_process=True), 3)


def test_buffers_that_an_environment_uses_again_do_no_harm():
    class Reusing(WalkVector):
        def step(self, actions: Any) -> Any:
            parts = super().step(actions)
            if not hasattr(self, "buffers"):
                self.buffers = [np.empty_like(p) for p in parts[:4]]
            for buffer, part in zip(self.buffers, parts[:4], strict=True):
                buffer[...] = part
            return (*self.buffers, parts[4])

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            result = super().reset(seed=seed, options=options)
            for buffer in getattr(self, "buffers", ()):
                buffer[...] = 0
            return result

    for mode in MODES:
        expected = transitions(collect(WalkVector, 3, 30, 1, mode=mode)[0])
        assert transitions(collect(Reusing, 3, 30, 1, mode=mode)[0]) == expected


@pytest.mark.parametrize("mode", MODES)
def test_lists_and_whole_numbers_are_taken_as_flags_and_rewards(mode: str):
    class Plain(WalkVector):
        def step(self, actions: Any) -> Any:
            obs, reward, terminated, truncated, info = super().step(actions)
            return obs, reward.tolist(), terminated.astype(np.int8), truncated.tolist(), info

    expected = transitions(collect(WalkVector, 3, 30, 1, mode=mode)[0])
    assert transitions(collect(Plain, 3, 30, 1, mode=mode)[0]) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [30, 17])
def test_what_a_slot_held_before_does_not_show(mode: str, steps: int):
    spec, spaces, state_bytes = found(WalkVector, 3, mode=mode)
    clean, used = (layout(spaces, 30, 3, state_bytes=state_bytes).allocate() for _ in range(2))
    for array in (*used.obs.values(), *used.columns.values(), *used.final_obs.values(), used.final_at, used.header):
        array[...] = 1
    for segment in (clean, used):
        group = make_group(spec, spaces, range(3), 5)
        group.open(None)
        group.collect(ByObs(spaces), segment, steps)
        group.close()
    assert 0 < clean.env_steps <= 3 * steps
    assert clean.finals == used.finals
    for name in clean.columns:
        rows = slice(None) if name in ("valid", "terminated", "truncated") else slice(steps)
        assert clean.columns[name][rows].tobytes() == used.columns[name][rows].tobytes(), name
    assert clean.obs["obs"][: steps + 1].tobytes() == used.obs["obs"][: steps + 1].tobytes()


# --- state ------------------------------------------------------------------------------------------------------------


@functools.cache
def walk_spaces() -> Spaces:
    return found(WalkVector, 3)[1]


def walks(**kwargs: Any) -> WalkVector:
    env = WalkVector(3, **kwargs)
    env.reset(seed=3)
    return env


def test_all_plain_kinds_of_state_come_back():
    env, other = walks(), walks()
    env.notes = {
        "steps": 0,
        "a": [1, (2.5, None)],
        "b": np.float32(3),
        "c": 2**80,
        4: np.arange(6).reshape(2, 3),
        "t": "text",
    }
    env.step(np.ones(3, np.int64))
    StateCapture(other).restore(StateCapture(env).capture())
    assert other.notes["a"] == [1, (2.5, None)]
    assert type(other.notes["b"]) is np.float32
    assert other.notes["c"] == 2**80
    assert other.notes[4].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert other.np_random.random() == env.np_random.random()
    other.x += 1  # restored arrays can be written


class Counted(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Counts steps."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.count = 0

    def step(self, actions: Any) -> Any:
        self.count += 1
        return super().step(actions)


def test_wrappers_are_part_of_the_state():
    wrapped, other = Counted(walks()), Counted(walks())
    wrapped.step(np.ones(3, np.int64))
    StateCapture(other).restore(StateCapture(wrapped).capture())
    assert other.unwrapped.x.tolist() == wrapped.unwrapped.x.tolist()
    assert other.count == 1


def test_what_has_no_plain_form_is_named():
    with pytest.raises(CannotCapture, match=r"WalkVector\.simulator is a builtins\.object"):
        StateCapture(walks(opaque=True)).capture()
    env = walks()
    env.rng = np.random.RandomState(0)
    with pytest.raises(CannotCapture, match=r"WalkVector\.rng"):
        StateCapture(env).capture()


def test_the_self_test_tells_exact_from_inexact():
    def make(**kwargs: Any) -> Any:
        return lambda: WalkVector(3, **kwargs)

    for mode in MODES:
        assert reproduces(make(mode=mode), walk_spaces(), 3) == ""
    assert "do not hold" in reproduces(make(hidden=True), walk_spaces(), 3)
    assert "simulator" in reproduces(make(opaque=True), walk_spaces(), 3)


STATE = StateCapture(walks()).capture()


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes):
    with pytest.raises(EnvError, match="does not fit"):
        StateCapture(walks()).restore(data)


@given(at=st.integers(0, len(STATE) - 1), byte=st.integers(0, 255))
def test_damaged_bytes_are_refused_or_plain(at: int, byte: int):
    damaged = STATE[:at] + bytes([byte]) + STATE[at + 1 :]
    env = walks()
    step = type(env).step
    try:
        StateCapture(env).restore(damaged)
    except EnvError:
        return
    assert type(env).step is step
    assert "step" not in vars(env)


@pytest.mark.parametrize(
    "name", ["step", "metadata", "__class__", "single_action_space", "np_random", "a b", "render_mode"]
)
def test_only_state_can_be_set(name: str):
    import msgspec

    with pytest.raises(EnvError, match="does not fit"):
        StateCapture(walks()).restore(msgspec.msgpack.encode([{name: 1}]))


def test_a_deeply_nested_state_is_refused():
    data: Any = b"\x90"
    for _ in range(100_000):
        data = b"\x93\xa1l\x91" + data + b"\xc2"
        if len(data) > 300_000:
            break
    with pytest.raises(EnvError, match="does not fit"):
        StateCapture(walks()).restore(b"\x91\x81\xa1x" + data)


def test_state_of_another_environment_is_refused():
    cart = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")
    cart.reset(seed=0)
    wrapped = Counted(walks())
    with pytest.raises(EnvError, match="1 wrappers, expected 2"):
        StateCapture(wrapped).restore(StateCapture(cart).capture())
    with pytest.raises(EnvError, match="does not fit"):
        StateCapture(walks()).restore(StateCapture(cart).capture())


def test_the_step_count_is_told():
    spec = EnvSpec("walks", {}, WalkVector, native=True, vector_only=True)
    vector = CheckedVector(make_vector(spec, 3), walk_spaces(), 3, lambda i, e: i + e)
    vector.reset()
    for _ in itertools.repeat(None, 4):
        vector.step(np.zeros(3, np.int64))
    assert vector.where == "environments 0-2, step 4"
