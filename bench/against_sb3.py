"""aiorl against Stable-Baselines3 as learners: the same training in turns, with the same settings, seeds and evaluations.

    python -m bench.against_sb3 --setup                            once: installs Stable-Baselines3 beside this
    python -m bench.against_sb3 --envs HalfCheetah-v5 Hopper-v5    SAC, 100,000 env steps, 3 seeds each
    python -m bench.against_sb3 --envs MinAtar/Breakout-v1         DQN, a million env steps
    python -m bench.against_sb3 --envs HalfCheetah-v5 --steps 300000 --seeds 1 --ours async twin
    python -m bench.against_sb3 --envs Pendulum-v1 --ours async twin --without-sb3 --seeds 10      whether both learn alike
    python -m bench.against_sb3 --quick                            so little that only its running is shown

Each run is a process of its own, and another participant begins with each seed. A finished run is kept in the JSON file and
not made again, so all this can be interrupted and repeated. Both sides evaluate the deterministic policy (the mean action,
the greedy one) on as many episodes after as many env steps. Stable-Baselines3 evaluates between two steps of training:
`training` leaves that out. aiorl evaluates beside training, where it takes processor time from it. `wall` is all of it, from
the start of the process to its end. Every library uses as many threads as it does by itself unless `--threads` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiorl.metrics.curve import Curve, Point, write_svg
from aiorl.metrics.svg import short_number
from bench.common import machine, print_machine, summarise
from bench.equivalence import Estimate, iqm_difference, verdict
from bench.learning_runs import load_rows, write_rows
from bench.peers import lineup, setup
from bench.peers.__main__ import end_group
from bench.peers.learning import TASKS, Task
from bench.peers.works import RESULT

ROOT = Path(__file__).parents[1]
JSON, DOCUMENT = ROOT / "bench" / "raw" / "against_sb3.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- begin: written by bench/against_sb3.py -->", "<!-- end: written by bench/against_sb3.py -->"
MARGIN = 0.05  # of scores, as for `learning_vs_degree`
KEY = ("env", "steps", "who", "seed")
NAMES = {"async": "aiorl, 2 workers", "twin": "aiorl, sequential", "sb3": "Stable-Baselines3"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Row = dict[str, Any]


class Job(NamedTuple):
    """One run to make."""

    task: Task
    who: str
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.task.env, self.task.steps, self.who, self.seed

    def command(self, peers: Path, small: bool) -> list[str]:
        sb3 = self.who == "sb3"
        python = peers.absolute() / lineup.VENVS["sb3"] / "bin" / "python" if sb3 else Path(sys.executable)
        module = f"bench.peers.learning_{'sb3' if sb3 else 'ours'}"
        line = [str(python), "-m", module, self.task.env, self.who, str(self.seed), str(self.task.steps)]
        return line + ["--small"] * small


def jobs(tasks: Sequence[Task], participants: Sequence[str], seeds: int) -> list[Job]:
    """Seed by seed, so that what is there early says something about all; another participant begins each."""
    found: list[Job] = []
    for seed in range(seeds):
        begin = seed % len(participants)
        turn = [*participants[begin:], *participants[:begin]]
        found += [Job(task, who, seed) for task in tasks for who in turn]
    return found


def carry_out(job: Job, options: argparse.Namespace) -> Row:
    """One run in a process of its own. Raises RuntimeError if it gives no answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if options.threads:
        environment |= dict.fromkeys(THREADS, str(options.threads))
    command = job.command(options.peers_dir, options.quick)
    launched = time.time()
    with tempfile.TemporaryDirectory() as scratch:  # MuJoCo leaves a log where it runs
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            out, _ = process.communicate()
        finally:
            end_group(process)
    answers = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    if not answers:
        raise RuntimeError(f"no answer from {' '.join(command)}; it ended with {process.returncode}")
    found, wall_s = json.loads(answers[-1]), time.time() - launched
    start_s = found.pop("begun_at") - launched
    for evaluation in found["evaluations"]:
        evaluation[1] += start_s
        evaluation[:] = [round(x, 3) for x in evaluation]
    env, steps, who, seed = job.key
    settings = {"settings": job.task.text, "cores": machine()["cores"], "threads": options.threads or "default"}
    times = {"wall_s": round(wall_s, 1), "train_s": round(found.pop("train_s"), 1)}
    return {"env": env, "steps": steps, "who": who, "seed": seed, **times, **found, **settings}


