"""Local files to records: .jsonl, .ndjson, .json, .csv, .tsv, .txt (each plain, .gz or .zst), .parquet and .arrow."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any

from alignkit.data.rows import BadRow
from alignkit.errors import DataError
from alignkit.recipe.yaml import label_path

Record = dict[str, Any]
Entry = tuple[str, Record | BadRow]  # place, and the record or why there is none

# A longer line is a broken file far more often than a row; of raw text one row may be a book.
MAX_LINE_BYTES = 2_000_000 - 1
MAX_BYTES = (MAX_LINE_BYTES, 256_000_000 - 1)
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
ACCEPTED = f"{', '.join(SUFFIXES)}, plain, .gz or .zst"
_PACKED = (".gz", ".zst")
_TABLE_BATCH = 1024
_CHUNK_BYTES = 1 << 18
_FOREIGN = {
    b"\x1f\x8b": "gzip data; name the file .gz", b"\x28\xb5\x2f\xfd": "Zstandard data; name the file .zst",
    b"PK\x03\x04": "a zip archive; unpack it", b"PAR1": "Parquet data; name the file .parquet",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8", codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8",
}  # fmt: skip
_JSON_NAMES = {type(None): "null", bool: "true or false", dict: "an object", float: "a number", int: "a number",
               list: "a list", str: "text"}  # fmt: skip


def data_suffix(path: Path) -> str | None:
    """The suffix that decides how to read the file, without .gz or .zst; None when we do not read such files."""
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def type_name(value: object) -> str:
    """What JSON calls the value's type: a list, text, a number, ..."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


def read_file(
    path: Path, *, blocks: bool = False, limit: int = MAX_LINE_BYTES, named: bool = False, shard: bool = False
) -> Iterator[Entry]:
    """Yield (place, record or BadRow) for every row of the file; raises DataError for one broken beyond single rows.
    A .txt file gives one {"text": ...} per line, or with `blocks` one per block of lines between blank ones. Places are
    lines of jsonl, csv and txt, rows (from 1) of json and tables. A row of more than `limit` bytes is a BadRow.
    With `named` a ClassLabel of a table is its name instead of its number; a table that is a `shard` may be empty."""
    name, suffix = label_path(path), data_suffix(path)
    with ExitStack() as opened:
        if suffix in (".parquet", ".arrow"):
            entries = _read_table(path, name, named=named)
        elif (stream := opened.enter_context(_open(path, name))) and suffix in (".jsonl", ".ndjson"):
            entries = _read_json_lines(stream, name, limit)
        elif suffix == ".json":
            entries = _read_json(stream, name, limit)
        elif suffix in (".csv", ".tsv"):
            entries = _read_csv(stream, name, limit, "," if suffix == ".csv" else "\t")
        else:
            entries = _read_text(stream, name, limit, blocks)
        if (first := next(entries, None)) is None:
            if shard and suffix in (".parquet", ".arrow"):
                return
            raise DataError("the file has no rows", where=name)
        yield first
        yield from entries


def read_parallel(path: Path, target: Path, *, limit: int = MAX_LINE_BYTES) -> Iterator[Entry]:
    """Yield a prompt and its completion for every line of two text files that translate each other, of any suffix."""
    name, other = label_path(path), label_path(target)
    with _open(path, name) as sources, _open(target, other) as targets:
        for lines in zip_longest(_lines(sources, limit), _lines(targets, limit)):
            number = next(line[0] for line in lines if line is not None)
            if None in lines:
                longer, shorter = (name, other) if lines[1] is None else (other, name)
                raise DataError(f"has no counterpart in {shorter}, which ends before", where=f"{longer}:{number}")
            try:
                source, translation = (_decode(line).strip() for _, line in lines)
                yield f"{name}:{number}", {"prompt": source, "completion": translation}
            except BadRow as bad:
                yield f"{name}:{number}", bad


