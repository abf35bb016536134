from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorl.cli import main
from aiorl.errors import ConfigError
from aiorl.metrics.curve import TOLD, Curve, Point, metric_names, read_curve, thin, write_curve, write_wins
from aiorl.metrics.directory import CSV_COLUMNS
from aiorl.metrics.svg import draw, interpolate, nice_ticks, nice_times, short_number, short_time
from tests.cli_events import evaluated, run_events, started, updated, write_run

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]


def test_curve_holds_what_the_events_say():
    curve = read_curve(run_events(20), goal=150.0)
    assert (curve.env, curve.algo, curve.seed, curve.goal) == ("CartPole-v1", "ppo", 3, 150.0)
    assert [p.value for p in curve.smooth] == [10.0 * v for v in range(1, 21)]
    assert [(p.env_steps, p.value, p.spread) for p in curve.evaluations] == [(1000 * v, 10 * v, 5) for v in (5, 10, 15, 20)]
    assert curve.end == (20_000, 21.5)


def test_rollouts_in_which_no_episode_ended_leave_no_point():
    curve = read_curve([started(), updated(1, None), updated(2, 7.0)])
    assert [(p.env_steps, p.value) for p in curve.rollouts] == [(2000, 7.0)]


def test_directory_and_events_give_the_same_curve(tmp_path: Path):
    run = write_run(tmp_path / "run", config="stop_at = 150.0\n")
    assert read_curve(run) == read_curve(run_events(), goal=150.0)


def test_what_updates_say_is_a_picture_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Updates without it (in warm-up) leave no point; what was done again after a resume is left out."""
    said = [msgspec.structs.replace(updated(v, 1.0), metrics={"q_max": v / 2} if v > 2 else {}) for v in range(1, 8)]
    curve = read_curve([started(), *said], metric="q_max")
    assert [(p.env_steps, p.value) for p in curve.smooth] == [(1000 * v, v / 2) for v in range(3, 8)]
    assert (curve.rollouts, curve.evaluations) == ([], [])
    again = read_curve([started(), *said, msgspec.structs.replace(started(), env_steps=5000), *said[5:]], metric="q_max")
    assert [p.value for p in again.smooth] == [1.5, 2, 2.5, 3, 3.5]
    runs = [write_run(tmp_path / name, [started(), *said]) for name in ("one", "two")]
    both = ["plot", *map(str, runs), "--metric"]
    assert main([*both, "q_max", "--out", str(tmp_path / "q.svg")]) == 0
    assert {"one", "two", "q_max", "of each update"} <= set(texts((tmp_path / "q.svg").read_text()))
    assert main([*both, "q_min", "--out", str(tmp_path / "no.svg")]) == 2
    assert not (tmp_path / "no.svg").exists()
    capsys.readouterr()
    assert main(["plot", str(runs[0]), "--metric", "q_max"]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "q_max.svg")
    assert main(["plot", str(runs[0]), "--metric", "q_min"]) == 2
    assert "q_min: no update tells it" in capsys.readouterr().err


def told_run(path: Path, **metrics: float) -> Path:
    """A run of six updates with the metrics times its version."""
    each = ((updated(v, 10.0 * v), {name: x * v for name, x in metrics.items()}) for v in range(1, 7))
    return write_run(path, iter([started(), *(msgspec.structs.replace(event, metrics=told) for event, told in each)]))


def test_a_metric_that_nobody_tells_is_refused_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, bare = told_run(tmp_path / "run", q_mean=1.0, q_max=2.0, loss=3.0), tmp_path / "bare"
    assert main(["plot", str(run), "--metric", "q_meen"]) == 2
    text = capsys.readouterr().err
    assert "no update tells it — did you mean q_mean?" in text
    assert "there are loss, q_max, q_mean, staleness, " in text
    assert main(["plot", str(run), "--metric", "loss", "--metric", "zzz"]) == 2
    assert "--metric zzz: no update tells it\n  there are loss, " in capsys.readouterr().err
    assert main(["plot", str(write_run(bare, iter([started()]))), "--metric", "loss"]) == 2
    assert "there has been no update" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.svg"))


def test_a_long_list_of_metrics_is_told_whole_or_says_that_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for most, cut in ((20, False), (60, True)):
        told = {f"a_metric_with_a_name_{i}": 1.0 for i in range(most)}
        run = told_run(tmp_path / str(most), **told)
        assert main(["plot", str(run), "--metric", "typo"]) == 2
        text = capsys.readouterr().err
        names = text.replace("there are", "").replace("\n", " ").split("tells it")[1].replace(",", " ").split()
        assert set(names) - {"…"} <= set(metric_names(run)), "a name was cut"
        assert (names == metric_names(run), names[-1] == "…") == (not cut, cut)


def test_the_name_of_a_metric_may_hold_what_xml_reserves(tmp_path: Path):
    name = "p<0.5 & up"
    run = told_run(tmp_path / "run", **{name: 1.0, "loss": 2.0})
    for metrics in ([name], [name, "loss"]):
        words = [word for metric in metrics for word in ("--metric", metric)]
        assert main(["plot", str(run), *words, "--out", str(tmp_path / "x.svg")]) == 0
        svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
        assert ", ".join(metrics) in texts(svg)
        assert ET.fromstring(svg).findtext(f"{SVG}title", "").endswith(f"{', '.join(metrics)} over env steps")


def test_several_metrics_share_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of one run each line is named for its metric, of several for both; a run that does not tell one is named."""
    one, two = told_run(tmp_path / "one", q_mean=1.0, q_max=2.0), told_run(tmp_path / "two", q_mean=3.0)
    assert main(["plot", str(one), "--metric", "q_mean", "--metric", "q_max"]) == 0
    assert capsys.readouterr().out.strip() == str(one / "q_mean-q_max.svg")
    shown = texts((one / "q_mean-q_max.svg").read_text())
    assert {"q_mean", "q_max", "q_mean, q_max", "CartPole-v1 · ppo · seed 3"} <= set(shown)
    out = tmp_path / "all.svg"
    assert main(["plot", str(one), str(two), "--metric", "q_mean", "--metric", "q_max", "--out", str(out)]) == 0
    assert f"left out: no update of {two} tells q_max" in capsys.readouterr().err
    shown = texts(out.read_text())
    assert {"one · q_mean", "one · q_max", "two · q_mean", "CartPole-v1 · ppo · 2 runs"} <= set(shown)
    assert "two · q_max" not in shown
    assert len(list(ET.fromstring(out.read_text()).iter(f"{SVG}polyline"))) == 3


