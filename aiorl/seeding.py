"""Where randomness comes from: one root seed, and a key that says what each stream is for; never a global generator."""

from __future__ import annotations

import numpy as np

LEARNER, ENV, ACT, EVAL_ENV, EVAL_ACT, REEVAL_ENV, MATCH = 1, 2, 3, 4, 5, 6, 7
"""First elements of all spawn keys: what the randomness is for. REEVAL_ENV: the last word on which snapshot is best.
MATCH: games between two players that nobody learns from."""


def env_seed(root: int, *key: int) -> int:
    """A seed for `env.reset`, from 0 to 2**31 - 1 (simulators written in C often take no more)."""
    return int(np.random.SeedSequence(root, spawn_key=key).generate_state(1)[0]) >> 1


def episode_seed(root: int, env: int, episode: int, again: int = 0) -> int:
    """The seed that training episode number `episode` of environment number `env` is reset with.

    `again` counts the resets before it that could not be used.
    """
    return env_seed(root, ENV, env, episode, *((again,) if again else ()))


def evaluation_seed(root: int, episode: int, *, fresh: bool = False) -> int:
    """The seed of evaluation episode number `episode`; `fresh` ones are used by no evaluation during training."""
    return env_seed(root, REEVAL_ENV if fresh else EVAL_ENV, episode)
