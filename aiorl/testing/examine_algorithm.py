"""Trying out an algorithm: does it keep its protocols, is it exact where that is promised, does it read ends rightly?

Everything is asked from outside, so it holds for any algorithm: on `aiorl.testing.chain.Chain`, which has six states.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from multiprocessing import reduction
from pathlib import Path
from typing import Any, cast

from aiorl import preflight
from aiorl.algos.base import Algorithm, Learner, LearnerContext, Policy, Recurrent, RecurrentPolicy
from aiorl.config import Config
from aiorl.envs.make import probe
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.errors import ConfigError
from aiorl.learning import params_sha256
from aiorl.run import Run, train
from aiorl.testing import learner_checks, policy_checks, replay_checks, task_checks
from aiorl.testing.bench import Bench, context, record
from aiorl.testing.findings import Finding, error, errors, left_out, sort, warning
from aiorl.testing.plain_loop import plain_loop

CHAIN = "aiorl.testing.chain:Chain"
ACTIONS = ("discrete", "box", "multi_discrete", "multi_binary")

RUN_ENVS, RUN_STEPS, RUN_ROLLOUTS, RUN_SEED = 4, 16, 6, 5

CHECKS: tuple[Callable[[Bench], Iterator[Finding]], ...] = (
    learner_checks.metrics, learner_checks.weights, learner_checks.moves, learner_checks.experience,
    learner_checks.repeatable, learner_checks.state, learner_checks.settings, learner_checks.not_finite,
    policy_checks.policy, replay_checks.update_ratio, replay_checks.held, replay_checks.target,
)  # fmt: skip
COMPARES: dict[Callable[[Bench], Iterator[Finding]], str] = {
    learner_checks.moves: "what its updates move", learner_checks.experience: "what it learns from",
    learner_checks.repeatable: "whether it repeats itself", learner_checks.state: "its state",
    learner_checks.settings: "what can be set", replay_checks.held: "whether it samples from all that it holds",
}  # fmt: skip
"""Those that compare weights, and what each is about: where weights move as they are asked for, any two differ."""


def check_algorithm(
    algorithm: Algorithm | type[Algorithm], *, learning: bool = True, tell: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Look for everything that would make a training with `algorithm` inexact, fail when resumed, or come out wrong.

    `algorithm` is a configuration, or its class if the defaults will do. With `learning` it is also trained on problems
    of a few states, to see what values it comes to, that it acts on what it learned, and that truncation bootstraps and
    termination does not: with that it takes some 15 seconds for DQN, minutes for large networks. Runs in this process.
    `tell` is told what is looked at next.
    """
    if inspect.isclass(algorithm):
        algorithm = cast("type[Any]", algorithm)()
    algorithm = cast("Algorithm", algorithm)
    if missing := list(_protocol(algorithm, Algorithm)):
        return missing
    try:
        env, spaces = _environment(algorithm)
    except ConfigError as refusal:
        return [error("refuses-all", f"check() refuses every kind of action space, the last with: {refusal}")]
    findings: list[Finding] = []
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="aiorl-check-") as directory:
        for stage in _stages(algorithm, env, spaces, learning, Path(directory), skipped):
            if errors(findings):
                skipped += stage
                continue
            for about, check in stage.items():
                tell(about)
                findings += check()
    return [*sort(findings), *left_out(skipped)]


def check_fit(algorithm: Algorithm | type[Algorithm], env: str, kwargs: Mapping[str, Any]) -> list[Finding]:
    """Whether a run with the algorithm in this environment would be refused (action space, warm-up, buffer, memory), or
    learn hardly as it is meant."""
    if inspect.isclass(algorithm):
        algorithm = cast("type[Any]", algorithm)()
    try:
        checked = preflight.check(Config(env=env, env_kwargs=dict(kwargs), algo=algorithm), write=False)
    except ConfigError as refusal:
        return [error("refused", *(line.strip() for line in str(refusal).splitlines()))]
    return [warning("doubtful", told) for told in checked.doubts]


def _stages(
    algorithm: Algorithm, env: EnvSpec, spaces: Spaces, learning: bool, directory: Path, skipped: list[str]
) -> Iterator[dict[str, Callable[[], list[Finding]]]]:
    """The checks in their order, by what each is about; after an error in one stage those that follow make no sense.

    What is left out within a check is added to `skipped`.
    """
    given = context(directory=directory)
    bench = cache(lambda: record(algorithm, env, directory))
    yield {"its form": lambda: [*_declared(algorithm), *_guarded("protocol", lambda: _halves(algorithm, spaces, given))]}
    yield {"its actions": lambda: _guarded("weights", lambda: policy_checks.actions(algorithm, spaces, given))}
    yield {"its policy and its learner": lambda: _guarded("runs", lambda: _examine(bench(), skipped))}
    last = {"whole runs": lambda: _in_a_thread(lambda: asyncio.run(_runs(bench(), directory)))}
    if learning and replay_checks.learns_from_replay(algorithm):
        last["the values that it learns"] = lambda: _guarded("value", lambda: replay_checks.value(bench()))
    if learning:
        tasks = "acting on what it learned, ends of episodes"
        last[tasks] = lambda: _guarded("tasks", lambda: task_checks.tasks(bench()))
    yield last


