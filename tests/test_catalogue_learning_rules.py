"""The catalogue of faults, what is impossible or refused: the property that makes it so, and settings that cannot be."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import msgspec
import numpy as np
import pytest
from experience import BOX, Stream, context, spaces
from faulty_learner import Small
from test_static_guards import PACKAGE, uses_in

import aiorl
from aiorl import offload, preflight
from aiorl.alarms import Alarms
from aiorl.algos.dqn import DQNPolicy, epsilon_at
from aiorl.buffers.replay import Replay
from aiorl.cli import main
from aiorl.errors import ConfigError, InvariantError
from aiorl.testing import check_algorithm, check_env, errors, replay_checks
from aiorl.testing.bench import record
from aiorl.testing.examine_algorithm import CHAIN, check_fit
from aiorl.testing.findings import Finding

if TYPE_CHECKING:
    import torch


def config(tmp_path: Path, algo: Any, **changes: Any) -> aiorl.Config:
    fields: dict[str, Any] = {
        "env": "CartPole-v1", "algo": algo, "envs": 4, "workers": 0, "segment_length": 8, "total_steps": 320,
        "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0, "out": str(tmp_path / "run"),
    }  # fmt: skip
    return aiorl.Config(**fields | changes)


def small_dqn(**changes: Any) -> aiorl.DQN:
    fields: dict[str, Any] = {"hidden": (8,), "warmup": 32, "capacity": 500, "batch_size": 8, "target_every": 10}
    return aiorl.DQN(**fields | changes)


# -- between processes -------------------------------------------------------------------------------------------------

SHARED = ("Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Value", "Array", "Pool", "Manager")


def shared_in(source: str) -> list[str]:
    """What a program shares between processes by way of multiprocessing."""
    names = [use.name for use in uses_in(source)]
    return [n for n in names if n.endswith(".share_memory_") or ("multiprocessing" in n and n.split(".")[-1] in SHARED)]


def test_nothing_locks_counts_or_pools_across_processes() -> None:
    """Workers get permissions to fill memory that is theirs until they say that it is full."""
    assert shared_in("import multiprocessing as mp\nlock, count = mp.Lock(), mp.Value('i', 0)")
    assert shared_in("from torch.multiprocessing import Pool\nmodel.share_memory_()")
    found = {path.name: shared_in(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: uses for name, uses in found.items() if uses} == {}


def shared_locks(source: str) -> list[str]:
    """Locks that a module or a class holds, not an object."""
    tree = ast.parse(source)
    bodies = [tree.body, *(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    statements = [s for body in bodies for s in body if isinstance(s, ast.Assign | ast.AnnAssign) and s.value]
    values = [ast.unparse(s.value) for s in statements if s.value]
    return [value for value in values if "Lock(" in value or "Semaphore(" in value]


def test_no_lock_is_shared_by_all_learners() -> None:
    """No module and no class holds one: two runs have nothing to wait for each other with."""
    assert shared_locks("class Learner:\n    training = threading.Lock()") == ["threading.Lock()"]
    found = {path.name: shared_locks(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    held = {name: locks for name, locks in found.items() if locks}
    assert held == {"offload.py": ["threading.Lock()"]}, "that of torch's number of threads, which is one for all"


def test_the_lock_of_torch_s_number_of_threads_is_held_for_a_moment_only() -> None:
    """Not while anything is computed: it is let go of before whoever asked for threads goes on."""
    import torch

    offload.set_torch_threads(torch.get_num_threads())
    assert not offload._torch_default.locked()
    uses = [path.name for path in PACKAGE.rglob("*.py") if "_torch_default" in path.read_text(encoding="utf-8")]
    assert uses == ["offload.py"]


@pytest.mark.parametrize("algorithm", [aiorl.DQN(), aiorl.SAC(), aiorl.TD3(), aiorl.PPO()])
def test_what_workers_get_of_an_algorithm_is_its_settings(algorithm: Any) -> None:
    sent = bytes(reduction.ForkingPickler.dumps(algorithm))
    assert len(sent) < 4096
    assert b"torch" not in sent


class Locked(Small, frozen=True):
    """Planted: a lock among the settings, for processes that cannot share it."""

    lock: Any = msgspec.field(default_factory=threading.Lock)


def test_a_lock_does_not_get_to_a_worker() -> None:
    (finding,) = errors(check_algorithm(Locked))
    assert (finding.code, "cannot be sent to a worker" in finding.message) == ("importable", True)


async def test_one_thread_has_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who adds is who samples, so there is no size to be read in between; rows arrive whole, after their update's turn."""
    threads: set[str] = set()
    for name in ("add", "sample"):
        method = getattr(Replay, name)

        def watched(self: Replay, *args: Any, method: Any = method, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Replay, name, watched)
    await aiorl.train(config(tmp_path, small_dqn(), workers=1, off_policy_degree=2))
    assert threads == {"aiorl-learner"}


