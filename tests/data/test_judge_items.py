"""What a judge of the toy world learns from is what the feedback room asks: the same words in the same layout."""

from __future__ import annotations

from collections import Counter

import pytest

from alignkit.data import true_reward
from alignkit.data.builtin import COMPARISONS, iter_builtin, parse_builtin
from alignkit.data.rows import Message
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.prompts import Comparison, ask_comparison
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS


def items(split: str = "train", rows: int = 200) -> list[dict]:
    return [record for _, record in iter_builtin(parse_builtin(f"builtin:judge-items?rows={rows}", split=split))]


def read(item: dict) -> Comparison:
    """Take an item apart again."""
    text = item["prompt"][0]["content"]
    before, _, options = text.partition(" Options:\n (A) [[[")
    first, _, second = options.removesuffix("]]]").partition("]]]\n (B) [[[")
    conversation, question = before.split("\n\n\n")
    asked = conversation.removeprefix(
        "Consider the following conversation between a human and an assistant:\n\nHuman: "
    )
    return Comparison((Message(role="user", content=asked),), first, second, question)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_item_is_asked_as_a_judge_is(split: str) -> None:
    for item in items(split):
        request = ask_comparison(read(item), (), str)
        assert request.messages == tuple(item["prompt"])
        assert item["completion"][0]["content"] in (f"{request.prefill} (A)", f"{request.prefill} (B)")


def test_the_answer_is_the_review_with_the_higher_true_reward_and_stands_in_either_place() -> None:
    places = Counter()
    for item in items():
        compared = read(item)
        right = "(A)" if true_reward(compared.first) > true_reward(compared.second) else "(B)"
        assert item["completion"][0]["content"].endswith(right)
        places[right] += 1
    assert 0.4 < places["(A)"] / 200 < 0.6


def test_the_questions_are_the_constitution_s() -> None:
    found = load_constitution("builtin:positive-reviews", needs="comparison").principles
    assert tuple(principle.comparison for principle in found) == COMPARISONS
    assert {read(item).question for item in items()} == set(COMPARISONS)


def test_the_recipe_knows_every_constitution_that_ships() -> None:
    for name in BUILTIN_CONSTITUTIONS:
        assert load_constitution(name).principles
