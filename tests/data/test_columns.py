"""What a row says beside its text: system, history, tools, weights, reasoning, other tools' roles, labels, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.formats import FORMATS, Detector, Parsed, rename_columns
from alignkit.data.rows import BadRow, Row

Read = Callable[..., Any]
Lines = Callable[..., Path]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def turns(*contents: str, **last: Any) -> list[dict[str, Any]]:
    """Return user and assistant turns by turns; `last` goes into the last one."""
    said = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [*said[:-1], said[-1] | last]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def adapt(record: dict[str, Any], **settings: Any) -> Row:
    detector = Detector(**settings)
    return detector.read(detector.recognise(record), record, Parsed("a.jsonl:1"))


def reason(record: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(BadRow) as caught:
        adapt(record, **settings)
    return caught.value.reason


HISTORY = [["Open?", "Yes."]]
ASKED = [system("Be brief."), *turns("Open?", "Yes.", "And now?")]
ASIDE = {"system": "Be brief.", "history": HISTORY}


@pytest.mark.parametrize(
    ("record", "prompt", "completions"),
    [
        ({"question": "And now?", "chosen": "a", "rejected": "b"}, ASKED, ("a", "b")),
        ({"prompt": "And now?", "chosen": "a", "rejected": "b"}, ASKED, ("a", "b")),
        ({"instruction": "And now?", "input": "", "output": "a"}, ASKED, ("a",)),
        ({"query": "And now?", "response": "a"}, ASKED, ("a",)),
        ({"prompt": "And now?", "completion": "a", "label": False}, ASKED, ("a",)),
        ({"prompt": "And now?", "responses": ["a", "b"]}, ASKED, ("a", "b")),
        ({"chosen": turns("And now?", "a"), "rejected": turns("And now?", "b")}, ASKED, ("a", "b")),
        ({"prompt": "And now?"}, ASKED, ()),
    ],
)
def test_system_and_history_stand_before_what_is_asked(record: dict, prompt: Any, completions: Any) -> None:
    row = adapt(record | ASIDE)
    assert row.prompt == prompt
    assert row.completions == tuple([{"role": "assistant", "content": text}] for text in completions)
    whole = adapt({"conversations": turns("And now?", "a")} | ASIDE)
    assert whole.completions == ([*ASKED, {"role": "assistant", "content": "a"}],)


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_tools_and_template_arguments_travel_with_the_first_message(column: str) -> None:
    record = {column: turns("Hi", "Hello"), "tools": json.dumps([TOOL["function"]])}
    record["chat_template_kwargs"] = {"enable_thinking": False, "unset": None}
    if column == "prompt":
        record |= {"prompt": "Hi", "completion": "Hello"}
    row = adapt(record)
    first = (row.prompt or row.completions[0])[0]
    assert first["template_kwargs"] == {"tools": [TOOL], "enable_thinking": False}
    assert adapt({"messages": turns("Hi", "Hello"), "tools": []}).completions == (turns("Hi", "Hello"),)


def test_calls_of_tools_are_brought_to_one_shape() -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    told = {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1"}
    given = json.dumps({"name": "weather", "arguments": json.dumps({"city": "Rome"})})
    openai = [
        *turns("Warm?"),
        {"role": "assistant", "content": None, "tool_calls": [json.loads(given) | {"id": "c1"}]},
        told,
        {"role": "assistant", "content": "21 degrees."},
    ]
    called = adapt({"messages": openai}).completions[0]
    assert called[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert called[2] == told
    sharegpt = [
        {"from": "human", "value": "Warm?"},
        {"from": "function_call", "value": given},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "21 degrees."},
    ]
    (messages,) = adapt({"conversations": sharegpt}).completions
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{key: call[key] for key in ("type", "function")}]


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        *(({key: value}, value) for key in ("weight", "train", "training", "loss") for value in (0, 1, False, True)),
        ({"masked": True}, False),
        ({"masked": False}, True),
        ({"weight": None}, True),
        ({"weight": 0.0, "train": False}, False),
    ],
)
def test_a_mark_decides_whether_a_turn_is_learnt(mark: dict, trained: object) -> None:
    (messages,) = adapt({"messages": turns("Hi", "Hello", **mark)}).completions
    assert messages[-1].get("trained", True) is bool(trained)
    marked = [turns("Hi", **{key: 0.5 for key in mark})[0], *turns("Hi", "Hello")[1:]]
    assert adapt({"messages": marked}).completions == (turns("Hi", "Hello"),)  # on a turn that is never learnt


def test_reasoning_goes_to_the_template() -> None:
    thought = [{"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}]
    for given in ({"thinking": "2 and 2"}, {"reasoning_content": "2 and 2"}, {"reasoning": "2 and 2", "thinking": ""}):
        assert adapt({"messages": turns("2+2?", "4", **given)}).completions[0][1:] == thought
    parts = [{"type": "thinking", "thinking": "2 and 2"}, {"type": "text", "value": "4"}]
    assert adapt({"messages": [*turns("2+2?"), {"role": "assistant", "content": parts}]}).completions[0][1:] == thought


@pytest.mark.parametrize(
    "conversation",
    [
        [{"speaker": "Human", "text": "Hi"}, {"speaker": "Bot", "text": "Hello"}],
        [{"role": "prompter", "value": "Hi"}, {"role": "GPT", "value": "Hello"}],
        [{"role": "Kunde", "content": "Hi"}, {"role": "Berater", "content": "Hello"}],
        [{"input": "Hi", "output": "Hello"}],
        [{"human": "Hi", "assistant": "Hello"}],
        [["Hi", "Hello"]],
        [system(""), *turns("Hi", "Hello")],
        turns("Hi", "Hello", "Thanks"),
        "Human: Hi\n\nAssistant: Hello",
    ],
)
def test_conversations_of_other_tools_are_read(conversation: Any) -> None:
    row = adapt({"conversation": conversation}, roles={"Kunde": "user", "Berater": "assistant"})
    assert row.completions == (turns("Hi", "Hello"),)


def test_a_later_system_message_stays() -> None:
    messages = [*turns("Hi", "Hello"), system("Be brief."), *turns("Ho", "Yes")]
    assert adapt({"messages": messages}).completions == (messages,)


PAIR = ("better", "worse")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "response_0": "worse", "response_1": "better", "better_response_id": 1, "safer_response_id": 0},
        {"prompt": "Q", "response_0": "better", "response_1": "worse", "safer_response_id": 0},
        {"prompt": "Q", "response_1": "better", "response_2": "worse", "preference_strength": -3},
        {"context": turns("Q"), "response1": "worse", "response2": "better", "overall_preference": 1},
        {"history": "Q", "human_ref_A": "better", "human_ref_B": "worse", "labels": 1, "score_A": 3},
        {"question": "Q", "response_j": "better", "response_k": "worse"},
        {"conversation_a": turns("Q", "worse"), "conversation_b": turns("Q", "better"), "winner": "model_b"},
        {"messages": turns("Q", "better"), "rejected_response": "worse"},
        {"messages": turns("Q"), "chosen": turns("-", "better")[1], "rejected": turns("-", "worse")[1]},
        {"system": "", "input": "Q", "chosen": "better", "rejected": "worse"},
        {"prompt": "\n\nHuman: Q\n\nAssistant: ",
         "answers": [{"answer": "worse", "rank": 2.0}, {"answer": "better", "rank": 1}]},
        {"question": "Q", "completions": [{"text": "worse", "score": 1}, {"text": "better", "score": 2}]},
    ],
)  # fmt: skip
def test_two_answers_and_which_is_better(record: dict[str, Any]) -> None:
    row = adapt(record)
    answers = [text if isinstance(text, str) else text[0]["content"] for text in row.completions]
    assert tuple(answers) == PAIR
    assert row.prompt in ("Q", turns("Q"))


def test_answers_with_a_thumb() -> None:
    for name, label in (("label", "desirable"), ("label", True), ("kto_tag", "true"), ("label", "1")):
        row = adapt({"messages": turns("Hi", "Hello"), name: label})
        assert row == Row("unpaired", turns("Hi"), (turns("Hi", "Hello")[1:],), label=1.0, place="a.jsonl:1")
    assert adapt({"prompt": "Hi", "completion": "a", "label": "Undesirable"}).label == 0.0


def test_turns_that_both_answers_begin_with_are_asked() -> None:
    chosen, rejected = turns("-", "a", "more", "b")[1:], turns("-", "a", "more", "c")[1:]
    row = adapt({"prompt": turns("Q"), "chosen": chosen, "rejected": rejected})
    assert row.prompt == [*turns("Q"), *chosen[:2]]
    assert row.completions == (chosen[2:], rejected[2:])


def test_segments_and_tokens_are_taken_as_they_are() -> None:
    row = adapt({"segments": [{"label": False, "text": "read "}, {"label": True, "text": "learnt"}]})
    assert (row.completions, row.scores) == (("read ", "learnt"), (0.0, 1.0))
    row = adapt({"input_ids": [7, 8, 9, 0], "labels": [-100, 8, 9, -100], "attention_mask": [1, 1, 1, 0]})
    assert row.tokens == ([7, 8, 9], [-100, 8, 9])
    assert adapt({"input_ids": [7, 8, 9], "assistant_masks": [0, 0, 1]}).tokens == ([7, 8, 9], [-100, -100, 9])


MESSAGES = turns("Hi", "Hello")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": MESSAGES, "images": ["a.png"]}, "images: only text can be trained on; leave such rows out"),
        ({"messages": turns("Hi", "Hello", weight=0.5)},
         "messages[1].weight: is 0.5; a turn is learnt or not: 1 or 0, true or false"),
        ({"messages": turns("Hi", "Hello", train=True, masked=True)},
         "messages[1]: train and masked contradict each other"),
        ({"messages": turns("Hi", "Hello", refusal="No.")},
         "messages[1].refusal: put what the assistant says into content"),
        ({"messages": turns("Hi", "Hello", text="Bye")},
         "messages[1].text: stands beside content and says something else"),
        ({"messages": [system("a"), *MESSAGES], "system": "b"},
         "system: differs from the system message of the conversation; keep one of the two"),
        ({"messages": MESSAGES, "prompt": "Bye"},
         "prompt: is not read in a row of openai messages, and says something that the columns read do not; name it in "
         "columns, or leave it out with columns: {prompt: null}"),
        ({"messages": [*turns("Hi"), {"role": "Berater", "content": "Hello"}]},
         "messages[1].role: 'Berater' is not a role; accepted: assistant, system, tool, user; data.roles: {Berater: "
         "user} maps other names"),
        ({"messages": turns("Hi", "Hello", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])},
         "messages[1].tool_calls[0].arguments: is no JSON: Expecting property name enclosed in double quotes: line 1 "
         "column 2 (char 1)"),
        ({"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 0},
         "preference_strength: is 0; no answer is better than the other"),
        ({"prompt": "Hi", "completion": "a", "weight": 2},
         "weight: is 2; single rows cannot be weighted, sources can: data.weight"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: has 1 entries; input_ids has 2"),
        ({"input_ids": [1, -2]}, "input_ids[1]: is -2; it must be a token id"),
        ({"segments": [{"label": False, "text": "a"}]}, "segments: none is to be learnt"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected


def test_a_column_may_repeat_what_was_read_or_be_left_out() -> None:
    alpaca = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    adapt(alpaca | {"text": "Below is an instruction.\n### Instruction:\nAdd.\n### Input:\n2 and 2\n### Response:\n4"})
    adapt({"messages": MESSAGES, "prompt": "Hi"})
    assert rename_columns({"text": "a", "label": 3}, {"label": None}) == {"text": "a"}
    assert "columns: {label: null}" in reason({"text": "a", "label": 3})
    adapt({"prompt": "Hi", "label": 3}, for_prompts=True, keeps_columns=True)  # a reward function is given it


def test_every_key_that_is_not_read_is_named_with_its_first_row(read: Read, lines: Lines) -> None:
    plain = {"messages": MESSAGES}
    lines(
        "a.jsonl",
        [plain | {"tools": []}, {"messages": turns("Ho", "Hello", rating=3, name="Ann")}, plain | {"source": "x"},
         plain | {"source": "y"}],
    )  # fmt: skip
    (source,) = read("sft", "a.jsonl").report.sources
    assert source.ignored_columns == {"messages[].rating": 1, "messages[].name": 1, "source": 2}
    assert source.ignored_places["messages[].rating"] == source.ignored_places["messages[].name"] == "a.jsonl:2"
    assert source.ignored_places["source"] == "a.jsonl:3" and source.formats == {"openai messages": 4}


def test_turns_after_the_last_answer_are_cut_and_counted(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [{"messages": MESSAGES}, {"messages": turns("Hi", "Hello", "Thanks")}])
    reading = read("sft", "a.jsonl")
    assert [row.completions for row in reading.rows] == [(MESSAGES,), (MESSAGES,)]
    assert reading.report.remarks() == [
        "1 conversations end with another turn than the assistant's, which was cut off (first: a.jsonl:2)"
    ]
    (_, asked) = read("ppo", "a.jsonl", reward="builtin:true-reward").rows
    assert asked.prompt == turns("Hi", "Hello", "Thanks")


def test_roles_that_are_swapped_are_said_or_refused_and_can_be_swapped_back(read: Read, lines: Lines) -> None:
    asks = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hello"}]
    swap = "where roles are swapped, data.roles: {user: assistant, assistant: user} swaps them back"
    lines("a.jsonl", [{"messages": asks}])
    error = str(read("sft", "a.jsonl").error)
    assert error.startswith(f"a.jsonl:1: messages: no turn of the user comes before an answer; {swap}")
    swapped = read("sft", "a.jsonl", roles={"user": "assistant", "assistant": "user"})
    assert [row.completions for row in swapped.rows] == [(MESSAGES,)]
    lines("a.jsonl", [{"messages": MESSAGES}, {"messages": [asks[0], *MESSAGES]}])
    said = [f"1 conversations begin with the assistant's turn; {swap} (first: a.jsonl:2)"]
    assert read("sft", "a.jsonl").report.remarks() == said
    pair = {"prompt": [asks[0], MESSAGES[0]], "chosen": MESSAGES[1:], "rejected": asks[:1]}
    lines("a.jsonl", [{**pair, "prompt": MESSAGES[:1]}, pair])
    assert read("dpo", "a.jsonl").report.remarks() == said


def test_what_a_method_learns_nothing_from_is_said(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    assert read("sft", "a.jsonl").report.remarks() == [
        "1 rows have worse answers beside the best one; sft learns nothing from them (first: a.jsonl:1)"
    ]
    for labels, said in (((1, 1), "desirable"), ((0, 0), "undesirable"), ((0, 1), None)):
        lines("a.jsonl", [{"prompt": "Q", "completion": f"a{n}", "label": label} for n, label in enumerate(labels)])
        assert read("dpo", "a.jsonl").report.remarks() == [
            f"all 2 answers are labelled {said}: kto learns from the difference of the two kinds"
        ] * bool(said)


def test_a_table_without_a_header_says_what_its_first_line_is(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1+1?,2\n2+2?,4\n")
    told = (
        "a.csv:2: no known format has the columns 1+1?, 2 (columns: {prompt: COLUMN, completion: COLUMN} names others)"
    )
    assert str(read("sft", "a.csv").error).startswith(f"{told} (its first line names the columns); accepted: text; ")
    (tmp_path / "a.csv").write_text("Instruction,Response\n1+1?,2\n")
    assert "(did you mean columns: {prompt: Instruction, completion: Response}?)" in str(read("sft", "a.csv").error)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_a_column_of_reasoning_is_part_of_the_answer_or_refused(read: Read, lines: Lines, name: str) -> None:
    row = {"question": "Hi", "answer": "Hello", name: "A greeting."}
    lines("a.jsonl", [row, {**row, name: ""}])
    first, second = read("sft", "a.jsonl").rows
    assert first.completions == ([{"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."}],)
    assert (first.prompt, second.prompt, second.completions) == (MESSAGES[:1], "Hi", ("Hello",))
    refused = f"a.jsonl:1: {name}: is not read in a row of trl pair, and says something that the columns read do not"
    lines("a.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b", name: "A greeting."}])
    assert str(read("dpo", "a.jsonl").error).startswith(refused)


def test_rated_answers_to_one_prompt_are_compared(read: Read, lines: Lines) -> None:
    """HelpSteer2: one answer a row, two rows a prompt."""
    rated = [("Q", "a", 2), ("Q", "b", 4), ("R", "c", 1), ("R", "d", 0)]
    rows = [{"prompt": asked, "response": said, "helpfulness": score, "verbosity": 1} for asked, said, score in rated]
    lines("a.jsonl", rows)
    found = read("rm", "a.jsonl")
    assert [(row.prompt, row.completions, row.scores, row.place) for row in found.rows] == [
        ("Q", ("b", "a"), (4.0, 2.0), "a.jsonl:1"), ("R", ("c", "d"), (1.0, 0.0), "a.jsonl:3"),
    ]  # fmt: skip
    assert found.report.sources[0].ignored_columns == {"verbosity": 2}
    assert [row.completions for row in read("dpo", "a.jsonl").rows] == [("b", "a"), ("c", "d")]
    assert [row.completions for row in read("sft", "a.jsonl").rows] == [("a",), ("b",), ("c",), ("d",)]
    lines("a.jsonl", rows[:3])
    assert str(read("rm", "a.jsonl").error).startswith("a.jsonl:3: helpfulness: is of one rated answer to its prompt")


def test_turns_of_others_inside_a_compared_answer_are_refused_by_place(read: Read, lines: Lines) -> None:
    answer = turns("-", "first", "said by the user", "second")[1:]
    lines("a.jsonl", [{"prompt": turns("Q"), "chosen": answer, "rejected": "no"}])
    assert read("dpo", "a.jsonl").message.startswith("a.jsonl:1: holds a turn of the user inside an answer, ")
    masked = [{"role": "assistant", "content": "a", "weight": 0}]
    lines("b.jsonl", [{"prompt": turns("Q"), "chosen": masked, "rejected": "no"}])
    assert read("dpo", "b.jsonl").message.startswith("b.jsonl:1: an answer that is compared is marked as not learnt; ")
    assert len(read("rm", "a.jsonl").rows) == 1  # a reward is read once, at the end of the whole


def test_trees_of_messages_become_their_threads(read: Read, lines: Lines) -> None:
    def node(name: str, parent: str | None, text: str, **more: Any) -> dict[str, Any]:
        role = "prompter" if parent is None or parent[0] == "a" else "assistant"
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, **more}

    rows = [
        node("q", None, "Q"), node("a1", "q", "second", rank=1), node("a0", "q", "best", rank=0),
        node("p", "a0", "More"),
        node("a3", "p", "more"), node("q2", "a1", "unanswered"), node("a9", "q", "gone", deleted=True),
        node("r", None, "R"),
        node("a5", "r", "r"), node("a6", "lost", "x"),
    ]  # fmt: skip
    lines("flat.jsonl", rows)
    reading = read("sft", "flat.jsonl", on_bad_row="skip")
    expected = [turns("Q", "best", "More", "more"), turns("Q", "second"), turns("R", "r")]
    assert [row.completions[0] for row in reading.rows] == expected
    assert reading.rejects.first[0].what.startswith("parent_id: 'lost' is no message of the tree; ")
    asked = [
        {"text": text, "role": "prompter", "replies": [{"text": text, "role": "assistant"}]} for text in ("x", "y")
    ]
    tree = {"text": "Q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", "replies": asked}]}
    lines("trees.jsonl", [{"message_tree_id": "1", "prompt": tree}])
    first, second = (row.completions[0] for row in read("sft", "trees.jsonl").rows)
    assert first == turns("Q", "a", "x", "x")
    assert second == [*turns("Q", "a", trained=False), *turns("y", "y")]  # its first answer was learnt above


def test_the_schema_names_the_formats_of_the_table() -> None:
    from typing import get_args

    from alignkit.recipe.schema import DataSource

    assert {*get_args(DataSource.model_fields["format"].annotation)} == {
        "auto", *(form.name for form in FORMATS if form.kind != "labelled")
    }  # fmt: skip
