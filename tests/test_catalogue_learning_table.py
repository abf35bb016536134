"""docs/catalogue.md: every fault is in it, what it is caught by is there, and every test that it names is collected."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from aiorl.testing import examine_algorithm, examine_run, learner_checks, policy_checks, replay_checks, task_checks
from aiorl.testing.catalogue import FAULTS, FOUND_AS
from aiorl.testing.laws import __doc__ as laws

ROOT = Path(__file__).parent.parent


class Row(NamedTuple):
    fault: str
    here: str
    tests: list[str]


def table() -> dict[str, Row]:
    text = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "::" in line]
    return {row[0].strip(): Row(row[1], row[2], re.findall(r"`([^`]+)`", row[3])) for row in rows}


def test_every_fault_is_in_the_table() -> None:
    assert {id_: row.fault for id_, row in table().items()} == FAULTS
    assert all(row.tests for row in table().values())


def test_every_finding_of_the_catalogue_tells_of_a_fault() -> None:
    assert {id_ for ids in FOUND_AS.values() for id_ in ids} <= set(FAULTS)


def test_what_catches_a_fault_is_what_tells_of_it() -> None:
    """Both ways: the codes that a row names, and the faults that a finding stands for."""
    for id_, row in table().items():
        named = {code for code in re.findall(r"`([^`]+)`", row.here) if code in FOUND_AS}
        assert named == {code for code, ids in FOUND_AS.items() if id_ in ids}, id_
        for law in re.findall(r"laws? `(\w+)`(?: and `(\w+)`)?", row.here):
            assert all(f"    {name}  " in (laws or "") for name in law if name), f"{id_}: there is no law {law}"


def test_every_code_of_the_catalogue_is_one_that_a_check_gives() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "aiorl" / "testing").glob("*_checks.py"))
    source += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "aiorl" / "testing").glob("examine_*.py"))
    source = source.replace('f"ignores-{what}"', '"ignores-rewards" "ignores-observations"')
    assert [code for code in FOUND_AS if f'"{code}"' not in source] == []


def given_by(module: ModuleType) -> set[str]:
    """The codes of findings that are written out in a module."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call) and node.args]
    made = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("error", "warning", "info", "_guarded")]
    return {c.args[0].value for c in made if isinstance(c.args[0], ast.Constant)}


ALGORITHM = (examine_algorithm, learner_checks, policy_checks, replay_checks, task_checks)
MORE = {"ignores-rewards", "ignores-observations", *(c.__name__.replace("_", "-") for c in examine_algorithm.CHECKS)}


@pytest.mark.parametrize(
    ("section", "codes"),
    [("An algorithm", set[str]().union(*map(given_by, ALGORITHM)) | MORE),
     ("A run", given_by(examine_run) | set(examine_run.ALARMS))],
)  # fmt: skip
def test_every_code_that_the_checks_give_is_explained(section: str, codes: set[str]) -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    mentioned = {code for row in rows for code in re.findall(r"`([^`]+)` \(warning\)", row)}
    assert len(codes) > 20
    assert codes == named | mentioned


def test_every_test_that_it_names_is_collected() -> None:
    named = {test for row in table().values() for test in row.tests}
    files = sorted({test.split("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in files)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    missing = [test for test in named if not any(c == test or c.startswith(f"{test}[") for c in collected)]
    assert missing == []