@pytest.mark.parametrize("n_step", [1, 3])
async def test_every_stack_that_is_sampled_in_a_run_was_acted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_step: int
) -> None:
    """Byte for byte, over ends of episodes, ends of rollouts and the end of the ring."""
    acted, sampled = set[bytes](), set[bytes]()
    features, sample = DQNPolicy.features, Replay.sample

    def watched_features(self: Any, obs: Any, first: Any) -> Any:
        acted.update(stack.tobytes() for stack in obs["obs"])
        return features(self, obs, first)

    def watched_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = sample(self, *args, **kwargs)
        sampled.update(stack.tobytes() for stack in batch.obs["obs"])
        return batch

    monkeypatch.setattr(DQNPolicy, "features", watched_features)
    monkeypatch.setattr(Replay, "sample", watched_sample)
    algorithm = small_dqn(n_step=n_step, capacity=100, update_ratio=1.0)
    await aiorl.train(config(tmp_path, algorithm, frame_stack=3, off_policy_degree=0))
    assert len(sampled) > 100
    assert sampled <= acted


def test_a_second_thread_at_the_buffer_is_an_error() -> None:
    """Planted: somebody samples while the learner adds."""
    stream = Stream(spaces(), 2, 8)
    replay = Replay(spaces(), 2, 64)
    replay.add(stream.next())
    caught: list[BaseException] = []

    rollout = stream.next()

    def sample() -> None:
        try:
            replay.sample(np.random.default_rng(0), 4)
        except BaseException as error:
            caught.append(error)

    original = type(rollout).column

    def column(self: Any, name: str) -> Any:
        if not caught:
            thread = threading.Thread(target=sample)
            thread.start()
            thread.join()
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rollout), "column", column)
        replay.add(rollout)
    assert isinstance(caught[0], InvariantError)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_epsilon_is_a_function_of_the_rollout_alone() -> None:
    """The weights of any version explore alike in one rollout: there is nothing that could be stale."""
    algorithm, space = small_dqn(warmup=0, epsilon_fraction=1.0), spaces()
    learner, stream = algorithm.learner(space, context(rollouts=10)), Stream(space, 4, 8, columns=algorithm.columns(space))
    first = {name: np.array(a) for name, a in learner.weights().items()}
    learner.update(stream.next())
    now = learner.weights()
    assert any(not np.array_equal(first[name], now[name]) for name in first)
    obs = {"obs": np.zeros((4, 3), np.float32)}
    for rollout in (0, 3, 9):
        random: list[Any] = []
        for weights in (first, now):
            policy = algorithm.policy(space)
            policy.begin(weights, rollout, np.random.default_rng(7), 50)
            acted = [policy.act(obs, np.zeros(4, bool)) for _ in range(50)]
            random.append(np.array([action != extras["greedy"] for action, extras in acted]))
        expected = epsilon_at(rollout, first["epsilon"])
        for acted in random:
            assert abs(acted.mean() - expected / 2) < 0.12


