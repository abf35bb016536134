"""The catalogue of faults, learning: each planted in a learner that is otherwise right, and found by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from faulty_learner import Small

import aiorl
from aiorl import losses
from aiorl.algos import dqn
from aiorl.algos.base import LearnerContext
from aiorl.algos.practice import Practice
from aiorl.buffers.replay import Replay
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.segments import Array, Rollout
from aiorl.testing import check_algorithm, learner_checks, replay_checks, task_checks
from aiorl.testing.bench import ENVS, STEPS, Bench, record
from aiorl.testing.examine_algorithm import CHAIN
from aiorl.testing.findings import Finding
from examples.custom_replay import EpsilonGreedy, TinyDQN, TinyDQNLearner

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of the tensors that are planted
]

PLANTED = {
    # flaw: (code, words of the message)
    "target twice": ("target-share", "took over 0.44 of the way to the parameters, expected 0.25: it is updated twice"),
    "target at every step": ("target-interval", "expected 0: it is due every 2 steps"),
    "target never": ("target-interval", "took over 0 of the way to the parameters, expected 0.25"),
    "target not saved": ("state-incomplete", "targets"),
    "own copy": ("ignores-rewards", "Are batches all zero?"),
    "zero gradient": ("zero-gradient", "the gradient is 0 in all"),
    "optimizes a copy": ("unchanged", "does the optimizer hold these very parameters?"),
    "publishes what it was": ("unpublished", "nothing in weights(), which is what acts"),
    "waits for ever": ("no-updates", "led to no gradient step"),
    "does not wait": ("update-ratio", "after 128 env steps it has done 32 gradient steps, expected 24"),
    "another device": ("runs", "raised "),
    "tensors": ("weights", "is a Tensor, expected a NumPy array"),
    "one action more": ("action-space", "chooses 2, the space has 0 to 1"),
}
WORTH = {
    "reward of one step": ("value", "values of 1.4", "one reward with gamma ** n would do that"),
    "gamma of one step": ("value", "values of 3.", "n rewards with gamma ** 1 would do that"),
    "gamma of twice as many steps": ("value", "values of 1.7", "n rewards with gamma ** 2n would do that"),
    "scales twice": ("value", "expected 2", ""),
    "no discount": ("value", "expected 2", ""),
    "tells the loss only": ("no-q-values", "a loss alone", ""),
}


SETTLING: dict[str, tuple[Small, list[tuple[str, str]]]] = {
    "soundly": (Small(plain=True, learning_rate=0.05), []),
    "wrongly": (Small(plain=True, learning_rate=0.05, flaw="gamma of one step"), [("error", "value")]),
    "too slowly": (Small(plain=True), [("warning", "not-settled")]),
    "too slowly, hardly at all": (Small(plain=True, learning_rate=1e-5), [("warning", "not-settled")]),
    "too slowly, but too far": (Small(plain=True, learning_rate=5e-3, flaw="gamma of one step"), [("error", "value")]),
    "never": (Small(plain=True, learning_rate=0.05, flaw="no discount"), [("error", "value")]),
    "fast, at the rate of the check": (Small(learning_rate=1e-9), []),
}  # fmt: skip


def recorded(algorithm: Any) -> Bench:
    action = "box" if isinstance(algorithm, aiorl.SAC) else "discrete"
    return record(algorithm, EnvSpec(CHAIN, {"action": action}, CHAIN))


def found(flaw: str, *, learning: bool) -> dict[str, Finding]:
    return {f.code: f for f in check_algorithm(Small(flaw=flaw), learning=learning) if f.severity != "info"}


def test_a_sound_learner_passes() -> None:
    assert set(found("", learning=True)) <= {"not-finite"}


@pytest.mark.parametrize("flaw", PLANTED)
def test_a_flaw_of_a_learner_is_found(flaw: str) -> None:
    code, words = PLANTED[flaw]
    findings = found(flaw, learning=False)
    assert code in findings, findings
    assert words in findings[code].message
    assert len(findings[code].message.splitlines()) <= 3


@pytest.mark.parametrize("flaw", WORTH)
def test_values_that_come_out_wrong_are_found(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, words, guess = WORTH[flaw]
    monkeypatch.setattr(task_checks, "ends_of_episodes", lambda *_: iter(()))  # takes long
    findings = found(flaw, learning=True)
    assert code in findings, findings
    assert words in findings[code].message
    assert guess in findings[code].message


@pytest.mark.parametrize("how", SETTLING)
def test_values_are_judged_once_they_have_settled(how: str) -> None:
    algorithm, expected = SETTLING[how]
    findings = list(replay_checks.value(recorded(algorithm)))
    assert [(f.severity, f.code) for f in findings] == expected
    assert all(len(f.message.splitlines()) <= 3 for f in findings)


@pytest.mark.parametrize("limit", [replay_checks.WORTH, 3.5, 6.0, 1.4, 0.5])
@pytest.mark.parametrize("slow_share", [0.0, 0.25])
def test_no_course_of_values_is_judged_too_soon(limit: float, slow_share: float) -> None:
    """However fast they settle, in one movement or in two: never the wrong verdict, and a verdict in time."""
    updates = np.arange(40)
    for pace in np.geomspace(1e-4, 10, 60):
        left = slow_share * np.exp(-updates * pace) + (1 - slow_share) * np.exp(-updates * min(10, 20 * pace))
        means = limit * (1 - left)
        right = replay_checks._near(means[-1]) and replay_checks._settled(means)
        wrong = not replay_checks._near(means[-1]) and (replay_checks._settled(means) or replay_checks._leaves(means))
        assert not (wrong if limit == replay_checks.WORTH else right)
        assert right or wrong or pace < 0.2


OTHERWISE = {
    "acts on numbers as they are": ("error", "acts-otherwise", "(uint8)", "in all when they are divided by 255 before"),
    "acts on bytes": ("error", "acts-otherwise", "(float32)", "in all when they are divided by 255 before"),
    "acts in reverse order": ("error", "acts-otherwise", "(float32)", "in all when they are in reverse order before"),
    "takes the worst": ("error", "acts-otherwise", "takes the other one in all of them", "an argmin for an argmax"),
    "acts blindly": ("warning", "not-learned", "(float32)", "in 3 of them after 8,192 env steps"),
}


@pytest.mark.parametrize("flaw", OTHERWISE)
def test_who_acts_on_something_else_than_it_learned_from_is_found(flaw: str) -> None:
    severity, code, *words = OTHERWISE[flaw]
    findings = found(flaw, learning=True)
    assert code in findings, findings
    assert findings[code].severity == severity
    assert all(word in findings[code].message for word in words), findings[code]
    assert len(findings[code].message.splitlines()) <= 3
    assert not {"ends", "bootstraps-termination", "cuts-truncation"} & set(findings), "not what is wrong"


class Tiny(TinyDQN, frozen=True):
    """The example, whose target is a copy every `target_every` gradient steps, but for its `flaw`."""

    flaw: str = ""

    def policy(self, spaces: Spaces) -> EpsilonGreedy:
        return Scaled(self, spaces) if self.flaw == "acts on bytes divided twice" else EpsilonGreedy(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> TinyLearner:
        return TinyLearner(self, spaces, context)


class Scaled(EpsilonGreedy):
    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        return super().act({name: leaf / np.float32(255) for name, leaf in obs.items()}, first)


class Stuck:
    """A learner's context whose random numbers do not depend on the rollout."""

    def __init__(self, context: LearnerContext) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def rng(self, *key: int) -> np.random.Generator:
        return self._context.rng(key[0])


