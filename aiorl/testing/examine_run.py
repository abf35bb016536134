"""Looking at a run by what it wrote: did it do what its settings say, and is what it did apt to be learning?

Nothing is run or imported: `config.toml`, `events.jsonl`, `schedule.jsonl` and `summary.json` are read as data. A run that
is still going on, or that was killed, can be looked at as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aiorl.algos.dqn import epsilon_at
from aiorl.buffers.replay import gradient_steps_owed
from aiorl.filelock import state_of
from aiorl.metrics.directory import LOCK
from aiorl.testing.findings import Finding, error, info, sort, warning
from aiorl.testing.story import Story, read

STILL = 10  # updates in a row that change nothing
LATE = 0.5  # share of a run after which the first gradient step is late
MOSTLY = 0.5  # share of episodes
SMALL_BATCH, LONG_GRADIENT, ONE_SIDED, FAR, EXPLORING = 8, 10.0, 0.2, 1.0, 0.5
HARDLY, ENOUGH = 1e-4, 100  # share of the parameters' length; gradient steps that move them further at any usual rate


def check_run(directory: str | Path) -> list[Finding]:
    """Look for signs that the run in `directory` did not do what it should, or cannot have learned.

    Raises ConfigError if there is no run, or one that cannot be read.
    """
    story = read(Path(directory))
    found: dict[str, Finding] = {}  # the first of each kind
    for check in CHECKS:
        try:
            for finding in check(story):
                found.setdefault(finding.code, finding)
        except KeyError as missing:
            story.spoilt(f"{check.__name__} finds no {missing}")
        except Exception as failure:
            told = f"{check.__name__} could not be checked: {type(failure).__name__}: {failure}"
            found.setdefault("not-checked", warning(
                "not-checked", _clipped(told), "was it written by another version of aiorl? If not, this is a bug in aiorl",
            ))  # fmt: skip
    if story.damaged:
        found["damaged"] = error(
            "damaged", f"what the run wrote is damaged: {story.damaged}", "is the disk full, or failing?"
        )
    return sort(found.values())


# -- how it went -------------------------------------------------------------------------------------------------------


def ended(story: Story) -> Iterator[Finding]:
    """How it ended, and what it survived."""
    if story.summary.get("status") == "failed":
        cause = str(story.summary.get("error") or "no cause was noted").splitlines()
        yield error("failed", f"the run failed: {cause[0]}", *(line.strip() for line in cause[1:2]))
    elif not story.summary and state_of(story.path / LOCK) == "left":
        yield error("killed", "the process of the run ended without a word, as when it is killed",
                    f"python -m aiorl resume {story.path}")  # fmt: skip
    again = [e for e in story.told if e.get("event") == "worker_restarted"]
    if again:
        yield warning("restarts", f"workers had to be started again {len(again)} times, the last for: {_short(again[-1])}",
                      "see worker-N.log in the run directory")  # fmt: skip
    books, dropped = story.summary.get("ledger", {}), story.summary.get("dropped", {})
    if books and books["produced"] != books["stored"] + books["dropped"] + books["in_flight"]:
        yield error("ledger", f"produced is not stored + dropped + in flight: {books}",
                    "transitions were lost or counted twice: this is a bug in aiorl")  # fmt: skip
    if dropped and story.summary["status"] == "completed" and story.summary.get("stop_overshoot") is None:
        yield warning("dropped", f"{sum(dropped.values())} env steps were collected and not used: {dropped}",
                      "in normal running nothing is dropped")  # fmt: skip


ALARMS = {
    "zeros": ("is 0", "every observation of rollout"), "no-gradient": ("is 0 in all", "the gradient of update"),
    "no-change": ("changed no weights", ""), "not-finite": (" reports ", "= "), "q-explodes": ("explode: from", ""),
}  # fmt: skip
"""Finding: what the warning of a run holds that it is made of."""


def alarms(story: Story) -> Iterator[Finding]:
    """What the run itself warned of."""
    messages = [str(e.get("message", "")) for e in story.told if e.get("event") == "warned"]
    for code, words in ALARMS.items():
        if meant := [m for m in messages if all(word in m for word in words)]:
            yield error(code, _clipped(meant[0]), f"the run warned of this {len(meant)} times" * (len(meant) > 1))
    if skipped := story.summary.get("skipped_updates"):
        yield warning("not-finite", f"updates were skipped as they came to NaN or infinity: {skipped}",
                      "lower the learning rate, or scale rewards down")  # fmt: skip


# -- how often ---------------------------------------------------------------------------------------------------------


def updates(story: Story) -> Iterator[Finding]:
    """When learning began, and how many gradient steps there were."""
    if not story.updates:
        yield error("never-updated", "there was no update at all", "train for at least one rollout")
        return
    steps = np.cumsum([u["gradient_steps"] for u in story.updates])
    total, last = int(story.config.get("total_steps", 0)), story.updates[-1]["env_steps"]
    ratio = story.settings.get("update_ratio")
    if not steps[-1]:
        why, todo = f" (warm-up: {story.warmup:,})", "train for longer, or lower warmup"
        if ratio == 0:
            why, todo = ": update_ratio is 0", "raise it: nothing is learned, however long the run"
        yield error("never-updated", f"no gradient step in {last:,} env steps{why}", todo)
        return
    first = story.updates[int(np.argmax(steps > 0))]["env_steps"]
    if total and first > LATE * total and not story.before:
        yield warning("late-start", f"the first gradient step came after {first:,} of {total:,} env steps",
                      "lower warmup, or train for longer")  # fmt: skip
    if ratio is None or any(u.get("skipped") for u in story.updates):
        return
    done_before = gradient_steps_owed(story.stored_before, story.warmup, ratio)
    for update, done in zip(story.updates, (done_before + steps).tolist(), strict=True):
        owed = gradient_steps_owed(update["env_steps"], story.warmup, ratio)
        if done != owed:
            yield error("update-ratio", f"{done} gradient steps after {update['env_steps']:,} env steps, expected {owed}",
                        f"update_ratio = {ratio:g} for each env step after {story.warmup:,} of warm-up")  # fmt: skip
            return


def movement(story: Story) -> Iterator[Finding]:
    """Gradients and weights, by the numbers: also where nobody was there to be warned."""
    learned = [bool(u["gradient_steps"]) and u["metrics"].get("learning_rate") != 0 for u in story.updates]
    counted = [u for u, yes in zip(story.updates, learned, strict=True) if yes]
    zero = [u["version"] for u in counted if u["metrics"].get("grad_norm") == 0]
    if zero:
        yield error("no-gradient", f"the gradient is 0 in {len(zero)} of {len(counted)} updates, first in {zero[0]}",
                    "is something detached or masked out? Are rewards all zero?")  # fmt: skip
    still = [a == b and yes for (a, b), yes in zip(itertools.pairwise(story.marks), learned[1:], strict=False)]
    longest = max((len(list(group)) for same, group in itertools.groupby(still) if same), default=0)
    if longest >= STILL or (still and all(still)):
        yield error("no-change", f"{longest} updates in a row left the weights as they were",
                    "does the optimizer hold these very parameters? Is the learning rate 0?")  # fmt: skip
    steps, norms = sum(u["gradient_steps"] for u in counted), story.metric("parameter_norm")
    if norms and steps >= ENOUGH and not story.before:
        moved = max((max(norms) - min(norms)) / max(*norms, 1e-12), *story.metric("target_drift"), 0.0)
        if moved < HARDLY:
            yield warning("no-change", f"in {steps:,} gradient steps the parameters hardly moved: "
                          f"by {moved:.1g} of their length", "raise learning_rate")  # fmt: skip


# -- what is in force --------------------------------------------------------------------------------------------------


def staleness(story: Story) -> Iterator[Finding]:
    """Who acted was at most `off_policy_degree` versions old."""
    bound = 0
    for update in story.updates:
        bound = max(bound, int(update["off_policy_degree"]))
        lag = int(update["rollout"]) - int(update["behaviour_version"])
        if not 0 <= lag <= bound or lag != update["staleness"] or update["rollout"] != update["version"] - 1:
            yield error("staleness", f"update {update['version']} used rollout {update['rollout']}, which version "
                        f"{update['behaviour_version']} had collected; at most {bound} behind is allowed",
                        "workers act with weights of another version than they say: this is a bug in aiorl")  # fmt: skip
            return


def schedules(story: Story) -> Iterator[Finding]:
    """Epsilon and learning rate are functions of the rollout's index, as the settings say."""
    names = ("epsilon_start", "epsilon_end", "epsilon_fraction")
    config, settings = story.config, story.settings
    if all(name in settings for name in names) and story.metric("epsilon"):
        for update in story.updates:
            rollouts = math.ceil(update["total_steps"] / (config["envs"] * config["segment_length"]))
            plan = np.array([settings[names[0]], settings[names[1]], settings[names[2]] * rollouts])
            epsilon, expected = update["metrics"].get("epsilon"), epsilon_at(update["rollout"], plan)
            if epsilon is not None and abs(epsilon - expected) > 1e-3:
                yield error("epsilon", f"epsilon is {epsilon:.4g} in rollout {update['rollout']}, expected {expected:.4g}",
                            "it is a function of the rollout's index, not of the weights that act")  # fmt: skip
                break
        if (left := story.metric("epsilon")[-1]) > EXPLORING and story.summary.get("status") == "completed":
            yield warning("still-exploring", f"in the end {left:.0%} of the actions were random",
                          "lower epsilon_end or epsilon_fraction")  # fmt: skip
    rates = story.metric("learning_rate")
    changed = any(e.get("event") == "settings_changed" for e in story.told)
    falls = settings.get("anneal") and settings.get("anneal_to", 0) != 1 and not changed
    if falls and len(rates) > STILL and min(rates) == max(rates):
        yield error("learning-rate", f"anneal is set, and the learning rate stays {rates[0]:g}",
                    "it must fall with the rollout's index")  # fmt: skip


