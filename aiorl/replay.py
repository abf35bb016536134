"""Repeating a finished run from its configuration and record, and saying where it differs if it does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import msgspec

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.record import SCHEDULE, read_record
from aiorl.run import Run


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """How a repetition went. `first_difference` is the first rollout after whose update the weights differ, None if none."""

    rollouts: int
    recorded_sha256: str
    repeated_sha256: str
    first_difference: int | None
    seconds: float

    @property
    def equal(self) -> bool:
        return self.recorded_sha256 == self.repeated_sha256 and self.first_difference is None


async def replay(directory: str | Path, *, workers: int | None = None) -> Replayed:
    """Repeat the run in `directory`, with other timing and if asked another number of workers; the result must be the same.

    Whatever made the record what it is (the eager schedule, a stop, settings changed on the way) is read, not made again.
    Raises ConfigError if there is nothing to repeat.
    """
    path = Path(directory)
    config = Config.from_toml(path / "config.toml")
    updates, recorded_sha256 = _recorded(path)
    record = read_record(path)
    if not record.lines:
        raise ConfigError(f"{path} has no rollouts to repeat")
    if len(record.lines) < updates:
        raise ConfigError(
            f"{path / SCHEDULE} has {len(record.lines):,} of {updates:,} rollouts\n"
            "  copy all of it; what a full disk did not take cannot be repeated: train anew from config.toml"
        )
    with tempfile.TemporaryDirectory(prefix="aiorl-replay-") as out:
        changes = {} if workers is None else {"workers": workers, "min_workers": None}
        again = config.replace(
            out=f"{out}/run", eval_every=0, eval_episodes=1, eval_suites={}, eval_top=0, checkpoint_every=0, stop_at=None,
            **changes,
        )
        async with Run(again, record=record) as run:
            result = await run.wait()
        repeated = read_record(run.directory)
    pairs = zip(record.lines, repeated.lines, strict=False)
    differs = next((old.k for old, new in pairs if old.crc != new.crc), None)
    return Replayed(
        rollouts=len(repeated.lines),
        recorded_sha256=recorded_sha256,
        repeated_sha256=result.params_sha256,
        first_difference=differs,
        seconds=result.wall_seconds,
    )


def _recorded(path: Path) -> tuple[int, str]:
    """The number of updates of a run, and the digest of the parameters that they made."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return int(summary["updates"]), str(summary["params_sha256"])
    except FileNotFoundError:
        raise ConfigError(f"{path} has no summary.json: only a finished run can be repeated") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / 'summary.json'} cannot be read: {error!r}") from None
