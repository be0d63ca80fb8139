"""Prompts as tokens: how long they may be, and what travels with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest

from alignkit.errors import DataError
from alignkit.rewards import join_columns
from alignkit.train.encode import longest_prompt

RECIPE = (
    "ppo: {reward: builtin:true-reward, data: rows.jsonl, max_new_tokens: 500, max_truncated: 0.5, "
    "gold: {function: 'm:f'}}"
)
SHORT_AND_LONG = [{"prompt": "short"}, {"prompt": "a long prompt " * 9}]


@pytest.fixture
def ask(prepare: Callable) -> Callable:
    return partial(prepare, model="builtin:tiny-gpt2")


def test_prompts_are_tokenised_as_generation_starts_from_them(ask: Callable) -> None:
    chat = [{"role": "user", "content": "Hi?"}]
    made = ask([{"prompt": chat, "wanted": 3, "note": None}], RECIPE, "ppo.max_new_tokens=400")
    (row,) = made.tables.train
    assert made.decode(row["prompt_ids"]) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert (json.loads(row["prompt"]), json.loads(row["columns"])) == (chat, {"wanted": 3, "note": None})
    assert row["length"] == len(row["prompt_ids"])


def test_text_prompts_get_no_end(ask: Callable) -> None:
    made = ask([{"prompt": "The film was "}], RECIPE, "ppo.chat=false")
    (row,) = made.tables.train
    assert made.decode(row["prompt_ids"]) == json.loads(row["prompt"]) == "The film was "


def test_prompts_without_room_for_an_answer_are_counted(ask: Callable) -> None:
    made = ask(SHORT_AND_LONG, RECIPE, "ppo.chat=false")
    assert longest_prompt(made.stage) == 12
    assert len(made.tables.train) == made.tables.lengths.num_too_long == 1
    assert "rows.jsonl:2" in str(made.rejects.first[0])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("ppo.max_truncated=0.2", "50% of the prompts are longer than the 12 tokens that ppo.max_new_tokens leaves of "
         "the model's context"),
        ("ppo.max_new_tokens=512", "is 512, and the model reads 512 tokens at once: no room for a prompt is left"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_stop_the_stage(ask: Callable, setting: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ask(SHORT_AND_LONG, RECIPE, "ppo.chat=false", setting)


def test_columns_are_lists_with_none_where_a_row_has_none() -> None:
    assert join_columns(['{"a": 1}', '{"b": "x"}', "{}"]) == {"a": [1, None, None], "b": [None, "x", None]}
