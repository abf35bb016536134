"""Spaces as plain data: translation from gymnasium, JSON, encoding, actions."""

from __future__ import annotations

import subprocess
import sys

import gymnasium.spaces as gym
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl.envs.contract import ObsReader
from aiorl.envs.spaces import Leaf, Spaces, spaces_of
from aiorl.errors import ConfigError
from aiorl.segments import Column

VECTOR = gym.Box(-1, 1, (3,), np.float32)


def of(observation: gym.Space, action: gym.Space | None = None) -> Spaces:
    return spaces_of(observation, action or gym.Discrete(2))


def names(spaces: Spaces) -> list[str]:
    return [leaf.name for leaf in spaces.observation]


def test_a_plain_space_has_one_leaf_called_obs():
    spaces = of(VECTOR)
    assert names(spaces) == ["obs"]
    assert spaces.obs_columns == {"obs": Column((3,), "float32")}
    assert spaces.features == 3


def test_nested_spaces_are_named_by_their_path():
    space = gym.Dict({"a": gym.Tuple((VECTOR, gym.Discrete(4))), "b.c": gym.Dict({"d": gym.MultiBinary(5)})})
    spaces = of(space)
    assert names(spaces) == ["obs.a.0", "obs.a.1", "obs.b.c.d"]
    assert [leaf.path for leaf in spaces.observation] == [("a", 0), ("a", 1), ("b.c", "d")]
    assert spaces.features == 3 + 4 + 5


def test_observations_are_stored_as_the_environment_gives_them():
    space = gym.Dict({"d": gym.Discrete(3), "m": gym.MultiDiscrete([2, 3]), "i": gym.Box(0, 255, (4, 4, 3), np.uint8)})
    columns = of(space).obs_columns
    assert columns["obs.d"] == Column((), "int64")
    assert columns["obs.m"] == Column((2,), "int64")
    assert columns["obs.i"] == Column((4, 4, 3), "uint8")


