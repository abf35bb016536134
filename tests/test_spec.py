"""Finding environments: what is refused, how they travel to workers, and what a look at one tells."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.vector import SyncVectorEnv

from aiorl.config import Config
from aiorl.envs import spec as spec_module
from aiorl.envs.make import make_env, make_vector, probe
from aiorl.envs.spec import EnvSpec, resolve_env
from aiorl.errors import ConfigError, EnvError
from aiorl.preflight import check
from aiorl.testing import check_env
from tests.envs_for_tests import Maker, Walk, WalkVector, sync_vector


def needs(size: int) -> Walk:
    return Walk(limit=size)


def takes_all(**kwargs: Any) -> Walk:
    return Walk(**kwargs)


def refused(env: Any, match: str, in_process: bool = False, **kwargs: Any) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        resolve_env(env, kwargs, in_process=in_process)
    assert str(caught.value).count("\n") < 3


@pytest.mark.parametrize(
    ("env", "match"),
    [
        ("CartPol-v1", r"unknown environment 'CartPol-v1' — did you mean CartPole-v1\?"),
        ("cartpole-v1", r"did you mean CartPole-v1\?"),
        ("CartPole", r"CartPole has no version — did you mean CartPole-v1\?"),
        ("CartPole-v7", r"no version 7 of CartPole — did you mean CartPole-v1\?\n.*CartPole-v0, CartPole-v1"),
        ("LunarLander-v2", r"did you mean LunarLander-v3\?"),
        ("xyzzy", r"unknown environment 'xyzzy'\n.*module:callable"),
        ("", "unknown environment ''"),
        ("no_such_module:Env", r"there is no module 'no_such_module'"),
        ("tests.no_such_module:Env", r"there is no module 'tests.no_such_module'"),
        ("tests.envs_for_tests:Wlak", r"has no 'Wlak' — did you mean tests.envs_for_tests:Walk\?"),
        ("tests.envs_for_tests:_ever", "is a count, not callable"),
        ("tests/envs.py:Walk", "is not the name of a module"),
        ("gymnasium:CartPol-v1", r"did you mean gymnasium:CartPole-v1\?"),
        (":Walk", "is not the name of a module"),
        (3, r"env = 3 is a int"),
        (Walk(), r"is a Walk\n"),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_hint(env: Any, match: str):
    refused(env, match)


@pytest.mark.parametrize(
    ("env", "kwargs", "match"),
    [
        (Walk, {"limt": 3}, r"takes no argument 'limt' — did you mean 'limit'\?"),
        ("CartPole-v1", {"gravity": 3}, r"CartPole-v1 takes no argument 'gravity'"),
        (needs, {}, r"needs the argument 'size'"),
    ],
)
def test_wrong_arguments_are_refused(env: Any, kwargs: dict[str, Any], match: str):
    refused(env, match, **kwargs)


def test_right_arguments_are_passed_on():
    assert make_env(resolve_env(Walk, {"limit": 3}, in_process=False)).unwrapped.limit == 3  # type: ignore[attr-defined]
    assert make_env(resolve_env(takes_all, {"limit": 4}, in_process=False)).unwrapped.limit == 4  # type: ignore[attr-defined]
    spec = resolve_env("CartPole-v1", {"max_episode_steps": 9}, in_process=False)
    assert make_env(spec).spec.max_episode_steps == 9  # type: ignore[union-attr]
    assert make_env(resolve_env(Walk, in_process=False).with_kwargs(limit=5)).unwrapped.limit == 5  # type: ignore[attr-defined]


def test_callables_that_workers_cannot_import_are_refused():
    def local() -> Walk:
        return Walk()

    refused(
        lambda limit=7: Walk(limit=limit), r"workers cannot import a lambda\n.*'module:callable', or set workers = 0"
    )
    refused(local, r"workers cannot import local, which is defined inside a function")
    refused(Maker(), r"workers cannot import")
    refused(functools.partial(lambda limit: Walk(limit=limit), limit=3), r"a lambda")
    for env in (lambda limit=7: Walk(limit=limit), local, Maker()):
        assert isinstance(make_env(resolve_env(env, in_process=True)), Walk)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (Walk, "tests.envs_for_tests:Walk"),
        ("tests.envs_for_tests:Walk", "tests.envs_for_tests:Walk"),
        (Maker.make, "tests.envs_for_tests:Maker.make"),
        ("tests.envs_for_tests:Maker.make", "tests.envs_for_tests:Maker.make"),
        ("CartPole-v1", "CartPole-v1"),
        ("gymnasium.envs:CartPole-v1", "gymnasium.envs:CartPole-v1"),
        (functools.partial(Walk, limit=3), "tests.envs_for_tests:Walk"),
    ],
)
def test_names_and_the_way_to_a_worker(env: Any, name: str):
    spec = resolve_env(env, in_process=False)
    assert spec.name == name
    made = make_env(pickle.loads(pickle.dumps(spec)))
    assert isinstance(made, gymnasium.Env)
    if isinstance(env, functools.partial):
        assert made.unwrapped.limit == 3  # type: ignore[attr-defined]


def test_an_id_registered_here_travels_with_its_registration():
    gymnasium.register("aiorl-tests/Walk-v3", entry_point="tests.envs_for_tests:Walk", max_episode_steps=4)
    try:
        data = pickle.dumps(resolve_env("aiorl-tests/Walk-v3", {"limit": 6}, in_process=False))
    finally:
        del gymnasium.registry["aiorl-tests/Walk-v3"]
    env = make_env(pickle.loads(data))
    assert env.unwrapped.limit == 6  # type: ignore[attr-defined]
    assert env.spec is not None
    assert env.spec.max_episode_steps == 4


def test_an_id_registered_with_a_lambda_is_refused_for_workers():
    gymnasium.register("aiorl-tests/Lambda-v0", entry_point=lambda limit=7: Walk(limit=limit))
    try:
        refused("aiorl-tests/Lambda-v0", r"workers cannot import aiorl-tests/Lambda-v0, registered as a lambda")
        assert make_env(resolve_env("aiorl-tests/Lambda-v0", in_process=True)).unwrapped.limit == 7  # type: ignore[attr-defined]
    finally:
        del gymnasium.registry["aiorl-tests/Lambda-v0"]


PROGRAM = """
    from aiorl.envs.spec import resolve_env
    from aiorl.errors import ConfigError
    from tests.envs_for_tests import Walk

    class Mine(Walk): pass

    def main():
        try:
            print(resolve_env(Mine, in_process=False).name)
        except ConfigError as error:
            print(error)

    {call}
