"""What a policy remembers from one segment to the next outlives its worker and the run, or is found not to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from kills import mortal_runs
from toys import Toy, ToyPolicy

import aiorl
from aiorl import checkpoint
from aiorl.algos.base import Recurrent
from aiorl.algos.selfplay import SelfPlay
from aiorl.envs.cursor import advance
from aiorl.envs.group import blocking_group
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import resolve_env
from aiorl.errors import ConfigError, InvariantError
from aiorl.preflight import check
from aiorl.seals import check_seal, lay_guards, seal
from aiorl.segments import Array, Column, SegmentLayout
from aiorl.testing import check_algorithm
from aiorl.testing.recording import Recording
from examples.custom_sequences import RecurrentQ

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="workers need POSIX")


class Undeclared(Toy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its policy goes by all that it has seen in an episode, and nobody is told."""

    name: ClassVar[str] = "undeclared"

    def policy(self, spaces: Spaces) -> Mindful:
        return Mindful(spaces)


class Declared(Undeclared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: ClassVar[str] = "declared"

    def policy_state(self, spaces: Spaces) -> dict[str, Column]:
        return {"seen": Column((spaces.features,)), "steps": Column((), "int64")}


class Mindful(ToyPolicy):
    def __init__(self, spaces: Spaces) -> None:
        super().__init__(spaces)
        self._seen, self._steps = np.zeros((1, spaces.features), np.float32), np.zeros(1, np.int64)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        self._seen = np.where(first[:, None], 0, self._seen) + self._spaces.encode(obs)
        self._steps = np.where(first, 0, self._steps) + 1
        actions = np.arange(self._w.shape[1])
        scores = 0.01 * self._seen @ self._w + 3 * (self._steps[:, None] % len(actions) == actions)
        if self._rng is not None:
            scores = scores + self._rng.gumbel(size=scores.shape)
        return scores.argmax(-1), {"score": scores.max(-1).astype(np.float32)}

    def state(self) -> dict[str, Array]:
        return {"seen": self._seen.astype(np.float32), "steps": self._steps}

    def restore(self, state: Mapping[str, Array]) -> None:
        self._seen, self._steps = state["seen"], state["steps"]


class Late(Undeclared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its policy's memory shows two steps later."""

    name: ClassVar[str] = "late"

    def policy(self, spaces: Spaces) -> Mindful:
        return Slow(spaces)


class Slow(Mindful):
    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        self._steps = np.where(first, 0, self._steps) + 1
        scores = self._spaces.encode(obs) @ self._w
        return scores.argmax(-1), {"score": (self._steps > 3).astype(np.float32)}


class Half(Declared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its policy takes over one of the two."""

    name: ClassVar[str] = "half"

    def policy(self, spaces: Spaces) -> Mindful:
        return Forgetful(spaces)


class Forgetful(Mindful):
    def restore(self, state: Mapping[str, Array]) -> None:
        self._seen = state["seen"]


class Vague(Declared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its policy remembers other things than it declares."""

    name: ClassVar[str] = "vague"

    def policy_state(self, spaces: Spaces) -> dict[str, Column]:
        return {"seen": Column((spaces.features,)), "steps": Column((2,), "int64")}


class Mute(Declared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its policy cannot say what it remembers."""

    name: ClassVar[str] = "mute"

    def policy(self, spaces: Spaces) -> Any:
        return ToyPolicy(spaces)


Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    return mortal_runs(
        tmp_path,
        env="run_envs:Counting", env_kwargs={"length": 20}, algo=Declared(), total_steps=1120, envs=8, group_size=2,
        segment_length=7, workers=0, off_policy_degree=1, eval_every=0, eval_episodes=2, checkpoint_every=0,
    )  # fmt: skip


# -- exact -------------------------------------------------------------------------------------------------------------


def test_who_declares_a_state_is_recurrent():
    assert isinstance(Declared(), Recurrent)
    assert isinstance(RecurrentQ(), Recurrent)
    for algorithm in (Undeclared(), aiorl.PPO(), aiorl.SAC(), SelfPlay()):
        assert not isinstance(algorithm, Recurrent)


async def test_what_a_policy_does_with_its_memory_stays_with_it(config: Make, monkeypatch: pytest.MonkeyPatch):
    """A run that is resumed and stopped before it has learned anything leaves the checkpoint that it began with."""

    def spoil(self: Mindful, state: Mapping[str, Array]) -> None:
        for leaf in state.values():
            leaf[...] = 77

    def remembered() -> list[Any]:
        _, parts = checkpoint.load(checkpoint.find(run.directory, "latest"), ("run",))
        return [g["cursor"]["policy_state"]["steps"].tolist() for g in parts["run"]["ledger"]["groups"].values()]

    async with aiorl.Run(config()) as run:
        async for event in run:
            if event.version >= 5:
                run.stop(final_evaluation=False)
    before, env_steps = remembered(), run.result.env_steps
    assert 77 not in before[0]
    monkeypatch.setattr(Mindful, "restore", spoil)
    async with aiorl.Run(config(out=None), resume=run.directory) as again:
        again.stop(final_evaluation=False)
    assert again.result.env_steps == env_steps
    assert remembered() == before


async def test_a_recorded_one_is_as_exact(config: Make):
    algo = Recording.of(Declared())
    whole = await aiorl.train(config(algo=algo))
    assert whole.params_sha256 != (await aiorl.train(config(algo=Recording.of(Toy())))).params_sha256
    async with aiorl.Run(config(algo=algo)) as run:
        async for event in run:
            if event.version >= 5:
                run.stop(final_evaluation=False)
    assert (await aiorl.train(config(algo=algo, out=None), resume=run.directory)).params_sha256 == whole.params_sha256


@needs_posix
@pytest.mark.parametrize("stepping", ["serial", "threads"])
async def test_a_new_worker_goes_on_from_what_the_last_one_remembered(config: Make, no_leaks: None, stepping: str):
    whole = await aiorl.train(config())
    assert whole.params_sha256 != (await aiorl.train(config(algo=Toy()))).params_sha256, "its memory makes no difference"
    async with asyncio.timeout(60):
        # In the middle of a segment, and in the middle of an episode.
        died = await aiorl.train(config([("kill", 30), ("exit", 11)], workers=1, stepping=stepping))
    assert died.restarts >= 1
    assert died.params_sha256 == whole.params_sha256


async def test_a_run_that_is_resumed_goes_on_from_it(config: Make):
    whole = await aiorl.train(config())
    async with aiorl.Run(config()) as run:
        async for event in run:
            if event.version >= 5:
                run.stop(final_evaluation=False)
    assert run.result.env_steps < whole.env_steps
    again = await aiorl.train(config(out=None), resume=run.directory)
    assert again.params_sha256 == whole.params_sha256


async def test_what_is_not_declared_is_lost(config: Make):
    """So the two tests above can fail."""
    whole = await aiorl.train(config(algo=Undeclared()))
    async with aiorl.Run(config(algo=Undeclared())) as run:
        async for event in run:
            if event.version >= 5:
                run.stop(final_evaluation=False)
    again = await aiorl.train(config(algo=Undeclared(), out=None), resume=run.directory)
    assert again.params_sha256 != whole.params_sha256


def test_it_travels_with_segment_and_cursor_and_is_sealed():
    look = probe(resolve_env("CartPole-v1", in_process=True), 3)
    columns = {"action": look.spaces.action_column, "reward": Column((), "float64"), "score": Column()}
    columns |= {name: Column((), "bool") for name in ("terminated", "truncated", "valid")}
    state = Declared().policy_state(look.spaces)
    segment = SegmentLayout(5, 3, look.spaces.obs_columns, columns, guarded=True, policy_state=state).allocate()
    lay_guards(segment)
    group, policy = blocking_group(look.spec, look.spaces, range(3), 0), Mindful(look.spaces)
    group.open(None)
    policy.begin({"w": np.zeros((4, 2), np.float32)}, 0, np.random.default_rng(0), 5)
    group.collect(policy, segment, 5)
    group.close()
    for name, place in segment.policy_state.items():
        place[...] = policy.state()[name]
    seal(segment, 0, 0, 0)
    cursor = advance(None, segment)
    assert cursor.policy_state["steps"].tolist() == [5, 5, 5]
    segment.policy_state["seen"][1, 2] += 1
    assert cursor.policy_state["seen"][1, 2] != segment.policy_state["seen"][1, 2], "not a copy"
    with pytest.raises(InvariantError, match=r"policy_state\.seen was changed"):
        check_seal(segment, 0, 0)


# -- refused, told, found ----------------------------------------------------------------------------------------------


def test_a_policy_that_cannot_say_it_is_refused(config: Make):
    with pytest.raises(ConfigError, match=r"mute declares a policy_state, and ToyPolicy lacks state\(\) or restore\(\)"):
        check(config(algo=Mute()), write=False)


SEEN = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"seen": SEEN, "steps": np.zeros((2, 2), int)}, r"has int64\[2, 2\] 'steps', .* declares int64\[2\]"),
        ({"seen": SEEN.astype(float), "steps": [1, 2]}, r"has float64\[2, 2\] 'seen', .* declares float32\[2, 2\]"),
        ({"seen": SEEN}, r"has no 'steps', policy_state\(\) declares int64\[2\]"),
        ({"seen": SEEN, "steps": [1, 2], "more": [0]}, r"has int64\[1\] 'more', .* declares no"),
    ],
    ids=["shape", "dtype", "less", "more"],
)
async def test_a_state_that_is_not_the_declared_one_ends_the_run_by_name(
    config: Make, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], match: str
):
    """Stored as declared it would be rounded or lost, and a new worker would go on from something else."""
    monkeypatch.setattr(Mindful, "state", lambda self: state)
    with pytest.raises(aiorl.AiorlError, match=match) as caught:
        await aiorl.train(config())
    assert len(str(caught.value).splitlines()) <= 3


def test_a_state_that_no_checkpoint_holds_is_refused(config: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Declared, "policy_state", lambda self, spaces: {"waves": Column((2,), "complex64")})
    with pytest.raises(ConfigError, match="policy_state 'waves' is complex64, which a checkpoint cannot hold"):
        check(config(), write=False)


async def test_a_checkpoint_from_before_it_was_declared_is_refused(config: Make, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as before:
        before.setattr(Declared, "policy_state", lambda self, spaces: {})
        done = await aiorl.train(config())
    with pytest.raises(aiorl.CheckpointError, match=r"groups\.0\.cursor\.policy_state"):
        await aiorl.train(config(total_steps=2000, out=None), resume=done.directory)


async def test_a_checkpoint_from_before_there_was_such_a_thing_is_resumed(config: Make, monkeypatch: pytest.MonkeyPatch):
    from aiorl import ledger

    def older(cursor: Any) -> dict[str, Any]:
        return {name: leaf for name, leaf in tree(cursor).items() if name != "policy_state"}

    tree = ledger._cursor_tree
    with monkeypatch.context() as before:
        before.setattr(ledger, "_cursor_tree", older)
        done = await aiorl.train(config(algo=Toy()))
    whole = await aiorl.train(config(algo=Toy(), total_steps=2000))
    again = await aiorl.train(config(algo=Toy(), total_steps=2000, out=None), resume=done.directory)
    assert again.params_sha256 == whole.params_sha256


@pytest.mark.parametrize(
    ("algorithm", "code", "words"),
    [
        (Undeclared(), "forgets", "remembers something beyond begin"),
        (Late(), "forgets", "remembers something beyond begin"),
        (Half(), "policy-state", "acts differently from the one whose state it got"),
        (Vague(), "policy-state", "steps int64"),
        (Mute(), "protocol", "restore, state"),
        (Declared(), "", ""),
        (Toy(), "", ""),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_doctor_says_what_is_wrong(algorithm: Toy, code: str, words: str):
    found = [f for f in check_algorithm(algorithm, learning=False) if f.severity == "error"]
    assert [f.code for f in found][:1] == [code] * bool(code)
    assert not code or words in found[0].message


def test_self_play_refuses_it(monkeypatch: pytest.MonkeyPatch):
    """Opponents come and go: whose memory would it be?"""
    monkeypatch.setattr("aiorl.algos.sac.SAC.policy_state", lambda self, spaces: {}, raising=False)
    with pytest.raises(ConfigError, match=r"selfplay\.algo = 'sac' has a policy_state, which opponents cannot have"):
        check(aiorl.Config(env="games:race", algo=SelfPlay(algo="sac"), workers=0), write=False)
