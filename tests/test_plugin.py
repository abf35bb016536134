"""The pytest plugin, in test sessions of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import aiorl.testing.sim  # noqa: F401 - loads NumPy, which inner sessions could not load again
from aiorl.testing.leaks import belongings, left_behind

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
Session = Callable[..., pytest.RunResult]
PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "aiorl.testing.plugin")


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Runs the tests in `source` in a session in this process, with these plugins alone, installed or not."""
    monkeypatch.delenv("AIORL_SEED", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(f"import asyncio, os, threading\nimport pytest\n{source}")
        return pytester.runpytest_inprocess("--strict-markers", *PLUGINS, *arguments)

    return run


# -- simulated tests ---------------------------------------------------------------------------------------------------

CHAOS = """
seeds = []

@pytest.mark.aiorl_chaos(seeds=7, limit_s=7200)
async def test_an_hour(aiorl_sim, tmp_path):
    assert tmp_path.is_dir()
    begun = asyncio.get_running_loop().time()
    await asyncio.sleep(3600)
    assert asyncio.get_running_loop().time() - begun == aiorl_sim.now_s - begun == 3600
    seeds.append(aiorl_sim.seed)

def test_each_seed_once():
    assert seeds == list(range(7))

class TestInAClass:
    @pytest.mark.aiorl_chaos
    async def test_without_asking_for_it(self):
        await asyncio.sleep(1)

    async def test_an_ordinary_one(self):
        await asyncio.sleep(0)
"""


def test_a_marked_test_runs_in_simulations(session: Session):
    session(CHAOS).assert_outcomes(passed=4)


def test_the_default_number_of_seeds(session: Session):
    session(
        "seeds = []\n"
        "@pytest.mark.aiorl_chaos\n"
        "async def test_many(aiorl_sim):\n    seeds.append(aiorl_sim.seed)\n"
        "def test_count():\n    assert len(seeds) == 50\n"
    ).assert_outcomes(passed=2)


RACE = """
@pytest.mark.aiorl_chaos(seeds=200)
async def test_race(aiorl_sim):
    value = 0
    async def add():
        nonlocal value
        seen = value
        await asyncio.sleep(0)
        if aiorl_sim.seed % 60 == 59:
            value = seen + 1
        else:
            value += 1
    await asyncio.gather(add(), add())
    assert value == 2
"""


def test_a_failing_seed_is_named_and_repeats(session: Session):
    first = session(RACE)
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*AIORL_SEED=59 reproduces it*"])
    session(RACE, "--aiorl-seed", "59").assert_outcomes(failed=1)
    session(RACE, "--aiorl-seed", "60").assert_outcomes(passed=1)


def test_the_seed_is_set_for_the_session_only(session: Session):
    import os

    source = "def test_it():\n    assert os.environ['AIORL_SEED'] == '17'\n"
    session(source, "--aiorl-seed", "17").assert_outcomes(passed=1)
    assert "AIORL_SEED" not in os.environ


FINDS = {
    "await asyncio.get_running_loop().create_future()": "*Deadlock: nothing is ready*",
    "kept.append(asyncio.ensure_future(asyncio.sleep(5)))": "*tasks that were not done*sleep*",
    "asyncio.get_running_loop().call_soon(lambda: 1 / 0); await asyncio.sleep(0.1)": "*complained*division by zero*",
}


def test_what_simulations_find(session: Session):
    tests = [f"@pytest.mark.aiorl_chaos(seeds=1)\nasync def test_{i}():\n    {body}\n" for i, body in enumerate(FINDS)]
    result = session("kept = []\n" + "\n".join(tests))
    result.assert_outcomes(failed=len(FINDS))
    for complaint in FINDS.values():
        result.stdout.fnmatch_lines([complaint])


def test_an_unknown_argument_of_the_marker_is_refused(session: Session):
    result = session("@pytest.mark.aiorl_chaos(sseds=1)\nasync def test(): pass\n")
    result.stdout.fnmatch_lines(["*unexpected keyword argument 'sseds'*"])


# -- leaks -------------------------------------------------------------------------------------------------------------

LEAKS = {
    "nothing": "pass",
    "tasks": "kept.append(asyncio.new_event_loop()); kept.append(kept[0].create_task(asyncio.sleep(9)))",
    "threads": "event = threading.Event(); kept.append(event); threading.Thread(target=event.wait, daemon=True).start()",
    "descriptors": "kept.extend(os.pipe())",
    "processes": "import subprocess; kept.append(subprocess.Popen(['sleep', '1000']))",
    "shared blocks": "from multiprocessing import shared_memory as s; kept.append(s.SharedMemory(create=True, size=9))",
}
CLEAN = {
    "tasks": "kept[1].cancel(); kept[0].run_until_complete(asyncio.wait([kept[1]])); kept[0].close()",
    "threads": "kept[0].set()",
    "descriptors": "[os.close(fd) for fd in kept]",
    "processes": "kept[0].kill(); kept[0].wait()",
    "shared blocks": "kept[0].close(); kept[0].unlink()",
}


def test_what_a_test_leaves_behind(session: Session):
    tests = [
        f"def test_leak_of_{kind.replace(' ', '_')}(aiorl_no_leaks):\n    {LEAKS[kind]}\n"
        f"def test_clean_after_{kind.replace(' ', '_')}():\n    {CLEAN.get(kind, 'pass')}\n    kept.clear()\n"
        for kind in LEAKS
    ]
    result = session("kept = []\n" + "\n".join(tests))
    result.assert_outcomes(passed=2 * len(LEAKS), errors=len(CLEAN))
    for kind in CLEAN:
        result.stdout.fnmatch_lines([f"*left behind after the test: {{'{kind}':*"])


OTHERS = """
import sys
from multiprocessing import shared_memory
mine = shared_memory.SharedMemory(create=True, size=9)
print(mine.name, flush=True)
sys.stdin.read()
mine.close()
mine.unlink()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="named blocks lie elsewhere")
@pytest.mark.parametrize("own", [True, False])
def test_a_shared_block_of_another_program_is_none_of_ours(own: bool):
    """The other one is not started by this process, but by a process that has ended: as in tests that run in parallel."""
    before = belongings()
    there, here = os.pipe()
    back, theirs = os.pipe()
    quoted = [sys.executable, "-c", OTHERS]
    orphan = f"import subprocess; subprocess.Popen({quoted!r}, stdin={back}, stdout={here}, pass_fds=({back}, {here}))"
    command = quoted if own else [sys.executable, "-c", orphan]
    with subprocess.Popen(command, stdin=back, stdout=here, pass_fds=(back, here)) as process:
        os.close(here)
        os.close(back)
        with os.fdopen(there) as lines:
            name = lines.readline().strip()
            if not own:
                process.wait(30)
            left = left_behind(before).get("shared blocks", [])
            os.close(theirs)
            lines.read()  # until it has ended
    assert left == ([name] if own else [])


# -- being there -------------------------------------------------------------------------------------------------------


def test_pytest_finds_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"aiorl": "aiorl.testing.plugin"}


def test_it_costs_nothing_where_it_is_not_used():
    code = (
        "import pytest, sys; before = set(sys.modules); import aiorl.testing.plugin; new = set(sys.modules) - before;"
        "print(sorted(m for m in new if not m.startswith('aiorl')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
