"""Learning at a degree above 0 against learning at 0: the exact suite in small, and the arithmetic of the whole one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aiorl import losses
from bench import learning_runs, tabular_ppo
from bench import learning_vs_degree as suite
from bench.equivalence import Estimate, iqm, iqm_difference, paired_mean, verdict
from bench.garnet import Garnets
from bench.tabular_ppo import Settings, learn, normalised_area

SMALL = Settings(updates=40)


# -- the claim, in small -----------------------------------------------------------------------------------------------


def test_corrected_learning_bears_stale_rollouts_and_uncorrected_does_not():
    processes, zero = 32, suite.exact([("decoupled", 0)], 32, SMALL)[0]
    rows = suite.exact([("decoupled", 4), ("vtrace", 4), ("none", 8)], processes, SMALL)
    found = {row.arm: paired_mean(np.array(row.areas) - zero.areas) for row in rows}
    assert np.mean(zero.areas) > 0.5  # it learns at all: 0 is where it begins, 1 the optimum
    assert found["decoupled"].low > -0.03
    assert found["vtrace"].low > -0.03
    assert found["none"].high < -0.05


def test_at_degree_0_the_arms_are_one_algorithm():
    garnets, settings = Garnets.random(3, 4), replace(SMALL, updates=6)
    plain, decoupled, vtrace = (learn(garnets, arm, 0, settings, 3) for arm in ("none", "decoupled", "vtrace"))
    np.testing.assert_allclose(plain.returns, decoupled.returns, rtol=1e-9)
    np.testing.assert_allclose(plain.returns, vtrace.returns, rtol=1e-9)
    assert plain.log_ratio_m2.max() < 1e-20


def test_rollouts_are_as_old_as_the_degree_says():
    garnets, settings = Garnets.random(3, 4), replace(SMALL, updates=6)
    learnt = learn(garnets, "decoupled", 2, settings, 3)
    assert learnt.log_ratio_m2[0] < 1e-20  # only version 0 exists
    assert (learnt.log_ratio_m2[1:] > 1e-6).all()
    early, late = (learn(garnets, "decoupled", d, settings, 3).returns for d in (5, 50))
    np.testing.assert_array_equal(early, late)  # all six rollouts were acted by version 0 either way


# -- processes with known returns --------------------------------------------------------------------------------------


def loop_of_two(stop: float, gamma: float, rewards: tuple[float, float]) -> Garnets:
    """State 0 leads to 1 and back; one action."""
    successors = np.array([1, 0]).reshape(1, 2, 1, 1)
    return Garnets(successors, np.ones((1, 2, 1, 1)), np.array(rewards).reshape(1, 2, 1), stop, gamma)


def test_exact_return_of_a_loop():
    garnets = loop_of_two(stop=0.0, gamma=0.5, rewards=(1.0, 0.0))
    np.testing.assert_allclose(garnets.values(np.ones((1, 2, 1))), [[4 / 3, 2 / 3]])
    np.testing.assert_allclose(garnets.returns(np.ones((1, 2, 1))), [1.0])
    ends = loop_of_two(stop=0.5, gamma=0.9, rewards=(1.0, 1.0))
    np.testing.assert_allclose(ends.values(np.ones((1, 2, 1))), 1 / (1 - 0.45))


def test_exact_return_is_what_sampled_episodes_earn():
    garnets, count, rng = Garnets.random(5, 2, states=6, stop=0.1), 20_000, np.random.default_rng(5)
    policy = rng.dirichlet(np.ones(4), (2, 6))
    states, alive, earned = rng.integers(6, size=(2, count)), np.ones((2, count), bool), np.zeros((2, count))
    for t in range(80):
        chosen = np.take_along_axis(policy, states[..., None], axis=1).cumsum(-1)
        actions = (rng.random((2, count, 1)) >= chosen[..., :-1]).sum(-1)
        rewards, _, ended, states = garnets.step(states, actions, rng.random((3, 2, count)))
        earned += garnets.gamma**t * rewards * alive
        alive &= ~ended
    error = earned.std(-1) / count**0.5
    assert (np.abs(earned.mean(-1) - garnets.returns(policy)) < 4 * error).all()


def test_optimum_is_the_best_of_all_policies():
    garnets = Garnets.random(7, 5, states=4, actions=2)
    policies = [np.broadcast_to(np.eye(2)[list(c)], (5, 4, 2)) for c in itertools.product((0, 1), repeat=4)]
    np.testing.assert_allclose(garnets.returns(garnets.optimal()), np.max([garnets.returns(p) for p in policies], axis=0))


def test_area_counts_from_the_first_version_to_the_best_policy():
    garnets = Garnets.random(7, 3)
    uniform, best = (garnets.returns(p) for p in (np.full((3, 30, 4), 0.25), garnets.optimal()))
    assert normalised_area(garnets, np.stack([uniform, best])) == pytest.approx([0.5] * 3)


def test_gradient_is_that_of_the_library_losses():
    rng, n = torch.Generator().manual_seed(1), 12
    logits, values = torch.randn(1, 5, 3, generator=rng).double(), torch.randn(1, 5, generator=rng).double()
    states, actions = (torch.randint(high, (1, n), generator=rng) for high in (5, 3))
    old, weight, advantages, targets = (torch.randn(1, n, generator=rng).double() for _ in range(4))
    old = logits.log_softmax(-1)[0, states[0], actions[0]][None] + 0.2 * old
    batch = [states, actions, old, weight.exp(), advantages, targets]
    policy, critic = (x.clone().requires_grad_() for x in (logits, values))
    log_ratio = policy.log_softmax(-1)[0, states[0], actions[0]] - old[0]
    loss, _ = losses.clipped_surrogate(log_ratio, losses.standardise(advantages[0]), 0.2, weight[0].exp())
    (loss + 0.5 * losses.value_loss(critic[0, states[0]], targets[0])[0]).backward()
    adam = torch.optim.Adam([logits, values])
    tabular_ppo._step((logits, values), adam, batch, replace(SMALL, max_grad_norm=1e9))
    torch.testing.assert_close(logits.grad, policy.grad)
    torch.testing.assert_close(values.grad, critic.grad)


# -- statistics --------------------------------------------------------------------------------------------------------


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([-1000.0, 0, 2, 3, 4, 5, 6, 1000])) == 3.5
    np.testing.assert_array_equal(iqm(np.arange(16.0).reshape(2, 8)), [3.5, 11.5])


def test_intervals_of_constants_have_no_width():
    assert paired_mean([0.25] * 9) == (0.25, 0.25, 0.25)
    scores, reference = [[1.0] * 8, [10.0] * 8], [[0.0] * 8, [4.0] * 8]
    # Drawn within each task: a bootstrap over all runs together would vary, as the tasks differ.
    assert iqm_difference(scores, reference) == (3.5, 3.5, 3.5)


def test_interval_of_paired_differences_is_that_of_the_mean():
    x = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = paired_mean(x)
    error = x.std(ddof=1) / 20
    assert found.value == x.mean()
    assert (found.low, found.high) == pytest.approx((x.mean() - 1.96 * error, x.mean() + 1.96 * error), abs=0.15 * error)


@pytest.mark.parametrize(
    ("low", "high", "judged"),
    [(-0.04, 0.04, "equivalent"), (-0.04, 0.06, "not worse"), (-0.06, 0.04, "undecided"), (-0.2, -0.06, "worse")],
)
def test_equality_is_claimed_only_within_the_margin(low: float, high: float, judged: str):
    assert verdict(Estimate(0.0, low, high), 0.05) == judged


# -- real tasks --------------------------------------------------------------------------------------------------------


def test_scores_of_a_row():
    row = {"env": "CartPole-v1", "evaluations": [[0, 22], [10, 475], [30, 475]], "final_return": 475, "means": {}}
    assert learning_runs.final_score(row) == 1.0
    assert learning_runs.area_score(row) == pytest.approx((0.5 * 10 + 20) / 30)
    assert learning_runs.rms_log_ratio({"means": {"log_ratio_m2": 0.04}}) == pytest.approx(0.2)


def test_a_run_gives_the_same_row_again(no_leaks: None):
    job = learning_runs.Job(learning_runs.TASKS[0]._replace(env_steps=20_480), degree=2, seed=1)
    first, again = learning_runs.carry_out(job), learning_runs.carry_out(job)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert len(first["evaluations"]) == learning_runs.EVALUATIONS
    assert first["evaluations"][-1][0] == first["env_steps"]
    assert first["means"]["log_ratio_m2"] > 0


def test_runs_that_are_stored_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning_runs, "carry_out", None)  # nothing is left to do
    path = tmp_path / "rows.json"
    rows = [{"env": "Acrobot-v1", "degree": d, "seed": s} for s in (1, 0) for d in (0, 1)]
    learning_runs.write_rows(path, rows)
    learning_runs.run_missing(path, degrees=[0, 1], seeds=2, processes=1, envs=["Acrobot-v1"])
    assert [(row["degree"], row["seed"]) for row in learning_runs.load_rows(path)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert learning_runs.load_rows(tmp_path / "none.json") == []


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_stored_exact_results_are_whole_and_meet_the_claims():
    rows = [suite.ExactRow(**row) for row in learning_runs.load_rows(suite.EXACT)]
    assert {(row.arm, row.degree) for row in rows} == set(itertools.product(suite.ARMS, suite.EXACT_DEGREES))
    assert all(len(row.areas) == suite.PROCESSES for row in rows)
    assert all(suite.exact_claims(suite.exact_differences(rows)).values())


def test_stored_real_results_are_whole():
    seen = [(row["env"], row["degree"], row["seed"]) for row in learning_runs.load_rows(suite.REAL)]
    envs = [task.env for task in learning_runs.TASKS]
    assert sorted(seen) == sorted(itertools.product(envs, suite.REAL_DEGREES, range(suite.SEEDS)))
