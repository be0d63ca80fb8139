"""The prompts of a ppo stage as tokens: how long they may be, and what travels with them for rewards.

Deliberately samples nothing; what an answer is and how it is scored are `rollout`'s and `rewards`' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.data import Rejects
from alignkit.errors import DataError
from alignkit.models.start import context_length
from alignkit.recipe import Stage
from alignkit.recipe.schema import PpoOptions

if TYPE_CHECKING:
    from alignkit.train.encode import EncodedRow, LengthReport


def longest_prompt(stage: Stage) -> int | None:
    """Return the most tokens a ppo prompt may have: what max_new_tokens leaves of the context; None without a limit.

    Raises DataError when that is nothing.
    """
    context, answer = context_length(stage), stage.expect(PpoOptions).max_new_tokens
    if context is not None and answer >= context:
        raise DataError(
            f"{stage.name}.max_new_tokens is {answer}, and the model reads {context} tokens at once: no room for a "
            "prompt is left; lower it",
            where=stage.where(f"{stage.name}.max_new_tokens"),
        )
    return None if context is None else context - answer


class PromptEncoder:
    """Prompts -> their ids as generation starts from them, the prompt itself and its columns for rewards."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "prompt", "columns", "length")}
        for row, (prompt,) in rows:
            ids = prompt.ids
            lengths.longest_tokens = max(lengths.longest_tokens, len(ids))
            if self._limit is not None and len(ids) > self._limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"a prompt of {len(ids)} tokens, which leaves no room for max_new_tokens")
                continue
            lengths.num_rows += 1
            lengths.num_tokens += len(ids)
            columns["prompt_ids"].append(ids)
            columns["prompt"].append(json.dumps(row.prompt, ensure_ascii=False))
            columns["columns"].append(row.columns or "{}")
            columns["length"].append(len(ids))
        return columns


def join_columns(rows: Iterable[str]) -> dict[str, list[Any]]:
    """Return the `columns` of table rows as a reward function gets them: one list a name, None where a row has none."""
    read = [json.loads(text) for text in rows]
    names = dict.fromkeys(name for row in read for name in row)
    return {name: [row.get(name) for row in read] for name in names}
