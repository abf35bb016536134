"""`python -m aiorl play` as a tournament, and what `--record` writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.dom import minidom

import gymnasium
import numpy as np
import pytest
from checkpoints import edit_manifest
from PIL import Image
from test_tournament import Auction

from aiorl.cli import main, versus
from aiorl.cli.record import Film, Recorder, Strip, captioned
from aiorl.envs.hockey.parallel import HockeyParallelEnv
from aiorl.envs.twoplayer import SelfPlayEnv
from aiorl.errors import EnvError
from aiorl.tournament import Played

TINY = ["--no-preset", "--envs", "2", "--group-size", "2", "--segment-length", "16", "--steps", "64", "--workers", "0",
        "--eval-episodes", "1", "--progress", "none"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Policies that have hardly learned: alone, with other spaces, by self-play, and of another game."""
    base = tmp_path_factory.mktemp("runs")
    selfplay = base / "selfplay.toml"
    selfplay.write_text(
        'env = "aiorl.envs.hockey.selfplay:hockey"\nalgo = "selfplay"\n[selfplay]\nalgo = "ppo"\n'
        "inner = {hidden = [8], epochs = 1, minibatches = 1}\n"
    )
    ppo = ["--ppo.hidden", "8", "--ppo.epochs", "1", "--ppo.minibatches", "1"]
    poor = base / "poor.toml"
    poor.write_text(
        'env = "hockey"\nenv_kwargs = {keep_mode = false}\n[ppo]\nhidden = [8]\n'
        '[eval_suites.shots]\nenv_kwargs = {mode = "TRAIN_SHOOTING", opponent = "still"}\n'
    )
    words = {
        "alone": ["hockey", *ppo, "--env-kwargs", "opponent=still", "frame_skip=2"],
        "poor": ["--config", str(poor)],
        "selfplay": ["--config", str(selfplay)],
        "pole": ["CartPole-v1", *ppo],
    }
    for name, extra in words.items():
        assert main(["train", *extra, *TINY, "--out", str(base / name)]) == 0
    return {name: str(base / name) for name in words}


def played(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["play", "--versus", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["play", *words]) == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) <= 3
    return text