def exploration(story: Story) -> Iterator[Finding]:
    """Epsilon is not down already when there is something to learn from."""
    began = next((u for u in story.updates if u["gradient_steps"]), None)
    if began is None or story.before or not all(name in story.settings for name in ("epsilon_start", "epsilon_end")):
        return
    epsilon, end = began["metrics"].get("epsilon"), story.settings["epsilon_end"]
    if epsilon is not None and epsilon <= end + 1e-6 and end < story.settings["epsilon_start"]:
        yield warning("stopped-exploring", f"epsilon was down at {end:g} before the first gradient step",
                      "what acted until then had learned nothing: raise epsilon_fraction, or lower warmup")  # fmt: skip


def sizes(story: Story) -> Iterator[Finding]:
    """Settings that hardly ever are what was meant."""
    batch = story.settings.get("batch_size")
    if "update_ratio" in story.settings and isinstance(batch, int) and batch < SMALL_BATCH:
        yield warning("batch", f"batch_size = {batch}: gradients of so few transitions are mostly noise",
                      "use 32 or more, or accumulate")  # fmt: skip
    norms, limit = story.metric("grad_norm"), story.settings.get("max_grad_norm")
    if "update_ratio" in story.settings and norms and limit and float(np.median(norms)) > LONG_GRADIENT * limit:
        yield warning("clipped", f"half of the gradients are longer than {np.median(norms):.3g}, max_grad_norm = {limit:g}",
                      "scale rewards down, or raise max_grad_norm")  # fmt: skip


