"""What a check found: one record for each thing that is wrong, doubtful or good to know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Finding:
    """`message` says what was seen, what is expected and what to change, one line each. `code` is for programs.

    An `error` would make a training fail or come out wrong, a `warning` costs something or may be meant, an `info` is a
    fact.
    """

    code: str
    severity: Severity
    message: str


def error(code: str, *lines: str) -> Finding:
    return Finding(code, "error", _message(lines))


def warning(code: str, *lines: str) -> Finding:
    return Finding(code, "warning", _message(lines))


def info(code: str, *lines: str) -> Finding:
    return Finding(code, "info", _message(lines))


def left_out(checks: Iterable[str]) -> Iterator[Finding]:
    """What was not looked at, as what was found before it makes no sense of it."""
    if names := ", ".join(checks):
        yield warning("not-checked", f"not looked at, because of these errors: {names}", "mend them, and look again")


def _message(lines: Iterable[str]) -> str:
    """What was seen, and indented under it what to do."""
    return "\n  ".join(line for line in lines if line)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that must be mended: `assert not errors(check_env(MyEnv))`."""
    return [finding for finding in findings if finding.severity == "error"]


def sort(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, otherwise in the order in which they were found."""
    return sorted(findings, key=lambda finding: _ORDER[finding.severity])