@pytest.mark.parametrize("column", TOLD)
def test_columns_of_metrics_csv_can_be_drawn(column: str, tmp_path: Path):
    run = told_run(tmp_path / "run")
    assert column in CSV_COLUMNS
    assert main(["plot", str(run), "--metric", column]) == 0
    points = read_curve(run, metric=column).smooth
    assert [p.value for p in points] == [getattr(updated(v, 10.0 * v), column) for v in range(1, 7)]
    assert column in metric_names(run)


def test_two_kinds_of_picture_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = told_run(tmp_path / "run", loss=1.0)
    assert main(["plot", str(run), "--metric", "loss", "--wins"]) == 2
    assert "one at a time" in capsys.readouterr().err


def test_wins_are_a_picture_of_their_own(tmp_path: Path):
    """A line for each suite that tells how its episodes ended, with the standard error of a share."""
    events = [
        started(),
        *(evaluated(v, 0.0, suite="weak", wins=v / 10, losses=0.1, episodes=100) for v in (2, 5, 8)),
        *(evaluated(v, 0.0, suite="strong", primary=False, wins=v / 20, losses=0.4, episodes=100) for v in (2, 8)),
        evaluated(8, 0.0, suite="alone", primary=False),
    ]
    curve = read_curve(events)
    assert {suite: [p.value for p in points] for suite, points in curve.wins.items()} == {
        "weak": [0.2, 0.5, 0.8],
        "strong": [0.1, 0.4],
    }
    assert curve.wins["weak"][1].spread == pytest.approx(0.05)
    assert write_wins(events, tmp_path / "wins.svg")
    svg = (tmp_path / "wins.svg").read_text()
    assert {"weak", "strong", "episodes won", "CartPole-v1 · ppo · seed 3"} <= set(texts(svg))
    assert "alone" not in texts(svg)
    assert len(list(ET.fromstring(svg).iter(f"{SVG}circle"))) == 5 + 2  # and in the legend
    assert not write_wins(run_events(), tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_wins_of_a_resumed_run_are_not_drawn_twice():
    again = started(seconds=9.0, env_steps=2000, version=2, resumed_from=2)
    before = [started(), evaluated(2, 0.0, wins=0.1), evaluated(3, 0.0, wins=0.2)]
    curve = read_curve([*before, again, evaluated(3, 0.0, wins=0.3)])
    assert [p.value for p in curve.wins[""]] == [0.1, 0.3]


def test_wins_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run")
    assert main(["plot", str(run), "--wins"]) == 2
    assert "no evaluation says how its episodes ended" in capsys.readouterr().err
    with (run / "events.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(evaluated(3, 0.0, suite="weak", wins=0.5, losses=0.25)) + b"\n")
    assert main(["plot", str(run), "--wins"]) == 0
    assert "weak" in texts((run / "wins.svg").read_text())
    assert main(["plot", str(run), str(run), "--wins"]) == 2
    assert "expected one run" in capsys.readouterr().err


def test_line_a_killed_run_was_writing_is_ignored(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"updated","seconds":3')
    assert read_curve(run) == read_curve(run_events())


def test_resumed_run_has_no_point_twice():
    first = [started(), *(updated(v, 1.0) for v in (1, 2, 3)), evaluated(3, 1.0)]
    again = [
        started(seconds=9.0, env_steps=2000, version=2, resumed_from=2),
        updated(3, 2.0, 9.5),
        updated(4, 2.0, 10.0),
    ]
    curve = read_curve([*first, *again])
    assert [(p.env_steps, p.value) for p in curve.smooth] == [(1000, 1), (2000, 1), (3000, 2), (4000, 2)]
    assert curve.evaluations == []
    times = [p.seconds for p in curve.smooth]
    assert times == sorted(times)


def test_time_goes_on_where_a_resumed_run_counts_from_zero():
    curve = read_curve([started(), updated(1, 1.0, 5.0), started(seconds=0.1, env_steps=1000), updated(2, 2.0, 1.1)])
    assert [p.seconds for p in curve.smooth] == [5.0, 6.0]


def test_svg_is_well_formed_and_says_what_it_shows(tmp_path: Path):
    run = write_run(tmp_path / "run", config="stop_at = 150.0\n")
    write_curve(run, tmp_path / "curve.svg")
    svg = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    shown = texts(svg)
    assert "CartPole-v1 · ppo · seed 3" in shown
    assert any("last evaluation 200.0 ± 5.0" in text for text in shown)
    assert {"env steps", "return", "goal 150", "mean of the last 100 episodes", "evaluation ± one std"} <= set(shown)
    assert {"0", "5k", "20k", "10 s"} <= set(shown)
    root = ET.fromstring(svg)
    assert len(list(root.iter(f"{SVG}polyline"))) == 3
    assert len(list(root.iter(f"{SVG}polygon"))) == 1
    assert "prefers-color-scheme: dark" in svg


def test_all_points_lie_within_the_picture():
    curve = read_curve(run_events(), goal=-50.0)
    root = ET.fromstring(draw([curve]))
    width, height = (float(root.attrib[a]) for a in ("width", "height"))
    for line in [*root.iter(f"{SVG}polyline"), *root.iter(f"{SVG}polygon")]:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_several_runs_share_a_picture_with_a_legend():
    curves = [read_curve(run_events(n)) for n in (10, 20)]
    shown = texts(draw(curves, "time", ["first", "second"]))
    assert {"first", "second", "wall time"} <= set(shown)
    assert "CartPole-v1 · ppo · 2 runs" in shown


@pytest.mark.parametrize("events", [[], [started()], [started(), updated(1, 5.0)], [started(), evaluated(1, 5.0)]])
def test_hardly_anything_to_show_is_still_a_picture(events: list):
    assert ET.fromstring(draw([read_curve(events)])).tag == f"{SVG}svg"


def test_names_are_escaped():
    assert "<b>" not in draw([Curve(env="<b>&", algo="x")])


def test_nan_returns_do_not_spoil_the_axis():
    curve = Curve(env="E", rollouts=[Point(1, 1, 1.0), Point(2, 2, math.nan), Point(3, 3, 3.0)], end=(3, 3))
    assert "nan" not in " ".join(texts(draw([curve])))


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e3, 1e3)), min_size=1, max_size=300), st.integers(1, 50))
def test_thinning_keeps_ends_mean_and_limit(pairs: list, most: int):
    points = [Point(x, x, y) for x, y in sorted(pairs)]
    thinned = thin(points, "steps", most)
    assert len(thinned) <= max(most, 0) or len(points) <= most
    low, high = min(p.value for p in points), max(p.value for p in points)
    assert all(low - 1e-6 <= p.value <= high + 1e-6 for p in thinned)
    assert all(a.env_steps <= b.env_steps for a, b in pairwise(thinned))


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float):
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 13
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps) + 1e-9
    assert low - 1e-6 * span <= ticks[0]
    assert ticks[-1] <= low + span * (1 + 1e-6)


