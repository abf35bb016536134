from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from aiorl.cli.panel import Panel, draw
from aiorl.cli.progress import JsonLines, Notes, PlainLines, Silent, event_line, header, make_display, progress_line
from aiorl.cli.summary import summary_lines
from aiorl.cli.text import count, duration, fit, number, rate, sparkline, spread, table
from aiorl.events import (
    CheckpointFailed,
    Finished,
    Lagged,
    Opponent,
    Progress,
    Reevaluated,
    Standings,
    Warned,
    WorkerRestarted,
)
from tests.cli_events import evaluated, run_events, started, status, updated

PLACE: dict[str, Any] = {"seconds": 12.0, "version": 3, "env_steps": 3000}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("mode", "err", "kind"),
    [
        ("auto", io.StringIO(), PlainLines),
        ("auto", Terminal(), Panel),
        ("rich", io.StringIO(), Panel),
        ("plain", Terminal(), PlainLines),
        ("json", Terminal(), JsonLines),
        ("none", Terminal(), Silent),
    ],
)
def test_mode_and_terminal_choose_the_display(mode: Any, err: io.StringIO, kind: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    display = make_display(mode, Notes(), io.StringIO(), err)
    display.close()
    assert type(display) is kind


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_display("auto", Notes(), io.StringIO(), Terminal())) is PlainLines


def test_json_lines_are_the_events():
    out = io.StringIO()
    display = make_display("json", Notes(), out, io.StringIO())
    events = list(run_events(5))
    for event in events:
        display.show(event)
    rows = [msgspec.json.decode(line) for line in out.getvalue().splitlines()]
    assert [row["event"] for row in rows] == [msgspec.to_builtins(e)["event"] for e in events]
    assert rows[0]["env"] == "CartPole-v1"
    assert rows[2]["status"]["state"] == "training"


def test_plain_lines_come_every_few_seconds_and_for_important_events():
    err = io.StringIO()
    display = PlainLines(Notes(preset=True, device="cpu"), err)
    for event in run_events(20):
        display.show(event)
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("CartPole-v1 · ppo · preset · 2 workers × 2 groups of 8 · cpu · seed 3 → runs/")
    progress = [line for line in lines if "steps/s" in line]
    assert [line[:9] for line in progress] == ["[   5.5s]", "[  10.5s]", "[  15.5s]", "[  20.5s]"]
    assert "return 50.0" in progress[0]
    assert "final evaluation 200.0 ± 5.0 at 20,000 steps (20 episodes), best so far" in lines[-3]
    assert lines[-1].endswith("completed")


def test_warm_up_says_how_far_it_is():
    err = io.StringIO()
    display = PlainLines(Notes(warmup=10_000), err, every_s=0.0)
    display.show(Progress(**PLACE, status=status(3, state="warm-up", gradient_steps=0)))
    assert "warm-up 3,000/10,000" in err.getvalue()


@pytest.mark.parametrize(
    ("state", "env_steps", "learned", "shown"),
    [
        ("waiting for data", 400, 0, "warm-up 400/1,000"),
        ("warm-up", 400, 0, "warm-up 400/1,000"),
        ("warm-up", 984, 0, "first update"),  # whose env steps are counted once it is done
        ("waiting for data", 984, 0, "warm-up 984/1,000"),
        ("waiting for data", 1200, 0, "waiting for data"),
        ("waiting for data", 1200, 5, "waiting for data"),
        ("training", 1200, 5, "training"),
        ("stopping", 400, 0, "stopping"),
    ],
)
def test_a_warm_up_lasts_as_long_as_it_does(state: str, env_steps: int, learned: int, shown: str):
    now = status(3, state=state, env_steps=env_steps, gradient_steps=learned)
    notes = Notes(warmup=1000, rollout=512)
    assert progress_line(now, notes).endswith(f", {shown}")
    assert f"state      {shown}" in "\n".join(line.plain for line in draw(now, notes, [], None, 80))


def test_a_first_update_is_no_warm_up_where_there_is_none():
    assert progress_line(status(0, state="warm-up", gradient_steps=0), Notes()).endswith(", first update")
    assert progress_line(status(1, state="warm-up", gradient_steps=0), Notes()).endswith(", warm-up"), "one of its own kind"


