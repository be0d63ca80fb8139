"""A batch as the loss sees it: every token as text, and whether it is learnt, only read, scored or padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from alignkit.train.encode import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

    from alignkit.recipe import Stage

_SHOWN_TOKENS = 400  # of each sequence

Tokens = tuple[str, Sequence[int], Sequence[str]]  # label, ids, kinds


def preview_rows(
    table: Dataset,
    collate: Callable[[list[dict[str, Any]]], Any],
    tokenizer: Any,
    *,
    num_rows: int = 3,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Collate the first rows of a table as one micro batch and describe every token of it.

    Each row is `{"sequences": [{"label", "spans": [{"kind", "tokens", "special"}], "num_left_out"}]}`. Kinds: `read`
    (context, no loss), `learnt` (its log-probability enters the loss), `scored` (where a reward model reads its reward)
    and `padding`. `special` lists the places of control tokens in `tokens`. A row of several packed documents has a
    sequence for each. A sequence of `limit` tokens, which may have been cut there, says so.
    """
    rows = [table[number] for number in range(min(num_rows, len(table)))]
    batch = rows if "prompt" in rows[0] else collate(rows)  # prompts of ppo are only read
    return [
        {"sequences": [_describe(tokenizer, *sequence, limit=limit) for sequence in sequences]}
        for sequences in _read_batch(batch)
    ]


def training_rows(stage: Stage, table: Dataset, tokenizer: Any, *, num_rows: int) -> tuple[Dataset, Callable[..., Any]]:
    """Give the first rows of a token table as the stage's trainer reads them, packed if it packs, and its collator.

    Equal to `train_dataset` and `data_collator` of the trainer, without a model.
    """
    table = table.select(range(min(len(table), 1000 if stage.trainer.get("packing") else num_rows)))
    pad = {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": stage.trainer.get("pad_to_multiple_of")}
    if stage.method == "ppo":
        return table, list
    if stage.method == "rm":
        from alignkit.train.rm import GroupCollator

        return table, GroupCollator(**pad)
    if stage.is_unpaired:
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        return table, DataCollatorForUnpairedPreference(**pad)
    if stage.method == "dpo":
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        from alignkit.train.dpo import LabelledCollator

        return table, LabelledCollator(DataCollatorForPreference(**pad))
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    strategy = stage.trainer.get("packing_strategy", "bfd")
    if packs := bool(stage.trainer.get("packing")):
        table = pack_dataset(table.select_columns(["input_ids", "labels"]), stage.trainer["max_length"], strategy)
    padding_free = stage.trainer.get("padding_free", False) or (packs and strategy != "wrapped")
    return table, DataCollatorForLanguageModeling(**pad, padding_free=padding_free)


def _read_batch(batch: Any) -> Iterator[Sequence[Tokens]]:
    """Yield the sequences of each row of a collated batch; which columns it has depends on the method."""
    if isinstance(batch, list):
        yield from ([("prompt", row["prompt_ids"], ["read"] * len(row["prompt_ids"]))] for row in batch)
    elif "cu_seq_lens_q" in batch:  # padding-free: all documents of all rows end to end
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        pieces = list(pairwise(batch["cu_seq_lens_q"].tolist()))
        yield [
            (f"document {number} of {len(pieces)}", ids[start:end], _learnt(labels[start:end]))
            for number, (start, end) in enumerate(pieces, 1)
        ]
    elif "labels" in batch:
        masks = batch.get("attention_mask", batch["input_ids"] == batch["input_ids"])
        columns = (batch["input_ids"].tolist(), batch["labels"].tolist(), masks.tolist())
        for ids, labels, mask in zip(*columns, strict=True):
            yield [("", ids, _padded(_learnt(labels), mask))]
    elif "prompt_of" in batch:
        rows: dict[int, list[Tokens]] = {}
        columns = tuple(batch[key].tolist() for key in ("prompt_of", "input_ids", "attention_mask"))
        for prompt, ids, mask in zip(*columns, strict=True):
            kinds = _padded(["read"] * len(ids), mask)
            kinds[sum(mask) - 1] = "scored"
            answers = rows.setdefault(prompt, [])
            answers.append((f"answer {len(answers) + 1}", ids, kinds))
        yield from rows.values()
    else:
        columns = tuple(batch[key].tolist() for key in ("input_ids", "completion_mask", "attention_mask"))
        sides = [
            (ids, _padded(["learnt" if flag else "read" for flag in learnt], mask))
            for ids, learnt, mask in zip(*columns, strict=True)
        ]
        if len(batch["label"]) == len(sides):  # single answers, each desired or not
            for good, (ids, kinds) in zip(batch["label"].tolist(), sides, strict=True):
                yield [("desired" if good else "undesired", ids, kinds)]
            return
        half = len(sides) // 2
        for chosen, rejected in zip(sides[:half], sides[half:], strict=True):
            yield [("chosen", *chosen), ("rejected", *rejected)]


def _learnt(labels: Sequence[int]) -> list[str]:
    # The first token is predicted from nothing: no method learns it.
    return ["learnt" if number and label != IGNORED else "read" for number, label in enumerate(labels)]


def _padded(kinds: list[str], mask: Sequence[int]) -> list[str]:
    return [kind if kept else "padding" for kind, kept in zip(kinds, mask, strict=True)]


def _describe(
    tokenizer: Any, label: str, ids: Sequence[int], kinds: Sequence[str], *, limit: int | None
) -> dict[str, Any]:
    num_tokens = len(kinds) - kinds.count("padding")
    texts = _split_text(tokenizer, ids[: min(num_tokens, _SHOWN_TOKENS)])
    controls = set(tokenizer.added_tokens_decoder)
    tokens = zip(kinds, ids, texts, strict=False)
    spans = []
    for kind, group in groupby(tokens, lambda token: token[0]):
        members = list(group)
        special = [number for number, (_, token, _) in enumerate(members) if token in controls]
        spans.append({"kind": kind, "tokens": [text for *_, text in members], "special": special})
    if num_tokens == limit:
        spans.append({"kind": "padding", "tokens": [f" max_length ({limit}) is reached"], "special": []})
    if num_padding := len(kinds) - num_tokens:
        text = f"{tokenizer.pad_token} x {num_padding}"
        spans.append({"kind": "padding", "tokens": [text], "special": []})
    return {"label": label, "spans": spans, "num_left_out": max(num_tokens - _SHOWN_TOKENS, 0)}


def _split_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Split the text at token borders; a character of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for number in range(len(ids)):
        text = tokenizer.decode(ids[: number + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = number + 1 == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return texts
