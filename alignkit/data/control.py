"""Control tokens inside user text, such as "<|im_end|>", which could forge turns: finding them and defusing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from alignkit.data.rows import Row, iter_contents, map_strings

# WORD JOINER: invisible, no line break, left alone by Unicode normalisation. Behind a token's first character it
# keeps the tokenizer from matching the rest.
BREAKER = "\u2060"


def find_control_tokens(row: Row, tokens: Sequence[str]) -> list[str]:
    """Find the tokens that occur in the row's text, each once, in their order."""
    if not tokens:
        return []
    search = _exact(tuple(tokens)).findall
    return list(dict.fromkeys(token for text in iter_contents(row) for token in search(text)))


def as_rendered(row: Row, tokens: Sequence[str]) -> Row | None:
    """Take a row that a chat template has written already as the text it is; None for any other.

    Such a text begins with a control token and has more of them. It may have been taken for what a user says.
    """
    completions = list(row.completions)
    text = row.prompt or next(iter(completions), "")
    if isinstance(row.prompt, list):
        turns = [turn[0]["content"] for turn in (row.prompt, *completions) if isinstance(turn, list) and len(turn) == 1]
        if len(turns) != 1 + len(completions):
            return None
        text, completions = turns[0], list(turns[1:])
    if not isinstance(text, str) or not _exact(tuple(tokens)).match(text.lstrip()):
        return None
    if len(_exact(tuple(tokens)).findall(text)) < 2:
        return None
    return replace(row, prompt=text if row.prompt else "", completions=tuple(completions))


def escape_control_tokens(row: Row, tokens: Sequence[str]) -> Row:
    """Put a WORD JOINER behind the first character of every token in the row's text; `unescape_text` undoes it exactly.

    Raises ValueError for a token of a single character, which nothing can break.
    """
    if not tokens:
        return row
    given = tuple(tokens)
    # The fast pattern first: most texts have neither.
    if not any(BREAKER in text or _exact(given).search(text) for text in iter_contents(row)):
        return row

    def escape(text: str) -> str:
        return _at_starts(text, given, lambda piece: piece + BREAKER)

    completions = tuple(map_strings(text, escape) for text in row.completions)
    return replace(row, prompt=map_strings(row.prompt, escape), completions=completions)


def unescape_text(text: str, tokens: Sequence[str]) -> str:
    """Undo `escape_control_tokens` for one text, such as a generated answer."""
    if not tokens or BREAKER not in text:
        return text
    return _at_starts(text, tuple(tokens), lambda piece: piece.removesuffix(BREAKER))


@lru_cache(maxsize=8)
def _exact(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(set(tokens) - {""}, key=len, reverse=True))))


def _at_starts(text: str, tokens: tuple[str, ...], change: Callable[[str], str]) -> str:
    """Change every character at which a token starts, with the joiners behind it.

    Joiners do not count in finding tokens, and tokens may overlap: what is found is the same before and after.
    """
    starts = {match.start() for match in _start(tokens).finditer(text.replace(BREAKER, ""))}
    if not starts:
        return text
    lead, *pieces = _PIECES.findall(text) if text.startswith(BREAKER) else ["", *_PIECES.findall(text)]
    return lead + "".join(change(piece) if place in starts else piece for place, piece in enumerate(pieces))


_PIECES = re.compile(rf"^{BREAKER}+|[^{BREAKER}]{BREAKER}*", re.DOTALL)


@lru_cache(maxsize=8)
def _start(tokens: tuple[str, ...]) -> re.Pattern[str]:
    if single := [token for token in tokens if len(token) == 1]:
        raise ValueError(f"tokens of one character cannot be escaped: {single}")
    return re.compile(f"(?={_exact(tokens).pattern})")