def test_episodes_and_the_buffer_are_in_the_progress():
    training = status(10, seconds=50.0, episodes=2_400, metrics={"replay_size": 250_000.0})
    assert "2,400 episodes (48/s), buffer 250k, training" in progress_line(training, Notes())
    text = "\n".join(line.plain for line in draw(training, Notes(), [], None, 100))
    assert "2,400 episodes (48/s) · buffer 250k" in text
    assert "buffer" not in progress_line(status(10, metrics={}), Notes())


def test_what_needs_a_line_gets_one():
    assert event_line(Warned(**PLACE, message="something odd")) == "warning: something odd"
    assert "disk full" in str(event_line(CheckpointFailed(**PLACE, reason="disk full")))
    back = WorkerRestarted(**PLACE, worker="worker 3", reason="was ended by SIGKILL", restarts=2, seconds_down=0.62)
    assert event_line(back) == "worker 3 is back after 0.6 s (restart 2): it was ended by SIGKILL"
    assert event_line(updated(3, 1.0)) is None
    assert event_line(Lagged(**PLACE, dropped=3)) is None
    assert event_line(Finished(**PLACE, status="failed", error="boom")) is None, "the command says it, once"


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120, 200])
def test_panel_never_exceeds_the_terminal(width: int):
    busy = status(15, dropped={"stopped": 1234}, restarts=2)
    lines = draw(busy, Notes(), [float(i) for i in range(100)], evaluated(10, 123.4), width)
    assert max(len(line.plain) for line in lines) <= width


def test_panel_shows_everything_at_eighty_columns():
    lines = draw(status(10), Notes(), [1.0, 2.0, 3.0], evaluated(10, 123.4), 80)
    text = "\n".join(line.plain for line in lines)
    for part in (
        "50 %", "10,000/20,000", "12.3k steps/s", "0:01 left", "return     100.0  ▁▅█", "123.4 ± 5.0", "best 90.0",
        "mean 0.75", "max 1", "degree 1", "queue 1/4", "loop lag 1.5 ms", "collect 90 %", "train 70 %", "evaluate 10 %",
        "state      training",
    ):  # fmt: skip
        assert part in text


def test_wins_and_losses_are_shown_where_they_are_told(tmp_path: Path):
    played = evaluated(10, 0.3, suite="weak", wins=0.55, losses=0.1)
    assert "evaluation weak 0.3 ± 5.0 at 10,000 steps (20 episodes, won 55 %, lost 10 %)" in str(event_line(played))
    assert "won" not in str(event_line(evaluated(10, 0.3)))
    again = Reevaluated(
        **PLACE, episodes=20, mean_return=0.5, std_return=1.0, mean_length=9.0, best=True, eval_seconds=1.0,
        wins=0.7, losses=0.2,
    )  # fmt: skip
    assert "won 70 %, lost 20 %" in str(event_line(again))
    wins = {"weak": played, "strong": evaluated(10, -0.2, suite="strong", wins=0.3, losses=0.5)}
    text = "\n".join(line.plain for line in draw(status(10), Notes(), [], played, 80, wins))
    assert "won – lost weak 55 % – 10 % · strong 30 % – 50 %" in text
    assert "won – lost" not in "\n".join(line.plain for line in draw(status(10), Notes(), [], played, 80))
    records = [{"suite": suite, "wins": e.wins, "losses": e.losses} for suite, e in wins.items()]
    old = {"suite": "weak", "wins": 0.1, "losses": 0.9}
    assert "won – lost  weak 55 % – 10 %, strong 30 % – 50 %" in summary_lines(
        {**summary(), "evaluations": [old, *records]}, tmp_path
    )


def test_a_panel_remembers_the_wins_of_every_suite():
    out = io.StringIO()
    panel = Panel(Notes(), out, Console(file=out, width=100, force_terminal=True))
    panel.show(started())
    for suite, wins in (("weak", 0.5), ("strong", 0.25)):
        panel.show(evaluated(3, 0.0, suite=suite, primary=suite == "weak", wins=wins, losses=0.125))
    panel.show(evaluated(3, 0.0, suite="alone", primary=False))
    panel.show(Progress(**PLACE, status=status(4)))
    panel.close()
    shown = Text.from_ansi(out.getvalue()).plain
    assert "weak 50 % – 12 % · strong 25 % – 12 %" in shown


