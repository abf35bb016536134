"""`python -m aiorl doctor [ENV]`: can this machine, and this environment, be trained with? If not, what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aiorl.cli.flags import Parser, key_value
from aiorl.cli.text import plural

if TYPE_CHECKING:
    from aiorl.testing.findings import Finding

MARKS = {"error": "ERROR", "warning": "warn", "info": "ok"}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "doctor", "Check this machine and, with ENV, an environment: each finding says what to do about it.",
        "[ENV] [--env-kwargs KEY=VALUE …] [--json]",
        epilog="Exit code 0: no error found; 1: at least one.",
    )  # fmt: skip
    parser.add_argument("env", nargs="?", metavar="ENV", help="gymnasium id or module:callable, tried out in workers")
    parser.add_argument(
        "--env-kwargs", nargs="+", action="extend", metavar="KEY=VALUE", help="keyword arguments for the environment"
    )
    parser.add_argument("--out", metavar="DIR", help="where runs are to be written (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    kwargs = dict(key_value("--env-kwargs", text) for text in given.get("env_kwargs", []))
    sections = look(given.get("env"), kwargs, given.get("out", "runs"))
    if given.get("json", False):
        for about, findings in sections.items():
            for f in findings:
                print(json.dumps({"about": about, "code": f.code, "severity": f.severity, "message": f.message}))
    else:
        print("\n\n".join(section(about, findings) for about, findings in sections.items()))
        print("\n" + summary([f for findings in sections.values() for f in findings]))
    return int(any(f.severity == "error" for findings in sections.values() for f in findings))


def look(env: str | None, kwargs: Mapping[str, Any], out: str) -> dict[str, list[Finding]]:
    """What is found, by what it is about: "machine", and the environment's name."""
    from aiorl.testing.examine_env import examine
    from aiorl.testing.machine import check_machine

    found = {"machine": check_machine(out)}
    return found if env is None else {**found, env: examine(env, kwargs)}


def section(about: str, findings: Sequence[Finding]) -> str:
    """The findings about one thing, in aligned columns; what to do stands under what was seen."""
    width = max((len(f.code) for f in findings), default=0)
    lines = [about]
    for f in findings:
        first, *rest = f.message.splitlines()
        lines.append(f"  {MARKS[f.severity]:<5}  {f.code:<{width}}  {first}")
        lines += [f"  {'':<5}  {'':<{width}}  {line.strip()}" for line in rest]
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    counts = [plural(n, kind) for kind in ("error", "warning") if (n := sum(f.severity == kind for f in findings))]
    return ", ".join(counts) if counts else "nothing to complain about"