class TinyLearner(TinyDQNLearner):
    def __init__(self, config: Tiny, spaces: Spaces, context: LearnerContext) -> None:
        given: Any = Stuck(context) if config.flaw == "draws the same" else context
        super().__init__(config, spaces, given)
        self._flaw = config.flaw

    def update(self, rollout: Rollout) -> dict[str, float]:
        before = self._target
        told = super().update(rollout)
        if self._flaw == "never":
            self._target = before
        if self._flaw == "but for a layer":
            self._target = {**self._target, "w1": before["w1"]}
        return told

    def _gradient_step(self, rng: np.random.Generator) -> dict[str, float]:
        if change := (SHUFFLES | WINDOWS | ROWS).get(self._flaw):
            draw = self._replay.sample
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self._replay, "sample", lambda *a, **kw: change(self._replay, draw(*a, **kw), rng))
                return super()._gradient_step(rng)
        target = self._target
        if self._flaw == "is its own target":
            self._target = self._parameters
        told = super()._gradient_step(rng)
        self._target = target
        if share := {"softly at every step": 0.005, "whole at every step": 1.0}.get(self._flaw):
            self._target = {name: t + share * (self._parameters[name] - t) for name, t in self._target.items()}
        return told

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._flaw == "under another name":
            state["slow"] = state.pop("target")
        return state

    def set(self, **changes: float) -> None:
        rate = self._learning_rate
        super().set(**changes)
        if self._flaw == "sets in vain":
            self._learning_rate = rate

    def weights(self) -> dict[str, Array]:
        if self._flaw == "weights move":
            for parameter in self._parameters.values():
                parameter *= np.float32(0.9999)
        return super().weights()