def test_self_play_shows_how_it_does_against_whom():
    told = {
        "win_rate_weak": 0.45, "loss_rate_weak": 0.2, "win_rate_pool": 0.5, "loss_rate_pool": 0.25, "pool_size": 3.0,
        "elo": 12.25, "loss": 0.5,
    }  # fmt: skip
    now = status(10, metrics=told)
    text = "\n".join(line.plain for line in draw(now, Notes(), [], None, 90))
    assert "self-play  weak 45 % – 20 % · pool 50 % – 25 % · 3 snapshots · Elo 12.2" in text
    assert ", weak 45 % – 20 %, pool 50 % – 25 %, 3 snapshots, Elo 12.2, " in progress_line(now, Notes())
    assert "self-play" not in "\n".join(line.plain for line in draw(status(10), Notes(), [], None, 90))


def test_standings_in_one_line_however_many_opponents_there_are():
    def line(*games: float) -> str:
        met = [
            Opponent(name=f"snapshot {i}", games=n, wins=0.5 if n else None, losses=0.25 if n else None, elo=0.0)
            for i, n in enumerate(games)
        ]
        return str(event_line(Standings(**PLACE, elo=-3.0, opponents=tuple(met))))

    assert line(0, 2) == "won – lost against snapshot 1 50 % – 25 % (Elo -3.0)"
    assert line(0) == "won – lost against nobody yet (Elo -3.0)"
    assert line(*[1] * 500).count("snapshot") == 8
    assert "492 more" in line(*[1] * 500)


def test_panel_before_the_first_episode_and_evaluation():
    empty = status(0, train_return_mean_100=None, last_evaluation=None, best_evaluation=None, env_steps_per_second=0.0)
    lines = draw(empty, Notes(), [], None, 80)
    text = "\n".join(line.plain for line in lines)
    assert "evaluation" not in text
    assert "return     –" in text
    assert "left" not in text


def run_panel(width: int, **options: Any) -> str:
    out = io.StringIO()
    panel = Panel(Notes(preset=True), out, Console(file=out, width=width, force_terminal=True, **options))
    for event in run_events(20):
        panel.show(event)
    panel.say("stopping")
    panel.close()
    return out.getvalue()


