"""Files of every kind, whole and broken: what is read, and the one line that says what cannot be."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.files import MAX_LINE_BYTES, read_file
from alignkit.data.rows import BadRow
from alignkit.errors import DataError

Lines = Callable[..., Path]
ROWS = [{"text": "one"}, {"text": "zwei"}, {"text": "drei – 3"}]


@pytest.fixture(autouse=True)
def _work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def entries(path: Path, *, blocks: bool = False) -> list[tuple[str, Any]]:
    """Places with records, or with the reason for there being none."""
    read = read_file(path, blocks=blocks)
    return [(place, record.reason if isinstance(record, BadRow) else record) for place, record in read]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        entries(path)
    return str(caught.value)


def test_json_lines_carry_line_numbers_past_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}\r\n{"text": "three"}')
    assert entries(path) == [
        ("rows.jsonl:1", {"text": "one"}),
        ("rows.jsonl:4", {"text": "two"}),
        ("rows.jsonl:5", {"text": "three"}),
    ]


def test_gzipped_json_lines_read_the_same(tmp_path: Path, lines: Lines) -> None:
    plain = lines("rows.ndjson", ROWS)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [record for _, record in entries(packed)] == ROWS
    assert entries(packed)[2][0] == "rows.jsonl.gz:3"


def test_zstandard_and_tabs_read_the_same(tmp_path: Path, lines: Lines) -> None:
    import pyarrow as pa

    def pack(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out:
            out.write(data)
        return bytes(sink.getvalue())

    plain = lines("rows.jsonl", ROWS).read_bytes()
    packed = tmp_path / "rows.jsonl.zst"
    packed.write_bytes(pack(plain[:20]) + pack(plain[20:]))  # two frames, as pzstd writes them
    assert [record for _, record in entries(packed)] == ROWS
    packed.write_bytes(pack(plain * 1000)[:-20])
    assert refused(packed).startswith("rows.jsonl.zst: cannot be read: ")
    table = tmp_path / "rows.tsv"
    table.write_text('text\tlabel\none, two\t1\n"a\tb"\t0\n')
    assert [record["text"] for _, record in entries(table)] == ["one, two", "a\tb"]
    (tmp_path / "rows.arrow").write_bytes(b"no table")
    assert refused(tmp_path / "rows.arrow").startswith("rows.arrow: is not a readable Arrow file: ")
    feather = tmp_path / "feather.arrow"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as out:
        out.write_table(pa.Table.from_pylist(ROWS))
    assert [record for _, record in entries(feather)] == ROWS


def test_invalid_json_in_line_734_is_named_with_its_column(lines: Lines) -> None:
    rows: list[Any] = [{"text": f"row {number}"} for number in range(1000)]
    rows[733] = '{"text": "row 733"'
    broken = [(place, what) for place, what in entries(lines("rows.jsonl", rows)) if isinstance(what, str)]
    assert broken == [("rows.jsonl:734", "invalid JSON: Expecting ',' delimiter (column 19)")]


def test_what_is_no_object_is_a_bad_row_and_reading_goes_on(lines: Lines) -> None:
    path = lines("rows.jsonl", ['"text"', "5", "[1]", "null", "true", '{"text": "a"} {"text": "b"}', '{"text": "a"}'])
    assert entries(path) == [
        ("rows.jsonl:1", "the row is text; it must be an object with named fields"),
        ("rows.jsonl:2", "the row is a number; it must be an object with named fields"),
        ("rows.jsonl:3", "the row is a list; it must be an object with named fields"),
        ("rows.jsonl:4", "the row is null; it must be an object with named fields"),
        ("rows.jsonl:5", "the row is true or false; it must be an object with named fields"),
        ("rows.jsonl:6", "invalid JSON: more text after the object (column 14); one object per line"),
        ("rows.jsonl:7", {"text": "a"}),
    ]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "three"}\n')
    assert entries(path)[1] == ("rows.jsonl:2", "byte 0xe9 at byte 14 of the line is not UTF-8; save the file as UTF-8")
    assert len(entries(path)) == 3


def test_hostile_json_is_a_bad_row(lines: Lines) -> None:
    deep, number = "[" * 100_000, "9" * 5000
    found = entries(lines("rows.jsonl", [f'{{"text": {deep}', f'{{"text": {number}}}', {"text": "fine"}]))
    assert found[0] == ("rows.jsonl:1", "invalid JSON: nested too deeply")
    assert found[1][1].startswith("invalid JSON: Exceeds the limit (4300 digits)")
    assert found[2] == ("rows.jsonl:3", {"text": "fine"})


def test_a_line_over_the_limit_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fits = '{"text": "' + "a" * (MAX_LINE_BYTES - 12) + '"}'
    assert len(fits) == MAX_LINE_BYTES
    path.write_text(f'{fits}\n{{"text": "{"b" * 3 * MAX_LINE_BYTES}"}}\n{{"text": "c"}}\n')
    found = entries(path)
    assert len(found[0][1]["text"]) == MAX_LINE_BYTES - 12
    assert found[1:] == [
        ("rows.jsonl:2", "the line has 2 MB or more; split the row or remove it"),
        ("rows.jsonl:3", {"text": "c"}),
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(path) == f"{name}: the file has no rows"


def test_json_array_of_rows_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS, 5], indent=2), encoding="utf-8")
    assert entries(path) == [
        *((f"rows.json[row {number}]", row) for number, row in enumerate(ROWS, 1)),
        ("rows.json[row 4]", "the row is a number; it must be an object with named fields"),
    ]
    rows = [{"text": f"{number} é " + "x" * (number * 97 % 4000)} for number in range(2000)]  # more than a chunk
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [record for _, record in entries(path)] == rows


def test_broken_json_array_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good = [f'{{"text": "{"x" * 300} {number}"}}' for number in range(2000)]
    path.write_text("[\n" + ",\n".join([*good, '{"text": oops}', '{"text": "b"}']) + "\n]")
    assert refused(path) == "rows.json:2002: invalid JSON: Expecting value (column 10)"
    path.write_text("[\n" + ",\n".join(good))
    assert refused(path) == "rows.json:2001: invalid JSON: expected ',' or ']', found the end of the file (column 318)"
    path.write_text('[{"text": "a"}] {}')
    assert refused(path) == "rows.json:1: invalid JSON: more text after the end of the list (column 17)"
    path.write_text('[{"text": "a"}, {"text": "' + "b" * 3 * MAX_LINE_BYTES)
    assert refused(path) == "rows.json:1: invalid JSON: the row is longer than 2 MB or never ends (column 17)"


def test_json_object_with_one_list_or_lines_under_the_name_json(tmp_path: Path, lines: Lines) -> None:
    assert entries(lines("rows.json", ROWS))[2] == ("rows.json:3", ROWS[2])
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1), encoding="utf-8")
    assert [record for _, record in entries(path)] == ROWS
    wanted = "rows.json: must be a list of rows, or an object that holds one list of rows; found"
    for content, found in (({"train": ROWS, "test": ROWS}, "lists under train, test"), (5, "a number without a list")):
        path.write_text(json.dumps(content))
        assert refused(path) == f"{wanted} {found}"


def test_csv_rows_carry_the_line_where_they_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,completion\r\n"one\r\nline",1\r\n\r\ntwo,"say ""2"""\r\nthree\r\nfour,4,5\r\n'
    )
    assert entries(path) == [
        ("rows.csv:2", {"prompt": "one\r\nline", "completion": "1"}),
        ("rows.csv:5", {"prompt": "two", "completion": 'say "2"'}),
        ("rows.csv:6", "has 1 cells; the header has 2"),
        ("rows.csv:7", "has 3 cells; the header has 2"),
    ]


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\na,1\nb\xff,1\nc,1\n")
    assert entries(path)[1][0] == "rows.csv:3"
    assert entries(path)[1][1] == "byte 0xff at byte 2 of the line is not UTF-8; save the file as UTF-8"
    path.write_bytes(b'text\n"never closed\nb\n')
    assert refused(path) == ("rows.csv:2: invalid CSV: unexpected end of data; the record that starts here has no end")
    path.write_bytes(b"text,text\na,b\n")
    assert refused(path) == "rows.csv:1: the header names 'text' more than once"
    path.write_bytes(b"prompt;completion\na;b\n")
    assert refused(path) == (
        "rows.csv:1: the header is one cell, 'prompt;completion': cells look separated by ';'; a .csv file by commas, "
        "a .tsv file by tabs"
    )
    path.write_bytes(b"t\xffxt\na\n")
    assert refused(path) == "rows.csv:1: byte 0xff at byte 2 of the line is not UTF-8; save the file as UTF-8"


