"""The commands with real runs: train, then everything that can be done with what a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import msgspec
import pytest
from checkpoints import edit_manifest
from cli_events import run_events, started, write_run
from permissions import without

from aiorl.cli import main
from aiorl.cli.runs import TAIL_BYTES
from aiorl.events import Warned

ROOT = Path(__file__).parent.parent
SMALL = [
    "--envs", "4", "--group-size", "2", "--segment-length", "32", "--eval-episodes", "3", "--no-preset",
    "--ppo.hidden", "8", "--ppo.minibatches", "2", "--ppo.epochs", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1024 env steps in this process; nobody may change it."""
    path = tmp_path_factory.mktemp("cli") / "run"
    words = ["train", "CartPole-v1", *SMALL, "--steps", "1024", "--workers", "0", "--seed", "5", "--progress", "none"]
    assert main([*words, "--out", str(path)]) == 0
    return path


def copy(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to / "run")


def test_run_directory_has_everything(finished: Path):
    names = {p.name for p in finished.iterdir()}
    assert {
        "config.toml", "events.jsonl", "metrics.csv", "schedule.jsonl", "summary.json", "curve.svg", "checkpoints", "best",
        "final",
    } <= names  # fmt: skip
    assert "error.txt" not in names
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["status"], summary["seed"]) == ("completed", 5)
    assert 1024 <= summary["env_steps"] < 1024 + 4 * 32, "less than one rollout too many"
    assert "CartPole-v1 · ppo · seed 5" in (finished / "curve.svg").read_text(encoding="utf-8")


def test_config_of_a_run_leads_to_the_same_run(finished: Path, tmp_path: Path):
    out = tmp_path / "again"
    words = ["train", "--config", str(finished / "config.toml"), "--no-preset", "--progress", "none", "--out", str(out)]
    assert main(words) == 0
    hashes = [json.loads((run / "summary.json").read_text())["params_sha256"] for run in (finished, out)]
    assert hashes[0] == hashes[1]


def test_training_into_a_finished_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "CartPole-v1", *SMALL, "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_eval_repeats_the_recorded_evaluation(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(finished), "--which", "final", "--episodes", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    recorded = json.loads((finished / "summary.json").read_text())["final_evaluation"]
    assert result["mean_return"] == pytest.approx(recorded["mean_return"])
    assert (result["seed"], result["env"], len(result["returns"])) == (5, "CartPole-v1", 3)
    assert result["returns"] == [float(n) for n in result["lengths"]], "CartPole pays 1 for each step"


