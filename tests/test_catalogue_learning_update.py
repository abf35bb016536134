"""The catalogue of faults, learning: each planted in a learner that is otherwise right, and found by its name."""

from __future__ import annotations

import pytest
from faulty_learner import Small

from aiorl.testing import check_algorithm
from aiorl.testing.findings import Finding

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
    "reward of one step": ("value", "values of 1.1", "one reward with gamma ** n would do that"),
    "gamma of one step": ("value", "values of 3.", "n rewards with gamma ** 1 would do that"),
    "scales twice": ("value", "expected 2", ""),
    "no discount": ("value", "expected 2", ""),
    "tells the loss only": ("no-q-values", "a loss alone", ""),
}


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
    monkeypatch.setattr("aiorl.testing.examine_algorithm.ends_of_episodes", lambda algorithm, env: iter(()))  # takes long
    findings = found(flaw, learning=True)
    assert code in findings, findings
    assert words in findings[code].message
    assert guess in findings[code].message
