"""Runs the commands of docs/results.md, several seeds each, and writes its table and curves.

    python -m bench.results                                    all of them, one after the other: about six hours
    python -m bench.results --only ppo/CartPole-v1 --seeds 2   a part; its rows in the document are replaced
    python -m bench.results --runs runs/results                keep the runs there; finished ones are not repeated
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import machine

DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- begin: written by bench/results.py -->", "<!-- end -->"


class Case(NamedTuple):
    """A command and what it must reach: the mean return of the final evaluation, for every seed."""

    algo: str
    env: str
    target: float
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.algo}/{self.env}"

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.env.replace('/', '-')}-{self.algo}"

    def directory(self, runs: Path, seed: int) -> Path:
        return runs / f"{self.stem}-{seed}"

    @property
    def command(self) -> str:
        return f"python -m aiorl train {self.env}" + (f" --algo {self.algo}" if self.algo != "ppo" else "")


CASES = (
    Case("ppo", "CartPole-v1", 475, 5),
    Case("ppo", "LunarLander-v3", 200, 3),
    Case("ppo", "Acrobot-v1", -100, 3),
    Case("ppo", "Pendulum-v1", -300, 3),
    Case("ppo", "MountainCar-v0", -130, 3),
    Case("ppo", "MiniGrid-Empty-8x8-v0", 0.9, 3),
    Case("ppo", "MiniGrid-DoorKey-5x5-v0", 0.9, 3),
    Case("dqn", "CartPole-v1", 475, 3),
    Case("dqn", "Acrobot-v1", -100, 3),
    Case("sac", "Pendulum-v1", -200, 5),
    Case("td3", "Pendulum-v1", -200, 5),
    Case("sac", "LunarLanderContinuous-v3", 200, 3),
    Case("sac", "BipedalWalker-v3", 280, 3),  # Stable-Baselines3's zoo reports 298 for its own settings
    Case("sac", "HalfCheetah-v5", 4_000, 1),
    Case("sac", "Hopper-v5", 2_000, 1),
    Case("dqn", "ALE/Pong-v5", 0, 1),
)


def carry_out(case: Case, seed: int, runs: Path) -> dict[str, Any]:
    """One run as a user would start it; what summary.json says. A run that is there already is taken as it is."""
    out = case.directory(runs, seed)
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        line = [sys.executable, *case.command.split()[1:], "--seed", str(seed), "--out", str(out), "--progress", "none"]
        subprocess.run(line, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def row(case: Case, summaries: list[dict[str, Any]]) -> str:
    """The Markdown row of a case."""
    finals = [s["final_evaluation"]["mean_return"] for s in summaries]
    passed = sum(value >= case.target for value in finals)
    reached = [first_at(case.target, s) for s in summaries]
    first = [r for r in reached if r is not None]
    met = "—"
    if first:
        met = f"{statistics.median(r[0] for r in first) / 1e3:,.0f}k / {statistics.median(r[1] for r in first):.0f} s"
    decimals = 1 if abs(case.target) > 1 else 2
    cells = (
        f"`{case.command} --seed S`",
        f"{case.target:g}",
        f"{passed} of {len(summaries)}",
        ", ".join(f"{value:.{decimals}f}" for value in finals),
        met,
        f"{summaries[0]['env_steps'] / 1e3:,.0f}k",
        f"{statistics.median(s['wall_seconds'] for s in summaries):.0f} s",
        f"[curves](img/{case.stem}.svg)",
    )
    return f"| {' | '.join(cells)} |"


def first_at(target: float, summary: dict[str, Any]) -> tuple[float, float] | None:
    """(env steps, seconds) of the first evaluation that reached the target."""
    for evaluation in summary["evaluations"]:
        if evaluation["mean_return"] >= target:
            return evaluation["env_steps"], evaluation["seconds"]
    return None


def write(rows: dict[str, str]) -> None:
    """Put rows into the document's table; those of other cases stay."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    old = {f"{c.algo}/{c.env}": line for c in CASES for line in table.splitlines() if f"`{c.command} --seed S`" in line}
    merged = {**old, **rows}
    head = "| command | target | passed | final evaluations, S = 0, 1, … | target first met at | env steps | wall | |"
    lines = [head, "|---|--:|--:|---|--:|--:|--:|---|", *(merged[c.name] for c in CASES if c.name in merged)]
    facts = ", ".join(f"{name} {value}" for name, value in machine().items() if name != "load_1min")
    body = "\n".join([*lines, "", f"Medians over the seeds. Made with {facts}."])
    DOCUMENT.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CASES], help="these cases, as ALGO/ENV")
    parser.add_argument("--seeds", type=int, help="how many seeds, from 0 on (default: as many as the document claims)")
    parser.add_argument("--runs", help="where the runs go (default: a temporary directory)")
    parser.add_argument("--no-write", action="store_true", help="leave the document and its pictures alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(options.runs or temporary)
        for case in CASES:
            if options.only and case.name not in options.only:
                continue
            seeds = range(options.seeds or case.seeds)
            summaries = [carry_out(case, seed, runs) for seed in seeds]
            line = row(case, summaries)
            print(re.sub(r"\s*\|\s*", "   ", line).strip(), flush=True)
            if not options.no_write:
                write({case.name: line})
                plot(case, [case.directory(runs, seed) for seed in seeds])


def plot(case: Case, directories: list[Path]) -> None:
    out = str(DOCUMENT.parent / "img" / f"{case.stem}.svg")
    line = [sys.executable, "-m", "aiorl", "plot", *map(str, directories), "--out", out]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
