"""Self-play: any algorithm against bots, earlier versions of itself and itself, in games for two (`SelfPlayEnv`).

The opponents travel with the learner's weights. So which version met whom is as exact, and as repeatable, as everything else
about the run: a rollout was acted with one version, opponents included. `aiorl.league` says who is in and who is met.

The inner algorithm learns from the learner's side of the game alone, as from any environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
import numpy as np
from msgspec import Meta

from aiorl import checkpoint
from aiorl.algos import algorithm_class, algorithm_name
from aiorl.algos.base import (
    AVERAGE,
    Algorithm,
    Closing,
    Learner,
    LearnerContext,
    Policy,
    Recurrent,
    StateTree,
    Weights,
    averages,
)  # fmt: skip
from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import CheckpointError, ConfigError, InvariantError
from aiorl.league import BOTS, SELF, UNKNOWN, Game, League, standings
from aiorl.segments import Array, Column, Rollout, Segment
from aiorl.structs import as_in_a_file, check_bounds, convert, without_none
from aiorl.trees import check_tree

OPPONENT, OUTCOME = "obs.opponent", "obs.outcome"
_PREFIX = "league."
Share = Annotated[float, Meta(ge=0, le=1)]


class SelfPlay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of self-play. `SelfPlay.of(aiorl.TD3(…), …)` wraps a configured algorithm."""

    name: ClassVar[str] = "selfplay"

    algo: Annotated[str, Meta(description="the algorithm that learns: a name or pkg.mod:Class")] = "sac"
    inner: Annotated[dict[str, Any], Meta(description="its settings")] = {}
    pool: Annotated[int, Meta(description="snapshots in the pool of opponents", ge=0, le=1000)] = 5
    matchmaking: Annotated[
        Literal["uniform", "hard", "even"],
        Meta(description="how often to meet a snapshot beaten with probability p: all alike, by (1-p)^2, by p(1-p)"),
    ] = "hard"
    bots: Annotated[dict[str, Share], Meta(description="share of games against each of the environment's bots")] = {}
    self_share: Annotated[float, Meta(description="share of games against the learner as it is now", ge=0, le=1)] = 0.2
    admit_every: Annotated[int, Meta(description="updates from one snapshot to the next, at least", ge=1)] = 100
    admit_win_rate: Annotated[
        float, Meta(description="and points per game against the pool since then (a tie counts half; 0: any)", ge=0, le=1)
    ] = 0.0
    admit_games: Annotated[int, Meta(description="in so many games at least", ge=0)] = 20
    replaced: Annotated[
        Literal["oldest", "easiest"], Meta(description="which snapshot makes room when the pool is full")
    ] = "oldest"
    memory: Annotated[
        int, Meta(description="games against an opponent after which a result has faded to a third", ge=2)
    ] = 100
    opponent_noise: Annotated[
        bool, Meta(description="let snapshots explore as the learner does; without, they do what they think best")
    ] = False
    frozen: Annotated[
        tuple[str, ...], Meta(description="run directories or checkpoints whose policies are in the pool from the start")
    ] = ()

    def __post_init__(self) -> None:
        check_bounds(self, f"{self.name}.")
        if self.algo == self.name:
            raise ConfigError("selfplay.algo = 'selfplay': expected the algorithm that is to learn")
        _ = self.algorithm  # refuses settings that it does not have
        if (total := self.self_share + sum(self.bots.values())) > 1 + 1e-9:
            raise ConfigError(f"selfplay: self_share and bots make {total:g}\n  expected at most 1; snapshots get the rest")
        if len(self.frozen) > self.pool:
            raise ConfigError(f"selfplay.frozen names {len(self.frozen)} policies, more than pool = {self.pool}")

    @classmethod
    def of(cls, algorithm: Any, **settings: Any) -> Self:
        return cls(algo=algorithm_name(algorithm), inner=without_none(as_in_a_file(algorithm)), **settings)

    @property
    def algorithm(self) -> Any:
        """The one that learns."""
        return convert(self.inner, algorithm_class(self.algo), "selfplay", "inner.")

    @property
    def default_segment_length(self) -> int:
        return self.algorithm.default_segment_length

    @property
    def default_error_target(self) -> float:
        return getattr(self.algorithm, "default_error_target", 0.3)

    @property
    def warmup(self) -> int | None:
        return getattr(self.algorithm, "warmup", None)

    @property
    def corrects_staleness(self) -> bool:
        return self.algorithm.corrects_staleness

    def check(self, spaces: Spaces) -> None:
        """Raise ConfigError unless these are the spaces of a `SelfPlayEnv` in which the inner algorithm can act, and it
        remembers nothing from step to step: opponents come and go in the middle of a game's segment."""
        if isinstance(self.algorithm, Recurrent):
            what = f"selfplay.algo = {self.algo!r} has a policy_state, which opponents cannot have"
            raise ConfigError(f"{what}\n  use an algorithm without one")
        self.algorithm.check(inner_spaces(spaces))

    def within(self, spaces: Spaces) -> tuple[Algorithm, Spaces, str]:
        return self.algorithm, inner_spaces(spaces), f"{self.name}.inner"

    def written_out(self) -> Self:
        return msgspec.structs.replace(self, inner=without_none(as_in_a_file(self.algorithm)))

    def standings(self, weights: Weights) -> dict[str, Any]:
        return standings(weights, list(self.bots))

    def columns(self, spaces: Spaces) -> dict[str, Column]:
        return self.algorithm.columns(inner_spaces(spaces))

    def policy(self, spaces: Spaces) -> SelfPlayPolicy:
        return SelfPlayPolicy(self, spaces)

    def learner(self, spaces: Spaces, context: LearnerContext) -> SelfPlayLearner:
        return SelfPlayLearner(self, spaces, context)