# -- what is learned ---------------------------------------------------------------------------------------------------


def episodes(story: Story) -> Iterator[Finding]:
    """Ends of episodes, and what there is to earn."""
    counts = [int(u["episodes"]) for u in story.updates]
    if not story.updates:
        return
    stored, lengths = story.updates[-1]["env_steps"], [u["length_mean"] for u in story.updates if u["episodes"]]
    if not sum(counts):
        if stored >= 10_000:
            yield warning("no-episodes", f"no episode ended in {stored:,} env steps",
                          "does the environment say `terminated` or `truncated`? Set a time limit")  # fmt: skip
        return
    single = sum(n for n, u in zip(counts, story.updates, strict=True) if n and u["length_mean"] <= 1)
    if max(lengths) <= 1:
        yield error("one-step-episodes", f"each of {sum(counts)} episodes had one step",
                    "right for a bandit; if not: is `terminated` a truth value, and reset by reset()?")  # fmt: skip
    elif single > MOSTLY * sum(counts) and lengths[0] > 1:
        yield warning("one-step-episodes", f"{single} of {sum(counts)} episodes had one step, the first had more",
                      "right if most end so soon; if not: does reset() forget a counter of steps?")  # fmt: skip
    inside = sum(n * u["length_mean"] for n, u in zip(counts, story.updates, strict=True) if n)
    if inside > stored * (1 + 1e-9):
        yield error("episodes", f"episodes have {inside:,.0f} env steps in all, {stored:,} were stored",
                    "an episode is counted twice, or begins before it ended: this is a bug in aiorl")  # fmt: skip
    if story.summary and not story.before and story.summary["episodes"] != sum(counts):
        yield error("episodes", f"{sum(counts)} episodes ended in the updates, the summary says {story.summary['episodes']}")
    if not any(story.returns):
        yield warning("no-reward", f"each of {sum(counts)} episodes came to 0: there is nothing to learn from",
                      "shape rewards, explore more, or begin closer to the goal")  # fmt: skip