def test_ticks_of_time_are_those_of_clocks():
    assert nice_times(60) == [0, 20, 40, 60]
    assert nice_times(600) == [0, 120, 240, 360, 480, 600]
    assert [short_time(s, 600) for s in (0, 120)] == ["0", "2 min"]
    assert short_time(0.5, 2) == "0.5 s"
    assert short_time(7200, 10_000) == "2 h"
    assert [short_number(v) for v in (1500, 2e6, -200, 0.25)] == ["1.5k", "2M", "−200", "0.25"]
    assert [short_number(v) for v in (6e18, -2.5e12, 1e-8, 999e9)] == ["6e18", "−2.5e12", "1e−8", "999G"]


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e6))
def test_no_two_ticks_have_the_same_name(low: float, span: float):
    ticks = nice_ticks(low, low + span)
    assert len({short_number(tick) for tick in ticks}) == len(ticks)


def test_interpolation_is_linear_between_and_constant_outside():
    line = [(0.0, 0.0), (2.0, 4.0)]
    assert [interpolate(line, x) for x in (-1, 0, 1, 2, 5)] == [0, 0, 2, 4, 4]


def test_plot_writes_into_the_run_and_prints_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run")
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curve.svg")
    assert "CartPole-v1" in (run / "curve.svg").read_text(encoding="utf-8")