"""
GUARDED = 'if __name__ == "__main__":\n        main()'


@pytest.mark.parametrize(("call", "said"), [("main()", "they would run it again"), (GUARDED, "__main__:Mine")])
def test_an_environment_in_the_main_program_needs_a_guard(tmp_path: Path, call: str, said: str):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM.format(call=call)))
    assert said in run(str(path))


def test_an_environment_in_a_module_run_with_m_is_named_by_its_module(tmp_path: Path):
    (tmp_path / "mine.py").write_text(textwrap.dedent(PROGRAM.format(call=GUARDED)))
    assert run("-m", "mine", cwd=tmp_path) == "mine:Mine"


def test_an_environment_without_a_file_is_refused():
    assert "they would run it again" in run("-c", textwrap.dedent(PROGRAM.format(call=GUARDED)))


def run(*args: str, cwd: Path | None = None) -> str:
    import os

    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=60, cwd=cwd or root,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in ("Box2D", "mujoco", "ale_py") else real(name, package)

    monkeypatch.setattr(spec_module.importlib.util, "find_spec", find_spec)
    refused("LunarLander-v3", r'LunarLander-v3 needs Box2D, which is not installed\n  pip install "aiorl\[box2d\]"')
    refused("Hopper-v5", r'pip install "aiorl\[mujoco\]"')
    refused("ALE/Pong-v5", r'pip install "aiorl\[atari\]" \(ale-py is GPL-2\.0\)')


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_box2d.py").write_text(
        "try:\n    import Box2D_x\nexcept ImportError as e:\n    raise OSError('no') from e"
    )
    (tmp_path / "divides.py").write_text("1 / 0")
    (tmp_path / "exits.py").write_text("raise SystemExit(2)")
    (tmp_path / "inner.py").write_text("import not_there_at_all")
    refused("divides:Env", "importing divides failed\n  ZeroDivisionError: division by zero")
    refused("exits:Env", "importing exits failed\n  SystemExit: 2")
    refused("inner:Env", "importing inner failed\n  ModuleNotFoundError: No module named 'not_there_at_all'")
    refused("needs_box2d:Env", "OSError: no")


# --- making and probing -----------------------------------------------------------------------------------------------


def test_a_probe_of_a_single_environment():
    look = probe(resolve_env("Acrobot-v1", in_process=True))
    assert (look.native, look.exact, look.state_bytes) == (False, True, 0)
    assert (look.reward_threshold, look.max_episode_steps) == (-100.0, 500)
    assert look.spaces.features == 6
    assert look.spaces.action.nvec == (3,)


def test_a_callable_may_make_a_vector():
    for env in (WalkVector, sync_vector, "tests.envs_for_tests:WalkVector"):
        look = probe(resolve_env(env, in_process=True), 4)
        assert (look.native, look.spec.vector_only, look.autoreset_mode) == (True, True, "NEXT_STEP")
        assert make_vector(look.spec, 6).num_envs == 6
    fixed = probe(resolve_env(lambda: WalkVector(4), in_process=True), 4)
    assert fixed.spec.vector_only


def test_what_an_environment_does_wrong_when_it_is_made_is_a_configuration_error():
    def fails() -> Walk:
        raise RuntimeError("no display")

    with pytest.raises(ConfigError, match="making the environment raised RuntimeError: no display") as caught:
        probe(resolve_env(fails, in_process=True))
    assert "in fails" in caught.value.detail
    with pytest.raises(ConfigError, match=r"made a int, expected a gymnasium\.Env"):
        probe(resolve_env(lambda: 3, in_process=True))
    with pytest.raises(EnvError, match="no display"):
        make_env(resolve_env(fails, in_process=True))


def test_an_unsupported_space_names_the_environment():
    class Talks(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Dict({"says": gymnasium.spaces.Text(5)})

    with pytest.raises(ConfigError, match=r"Talks: observation space obs\.says: Text"):
        probe(resolve_env(Talks, in_process=True))

    class Blind(Walk):
        def __init__(self) -> None:
            super().__init__()
            del self.observation_space

    with pytest.raises(ConfigError, match=r"Blind has no observation_space"):
        probe(resolve_env(Blind, in_process=True))


def test_the_environment_is_closed_after_the_probe():
    closed: list[int] = []

    class Closes(Walk):
        def close(self) -> None:
            closed.append(1)

    probe(resolve_env(Closes, in_process=True))
    assert closed == [1]


@pytest.mark.parametrize("env", ["single", "vector"])
def test_an_error_of_close_is_named(env: str):
    class Sticky(Walk):
        def close(self) -> None:
            raise OSError("the door is stuck")

    class StickyVector(SyncVectorEnv):
        def __init__(self, num_envs: int) -> None:
            super().__init__([Walk] * num_envs)

        def close(self, **_: Any) -> None:
            raise OSError("the door is stuck")

    made = Sticky if env == "single" else StickyVector
    with pytest.raises(ConfigError, match=rf"{made.__name__}: closing it raised OSError: the door is stuck") as caught:
        probe(resolve_env(made, in_process=True), 2)
    assert "in close" in caught.value.detail, "no traceback"


def normalised(name: str = "NormalizeObservation", frozen: bool = False) -> Any:
    env: Any = getattr(wrappers, name)(gymnasium.make("Pendulum-v1"))
    env.update_running_mean = not frozen
    return wrappers.TransformReward(env, float)


def normalised_vector(num_envs: int) -> Any:
    return wrappers.vector.NormalizeObservation(WalkVector(num_envs))


def vector_of_normalised(num_envs: int) -> Any:
    return SyncVectorEnv([normalised] * num_envs)


@pytest.mark.parametrize(
    ("env", "kwargs", "instead"),
    [
        (normalised, {}, "NormalizeObservation .* use normalise_obs"),
        (normalised, {"name": "NormalizeReward"}, "NormalizeReward .* use normalise_rewards or reward_scale"),
        (normalised_vector, {}, "NormalizeObservation .* use normalise_obs"),
        (vector_of_normalised, {}, "NormalizeObservation .* use normalise_obs"),
    ],
)
def test_statistics_that_a_wrapper_keeps_are_told(env: Any, kwargs: dict[str, Any], instead: str):
    """Evaluations have others, and an open episode is not brought back by its seed and actions."""
    look = probe(resolve_env(env, kwargs, in_process=True), 2)
    (told,) = look.warnings
    assert re.search(instead, told)
    assert not look.exact
    assert look.why_inexact


def test_statistics_that_stand_still_are_as_good_as_none():
    look = probe(resolve_env(normalised, {"frozen": True}, in_process=True))
    assert (look.warnings, look.exact) == ((), True)
    assert probe(resolve_env("Pendulum-v1", in_process=True)).warnings == ()


def test_wrappers_that_keep_statistics_are_not_taken_for_a_faulty_generator():
    told = {f.code: f.message for f in check_env("tests.test_spec:normalised") if f.severity != "info"}
    assert told.keys() - {"slow-start"} == {"doubtful", "inexact"}
    assert "use normalise_obs" in told["doubtful"]
    assert "the statistics of NormalizeObservation last over episodes" in told["inexact"]


def test_a_run_begins_with_what_is_doubtful():
    checked = check(Config(env=normalised, algo="sac", workers=0), write=False)
    assert set(checked.probe.warnings) < set(checked.warnings), "and that it may not be resumed exactly"


def test_gymnasiums_checker_is_off():
    env = make_env(resolve_env("CartPole-v1", in_process=True))
    assert "PassiveEnvChecker" not in str(env)


def test_resolving_makes_nothing():
    class Loud(Walk):
        def __init__(self) -> None:
            raise AssertionError("made")

    resolve_env(Loud, in_process=True)


def test_a_spec_is_plain():
    assert EnvSpec("a") == EnvSpec("a")
    assert np.isscalar(EnvSpec("a").name)


# -- what a fork server may import -------------------------------------------------------------------------------------

LOADED = """
import importlib, os, sys
import aiorl.workers.preload
for module in sys.argv[1:]:
    importlib.import_module(module)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(
    ("env", "needs", "module"),
    [
        ("CartPole-v1", "numpy", "gymnasium.envs.classic_control.cartpole"),
        ("LunarLander-v3", "Box2D", "gymnasium.envs.box2d.lunar_lander"),
        ("ALE/Pong-v5", "ale_py", "cv2"),
        ("MinAtar/Breakout-v1", "minatar", "minatar.gym"),
        ("MiniGrid-Empty-8x8-v0", "minigrid", "minigrid.envs"),
        ("hockey", "Box2D", "aiorl.envs.hockey.env"),
    ],
)
def test_what_workers_share_starts_no_thread_and_prints_nothing(env: str, needs: str, module: str):
    """A thread would not be there after the fork, and what it had locked would stay locked."""
    pytest.importorskip(needs)
    modules = resolve_env(env, in_process=False).modules
    assert module in modules
    done = subprocess.run([sys.executable, "-c", LOADED, *modules], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_mujoco_is_imported_by_each_worker():
    """It may open what it draws with as it is imported."""
    pytest.importorskip("mujoco")
    assert resolve_env("HalfCheetah-v5", in_process=False).modules == ()


def test_an_environment_of_the_users_own_is_imported_by_each_worker():
    assert resolve_env("tests.envs_for_tests:Walk", in_process=False).modules == ()
    assert resolve_env(Walk, in_process=False).modules == ()
    for entry in ("tests.envs_for_tests:Walk", "minigrid_of_mine:Walk"):
        registered = EnvSpec("tests/Shared-v0", registration=gymnasium.envs.registration.EnvSpec("Shared-v0", entry))
        assert registered.modules == ()
