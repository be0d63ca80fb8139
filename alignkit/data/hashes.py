"""Stable hashes of rows and prompts, and a compact set of 64-bit hashes.

Digests and keys depend on content only (never on the place of a row, the Python version or the process), so that data
fingerprints, splits and half-weighted sources are the same on every machine. Not for secrets.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from hashlib import blake2b

from alignkit.data.rejects import BadRow
from alignkit.data.rows import Message, Row, Text

DIGEST_BYTES = 16
_FIRST_SIZE = 1 << 12
_64_BITS = (1 << 64) - 1


def digest_row(row: Row) -> bytes:
    """Return 16 bytes that two rows share only when everything but their place is equal.

    Raises:
        BadRow: a text holds half of a surrogate pair, which no tokenizer can read.
    """
    parts = [row.kind, _netstring(row.prompt), *map(_netstring, row.completions)]
    if row.scores is not None or row.label is not None or row.margin is not None:
        parts.append(repr((row.scores, row.label, row.margin)))
    if row.tokens is not None:
        parts.append(repr(row.tokens))
    if row.columns:
        parts.append(row.columns)
    return blake2b(_encode("\x1e".join(parts)), digest_size=DIGEST_BYTES).digest()


def hash_prompt(row: Row) -> int:
    """Return 64 bits of the row's prompt (see `prompt_key`), comparable within this process only."""
    return hash(prompt_key(row)) & _64_BITS


def prompt_key(row: Row) -> bytes:
    """Return what decides whether two rows have the same prompt.

    A prompt of one user turn equals the same prompt as plain text. Rows without a prompt use what stands in for it:
    a conversation the turns before its first answer, a text the text itself, tokens and segments all of them.
    """
    prompt = row.prompt
    if row.kind in ("segments", "tokens"):
        return digest_row(row)
    if not prompt and row.completions:
        prompt = row.completions[0]
        if not isinstance(prompt, str):
            prompt = _before_answer(prompt)
    if isinstance(prompt, str):
        return _encode(prompt.strip())
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _encode(prompt[0]["content"].strip())
    return _encode(_netstring(prompt))


def _before_answer(messages: list[Message]) -> list[Message]:
    for place, message in enumerate(messages):
        if place and message["role"] == "assistant":
            return messages[:place]
    return messages


def _netstring(text: Text) -> str:
    """Join lengths and contents so that no two different texts give the same string."""
    if isinstance(text, str):
        return f"{len(text)}:{text}"
    return "".join(
        [f"{message['role']}:{len(message['content'])}:{message['content']}{_rest(message)}" for message in text]
    )


def _rest(message: Message) -> str:
    """Dump what a message holds beside role and content."""
    if len(message) == 2:
        return ""
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return json.dumps(rest, sort_keys=True, ensure_ascii=False)


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"text holds {half}, half of a surrogate pair: it is not valid Unicode; remove it") from error


class HashSet:
    """64-bit hashes at 16 to 32 bytes each, where a set of ints needs about 70 (open addressing, linear probes)."""

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SIZE))
        self._mask = _FIRST_SIZE - 1
        self._count = 0
        for value in hashes:
            self.add(value)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._find(value or 1)] != 0

    def add(self, value: int) -> bool:
        """Add a hash; return whether it was new."""
        value = value or 1  # 0 marks a free slot
        slot = self._find(value)
        if self._slots[slot]:
            return False
        self._slots[slot] = value
        self._count += 1
        if 2 * self._count > self._mask:
            self._grow()
        return True

    def _find(self, value: int) -> int:
        slots, mask = self._slots, self._mask
        slot = value & mask
        while (found := slots[slot]) and found != value:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        self._mask = len(self._slots) - 1
        for value in old:
            if value:
                self._slots[self._find(value)] = value
