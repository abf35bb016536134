"""Repeating a finished run from its configuration and record, and saying where it differs if it does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import msgspec

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.record import read_record
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
    recorded_sha256 = _recorded_sha256(path)
    record = read_record(path)
    if not record.lines:
        raise ConfigError(f"{path} has no rollouts to repeat")
    with tempfile.TemporaryDirectory(prefix="aiorl-replay-") as out:
        changes = {} if workers is None else {"workers": workers}
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


def _recorded_sha256(path: Path) -> str:
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return str(summary["params_sha256"])
    except FileNotFoundError:
        raise ConfigError(f"{path} has no summary.json: only a finished run can be repeated") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / 'summary.json'} cannot be read: {error!r}") from None
