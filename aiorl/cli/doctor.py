"""`python -m aiorl doctor [ENV|RUN] [--algo A]`: can this be trained with, or did this train? If not, what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiorl.cli.flags import Parser, key_value
from aiorl.cli.text import plural

if TYPE_CHECKING:
    from aiorl.testing.findings import Finding

MARKS = {"error": "ERROR", "warning": "warn", "info": "ok"}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "doctor", "Check this machine and, if given, an environment and an algorithm; or with RUN what a run wrote.",
        "[ENV|RUN] [--algo A] [--env-kwargs KEY=VALUE …] [--json]",
        epilog="Each finding says what to do about it; [ids] are those of docs/catalogue.md. "
        "Exit code 0: no error found; 1: at least one.",
    )  # fmt: skip
    parser.add_argument(
        "what", nargs="?", metavar="ENV|RUN",
        help="gymnasium id or module:callable, tried out in workers; or the directory of a run, which is only read",
    )  # fmt: skip
    parser.add_argument("--algo", metavar="A", help="algorithm to try out: a name or pkg.mod:Class")
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
    sections = look(given.get("what"), given.get("algo"), kwargs, given.get("out", "runs"))
    if given.get("json", False):
        for about, findings in sections.items():
            for f in findings:
                print(json.dumps(plain(about, f)))
    else:
        print("\n\n".join(section(about, findings) for about, findings in sections.items()))
        print("\n" + summary([f for findings in sections.values() for f in findings]))
    return int(any(f.severity == "error" for findings in sections.values() for f in findings))


def look(what: str | None, algo: str | None, kwargs: Mapping[str, Any], out: str) -> dict[str, list[Finding]]:
    """What is found, by what it is about: "machine", the environment's and the algorithm's name; or the run alone."""
    from aiorl.testing.examine_algorithm import check_algorithm, check_fit
    from aiorl.testing.examine_env import examine
    from aiorl.testing.examine_run import check_run
    from aiorl.testing.machine import check_machine

    if what is not None and Path(what).is_dir():
        return {what: check_run(what)}
    found = {"machine": check_machine(out)}
    if what is not None:
        found[what] = [_also_no_run(what, finding) for finding in examine(what, kwargs)]
    if algo is not None:
        from aiorl.algos import algorithm_class

        found[algo] = check_algorithm(algorithm_class(algo))
        if what is not None:
            found[f"{algo} in {what}"] = check_fit(algorithm_class(algo), what, kwargs)
    return found


def _also_no_run(what: str, finding: Finding) -> Finding:
    """A name that is no environment's may be meant as a run's."""
    if finding.code != "resolve" or ":" in what:
        return finding
    return dataclasses.replace(finding, message=f"{finding.message}\n  a run: there is no directory {what}")


def plain(about: str, finding: Finding) -> dict[str, Any]:
    """A finding as JSON shows it."""
    from aiorl.testing.catalogue import FOUND_AS

    ids = [] if finding.severity == "info" else list(FOUND_AS.get(finding.code, ()))
    shown = {"about": about, "code": finding.code, "severity": finding.severity, "message": finding.message}
    return shown | {"catalogue": ids}


def section(about: str, findings: Sequence[Finding]) -> str:
    """The findings about one thing, in aligned columns; what to do stands under what was seen."""
    width = max((len(f.code) for f in findings), default=0)
    lines = [about]
    for f in findings:
        first, *rest = f.message.splitlines()
        ids = " ".join(plain(about, f)["catalogue"])
        lines.append(f"  {MARKS[f.severity]:<5}  {f.code:<{width}}  {first}" + (f"  [{ids}]" if ids else ""))
        lines += [f"  {'':<5}  {'':<{width}}  {line.strip()}" for line in rest]
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    counts = [plural(n, kind) for kind in ("error", "warning") if (n := sum(f.severity == kind for f in findings))]
    return ", ".join(counts) if counts else "nothing to complain about"
