"""Debug mode: whoever writes into a slot that is not his is found out before anything is learned from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import workers_of
from toys import Toy

import aiorl
from aiorl.cli import main
from aiorl.errors import InvariantError
from aiorl.faultpoints import armed
from aiorl.seals import check_seal, lay_guards, seal
from aiorl.segments import GUARD_BYTES, Column, Segment, SegmentHeader, SegmentLayout

COLUMNS = {"action": Column((), "int64"), "reward": Column((), "float64"), "flag": Column((), "bool")}
LAYOUT = SegmentLayout(4, 3, {"obs": Column((2,)), "obs.im": Column((2, 2), "uint8")}, COLUMNS, 9, guarded=True)


def filled(layout: SegmentLayout = LAYOUT, seed: int = 0) -> tuple[bytearray, Segment]:
    """The memory of three slots, and the middle one, full and sealed: segment 5 of group 2, by worker 1."""
    memory = bytearray(3 * layout.nbytes)
    slots = [layout.view(memoryview(memory), n * layout.nbytes) for n in range(3)]
    for slot in slots:
        lay_guards(slot)
    segment, rng = slots[1], np.random.default_rng(seed)
    segment.clear()
    for array in (*segment.obs.values(), *segment.columns.values()):
        array[...] = rng.integers(0, 2 if array.dtype == bool else 200, array.shape)
    for t in (0, 2):
        segment.add_final(t, 1, {"obs": [t, 1], "obs.im": [[1, 2], [3, 4]]})
    segment.put_env_state(b"state")
    segment.header[SegmentHeader.ENDED_S] = 12.5
    seal(segment, 1, 2, 5)
    check_seal(segment, 2, 5)
    return memory, segment


def blocks(segment: Segment) -> dict[str, np.ndarray[Any, Any]]:
    """Everything in use, by the name that a message gives it."""
    finals = {f"final_{name}": leaf[: segment.finals] for name, leaf in segment.final_obs.items()}
    rest = {"aborted": segment.aborted, "final_at": segment.final_at[:2], "state": segment.state[:5]}
    return {**segment.obs, **segment.columns, **finals, **rest, "header": segment.header}


@pytest.mark.parametrize("name", blocks(filled()[1]))
def test_a_changed_bit_is_found_in_its_column(name: str) -> None:
    _, segment = filled()
    data = blocks(segment)[name].reshape(-1).view(np.uint8)
    for at in range(len(data)):
        data[at] ^= 1
        with pytest.raises(InvariantError, match=f"worker-1, group 2, segment 5: column {name} was changed"):
            check_seal(segment, 2, 5)
        data[at] ^= 1
    check_seal(segment, 2, 5)


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, LAYOUT.nbytes - 1), length=st.integers(1, 400), seed=st.integers(0, 9))
def test_a_stray_write_is_found_unless_nobody_reads_what_it_hit(at: int, length: int, seed: int) -> None:
    memory, segment = filled(seed=seed)
    first = LAYOUT.nbytes + at
    before = {name: array.tobytes() for name, array in blocks(segment).items()}
    for n in range(first, min(first + length, len(memory))):
        memory[n] ^= 0xA5
    if {name: array.tobytes() for name, array in blocks(segment).items()} != before:
        with pytest.raises(InvariantError):
            check_seal(segment, 2, 5)


@pytest.mark.parametrize(("side", "at"), [("before", 0), ("before", -1), ("behind", 0), ("behind", -1)])
def test_a_write_beyond_a_neighbours_slot_hits_the_marks(side: str, at: int) -> None:
    memory, segment = filled()
    memory[LAYOUT.nbytes + (0 if side == "before" else LAYOUT.nbytes - GUARD_BYTES) + at % GUARD_BYTES] ^= 1
    with pytest.raises(InvariantError, match=f"segment 5: the 64 bytes {side} its slot were written over"):
        check_seal(segment, 2, 5)


@pytest.mark.parametrize(("group", "ordinal"), [(2, 6), (3, 5)])
def test_another_segment_than_the_one_expected(group: int, ordinal: int) -> None:
    with pytest.raises(InvariantError, match="its slot holds segment 5 of group 2"):
        check_seal(filled()[1], group, ordinal)


def test_without_debug_there_is_nothing_to_check_and_no_room_for_it() -> None:
    plain = SegmentLayout(4, 3, LAYOUT.obs, LAYOUT.columns, 9)
    segment = plain.allocate()
    seal(segment, 0, 0, 0)
    check_seal(segment, 7, 7)
    assert LAYOUT.nbytes > plain.nbytes
    assert segment.seal.size == 0


# -- whole runs --------------------------------------------------------------------------------------------------------


def make(out: Path, **changes: Any) -> aiorl.Config:
    fields: dict[str, Any] = {
        "env": "run_envs:Counting", "algo": Toy(), "envs": 4, "group_size": 2, "workers": 2, "total_steps": 640,
        "off_policy_degree": 1, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0, "debug": True, "out": str(out),
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


@pytest.mark.parametrize("workers", [0, 2])
async def test_it_changes_nothing(tmp_path: Path, workers: int) -> None:
    hashes = set[str]()
    for debug in (False, True):
        result = await aiorl.train(make(tmp_path / str(debug), workers=workers, debug=debug))
        assert result.status == "completed"
        hashes.add(result.params_sha256)
    assert len(hashes) == 1


async def spoilt(config: aiorl.Config, spoil: Callable[[Segment], Any]) -> str:
    """What a run says after `spoil` was let loose on group 1's segment of rollout 3, which waits to be learned from."""
    passed = 0

    def passing(name: str) -> None:
        nonlocal passed
        passed += name == "update.before"
        if name == "update.before" and passed == 4:
            spoil(workers_of(run).segment(1, 3 % 2))

    with armed(passing):
        async with aiorl.Run(config) as run:
            with pytest.raises(InvariantError) as caught:
                await run.wait()
    assert run.result.updates == 3, "it was learned from"
    return str(caught.value)


async def test_the_learner_looks_before_it_learns(tmp_path: Path) -> None:
    def one_reward(segment: Segment) -> None:
        segment.columns["reward"][5, 1] += 1e-9

    text = await spoilt(make(tmp_path / "1"), one_reward)
    assert text.startswith("worker-1, group 1, segment 3: column reward was changed after it was complete")
    assert len(text.splitlines()) <= 3

    def beyond(segment: Segment) -> None:
        segment.guards["behind"][7] = 0

    assert "the 64 bytes behind its slot were written over" in await spoilt(make(tmp_path / "2"), beyond)


def test_the_command_line_turns_it_on(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (([], "debug = false"), (["--debug"], "debug = true")):
        assert main(["train", "CartPole-v1", "--dry-run", *words]) == 0
        assert expected in capsys.readouterr().out
