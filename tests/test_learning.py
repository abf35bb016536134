"""The synchronous half of a run: updates, books, what is captured for a checkpoint, and hashes of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from experience import Stream, context, digest, spaces
from torch_threads import threads_of_a_new_thread
from toys import Toy, ToyLearner

from aiorl.errors import InvariantError, TrainingError
from aiorl.learning import Outcome, Trainer, fingerprint, params_sha256
from aiorl.ledger import Ledger
from aiorl.pacing import Grant, RolloutPlan
from aiorl.segments import Array, Segment, SegmentHeader

SPACES = spaces()
GROUPS, N, STEPS = 2, 2, 8

Make = Callable[..., Trainer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Trainer] = []

    def call(settings: Any = None, **fields: Any) -> Trainer:
        made.append(Trainer(Toy(**fields), SPACES, context(), Ledger(GROUPS, N), 1, settings))
        return made[-1]

    yield call
    for trainer in made:
        trainer.close()


def rollout(k: int) -> tuple[RolloutPlan, tuple[Segment, ...]]:
    """The k-th made-up rollout: groups in the order 1, 0."""
    streams = [Stream(SPACES, N, STEPS, seed=group) for group in range(GROUPS)]
    segments = [[stream.next().segments[0] for _ in range(k + 1)][-1] for stream in streams]
    for group, segment in enumerate(segments):
        segment.header[SegmentHeader.STARTED_S], segment.header[SegmentHeader.ENDED_S] = 10.0, 11.0 + group
    return RolloutPlan(k, (Grant(1, k, 0, k), Grant(0, k, 0, k))), (segments[1], segments[0])


def train(trainer: Trainer, first: int, last: int) -> list[Outcome]:
    return [trainer.update(*rollout(k)) for k in range(first, last)]


def test_an_update_enters_the_books_and_reports(make: Make) -> None:
    trainer = make()
    first, second = train(trainer, 0, 2)
    assert first.metrics.keys() == {"norm"}
    assert (first.gradient_steps, first.env_steps, first.stored) == (1, STEPS * N * GROUPS, STEPS * N * GROUPS)
    assert second.stored == 2 * first.stored
    assert (first.collect_seconds, first.collected_seconds) == (2.0, 3.0), "the longest segment, and all of them"
    assert sorted(first.segment_seconds) == [1.0, 2.0]
    assert first.update_seconds > 0
    assert len(first.episodes) + len(second.episodes) == trainer.ledger.episodes > 0
    assert {e.env for e in first.episodes} <= set(range(4))
    assert second.fingerprint == fingerprint(trainer.learner.weights())


def test_columns_are_named_by_their_environments(make: Make) -> None:
    trainer, seen = make(), []
    update = trainer.learner.update
    trainer.learner.update = lambda r: seen.append((r.index, r.behaviour_version, r.envs.tolist())) or update(r)  # type: ignore[method-assign,func-returns-value]
    train(trainer, 0, 1)
    assert seen == [(0, 0, [2, 3, 0, 1])]


def test_metrics_without_gradient_steps_are_refused(make: Make) -> None:
    trainer = make()
    trainer.learner.update = lambda r: {"loss": 1.0}  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"ToyLearner\.update returned no `gradient_steps`"):
        train(trainer, 0, 1)


def test_capture_and_restore_go_on_as_if_nothing_had_happened(make: Make) -> None:
    whole = make()
    train(whole, 0, 5)
    half = make()
    train(half, 0, 3)
    behaviour = {2: {"w": np.ones((3, 2), np.float32)}}
    parts = half.capture(behaviour)
    assert parts.keys() == {"policy", "learner", "run"}
    np.testing.assert_array_equal(parts["policy"]["w"], half.learner.weights()["w"])
    assert parts["run"]["behaviour"].keys() == {"2"}
    train(half, 3, 4)  # what was captured must not change any more
    behaviour[2]["w"][...] = 9
    assert parts["run"]["behaviour"]["2"]["w"].tolist() == np.ones((3, 2)).tolist()

    again = make()
    again.restore(parts)
    train(again, 3, 5)
    assert params_sha256(again.learner.weights()) == params_sha256(whole.learner.weights())
    assert digest(again.learner.state_dict()) == digest(whole.learner.state_dict())
    assert digest(again.ledger.state_dict()) == digest(whole.ledger.state_dict())


def test_where_a_group_stands_does_not_depend_on_what_has_been_learned_from(make: Make) -> None:
    delivered = {k: rollout(k)[1][1] for k in range(4)}  # of group 0
    whole = make()
    train(whole, 0, 4)
    expected = whole.ledger.cursor(0)
    assert expected is not None
    for used in range(5):
        trainer = make()
        train(trainer, 0, used)
        for oldest in range(used + 1):  # those learned from may still lie there
            found = trainer.where(0, {k: s for k, s in delivered.items() if k >= oldest})
            assert found is not None
            assert found.episodes.tolist() == expected.episodes.tolist()
            assert [a.tolist() for a in found.actions] == [a.tolist() for a in expected.actions]
            assert found.obs["obs"].tobytes() == expected.obs["obs"].tobytes()
    assert make().where(0, {}) is None


def test_where_a_group_stands_is_known_during_an_update(make: Make) -> None:
    trainer, seen = make(), []
    update, first = trainer.learner.update, rollout(0)
    trainer.learner.update = lambda r: seen.append(trainer.where(0, {0: first[1][1]})) or update(r)  # type: ignore[method-assign,func-returns-value]
    trainer.update(*first)
    assert seen[0].episodes.tolist() == trainer.where(0, {}).episodes.tolist()  # type: ignore[union-attr]


def test_a_gap_in_what_was_delivered_is_an_error(make: Make) -> None:
    trainer = make()
    train(trainer, 0, 1)
    with pytest.raises(InvariantError, match=r"group 0 delivered segments \[2\], expected those from 1 on"):
        trainer.where(0, {0: rollout(0)[1][1], 2: rollout(2)[1][1]})


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["learner"].update(w=np.zeros((9, 9), np.float32)),
        lambda p: p["learner"].pop("w"),
        lambda p: p["run"].pop("ledger"),
        lambda p: p["run"]["ledger"]["groups"].pop("0"),
    ],
)
def test_what_does_not_fit_is_refused(make: Make, change: Callable[[Any], Any]) -> None:
    trainer = make()
    train(trainer, 0, 1)
    parts = trainer.capture({})
    change(parts)
    with pytest.raises((ValueError, KeyError)):
        make().restore(parts)


def test_changed_settings_count_from_the_next_update_also_after_a_resume(make: Make) -> None:
    trainer = make()
    train(trainer, 0, 2)
    assert trainer.set({"learning_rate": 0.5}) == 2
    train(trainer, 2, 3)
    parts = trainer.capture({})
    resumed = make()
    resumed.restore(parts)
    assert resumed.set({"learning_rate": 0.25}) == 3
    train(resumed, 3, 4)
    with pytest.raises(ValueError, match="momentum"):
        resumed.set({"momentum": 1.0})

    repeated = make(settings={2: {"learning_rate": 0.5}, 3: {"learning_rate": 0.25}})
    outcomes = train(repeated, 0, 4)
    assert params_sha256(outcomes[-1].weights) == params_sha256(resumed.learner.weights())
    plain = make()
    assert params_sha256(train(plain, 0, 4)[-1].weights) != params_sha256(resumed.learner.weights())


def test_torch_threads_are_those_of_the_learner_thread_alone() -> None:
    import torch

    before, default = torch.get_num_threads(), threads_of_a_new_thread()
    trainer = Trainer(Toy(), SPACES, context(), Ledger(GROUPS, N), before + 1)
    assert isinstance(trainer.learner, ToyLearner)
    assert torch.get_num_threads() == before + 1
    assert threads_of_a_new_thread() == default
    trainer.close()
    assert torch.get_num_threads() == before
    assert threads_of_a_new_thread() == default


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_params_sha256_is_of_the_bytes_sorted_by_name() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2], np.int64)
    expected = hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest()
    assert params_sha256({"a": a, "b": b}) == expected
    assert params_sha256({"b": b, "a": a}) == expected, "the order of insertion does not count"
    assert params_sha256({"x": a, "y": b}) == expected, "names only sort"
    assert params_sha256({"a": b, "b": a}) != expected
    assert params_sha256({}) == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a.astype(">f4"), np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    ],
    ids=["big endian", "fortran", "strided", "read only"],
)  # fmt: skip
def test_params_sha256_depends_on_values_not_on_their_place_in_memory(form: Callable[[Array], Array]) -> None:
    a = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    assert params_sha256({"a": form(a)}) == params_sha256({"a": a})


def test_one_bit_changes_the_hash_and_the_fingerprint() -> None:
    a = np.zeros(2000, np.float32)
    b = a.copy()
    b[3] = np.nextafter(np.float32(0), np.float32(1))
    assert params_sha256({"a": a}) != params_sha256({"a": b})
    assert fingerprint({"a": a}) != fingerprint({"a": b})
    assert 0 <= fingerprint({"a": a}) < 2**32
