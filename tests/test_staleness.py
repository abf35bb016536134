"""The account of how old the data was."""

from __future__ import annotations

import msgspec

from aiorl.metrics.staleness import StalenessBooks
from aiorl.pacing import Grant, RolloutPlan


def plan(k: int, version: int, arrived_at: int) -> RolloutPlan:
    return RolloutPlan(k, (Grant(0, k, 0, version), Grant(1, k, 0, version + 1)), arrived_at)


def test_staleness_is_split_where_the_rollout_was_complete() -> None:
    books = StalenessBooks.empty()
    books.enter(plan(5, 2, 4), {})  # 2 versions in flight, 1 in the queue
    books.enter(plan(6, 6, 6), {})
    summary = books.summary()
    assert (summary["mean"], summary["max"]) == (1.5, 3)
    assert summary["histogram"] == {"0": 1, "3": 1}
    assert (summary["mean_in_flight"], summary["mean_in_queue"]) == (1.0, 0.5)


def test_what_staleness_does_is_kept_for_each_lag() -> None:
    books = StalenessBooks.empty()
    for version, ess in ((2, 0.5), (2, 0.7), (3, 0.9)):
        books.enter(plan(4, version, 4), {"ess": ess, "policy_loss": 1.0})
    books.enter(plan(4, 3, 4), {})  # an update that measured nothing does not count as one that measured 0
    assert books.summary()["by_lag"] == {"1": {"ess": 0.9}, "2": {"ess": 0.6}}


def test_its_fields_are_its_state() -> None:
    books = StalenessBooks.empty()
    books.enter(plan(4, 2, 3), {"ess": 0.5})
    again = msgspec.convert(msgspec.to_builtins(books, str_keys=True), StalenessBooks, str_keys=True)
    assert again == books
    again.enter(plan(5, 5, 5), {"ess": 1.0})
    assert StalenessBooks.empty() == StalenessBooks.empty(), "books do not share what they begin with"
    assert books.summary()["histogram"] == {"2": 1}
