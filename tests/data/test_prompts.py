"""Any row can be a prompt of a ppo stage: what is kept of it, and what is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.rows import Row

USER = [{"role": "user", "content": "Hi?"}]
ANSWER = [{"role": "assistant", "content": "Hello."}]
FUNCTION = [{"function": "m:f"}]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Hi?"}, "Hi?"),
        ({"prompt": USER}, USER),
        ({"prompt": "Hi?", "completion": "Hello."}, "Hi?"),
        ({"prompt": USER, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "No."}]}, USER),
        ({"prompt": "Hi?", "completions": ["a", "b"], "scores": [1, 0]}, "Hi?"),
        ({"prompt": "Hi?", "completion": "Hello.", "label": True}, "Hi?"),
        ({"messages": [*USER, *ANSWER]}, USER),
        ({"messages": [*USER, *ANSWER, *USER, *ANSWER]}, [*USER, *ANSWER, *USER]),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}, USER),
        ({"instruction": "Say", "input": "hello", "output": "hello"}, "Say\n\nhello"),
        ({"text": "Once upon a time"}, "Once upon a time"),
        ({"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, USER),
    ],
)
def test_the_prompt_of_every_kind_of_row(read: Callable, lines: Callable, record: dict[str, Any], prompt: Any) -> None:
    lines("a.jsonl", [record])
    (row,) = read("ppo", "a.jsonl", reward="x/y").rows
    assert row == Row("prompt", prompt, (), None, None, None, "a.jsonl:1", "")


def test_columns_are_kept_where_a_function_reads_them(read: Callable[..., Any], lines: Callable[..., Path]) -> None:
    lines("a.jsonl", [{"prompt": "Hi?", "completion": "Hello.", "wanted": 3, "prompts": "x"}])
    reading = read("ppo", "a.jsonl", reward=FUNCTION)
    assert json.loads(reading.rows[0].columns) == {"completion": "Hello.", "wanted": 3}
    assert reading.report.to_dict()["sources"][0]["ignored_columns"] == {}
    as_gold = read("ppo", "a.jsonl", reward="x/y", gold=FUNCTION)
    assert json.loads(as_gold.rows[0].columns)["wanted"] == 3
    without = read("ppo", "a.jsonl", reward="x/y")
    assert without.rows[0].columns == ""
    assert without.report.to_dict()["sources"][0]["ignored_columns"] == {"wanted": 1, "prompts": 1}
    assert without.report.fingerprint != reading.report.fingerprint


def test_empty_prompts_are_refused_with_their_place(read: Callable[..., Any], lines: Callable[..., Path]) -> None:
    lines("a.jsonl", [{"prompt": "Hi?"}, {"prompt": " "}, {"prompt": None}])
    message = read("ppo", "a.jsonl", reward="x/y").message
    assert "a.jsonl:2: prompt: is empty" in message and "a.jsonl:3: prompt: is null" in message
    lines("b.jsonl", [{"prompt": []}, {"prompt": [{"role": "user", "content": ""}]}, {"prompt": ANSWER}])
    message = read("ppo", "b.jsonl", reward="x/y").message
    assert "b.jsonl:1: prompt: is an empty list" in message
    assert "b.jsonl:2: prompt[0].content: is empty" in message
    assert "b.jsonl:3: prompt: the last turn is assistant; it must be user" in message


def test_rows_that_differ_in_their_answers_only_are_one_prompt(read: Callable, lines: Callable) -> None:
    lines("a.jsonl", [{"prompt": "Hi?", "completion": "a"}, {"prompt": "Hi?", "completion": "b"}])
    assert len(read("ppo", "a.jsonl", reward="x/y", dedupe=True).rows) == 1


def test_a_column_that_is_no_json_is_named(read: Callable[..., Any], tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["Hi?"], "when": [datetime.date(2020, 1, 1)]}), tmp_path / "a.parquet")
    assert "when: holds a value that is no JSON" in read("ppo", "a.parquet", reward=FUNCTION).message
    assert len(read("ppo", "a.parquet", reward="x/y").rows) == 1
