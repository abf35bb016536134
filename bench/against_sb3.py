"""aiorl against Stable-Baselines3 as learners: the same training in turns, with the same settings, seeds and evaluations.

    python -m bench.against_sb3 --setup                            once: installs Stable-Baselines3 beside this
    python -m bench.against_sb3 --envs HalfCheetah-v5 Hopper-v5    SAC, 100,000 env steps, 3 seeds each
    python -m bench.against_sb3 --envs MinAtar/Breakout-v1 --ours async mean qrdqn DQN and QR-DQN, a million env steps
    python -m bench.against_sb3 --envs ALE/Pong-v5 --seeds 1       pixels: speed and memory
    python -m bench.against_sb3 --envs HalfCheetah-v5 --steps 300000 --seeds 1 --ours async twin
    python -m bench.against_sb3 --envs Pendulum-v1 --ours async twin --without-sb3 --seeds 10      whether both learn alike
    python -m bench.against_sb3 --quick                            so little that only its running is shown

Each run is a process of its own, and another participant begins with each seed. A finished run is kept in the JSON file and
not made again, so all this can be interrupted and repeated. Both sides evaluate the deterministic policy (the mean action,
the greedy one) on as many episodes after as many env steps. Stable-Baselines3 evaluates between two steps of training:
`training` leaves that out. aiorl evaluates beside training, where it takes processor time from it. `wall` is all of it, from
the start of the process to its end. Stable-Baselines3 runs with subnormal numbers flushed, which its users have to ask for
and which makes it faster where units die. Every library uses as many threads as it does by itself unless `--threads` is
given.

`--jobs N` makes N runs at once, each with one torch thread on a core of its own: learning curves need no idle machine. Their
times are kept and say nothing about who is faster; that is judged by the runs that were made alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiorl.filelock import FileLock, Held
from bench.common import machine, print_machine
from bench.learning_runs import load_rows, write_rows
from bench.peers import lineup, setup
from bench.peers.learning import DQN, OF_DQN, TASKS, Task, chosen
from bench.peers.works import RESULT
from bench.sb3_report import NAMES, Row, plot, pooled, report, write

ROOT = Path(__file__).parents[1]
JSON = ROOT / "bench" / "raw" / "against_sb3.json"
KEY = ("env", "steps", "who", "seed")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
        return [*line, "--episodes", str(self.task.episodes), *["--small"] * small]


def jobs(tasks: Sequence[Task], participants: Sequence[str], seeds: int) -> list[Job]:
    """Seed by seed, so that what is there early says something about all; another participant begins each."""
    found: list[Job] = []
    for seed in range(seeds):
        begin = seed % len(participants)
        turn = [*participants[begin:], *participants[:begin]]
        found += [Job(task, who, seed) for task in tasks for who in turn]
    return found


async def carry_out(job: Job, options: argparse.Namespace, core: int | None) -> Row:
    """One run in a process of its own, on that core alone if there is one. Raises RuntimeError if it gives no answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if options.threads:
        environment |= dict.fromkeys(THREADS, str(options.threads))
    command = job.command(options.peers_dir, options.quick)
    launched = time.time()
    with tempfile.TemporaryDirectory() as scratch:  # MuJoCo leaves a log where it runs
        out, code = await _output_of(command, scratch, environment, core)
    answers = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    if not answers:
        raise RuntimeError(f"no answer from {' '.join(command)}; it ended with {code}")
    found, wall_s = json.loads(answers[-1]), time.time() - launched
    start_s = found.pop("begun_at") - launched
    for evaluation in found["evaluations"]:
        evaluation[1] += start_s
        evaluation[:] = [round(x, 3) for x in evaluation]
    cores = machine()["cores"] if core is None else 1
    circumstances = {"cores": cores, "threads": options.threads or "default", "side_by_side": options.jobs}
    times = {"wall_s": round(wall_s, 1), "train_s": round(found.pop("train_s"), 1)}
    return {**dict(zip(KEY, job.key, strict=True)), **times, **found, "settings": job.task.text, **circumstances}


