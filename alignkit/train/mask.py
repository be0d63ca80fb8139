"""A few rows as the trainer sees them: every token as text, and what the loss does with it.

It reads the token tables that training reads; there is no second tokenisation that could drift. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from alignkit.train.encode import IGNORED

_SHOWN_ROWS = 3
_SHOWN_TOKENS = 400  # of each sequence


def preview_rows(table: Any, tokenizer: Any, *, num_rows: int = _SHOWN_ROWS) -> list[dict[str, Any]]:
    """Return the first rows of a token table as sequences of tokens with what becomes of them.

    Each row is `{"sequences": [{"label", "spans": [{"kind", "tokens"}], "num_left_out"}]}`. Kinds: `read` (context, no
    loss), `learnt` (its log-probability enters the loss) and `scored` (where a reward model reads its reward).
    """
    return [
        {"sequences": [_describe(tokenizer, *sequence) for sequence in _sequences(table[number])]}
        for number in range(min(num_rows, len(table)))
    ]


def _sequences(row: dict[str, Any]) -> Iterator[tuple[str, Sequence[int], list[str]]]:
    """Yield label, ids and kinds of each sequence of a row; `encode` says which columns each method has."""
    if "labels" in row:
        # The first token is predicted from nothing: no method learns it.
        learnt = [number > 0 and label != IGNORED for number, label in enumerate(row["labels"])]
        yield "", row["input_ids"], ["learnt" if flag else "read" for flag in learnt]
    elif "answers_ids" in row:
        for rank, ids in enumerate(row["answers_ids"]):
            yield f"answer {rank + 1}", ids, ["read"] * (len(ids) - 1) + ["scored"]
    elif "chosen_ids" in row:
        yield "chosen", *_join(row["prompt_ids"], row["chosen_ids"])
        yield "rejected", *_join(row["prompt_ids"], row["rejected_ids"])
    elif "completion_ids" in row:
        yield "desired" if row["label"] else "undesired", *_join(row["prompt_ids"], row["completion_ids"])
    else:
        yield "prompt", row["prompt_ids"], ["read"] * len(row["prompt_ids"])


def _join(prompt: Sequence[int], completion: Sequence[int]) -> tuple[list[int], list[str]]:
    return [*prompt, *completion], ["read"] * len(prompt) + ["learnt"] * len(completion)


def _describe(tokenizer: Any, label: str, ids: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    texts = _split_text(tokenizer, ids[:_SHOWN_TOKENS])
    pairs = zip(kinds[: len(texts)], texts, strict=True)
    spans = [
        {"kind": kind, "tokens": [text for _, text in group]} for kind, group in groupby(pairs, lambda pair: pair[0])
    ]
    return {"label": label, "spans": spans, "num_left_out": max(len(ids) - _SHOWN_TOKENS, 0)}


def _split_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's share of the text; a character of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for number in range(len(ids)):
        text = tokenizer.decode(ids[: number + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = number + 1 == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return texts