async def test_epsilon_and_learning_rate_do_not_depend_on_who_acts(tmp_path: Path) -> None:
    """Two workers, two versions late: the schedules are those of the sequential run."""
    seen: list[list[tuple[float, float]]] = []
    for name, changes in {"a": {"off_policy_degree": 0}, "b": {"off_policy_degree": 2, "workers": 2}}.items():
        made = config(tmp_path / name, small_dqn(anneal=True), **changes)
        async with aiorl.Run(made) as run:
            events = [event async for event in run.events(1000)]
        metrics = [e.metrics for e in events if isinstance(e, aiorl.Updated)]
        seen.append([(m["epsilon"], m["learning_rate"]) for m in metrics])
    assert seen[0] == seen[1]
    rates = [rate for _, rate in seen[0]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "warm-up longer than the run": ({"warmup": 400}, {}, "before the first gradient step"),
    "as the run's setting": ({}, {"warmup": 320}, "warmup = 320: the run ends after 320 env steps"),
    "warm-up beyond the buffer": ({"warmup": 200, "capacity": 100}, {}, "raise dqn.capacity to 200 or more"),
    "a rollout beyond the buffer": ({"capacity": 50}, {"segment_length": 16}, "a rollout has 64 env steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_buffer_that_cannot_do_is_refused(name: str, tmp_path: Path) -> None:
    algorithm, changes, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as caught:
        preflight.check(config(tmp_path, small_dqn(**algorithm), **changes), write=False)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "run").exists()


OUT_OF_RANGE = {
    "learning_rate": 0.0, "batch_size": 0, "capacity": 0, "gamma": 1.5, "n_step": 0, "epsilon_end": 1.2,
    "epsilon_fraction": 2.0, "target_tau": 0.0, "target_every": 0, "max_grad_norm": -1.0, "update_ratio": -1.0,
    "average": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_settings_that_cannot_be_are_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"dqn.{field}"):
        config(tmp_path, small_dqn(**{field: OUT_OF_RANGE[field]}))


def test_an_action_space_that_is_not_the_learners_is_refused() -> None:
    (finding,) = check_fit(aiorl.DQN, "Pendulum-v1", {})
    assert (finding.code, "needs a Discrete action space" in finding.message) == ("refused", True)
    assert check_fit(aiorl.DQN(), "CartPole-v1", {}) == []


def test_the_doctor_tries_an_own_algorithm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiorl.testing.machine.check_machine", lambda out: [])
    monkeypatch.setattr("aiorl.testing.examine_env.examine", lambda env, kwargs: [])
    assert main(["doctor", "--algo", "faulty_learner:Twice", "--json", "Pendulum-v1"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = [(f["about"], f["code"], f["catalogue"]) for f in found if f["severity"] == "error"]
    assert errors == [
        ("faulty_learner:Twice in Pendulum-v1", "refused", ["5.1", "5.2", "10.3"]),
        ("faulty_learner:Twice", "target-share", ["0.3", "4.1", "9.4"]),
    ]


def test_a_reset_that_forgets_is_found() -> None:
    """Planted: reset begins an episode and forgets the clock, so that every episode after the first has one step."""

    class Forgets(gymnasium.Env[Any, Any]):  # a local class is looked at in this process, which is quicker
        observation_space = gymnasium.spaces.Box(0, 1e6, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)
        time = 0

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            return np.array([self.time], np.float32), {}

        def step(self, action: Any) -> Any:
            self.time += 1
            return np.array([self.time], np.float32), 1.0, self.time >= 20, False, {}

    assert "not-reproducible" in {f.code for f in check_env(Forgets)}


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_that_explode_are_said_once() -> None:
    alarms = Alarms(spaces())
    segments = Stream(spaces(), 2, 8).next().segments
    fine = {"gradient_steps": 4.0, "q_min": -50.0, "q_max": 90.0, "q_limit": 100.0}

    def told(**changes: float) -> list[str]:
        return alarms.update(3, segments, {**fine, **changes}, changed=True, skipped=None)

    assert told() == []
    (message,) = told(q_min=-1e7)
    assert "the values of update 3 explode: from -1e+07 to 90, rewards allow 100" in message
    assert told(q_max=1e9) == []
    assert told() == []
    assert len(told(q_max=1e9)) == 1


SOUND: dict[str, Any] = {
    "dqn": aiorl.DQN(hidden=(16,)), "dqn of scaled rewards": aiorl.DQN(hidden=(16,), reward_scale=0.25),
    "sac": aiorl.SAC(hidden=(16,), reward_scale=2.0), "td3": aiorl.TD3(hidden=(16,)), "small": Small(),
    "dqn of clipped rewards": aiorl.DQN(hidden=(16,), reward_scale=2.0, reward_clip=1.0),
    "td3 with late targets": aiorl.TD3(hidden=(16,), policy_delay=5_000),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_sound_learners_value_a_steady_reward_rightly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """n-step returns, gamma, truncation, reward scale and target together come to 1 / (1 - gamma)."""
    algorithm = SOUND[name]
    action = "box" if name.startswith(("sac", "td3")) else "discrete"
    monkeypatch.setattr(replay_checks, "OFF", 0.1)
    env = aiorl.envs.spec.EnvSpec(CHAIN, {"action": action}, CHAIN)
    quick = replay_checks.changed(algorithm, update_ratio=0.02, warmup=64, random_steps=64)
    found: list[Finding] = [*replay_checks.value(record(quick, env))]
    assert found == []


def test_gradients_of_several_batches_make_one_step() -> None:
    """Four batches of 8 take the step of one of 32."""
    ends: list[Any] = []
    for settings in ({"batch_size": 32}, {"batch_size": 8, "accumulate": 4}):
        algorithm = small_dqn(warmup=0, **settings)
        learner, stream = algorithm.learner(spaces(), context()), Stream(spaces(), 4, 8, columns=algorithm.columns(spaces()))
        assert learner.update(stream.next())["gradient_steps"] == 8
        ends.append(learner.weights())
    assert max(float(np.abs(ends[0][k] - ends[1][k]).max()) for k in ends[0]) < 1e-4


FETCHES = ("cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")
"""What brings a tensor's numbers from a device."""


def fetched(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], Any] = lambda loss: None
) -> int:
    """How often one update fetches where no tensor says that it is in main memory; `wrong` is done at each step."""
    import torch

    space = spaces(BOX if isinstance(algorithm, aiorl.SAC | aiorl.TD3) else None)
    learner: Any = algorithm.learner(space, context())
    rollout = Stream(space, 4, 8, columns=algorithm.columns(space)).next()
    found: list[str] = []
    step = learner._step

    def and_wrong(*args: Any) -> Any:
        results = step(*args)
        wrong(results["td_error"].sum())
        return results

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        patch.setattr(learner, "_step", and_wrong)
        for name in FETCHES:
            method = getattr(torch.Tensor, name)

            def counted(self: Any, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                found.append(name)
                return method(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        told = learner.update(rollout)
    assert told["gradient_steps"] == 32 * algorithm.update_ratio
    return len(found)


BUSY: dict[str, Any] = {"hidden": (8,), "warmup": 0, "capacity": 500, "batch_size": 8}
FEW, MANY = 0.125, 0.5  # 4 and 16 gradient steps
LEARNERS = {
    "dqn": aiorl.DQN(**BUSY), "qrdqn": aiorl.QRDQN(**BUSY),
    "dueling": aiorl.DQN(**BUSY, dueling=True, target_every=2, average=0.9),
    "sac": aiorl.SAC(**BUSY, random_steps=0), "td3": aiorl.TD3(**BUSY, random_steps=0),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_results_are_fetched_once_an_update_whatever_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device need not wait for each gradient step."""
    few, many = (fetched(replay_checks.changed(LEARNERS[name], update_ratio=r), monkeypatch) for r in (FEW, MANY))
    assert 0 < few == many <= 12


def test_with_priorities_errors_are_fetched_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = aiorl.DQN(**BUSY, priority_exponent=0.6)
    few, many = (fetched(replay_checks.changed(algorithm, update_ratio=r), monkeypatch) for r in (FEW, MANY))
    assert many - few == 2 * (16 - 4), "cpu().numpy()"


WRONG: dict[str, Callable[[torch.Tensor], Any]] = {
    "cpu": lambda loss: loss.cpu(), "item": lambda loss: loss.item(), "tolist": lambda loss: loss.tolist(),
    "float": float, "compared": lambda loss: bool(loss > 0),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_fetch_in_each_gradient_step_is_counted(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (fetched(aiorl.DQN(**BUSY, update_ratio=r), monkeypatch, WRONG[how]) for r in (FEW, MANY))
    assert many - few >= 16 - 4
