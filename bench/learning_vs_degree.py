"""Evidence that PPO learns at `off_policy_degree` D as it does at 0, where it is the sequential loop.

    python -m bench.learning_vs_degree            the exact suite anew, then the tables, from stored results for real tasks
    python -m bench.learning_vs_degree --real     make the runs on real tasks that are not stored yet (about half an hour)
    python -m bench.learning_vs_degree --table    the tables, from stored raw results
    python -m bench.learning_vs_degree --plot     the same as docs/img/learning_vs_degree.svg

The protocol. It was fixed before any difference between degrees was looked at; nothing was changed afterwards.

(a) Exact suite: 256 random `Garnets` (30 states, 4 actions, 3 branches, discount 0.95), one learner each. Learner:
    `bench.tabular_ppo`, 120 updates, the rest as in its `Settings`; of the learning rates 0.01, 0.02, 0.05, 0.1, 0.2 the one
    that learns best at D = 0 (on 64 other processes). D in 0, 1, 2, 4, 8, 16; arms: correction = decoupled, vtrace, none.
    Returns are exact (linear solve), so there is no noise of evaluation. Statistic: area under the curve of normalised
    return (0 the uniform policy, 1 the best) at D minus that at D = 0, paired by process (same process, same random
    numbers), mean and 95 % percentile bootstrap over processes. Claim: at D = 4 both corrected arms have a lower edge of at
    least -0.01, while the uncorrected one is found to be worse: its upper edge is below 0.

(b) Real tasks: CartPole-v1 (100k env steps), Acrobot-v1 (200k), LunarLander-v3 (500k), the presets' PPO (decoupled)
    otherwise, with the learning rate falling to 0 over that budget; D in 0, 1, 2, 4; seeds 0 to 19. The ordered schedule
    makes the result a function of D and seed, whatever the number of workers, so the runs are made inline. Score:
    normalised return (`learning_runs.TASKS`) of the final policy over 50 episodes; also, as information, the area under
    10 evaluations of 10 episodes. Statistic: IQM over seeds at D minus that at D = 0, 95 % percentile bootstrap, by task
    and pooled (stratified by task). Claim: at the recommended D = 1 the interval lies within a margin of 0.05: equivalent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from aiorl.config import usable_cores
from bench.equivalence import Estimate, iqm, iqm_difference, paired_mean, verdict
from bench.garnet import Garnets
from bench.learning_runs import (
    METRICS,
    TASKS,
    area_score,
    final_score,
    load_rows,
    rms_log_ratio,
    run_missing,
    write_rows,
)
from bench.tabular_ppo import Correction, Settings, learn, normalised_area

RAW = Path(__file__).parent / "raw"
EXACT, REAL = RAW / "learning_vs_degree_exact.json", RAW / "learning_vs_degree_real.json"
PICTURE = Path(__file__).parent.parent / "docs" / "img" / "learning_vs_degree.svg"

ARMS: tuple[Correction, ...] = ("decoupled", "vtrace", "none")
EXACT_DEGREES, REAL_DEGREES = (0, 1, 2, 4, 8, 16), (0, 1, 2, 4)
PROCESSES, SEEDS = 256, 20
EXACT_BOUND, MARGIN, RECOMMENDED = 0.01, 0.05, 1
POOLED = "pooled"


# -- (a) exact returns -------------------------------------------------------------------------------------------------


class ExactRow(NamedTuple):
    """One arm at one degree: normalised area [M] of each process, root mean square of the log-ratio, clip fraction."""

    arm: str
    degree: int
    areas: list[float]
    rms_log_ratio: float
    clip_fraction: float


def exact(
    cells: Sequence[tuple[Correction, int]], processes: int = PROCESSES, settings: Settings | None = None, seed: int = 0
) -> list[ExactRow]:
    """Learn in every process, for each (arm, degree)."""
    garnets = Garnets.random(seed, processes)
    rows: list[ExactRow] = []
    for arm, degree in cells:
        found = learn(garnets, arm, degree, settings or Settings(), seed)
        areas = normalised_area(garnets, found.returns).round(5).tolist()
        rms = float(np.sqrt(found.log_ratio_m2[degree:].mean()))
        rows.append(ExactRow(arm, degree, areas, round(rms, 4), round(float(found.clip_fraction[degree:].mean()), 4)))
    return rows


def exact_differences(rows: Sequence[ExactRow]) -> dict[tuple[str, int], Estimate]:
    """Paired difference to degree 0 of the same arm, by (arm, degree)."""
    areas = {(row.arm, row.degree): np.array(row.areas) for row in rows}
    cells = [(arm, d) for arm in ARMS for d in EXACT_DEGREES[1:] if (arm, d) in areas]
    return {(arm, d): paired_mean(areas[arm, d] - areas[arm, 0]) for arm, d in cells}


def exact_claims(found: dict[tuple[str, int], Estimate]) -> dict[str, bool]:
    claims = {f"{arm}, D = 4: lower edge >= -{EXACT_BOUND}": found[arm, 4].low >= -EXACT_BOUND for arm in ARMS[:2]}
    return claims | {"none, D = 4: found to be worse": found["none", 4].high < 0}


# -- (b) real tasks ----------------------------------------------------------------------------------------------------

Score = Any  # a function of a row


def scores(rows: Sequence[dict[str, Any]], env: str, degree: int, score: Score = final_score) -> np.ndarray:
    """By seed."""
    chosen = [row for row in rows if row["env"] == env and row["degree"] == degree]
    return np.array([score(row) for row in sorted(chosen, key=lambda row: row["seed"])])


def real_differences(rows: Sequence[dict[str, Any]], score: Score = final_score) -> dict[tuple[str, int], Estimate]:
    """Difference of IQMs to degree 0, by (task or "pooled", degree), for what there are rows of."""
    envs = [task.env for task in TASKS if any(row["env"] == task.env for row in rows)]
    found: dict[tuple[str, int], Estimate] = {}
    for name, tasks in {**{env: [env] for env in envs}, POOLED: envs}.items():
        zero = [scores(rows, env, 0, score) for env in tasks]
        for d in REAL_DEGREES[1:]:
            found[name, d] = iqm_difference([scores(rows, env, d, score) for env in tasks], zero)
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def print_exact(rows: Sequence[ExactRow]) -> None:
    found = exact_differences(rows)
    print(f"(a) Exact returns on {len(rows[0].areas)} random processes: normalised area at D minus that at D = 0")
    for row in rows:
        area = f"area {np.mean(row.areas):.3f}   rms log-ratio {row.rms_log_ratio:.3f}   clipped {row.clip_fraction:5.1%}"
        difference = "" if row.degree == 0 else found[row.arm, row.degree].text()
        print(f"    {row.arm:10} D = {row.degree:2}   {difference:26} {area}")
    for claim, holds in exact_claims(found).items():
        print(f"    {'met    ' if holds else 'NOT MET'}  {claim}")


def print_real(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        print("\n(b) no runs stored yet: --real makes them")
        return
    found, areas = real_differences(rows), real_differences(rows, area_score)
    print(f"\n(b) Real tasks: difference of IQMs to D = 0, margin {MARGIN}")
    for (name, degree), difference in found.items():
        judged = verdict(difference, MARGIN)
        print(f"    {name:15} D = {degree}   final {difference.text()}  {judged:10}   area {areas[name, degree].text()}")
    recommended = {name: verdict(d, MARGIN) for (name, degree), d in found.items() if degree == RECOMMENDED}
    for name, judged in recommended.items():
        print(f"    {'met    ' if judged == 'equivalent' else 'NOT MET'}  {name}, D = {RECOMMENDED}: {judged}")
    print_staleness(rows)


def print_staleness(rows: Sequence[dict[str, Any]]) -> None:
    """What each degree did to the quantities that speak of stale data: medians over seeds of the means over a run."""
    print("\n    Scores, and means over the updates of a run (medians over seeds); rms max: the largest of any update")
    head = "".join(f"{name:>15}" for name in METRICS[1:])
    print(f"    {'':15} {'':5} seeds  IQM final   IQM area  rms log-ratio    rms max{head}")
    for task in TASKS:
        for degree in REAL_DEGREES:
            chosen = [row for row in rows if row["env"] == task.env and row["degree"] == degree]
            if not chosen:
                continue
            final, area = (iqm(scores(rows, task.env, degree, score)) for score in (final_score, area_score))
            rms = [np.median([rms_log_ratio(row, which) for row in chosen]) for which in ("means", "maxima")]
            means = "".join(f"{np.median([row['means'][name] for row in chosen]):15.4f}" for name in METRICS[1:])
            print(f"    {task.env:15} D = {degree} {len(chosen):5} {final:10.3f} {area:10.3f} "
                  f"{rms[0]:14.4f} {rms[1]:10.4f}{means}")  # fmt: skip


# -- picture -----------------------------------------------------------------------------------------------------------

COLOURS = {
    "decoupled": "#2563c9", "vtrace": "#0f8a5f", "none": "#d1570b",
    "CartPole-v1": "#2563c9", "Acrobot-v1": "#0f8a5f", "LunarLander-v3": "#a23b9b", POOLED: "#1c2128",
}  # fmt: skip
LABELS = {"decoupled": "decoupled PPO (default)", "vtrace": "V-trace", "none": "uncorrected PPO"}


def plot(exact_rows: Sequence[ExactRow], real_rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Both differences over the degree, with intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "aiorl", "font.size": 9.5, "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = cast(Any, figure.subplots(1, 2))
        _panel(left, exact_differences(exact_rows), EXACT_DEGREES[1:], (-EXACT_BOUND, 0), f"bound −{EXACT_BOUND}")
        left.set_title(f"(a) exact return, {len(exact_rows[0].areas)} random tabular MDPs")
        left.set_ylabel("difference to D = 0, normalised area")
        _panel(right, real_differences(real_rows), REAL_DEGREES[1:], (-MARGIN, MARGIN), f"margin ±{MARGIN}")
        right.set_title(f"(b) final policy, {max(row['seed'] for row in real_rows) + 1} seeds each")
        right.set_ylabel("difference of IQMs to D = 0, normalised score")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def _panel(
    axes: Any, found: dict[tuple[str, int], Estimate], degrees: Sequence[int], band: tuple[float, float], label: str
) -> None:
    """One colour a name, side by side within each degree; the band is where an interval may begin and end."""
    names = list(dict.fromkeys(name for name, _ in found))
    axes.axhspan(*band, color="#8a94a3", alpha=0.25, linewidth=0, label=label)
    axes.axhline(0, color="#616975", linewidth=0.8)
    for index, name in enumerate(names):
        estimates = [found[name, d] for d in degrees]
        x = np.arange(len(degrees)) + (index - (len(names) - 1) / 2) * 0.14
        value = np.array([e.value for e in estimates])
        errors = [value - [e.low for e in estimates], np.array([e.high for e in estimates]) - value]
        axes.errorbar(
            x, value, errors, fmt="s" if name == POOLED else "o", markersize=5, capsize=3, linewidth=1.6,
            color=COLOURS[name], label=LABELS.get(name, name),
        )  # fmt: skip
    axes.set_xticks(range(len(degrees)), [str(d) for d in degrees])
    axes.set_xlabel("off_policy_degree D")
    axes.grid(axis="y", color="#e9ecf1")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8.5)


# -- the program -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", action="store_true", help="run the exact suite and store its raw results")
    parser.add_argument("--real", action="store_true", help="make the runs on real tasks that are not stored yet")
    parser.add_argument("--table", action="store_true", help="print the tables (also the default's end)")
    parser.add_argument("--plot", nargs="?", const=str(PICTURE), metavar="FILE", help="draw the picture (.svg or .png)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="--real: how many seeds, from 0 on")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="--real: runs at a time")
    parser.add_argument("--envs", nargs="+", default=[t.env for t in TASKS], choices=[t.env for t in TASKS])
    parser.add_argument("--exact-file", type=Path, default=EXACT, help="raw results of the exact suite")
    parser.add_argument("--real-file", type=Path, default=REAL, help="raw results of the real tasks")
    options = parser.parse_args()
    asked = options.exact or options.real or options.table or options.plot
    if options.exact or not asked:
        begun_s = time.perf_counter()
        rows = exact([(arm, degree) for arm in ARMS for degree in EXACT_DEGREES])
        write_rows(options.exact_file, [row._asdict() for row in rows], key=("arm", "degree"))
        print(f"exact suite: {time.perf_counter() - begun_s:.0f} s\n")
    if options.real:
        run_missing(options.real_file, REAL_DEGREES, options.seeds, options.processes, options.envs)
    exact_rows = [ExactRow(**row) for row in load_rows(options.exact_file)]
    real_rows = load_rows(options.real_file)
    if options.plot:
        plot(exact_rows, real_rows, Path(options.plot))
    if options.exact or options.table or not asked:
        print_exact(exact_rows)
    if options.real or options.table or not asked:
        print_real(real_rows)


if __name__ == "__main__":
    main()
