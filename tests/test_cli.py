from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl import resuming
from aiorl.cli import VERBS, main
from aiorl.cli.flags import bare, description, field_value, key_value, members, number, scalar
from aiorl.cli.parse import RESUMABLE_OWN, Request, merge, read_resume, read_train
from aiorl.errors import ConfigError

ROOT = Path(__file__).parent.parent


def request(*words: str) -> Request:
    found = read_train(words)
    assert isinstance(found, Request)
    return found


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that is refused with exit code 2, nothing on stdout, three lines at most."""
    assert main(words) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("error: ")
    assert len(seen.err.strip().splitlines()) <= 3
    return seen.err


# -- the front door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_has_every_verb_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name}" in text
        assert f"python -m aiorl {verb.example}" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m aiorl {verb}")


@pytest.mark.parametrize("words", ["", "--help", "train --help", "train CartPole-v1 --algo dqn --help", "resume --help"])
def test_help_imports_neither_torch_nor_gymnasium(words: str):
    code = (
        "import sys\nfrom aiorl.cli import main\n"
        f"code = main({words.split()!r})\n"
        "heavy = [m for m in ('torch', 'gymnasium', 'rich', 'asyncio') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_the_command_sets_one_blas_thread_unless_told_otherwise():
    code = (
        "import os\nfrom aiorl.__main__ import limit_threads\nlimit_threads()\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    )
    env = {**os.environ, "MKL_NUM_THREADS": "3"}
    env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert done.stdout.split() == ["1", "3"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("trian", ["unknown verb `trian`", "did you mean `train`?"]),
        ("CartPole-v1", ["python -m aiorl train CartPole-v1"]),
        ("xyzzy", ["verbs: train, resume"]),
        ("--steps 5 train", ["the verb comes first"]),
        ("train", ["no environment given", "aiorl envs"]),
        ("train CartPole-v1 --stps 5", ["unknown flag `--stps`", "did you mean `--steps`?"]),
        ("train CartPole-v1 --total-steps=5", ["did you mean `--steps`?"]),
        ("train CartPole-v1 --learning-rate 1", ["did you mean `--ppo.learning-rate`?"]),
        ("train CartPole-v1 --ppo.learning-rat 1", ["did you mean `--ppo.learning-rate`?"]),
        ("train CartPole-v1 --zzzzzz", ["unknown flag `--zzzzzz`", "--help"]),
        ("train CartPole-v1 Acrobot-v1", ["unexpected argument `Acrobot-v1`"]),
        ("train CartPole-v1 --steps", ["--steps: expected one argument"]),
        ("train CartPole-v1 --steps many", ["--steps many: expected a whole number such as 4096 or 200k"]),
        ("train CartPole-v1 --steps 0", ["--steps 0", ">= 1"]),
        ("train CartPole-v1 --ppo.hidden 8,0", ["--ppo.hidden 8 0: expected numbers separated by commas, >= 1\n"]),
        ("train CartPole-v1 --algo dqn --dqn.hidden -3", ["--dqn.hidden -3: expected numbers", ">= 1\n"]),
        ("train CartPole-v1 --algo dqn --dqn.epsilon-end 0.5 --dqn.epsilon-start 0.1", ["epsilon_end = 0.5", "exchange"]),
        ("train CartPole-v1 --steps 2.5", ["--steps 2.5: expected a whole number"]),
        ("train CartPole-v1 --seed -1", ["--seed -1", ">= 0"]),
        ("train CartPole-v1 --stop-at -1x", ["--stop-at -1x: expected a number"]),
        ("train CartPole-v1 --device gpu", ["expected one of auto, cpu, cuda", "did you mean `cpu`?"]),
        ("train CartPole-v1 --schedule orderd", ["did you mean `ordered`?"]),
        ("train CartPole-v1 --workers aut", ["did you mean `auto`?"]),
        ("train CartPole-v1 --step-timeout 0", ["--step-timeout 0", "> 0"]),
        ("train CartPole-v1 --ppo.learning-rate fast", ["--ppo.learning-rate fast: expected a number"]),
        ("train CartPole-v1 --progress pretty", ["--progress pretty", "auto, rich, plain, json, none"]),
        ("train CartPole-v1 --env-kwargs gravity", ["expected key=value"]),
        ("train CartPole-v1 --envs 10 --group-size 4", ["10", "group_size = 4", "1, 2, 5, 10"]),
        ("train CartPole-v1 --algo pppo", ["unknown algorithm 'pppo'", "did you mean ppo?"]),
        ("train CartPole-v1 --algo nowhere.at:All", ["nowhere.at"]),
        ("train CartPole-v1 --config nowhere.toml", ["nowhere.toml"]),
        ("train CartPole-v2 --dry-run", ["CartPole-v1"]),
        ("train Cartpole-v1 --dry-run", ["did you mean CartPole-v1?"]),
        ("train nowhere:make --dry-run", ["nowhere"]),
        ("train tests.toys:nothing --dry-run", ["tests.toys"]),
        ("train CartPole-v1 --env-kwargs gravity=3 --dry-run", ["gravity"]),
        ("train Pendulum-v1 --algo dqn --dry-run", ["dqn needs a Discrete action space", "Box"]),
        ("train CartPole-v1 --envs 4096 --segment-length 4096 --memory-gb 0.001 --dry-run", ["memory_gb = 0.001"]),
        ("resume", ["no run given"]),
        ("resume nowhere", ["nowhere"]),
        ("resume nowhere --seed 3", ["unknown flag `--seed`"]),
        ("eval", ["no run given"]),
        ("eval nowhere", ["nowhere"]),
        ("eval nowhere --episodes 0", ["--episodes 0", ">= 1"]),
        ("eval nowhere --which bset", ["expected one of best, final, latest"]),
        ("play nowhere", ["nowhere"]),
        ("play nowhere --record x.avi", [".gif or .mp4"]),
        ("play nowhere --record nodir/x.gif", ["there is no directory nodir"]),
        ("runs nowhere", ["there is no directory nowhere"]),
        ("envs CartPoleX", ["CartPole"]),
        ("algos sarsa", ["unknown algorithm 'sarsa'"]),
    ],
)
def test_bad_usage_is_refused(words: str, parts: list[str], capsys: pytest.CaptureFixture[str]):
    text = refused(words.split(), capsys)
    for part in parts:
        assert part in text


def test_no_traceback_unless_asked_for(capsys: pytest.CaptureFixture[str]):
    assert "Traceback" not in refused(["train", "--steps"], capsys)
    assert main(["train", "--debug", "--steps"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def broken(argv: Any) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("aiorl.cli.runs.main", broken)
    assert main(["runs"]) == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: oh\n  run again with --debug to see the traceback\n"


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("200k", 200_000), ("1.5M", 1_500_000), ("1e6", 1e6), ("200_000", 200_000), ("-3", -3), ("2.5e-4", 2.5e-4),
     ("0.1k", 100), ("auto", "auto"), ("1e", "1e"), ("k", "k"), ("__import__('os')", "__import__('os')")],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: Any):
    assert number(text) == value
    assert type(number(text)) is type(value)


@given(st.integers(-(10**12), 10**12))
def test_every_whole_number_is_read_back(value: int):
    assert number(str(value)) == value
    assert number(f"{value:_}") == value


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("gravity=-9.8", ("gravity", -9.8)),
        ("continuous=true", ("continuous", True)),
        ("keep_mode=no", ("keep_mode", False)),
        ('language="no"', ("language", "no")),
        ("size=1e3", ("size", 1000)),
        ("size=4.0", ("size", 4.0)),
        ("high=1e18", ("high", 10**18)),
        ("high=1e38", ("high", 1e38)),  # no integer of TOML
        ("low=-1e30", ("low", -1e30)),
        ("high=1e30k", ("high", 1e30 * 1000)),
        ("high=1e400k", ("high", float("inf"))),  # to be refused as not finite
        ("high=99999999999999999999", ("high", 99999999999999999999)),  # to be refused, not rounded
        ("name=easy", ("name", "easy")),
        ("name=", ("name", "")),
        ("seed=none", ("seed", None)),
        ("map=[[1,2],[3,4]]", ("map", [[1, 2], [3, 4]])),
        ('name="12"', ("name", "12")),
        ("url=a=b", ("url", "a=b")),
    ],
)
def test_environment_arguments_are_read_by_their_look(text: str, pair: tuple[str, Any]):
    found = key_value("--env-kwargs", text)
    assert found == pair
    assert type(found[1]) is type(pair[1])


@pytest.mark.parametrize("text", ["=3", "a-b=3", "x", "map=[1,"])
def test_malformed_environment_arguments(text: str):
    with pytest.raises(ConfigError, match="--env-kwargs"):
        key_value("--env-kwargs", text)


def test_values_follow_the_type_of_the_field():
    widths = Annotated[tuple[int, ...], msgspec.Meta(description="widths")]
    assert field_value("hidden", ["64,64"], widths) == (64, 64)
    assert field_value("hidden", ["64", "32"], widths) == (64, 32)
    assert field_value("x", "none", float | None) is None
    assert field_value("x", "3", float | None) == 3.0
    assert field_value("n", "1e3", int) == 1000
    assert field_value("mode", "b", Literal["a", "b"]) == "b"
    assert field_value("out", "123", str | None) == "123"
    assert scalar("false") is False
    assert description(Annotated[float, msgspec.Meta(description="how far")] | None) == "how far"
    assert members(Annotated[int | Literal["auto"], 1]) == [int, "auto"]
    assert bare(Annotated[bool | None, 1]) is bool


def test_merging_is_deep_except_for_environment_arguments():
    below = {"envs": 4, "ppo": {"epochs": 3, "clip": 0.2}, "env_kwargs": {"a": 1}}
    above = {"ppo": {"epochs": 9}, "env_kwargs": {"b": 2}}
    assert merge(below, above) == {"envs": 4, "ppo": {"epochs": 9, "clip": 0.2}, "env_kwargs": {"b": 2}}


# -- precedence --------------------------------------------------------------------------------------------------------


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"total_steps": 111, "envs": 4, "segment_length": 16, "ppo": {"learning_rate": 0.5}}
    monkeypatch.setattr("aiorl.cli.parse.preset", lambda algo, env: found if (algo, env) == ("ppo", "CartPole-v1") else {})


@pytest.mark.usefixtures("presets")
def test_flags_over_file_over_preset_over_defaults(tmp_path: Path):
    file = tmp_path / "a.toml"
    file.write_text("total_steps = 222\nsegment_length = 32\n[ppo]\nlearning_rate = 0.25\ngamma = 0.5\n")
    config = request("CartPole-v1", "--config", str(file), "--steps", "333", "--ppo.gamma", "0.75").config
    assert (config.total_steps, config.segment_length, config.envs, config.seed) == (333, 32, 4, 0)
    assert (config.algo.learning_rate, config.algo.gamma) == (0.25, 0.75)


@pytest.mark.usefixtures("presets")
def test_presets_can_be_left_out_and_belong_to_one_environment():
    assert request("CartPole-v1").preset
    assert request("CartPole-v1").config.total_steps == 111
    assert not request("CartPole-v1", "--no-preset").preset
    assert request("CartPole-v1", "--no-preset").config.total_steps == 100_000
    assert not request("Acrobot-v1").preset


@pytest.mark.usefixtures("presets")
def test_help_shows_the_defaults_that_would_be_used(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "CartPole-v1", "--help"]) == 0
    assert "(preset: 111)" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "111)" not in capsys.readouterr().out


@pytest.mark.usefixtures("presets")
def test_help_says_where_a_value_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also of settings whose text says what the default is."""
    file = tmp_path / "a.toml"
    file.write_text("total_steps = 222\n[ppo]\ngamma = 0.5\n")
    assert main(["train", "CartPole-v1", "--config", str(file), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.partition("what to train:")[2].split())
    for flag, end in (
        ("--steps N", "(file: 222)"), ("--envs N", "(preset: 4)"), ("--seed N", "(default: 0)"),
        ("--segment-length N", "(default: the algorithm's) (preset: 16)"),
        ("--ppo.learning-rate X", "(preset: 0.5)"), ("--ppo.gamma X", "(file: 0.5)"),
        ("--ppo.gae-lambda X", "(default: 0.95)"),
    ):  # fmt: skip
        assert text.partition(flag)[2].partition(" --")[0].endswith(end), flag


def test_help_lists_every_setting_with_its_description(capsys: pytest.CaptureFixture[str]):
    from aiorl.config import Config

    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--algo", "--steps", "--seed", "--envs", "--group-size N|auto", "--workers N|auto", "--segment-length",
        "--off-policy-degree", "--schedule ordered|eager", "--warmup", "--eval-every", "--eval-episodes", "--stop-at",
        "--step-timeout", "--device auto|cpu|cuda", "--torch-threads", "--out", "--progress auto|rich|plain|json|none",
        "--config", "--ppo.learning-rate", "--dry-run", "--env-kwargs", "--checkpoint-every", "--keep", "--memory-gb",
        "--allow-uncorrected", "--no-native-vector", "--no-preset", "--debug",
    ):  # fmt: skip
        assert flag in text, flag
    for field in msgspec.structs.fields(Config):
        if field.name != "env":
            words = description(field.type).split(" (")[0].split("; ")[0]
            assert words
            assert words in text, field.name


