"""The catalogue of faults, experience: each planted in a buffer that is otherwise right, and found by its name."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_buffer import Chains, Prioritised, RingBuffer, Stacks

from aiorl.buffers.lanes import Lanes
from aiorl.buffers.priorities import SumTree
from aiorl.buffers.replay import Batch, Replay
from aiorl.testing import check_replay, errors
from aiorl.testing.findings import Finding

PLANTED = {
    # flaw: (code, words of the message)
    "own copy": ("empty", "14 transitions were added, it says that it holds none"),
    "counts too much": ("size", "it says that it holds 15 transitions, there are 14"),
    "(1, F)": ("shape", "obs is (256, 1, 4), expected (256, 4)"),
    "unlocked size": ("uninitialised", "all zero"),
    "torn": ("torn", "none that was added"),
    "crosses the head": ("wrap-around", "beyond it lie the oldest"),
    "crosses episodes": ("crosses-end", "past the end of an episode"),
    "reward of one step": ("n-step-return", "its rewards come to"),
    "gamma of one step": ("n-step-discount", "gamma to the power"),
    "truncation is the end": ("end", "a truncation is not the end"),
    "termination goes on": ("end", "after 1 steps and a termination the discount is 0.9, expected 0"),
    "clears history": ("wrap-around", "what follows time"),
    "forgets some": ("never-sampled", "are held and were never sampled"),
    "biased": ("biased", "importance weights"),
    "samples what is no step": ("not-valid", "which is no transition"),
    "goes on into what is no step": ("not-valid", "end windows before it"),
    "does not see what was given up": ("crosses-end", "rollout.aborted"),
    "goes by columns": ("gap", "in the eager schedule columns change"),
    "loads no ends": ("state", "a buffer that is new does not sample after load_state_dict"),
    "keeps its size": ("state-leftover", "a buffer that held 8 rollouts does not sample"),
}


def found(flaw: str, kind: type[RingBuffer] = RingBuffer) -> dict[str, Finding]:
    return {f.code: f for f in check_replay(functools.partial(kind, flaw=flaw))}


def test_sound_buffers_pass() -> None:
    assert check_replay(Replay) == []
    assert check_replay(RingBuffer) == []
    assert check_replay(Prioritised) == []
    assert check_replay(Chains) == []
    assert check_replay(Replay, stack=4) == []
    assert check_replay(Stacks, stack=4) == []
    assert check_replay(Prioritised, priority_exponent=0.5) == []
    for exponent in (0.6, 1.0):
        assert check_replay(functools.partial(Replay, priority_exponent=exponent), priority_exponent=exponent) == []


@pytest.mark.parametrize("storage", ["disk", "device"])
@pytest.mark.parametrize("stack", [1, 4])
def test_it_does_not_matter_where_a_buffer_keeps_observations(storage: Any, stack: int, tmp_path: Path) -> None:
    make = functools.partial(Replay, storage=storage, directory=tmp_path, priority_exponent=0.6)
    assert check_replay(make, stack=stack, priority_exponent=0.6) == []


class OnDevice(RingBuffer):
    """Its observations are tensors."""

    def sample(self, *args: Any, **settings: Any) -> Batch:
        batch = super().sample(*args, **settings)
        obs, after = ({k: torch.from_numpy(x) for k, x in leaves.items()} for leaves in (batch.obs, batch.next_obs))
        return dataclasses.replace(batch, obs=obs, next_obs=after)


@pytest.mark.parametrize("flaw", ["(1, F)", "torn", "clears history", "loads no ends", "biased"])
def test_a_flaw_is_found_in_tensors_as_well(flaw: str) -> None:
    code, words = PLANTED[flaw]
    assert words in found(flaw, OnDevice)[code].message


@pytest.mark.parametrize("flaw", PLANTED)
def test_a_flaw_of_a_buffer_is_found(flaw: str) -> None:
    code, words = PLANTED[flaw]
    findings = found(flaw)
    assert code in findings, findings
    assert words in findings[code].message
    assert len(findings[code].message.splitlines()) <= 3


STACKED = {
    "clears its history": ("stack", "when it was acted on they were"),
    "stacks across ends": ("stack", "aiorl.frames.stack_places"),
    "newest first": ("stack", "obs stacks the frames of times"),
    "stacks fewer": ("shape", "obs is (256, 3, 4), expected (256, 4, 4)"),
}


@pytest.mark.parametrize("flaw", STACKED)
def test_a_flaw_in_stacking_is_found(flaw: str) -> None:
    code, words = STACKED[flaw]
    findings = {f.code: f for f in check_replay(functools.partial(Stacks, flaw=flaw), stack=4)}
    assert code in findings, findings
    assert words in findings[code].message


def test_what_does_not_fit_the_stack_is_refused_at_once() -> None:
    """Acting shows 4 frames, the buffer is made for 3."""
    (finding,) = errors(check_replay(functools.partial(Replay, stack=3), stack=4))
    assert "3" in finding.message


CHAINED = {
    "sequences cross the head": ("sequence-order", "beyond it lie the oldest"),
    "goes on elsewhere": ("sequence-order", "go by rollout.envs"),
    "sequences hold what is no step": ("not-valid", "end sequences before such a row"),
    "ends untold": ("sequence-first", "an episode begins with row"),
    "cuts are begins": ("sequence-first", "`first` is True at row 0 of a sequence, in the middle of an episode"),
    "has holes": ("sequence-mask", "False before its end"),
    "sequences are short": ("sequence-short", "end before the step that came next"),
    "rewards of the step before": ("torn", "row 0 of a sequence is none that was added"),
}


@pytest.mark.parametrize("flaw", CHAINED)
def test_a_flaw_of_sequences_is_found(flaw: str) -> None:
    """What the same buffer samples besides is right."""
    code, words = CHAINED[flaw]
    findings = found(flaw, Chains)
    assert code in findings, findings
    assert words in findings[code].message
    assert all("sequence" in finding.message for finding in findings.values())


PRIORITISED = {
    "draws uniformly": ("chances", "rows with 4 times the error of others are drawn"),
    "has no weights": ("importance-weights", "have weights of 1, the others of 1, expected 0.707 and 1"),
    "weights of all rows": ("importance-weights", "divided by the largest of them"),
    "takes none": ("live-priorities", "errors of rows that are there still"),
}


@pytest.mark.parametrize("flaw", PRIORITISED)
def test_a_flaw_of_priorities_is_found(flaw: str) -> None:
    code, words = PRIORITISED[flaw]
    (finding,) = check_replay(functools.partial(Prioritised, flaw=flaw), priority_exponent=0.5)
    assert (finding.code, words in finding.message) == (code, True), finding


def test_stale_priorities_are_found() -> None:
    assert set(found("stale priorities", Prioritised)) == {"stale-priorities"}


def test_priorities_left_over_by_a_load_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: rows that are not loaded keep the chances that they had."""
    monkeypatch.setattr(SumTree, "clear", lambda self: None)
    (finding,) = check_replay(functools.partial(Replay, priority_exponent=0.6), priority_exponent=0.6)
    assert finding.code == "state-leftover"


def test_a_ring_that_goes_by_columns_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: whoever comes in a column goes on where the column ended, if it only shows the same."""
    monkeypatch.setattr(Lanes, "of", lambda self, envs: (np.arange(len(envs)), np.ones(len(envs), bool)))
    monkeypatch.setattr("aiorl.buffers.replay.in_turn", lambda rollout: [rollout])
    monkeypatch.setattr("aiorl.buffers.replay.alike", lambda a, b: np.ones(len(a), bool))
    assert "gap" in {f.code for f in check_replay(Replay)}


def test_what_a_buffer_raises_is_a_finding() -> None:
    def broken(*_: object) -> RingBuffer:
        raise RuntimeError("no room")

    (finding,) = errors(check_replay(broken))
    assert (finding.code, "no room" in finding.message) == ("raised", True)
