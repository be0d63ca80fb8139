"""Rows on disk, so that their number is not bound by memory: parsed ones for later passes, and tables of token ids."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, Any

from alignkit.data.formats import FORMATS, Parsed
from alignkit.data.rows import Row, count_chars
from alignkit.data.sources import Located
from alignkit.runs.files import replacing

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_CHUNK, _CHUNK_CHARS = 4096, 10_000_000  # parsed rows of a source that are held in memory
_MOST_SOURCES, _SPARE_BYTES = 64, 1 << 30  # of the disk of temporary files
_FORMATS = {form: number for number, form in enumerate(FORMATS)}
_OF_ROW = attrgetter("kind", "prompt", "completions", "scores", "label", "margin", "columns", "tokens", "answer")
_TOLD = attrgetter("reason", "equal_answers", "columns", "unread", "noted")
_to_json = json.JSONEncoder(check_circular=False).encode  # rows are trees; looking for circles is a third of the time
_kept: dict[str, KeptRows] = {}


def keep_parsed(located: Located, settings: object, parse: Callable[[], Iterator[Parsed]]) -> KeptRows:
    """Keep the rows of a source as they are parsed, or give those kept, while its files and `settings` are the same."""
    saved = Path(located.source.path).rglob("*") if located.origin == "saved" else ()
    stats = [(str(path), path.stat()) for path in (*located.files, *saved)]
    files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats]
    source = located.source.model_dump(exclude={"weight", "separator", "max_rows"})
    max_rows = located.source.max_rows if not files else None  # built-in data makes, and the hub streams, as many
    key = json.dumps([source, max_rows, files, settings, str(Path.cwd())])
    if key not in _kept:
        if len(_kept) == _MOST_SOURCES:
            del _kept[next(iter(_kept))]
        _kept[key] = KeptRows(parse, lambda: _kept.pop(key, None))
    return _kept[key]


def forget_parsed() -> None:
    """Free the disk of kept rows, once nothing is left to read them."""
    _kept.clear()


class KeptRows:
    """Parsed rows, read from their source once and only as far as they are asked for; anew where the disk is full."""

    def __init__(self, parse: Callable[[], Iterator[Parsed]], forget: Callable[[], object]) -> None:
        self._parse, self._source, self._forget = parse, parse(), forget
        self._is_full = False
        self._file: IO[bytes] | None = None  # has no name: it goes with this object, however the process ends
        self._chunks: list[int] = []  # where batches of rows begin in the file
        self._fresh: list[Parsed] = []  # rows after those
        self._num_chars = 0

    def __call__(self) -> Iterator[Parsed]:
        if self._is_full:
            yield from self._parse()
            return
        number = 0
        while True:
            while number < len(self._chunks):
                yield from self._read(self._chunks[number])
                number += 1
            fresh, place = self._fresh, 0
            while place < len(fresh) or fresh is self._fresh:
                if place == len(fresh):
                    try:
                        fresh.append(next(self._source))
                    except StopIteration:
                        return
                    except BaseException:
                        self._forget()  # a later pass meets the same fault
                        raise
                    if row := fresh[-1].row:
                        self._num_chars += sum(map(count_chars, (row.prompt, *row.completions)))
                    if len(fresh) == _CHUNK or self._num_chars > _CHUNK_CHARS:
                        self._write()
                yield fresh[place]
                place += 1
            number += 1

    def _write(self) -> None:
        """Move the rows in memory to the end of the file, as one line of JSON."""
        rows = [(parsed.place, parsed.form and _FORMATS[parsed.form], parsed.digest.hex(), _TOLD(parsed),
                 parsed.row and _OF_ROW(parsed.row)) for parsed in self._fresh]  # fmt: skip
        start = 0
        try:
            self._file = self._file or TemporaryFile()  # noqa: SIM115
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(_to_json(rows).encode() + b"\n")
            self._file.flush()
            self._is_full = disk_usage(gettempdir()).free < _SPARE_BYTES
        except OSError:
            self._is_full = True
        if self._is_full:
            self._file = None
        self._chunks.append(start)
        self._fresh, self._num_chars = [], 0

    def _read(self, start: int) -> Iterator[Parsed]:
        assert self._file is not None
        self._file.seek(start)
        for place, form, digest, (reason, equal, columns, unread, noted), row in json.loads(self._file.readline()):
            parsed = Parsed(place, None if form is None else FORMATS[form], None, bytes.fromhex(digest), reason, equal,
                            columns, tuple(unread), tuple(noted))  # fmt: skip
            if row:
                kind, prompt, answers, scores, label, margin, texts, tokens, answer = row
                scores, tokens = scores and tuple(scores), tokens and tuple(tokens)
                parsed.row = Row(kind, prompt, tuple(answers), scores, label, margin, place, texts, tokens, answer)
            yield parsed


def write_table(path: Path, batches: Iterable[dict[str, list[Any]]]) -> datasets.Dataset:
    """Write batches of columns to `path`, whole or not at all, ids in 32 bits, and open it as a memory-mapped set."""
    import pyarrow as pa
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    writer: pa.ipc.RecordBatchStreamWriter | None = None
    with replacing(path, mode="wb") as file:
        for columns in batches:
            if writer is None:
                kinds = [(name, _narrow(_as_arrow(values).type)) for name, values in columns.items()]
                schema = pa.schema(kinds)
                writer = pa.ipc.new_stream(file, schema)
            if columns.keys() != set(schema.names):
                raise ValueError(f"columns {sorted(columns)} differ from the first batch's {sorted(schema.names)}")
            arrays = [_as_arrow(columns[column.name], column.type) for column in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        if writer is None:
            raise ValueError("no rows to write")
        writer.close()
    return Dataset.from_file(str(path))


def _as_arrow(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Make a column of values; arrays of int32 are put behind each other as they are."""
    import numpy as np
    import pyarrow as pa

    packed = [isinstance(value, array) for value in values]
    if not all(packed):
        return pa.array([list(value) if is_array else value for value, is_array in zip(values, packed, strict=True)]
                        if any(packed) else values, type=kind)  # fmt: skip
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.frombuffer(b"".join(values), np.int32)))


def _narrow(kind: pa.DataType) -> pa.DataType:
    """Make integers in lists 32 bits wide; a list that is empty throughout is one of integers."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return kind
    inner = kind.value_type
    whole = pa.types.is_integer(inner) or pa.types.is_null(inner)
    return pa.list_(pa.int32() if whole else _narrow(inner))
