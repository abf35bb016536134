"""Random tabular decision processes (Garnet), many at a time, whose returns are known exactly by a linear solve.

Archibald, McKinnon and Thomas (1995), as used by Bhatnagar et al. (2009): every action in every state leads to `branches`
random states with random probabilities, and its reward is normal. Here an episode also ends after each step with
probability `stop`, and begins in a state drawn uniformly. M processes, S states, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aiorl.segments import Array


@dataclass(frozen=True)
class Garnets:
    """Successors int64 [M, S, A, branches] with cumulated probabilities of the same shape; rewards float64 [M, S, A]."""

    successors: Array
    cumulated: Array
    rewards: Array
    stop: float
    gamma: float

    @classmethod
    def random(
        cls, seed: int, count: int, *, states: int = 30, actions: int = 4, branches: int = 3, stop: float = 0.02,
        gamma: float = 0.95,
    ) -> Garnets:  # fmt: skip
        """Rewards are scaled by 1 - gamma, so that values are of order 1."""
        rng = np.random.default_rng((seed, 0))
        shape = (count, states, actions)
        successors = rng.random((*shape, states)).argsort(-1)[..., :branches]
        cuts = np.sort(rng.random((*shape, branches - 1)), axis=-1)
        cumulated = np.concatenate([cuts, np.ones((*shape, 1))], axis=-1)
        return cls(successors, cumulated, rng.normal(size=shape) * (1 - gamma), stop, gamma)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, S, A)"""
        m, s, a = self.rewards.shape
        return m, s, a

    def transitions(self) -> Array:
        """P(s' | s, a) given that the episode goes on, [M, S, A, S]."""
        chances = np.diff(self.cumulated, prepend=0.0)
        result = np.zeros((*self.rewards.shape, self.shape[1]))
        np.put_along_axis(result, self.successors, chances, axis=-1)  # successors of one action are distinct
        return result

    def values(self, policy: Array, transitions: Array | None = None) -> Array:
        """V [M, S] of a policy, pi(a | s) as [M, S, A]: the solution of V = r_pi + gamma * (1 - stop) * P_pi V."""
        p = self.transitions() if transitions is None else transitions
        p_pi = np.einsum("msa,msat->mst", policy, p)
        r_pi = (policy * self.rewards).sum(-1)
        return np.linalg.solve(np.eye(self.shape[1]) - self._discount * p_pi, r_pi[..., None])[..., 0]

    def returns(self, policy: Array, transitions: Array | None = None) -> Array:
        """Expected discounted return [M] from a start state drawn uniformly."""
        return self.values(policy, transitions).mean(-1)

    def optimal(self) -> Array:
        """The best policy, by policy iteration: one-hot [M, S, A]."""
        p = self.transitions()
        policy = np.eye(self.shape[2])[self.rewards.argmax(-1)]
        while True:
            q = self.rewards + self._discount * np.einsum("msat,mt->msa", p, self.values(policy, p))
            # The action in use wins ties (as rounding makes them), so that this ends.
            better = np.eye(self.shape[2])[(q + 1e-10 * policy).argmax(-1)]
            if np.array_equal(better, policy):
                return policy
            policy = better

    def step(self, states: Array, actions: Array, chance: Array) -> tuple[Array, Array, Array, Array]:
        """One step of B chains in each process: (rewards, next states, whether it ended, states to go on from), [M, B] each.

        `chance` holds uniform numbers [3, M, B]: for the successor, the end, and the start of the next episode.
        """
        at = np.arange(self.shape[0])[:, None], states, actions
        branch = (chance[0][..., None] >= self.cumulated[at]).sum(-1)
        after = np.take_along_axis(self.successors[at], branch[..., None], axis=-1)[..., 0]
        ended = chance[1] < self.stop
        return self.rewards[at], after, ended, np.where(ended, start_states(chance[2], self.shape[1]), after)

    @property
    def _discount(self) -> float:
        return self.gamma * (1 - self.stop)


def start_states(chance: Array, states: int) -> Array:
    """States drawn uniformly by numbers in [0, 1)."""
    return (chance * states).astype(np.int64)
