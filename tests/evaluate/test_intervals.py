"""Intervals against published and hand-worked values, and their coverage where there is no formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignkit.evaluate.context import (
    Figure,
    bootstrap,
    compare_rows,
    divide,
    make_figure,
    mean,
    mean_of_groups,
    share,
    wilson,
)
from alignkit.evaluate.metrics.win_rate import control_length


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # R: binom.confint(8, 10, methods = "wilson")
        (0, 10, 0.0, 0.2775328),  # z^2 / (n + z^2)
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilson_gives_the_known_interval(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert (found.value, found.n, found.interval) == (successes / n, n, "wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_nothing_and_one_row_have_no_interval() -> None:
    assert wilson(0, 0).value is None
    assert mean([]).value is None
    one = mean([3.0])
    assert (one.value, one.low, one.high, one.n, one.interval) == (3.0, None, None, 1, "none")


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=2000)
    found = mean(values.tolist())
    half = 1.96 * values.std() / len(values) ** 0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def _covers(found: Figure, truth: float) -> bool:
    assert found.low is not None and found.high is not None
    return found.low <= truth <= found.high


def test_the_bootstrap_covers_a_ratio_and_a_skewed_mean_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(3), 0
    for _ in range(300):
        sizes = random.integers(1, 30, size=60)
        sums = [(float(random.poisson(2.0 * size)), float(size)) for size in sizes]
        covered += _covers(bootstrap(sums, divide, resamples=300), 2.0)
    assert 0.90 <= covered / 300 <= 0.98
    random, covered = np.random.default_rng(7), 0
    for _ in range(400):
        covered += _covers(mean(random.exponential(2.0, size=50).tolist(), resamples=300), 2.0)
    assert 0.89 <= covered / 400 <= 0.97  # the percentile bootstrap is known to be a little short for such rows


@pytest.mark.parametrize("truth", [0.1, 0.3, 0.5, 0.85])
def test_wilson_covers_a_share_of_fifty_rows(truth: float) -> None:
    """Exactly, by the binomial distribution."""
    covered = 0.0
    for wins in range(51):
        if _covers(wilson(wins, 50), truth):
            covered += math.comb(50, wins) * truth**wins * (1 - truth) ** (50 - wins)
    assert 0.93 <= covered <= 0.98


def test_length_control_covers_the_truth_of_fifty_rows() -> None:
    random, covered, trials, truth = np.random.default_rng(11), 0, 40, 1 / (1 + math.exp(-0.5))
    for _ in range(trials):
        difference = random.normal(10, 40, size=50)
        chance = 1 / (1 + np.exp(-0.5 - 0.8 * np.tanh(difference / 40)))
        wins = (random.random(50) < chance).astype(float)
        lengths = [(int(500 + each), 500) for each in difference]
        covered += _covers(control_length(wins.tolist(), lengths), truth)
    assert covered / trials >= 0.86


def test_answers_to_one_prompt_are_drawn_together() -> None:
    random = np.random.default_rng(0)
    groups = [[value] * 8 for value in random.normal(size=50)]
    together = mean_of_groups(groups)
    apart = mean([value for group in groups for value in group])
    assert together.n == 50 and apart.n == 400
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 2 * (apart.high - apart.low)  # type: ignore[operator]


def test_a_share_takes_wilson_only_for_single_outcomes() -> None:
    assert share([[1.0], [0.0], [0.5]]) == wilson(1.5, 3)
    assert share([[1.0, 0.0], [1.0]]).interval == "bootstrap"
    assert share([[0.3], [0.9]]).interval == "bootstrap"


def test_the_same_rows_give_the_same_interval() -> None:
    assert mean([1.0, 2.0, 5.0]) == mean([1.0, 2.0, 5.0])


def test_a_paired_difference_is_over_rows_and_narrower_than_two_intervals() -> None:
    noise = np.random.default_rng(5).normal(0.0, 3.0, size=400)
    before, after = make_figure("r", mean(noise.tolist())), make_figure("r", mean((noise + 0.1).tolist()))
    change = compare_rows(after, before, "sft").change
    assert change is not None and (change["start"], change["rose"], change["fell"]) == ("sft", 400, 0)
    assert (change["value"], change["low"], change["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert before.low is not None and after.high is not None and before.low < after.high - 0.3  # alone they overlap
    # Shares with one outcome a row: 1, 1, 0 against 0, 1, 1.
    one, other = (make_figure("s", share([[each] for each in found])) for found in ([1, 1, 0], [0, 1, 1]))
    found = compare_rows(one, other, "sft").change
    assert found is not None and (found["value"], found["rose"], found["fell"]) == (0.0, 1, 1)
    fewer = make_figure("r", mean([1.0, 2.0]))
    assert compare_rows(after, fewer, "sft").change is None and compare_rows(after, None, "sft").change is None
    assert "change" not in before.to_dict() and "sums" not in before.to_dict()
