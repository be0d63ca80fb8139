"""Rows that do not fit: the reason for one, the file of those left out, the error that names the first ones."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, DiskError, Problem

SHOWN_PROBLEMS = 5
_SPOOL_BYTES = 1 << 20  # beyond this the rejects wait on disk, not in memory
_PLACE = re.compile(r"(?s)(?P<file>.*?)(?::(?P<line>\d+)|\[row (?P<row>\d+)\])?\Z")


class BadRow(ValueError):
    """A row that cannot be used; `reason` reads "field: what is wrong", and equal answers are counted by themselves."""

    def __init__(self, reason: str, *, equal_answers: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.equal_answers = equal_answers


class Rejects:
    """The rows left out, in constant memory, until they are written as rejects.jsonl."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Problem] = []  # the first five, for an error when nothing else is left
        # Lives as long as this object; closed by the garbage collector, as a temporary file may be.
        self._lines = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, mode="w+b")  # noqa: SIM115

    def add(self, place: str, reason: str) -> None:
        """Remember one row; `place` is a Row's place."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(Problem(reason, place))
        found = _PLACE.fullmatch(place)
        assert found is not None  # the pattern matches every string
        located: dict[str, Any] = {"file": found["file"]}
        located |= {key: int(found[key]) for key in ("line", "row") if found[key]}
        self._lines.write(json.dumps(located | {"reason": reason}).encode() + b"\n")

    def write(self, path: Path) -> None:
        """Write all rows to `path`, if there are any, whole or not at all; raises DiskError."""
        if not self.count:
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._lines.seek(0)
        try:
            with partial.open("wb") as out:
                while chunk := self._lines.read(_SPOOL_BYTES):
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DiskError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            self._lines.seek(0, os.SEEK_END)


class Problems:
    """Counts what is wrong and keeps the first few; `raise_any` says it all at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.files: list[Problem] = []  # about a file as a whole
        self.rows: list[Problem] = []
        self.num_rows = 0

    def add_row(self, place: str, reason: str) -> None:
        """Count a row; only the first five are kept. With `at_once` the first one is raised."""
        if self.at_once:
            raise DataError(reason, where=place)
        self.num_rows += 1
        if len(self.rows) < SHOWN_PROBLEMS:
            self.rows.append(Problem(reason, place))

    def raise_any(self, num_read: int, remedies: Iterable[str] = ()) -> None:
        """Raise a DataError when there is a problem, with remedies; `num_read` is the number of all rows read."""
        if not self.files and not self.num_rows:
            return
        advice = "on_bad_row: skip leaves such rows out and writes rejects.jsonl"
        summary = []
        if more := self.num_rows - len(self.rows):
            summary = [Problem(f"and {more} more of {num_read} rows ({advice})")]
        elif self.num_rows:
            summary = [Problem(f"{self.num_rows} of {num_read} rows cannot be used ({advice})")]
        raise DataError([*self.files, *self.rows, *summary, *map(Problem, remedies)])
