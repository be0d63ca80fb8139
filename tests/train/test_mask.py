"""The loss-mask preview, from the token tables of every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import Rejects
from alignkit.models.chat import Chat
from alignkit.models.tokens import load_tokenizer
from alignkit.train.mask import preview_rows
from alignkit.train.tables import prepare_tables

BASE = "model: {path: builtin:tiny-llama}\n"
PAIR = {
    "prompt": [{"role": "user", "content": "Which is it?"}],
    "chosen": [{"role": "assistant", "content": "Good."}],
    "rejected": [{"role": "assistant", "content": "Bad."}],
}
TURN = "<|im_start|>user\nWhich is it?<|im_end|>\n<|im_start|>assistant\n"


def preview(make_stage: Callable, tmp_path: Path, section: str, name: str) -> list[dict[str, Any]]:
    stage = make_stage(BASE + section, name)
    chat = Chat(load_tokenizer(stage))
    tables = prepare_tables(stage, chat, tmp_path / "cache", rejects=Rejects())
    return preview_rows(tables.train, chat.tokenizer)


def spans(sequence: dict[str, Any]) -> list[tuple[str, str]]:
    return [(span["kind"], "".join(span["tokens"])) for span in sequence["spans"]]


def test_an_answer_is_learnt_and_its_prompt_is_read(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows([{"messages": [*PAIR["prompt"], *PAIR["chosen"]]}])
    (row,) = preview(make_stage, tmp_path, "sft: {data: ./rows.jsonl}", "sft")
    (sequence,) = row["sequences"]
    found = spans(sequence)
    assert found[:2] == [("read", TURN), ("learnt", "Good.<|im_end|>")]
    assert len(sequence["spans"][1]["tokens"]) > 1  # token by token


def test_both_answers_of_a_pair_are_learnt_by_dpo(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows([PAIR])
    (row,) = preview(make_stage, tmp_path, "dpo: {data: ./rows.jsonl}", "dpo")
    assert [(each["label"], spans(each)[1]) for each in row["sequences"]] == [
        ("chosen", ("learnt", "Good.<|im_end|>")),
        ("rejected", ("learnt", "Bad.<|im_end|>")),
    ]


def test_a_reward_is_read_at_the_last_token(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows([PAIR])
    (row,) = preview(make_stage, tmp_path, "rm: {data: ./rows.jsonl}", "rm")
    assert [each["label"] for each in row["sequences"]] == ["answer 1", "answer 2"]
    assert [kind for kind, _ in spans(row["sequences"][0])] == ["read", "scored"]
    assert len(row["sequences"][0]["spans"][1]["tokens"]) == 1


@pytest.mark.parametrize("text", ["naïve 日本語 🙂 text", "tabs\tand\nlines", "  two  spaces "])
def test_the_tokens_are_the_text_whatever_they_split(
    make_stage: Callable, write_rows: Callable, tmp_path: Path, text: str
) -> None:
    write_rows([{"text": text}])
    (row,) = preview(make_stage, tmp_path, "sft: {data: ./rows.jsonl}", "sft")
    (sequence,) = row["sequences"]
    assert "".join(shown for _, shown in spans(sequence)) == text + "<|endoftext|>"
    assert spans(sequence)[0][0] == "read"  # nothing predicts the first token
    assert json.loads(json.dumps(row)) == row


def test_a_long_row_is_cut_and_says_so(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows([{"text": "word " * 700}])
    (row,) = preview(make_stage, tmp_path, "sft: {data: ./rows.jsonl, max_length: 1500}", "sft")
    (sequence,) = row["sequences"]
    assert sum(len(span["tokens"]) for span in sequence["spans"]) == 400
    assert sequence["num_left_out"] > 100