@pytest.mark.parametrize(
    ("space", "value", "expected"),
    [
        (gym.Discrete(3, start=5), np.array(6), [0, 1, 0]),
        (gym.MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (gym.MultiDiscrete([2, 2], start=[1, -1]), np.array([1, 0]), [1, 0, 0, 1]),
        (gym.MultiDiscrete([[2], [3]]), np.array([[0], [1]]), [1, 0, 0, 1, 0]),
        (gym.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (gym.Box(0, 255, (2, 2), np.uint8), np.array([[0, 51], [102, 255]], np.uint8), [0, 0.2, 0.4, 1]),
        (gym.Box(0, 9, (2,), np.uint8), np.array([3, 9], np.uint8), [3, 9]),  # no image: not scaled
        (gym.Box(-1, 1, (), np.float64), np.array(0.5), [0.5]),
        (gym.Box(0, 1, (2,), bool), np.array([True, False]), [1, 0]),
    ],
)
def test_encoding_of_each_kind(space: gym.Space, value: np.ndarray, expected: list[float]):
    spaces = of(space)
    encoded = spaces.encode({"obs": value})
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, expected, rtol=1e-6)
    assert spaces.features == len(expected)
    batch = spaces.encode({"obs": np.broadcast_to(value, (5, 2, *value.shape))})
    assert batch.shape == (5, 2, len(expected))
    assert (batch == encoded).all()


def test_a_float_vector_is_encoded_without_a_copy():
    obs = np.zeros((7, 3), np.float32)
    assert of(VECTOR).encode({"obs": obs}) is obs


def test_leaves_are_encoded_side_by_side_in_order():
    spaces = of(gym.Dict({"a": VECTOR, "b": gym.Discrete(2)}))
    encoded = spaces.encode({"obs.b": np.array([1]), "obs.a": np.array([[1, 2, 3]], np.float32)})
    assert encoded.tolist() == [[1, 2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("action", "column"),
    [
        (gym.Discrete(3), Column((), "int64")),
        (gym.MultiDiscrete([2, 3]), Column((2,), "int64")),
        (gym.MultiDiscrete([[2, 3], [4, 5]]), Column((4,), "int64")),
        (gym.MultiBinary(3), Column((3,), "int64")),
        (gym.Box(-1, 1, (2,), np.float64), Column((2,), "float32")),
        (gym.Box(-1, 1, (2, 2), np.float32), Column((4,), "float32")),
    ],
)
def test_how_actions_are_stored(action: gym.Space, column: Column):
    assert of(VECTOR, action).action_column == column


def test_discrete_actions_count_from_the_start_of_their_space():
    spaces = of(VECTOR, gym.Discrete(3, start=-1))
    assert spaces.env_action(np.array(0)) == -1
    assert spaces.env_actions(np.array([0, 2])).tolist() == [-1, 1]
    assert isinstance(spaces.env_action(np.array(0)), np.int64)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_discrete_spaces_of_other_dtypes(dtype: type[np.integer]):
    """Actions are what the space contains; all is stored as int64, and observations may be numbers of either kind."""
    space = gym.Discrete(3, start=1, dtype=dtype)
    spaces = of(space, space)
    taken = spaces.env_actions(np.array([0, 2]))
    assert (taken.dtype, taken.tolist()) == (dtype, [1, 3])
    assert all(space.contains(action) for action in taken)
    assert space.contains(spaces.env_action(np.array(1)))
    assert spaces.action_column == spaces.obs_columns["obs"] == Column((), "int64")
    reader = ObsReader(spaces.observation)
    assert [reader.read(shown)[0].dtype for shown in (2, np.int64(2), dtype(2))] == ["int64"] * 3


def test_box_actions_are_clipped_and_cast():
    spaces = of(VECTOR, gym.Box(np.array([-1, -np.inf]), np.array([0.1, 2]), dtype=np.float64))
    action = spaces.env_action(np.array([5, -1e9], np.float32))
    assert action.tolist() == [0.1, -1e9]
    assert action.dtype == np.float64


@pytest.mark.parametrize(
    "action",
    [
        gym.Discrete(3, start=7), gym.MultiDiscrete([2, 3], start=[4, 5]), gym.MultiBinary(4), gym.Box(-2, 3, (3,)),
        gym.Box(-1, 1, (2, 2), np.float64), gym.MultiDiscrete([[2, 3], [4, 5]]), gym.Box(-np.inf, 1, (2,), np.float32),
        gym.MultiBinary([2, 3]), gym.Box(-1, 1, (), np.float32),
    ],
)  # fmt: skip
def test_sampled_actions_are_in_the_space(action: gym.Space):
    spaces = of(VECTOR, action)
    stored = spaces.sample_actions(50, np.random.default_rng(0))
    assert stored.shape == (50, *spaces.action_column.shape)
    assert stored.dtype == spaces.action_column.dtype
    assert all(action.contains(taken) for taken in spaces.env_actions(stored))
    assert action.contains(spaces.env_action(stored[0]))


def test_a_box_without_axes_gets_arrays_and_a_discrete_space_numbers():
    box, discrete = of(VECTOR, gym.Box(-1, 1, (), np.float64)), of(VECTOR, gym.Discrete(3))
    taken = [box.env_action(np.array([0.5], np.float32)), *box.each_action(np.array([[0.5], [2.0]], np.float32))]
    assert [(type(action), action.shape, action.dtype) for action in taken] == [(np.ndarray, (), np.float64)] * 3
    assert [float(action) for action in taken] == [0.5, 0.5, 1.0]
    assert [type(action) for action in discrete.each_action(np.array([0, 2]))] == [np.int64] * 2


def test_env_actions_never_share_memory_with_what_is_stored():
    for action in (gym.Discrete(3), gym.MultiDiscrete([2, 3]), gym.Box(-np.inf, np.inf, (2,))):
        spaces = of(VECTOR, action)
        stored = spaces.sample_actions(4, np.random.default_rng(0))
        assert not np.shares_memory(spaces.env_actions(stored), stored)


def test_json_round_trip_with_infinite_bounds():
    spaces = of(
        gym.Dict({"a": gym.Box(-np.inf, np.inf, (2,)), "b": gym.Tuple((gym.Discrete(3, start=2), gym.MultiBinary(2)))}),
        gym.Box(np.array([-np.inf, 0], np.float32), np.array([0.1, np.inf], np.float32)),
    )
    back = msgspec.json.decode(msgspec.json.encode(spaces), type=Spaces)
    assert back == spaces
    assert back.action.bounds[1].tolist() == spaces.action.bounds[1].tolist()
    assert back.action.bounds[0].tolist() == [-np.inf, 0]


@given(
    nvec=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float64", "uint8"]),
    shape=st.lists(st.integers(1, 3), max_size=3),
)
def test_any_space_round_trips_and_encodes_alike(nvec: list[int], dtype: str, shape: list[int]):
    low = 0 if dtype == "uint8" else -np.inf
    observation = gym.Dict({"m": gym.MultiDiscrete(nvec), "b": gym.Box(low, 255, tuple(shape), np.dtype(dtype).type)})
    spaces = of(observation, gym.MultiDiscrete(nvec))
    back = msgspec.json.decode(msgspec.json.encode(spaces), type=Spaces)
    assert back == spaces
    leaves = spaces.flatten_obs(observation.sample())
    assert leaves.keys() == spaces.obs_columns.keys()
    assert back.encode(leaves).tobytes() == spaces.encode(leaves).tobytes()
    assert spaces.encode(leaves).shape == (spaces.features,)


@pytest.mark.parametrize(
    "data",
    [
        b'{"name": "obs", "kind": "box", "dtype": "O"}',
        b'{"name": "obs", "kind": "box", "dtype": "float32", "shape": [-1]}',
        b'{"name": "obs", "kind": "box", "dtype": "float32", "extra": 1}',
        b'{"name": "obs", "kind": "picture", "dtype": "float32"}',
        b'{"name": "obs", "kind": "discrete", "dtype": "int64", "nvec": [2], "start": []}',
    ],
)
def test_bad_json_is_refused(data: bytes):
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data, type=Leaf)


def test_flatten_obs_takes_batches_and_names_what_is_missing():
    spaces = of(gym.Dict({"a": VECTOR, "b": gym.Discrete(2)}))
    leaves = spaces.flatten_obs({"a": np.zeros((4, 3)), "b": [0, 1, 1, 0]})
    assert leaves["obs.a"].dtype == np.float32
    assert leaves["obs.b"].shape == (4,)
    with pytest.raises(ValueError, match=r"obs\.b is missing"):
        spaces.flatten_obs({"a": np.zeros(3)})
    with pytest.raises(ValueError, match=r"obs\.a expected .* got \(4,\)"):
        spaces.flatten_obs({"a": np.zeros(4), "b": 0})


@pytest.mark.parametrize("pixel", [0.5, 300, -1, np.nan, 1e30])
def test_flatten_obs_refuses_numbers_that_would_become_others(pixel: float):
    """A camera of bytes, shown as fractions, would be all zeros."""
    spaces = of(gym.Box(0, 255, (2,), np.uint8), gym.Discrete(2))
    assert spaces.flatten_obs([3.0, 255.0])["obs"].tolist() == [3, 255]
    with pytest.raises(ValueError, match=r"obs expected uint8, got .* numbers uint8 does not have"):
        spaces.flatten_obs([3, pixel])


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (gym.Dict({"a": gym.Dict({"t": gym.Text(5)})}), gym.Discrete(2), r"obs\.a\.t: Text"),
        (gym.Tuple((VECTOR, gym.Sequence(VECTOR))), gym.Discrete(2), r"obs\.1: Sequence"),
        (gym.Graph(VECTOR, None), gym.Discrete(2), "Graph"),
        (VECTOR, gym.Dict({"a": gym.Discrete(2)}), "action space Dict"),
        (VECTOR, gym.Tuple((gym.Discrete(2),)), "action space Tuple"),
        (VECTOR, gym.Box(0, 3, (1,), np.int32), "action space Box"),
        (gym.Dict({"a.b": VECTOR, "a": gym.Dict({"b": VECTOR})}), gym.Discrete(2), r"both called obs\.a\.b"),
        (gym.Dict({}), gym.Discrete(2), "is empty"),
        (gym.Dict({"a": gym.Dict({}), "b": VECTOR}), gym.Discrete(2), r"obs\.a: Dict\(\) is empty\n  leave it out"),
        (gym.Tuple((VECTOR, gym.Dict({"a": gym.Tuple(())}))), gym.Discrete(2), r"obs\.1\.a: Tuple\(\) is empty\n"),
        (gym.Dict({1: VECTOR}), gym.Discrete(2), "key 1"),
    ],
)
def test_unsupported_spaces_are_named(observation: gym.Space, action: gym.Space, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        spaces_of(observation, action)
    assert str(caught.value).count("\n") < 3


def test_a_stack_is_part_of_the_spaces():
    plain = of(gym.Dict({"a": gym.Box(0, 255, (4, 2), np.uint8), "b": gym.MultiDiscrete([2, 3, 4, 5])}))
    stacked = plain.with_stack(4)
    assert (plain.stack, stacked.stack) == (1, 4)
    assert msgspec.json.decode(msgspec.json.encode(stacked), type=Spaces) == stacked
    assert [leaf.shape for leaf in stacked.single.observation] == [(2,), ()]
    assert stacked.with_stack(4) is stacked
    with pytest.raises(ValueError, match="does not begin with the stack of 3"):
        plain.with_stack(3)


def test_spaces_need_no_gymnasium():
    code = "import sys, aiorl.envs.spaces; print([m for m in ('gymnasium', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
