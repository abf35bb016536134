"""A policy by itself: found, loaded without its environment, and refused if it is not what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from checkpoints import edit_manifest
from experience import context, spaces
from toys import Toy

import aiorl
from aiorl import checkpoint
from aiorl.algos.base import Algorithm, Weights
from aiorl.checkpoint import Manifest
from aiorl.cli import main
from aiorl.config import Config
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import resolve_env
from aiorl.errors import CheckpointError
from aiorl.policy import LoadedPolicy, find, load

SPACES = spaces()


def save(path: Path, algo: Any, version: int = 1, space: Spaces = SPACES, weights: Weights | None = None) -> Weights:
    """A checkpoint with the weights of a fresh learner."""
    made = dict(weights or algo.learner(space, context(seed=version)).weights())
    manifest = Manifest(
        schema=checkpoint.SCHEMA, kind="best", version=version, env_steps=32, libraries={},
        config=Config(env="CartPole-v1", algo=algo).resolve().to_dict(), spaces=space, notes={"mark": version},
    )  # fmt: skip
    checkpoint.save(path, manifest, {"policy": made})
    return made


def expected_actions(algo: Algorithm, weights: Weights, obs: Any) -> list[Any]:
    policy = algo.policy(SPACES)
    policy.begin(weights, 0, None, 0)
    return policy.act({"obs": obs}, np.ones(len(obs), bool))[0].tolist()


@pytest.mark.parametrize(
    "algo",
    [
        aiorl.PPO(hidden=(8,)), aiorl.PPO(hidden=(8,), normalise_obs=True), aiorl.DQN(hidden=(8,)),
        aiorl.QRDQN(hidden=(8,), normalise_obs=True), aiorl.DQN(hidden=(8,), average=0.9),
    ],
)  # fmt: skip
def test_a_loaded_policy_acts_as_the_learner_would(tmp_path: Path, algo: Any) -> None:
    weights = save(tmp_path / "best", algo)
    policy = load(tmp_path)
    assert policy.algorithm == algo
    assert (policy.version, policy.spaces, policy.notes) == (1, SPACES, {"mark": 1})
    assert policy.config["env"] == "CartPole-v1"
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    expected = expected_actions(algo, weights, obs)
    assert policy.act({"obs": obs}).tolist() == expected
    assert [policy(one) for one in obs] == expected
    assert [policy(one.tolist()) for one in obs] == expected, "any form that the environment may give"


@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (2, 5, 3), (3, 3)])
def test_a_batch_is_not_taken_for_one_observation(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path / "best", aiorl.DQN(hidden=(8,)))
    policy = load(tmp_path)
    with pytest.raises(ValueError, match=r"obs has shape \(.*, 3\), expected \(3,\)\n  .*policy\.act"):
        policy(np.ones(shape, np.float32))
    assert policy.act({"obs": np.ones((5, 3), np.float32)}).shape == (5,)
    with pytest.raises(ValueError, match=r"obs has shape \(5, 1, 3\), expected \(5, 3\)"):
        policy.act({"obs": np.ones((5, 1, 3), np.float32)})


@pytest.mark.parametrize("obs", [{"a": 1}, {}, None, "abc", [{}, {}, {}], [[1], [1, 2], 3], [2**2000] * 3, object()])
def test_what_is_no_observation_is_a_value_error(tmp_path: Path, obs: Any) -> None:
    save(tmp_path / "best", aiorl.DQN(hidden=(8,)))
    policy = load(tmp_path)
    with pytest.raises(ValueError):
        policy(obs)
    assert policy([0, 0, 0]) in (0, 1)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([[0, 0, 0]], r"expected a dict of batches .*, got a list"),
        (np.zeros((1, 3), np.float32), r"expected a dict of batches .*, got a ndarray"),
        (None, "got a NoneType"),
        ({}, "obs is missing"),
        ({"observation": np.zeros((1, 3))}, "obs is missing"),
        ({"obs": 3.0}, r"obs has shape \(\), expected \(1, 3\)"),
        ({"obs": None}, r"obs has shape \(\), expected \(1, 3\)"),
        ({"obs": np.zeros(3)}, r"obs has shape \(3,\), expected \(3, 3\)"),
    ],
)
def test_what_is_no_batch_is_a_value_error(tmp_path: Path, batch: Any, words: str) -> None:
    save(tmp_path / "best", aiorl.DQN(hidden=(8,)))
    with pytest.raises(ValueError, match=words):
        load(tmp_path).act(batch)


def test_a_batch_is_not_taken_for_one_frame(tmp_path: Path) -> None:
    stacked = spaces(observation=gymnasium.spaces.Box(0, 255, (4, 6, 6), np.uint8)).with_stack(4)
    save(tmp_path / "best", aiorl.DQN(hidden=(8,)), space=stacked)
    policy = load(tmp_path)
    assert policy(np.ones((6, 6), np.uint8)) == policy(np.ones((4, 6, 6), np.uint8)), "a frame, or all four"
    for shape in ((3, 6, 6), (5, 4, 6, 6)):
        with pytest.raises(ValueError, match=r"expected \(6, 6\)\n  .*policy\.act"):
            policy(np.ones(shape, np.uint8))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (gymnasium.spaces.Discrete(3, start=5), lambda a: int(a) in (5, 6, 7)),
        (gymnasium.spaces.Box(-0.001, 0.001, (2, 2), np.float32), lambda a: a.shape == (2, 2) and np.abs(a).max() <= 0.001),
        (gymnasium.spaces.MultiDiscrete([2, 3]), lambda a: a.shape == (2,) and a.dtype == np.int64),
    ],
)
def test_actions_have_the_form_that_the_environment_takes(tmp_path: Path, action: Any, expected: Any) -> None:
    space = spaces(action)
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)), space=space)
    taken = load(tmp_path)(np.ones(3, np.float32))
    assert expected(taken)
    assert action.contains(taken)


def test_observations_with_parts(tmp_path: Path) -> None:
    nested = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(3), "b": gymnasium.spaces.Box(-1, 1, (2,), np.float32)})
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)), space=spaces(observation=nested))
    policy = load(tmp_path)
    assert policy({"a": 2, "b": [0.1, 0.2]}) in (0, 1)
    with pytest.raises(ValueError, match=r"obs\.b"):
        policy({"a": 2})


def test_the_policy_owns_its_weights() -> None:
    algo = Toy()
    weights = {"w": np.ones((3, 2), np.float32)}
    policy = LoadedPolicy(algo, SPACES, weights, 0)
    weights["w"][:, 1] = 100
    assert policy([1, 1, 1]) == 0


class Memory(Toy, frozen=True, kw_only=True):
    """Acts by how often it was asked since the episode began."""

    def policy(self, spaces: Spaces) -> Any:
        class Counts:
            def begin(self, *args: Any) -> None:
                self.count = 0

            def act(self, obs: Any, first: Any) -> Any:
                self.count = 0 if first[0] else self.count + 1
                return np.array([self.count % 2]), {}

        return Counts()


def test_a_policy_with_memory_begins_anew_at_each_reset(tmp_path: Path) -> None:
    policy = LoadedPolicy(Memory(), SPACES, {}, 0)
    for _ in range(2):
        assert [policy([0, 0, 0]) for _ in range(4)] == [0, 1, 0, 1]
        policy([0, 0, 0])
        policy.reset()


def test_loading_needs_neither_torch_nor_gymnasium(tmp_path: Path) -> None:
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)))
    program = (
        f"import sys, aiorl; p = aiorl.load({str(tmp_path)!r}); print(int(p([0.0, 0.0, 0.0])));"
        "assert not {'torch', 'gymnasium'} & set(sys.modules), 'imported'"
    )
    root = Path(aiorl.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("0", "1")


# -- finding -----------------------------------------------------------------------------------------------------------


def test_which_checkpoint_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find(run)
    for version in (7, 12):
        save(run / "checkpoints" / f"{version:08d}", Toy(), version)
    assert load(run, algo=Toy).version == 12
    with pytest.raises(CheckpointError, match="holds no best checkpoint yet"):
        load(run, which="best", algo=Toy)
    save(run / "final", Toy(), 20)
    assert load(run, algo=Toy).version == 20
    save(run / "best", Toy(), 15)
    assert load(run, algo=Toy).version == 15
    assert load(run, which="final", algo=Toy).version == 20
    assert load(run, which="latest", algo=Toy).version == 12
    assert load(run / "checkpoints" / "00000007", algo=Toy).version == 7
    assert load(str(run / "best"), which="final", algo=Toy).version == 15, "a checkpoint is itself"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no run or checkpoint at .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="there is no run or checkpoint"):
        load(tmp_path / "file")


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_a_file_does_not_decide_what_is_imported(tmp_path: Path) -> None:
    save(tmp_path / "best", Toy())
    with pytest.raises(CheckpointError, match=r"trained with toys:Toy, .*\n.*pass algo=YourClass"):
        load(tmp_path)
    assert load(tmp_path, algo=Toy).algorithm == Toy()
    edit_manifest(tmp_path / "best", lambda m: m["config"].update(algo="antigravity:Algo"))
    with pytest.raises(CheckpointError, match="antigravity"):
        load(tmp_path)
    assert "antigravity" not in sys.modules


class Mine(aiorl.TD3, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An algorithm of one's own."""

    name: ClassVar[str] = "mine"


