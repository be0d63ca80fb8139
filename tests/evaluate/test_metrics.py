"""Every metric against values worked out by hand or by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from alignkit.data import Row
from alignkit.evaluate.metrics.best_of import best_of_kl, expected_best, measure_best_of
from alignkit.evaluate.metrics.kl import measure_kl
from alignkit.evaluate.metrics.overlap import measure_bleu, measure_rouge
from alignkit.evaluate.metrics.pairs import (
    Pair,
    list_pairs,
    measure_accuracy,
    measure_calibration,
    measure_length_baselines,
)
from alignkit.evaluate.metrics.perplexity import measure_perplexity
from alignkit.evaluate.metrics.win_rate import control_length, measure_win_rate
from alignkit.evaluate.policy import Likelihood

RESAMPLES = 200


def test_perplexity_and_bits_per_byte_of_known_likelihoods() -> None:
    # 10 tokens at 1/4 and 20 at 1/2: (20 ln 2 + 20 ln 2) / 30 nats a token; 40 bits over 50 bytes.
    rows = [Likelihood(10 * math.log(1 / 4), 10, 30), Likelihood(20 * math.log(1 / 2), 20, 20)]
    perplexity, bits = measure_perplexity(rows, resamples=RESAMPLES)
    assert perplexity.value == pytest.approx(2 ** (40 / 30))
    assert bits.value == pytest.approx(40 / 50)
    assert (perplexity.n, perplexity.better, perplexity.interval) == (2, "lower", "bootstrap")
    assert perplexity.low == pytest.approx(2.0) and perplexity.high == pytest.approx(4.0)  # one row drawn twice


def _pairs(*texts: tuple[str, str]) -> list[Pair]:
    return [Pair("p", chosen, rejected, number) for number, (chosen, rejected) in enumerate(texts)]


def test_pair_accuracy_and_its_slices_by_hand() -> None:
    pairs = _pairs(("long", "s"), ("long", "s"), ("s", "long"), ("s", "long"), ("abc", "abd"), ("abc", "abd"))
    figures = measure_accuracy("reward_accuracy", pairs, [2.0, -1.0, 1.0, 3.0, 0.0, 0.5], resamples=RESAMPLES)
    by_slice = {figure.slice: (figure.value, figure.n) for figure in figures}
    assert by_slice[None] == (4.5 / 6, 6)  # a tie counts one half
    assert by_slice["chosen longer"] == (0.5, 2)
    assert by_slice["chosen shorter"] == (1.0, 2)
    assert by_slice["equal length"] == (0.75, 2)
    assert figures[0].interval == "wilson"
    longer, shorter = measure_length_baselines(pairs, resamples=RESAMPLES)
    assert (longer.value, shorter.value) == (0.5, 0.5)


def test_margins_are_cut_into_quarters_the_least_sure_first() -> None:
    pairs = _pairs(*[("a", "b")] * 8)
    figures = measure_accuracy("m", pairs, [0.1, -0.2, 1, 1.1, -2, 2.1, 3, 3.1], resamples=RESAMPLES)
    slices = [(figure.slice, figure.value) for figure in figures[1:] if (figure.slice or "").startswith("margin")]
    assert slices == [
        ("margin 0.1 to 0.2", 0.5), ("margin 1 to 1.1", 1.0), ("margin 2 to 2.1", 0.5), ("margin 3 to 3.1", 1.0),
    ]  # fmt: skip


def test_ranked_lists_and_soft_labels_become_pairs() -> None:
    ranked = Row("ranked", "q", ("a", "b", "c"), scores=(2.0, 1.0, 1.0))
    soft = Row("pair", "q", ("x", "y"), label=0.2)
    even = Row("pair", "q", ("x", "y"), label=0.5)
    pairs = list_pairs([ranked, soft, even])
    assert [(pair.chosen, pair.rejected, pair.group) for pair in pairs] == [("a", "b", 0), ("a", "c", 0), ("y", "x", 1)]


def test_pairs_of_one_list_are_not_counted_as_independent() -> None:
    pairs = list_pairs([Row("ranked", "q", ("a", "b", "c"), scores=(3.0, 2.0, 1.0))] * 10)
    whole = measure_accuracy("m", pairs, [1.0] * len(pairs), resamples=RESAMPLES)[0]
    assert (whole.n, whole.interval) == (10, "bootstrap")


def test_calibration_error_by_hand() -> None:
    three = math.log(3)  # confidence 0.75
    calibrated = measure_calibration([three, three, three, -three], [0, 1, 2, 3], resamples=RESAMPLES)[0]
    assert calibrated.value == pytest.approx(0.0, abs=1e-12)
    sure = measure_calibration([three] * 4, [0, 1, 2, 3], resamples=RESAMPLES)[0]
    assert sure.value == pytest.approx(0.25)
    assert sure.details is not None
    (full,) = [row for row in sure.details if row["n"]]
    assert (full["low"], full["high"], full["n"], full["accuracy"]) == (0.75, 0.8, 4, 1.0)
    # Two bins: half the pairs at confidence 0.5 (tied), half at almost 1 and all wrong.
    mixed = measure_calibration([0.0, 0.0, -50.0, -50.0], [0, 1, 2, 3], resamples=RESAMPLES)[0]
    assert mixed.value == pytest.approx(0.5)


def test_kl_is_the_mean_log_ratio_over_answers() -> None:
    (figure,) = measure_kl([[-1.0, -2.0], [-3.0]], [[-2.0, -2.5], [-3.0]], resamples=RESAMPLES)
    assert (figure.value, figure.n, figure.better, figure.unit) == (pytest.approx(0.5), 2, None, "nats per answer")


def test_rouge_and_bleu_by_hand() -> None:
    figures = {figure.metric: figure for figure in measure_rouge(["the cat sat"], ["the cat ran off"], resamples=100)}
    assert figures["rouge1"].value == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert figures["rouge2"].value == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert figures["rougeL"].value == pytest.approx(figures["rouge1"].value)
    same = ["a small cat sat on the mat"] * 3
    bleu, chrf = measure_bleu(same, same, resamples=100)
    assert (bleu.value, chrf.value) == pytest.approx((100.0, 100.0))
    assert all(type(value) is float for figure in (bleu, chrf) for value in (figure.low, figure.high))
    assert "nrefs:1" in bleu.settings["signature"] and "bs:" not in bleu.settings["signature"]


def test_chrf_and_bleu_of_other_words_by_hand() -> None:
    # Characters 2 of 3 right, pairs 1 of 2, triples 0 of 1, longer n-grams in neither; precision and recall are equal.
    chrf = measure_bleu(["abc"], ["abd"], resamples=100)[1]
    assert chrf.value == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert (chrf.low, chrf.high, chrf.interval) == (None, None, "none")
    # 6 of 6 words, 4 of 5 pairs, 2 of 4 triples, 1 of 3 fours; 6 words for 7: brevity exp(1 - 7 / 6).
    bleu = measure_bleu(["the cat sat on a mat"], ["the cat sat on mat a mat"], resamples=100)[0]
    right = (6 / 6) * (4 / 5) * (2 / 4) * (1 / 3)
    assert bleu.value == pytest.approx(100 * right**0.25 * math.exp(1 - 7 / 6))


def test_a_missing_scorer_is_one_line_with_its_remedy(run_code: Callable) -> None:
    done = run_code(
        "import sys; sys.modules['sacrebleu'] = None\n"
        "from alignkit.evaluate.metrics.overlap import measure_bleu\n"
        "from alignkit.errors import EnvironmentProblem\n"
        "try: measure_bleu(['a'], ['a'], resamples=100)\n"
        "except EnvironmentProblem as error: print(error)"
    )
    assert done.stdout == (
        "sacrebleu is not installed; pip install 'alignkit[eval]', or leave the metric overlap out\n"
    )


def test_best_of_n_equals_the_mean_over_all_subsets() -> None:
    scores, gold = [0.3, 2.0, -1.0, 0.5, 1.0], [5.0, 1.0, 2.0, 4.0, 3.0]
    for number in (1, 2, 3, 5):
        best = [max(subset, key=lambda place: scores[place]) for subset in itertools.combinations(range(5), number)]
        assert expected_best(number, scores, gold) == pytest.approx(np.mean([gold[place] for place in best]))
        assert expected_best(number, scores, scores) == pytest.approx(np.mean([scores[place] for place in best]))
    assert expected_best(2, [1.0, 1.0], [10.0, 20.0]) == pytest.approx(15.0)  # tied answers share their ranks


def test_best_of_n_figures_carry_the_bound_of_their_kl() -> None:
    figures = measure_best_of([1, 4], [[1.0, 2, 3, 4]] * 3, {"true_reward": [[4.0, 3, 2, 1]] * 3}, resamples=100)
    assert [(figure.metric, figure.slice, figure.value) for figure in figures] == [
        ("best_of_n", "N=1", 2.5), ("best_of_n_true_reward", "N=1", 2.5),
        ("best_of_n", "N=4", 4.0), ("best_of_n_true_reward", "N=4", 1.0),
    ]  # fmt: skip
    assert best_of_kl(1) == 0.0
    assert figures[2].settings["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)


class _Biased:
    """A judge that prefers whatever stands first nine times out of ten."""

    name, settings, report = "biased", {}, {}  # type: ignore[var-annotated]

    def compare(self, prompts: list, firsts: list, seconds: list) -> list[tuple[float, float]]:
        return [(0.9, 1 - 0.9)] * len(prompts)


def test_asking_both_orders_takes_a_judge_s_bias_out() -> None:
    figures = measure_win_rate(_Biased(), ["p"] * 6, ["a"] * 6, ["b"] * 6, resamples=RESAMPLES)
    values = {(figure.metric, figure.slice): figure.value for figure in figures}
    assert values[("win_rate", None)] == pytest.approx(0.5)
    assert values[("win_rate", "ours first")] == pytest.approx(0.9)
    assert values[("win_rate", "ours second")] == pytest.approx(0.1)
    assert values[("judge_agreement", None)] == 0.0


def test_length_control_removes_a_preference_for_length() -> None:
    random = np.random.default_rng(5)
    lengths = [(int(100 + difference), 100) for difference in random.normal(20, 40, size=600)]
    by_length = [float(random.random() < 1 / (1 + math.exp(-(a - b) / 15))) for a, b in lengths]
    raw = sum(by_length) / len(by_length)
    controlled = control_length(by_length, lengths)
    assert raw > 0.6 and controlled.value == pytest.approx(0.5, abs=0.06)
    assert controlled.low is not None and controlled.high is not None and controlled.low < 0.5 < controlled.high
    # Where length explains nothing, nothing changes.
    fair = [float(value) for value in random.random(600) < 0.7]
    assert control_length(fair, lengths).value == pytest.approx(sum(fair) / 600, abs=0.05)


def test_length_control_stays_finite_when_length_separates_the_wins() -> None:
    found = control_length([1.0] * 10 + [0.0] * 10, [(2, 1)] * 10 + [(1, 2)] * 10)
    assert found.value == pytest.approx(0.5, abs=0.01)