def test_eval_for_people(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(finished / "best"), "--episodes", "2", "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "over 2 episodes" in text
    assert "CartPole-v1, seed 1" in text


def test_eval_does_not_import_what_a_file_names(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copy(finished, tmp_path)
    edit_manifest(run / "best", lambda m: m["config"].update(env="hostile.module:make"))
    assert main(["eval", str(run), "--episodes", "1"]) == 2
    assert "--env hostile.module:make" in capsys.readouterr().err
    assert "hostile" not in sys.modules
    edit_manifest(run / "best", lambda m: m["config"].update(env="CartPole-v1", algo="hostile.module:Algo"))
    assert main(["eval", str(run), "--episodes", "1"]) == 2
    assert "hostile" not in sys.modules


def test_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copy(finished, tmp_path)
    weights = next((run / "best").glob("policy-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    assert main(["eval", str(run)]) == 2
    assert weights.name in capsys.readouterr().err


@pytest.mark.parametrize("file", ["learner-*.safetensors", "run-*.json", "manifest.json"])
def test_of_a_damaged_checkpoint_the_one_before_it_is_named(
    file: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = copy(finished, tmp_path)
    older, newest = sorted((run / "checkpoints").iterdir())
    words = ["--steps", "1200", "--progress", "none"]
    for damaged, told in ((newest, f"python -m aiorl resume {older}"), (older, "")):
        (path,) = damaged.glob(file)
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
        assert main(["resume", str(run), *words]) == 2
        text = capsys.readouterr().err
        assert newest.name in text.splitlines()[0]
        assert (told in text, "aiorl resume" in text) == (True, bool(told))
        if told:
            assert main(["resume", str(shutil.copytree(run, tmp_path / "copy") / "checkpoints" / older.name), *words]) == 0


def test_policy_in_the_wrong_environment(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(finished), "--env", "Acrobot-v1", "--episodes", "1"]) == 2
    text = capsys.readouterr().err
    assert "other spaces than Acrobot-v1 has" in text
    assert "saved: box 4 float32 -> discrete 2" in text
    assert "now:   box 6 float32 -> discrete 3" in text


def test_resume_goes_on_to_a_larger_total(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copy(finished, tmp_path)
    assert main(["resume", str(run), "--progress", "none"]) == 2
    text = capsys.readouterr().err
    assert "is finished" in text
    assert "to train longer, give a larger total" in text
    assert main(["resume", str(run), "--steps", "1500", "--progress", "plain"]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("completed")
    assert "CartPole-v1 · ppo" in seen.err
    summary = json.loads((run / "summary.json").read_text())
    assert 1500 <= summary["env_steps"] < 1500 + 4 * 32
    assert tomllib.loads((run / "config.toml").read_text())["total_steps"] == 1500


def test_the_total_to_resume_with_is_larger_than_what_is_done(finished: Path, capsys: pytest.CaptureFixture[str]):
    done = json.loads((finished / "summary.json").read_text())["env_steps"]
    for words in ([], ["--steps", "100"]):
        assert main(["resume", str(finished), *words]) == 2
        text = capsys.readouterr().err
        assert f"has {done:,} env steps, {words[-1] if words else '1,024'} were asked for" in text
        assert int(text.split("--steps ")[1]) > done


def test_a_run_goes_on_with_another_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, dqn = tmp_path / "run", ["--algo", "dqn", "--dqn.warmup", "64", "--dqn.hidden", "8", "--dqn.capacity", "1000"]
    words = ["--envs", "4", "--segment-length", "16", "--steps", "128", "--eval-episodes", "1", "--workers", "0"]
    assert main(["train", "CartPole-v1", *dqn, *words, "--no-preset", "--progress", "none", "--out", str(run)]) == 0
    capsys.readouterr()
    for setting, part in (
        ("--sac.storage disk", f"{run} was made with dqn\n  its own settings are called --dqn.storage"),
        ("--dqn.storage tape", f"{run}: dqn.storage = 'tape': expected memory or disk or device"),
        ("--dqn.inner.storage disk", "dqn.inner"),
    ):
        assert main(["resume", str(run), *setting.split(), "--steps", "192"]) == 2
        assert part in capsys.readouterr().err
    assert main(["resume", "--dqn.storage", "disk", "--steps", "192", "--progress", "none", str(run)]) == 0
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["dqn"]["storage"], config["total_steps"], config["dqn"]["hidden"]) == ("disk", 192, [8])


def test_runs_lists_finished_and_unfinished_ones(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copy(finished, tmp_path)
    (tmp_path / "notes").mkdir()
    unfinished = shutil.copytree(run, tmp_path / "cut")
    (unfinished / "summary.json").unlink()
    os.utime(unfinished / "events.jsonl", (1, 1))
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "status", "env", "algo"]
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert set(rows) == {"run", "cut"}
    assert rows["run"][1:5] == ["completed", "CartPole-v1", "ppo", "5"]
    assert rows["cut"][1] == "unfinished"
    assert rows["cut"][5:8] == rows["run"][5:8], "steps, return and best evaluation come from the events"
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert {json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()} == {"completed", "unfinished"}


def test_runs_are_in_the_order_in_which_they_were_begun_also_those_gone_on_with(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = copy(finished, tmp_path)
    begun = json.loads((run / "events.jsonl").read_text().splitlines()[0])["unix_seconds"]
    assert main(["resume", str(run), "--steps", "1200", "--progress", "none"]) == 0
    later = msgspec.structs.replace(started(), unix_seconds=begun + 1e6)
    warning = Warned(seconds=0.1, version=0, env_steps=0, message="this comes before the workers are ready")
    write_run(tmp_path / "later", iter([warning, later]))
    os.utime(tmp_path / "later" / "config.toml", (1, 1))  # by the times of files they come the other way round
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["run"], f["started"]) for f in found] == [(str(run), begun), (str(tmp_path / "later"), begun + 1e6)]
    old = write_run(tmp_path / "old" / "run")
    os.utime(old / "config.toml", (5, 5))
    assert main(["runs", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["started"] == 5, "its events do not say it yet"


ODD: dict[str, tuple[str, str]] = {
    "best": ("summary.json", '{"best": 3.5, "status": "completed"}'),
    "mean": ("summary.json", '{"status": "completed", "env_steps": 9, "wall_seconds": 1, "train_return_mean_100": "x"}'),
    "cut": ("summary.json", '{"status": "comp'),
    "evaluated": ("events.jsonl", '{"event": "evaluated", "seconds": 1, "env_steps": 9}\n'),
    "when": ("events.jsonl", '{"event":"started", "seconds": 1, "env_steps": 9, "unix_seconds": 1e300}\n'),
    "line": ("events.jsonl", '{"event": "upd\n{"event": "updated", "seconds": 1, "env_steps": 9}\n'),
    "toml": ("config.toml", "env = "),
    "seed": ("config.toml", 'seed = "many"'),
    "bytes": ("config.toml", "env = '\udcff'"),
}


def test_an_odd_directory_is_shown_as_damaged_and_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, (file, text) in ODD.items():
        run = write_run(tmp_path / name)
        (run / file).write_text(text, errors="surrogateescape")
    os.utime(write_run(tmp_path / os.fsdecode(b"n\xffme")) / "events.jsonl", (1, 1))
    write_run(tmp_path / "closed")
    with without(tmp_path / "closed"):
        assert main(["runs", str(tmp_path)]) == 0
        rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
        assert rows == {**dict.fromkeys([*ODD, "closed"], "damaged"), "n\ufffdme": "unfinished"}
        assert main(["runs", str(tmp_path), "--json"]) == 0
        assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == len(rows)


def test_runs_of_a_directory_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with without(tmp_path):
        assert main(["runs", str(tmp_path)]) == 2
    assert f"cannot read {tmp_path}: Permission denied" in capsys.readouterr().err


def test_events_that_are_being_written_are_not_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", run_events(updates=400))
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "upd')
    os.utime(run / "events.jsonl", (1, 1))
    assert (run / "events.jsonl").stat().st_size > TAIL_BYTES, "the first line that is read is cut, too"
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["status"], found["env_steps"], found["best_evaluation"]) == ("unfinished", 400_000, 4000.0)


def test_runs_of_an_empty_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


@pytest.mark.skipif(not all(map(find_spec, ("imageio", "PIL", "pygame"))), reason="needs the extra `video` and pygame")
def test_play_records_every_frame(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    out = tmp_path / "pole.gif"
    assert main(["play", str(finished), "--record", str(out), "--fps", "25", "--which", "final"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    frames = int(line.split(", ")[1].split()[0]) + 1
    with Image.open(out) as image:
        assert image.size == (600, 400)
        lasts = []
        for index in range(image.n_frames):
            image.seek(index)
            lasts.append(image.info["duration"])
    assert sum(lasts) == 40 * frames, "equal frames in a row may have become one that lasts longer"


def test_play_without_the_extra_names_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["play", str(finished), "--record", "x.gif"]) == 2
    assert 'pip install "aiorl[video]"' in capsys.readouterr().err


def test_play_without_a_screen_says_so(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("aiorl.cli.play._has_screen", lambda: False)
    assert main(["play", str(finished)]) == 2
    assert "--record out.gif" in capsys.readouterr().err


def test_play_draws_text_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("aiorl.cli.play._has_screen", lambda: False)
    out = str(tmp_path / "lake")
    assert (
        main(["train", "FrozenLake-v1", *SMALL, "--steps", "128", "--workers", "0", "--progress", "none", "--out", out]) == 0
    )
    capsys.readouterr()
    assert main(["play", out]) == 0
    text = capsys.readouterr().out
    assert "SFFF" in text.replace("\x1b[41m", "").replace("\x1b[0m", "")
    assert "episode 1: return" in text


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "aiorl", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_real_run_and_leaves_a_checkpoint(number: int, code: int, tmp_path: Path):
    out = tmp_path / "run"
    words = ["train", "CartPole-v1", *SMALL, "--steps", "10M", "--workers", "1", "--progress", "json", "--out", str(out)]
    with start(*words) as process:
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        first = next(events)
        while next(events)["event"] != "updated":
            pass
        process.send_signal(number)
        rest = [event["event"] for event in events]
        assert process.stderr is not None
        errors = process.stderr.read()
    assert first["event"] == "started"
    assert process.returncode == code
    assert rest[-1] == "finished"
    assert "Traceback" not in errors
    assert json.loads((out / "summary.json").read_text())["status"] == "stopped"
    assert (out / "final" / "manifest.json").is_file()
    assert list((out / "checkpoints").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
def test_a_directory_that_config_toml_cannot_name_is_refused_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / os.fsdecode(b"bad\xffname")
    assert main(["train", "CartPole-v1", *SMALL, "--out", str(out)]) == 2
    assert "bad\\udcffname': expected a text that UTF-8 can hold" in capsys.readouterr().err
    assert not out.exists()


def test_refused_in_a_process_of_its_own(tmp_path: Path):
    out = tmp_path / "run"
    with start("train", "tests.toys:nothing_like_this", "--out", str(out)) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert len(errors.strip().splitlines()) <= 3
    assert not out.exists()


TOY = ["train", "CartPole-v1", "--algo", "tests.toys:Toy", "--envs", "2", "--workers", "0", "--progress", "none"]


def test_failing_run_ends_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main([*TOY, "--toy.fail-at", "2", "--steps", "500", "--out", str(out)]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "planned failure" in seen.err
    assert f"traceback: {out / 'error.txt'}" in seen.err
    assert "Traceback" not in seen.err
    assert "Traceback" in (out / "error.txt").read_text()
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert main(["runs", str(tmp_path)]) == 0
    assert "failed" in capsys.readouterr().out


def test_algorithm_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main([*TOY, "--help"]) == 0
    assert "--toy.learning-rate X" in capsys.readouterr().out
    assert main([*TOY, "--toy.learning-rate", "0.5", "--steps", "300", "--out", str(out)]) == 0
    config = tomllib.loads((out / "config.toml").read_text())
    assert (config["algo"], config["toy"]["learning_rate"]) == ("tests.toys:Toy", 0.5)
    assert main(["eval", str(out), "--episodes", "1"]) == 2, "a file must not decide what is imported"
    assert "say so with --algo tests.toys:Toy" in capsys.readouterr().err
    assert main(["eval", str(out), "--episodes", "1", "--algo", "tests.toys:Toy"]) == 0


class Sounds(gymnasium.Env):
    """Observes something that no column can hold."""

    observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(3))
    action_space = gymnasium.spaces.Discrete(2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("train tests.test_cli_runs:Sounds", ["Sequence"]),
        ("train tests.test_cli_runs:ROOT", ["not callable"]),
        ("train CartPole-v1 --out {file}/run", ["cannot write to {file}/run", "out"]),
        ("resume {run}/best", ["{run}/best holds a policy", "resume {run}"]),
        ("resume {run} --steps 900", ["is finished"]),
        ("eval {run}/checkpoints", ["{run}/checkpoints"]),
        ("plot {run} --out {file}/x.svg", ["cannot write {file}/x.svg"]),
    ],
)
def test_refused_before_anything_starts(
    words: str, parts: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    names = {"file": tmp_path / "file", "run": finished}
    assert main(words.format(**names).split()) == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) <= 3
    for part in parts:
        assert part.format(**names) in text


@pytest.mark.parametrize(
    ("words", "closed", "told"),
    [
        ("plot {run}", "", "cannot read {run}/events.jsonl"),
        ("plot {run}", "events.jsonl", "cannot read {run}/events.jsonl"),
        ("plot {run} --standings", "standings.json", "cannot read {run}/standings.json"),
        ("eval {run}", "", "cannot read {run}/manifest.json"),
        ("eval {run} --which latest", "checkpoints", "cannot read {run}/checkpoints"),
        ("play {run}", "best", "cannot read {run}/best/manifest.json"),
        ("resume {run} --steps 5k", "", "cannot read {run}/manifest.json"),
        ("resume {run} --steps 5k", "events.jsonl", "cannot add to {run}/events.jsonl"),
        ("resume {run} --steps 5k", "worker-0.log", "cannot add to {run}/worker-0.log"),
    ],
)
def test_what_may_not_be_read_or_written_is_named(
    words: str, closed: str, told: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = copy(finished, tmp_path)
    for name in ("standings.json", "worker-0.log"):
        (run / name).touch()
    with without(run / closed):
        assert main(words.format(run=run).split()) == 2
    text = capsys.readouterr().err
    assert f"{told.format(run=run)}: Permission denied" in text
    assert len(text.strip().splitlines()) <= 3


def test_checkpoint_of_a_later_aiorl(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copy(finished, tmp_path)
    edit_manifest(run / "best", lambda m: m.update(schema=99))
    assert main(["eval", str(run)]) == 2
    assert "schema 99" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "aiorl", "train", "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [(">&-", "algos ppo", 0), (">&-", "--help", 0), ("2>&-", "trian", 2), ("<&- >&- 2>&-", "algos ppo", 0)],
)
def test_standard_streams_that_are_closed(closed: str, words: str, code: int):
    shell = f'exec "$0" -m aiorl {words} {closed}'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_terminal_that_knows_ascii_only(finished: Path):
    """A sign that it does not have is no reason to lose what was measured."""
    env = {**os.environ, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for words in ([], ["eval", str(finished), "--episodes", "1"]):
        command = [sys.executable, "-m", "aiorl", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "?" in done.stdout


def test_replay_repeats_a_run_and_sees_a_difference(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["replay", str(finished), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"]
    assert told["repeated_sha256"] == json.loads((finished / "summary.json").read_text())["params_sha256"]
    other = copy(finished, tmp_path)
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config.replace("seed = 5", "seed = 6"))
    assert main(["replay", str(other)]) == 1
    assert "differs  from rollout 0 on" in capsys.readouterr().out
    assert main(["replay", str(tmp_path)]) == 2
    assert main(["replay"]) == 2
    assert "no run given" in capsys.readouterr().err
