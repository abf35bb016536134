"""What the documents say is there is there, and the programs in them run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_named_files_exist(path: Path):
    """`tests/test_x.py`, `envs/y.py` and the like, as code; paths may be given from the root or from the package."""
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|txt))`", path.read_text(encoding="utf-8")))
    names -= {"config.toml", "error.txt", "stall.txt"}  # written by runs
    missing = [name for name in names if not any((ROOT / base / name).exists() for base in ("", "aiorl", "tests"))]
    assert not missing, f"{path.name} names {sorted(missing)}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^\$ |`)make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= targets


def test_the_library_example_runs(tmp_path: Path):
    """As a program of its own, exactly as printed but for the number of steps."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert "total_steps=200_000" in code
    (tmp_path / "program.py").write_text(code.replace("total_steps=200_000", "total_steps=6_000"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"completed [01]\n", done.stdout)
