"""How fast hockey is on one core, and whether it plays as the reference games did.

    python -m bench.hockey_env [--games 300] [--seconds 5] [--json FILE]

Speed: env steps per second of CPU time of one process, against bots, by way of `gymnasium.make`, resets included. Times of
a machine mean little alone, so the same process also counts how often a second it can do a fixed piece of pure Python; the
ratio of the two compares machines, and moments of a busy one.

Play: bots against bots. The reference table was measured on another implementation of the game, 200 to 300 games a row;
shares of wins, ties and losses are to be within 0.08 of it and the mean length of a game within 10 %.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any, NamedTuple

import gymnasium
import numpy as np

import aiorl.envs.hockey
from aiorl.envs.hockey.bots import BOTS
from aiorl.envs.hockey.game import FIRST, SECOND, Game, reward
from bench.common import print_machine, summarise, write_json

GOAL = 15_000.0
SHARE, LENGTH = 0.08, 0.10
ROUND_S = 0.5


class Row(NamedTuple):
    """How a player did against another one; shares of games, None where the reference does not tell."""

    mode: str
    first: str
    second: str
    win: float | None
    tie: float | None
    loss: float | None
    mean_return: float
    length: float


REFERENCE = [
    Row("NORMAL", "random", "weak", 0.04, 0.50, 0.46, -17.9, 172),
    Row("NORMAL", "still", "weak", 0.03, 0.70, 0.28, -16.0, 202),
    Row("NORMAL", "random", "strong", 0.12, 0.47, 0.41, -16.2, 176),
    Row("NORMAL", "weak", "weak", 0.21, 0.58, 0.20, -4.6, 190),
    Row("NORMAL", "strong", "weak", 0.41, 0.46, 0.12, -1.5, 172),
    Row("NORMAL", "strong", "strong", 0.37, 0.34, 0.29, -3.4, 151),
    Row("TRAIN_SHOOTING", "random", "still", 0.06, None, None, -24.9, 78),
    Row("TRAIN_SHOOTING", "weak", "still", 0.59, None, None, -1.5, 57),
    Row("TRAIN_SHOOTING", "strong", "still", 0.37, None, None, -2.2, 67),
    Row("TRAIN_DEFENSE", "random", "still", None, None, 0.43, -5.9, 41),
    Row("TRAIN_DEFENSE", "weak", "still", None, None, 0.20, -1.1, 46),
    Row("TRAIN_DEFENSE", "strong", "still", None, None, 0.04, -0.2, 63),
]


def play(mode: str, first: str, second: str, games: int, seed: int = 0) -> Row:
    """So many games between two bots, by player 1's account."""
    game, rng = Game(mode), np.random.default_rng(seed)
    ends, total, steps = {1: 0, 0: 0, -1: 0}, 0.0, 0
    for _ in range(games):
        game.reset(rng)
        one, other = BOTS[first](rng), BOTS[second](rng)
        while game.playing:
            game.step(one(game.observe(FIRST)), other(game.observe(SECOND)))
            total += reward(game.info(FIRST))
        ends[int(game.info(FIRST)["winner"])] += 1
        steps += game.steps
    return Row(mode, first, second, ends[1] / games, ends[0] / games, ends[-1] / games, total / games, steps / games)


def differences(expected: Row, seen: Row) -> list[str]:
    """What is out of bounds, in words."""
    found = [
        f"{name} {getattr(seen, name):.2f} instead of {share:.2f}"
        for name in ("win", "tie", "loss")
        if (share := getattr(expected, name)) is not None and abs(getattr(seen, name) - share) > SHARE
    ]
    if abs(seen.length / expected.length - 1) > LENGTH:
        found.append(f"length {seen.length:.0f} instead of {expected.length:.0f}")
    return found


def show(expected: Row, seen: Row) -> str:
    """One line of the table: seen, and the reference in brackets."""
    pairs = zip(seen[3:6], expected[3:6], strict=True)
    shares = [f"{value:5.2f} ({'  - ' if share is None else f'{share:.2f}'})" for value, share in pairs]
    return (
        f"{seen.mode:14} {seen.first:6} {seen.second:6} {'  '.join(shares)}  {seen.mean_return:6.1f} "
        f"({expected.mean_return:5.1f})  {seen.length:4.0f} ({expected.length:.0f})"
    )


def steps_per_second(seconds: float, **arguments: Any) -> list[float]:
    """Of CPU time, in rounds of half a second; each begins with a new game."""
    env = gymnasium.make(aiorl.envs.hockey.ID, disable_env_checker=True, **arguments)
    actions = np.random.default_rng(0).uniform(-1, 1, (1024, 4)).astype(np.float32)
    env.reset(seed=0)
    rates: list[float] = []
    for _ in range(max(1, round(seconds / ROUND_S))):
        begun, steps = time.process_time(), 0
        while (used := time.process_time() - begun) < ROUND_S:
            env.reset()
            over = False
            while not over:
                _, _, terminated, truncated, _ = env.step(actions[steps % 1024])
                over = terminated or truncated
                steps += 1
        rates.append(steps / used)
    env.close()
    return rates


def calibration() -> float:
    """Million additions a second in a Python loop: the machine as it is now."""
    times: list[float] = []
    for _ in range(9):
        begun, total = time.process_time(), 0
        for i in range(200_000):
            total += i
        times.append(time.process_time() - begun)
    return 0.2 / median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=300, help="of each row of the table; 0 leaves it out")
    parser.add_argument("--seconds", type=float, default=5.0, help="of CPU time for each speed")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print_machine()
    speed: dict[str, Any] = {"calibration_million_additions_per_s": calibration()}
    print(f"calibration: {speed['calibration_million_additions_per_s']:.1f} million additions/s in a Python loop")
    for mode, opponent in (("NORMAL", "weak"), ("NORMAL", "strong"), ("TRAIN_SHOOTING", "still")):
        rates = summarise(steps_per_second(options.seconds, mode=mode, opponent=opponent))
        verdict = "ok" if rates.median >= GOAL else "below the goal"
        print(f"{mode:14} against {opponent:6} {rates.text(0)} steps/s on one core, goal {GOAL:,.0f}: {verdict}")
        speed[f"{mode} {opponent}"] = rates._asdict()
    table: list[dict[str, Any]] = []
    if options.games:
        print(f"\nplay over {options.games} games: win, tie, loss, mean return, mean length of player 1 (reference)")
        for expected in REFERENCE:
            seen = play(*expected[:3], games=options.games)
            wrong = differences(expected, seen)
            print(show(expected, seen), " ".join(wrong) or "ok", flush=True)
            table.append({**seen._asdict(), "differences": wrong})
    write_json(options.json, {"steps_per_second": speed, "play": table})


if __name__ == "__main__":
    main()