def run_missing(work: Sequence[Job], options: argparse.Namespace) -> list[Row]:
    """Make the runs that the file has no row of and add their rows at once. Returns the rows of all."""
    path = None if options.quick else Path(options.json)
    rows = load_rows(path) if path else []
    refuse_other_settings(rows, work)
    known = {tuple(row[name] for name in KEY) for row in rows}
    missing = [job for job in work if job.key not in known]
    print(f"{len(work)} runs, {len(work) - len(missing)} of them there already", flush=True)
    failed = 0
    for number, job in enumerate(missing, 1):
        print(f"{number}/{len(missing)}  {job.task.env}, {NAMES[job.who]}, seed {job.seed}", flush=True)
        try:
            rows.append(carry_out(job, options))
        except RuntimeError as error:
            failed += 1
            print(f"  FAILED: {error}", flush=True)
            continue
        if path:
            write_rows(path, rows, KEY)
    if failed:
        print(f"{failed} runs failed and are missing below; the same command makes them again", flush=True)
    wanted = {job.key for job in work}
    return [row for row in rows if tuple(row[name] for name in KEY) in wanted]


def refuse_other_settings(rows: Sequence[Row], work: Sequence[Job]) -> None:
    """Raise SystemExit if a run that is there was made with other settings than are asked for now."""
    settings = {job.key: job.task.text for job in work}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        if row["settings"] != settings.get(key, row["settings"]):
            raise SystemExit(
                f"the run {key} was made with {row['settings']}\nexpected {settings[key]}\nname another file with --json"
            )


# -- what comes out ----------------------------------------------------------------------------------------------------


def final(row: Row) -> float:
    return row["evaluations"][-1][2]


def mean_height(row: Row) -> float:
    """Mean of all evaluations: how good the run was on its way."""
    return statistics.fmean(evaluation[2] for evaluation in row["evaluations"])


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each environment and participant, medians [ranges] over the seeds."""
    heads = ("environment", "who", "final return", "mean of all evaluations", "training s", "wall s", "env steps/s", "seeds")
    lines = [f"| {' | '.join(heads)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for (env, steps, who), group in grouped(rows).items():
        cells = [
            f"{env}, {steps:,}",
            NAMES[who],
            summarise([final(row) for row in group]).text(),
            summarise([mean_height(row) for row in group]).text(),
            summarise([row["train_s"] for row in group]).text(0),
            summarise([row["wall_s"] for row in group]).text(0),
            summarise([row["env_steps"] / row["train_s"] for row in group]).text(0),
            str(len(group)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grouped(rows: Sequence[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """(env, steps, who) to rows by seed, in the order of `NAMES` within an environment."""
    order = list(NAMES)
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["env"], row["steps"], order.index(row["who"]), row["seed"])):
        found.setdefault((row["env"], row["steps"], row["who"]), []).append(row)
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether aiorl has come as far as Stable-Baselines3, whether both its ways learn alike, and who is sooner.

    Only seeds that both sides have count. As far: medians of the final returns. Alike: the 95 % interval of the difference
    of the interquartile means of the final scores lies within `MARGIN`.
    """
    groups, lines = grouped(rows), list[str]()
    for (env, steps, who), group in groups.items():
        for other in {"async": ("sb3", "twin"), "twin": ("sb3",)}.get(who, ()):
            theirs = {row["seed"]: row for row in groups.get((env, steps, other), [])}
            pairs = [(row, theirs[row["seed"]]) for row in group if row["seed"] in theirs]
            if pairs:
                judge = _at_least if other == "sb3" else _alike
                about = f"{env}, {NAMES[who]} against {NAMES[other]}, {len(pairs)} seeds"
                lines += [f"{mark}  {about}: {text}" for mark, text in [judge(TASKS[env], pairs), *_sooner(pairs)]]
    return lines


Pairs = Sequence[tuple[Row, Row]]


def _at_least(task: Task, pairs: Pairs) -> tuple[str, str]:
    ours, theirs = (statistics.median(final(pair[side]) for pair in pairs) for side in (0, 1))
    return _mark(ours >= theirs), f"final return {ours:,.1f} against {theirs:,.1f} (medians)"


def _alike(task: Task, pairs: Pairs) -> tuple[str, str]:
    if len(pairs) < 2:
        return _mark(False), "one seed does not tell whether they learn alike"

    def difference(measure: Callable[[Row], float]) -> Estimate:
        ours, theirs = ([task.score(measure(pair[side])) for pair in pairs] for side in (0, 1))
        return iqm_difference([ours], [theirs])

    found, on_the_way = difference(final), difference(mean_height)
    judged = verdict(found, MARGIN)
    text = f"IQM of the scores differs by {found.text()}, margin {MARGIN}: {judged}"
    return _mark(judged == "equivalent"), f"{text}; of all evaluations' means by {on_the_way.text()}"


