"""Every format that `format: auto` knows, from the rows people have, and the exact reason for those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.formats import Detector, Parsed, rename_columns
from alignkit.data.rejects import BadRow
from alignkit.data.rows import Row

Lines = Callable[..., Path]


def adapt(record: dict[str, Any], format_name: str = "auto") -> Row:
    detector = Detector(format_name)
    return detector.read(detector.recognise(record), record, Parsed("rows.jsonl:1"))


def reason(record: dict[str, Any], format_name: str = "auto") -> str:
    with pytest.raises(BadRow) as caught:
        adapt(record, format_name)
    return caught.value.reason


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def test_trl_text() -> None:
    assert adapt({"text": "Once."}) == Row("text", "", ("Once.",), place="rows.jsonl:1")


def test_trl_prompt_completion_as_text_and_as_messages() -> None:
    row = adapt({"prompt": "The sky is", "completion": " blue."})
    assert row == Row("prompt_completion", "The sky is", (" blue.",), place="rows.jsonl:1")
    row = adapt({"prompt": [user("Hi")], "completion": [assistant("Hello")]})
    assert row == Row("prompt_completion", [user("Hi")], ([assistant("Hello")],), place="rows.jsonl:1")


def test_text_beside_messages_becomes_a_turn() -> None:
    row = adapt({"prompt": [system("Be kind."), user("Hi")], "completion": "Hello"})
    assert row.completions == ([assistant("Hello")],)
    row = adapt({"prompt": "Hi", "completion": assistant("Hello")})
    assert (row.prompt, row.completions) == ([user("Hi")], ([assistant("Hello")],))


def test_trl_prompt_only() -> None:
    assert adapt({"prompt": "The sky is"}) == Row("prompt", "The sky is", (), place="rows.jsonl:1")
    assert adapt({"prompt": [user("Hi")]}).conversational


def test_trl_pair_with_soft_label_and_margin() -> None:
    row = adapt({"prompt": "2+2=", "chosen": "4", "rejected": "5", "label": 0.75, "margin": 2})
    assert row == Row("pair", "2+2=", ("4", "5"), label=0.75, margin=2.0, place="rows.jsonl:1")
    assert adapt({"prompt": "2+2=", "chosen": "4", "rejected": "5", "soft_label": 1}).label == 1.0


def test_implicit_prompt_is_the_common_start_cut_before_a_word() -> None:
    row = adapt({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (row.prompt, row.completions) == ("The sky is", (" blue.", " black."))


def test_answers_that_share_no_prompt_are_refused() -> None:
    assert reason({"chosen": "blue", "rejected": "black"}) == (
        "prompt: is missing, and chosen and rejected share no beginning that could be it; the row has chosen, "
        "rejected; name what was asked with columns: {prompt: COLUMN}"
    )


def test_implicit_prompt_leaves_both_sides_something() -> None:
    row = adapt({"chosen": "Yes indeed", "rejected": "Yes indeed not"})
    assert (row.prompt, row.completions) == ("Yes", (" indeed", " indeed not"))


def test_implicit_prompt_of_conversations_is_their_common_turns() -> None:
    row = adapt({"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go away")]})
    assert row.prompt == [user("Hi")]
    assert row.completions == ([assistant("Hello")], [assistant("Go away")])


def test_implicit_prompts_that_differ_are_refused() -> None:
    record = {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Ho"), assistant("Hello")]}
    assert reason(record) == "rejected[0]: the prompts differ; all turns before the answer must be those of chosen"


def test_unpaired_labels() -> None:
    row = adapt({"prompt": "2+2=", "completion": "4", "label": True})
    assert row == Row("unpaired", "2+2=", ("4",), label=1.0, place="rows.jsonl:1")
    assert adapt({"prompt": "2+2=", "completion": "5", "label": 0}).label == 0.0
    wrong = reason({"prompt": "2+2=", "completion": "5", "label": 0.5})
    assert wrong == "label: is 0.5; it must be true or false (1 or 0) where there is one completion"


def test_openai_messages() -> None:
    messages = [system("Be kind."), user("Hi"), assistant("Hello"), user("Bye"), assistant("Farewell")]
    row = adapt({"messages": messages, "id": 7})
    assert row == Row("messages", "", (messages,), place="rows.jsonl:1")


def test_openai_content_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
    row = adapt({"messages": [{"role": "user", "content": parts}, assistant("I see")]})
    assert row.completions == ([user("Look\nhere"), assistant("I see")],)


def test_openai_image_parts_are_refused() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    record = {"messages": [{"role": "user", "content": parts}, assistant("I see")]}
    assert reason(record) == "messages[0].content[0]: is a part of type image_url; only text parts can be used"


def test_openai_developer_is_system() -> None:
    row = adapt({"messages": [{"role": "developer", "content": "Be kind."}, user("Hi"), assistant("Hello")]})
    assert row.completions[0][0] == system("Be kind.")


def test_sharegpt_conversation() -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    row = adapt({"id": "x", "conversations": turns})
    assert row.completions == ([system("Be kind."), user("Hi"), assistant("Hello")],)


def test_sharegpt_pair() -> None:
    record = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go away"},
    }
    assert adapt(record) == Row(
        "pair", [user("Hi")], ([assistant("Hello")], [assistant("Go away")]), place="rows.jsonl:1"
    )


def test_alpaca_joins_instruction_and_input() -> None:
    row = adapt({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert row == Row("prompt_completion", "Add.\n\n2 and 2", ("4",), place="rows.jsonl:1")
    assert adapt({"instruction": "Greet.", "input": "", "output": "Hi"}).prompt == "Greet."


def test_alpaca_pair() -> None:
    row = adapt({"instruction": "Greet.", "input": "", "output": "Hi", "chosen": "Hi", "rejected": "Hey you"})
    assert row == Row("pair", "Greet.", ("Hi", "Hey you"), place="rows.jsonl:1")


HH_CHOSEN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Farewell"
HH_REJECTED = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Get lost"


def test_hh_transcript_is_split_at_the_last_answer_of_chosen() -> None:
    row = adapt({"chosen": HH_CHOSEN, "rejected": HH_REJECTED})
    assert row.prompt == [user("Hi"), assistant("Hello"), user("Bye")]
    assert row.completions == ([assistant("Farewell")], [assistant("Get lost")])


def test_hh_prompts_that_differ_are_refused() -> None:
    shorter = "\n\nHuman: Hi\n\nAssistant: Get lost"
    expected = "rejected: its prompt (all up to the last '\\n\\nAssistant:') differs from that of chosen"
    assert reason({"chosen": HH_CHOSEN, "rejected": shorter}) == expected
    # get_hh would take this one: it starts with the prompt, and goes on with a turn of the human.
    longer = HH_REJECTED + "\n\nHuman: No\n\nAssistant: Yes"
    assert reason({"chosen": HH_CHOSEN, "rejected": longer}) == expected


def test_hh_empty_answer_is_refused() -> None:
    wrong = reason({"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"})
    assert wrong == "chosen: the answer after the last '\\n\\nAssistant:' is empty"


def test_hh_format_asked_for_refuses_other_text() -> None:
    wrong = reason({"chosen": "Hello", "rejected": "Go"}, "hh")
    assert wrong == "chosen: does not start with '\\n\\nHuman:'; it is not an HH transcript"


def test_ultrafeedback_binarized() -> None:
    record = {
        "prompt": "Hi",
        "prompt_id": "x",
        "chosen": [user("Hi"), assistant("Hello")],
        "rejected": [user("Hi"), assistant("Go away")],
        "messages": [user("Hi"), assistant("Hello")],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    }
    row = adapt(record)
    assert row == Row("pair", [user("Hi")], ([assistant("Hello")], [assistant("Go away")]), place="rows.jsonl:1")
    detector = Detector()
    form = detector.recognise(record)
    assert str(form) == "ultrafeedback pair"
    detector.read(form, record, parsed := Parsed("a.jsonl:1"))
    assert parsed.unread == ("prompt_id", "messages", "score_chosen", "score_rejected")


def test_ultrafeedback_answer_to_another_prompt_is_refused() -> None:
    record = {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("Hello")],
        "rejected": [user("Ho"), assistant("Go away")],
    }
    assert reason(record) == "rejected: its turns before the answer do not contain the prompt"


def test_ultrafeedback_raw_is_ranked_by_overall_score() -> None:
    completions = [{"response": f"answer {score}", "overall_score": score} for score in (3.0, 8.5, 1.0)]
    row = adapt({"source": "x", "instruction": "Hi", "completions": completions})
    assert row == Row(
        "ranked", "Hi", ("answer 8.5", "answer 3.0", "answer 1.0"), scores=(8.5, 3.0, 1.0), place="rows.jsonl:1"
    )


def test_ranked_by_scores_ranking_or_order() -> None:
    scored = adapt({"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [0, 2, 1]})
    assert (scored.completions, scored.scores) == (("b", "c", "a"), (2.0, 1.0, 0.0))
    placed = adapt({"prompt": "Hi", "completions": ["a", "b", "c"], "ranking": [2, 1, 2]})
    assert (placed.completions, placed.scores) == (("b", "a", "c"), (-1.0, -2.0, -2.0))
    ordered = adapt({"prompt": [user("Hi")], "responses": ["a", "b"]})
    assert (ordered.completions, ordered.scores) == (([assistant("a")], [assistant("b")]), (2.0, 1.0))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "rejected: is missing; the row has prompt, chosen"),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "rejected: is null"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": 5},
            "rejected: is a number; it must be text or a list of messages",
        ),
        ({"prompt": "Hi", "chosen": " ", "rejected": "b"}, "chosen: is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "rejected: is the same as chosen"),
        ({"prompt": "", "completion": "a"}, "prompt: is empty"),
        ({"prompt": 5, "completion": "a"}, "prompt: is a number; it must be text"),
        ({"text": ["a"]}, "text: is a list; it must be text"),
        ({"completion": "a"}, "prompt: is missing; the row has completion"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "label": float("nan")},
            "label: is nan; it must be a finite number",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "label": 1.2},
            "label: is 1.2; it must be between 0 and 1",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("inf")},
            "margin: is inf; it must be a finite number",
        ),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "big"}, "margin: is 'big'; it must be a number"),
        ({"messages": []}, "messages: is an empty list"),
        ({"messages": "Hi"}, "messages: is text; it must be a list"),
        ({"messages": ["Hi"]}, "messages[0]: is text; it must be an object with role and content"),
        ({"messages": [user("Hi")]}, "messages: the last turn is user; it must be assistant"),
        ({"messages": [assistant("Hi")]}, "messages: has no user turn"),
        ({"messages": [user("Hi"), {"role": "assistant"}]}, "messages[1].content: is missing"),
        ({"messages": [user("Hi"), {"content": "Hello"}]}, "messages[1].role: is missing"),
        ({"messages": [user("Hi"), assistant("")]}, "messages[1].content: is empty"),
        ({"messages": [user("Hi"), {"role": ["x"], "content": "a"}]}, "messages[1].role: is a list; it must be text"),
        (
            {"messages": [user("Hi"), {"role": "asistant", "content": "a"}]},
            "messages[1].role: 'asistant' is not a role (did you mean assistant?); "
            "accepted: assistant, system, tool, user; data.roles: {asistant: user} maps other names",
        ),
        ({"prompt": [user("Hi"), assistant("a")]}, "prompt: the last turn is assistant; it must be user"),
        (
            {"prompt": "Hi", "completions": ["a"], "scores": [1]},
            "completions: has one answer; a ranking needs two or more",
        ),
        ({"prompt": "Hi", "completions": ["a", "b"], "scores": [1]}, "scores: has 1 entries for 2 completions"),
        (
            {"prompt": "Hi", "completions": ["a", "b"]},
            "scores: is missing; completions need scores (higher is better) or ranking (1 is best)",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 1]},
            "scores: are all equal; no answer is better than another",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b", "a"], "scores": [3, 2, 1]},
            "completions[2]: is the same as completions[0] with another score",
        ),
        ({"instruction": "Hi"}, "output: is missing; the row has instruction"),
        (
            {"promt": "Hi", "response": "a"},
            "no known format has the columns promt, response (did you mean columns: {prompt: promt}?); accepted: text; "
            "messages; prompt + completion (+ label); prompt + chosen + rejected; chosen + rejected; prompt + "
            "completions + scores or ranking; prompt + responses; conversations; instruction + output; prompt",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_exactly_why(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected


def test_columns_rename_and_a_missing_one_names_the_nearest() -> None:
    assert rename_columns({"question": "Hi", "id": 1}, {"prompt": "question"}) == {"prompt": "Hi", "id": 1}
    with pytest.raises(BadRow) as caught:
        rename_columns({"promts": "Hi", "answer": "a"}, {"prompt": "question"})
    expected = (
        "question: is missing (columns.prompt); the row has promts, answer (did you mean columns: {prompt: promts}?)"
    )
    assert caught.value.reason == expected


def test_a_file_whose_columns_always_change_does_not_fill_the_detector() -> None:
    detector = Detector()
    for number in range(10_000):
        record = {"text": "a", f"column {number}": 1}
        detector.read(detector.recognise(record), record, parsed := Parsed("a.jsonl:1"))
        assert parsed.unread == (f"column {number}",)
    assert len(detector._known) <= 4096
