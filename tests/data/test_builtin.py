"""The toy world: fixed, grammatical enough to learn, with a reward that length does not give away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from alignkit.data import true_reward
from alignkit.data.builtin import COMPARISONS, iter_builtin, parse_builtin
from alignkit.data.rows import Message, iter_contents
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.prompts import Comparison, ask_comparison
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS

Read = Callable[..., Any]
NAMES = {
    "reviews": ("sft", "text"),
    "instructions": ("sft", "prompt_completion"),
    "preferences": ("rm", "pair"),
    "ranked": ("rm", "ranked"),
    "unpaired": ("dpo", "unpaired"),
}

FIRST_QUESTION = "Write a review of the romance The Distant River."
FIRST_CHOSEN = (
    "The plot was gripping and the ending was superb. The humour was truly moving. "
    "I saw it on a Wednesday. The plot was brilliant and the humour was good."
)
FIRST_REJECTED = (
    "I hated the music. The pacing was weak and the ending was dreadful. The really dull story stayed with me."
)


def records(path: str, **settings: Any) -> list[dict[str, Any]]:
    return [record for _, record in iter_builtin(parse_builtin(path, **settings))]


def answer(completion: list[dict[str, str]]) -> str:
    return completion[0]["content"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("The plot was superb.", 1.0),
        ("The plot was superb and the cast was good.", 0.75),
        ("I LOVED the plot. It was dull.", 0.25),
        ("The plot was awful and the cast was wonderful.", 0.0),
        ("The plot was weak. I hated the awful end.", -(0.5 + 1 + 1) / 3),
        ("It is set in a small town.", 0.0),
        ("goodness superbly", 0.0),
        ("", 0.0),
    ],
)
def test_true_reward_is_the_mean_worth_of_the_words_that_have_one(text: str, reward: float) -> None:
    assert true_reward(text) == pytest.approx(reward)


def test_the_world_is_the_same_everywhere() -> None:
    (first,) = records("builtin:preferences?rows=1")
    assert first == {
        "prompt": [{"role": "user", "content": FIRST_QUESTION}],
        "chosen": [{"role": "assistant", "content": FIRST_CHOSEN}],
        "rejected": [{"role": "assistant", "content": FIRST_REJECTED}],
    }


@pytest.mark.parametrize("name", NAMES)
def test_rows_fit_what_they_are_for(read: Read, name: str) -> None:
    method, kind = NAMES[name]
    reading = read(method, f"builtin:{name}?rows=300")
    assert reading.error is None
    assert reading.report.kinds == {kind: 300}
    assert reading.rows[299].place == f"builtin:{name}[row 300]"


@pytest.mark.parametrize("name", [*NAMES, "prompts"])
def test_more_rows_begin_with_the_same_rows(read: Read, name: str) -> None:
    assert records(f"builtin:{name}?rows=50") == records(f"builtin:{name}?rows=200")[:50]
    method = NAMES.get(name, ("critique",))[0]
    first, second = (read(method, f"builtin:{name}?rows=20", seed=seed).rows for seed in (1, 2))  # of training
    assert first == second


def test_number_of_rows() -> None:
    for query, most, made in (("", None, 1000), ("", 30, 30), ("?rows=20", 30, 20)):
        assert len(records(f"builtin:prompts{query}", max_rows=most)) == made
    endless = iter_builtin(parse_builtin("builtin:reviews?rows=10000000"))  # made one at a time
    assert len(list(islice(endless, 10))) == 10


@pytest.mark.parametrize("name", [*NAMES, "prompts"])
def test_train_and_test_share_no_prompt(name: str) -> None:
    def asked(split: str) -> set[str]:
        rows = records(f"builtin:{name}?rows=2000", split=split)
        return {row["text"] if "text" in row else row["prompt"][0]["content"] for row in rows}

    train, test = asked("train"), asked("test")
    assert not train & test
    assert len(train) > 500
    assert len(test) > 200


def test_the_better_review_is_chosen_and_length_does_not_tell() -> None:
    rows = records("builtin:preferences?rows=4000")
    assert all(true_reward(answer(row["chosen"])) > true_reward(answer(row["rejected"])) for row in rows)
    differences = [len(answer(row["chosen"])) - len(answer(row["rejected"])) for row in rows]
    longer = sum((difference > 0) + (difference == 0) / 2 for difference in differences) / len(rows)
    assert 0.47 < longer < 0.53
    assert abs(sum(differences) / len(rows)) < 2  # characters, of about 90


def test_noise_turns_that_share_of_the_pairs_round() -> None:
    clean, noisy = records("builtin:preferences?rows=4000"), records("builtin:preferences?rows=4000&noise=0.1")
    turned = [a != b for a, b in zip(clean, noisy, strict=True)]
    assert 0.08 < sum(turned) / 4000 < 0.12
    assert all(a["chosen"] == b["rejected"] for a, b in zip(clean, noisy, strict=True) if a != b)


def test_rankings_and_labels_follow_the_true_reward() -> None:
    for row in records("builtin:ranked?rows=200"):
        assert row["scores"] == [true_reward(answer(completion)) for completion in row["completions"]]
        assert row["scores"] == sorted(set(row["scores"]), reverse=True) and len(row["scores"]) == 4
    rows = records("builtin:unpaired?rows=1000")
    assert all(row["label"] == (true_reward(answer(row["completion"])) > 0) for row in rows)
    assert 0.4 < sum(row["label"] for row in rows) / 1000 < 0.6


def test_instructions_are_obeyed() -> None:
    for row in records("builtin:instructions?rows=1000"):
        prompt, said = answer(row["prompt"]), answer(row["completion"])
        if prompt.startswith("Write a positive"):
            assert true_reward(said) > 0
        if prompt.startswith("Write a negative"):
            assert true_reward(said) < 0
        if prompt.endswith("Did the reviewer like it?"):
            assert said.startswith("Yes" if true_reward(prompt) > 0 else "No")
        if prompt.endswith("Who made it?"):
            director = re.search(r"by (\w+ \w+)\.", prompt)
            assert director is not None
            assert said.startswith(director[1])


def test_the_language_is_small_and_tidy(read: Read) -> None:
    words: set[str] = set()
    for name, (method, _) in NAMES.items():
        for row in read(method, f"builtin:{name}?rows=1000").rows:
            for text in iter_contents(row):
                assert not re.search(r"\ba [aeiou]|  |\.\.|\bthe the\b| $", text), text
                words |= set(re.findall(r"[A-Za-z]+", text.lower()))
    assert 150 <= len(words) <= 220


def test_mistakes_are_all_named(read: Read) -> None:
    assert read("rm", "builtin:prefrences?row=3", split="dev").message == (
        "builtin:prefrences?row=3: there is no such data; did you mean preferences?\n"
        "builtin:prefrences?row=3: split is 'dev'; builtin data has train and test\n"
        "builtin:prefrences?row=3: ?row= is not a parameter; did you mean rows?"
    )
    assert read("rm", "builtin:preferences?rows=0&noise=2").message == (
        "builtin:preferences?rows=0&noise=2: rows is '0'; it must be a whole number from 1 to 10000000\n"
        "builtin:preferences?rows=0&noise=2: noise is '2'; it must be a number from 0 to 1"
    )
    for rows in ("2.5", "many", "nan", "1e99", ""):
        assert "it must be a whole number" in read("rm", f"builtin:preferences?rows={rows}").message
    assert "?noise= is not a parameter; accepted: rows" in read("sft", "builtin:reviews?noise=0.1").message


# What a judge of the toy world learns from is what the feedback room asks: the same words in the same layout.


def items(split: str = "train", rows: int = 200) -> list[dict]:
    return records(f"builtin:judge-items?rows={rows}", split=split)


def take_apart(item: dict) -> Comparison:
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
        request = ask_comparison(take_apart(item), (), str)
        assert request.messages == tuple(item["prompt"])
        assert item["completion"][0]["content"] in (f"{request.prefill} (A)", f"{request.prefill} (B)")


def test_the_answer_is_the_review_with_the_higher_true_reward_and_stands_in_either_place() -> None:
    places = Counter()
    for item in items():
        compared = take_apart(item)
        right = "(A)" if true_reward(compared.first) > true_reward(compared.second) else "(B)"
        assert item["completion"][0]["content"].endswith(right)
        places[right] += 1
    assert 0.4 < places["(A)"] / 200 < 0.6


def test_the_questions_are_the_constitution_s() -> None:
    found = load_constitution("builtin:positive-reviews", needs="comparison").principles
    assert tuple(principle.comparison for principle in found) == COMPARISONS
    assert {take_apart(item).question for item in items()} == set(COMPARISONS)


def test_the_recipe_knows_every_constitution_that_ships() -> None:
    for name in BUILTIN_CONSTITUTIONS:
        assert load_constitution(name).principles