def _examine(bench: Bench, skipped: list[str]) -> Iterator[Finding]:
    weights_move = False
    for check in CHECKS:
        if weights_move and check in COMPARES:
            skipped.append(COMPARES[check])
            continue
        found = _guarded(check.__name__, lambda check=check: check(bench))
        weights_move = weights_move or any(finding.code == "weights-move" for finding in found)
        yield from found


def _guarded(code: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What an algorithm raises is a finding as well."""
    try:
        return list(check())
    except Exception as failure:
        return [error(code.replace("_", "-"), f"raised {type(failure).__name__}: {failure}")]


# -- the form ----------------------------------------------------------------------------------------------------------


def _protocol(thing: Any, protocol: Any) -> Iterator[Finding]:
    names = {*vars(protocol), *inspect.get_annotations(protocol)}
    if missing := sorted(name for name in names if not name.startswith("_") and not hasattr(thing, name)):
        kind = protocol.__name__
        yield error(
            "protocol", f"{type(thing).__name__} has no {', '.join(missing)}", f"see {kind} in aiorl/algos/base.py"
        )


def _halves(algorithm: Algorithm, spaces: Spaces, given: LearnerContext) -> Iterator[Finding]:
    policy = algorithm.policy(spaces)
    yield from _protocol(policy, Policy)
    if isinstance(algorithm, Recurrent):
        yield from _protocol(policy, RecurrentPolicy)
    yield from _protocol(algorithm.learner(spaces, given), Learner)


def _environment(algorithm: Algorithm) -> tuple[EnvSpec, Spaces]:
    """The chain with the first kind of actions that the algorithm takes. Raises ConfigError if it takes none."""
    refusal = ""
    for action in ACTIONS:
        spec = EnvSpec(CHAIN, {"action": action}, CHAIN)
        spaces = probe(spec).spaces
        try:
            algorithm.check(spaces)
        except (ConfigError, AssertionError) as no:
            refusal = str(no)
        else:
            return spec, spaces
    raise ConfigError(refusal)


def _declared(algorithm: Algorithm) -> Iterator[Finding]:
    if not isinstance(algorithm.corrects_staleness, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield error(
            "corrects-staleness", f"corrects_staleness is {algorithm.corrects_staleness!r}, expected True or False"
        )
    length = algorithm.default_segment_length
    if not isinstance(length, int) or length < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        yield error("segment-length", f"default_segment_length is {length!r}, expected a whole number of steps")
    try:
        reduction.ForkingPickler.dumps(algorithm)
    except (pickle.PicklingError, TypeError, AttributeError) as failure:
        yield error(
            "importable",
            f"the configuration cannot be sent to a worker: {failure}",
            "define its class at the top level of a module",
        )


# -- whole runs --------------------------------------------------------------------------------------------------------


async def _runs(bench: Bench, directory: Path) -> list[Finding]:
    """In this process, without workers: equal to the plain loop, and to itself when it is stopped and resumed."""
    whole = ""
    for degree in [0, 2] if bench.algorithm.corrects_staleness else [0]:
        result = await train(_config(bench, directory / f"degree-{degree}", degree))
        learner = plain_loop(
            bench.algorithm, bench.env, envs=RUN_ENVS, group_size=2, steps=RUN_STEPS, seed=RUN_SEED,
            rollouts=RUN_ROLLOUTS, degree=degree, warmup=RUN_STEPS, directory=directory,
        )  # fmt: skip
        whole = whole or result.params_sha256
        if params_sha256(learner.weights()) != result.params_sha256:
            return [error(
                "not-serial",
                f"a run at off_policy_degree {degree} does not end where the plain loop ends",
                "something depends on more than seed, weights and rollouts: on time, threads, or what instances share",
            )]  # fmt: skip
    halves = _config(bench, directory / "halves", 0)
    async with Run(halves) as run:
        async for event in run:
            if event.version >= RUN_ROLLOUTS // 2:
                run.stop(final_evaluation=False)
    if (await train(halves, resume=run.directory)).params_sha256 != whole:
        return [error(
            "not-resumable",
            "a run that was stopped and resumed does not end where one without a stop ends",
            "something is missing from state_dict, or changes on its way through a file",
        )]  # fmt: skip
    return []


def _config(bench: Bench, out: Path, degree: int) -> Config:
    return Config(
        env=CHAIN, env_kwargs=dict(bench.env.kwargs), algo=bench.algorithm, seed=RUN_SEED, envs=RUN_ENVS, group_size=2,
        workers=0, segment_length=RUN_STEPS, total_steps=RUN_ROLLOUTS * RUN_STEPS * RUN_ENVS, off_policy_degree=degree,
        warmup=RUN_STEPS, eval_every=0, eval_episodes=1, checkpoint_every=0, out=str(out),
    )  # fmt: skip


def _in_a_thread(work: Callable[[], list[Finding]]) -> list[Finding]:
    """The caller may be inside an event loop, where no other can run."""
    results: list[list[Finding]] = []
    thread = threading.Thread(target=lambda: results.append(_guarded("run", work)), name="aiorl-check")
    thread.start()
    thread.join()
    return results[0]
