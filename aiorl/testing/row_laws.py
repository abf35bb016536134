"""The laws of rows: what each environment contributed to a run, joined together, and checked row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from aiorl.ledger import Ledger
from aiorl.seeding import episode_seed
from aiorl.segments import Array
from aiorl.testing import ledger_env
from aiorl.testing.recording import Taken, Tape


class Violation(NamedTuple):
    """A law and how it was broken, in numbers."""

    law: str
    what: str


class Open(NamedTuple):
    """Where an environment goes on: step `t` of its episode `episode`."""

    episode: int
    t: int


class History(NamedTuple):
    """All rows of one environment in order: leaves and columns [N, …]. `place` [N, 2]: rollout and row. `fresh` [N]: how
    many episodes were aborted between the row and the one before it."""

    env: int
    obs: dict[str, Array]
    next_obs: dict[str, Array]
    columns: dict[str, Array]
    place: Array
    fresh: Array

    def at(self, row: int) -> str:
        rollout, t = self.place[row].tolist()
        return f"environment {self.env}, rollout {rollout}, row {t}"


def histories(tape: Tape) -> dict[int, History]:
    """The valid rows of each environment, joined over all rollouts."""
    pieces: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, taken in enumerate(tape.rollouts):
        for column, env in enumerate(taken.envs.tolist()):
            pieces[env].append((number, column))
    found: dict[int, History] = {}
    for env, where in sorted(pieces.items()):
        valid = [tape.rollouts[n].columns["valid"][:, c] for n, c in where]

        def join(select: str, name: str, where: list[tuple[int, int]] = where, valid: list[Array] = valid) -> Array:
            parts = [getattr(tape.rollouts[n], select)[name] for n, _ in where]
            return np.concatenate([p[: len(v), c][v] for p, (_, c), v in zip(parts, where, valid, strict=True)])

        first = tape.rollouts[0]
        aborts = np.cumsum(np.concatenate([_aborts(tape.rollouts[n], c) for n, c in where]))[np.concatenate(valid)]
        found[env] = History(
            env,
            {name: join("obs", name) for name in first.obs},
            {name: join("next_obs", name) for name in first.next_obs},
            {name: join("columns", name) for name in first.columns},
            np.concatenate(
                [
                    np.column_stack([np.full(len(v), tape.rollouts[n].index), np.arange(len(v))])[v]
                    for (n, _), v in zip(where, valid, strict=True)
                ]
            ),
            np.diff(aborts, prepend=0),
        )
    return found


def _aborts(taken: Taken, column: int) -> Array:
    """[T] how many episodes were aborted before each row, or in it: at the beginning, and by rows that were spent on it."""
    spent = ~taken.columns["valid"][:, column] & taken.columns["truncated"][:, column]
    spent = spent.astype(np.int64)
    spent[0] += int(taken.aborted[column])
    return spent


def contiguous(history: History) -> Iterator[Violation]:
    ended = history.columns["terminated"] | history.columns["truncated"]
    for name, obs in history.obs.items():
        before, after = history.next_obs[name][:-1], obs[1:]
        differs = np.any((before != after).reshape(len(after), -1), axis=1) if len(after) else np.zeros(0, bool)
        for row in np.flatnonzero(differs & ~ended[:-1] & (history.fresh[1:] == 0)).tolist()[:3]:
            yield Violation(
                "contiguous", f"{history.at(row)}: {name} leads to {before[row]}, the next row begins with {after[row]}"
            )
    both = history.columns["terminated"] & history.columns["truncated"]
    if both.any():
        yield Violation("contiguous", f"{history.at(int(np.argmax(both)))} is both terminated and truncated")


def finite(history: History) -> Iterator[Violation]:
    for name, values in {"reward": history.columns["reward"], **history.obs, **history.next_obs}.items():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
        if bad.any():
            row = int(np.argmax(bad))
            yield Violation("true", f"{history.at(row)}: {name} is {values[row]}")


def true(history: History, root: int, begin: Open, *, may_abort: bool) -> Iterator[Violation]:
    """Every row of a LedgerEnv against what its seed says, from where it began. `may_abort`: for NaN or infinity."""
    [obs], [after], columns = history.obs.values(), history.next_obs.values(), history.columns
    seed, t, action = obs[:, 0].astype(np.int64), obs[:, 1].astype(np.int64), columns["action"].astype(np.int64)
    ended = t + 1 >= ledger_env.length_of(seed)
    cut = ledger_env.is_cut(seed)
    tests = {
        "its observation has a false checksum": ~ledger_env.is_true(obs),
        "its next observation has a false checksum": ~ledger_env.is_true(after),
        "its next observation is not that of this step": (
            (after[:, 0] != seed) | (after[:, 1] != t + 1) | (after[:, 2] != action)
        ),
        "its reward is not that of this step": columns["reward"] != ledger_env.rewards(seed, t + 1, action),
        "terminated is false": columns["terminated"] != (ended & ~cut),
        "truncated is false": columns["truncated"] != (ended & cut),
    }
    for complaint, wrong in tests.items():
        if wrong.any():
            row = int(np.argmax(wrong))
            yield Violation("true", f"{history.at(row)}: {complaint} ({np.count_nonzero(wrong)} such rows)")
    if history.fresh.any() and not may_abort:
        row = int(np.argmax(history.fresh))
        yield Violation("true", f"{history.at(row)}: aborted, although this environment can be brought back")
    yield from _unique(history, root, seed, t, begin)


def _unique(history: History, root: int, seed: Array, t: Array, begin: Open) -> Iterator[Violation]:
    """The episodes of one environment follow each other with all their steps, each once, from `begin` on."""
    places = list(zip(seed.tolist(), t.tolist(), strict=True))
    seen: dict[tuple[int, int], int] = {}
    episode, step = begin
    for row, place in enumerate(places):
        if place in seen:
            yield Violation("unique", f"{history.at(row)} is {history.at(seen[place])} once more (step {place[1]})")
            return
        seen[place] = row
        if aborted := int(history.fresh[row]):
            episode, step = episode + aborted, 0
        if place != (episode_seed(root, history.env, episode), step):
            yield Violation("unique", f"{history.at(row)}: expected step {step} of episode {episode}, found {place}")
            return
        step += 1
        if step >= ledger_env.length_of(np.int64(place[0])):  # pyright: ignore[reportArgumentType]
            episode, step = episode + 1, 0


def returns(
    tape: Tape, ledger: Ledger, *, episodes: int, recent: list[float], totals: Mapping[int, float]
) -> Iterator[Violation]:
    """The last returns in the books, added up again from the rows. The rest is what the books said at the beginning:
    `episodes` that were over, the last of their returns, and the rewards of the open one of each environment."""
    open_totals: dict[int, float] = defaultdict(float, totals)
    found: list[float] = []
    for taken in tape.rollouts:
        c = taken.columns
        ended = (c["terminated"] | c["truncated"]).tolist()
        reward, valid = c["reward"].tolist(), c["valid"].tolist()
        for column, env in enumerate(taken.envs.tolist()):
            if taken.aborted[column]:
                open_totals.pop(env, None)
            for row in range(len(reward)):
                if valid[row][column]:
                    open_totals[env] += reward[row][column]
                if ended[row][column]:
                    total = open_totals.pop(env, 0.0)
                    found += [total] * valid[row][column]
    if ledger.episodes != episodes + len(found):
        yield Violation("returns", f"{episodes + len(found)} episodes were stored, the books say {ledger.episodes}")
    expected = [*recent, *found][-100:]
    if list(ledger.recent) != expected:
        yield Violation("returns", f"the last returns are {expected[-3:]}, the books say {list(ledger.recent)[-3:]}")