Check = Callable[[Bench], Iterable[Finding]]
Change = Callable[[Replay, Any, np.random.Generator], Any]
"""Of a buffer, a batch that was drawn from it and a generator: the batch that is learned from."""

SHUFFLES: dict[str, Change] = {
    "the next row's": lambda _, batch, rng: replace(batch, action=np.roll(batch.action, 1)),
    "any row's": lambda _, batch, rng: replace(batch, action=rng.permutation(batch.action)),
    "none of the rows'": lambda _, batch, rng: replace(batch, action=rng.integers(2, size=len(batch.action))),
}
"""Whose actions it learns from."""


WINDOWS: dict[str, Change] = {
    "where one step led": lambda replay, batch, _: replace(batch, next_obs=replay.gather(batch.index, 1, 0.9).next_obs),
    "where it was": lambda _, batch, rng: replace(batch, next_obs=batch.obs),
}
"""Whose value it takes after the rewards of a window."""


def newest(replay: Replay, batch: Any, rng: np.random.Generator) -> Any:
    """Of rows that were stored without a gap, and none over another."""
    rows = ENVS * STEPS
    return replay.gather(rng.integers(replay.env_steps - rows, replay.env_steps, len(batch.index)), 1, 0.9)


ROWS: dict[str, Change] = {"knows the newest rows only": newest}
SILENT: dict[str, tuple[Check, str, str, str]] = {
    # flaw: (who finds it, severity, code, words of the message)
    "knows the newest rows only": (replay_checks.held, "error", "never-sampled", "in the first 128 make no difference"),
    "is its own target": (replay_checks.target, "error", "target-unused", "with another target it learns the same"),
    "sets in vain": (learner_checks.settings, "error", "set-unused", "set(learning_rate=…) is accepted, and with half"),
    "draws the same": (learner_checks.repeatable, "warning", "same-chance", "context.rng(1) is asked for 6 times"),
}


@pytest.mark.parametrize("flaw", SILENT)
def test_what_raises_nothing_and_shows_in_no_metric_is_found(flaw: str) -> None:
    check, severity, code, words = SILENT[flaw]
    assert not [f for f in check(recorded(Tiny())) if f.severity != "info"]
    (finding,) = check(recorded(Tiny(flaw=flaw)))
    assert (finding.severity, finding.code, words in finding.message) == (severity, code, True), finding
    assert len(finding.message.splitlines()) <= 3