def test_evaluations_and_header_stay_above_the_panel():
    text = run_panel(100)
    assert "CartPole-v1 · ppo · preset · 2 workers × 2 groups of 8 · seed 3 → runs/CartPole-v1-ppo-3" in text
    assert "final evaluation 200.0 ± 5.0" in text
    assert "checkpoint (periodic) c/10" in text
    assert "stopping" in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch):
    assert "\x1b[32m" in run_panel(80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in run_panel(80)


def test_header_gives_way_in_a_narrow_terminal():
    assert header(started(), Notes(device="cpu"), 40) == "CartPole-v1 · ppo"
    assert header(started(workers=0, groups=1), Notes(), 200).startswith(
        "CartPole-v1 · ppo · in this process, 1 group of 16 · seed 3"
    )


def summary() -> dict[str, Any]:
    record = {
        "version": 9,
        "env_steps": 20_480,
        "seconds": 3.5,
        "episodes": 20,
        "mean_return": 480.0,
        "std_return": 9.0,
    }
    return {
        "status": "completed", "env_steps": 30_720, "wall_seconds": 12.34, "env_steps_per_second": 9876.0,
        "updates": 15, "episodes": 1234, "train_return_mean_100": 412.3,
        "evaluations": [record],
        "stop_return": 475.0, "first_evaluation_at_stop_return": {"env_steps": 20_480, "seconds": 3.5},
        "best": {**record, "mean_return": 490.0},
        "final_evaluation": record, "off_policy_degree": 1, "staleness": {"mean": 0.9, "max": 1, "histogram": {}},
        "busy": {"collect": 0.9, "train": 0.5},
    }  # fmt: skip


def test_summary_tells_a_session_from_the_whole(tmp_path: Path):
    resumed = {**summary(), "session_env_steps": 720}
    assert "30,720 env steps, 720 of them in 12.3 s (" in summary_lines(resumed, tmp_path)[0]
    whole = {**summary(), "session_env_steps": 30_720}
    assert "30,720 env steps in 12.3 s (" in summary_lines(whole, tmp_path)[0]


def test_summary_says_why_workers_were_restarted(tmp_path: Path):
    reasons = {"died with exit code -9": 1, "raised in environment 3: reward is nan": 2}
    lines = "\n".join(summary_lines({**summary(), "restarts": 3, "restart_reasons": reasons}, tmp_path))
    assert "restarts    3: a worker raised in environment 3: reward is nan, and 1 other reason\n" in lines
    assert "restarts    1\n" in "\n".join(summary_lines({**summary(), "restarts": 1}, tmp_path)), "of an older version"
    assert "restarts" not in "\n".join(summary_lines({**summary(), "restarts": 0}, tmp_path))


def test_summary_says_how_it_ended(tmp_path: Path):
    (tmp_path / "x" / "best").mkdir(parents=True)
    lines = summary_lines(summary(), tmp_path / "x")
    assert 3 <= len(lines) <= 6
    text = "\n".join(lines)
    for part in (
        "completed   30,720 env steps in 12.3 s (9.9k steps/s), 15 updates",
        "412.3 over the last 100 training episodes (of 1,234)",
        "480.0 ± 9.0 (final, 20 episodes), best 490.0 at 20,480", "475.0 first at 20,480 env steps, 3.5 s",
        "mean 0.90, max 1 of 1", "collect 90 %, train 50 %", "/x/ (best/)",
    ):  # fmt: skip
        assert part in text


def test_summary_of_a_run_that_hardly_began():
    nothing = {"train_return_mean_100": None, "best": None, "final_evaluation": None, "evaluations": []}
    lines = summary_lines({**summary(), **nothing, "first_evaluation_at_stop_return": None, "status": "stopped"}, Path("r"))
    assert len(lines) == 3
    assert lines[0].startswith("stopped")


def test_numbers_as_people_read_them():
    assert [number(v) for v in (None, 412.34, 12_345.6, 0.0123, -3.0, float("nan"))] == [
        "–", "412.3", "12,346", "0.012", "-3.0", "nan",
    ]  # fmt: skip
    assert [count(v) for v in (999, 12_345, 123_456, 1_230_000, 2e9)] == ["999", "12,345", "123k", "1.23M", "2G"]
    assert [rate(v) for v in (3.21, 812, 9_700, 33_012, 1_200_000)] == ["3.2", "812", "9.7k", "33.0k", "1.20M"]
    assert [duration(s) for s in (7.4, 725, 3723, 183_600)] == ["0:07", "12:05", "1:02:03", "2d 03:00"]
    assert [spread(499.94, 0.2), spread(0.5, 0.25), spread(-12_345.6, 3.0)] == [
        "499.9 ± 0.2",
        "0.500 ± 0.250",
        "-12,346 ± 3",
    ]
    assert [number(v) for v in (2e-4, -1e-4, 1.2345e-9, 0.001, 0.0, -0.0)] == [
        "0.0002", "-0.0001", "1.23e-09", "0.001", "0.0", "0.0",
    ]  # fmt: skip
    assert [spread(2e-4, 1.5e-5), spread(-1e-4, 0.5), spread(0.0, 0.0)] == [
        "0.0002 ± 1.5e-05", "0.000 ± 0.500", "0.000 ± 0.000",
    ]  # fmt: skip
    assert [count(v) for v in (999_499, 999_999, 999_994_999, 999_999_999, 1e12)] == ["999k", "1M", "999.99M", "1G", "1000G"]
    assert [rate(v) for v in (999.4, 999.6, 999_940, 999_960, 2e9)] == ["999", "1.0k", "999.9k", "1.00M", "2000.00M"]
    assert fit(["ab", "", "cd", "ef"], 7) == "ab · cd"
    assert fit(["abcdef"], 4) == "abc…"
    assert table([("a", "n"), ("bb", "10")], frozenset({1})) == "a    n\nbb  10"


@given(st.lists(st.floats(-1e9, 1e9)), st.integers(0, 60))
def test_sparkline_fits(values: list[float], width: int):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set("▁▂▃▄▅▆▇█")


def test_sparkline_rises_with_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([5.0, 5.0], 9) == "▁▁"
    assert sparkline([float("nan"), 1.0], 9) == "▁"