# -- the two sides of a game -------------------------------------------------------------------------------------------


def inner_spaces(spaces: Spaces) -> Spaces:
    """What the inner algorithm observes and does. Raises ConfigError if these are not spaces of a `SelfPlayEnv`."""
    told = {leaf.name for leaf in spaces.observation if not leaf.shape}
    own = tuple(
        msgspec.structs.replace(leaf, name=_without_side(leaf.name), path=leaf.path[1:])
        for leaf in spaces.observation
        if leaf.path[:1] == ("own",)
    )
    action = spaces.action
    if not own or not {OPPONENT, OUTCOME} <= told or action.kind not in ("box", "multi_discrete") or action.size < 3:
        raise ConfigError(
            "selfplay needs a game for two, this environment is for one\n"
            "  let its maker return aiorl.envs.twoplayer.SelfPlayEnv(game), and leave frame_stack at 1"
        )
    return Spaces(observation=own, action=_half(action))


def _without_side(name: str) -> str:
    """"obs.own.speed" -> "obs.speed"."""
    first, _, *rest = name.split(".")
    return ".".join([first, *rest])


def _half(leaf: Leaf) -> Leaf:
    """One player's action, flat; the last number of `leaf` is the opponent's code."""
    n = leaf.size // 2
    if leaf.kind == "box":
        low, high = (bound * leaf.size if len(bound) == 1 else bound for bound in (leaf.low, leaf.high))
        low, high = (bound[:1] if len(set(bound[:n])) == 1 else bound[:n] for bound in (low, high))
        return msgspec.structs.replace(leaf, shape=(n,), low=low, high=high)
    kind, shape = ("discrete", ()) if n == 1 else ("multi_discrete", (n,))
    return msgspec.structs.replace(leaf, kind=kind, shape=shape, nvec=leaf.nvec[:n], start=leaf.start[:n])


def inner_weights(weights: Weights) -> dict[str, Array]:
    """The learner's own, without its opponents'."""
    return {name: array for name, array in weights.items() if not name.startswith(_PREFIX)}