@pytest.mark.parametrize("algorithm", [aiorl.DQN, aiorl.QRDQN, aiorl.SAC])
def test_importance_weights_that_are_not_used_are_found(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = recorded(algorithm(priority_exponent=0.6, hidden=(32,), batch_size=32))
    assert not [*replay_checks.held(bench)]
    monkeypatch.setattr(Practice, "importance", lambda *_: None)
    (finding,) = replay_checks.held(bench)
    assert (finding.severity, finding.code) == ("error", "importance-weights")
    assert len(finding.message.splitlines()) <= 3


@pytest.mark.parametrize("seed", [task_checks.SEED, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 4))])
@pytest.mark.parametrize("flaw", ["", *WINDOWS])
def test_values_of_another_place_than_windows_lead_to_are_found(flaw: str, seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(task_checks, "SEED", seed)
    found = [*task_checks.windows(recorded(Tiny(flaw=flaw)))]
    assert [(f.severity, f.code) for f in found] == [("error", "window-value")] * bool(flaw)
    assert all(len(f.message.splitlines()) <= 3 for f in found)


@pytest.mark.parametrize("seed", [task_checks.SEED, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 4))])
@pytest.mark.parametrize("flaw", ["", "follows the worst", "follows a mean"])
def test_values_of_other_actions_than_the_best_that_follow_are_found(flaw: str, seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(task_checks, "SEED", seed)
    found = [*task_checks.following(recorded(Small(flaw=flaw)))]
    assert [(f.severity, f.code) for f in found] == [("warning", "follows-worst")] * bool(flaw)
    assert all(len(f.message.splitlines()) <= 3 for f in found)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_an_argmin_for_an_argmax_is_found(double: bool, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.q_targets

    def of_the_worst(returns: Any, discounts: Any, target: Any, online: Any = None) -> Any:
        return right(returns, discounts, target, -(target if online is None else online))

    if wrong:
        monkeypatch.setattr(dqn.losses, "q_targets", of_the_worst)
    assert [f.code for f in task_checks.following(recorded(aiorl.DQN(double=double)))] == ["follows-worst"] * wrong


@pytest.mark.parametrize("seed", [task_checks.SEED, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 4))])
@pytest.mark.parametrize("flaw", SHUFFLES)
def test_who_does_not_tell_actions_apart_is_not_blamed_for_ends(flaw: str, seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(task_checks, "SEED", seed)
    bench = recorded(Tiny(flaw=flaw))
    assert [f.code for f in task_checks.tasks(bench)] == ["not-learned"]
    assert not {f.code for f in task_checks.ends_of_episodes(bench)} & {"bootstraps-termination", "cuts-truncation"}


COPIED = {
    "softly at every step": ("target-interval", "step 1 target took over 0.005 of the way to the parameters, expected 0"),
    "whole at every step": ("target-interval", "step 1 target took over 1 of the way to the parameters, expected 0"),
    "never": ("target-interval", "step 2 target took over 0 of the way to the parameters, expected 1"),
    "but for a layer": ("target-share", "of the way to the parameters, expected 1"),
    "under another name": ("not-checked", "its state has no `target` beside `parameters`"),
}


@pytest.mark.parametrize("flaw", COPIED)
def test_a_target_that_is_copied_is_measured_by_its_interval_alone(flaw: str) -> None:
    code, words = COPIED[flaw]
    (finding,) = target_of(Tiny(flaw=flaw))
    assert (finding.code, words in finding.message) == (code, True), finding
    assert len(finding.message.splitlines()) <= 3


def test_the_doctor_looks_at_the_target_of_the_example() -> None:
    assert target_of(Tiny()) == []
    assert "target-interval" in {f.code for f in check_algorithm(Tiny(flaw="softly at every step"), learning=False)}


class Renamed:
    """The example, with another name for `target_every`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Tiny(), {"copy_every": "target_every", "target_every": "?"}.get(name, name))


def test_a_target_whose_settings_nobody_knows_is_not_passed_over() -> None:
    (finding,) = target_of(Renamed())
    assert (finding.code, "no setting `target_every` or `tau`" in finding.message) == ("not-checked", True)


def test_a_network_that_acts_on_other_numbers_than_it_learned_from_is_found() -> None:
    bench = recorded(Tiny(flaw="acts on bytes divided twice"))
    (finding,) = task_checks.acting(bench)
    assert (finding.code, "in all when they are multiplied by 255 before" in finding.message) == ("acts-otherwise", True)


def target_of(algorithm: Any) -> list[Finding]:
    return list(replay_checks.target(recorded(algorithm)))


def test_what_is_not_looked_at_is_said() -> None:
    whole = "whole runs, the values that it learns, acting on what it learned, ends of episodes"
    for learning, words in ((True, whole), (False, "whole runs")):
        told = found("one action more", learning=learning)["not-checked"].message.splitlines()[0]
        assert told == f"not looked at, because of these errors: its policy and its learner, {words}"


def test_weights_that_move_as_they_are_asked_for_are_not_blamed_for_what_differs_then() -> None:
    moved, left_out = (f for f in check_algorithm(Tiny(flaw="weights move"), learning=False) if f.code != "not-finite")
    assert (moved.code, left_out.code) == ("weights-move", "not-checked")
    told = left_out.message.splitlines()[0].partition(": ")[2]
    compared = "what its updates move, what it learns from, whether it repeats itself, its state, what can be set"
    assert told == f"{compared}, whether it samples from all that it holds, whole runs"
