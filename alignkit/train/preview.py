"""A batch as the loss sees it: every token as text, and whether it is learnt, only read, scored or padding."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

from alignkit.recipe import Stage
from alignkit.train.encode import IGNORED
from alignkit.train.setup import collator_for

_SHOWN_TOKENS = 400  # of each sequence

Tokens = tuple[str, Sequence[int], Sequence[str]]  # label, ids, kinds


def preview_rows(
    table: Any, collate: Callable[[list[dict[str, Any]]], Any], tokenizer: Any, *, num_rows: int = 3,
    limit: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Collate the first rows of a table as one micro batch and describe every token of it.
    Each row is `{"sequences": [{"label", "spans": [{"kind", "tokens", "special"}], "num_left_out"}]}`. Kinds: `read`
    (context, no loss), `learnt` (its log-probability enters the loss), `scored` (where a reward model reads its reward)
    and `padding`. `special` lists the places of control tokens in `tokens`. A row of several packed documents has a
    sequence for each. A sequence of `limit` tokens, which may have been cut there, says so."""
    rows = [table[number] for number in range(min(num_rows, len(table)))]
    found = _read_batch(rows if "prompt" in rows[0] else collate(rows))  # prompts of ppo are only read
    return [{"sequences": [_describe(tokenizer, *each, limit=limit) for each in sequences]} for sequences in found]


def _read_batch(batch: Any) -> Iterator[Sequence[Tokens]]:
    """Yield the sequences of each row of a collated batch; which columns it has depends on the method."""
    if isinstance(batch, list):
        yield from ([("prompt", row["prompt_ids"], ["read"] * len(row["prompt_ids"]))] for row in batch)
        return
    columns = {name: column.tolist() for name, column in batch.items() if hasattr(column, "tolist")}
    ids = columns["input_ids"]
    if "cu_seq_lens_q" in columns:  # padding-free: all documents of all rows end to end
        pieces = [slice(*ends) for ends in pairwise(columns["cu_seq_lens_q"])]
        yield [
            (f"document {number} of {len(pieces)}", ids[0][piece], _kinds(columns["labels"][0][piece]))
            for number, piece in enumerate(pieces, 1)
        ]
    elif "decoder_attention_mask" in columns:
        for source, mask, target, learnt in zip(*columns.values(), strict=True):
            kinds = ["learnt" if kept else "padding" for kept in learnt]
            yield [("source", source, _kinds([IGNORED] * len(source), mask)), ("target", target, kinds)]
    elif of_row := columns.get("prompt_of") or columns.get("row_of"):
        rows: dict[int, list[Tokens]] = defaultdict(list)
        learnt = columns.get("labels") or [[IGNORED] * len(tokens) for tokens in ids]
        for row, tokens, labels, mask in zip(of_row, ids, learnt, columns["attention_mask"], strict=True):
            kinds = _kinds(labels, mask)
            kinds[sum(mask) - 1] = "scored"
            name = f"answer {len(rows[row]) + 1}" if "prompt_of" in columns else ""
            rows[row].append((name, tokens, kinds))
        yield from rows.values()
    elif "labels" in columns:
        masks = columns.get("attention_mask", [None] * len(ids))
        yield from ([("", *row[:1], _kinds(*row[1:]))] for row in zip(ids, columns["labels"], masks, strict=True))
    else:
        labels = ([flag or IGNORED for flag in flags] for flags in columns["completion_mask"])
        kinds_of = [_kinds(*row) for row in zip(labels, columns["attention_mask"], strict=True)]
        sides = list(zip(ids, kinds_of, strict=True))
        if len(columns["label"]) == len(sides):  # single answers, each desired or not
            for good, side in zip(columns["label"], sides, strict=True):
                yield [("desired" if good else "undesired", *side)]
            return
        for chosen, rejected in zip(sides[: len(sides) // 2], sides[len(sides) // 2 :], strict=True):
            yield [("chosen", *chosen), ("rejected", *rejected)]


def _kinds(labels: Sequence[int], mask: Sequence[int] | None = None) -> list[str]:
    # The first token is predicted from nothing: no method learns it.
    kinds = ["learnt" if number and label != IGNORED else "read" for number, label in enumerate(labels)]
    return [kind if kept else "padding" for kind, kept in zip(kinds, mask or [1] * len(kinds), strict=True)]


def _describe(
    tokenizer: Any, label: str, ids: Sequence[int], kinds: Sequence[str], *, limit: int | None
) -> dict[str, Any]:
    num_tokens = len(kinds) - kinds.count("padding")
    read = ids[: min(num_tokens, _SHOWN_TOKENS)]
    texts, shown = [], ""
    for end in range(1, len(read) + 1):  # a character of several tokens belongs to the last of them
        text = tokenizer.decode(read[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = end == len(read) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    controls = set(tokenizer.added_tokens_decoder)
    tokens = zip(kinds, ids, texts, strict=False)
    spans = []
    for kind, group in groupby(tokens, lambda token: token[0]):
        members = list(group)
        special = [number for number, (_, token, _) in enumerate(members) if token in controls]
        spans.append({"kind": kind, "tokens": [text for *_, text in members], "special": special})
    remarks = [f" max_length ({limit}) is reached"] if num_tokens == limit else []
    remarks += [f"{tokenizer.pad_token} x {len(kinds) - num_tokens}"] if len(kinds) > num_tokens else []
    spans += [{"kind": "padding", "tokens": [text], "special": []} for text in remarks]
    return {"label": label, "spans": spans, "num_left_out": max(num_tokens - _SHOWN_TOKENS, 0)}


def training_rows(stage: Stage, table: Any, tokenizer: Any, *, num_rows: int) -> tuple[Any, Callable[..., Any]]:
    """The first rows of a token table as the stage's trainer reads them, packed if it packs, and its collator."""
    packs = stage.method == "sft" and bool(stage.trainer.get("packing"))
    table = table.select(range(min(len(table), 1000 if packs else num_rows)))
    if packs:
        from trl.data_utils import pack_dataset

        strategy = stage.trainer.get("packing_strategy", "bfd")
        table = pack_dataset(table.select_columns(["input_ids", "labels"]), stage.trainer["max_length"], strategy)
    return table, collator_for(stage, tokenizer)