def _sooner(pairs: Pairs) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, name in (("train_s", "training"), ("wall_s", "wall time")):
        ratio = summarise([theirs[key] / ours[key] for ours, theirs in pairs])
        found.append((_mark(ratio.median > 1), f"{name} {ratio.text(2)} times as fast"))
    return found


def _mark(reached: bool) -> str:
    return "reached" if reached else "MISSED "


def curves(rows: Sequence[Row]) -> list[tuple[str, Curve]]:
    """Label and curve of each participant in one environment: means of the seeds, with their deviation as the spread."""
    found: list[tuple[str, Curve]] = []
    for (env, _, who), group in grouped(rows).items():
        points = [_point(column) for column in zip(*(row["evaluations"] for row in group), strict=False)]
        end = (points[-1].env_steps, statistics.fmean(row["wall_s"] for row in group))
        curve = Curve(env=env, algo=TASKS[env].algo, evaluations=points, end=end)
        found.append((f"{NAMES[who]}, {len(group)} seeds", curve))
    return found


def _point(evaluations: Sequence[Sequence[float]]) -> Point:
    """The same evaluation of all seeds."""
    steps, seconds, means, _ = zip(*evaluations, strict=True)
    return Point(statistics.fmean(steps), statistics.fmean(seconds), statistics.fmean(means), statistics.pstdev(means))


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Two pictures for each environment and length, over env steps and over time. Returns their paths."""
    paths: list[Path] = []
    for env, steps in sorted({(row["env"], row["steps"]) for row in rows}):
        found = curves([row for row in rows if (row["env"], row["steps"]) == (env, steps)])
        labels, drawn = [label for label, _ in found], [curve for _, curve in found]
        for axis in ("steps", "time"):
            name = f"against_sb3-{env.replace('/', '-')}-{short_number(steps)}-{axis}.svg"
            write_svg(drawn, directory / name, axis, labels)
            paths.append(directory / name)
    return paths


def report(rows: Sequence[Row]) -> str:
    """Markdown: table, verdicts, and what was held equal in each environment."""
    lines = [table(rows), "", *(f"    {line}" for line in verdicts(rows)), ""]
    for env, text in sorted({(row["env"], row["settings"]) for row in rows}):
        task = TASKS[env]
        lines.append(f"* {env}: {text}; {task.episodes} episodes every {task.eval_every:,} env steps.")
    return "\n".join(lines)


def write(rows: Sequence[Row], document: Path = DOCUMENT) -> None:
    """Draw all rows and put the report between its marks in the document."""
    pictures = [f"![{path.stem}](img/{path.name})" for path in plot(rows, document.parent / "img")]
    block = "\n".join([BEGIN, report(rows), "", *pictures, END])
    whole = document.read_text(encoding="utf-8")
    if BEGIN not in whole or END not in whole:
        raise SystemExit(f"{document} has no place for this: expected {BEGIN} and {END}")
    document.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, whole, flags=re.DOTALL), encoding="utf-8")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=["HalfCheetah-v5", "Hopper-v5"])
    parser.add_argument("--ours", nargs="+", choices=[name for name in NAMES if name != "sb3"], default=["async"])
    parser.add_argument("--without-sb3", action="store_true", help="only aiorl's ways")
    parser.add_argument("--steps", type=int, help="env steps of each run (default: the environment's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each learner; 0: as each does by itself")
    parser.add_argument("--json", default=str(JSON), help="where finished runs are kept")
    parser.add_argument("--images", type=Path, help="draw the curves of these runs into this directory")
    parser.add_argument("--write", action="store_true", help="put all runs of the file, drawn, into docs/results.md")
    parser.add_argument("--quick", action="store_true", help="800 env steps, one seed, nothing is kept")
    parser.add_argument("--peers-dir", type=Path, default=lineup.peers_directory(), help="where the peers are installed")
    parser.add_argument("--setup", action="store_true", help="install what is missing there, and end")
    options = parser.parse_args(arguments)
    options.seeds = 1 if options.quick else options.seeds
    return options


def main() -> None:
    options = parse()
    if options.setup:
        setup.set_up(options.peers_dir, ["common"])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way is ended, too
    print_machine()
    chosen = [TASKS[env] for env in options.envs]
    tasks = [task.small() if options.quick else task.of(options.steps or task.steps) for task in chosen]
    participants = [*options.ours, *([] if options.without_sb3 else ["sb3"])]
    rows = run_missing(jobs(tasks, participants, options.seeds), options)
    print(f"\n{report(rows)}")
    if options.images:
        for path in plot(rows, options.images):
            print(f"curves in {path}")
    if options.write:
        write(load_rows(Path(options.json)))


if __name__ == "__main__":
    main()
