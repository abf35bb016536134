"""The few lines that say how a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiorl.cli.text import count, duration, number, plural, rate, share, spread

LABEL = 11
FILES = ("curve.svg", "wins.svg", "opponents.svg", "standings.svg", "standings.json", "summary.json", "best/", "final/")


def summary_lines(result: Mapping[str, Any], directory: Path) -> list[str]:
    """Three to nine lines from the fields of summary.json (see Result)."""
    seconds = result["wall_seconds"]
    took = f"{seconds:.1f} s" if seconds < 100 else duration(seconds)
    session = result.get("session_env_steps")
    resumed = f", {session:,} of them" if session not in (None, result["env_steps"]) else ""
    lines = [
        _line(
            result["status"],
            f"{result['env_steps']:,} env steps{resumed} in {took} ({rate(result['env_steps_per_second'])} steps/s), "
            f"{plural(result['updates'], 'update')}",
        )
    ]
    if result.get("train_return_mean_100") is not None:
        shown = f"{number(result['train_return_mean_100'])} over the last 100 training episodes"
        lines.append(_line("return", f"{shown} (of {result['episodes']:,})"))
    if (evaluation := _evaluation(result)) is not None:
        lines.append(_line("evaluation", evaluation))
    if won := _won(result):
        lines.append(_line("won – lost", won))
    if (reached := result.get("first_evaluation_at_stop_return")) is not None:
        when = f"first at {count(reached['env_steps'])} env steps, {number(reached['seconds'])} s"
        lines.append(_line("reached", f"{number(result['stop_return'])} {when}{_overshoot(result)}"))
    lines.append(_line("staleness", _staleness(result)))
    if skipped := sum(result.get("skipped_updates", {}).values()):
        lines.append(_line("skipped", f"{plural(skipped, 'update')} that came to NaN or infinity"))
    if restarts := result.get("restarts"):
        lines.append(_line("restarts", f"{restarts}{_why_restarted(result)}"))
    if aborted := result.get("aborted"):
        lines.append(_line("aborted", f"{plural(aborted, 'episode')}{_why_aborted(result, aborted)}"))
    there = [name for name in FILES if (directory / name).exists()]
    lines.append(_line("files", f"{directory}/ ({', '.join(there)})" if there else f"{directory}/"))
    return lines


def _evaluation(result: Mapping[str, Any]) -> str | None:
    final, best = result.get("final_evaluation"), result.get("best")
    shown = final or best
    if not shown:
        return None
    kind = "final" if final else "best"
    text = f"{spread(shown['mean_return'], shown['std_return'])} ({kind}, {plural(shown['episodes'], 'episode')})"
    again = result.get("reevaluations")
    if final and best and (again or best["mean_return"] > final["mean_return"]):
        text += f", best {number(best['mean_return'])} at {count(best['env_steps'])} env steps"
        text += f" (of {len(again)} evaluated again)" if again else ""
    return text


def _won(result: Mapping[str, Any]) -> str:
    """The newest shares of each suite whose environment tells how episodes ended."""
    newest = {e.get("suite", ""): e for e in result.get("evaluations", []) if e.get("wins") is not None}
    return ", ".join(f"{suite} {share(e['wins'])} – {share(e['losses'])}".strip() for suite, e in newest.items())


def _overshoot(result: Mapping[str, Any]) -> str:
    """How far training went on until the stop that it had earned took effect."""
    beyond = result.get("stop_overshoot")
    if beyond is None:
        return ""
    return f"; training stopped {plural(beyond['updates'], 'update')} ({count(beyond['env_steps'])} env steps) later"


def _why_restarted(result: Mapping[str, Any]) -> str:
    """What ended workers most often."""
    reasons = result.get("restart_reasons")
    if not reasons:
        return ""
    others = f", and {plural(len(reasons) - 1, 'other reason')}" if len(reasons) > 1 else ""
    return f": a worker {max(reasons, key=reasons.__getitem__)}{others}"


def _why_aborted(result: Mapping[str, Any], aborted: int) -> str:
    """Steps that were dropped as not finite are one for each episode, but of this session alone."""
    not_finite = min(aborted, result.get("dropped", {}).get("not finite", 0))
    if not not_finite:
        return " of environments that do not reproduce: not exact"
    others = f", {aborted - not_finite} otherwise" if aborted > not_finite else ""
    return f": {not_finite} for NaN or infinity from the environment{others}"


def _staleness(result: Mapping[str, Any]) -> str:
    degree, seen = result["off_policy_degree"], result["staleness"]
    text = f"mean {seen['mean']:.2f}, max {seen['max']} of {degree}"
    busy = ", ".join(f"{name} {share(part)}" for name, part in result.get("busy", {}).items())
    return f"{text}; busy: {busy}" if busy else text


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}} {text}"
