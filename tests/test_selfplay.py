"""Self-play: opponents that travel with the weights, an inner learner that sees one side, all of it exact and resumable."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import games
import numpy as np
import pytest
import torch
from experience import context
from kills import kill, workers_of
from plain_loop import plain_loop
from scipy import stats
from test_exactness import saved_learner_sha256, tree_sha256

import aiorl
from aiorl.algos.base import AVERAGE, Algorithm, Learner, Policy, averages
from aiorl.algos.selfplay import SelfPlayLearner, inner_spaces, inner_weights, load_opponent
from aiorl.cli.plot import main as plot
from aiorl.cli.train import main as train
from aiorl.envs.make import probe
from aiorl.envs.spaces import spaces_of
from aiorl.envs.spec import resolve_env
from aiorl.errors import CheckpointError, ConfigError, InvariantError
from aiorl.league import BOTS, SELF, UNKNOWN, League, bot_code, standings
from aiorl.learning import params_sha256
from aiorl.segments import Array, Rollout
from aiorl.testing import Recording, check_laws
from aiorl.testing.leaks import belongings

SEED, STEPS, ENVS, GROUP_SIZE = 5, 8, 4, 2
SMALL: dict[str, Any] = {
    "hidden": (8, 8), "batch_size": 8, "warmup": 64, "random_steps": 64, "update_ratio": 0.1, "capacity": 2000,
}  # fmt: skip
RACE: dict[str, Any] = {"bots": {"stroller": 0.2, "still": 0.1}, "self_share": 0.2, "admit_every": 2, "pool": 2}
TD3 = aiorl.SelfPlay.of(aiorl.TD3(**SMALL), **RACE)
ALGORITHMS: dict[str, tuple[str, aiorl.SelfPlay]] = {
    "td3": ("games:race", TD3),
    "sac": ("games:race", aiorl.SelfPlay.of(aiorl.SAC(**SMALL), opponent_noise=True, matchmaking="even", **RACE)),
    "dqn": (
        "games:matching",
        aiorl.SelfPlay.of(
            aiorl.DQN(hidden=(8,), batch_size=8, warmup=64, update_ratio=0.1), bots={"rock": 0.2, "anything": 0.2},
            admit_every=3, pool=3, replaced="easiest",
        ),
    ),
    "ppo": (
        "games:matching",
        aiorl.SelfPlay.of(
            aiorl.PPO(hidden=(8,), epochs=1, minibatches=2, normalise_obs=True), bots={"rock": 0.2, "anything": 0.2},
            admit_every=2, admit_win_rate=0.4, admit_games=5, pool=3, opponent_noise=True, matchmaking="uniform",
        ),
    ),
}  # fmt: skip
SPACES = probe(resolve_env("games:race", in_process=True)).spaces


def config(out: Path, algo: str = "td3", rollouts: int = 20, **changes: Any) -> aiorl.Config:
    env, algorithm = ALGORITHMS[algo]
    fields: dict[str, Any] = {
        "env": env, "algo": algorithm, "seed": SEED, "envs": ENVS, "group_size": GROUP_SIZE, "segment_length": STEPS,
        "workers": 2, "off_policy_degree": 0, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 0,
        "out": str(out), "total_steps": rollouts * STEPS * ENVS,
    }  # fmt: skip
    return aiorl.Config(**{**fields, **changes})


def run_plain(algo: str = "td3", rollouts: int = 20, degree: int = 0, each: Any = None, **changes: Any) -> Learner:
    env, algorithm = ALGORITHMS[algo]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return plain_loop(
            aiorl.SelfPlay(**{**{f: getattr(algorithm, f) for f in algorithm.__struct_fields__}, **changes}),
            resolve_env(env, in_process=True), envs=ENVS, group_size=GROUP_SIZE, steps=STEPS, seed=SEED,
            rollouts=rollouts, degree=degree, each=each,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def sha256(weights: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def league_of(learner: Learner) -> League:
    assert isinstance(learner, SelfPlayLearner)
    return learner._league


# -- configuration -----------------------------------------------------------------------------------------------------


def test_it_follows_the_protocols():
    assert isinstance(TD3, Algorithm)
    assert isinstance(TD3.policy(SPACES), Policy)
    assert isinstance(TD3.learner(SPACES, context()), Learner)
    assert (TD3.default_segment_length, TD3.warmup, TD3.corrects_staleness) == (8, 64, True)


def test_it_is_written_and_read(tmp_path: Path):
    one = config(tmp_path)
    (tmp_path / "a.toml").write_text(one.to_toml())
    again = aiorl.Config.from_toml(tmp_path / "a.toml")
    assert again.to_dict() == one.to_dict()
    assert again.algorithm.algorithm == aiorl.TD3(**SMALL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"algo": "selfplay"}, "^selfplay.algo = 'selfplay': expected the algorithm"),
        ({"algo": "td4"}, "^unknown algorithm 'td4' — did you mean td3?"),
        ({"inner": {"gama": 1}}, "^selfplay: unknown key `inner.gama` — did you mean `inner.gamma`"),
        ({"inner": {"gamma": 2}}, "^selfplay: inner.gamma = 2: expected"),
        ({"bots": {"weak": 0.7}, "self_share": 0.4}, r"self_share and bots make 1\.1\n  expected at most 1"),
        ({"bots": {"weak": "x"}}, "^selfplay.bots = "),
        ({"frozen": ("a", "b"), "pool": 1}, "names 2 policies, more than pool = 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        aiorl.SelfPlay(**settings)


def test_a_game_for_one_is_refused():
    from gymnasium.spaces import Box

    plain = spaces_of(Box(-1, 1, (3,), np.float32), Box(-1, 1, (3,), np.float32))
    with pytest.raises(ConfigError, match=r"^selfplay needs a game for two, this environment is for one\n"):
        TD3.check(plain)
    with pytest.raises(ConfigError, match=r"^dqn needs a Discrete action space"):
        aiorl.SelfPlay(algo="dqn").check(SPACES)


def test_by_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = "--algo selfplay --selfplay.algo td3 --selfplay.inner hidden=[8,8] gamma=0.9 --selfplay.bots still=0.25"
    assert train(["games:race", *line.split(), "--steps", "2000", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "still" in capsys.readouterr().out


# -- acting ------------------------------------------------------------------------------------------------------------


def test_the_inner_algorithm_sees_one_side():
    inner = inner_spaces(SPACES)
    assert [(leaf.name, leaf.shape) for leaf in inner.observation] == [("obs", (2,))]
    assert (inner.action.shape, inner.action.low, inner.action.high) == ((1,), (-1.0,), (1.0,))
    discrete = inner_spaces(probe(resolve_env("games:matching", in_process=True)).spaces)
    assert (discrete.action.kind, discrete.action.nvec) == ("discrete", (3,))


def shown(opponents: Any) -> dict[str, Array]:
    n = len(opponents)
    rng = np.random.default_rng(0)
    return {
        "obs.own": rng.normal(size=(n, 2)).astype(np.float32), "obs.other": rng.normal(size=(n, 2)).astype(np.float32),
        "obs.opponent": np.array(opponents), "obs.outcome": np.zeros(n, np.int8),
    }  # fmt: skip


def trained() -> Learner:
    """With two snapshots, results that differ, and weights that are not those of version 0 any more."""
    return run_plain(rollouts=9)


def test_matches_follow_the_odds():
    weights = trained().weights()
    policy, n = TD3.policy(SPACES), 4000
    policy.begin(weights, 1000, np.random.default_rng(3), 1)
    chosen = policy.act(shown([UNKNOWN] * n), np.ones(n, bool))[0][:, -1]
    odds, codes = weights["league.odds"], weights["league.codes"]
    met = odds > 0
    assert np.isin(chosen, codes[met]).all()
    seen = np.array([(chosen == code).sum() for code in codes[met]])
    assert stats.chisquare(seen, odds[met] * n).pvalue > 0.01
    assert stats.chisquare(seen, np.full(met.sum(), n / met.sum())).pvalue < 1e-6, "the test can fail"


@pytest.mark.parametrize("matchmaking", ["uniform", "hard"])
def test_games_are_played_against_whom_the_odds_say(matchmaking: str, monkeypatch: pytest.MonkeyPatch):
    """From the odds of a version to the opponent that the environment shows at the end of a game, over a whole run."""
    expected: dict[int, float] = defaultdict(float)
    variance: dict[int, float] = defaultdict(float)
    played: Counter[int] = Counter()
    odds_of: dict[int, dict[int, float]] = {}

    def update(self: SelfPlayLearner, rollout: Rollout) -> dict[str, float]:
        league = league_of(self)
        odds_of[rollout.index] = dict(zip(league.codes.tolist(), league.odds().tolist(), strict=True))
        for segment in rollout.segments:  # a game begins where nobody has been met yet
            begun = segment.obs["obs.opponent"][:-1] == UNKNOWN
            for code in segment.columns["action"][..., -1][begun].astype(int).tolist():
                played[code] += 1
            for code, p in odds_of[rollout.behaviour_version].items():
                expected[code] += int(begun.sum()) * p
                variance[code] += int(begun.sum()) * p * (1 - p)
        return original(self, rollout)

    original = SelfPlayLearner.update
    monkeypatch.setattr(SelfPlayLearner, "update", update)
    run_plain("dqn", 250, degree=1, matchmaking=matchmaking, admit_every=20)
    assert sum(played.values()) == pytest.approx(sum(expected.values()))
    assert len(played) > 8, "the pool did not turn over"
    assert played.keys() <= {code for code, wanted in expected.items() if wanted}
    for code, wanted in expected.items():
        if variance[code] > 5:
            assert abs(played[code] - wanted) < 4 * variance[code] ** 0.5, code


def test_everybody_plays_as_the_version_that_was_admitted():
    learner = trained()
    weights, league = learner.weights(), league_of(learner)
    ids = league.ids[league.ids > 0].tolist()
    assert len(ids) >= 2
    policy = TD3.policy(SPACES)
    policy.begin(weights, 1000, np.random.default_rng(0), 1)
    obs = shown([SELF, *ids, bot_code("still"), *ids])
    joint, extras = policy.act(obs, np.zeros(len(obs["obs.own"]), bool))
    assert extras["mean"].shape == (len(joint), 1)
    assert joint[:, -1].tolist() == obs["obs.opponent"].tolist()

    def greedy(weights: Mapping[str, Array], side: str) -> Array:
        inner = TD3.algorithm.policy(inner_spaces(SPACES))
        inner.begin(weights, 0, None, 0)
        return inner.act({"obs": obs[side]}, np.zeros(len(joint), bool))[0]

    for row, code in enumerate(obs["obs.opponent"].tolist()):
        if code < BOTS:
            place = np.flatnonzero(league.ids == code)
            whose = {n: a[place[0]] for n, a in league.snapshots.items()} if code else inner_weights(weights)
            assert joint[row, 1] == pytest.approx(greedy(whose, "obs.other")[row, 0], rel=1e-5)
        else:
            assert joint[row, 1] == 0
    calm = TD3.policy(SPACES)
    calm.begin(weights, 1000, None, 0)
    joint = calm.act({**obs, "obs.opponent": np.full(len(joint), UNKNOWN)}, np.ones(len(joint), bool))[0]
    assert joint[:, 0].tolist() == greedy(inner_weights(weights), "obs.own")[:, 0].tolist()
    assert set(joint[:, -1].tolist()) == {SELF}


def test_who_is_not_in_the_pool_cannot_play():
    policy = TD3.policy(SPACES)
    policy.begin(trained().weights(), 0, None, 0)
    with pytest.raises(InvariantError, match="snapshot 999 is in play and not in the pool"):
        policy.act(shown([999]), np.zeros(1, bool))


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_member_is_the_version_that_was_published(algo: str):
    """By SHA-256, for as long as it is in the pool; and the pool turns over meanwhile, though games outlast rollouts."""
    published: dict[int, str] = {}
    sizes: set[int] = set()
    seen: set[int] = set()

    def each(k: int, learner: Any, metrics: dict[str, float]) -> None:
        weights, league = learner.weights(), league_of(learner)
        published[k + 1] = sha256(inner_weights(weights))
        sizes.add(sum(a.nbytes for a in weights.values()))
        for place in np.flatnonzero(league.versions > 0).tolist():
            member = {name: rows[place] for name, rows in league.snapshots.items()}
            assert sha256(member) == published[int(league.versions[place])]
            seen.add(int(league.versions[place]))
        assert metrics["pool_admitted"] == league.admitted

    learner = run_plain(algo, 40, degree=2, each=each)
    assert len(set(published.values())) > 5
    assert len(seen) > league_of(learner)._rules.pool + 2
    assert len(sizes) == 1, "the weights changed their size"


def test_a_place_given_away_too_soon_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """What the league waits for is needed: without it somebody in play is gone."""

    def watch(self: League, version: int, envs: Array, playing: Array) -> None:
        for place in np.flatnonzero(self._retired >= 0).tolist():
            self._empty(place)

    changes = {"admit_every": 1, "pool": 1, "bots": {}, "self_share": 0.0}
    run_plain(rollouts=40, degree=3, **changes)
    monkeypatch.setattr(League, "watch", watch)
    with pytest.raises(InvariantError, match="not in the pool"):
        run_plain(rollouts=40, degree=3, **changes)


def test_outcomes_are_counted_once():
    counted: list[float] = []
    learner = run_plain("dqn", 20, each=lambda k, learner, metrics: counted.append(metrics["games"]))
    assert counted[-1] == ENVS * (20 * STEPS // 3)
    league = league_of(learner)
    assert league.games == counted[-1]
    assert set(learner.weights()) >= {"league.odds", "league.codes", "epsilon"}


async def test_self_play_alone_learns_to_race(tmp_path: Path):
    """It has met nobody but itself and its past, and beats a player it has never seen."""
    inner = aiorl.TD3(
        hidden=(32, 32), warmup=200, random_steps=200, update_ratio=0.25, batch_size=64, capacity=20_000, noise=0.3,
        gamma=0.95,
    )  # fmt: skip
    one = config(
        tmp_path / "run", algo="td3", rollouts=100, total_steps=4_000, envs=8, group_size=4, segment_length=16,
        eval_every=4_000, eval_episodes=100, off_policy_degree=1, seed=1,
        eval_suites={"stroller": {"env_kwargs": {"opponent": "stroller"}}},
    ).replace(algo=aiorl.SelfPlay.of(inner, admit_every=5, pool=3))  # fmt: skip
    before = [random_race(seed) for seed in range(200)]
    async with aiorl.Run(one) as run:
        async for event in run:
            if isinstance(event, aiorl.Evaluated) and event.final:
                assert event.mean_return > 3 > np.mean(before) + 2
        result = await run.wait()
    assert result.status == "completed"
    told = standings(run.policy().weights, [])
    assert json.loads(json.dumps(told)) == told
    assert told["players"][0] == "learner"


def random_race(seed: int) -> float:
    """The return of somebody who acts at random against the stroller."""
    env, rng, total = games.race("stroller"), np.random.default_rng(seed), 0.0
    env.reset(seed=seed)
    while True:
        _, reward, terminated, truncated, _ = env.step(np.array([rng.uniform(-1, 1), 0, 0], np.float32))
        total += reward
        if terminated or truncated:
            return total


# -- exact, resumable, through kills -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("algo", "degree", "workers"), [("sac", 1, 2), ("dqn", 0, 0), ("ppo", 3, 0)])
@pytest.mark.usefixtures("no_leaks")
async def test_a_run_equals_the_plain_loop(tmp_path: Path, algo: str, degree: int, workers: int):
    result = await aiorl.train(config(tmp_path / "run", algo, off_policy_degree=degree, workers=workers))
    learner = run_plain(algo, result.updates, degree)
    assert result.params_sha256 == params_sha256(learner.weights())
    assert saved_learner_sha256(result.directory) == tree_sha256(learner.state_dict())


@pytest.mark.parametrize("degree", [0, 1])
async def test_a_worker_killed_in_the_middle_of_a_game_changes_nothing(tmp_path: Path, degree: int):
    one = config(tmp_path / "run", off_policy_degree=degree, rollouts=30)
    async with asyncio.timeout(120), aiorl.Run(one) as run:
        workers, learner = workers_of(run), run._session.parts.trainer.learner  # type: ignore[union-attr]
        async for event in run:
            codes = league_of(learner)._playing.reshape(-1, GROUP_SIZE)  # games last up to 20 steps, segments 8
            against_a_snapshot = np.flatnonzero(((codes > SELF) & (codes < BOTS)).any(1)).tolist()
            if event.version >= 7 and against_a_snapshot:
                kill(workers.pids[workers.worker_of(against_a_snapshot[0])])
                break
        result = await run.wait()
    assert (result.restarts, result.dropped) == (1, {})
    learner = run_plain(rollouts=result.updates, degree=degree)
    assert result.params_sha256 == params_sha256(learner.weights())
    assert saved_learner_sha256(result.directory) == tree_sha256(learner.state_dict())


@pytest.mark.parametrize(("algo", "degree"), [("td3", 0), ("dqn", 2)])
async def test_stop_and_resume_equals_one_go(tmp_path: Path, algo: str, degree: int):
    whole = await aiorl.train(config(tmp_path / "whole", algo, off_policy_degree=degree, workers=0))
    halves = config(tmp_path / "halves", algo, off_policy_degree=degree, workers=1 if degree else 0)
    async with aiorl.Run(halves) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version == 7:
                run.stop(final_evaluation=False)
    assert run.result.updates < whole.updates
    second = await aiorl.train(halves, resume=run.directory)
    assert second.params_sha256 == whole.params_sha256
    assert saved_learner_sha256(second.directory) == saved_learner_sha256(whole.directory)


@pytest.mark.usefixtures("no_leaks")
async def test_a_run_holds_no_more_as_its_pool_turns_over(tmp_path: Path):
    early, late = range(8, 13), range(53, 58)  # at one moment alone a file may be open that is just being written
    held: dict[int, dict[str, set[str]]] = {}
    admitted: dict[int, float] = {}
    one = config(tmp_path / "run", rollouts=60, algo="td3", off_policy_degree=1)
    async with aiorl.Run(one) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version in (*early, *late):
                held[event.version] = {kind: found for kind, found in belongings().items() if kind != "tasks"}
                admitted[event.version] = event.metrics["pool_admitted"]
    assert admitted[late[0]] > admitted[early[-1]] + 5
    for kind in held[late[0]]:
        first, last = (set.intersection(*(held[version][kind] for version in span)) for span in (early, late))
        assert not last - first, kind  # less it may be: what tests before left is collected meanwhile


# -- what is told ------------------------------------------------------------------------------------------------------


async def test_how_it_does_against_everybody_is_told_and_kept(tmp_path: Path):
    """An event for each new member of the pool and one at the end; the file says the same, and so do the weights."""
    told: list[aiorl.Standings] = []
    updates: dict[int, dict[str, float]] = {}
    async with aiorl.Run(config(tmp_path / "run", rollouts=60)) as run:
        async for event in run:
            if isinstance(event, aiorl.Standings):
                told.append(event)
            elif isinstance(event, aiorl.Updated):
                updates[event.version] = event.metrics
    joined = [v for v in updates if v == 1 or updates[v]["pool_admitted"] > updates[v - 1]["pool_admitted"]]
    assert [event.version for event in told] == [*joined, max(updates)]
    assert len(joined) > 5
    for event in told:
        metrics = updates[event.version]
        by_name = {one.name: one for one in event.opponents}
        assert list(by_name)[:3] == ["self", "stroller", "still"]
        assert len(by_name) > 3
        assert event.elo == pytest.approx(metrics["elo"], abs=0.05)
        for bot in ("stroller", "still"):
            assert by_name[bot].wins == pytest.approx(metrics.get(f"win_rate_{bot}"), abs=1e-3)
            assert by_name[bot].losses == pytest.approx(metrics.get(f"loss_rate_{bot}"), abs=1e-3)
    assert any(one.version and one.games for event in told for one in event.opponents), "games against snapshots"
    kept = json.loads((tmp_path / "run" / "standings.json").read_text())
    last = run.policy().weights
    assert kept == {"version": max(updates), "env_steps": 60 * STEPS * ENVS, **standings(last, ["stroller", "still"])}
    row = zip(*(kept[name][0] for name in ("wins", "ties", "losses")), strict=True)
    assert [one.games for one in told[-1].opponents] == pytest.approx([sum(counts) for counts in row])
    written = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e for e in written if e["event"] == "standings"] == [json.loads(json.dumps(event.to_dict())) for event in told]


def test_by_the_command_line_there_are_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    (tmp_path / "a.toml").write_text(config(run, rollouts=40, workers=0, eval_every=0).to_toml())
    assert train(["--config", str(tmp_path / "a.toml"), "--progress", "plain"]) == 0
    shown = capfd.readouterr()
    assert "won – lost against self " in shown.err
    assert "opponents.svg, standings.svg, standings.json" in shown.out
    for name, words in (
        ("opponents", (">stroller<", ">still<", ">pool<", ">training games won<")),
        ("standings", (">stroller<", ">learner<", ">snapshot ", ">Elo<")),
    ):
        svg = (run / f"{name}.svg").read_text(encoding="utf-8")
        assert all(word in svg for word in words), name
        (run / f"{name}.svg").unlink()
        assert plot([str(run), f"--{name}"]) == 0
        assert (run / f"{name}.svg").read_text(encoding="utf-8") == svg


# -- opponents from files ----------------------------------------------------------------------------------------------


async def test_opponents_from_files(tmp_path: Path):
    await aiorl.train(config(tmp_path / "before", rollouts=8, workers=0))
    frozen = (str(tmp_path / "before"),)
    before = aiorl.load(tmp_path / "before").weights
    learner = TD3.__class__.of(aiorl.TD3(**SMALL), **RACE, frozen=frozen).learner(SPACES, context())
    league = league_of(learner)
    assert sha256({name: rows[0] for name, rows in league.snapshots.items()}) == sha256(inner_weights(before))
    assert (league.ids.tolist(), league.versions.tolist()) == ([1, 2, 0], [-1, 0, -1])
    for changes, words in (
        ({"hidden": (9, 8)}, r"policy\.actor\.\d\.\w+: expected float32 \["),
        ({"activation": "tanh"}, r"policy\.activation: expected tanh, got relu"),
    ):
        other = aiorl.SelfPlay.of(aiorl.TD3(**{**SMALL, **changes}), frozen=frozen)
        with pytest.raises(CheckpointError, match=f"^selfplay.frozen: .*before cannot play here: {words}") as error:
            other.learner(SPACES, context())
        assert str(error.value).count("\n") <= 2
    with pytest.raises(CheckpointError, match="there is no run or checkpoint at"):
        aiorl.SelfPlay.of(aiorl.TD3(**SMALL), frozen=("nowhere",)).learner(SPACES, context())


async def test_opponents_with_a_mean_network_and_without_meet(tmp_path: Path):
    """What such an opponent plays is what it was judged by: its mean."""
    small: dict[str, Any] = {"hidden": (8,), "warmup": 32, "capacity": 500}
    for name, average in (("plain", 0.0), ("mean", 0.9)):
        algo = aiorl.SelfPlay.of(aiorl.DQN(**small, average=average))
        await aiorl.train(config(tmp_path / name, "dqn", rollouts=8, workers=0).replace(algo=algo))
    plain, mean = (inner_weights(aiorl.load(tmp_path / name).weights) for name in ("plain", "mean"))
    acting = averages(mean)
    assert acting.keys() < plain.keys()
    taken = load_opponent(str(tmp_path / "mean"), aiorl.DQN(**small), plain)
    assert taken.keys() == plain.keys()
    assert all((taken[name] == array).all() for name, array in acting.items())
    taken = load_opponent(str(tmp_path / "plain"), aiorl.DQN(**small, average=0.9), mean)
    assert taken.keys() == mean.keys()
    assert all((taken[name] == taken[AVERAGE + name]).all() for name in acting)
    assert all((taken[name] == plain[name]).all() for name in acting)
    taken = load_opponent(str(tmp_path / "mean"), aiorl.DQN(**small, average=0.5), mean)
    assert all((taken[name] == array).all() for name, array in mean.items())


@pytest.mark.parametrize("schedule", ["ordered", "eager"])
async def test_nobody_in_play_is_missed_while_the_degree_changes(tmp_path: Path, schedule: Any):
    """A policy raises if its opponent is gone; the pool of one turns over as fast as it can. All laws of runs hold."""
    algorithm = aiorl.SelfPlay.of(aiorl.TD3(**SMALL), admit_every=1, pool=1, self_share=0.0)
    one = config(tmp_path / "run", rollouts=60, off_policy_degree=0, schedule=schedule, degree_max=4)
    one = one.replace(algo=Recording.of(algorithm))
    async with asyncio.timeout(120), aiorl.Run(one) as run:
        async for event in run:
            if isinstance(event, aiorl.Updated) and event.version in (5, 15, 25, 35):
                await run.set(off_policy_degree={5: 4, 15: 1, 25: 3, 35: 0}[event.version])
            if isinstance(event, aiorl.Updated):
                metrics = event.metrics
        result = await run.wait()
    assert result.status == "completed"
    assert metrics["pool_admitted"] > 5
    check_laws(run)
