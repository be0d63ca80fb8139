"""Local files to records: .jsonl, .ndjson, .json, .csv, .tsv, .txt (each plain, .gz or .zst), .parquet and .arrow.

A record is a dict as it stands in the file; a line that cannot become one is yielded as a BadRow so that reading goes
on. A file that cannot be read at all raises a DataError. Nothing here knows formats of rows, and nothing but a JSON
object around a list is held in memory as a whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from alignkit.data.json_array import iter_array
from alignkit.data.rejects import BadRow, Problems, Rejects
from alignkit.errors import DataError

Record = dict[str, Any]
Entry = tuple[str, Record | BadRow]  # place, and the record or why there is none
_Parsed = TypeVar("_Parsed")

MAX_LINE_BYTES = 2_000_000 - 1  # a longer line is a broken file far more often than a row
MAX_DOCUMENT_BYTES = 256_000_000 - 1  # of raw text, where one row may be a book
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
ACCEPTED = f"{', '.join(SUFFIXES)}, plain, .gz or .zst"
_PACKED = (".gz", ".zst")
_TABLE_BATCH = 1024
_BUFFER_BYTES = 1 << 18


def data_suffix(path: Path) -> str | None:
    """The suffix that decides how to read the file, without .gz or .zst; None when we do not read such files."""
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def display_name(path: Path) -> str:
    """Return the path as messages show it: relative to the working directory where it lies under it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_file(path: Path, *, blocks: bool = False, limit: int = MAX_LINE_BYTES) -> Iterator[Entry]:
    """Yield (place, record or BadRow) for every row of the file; blank lines are no rows.

    A .txt file gives one {"text": ...} per line that is not blank, or with `blocks` one per block of lines between
    blank lines. Places carry real line numbers for jsonl, csv and txt, row numbers (from 1) for json and tables. A row
    of more than `limit` bytes is a BadRow.

    Raises:
        DataError: the file is missing, empty, not readable, or broken beyond one row.
    """
    name = display_name(path)
    suffix = data_suffix(path)
    entries = _entries(path, name, suffix, blocks, limit)
    first = next(entries, None)
    if first is None:
        raise DataError("the file has no rows", where=name)
    yield first
    yield from entries


def read_published(
    path: Path, parse: Callable[[Record], _Parsed], what: str, *, skip: bool, rejects: Rejects
) -> Iterator[tuple[str, _Parsed]]:
    """Yield (place, what `parse` makes of the row) for every row of a file that others have published.

    Rows that cannot be read, or that `parse` fails on as it does on other shapes than `what`, go to `rejects` with
    `skip`; else the first of them are raised as one DataError at the end.
    """
    problems, count = Problems(), 0
    for count, (place, record) in enumerate(read_file(path), 1):  # noqa: B007
        try:
            if isinstance(record, BadRow):
                raise record
            parsed = parse(record)
        except BadRow as bad:
            reason = bad.reason
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"is no {what} ({type(error).__name__}: {error})"
        else:
            yield place, parsed
            continue
        if skip:
            rejects.add(place, reason)
        else:
            problems.add_row(place, reason)
    problems.raise_any(count)


def _entries(path: Path, name: str, suffix: str | None, blocks: bool, limit: int) -> Iterator[Entry]:
    if suffix in (".parquet", ".arrow"):
        yield from _read_table(path, name)
        return
    with _open(path, name) as stream:
        if suffix in (".jsonl", ".ndjson"):
            yield from _read_json_lines(stream, name, limit)
        elif suffix == ".json":
            yield from _read_json(stream, name, limit)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(stream, name, limit, "," if suffix == ".csv" else "\t")
        elif blocks:
            yield from _read_blocks(stream, name, limit)
        else:
            yield from _read_text_lines(stream, name, limit)


