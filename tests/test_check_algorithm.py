"""`check_algorithm` finds each planted mistake, and nothing in sound algorithms."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from toys import Toy

import aiorl
from aiorl.algos.base import LearnerContext, Weights
from aiorl.buffers import replay
from aiorl.buffers.priorities import SumTree
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import ConfigError
from aiorl.segments import Array, Column, Rollout
from aiorl.testing import Finding, check_algorithm, errors, learner_checks, task_checks
from aiorl.testing.bench import record
from aiorl.testing.chain import Chain, Place, Signs, is_high
from aiorl.testing.examine_algorithm import CHAIN
from examples.custom_algorithm import Reinforce
from examples.custom_replay import TinyDQN

pytestmark = pytest.mark.usefixtures("no_leaks")


def codes(findings: list[Finding]) -> list[str]:
    return [f.code for f in findings if f.severity in ("error", "warning")]


# -- sound -------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "hidden": (32, 32), "batch_size": 64, "warmup": 256, "random_steps": 256, "update_ratio": 0.1, "tau": 0.02,
    "learning_rate": 3e-3, "capacity": 20_000,
}  # fmt: skip
SMALL: dict[str, Any] = {"hidden": (32, 32), "batch_size": 64, "learning_rate": 1e-3}
VALUES = {name: value for name, value in QUICK.items() if name not in ("random_steps", "tau")}
SOUND: dict[str, tuple[Any, list[str]]] = {
    "ppo": (aiorl.PPO(), []),
    "dqn": (aiorl.DQN(), []),
    "qrdqn": (aiorl.QRDQN(**VALUES, priority_exponent=0.6, accumulate=2, quantiles=16, average=0.99), []),
    "sac": (aiorl.SAC(**QUICK), []),
    "td3": (aiorl.TD3(**QUICK), []),
    "toy": (Toy(), ["no-foresight"]),
    "reinforce": (Reinforce, []),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_algorithms_pass(name: str):
    algorithm, known = SOUND[name]
    found = check_algorithm(algorithm)
    assert not errors(found), found
    assert [code for code in codes(found) if code != "not-finite"] == known
    assert ("ends" in {f.code for f in found}) == (not known)


@pytest.mark.parametrize("storage", ["disk", "device"])
def test_experience_may_lie_anywhere(storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(task_checks, "ENDS_ENV_STEPS", 2_048)
    algorithm = aiorl.DQN(hidden=(16,), batch_size=16, capacity=2_000, storage=storage)
    assert codes(check_algorithm(algorithm)) in (["no-foresight"], ["not-learned"]), "so little was learned"
    assert [*(tmp_path / "temporary").iterdir()] == []


def test_a_clip_that_makes_all_rewards_the_same_does_not_hide_the_ends():
    env = EnvSpec(CHAIN, {"action": "discrete"}, CHAIN)
    assert [f.code for f in task_checks.ends_of_episodes(record(aiorl.DQN(hidden=(32,), reward_clip=0.3), env))] == ["ends"]


@pytest.mark.long
@pytest.mark.parametrize("action", ["discrete", "box", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize("seed", range(3))
def test_ends_are_judged_rightly_whatever_the_seed(action: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_checks, "SEED", seed)
    env = EnvSpec(CHAIN, {"action": action}, CHAIN)
    algorithms = [aiorl.PPO(), aiorl.PPO(correction="vtrace", normalise_rewards=True)]
    if action == "discrete":
        algorithms += [aiorl.DQN(n_step=3, dueling=True), Q()]
    for algorithm in algorithms:
        assert [f.code for f in task_checks.ends_of_episodes(record(algorithm, env))] == ["ends"]
    if action == "discrete":
        for flaw, code in (("termination", "bootstraps-termination"), ("truncation", "cuts-truncation")):
            assert [f.code for f in task_checks.ends_of_episodes(record(Q(flaw=flaw), env))] == [code]


ENDS = {
    # code: what an action leads on to, by a row's flags
    "ends": replay.GOES_ON,
    "bootstraps-termination": np.ones(256),
    "cuts-truncation": 1.0 - (np.arange(256) & (replay.TERMINATED | replay.TRUNCATED) != 0),
}


@pytest.mark.long
@pytest.mark.parametrize("code", ENDS)
@pytest.mark.parametrize("algorithm", [aiorl.SAC(**SMALL), aiorl.TD3(**SMALL)], ids=["sac", "td3"])
@pytest.mark.parametrize("seed", range(3))
def test_ends_are_judged_rightly_by_actors(algorithm: Any, code: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_checks, "SEED", seed)
    bench = record(algorithm, EnvSpec(CHAIN, {"action": "box"}, CHAIN))
    monkeypatch.setattr(replay, "GOES_ON", ENDS[code])
    assert [f.code for f in task_checks.ends_of_episodes(bench)] == [code]


@pytest.mark.long
@pytest.mark.parametrize("action", ["discrete", "box", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize("seed", range(3))
def test_acting_is_judged_rightly_whatever_the_seed(action: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_checks, "SEED", seed)
    algorithms: list[Any] = [aiorl.PPO(), aiorl.PPO(correction="vtrace", normalise_rewards=True)]
    if action == "discrete":
        algorithms += [aiorl.DQN(), aiorl.DQN(n_step=3, dueling=True, average=0.999), aiorl.QRDQN()]
        algorithms += [Reinforce(), TinyDQN(), Q()]
    if action == "box":
        algorithms += [aiorl.SAC(), aiorl.TD3()]
    for algorithm in algorithms:
        assert [*task_checks.acting(record(algorithm, EnvSpec(CHAIN, {"action": action}, CHAIN)))] == []


# -- each mistake ------------------------------------------------------------------------------------------------------


class Q(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Linear Q-learning with momentum on half of each rollout, sound but for its `flaw`."""

    name: ClassVar[str] = "q"
    default_segment_length: ClassVar[int] = 16

    flaw: str = ""

    @property
    def corrects_staleness(self) -> Any:
        return "yes" if self.flaw == "corrects" else True

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete" or self.flaw == "refuses":
            raise ConfigError("q needs Discrete actions")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"best": Column((), "float32")}

    def policy(self, spaces: Spaces) -> QPolicy:
        return QPolicy(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> QLearner:
        return QLearner(self, spaces, context)


class QPolicy:
    def __init__(self, config: Q, spaces: Spaces) -> None:
        self._flaw, self._spaces = config.flaw, spaces

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._w, self._rng = weights["w"], rng
        if self._flaw == "writes weights":
            self._w += 0.0

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        q = self._spaces.encode(obs) @ self._w
        best, n = q.max(1), len(q)
        if self._flaw == "writes obs":
            next(iter(obs.values()))[...] += 1.0
        if self._flaw == "draws":
            return np.random.default_rng().integers(2, size=n), {"best": best}
        action = q.argmax(1)
        if self._rng is not None:
            action = np.where(self._rng.random(n) < 0.3, self._rng.integers(2, size=n), action)
        if self._flaw == "global policy":
            action = np.where(np.random.random(n) < 0.01, 0, action)
        if self._flaw == "float actions":
            return action.astype(np.float64), {"best": best}
        if self._flaw == "double column":
            return action, {"best": best.astype(np.float64)}
        return action, {} if self._flaw == "no column" else {"best": best}


class QLearner:
    def __init__(self, config: Q, spaces: Spaces, context: LearnerContext) -> None:
        self._flaw, self._spaces, self._context = config.flaw, spaces, context
        self._w = np.zeros((spaces.features, spaces.action.nvec[0]), np.float32)
        self._momentum, self._updates, self._rewards = np.zeros_like(self._w), 0, None

    def update(self, rollout: Rollout) -> dict[str, float]:
        flaw = self._flaw
        reward, action = rollout.column("reward"), rollout.column("action")
        ends = {"termination": "truncated", "truncation": ""}.get(flaw, "terminated")
        over = rollout.column(ends) if ends else rollout.column("terminated") | rollout.column("truncated")
        if flaw == "termination":
            over = np.zeros_like(over)
        if flaw == "writes rollout":
            reward -= reward.mean()
        if flaw == "keeps rollout":
            reward, self._rewards = reward if self._rewards is None else self._rewards, reward
        x = self._spaces.encode({k: v[:-1] for k, v in rollout.obs.items()})
        target = reward + 0.9 * np.where(over, 0.0, (self._spaces.encode(rollout.next_obs()) @ self._w).max(-1))
        chosen = np.eye(2)[action]
        rng = self._context.rng(rollout.index)
        used = (np.random.random(reward.shape) if flaw == "global learner" else rng.random(reward.shape)) < 0.5
        error = (target - ((x @ self._w) * chosen).sum(-1)) * used * rollout.column("valid")
        gradient = np.einsum("tbf,tba,tb->fa", x, chosen, error) / error.size
        self._momentum[...] = 0.8 * self._momentum + gradient
        step = 2.0
        if flaw == "clock":
            step += time.perf_counter() % 1e-3
        if flaw == "thread" and threading.current_thread().name == "aiorl-learner":
            step = 1.0
        self._w += step * self._momentum.astype(np.float32)
        if flaw == "dtype moves":
            self._w = self._w.astype(np.float64)
        self._updates += 1
        if flaw == "raises":
            raise RuntimeError("the learner fell over")
        metrics = {"gradient_steps": 1.0, "off_policy_error": 0.5 if flaw == "error at lag 0" else 0.0}
        if flaw == "metric":
            metrics["loss"] = float("nan")
        return {k: v for k, v in metrics.items() if not (flaw == "silent" and k == "gradient_steps")}

    def weights(self) -> Weights:
        if self._flaw == "weights move":
            self._w *= np.float32(0.99)
        return {"w": self._w}

    def state_dict(self) -> dict[str, Any]:
        w = self._w if self._flaw == "aliased" else self._w.copy()
        state = {"w": w, "momentum": self._momentum.copy(), "updates": self._updates}
        if self._flaw == "unsaved leaf":
            state["rng"] = np.random.default_rng(0)
        return {k: v for k, v in state.items() if not (self._flaw == "forgets" and k == "momentum")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._flaw == "trusts":
            state = {**self.state_dict(), **state}
        elif state["w"].shape != self._w.shape:
            raise ValueError(f"w: expected {self._w.shape}, got {state['w'].shape}")
        self._w = state["w"] if self._flaw == "takes" else state["w"].copy()
        if self._flaw != "forgets":
            self._momentum[...] = state["momentum"]
        self._updates = 0 if self._flaw == "half loaded" else int(state["updates"])

    def set(self, **changes: float) -> None:
        if self._flaw != "sets anything":
            raise ValueError(f"cannot change {', '.join(changes)}")


MISTAKES: dict[str, tuple[str, str, str]] = {
    # flaw: (severity, code, words of the message)
    "corrects": ("error", "corrects-staleness", "'yes', expected True or False"),
    "refuses": ("error", "refuses-all", "q needs Discrete actions"),
    "raises": ("error", "runs", "RuntimeError: the learner fell over"),
    "silent": ("error", "gradient-steps", "add it to the metrics"),
    "metric": ("error", "metrics", "'loss' is nan"),
    "error at lag 0": ("error", "off-policy-error", "0.5 for a rollout of the newest version"),
    "dtype moves": ("error", "weights", "float32[6, 2] at first"),
    "weights move": ("error", "weights-move", "without an update"),
    "global learner": ("error", "global-chance", "the learner uses the global generator of numpy.random"),
    "clock": ("error", "not-repeatable", "context.rng"),
    "writes rollout": ("error", "writes-into-rollout", "work on a copy"),
    "keeps rollout": ("error", "keeps-rollout", "copy what must outlive"),
    "unsaved leaf": ("error", "state-leaves", "'rng' is a Generator"),
    "half loaded": ("error", "state-round-trip", "differs at updates"),
    "forgets": ("error", "state-incomplete", "optimizer moments"),
    "aliased": ("error", "state-aliased", "return copies"),
    "takes": ("error", "state-taken", "copy them"),
    "trusts": ("warning", "accepts-damage", "without 'w'"),
    "sets anything": ("warning", "set", "raise ValueError"),
    "writes weights": ("error", "writes-weights", "other workers act with"),
    "writes obs": ("error", "writes-obs", "stored as they are"),
    "draws": ("error", "not-deterministic", "rng = None"),
    "global policy": ("error", "global-chance", "the policy uses"),
    "float actions": ("error", "dtype", "'action' as float64, which cannot be stored as int64"),
    "double column": ("warning", "dtype", "'best' as float64"),
    "thread": ("error", "not-serial", "off_policy_degree 0"),
}


def test_without_a_flaw_it_is_sound():
    assert codes(check_algorithm(Q)) == ["not-finite"]


@pytest.mark.parametrize("flaw", MISTAKES)
def test_a_mistake_is_found_and_explained(flaw: str):
    severity, code, words = MISTAKES[flaw]
    findings = check_algorithm(Q(flaw=flaw), learning=False)
    found = {f.code: f for f in findings}
    assert len(found) == len(findings), "one mistake, one finding of a kind"
    assert code in found, found
    assert found[code].severity == severity
    assert words in found[code].message
    assert len(found[code].message.splitlines()) <= 3


def test_what_a_load_leaves_over_is_found(monkeypatch: pytest.MonkeyPatch):
    """Planted: rows of a buffer that are not loaded keep the priorities that they had."""
    algorithm = aiorl.DQN(hidden=(8,), batch_size=8, update_ratio=0.1, priority_exponent=0.6)
    bench = record(algorithm, EnvSpec(CHAIN, {"action": "discrete"}, CHAIN))
    assert [*learner_checks.state(bench)] == []
    monkeypatch.setattr(SumTree, "clear", lambda self: None)
    (finding,) = learner_checks.state(bench)
    assert (finding.code, len(finding.message.splitlines())) == ("state-leftover", 2)


@pytest.mark.parametrize(
    ("flaw", "code"), [("termination", "bootstraps-termination"), ("truncation", "cuts-truncation")]
)
def test_ends_of_episodes_read_wrongly(flaw: str, code: str):
    assert [f.code for f in errors(check_algorithm(Q(flaw=flaw)))] == [code]


class Derived(Q, frozen=True):
    """Its learning rate follows from something else."""

    @property
    def learning_rate(self) -> float:
        return 0.1


def test_a_setting_that_is_derived_is_left_as_it_is():
    assert codes([*task_checks.acting(record(Derived(), EnvSpec(CHAIN, {"action": "discrete"}, CHAIN)))]) == []


def test_a_column_that_is_declared_but_not_given_ends_at_once():
    (found,) = errors(check_algorithm(Q(flaw="no column")))
    assert "column 'best'" in found.message


def test_a_protocol_that_is_not_whole():
    class Bare:
        name = "bare"

    (found,) = check_algorithm(Bare)  # type: ignore[arg-type]
    assert found.code == "protocol"
    assert "Bare has no check, columns, corrects_staleness, default_segment_length, learner, policy" in found.message


class Halved(Q, frozen=True):
    """Its learner lacks a method."""

    def learner(self, spaces: Spaces, context: LearnerContext) -> Any:
        whole = QLearner(self, spaces, context)
        names = ("update", "weights", "state_dict", "load_state_dict")
        return type("HalfLearner", (), {name: getattr(whole, name) for name in names})()


def test_a_learner_that_is_not_whole():
    found, left_out = check_algorithm(Halved)
    assert (found.code, "HalfLearner has no set" in found.message) == ("protocol", True)
    assert (left_out.code, "its policy and its learner, whole runs" in left_out.message) == ("not-checked", True)


def test_a_class_that_no_worker_can_import():
    class Local(Q, frozen=True):
        pass

    assert [f.code for f in check_algorithm(Local)] == ["importable", "not-checked"]


async def test_it_can_be_called_inside_an_event_loop():
    assert codes(check_algorithm(Q, learning=False)) == ["not-finite"]


def test_it_tells_what_it_looks_at():
    told: list[str] = []
    check_algorithm(Q, learning=False, tell=told.append)
    assert told == ["its form", "its actions", "its policy and its learner", "whole runs"]


# -- the problem it is asked on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "high", "then", "reward", "terminated", "truncated"),
    [
        (Place.TERMINATED, True, Place.GOAL, 0.0, True, False),
        (Place.TRUNCATED, True, Place.GOAL, 0.0, False, True),
        (Place.GOES_ON, True, Place.GOAL, 0.0, False, False),
        (Place.ENOUGH, True, Place.GOAL, 0.0, False, False),
        (Place.TERMINATED, False, Place.VOID, 0.3, True, False),
        (Place.TRUNCATED, False, Place.VOID, 0.3, True, False),
        (Place.GOES_ON, False, Place.VOID, 0.3, True, False),
        (Place.ENOUGH, False, Place.VOID, 1.6, True, False),
        (Place.GOAL, True, Place.VOID, 1.0, True, False),
        (Place.GOAL, False, Place.VOID, 1.0, True, False),
    ],
)
@pytest.mark.parametrize(("action", "turned"), [("discrete", False), ("discrete", True), ("box", False), ("box", True)])
def test_the_chain(
    action: str, turned: bool, place: Place, high: bool, then: Place, reward: float, terminated: bool, truncated: bool
):
    env = Chain(action, turned)
    begun = {int(env.reset(seed=seed)[0].argmax()) for seed in range(40)}
    assert begun == {*Place} - {Place.VOID} - ({Place.ENOUGH} if not turned else set())
    env.place = place
    up = high != turned
    taken = int(up) if action == "discrete" else np.array([1.0 if up else -1.0], np.float32)
    obs, *rest, _ = env.step(taken)
    assert is_high(taken, discrete=action == "discrete") == up
    assert (Place(int(obs.argmax())), *rest) == (then, reward, terminated, truncated)


def test_in_the_chain_a_box_is_high_with_a_chance():
    env = Chain("box")
    env.reset(seed=0)
    for value in (-0.5, 0.0, 0.5):
        went: list[bool] = []
        for _ in range(2_000):
            env.place = Place.GOES_ON
            went.append(int(env.step(np.array([value], np.float32))[0].argmax()) == Place.GOAL)
        assert np.mean(went) == pytest.approx((value + 1) / 2, abs=0.04)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_the_signs(action: str, dtype: str):
    env = Signs(action, dtype)
    shown = {tuple(env.reset(seed=seed)[0].tolist()) for seed in range(40)}
    assert len(shown) == len(Signs.HIGH)
    assert env.observation_space.contains(env.reset(seed=0)[0])
    assert {x for sign in shown for x in sign} == ({0, 102, 255} if dtype == "uint8" else {0, np.float32(0.4), 1})
    for sign, high in enumerate(Signs.HIGH.tolist()):
        worth: list[float] = []
        for value in (0, 1) if action == "discrete" else (np.array([-1], np.float32), np.array([1], np.float32)):
            env.sign = sign
            _, reward, terminated, truncated, _ = env.step(value)
            assert (terminated, truncated) == (True, False)
            worth.append(reward)
        assert worth == [not high, high]
