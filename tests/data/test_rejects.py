"""rejects.jsonl: whole or not at all, and in constant memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.data.report import Rejects
from alignkit.errors import DiskError


def test_places_become_file_and_line_or_row(tmp_path: Path) -> None:
    rejects = Rejects()
    rejects.add("data/a:b.jsonl:734", "text: is empty")
    rejects.add("data/a.parquet[row 12]", "text: is empty")
    rejects.add("builtin:reviews[row 3]", "line\nend é")
    rejects.add("somewhere", "odd")
    rejects.write(tmp_path / "rejects.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        {"file": "data/a:b.jsonl", "line": 734, "reason": "text: is empty"},
        {"file": "data/a.parquet", "row": 12, "reason": "text: is empty"},
        {"file": "builtin:reviews", "row": 3, "reason": "line\nend é"},
        {"file": "somewhere", "reason": "odd"},
    ]
    Rejects().write(tmp_path / "none.jsonl")  # nothing was left out: no file
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]


def test_rows_can_be_added_after_writing(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    rejects = Rejects()
    for number in range(1, 4):
        rejects.add(f"a.jsonl:{number}", "x" * 500_000)  # larger than what is held in memory
        rejects.write(path)
        assert len(path.read_text().splitlines()) == rejects.count == number


def test_a_place_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    rejects = Rejects()
    rejects.add("a.jsonl:1", "bad")
    path = tmp_path / "missing" / "rejects.jsonl"
    with pytest.raises(DiskError, match=r"missing: cannot write rejects.jsonl \(No such file or directory; "):
        rejects.write(path)
