"""`python -m aiorl doctor [ENV|RUN] [--algo A]`: can this be trained with, or did this train? If not, what to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aiorl.cli.flags import Parser, add_fields, field_value, key_value
from aiorl.cli.text import plural
from aiorl.errors import ConfigError

if TYPE_CHECKING:
    from aiorl.testing.findings import Finding

MARKS = {"error": "ERROR", "warning": "warn", "info": "ok"}


def main(argv: Sequence[str]) -> int:
    named = _early_parser().parse_known_args(list(argv))[0]
    algorithm = _algorithm_class(named.algo) if "algo" in named else None
    parser = _parser(algorithm)
    given = parser.read(argv)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return 0
    _refuse_what_is_ignored(given)
    algorithm = _with_settings(algorithm, given)
    kwargs = dict(key_value("--env-kwargs", text) for text in given.get("env_kwargs", []))
    as_json, found = given.get("json", False), list["Finding"]()
    for about, find in look(given.get("what"), given.get("algo"), algorithm, kwargs, given.get("out", "runs")):
        found += _show_as_json(about, find) if as_json else _show(about, find)
    if not as_json:
        print(summary(found))
    return int(any(f.severity == "error" for f in found))


def _early_parser() -> Parser:
    """Finds what decides which flags there are."""
    parser = Parser("doctor", "")
    parser.add_argument("--algo")
    return parser


def _algorithm_class(name: str) -> Any:
    from aiorl.algos import algorithm_class

    return algorithm_class(name)


def _parser(algorithm: Any) -> Parser:
    parser = Parser(
        "doctor", "Check this machine and, if given, an environment and an algorithm; or with RUN what a run wrote.",
        "[ENV|RUN] [--algo A] [--A.SETTING VALUE …] [--env-kwargs KEY=VALUE …] [--json]",
        epilog="Each finding says what to do about it; [ids] are those of docs/catalogue.md. "
        "Exit code 0: no error found; 1: at least one; 2: there was nothing to look at, such as an unknown algorithm.",
    )  # fmt: skip
    parser.add_argument(
        "what", nargs="?", metavar="ENV|RUN",
        help="gymnasium id or module:callable, tried out in workers; or the directory of a run, which is only read",
    )  # fmt: skip
    parser.add_argument(
        "--algo", metavar="A", help="algorithm to try out: a name or pkg.mod:Class; with --help, its settings are listed"
    )
    parser.add_argument(
        "--env-kwargs", nargs="+", action="extend", metavar="KEY=VALUE", help="keyword arguments for the environment"
    )
    parser.add_argument("--out", metavar="DIR", help="where runs are to be written (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    if isinstance(algorithm, type) and issubclass(algorithm, msgspec.Struct):
        names = [f.name for f in msgspec.structs.fields(algorithm)]
        own = str(getattr(algorithm, "name", ""))
        add_fields(parser, parser.add_argument_group(f"{own} options"), algorithm, names, {}, f"{own}.")
    return parser


def _refuse_what_is_ignored(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for what was asked and would not be looked at."""
    what = given.get("what")
    if what is not None and Path(what).is_dir():
        flags = [f"--{name.replace('_', '-')}" for name in ("algo", "env_kwargs", "out") if name in given]
        if flags:
            raise ConfigError(f"{what} is a directory: what a run wrote is only read, without {', '.join(flags)}\n"
                              "  leave that out, or name an environment")  # fmt: skip
    elif what is None and "env_kwargs" in given:
        raise ConfigError("--env-kwargs without an environment\n  name one: python -m aiorl doctor ENV --env-kwargs …")


def _with_settings(algorithm: Any, given: Mapping[str, Any]) -> Any:
    """The class as it is, or an instance with the settings that were given."""
    own = {key.partition(".")[2]: (key, text) for key, text in given.items() if "." in key}
    if not own:
        return algorithm
    kinds = {f.name: f.type for f in msgspec.structs.fields(algorithm)}
    return algorithm(**{name: field_value(key, text, kinds[name]) for name, (key, text) in own.items()})


def look(
    what: str | None, name: str | None, algorithm: Any, kwargs: Mapping[str, Any], out: str
) -> Iterator[tuple[str, Callable[[], Sequence[Finding]]]]:
    """What there is to look at, and what is found there, the quickest first: whether they fit; the machine, the
    environment, the algorithm called `name`; or the run alone."""
    from aiorl.testing.examine_algorithm import check_algorithm, check_fit
    from aiorl.testing.examine_env import examine
    from aiorl.testing.examine_run import check_run
    from aiorl.testing.machine import check_machine

    if what is not None and Path(what).is_dir():
        yield what, lambda: check_run(what)
        return
    if what is not None and name is not None:
        yield f"{name} in {what}", lambda: check_fit(algorithm, what, kwargs)
    yield "machine", lambda: check_machine(out)
    if what is not None:
        yield what, lambda: [_also_no_run(what, finding) for finding in examine(what, kwargs)]
    if name is not None:
        yield name, lambda: check_algorithm(algorithm, tell=_working)


def _show(about: str, find: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """First what is looked at: it may take a while."""
    print(about, flush=True)
    findings = find()
    _working("")
    print("\n".join([*section(about, findings), ""]), flush=True)
    return findings


def _working(on: str) -> None:
    """What is being looked at, for who waits at a terminal; "" takes it away."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K  looking at {on} …" if on else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show_as_json(about: str, find: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    findings = find()
    _working("")
    for f in findings:
        print(json.dumps(plain(about, f)), flush=True)
    return findings


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


def section(about: str, findings: Sequence[Finding]) -> list[str]:
    """The findings about one thing, in aligned columns; what to do stands under what was seen."""
    width = max((len(f.code) for f in findings), default=0)
    lines: list[str] = [] if findings else [f"  {MARKS['info']:<5}  nothing wrong was found"]
    for f in findings:
        first, *rest = f.message.splitlines()
        ids = " ".join(plain(about, f)["catalogue"])
        lines.append(f"  {MARKS[f.severity]:<5}  {f.code:<{width}}  {first}" + (f"  [{ids}]" if ids else ""))
        lines += [f"  {'':<5}  {'':<{width}}  {line.strip()}" for line in rest]
    return lines


def summary(findings: Sequence[Finding]) -> str:
    counts = [plural(n, kind) for kind in ("error", "warning") if (n := sum(f.severity == kind for f in findings))]
    return ", ".join(counts) if counts else "nothing to complain about"
