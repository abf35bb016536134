"""Going on from a checkpoint: what it holds, the configuration it was made with, in what a new one must agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from aiorl import checkpoint, policy
from aiorl.algos import named_within
from aiorl.algos.base import Wrapping
from aiorl.config import Config, EvalSuite, env_name
from aiorl.degree import check_degree
from aiorl.envs.spaces import Spaces
from aiorl.errors import CheckpointError
from aiorl.events import Evaluated, EvaluationSkipped
from aiorl.ledger import check_state as check_ledger
from aiorl.report import Report
from aiorl.segments import SegmentLayout
from aiorl.structs import convert
from aiorl.trees import check_tree

PARTS = ("policy", "learner", "run")


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from."""

    path: Path
    manifest: checkpoint.Manifest
    parts: dict[str, checkpoint.Tree]

    @property
    def degree(self) -> dict[str, Any]:
        """What the degree had become (see `Dial.state_dict`); empty if it was as configured."""
        return self.parts["run"].get("degree", {})


def read_saved(path: Path) -> Saved:
    """The checkpoint to resume: a checkpoint directory, or the newest one of a run directory."""
    found = policy.find(path.absolute(), "latest")
    try:
        return Saved(found, *checkpoint.load(found, PARTS))
    except CheckpointError as error:
        raise with_older(error, found) from None


def with_older(error: CheckpointError, found: Path) -> CheckpointError:
    """What is wrong with a run's checkpoint, and the newest whole one before it, if there is one."""
    others = checkpoint.complete_checkpoints(found.parent) if found.parent.name == "checkpoints" else []
    for older in reversed(others[: others.index(found)] if found in others else []):
        with contextlib.suppress(CheckpointError):
            checkpoint.load(older, PARTS)
            return CheckpointError(f"{error}\n  one before it is whole: python -m aiorl resume {older}")
    return error


def check_newest(saved: Saved, asked: str | Path) -> None:
    """See that what was read is still what `asked` means: until a run is held, somebody else may go on with it.

    Raises CheckpointError if not. What they have saved would be pruned, as of a future that was given up.
    """
    path = Path(asked).absolute()
    if path != saved.path and (newest := policy.find(path, "latest")) != saved.path:
        raise CheckpointError(
            f"{asked} has gone on from {saved.path.name} to {newest.name} while this process made ready to resume it\n"
            f"  run it again to go on from there, or name the checkpoint: {saved.path}"
        )


def resumed_config(path: str | Path, **changes: Any) -> Config:
    """The configuration that a checkpoint was made with, read from its run's config.toml, with `changes` on top."""
    found = policy.find(Path(path).absolute(), "latest")
    if found.parent.name != "checkpoints":
        raise CheckpointError(
            f"{path} holds a policy to act with, not a state to go on from\n  resume the run, or one of its checkpoints/"
        )
    source = found.parent.parent / "config.toml"
    config = Config.from_toml(source)
    return config.replace(out=str(source.parent), **changes)


# A resumed run must agree in these with its checkpoint, and in the settings of its algorithm but for those that change no
# result.
_FIXED = (
    "env", "env_kwargs", "native_vector", "frame_stack", "algo", "seed", "envs", "group_size", "segment_length", "schedule",
    "inference", "warmup",
)  # fmt: skip
_FREE = ("storage",)


def check_fits(saved: Saved, config: Config, spaces: Spaces) -> None:
    """Name the first thing in which a checkpoint and a configuration disagree. Raises CheckpointError."""
    made, now = saved.manifest.config, msgspec.to_builtins(config.to_dict())
    pairs = {key: (made.get(key), now.get(key)) for key in _FIXED}
    if pairs["algo"][0] == pairs["algo"][1]:
        pairs |= settings(saved, config.algorithm)
    for key, (before, after) in pairs.items():
        if before != after:
            raise CheckpointError(
                f"{saved.path} was made with {key} = {before!r}, the configuration says {after!r}\n"
                "  resume with the same value, or start a new run"
            )
    if saved.manifest.spaces != spaces:
        raise CheckpointError(
            f"{saved.path} was made for other spaces than {config.env} has now\n"
            f"  saved: {saved.manifest.spaces.describe()}\n  now:   {spaces.describe()}"
        )