def test_plot_overlays_runs_and_leaves_out_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "empty").mkdir()
    out = tmp_path / "both.svg"
    assert main(["plot", *map(str, runs), str(tmp_path / "empty"), "--x", "time", "--out", str(out)]) == 0
    assert {"a", "b", "wall time"} <= set(texts(out.read_text(encoding="utf-8")))
    assert "left out" in capsys.readouterr().err


def test_plot_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", config="stop_at = 150.0\n")
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def drawn_with_matplotlib(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes of the picture that a command writes as PNG."""
    figure, kept = pytest.importorskip("matplotlib.figure").Figure, []
    real = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (kept.append(self), real(self, *a, **k))[1])
    assert main(words) == 0
    assert Path(words[-1]).read_bytes().startswith(b"\x89PNG")
    return kept[0].axes[0]


def in_legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_line_of_a_curve_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "run", config="stop_at = 150.0\n")
    names = ["return of a rollout", "mean of the last 100 episodes", "evaluation ± one std"]
    axes = drawn_with_matplotlib(["plot", str(run), "--out", str(tmp_path / "x.png")], monkeypatch)
    assert in_legend(axes) == [*names, "goal 150"]
    write_curve(run, tmp_path / "curve.svg")
    assert {*names, "goal 150"} <= set(texts((tmp_path / "curve.svg").read_text(encoding="utf-8")))


def test_what_is_drawn_as_svg_is_drawn_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, png = told_run(tmp_path / "run", q_mean=1.0, q_max=2.0, win_rate_weak=0.1), ["--out", str(tmp_path / "x.png")]
    with (run / "events.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(evaluated(3, 0.0, suite="weak", wins=0.5, losses=0.25)) + b"\n")
    axes = drawn_with_matplotlib(["plot", str(run), "--metric", "q_mean", *png], monkeypatch)
    assert (in_legend(axes), axes.get_ylabel(), axes.get_title()) == (["q_mean"], "q_mean", "CartPole-v1 · ppo · seed 3")
    assert list(axes.lines[0].get_ydata()) == [1, 2, 3, 4, 5, 6]
    for kind, label in (("--wins", "episodes won"), ("--opponents", "training games won")):
        axes = drawn_with_matplotlib(["plot", str(run), kind, *png], monkeypatch)
        assert (in_legend(axes), axes.get_ylabel()) == (["weak"], label)


def test_png_without_matplotlib_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = write_run(tmp_path / "run")
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert 'pip install "aiorl[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["plot"], "no run given"),
        (["plot", "nowhere"], "not a run directory"),
        (["plot", "x", "--x", "epochs"], "expected one of steps, time"),
        (["plot", "x", "--out", "x.pdf"], ".svg or .png"),
        (["plot", "x", "--metric", "loss", "--out", "x.pdf"], ".svg or .png"),
        (["plot", "x", "--standings", "--out", "x.png"], "ends in .svg"),
    ],
)
def test_plot_refuses(words: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert part in capsys.readouterr().err


def test_reading_what_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no events\.jsonl"):
        read_curve(tmp_path)
