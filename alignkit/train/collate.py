"""Batches of token rows as each trainer reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.models.logprobs import pad
from alignkit.recipe import Stage

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class LabelledCollator:
    """TRL's preference collator, with each pair's soft label P(chosen preferred) kept beside the tokens, (B,)."""

    inner: Callable[[Any], dict[str, Tensor]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.inner(rows)
        batch["label"] = torch.tensor([row.get("label", 1.0) for row in rows], dtype=torch.float)
        return batch


@dataclass
class GroupCollator:
    """Flatten the answers of B prompts into A rows, and list their pairs by row number.

    Returns input_ids, attention_mask (A, T) right-padded; better, worse, pair_prompt (P,) long; label, margin (P,)
    float; prompt_of (A,) long. Ties make no pair.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        answers = [ids for row in rows for ids in row["answers_ids"]]
        input_ids, attention_mask = pad(answers, self.pad_token_id, multiple_of=self.pad_to_multiple_of or 1)
        pairs: list[tuple[int, int, int, float, float]] = []
        prompt_of: list[int] = []
        for prompt, row in enumerate(rows):
            first, scores = len(prompt_of), row["scores"]
            prompt_of += [prompt] * len(scores)
            pairs += [
                (first + better, first + worse, prompt, row["label"], row["margin"])
                for better, worse in combinations(range(len(scores)), 2)
                if scores[better] != scores[worse]
            ]
        better, worse, pair_prompt, label, margin = zip(*pairs, strict=True)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "pair_prompt": torch.tensor(pair_prompt),
            "label": torch.tensor(label, dtype=torch.float),
            "margin": torch.tensor(margin, dtype=torch.float),
            "prompt_of": torch.tensor(prompt_of),
        }


def collator_for(stage: Stage, tokenizer: Any) -> Callable[..., Any]:
    """The collator of a stage's token rows, which are cut to max_length already."""
    padding = {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": stage.trainer.get("pad_to_multiple_of")}
    if stage.method == "ppo":
        return list
    if stage.method == "rm":
        return GroupCollator(**padding)
    if stage.is_unpaired:
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        return DataCollatorForUnpairedPreference(**padding)
    if stage.method == "dpo":
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return LabelledCollator(DataCollatorForPreference(**padding))
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packs = stage.trainer.get("packing") and stage.trainer.get("packing_strategy", "bfd") != "wrapped"
    padding_free = stage.trainer.get("padding_free", False) or bool(packs)
    return DataCollatorForLanguageModeling(**padding, padding_free=padding_free)


def training_rows(stage: Stage, table: Dataset, tokenizer: Any, *, num_rows: int) -> tuple[Dataset, Callable[..., Any]]:
    """Give the first rows of a token table as the stage's trainer reads them, packed if it packs, and its collator.

    Equal to `train_dataset` and `data_collator` of the trainer, without a model.
    """
    packs = stage.method == "sft" and bool(stage.trainer.get("packing"))
    table = table.select(range(min(len(table), 1000 if packs else num_rows)))
    if packs:
        from trl.data_utils import pack_dataset

        strategy = stage.trainer.get("packing_strategy", "bfd")
        table = pack_dataset(table.select_columns(["input_ids", "labels"]), stage.trainer["max_length"], strategy)
    return table, collator_for(stage, tokenizer)
