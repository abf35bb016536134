"""`python -m aiorl replay RUN`: repeats a finished run from its record and compares the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from aiorl.cli import DONE, FAILED
from aiorl.cli.flags import Parser, field_value
from aiorl.cli.session import run_async
from aiorl.errors import ConfigError

WORKERS = Annotated[int, msgspec.Meta(ge=0)]


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "replay",
        "Repeat a finished run from config.toml and schedule.jsonl. It must end with the same parameters, whatever the "
        "timing, the schedule or the number of workers.",
        "RUN [--workers N] [--json]",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--workers", metavar="N", help="worker processes (default: as in the run)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return DONE
    if "run" not in given:
        raise ConfigError("no run given\n  for example: python -m aiorl replay runs/CartPole-v1-ppo-0")
    from aiorl.replay import replay

    workers = field_value("workers", given["workers"], WORKERS) if "workers" in given else None
    result = run_async(replay(given["run"], workers=workers))
    if given.get("json", False):
        print(msgspec.json.encode({**msgspec.to_builtins(result), "equal": result.equal}).decode())
    elif result.equal:
        print(f"equal    {result.rollouts:,} rollouts repeated in {result.seconds:.1f} s")
        print(f"sha256   {result.repeated_sha256}")
    else:
        where = "at the end" if result.first_difference is None else f"from rollout {result.first_difference:,} on"
        print(f"differs  {where}")
        print(f"sha256   {result.recorded_sha256} recorded\n         {result.repeated_sha256} repeated")
    return DONE if result.equal else FAILED