def test_text_files_give_lines_or_blocks(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"one\r\ntwo\n\n\n  three\nfo\xffur\n\nfive")
    assert entries(path) == [
        ("rows.txt:1", {"text": "one"}),
        ("rows.txt:2", {"text": "two"}),
        ("rows.txt:5", {"text": "three"}),
        ("rows.txt:6", "byte 0xff at byte 3 of the line is not UTF-8; save the file as UTF-8"),
        ("rows.txt:8", {"text": "five"}),
    ]
    assert entries(path, blocks=True) == [
        ("rows.txt:1", {"text": "one\r\ntwo"}),
        ("rows.txt:5", "the block holds bytes that are not UTF-8; save the file as UTF-8"),
        ("rows.txt:8", {"text": "five"}),
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "content": f"{number}"}], "score": number / 2} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = entries(path)
    assert [record for _, record in found] == rows
    assert found[2999][0] == "rows.parquet[row 3000]"
    for broken in (b"PAR1 not really", b""):
        path.write_bytes(broken)
        said = refused(path)
        assert said.startswith("rows.parquet: is not a readable Parquet file: ") and "\n" not in said


def test_a_table_whose_notes_on_labels_are_damaged_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{"text": "a", "label": 0}])
    for notes in (b'{"info": null}', b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        pq.write_table(table.replace_schema_metadata({b"huggingface": notes}), path)
        with pytest.raises(DataError, match="is not a readable Parquet file"):
            list(read_file(path, named=True))


def test_broken_gzip_is_refused(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(lines("rows.jsonl", ROWS * 1000).read_bytes())
    for content in (whole[: len(whole) // 2], whole[:-6], b'{"text": "a"}\n', whole[:40] + b"\0\0\0" + whole[43:]):
        path.write_bytes(content)
        assert refused(path).startswith("rows.jsonl.gz: is not a whole gzip file: ")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "gzip data; name the file .gz"),
        (b"PK\x03\x04....", "a zip archive; unpack it"),
        (b"PAR1....", "Parquet data; name the file .parquet"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ],
)
def test_a_file_with_the_wrong_name_says_what_it_holds(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert refused(path) == f"rows.jsonl: holds {what}"


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.mkdir()
    assert refused(path) == "rows.jsonl: cannot be read: Is a directory"