class SelfPlayPolicy:
    """The acting half: plays the learner's side, and the other one where no bot does, as whoever `OPPONENT` shows."""

    def __init__(self, config: SelfPlay, spaces: Spaces) -> None:
        self._config, self._algorithm, self._inner_spaces = config, config.algorithm, inner_spaces(spaces)
        self._policy: Policy = self._algorithm.policy(self._inner_spaces)
        self._action = spaces.action_column
        names = [leaf.name for leaf in spaces.observation if leaf.path[:1] == ("own",)]
        self._own = {name: _without_side(name) for name in names}
        self._other = {name.replace("obs.own", "obs.other", 1): short for name, short in self._own.items()}
        self._spare: dict[int, Policy] = {}  # by column; made when first needed
        self._begun: dict[int, Policy] = {}  # by code, those that have begun this segment

    def begin(self, weights: Weights, rollout: int, rng: np.random.Generator | None, steps: int) -> None:
        self._weights, self._rollout, self._steps = weights, rollout, steps
        self._codes: Array = weights["league.codes"]
        self._begun.clear()
        self._seeds = self._chance = None
        if rng is not None:
            drawn = rng.integers(2**63, size=1 + len(self._codes)).tolist()
            self._chance, self._seeds = np.random.default_rng(drawn[0]), drawn[1:]
            self._odds = np.cumsum(weights["league.odds"])
        self._policy.begin(inner_weights(weights), rollout, rng, steps)

    def act(self, obs: Mapping[str, Array], first: Array) -> tuple[Array, Mapping[str, Array]]:
        own = {short: obs[name] for name, short in self._own.items()}
        other = {short: obs[name] for name, short in self._other.items()}
        action, extras = self._policy.act(own, first)
        n, half = len(action), self._action.shape[0] // 2
        codes = self._matched(obs[OPPONENT])
        joint = np.zeros((n, 2 * half + 1), self._action.dtype)
        joint[:, :half] = action.reshape(n, half)
        joint[:, -1] = codes
        for code in sorted({code for code in codes.tolist() if code < BOTS}):
            mine = np.flatnonzero(codes == code)
            policy = self._opponent(code)
            if self._config.opponent_noise:  # which is drawn for a whole group at a time
                theirs = policy.act(other, first)[0][mine]
            else:
                theirs = policy.act({name: leaf[mine] for name, leaf in other.items()}, first[mine])[0]
            joint[mine, half:-1] = theirs.reshape(len(mine), half)
        return joint, extras

    def _matched(self, shown: Array) -> Array:
        """The opponent of each game [N]; where one begins, chosen by the odds (without a generator, the learner itself)."""
        codes = np.array(shown)
        new = codes == UNKNOWN
        if not new.any():
            return codes
        if self._chance is None:
            codes[new] = SELF
        else:
            at = np.searchsorted(self._odds, self._chance.random(int(new.sum())) * self._odds[-1], side="right")
            codes[new] = self._codes[at]
        return codes

    def _opponent(self, code: int) -> Policy:
        """The policy with this code, ready to act."""
        if code in self._begun:
            return self._begun[code]
        columns = np.flatnonzero(self._codes == code)
        if not len(columns):
            raise InvariantError(f"snapshot {code} is in play and not in the pool {self._codes.tolist()}")
        column = int(columns[0])
        policy = self._spare.get(column) or self._algorithm.policy(self._inner_spaces)
        self._spare[column] = self._begun[code] = policy
        rng = np.random.default_rng(self._seeds[column]) if self._config.opponent_noise and self._seeds else None
        policy.begin(self._weights_of(column), self._rollout, rng, self._steps)
        return policy

    def _weights_of(self, column: int) -> dict[str, Array]:
        if column == 0:
            return inner_weights(self._weights)
        place = column - 1 - len(self._config.bots)
        prefix = f"{_PREFIX}snapshots."
        return {name.removeprefix(prefix): a[place] for name, a in self._weights.items() if name.startswith(prefix)}