@contextmanager
def _open(path: Path, name: str) -> Iterator[io.BufferedReader[Any]]:
    """Open for reading bytes, unpacked when the name says so; reading errors become one line."""
    try:
        with path.open("rb", buffering=0) as raw:
            # GzipFile.readline runs in Python; a BufferedReader around it runs in C.
            stream = io.BufferedReader(_unpack(raw, path.suffix), _BUFFER_BYTES)
            _refuse_foreign(stream, name)
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"is not a whole gzip file: {error}; pack or download it again", where=name) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def _unpack(raw: io.FileIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(raw, "zstd")
    return raw


_FOREIGN = {
    b"\x1f\x8b": "gzip data; name the file .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data; name the file .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet data; name the file .parquet",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8",
}


def _refuse_foreign(stream: io.BufferedReader[Any], name: str) -> None:
    head = stream.peek(4)[:4]
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"holds {what}", where=name)


def _too_long(limit: int) -> BadRow:
    return BadRow(f"the line has {round(limit / 1e6)} MB or more; split the row or remove it")


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield (line number, bytes) without ever holding more than `limit` bytes; drops a byte order mark."""
    readline = stream.readline
    number = 0
    while line := readline(limit + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = readline(limit)
            yield number, _too_long(limit)
        else:
            yield number, line


def _bad_utf8(error: UnicodeDecodeError) -> BadRow:
    byte = error.object[error.start]
    return BadRow(f"byte 0x{byte:02x} at byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")


def _read_json_lines(stream: IO[bytes], name: str, limit: int) -> Iterator[Entry]:
    decode = json.JSONDecoder().raw_decode
    for number, line in _lines(stream, limit):
        place = f"{name}:{number}"
        if isinstance(line, BadRow):
            yield place, line
            continue
        line = line.strip()
        if not line:
            continue
        try:
            text = line.decode()
            record, end = decode(text)
        except UnicodeDecodeError as error:
            yield place, _bad_utf8(error)
        except (ValueError, RecursionError) as error:
            yield place, _bad_json(error)
        else:
            if end != len(text):
                yield place, BadRow(f"invalid JSON: more text after the object (column {end + 1}); one object per line")
            elif type(record) is not dict:
                yield place, not_an_object(record)
            else:
                yield place, record


def _bad_json(error: Exception) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        return BadRow(f"invalid JSON: {error.msg} (column {error.colno})")
    if isinstance(error, RecursionError):
        return BadRow("invalid JSON: nested too deeply")
    return BadRow(f"invalid JSON: {error}")


_JSON_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "text",
}


def type_name(value: object) -> str:
    """Return what JSON calls the value's type: a list, text, a number, ..."""
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


def not_an_object(value: object) -> BadRow:
    """Say that a row is something else than a JSON object."""
    return BadRow(f"the row is {type_name(value)}; it must be an object with named fields")


