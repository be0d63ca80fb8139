"""The Arrow file of tokenised rows."""

from __future__ import annotations

import resource
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.data.store import write_table
from alignkit.errors import DiskError

pa = pytest.importorskip("pyarrow")


def test_rows_come_back_with_ids_of_32_bits(tmp_path: Path) -> None:
    batches = [
        {"input_ids": [[1, 2, 3], []], "mask": [[True], [False]], "length": [3, 0], "score": [0.5, 1.0]},
        {"input_ids": [[50_000]], "mask": [[]], "length": [1], "score": [2.0]},
    ]
    table = write_table(tmp_path / "deep" / "train.arrow", iter(batches))
    assert table.column_names == ["input_ids", "mask", "length", "score"]
    assert table[:]["input_ids"] == [[1, 2, 3], [], [50_000]]
    assert table[:]["mask"] == [[True], [False], []]
    assert table.data.schema.field("input_ids").type == pa.list_(pa.int32())
    assert table.data.schema.field("length").type == pa.int64()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["train.arrow"]


def test_lists_of_lists_and_lists_without_items(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "t.arrow", [{"answers": [[[1], [2, 3]]], "none": [[]]}, {"answers": [[]], "none": [[7]]}]
    )
    assert table[:] == {"answers": [[[1], [2, 3]], []], "none": [[], [7]]}


def test_arrays_of_int32_make_the_very_file_that_lists_make(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [50_000, -100]]
    packed = [array("i", row) for row in rows]
    for name, values in {"lists": rows, "packed": packed, "mixed": [packed[0], *rows[1:]]}.items():
        write_table(
            tmp_path / name, [{"input_ids": values, "length": [3, 0, 2]}, {"input_ids": values[:1], "length": [3]}]
        )
    contents = {(tmp_path / name).read_bytes() for name in ("lists", "packed", "mixed")}
    assert len(contents) == 1


def test_other_columns_later_are_a_mistake_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ from the first batch"):
        write_table(tmp_path / "t.arrow", [{"a": [1]}, {"b": [1]}])
    with pytest.raises(ValueError, match="no rows to write"):
        write_table(tmp_path / "t.arrow", [])
    assert not list(tmp_path.iterdir())


def test_a_fault_while_reading_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_table(path, [{"a": [1]}])

    def broken() -> Iterator[dict[str, list[int]]]:
        yield {"a": [2]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, broken())
    assert write_table(tmp_path / "u.arrow", [{"a": [3]}])[:] == {"a": [3]}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["t.arrow", "u.arrow"]
    from datasets import Dataset

    assert Dataset.from_file(str(path))[:] == {"a": [1]}


def test_a_full_disk_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # a larger file fails as on a full disk
    try:
        with pytest.raises(DiskError, match=r"cannot write t\.arrow \(File too large; .* free\); nothing complete was"):
            write_table(tmp_path / "t.arrow", ({"a": [[number] * 1000] * 100} for number in range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_rows(tmp_path: Path) -> None:
    """Tables of 1,000,000 rows may take 24 MiB more than those of 300,000: buffers that fill up, and no row."""
    script = Path(__file__).with_name("million_rows.py")
    peaks = {}
    for count in (300_000, 1_000_000):
        command = [sys.executable, str(script), str(tmp_path), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        peaks[count] = int(done.stdout.splitlines()[-1])
    assert peaks[1_000_000] - peaks[300_000] < 24 * 1024, peaks
