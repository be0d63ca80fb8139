"""A JSON array read item by item, so that a file larger than memory can be used.

Deliberately reads arrays only: the standard library reads everything else whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from alignkit.errors import DataError

_CHUNK_BYTES = 1 << 18
_SPACE = " \t\n\r"


def iter_array(stream: IO[bytes], name: str, *, max_item_chars: int) -> Iterator[Any]:
    """Yield the items of the array that the stream holds.

    Raises:
        DataError: the text is not one JSON array, not UTF-8, or an item is longer than `max_item_chars`; with
            `name` and the line. Items before the fault have been yielded by then.
    """
    text = _Window(stream, name)
    text.expect("[")
    if text.next_char() == "]":
        text.position += 1
    else:
        while True:
            text.next_char()
            yield text.decode_item(max_item_chars)
            if text.expect(",]") == "]":
                break
    if text.next_char():
        raise text.error("more text after the end of the list")


class _Window:
    """The part of the file in memory, and where in it we are."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.position = 0
        self._stream, self._name = stream, name
        self._text = ""
        self._lines_before = 0  # newlines, and the column, that were dropped in front of the window
        self._columns_before = 0
        self._ended = False
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._raw_decode = json.JSONDecoder().raw_decode

    def next_char(self) -> str:
        """Skip white space and return the character there, or "" at the end."""
        while True:
            while self.position < len(self._text):
                if self._text[self.position] not in _SPACE:
                    return self._text[self.position]
                self.position += 1
            if not self._read_more():
                return ""

    def expect(self, accepted: str) -> str:
        found = self.next_char()
        if not found or found not in accepted:
            expected = " or ".join(repr(char) for char in accepted)
            raise self.error(f"expected {expected}, found {repr(found) if found else 'the end of the file'}")
        self.position += 1
        return found

    def decode_item(self, max_chars: int) -> Any:
        """Decode the item at the position, reading on while it may only be cut off."""
        while True:
            try:
                item, end = self._raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                if len(self._text) - self.position > max_chars:
                    # An item this long is an unclosed quote or bracket; the decoder's own message points elsewhere.
                    self._refuse_long(error, max_chars)
                failure = self.error(error.msg, error.pos)  # its position is in the window as it is now
                if not self._read_more():
                    raise failure from error
                continue
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise self.error(reason) from error
            if end < len(self._text) or not self._read_more():  # a number may go on in the next chunk
                self.position = end
                return item

    def _refuse_long(self, error: json.JSONDecodeError, max_chars: int) -> None:
        if error.pos < self.position + max_chars // 2 and not error.msg.startswith("Unterminated"):
            raise self.error(error.msg, error.pos) from error
        raise self.error(f"the row is longer than {round(max_chars / 1e6)} MB or never ends") from error

    def _read_more(self) -> bool:
        """Drop what is behind us and append a chunk; False at the end of the file."""
        if self._ended:
            return False
        passed = self._text[: self.position]
        self._lines_before += passed.count("\n")
        newline = passed.rfind("\n")
        self._columns_before = self._columns_before + len(passed) if newline < 0 else len(passed) - newline - 1
        chunk = self._stream.read(_CHUNK_BYTES)
        self._ended = not chunk
        try:
            fresh = self._to_text.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            what = f"holds byte 0x{byte:02x}, which is not UTF-8; save the file as UTF-8"
            raise DataError(what, where=self._name) from error
        self._text = self._text[self.position :] + fresh
        self.position = 0
        return not self._ended or bool(fresh)

    def error(self, what: str, position: int | None = None) -> DataError:
        behind = self._text[: self.position if position is None else position]
        line = self._lines_before + behind.count("\n") + 1
        newline = behind.rfind("\n")
        column = self._columns_before + len(behind) + 1 if newline < 0 else len(behind) - newline
        return DataError(f"invalid JSON: {what} (column {column})", where=f"{self._name}:{line}")