class SelfPlayLearner:
    """The learning half: the inner learner and the league."""

    def __init__(self, config: SelfPlay, spaces: Spaces, context: LearnerContext) -> None:
        self._spaces = inner_spaces(spaces)
        self._inner: Learner = config.algorithm.learner(self._spaces, context)
        weights = self._inner.weights()
        frozen = [load_opponent(path, config.algorithm, weights) for path in config.frozen]
        self._league = League(config, weights, context.envs, frozen)

    def update(self, rollout: Rollout) -> dict[str, float]:
        metrics = self._inner.update(_own_side(rollout))
        self._league.record(list(finished(rollout)))
        playing = np.concatenate([segment.obs[OPPONENT][-1] for segment in rollout.segments])
        self._league.watch(rollout.behaviour_version, rollout.envs, playing)
        self._league.advance(rollout.index + 1, self._inner.weights())
        return metrics | self._league.metrics()

    def weights(self) -> Weights:
        return {**self._inner.weights(), **self._league.weights()}

    def state_dict(self) -> StateTree:
        return {"inner": self._inner.state_dict(), "league": self._league.state_dict()}

    def load_state_dict(self, state: StateTree) -> None:
        if missing := {"inner", "league"} - state.keys():
            raise ValueError(f"state.{min(missing)} is missing")
        self._inner.load_state_dict(state["inner"])
        self._league.load_state_dict(state["league"])

    def set(self, **changes: float) -> None:
        """Change settings of the inner algorithm."""
        self._inner.set(**changes)

    def close(self) -> None:
        if isinstance(self._inner, Closing):
            self._inner.close()


def finished(rollout: Rollout) -> Iterator[Game]:
    """The games that ended in a rollout, segment by segment and in their order."""
    for segment in rollout.segments:
        at = segment.final_at[: segment.finals]
        t, env = at // segment.envs, at % segment.envs
        columns = segment.columns
        ended = columns["valid"][t, env] & (columns["terminated"][t, env] | columns["truncated"][t, env])
        for row in np.flatnonzero(ended).tolist():
            yield Game(int(segment.final_obs[OPPONENT][row]), int(segment.final_obs[OUTCOME][row]))


def _own_side(rollout: Rollout) -> Rollout:
    """What the inner learner is shown: views on the learner's own observations and actions."""
    segments = tuple(_own_segment(segment) for segment in rollout.segments)
    return Rollout(rollout.index, rollout.behaviour_version, segments, rollout.envs)


def _own_segment(segment: Segment) -> Segment:
    def own(leaves: Mapping[str, Array]) -> dict[str, Array]:
        return {_without_side(name): leaf for name, leaf in leaves.items() if name.split(".")[1] == "own"}

    joint = segment.columns["action"]
    half = joint.shape[-1] // 2
    action = joint[..., 0] if half == 1 and joint.dtype.kind == "i" else joint[..., :half]
    return Segment(
        segment.steps, segment.envs, segment.header, own(segment.obs), {**segment.columns, "action": action},
        segment.final_at, own(segment.final_obs), segment.state, segment.aborted, segment.seal, segment.guards,
        segment.policy_state,
    )  # fmt: skip


# -- opponents from files ----------------------------------------------------------------------------------------------


def load_opponent(path: str, algorithm: Algorithm, like: Weights) -> dict[str, Array]:
    """The weights of a policy in a run directory or checkpoint, of this algorithm alone or in self-play.

    Raises CheckpointError if it is not of the architecture that `like`, weights of `algorithm`, has.
    """
    manifest, parts = checkpoint.load(checkpoint.find(Path(path)), ("policy",))
    weights = _in_the_form_of(like, inner_weights(parts["policy"]))
    table: Any = manifest.config.get(SelfPlay.name, {})
    trained: Any = table.get("inner", {}) if table else manifest.config.get(algorithm.name, {})
    theirs, mine = trained.get("activation"), getattr(algorithm, "activation", None)
    try:
        check_tree(weights, dict(like), "policy")
        if theirs is not None and theirs != mine:
            raise ValueError(f"policy.activation: expected {mine}, got {theirs}")
    except ValueError as error:
        raise CheckpointError(
            f"selfplay.frozen: {path} cannot play here: {error}\n"
            f"  give a {algorithm.name} policy of the same game, with the same hidden layers"
        ) from None
    return weights


def _in_the_form_of(like: Weights, weights: Weights) -> dict[str, Array]:
    """One trained with `average` plays as its mean network where none has one; one without is its own mean network."""
    own, wanted = averages(weights), averages(like)
    if bool(own) == bool(wanted):
        return dict(weights)
    acting = {name: array for name, array in weights.items() if not name.startswith(AVERAGE)} | own
    return acting | {AVERAGE + name: acting[name] for name in wanted if name in acting}