def save_selfplay(path: Path, algo: Any) -> None:
    save(path, aiorl.SelfPlay.of(algo), space=probe(resolve_env("games:race", in_process=True)).spaces)
    edit_manifest(path, lambda m: m["config"].update(env="games:race"))


@pytest.mark.parametrize(
    "inner",
    [
        {"algo": "antigravity:Algo"},
        {"algo": "aiorl.algos.selfplay:SelfPlay", "inner": {"algo": "antigravity:Algo"}},
        {"algo": "td3", "inner": {"algo": "antigravity:Algo"}},
        {"algo": ["antigravity:Algo"]},
    ],
)
def test_nor_does_it_within_self_play(tmp_path: Path, inner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_selfplay(tmp_path / "best", aiorl.TD3(hidden=(4,)))
    assert load(tmp_path).algorithm.name == "selfplay"
    edit_manifest(tmp_path / "best", lambda m: m["config"].update(selfplay=inner))
    refused = r"trained with .*\n  .*pass algo=YourClass|trained with selfplay, not with"
    for algo in (None, aiorl.SelfPlay, aiorl.TD3, Mine):
        with pytest.raises(CheckpointError, match=refused):
            load(tmp_path, algo=algo)
    for words in (["eval"], ["play"], ["play", "--versus", "weak"]):
        assert main([*words, str(tmp_path), "--env", "games:race"]) == 2
        assert "a file must not decide what is imported: say so with --algo" in capsys.readouterr().err
    assert "antigravity" not in sys.modules


def test_one_of_your_own_within_self_play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The class that learns is what has to be named."""
    save_selfplay(tmp_path / "best", Mine(hidden=(4,)))
    for algo in (None, aiorl.SelfPlay):
        with pytest.raises(CheckpointError, match=r"trained with test_policy:Mine, .*\n.*pass algo=YourClass"):
            load(tmp_path, algo=algo)
    loaded: Any = load(tmp_path, algo=Mine).algorithm
    assert isinstance(loaded, aiorl.SelfPlay)
    assert loaded.algorithm == Mine(hidden=(4,))
    words = ["eval", str(tmp_path), "--episodes", "1", "--env", "games:race"]
    assert main(words) == 2
    assert "say so with --algo test_policy:Mine" in capsys.readouterr().err
    assert main([*words, "--algo", "test_policy:Mine"]) == 0


@pytest.mark.parametrize("env", ["GymV26Environment-v0", "GymV21Environment-v0"])
def test_an_environment_that_imports_what_its_arguments_name(
    tmp_path: Path, env: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)))
    edit_manifest(tmp_path / "best", lambda m: m["config"].update(env=env, env_kwargs={"env_id": "antigravity:Env"}))
    assert main(["eval", str(tmp_path)]) == 2
    assert f"say so with --env {env}" in capsys.readouterr().err


def test_another_algorithm_than_it_was_trained_with(tmp_path: Path) -> None:
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)))
    with pytest.raises(CheckpointError, match="trained with ppo, not with dqn"):
        load(tmp_path, algo=aiorl.DQN)
    with pytest.raises(CheckpointError, match="algo must be a configuration class"):
        load(tmp_path, algo=Toy())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(algo="ppq"), "unknown algorithm 'ppq' — did you mean ppo"),
        (lambda m: m["config"].update(algo=""), "unknown algorithm ''"),
        (lambda m: m["config"].update(algo={"ppo": 1}), "not part of aiorl"),
        (lambda m: m["config"].pop("algo"), "unknown algorithm"),
        (lambda m: m["config"].pop("ppo"), "trained with ppo, not with ppo"),
        (lambda m: m["config"].update(ppo=3), "ppo = 3: expected a table"),
        (lambda m: m["config"]["ppo"].update(hooks=3), "unknown key `ppo.hooks`"),
        (lambda m: m["config"]["ppo"].update(gamma="x"), "ppo.gamma = 'x': expected float"),
        (lambda m: m["config"]["ppo"].update(normalise_obs=True), "does not fit its own description: KeyError.*obs_mean"),
        (lambda m: m["spaces"]["observation"][0].update(shape=[4]), "does not fit its own description"),
        (lambda m: m["spaces"]["observation"][0].update(shape=[10**15]), "does not fit its own description"),
        (lambda m: m["spaces"].update(observation=[]), "does not fit its own description"),
        (lambda m: m["spaces"]["action"].update(kind="box", nvec=[], start=[]), "does not fit its own description"),
    ],
)  # fmt: skip
def test_a_description_that_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)))
    edit_manifest(tmp_path / "best", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actor.0.weight": None}, "KeyError.*actor"),
        ({"actor.0.bias": None}, "KeyError.*actor.0.bias"),
        ({"actor.0.weight": np.zeros((4, 9), np.float32)}, "ValueError"),
        ({"actor.0.weight": np.zeros(3, np.float32)}, "does not fit"),
        ({"actor.0.weight": "text"}, "does not fit"),
        ({"actor.1.bias": np.zeros(7, np.float32)}, "ValueError"),
    ],
    ids=str,
)
def test_weights_that_are_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    weights = dict(aiorl.PPO(hidden=(4,)).learner(SPACES, context()).weights()) | change
    save(tmp_path / "best", aiorl.PPO(hidden=(4,)), weights={k: v for k, v in weights.items() if v is not None})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
