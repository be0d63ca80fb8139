"""Rewards that check an answer: each kind on right and wrong answers, in time, and what rows and machines must have."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import EnvironmentProblem, RewardError
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers, Workspace
from alignkit.rewards.kinds.verify import VerifyReward, _read

IFEVAL = "instruction_id_list"


def verify(kind: str, texts: list[str], column: str, values: list[Any], *, more: Any = (), **keys: Any) -> list[float]:
    if "column_named" in keys:
        keys["column"] = keys.pop("column_named")
    reward = VerifyReward(RewardSource(verify=kind, **keys), Workspace(trust_code=True))  # type: ignore[arg-type]
    return reward.score(Answers(["?"] * len(texts), texts, columns={column: values, **dict(more)}))


@pytest.mark.parametrize(
    ("kind", "column", "value", "right", "wrong", "keys"),
    [
        ("exact", "answer", 42, [" 42\n"], ["42.", "", "4 2"], {}),
        ("exact", "answer", "a b", ["a  b"], ["ab"], {}),
        ("exact", "answer", "7", ["1 + 6\n#### 7"], ["7", "#### 7 #### 8"], {"extract": "#### (\\S+)"}),
        ("regex", "pattern", "^yes\\b", ["yes, it is"], ["well, yes"], {}),
        ("json_schema", "schema", {"type": "object", "required": ["a"]}, ['{"a": 1}', '```json\n{"a": 2}\n```'],
         ['{"b": 1}', "[1]", "no json"], {}),
        ("json_schema", "schema", '{"type": "integer"}', ["3"], ["3.5"], {}),
    ],
)  # fmt: skip
def test_right_answers_are_worth_one_and_others_nothing(
    kind: str, column: str, value: Any, right: list[str], wrong: list[str], keys: dict[str, Any]
) -> None:
    texts = right + wrong
    assert verify(kind, texts, column, [value] * len(texts), **keys) == [1.0] * len(right) + [0.0] * len(wrong)


def test_mathematics_is_compared_as_such() -> None:
    pytest.importorskip("math_verify", reason="needs alignkit[verify]")
    texts = ["so it is $\\frac{1}{2}$", "\\boxed{0.5}", "the answer is 2/4", "0.51", "none"]
    assert verify("math", texts, "answer", ["1/2"] * 5) == [1, 1, 1, 0, 0]
    assert verify("math", ["\\boxed{(1, \\pi)}"], "answer", ["$(1,\\pi)$"]) == [1]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"verify: math needs math-verify; pip install 'alignkit.verify.'"):
        verify("math", ["1"], "answer", ["1"])


@pytest.mark.parametrize(("name", "given", "kept", "broken"), [
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "AB D", "AB c"),
    ("change_case:english_capital", {}, "ALL OF IT!", "Not all"),
    ("change_case:english_lowercase", {}, "all of it", "Not all"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why (so)?"}, "why (so)? Because.", "Because. Why (so)?"),
    ("combination:two_responses", {}, "one ****** two", "one"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\np.s. Bye", "Hi. PS"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1 a SECTION 2 b", "SECTION 1 a"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* and b"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>"),
    ("keywords:existence", {"keywords": ["Red", "blue"]}, "blue or red", "red"),
    ("keywords:forbidden_words", {"forbidden_words": ["red"]}, "reddish", "Red."),
    ("keywords:frequency", {"keyword": "a", "relation": "less than", "frequency": 2}, "a b", "a a"),
    ("keywords:letter_frequency", {"letter": "z", "let_relation": "at least", "let_frequency": 2}, "Zz", "z"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
     "First.\n\nThen, more.", "Then.\n\nFirst."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a b"),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}, "A. B!", "A. B. C."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "a b c", "a b"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("startend:end_checker", {"end_phrase": "The end."}, "Well. The end. ", "The end. Not."),
    ("startend:quotation", {}, '"a\nb"', '"a'),
])  # fmt: skip
def test_every_instruction_tells_kept_from_broken(name: str, given: dict, kept: str, broken: str) -> None:
    found = verify("ifeval", [kept, broken, " "], IFEVAL, [[name]] * 3, more={"kwargs": [[given]] * 3})
    assert found == [1.0, 0.0, 0.0]


def test_the_share_of_the_instructions_counts_and_unknown_ones_are_refused() -> None:
    names, kwargs = ["punctuation:no_comma", "change_case:english_lowercase"], [None, {}]
    assert verify("ifeval", ["A b"], IFEVAL, [names], more={"kwargs": [kwargs]}) == [0.5]
    with pytest.raises(RewardError, match="there is no check of language:response_language"):
        verify("ifeval", ["a"], IFEVAL, [["language:response_language"]], more={"kwargs": [[{"language": "de"}]]})
    assert len(json.loads(_read("instructions.json"))) == 24


def test_code_passes_its_tests_in_a_process_with_limits(tmp_path: Path) -> None:
    right = "Here:\n```python\ndef add(a, b):\n    return a + b\n```"
    wrong = [
        "def add(a, b):\n    return a - b",
        "import sys; sys.exit(0)",  # an end before the tests is no pass
        "import os; os._exit(0)",
        "def add(a, b): return bytearray(2**31) and a + b",  # more memory than there is for it
        f"open({str(tmp_path / 'big')!r}, 'wb').write(b'x' * 2**22)\nadd = lambda a, b: a + b",
        "while True: pass",
    ]
    began = time.monotonic()
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    assert verify("code", [right, *wrong], "tests", [tests] * 7, timeout=3) == [1.0] + [0.0] * 6
    assert time.monotonic() - began < 30
    assert not (tmp_path / "big").exists() or (tmp_path / "big").stat().st_size <= 2**20
    seen = "import os, json\nadd = None\nassert 'SECRET_TOKEN' not in os.environ and os.listdir('.') == []"
    os.environ["SECRET_TOKEN"] = "x"
    try:
        assert verify("code", [seen], "tests", [""]) == [1.0]
    finally:
        del os.environ["SECRET_TOKEN"]


def test_what_cannot_be_checked_is_said() -> None:
    with pytest.raises(RewardError, match="needs the column answer in every row; the rows have gold, answers; did you"):
        verify("exact", ["a"], "gold", ["a"], more={"answers": ["b"]})
    assert verify("exact", ["a"], "gold", ["a"], column_named="gold") == [1.0]
    with pytest.raises(RewardError, match="needs the column answer in every row"):
        verify("exact", ["a", "b"], "answer", ["a", None])
    with pytest.raises(RewardError, match=r"verify: regex: '\(' of a row cannot be used"):
        verify("regex", ["a"], "pattern", ["("])
    with pytest.raises(RewardError, match="no regular expression"):
        verify("exact", ["a"], "answer", ["a"], extract="(")
    with pytest.raises(RewardError, match="give --trust-code on the command line"):
        VerifyReward(RewardSource(verify="code"), Workspace())
    assert verify("regex", ["a" * 40 + "b"], "pattern", ["^(a+)+$"], timeout=0.5) == [0.0]  # it would take for ever


def test_sums_have_certain_answers_and_no_pair_is_in_both_splits() -> None:
    from alignkit.data.builtin import BuiltinData, iter_builtin

    rows = {
        split: [row for _, row in iter_builtin(BuiltinData("arithmetic", split, 400))] for split in ("train", "test")
    }
    for row in rows["train"] + rows["test"]:
        assert str(eval(row["prompt"].rstrip("="))) == row["answer"] == row["completion"].strip()
    asked = {split: {row["prompt"] for row in found} for split, found in rows.items()}
    assert not asked["train"] & asked["test"] and len(asked["train"]) > 120
    assert json.dumps(rows["train"][0])
