"""The loss-mask preview, from the token tables of every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from alignkit.errors import RecipeError
from alignkit.runs.directory import RunDir
from alignkit.train.preview import preview_rows, training_rows

BASE = "model: {path: builtin:tiny-llama}\n"
PAIR = {
    "prompt": [{"role": "user", "content": "Which is it?"}],
    "chosen": [{"role": "assistant", "content": "Good."}],
    "rejected": [{"role": "assistant", "content": "Bad."}],
}
TURN = "<|im_start|>user\nWhich is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def preview(prepare: Callable) -> Callable:
    """Return a function that previews one row of a one-stage recipe: its sequences."""

    def preview(row: dict, recipe: str) -> list[dict[str, Any]]:
        made = prepare([row], recipe)
        table, collate = training_rows(made.stage, made.tables.train, made.chat.tokenizer, num_rows=3)
        (found,) = preview_rows(table, collate, made.chat.tokenizer)
        assert json.loads(json.dumps(found)) == found
        sequences: list[dict[str, Any]] = found["sequences"]
        return sequences

    return preview


def spans(sequence: dict[str, Any]) -> list[tuple[str, str]]:
    return [(span["kind"], "".join(span["tokens"])) for span in sequence["spans"]]


def test_an_answer_is_learnt_and_its_prompt_is_read(preview: Callable) -> None:
    (sequence,) = preview({"messages": [*PAIR["prompt"], *PAIR["chosen"]]}, "sft: {data: ./rows.jsonl}")
    assert spans(sequence)[:2] == [("read", TURN), ("learnt", "Good.<|im_end|>")]
    assert len(sequence["spans"][1]["tokens"]) > 1  # token by token


def test_both_answers_of_a_pair_are_learnt_by_dpo(preview: Callable) -> None:
    assert [(each["label"], spans(each)[1]) for each in preview(PAIR, "dpo: {data: ./rows.jsonl}")] == [
        ("chosen", ("learnt", "Good.<|im_end|>")),
        ("rejected", ("learnt", "Bad.<|im_end|>")),
    ]


def test_a_reward_is_read_at_the_last_token(preview: Callable) -> None:
    sequences = preview(PAIR, "rm: {data: ./rows.jsonl}")
    assert [each["label"] for each in sequences] == ["answer 1", "answer 2"]
    assert [kind for kind, _ in spans(sequences[0])] == ["read", "scored"]
    assert len(sequences[0]["spans"][1]["tokens"]) == 1


@pytest.mark.parametrize("text", ["naïve 日本語 🙂 text", "tabs\tand\nlines", "  two  spaces "])
def test_the_tokens_are_the_text_whatever_they_split(preview: Callable, text: str) -> None:
    (sequence,) = preview({"text": text}, "sft: {data: ./rows.jsonl}")
    assert "".join(shown for _, shown in spans(sequence)) == text + "<|endoftext|>"
    assert spans(sequence)[0][0] == "read"  # nothing predicts the first token


def test_a_long_row_is_cut_and_says_so(preview: Callable) -> None:
    (sequence,) = preview({"text": "word " * 700}, "sft: {data: ./rows.jsonl, max_length: 1500}")
    assert sum(len(span["tokens"]) for span in sequence["spans"]) == 400
    assert sequence["num_left_out"] > 100


STAGES = {
    "sft": "sft: {data: ./rows.jsonl, batch_size: 2, max_length: 64}",
    "packed": "packed: {method: sft, data: ./rows.jsonl, batch_size: 2, packing: true, max_length: 40}",
    "wrapped": "wrapped: {method: sft, data: ./rows.jsonl, batch_size: 2, packing: true, packing_strategy: wrapped, "
    "max_length: 32}",
    "rm": "rm: {data: ./rows.jsonl, batch_size: 2}",
    "dpo": "dpo: {data: ./rows.jsonl, batch_size: 2, pad_to_multiple_of: 32}",
    "kto": "kto: {method: dpo, loss_type: kto, data: ./rows.jsonl, batch_size: 2}",
}


@pytest.mark.parametrize("name", list(STAGES))
def test_the_batch_is_the_one_that_the_trainer_gets(
    make_stage: Callable, write_rows: Callable, tmp_path: Path, name: str
) -> None:
    """Row for row and key for key, padding and packing included."""
    import torch

    from alignkit.train import dpo, rm, sft

    short, long = (
        {**PAIR, "prompt": [{"role": "user", "content": text}]} for text in ("Why?", "And what is this one?")
    )
    chats = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in (short, PAIR, long)]
    write_rows(chats if "sft" in STAGES[name] else [short, PAIR, long])
    stage = make_stage(BASE + STAGES[name], name)
    (tmp_path / "run").mkdir()
    trainer = {"sft": sft, "rm": rm, "dpo": dpo}[stage.method].build(stage, RunDir(tmp_path / "run")).trainer
    table = Dataset.from_file(str(tmp_path / "run" / "cache" / "train.arrow"))
    table, collate = training_rows(stage, table, trainer.processing_class, num_rows=2)
    columns = [column for column in trainer.train_dataset.column_names if not column.startswith("KL_")]
    rows, expected = ([each[number] for number in range(2)] for each in (table, trainer.train_dataset))
    if name != "kto":  # whose rows are shuffled once, and go with a neighbour's answer
        assert [{key: row[key] for key in columns} for row in rows] == expected
    mine, theirs = collate(rows), trainer.data_collator(rows)
    assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in theirs.keys() | mine)


def test_a_preview_names_what_looks_wrong(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    from alignkit.preflight.check import preview_stage

    long = [{"role": "user", "content": "a " * 99}]
    write_rows([{"messages": [*prompt, *PAIR["chosen"]]} for prompt in (PAIR["prompt"], long)])
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|><|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text = (
        "model: {path: builtin:tiny-llama, chat_template: ./endless.jinja}\n"
        "sft: {data: ./rows.jsonl, max_length: 90, max_truncated: 0.6}\n"
    )
    shown = preview_stage(make_stage(text, "sft"), num_rows=5)
    assert shown["findings"] == [
        "1 of 1 rows end with <|im_end|><|im_end|>, more than one end; first row 1",
        "50.0% of the rows are longer than max_length: 1 cut, 0 left out; the longest has 111 tokens; "
        "first cut: rows.jsonl:2",
        "1 rows are left out: they have no token to learn from",
        "rows.jsonl:2: left out: no token to learn from within max_length",
    ]
    assert len(shown["rows"]) == 1


def test_a_stage_without_rows_of_tokens_cannot_be_previewed(make_stage: Callable, write_rows: Callable) -> None:
    from alignkit.preflight.check import preview_stage

    write_rows([{"prompt": "a"}])
    text = (
        BASE
        + "label: {method: label, data: ./rows.jsonl, judge: builtin:true-reward, constitution: builtin:harmlessness}\n"
    )
    with pytest.raises(RecipeError, match="label is a label stage: it trains on no rows"):
        preview_stage(make_stage(text, "label"), num_rows=1)


def test_answers_that_later_turns_rewrite_are_counted(
    make_stage: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    from alignkit.preflight.check import preview_stage

    write_rows([{"messages": [*PAIR["prompt"], *PAIR["chosen"]] * 2}])
    (tmp_path / "last.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}So: {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = "model: {path: builtin:tiny-llama, chat_template: ./last.jinja}\nsft: {data: ./rows.jsonl}\n"
    shown = preview_stage(make_stage(text, "sft"), num_rows=5)
    assert shown["facts"]["learnt apart"] == "1 answers, each in a text of its own: later turns rewrite them"
    learnt = [text for row in shown["rows"] for kind, text in spans(row["sequences"][0]) if kind == "learnt"]
    assert learnt == ["So: Good.<|im_end|>"] * 2
