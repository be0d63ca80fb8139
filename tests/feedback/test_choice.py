from __future__ import annotations

import math

import pytest

from alignkit.feedback.writer import TokenChances, parse_choice, read_decision


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A)", "A"), ("B", "B"), (" (B) ", "B"), ("A.", "A"), ("**B**", "B"), ("Option A", "A"), ("b", "B"),
        ("The answer is: (A)", "A"), ("The answer is (B).", "B"), ("the answer is **B**, for it is kinder", "B"),
        ("(A) is rude.\nTherefore the better answer is: (B)", "B"),
        ("The answer is: (A)\nNo wait.\nThe answer is: (B)", "B"),
        ("I prefer (A) because it is short.", "A"), ("A) because it is short", "A"), ("Response B", "B"),
        ("Answer: (B)", "B"), ("[A]", "A"),
        ("", None), ("Both are fine.", None), ("(A) or (B)?", None), ("A good question!", None), ("Banana", None),
        ("The answer is: (A) or rather the answer is: (B)", None), ("As an AI I cannot say", None),
    ],
)  # fmt: skip
def test_letter_of_a_reply(text: str, letter: str | None) -> None:
    found = parse_choice(text)
    assert (found and found[0]) == letter
    if found is not None:
        assert text[found[1]].upper() == letter


def test_the_probability_comes_from_the_token_that_decides() -> None:
    tokens = [
        TokenChances("The", {"The": -0.1, "A": -9.0}),
        TokenChances(" answer is: (", {" answer is: (": -0.1}),
        TokenChances("B", {"B": math.log(0.6), "A": math.log(0.3), " A": math.log(0.05), "C": math.log(0.05)}),
        TokenChances(")", {")": -0.1}),
    ]
    verdict = read_decision("The answer is: (B)", tokens)
    assert verdict.p_first == pytest.approx(0.35 / 0.95) and verdict.mass == pytest.approx(0.95)


def test_an_option_that_is_not_listed_is_as_likely_as_the_least_that_is() -> None:
    verdict = read_decision("A", [TokenChances("A", {"A": math.log(0.9), "I": math.log(0.01)})])
    assert verdict.p_first == pytest.approx(0.9 / 0.91)


def test_without_log_probs_the_text_decides_or_abstains() -> None:
    assert read_decision("(A)", []).p_first == 1.0
    assert read_decision("(B)", []).p_first == 0.0
    assert read_decision("", []).problem == "empty reply"
    assert read_decision("hm", []).problem == "the reply names neither option, or both"


def test_a_reply_that_was_cut_before_its_verdict_is_read_by_its_first_letter_token() -> None:
    tokens = [TokenChances("A", {"A": math.log(0.7), "B": math.log(0.2)}), TokenChances(" fine", {" fine": -1.0})]
    assert read_decision("A fine answer, both", tokens).p_first == pytest.approx(0.7 / 0.9)


def test_the_mean_of_both_orders_is_clamped_and_not_each_order() -> None:
    from alignkit.feedback.judge import Label, Pairing

    pairing = Pairing("p", "a", "b", "f:1", "k")
    leaning = Label(pairing, "x", (0.46, 0.58), bounds=(0.45, 0.55))  # a judge that prefers the second place
    assert leaning.p_first == pytest.approx(0.52) and not leaning.is_tie
    assert Label(pairing, "x", (0.9, 0.7), bounds=(0.45, 0.55)).p_first == 0.55
