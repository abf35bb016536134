"""Central inference: exact versions and exact rows, the same result for any workers and through every kill."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import kill, until, workers_of
from sims import SHAPES, Folder
from stamped import Broken, Stamped, Stuck
from torch_threads import in_a_new_thread, threads_of_a_new_thread
from toys import Toy

import aiorl
from aiorl.algos.base import CentralAlgorithm, Forward, LearnerContext, SplitPolicy
from aiorl.envs.make import probe
from aiorl.envs.spec import resolve_env
from aiorl.inference import Network
from aiorl.segments import Array
from aiorl.testing import FaultPlan, Pace, Recording, Sim, explore, seconds, simulate, step
from aiorl.workers.control import Stopped
from aiorl.workers.questions import Asking, MailboxLayout, Question, Questions
from aiorl.workers.records import Kind, Record

ALGORITHMS: dict[str, Any] = {
    "ppo": aiorl.PPO(normalise_obs=True, hidden=(32, 32), epochs=1, minibatches=2),
    "dqn": aiorl.DQN(warmup=200, update_ratio=0.1, hidden=(32, 32), dueling=True),
    "qrdqn": aiorl.QRDQN(warmup=200, update_ratio=0.1, hidden=(32, 32), normalise_obs=True, average=0.9),
    "sac": aiorl.SAC(warmup=200, random_steps=100, update_ratio=0.1, hidden=(16, 16), batch_size=32),
    "td3": aiorl.TD3(warmup=200, random_steps=100, update_ratio=0.1, hidden=(16, 16), batch_size=32),
}
Make = Callable[..., aiorl.Config]


@pytest.fixture
def config(tmp_path: Path) -> Make:
    count = iter(range(1000))

    def make(algo: Any = "ppo", **changes: Any) -> aiorl.Config:
        fields: dict[str, Any] = {
            "env": "CartPole-v1", "algo": ALGORITHMS.get(algo, algo), "total_steps": 768, "envs": 8, "group_size": 2,
            "segment_length": 16, "workers": 2, "off_policy_degree": 0, "eval_every": 0, "eval_episodes": 1,
            "checkpoint_every": 0, "inference": "central", "out": str(tmp_path / str(next(count))),
        }  # fmt: skip
        return aiorl.Config(**{**fields, **changes})

    return make


@pytest.fixture
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    made.close()


def same(results: list[aiorl.Result]) -> bool:
    return len({(r.params_sha256, r.env_steps, r.updates) for r in results}) == 1 and not any(r.dropped for r in results)


# -- the same results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degree", "algo"), [(0, "ppo"), (1, "dqn")])
async def test_nothing_but_the_speed_depends_on_the_workers(config: Make, no_leaks: None, degree: int, algo: str) -> None:
    ways: list[dict[str, Any]] = [
        {"workers": 0}, {"workers": 1}, {"stepping": "threads", "inference_wait_ms": 0.0},
    ]  # fmt: skip
    results = [await aiorl.train(config(algo, off_policy_degree=degree, **way)) for way in ways]
    results.append(await killed(config(algo, off_policy_degree=degree), version=3))
    assert same(results), [r.params_sha256 for r in results]
    alone = await aiorl.train(config(algo, off_policy_degree=degree, envs=2, workers=1))
    assert alone.params_sha256 != results[0].params_sha256, "what is compared here can differ"
    for result in results[1:]:
        assert result.inference["forwards"] >= 1
        assert result.waiting["inference"] > 0
    assert results[0].inference == {}


async def killed(config: aiorl.Config, version: int) -> aiorl.Result:
    async with asyncio.timeout(60), aiorl.Run(config) as run:
        async for event in run:
            if event.version >= version:
                kill(workers_of(run).pids[0])
                break
        result = await run.wait()
    assert result.restarts == 1
    return result


@pytest.mark.parametrize("algo", ["sac", "td3"])
async def test_continuous_actions(config: Make, algo: str) -> None:
    ways: list[dict[str, Any]] = [{"workers": 0}, {"workers": 2}]
    assert same([await aiorl.train(config(algo, env="Pendulum-v1", off_policy_degree=1, **way)) for way in ways])


async def test_coroutines_do_not_hold_the_loop_while_they_wait(config: Make, no_leaks: None) -> None:
    changes: dict[str, Any] = {"env": "lane_envs:AsyncCounting", "envs": 6, "group_size": 1, "off_policy_degree": 1,
                               "total_steps": 400}  # fmt: skip
    ways: list[dict[str, Any]] = [{"workers": 0}, {"workers": 1}, {"workers": 2, "steps_at_once": 2}]
    results = [await aiorl.train(config(Stamped(), **changes, **way)) for way in ways]
    assert same(results)
    assert results[1].inference["questions_per_forward"] > 1, "groups of one worker were not asked for together"


async def test_a_resumed_run_is_exact(config: Make) -> None:
    whole = await aiorl.train(config())
    halves = config()
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 3:
                run.stop(final_evaluation=False)
    assert 3 <= run.result.updates < whole.updates
    assert same([whole, await aiorl.train(halves, resume=run.directory)])


# -- every version and every row, in simulation ------------------------------------------------------------------------


def central(folder: Folder, shape: dict[str, Any], **changes: Any) -> aiorl.Config:
    fields = {"algo": Recording.of(Stamped()), "inference": "central", **changes}
    return folder.config(shape, **fields)


def test_every_answer_is_the_right_one_whatever_dies(folder: Folder) -> None:
    """`Stamped` raises at a wrong one."""
    asked = [0, 0]

    def trial(sim: Sim) -> None:
        shape = SHAPES[sim.seed % len(SHAPES)]
        chosen = central(folder, shape)
        plan = FaultPlan.random(sim.rng, int(chosen.workers), steps=400)
        done = sim.run(simulate(sim, chosen, plan, pace=Pace.random(sim.rng)))
        done.check_laws()
        assert not sim.left, f"left behind: {sim.left}"
        if done.run.result.status == "completed":
            asked[0] += 1
            asked[1] += done.run.result.restarts
        assert not re.search("asked (for|about)", done.run.result.error or "")
        shutil.rmtree(chosen.out or "", ignore_errors=True)

    explore(trial, seeds=20)
    assert asked[0] > 5
    assert asked[1] > 5, "the faults were not hard enough"


@pytest.mark.parametrize("degree", [0, 2])
def test_kills_leave_no_trace(folder: Folder, degree: int) -> None:
    hashes: set[str] = set()

    def trial(sim: Sim) -> None:
        workers = 1 + sim.seed % 3
        chosen = central(folder, {}, workers=workers, off_policy_degree=degree)
        plan = FaultPlan()
        for worker in range(workers):
            for _ in range(int(sim.rng.integers(0, 3))):
                plan = plan.kill(worker, step(int(sim.rng.integers(1, 60))))
        done = sim.run(simulate(sim, chosen, plan, pace=Pace.random(sim.rng)))
        done.check_laws()
        hashes.add(done.run.result.params_sha256)
        shutil.rmtree(chosen.out or "", ignore_errors=True)

    explore(trial, seeds=8)
    assert len(hashes) == 1


def test_a_group_that_waits_for_its_answer_does_not_hang(folder: Folder) -> None:
    sim = Sim(1)
    chosen = central(folder, {}, step_timeout_s=0.1, total_steps=160)
    done = sim.run(simulate(sim, chosen, pace=Pace(segment_s=0.001, file_s=0.5)))
    done.check_laws()
    assert (done.run.result.status, done.run.result.restarts) == ("completed", 0)
    assert done.run.result.inference["answered_in_ms"] > 300


@pytest.mark.parametrize("what", ["hang", "stop"])
def test_one_that_hangs_otherwise_is_noticed(folder: Folder, what: str) -> None:
    sim = Sim(2)
    plan = getattr(FaultPlan(), what)(1, step(7) if what == "hang" else seconds(0.5))
    done = sim.run(simulate(sim, central(folder, {}), plan))
    done.check_laws()
    assert (done.run.result.status, done.run.result.restarts) == ("completed", 1)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"central inference with version 0 failed: ZeroDivisionError: the matrix broke"),
        ("shape", r"forward\(\)\.apply returned \[8, 4\] float32, expected \[8, 5\] float32"),
    ],
)
async def test_a_failing_network_fails_the_run_by_name(config: Make, workers: int, how: str, message: str) -> None:
    with pytest.raises(aiorl.TrainingError if workers else aiorl.WorkerError, match=message):
        await aiorl.train(config(Broken(how=how), workers=workers))


async def test_an_environment_that_hangs_is_noticed_among_those_that_ask(config: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"env": "run_envs:Counting", "env_kwargs": {"length": 20}, "total_steps": 400}
    whole = await aiorl.train(config(Stamped(), **changes, workers=0))
    marks = tmp_path / "marks" / str(os.getpid())
    marks.mkdir(parents=True)
    changes |= {"env": "run_envs:Mortal", "env_kwargs": {"marks": str(marks), "deaths": [["hang", 12]], "length": 20}}
    result = await aiorl.train(config(Stamped(), **changes, step_timeout_s=0.5))
    assert same([whole, result])
    assert result.restarts == 1


@pytest.mark.parametrize("stepping", ["auto", "threads"])
async def test_leaving_waits_for_no_answer(config: Make, no_leaks: None, stepping: str) -> None:
    Stuck.begun, Stuck.go_on = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    try:
        async with aiorl.Run(config(Stuck(), stepping=stepping)) as run:
            await until(Stuck.begun.is_set)
            assert re.search(r"inference +computes the outputs of \d groups at .*\(wait\)", shown(run))
            workers = workers_of(run)
            worker = workers._keepers[0]._worker
            await until(lambda: sum(len(control.at_work()) for control in worker._controls) == 2)
            assert len(worker.stepping) == (2 if stepping == "threads" else 0), "tasks take turns: one may wait for another"
            begun_s = loop.time()
            pids = workers.pids
        assert loop.time() - begun_s < 6.0, "leaving took far longer than the two seconds promised"  # a busy machine
    finally:
        Stuck.go_on.set()
    assert len(pids) == 3
    assert all(k._worker.fault is not None and "code 0" in k._worker.fault.reason for k in workers._keepers)


def shown(run: aiorl.Run) -> str:
    return "\n".join(f"{row.who} {row.does}" for row in run._session.view().rows)


def test_an_algorithm_without_a_network_of_its_own_is_refused(config: Make) -> None:
    with pytest.raises(aiorl.ConfigError, match=r'inference = "central": toy has no `forward`'):
        config(Toy())


async def test_a_policy_that_cannot_be_split_is_refused(config: Make) -> None:
    class Whole(Stamped, frozen=True):
        def policy(self, spaces: Any) -> Any:
            return super(Stamped, self).policy(spaces)

    with pytest.raises(aiorl.ConfigError, match=r"policy of stamped has no `features` and `choose`"):
        await aiorl.train(config(Whole(), workers=0))


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algo", "env"), [("ppo", "CartPole-v1"), ("ppo", "Pendulum-v1"), ("dqn", "CartPole-v1"), ("sac", "Pendulum-v1"),
                      ("td3", "Pendulum-v1"), ("qrdqn", "CartPole-v1")],
)  # fmt: skip
def test_the_network_is_the_policys(algo: str, env: str) -> None:
    algorithm, spaces = ALGORITHMS[algo], probe(resolve_env(env, in_process=True)).spaces
    assert isinstance(algorithm, CentralAlgorithm)
    context = LearnerContext(seed=0, envs=4, segment_length=8, rollouts=4, off_policy_degree=0)
    weights = algorithm.learner(spaces, context).weights()
    policy, forward = algorithm.policy(spaces), algorithm.forward(spaces)
    assert isinstance(policy, SplitPolicy)
    rng, first = np.random.default_rng(0), np.zeros(4, bool)
    obs: dict[str, Array] = {n: rng.normal(size=(4, *c.shape)).astype(c.dtype) for n, c in spaces.obs_columns.items()}
    policy.begin(weights, 0, np.random.default_rng(1), 1)
    acted, extras = policy.act(obs, first)
    policy.begin(weights, 0, np.random.default_rng(1), 1)
    features = policy.features(obs, first)
    assert features.shape == (4, forward.features)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    outputs = forward.apply(tensors, torch.from_numpy(np.array(features))).numpy()
    assert outputs.shape == (4, forward.outputs)
    chosen, central_extras = policy.choose(outputs)
    np.testing.assert_allclose(chosen, acted, rtol=1e-5, atol=1e-6)
    for name in extras:
        np.testing.assert_allclose(central_extras[name], extras[name], rtol=1e-4, atol=1e-6)


GROUPS, SIZE, WIDTH = 5, 1, 37  # one row alone is multiplied in another way than five


def test_outputs_do_not_depend_on_who_asks_at_the_same_time() -> None:
    rng = np.random.default_rng(0)
    buffers = [{"w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)} for _ in range(3)]
    features = [rng.normal(size=(SIZE, WIDTH)).astype(np.float32) for _ in range(GROUPS)]
    loaded: list[int] = []

    def arrays(buffer: int) -> dict[str, Array]:
        loaded.append(buffer)
        return buffers[buffer]

    forward = Forward(WIDTH, WIDTH, lambda weights, x: torch.tanh(x @ weights["w"]))
    network = Network(forward, GROUPS, SIZE, arrays, keep=2, device="cpu", threads=torch.get_num_threads())

    def ask(groups: list[int], version: Callable[[int], int]) -> dict[int, bytes]:
        asked = [Question(Record(Kind.ASK, g, 1, version(g) % 3, 0, version(g)), features[g], 0.0) for g in groups]
        return {g: out.tobytes() for g, out in zip(groups, network.compute(asked), strict=True)}

    apart = {g: ask([g], lambda g: g % 2)[g] for g in range(GROUPS)}
    assert ask(list(range(GROUPS)), lambda g: g % 2) == apart
    assert ask([3, 1], lambda g: 1) == {g: apart[g] for g in (3, 1)}
    assert loaded == [0, 1], "a version is loaded once"
    ask([0], lambda g: 2)
    ask([0], lambda g: 1)
    assert loaded == [0, 1, 2], "not the oldest version has made room"
    close = np.tanh(features[3].astype(np.float64) @ buffers[1]["w"])
    np.testing.assert_allclose(np.frombuffer(apart[3], np.float32).reshape(SIZE, WIDTH), close, atol=1e-5)


def test_the_threads_of_others_stay_as_they_are() -> None:
    default = threads_of_a_new_thread()
    forward = Forward(WIDTH, WIDTH, lambda weights, x: x * torch.get_num_threads())
    network = Network(forward, 1, SIZE, lambda buffer: {}, keep=1, device="cpu", threads=default + 1)
    asked = Question(Record(Kind.ASK, 0, 1, 0, 0, 0), np.ones((SIZE, WIDTH), np.float32), 0.0)
    (outputs,) = in_a_new_thread(network.compute, [asked])
    assert (outputs == default + 1).all()
    assert threads_of_a_new_thread() == default


async def test_an_answer_to_the_process_before_is_none() -> None:
    rung: list[Record] = []
    asking = Asking(rung.append, threads=False)
    asked = Record(Kind.ASK, 4, 7, 0, 3, 2)
    waiting = asyncio.ensure_future(asking.ask(asked))
    await asyncio.sleep(0)
    assert rung == [asked]
    asking.answered(asked._replace(kind=Kind.ANSWER, slot=6))
    asking.answered(asked._replace(kind=Kind.ANSWER, group=5))
    await asyncio.sleep(0)
    assert not waiting.done()
    asking.answered(asked._replace(kind=Kind.ANSWER))
    asking.answered(asked._replace(kind=Kind.ANSWER))
    await waiting


@pytest.mark.parametrize("threads", [False, True])
async def test_who_waits_at_the_end_is_stopped(threads: bool) -> None:
    rung = threading.Event()
    asking = Asking(lambda record: rung.set(), threads=threads)

    def ask() -> None:
        with pytest.raises(Stopped):
            asyncio.run(asking.ask(Record(Kind.ASK)))

    if threads:
        waiting = asyncio.ensure_future(asyncio.to_thread(ask))
        await until(rung.is_set)
    else:
        waiting = asyncio.ensure_future(asking.ask(Record(Kind.ASK)))
        await asyncio.sleep(0)
    asking.close()
    if threads:
        await waiting
    else:
        with pytest.raises(Stopped):
            await waiting
    with pytest.raises(Stopped):
        await asking.ask(Record(Kind.ASK))


async def test_a_batch_is_complete_when_all_who_collect_have_asked() -> None:
    questions, features = Questions(), np.zeros((1, 1), np.float32)
    for group in (0, 1, 1):
        questions.granted(group)
    assert questions.collecting == 2
    questions.put(Record(Kind.ASK, 1, slot=1), features)
    questions.put(Record(Kind.ASK, 1, slot=2), features)  # its process was started again
    assert not questions.all_asked()
    questions.put(Record(Kind.ASK, 0, slot=1), features)
    assert questions.all_asked()
    assert [q.record[1:3] for q in questions.take()] == [(0, 1), (1, 2)]
    questions.filled(1)
    assert questions.collecting == 2
    questions.put(Record(Kind.ASK, 1, slot=2), features)
    questions.put(Record(Kind.ASK, 0, slot=1), features)  # of a process that was there before
    questions.filled(0)
    assert questions.all_asked()
    assert [q.record.group for q in questions.take()] == [1]


def test_mailboxes_lie_apart() -> None:
    layout = MailboxLayout(3, 5, 2)
    memory = bytearray(2 * layout.nbytes)
    boxes = [layout.view(memoryview(memory), at * layout.nbytes) for at in range(2)]
    for number, array in enumerate(array for box in boxes for array in box):
        array[...] = number
    assert [float(array.max()) for box in boxes for array in box] == [0, 1, 2, 3]
    assert [array.shape for array in boxes[0]] == [(3, 5), (3, 2)]
