"""What came of reading the data: counts per source, duplicates, length bias, overlap, fingerprint."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from alignkit.data.rows import Row, count_chars, prompt_key
from alignkit.errors import DataError, Problem
from alignkit.runs.files import replacing

SHOWN_PROBLEMS = 5
_SPOOL_BYTES = 1 << 20  # beyond this rejects and hashes wait on disk, not in memory
_PLACE = re.compile(r"(?s)(?P<file>.*?)(?::(?P<line>\d+)|\[row (?P<row>\d+)\])?\Z")


@dataclass
class SourceReport:
    """Counts of one source; `read` = `kept` + `rejected` + `duplicates_dropped` + `not_sampled`."""

    path: str
    read: int = 0
    kept: int = 0  # rows used, before weight repeats them
    rejected: int = 0
    duplicates_dropped: int = 0  # by dedupe
    not_sampled: int = 0  # left out by a weight with a fraction
    equal_answers: int = 0  # of the rejected: chosen and rejected are the same
    formats: Counter[str] = field(default_factory=Counter)  # "hh pair" -> rows
    forms: Counter[str] = field(default_factory=Counter)  # rows given out as "chat", as "text", or "raw" as they are
    ignored_columns: Counter[str] = field(default_factory=Counter)  # column or key of messages -> rows that have it
    ignored_places: dict[str, str] = field(default_factory=dict)  # the first of those rows
    noted: dict[str, tuple[int, str]] = field(default_factory=dict)  # what is odd about rows -> how many, the first


@dataclass
class DataReport:
    """Everything worth knowing about the rows that were read; complete once the rows are exhausted."""

    sources: list[SourceReport] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # of the rows given out
    desirable: int = 0  # of the unpaired ones
    rows: int = 0  # given out: after weights, with ranked lists broken up where the method does so
    chars: Counter[str] = field(default_factory=Counter)  # of prompts, of all completions, of chosen and of rejected
    comparisons: int = 0  # pairs, and best against worst of ranked lists
    longer_chosen: float = 0  # of them; equal lengths count half
    overlap: int = 0  # rows whose prompt is also in the rows this report was compared with
    overlap_places: list[str] = field(default_factory=list)  # the first five
    remembers: bool = True  # False: no hash of a row is kept, so that memory stays flat over any number of rows
    _row_hashes: Hashes = field(default_factory=lambda: Hashes(), repr=False)  # defined below
    prompt_hashes: Hashes = field(default_factory=lambda: Hashes(), repr=False)
    _hasher: Any = field(default_factory=lambda: blake2b(digest_size=16), repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash, in hex, of all rows given out so far, in order; places do not count."""
        return str(self._hasher.hexdigest())

    @property
    def read(self) -> int:
        return sum(source.read for source in self.sources)

    @property
    def rejected(self) -> int:
        return sum(source.rejected for source in self.sources)

    def add_sizes(self, sizes: Sequence[int]) -> None:
        """Take the sizes of files into the fingerprint, where not all of their rows will be."""
        self._hasher.update(repr(list(sizes)).encode())

    def add_source_row(self, row: Row, digest: bytes, known_prompts: Sequence[int] | None) -> None:
        """Count a row that is used, once however often its weight repeats it."""
        if not self.remembers:
            return
        prompt_hash = hash(prompt_key(row)) & ((1 << 64) - 1)  # comparable within this process only
        self._row_hashes.add(digest[:8])
        self.prompt_hashes.add(prompt_hash.to_bytes(8, sys.byteorder))
        if known_prompts and prompt_hash in known_prompts[(at := bisect_left(known_prompts, prompt_hash)) : at + 1]:
            self.overlap += 1
            if len(self.overlap_places) < SHOWN_PROBLEMS:
                self.overlap_places.append(row.place)

    def add_given_row(self, row: Row, digest: bytes) -> None:
        """Count a row as it is given out; `digest` is that of the row it came from."""
        self.rows += 1
        self.kinds[row.kind] += 1
        self.desirable += row.kind == "unpaired" and row.label == 1
        self._hasher.update(digest)
        lengths = list(map(count_chars, row.completions))
        self.chars["prompt"] += count_chars(row.prompt) if row.prompt else 0
        self.chars["completion"] += sum(lengths)
        if len(lengths) > 1 and row.kind != "labelled":
            self.comparisons += 1
            self.chars["chosen"] += lengths[0]
            self.chars["rejected"] += lengths[-1]
            self.longer_chosen += 0.5 if lengths[0] == lengths[-1] else lengths[0] > lengths[-1]

    def remarks(self) -> list[str]:
        """Doubts that the rows say what they are meant to."""
        noted = [item for source in self.sources for item in source.noted.items()]
        said = [f"{count} {what} (first: {place})" for what, (count, place) in noted]
        if (labelled := self.kinds["unpaired"]) and self.desirable in (0, labelled):
            kind = "desirable" if self.desirable else "undesirable"
            said.append(f"all {labelled} answers are labelled {kind}: kto learns from the difference of the two kinds")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain data for stage.json and `check --json`. Duplicates repeat an earlier row, dropped or kept, or its
        prompt; copies made by a weight do not count."""

        def count_repeats(hashes: Hashes) -> int:
            return len(hashes) - sum(map(len, hashes.distinct()))

        compared = self.comparisons
        means = {"prompt": self.rows, "completion": self.rows, "chosen": compared, "rejected": compared}
        return {
            "rows": self.rows, "read": self.read, "rejected": self.rejected,
            "duplicates": sum(it.duplicates_dropped for it in self.sources) + count_repeats(self._row_hashes),
            "duplicate_prompts": count_repeats(self.prompt_hashes), "comparisons": compared,
            "longer_chosen_share": self.longer_chosen / compared if compared else None,
            "overlap": self.overlap, "fingerprint": self.fingerprint,
            **{f"mean_{of}_chars": self.chars[of] / n if n else None for of, n in means.items()},
            "kinds": dict(self.kinds), "overlap_places": list(self.overlap_places),
            "sources": [
                {key: dict(value) if isinstance(value, dict) else value for key, value in vars(source).items()}
                for source in self.sources
            ],
        }  # fmt: skip


class Hashes:
    """64-bit hashes in the order they came, in constant memory."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
        self.add = self._file.write

    def __len__(self) -> int:
        return self._file.seek(0, os.SEEK_END) // 8

    def chunks(self) -> Iterator[bytes]:
        """Give their bytes, up to a megabyte at a time; none may be added until all are read."""
        self._file.seek(0)
        return iter(partial(self._file.read, _SPOOL_BYTES), b"")

    def distinct(self) -> Iterator[Any]:
        """Yield each of them once, sorted, as arrays of uint64: of many a range at a time, in a pass over the file."""
        import numpy as np

        for number in range(num := len(self) * 8 // (4 * _SPOOL_BYTES) + 1):
            parts = (np.frombuffer(chunk, np.uint64) for chunk in self.chunks())
            yield np.unique(np.concatenate([part[(part >> 32) * num >> 32 == number] for part in parts] or [[]]))

    def sort(self) -> memoryview:
        """Give what is distinct in ascending order, mapped into memory from the disk; there must be some."""
        with tempfile.TemporaryFile() as file:
            file.writelines(part.tobytes() for part in self.distinct())
            file.flush()
            return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ)).cast("Q")


