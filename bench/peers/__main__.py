"""aiorl against its peers, on the same work, in turns: collection, PPO, DQN, SAC, slow environments.

    python -m bench.peers --setup                       # once: the peers' virtual environments, a few minutes
    python -m bench.peers [--work w1 w2 w3 w4 w5] [--peers sb3 gymnasium …] [--rounds 5] [--quick] [--json FILE] [--write]

In each round every participant does the work once, as a process of its own with one torch thread; another one begins each
round. Ratios are taken within a round, so that a machine that is slower for a while slows both. Without `--peers` those
take part that are best at something, and one of each kind that starts a process for every environment. A full run takes
about 45 minutes on two cores, which have to be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import print_machine, write_json
from bench.peers import lineup, report, setup
from bench.peers.lineup import VENVS, WORKS, Entry
from bench.peers.works import RESULT

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: written by bench/peers -->", "<!-- end: written by bench/peers -->"
LIMIT_S = 300.0
LONGER = {"w5": 2.0}  # slow environments vary more


class Failed(Exception):
    """A participant gave no answer; says why."""


def turns_per_us() -> float:
    """Turns of an empty Python loop, the best of three: what this machine has to give just now."""
    best = 0.0
    for _ in range(3):
        begun, x = time.perf_counter(), 0
        for i in range(500_000):
            x += i
        best = max(best, 0.5 / (time.perf_counter() - begun))
    return round(best, 2)


def ask(entry: Entry, python: Path, seed: int, seconds: float, smoke: bool) -> dict[str, Any]:
    """What the program of one participant answers, and when it was launched. Raises Failed."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [str(python), "-m", entry.module, entry.work, entry.variant, "--seed", str(seed), "--seconds", str(seconds)]
    launched = time.time()
    process = subprocess.Popen(
        command + ["--smoke"] * smoke, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", process_group=0,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer after {LIMIT_S:.0f} s") from None
    finally:
        end_group(process)
    answers = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    if not answers:
        raise Failed((err.strip().splitlines() or [f"it ended with {process.returncode}"])[-1])
    return {**json.loads(answers[-1]), "launched": launched}


def end_group(process: subprocess.Popen[str]) -> None:
    """End what a participant has left running; some leave environments behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def measure(entry: Entry, python: Path, index: int, seconds: float, smoke: bool) -> tuple[report.Row, dict[str, str]]:
    """One row and the versions it was measured with. The seed is the round's number, for all alike."""
    before, begun = turns_per_us(), time.perf_counter()
    found = ask(entry, python, index, seconds, smoke)
    wall_s = time.perf_counter() - begun
    start_s, figures = found["begun_at"] - found["launched"], found["figures"]
    if report.SECONDS in figures:
        reached = figures[report.SECONDS]
        figures[report.WITH_START] = None if reached is None else start_s + reached
    return report.Row(index, entry, figures, start_s, wall_s, (before, turns_per_us())), found["versions"]


def compare(entries: list[Entry], options: argparse.Namespace, versions: dict[str, Any]) -> list[report.Row]:
    """All participants of one work in turns; one that fails takes no further part."""
    rows: list[report.Row] = []
    going = [e for e in entries if usable(e, options.peers_dir)]
    for index in range(options.rounds):
        begin = index * len(going) // options.rounds
        for entry in going[begin:] + going[:begin]:
            seconds = options.seconds * LONGER.get(entry.work, 1.0)
            try:
                row, versions[entry.peer] = measure(
                    entry, entry.python(options.peers_dir), index, seconds, options.smoke
                )
            except Failed as failure:
                print(f"  {entry.work} round {index} {entry.name:52} FAILED: {failure}", flush=True)
                going = [e for e in going if e != entry]
                continue
            rows.append(row)
            shown = "  ".join(f"{k} {v:,.1f}" if v is not None else f"{k} -" for k, v in row.figures.items())
            print(f"  {entry.work} round {index} {entry.name:52} {shown}  start {row.start_s:.1f} s  "
                  f"speed {row.speed[0]} {row.speed[1]}", flush=True)  # fmt: skip
    return rows


def usable(entry: Entry, directory: Path) -> bool:
    """Whether it can take part; if not, that is said."""
    if not setup.is_ready(entry.python(directory)):
        print(f"  {entry.work} {entry.name}: skipped, {directory / VENVS[entry.peer]} is not installed (see --setup)")
        return False
    return True


def text(work: str, rows: list[report.Row]) -> str:
    """The table of one work, what it says about the goals, and whether it may be trusted."""
    parts = [report.table(work, rows)]
    parts += ["\n".join(f"    {verdict.line()}" for verdict in report.verdicts(work, rows))]
    if odd := report.disturbed(rows):
        names = ", ".join(f"{row.entry.name} in round {row.round}" for row in odd[:3]) + ", …" * (len(odd) > 3)
        parts += [f"Disturbed by something else on this machine: {len(odd)} of {len(rows)} measurements ({names})."]
    return "\n\n".join(part for part in parts if part)


def write(tables: list[str], document: Path = DOCUMENT) -> None:
    """Put the tables between their marks in the document."""
    whole = document.read_text(encoding="utf-8")
    block = "\n\n".join([BEGIN, *tables, END])
    document.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, whole, flags=re.DOTALL), encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--peers", nargs="+", choices=VENVS, default=[], help="by name: with each one's best variant")
    parser.add_argument("--all", action="store_true", help="every variant of them, most of an afternoon")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measured rate; PPO, DQN and SAC have a set work")
    parser.add_argument("--quick", action="store_true", help="one round, about 9 minutes")
    parser.add_argument("--smoke", action="store_true", help="no more than shows that everything runs")
    parser.add_argument("--json", default="bench/raw/peers.json", help="write all rows to this file; '' for none")
    parser.add_argument("--rows", nargs="+", type=Path, help="measure nothing: take the rows of these files")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--peers-dir", type=Path, default=lineup.peers_directory(), help="where the peers are installed")
    parser.add_argument("--setup", action="store_true", help="install what is missing there, and end")
    options = parser.parse_args(arguments)
    if options.quick or options.smoke:
        options.rounds = 1
    if options.smoke:
        options.seconds = 0.5
    return options


def main() -> None:
    options = parse()
    if options.setup:
        setup.set_up(options.peers_dir)
        return
    print_machine()
    everything: list[report.Row] = []
    tables: list[str] = []
    before = [json.loads(path.read_text()) for path in options.rows or []]
    versions: dict[str, Any] = {name: version for data in before for name, version in data["versions"].items()}
    known = report.rows(row for data in before for row in data["rows"])
    for work, entries in lineup.chosen(options.work, options.peers, options.all).items():
        rows = [row for row in known if row.entry.work == work] if before else compare(entries, options, versions)
        if not rows:
            continue
        everything += rows
        tables.append(text(work, rows))
        print(f"\n{tables[-1]}\n", flush=True)
    rounds = 1 + max((row.round for row in everything), default=-1)
    settings = {"rounds": rounds, "seconds": options.seconds, "versions": versions}
    write_json(options.json if not options.smoke else None, {**settings, "rows": report.raw(everything)})
    if options.write:
        write(tables)


if __name__ == "__main__":
    sys.exit(main())
