"""Prompts as tokens: how long they may be, and what travels with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.data import Rejects
from alignkit.errors import DataError
from alignkit.models.chat import Chat
from alignkit.models.tokens import load_tokenizer
from alignkit.recipe import Stage
from alignkit.train.encode import longest_prompt
from alignkit.train.ppo.sampling import join_columns
from alignkit.train.tables import Tables, prepare_tables

RECIPE = """model: {path: builtin:tiny-gpt2}
ppo: {reward: builtin:true-reward, data: rows.jsonl, max_new_tokens: 500, max_truncated: 0.5, gold: {function: 'm:f'}}
"""
Make = Callable[..., Stage]
WriteRows = Callable[..., Path]


def tables(stage: Stage, tmp_path: Path, rejects: Rejects | None = None) -> Tables:
    return prepare_tables(stage, Chat(load_tokenizer(stage)), tmp_path / "cache", rejects=rejects or Rejects())


def test_prompts_are_tokenised_as_generation_starts_from_them(
    make_stage: Make, write_rows: WriteRows, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Hi?"}]
    write_rows([{"prompt": chat, "wanted": 3, "note": None}])
    stage = make_stage(RECIPE, "ppo", "ppo.max_new_tokens=400")
    (row,) = tables(stage, tmp_path).train
    tokenizer = load_tokenizer(stage)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads(row["prompt"]) == chat
    assert json.loads(row["columns"]) == {"wanted": 3, "note": None}
    assert row["length"] == len(row["prompt_ids"])


def test_text_prompts_get_no_end(make_stage: Make, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows([{"prompt": "The film was "}])
    stage = make_stage(RECIPE, "ppo", "ppo.chat=false")
    (row,) = tables(stage, tmp_path).train
    assert load_tokenizer(stage).decode(row["prompt_ids"]) == "The film was "
    assert json.loads(row["prompt"]) == "The film was "


def test_prompts_without_room_for_an_answer_are_counted(
    make_stage: Make, write_rows: WriteRows, tmp_path: Path
) -> None:
    write_rows([{"prompt": "short"}, {"prompt": "a long prompt " * 9}])
    stage, rejects = make_stage(RECIPE, "ppo", "ppo.chat=false"), Rejects()
    assert longest_prompt(stage) == 12
    found = tables(stage, tmp_path, rejects)
    assert len(found.train) == 1 and found.lengths.num_too_long == 1
    assert rejects.first[0].where == str(tmp_path / "rows.jsonl") + ":2" or "rows.jsonl:2" in str(rejects.first[0])


def test_too_many_long_prompts_stop_the_stage(make_stage: Make, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows([{"prompt": "short"}, {"prompt": "a long prompt " * 9}])
    stage = make_stage(RECIPE, "ppo", "ppo.chat=false", "ppo.max_truncated=0.2")
    with pytest.raises(DataError) as caught:
        tables(stage, tmp_path)
    assert "50% of the prompts are longer than the 12 tokens that ppo.max_new_tokens leaves of the model's context" in (
        str(caught.value)
    )


def test_an_answer_that_fills_the_context_is_refused(make_stage: Make, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows([{"prompt": "short"}])
    with pytest.raises(DataError, match="is 512, and the model reads 512 tokens at once: no room for a prompt is left"):
        tables(make_stage(RECIPE, "ppo", "ppo.chat=false", "ppo.max_new_tokens=512"), tmp_path)


def test_columns_are_lists_with_none_where_a_row_has_none() -> None:
    assert join_columns(['{"a": 1}', '{"b": "x"}', "{}"]) == {"a": [1, None, None], "b": [None, "x", None]}
