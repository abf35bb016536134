"""A recurrent replay learner of your own in one file, on `Replay.sequences`, and a maze that nobody solves without memory.

A deep recurrent Q-network (Hausknecht and Stone 2015) that begins its sequences with the memory that acting had, and with
some rows of burn-in (Kapturowski et al. 2019). The gates of its memory see the observation alone (Feng et al. 2024), so that
what goes through time is one multiplication a step. Plain NumPy.

python -m aiorl train examples.custom_sequences:TMaze --algo examples.custom_sequences:RecurrentQ --steps 30k
python -m aiorl doctor examples.custom_sequences:TMaze --algo examples.custom_sequences:RecurrentQ
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import msgspec
import numpy as np

from aiorl import ConfigError, LearnerContext, TrainingError
from aiorl.buffers.batch import Sequences
from aiorl.buffers.replay import Replay, gradient_steps_owed
from aiorl.envs.spaces import Spaces
from aiorl.segments import Array, Column, Rollout

Parameters = dict[str, Array]
INIT, SAMPLE = 0, 1  # what random numbers are for


class TMaze(gymnasium.Env[Any, np.int64]):
    """A sign at the begin of a corridor says which way to turn at its end, 3 to 6 steps later: 1 if right, else -1.

    It shows (sign: -1, 1, or 0 where there is none; whether this is the end). Both signs are as likely and all ends look
    alike, so whoever remembers nothing gets 0 on average, whatever they do; who remembers the sign gets 1.
    """

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._way, self._left = int(self.np_random.integers(2)), int(self.np_random.integers(3, 7))
        return np.array([2 * self._way - 1, 0], np.float32), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        ends = self._left == 0
        reward = (1.0 if action == self._way else -1.0) if ends else 0.0
        self._left -= 1
        return np.array([0, self._left == 0], np.float32), reward, ends, False, {}


class RecurrentQ(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration."""

    name: ClassVar[str] = "recurrent_q"
    default_segment_length: ClassVar[int] = 32

    learning_rate: float = 3e-3
    memory: int = 16
    hidden: int = 32
    batch_size: int = 32  # sequences
    length: int = 12  # rows of each
    burn_in: int = 3  # of these, rows that only bring the memory up to date
    capacity: int = 20_000
    warmup: int = 1_000
    update_ratio: float = 0.05
    gamma: float = 0.95
    target_every: int = 50  # gradient steps
    epsilon: float = 0.1

    @property
    def corrects_staleness(self) -> bool:
        return True  # one-step targets hold whoever acted

    def check(self, spaces: Spaces) -> None:
        if spaces.action.kind != "discrete":
            raise ConfigError(f"recurrent_q needs a Discrete action space, not {spaces.action.kind}")
        if not 0 <= self.burn_in < self.length:
            raise ConfigError(f"recurrent_q.burn_in is {self.burn_in}, expected 0 to length - 1, {self.length - 1}")

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return {"memory": Column((self.memory,))}  # as it was before the step

    def policy_state(self, spaces: Spaces) -> dict[str, Column]:
        return {"memory": Column((self.memory,))}  # as it is after the last step of a segment

    def policy(self, spaces: Spaces) -> Remembering:
        return Remembering(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> RecurrentQLearner:
        return RecurrentQLearner(self, spaces, context)


# -- the network, for acting and learning alike ------------------------------------------------------------------------


def noticed(p: Mapping[str, Array], x: Array) -> tuple[Array, Array]:
    """Of features […, F]: how far each cell of the memory is renewed, 0 to 1, and what with, […, M] both."""
    return 1 / (1 + np.exp(-(x @ p["w_gate"] + p["b_gate"]))), x @ p["w_new"] + p["b_new"]


def values(p: Mapping[str, Array], x: Array, memory: Array) -> tuple[Array, Array, Array]:
    """Features […, F] and the memory after them […, M] to what the hidden layer sees, that layer, action values […, A]."""
    joined = np.concatenate([memory, x], axis=-1)
    hidden = np.maximum(joined @ p["w_hidden"] + p["b_hidden"], 0)
    return joined, hidden, hidden @ p["w_q"] + p["b_q"]


def unrolled(p: Mapping[str, Array], x: Array, first: Array, memory: Array) -> tuple[Array, Array, Array, Array]:
    """Along x [L, N, F] from a memory [N, M] on: gate, news, memory before and after each row, [L, N, M] all."""
    gate, news = noticed(p, x)
    before, after = np.empty_like(gate), np.empty_like(gate)
    for t in range(len(x)):
        before[t] = np.where(first[t, :, None], 0, memory)
        memory = after[t] = before[t] + gate[t] * (news[t] - before[t])
    return gate, news, before, after


def gradient(
    p: Mapping[str, Array], x: Array, first: Array, memory: Array, action: Array, target: Array, weight: Array
) -> tuple[Parameters, Array, Array]:
    """Of the sum of `weight` * Huber loss of Q(action) - target, [L, N] all; and these errors, and all values [L, N, A]."""
    gate, news, before, after = unrolled(p, x, first, memory)
    joined, hidden, q = values(p, x, after)
    error = np.take_along_axis(q, action[..., None], 2)[..., 0] - target
    d_q = np.zeros_like(q)
    np.put_along_axis(d_q, action[..., None], (weight * np.clip(error, -1, 1))[..., None], 2)
    d_hidden = d_q @ p["w_q"].T * (hidden > 0)
    d_after = (d_hidden @ p["w_hidden"].T)[..., : memory.shape[1]]
    for t in reversed(range(1, len(x))):  # through time, but not into the episode before
        d_after[t - 1] += d_after[t] * (1 - gate[t]) * ~first[t, :, None]
    d_gate, d_news = d_after * (news - before) * gate * (1 - gate), d_after * gate
    found: Parameters = {}
    for name, source, d in (("gate", x, d_gate), ("new", x, d_news), ("hidden", joined, d_hidden), ("q", hidden, d_q)):
        found[f"w_{name}"] = np.tensordot(source, d, ((0, 1), (0, 1)))
        found[f"b_{name}"] = d.sum((0, 1))
    return found, error, q


class Remembering:
    """The acting half: runs in the workers, one for each group of environments.

    What it remembers begins anew with each episode and lasts over segments: `policy_state` declares it, so that a worker
    that is replaced, or a run that is resumed, goes on from the same memory and everything stays exact.
    """

    def __init__(self, config: RecurrentQ, spaces: Spaces) -> None:
        self._config, self._spaces = config, spaces
        self._memory = np.zeros((1, config.memory), np.float32)

    def begin(self, weights: Mapping[str, Array], rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._weights, self._rng = weights, rng

    def state(self) -> dict[str, Array]:
        return {"memory": self._memory}

    def restore(self, state: Mapping[str, Array]) -> None:
        self._memory = state["memory"]

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, dict[str, Array]]:
        x = self._spaces.encode(obs)
        _, _, before, after = unrolled(self._weights, x[None], first[None], self._memory)
        self._memory = after[0]
        action = values(self._weights, x, self._memory)[2].argmax(axis=-1)
        if self._rng is not None:
            explores = self._rng.random(len(x)) < self._config.epsilon
            action = np.where(explores, self._rng.integers(self._spaces.action.features, size=len(x)), action)
        return action, {"memory": before[0]}


class RecurrentQLearner:
    """The learning half: runs on the learner thread."""

    def __init__(self, config: RecurrentQ, spaces: Spaces, context: LearnerContext) -> None:
        self._config, self._spaces, self._context = config, spaces, context
        self._warmup = config.warmup if context.warmup is None else context.warmup  # `--warmup` goes before
        self._learning_rate = config.learning_rate
        self._replay = Replay(spaces, context.envs, config.capacity, columns=config.columns(spaces))
        self._steps = 0  # gradient steps done
        features, actions, rng = spaces.features, spaces.action.features, context.rng(INIT)
        layers = {"gate": (features, config.memory), "new": (features, config.memory)}
        layers |= {"hidden": (config.memory + features, config.hidden), "q": (config.hidden, actions)}
        self._parameters: Parameters = {}
        for name, (fan_in, fan_out) in layers.items():
            bound = fan_in**-0.5
            self._parameters[f"w_{name}"] = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
            self._parameters[f"b_{name}"] = rng.uniform(-bound, bound, fan_out).astype(np.float32)
        self._parameters["b_gate"] -= 2  # what nothing is known of yet is kept: about an eighth is renewed with each step
        self._target = copy(self._parameters)
        self._mean, self._square = ({k: np.zeros_like(p) for k, p in self._parameters.items()} for _ in range(2))

    def update(self, rollout: Rollout) -> dict[str, float]:
        config = self._config
        self._replay.add(rollout)
        owed = gradient_steps_owed(self._replay.env_steps, self._warmup, config.update_ratio) - self._steps
        told: dict[str, float] = {"gradient_steps": float(owed), "learning_rate": self._learning_rate}
        rng = self._context.rng(SAMPLE, rollout.index)  # so that a resumed run draws what one without a stop draws
        for _ in range(owed):
            self._context.go_on()  # a pause or an end of the run need not wait for all of them
            told |= self._gradient_step(self._replay.sequences(rng, config.batch_size, config.length))
            self._steps += 1
            if self._steps % config.target_every == 0:
                self._target = copy(self._parameters)
        return told

    def _gradient_step(self, rows: Sequences) -> dict[str, float]:
        x, memory = self._spaces.encode(rows.obs), rows.columns["memory"][0]
        # Rows behind the end of a sequence repeat its last one, and those of the burn-in came out of an old memory.
        counts = rows.mask & (np.arange(len(x)) >= self._config.burn_in)[:, None]
        weight = (counts / max(1, counts.sum())).astype(np.float32)
        found, error, q = gradient(self._parameters, x, rows.first, memory, rows.action, self._targets(rows), weight)
        norm = float(np.sqrt(sum(np.square(g).sum() for g in found.values())))
        if not np.isfinite(norm):
            raise TrainingError(f"gradient step {self._steps} is not finite\n  lower recurrent_q.learning_rate")
        self._adam(found)
        return {"grad_norm": norm, "td_error": float((abs(error) * weight).sum()), "q_mean": float(q[rows.mask].mean())}

    def _targets(self, rows: Sequences) -> Array:
        """What each step was worth, by the target network, which has a memory of its own; float32 [L, N]."""
        p, following = self._target, self._spaces.encode(rows.next_obs)
        *_, after = unrolled(p, self._spaces.encode(rows.obs), rows.first, rows.columns["memory"][0])
        gate, news = noticed(p, following)  # of what a step led to, the last one of an episode or a sequence, too
        best = values(p, following, after + gate * (news - after))[2].max(axis=-1)
        return (rows.reward + self._config.gamma * ~rows.terminated * best).astype(np.float32)

    def _adam(self, found: Parameters) -> None:
        step = self._steps + 1
        for name, g in found.items():
            self._mean[name] = 0.9 * self._mean[name] + 0.1 * g
            self._square[name] = 0.999 * self._square[name] + 0.001 * g * g
            scale = np.sqrt(self._square[name] / (1 - 0.999**step)) + 1e-8
            self._parameters[name] -= self._learning_rate * self._mean[name] / (1 - 0.9**step) / scale

    def weights(self) -> Parameters:
        return self._parameters

    def state_dict(self) -> dict[str, Any]:
        return {**{name: copy(tree) for name, tree in self._trees().items()}, "replay": self._replay.state_dict(),
                "steps": self._steps, "learning_rate": self._learning_rate}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tree in self._trees().items():
            for key, array in tree.items():
                if state[name][key].shape != array.shape:
                    raise ValueError(f"{name}.{key}: shape {state[name][key].shape}, expected {array.shape}")
            tree |= copy(state[name])
        self._replay.load_state_dict(state["replay"])
        self._steps, self._learning_rate = state["steps"], state["learning_rate"]

    def _trees(self) -> dict[str, Parameters]:
        return {"parameters": self._parameters, "target": self._target, "mean": self._mean, "square": self._square}

    def set(self, **changes: float) -> None:
        if set(changes) != {"learning_rate"}:
            raise ValueError(f"cannot change {', '.join(changes)}; recurrent_q has: learning_rate")
        self._learning_rate = changes["learning_rate"]


def copy(tree: Parameters) -> Parameters:
    return {name: array.copy() for name, array in tree.items()}