def test_the_algorithm_decides_which_flags_there_are(tmp_path: Path):
    config = request("CartPole-v1", "--dqn.gamma", "0.5", "--algo", "dqn", "--off-policy-degree", "0").config
    assert (config.algo.name, config.algo.gamma) == ("dqn", 0.5)
    file = tmp_path / "a.toml"
    file.write_text('algo = "dqn"\nenv = "CartPole-v1"\n')
    config = request("--config", str(file), "--dqn.gamma=0.5").config
    assert (config.algo.name, config.algo.gamma, config.env) == ("dqn", 0.5, "CartPole-v1")


@pytest.mark.parametrize("out", ["runs/x", "../{home}/runs/x", "{whole}/runs/x"])
def test_where_a_run_lies_is_no_setting_of_the_next_one(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config.toml of a run names its own directory."""
    monkeypatch.chdir(tmp_path)
    file = Path("runs/x/config.toml")
    file.parent.mkdir(parents=True)
    file.write_text(f'env = "CartPole-v1"\nout = "{out.format(home=tmp_path.name, whole=tmp_path)}"\n')
    assert request("--config", str(file)).config.out is None
    assert request("--config", str(file), "--out", "runs/x").config.out == "runs/x"
    assert request("--config", str(file.rename("runs/x/mine.toml"))).config.out is not None


def test_flags_of_every_kind():
    config = request(
        "--steps", "1.5k", "CartPole-v1", "--workers", "auto", "--stop-at", "-100", "--no-native-vector", "--out", "7",
        "--step-timeout", "2", "--env-kwargs", "a=1", "b=x", "--eval-every=0",
    ).config  # fmt: skip
    assert (config.total_steps, config.workers, config.stop_at, config.native_vector) == (1500, "auto", -100.0, False)
    assert (config.out, config.step_timeout_s, config.env_kwargs, config.eval_every) == (
        "7",
        2.0,
        {"a": 1, "b": "x"},
        0,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("-100", -100.0), ("-1k", -1e3), ("-1e3", -1e3), ("-1_000", -1e3), ("-1.5M", -1.5e6)]
)
def test_negative_numbers_as_people_write_them(text: str, value: float):
    assert request("Pendulum-v1", "--stop-at", text).config.stop_at == value
    assert request("--stop-at", text, "Pendulum-v1").config.stop_at == value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("total_step = 3", "did you mean `total_steps`?"),
        ("[ppo]\nlearning_rat = 3", "did you mean `ppo.learning_rate`?"),
        ("total_steps = 'many'", "total_steps = 'many'"),
        ("total_steps = 0", "total_steps = 0"),
        ("ppo = 3", "expected a table [ppo]"),
        ("[dqn]\ngamma = 0.5", "unknown key `dqn`"),
        ("algo = 3", "algo = 3"),
        ("total_steps = = 3", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    message = refused(["train", "CartPole-v1", "--config", str(file)], capsys)
    assert "mine.toml" in message
    assert part in message


# -- dry run -----------------------------------------------------------------------------------------------------------


def test_dry_run_prints_what_would_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "CartPole-v1", "--seed", "3", "--envs", "6", "--workers", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    printed = tomllib.loads(text)
    assert (printed["env"], printed["seed"], printed["envs"], printed["group_size"]) == ("CartPole-v1", 3, 6, 3)
    assert printed["ppo"]["learning_rate"] > 0
    assert list(tmp_path.iterdir()) == []
    # What it prints is a configuration file that leads to the same run.
    Path("again.toml").write_text(text)
    assert main(["train", "--no-preset", "--config", "again.toml", "--dry-run"]) == 0
    assert capsys.readouterr().out == text


def test_directory_that_holds_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text("")
    text = refused(["train", "CartPole-v1", "--out", str(tmp_path), "--dry-run"], capsys)
    assert "already holds a run" in text
    assert f"aiorl resume {tmp_path}" in text


def test_resume_takes_only_what_may_change():
    found = read_resume(["runs/x", "--steps", "1M", "--workers", "0", "--progress", "json"])
    assert found == ("runs/x", {"total_steps": 1_000_000, "workers": 0}, "json")
    with pytest.raises(ConfigError, match="unknown flag `--envs`"):
        read_resume(["runs/x", "--envs", "3"])


def test_resume_takes_those_settings_of_an_algorithm_that_change_no_result():
    assert RESUMABLE_OWN == resuming._FREE
    found = read_resume(["--dqn.storage", "disk", "--selfplay.inner.storage=memory", "runs/x", "--steps", "5k"])
    assert found == ("runs/x", {"total_steps": 5000, "dqn.storage": "disk", "selfplay.inner.storage": "memory"}, "auto")
    for words, part in (
        (["--dqn.gamma", "0.5"], "unknown flag `--dqn.gamma`\n  a run goes on with what it was made with"),
        (["--no-dqn.double"], "unknown flag `--no-dqn.double`"),
        (["--no-native-vector"], "unknown flag `--no-native-vector`\n  a run goes on with"),
        (["--dqn.storag", "disk"], "did you mean `--dqn.storage`?"),
        (["--dqn.storage"], "expected one argument"),
    ):
        with pytest.raises(ConfigError) as refused:
            read_resume(["runs/x", *words])
        assert part in str(refused.value)
