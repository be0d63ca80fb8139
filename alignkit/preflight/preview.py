"""`alignkit preview`: rows of a stage as its trainer reads them, and what looks wrong about their tokens."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import RecipeError
from alignkit.preflight.check import describe_rows, start_today
from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK

if TYPE_CHECKING:
    from alignkit.models.chat import Chat
    from alignkit.train.tables import Tables

_LOOKED_AT = 10_000  # rows whose tokens are looked at for faults


@dataclass
class Preview:
    """Rows as `train.preview` describes them, what was counted over all rows, and findings in words."""

    stage: str
    method: str
    rows: list[dict[str, Any]]
    facts: dict[str, str]
    findings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the page."""
        return asdict(self)


def preview_stage(stage: Stage, *, num_rows: int) -> Preview:
    """Tokenise the rows of a stage as training does, collate the first ones and look for faults; loads no weights."""
    if stage.method in FEEDBACK:
        raise RecipeError(
            f"{stage.name} is a {stage.method} stage: it trains on no rows; preview the stage that trains on what it "
            "writes",
            where=stage.where(stage.name),
        )
    from alignkit.data import Rejects
    from alignkit.models.tokens import load_chat
    from alignkit.train.preview import preview_rows, training_rows
    from alignkit.train.tables import prepare_tables

    stage, _ = start_today(stage)
    chat = load_chat(stage)
    with tempfile.TemporaryDirectory(prefix="alignkit-preview-") as directory:
        rejects = Rejects()
        tables = prepare_tables(stage, chat, Path(directory), rejects=rejects)
        limit = stage.trainer.get("max_length") if tables.lengths.first_cut else None
        table, collate = training_rows(stage, tables.train, chat.tokenizer, num_rows=num_rows)
        rows = preview_rows(table, collate, chat.tokenizer, num_rows=num_rows, limit=limit)
        facts = describe_rows(tables)
        findings = [*tables.report.remarks(), *find_faults(stage, tables, chat), *_left_out(tables, rejects)]
    return Preview(stage.name, stage.method, rows, facts, findings)


def find_faults(stage: Stage, tables: Tables, chat: Chat) -> list[str]:
    """Look at the tokens of the first 10,000 rows for what trains a model wrongly without stopping it."""
    tokenizer, limit = chat.tokenizer, stage.trainer.get("max_length")
    ends = set(chat.stop_ids)
    found: Counter[str] = Counter()
    first: dict[str, int] = {}
    total = min(len(tables.train), _LOOKED_AT)
    for number, row in enumerate(tables.train.select(range(total)), 1):
        faults = (_faults(whole, answer, tokenizer, ends, limit) for whole, answer in _sequences(row))
        for fault in set(chain.from_iterable(faults)):
            found[fault] += 1
            first.setdefault(fault, number)
    return [f"{count} of {total} rows {fault}; first row {first[fault]}" for fault, count in found.most_common()]


def _sequences(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int] | None]]:
    """Yield each sequence of a row of tokens, whole, and the part of it that the model writes."""
    if "labels" in row:
        yield row["input_ids"], [label for label in row["labels"] if label >= 0]
    elif "answers_ids" in row:
        yield from ((ids, ids) for ids in row["answers_ids"])
    elif "prompt" in row:
        yield row["prompt_ids"], None
    else:
        answers = [row[key] for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in row]
        yield from ((row["prompt_ids"] + answer, answer) for answer in answers)


def _faults(
    ids: list[int], answer: list[int] | None, tokenizer: Any, ends: set[int], limit: int | None
) -> Iterator[str]:
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in ends and ids[:2] == [bos, bos]:
        yield f"begin with two {tokenizer.bos_token}"
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        yield f"have characters that the tokenizer does not know ({tokenizer.unk_token})"
    if answer is None or not answer or (limit and len(ids) >= limit):
        return
    last = [token for token in answer[-3:] if token in ends]
    if not last:
        names = " or ".join(sorted(tokenizer.convert_ids_to_tokens(token) for token in ends))
        yield f"end in an answer without {names}: the model will not learn to stop"
    elif len(last) > 1:
        yield f"end with {''.join(tokenizer.convert_ids_to_tokens(last))}, more than one end"


def _left_out(tables: Tables, rejects: Any) -> Iterator[str]:
    lengths = tables.lengths
    if lengths.num_truncated or lengths.num_too_long:
        yield (
            f"{lengths.truncated_share:.1%} of the rows are longer than max_length: {lengths.num_truncated} cut, "
            f"{lengths.num_too_long} left out; the longest has {lengths.longest_tokens} tokens"
            + (f"; first cut: {lengths.first_cut}" if lengths.first_cut else "")
        )
    if lengths.num_untrained:
        yield f"{lengths.num_untrained} rows are left out: they have no token to learn from"
    for reject in rejects.first[:3]:
        yield f"{reject.where}: left out: {reject.what}"