class Seen:
    """Digests of rows, each once, in a table on disk (SQLite): with any number of them it takes 16 MiB of memory."""

    def __init__(self) -> None:
        import sqlite3

        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # a temporary file
        self._table.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA cache_size = -16384;"
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN"
        )
        self._full = sqlite3.OperationalError

    def add(self, digest: bytes) -> bool:
        """Add one; tell whether it is new. Raises OSError where the disk is full."""
        try:
            return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        except self._full as error:
            raise OSError(errno.ENOSPC, str(error), tempfile.gettempdir()) from error


class Rejects:
    """The rows left out, in constant memory, until they are written as rejects.jsonl."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Problem] = []  # the first five, for an error when nothing else is left
        # Lives as long as this object; closed by the garbage collector, as a temporary file may be.
        self._lines = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, mode="w+", encoding="utf-8")  # noqa: SIM115

    def add(self, place: str, reason: str) -> None:
        """Remember one row; `place` is a Row's place."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(Problem(reason, place))
        found: dict[str, str | None] = _PLACE.fullmatch(place).groupdict()  # type: ignore[union-attr]
        located = {key: value if key == "file" else int(value) for key, value in found.items() if value is not None}
        self._lines.write(json.dumps(located | {"reason": reason}) + "\n")

    def write(self, path: Path) -> None:
        """Write all rows to `path`, if there are any, whole or not at all; raises DiskError."""
        if self.count:
            self._lines.seek(0)
            with replacing(path) as file:
                shutil.copyfileobj(self._lines, file)
            self._lines.seek(0, os.SEEK_END)


class Problems:
    """Counts what is wrong and keeps the first few; `raise_any` says it all at once.
    Bad rows go to `skipped` where it is given; else the first one is raised `at_once`, or they are kept."""

    def __init__(self, skipped: Rejects | None = None, *, at_once: bool = False) -> None:
        self.skipped, self.at_once = skipped, at_once
        self.files: list[Problem] = []  # about a file as a whole
        self.rows: list[Problem] = []
        self.num_rows = 0

    def add_row(self, place: str, reason: str) -> None:
        if self.skipped is not None:
            self.skipped.add(place, reason)
        elif self.at_once:
            raise DataError(reason, where=place) from None
        else:
            self.num_rows += 1
            self.rows += [Problem(reason, place)] if self.num_rows <= SHOWN_PROBLEMS else []

    def raise_any(self, num_read: int, remedies: Iterable[str] = ()) -> None:
        """Raise a DataError when there is a problem, with remedies; `num_read` is the number of all rows read."""
        if not self.files and not self.num_rows:
            return
        more = self.num_rows - len(self.rows)
        what = f"and {more} more of {num_read} rows" if more else f"{self.num_rows} of {num_read} rows cannot be used"
        advice = Problem(f"{what} (on_bad_row: skip leaves such rows out and writes rejects.jsonl)")
        raise DataError([*self.files, *self.rows, *[advice] * bool(self.num_rows), *map(Problem, remedies)])
