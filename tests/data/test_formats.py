"""Every format that `format: auto` knows, from the rows people have, and the exact reason for those that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from alignkit.data.formats import Detector, Parsed, rename_columns
from alignkit.data.rows import BadRow, Row


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


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [(user, assistant)[place % 2](content) for place, content in enumerate(contents)]


HI, BE_KIND = [user("Hi")], system("Be kind.")
HELLO, AWAY = [assistant("Hello")], [assistant("Go away")]
LONG = [BE_KIND, *turns("Hi", "Hello", "Bye", "Farewell")]
PARTS = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
ONE = "\n\nHuman: Hi\n\nAssistant:"
SHARED = {"prompt": "Hi", "chosen": [*HI, *HELLO], "rejected": [*HI, *AWAY]}
RATED = [{"response": f"answer {score}", "overall_score": score} for score in (3.0, 8.5, 1.0)]
ABC = {"prompt": "Hi", "completions": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"text": "Once."}, Row("text", "", ("Once.",))),
        ({"prompt": "The sky is", "completion": " blue."}, Row("prompt_completion", "The sky is", (" blue.",))),
        ({"prompt": HI, "completion": HELLO}, Row("prompt_completion", HI, (HELLO,))),
        # Text beside messages becomes a turn.
        ({"prompt": [BE_KIND, *HI], "completion": "Hello"}, Row("prompt_completion", [BE_KIND, *HI], (HELLO,))),
        ({"prompt": "Hi", "completion": HELLO[0]}, Row("prompt_completion", HI, (HELLO,))),
        ({"prompt": "The sky is"}, Row("prompt", "The sky is", ())),
        ({"prompt": HI}, Row("prompt", HI, ())),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "label": 0.75, "margin": 2},
         Row("pair", "2+2=", ("4", "5"), label=0.75, margin=2.0)),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "soft_label": 1},
         Row("pair", "2+2=", ("4", "5"), label=1.0)),
        # An implicit prompt is the common start, cut before a word so that both sides keep something; or common turns.
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."},
         Row("pair", "The sky is", (" blue.", " black."))),
        ({"chosen": "Yes indeed", "rejected": "Yes indeed not"}, Row("pair", "Yes", (" indeed", " indeed not"))),
        ({"chosen": [*HI, *HELLO], "rejected": [*HI, *AWAY]}, Row("pair", HI, (HELLO, AWAY))),
        ({"prompt": "2+2=", "completion": "4", "label": True}, Row("unpaired", "2+2=", ("4",), label=1.0)),
        ({"prompt": "2+2=", "completion": "5", "label": 0}, Row("unpaired", "2+2=", ("5",), label=0.0)),
        ({"messages": LONG, "id": 7}, Row("messages", "", (LONG,))),
        ({"messages": [{"role": "user", "content": PARTS}, *HELLO]},
         Row("messages", "", ([user("Look\nhere"), *HELLO],))),
        ({"messages": [{"role": "developer", "content": "Be kind."}, *HI, *HELLO]},
         Row("messages", "", ([BE_KIND, *HI, *HELLO],))),
        ({"conversations": [{"from": who, "value": said} for who, said in
                            (("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"))]},
         Row("messages", "", ([BE_KIND, *HI, *HELLO],))),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
          "rejected": {"from": "gpt", "value": "Go away"}}, Row("pair", HI, (HELLO, AWAY))),
        ({"instruction": "Add.", "input": "2 and 2", "output": "4"},
         Row("prompt_completion", "Add.\n\n2 and 2", ("4",))),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, Row("prompt_completion", "Greet.", ("Hi",))),
        ({"instruction": "Greet.", "input": "", "output": "Hi", "chosen": "Hi", "rejected": "Hey you"},
         Row("pair", "Greet.", ("Hi", "Hey you"))),
        ({"chosen": f"{HH} Farewell", "rejected": f"{HH} Get lost"},
         Row("pair", turns("Hi", "Hello", "Bye"), ([assistant("Farewell")], [assistant("Get lost")]))),
        ({"source": "x", "instruction": "Hi", "completions": RATED},
         Row("ranked", "Hi", ("answer 8.5", "answer 3.0", "answer 1.0"), scores=(8.5, 3.0, 1.0))),
        # Ranked by scores, by ranking or by order.
        (ABC | {"scores": [0, 2, 1]}, Row("ranked", "Hi", ("b", "c", "a"), scores=(2.0, 1.0, 0.0))),
        (ABC | {"ranking": [2, 1, 2]}, Row("ranked", "Hi", ("b", "a", "c"), scores=(-1.0, -2.0, -2.0))),
        ({"prompt": HI, "responses": ["a", "b"]},
         Row("ranked", HI, ([assistant("a")], [assistant("b")]), scores=(2.0, 1.0))),
    ],
)  # fmt: skip
def test_the_row_of_every_format(record: dict[str, Any], row: Row) -> None:
    assert adapt(record) == replace(row, place="rows.jsonl:1")


def test_what_nothing_reads_of_a_row_is_noted() -> None:
    record = SHARED | {"prompt_id": "x", "messages": [*HI, *HELLO], "score_chosen": 8.0, "score_rejected": 2.0}
    detector, parsed = Detector(), Parsed("a.jsonl:1")
    form = detector.recognise(record)
    assert str(form) == "ultrafeedback pair"
    assert detector.read(form, record, parsed) == Row("pair", HI, (HELLO, AWAY), place="a.jsonl:1")
    assert parsed.unread == ("prompt_id", "messages", "score_chosen", "score_rejected")


def test_hh_asked_for_refuses_other_text() -> None:
    wrong = reason({"chosen": "Hello", "rejected": "Go"}, "hh")
    assert wrong == "chosen: does not start with '\\n\\nHuman:'; it is not an HH transcript"


HH_DIFFERS = "rejected: its prompt (all up to the last '\\n\\nAssistant:') differs from that of chosen"
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"chosen": "blue", "rejected": "black"},
         "prompt: is missing, and chosen and rejected share no beginning that could be it; the row has chosen, "
         "rejected; name what was asked with columns: {prompt: COLUMN}"),
        ({"chosen": [*HI, *HELLO], "rejected": [user("Ho"), *HELLO]},
         "rejected[0]: the prompts differ; all turns before the answer must be those of chosen"),
        ({"prompt": "2+2=", "completion": "5", "label": 0.5},
         "label: is 0.5; it must be true or false (1 or 0) where there is one completion"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, *HELLO]},
         "messages[0].content[0]: is a part of type image_url; only text parts can be used"),
        ({"chosen": f"{HH} Farewell", "rejected": f"{ONE} Get lost"}, HH_DIFFERS),
        # get_hh would take this one: it starts with the prompt, and goes on with a turn of the human.
        ({"chosen": f"{HH} Farewell", "rejected": f"{HH} Get lost\n\nHuman: No\n\nAssistant: Yes"}, HH_DIFFERS),
        ({"chosen": f"{ONE} ", "rejected": f"{ONE} Go"},
         "chosen: the answer after the last '\\n\\nAssistant:' is empty"),
        (SHARED | {"rejected": [user("Ho"), *AWAY]},
         "rejected: its turns before the answer do not contain the prompt"),
        ({"prompt": "Hi", "chosen": "a"}, "rejected: is missing; the row has prompt, chosen"),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "rejected: is null"),
        ({"prompt": "Hi", "chosen": "a", "rejected": 5},
         "rejected: is a number; it must be text or a list of messages"),
        ({"prompt": "Hi", "chosen": " ", "rejected": "b"}, "chosen: is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "rejected: is the same as chosen"),
        ({"prompt": "", "completion": "a"}, "prompt: is empty"),
        ({"prompt": 5, "completion": "a"}, "prompt: is a number; it must be text"),
        ({"text": ["a"]}, "text: is a list; it must be text"),
        ({"completion": "a"}, "prompt: is missing; the row has completion"),
        (PAIR | {"label": float("nan")},
         "label: is nan; it must be a finite number"),
        (PAIR | {"label": 1.2},
         "label: is 1.2; it must be between 0 and 1"),
        (PAIR | {"margin": float("inf")},
         "margin: is inf; it must be a finite number"),
        (PAIR | {"margin": "big"}, "margin: is 'big'; it must be a number"),
        ({"messages": []}, "messages: is an empty list"),
        ({"messages": "Hi"}, "messages: is text; it must be a list"),
        ({"dialog_id": 1, "speaker": "user", "text": "Hi"},
         "speaker: is user; a turn is no text of its own; write each conversation as a row of messages, or leave the "
         "column out with columns: {speaker: null}"),
        ({"image_path": "a.png", "prompt": "Hi", "completion": "a"},
         "image_path: only text can be trained on; leave such rows out"),
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
        ({"prompt": "Hi", "completions": ["a"], "scores": [1]},
         "completions: has one answer; a ranking needs two or more"),
        ({"prompt": "Hi", "completions": ["a", "b"], "scores": [1]}, "scores: has 1 entries for 2 completions"),
        ({"prompt": "Hi", "completions": ["a", "b"]},
         "scores: is missing; completions need scores (higher is better) or ranking (1 is best)"),
        ({"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 1]},
         "scores: are all equal; no answer is better than another"),
        ({"prompt": "Hi", "completions": ["a", "b", "a"], "scores": [3, 2, 1]},
         "completions[2]: is the same as completions[0] with another score"),
        ({"instruction": "Hi"}, "output: is missing; the row has instruction"),
        (
            {"promt": "Hi", "response": "a"},
            "no known format has the columns promt, response (did you mean columns: {prompt: promt}?); accepted: text; "
            "messages; prompt + completion (+ label); prompt + chosen + rejected; chosen + rejected; prompt + "
            "completions + scores or ranking; prompt + responses; conversations; instruction + output; prompt",
        ),
    ],
)  # fmt: skip
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


MARKS = [{"learn": False}, {"loss_weight": 0}, {"loss_mask": 0}, {"ignore": True}, {"no_loss": 1}]


@pytest.mark.parametrize("mark", MARKS)
def test_a_turn_is_not_learnt_whatever_the_mark_is_called(mark: dict[str, Any]) -> None:
    row = adapt({"messages": [user("Hi"), assistant("Hello") | mark, user("Bye"), assistant("Ciao")]})
    (messages,) = row.completions
    assert [turn.get("trained", True) for turn in messages] == [True, False, True, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "messages",
    [
        ["Hi", "Hello"],
        [{"author": "user", "content": "Hi"}, {"author": "chatbot", "content": "Hello"}],
        [{"sender": "User", "message": "Hi"}, {"sender": "Bot", "message": "Hello"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
         {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}],
    ],
)  # fmt: skip
def test_turns_under_other_names_are_read(messages: list[Any]) -> None:
    assert adapt({"conversation": messages}) == Row("messages", "", ([*HI, *HELLO],), place="rows.jsonl:1")


@pytest.mark.parametrize(("word", "label"), [("chosen", 1.0), ("Rejected", 0.0), ("yes", 1.0), ("thumbs_down", 0.0)])
def test_a_label_may_be_a_word(word: str, label: float) -> None:
    assert adapt({"prompt": "Hi", "completion": "Hello", "label": word}).label == label


def test_a_conversation_as_json_is_found_whatever_its_text_and_the_order_of_its_keys() -> None:
    said = [{"content": "what is {x}?", "role": "user"}, {"content": "a", "role": "assistant"}]
    for cell in (json.dumps(said), f"\n {json.dumps(said, indent=1)}", json.dumps([{"id": {}, **said[0]}, said[1]])):
        assert isinstance(rename_columns({"chosen": cell}, {})["chosen"], list)
    with pytest.raises(BadRow, match="no JSON"):
        rename_columns({"chosen": str(said)}, {})
    for text in ('{"author": "Poe", "text": "Lo"}', '{"a": {"role": 1, "content": 2}} shows it', '{"from": "Rome"}'):
        assert rename_columns({"completion": text}, {}) == {"completion": text}