@contextmanager
def _open(path: Path, name: str) -> Iterator[io.BufferedReader[Any]]:
    """Open for reading bytes, unpacked when the name says so; reading errors become one line."""
    try:
        with path.open("rb", buffering=0) as raw:
            unpacked: Any = raw
            if path.suffix == ".gz":
                unpacked = gzip.GzipFile(fileobj=raw, mode="rb")
            elif path.suffix == ".zst":
                import pyarrow as pa

                unpacked = pa.CompressedInputStream(raw, "zstd")
            # GzipFile.readline runs in Python; a BufferedReader around it runs in C.
            stream = io.BufferedReader(unpacked, _CHUNK_BYTES)
            head = stream.peek(4)[:4]
            for magic, what in _FOREIGN.items():
                if head.startswith(magic):
                    raise DataError(f"holds {what}", where=name)
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"is not a whole gzip file: {error}; pack or download it again", where=name) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield (line number, bytes) without ever holding more than `limit` bytes; drops a byte order mark."""
    readline, number = stream.readline, 0
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


def _too_long(limit: int) -> BadRow:
    return BadRow(f"the line has {round(limit / 1e6)} MB or more; split the row or remove it")


def _decode(line: bytes | BadRow) -> str:
    if isinstance(line, BadRow):
        raise line
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        what = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line is not UTF-8"
        raise BadRow(f"{what}; save the file as UTF-8") from None


def _bad_json(error: Exception) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        return BadRow(f"invalid JSON: {error.msg} (column {error.colno})")
    return BadRow(f"invalid JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}")


def _as_entry(place: str, value: Any) -> Entry:
    if type(value) is dict:
        return place, value
    return place, BadRow(f"the row is {type_name(value)}; it must be an object with named fields")


def _read_text(stream: IO[bytes], name: str, limit: int, blocks: bool) -> Iterator[Entry]:
    """Read lines, or blocks of lines up to the next blank one; a line that cannot be read spoils its block."""
    block: list[str] = []
    start, size = 0, 0
    bad: BadRow | None = None
    for number, line in chain(_lines(stream, limit), [(0, b"")]):
        goes_on = isinstance(line, BadRow) or bool(line.strip())
        start = start or (number if goes_on else 0)
        size += 0 if isinstance(line, BadRow) else len(line)
        try:
            block.append(_decode(line))
            if size > limit:
                block, bad = [], bad or _too_long(limit)
        except BadRow as unread:
            of_block = blocks and not isinstance(line, BadRow)
            what = "the block holds bytes that are not UTF-8; save the file as UTF-8"
            bad = bad or (BadRow(what) if of_block else unread)
        if start and (not goes_on or not blocks):
            yield f"{name}:{start}", bad or {"text": "".join(block).strip()}
        if not goes_on or not blocks:
            block, start, size, bad = [], 0, 0, None


def _read_json_lines(stream: IO[bytes], name: str, limit: int) -> Iterator[Entry]:
    decode = json.JSONDecoder().raw_decode
    for number, line in _lines(stream, limit):
        place = f"{name}:{number}"
        if not isinstance(line, BadRow) and not (line := line.strip()):
            continue
        try:
            text = _decode(line)
            record, end = decode(text)
            if end != len(text):
                raise BadRow(f"invalid JSON: more text after the object (column {end + 1}); one object per line")
        except BadRow as bad:
            yield place, bad
        except (ValueError, RecursionError) as error:
            yield place, _bad_json(error)
        else:
            yield _as_entry(place, record)


def _read_json(stream: io.BufferedReader[Any], name: str, limit: int) -> Iterator[Entry]:
    """Read an array of objects, an object that holds one list of them, or lines of objects."""
    head = stream.peek(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, rest = head.partition(b"\n")
    try:  # lines have a whole object on the first one, and another after it
        has_lines = isinstance(json.loads(first), dict) and rest.lstrip().startswith(b"{")
    except ValueError:
        has_lines = False
    if has_lines:
        yield from _read_json_lines(stream, name, limit)
        return
    items: Iterable[Any] = _read_array(stream, name, limit) if head.startswith(b"[") else ()
    if head and not head.startswith(b"["):
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
        lists = [key for key in value if isinstance(value[key], list)] if isinstance(value, dict) else []
        if len(lists) != 1:
            found = f"lists under {', '.join(lists)}" if lists else f"{type_name(value)} without a list"
            what = f"must be a list of rows, or an object that holds one list of rows; found {found}"
            raise DataError(what, where=name)
        items = value[lists[0]]
    for number, item in enumerate(items, start=1):
        yield _as_entry(f"{name}[row {number}]", item)


def _read_array(stream: IO[bytes], name: str, limit: int) -> Iterator[Any]:
    """Yield the items of a JSON array one by one, for files larger than memory; faults name line and column."""
    decode, decoder = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    text, at, ended = "", 0, False  # what is held of the file, and the place in it
    line, column = 1, 1  # of the first character held

    def locate(place: int) -> tuple[int, int]:
        lines = text.count("\n", 0, place)
        return line + lines, place - text.rfind("\n", 0, place) if lines else column + place

    def fault(what: str, place: int) -> DataError:
        number, position = locate(place)
        return DataError(f"invalid JSON: {what} (column {position})", where=f"{name}:{number}")

    def read_on() -> bool:
        """Drop what is behind and append a chunk; False at the end of the file."""
        nonlocal text, at, ended, line, column
        if ended:
            return False
        line, column = locate(at)
        chunk = stream.read(_CHUNK_BYTES)
        ended = not chunk
        try:
            text, at = text[at:] + decoder.decode(chunk, final=ended), 0
        except UnicodeDecodeError as error:
            what = f"holds byte 0x{error.object[error.start]:02x}, which is not UTF-8; save the file as UTF-8"
            raise DataError(what, where=name) from error
        return True

    def skip_blanks() -> str:
        """Go to the next character that is no white space, and peek at it; "" at the end."""
        nonlocal at
        while True:
            at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or not read_on():
                return text[at : at + 1]

    expected = "["
    while True:
        found = skip_blanks()
        if not found or found not in expected:
            either = " or ".join(map(repr, expected))
            raise fault(f"expected {either}, found {repr(found) if found else 'the end of the file'}", at)
        at += 1
        if found == "]":
            break
        if skip_blanks() == "]" and found == "[":
            expected = "]"
            continue
        while True:  # read on while an item may only be cut off
            try:
                item, end = decode(text, at)
            except json.JSONDecodeError as error:
                wrong = fault(error.msg, error.pos)  # its position is in the text as it is now
                if len(text) - at > limit:
                    # An item this long is an unclosed quote or bracket; the decoder's own message points elsewhere.
                    if error.pos < at + limit // 2 and not error.msg.startswith("Unterminated"):
                        raise wrong from error
                    raise fault(f"the row is longer than {round(limit / 1e6)} MB or never ends", at) from error
                if not read_on():
                    raise wrong from error
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise fault(reason, at) from error
            else:
                if end < len(text) or not read_on():  # a number may go on in the next chunk
                    break
        at, expected = end, ",]"
        yield item
    if skip_blanks():
        raise fault("more text after the end of the list", at)


_BLANKS = re.compile(r"[ \t\n\r]*")


def _read_csv(stream: IO[bytes], name: str, limit: int, delimiter: str) -> Iterator[Entry]:
    """Read separated values with a header line; cells are text, quoted ones may span lines."""
    csv.field_size_limit(limit)
    broken: dict[int, BadRow] = {}  # lines of the current record that could not be read

    def decode() -> Iterator[str]:
        for number, line in _lines(stream, limit):
            try:
                yield _decode(line)
            except BadRow as bad:
                broken[number] = bad
                yield "\n" if isinstance(line, BadRow) else line.decode(errors="replace")

    reader = csv.reader(decode(), delimiter=delimiter, strict=True)
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
            header = [cell.strip() for cell in cells]
            if len(header) == 1 and (other := next((sign for sign in ",;\t|" if sign in header[0]), "")):
                what = f"the header is one cell, {header[0]!r}: cells look separated by {other!r}"
                raise DataError(f"{what}; a .csv file by commas, a .tsv file by tabs", where=place)
            if twice := sorted({cell for cell in header if header.count(cell) > 1}):
                raise DataError(f"the header names {', '.join(map(repr, twice))} more than once", where=place)
        elif len(cells) != len(header):
            yield place, BadRow(f"has {len(cells)} cells; the header has {len(header)}")
        else:
            yield place, dict(zip(header, cells, strict=True))


def read_records(table: Any, *, named: bool) -> list[Record]:
    """Give the rows of an Arrow table; with `named` the ClassLabels that datasets notes in its schema are names."""
    records: list[Record] = table.to_pylist()
    stored = (table.schema.metadata or {}).get(b"huggingface") if named else None
    for column, feature in (json.loads(stored)["info"]["features"] if stored else {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = dict(enumerate(feature["names"]))
            for record in records:
                record[column] = names.get(record[column], record[column])  # -1 and null stay: there is no label
    return records


def _read_table(path: Path, name: str, *, named: bool) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix in _PACKED:
        raise DataError(f"a table is packed already and cannot be read through {path.suffix}; unpack it", where=name)
    kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
    number = 0
    try:
        if kind == "Parquet":
            batches: Iterable[Any] = pq.ParquetFile(path, pre_buffer=False).iter_batches(_TABLE_BATCH)
        elif (source := pa.memory_map(str(path))).read(6) == b"ARROW1":  # Feather: a file that lists its batches
            file = pa.ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:  # a stream, as datasets writes it
            source.seek(0)
            batches = pa.ipc.open_stream(source)
        for batch in batches:
            for start in range(0, len(batch), _TABLE_BATCH):
                for record in read_records(batch.slice(start, _TABLE_BATCH), named=named):
                    number += 1
                    yield f"{name}[row {number}]", record
    except (pa.ArrowException, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        after = f" after row {number}" if number else ""
        raise DataError(f"is not a readable {kind} file{after}: {first_line}", where=name) from error
