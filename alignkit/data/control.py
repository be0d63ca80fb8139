"""Control tokens inside user text: finding them and defusing them.

Text like "<|im_end|>" in a row becomes a real control token when the row is tokenised, and can forge turns. The
tokens are given (a tokenizer's special tokens); this room has none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from alignkit.data.rows import Message, Row, Text, iter_contents

# WORD JOINER: invisible, no line break, left alone by Unicode normalisation. Behind a token's first character it
# keeps the tokenizer from matching the rest.
BREAKER = "\u2060"


def find_control_tokens(row: Row, tokens: Sequence[str]) -> list[str]:
    """Return the tokens that occur in the row's text, each once, in the order they are found."""
    if not tokens:
        return []
    search = _exact(tuple(tokens)).findall
    return list(dict.fromkeys(token for text in iter_contents(row) for token in search(text)))


def escape_control_tokens(row: Row, tokens: Sequence[str]) -> Row:
    """Return the row with a WORD JOINER behind the first character of every token in its text.

    `unescape_text` undoes it exactly, whatever joiners the text had before.

    Raises:
        ValueError: a token is a single character, which nothing can break.
    """
    if not tokens:
        return row
    given = tuple(tokens)
    if not any(_may_need_escape(text, given) for text in iter_contents(row)):
        return row
    escape = _on_contents(lambda text: _broken(given).sub(rf"{BREAKER}\g<0>", text))
    return replace(row, prompt=escape(row.prompt), completions=tuple(map(escape, row.completions)))


def unescape_text(text: str, tokens: Sequence[str]) -> str:
    """Undo `escape_control_tokens` for one text, such as a generated answer."""
    if not tokens or BREAKER not in text:
        return text
    return _broken(tuple(tokens)).sub(lambda match: match[0].replace(BREAKER, "", 1), text)


def _may_need_escape(text: str, tokens: tuple[str, ...]) -> bool:
    """Look with the fast pattern first: the one with look-behinds tries every token at every character."""
    return BREAKER in text or _exact(tokens).search(text) is not None


def _on_contents(change: Callable[[str], str]) -> Callable[[Text], Text]:
    def apply(text: Text) -> Text:
        if isinstance(text, str):
            return change(text)
        return [Message(role=message["role"], content=change(message["content"])) for message in text]

    return apply


def _longest_first(tokens: tuple[str, ...]) -> list[str]:
    return sorted({token for token in tokens if token}, key=len, reverse=True)


@lru_cache(maxsize=8)
def _exact(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, _longest_first(tokens))))


@lru_cache(maxsize=8)
def _broken(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Match tokens with any number of joiners behind their first character.

    Joiners count, so that a text that already holds an escaped token gets one more and loses just that one again.
    """
    if single := [token for token in tokens if len(token) == 1]:
        raise ValueError(f"tokens of one character cannot be escaped: {single}")
    parts = ((re.escape(token[0]), re.escape(token[1:])) for token in _longest_first(tokens))
    return re.compile("|".join(rf"(?<={first}){BREAKER}*{rest}" for first, rest in parts))
