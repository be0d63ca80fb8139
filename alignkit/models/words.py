"""Batched tokenisation that looks a word up instead of splitting it again.

Byte-level tokenizers cut a text before every single space between words, so the ids of a text are the ids of its
words, and most words of a data set have been seen. Where that is not certain, the tokenizer does the work itself.
It adds no special tokens and keeps no offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

_MAX_WORDS = 100_000  # about 20 MB of Python lists
# A run of white space with a space in it is cut as a whole, and differently at its end.
_RUN = re.compile(r"\s | \s")
# Patterns that start a new piece at a space between two visible characters: Llama 3, Qwen 2 and 3, GPT-4's.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SAFE_PATTERNS = frozenset({_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL, _CONTRACTIONS + r"\p{N}" + _TAIL})


class WordTokenizer:
    """Tokenize texts exactly as the backend does, with a cache of words where that is safe."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.cached = _cuts_at_spaces(backend)
        self._first: dict[str, list[int]] = {}  # the text up to its first space
        self._spaced: dict[str, list[int]] = {}  # ids of " " + word

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens of its own accord."""
        if not self.cached:
            return self._encode_all(texts)
        split = [None if _RUN.search(text) else text.split(" ") for text in texts]
        self._learn([words for words in split if words])
        whole = iter(self._encode_all([text for text, words in zip(texts, split, strict=True) if words is None]))
        spaced = self._spaced.__getitem__
        return [
            next(whole) if words is None else [*self._first[words[0]], *chain.from_iterable(map(spaced, words[1:]))]
            for words in split
        ]

    def _learn(self, texts: list[list[str]]) -> None:
        """Tokenize the words that are new, all at once."""
        if len(self._first) + len(self._spaced) > _MAX_WORDS:
            self._first.clear()
            self._spaced.clear()
        first = list({words[0] for words in texts} - self._first.keys())
        spaced = list(set(chain.from_iterable(words[1:] for words in texts)) - self._spaced.keys())
        ids = self._encode_all([*first, *(f" {word}" for word in spaced)])
        self._first.update(zip(first, ids[: len(first)], strict=True))
        self._spaced.update(zip(spaced, ids[len(first) :], strict=True))

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _cuts_at_spaces(backend: Tokenizer) -> bool:
    """Say whether a tokenizer is known to cut before each space that stands between two visible characters."""
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    if _describe(backend.normalizer)["type"] not in (None, "NFC"):
        return False
    if any(token.rstrip or " " in token.content for token in backend.get_added_tokens_decoder().values()):
        return False
    before = _describe(backend.pre_tokenizer)
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if kinds == ["ByteLevel"]:
        return steps[0]["use_regex"]  # GPT-2's own pattern
    return (
        kinds == ["Split", "ByteLevel"]
        and not steps[1]["use_regex"]
        and steps[0]["pattern"].get("Regex") in _SAFE_PATTERNS
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
    )


def _describe(part: Any) -> dict[str, Any]:
    """Return what a part of the pipeline is made of; its pickle state is the JSON of tokenizer.json."""
    return {"type": None} if part is None else json.loads(part.__getstate__())
