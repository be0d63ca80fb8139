"""The optimum of reward against KL, beside a reference whose optimum is known exactly: a categorical distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from alignkit.evaluate.metrics.best_of import best_of_kl, expected_best, measure_best_of_kl, tied_kl
from alignkit.evaluate.metrics.frontier import MIN_EFFECTIVE, measure_optimum, reweight

Floats = NDArray[np.float64]
SHARES = np.array([0.5, 0.3, 0.15, 0.04, 0.01])  # of each answer under the reference
REWARDS = np.array([-1.0, -0.25, 0.25, 0.75, 1.0])


def exact(beta: float) -> tuple[float, float, float]:
    """Return reward, KL and value of the optimum of the categorical reference, as the formula has them."""
    policy = SHARES * np.exp(REWARDS / beta)
    policy /= policy.sum()
    reward, kl = float(policy @ REWARDS), float(policy @ np.log(policy / SHARES))
    return reward, kl, beta * math.log(float(SHARES @ np.exp(REWARDS / beta)))


def in_proportion(number: int) -> list[float]:
    """Return answers of the reference in exactly its shares."""
    return np.repeat(REWARDS, np.round(SHARES * number).astype(int)).tolist()


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3, 0.1, 0.01])
def test_answers_in_exact_shares_give_the_exact_optimum(beta: float) -> None:
    found = reweight([in_proportion(1000)], beta)
    reward, kl, value = exact(beta)
    assert found.reward[0] == pytest.approx(reward, abs=1e-12)
    assert found.kl[0] == pytest.approx(kl, abs=1e-10)
    assert found.value[0] == pytest.approx(value, abs=1e-12)
    assert value == pytest.approx(reward - beta * kl, abs=1e-12)


def test_two_answers_by_hand() -> None:
    # Rewards 0 and ln 3 at beta 1: weights 1 and 3, so shares 1/4 and 3/4; Z = 2.
    found = reweight([[0.0, math.log(3)]], 1.0)
    assert found.reward[0] == pytest.approx(0.75 * math.log(3))
    assert found.kl[0] == pytest.approx(0.75 * math.log(3) - math.log(2))
    assert found.kl[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found.effective[0] == pytest.approx(16 / 10)


def test_sampled_answers_give_it_within_the_interval() -> None:
    random = np.random.default_rng(0)
    scores = [random.choice(REWARDS, size=512, p=SHARES).tolist() for _ in range(64)]
    betas = [1.0, 0.5, 0.3]
    figures, warnings = measure_optimum(betas, scores, resamples=500)
    found = {(figure.metric, figure.slice): figure for figure in figures}
    assert warnings == []
    for beta in betas:
        for metric, truth in zip(("optimum_reward", "optimum_kl"), exact(beta), strict=False):
            figure = found[metric, f"beta={beta:g}"]
            assert figure.low is not None and figure.high is not None and figure.value is not None
            assert figure.high - figure.low < 0.1
            # Half an interval more on either side: ten 95 % intervals rarely all hold the truth.
            room = (figure.high - figure.low) / 2
            assert figure.low - room <= truth <= figure.high + room
    start = found["reference_reward", None]
    assert start.value == pytest.approx(SHARES @ REWARDS, abs=0.01)
    for at in start.details or []:
        assert at["value"] == pytest.approx(at["reward"] - at["beta"] * at["kl"], abs=1e-9)
        assert at["value"] == pytest.approx(exact(at["beta"])[2], abs=0.02)


def test_no_policy_has_more_of_the_objective() -> None:
    random = np.random.default_rng(1)
    policies = random.dirichlet(np.full(5, 0.5), size=2000)
    rewards, kls = policies @ REWARDS, (policies * np.log(policies / SHARES + 1e-300)).sum(axis=1)
    for beta in (3.0, 1.0, 0.3, 0.1, 0.03):
        (value,) = reweight([in_proportion(1000)], beta).value
        assert np.all(rewards - beta * kls <= value + 1e-9)
        assert np.any(rewards - beta * kls > value - 0.3)  # and it is not far above all of them


def test_every_prompt_has_its_own_optimum() -> None:
    # A prompt whose answers are all bad must not lend its share to a prompt whose answers are good.
    bad, good = [-1.0] * 50, [1.0] * 50
    apart = reweight([bad, good], 0.1)
    assert apart.reward.mean() == 0.0
    assert apart.kl.tolist() == [pytest.approx(0.0), pytest.approx(0.0)]
    pooled = reweight([bad + good], 0.1)
    assert pooled.reward[0] == pytest.approx(1.0)  # what no policy of these prompts can do


def test_a_beta_with_few_effective_answers_is_left_out_and_said() -> None:
    scores = np.random.default_rng(2).normal(size=(20, 100)).tolist()
    figures, (warning,) = measure_optimum([1.0, 0.01], scores, resamples=100)
    assert [figure.slice for figure in figures if figure.slice] == ["beta=1", "beta=1"]
    assert "beta 0.01 (1." in warning and "evaluate.frontier.answers" in warning
    curve = figures[0].details or []
    assert min(at["effective"] for at in curve) >= MIN_EFFECTIVE
    assert [at["beta"] for at in curve] == sorted((at["beta"] for at in curve), reverse=True)


def test_huge_rewards_do_not_overflow() -> None:
    found = reweight([[1e6, 0.0, -1e6]], 1e-3)
    assert (found.reward[0], found.effective[0]) == (1e6, 1.0)
    assert found.kl[0] == pytest.approx(math.log(3), rel=1e-4)


def test_the_kl_of_the_best_of_n_by_brute_force() -> None:
    # Three answers, rewards 0, 0, 1; two drawn of them: (0, 0), (0, 1), (0, 1), so the 1 is best twice in three times.
    assert tied_kl(2, [0.0, 0.0, 1.0]) == pytest.approx(1 / 3 * math.log(1 / 2) + 2 / 3 * math.log(2))
    assert tied_kl(7, [0.5] * 20) == 0.0  # nothing to pick
    assert tied_kl(1, [0.1, 0.2, 0.3, 0.3]) == pytest.approx(0.0)
    with_ties, (figure,) = in_proportion(1000), measure_best_of_kl([8], [in_proportion(1000)] * 2, resamples=100)
    assert figure.value == pytest.approx(tied_kl(8, with_ties))
    assert tied_kl(8, with_ties) < best_of_kl(8)
    different = np.random.default_rng(3).normal(size=2000).tolist()
    assert tied_kl(16, different) == pytest.approx(best_of_kl(16), abs=0.01)


@pytest.mark.parametrize("number", [2, 4, 16, 64])
def test_the_best_of_n_stays_below_the_optimum_at_its_kl(number: int) -> None:
    scores = in_proportion(1000)
    reward, kl = expected_best(number, scores, scores), tied_kl(number, scores)
    values = [reweight([scores], beta).value[0] + beta * kl for beta in np.geomspace(0.01, 10, 200)]
    assert reward <= min(values) + 1e-9
    assert reward > min(values) - 0.2