def values(story: Story) -> Iterator[Finding]:
    """Action values against what rewards allow; the target; priorities."""
    if "update_ratio" not in story.settings:
        return
    learned = [u for u in story.updates if u["gradient_steps"]]
    if learned and not story.metric("q_mean"):
        yield warning("loss-only", "no update reports `q_mean`: a loss alone does not show whether values are sound",
                      "add the mean of the values that are learned to the metrics")  # fmt: skip
    for update in learned:
        seen = update["metrics"]
        highest = max(abs(seen.get(name) or 0.0) for name in ("q_max", "q_min", "q_mean"))
        if highest > (limit := _limit(story, seen)):
            yield error("q-explodes", f"values reach {highest:.4g} in update {update['version']}, rewards allow {limit:.4g}",
                        "lower learning_rate or reward_scale, or update the target more slowly")  # fmt: skip
            break
    every, done = story.settings.get("target_every", 0), sum(u["gradient_steps"] for u in learned)
    if 0 < done < every and not story.before and story.summary.get("status") == "completed":
        yield warning("target-stands", f"the target was never updated: it is due every {every:,} gradient steps, "
                      f"the run did {done:,}", "lower target_every, or train for longer")  # fmt: skip
    drift = story.metric("target_drift")[len(story.updates) // 2 :]
    if drift and float(np.median(drift)) > FAR:
        yield warning("target-stands", f"the target is {np.median(drift):.3g} times the parameters' length away from them",
                      "update it more often, or by a larger share")  # fmt: skip
    spread = story.metric("priority_entropy")
    if spread and spread[-1] < ONE_SIDED:
        yield warning("priorities", f"priority_entropy is {spread[-1]:.2g}: a few transitions fill nearly all batches",
                      "lower priority_exponent")  # fmt: skip


def _limit(story: Story, metrics: Mapping[str, float]) -> float:
    """The largest value that is sound: as reported, or by the largest return of an episode, generously."""
    if metrics.get("q_limit") is not None:
        return metrics["q_limit"]
    returns = [abs(mean) for mean in story.returns]
    gamma = float(story.settings.get("gamma", 0.99))
    return 100.0 * max(1.0, *returns, 1 / max(1 - gamma, 1e-4)) if returns else math.inf


def progress(story: Story) -> Iterator[Finding]:
    """What to look at besides the loss: each from the first tenth of the updates to the last."""
    parts: list[str] = []
    named = {name: story.metric(name) for name in ("q_mean", "epsilon", "loss", "entropy")}
    for name, series in {"return": story.returns, **named}.items():
        if len(series) > 1:
            tenth = max(1, len(series) // 10)
            parts.append(f"{name} {np.mean(series[:tenth]):.3g} -> {np.mean(series[-tenth:]):.3g}")
    if parts:
        yield info("progress", ", ".join(parts), "neither loss nor return alone says whether it learns")


CHECKS: tuple[Callable[[Story], Iterator[Finding]], ...] = (
    ended, alarms, updates, movement, staleness, schedules, exploration, sizes, episodes, values, progress,
)  # fmt: skip


def _short(event: Mapping[str, Any]) -> str:
    return _clipped(str(event.get("reason", "")).splitlines()[0] if event.get("reason") else "?")


def _clipped(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