async def _output_of(
    command: Sequence[str], directory: str, environment: dict[str, str], core: int | None
) -> tuple[str, int]:
    """What a program prints and its exit status; what it leaves running is ended."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=environment, stdout=asyncio.subprocess.PIPE, process_group=0
    )
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})  # while it has one thread: those to come inherit it
        out, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = await process.wait()
    return out.decode(), code


def lanes(runs_at_once: int) -> list[int | None]:
    """The core of each run made at once; None: all cores, for a run alone. Raises ValueError if there are too few."""
    if runs_at_once == 1:
        return [None]
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("cores cannot be assigned to processes on this system, expected --jobs 1")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 < runs_at_once <= len(cores):
        raise ValueError(f"{runs_at_once} runs at once on {len(cores)} cores, expected between 1 and a run for each core")
    return [*cores[:runs_at_once]]


async def run_missing(work: Sequence[Job], options: argparse.Namespace) -> list[Row]:
    """Make the runs that the file has no row of and add their rows at once. Returns the rows of all."""
    path = None if options.quick else Path(options.json)
    with contextlib.ExitStack() as stack:
        if path:
            stack.callback(_hold(path).release)
        rows = load_rows(path) if path else []
        refuse_other_settings(rows, work)
        known = {tuple(row[name] for name in KEY) for row in rows}
        missing = [job for job in work if job.key not in known]
        print(f"{len(work)} runs, {len(work) - len(missing)} of them there already", flush=True)
        failed: list[Job] = []
        left = iter(enumerate(missing, 1))  # shared: whoever is free takes the next one

        async def lane(core: int | None) -> None:
            for number, job in left:
                print(f"{number}/{len(missing)}  {job.task.env}, {NAMES[job.who]}, seed {job.seed}", flush=True)
                try:
                    rows.append(await carry_out(job, options, core))
                except RuntimeError as error:
                    failed.append(job)
                    print(f"  FAILED: {error}", flush=True)
                    continue
                if path:
                    write_rows(path, rows, KEY)

        async with asyncio.TaskGroup() as group:
            for core in lanes(options.jobs):
                group.create_task(lane(core))
    if failed:
        print(f"{len(failed)} runs failed and are missing below; the same command makes them again", flush=True)
    wanted = {job.key for job in work}
    return [row for row in rows if tuple(row[name] for name in KEY) in wanted]


def _hold(path: Path) -> FileLock:
    """Two programs that write the same file would each drop the other's rows. Raises SystemExit if another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path.with_suffix(".lock"))
    except Held as held:
        text = f"{path} is in use: {held}\nexpected one program at a time: see --jobs, or name another file with --json"
        raise SystemExit(text) from None


def refuse_other_settings(rows: Sequence[Row], work: Sequence[Job]) -> None:
    """Raise SystemExit if a run that is there was made with other settings than are asked for now."""
    settings = {job.key: job.task.text for job in work}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        if row["settings"] != settings.get(key, row["settings"]):
            raise SystemExit(
                f"the run {key} was made with {row['settings']}\nexpected {settings[key]}\nname another file with --json"
            )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=["HalfCheetah-v5", "Hopper-v5"])
    parser.add_argument("--ours", nargs="+", choices=[name for name in NAMES if name != "sb3"], default=["async"])
    parser.add_argument("--without-sb3", action="store_true", help="only aiorl's ways")
    parser.add_argument("--steps", type=int, help="env steps of each run (default: the environment's)")
    parser.add_argument("--episodes", type=int, help="of each evaluation (default: the environment's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each learner; 0: as each does by itself")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on a core of its own with one torch thread")
    parser.add_argument("--json", default=str(JSON), help="where finished runs are kept")
    parser.add_argument("--pool", type=Path, help="judge the twin also with the runs of this file, of another machine")
    parser.add_argument("--images", type=Path, help="draw the curves of these runs into this directory")
    parser.add_argument("--write", action="store_true", help="put all runs of the file, drawn, into docs/results.md")
    parser.add_argument("--quick", action="store_true", help="800 env steps, one seed, nothing is kept")
    parser.add_argument("--peers-dir", type=Path, default=lineup.peers_directory(), help="where the peers are installed")
    parser.add_argument("--setup", action="store_true", help="install what is missing there, and end")
    options = parser.parse_args(arguments)
    options.seeds = 1 if options.quick else options.seeds
    others = [env for env in options.envs if not isinstance(TASKS[env].learner, DQN)]
    if others and (narrow := [way for way in options.ours if way in OF_DQN]):
        parser.error(f"--ours {narrow[0]} takes part where DQN does, and not in {', '.join(others)}")
    if options.episodes is not None and options.episodes < 1:
        parser.error(f"--episodes {options.episodes}: expected at least one")
    try:
        lanes(options.jobs)
    except ValueError as error:
        parser.error(f"--jobs: {error}")
    if options.jobs > 1:
        if options.threads > 1:
            parser.error(f"--threads {options.threads} with --jobs {options.jobs}: expected one thread on a core")
        options.threads = 1
    return options


def main() -> None:
    options = parse()
    if options.setup:
        setup.set_up(options.peers_dir, ["common"])
        return
    print_machine()
    tasks = [chosen(env, options.steps, options.episodes, options.quick) for env in options.envs]
    participants = [*options.ours, *([] if options.without_sb3 else ["sb3"])]
    try:
        rows = asyncio.run(until_told(jobs(tasks, participants, options.seeds), options))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    print(f"\n{report(rows)}")
    if options.pool:
        print("\n".join(pooled(rows, load_rows(options.pool))))
    if options.images:
        for path in plot(rows, options.images):
            print(f"curves in {path}")
    if options.write:
        write(load_rows(Path(options.json)))


async def until_told(work: Sequence[Job], options: argparse.Namespace) -> list[Row]:
    """`run_missing`; SIGTERM cancels it, so that the runs under way are ended, too."""
    asked = asyncio.create_task(run_missing(work, options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.cancel)
    return await asked


if __name__ == "__main__":
    main()