def _read_json(stream: io.BufferedReader[Any], name: str, limit: int) -> Iterator[Entry]:
    """Read an array of objects, an object that holds one list of them, or lines of objects with the wrong suffix."""
    head = stream.peek(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        for number, value in enumerate(iter_array(stream, name, max_item_chars=limit), start=1):
            place = f"{name}[row {number}]"
            yield place, value if type(value) is dict else not_an_object(value)
    elif _is_whole_object(head):
        yield from _read_json_lines(stream, name, limit)
    elif head:
        yield from _read_json_object(stream, name)


def _is_whole_object(head: bytes) -> bool:
    """Tell JSON lines (a whole object on the first line, another after it) from one big object."""
    first, _, rest = head.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith(b"{")
    except ValueError:
        return False


def _read_json_object(stream: IO[bytes], name: str) -> Iterator[Entry]:
    try:
        value = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", where=name) from error
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        what = f"invalid JSON: {error.msg} (column {error.colno}){hint}"
        raise DataError(what, where=f"{name}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(_bad_json(error).reason, where=name) from error
    lists = {key: held for key, held in value.items() if isinstance(held, list)} if isinstance(value, dict) else {}
    if len(lists) != 1:
        found = f"lists under {', '.join(lists)}" if lists else f"{type_name(value)} without a list"
        raise DataError(f"must be a list of rows, or an object that holds one list of rows; found {found}", where=name)
    (rows,) = lists.values()
    for number, row in enumerate(rows, start=1):
        yield f"{name}[row {number}]", row if type(row) is dict else not_an_object(row)


def _read_csv(stream: IO[bytes], name: str, limit: int, delimiter: str) -> Iterator[Entry]:
    """Read separated values with a header line; cells are text, quoted ones may span lines."""
    csv.field_size_limit(limit)
    broken: dict[int, BadRow] = {}  # lines of the current record that could not be read
    reader = csv.reader(_decoded(stream, limit, broken), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # The reader has lost track of quotes; what follows would be guesswork.
            raise DataError(f"invalid CSV: {error}; the record that starts here has no end", where=place) from error
        if cells is None:
            return
        if broken:
            number, bad = broken.popitem()
            broken.clear()
            if header is None:
                raise DataError(bad.reason, where=f"{name}:{number}")
            yield f"{name}:{number}", bad
        elif not cells:
            continue
        elif header is None:
            header = _check_header(cells, place)
        elif len(cells) != len(header):
            yield place, BadRow(f"has {len(cells)} cells; the header has {len(header)}")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _decoded(stream: IO[bytes], limit: int, broken: dict[int, BadRow]) -> Iterator[str]:
    for number, line in _lines(stream, limit):
        if isinstance(line, BadRow):
            broken[number] = line
            yield "\n"
            continue
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            broken[number] = _bad_utf8(error)
            yield line.decode(errors="replace")


def _check_header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (other := next((sign for sign in ",;\t|" if sign in names[0]), "")):
        rule = "a .csv file by commas, a .tsv file by tabs"
        raise DataError(f"the header is one cell, {names[0]!r}: cells look separated by {other!r}; {rule}", where=place)
    if twice := sorted({cell for cell in names if names.count(cell) > 1}):
        raise DataError(f"the header names {', '.join(map(repr, twice))} more than once", where=place)
    return names


def _read_text_lines(stream: IO[bytes], name: str, limit: int) -> Iterator[Entry]:
    for number, line in _lines(stream, limit):
        if isinstance(line, BadRow):
            yield f"{name}:{number}", line
        elif line := line.strip():
            try:
                yield f"{name}:{number}", {"text": line.decode()}
            except UnicodeDecodeError as error:
                yield f"{name}:{number}", _bad_utf8(error)


def _read_blocks(stream: IO[bytes], name: str, limit: int) -> Iterator[Entry]:
    """Join lines up to the next blank one; a line that cannot be read spoils its block."""
    for start, lines in _iter_blocks(stream, limit):
        place = f"{name}:{start}"
        bad = next((line for line in lines if isinstance(line, BadRow)), None)
        try:
            yield place, bad or {"text": b"".join(line for line in lines if isinstance(line, bytes)).decode().strip()}
        except UnicodeDecodeError:
            yield place, BadRow("the block holds bytes that are not UTF-8; save the file as UTF-8")


def _iter_blocks(stream: IO[bytes], limit: int) -> Iterator[tuple[int, list[bytes | BadRow]]]:
    block: list[bytes | BadRow] = []
    start, size = 1, 0
    for number, line in _lines(stream, limit):
        if not isinstance(line, BadRow) and not line.strip():
            if block:
                yield start, block
            block, size = [], 0
            continue
        start = start if block else number
        size += 0 if isinstance(line, BadRow) else len(line)
        if size > limit:
            block = [_too_long(limit)]
        else:
            block.append(line)
    if block:
        yield start, block


def _read_table(path: Path, name: str) -> Iterator[Entry]:
    import pyarrow as pa

    if path.suffix in _PACKED:
        raise DataError(f"a table is packed already and cannot be read through {path.suffix}; unpack it", where=name)
    kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
    number = 0
    try:
        for batch in _iter_arrow(path) if kind == "Arrow" else _iter_parquet(path):
            for start in range(0, len(batch), _TABLE_BATCH):
                for record in batch.slice(start, _TABLE_BATCH).to_pylist():
                    number += 1
                    yield f"{name}[row {number}]", record
    except (pa.ArrowException, OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        after = f" after row {number}" if number else ""
        raise DataError(f"is not a readable {kind} file{after}: {first_line}", where=name) from error


def _iter_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=_TABLE_BATCH)


def _iter_arrow(path: Path) -> Iterator[Any]:
    """Read what datasets writes, a stream, or what Feather is, a file that ends with a table of its batches."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
