"""A template with a date, and with several ends, over the life of a run: gpt-oss's, as TRL ships it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig

from alignkit.models.start import builtin_tokenizer
from alignkit.recipe import Stage
from alignkit.train import sft
from alignkit.train.fingerprint import find_changes

TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]


def run_on(day: int, stage: Stage, monkeypatch: pytest.MonkeyPatch, *, allow_change: tuple[str, ...] = ()) -> str:
    """Train on a day of December, and return the first sequence that was trained on."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Day:
            return cls(2026, 12, day)

    monkeypatch.setattr("alignkit.train.setup.datetime", Day)
    run = Path(stage.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    sft.run(stage, run, allow_change=allow_change)
    (sequence,) = json.loads((run / "preview.json").read_text())["rows"][0]["sequences"]
    return "".join(token for span in sequence["spans"] for token in span["tokens"])


def test_a_run_keeps_its_date_and_saves_what_ends_an_answer(
    make_stage: Callable, write_rows: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": TOKENS})
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes).save_pretrained(tmp_path / "base")
    trl = find_spec("trl")
    assert trl is not None and trl.submodule_search_locations
    template = Path(trl.submodule_search_locations[0]) / "chat_templates" / "gptoss.jinja"
    write_rows([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 2)
    stage = make_stage(
        f"model: {{path: ./base, init: scratch, chat_template: {template}}}\n"
        "sft: {data: ./rows.jsonl, batch_size: 2, max_steps: 1, samples: {num: 0}}",
        "sft",
    )
    first = run_on(1, stage, monkeypatch)
    assert "Current date: 2026-12-01" in first
    run = Path(stage.run_dir)
    ends = json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"]
    # <|end|> closes the thoughts, after which the answer is still to come.
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"<|return|>", "<|call|>", tokenizer.eos_token}
    longer = replace(stage, trainer={**stage.trainer, "max_steps": 2})
    assert run_on(24, longer, monkeypatch, allow_change=("max_steps",)) == first
    assert (run / "checkpoints" / "checkpoint-2").is_dir()
    assert find_changes(longer, run) == []
    other = replace(stage, run_dir=str(tmp_path / "other"))
    assert "Current date: 2026-12-24" in run_on(24, other, monkeypatch)
    prints = [json.loads((path / "stage.json").read_text())["fingerprint"] for path in (run, tmp_path / "other")]
    assert prints[0]["data"] == prints[1]["data"] and prints[0]["template"] != prints[1]["template"]
