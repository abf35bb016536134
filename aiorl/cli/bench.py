"""`python -m aiorl bench ENV`: how fast a training would run here, what bounds it, and which flag to change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from aiorl.cli.flags import Parser
from aiorl.cli.parse import Request, read_train
from aiorl.cli.text import rate, share
from aiorl.config import env_name
from aiorl.errors import ConfigError

if TYPE_CHECKING:
    from aiorl.cli.measure import Figures

DEFAULT_ENV = "CartPole-v1"
SECONDS = 12.0


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "bench", "Measure how fast a training would run on this machine, what bounds it, and which flag to change.",
        "[ENV] [--seconds S] [--json] [any option of `train`]",
        "Trains for a few seconds in a temporary directory. Exit code 0, or 2 for a configuration that cannot run.",
    )  # fmt: skip
    parser.add_argument("--seconds", metavar="S", help=f"how long to measure (default: {SECONDS:g})")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    known, rest = parser.parse_known_args(list(argv))
    given = vars(known)
    if given.get("help", False):
        print(parser.format_help(), end="")
        return 0
    request = read_train(rest, DEFAULT_ENV)
    assert isinstance(request, Request)
    if request.dry_run:
        raise ConfigError("--dry-run: bench has to run to measure\n  to see the settings: "
                          f"python -m aiorl train {env_name(request.config.env)} --dry-run")  # fmt: skip
    from aiorl.cli.measure import advice, measure
    from aiorl.cli.session import run_async

    figures = run_async(measure(request.config, _seconds(given.get("seconds"))))
    found = advice(figures)
    if given.get("json", False):
        whole = {**msgspec.to_builtins(figures), "bound_per_second": figures.bound_per_second, "advice": found}
        print(json.dumps(whole))
    else:
        print("\n".join([*lines(figures), "", *(f"- {sentence}" for sentence in found)]))
    return 0


def _seconds(text: str | None) -> float:
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise ConfigError(f"--seconds {text}: expected a number from 1 to 3600")
    return seconds


def lines(figures: Figures) -> list[str]:
    """The figures as a table: each part by itself, then the run against what they allow."""
    env, parts, run = figures.env, figures.parts, figures.run
    kind = "as native vectors" if env.native else "one by one"
    alone = f"{env.step_us:.1f} µs an env step {kind}, {share(env.cpu_share)} of it computing"
    reached = run.env_steps_per_second / figures.bound_per_second
    alone = alone if env.step_us else "coroutines, which wait side by side: not measured by themselves"
    rows = [
        ("environment", f"{env.name}: {alone}"),
        ("collecting", f"{parts.collect_us:.1f} µs an env step with the policy: {rate(1e6 / parts.collect_us)}/s a core"),
        (
            "learning",
            f"{parts.learn_us:.1f} µs an env step: {rate(figures.learn_per_second)}/s; "
            f"{parts.gradient_step_ms:.2f} ms a gradient step",
        ),
        (
            "together",
            f"{rate(run.env_steps_per_second)} env steps/s, {rate(run.gradient_steps_per_second)} gradient steps/s: "
            f"{share(reached)} of what the parts allow ({rate(figures.bound_per_second)}/s)",
        ),
        (
            "busy",
            f"workers {share(run.busy['collect'])}, learner {share(run.busy['train'])}; "
            f"{run.workers} workers on {figures.cores} cores, off-policy degree {run.off_policy_degree}",
        ),
        ("event loop", f"p99 late by {run.lag_ms:.1f} ms"),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]