@pytest.mark.parametrize("kind", ["discrete", "box", "many"])
def test_a_game_gets_actions_of_its_own_space(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    """Where self-play has them flat, counting from 0 and in single precision."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'env = "games:strict"\nenv_kwargs = {{kind = "{kind}"}}\nalgo = "selfplay"\n[selfplay]\nalgo = "ppo"\n'
        "inner = {hidden = [8], epochs = 1, minibatches = 1}\n"
    )
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(config), *TINY, "--out", run]) == 0
    result = played(capsys, run, f"{run}/final", "--env", "games:strict", "--env-kwargs", f"kind={kind}", "--games", "4")
    assert result["matches"][0]["games"] == 4


def test_bots_against_each_other(capsys: pytest.CaptureFixture[str]):
    result = played(capsys, "strong", "weak", "--games", "6", "--seed", "3")
    assert (result["env"], result["games"], result["seed"], result["players"]) == ("hockey", 6, 3, ["strong", "weak"])
    (match,) = result["matches"]
    assert match["wins"] + match["ties"] + match["losses"] == match["games"] == 6
    assert 0 <= match["win"]["low"] <= match["win"]["share"] <= match["win"]["high"] <= 1
    assert 1 <= match["mean_length"] <= 250
    assert result == played(capsys, "strong", "weak", "--games", "6", "--seed", "3")
    assert result["matches"] != played(capsys, "strong", "weak", "--games", "6", "--seed", "4")["matches"]


def test_bots_and_policies_where_actions_are_discrete(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    discrete = ("--env-kwargs", "discrete=true")
    (match,) = played(capsys, "strong", "weak", "--games", "2", "--seed", "3", *discrete)["matches"]
    (same,) = played(capsys, "strong", "weak", "--games", "2", "--seed", "3")["matches"]
    assert match == same, "bots act as they do without"
    toml = 'env = "aiorl.envs.hockey.selfplay:hockey"\nenv_kwargs = {discrete = true}\nalgo = "selfplay"\n'
    (tmp_path / "discrete.toml").write_text(toml + '[selfplay]\nalgo = "dqn"\ninner = {hidden = [8], warmup = 32}\n')
    run = ["train", "--config", str(tmp_path / "discrete.toml"), *TINY, "--out", str(tmp_path / "run")]
    assert main(run) == 0
    (match,) = played(capsys, str(tmp_path / "run"), "still", "--games", "2")["matches"]
    assert match["games"] == 2


def test_a_pair_does_not_depend_on_who_else_takes_part(capsys: pytest.CaptureFixture[str]):
    matches = played(capsys, "weak", "still", "random", "--games", "4")["matches"]
    assert [(m["first"], m["second"]) for m in matches] == [("weak", "still"), ("weak", "random"), ("still", "random")]
    assert matches[1] == played(capsys, "weak", "random", "--games", "4")["matches"][0]


def test_the_same_player_twice_does_as_well_on_both_sides(capsys: pytest.CaptureFixture[str]):
    """A game in which chance has no part but the seed: the two games of a seed are one another's mirror image."""
    result = played(capsys, "still", "still", "--games", "8", "--env-kwargs", "mode=TRAIN_DEFENSE")
    (match,) = result["matches"]
    assert result["players"] == ["still", "still (2)"]
    assert match["wins"] == match["losses"] > 0
    assert match["mean_returns"][0] == pytest.approx(match["mean_returns"][1])
    assert result["env_kwargs"] == {"mode": "TRAIN_DEFENSE"}


def test_policies_play_either_seat(runs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    """Trained against a bot or by self-play, as a run or as a checkpoint of one."""
    result = played(capsys, runs["alone"], runs["selfplay"], f"{runs['alone']}/final", "weak", "--games", "2")
    assert result["players"] == ["alone", "selfplay", "alone/final", "weak"]
    assert result["env"] == "hockey"
    assert all(math.isfinite(match["mean_returns"][0]) for match in result["matches"])
    assert result == played(capsys, runs["alone"], runs["selfplay"], f"{runs['alone']}/final", "weak", "--games", "2")
    assert played(capsys, runs["selfplay"], "still", "--games", "2")["env"] == "aiorl.envs.hockey.selfplay:hockey"


def test_the_game_has_the_spaces_of_the_first_policy(runs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert played(capsys, "random", runs["poor"], "--games", "2")["env_kwargs"] == {"keep_mode": False}
    text = refused(capsys, "--versus", runs["poor"], runs["alone"])
    assert f"{runs['alone']} was made for other spaces than hockey has" in text
    assert "saved: box 18 float32 -> box 4 float32\n  game:  box 16 float32 -> box 3 float32" in text


def test_a_table_a_matrix_and_files_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "results"
    assert main(["play", "--versus", "weak", "still", "random", "--games", "2", "--save", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0].startswith("weak – still: 2/2 games, won ")
    assert "hockey, 2 games a match, seed 0" in shown.out
    assert "won against  weak" in shown.out
    assert shown.out.splitlines()[-1] == str(out)
    data = json.loads((out / "matrix.json").read_text())
    assert [row[i] for i, row in enumerate(data["win_shares"])] == [None] * 3
    assert "| weak | – |" in (out / "matrix.md").read_text(encoding="utf-8")
    minidom.parse(str(out / "matrix.svg"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--versus weak", "expected two players or more"),
        ("--versus weak strnog", "there is no such run, and no such bot\n  bots of hockey: weak, strong, still, random"),
        ("--versus weak strong --env CartPole-v1", "CartPole-v1 is not a game for two players\n  --env hockey is one"),
        ("--versus weak strong --env test_play_versus:chair", "test_play_versus:chair is not a game for two players"),
        ("--versus weak strong --env-kwargs opponent=weak", "takes no argument 'opponent'"),
        ("--versus weak strong --env-kwargs mode=HARD", "hockey has no mode 'HARD'"),
        ("--versus a b --env test_play_versus:market --record x.gif", "takes no argument 'render_mode'"),
        ("--versus weak strong --games 0", "--games 0: expected"),
        ("--versus weak strong --record x.webm", "ends in .gif or .mp4, or in .png"),
        ("--versus weak strong --save pyproject.toml", "expected a directory, there is a file of that name"),
        ("somewhere --versus weak strong", "`somewhere` stands before --versus, expected all players after it"),
        ("--versus weak strong --env hocky", "unknown environment 'hocky' — did you mean hockey?"),
        ("--versus weak strong --record x.gif --frames 3", "--frames is for a strip of frames"),
        ("--versus weak strong --suite shots", "--suite does not go with --versus"),
        ("somewhere --games 3", "--games is for tournaments"),
        ("--versus tests weak", "tests holds no checkpoint yet"),
    ],
)
def test_mistakes(words: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert expected in refused(capsys, *words.split())


def test_an_interrupted_tournament_ends_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any, on_end: Callable[[int, Played], None], **__: Any) -> None:
        on_end(0, Played(1, (10.0, -10.0), 20))
        raise KeyboardInterrupt

    monkeypatch.setattr(versus, "play_match", interrupted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["play", "--versus", "weak", "strong", "--games", "5"]) == 130
    shown = capsys.readouterr().err
    assert shown.startswith("\rweak – strong: 1/5 games")
    assert shown.endswith("\nerror: interrupted\n")


def test_help_imports_neither_torch_nor_gymnasium():
    code = (
        "import sys\nfrom aiorl.cli import main\nmain(['play', '--help'])\n"
        "print([m for m in ('torch', 'gymnasium', 'PIL', 'Box2D') if m in sys.modules], file=sys.stderr)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_a_policy_of_another_game_is_refused(runs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert "CartPole-v1 is not a game for two players" in refused(capsys, "--versus", runs["pole"], "weak")
    text = refused(capsys, "--versus", runs["pole"], "weak", "--env", "hockey")
    assert "was made for other spaces than hockey has" in text


def test_a_file_does_not_decide_what_is_imported(runs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    edit_manifest(Path(runs["pole"]) / "best", lambda m: m["config"].update(env="hostile.module:make"))
    assert "--env hostile.module:make" in refused(capsys, "--versus", runs["pole"], "weak")
    assert "hostile" not in sys.modules


def chair() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


class Market(Auction):
    """A game of one's own, with bots of its own."""

    @property
    def bots(self) -> dict[str, Any]:
        return {"miser": lambda rng: lambda obs: [1.0], "spender": lambda rng: lambda obs: [1 + rng.random()]}


def market(opponent: str | None = None) -> SelfPlayEnv:
    return SelfPlayEnv(Market(), Market().bots, opponent)


def test_a_game_of_ones_own_for_self_play(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "selfplay.toml"
    config.write_text('algo = "selfplay"\n[selfplay]\nalgo = "ppo"\ninner = {hidden = [8]}\n')
    run, env = str(tmp_path / "run"), "test_play_versus:market"
    assert main(["train", env, "--config", str(config), *TINY, "--out", run]) == 0
    assert f"--env {env}" in refused(capsys, "--versus", run, "miser"), "a file does not decide what is imported"
    (match,) = played(capsys, run, "miser", "--env", env, "--games", "4")["matches"]
    assert match["games"] == 4


def test_a_game_of_ones_own(capsys: pytest.CaptureFixture[str]):
    (match,) = played(capsys, "spender", "miser", "--env", "test_play_versus:Market", "--games", "6")["matches"]
    assert (match["wins"], match["losses"]) == (6, 0)
    assert "bots of test_play_versus:Auction: none" in refused(
        capsys, "--versus", "weak", "strong", "--env", "test_play_versus:Auction"
    )


def test_eval_plays_the_first_suite_unless_told_otherwise(runs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    def measured(*words: str) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        assert main(["eval", runs["poor"], "--episodes", "2", "--json", *words]) == 0
        result = json.loads(capsys.readouterr().out)
        assert max(result["lengths"]) <= (80 if result["env_kwargs"].get("mode") else 250)
        return result["suite"], result["env_kwargs"]

    suite = {"keep_mode": False, "mode": "TRAIN_SHOOTING", "opponent": "still"}
    assert measured() == measured("--suite", "shots") == ("shots", suite)
    assert measured("--env-kwargs", "opponent=weak") == ("shots", suite | {"opponent": "weak"})
    assert measured("--env", "aiorl/Hockey-v0", "--env-kwargs", "keep_mode=no") == ("", {"keep_mode": False})
    assert main(["eval", runs["poor"], "--env-kwargs", "oponent=weak"]) == 2
    assert "did you mean 'opponent'?" in capsys.readouterr().err
    assert main(["eval", runs["poor"], "--suite", "goals"]) == 2
    assert "--suite goals: expected shots" in capsys.readouterr().err


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_clock_runs_and_the_end_of_a_game_is_told():
    env = HockeyParallelEnv(mode="TRAIN_DEFENSE", render_mode="rgb_array")
    still = dict.fromkeys(env.possible_agents, np.zeros(4, np.float32))

    env.reset(seed=0)
    frames: list[Any] = [env.render()]
    while env.agents:
        env.step(still)
        frames.append(env.render())
    stands = frames[0][2, 2]
    bars = [int((frame[10, 60:540] != stands).any(1).sum()) for frame in frames]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > bars[-1]
    word = slice(115, 155), slice(240, 360)
    changed = [int((one[word] != other[word]).any(2).sum()) for one, other in pairwise(frames)]
    assert changed[-2] == 0, "nothing passed by where it is written"
    assert changed[-1] > 500
    env.close()


def test_a_game_as_a_strip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "game.png"
    words = ["--games", "2", "--record", str(out), "--frames", "4"]
    assert main(["play", "--versus", "weak", "strong", *words]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.size == (4 * (596 + 4) - 4, round((480 + 36) * 596 / 600))


def test_a_game_as_a_video(tmp_path: Path):
    out = tmp_path / "game.gif"
    words = ["--games", "1", "--record", str(out), "--env-kwargs", "mode=TRAIN_DEFENSE", "--fps", "25"]
    assert main(["play", "--versus", "still", "random", *words]) == 0
    with Image.open(out) as image:
        lasts = []
        for index in range(image.n_frames):
            image.seek(index)
            lasts.append(image.info["duration"])
    assert 1040 <= sum(lasts) <= 40 * 81 + 1000, "every frame, and the end for a second"


def test_a_policy_as_a_strip_and_as_mp4(runs: dict[str, str], tmp_path: Path):
    short = ["--env-kwargs", "mode=TRAIN_DEFENSE"]
    assert main(["play", runs["alone"], "--record", str(tmp_path / "run.png"), "--frames", "3", *short]) == 0
    with Image.open(tmp_path / "run.png") as image:
        assert image.size == (3 * 604 - 4, 480)
    assert main(["play", runs["selfplay"], "--record", str(tmp_path / "run.mp4"), *short]) == 0
    assert (tmp_path / "run.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("suffix", "module"), [("gif", "imageio"), ("mp4", "imageio_ffmpeg"), ("png", "PIL"), ("mp4", "PIL")]
)
def test_what_is_missing_is_named(
    suffix: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find_spec(name))
    text = refused(capsys, "--versus", "weak", "strong", "--record", f"x.{suffix}")
    assert f'needs {module}, not installed\n  pip install "aiorl[video]"' in text


def test_a_strip_spreads_its_frames_and_keeps_few():
    for n in (1, 2, 5, 6, 47, 48, 49, 1000):
        strip = Strip(6)
        most = 0
        for i in range(n):
            strip.add(np.full((2, 2, 3), i % 251, np.uint8))
            most = max(most, len(strip._kept))
        shown = [int(frame[0, 0, 0]) for frame in strip.frames()]
        assert len(shown) == min(6, n)
        assert (shown[0], shown[-1]) == (0, (n - 1) % 251)
        assert most < 48
    steps = np.diff([int(frame[0, 0, 0]) for frame in _strip_of(200).frames()])
    assert steps.max() - steps.min() <= 16, "evenly, but for the frames that were let go"


def _strip_of(n: int) -> Strip:
    strip = Strip(6)
    for i in range(n):
        strip.add(np.full((2, 2, 3), i, np.uint8))
    return strip


def test_what_is_no_picture_is_refused(tmp_path: Path):
    with Recorder(tmp_path / "x.png", 30) as recorder:
        recorder.add(np.zeros((4, 4, 3), np.uint8))
        for frame in (None, "text", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))):
            with pytest.raises(EnvError, match=r"expected an array uint8 \[height, width, 3\]"):
                recorder.add(frame)
    with pytest.raises(EnvError, match="no frame was drawn"), Recorder(tmp_path / "y.png", 30):
        pass


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from aiorl.cli.record import Recorder
from aiorl.errors import ConfigError

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
try:
    with Recorder(Path(sys.argv[1]), 30) as recorder:
        for _ in range(int(sys.argv[2])):
            recorder.add(noise)
except ConfigError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit for the size of files")
@pytest.mark.parametrize(("name", "frames"), [("x.gif", 5), ("x.mp4", 5), ("x.mp4", 10_000), ("x.png", 5)])
def test_what_cannot_be_written_is_named_and_nothing_else_is_said(name: str, frames: int, tmp_path: Path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / name), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert done.stdout.startswith(f"--record {tmp_path / name}: cannot write it: ")
    assert (len(done.stdout.splitlines()), done.stderr, done.returncode) == (2, "", 0)


def test_a_directory_is_no_file_to_record_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.gif").mkdir()
    text = refused(capsys, "--versus", "weak", "strong", "--record", str(tmp_path / "x.gif"))
    assert f"--record {tmp_path / 'x.gif'}: it is a directory" in text


def test_a_caption_is_above_the_picture():
    frame = np.full((20, 200, 3), 200, np.uint8)
    picture = captioned(frame, "a", "0 : 0", "b")
    assert picture.shape == (56, 200, 3)
    np.testing.assert_array_equal(picture[36:], frame)
    assert picture[:36].max() > 150, "something is written"


def test_a_film_shows_so_many_games_of_each_match():
    from aiorl.tournament import Played

    class Frames:
        still_frames = 3
        count = 0

        def add(self, frame: Any) -> None:
            self.count += 1

    frames: Any = Frames()
    film = Film(frames, lambda: np.zeros((8, 120, 3), np.uint8), 1)
    for _ in range(2):
        film.match("a", "b")
        for game in (0, 20):
            film.frame(game)
            film.ended(game, Played(1, (0.0, 0.0), 1))
            film.frame(game)
    assert frames.count == 2 * (1 + 3)