def settings(saved: Saved, algorithm: Any) -> dict[str, tuple[Any, Any]]:
    """Each setting of the algorithm, by its name in a file: as saved (if it was not, the default), and now."""
    table = saved.manifest.config.get(algorithm.name, {})
    if foreign := set(named_within(table)) - set(named_within(msgspec.to_builtins(algorithm))):
        raise CheckpointError(
            f"{saved.path} was made with {min(foreign)}, which the configuration does not name\n"
            "  a file must not decide what is imported: resume with the same value, or start a new run"
        )
    before = convert(table, type(algorithm), str(saved.path), f"{algorithm.name}.")
    whole = (a.written_out() if isinstance(a, Wrapping) else a for a in (before, algorithm))
    old, new = (dict(_flat(msgspec.to_builtins(a), algorithm.name)) for a in whole)
    return {key: (old.get(key), new.get(key)) for key in old | new if key.rpartition(".")[2] not in _FREE}


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def check_state(saved: Saved, config: Config, segment: SegmentLayout) -> None:
    """See that what was saved is of this run in form, and that its parts agree with each other."""
    manifest, run = saved.manifest, saved.parts["run"]
    try:
        ledger = run["ledger"]
        check_ledger(ledger, config.groups, segment)
        Report(None).load_state_dict(run["report"], 0)
        check_degree(run["degree"])
        if not all(isinstance(value, int | float) for value in run["set_now"].values()):
            raise ValueError(f"set_now: {run['set_now']}, expected numbers")
        for version, weights in run["behaviour"].items():
            check_tree(weights, saved.parts["policy"], f"behaviour.{int(version)}")
        segments = sum(books["segments"] for books in ledger["groups"].values())
        if (segments, ledger["stored"]) != (manifest.version * config.groups, manifest.env_steps):
            raise ValueError(f"{segments} segments with {ledger['stored']} env steps are not {manifest.version} updates")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} is damaged or of another make: {error}") from None


def read_late(
    directory: Path, pending: Sequence[tuple[int, int]], config: Config
) -> tuple[dict[int, list[Evaluated]], Evaluated | None]:
    """What a run directory knows of evaluations that were due when its checkpoint was captured, by version, and of `best/`.

    An evaluation may end after the checkpoint that was begun with it: its result is in the events alone. One of which
    only some suites were played counts as not made. No list: it was skipped.
    """
    wanted = {version for version, _ in pending}
    found: dict[int, dict[str, Evaluated] | None] = {}
    for event in _evaluated(directory / "events.jsonl") if wanted else ():
        if isinstance(event, EvaluationSkipped):
            found[event.version] = None
        else:
            found[event.version] = (found.get(event.version) or {}) | {event.suite: event}
    results = {v: list((events or {}).values()) for v, events in found.items() if v in wanted}
    suites, best = max(1, len(config.eval_suites)), _best(directory, config)
    return {v: events for v, events in results.items() if not events or len(events) == suites}, best


def judged_alike(made: Mapping[str, Any], config: Config) -> bool:
    """Whether a recorded configuration of this run has the same primary suite: only then are results comparable."""
    try:
        recorded = msgspec.convert(made.get("eval_suites", {}), dict[str, EvalSuite])
    except msgspec.ValidationError:
        return True  # as far as can be told
    name = config.primary_suite
    if not name or next(iter(recorded), "") != name:
        return not (name or recorded)
    suites = recorded[name], config.eval_suites[name]
    before, now = (suite.environment(env_name(config.env), config.env_kwargs) for suite in suites)
    return before == now


def _evaluated(path: Path) -> Iterator[Evaluated | EvaluationSkipped]:
    """What came of evaluations, in the order of its writing."""
    try:
        with path.open("rb") as file:
            for line in file:
                if b'"evaluat' in line[:40]:  # most lines are something else
                    yield msgspec.json.decode(line, type=Evaluated | EvaluationSkipped)
    except (OSError, msgspec.MsgspecError):
        return


def _best(directory: Path, config: Config) -> Evaluated | None:
    """The evaluation by which `best/` became the best; None if none can be read, or it was of another suite."""
    try:
        manifest = checkpoint.load_manifest(directory / "best")
        found = msgspec.convert(manifest.notes["evaluation"], Evaluated)
    except (CheckpointError, KeyError, msgspec.ValidationError):
        return None
    return found if found.suite == config.primary_suite and judged_alike(manifest.config, config) else None
